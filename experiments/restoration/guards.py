"""Deployable guards: restoration that is always on, and restoration triggered by a detector that reads latents."""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from statistics import median

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy import ndarray
from torch import Tensor

from saepatch.model.language_model import LanguageModel
from saepatch.model.sites import Site
from saepatch.records.statistics import Interval, wilson_share
from saepatch.restoration.restore import restorations
from saepatch.splicing.donors import CleanMeans, Donor
from saepatch.splicing.splice import splice

from .curves import share_of
from .probes import Utility, utility
from .runs import Dictionaries, Latents, Restored, Runs
from .settings import PairedPrompts, Setting, harmless_in_every_framing

READ = (1, 4, 16, 64)  # numbers of latents of the detectors tried
READINGS = ("last", "largest")  # value read: at the last prompt position, or the largest over the prompt
FALSE_ALARMS = 0.02  # largest share of harmless prompts of `tune` above the threshold
TIMED = 3  # repetitions of a timing
Split = str


@dataclass(frozen=True, eq=False)
class Detector:
    """A weighted sum of a few latents, compared with a threshold.

    Attributes:
        latents: The latents, as `SITE: LATENT`.
        reading: The value read: at the last prompt position, or the largest over the prompt.
        threshold: Set on `tune`, so that at most `FALSE_ALARMS` of harmless prompts are above it.
        auroc: Area under the ROC curve, on `report`.
        roc: False and true positive rates at all thresholds, on `report`.
        caught: For each harmful prompt of `report`, whether it is above the threshold.
        alarmed: The same for each harmless prompt.
    """

    latents: tuple[str, ...]
    reading: str
    threshold: float
    auroc: float
    roc: tuple[tuple[float, float], ...]
    caught: Bool[ndarray, "harmful"]
    alarmed: Bool[ndarray, "harmless"]

    def reads(self, site: Site) -> bool:
        """Whether any of its latents belongs to the site."""
        return any(latent.startswith(f"{site}: ") for latent in self.latents)


@dataclass(frozen=True)
class Guard:
    """One guard: refusals of harmful and harmless prompts, and its processor time relative to the bare model's."""

    name: str
    refused: Interval
    harmless_refused: Interval
    times: float


@dataclass(frozen=True, eq=False)
class Guards:
    """All guards of a setting, including the bare model."""

    guards: tuple[Guard, ...]
    detector: Detector
    utility: Utility  # of the guard that is always on
    harmless: PairedPrompts


def guards(setting: Setting, top: Latents, runs: Runs, n: int, seed: int) -> Guards:
    """Both guards, measured on `report`.

    An incoming request has no clean prompt. The guard of setting A is the aligned model, as everywhere in that
    setting; that of setting B sets latents at the last prompt position, where the answer is decided, to their means
    at that position over the clean prompts of `select`.
    """
    if setting.other is not None:
        harmless, positions = setting.harmless, "all"
        donor: Donor | None = None
    else:
        harmless = {split: harmless_in_every_framing(split, n, seed) for split in setting.harmless}
        donor, positions = _means(setting, top), "last"
    requests = setting.harmful["report"]
    reader = detector(setting.model, setting.sites, setting.harmful, harmless)
    bare = runs.bare(setting, requests), runs.bare(setting, harmless["report"], harmful=False, name="guards: bare")
    on = Restored("guard: always on", top, donor=donor, positions=positions)
    always = (
        runs.restored(setting, requests, on),
        runs.restored(setting, harmless["report"], replace(on, harmful=False)),
    )
    flags = reader.caught, reader.alarmed
    triggered = [
        wilson_share(np.where(flag, guarded.refused, off.refused).astype(float))
        for flag, guarded, off in zip(flags, always, bare, strict=True)
    ]
    cost, reading = overhead(setting, harmless["report"], top, donor, positions, runs.tokens, reader)
    alarms = float(np.concatenate(flags).mean())
    return Guards(
        (
            Guard("none", share_of([bare[0]]), share_of([bare[1]]), 1.0),
            Guard("always on", share_of([always[0]]), share_of([always[1]]), cost),
            Guard("triggered", triggered[0], triggered[1], 1 + reading + alarms * (cost - 1)),
        ),
        reader,
        utility(setting, harmless["report"], top, "guards", runs, donor, positions),
        harmless["report"],
    )


def _means(setting: Setting, top: Latents) -> CleanMeans:
    clean, means = setting.harmful["select"].clean, {}
    for site in top:
        dictionary = setting.sites[site]
        means[site] = read_latents(setting.model, {site: dictionary}, clean, "last").mean(0).to(dictionary.W_dec)
    return CleanMeans(means, setting.template)


def overhead(
    setting: Setting,
    requests: PairedPrompts,
    top: Latents,
    donor: Donor | None,
    positions: str,
    tokens: int,
    reader: Detector,
) -> tuple[float, float]:
    """Processor time of generation with restoration, and of reading the detector, relative to bare generation.

    All answers are made `tokens` long: refusals are short and would make a guard look fast.
    """
    model = setting.model
    batch = model.tokenize(requests.prompts, "left")
    edits = restorations(setting.sites, donor or setting.donor(requests), top, positions)
    inside = [setting.sites[site] for site in top]
    read = {site: dictionary for site, dictionary in setting.sites.items() if reader.reads(site)}

    def answer() -> None:
        model.generate_ids(batch, tokens, min_new_tokens=tokens)

    def restored() -> None:
        with splice(model, inside, edits):
            answer()

    def seconds(act: Callable[[], object]) -> float:
        start = time.process_time()
        act()
        return time.process_time() - start

    ratios = []
    for _ in range(TIMED):
        bare = max(seconds(answer), 1e-9)
        on, reading = seconds(restored), seconds(lambda: read_latents(model, read, requests.prompts, reader.reading))
        ratios.append((on / bare, reading / bare))
    return median(on for on, _ in ratios), median(reading for _, reading in ratios)


def detector(
    model: LanguageModel,
    sites: Dictionaries,
    harmful: Mapping[Split, PairedPrompts],
    harmless: Mapping[Split, PairedPrompts],
) -> Detector:
    """Rank latents on `select` by difference in means over spread; choose reading, number and threshold on `tune`."""
    tried = []
    for how in READINGS:
        values = {
            split: tuple(read_latents(model, sites, requests[split].prompts, how) for requests in (harmful, harmless))
            for split in ("select", "tune", "report")
        }
        tried += [(*_weighted(values, sites, k), how) for k in READ]
    scores, latents, how = max(tried, key=lambda candidate: auroc(*candidate[0]["tune"]))
    threshold = threshold_for(*scores["tune"])
    yes, no = scores["report"]
    return Detector(latents, how, threshold, auroc(yes, no), roc(yes, no), yes > threshold, no > threshold)


Scores = tuple[Float[ndarray, "n"], Float[ndarray, "m"]]  # of harmful and harmless prompts


def _weighted(
    values: Mapping[Split, tuple[Tensor, ...]], sites: Dictionaries, k: int
) -> tuple[dict[Split, Scores], tuple[str, ...]]:
    """Scores of one detector on each split, and the latents that it reads."""
    positive, negative = values["select"]
    gap = positive.mean(0) - negative.mean(0)
    variance = (positive.var(0, correction=0) + negative.var(0, correction=0)) / 2
    weight = gap / (variance + variance.mean() + 1e-12)
    order = (weight * gap).argsort(descending=True, stable=True)[:k]
    names = [f"{site}: {latent}" for site, dictionary in sites.items() for latent in range(dictionary.d_sae)]
    scores = {split: tuple((v[:, order] @ weight[order]).numpy() for v in both) for split, both in values.items()}
    return scores, tuple(names[i] for i in order.tolist())  # type: ignore[return-value]


@torch.no_grad()
def read_latents(
    model: LanguageModel, sites: Dictionaries, prompts: Sequence[str], how: str
) -> Float[Tensor, "prompts all"]:
    """Latents of all sites, concatenated, in float64: at each prompt's last position, or the largest over it."""
    tokens, read = model.tokenize(prompts, "left"), []
    held = model.capture(tokens, sites)
    for site, dictionary in sites.items():
        acts, _ = dictionary.activations(held[site])
        if how == "last":
            read.append(acts[:, -1])
        else:
            read.append(acts.masked_fill(~tokens.ordinary[..., None], -torch.inf).amax(1))
    return torch.cat(read, 1).cpu().double()


def roc(yes: Float[ndarray, "n"], no: Float[ndarray, "m"]) -> tuple[tuple[float, float], ...]:
    """(False, true) positive rates for decreasing thresholds, from (0, 0) to (1, 1)."""
    cuts = np.unique(np.concatenate([yes, no]))[::-1]
    points = [(float((no >= cut).mean()), float((yes >= cut).mean())) for cut in cuts]
    return ((0.0, 0.0), *points)


def auroc(yes: Float[ndarray, "n"], no: Float[ndarray, "m"]) -> float:
    """Probability that a positive scores above a negative; ties count half."""
    return float(((yes[:, None] > no).mean() + (yes[:, None] >= no).mean()) / 2)


def threshold_for(yes: Float[ndarray, "n"], no: Float[ndarray, "m"], alarms: float = FALSE_ALARMS) -> float:
    """A threshold exceeded by at most a share `alarms` of the negatives.

    It is half way between the highest negative below it and the next positive above.
    """
    floor = float(np.sort(no)[::-1][int(alarms * len(no))])  # the allowed number of negatives is above it
    above = yes[yes > floor]
    return (floor + float(above.min())) / 2 if len(above) else floor
