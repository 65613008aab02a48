"""What a finished experiment shows to trackers: its figures, its page's tables and charts, its dictionaries."""

from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

from saepatch.pages.tracked import track_dictionaries, track_page
from saepatch.report import Page
from saepatch.runs.kinds import flat, numbers
from saepatch.tracking.open import RunDescription, open_tracker


@runtime_checkable
class TrackedSettings(Protocol):
    """What is read of an experiment's settings."""

    @property
    def out(self) -> str: ...
    @property
    def track(self) -> str: ...
    @property
    def sae(self) -> str: ...


def show(config: TrackedSettings, run: str, page: Page, summary: Mapping[str, Any]) -> None:
    """Write the local log and, if the run asks for them, to trackers. The group is the folder that the run is in.

    Args:
        config: The run, whose folder holds `report.html` already.
        run: What the run is called.
        page: That page.
        summary: Figures, nested as you like: numbers, and intervals as [value, low, high].
    """
    out = Path(config.out)
    about = RunDescription(out, run=run, config=asdict(cast(Any, config)), job_type="experiment")
    with open_tracker(config.track, about) as tracker:
        tracker.summarise(flat(dict(numbers(summary))))
        track_page(page, out / "report.html", tracker)
        for sae in dict.fromkeys((config.sae, getattr(config, "shared_sae", config.sae))):
            track_dictionaries(sae, tracker)
