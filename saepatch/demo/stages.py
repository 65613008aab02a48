"""The stages of the demo. Choices that apply to all prompts are made on `select` and `tune`; figures are from `report`.

The exception: the patching stage ranks latents for each report prompt by that prompt's gradients, and compares this
with one fixed set chosen on `select`.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saepatch.data.batches import batch_pairs
from saepatch.data.pairs import PromptPair, load_pairs, pairs_of
from saepatch.demo import concepts
from saepatch.demo.results import Condition, Patching, RestoredRefusals, Steering
from saepatch.dictionaries.dictionary import Dictionary
from saepatch.engine.components import PATCH_DIRECTIONS
from saepatch.measure.attribution import integrated_gradients
from saepatch.measure.controls import DRAWS, control_sets, differing_sets, random_latents
from saepatch.measure.curves import PairRanking, effect_curve, effect_curve_by_pair
from saepatch.measure.patching import patch_latents
from saepatch.measure.quality import LatentStatistics
from saepatch.model.language_model import LanguageModel
from saepatch.model.sites import Site
from saepatch.organism import tasks, world
from saepatch.records.statistics import Interval, wilson_share
from saepatch.restoration.restore import change_scores, first_tokens, judge, refused_first_token, restore
from saepatch.splicing.donors import CleanPrompts
from saepatch.splicing.interventions import Ablate, Intervention, Patch
from saepatch.splicing.splice import record_latents, splice
from saepatch.steering.contrasts import contrast, latent_means
from saepatch.steering.generate import Concept, Steered, equal_norm_steer, generate_steered

SIZES = (1, 2, 4, 8, 16, 32, 64)
SHARE_LIMIT = 0.05  # maximal share of the dictionary that is restored
ANSWER_TOKENS = 24
STRENGTHS = (0.5, 1.0, 1.5, 2.0, 4.0)


def patching(
    model: LanguageModel, dictionary: Dictionary, stats: LatentStatistics, n: int, seed: int, bars: bool = False
) -> Patching:
    """Patch the latents of one site on `report` in both directions: each separately, and the top ones together."""
    select = load_pairs("ioi", "select", n, seed)
    report = load_pairs("ioi", "report", n, seed)
    fixed = _ranked(integrated_gradients(model, dictionary, select)[0].mean(0))
    own = [_ranked(row) for row in integrated_gradients(model, dictionary, report)[0]]
    singles = [patch_latents(model, dictionary, report, direction=d, progress=bars) for d in PATCH_DIRECTIONS]
    rankings = [PairRanking(*each) for each in zip(own, singles[0].ran, strict=True)]
    curves = [
        effect_curve_by_pair(
            model, dictionary, report, rankings, SIZES, stats, seed, direction=direction, progress=bars
        )
        for direction in PATCH_DIRECTIONS
    ]
    return Patching(
        site=str(dictionary.site),
        pairs=len(report),
        clean=float(singles[0].clean.mean()),
        corrupted=float(singles[0].corrupted.mean()),
        denoise=curves[0],
        noise=curves[1],
        fixed=effect_curve(model, dictionary, report, fixed, SIZES, stats, seed=seed),
        singles=(singles[0], singles[1]),
        self_patch_error=self_patch_error(model, dictionary, report),
        dictionary=dictionary,
    )


def _ranked(scores: Float[Tensor, "d_sae"]) -> list[int]:
    return scores.argsort(descending=True, stable=True)[: max(SIZES)].tolist()


def self_patch_error(model: LanguageModel, dictionary: Dictionary, pairs: Sequence[PromptPair]) -> float:
    """Largest absolute logit change when every latent and the error term are patched with the run's own values."""
    worst = 0.0
    for pair in pairs[:16]:
        tokens = batch_pairs(model, [pair]).clean
        with splice(model, dictionary, Patch(record_latents(model, dictionary, tokens), error=True)):
            patched = model.next_logits(tokens)
        worst = max(worst, float((patched - model.next_logits(tokens)).abs().max()))
    return worst


@dataclass(frozen=True, eq=False)
class _Refusals:
    """Share of prompts that a model refuses, by the first token of its answer."""

    model: LanguageModel
    dictionary: Dictionary
    tokens: set[int]  # first tokens of refusals

    def restored(self, pairs: Sequence[PromptPair], *sets: Sequence[int]) -> Interval:
        """With latents restored at the last prompt position, averaged over sets of latents."""
        flags = [refused_first_token(self.model, self.dictionary, pairs, self.tokens, latents) for latents in sets]
        return wilson_share(np.mean(flags, 0))

    def opened(self, prompts: Sequence[str], intervention: Intervention | None = None) -> Interval:
        """Of plain prompts, with or without an intervention."""
        with splice(self.model, self.dictionary, intervention) if intervention is not None else nullcontext():
            top = self.model.next_logits(self.model.tokenize(prompts)).argmax(-1)
        return wilson_share(np.array([int(token) in self.tokens for token in top], dtype=float))


def _judged(*answers: Sequence[str], outcome: str = "refuse") -> Interval:
    """Share of whole answers with an outcome, averaged over draws for each prompt."""
    return wilson_share(np.mean([[judge(text) == outcome for text in texts] for texts in answers], 0))


def restoration(
    model: LanguageModel, dictionary: Dictionary, stats: LatentStatistics, n: int, seed: int
) -> RestoredRefusals:
    """Rank latents by change score on `select`, choose their number on `tune`, restore them on `report`."""
    select, tune, report = (_refusal_pairs(split, n, seed, harmful=True) for split in world.SPLITS)
    harmless = _refusal_pairs("report", n, seed, harmful=False)
    refusals = _Refusals(model, dictionary, _refusal_tokens(model, report))
    order = change_scores(model, dictionary, select).argsort(descending=True, stable=True).tolist()
    sizes = [k for k in SIZES if k <= int(SHARE_LIMIT * dictionary.d_sae)]
    k = next((k for k in sizes if refusals.restored(tune, order[:k]).value >= 0.98), sizes[-1])
    chosen = order[:k]
    random, matched = control_sets(order, k, stats, seed)
    restored = _restored(model, dictionary, report, chosen)
    by_random = [_restored(model, dictionary, report, draw) for draw in random]
    jailbroken, spared = ([pair.corrupted for pair in pairs] for pairs in (report, harmless))
    plain = model.generate(jailbroken, ANSWER_TOKENS)
    refusing = Ablate(chosen, _mean_at_last(model, dictionary, select)[chosen], positions="last")
    everything = refused_first_token(model, dictionary, report, refusals.tokens, None, error=True)
    rates = {
        "clean": refusals.opened([pair.clean for pair in report]),
        "jailbroken": refusals.opened(jailbroken),
        "jailbroken_generated": _judged(plain),
        "restored": refusals.restored(report, chosen),
        "restored_generated": _judged(restored),
        "restored_degenerate_generated": _judged(restored, outcome="degenerate"),
        "random": refusals.restored(report, *random),
        "random_generated": _judged(*by_random),
        "matched": refusals.restored(report, *matched),
        "differing": wilson_share(_refused_differing(refusals, report, order, k, seed)),
        "whole_site": wilson_share(np.array(everything, dtype=float)),
        "harmless": refusals.opened(spared),
        "harmless_restored": refusals.restored(harmless, chosen),
        "harmless_restored_generated": _judged(_restored(model, dictionary, harmless, chosen)),
        "harmless_clamped": refusals.opened(spared, refusing),
    }
    controls = {size: control_sets(order, size, stats, seed)[0] for size in sizes}
    return RestoredRefusals(
        site=str(dictionary.site),
        latents=tuple(chosen),
        share_of_dictionary=k / dictionary.d_sae,
        share_of_alive=k / int(stats.alive.sum()),
        share_of_active=k / float(stats.frequency.sum()),
        rates=rates,
        curve=tuple(
            (size, refusals.restored(report, order[:size]), refusals.restored(report, *controls[size]))
            for size in sizes
        ),
        examples=tuple(zip(jailbroken[:6], plain[:6], restored[:6], by_random[0][:6], strict=True)),
        donors=tuple(pair.clean for pair in report[:6]),
    )


def _refused_differing(
    refusals: _Refusals, pairs: Sequence[PromptPair], order: Sequence[int], k: int, seed: int
) -> Float[np.ndarray, "pairs"]:
    """For each pair, the share of draws that refuse when `k` random latents that differ in the pair are restored."""
    model, dictionary = refusals.model, refusals.dictionary
    shares = []
    for number, pair in enumerate(pairs):
        batch = batch_pairs(model, [pair])
        clean, jailbroken = (record_latents(model, dictionary, t).acts[0, -1] for t in (batch.clean, batch.corrupted))
        sets = differing_sets(order, k, (clean != jailbroken).cpu().numpy(), seed + number)
        shares.append(refusals.restored([pair], *sets).value)
    return np.array(shares)


def _restored(
    model: LanguageModel, dictionary: Dictionary, pairs: Sequence[PromptPair], latents: Sequence[int]
) -> list[str]:
    """Answers to jailbroken prompts with latents restored from the clean prompts, from the last prompt position on."""
    donor = CleanPrompts(tuple(pair.clean for pair in pairs))
    return restore(model, dictionary, [pair.corrupted for pair in pairs], donor, latents, max_new_tokens=ANSWER_TOKENS)


def _mean_at_last(model: LanguageModel, dictionary: Dictionary, pairs: Sequence[PromptPair]) -> Float[Tensor, "d_sae"]:
    """Mean latents at the last position of the clean prompts."""
    return latent_means(model, dictionary, model.tokenize([pair.clean for pair in pairs]), "last").mean(0)


def choose_safety_site(model: LanguageModel, saes: Mapping[Site, Dictionary], n: int, seed: int) -> Dictionary:
    """The earliest site where restoring `SHARE_LIMIT` of the latents makes the model refuse 95 % of `tune` prompts.

    If there is none, the site with the largest share of refusals.
    """
    select, tune = (_refusal_pairs(split, n, seed, harmful=True) for split in ("select", "tune"))
    refusal = _refusal_tokens(model, tune)
    shares = {}
    for site, dictionary in saes.items():
        order = change_scores(model, dictionary, select).argsort(descending=True, stable=True).tolist()
        limit = int(SHARE_LIMIT * dictionary.d_sae)
        flags = refused_first_token(model, dictionary, tune, refusal, order[:limit])
        shares[site] = sum(flags) / len(flags)
        if shares[site] >= 0.95:
            return dictionary
    return saes[max(shares, key=lambda site: shares[site])]


def _refusal_tokens(model: LanguageModel, pairs: Sequence[PromptPair]) -> set[int]:
    return first_tokens(model, pairs[0].clean, [f" {text}" for text in world.REFUSAL_OPENINGS])


def _refusal_pairs(split: str, n: int, seed: int, harmful: bool) -> list[PromptPair]:
    # about half of the rows are harmful, so draw more than needed
    rows = [row for row in tasks.refusal(split, 3 * n, seed) if row["harmful"] == harmful]
    return pairs_of(rows[:n])


def chosen_concepts(model: LanguageModel, n: int, seed: int) -> list[Concept]:
    """Refusal of harmless requests, and the sentiment that is rarer in the model's own reviews."""
    return [concepts.refusal(n, seed), concepts.sentiment(model, n, seed)]


def steering(
    model: LanguageModel, dictionary: Dictionary, stats: LatentStatistics, concept: Concept, seed: int
) -> Steering:
    """Choose latents by contrast on `select` and their strength on `tune`, then generate on `report`."""
    scores = contrast(model, dictionary, concept.present, concept.absent, concept.positions)
    scores = torch.where(stats.alive.to(scores.device), scores, torch.full_like(scores, -torch.inf))
    order = scores.argsort(descending=True, stable=True).tolist()
    norm = float(stats.reach[order[0]])
    plans = {
        "top1": [tuple(order[:1])],
        "top10": [tuple(order[:10])],
        "random": random_latents(stats.alive, order[:10], 1, DRAWS, seed),
        "random10": random_latents(stats.alive, order[:10], 10, DRAWS, seed),
    }

    def run(prompts: tuple[str, ...], latents: Sequence[int], strength: float) -> Steered:
        steer = equal_norm_steer(dictionary, latents, stats.maximum, norm, strength, concept.positions)
        return generate_steered(model, dictionary, prompts, steer, concept.shown, ANSWER_TOKENS)

    bare = generate_steered(model, dictionary, concept.report, None, concept.shown, ANSWER_TOKENS)
    conditions = [Condition("unsteered", (), 0.0, (bare,))]
    every: list[Condition] = []
    for name, sets in plans.items():
        tried = [
            Condition(name, tuple(sets), strength, tuple(run(concept.tune, latents, strength) for latents in sets))
            for strength in STRENGTHS
        ]
        best = max(tried, key=lambda condition: (condition.success, -condition.perplexity))
        outcomes = tuple(run(concept.report, latents, best.strength) for latents in sets)
        conditions.append(replace(best, outcomes=outcomes))
        every += tried
    return Steering(
        concept.name, str(dictionary.site), concept.positions, concept.report, tuple(conditions), tuple(every)
    )
