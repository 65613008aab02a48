"""Which latents do languages share, and where are concept and output language decided?

    python -m experiments.cross_lingual --out runs/cross_lingual
    python -m experiments.cross_lingual --model FOLDER --sae FOLDER --languages '[English,Spanish]' --out runs/real

Facts are asked in parallel: the same pair of countries in every language. At each site, latents are ranked by
attribution in each language on `select`. Two languages share latents if their first k overlap more than one language's
do with latents of the other's firing frequency and size; two halves of one language's pairs are the ceiling. Transfer:
the first k of one language, patched in another on `report`, beside the own language's and matched latents. Then the
last token's state of one language and country is written into the prompt of another, at each layer: the concept (the
answer) and the language of the next word are scored apart. A stopped run continues when the same command is given
again.
"""

from collections.abc import Mapping, Sequence
from functools import partial
from itertools import permutations
from pathlib import Path
from random import Random

import numpy as np
from jaxtyping import Float

from saepatch.data.batches import batch_pairs
from saepatch.data.pairs import PromptPair
from saepatch.dictionaries.dictionary import Dictionary
from saepatch.dictionaries.loading import load_saes
from saepatch.engine.components import Edit
from saepatch.errors import UserError
from saepatch.measure.attribution import attribute
from saepatch.measure.controls import DRAWS, control_sets
from saepatch.measure.patching import patch_components
from saepatch.measure.quality import LatentStatistics, latent_statistics
from saepatch.model.language_model import LanguageModel
from saepatch.model.loading.load import load_model
from saepatch.model.sites import Site
from saepatch.organism import tasks, world
from saepatch.reading.cross_patch import CrossPatched, CrossQuery, Move, cross_patch
from saepatch.records.statistics import Interval, bootstrap_mean, wilson_share
from saepatch.runs.measurements import measurements
from saepatch.runs.ownership import check_owner

from ..common.kept import KeptResults, deciding
from ..real.stages.tasks import pair_metrics
from .capitals import CAPITAL, COUNTRIES
from .page import write
from .results import (
    FEWEST,
    CrossLingualConfig,
    CrossLingualResults,
    DepthOf,
    LanguageLatents,
    ParallelPairs,
    SharedLatents,
)

SPLITS = ("select", "report")


def organism_pairs(n: int, seed: int) -> ParallelPairs:
    """Parallel English and French pairs of the organism's tasks; countries are left out whose name is one in both."""
    made: dict[str, dict[str, tuple[PromptPair, ...]]] = {}
    left = {"subject spelt alike in both": 0, "not asked in both": 0}
    for split in SPLITS:
        by_answer: dict[str, dict[tuple[str, str], dict[str, str]]] = {}
        for language, task in (("English", "facts"), ("French", "facts_fr")):
            rows = [row for row in tasks.task(task, split, 10**6, seed) if row["kind"] != "landmark"]
            by_answer[language] = {(row["answer"], row["counter"]): row for row in rows}
        keys = []
        for key, row in by_answer["French"].items():
            if key not in by_answer["English"]:
                left["not asked in both"] += 1
            elif by_answer["English"][key]["subject"] in row["subject"]:
                left["subject spelt alike in both"] += 1
            else:
                keys.append(key)
        some = Random(f"{split}/{seed}").sample(keys, min(n, len(keys)))
        made[split] = {
            language: tuple(
                PromptPair(rows[key]["clean"], rows[key]["corrupted"], *key, f"{split}-{key[0]}-{key[1]}")
                for key in some
            )
            for language, rows in by_answer.items()
        }
    countries = {f" {country.capital}": country for country in world.FRENCH_COUNTRIES}
    keys = [(pair.answer, pair.counter) for pair in made["report"]["English"]]
    cut = {
        "English": tuple(
            (f"The capital of {countries[a].name}", f"The capital of {countries[b].name}") for a, b in keys
        ),
        "French": tuple((f"La capitale {countries[a].french}", f"La capitale {countries[b].french}") for a, b in keys),
    }
    return ParallelPairs(made, left, cut, {"English": " is", "French": " est"})


def written_pairs(model: LanguageModel, n: int, seed: int, languages: Sequence[str]) -> ParallelPairs:
    """Parallel pairs of capitals that differ between the languages, are one token, and are known to the model.

    Splits share no pair of countries.
    """
    left = {"answer spelt alike": 0, "not one token, or of unequal length": 0, "not known in every language": 0}
    made: dict[str, dict[str, tuple[PromptPair, ...]]] = {}
    apart = [c for c, names in COUNTRIES.items() if len({names[each][1] for each in languages}) == len(languages)]
    left["answer spelt alike"] = len(COUNTRIES) - len(apart)
    cells = list(permutations(apart, 2))
    Random(seed).shuffle(cells)
    for number, split in enumerate(SPLITS):
        fit: list[dict[str, PromptPair]] = []
        for one, other in cells[number :: len(SPLITS)]:
            each = {
                language: _capital_pair(language, number, one, other, f"{split}-{one}-{other}")
                for language in languages
            }
            try:
                for pair in each.values():
                    batch_pairs(model, [pair])
            except UserError:
                left["not one token, or of unequal length"] += 1
                continue
            fit.append(each)
        known = np.ones(len(fit), dtype=bool)
        for language in languages if fit else ():
            known &= pair_metrics(model, [each[language] for each in fit]).right
        left["not known in every language"] += int((~known).sum())
        kept = [each for each, right in zip(fit, known, strict=True) if right]
        made[split] = {language: tuple(each[language] for each in kept[:n]) for language in languages}
    copulas = {language: CAPITAL[language][1][1] for language in languages}
    cut = {
        language: tuple(
            (pair.clean.removesuffix(copulas[language]), pair.corrupted.removesuffix(copulas[language]))
            for pair in made["report"][language]
        )
        for language in languages
    }
    return ParallelPairs(made, left, cut, copulas)


def _capital_pair(language: str, number: int, one: str, other: str, example: str) -> PromptPair:
    beginning, copula = CAPITAL[language][number]
    names = [COUNTRIES[country][language] for country in (one, other)]
    clean, corrupted = ((beginning + copula).format(x=name) for name, _ in names)
    answer, counter = (f" {city}" for _, city in names)
    return PromptPair(clean, corrupted, answer, counter, example)


def first_latents(
    model: LanguageModel, dictionary: Dictionary, pairs: Mapping[str, Sequence[PromptPair]], k: int
) -> LanguageLatents:
    """The first k latents by mean attribution, for every language and half."""

    def first(some: Sequence[PromptPair]) -> tuple[int, ...]:
        edits, means = attribute(model, dictionary, some).means(each_position=False)
        order = np.argsort(-means, kind="stable").tolist()
        return tuple(edits[i].units[0] for i in order if edits[i].kind == "latent" and means[i] > 0)[:k]

    halves = {language: (first(some[::2]), first(some[1::2])) for language, some in pairs.items()}
    return LanguageLatents({language: first(some) for language, some in pairs.items()}, halves)


def overlap(one: Sequence[int], other: Sequence[int]) -> float:
    """Share of the first set that is in the second."""
    return len(set(one) & set(other)) / len(one) if one else float("nan")


def shared_latents(
    model: LanguageModel,
    dictionary: Dictionary,
    report: Mapping[str, Sequence[PromptPair]],
    ranked: LanguageLatents,
    languages: tuple[str, str],
    seed: int,
) -> SharedLatents:
    """What one language's first latents share with another's, and restore in it."""
    one, other = languages
    mine, theirs = ranked.first[one], ranked.first[other]
    if not mine or not theirs:
        raise UserError(f"no latent of {dictionary.site} has a positive effect in {one} or {other}: use another site")

    def statistics(language: str) -> LatentStatistics:
        texts = [text for pair in report[language] for text in (pair.clean, pair.corrupted)]
        return latent_statistics(model, dictionary, model.tokenize(texts))

    crossed = [(ranked.halves[one][i], ranked.halves[other][1 - i]) for i in (0, 1)]  # no pair of countries in both
    like_theirs = [control_sets(some, len(some), statistics(other), seed, DRAWS)[1] for _, some in crossed]
    _, like_mine = control_sets(mine, len(mine), statistics(other), seed, DRAWS)
    effects = _effects(model, dictionary, report[other], [theirs, mine, *like_mine])
    home = _effects(model, dictionary, report[one], [mine])
    return SharedLatents(
        overlap=float(np.mean([overlap(*each) for each in crossed])),
        chance=float(
            np.mean([overlap(own, some) for (own, _), sets in zip(crossed, like_theirs, strict=True) for some in sets])
        ),
        ceiling=overlap(*ranked.halves[one]),
        own=bootstrap_mean(effects[0]),
        transfer=bootstrap_mean(effects[1]),
        matched=bootstrap_mean(effects[2:].mean(0)),
        home=bootstrap_mean(home[0]),
    )


def _effects(
    model: LanguageModel, dictionary: Dictionary, pairs: Sequence[PromptPair], sets: Sequence[Sequence[int]]
) -> Float[np.ndarray, "sets pairs"]:
    """Normalised effect of each set, patched together from the clean prompt into the corrupted one."""
    edits = [Edit(dictionary.site, tuple(some), role="given") for some in sets]
    effects = patch_components(model, dictionary, pairs, edits)
    at = [effects.edits.index(edit) for edit in edits]
    return (effects.change[:, at] / effects.gap[:, None]).T


def depth(model: LanguageModel, parallel: ParallelPairs, one: str, other: str) -> DepthOf:
    """At which layer the last token's state carries the concept, and at which the language of the next word.

    The source is a prompt of the first language on another country, the target one of the second. The concept is
    scored by the target language's answer for the source's country, the language by the copulas before which both are
    cut: each wins where it is likelier than the target's own.
    """
    moves = [Move(Site(layer), Site(layer)) for layer in range(model.n_layers)]
    copulas, pairs = parallel.copulas, parallel.pairs["report"][other]
    texts = list(zip(parallel.cut[one], parallel.cut[other], strict=True))
    concept = [
        CrossQuery(source + copulas[one], target + copulas[other], pair.counter, pair.answer)
        for ((_, source), (target, _)), pair in zip(texts, pairs, strict=True)
    ]
    language = [CrossQuery(source, target, copulas[one], copulas[other]) for (_, source), (target, _) in texts]
    crossed = [cross_patch(model, queries, moves) for queries in (concept, language)]
    shares = [_shares(each) for each in crossed]
    return DepthOf(tuple(range(model.n_layers)), shares[0], shares[1], (_plain(crossed[0]), _plain(crossed[1])))


def _shares(result: CrossPatched) -> tuple[Interval, ...]:
    """By move, how often the wanted answer is likelier than the target's own."""
    rows = np.arange(len(result.queries))
    own = [query.own for query in result.queries]
    ahead = result.log_p[rows, :, result.places()] > result.log_p[rows, :, result.places(own)]
    return tuple(wilson_share(column.astype(float)) for column in ahead.T)


def _plain(result: CrossPatched) -> float:
    rows, own = np.arange(len(result.queries)), [query.own for query in result.queries]
    plain = result.plain_log_p
    return float((plain[rows, result.places()] > plain[rows, result.places(own)]).mean())


def main(config: CrossLingualConfig) -> None:
    out = Path(config.out)
    check_owner(out, "cross-lingual")
    model = load_model(config.model, config.device, config.dtype)
    saes = load_saes(config.sae, config.device) if config.sae else {}
    embedded = config.model == "organism"
    parallel = (
        organism_pairs(config.pairs, config.seed)
        if embedded
        else written_pairs(model, config.pairs, config.seed, config.languages)
    )
    if (fewest := min(len(some) for each in parallel.pairs.values() for some in each.values())) < FEWEST:
        left = ", ".join(f"{name}: {count}" for name, count in parallel.left_out.items())
        raise UserError(
            f"{fewest} parallel pairs fit {model.name}, fewer than {FEWEST} ({left}): use other languages, or another "
            "model"
        )
    decides = deciding(config, model, saes, ("out", "track", "device"))
    with measurements(out, "cross-lingual", decides) as kept_file:
        results = measure(config, model, saes, parallel, KeptResults(kept_file, {}))
    write(config, model, results)


def measure(
    config: CrossLingualConfig,
    model: LanguageModel,
    saes: Mapping[Site, Dictionary],
    parallel: ParallelPairs,
    kept: KeptResults,
) -> CrossLingualResults:
    both, shared = list(permutations(parallel.languages, 2)), dict[str, dict[str, SharedLatents]]()
    for site, dictionary in saes.items():
        find = partial(first_latents, model, dictionary, parallel.pairs["select"], config.latents)
        ranked = kept.get(f"first/{site}", LanguageLatents, find)
        shared[str(site)] = {}
        for one, other in both:
            compare = partial(
                shared_latents, model, dictionary, parallel.pairs["report"], ranked, (one, other), config.seed
            )
            shared[str(site)][_named(one, other)] = kept.get(f"shared/{site}/{one}/{other}", SharedLatents, compare)
    depths = {
        _named(one, other): kept.get(f"depth/{one}/{other}", DepthOf, partial(depth, model, parallel, one, other))
        for one, other in both
    }
    counts = {split: len(next(iter(each.values()))) for split, each in parallel.pairs.items()}
    return CrossLingualResults(counts, parallel.left_out, shared, depths)


def _named(one: str, other: str) -> str:
    return f"{one} → {other}"
