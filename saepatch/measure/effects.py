"""Results of a sweep: the metric under every edit of every pair, normalised effects, intervals, controls, rows."""

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
UNTESTED = "no q: no edit changes anything in two or more pairs, so nothing was tested"
NOTHING = "differs in 0: equal in both runs of every pair, so nothing was patched; the 0 is no evidence of no effect"
WHOLE = ("stream", "error")  # kinds of component with a single unit, which is not named
ROUNDING = 1e-4  # share of the mean gap: differences between batch compositions are below this in float32
NARROW = 2e-2  # the same in bfloat16 and float16
WITHIN = "°: within rounding, which alone may change the metric by {:.1g} of the gap here"


@dataclass(frozen=True, eq=False)
class Effects(PairGaps):
    """The metric under each edit, for every pair.

    `patched[pair, edit]` is the metric under the edit. Denoising patches the clean run's values into the corrupted run
    (are they sufficient?), noising the reverse (are they necessary?). `ran` is false where both runs have the same
    values, so that the edit changes nothing and `patched` is the base run's metric. Where a corruption makes several
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
    corruption: str = ""  # how the corrupted runs were made, if not from the pairs' corrupted prompts
    rounding: float = ROUNDING
    precision: str = ""  # the model's dtype
    method: str = "exact"

    def __post_init__(self) -> None:
        if not self.min_gap > 0:
            raise UserError(f"min_gap = {self.min_gap}: use a number above 0, such as 0.01")

    @cached_property
    def change(self) -> Float[ndarray, "pairs edits"]:
        """Change of the metric by each edit, from the base run towards the source run, in the metric's units."""
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
        """Ratio of means of one edit (given itself or by index), with its interval over pairs: the headline effect.

        NaN where the mean gap is below `min_gap`.
        """
        return self.ratio(self.change[:, self._index(edit)], seed)

    def mean_of_ratios(self, edit: Edit | int, seed: int = 0) -> Interval:
        """Mean of the normalised effects of pairs, leaving out pairs with a gap below `min_gap`."""
        return bootstrap_mean(self.normalised[:, self._index(edit)], seed=seed)

    def controls(self, edit: Edit | int, role: str, seed: int = 0) -> Interval | None:
        """Ratio of means for the average of an edit's controls ("random" or "matched"); None where there are none.

        The interval is over pairs, for these sets: see `about_sets` for what they say of all such sets.
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
            UserError: clean and corrupted runs are equal on average, so there is no gap to divide by.
        """
        self.check_gap(self.metric)
        return self.change.mean(0) / self.mean_gap

    def top(self, k: int) -> list[Edit]:
        """The `k` edits with the largest ratio of means, largest first, without controls."""
        if k < 0:
            raise UserError(f"k = {k}: use at least 0")
        ratios = self.ratios()
        own = [i for i in np.argsort(-ratios, kind="stable") if self.edits[i].role not in CONTROLS]
        return [self.edits[i] for i in own[:k]]

    def q_values(self) -> Float[ndarray, "edits"]:
        """False discovery rate at which each edit's mean change differs from 0 (Benjamini and Hochberg over edits).

        NaN for controls and for edits that ran on fewer than two pairs; NaN for all edits where there are too few
        pairs to flag any (`why_no_q`). Skewed changes make q too small: see `p_max_skewed`. Changes below `rounding`
        times the mean gap count as 0, since rounding errors often have a consistent sign, like an effect.
        """
        return false_discovery(self._beyond_rounding, self.ran & ~self._is_control)

    def p_max(self, draws: int = 2000, seed: int = 0) -> Float[ndarray, "edits"]:
        """Probability that the largest of all edits would move the metric as far if signs were random.

        Corrected for the number of edits by the permutation distribution of the maximum. NaN as in `q_values`.
        """
        return sign_flip_test(self._beyond_rounding, self.ran & ~self._is_control, draws, seed)

    def p_max_skewed(self, draws: int = 2000, seed: int = 0) -> Float[ndarray, "edits"]:
        """As `p_max`, by a bootstrap over pairs that is valid for skewed changes; NaN for edits on fewer than ten."""
        return studentised_max_test(self._beyond_rounding, self.ran & ~self._is_control, draws, seed)

    def why_no_q(self) -> str:
        """Why `q_values` cannot flag any single edit; empty where it can."""
        return why_no_q(len(self.clean), int(((self.ran & ~self._is_control).sum(0) >= 2).sum()))

    @property
    def _beyond_rounding(self) -> Float[ndarray, "pairs edits"]:
        return np.where(np.abs(self.change) < self.rounding * np.abs(self.gap).mean(), 0.0, self.change)

    @property
    def _is_control(self) -> Bool[ndarray, "edits"]:
        return np.array([edit.role in CONTROLS for edit in self.edits], dtype=bool)

    def map(self, k: int | None = None) -> "Map":
        """Ratio of means by unit (rows) and position (columns), for edits at single positions; the `k` largest rows.

        Raises:
            UserError: the edits act at all positions together.
        """
        return Map.of(self, k)

    def summary(self, k: int = 10) -> str:
        """The top edits as a table, with intervals, controls and false discovery rates."""
        q, top, mean = self.q_values(), self.top(k), self.change.mean(0)
        small = [within_rounding(float(mean[self._index(edit)]), self.rounding, self) for edit in top]
        roles = [role for role in CONTROLS[:2] if self.where(role)]
        rows = []
        for edit, is_small in zip(top, small, strict=True):
            number = self._index(edit)
            cells = [f"{self.of(edit)}{' °' * is_small}", *(self.controls(edit, role) for role in roles)]
            at = "all" if edit.position is None else edit.position
            rows.append([f"{edit.place} {describe(edit)}", at, *cells, self.ran[:, number].sum(), q_text(q[number])])
        lines = [effects_table("what", roles, rows)]
        if any(not self.ran[:, self._index(edit)].any() for edit in top):
            lines.append(NOTHING)
        lines += [WITHIN.format(self.rounding)] * any(small)
        sets = max((len(self._control_columns(edit, role)) for edit in top for role in roles), default=0)
        lines += about_table((self.why_no_q() or UNTESTED) if np.isnan(q).all() else "", sets)
        lines.append(f"{self.direction}, {self.metric}: {self.ends()}, positions {self.positions}")
        return "\n".join(lines)

    def rows(self, task: str, tokens: Sequence[Sequence[str]] | None = None) -> list[Row]:
        """Flat rows: each edit on each pair, with the base run's metric where the edit changed nothing.

        For units that were swept ("single") or edits at one position, only edits that ran have a row. `tokens` are the
        texts of each pair's own tokens, for the column `token`.
        """
        normalised, rounding = self.normalised, self.rounding * float(np.abs(self.gap).mean())
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
                    precision=self.precision,
                    rounding=rounding,
                    clean=float(self.clean[pair]),
                    corrupted=float(self.corrupted[pair]),
                    patched=float(self.patched[pair, column]),
                    effect=float(normalised[pair, column]),
                )
            )
        return rows


def within_rounding(mean: float, rounding: float, pairs: PairGaps) -> bool:
    """Whether a mean change, other than none at all, is below `rounding`, a share of the mean gap."""
    return bool(0 < abs(mean) < rounding * float(np.abs(pairs.gap).mean()))


def precision_of(dtype: object) -> tuple[str, float]:
    """The name of a model's dtype, and the share of the mean gap that its rounding may change."""
    name = str(dtype).removeprefix("torch.")
    return name, ROUNDING if name == "float32" else NARROW


def effects_table(what: str, controls: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Table of edits: effects and controls with intervals, number of pairs in which the edit changes values, q."""
    heads = ["effect [95 % interval]", *(f"{role} controls" for role in controls)]
    return text_table([what, "at", *heads, "differs in", "q"], rows)


def q_text(q: float) -> str:
    """A false discovery rate; a dash where nothing was tested."""
    return "–" if np.isnan(q) else f"{q:.2g}"


def about_table(no_q: str, sets: int) -> list[str]:
    """The lines below a table of effects: why there is no q, or what q assumes, and the number of control sets."""
    assumed = "q: false discovery rate, if changes are symmetric about 0 where there is no effect (too small if skewed)"
    return [no_q or assumed, *([about_sets(sets)] if sets else [])]


def describe(edit: Edit) -> str:
    """The units as text: "417", "3,17", "all"; empty for a component with one unit; several parts as "281 | 5"."""
    units = ["" if part.kind in WHOLE else ",".join(map(str, part.units)) for part in edit.parts]
    texts = [f"{text} frozen".strip() if part.frozen else text for text, part in zip(units, edit.parts, strict=True)]
    return "all" if edit.role == "every" and units[0] else " | ".join(texts)


def _joined(texts: Iterable[str]) -> str:
    """The texts of an edit's parts joined by bars; a single text where all are the same."""
    several = list(texts)
    return several[0] if len(set(several)) == 1 else " | ".join(several)


@dataclass(frozen=True, eq=False)
class Map:
    """Effects by unit and position, without controls; cells that no pair ran are NaN.

    Effects are shares of the mean gap of all pairs, including pairs too short to have the position: for a map in which
    a position has one meaning, give pairs of one form.
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
