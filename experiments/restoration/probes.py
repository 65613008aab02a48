"""Results beside the curve: upper bounds by depth, importance of layers, held-out framings, utility."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from saepatch.model.sites import Site
from saepatch.records.statistics import Interval, bootstrap_mean, wilson_share
from saepatch.restoration.answering import Answered
from saepatch.restoration.restore import answer_log_probs, restorations
from saepatch.splicing.donors import Donor
from saepatch.splicing.splice import splice

from .curves import ENOUGH, choose, rank, share_of
from .runs import Latents, Restored, Runs
from .settings import PairedPrompts, Setting


@dataclass(frozen=True, eq=False)
class Depth:
    """Answers with everything restored up to a site: the whole residual, which bounds any latents, and all latents."""

    last: Site
    residual: Answered
    latents: Answered


def extended(setting: Setting, runs: Runs) -> Setting:
    """The setting, with layers added until the whole residual at the last of them restores refusals on `tune`.

    No latents of a site can do more than its whole residual. If no layer is enough, the sites stay as they are.
    """
    requests = setting.harmful["tune"]
    bare, donor = (
        float(answered.refused.mean())
        for answered in (
            runs.bare(setting, requests, name="tune: bare"),
            runs.donor(setting, requests, name="tune: donor"),
        )
    )
    for last in [site for site in setting.every if site >= max(setting.sites)]:
        only = {last: setting.every[last]}
        whole = runs.restored(setting, requests, Restored(f"tune: full residual at {last}", None, only, error=True))
        if float(whole.refused.mean()) - bare >= ENOUGH * (donor - bare):
            sites = {site: dictionary for site, dictionary in setting.every.items() if site <= last}
            return setting if last in setting.sites else replace(setting, sites=sites)
    return setting


def depths(setting: Setting, runs: Runs) -> list[Depth]:
    """Upper bounds by depth, at all sites with dictionaries, not only those of the setting."""
    requests, by_depth = setting.harmful["report"], []
    for last in setting.every:
        sites = {site: dictionary for site, dictionary in setting.every.items() if site <= last}
        only = {last: sites[last]}  # it overwrites all that earlier sites change
        residual = runs.restored(setting, requests, Restored(f"full residual at {last}", None, only, error=True))
        by_depth.append(
            Depth(last, residual, runs.restored(setting, requests, Restored(f"all latents to {last}", None, sites)))
        )
    return by_depth


@dataclass(frozen=True, eq=False)
class Layer:
    """Answers with only the chosen latents of one site restored, and with all but those."""

    site: Site
    latents: int
    alone: Answered
    without: Answered


def layers(setting: Setting, top: Latents, runs: Runs) -> list[Layer]:
    requests, by_site = setting.harmful["report"], []
    for site in setting.sites:
        mine = {site: top[site]} if site in top else {}
        others = {other: ids for other, ids in top.items() if other != site}
        by_site.append(
            Layer(
                site,
                len(top.get(site, ())),
                runs.restored(setting, requests, Restored(f"only {site}", mine)),
                runs.restored(setting, requests, Restored(f"without {site}", others)),
            )
        )
    return by_site


@dataclass(frozen=True)
class HeldOut:
    """Results on framings of other kinds than those that latents and their number were chosen on."""

    name: str
    prompts: int
    bare: Interval
    donor: Interval
    restored: Interval
    latents: tuple[int, ...]


def held_out(setting: Setting, top: Latents, sizes: Sequence[int], refusal_ids: set[int], runs: Runs) -> list[HeldOut]:
    """Results on the setting's held-out prompts, and on each half of the kinds with all choices made on the other."""
    results = []
    for name, requests in setting.held_out.items():
        runs_of = (
            runs.bare(setting, requests, name=f"{name}: bare"),
            runs.donor(setting, requests, name=f"{name}: donor"),
            runs.restored(setting, requests, Restored(f"{name}: top", top)),
        )
        bare, donor, restored = (share_of([answered]) for answered in runs_of)
        results.append(HeldOut(name, len(requests), bare, donor, restored, (sum(map(len, top.values())),)))
    report = setting.harmful["report"]
    kinds = sorted(set(report.kinds))
    if len(kinds) < 2:
        return results
    flags: dict[str, list[np.ndarray]] = {"bare": [], "donor": [], "restored": []}
    used = []
    for half in (kinds[::2], kinds[1::2]):
        others = [kind for kind in kinds if kind not in half]
        ranked = rank(setting, setting.harmful["select"].of_kinds(others), refusal_ids, runs)
        name = f"{' and '.join(half)} held out"
        choice = choose(setting, ranked, setting.harmful["tune"].of_kinds(others), sizes, runs, f"tune, {name}")
        requests = report.of_kinds(half)
        used.append(choice.latents)
        chosen = ranked.top(choice.latents, choice.ranking)
        flags["bare"].append(runs.bare(setting, requests, name=f"{name}: bare").refused)
        flags["donor"].append(runs.donor(setting, requests, name=f"{name}: donor").refused)
        flags["restored"].append(runs.restored(setting, requests, Restored(f"{name}: top", chosen)).refused)
    bare, donor, restored = (_pooled(flags[key]) for key in ("bare", "donor", "restored"))
    return [*results, HeldOut("kinds of framing held out", len(report), bare, donor, restored, tuple(used))]


def _pooled(parts: Sequence[np.ndarray]) -> Interval:
    return wilson_share(np.concatenate(parts).astype(float))


@dataclass(frozen=True)
class Utility:
    """The cost of restoration on harmless prompts; divergences are over the bare model's answers, in nats per token."""

    refused_bare: Interval
    refused: Interval
    degenerate: Interval
    kl: Interval
    ce_bare: Interval
    ce: Interval

    @property
    def rise(self) -> float:
        """Increase in the share of harmless prompts refused."""
        return self.refused.value - self.refused_bare.value


def utility(
    setting: Setting,
    requests: PairedPrompts,
    top: Latents,
    name: str,
    runs: Runs,
    donor: Donor | None = None,
    positions: str = "all",
) -> Utility:
    """Refusals of harmless prompts, KL(bare ‖ restored), and the cross-entropy of the bare model's answers."""
    bare = runs.bare(setting, requests, harmful=False, name=f"{name}: bare")
    restored = runs.restored(
        setting, requests, Restored(f"{name}: restored", top, harmful=False, donor=donor, positions=positions)
    )
    model = setting.model
    answers = model.continue_ids(requests.prompts, runs.tokens, len(requests))
    spoken = [number for number, answer in enumerate(answers) if answer]
    some = PairedPrompts(
        *(tuple(column[i] for i in spoken) for column in (requests.prompts, requests.clean, requests.kinds))
    )
    given = [answers[i] for i in spoken]
    plain = answer_log_probs(model, some.prompts, given)
    edits = restorations(setting.sites, donor or setting.donor(some), top, positions)
    with splice(model, [setting.sites[edit.site] for edit in edits if isinstance(edit.site, Site)], edits):
        edited = answer_log_probs(model, some.prompts, given)
    kl, before, after = [], [], []
    for p, q, answer in zip(plain, edited, given, strict=True):
        kl.append(float((p.exp() * (p - q)).sum(-1).double().mean()))
        before.append(-float(p[range(len(answer)), answer].double().mean()))
        after.append(-float(q[range(len(answer)), answer].double().mean()))
    return Utility(
        refused_bare=share_of([bare]),
        refused=share_of([restored]),
        degenerate=wilson_share(restored.are("degenerate").astype(float)),
        kl=bootstrap_mean(np.array(kl)),
        ce_bare=bootstrap_mean(np.array(before)),
        ce=bootstrap_mean(np.array(after)),
    )


def by_kind(setting: Setting, answered: Answered) -> Mapping[str, float]:
    """Share of prompts refused by kind of framing."""
    kinds = setting.harmful["report"].kinds
    return {
        kind: float(np.mean([flag for flag, its_kind in zip(answered.refused, kinds, strict=True) if its_kind == kind]))
        for kind in sorted(set(kinds))
    }
