"""Settings and results of the study of two-hop facts."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from random import Random

import numpy as np
from jaxtyping import Float, Int

from saepatch.errors import UserError
from saepatch.model.language_model import LanguageModel
from saepatch.model.sites import Site
from saepatch.reading.cosine_lens import Mention, cosine_lens
from saepatch.reading.cross_patch import CrossPatched, Move
from saepatch.records.statistics import Interval, bootstrap_mean, wilson_share
from saepatch.tracking.open import read_spec

WRONG = 20  # random wrong answers of each question, for the null of a maximum


@dataclass(frozen=True)
class TwoHopConfig:
    """Ask why questions of two hops fail or succeed: cosine lens, cross-, back- and forward-patching."""

    out: str = "runs/two_hop"
    """Folder for summary.json, report.html, results.parquet and config.yaml."""
    model: str = "organism"
    """The embedded model, a folder, or a Hugging Face id."""
    sae: str = "organism"
    """Dictionaries whose latents are moved: organism, or a folder with one sub-folder per site; empty: none."""
    queries: int = 24
    """Maximum number of questions, or pairs of prompts, of each kind and split."""
    layer_step: int = 1
    """States are moved from and to every so many layers."""
    latents: int = 16
    """Number of latents that are moved."""
    device: str = "cpu"
    """Where to run."""
    dtype: str = "float32"
    """Precision of the model."""
    seed: int = 0
    """Seed of the choice of questions, of random latents and of wrong answers."""
    track: str = "none"
    """Trackers besides the local log, separated by commas: none, wandb, wandb:offline, wandb:online, trackio."""

    def __post_init__(self) -> None:
        read_spec(self.track)
        if self.queries < 6 or min(self.layer_step, self.latents) < 1:
            raise UserError(
                f"queries = {self.queries}, layer_step = {self.layer_step}, latents = {self.latents}: use at least 6, "
                "1 and 1"
            )


@dataclass(frozen=True, eq=False)
class KeptSweep:
    """The arrays of a `CrossPatched`, and how many pairs were left out, by reason."""

    answers: tuple[str, ...]
    log_p: Float[np.ndarray, "queries moves answers"]
    likeliest: Int[np.ndarray, "queries moves"]
    plain_log_p: Float[np.ndarray, "queries answers"]
    plain_likeliest: Int[np.ndarray, "queries"]
    ids: Int[np.ndarray, "queries answers"]


@dataclass(frozen=True, eq=False)
class MoveSweep:
    """One kind of moves on both splits: what was moved, from and to where."""

    name: str
    split: Mapping[str, CrossPatched]
    left_out: Mapping[str, int]

    @property
    def report(self) -> CrossPatched:
        return self.split["report"]

    def among(self, back: bool | None = None) -> list[int]:
        """The moves to an earlier site (back), to a later one (False), or all."""
        orders = [(move.read.order, move.write.order) for move in self.report.moves]
        return [i for i, (read, write) in enumerate(orders) if back is None or (read > write if back else read < write)]

    def chosen(self, back: bool | None = None) -> tuple[Move, Interval]:
        """The best of these moves on `select`, ties broken by the answer's probability, and its share on `report`."""
        mine, select = self.among(back), self.split["select"]
        p = np.exp(select.log_p[np.arange(len(select.queries)), :, select.places()]).mean(0)
        score = select.given().mean(0) + 1e-3 * p
        best = mine[int(score[mine].argmax())]
        return self.report.moves[best], self.report.share(best)

    def any_of(self, back: bool, seed: int) -> tuple[Interval, Interval, Interval]:
        """Share of questions that some move repairs; of wrong answers that some move yields; and their difference."""
        mine, patched = self.among(back), self.report
        hits = patched.given()[:, mine].any(1).astype(float)
        random, null = Random(seed), np.zeros(len(hits))
        for _ in range(WRONG):
            wrong = [random.choice([a for a in patched.answers if a not in (q.wanted, q.own)]) for q in patched.queries]
            null += patched.given(wrong)[:, mine].any(1)
        null /= WRONG
        return wilson_share(hits), wilson_share(null), bootstrap_mean(hits - null, seed=seed)


@dataclass(frozen=True, eq=False)
class LensAt:
    """The cosine lens of one form of the bridge at one position of the questions on `report`."""

    sites: tuple[str, ...]
    nearest: tuple[Interval, ...]
    alignment: tuple[float, ...]
    cohesion: tuple[float, ...]
    chance: float

    @classmethod
    def measured(
        cls,
        model: LanguageModel,
        mentions: Mapping[str, Sequence[Mention]],
        held_out: Mapping[str, Sequence[Mention]],
        sites: Sequence[Site],
    ) -> "LensAt":
        lens = cosine_lens(model, mentions, held_out, sites)
        means = [tuple(values.mean(1).tolist()) for values in (lens.alignment, lens.cohesion)]
        nearest = tuple(lens.share_nearest())
        return cls(tuple(map(str, lens.sites)), nearest, means[0], means[1], 1 / len(lens.entities))


@dataclass(frozen=True, eq=False)
class HopShares:
    """Shares of questions of `report` answered right, by kind, and answered with the bridge."""

    composed: Interval
    recalled: Interval | None
    bridge: Interval


@dataclass(frozen=True)
class MovedLatents:
    """Shares of questions that take over the source's answer, from one site of the last token into the same site."""

    whole: Interval
    chosen: Interval
    random: Interval
    unpatched: Interval


@dataclass(frozen=True, eq=False)
class TwoHopResults:
    """All results of the study."""

    asked: Mapping[str, int]
    left_out: Mapping[str, int]
    shares: HopShares
    lenses: Mapping[str, LensAt]
    sweeps: Sequence[MoveSweep]
    latents: Mapping[str, MovedLatents]
