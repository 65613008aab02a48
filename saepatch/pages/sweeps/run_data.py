"""The data of a page, read from the folder of a run of `patch` or `attribute`."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from numpy import ndarray

from saepatch.errors import UserError
from saepatch.measure.results.effects import CONTROLS
from saepatch.pages.cards import anchors_of
from saepatch.pages.gather import READING
from saepatch.pages.sweeps.maps import EditTable, PromptTokens
from saepatch.reading.cards import Card
from saepatch.report import EstimateCell
from saepatch.runs.catalogue import RunFolder, read_json, read_run
from saepatch.runs.lookup import read_merged
from saepatch.runs.parts import KEYS, EditKey, Pairs, RowChanges

EXACT = ("top", "random")  # roles of a screen's verified nodes


@dataclass(frozen=True, eq=False)
class RunData:
    """A run's rows, pairs, summary and, where present, `reading.json`: prompts token by token, and cards."""

    folder: RunFolder
    pairs: Pairs
    changes: RowChanges
    provenance: dict[str, str]
    reading: dict[str, Any] | None
    cards: tuple[Card, ...]

    @property
    def summary(self) -> dict[str, Any]:
        return self.folder.summary

    @cached_property
    def settings(self) -> dict[str, Any]:
        return self.folder.settings

    @cached_property
    def is_screen(self) -> bool:
        return self.folder.work == "attribute"

    @property
    def sizes(self) -> bool:
        """Whether effects are magnitudes without a sign, as from GradDrop."""
        return self.is_screen and self.settings.get("method") == "graddrop"

    @property
    def metric(self) -> str:
        return str(self.settings["metric"]).replace("_", " ")

    @property
    def directions(self) -> list[str]:
        return list(self.summary["screens" if self.is_screen else "top"])

    @property
    def gap(self) -> float:
        """The mean gap, the denominator of effects; NaN where it is too small."""
        return abs(self.pairs.mean_gap) if self.sizes else self.pairs.mean_gap

    def own(self, direction: str) -> list[int]:
        """The edits of a direction without controls (in a screen: the estimates)."""
        return [
            number
            for number, key in enumerate(self.changes.keys)
            if key.direction == direction and (key.role == "single" if self.is_screen else key.role not in CONTROLS)
        ]

    @cached_property
    def effects(self) -> Float[ndarray, "edits"]:
        """Each edit's effect as a share of the mean gap of all pairs."""
        return self.changes.totals / len(self.pairs.examples) / self.gap

    def effects_of(self, pair: int) -> tuple[Float[ndarray, "edits"], Bool[ndarray, "edits"]]:
        """Each edit's effect as a share of one pair's gap, and whether it changed anything in that pair."""
        mine = self.changes.pair == pair
        effects = np.zeros(len(self.changes.keys))
        ran = np.zeros(len(effects), dtype=bool)
        gap = self.pairs.usable_gap[pair]
        effects[self.changes.key[mine]] = self.changes.change[mine] / (abs(gap) if self.sizes else gap)
        ran[self.changes.key[mine]] = True
        return effects, ran

    def intervals(self, numbers: Sequence[int], seed: int | None = None) -> list[EstimateCell]:
        """Ratios of means with intervals over pairs, with the same bootstrap draws as the summary."""
        n, changes = len(self.pairs.examples), self.changes
        values = [float(self.effects[number]) for number in numbers]
        if n < 2 or self.gap != self.gap:
            return [EstimateCell(value, None, None) for value in values]
        bootstrap = self.pairs.bootstrap(int(self.settings["seed"]) if seed is None else seed, self.sizes)
        out = []
        for number, value in zip(numbers, values):
            mine, change = self._rows_of(number), np.zeros(n)
            change[changes.pair[mine]] = changes.change[mine]
            drawn = bootstrap.of(change)
            low, high = (None if np.isnan(end) else end for end in (drawn.low, drawn.high))
            out.append(EstimateCell(value, low, high, drawn.reason))
        return out

    def _rows_of(self, number: int) -> Int[ndarray, "rows"]:
        order, starts = self._grouped
        return order[starts[number] : starts[number + 1]]

    @cached_property
    def _grouped(self) -> tuple[Int[ndarray, "rows"], Int[ndarray, "starts"]]:
        order = np.argsort(self.changes.key, kind="stable")
        counts = np.bincount(self.changes.key, minlength=len(self.changes.keys))
        return order, np.concatenate([[0], np.cumsum(counts)]).astype(np.int64)

    @cached_property
    def q(self) -> dict[EditKey, float]:
        """False discovery rates of the edits in the summary, which were computed over all edits."""
        if self.is_screen:
            return {}
        return {
            EditKey(*(str(line[name]) for name in KEYS)): line["q"]
            for top in self.summary["top"].values()
            for line in top
            if line["q"] is not None
        }

    @cached_property
    def anchors(self) -> dict[tuple[str, str], str]:
        """Anchors of the cards by (site, latent)."""
        return anchors_of(self.cards)

    @cached_property
    def edits(self) -> EditTable:
        """All edits, with their effects over all pairs."""
        return EditTable(self.changes.keys, self.effects, self.changes.counts, self.intervals)

    def tokens(self, pair: int | None) -> PromptTokens:
        """The tokens of one pair's prompts; None: those that all pairs share."""
        if self.reading is None:
            return PromptTokens()
        prompts = self.reading["prompts"]
        sides = prompts["shared"] if pair is None else prompts["first"][pair]
        return PromptTokens(sides["clean"], sides.get("corrupted", ()), prompts["same_length"])


def read_run_data(out: Path) -> RunData:
    """Read a finished run's folder; no model is loaded.

    Raises:
        UserError: there is no finished run of `patch` or `attribute`, or a file is damaged.
    """
    run = read_run(out)
    if run.work not in ("patch", "attribute"):
        raise UserError(f"{str(out)!r} holds no run of patch or attribute: give the folder of one")
    reading = read_json(out / READING) if (out / READING).exists() else None
    pairs, changes, provenance = _read_rows(out, run.settings["min_gap"])
    try:
        cards = tuple(map(Card.read, reading["latents"])) if reading else ()
    except (KeyError, TypeError) as error:
        raise UserError(
            f"{out / READING} is of another version of saepatch ({error}): write it again with saepatch report "
            f"{out} --read"
        ) from error
    return RunData(run, pairs, changes, provenance, reading, cards)


def _read_rows(out: Path, min_gap: float) -> tuple[Pairs, RowChanges, dict[str, str]]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    pairs, changes = read_merged(out, min_gap)
    try:
        first = next(
            pq.ParquetFile(out / "results.parquet").iter_batches(1, columns=["seed", "versions", "command"]), None
        )
    except (OSError, pa.ArrowException) as error:
        raise UserError(f"cannot read the rows in {str(out)!r} ({error}): merge the run again") from error
    provenance: dict[str, str] = {}
    if first is not None and len(first):
        row = first.to_pylist()[0]
        versions = json.loads(row["versions"])
        provenance = {"seed": str(row["seed"]), "command": row["command"]}
        provenance["versions"] = ", ".join(f"{name} {version}" for name, version in versions.items())
    return pairs, changes, provenance
