"""What a sweep found: the metric under every edit of every pair, normalised, with intervals, controls and rows."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray

from saepatch.engine.components import Edit, PatchDirection
from saepatch.errors import UserError
from saepatch.measure.gaps import PairGaps, towards_source
from saepatch.records.rows import Row
from saepatch.records.statistics import (
    Interval,
    about_sets,
    bootstrap_mean,
    false_discovery,
    sign_flip_test,
    studentised_max_test,
    why_no_q,
)
from saepatch.records.tables import text_table

CONTROLS = ("random", "matched", "differing")
UNTESTED = "no q: no edit changes something in two pairs, so nothing was tested"
NOTHING = "differs in 0: the same in both runs of every pair, so there was nothing to patch: 0 is no evidence"
WHOLE = ("stream", "error")  # kinds of component that have one unit, so it goes without a name
ROUNDING = 1e-4  # of the mean gap: passes of differently made batches differ by less than this in float32


@dataclass(frozen=True, eq=False)
class Effects(PairGaps):
    """What each edit does to the metric, for every pair.

    `patched[pair, edit]` is the metric under the edit. Denoising patches the clean run's values into the corrupted run
    (are they sufficient?), noising the other way round (are they necessary?). `ran` is false where the two runs have
    the same values, so the edit is nothing and `patched` is the base run's own value. Where a corruption makes several
    corrupted runs of a pair, values are means over them.
    """

    direction: PatchDirection
    metric: str
    positions: str
    edits: tuple[Edit, ...]
    examples: tuple[str, ...]
    clean: Float[ndarray, "pairs"]
    corrupted: Float[ndarray, "pairs"]
    patched: Float[ndarray, "pairs edits"]
    ran: Bool[ndarray, "pairs edits"]
    min_gap: float = 1e-2
    corruption: str = ""  # what made the corrupted runs, where it was not the pairs' corrupted prompts
    rounding: float = ROUNDING
    method: str = "exact"

    def __post_init__(self) -> None:
        if not self.min_gap > 0:
            raise UserError(f"min_gap = {self.min_gap}: use a number above 0, such as 0.01")

    @cached_property
    def change(self) -> Float[ndarray, "pairs edits"]:
        """How far each edit moves the metric from the base run towards the source run, in the metric's units."""
        return towards_source(self.patched, self.clean[:, None], self.corrupted[:, None], self.direction == "denoise")

    @property
    def normalised(self) -> Float[ndarray, "pairs edits"]:
        """`change / gap`, not clipped: 0 is the base run, 1 the source run; NaN where |gap| < `min_gap`."""
        return self.change / self.usable_gap[:, None]

    def where(self, role: str) -> list[int]:
        """Indices of the edits of one role."""
        return [i for i, edit in enumerate(self.edits) if edit.role == role]

    def _index(self, edit: Edit | int) -> int:
        return edit if isinstance(edit, (int, np.integer)) else self.edits.index(edit)

    def of(self, edit: Edit | int, seed: int = 0) -> Interval:
        """Ratio of means of one edit (or the one at an index), with its interval over pairs: the headline effect.

        NaN where the mean gap is smaller than `min_gap`.
        """
        return self.ratio(self.change[:, self._index(edit)], seed)

    def mean_of_ratios(self, edit: Edit | int, seed: int = 0) -> Interval:
        """Mean of the per-pair normalised effects, pairs with too small a gap left out."""
        return bootstrap_mean(self.normalised[:, self._index(edit)], seed=seed)

    def controls(self, edit: Edit | int, role: str, seed: int = 0) -> Interval | None:
        """The same for the mean over an edit's controls ("random" or "matched"); None where there are none.

        The interval is over pairs, for these sets: `about_sets` says what so few sets show.
        """
        columns = self._control_columns(edit, role)
        return self.ratio(self.change[:, columns].mean(1), seed) if columns else None

    def _control_columns(self, edit: Edit | int, role: str) -> list[int]:
        mine = self.edits[self._index(edit)]
        return [
            i
            for i, other in enumerate(self.edits)
            if (other.role, other.kind, other.place, other.position) == (role, mine.kind, mine.place, mine.position)
            if (other.beside_key == mine.key if other.beside else len(other.units) == len(mine.units))
        ]

    def ratios(self) -> Float[ndarray, "edits"]:
        """Ratio of means of every edit, without intervals.

        Raises:
            UserError: clean and corrupted runs are the same on average, so there is nothing to divide by.
        """
        self.check_gap(self.metric)
        return self.change.mean(0) / self.mean_gap

    def top(self, k: int) -> list[Edit]:
        """The `k` edits with the largest ratio of means, largest first; controls are not among them."""
        if k < 0:
            raise UserError(f"the top {k}: ask for 0 or more")
        ratios = self.ratios()
        own = [i for i in np.argsort(-ratios, kind="stable") if self.edits[i].role not in CONTROLS]
        return [self.edits[i] for i in own[:k]]

    def q_values(self) -> Float[ndarray, "edits"]:
        """False discovery rate at which each edit's mean change differs from 0 (Benjamini and Hochberg over edits).

        NaN for controls, and for edits that ran on fewer than two pairs: nothing was tested there; for all where the
        pairs are too few to flag one (`why_no_q`). Skewed changes make them too small: see `p_max_skewed`. Changes
        of less than `rounding` of the mean gap are taken as 0: rounding often goes one way, as an effect does.
        """
        return false_discovery(self._beyond_rounding, self.ran & ~self._is_control)

    def p_max(self, draws: int = 2000, seed: int = 0) -> Float[ndarray, "edits"]:
        """Chance that the largest of all edits would move the metric as far if signs were random; NaN as above.

        Corrected for the number of edits by the permutation distribution of the maximum.
        """
        return sign_flip_test(self._beyond_rounding, self.ran & ~self._is_control, draws, seed)

    def p_max_skewed(self, draws: int = 2000, seed: int = 0) -> Float[ndarray, "edits"]:
        """The same by draws of pairs, which holds for skewed changes, too; NaN for edits on fewer than ten pairs."""
        return studentised_max_test(self._beyond_rounding, self.ran & ~self._is_control, draws, seed)

    def why_no_q(self) -> str:
        """Why `q_values` can flag no single edit; empty where they can."""
        return why_no_q(len(self.clean), int(((self.ran & ~self._is_control).sum(0) >= 2).sum()))

    @property
    def _beyond_rounding(self) -> Float[ndarray, "pairs edits"]:
        return np.where(np.abs(self.change) < self.rounding * np.abs(self.gap).mean(), 0.0, self.change)

    @property
    def _is_control(self) -> Bool[ndarray, "edits"]:
        return np.array([edit.role in CONTROLS for edit in self.edits], dtype=bool)

    def map(self, k: int | None = None) -> "Map":
        """Ratio of means by unit (rows) and position (columns), of edits at one position each; the `k` largest rows.

        Raises:
            UserError: the edits are at all positions together.
        """
        return Map.of(self, k)

    def summary(self, k: int = 10) -> str:
        """The top edits as a table, with intervals, controls and false discovery rates."""
        q, top = self.q_values(), self.top(k)
        roles = [role for role in CONTROLS[:2] if self.where(role)]
        rows = []
        for edit in top:
            number = self._index(edit)
            cells = [self.of(edit), *(self.controls(edit, role) for role in roles)]
            at = "all" if edit.position is None else edit.position
            rows.append([f"{edit.place} {describe(edit)}", at, *cells, self.ran[:, number].sum(), q_text(q[number])])
        lines = [effects_table("what", roles, rows)]
        if any(not self.ran[:, self._index(edit)].any() for edit in top):
            lines.append(NOTHING)
        sets = max((len(self._control_columns(edit, role)) for edit in top for role in roles), default=0)
        lines += about_table((self.why_no_q() or UNTESTED) if np.isnan(q).all() else "", sets)
        lines.append(f"{self.direction}, {self.metric}: {self.ends()}, positions {self.positions}")
        return "\n".join(lines)

    def rows(self, task: str, tokens: Sequence[Sequence[str]] | None = None) -> list[Row]:
        """Flat rows: each edit on each pair, with the base run's own value where the edit was nothing.

        Only those that ran, of units that were swept alone ("single") or at one position: all others did nothing.
        `tokens` are the texts of each pair's own tokens, to name the positions with.
        """
        normalised = self.normalised
        everywhere = [edit.role != "single" and edit.position is None for edit in self.edits]
        wanted = self.ran | np.array(everywhere, dtype=bool)
        rows = []
        for pair, column in zip(*np.nonzero(wanted), strict=True):
            edit = self.edits[column]
            at = edit.position
            rows.append(
                Row(
                    task=task,
                    example=self.examples[pair],
                    site=edit.place,
                    component=_joined(part.kind for part in edit.parts),
                    latent=describe(edit),
                    role=edit.role,
                    position=_joined(self.positions if p.position is None else str(p.position) for p in edit.parts),
                    token="" if at is None or edit.others or tokens is None else tokens[pair][at],
                    direction=self.direction,
                    metric=self.metric,
                    method=self.method,
                    corruption=self.corruption,
                    clean=float(self.clean[pair]),
                    corrupted=float(self.corrupted[pair]),
                    patched=float(self.patched[pair, column]),
                    effect=float(normalised[pair, column]),
                )
            )
        return rows


def effects_table(what: str, controls: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Edits with their intervals, those of their controls, in how many pairs they change something, and q values."""
    heads = ["effect [95 % interval]", *(f"{role} controls" for role in controls)]
    return text_table([what, "at", *heads, "differs in", "q"], rows)


def q_text(q: float) -> str:
    """A false discovery rate; a dash where nothing was tested."""
    return "–" if np.isnan(q) else f"{q:.2g}"


def about_table(no_q: str, sets: int) -> list[str]:
    """The lines below a table of effects: why it has no q, or what q assumes, and how many sets the controls are."""
    assumed = "q: false discovery rate, if changes are symmetric about 0 where there is no effect (too small if skewed)"
    return [no_q or assumed, *([about_sets(sets)] if sets else [])]


def describe(edit: Edit) -> str:
    """The units as a text: "417", "3,17", "all"; empty where the component has only one; of several parts "281 | 5"."""
    units = ["" if part.kind in WHOLE else ",".join(map(str, part.units)) for part in edit.parts]
    held = [f"{text} frozen".strip() if part.frozen else text for text, part in zip(units, edit.parts, strict=True)]
    return "all" if edit.role == "every" and units[0] else " | ".join(held)


def _joined(texts: Iterable[str]) -> str:
    """One text where all parts of an edit have the same."""
    several = list(texts)
    return several[0] if len(set(several)) == 1 else " | ".join(several)


@dataclass(frozen=True, eq=False)
class Map:
    """Effects by unit and position, controls left out; cells that no pair ran are NaN.

    Shares are of the mean gap of all pairs, those that are too short for a position among them: for a map in which a
    position means one thing, give pairs of one form.
    """

    labels: tuple[str, ...]
    positions: tuple[int, ...]
    values: Float[ndarray, "units positions"]

    @classmethod
    def of(cls, effects: Effects, k: int | None = None) -> "Map":
        if any(edit.position is None for edit in effects.edits):
            raise UserError("a map needs edits at one position each: sweep with each_position=True")
        ratios, ran = effects.ratios(), np.asarray(effects.ran.any(0))
        own = [(i, edit) for i, edit in enumerate(effects.edits) if edit.role not in CONTROLS]
        positions = sorted({edit.position for _, edit in own if edit.position is not None})
        keys = list(dict.fromkeys(edit.key for _, edit in own))
        row, column = {key: i for i, key in enumerate(keys)}, {position: i for i, position in enumerate(positions)}
        values = np.full((len(keys), len(positions)), np.nan)
        for i, edit in own:
            if ran[i] and edit.position is not None:
                values[row[edit.key], column[edit.position]] = ratios[i]
        labels = {edit.key: " ".join(filter(None, (edit.place, describe(edit)))) for _, edit in own}
        names = [labels[key] for key in keys]
        if k is not None and k < len(keys):
            best = np.argsort(-np.nan_to_num(np.abs(values)).max(1), kind="stable")[:k]
            names, values = [names[i] for i in best], values[best]
        return cls(tuple(names), tuple(positions), values)
