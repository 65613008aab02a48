"""Stage "restoration": a behaviour that one prompt suppresses is restored, latent by latent, from one that asks for it.

After an example of a translation, a label asks for French or for English. While the model answers the prompt with the
English label, latents at the label's colon and at all generated tokens are overwritten with those of the run on the
prompt with the French label, which reads the same generated tokens. Latents are ranked on `select`, the site is chosen
on `tune`.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

from saepatch.dictionaries.bases import directions_of, units_of
from saepatch.dictionaries.dictionary import Dictionary
from saepatch.errors import UserError
from saepatch.measure.baselines import difference_of_means
from saepatch.measure.controls import control_sets
from saepatch.measure.quality import latent_statistics
from saepatch.model.language_model import LanguageModel
from saepatch.model.sites import Site
from saepatch.records.statistics import Interval, bootstrap_mean, wilson_share
from saepatch.restoration.ranking import find_safety_latents
from saepatch.restoration.restore import restore
from saepatch.splicing.donors import CleanPrompts

from ...common.kept import KeptResults
from ...steering.concepts import words_judge
from ..settings import RealConfig
from .texts import ENGLISH_WORDS, FRENCH_WORDS, translations

SIZES = (1, 4, 16, 64)  # numbers of latents that are restored together
LEAST = 0.3  # smallest difference between the shares of answers in French after the two prompts
TEMPLATE = 1  # tokens at the end of prompts that are restored: the colon
SUPPRESSED, ASKED, WHOLE = "nothing", "the asking prompt itself", "the whole site"
RANDOM, MATCHED, DENSE, DIMENSIONS, NEURONS = (
    "random latents", "matched latents", "difference of means", "residual dimensions", "neurons of all layers up to it"
)  # fmt: skip

Ids = Mapping[str, tuple[int, ...]]  # units by the name of their site
Sets = Sequence[Mapping[Site, tuple[int, ...]] | None]  # units that are restored together; None: all
Make = Callable[[], Mapping[Site, Dictionary]]  # makes the dictionaries only where they are needed

_more_french = words_judge(FRENCH_WORDS.split(), ENGLISH_WORDS.split())


def in_french(text: str) -> bool:
    """Whether the first line of an answer has more French function words than English ones."""
    return _more_french(text.strip().split("\n")[0])


@dataclass(frozen=True)
class RankedUnits:
    """The first units of a ranking by site, for each size; and control sets of the largest size, by role."""

    first: Mapping[str, Ids]
    controls: Mapping[str, tuple[tuple[int, ...], ...]]


@dataclass(frozen=True)
class DrawnAnswers:
    """Answers to the prompts of a split under one condition; several draws are one after the other."""

    texts: tuple[str, ...]

    def shown(self, prompts: int) -> np.ndarray:
        """Share of draws that answer in French [prompts]."""
        return np.array([in_french(text) for text in self.texts], dtype=float).reshape(-1, prompts).mean(0)


@dataclass(frozen=True, eq=False)
class RestoredBehaviour:
    """Answers on `report` by condition; those of latents are named by their number. `latents` are the first of the
    ranking, `d_sae` the size of the dictionary."""

    site: str
    d_sae: int
    prompts: int
    latents: tuple[int, ...]
    answers: Mapping[str, DrawnAnswers]

    def share(self, condition: str) -> Interval:
        return wilson_share(self.answers[condition].shown(self.prompts))

    def beyond(self, condition: str, other: str) -> Interval:
        """Share of answers in French under one condition minus that under another, paired by prompt."""
        return bootstrap_mean(self.answers[condition].shown(self.prompts) - self.answers[other].shown(self.prompts))

    @property
    def most(self) -> str:
        """The condition with the most latents."""
        return top_name(max(k for k in SIZES if top_name(k) in self.answers))


def top_name(k: int) -> str:
    return f"{k} latent{'s' if k > 1 else ''}"


@dataclass(frozen=True, eq=False)
class Restorer:
    """The model, its prompts, and answers that are kept by name."""

    config: RealConfig
    model: LanguageModel
    kept: KeptResults

    def prompts(self, split: str) -> tuple[tuple[str, ...], tuple[str, ...]]:
        """The asking and the suppressing prompts."""
        pairs = translations(split)[: self.config.prompts]
        return tuple(asking for asking, _ in pairs), tuple(suppressing for _, suppressing in pairs)

    def plain(self, split: str, condition: str) -> DrawnAnswers:
        """Answers without restoration, to the suppressing prompts or to the asking ones."""
        prompts = self.prompts(split)[condition == SUPPRESSED]
        measure = partial(self.model.generate, prompts, self.config.new_tokens)
        return self.kept.get(f"restoration/{split}/{condition}", DrawnAnswers, lambda: DrawnAnswers(tuple(measure())))

    def answers(self, split: str, name: str, make: Make, sets: Sets, error: bool = False) -> DrawnAnswers:
        """Answers to the suppressing prompts with each of several sets of units restored."""
        asking, suppressing = self.prompts(split)

        def measure() -> DrawnAnswers:
            dictionaries, texts = make(), list[str]()
            for units in sets:
                used = [each for site, each in dictionaries.items() if units is None or site in units]
                texts += restore(
                    self.model, used, suppressing, CleanPrompts(asking, TEMPLATE), units, error=error,
                    max_new_tokens=self.config.new_tokens,
                )  # fmt: skip
            return DrawnAnswers(tuple(texts))

        return self.kept.get(f"restoration/{split}/{name}", DrawnAnswers, measure)

    def completions(self) -> list[list[int]]:
        """Token ids of the donor's answers on `select`, which both runs read when units are ranked."""
        measure = partial(self.model.continue_ids, self.prompts("select")[0], self.config.new_tokens)
        return self.kept.value("restoration/select/completions", measure)

    def rank(self, dictionaries: Mapping[Site, Dictionary], with_controls: bool) -> RankedUnits:
        """Rank units by their change between the two prompts, times the norm of what they write."""
        asking, suppressing = self.prompts("select")
        donor = CleanPrompts(asking, TEMPLATE)
        scores = find_safety_latents(self.model, list(dictionaries.values()), suppressing, donor, self.completions())
        most = sum(int((each > 0).sum()) for each in scores.change.values())
        statistics = None
        if with_controls:  # of one dictionary
            (dictionary,) = dictionaries.values()
            statistics = latent_statistics(self.model, dictionary, [*asking, *suppressing])
            most = min(most, int(statistics.alive.sum()) // 2)
        if not most:
            raise UserError(f"no unit of {', '.join(map(str, dictionaries))} differs between the prompts")
        sizes = [k for k in SIZES if k <= most] or [most]
        first = {str(k): {str(site): ids for site, ids in scores.top(k).items()} for k in sizes}
        if statistics is None:
            return RankedUnits(first, {})
        (ranking,) = first[str(sizes[-1])].values()
        sets = control_sets(ranking, len(ranking), statistics, self.config.seed, self.config.draws)
        return RankedUnits(first, dict(zip((RANDOM, MATCHED), map(tuple, sets), strict=True)))

    def ranked(self, name: str, make: Make, with_controls: bool = False) -> RankedUnits:
        return self.kept.get(f"restoration/ranking/{name}", RankedUnits, lambda: self.rank(make(), with_controls))

    @torch.no_grad()
    def dense(self, site: Site) -> Dictionary:
        """The direction from the suppressing to the asking run's mean on `select`, as a dictionary of one unit."""
        completions, means = self.completions(), []
        for prompts in self.prompts("select"):
            rows = [[*self.model.encode(text), *answer] for text, answer in zip(prompts, completions, strict=True)]
            x = self.model.capture(self.model.pad(rows, "left"), [site])[site]
            means.append(torch.cat([row[-TEMPLATE - len(own) :] for row, own in zip(x, completions, strict=True)]))
        direction = difference_of_means(means[0], means[1], site)
        return directions_of(direction.rows.to(self.model.device, self.model.dtype), site, DENSE)

    def of_latents(self, site: Site, dictionary: Dictionary, ranked: RankedUnits) -> dict[str, DrawnAnswers]:
        """Answers on `report` with latents and with their controls restored, and with the whole site."""
        name, own = f"{site} {dictionary.fingerprint}", {site: dictionary}
        chosen: Make = partial(dict, own)
        answers = {}
        for k, by_site in ranked.first.items():
            sets: Sets = [{site: by_site[str(site)]}]
            answers[top_name(int(k))] = self.answers("report", f"top {k}/{name}", chosen, sets)
        for role, drawn in ranked.controls.items():
            sets = [{site: ids} for ids in drawn]
            answers[role] = self.answers("report", f"{role}/{name}", chosen, sets)
        answers[WHOLE] = self.answers("report", f"{WHOLE}/{site}", chosen, [None], error=True)
        return answers

    def of_others(self, site: Site, k: str) -> dict[str, DrawnAnswers]:
        """Answers on `report` with the dense direction, and as many residual dimensions and neurons, restored."""
        answers = {DENSE: self.answers("report", f"{DENSE}/{site}", lambda: {site: self.dense(site)}, [None])}
        others = {DIMENSIONS: [site]}
        every = self.model.layout.all_sites
        if neurons := [each for each in every if each.stream == "neurons" and each.layer <= site.layer]:
            others[NEURONS] = neurons
        for name, sites in others.items():
            units = partial(_units, self.model, sites)
            first = self.ranked(f"{name}/{site}", units).first
            chosen = {Site.parse(each): ids for each, ids in first.get(k, first[list(first)[-1]]).items()}
            answers[name] = self.answers("report", f"{name}/{site}/{k}", units, [chosen])
        return answers


def _units(model: LanguageModel, sites: Sequence[Site]) -> dict[Site, Dictionary]:
    return {site: units_of(model, site) for site in sites}


def restoration(
    config: RealConfig, model: LanguageModel, saes: Mapping[Site, Dictionary], kept: KeptResults
) -> RestoredBehaviour | str:
    """Restore answers in French; the reason where the model does not answer in the language that is asked for."""
    restorer = Restorer(config, model, kept)
    prompts = len(restorer.prompts("report")[0])
    answers = {condition: restorer.plain("report", condition) for condition in (SUPPRESSED, ASKED)}
    nothing, asked = (answers[condition].shown(prompts).mean() for condition in (SUPPRESSED, ASKED))
    if not asked >= nothing + LEAST:
        return (
            f"{asked:.0%} of the answers are in French where French is asked for, and {nothing:.0%} where English is, "
            "so there is little to restore"
        )
    ranked, success = {}, {}
    for site, dictionary in saes.items():
        name = f"{site} {dictionary.fingerprint}"
        ranked[site] = restorer.ranked(f"latents/{name}", partial(dict, {site: dictionary}), with_controls=True)
        most = list(ranked[site].first)[-1]
        sets: Sets = [{site: ranked[site].first[most][str(site)]}]
        on_tune = restorer.answers("tune", f"top {most}/{name}", partial(dict, {site: dictionary}), sets)
        success[site] = np.mean([in_french(text) for text in on_tune.texts])
    best = max(success, key=lambda site: success[site])
    most = list(ranked[best].first)[-1]
    answers |= restorer.of_latents(best, saes[best], ranked[best]) | restorer.of_others(best, most)
    return RestoredBehaviour(str(best), saes[best].d_sae, prompts, ranked[best].first[most][str(best)], answers)
