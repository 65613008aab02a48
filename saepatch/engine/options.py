"""Options that sweeps and screens share: positions, direction, metric, corruption, batch size."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields, replace
from typing import TYPE_CHECKING, Any, Literal, TypedDict, TypeVar, cast

from saepatch.engine.components import PATCH_DIRECTIONS, PatchDirection
from saepatch.engine.corruptions import Corruption
from saepatch.engine.metrics import Metric, as_metric, logit_difference, metric_name
from saepatch.errors import UserError
from saepatch.model.positions import Positions

Options = TypeVar("Options")
Align = Literal["equal", "right"]
Progress = bool | Callable[[int], None]  # a bar, or a function that receives the number of edits just done


class Labels(TypedDict):
    direction: PatchDirection
    metric: str
    positions: str
    min_gap: float


if TYPE_CHECKING:
    NamedMetric = Metric
else:
    NamedMetric = Any  # a metric, or a name that is replaced by it on creation


@dataclass(frozen=True, kw_only=True, eq=False)
class SweepOptions:
    """Options of patching and attribution; the functions also accept each option as a keyword.

    Attributes:
        positions: Positions to patch, all of them together or, with `each_position`, one at a time.
        each_position: Patch at each position separately. Screens always do.
        direction: "denoise" patches clean values into the corrupted run, "noise" the reverse.
        metric: A function of next-token logits [batch, vocab] and the batch that returns one value per example; or
            the name of one in `METRICS`, such as "probability", or MODULE:FUNCTION, as on the command line.
        corruption: How the corrupted run is made; None: from the pair's corrupted prompt.
        min_gap: Pairs whose clean and corrupted metric differ by less than this have no normalised effect.
        align: As for `batch_pairs`.
        batch_size: Edits (in a screen, pairs) per forward pass; None: chosen by speed and memory.
        progress: Show a progress bar; or a function that is called with the number of edits just done.

    Raises:
        UserError: an unknown direction or name of a metric, or a batch size below 1.
    """

    positions: Positions = "all"
    each_position: bool = False
    direction: PatchDirection = "denoise"
    metric: NamedMetric = logit_difference
    corruption: Corruption | None = None
    min_gap: float = 1e-2
    align: Align = "equal"
    batch_size: int | None = None
    progress: Progress = False

    def __post_init__(self) -> None:
        if self.direction not in PATCH_DIRECTIONS:
            raise UserError(f"unknown direction {self.direction!r}: use 'denoise' or 'noise'")
        if self.batch_size is not None and self.batch_size < 1:
            raise UserError(f"batch_size = {self.batch_size}: use at least 1, or None for an automatic choice")
        object.__setattr__(self, "metric", as_metric(self.metric))

    @property
    def denoises(self) -> bool:
        return self.direction == "denoise"

    @property
    def at_component(self) -> bool:
        """Whether the corruption acts on the patched component."""
        return self.corruption is not None and self.corruption.at_component

    @property
    def samples(self) -> int:
        """Number of corrupted runs per pair."""
        return 1 if self.corruption is None else self.corruption.samples

    @property
    def labels(self) -> Labels:
        """The options that results record."""
        positions = self.positions if isinstance(self.positions, str) else repr(self.positions)
        return {
            "direction": self.direction,
            "metric": metric_name(self.metric),
            "positions": positions,
            "min_gap": self.min_gap,
        }


class SweepKeywords(TypedDict, total=False):
    """The options of `SweepOptions` as keywords."""

    positions: Positions
    each_position: bool
    direction: PatchDirection
    metric: Metric | str
    corruption: Corruption | None
    min_gap: float
    align: Align
    batch_size: int | None
    progress: Progress


def with_keywords(options: Options, keywords: Mapping[str, object]) -> Options:
    """An options value (a frozen dataclass) with some of its fields replaced by keywords.

    Raises:
        UserError: a keyword is not an option, or a value is invalid.
    """
    known = [field.name for field in fields(cast(Any, options))]
    if unknown := [name for name in keywords if name not in known]:
        raise UserError(f"unknown option {unknown[0]!r}: use one of {', '.join(known)}")
    return replace(cast(Any, options), **keywords)
