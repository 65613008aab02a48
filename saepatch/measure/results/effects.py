"""Results of a sweep: the metric under every edit of every pair, normalised effects, intervals, controls, rows."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np
from jaxtyping import Bool, Float
from numpy import ndarray
from torch import nn

from saepatch.engine.components import Edit, PatchDirection
from saepatch.errors import UserError
from saepatch.measure.results.gaps import PairGaps, towards_source
from saepatch.measure.results.maps import Map
from saepatch.model.fingerprint import stored_dtypes
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
from saepatch.report.blocks import Block, Simple
from saepatch.report.notebook import Figure, Shown

CONTROLS = ("random", "matched", "differing")
UNTESTED = "no q: no edit changes anything in two or more pairs, so nothing was tested"
NOTHING = "differs in 0: equal in both runs of every pair, so nothing was patched; the 0 is no evidence of no effect"
WHOLE = ("stream", "error")  # kinds of component with a single unit, which is not named
ROUNDING = 1e-4  # share of the mean gap: differences between batch compositions are below this in float32
NARROW = 2e-2  # the same in bfloat16 and float16
WITHIN = "°: within rounding, which alone may change the metric by {:.1g} of the gap here"


@dataclass(frozen=True, eq=False, repr=False)
class Effects(PairGaps, Shown):
    """The metric under each edit, for every pair.

    `patched[pair, edit]` is the metric under the edit. Denoising patches the clean run's values into the corrupted run
    (are they sufficient?), noising the reverse (are they necessary?). `ran` is false where both runs have the same
    values, so that the edit changes nothing and `patched` is the base run's metric. Where a corruption makes several
    corrupted runs of a pair, values are means over them.

    In a notebook it shows its largest edits; `plot` draws them, `to_frame` has a row for every edit, `report` writes a
    page.

    Attributes:
        direction: "denoise" or "noise".
        metric: Name of the metric.
        positions: The positions that were patched, as text.
        edits: The edits, controls included.
        examples: Names of the pairs.
        clean: Metric of each pair's clean run.
        corrupted: Metric of its corrupted run.
        patched: Metric under each edit.
        ran: Whether the edit changes anything in the pair.
        min_gap: Pairs with a smaller gap are missing in `normalised`.
        corruption: How corrupted runs were made, if not from the pairs' corrupted prompts.
        rounding: Share of the mean gap that rounding alone may change.
        precision: The model's dtype.
        method: "exact".
        tokens: Texts of the tokens of each pair's base prompt; empty where unknown.
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
    corruption: str = ""
    rounding: float = ROUNDING
    precision: str = ""
    method: str = "exact"
    tokens: tuple[tuple[str, ...], ...] = ()

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

        The interval is over pairs, for these sets: see `about_sets` for what they say about all such sets.
        """
        columns = self._control_columns(edit, role)
        return self.ratio(self.change[:, columns].mean(1), seed) if columns else None

    def control_sets(self, edit: Edit | int, role: str) -> int:
        """Number of an edit's controls of one role."""
        return len(self._control_columns(edit, role))

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

    def map(self, k: int | None = None) -> Map:
        """Ratio of means by unit (rows) and position (columns), for edits at single positions; the `k` largest rows.

        Raises:
            UserError: the edits act at all positions together.
        """
        from saepatch.measure.results.display import effects_map

        return effects_map(self, k)

    def summary(self, k: int = 10) -> str:
        """The top edits as a table, with intervals, controls and false discovery rates."""
        from saepatch.measure.results.display import summary_text

        return summary_text(self, k)

    def __repr__(self) -> str:
        from saepatch.measure.results.display import effects_line

        return effects_line(self)

    @property
    def title(self) -> str:
        """Heading shown above the effects."""
        return f"Effects on {len(self.clean)} pairs ({self.direction}, {self.metric.replace('_', ' ')})"

    def blocks(self) -> list[Simple]:
        """The metric of both runs, and the largest edits."""
        from saepatch.measure.results.display import effects_blocks

        return effects_blocks(self)

    def figures(self) -> list[Block]:
        """The figure of `plot`."""
        return [self.plot().chart] if self.edits and not np.isnan(self.mean_gap) else []

    def plot(self, k: int = 16) -> Figure:
        """The `k` largest edits as bars with intervals and controls; a map where edits are at single positions.

        All heads of a model are drawn by layer and head.

        Raises:
            UserError: clean and corrupted runs are equal on average, so there is no gap to divide by.
        """
        from saepatch.measure.results.display import effects_figure

        return effects_figure(self, k)

    def to_frame(self, intervals: bool = True, seed: int = 0) -> Any:
        """A pandas frame with a row for every edit: the headline effect with everything needed to interpret it.

        Columns: site, component, units (text), latent (the number of a single unit), role, position (missing: all
        together), token (of the base prompt; "…" where pairs differ), direction, metric, ratio_of_means with low, high
        (95 % interval over pairs; `why_no_interval` where there is none), mean_change (in the metric's units),
        pairs_changed, q (missing for controls), within_rounding. Texts are `string`, ids and counts `Int64`, values
        `float64`; `frame.attrs` has the number of pairs and the mean gap.

        Args:
            intervals: Whether to compute intervals, which takes about a millisecond an edit.
        """
        from saepatch.measure.results.frames import effects_frame

        return effects_frame(self, intervals, seed)

    def to_pandas(self, task: str = "") -> Any:
        """A pandas frame with a row for every edit of every pair, typed as in `to_frame`.

        As in `rows`, a pair in which a swept edit changes nothing has no row: divide sums of `change` by the number of
        pairs. The headline effect is `change.sum() / gap.sum()` over all pairs, not the mean of `normalised`.
        """
        from saepatch.measure.results.frames import rows_frame

        return rows_frame(self, task)

    def own_token(self, pair: int, edit: Edit) -> str | None:
        """The token of a pair's base prompt at an edit's position; None for several positions, or unknown tokens."""
        if edit.position is None or edit.others or not self.tokens:
            return None
        return self.tokens[pair][edit.position]

    def token_at(self, edit: int) -> str | None:
        """The token at an edit's position in the pairs it changes; "…" where they differ; None as in `own_token`."""
        pairs = np.flatnonzero(self.ran[:, edit])
        known = {self.own_token(int(pair), self.edits[edit]) for pair in pairs}
        return known.pop() if len(known) == 1 else "…" if known else None

    def wanted(self) -> Bool[ndarray, "pairs edits"]:
        """The edits of pairs that have rows: those that ran, and edits that were given for all positions."""
        everywhere = [edit.role != "single" and edit.position is None for edit in self.edits]
        return self.ran | np.array(everywhere, dtype=bool)

    def rows(self, task: str = "", tokens: Sequence[Sequence[str]] | None = None) -> list[Row]:
        """Flat rows: each edit on each pair, with the base run's metric where the edit changed nothing.

        For units that were swept ("single") or edits at one position, only edits that ran have a row. `task` names the
        pairs in the rows. `tokens`, the texts of each pair's own tokens, are those of the result if not given.
        """
        tokens = self.tokens if tokens is None else tokens
        normalised, rounding = self.normalised, self.rounding * float(np.abs(self.gap).mean())
        rows = []
        for pair, column in zip(*np.nonzero(self.wanted()), strict=True):
            edit = self.edits[column]
            rows.append(
                Row(
                    task=task,
                    example=self.examples[pair],
                    site=edit.place,
                    component=_joined(part.kind for part in edit.parts),
                    latent=describe(edit),
                    role=edit.role,
                    position=_joined(self.positions if p.position is None else str(p.position) for p in edit.parts),
                    token="" if edit.position is None or edit.others or not tokens else tokens[pair][edit.position],
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


def precision_of(hf: nn.Module) -> tuple[str, float]:
    """What a model computes in, by its weights, and the share of the mean gap that its rounding may change.

    A quantised model is named by both, as in "float32 over int8 weights"; what its rounding changes beyond that dtype
    is measured (`batch_noise`).
    """
    dtype, integers = stored_dtypes(hf)
    name, *quantised = (str(each).removeprefix("torch.") for each in (dtype, *integers))
    over = f" over {', '.join(quantised)} weights" if quantised else ""
    return name + over, ROUNDING if name == "float32" else NARROW


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
