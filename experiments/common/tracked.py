"""What a finished experiment shows to trackers: its figures, its page's tables and charts, its dictionaries."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from saepatch.pages.tracked import track_dictionaries, track_page
from saepatch.report import Page
from saepatch.tracking.open import RunDescription, open_tracker

if TYPE_CHECKING:
    from ..patchscope import PatchscopeConfig
    from ..safety import SafetyConfig
    from ..steering.question import SteeringConfig


def show(
    config: "SafetyConfig | SteeringConfig | PatchscopeConfig", run: str, page: Page, summary: Mapping[str, Any]
) -> None:
    """Write the local log and, if the run asks for them, to trackers. The group is the folder that the run is in.

    Args:
        config: The run, whose folder holds `report.html` already.
        run: What the run is called.
        page: That page.
        summary: Figures, nested as you like: numbers, and intervals as [value, low, high].
    """
    out = Path(config.out)
    about = RunDescription(out, run=run, config=asdict(config), job_type="experiment")
    with open_tracker(config.track, about) as tracker:
        tracker.summarise(dict(figures(summary)))
        track_page(page, out / "report.html", tracker)
        for sae in dict.fromkeys((config.sae, getattr(config, "shared_sae", config.sae))):
            track_dictionaries(sae, tracker)


def figures(summary: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, float]]:
    """Numbers by their path, as in `setting_a/dense_direction`; an interval is three of them."""
    for name, value in summary.items():
        if isinstance(value, Mapping):
            yield from figures(value, f"{prefix}{name}/")
        elif _is_number(value):
            yield f"{prefix}{name}", value
        elif isinstance(value, list) and len(value) == 3 and all(map(_is_number, value)):
            middle, low, high = value
            if low <= middle <= high:
                yield from ((f"{prefix}{name}{end}", v) for end, v in (("", middle), ("_low", low), ("_high", high)))


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)
