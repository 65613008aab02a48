"""Does a jailbreak suppress the latents of refusal, amplify others, or both?

    python -m experiments.jailbreak --out runs/jailbreak

Harmful requests are compared in a jailbreak framing and in a benign one of equal length, over the benign run's own
refusals. Latents that the jailbreak suppresses are restored from the benign run, those that it amplifies are ablated,
and both; each half's number is chosen on `tune`. Controls are random and matched sets of as many latents. In the other
direction, each half of the jailbreak is carried into the benign run, which refuses. All edits act from the assistant's
turn on. Splits share no framing, and the nested framings occur in no choice at all. CC-Delta (a paired test of each
latent, shifted back by its mean difference, at the site and strength that are best on `tune`) stands in the same table.
A stopped run continues when the same command is given again.
"""

from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from saepatch import organism
from saepatch.dictionaries.loading import load_saes
from saepatch.measure.quality import LatentStatistics, latent_statistics
from saepatch.model.language_model import LanguageModel
from saepatch.model.loading.load import load_model
from saepatch.model.sites import Site
from saepatch.organism import world
from saepatch.records.statistics import bootstrap_mean
from saepatch.restoration.answering import Answered
from saepatch.restoration.context_shift import ContextShift, find_context_shift
from saepatch.restoration.ranking import find_safety_latents
from saepatch.restoration.restore import answer_log_probs, assistant_header, first_tokens, restorations
from saepatch.runs.measurements import measurements
from saepatch.runs.ownership import check_owner
from saepatch.splicing.donors import CleanPrompts
from saepatch.splicing.interventions import Ablate
from saepatch.splicing.splice import Interventions, splice

from ..common.kept import KeptResults, deciding
from ..restoration.curves import ENOUGH, control_latents
from ..restoration.settings import PairedPrompts, Setting, two_prompts
from .page import write
from .results import BOTH, DONE, HALVES, SHIFT, Cost, JailbreakConfig, JailbreakResults, RankedHalves, ShiftChoice

SIZES = (1, 2, 4, 8, 16, 32, 64)
Latents = Mapping[Site, tuple[int, ...]]
STRENGTHS = (1.0, 2.0, 4.0)  # of CC-Delta


@dataclass(frozen=True, eq=False)
class _JailbreakRun:
    config: JailbreakConfig
    setting: Setting
    refusal_ids: set[int]
    kept: KeptResults

    @property
    def model(self) -> LanguageModel:
        return self.setting.model

    def find(self) -> RankedHalves:
        """Rank both halves on `select`."""
        some = self.setting.harmful["select"]
        donor = CleanPrompts(some.clean, self.setting.template)
        scores = find_safety_latents(
            self.model, self.setting.sites, some.prompts, donor, max_new_tokens=self.config.tokens
        )
        shift = self.shift()
        ranked, total = {}, sum(float(v.abs().sum()) for v in scores.signed.values())
        share = {}
        for half, sign in (("suppressed", 1), ("amplified", -1)):
            signed = {site: sign * value for site, value in scores.signed.items()}
            top = replace(scores, signed=signed).top(SIZES[-1], "signed")
            pairs = [(float(signed[site][latent]), str(site), latent) for site, ids in top.items() for latent in ids]
            ranked[half] = tuple((site, latent) for _, site, latent in sorted(pairs, key=lambda each: -each[0]))
            share[half] = sum(float(value.clamp(min=0).sum()) for value in signed.values()) / total
        significant = {h: sum(map(len, shift.significant(s).values())) for h, s in zip(HALVES, (1, -1), strict=True)}
        active = sum(int((~np.isnan(q)).sum()) for q in shift.q.values())
        return RankedHalves(ranked, share, significant, active)

    def shift(self) -> ContextShift:
        some = self.setting.harmful["select"]
        return find_context_shift(self.model, self.setting.sites, some.prompts, some.clean, self.setting.template)

    def chosen_shift(self) -> ShiftChoice:
        """The site, strength and positions with which CC-Delta does most on `tune`; ties: by refusal score."""
        some, shift, tried = self.setting.harmful["tune"], self.shift(), []
        for site in shift.significant():
            for strength in STRENGTHS:
                for in_answer in (True, False):
                    edits = list(shift.undone([site], strength, in_answer=in_answer))
                    answered = self.answers(f"tune/shift/{site}/{strength}/{in_answer}", some, edits)
                    merit = float(answered.refused.mean()), float(np.mean(answered.scores))
                    tried.append((merit, ShiftChoice(str(site), strength, in_answer)))
        return max(tried, key=lambda each: each[0])[1]

    def edits(self, some: PairedPrompts, restored: Latents | None, ablated: Latents | None) -> Interventions:
        """Restore some latents from the clean prompts, ablate others."""
        setting = self.setting
        made: list[Any] = []
        if restored:
            made += restorations(setting.sites, CleanPrompts(some.clean, setting.template), restored)
        for site, ids in (ablated or {}).items():
            ends = (slice(-setting.template, None), "generated")
            made += [Ablate(ids, positions=positions, site=site) for positions in ends]
        return made

    def answers(self, name: str, some: PairedPrompts, edits: Interventions) -> Answered:
        return self.kept.get(f"answers/{name}", Answered, partial(self._answers, some, edits))

    def _answers(self, some: PairedPrompts, edits: Interventions) -> Answered:
        sites = self._sites(edits)
        with splice(self.model, sites, edits) if sites else nullcontext():
            return Answered.by(self.model, some.prompts, self.config.tokens, self.refusal_ids)

    def _sites(self, edits: Interventions) -> list[Any]:
        assert isinstance(edits, list)
        return [d for site, d in self.setting.sites.items() if any(each.site == site for each in edits)]

    def size(self, ranked: RankedHalves, half: str) -> int:
        """The fewest latents that bring `ENOUGH` of the gap in refusals back on `tune`, or those that do most."""
        some = self.setting.harmful["tune"]
        clean = replace(some, prompts=some.clean)
        bare, donor = (float(self.answers(f"tune/{name}", each, []).refused.mean()) for name, each in
                       (("nothing", some), ("benign", clean)))  # fmt: skip
        rates = []
        for k in SIZES:
            top = ranked.top(half, k)
            edits = self.edits(some, top, None) if half == "suppressed" else self.edits(some, None, top)
            answered = self.answers(f"tune/{half}/{k}", some, edits)
            rates.append((float(answered.refused.mean()), float(np.mean(answered.scores))))
        enough = [k for k, (rate, _) in zip(SIZES, rates, strict=True) if rate - bare >= ENOUGH * (donor - bare) > 0]
        return enough[0] if enough else SIZES[max(range(len(SIZES)), key=lambda i: rates[i])]

    def controls(self, top: Latents) -> dict[str, list[dict[Site, tuple[int, ...]]]]:
        """Random and matched sets with as many latents at each site as a half has."""
        some = self.setting.harmful["select"]
        tokens = self.model.tokenize(organism.texts()), self.model.tokenize([*some.prompts, *some.clean])
        over: list[dict[Site, LatentStatistics]] = [
            {site: latent_statistics(self.model, self.setting.sites[site], each) for site in top} for each in tokens
        ]
        sets = control_latents(top, (over[0], over[1]), self.config.draws, self.config.seed)
        return dict(zip(("random", "matched"), sets, strict=True))

    def conditions(
        self, some: PairedPrompts, halves: Mapping[str, Latents], shift: ShiftChoice
    ) -> dict[str, list[Interventions]]:
        """The interventions on some prompts, several draws each for controls."""
        one, other = (halves[half] for half in HALVES)
        made: dict[str, list[Interventions]] = {
            "nothing": [[]],
            DONE["suppressed"]: [self.edits(some, one, None)],
            DONE["amplified"]: [self.edits(some, None, other)],
            BOTH: [self.edits(some, one, other)],
            SHIFT: [list(self.shift().undone([Site.parse(shift.site)], shift.strength, in_answer=shift.in_answer))],
        }
        return made

    def cost(self, some: PairedPrompts, edits: Interventions) -> Cost:
        model = self.model
        answers = model.continue_ids(some.prompts, self.config.tokens, len(some))
        plain = answer_log_probs(model, some.prompts, answers)
        with splice(model, self._sites(edits), edits):
            edited = answer_log_probs(model, some.prompts, answers)
        kl = [float((p.exp() * (p - q)).sum(-1).double().mean()) for p, q in zip(plain, edited, strict=True)]
        return Cost(bootstrap_mean(np.array(kl)))


def measure(run: _JailbreakRun) -> JailbreakResults:
    ranked = run.kept.get("halves", RankedHalves, run.find)
    sizes = {half: run.size(ranked, half) for half in HALVES}
    halves = {half: ranked.top(half, sizes[half]) for half in HALVES}
    report, harmless = run.setting.harmful["report"], run.setting.harmless["report"]
    answers: dict[str, dict[str, list[Answered]]] = {}

    def ask(name: str, some: PairedPrompts, conditions: Mapping[str, Sequence[Interventions]]) -> None:
        answers[name] = {
            condition: [run.answers(f"{name}/{condition}/{i}", some, edits) for i, edits in enumerate(several)]
            for condition, several in conditions.items()
        }

    shift = run.chosen_shift()
    conditions = run.conditions(report, halves, shift)
    for half in HALVES:
        for kind, sets in run.controls(halves[half]).items():
            name = f"{kind}, as many as {half}"
            restores = half == "suppressed"
            conditions[name] = [run.edits(report, s if restores else None, None if restores else s) for s in sets]
    benign = replace(report, prompts=report.clean)
    ask("jailbroken", report, conditions)
    ask("benign", benign, {"nothing": [[]]})
    carried = PairedPrompts(report.clean, report.prompts, report.kinds)  # the jailbreak as the donor
    both = {site: tuple({*halves["suppressed"].get(site, ()), *halves["amplified"].get(site, ())})
            for site in {**halves["suppressed"], **halves["amplified"]}}  # fmt: skip
    for name, top in (*halves.items(), (BOTH, both)):
        answers["benign"][f"{name} as in the jailbreak"] = [
            run.answers(f"benign/{name}/0", carried, run.edits(carried, top, None))
        ]
    ask("harmless", harmless, run.conditions(harmless, halves, shift))
    (nested,) = run.setting.held_out.values()
    ask("nested", nested, run.conditions(nested, halves, shift))
    costs = {
        name: run.kept.get(f"costs/{name}", Cost, partial(run.cost, harmless, edits)).kl
        for name, (edits,) in run.conditions(harmless, halves, shift).items()
        if name != "nothing"
    }
    return JailbreakResults(ranked, sizes, shift, answers, costs)


def main(config: JailbreakConfig) -> None:
    out = Path(config.out)
    check_owner(out, "jailbreak")
    model, saes = load_model("organism"), load_saes(config.sae)
    header = assistant_header(model)
    assert header is not None  # the embedded model's chat template opens an assistant's turn
    setting = two_prompts(model, saes, header, config.prompts, config.seed)
    refusal_ids = first_tokens(model, world.chat("a"), [f" {text}" for text in world.REFUSAL_OPENINGS])
    with measurements(out, "jailbreak", deciding(config, model, saes)) as kept:
        results = measure(_JailbreakRun(config, setting, refusal_ids, KeptResults(kept, {})))
    write(config, setting, results)
