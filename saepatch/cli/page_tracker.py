"""Tracking for commands that write a page."""

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING

from saepatch.settings.latent import LatentConfig
from saepatch.settings.steer import SteerConfig
from saepatch.settings.trace import TraceConfig

if TYPE_CHECKING:
    from saepatch.tracking.open import Tracker


def page_tracker(config: SteerConfig | LatentConfig | TraceConfig, job_type: str) -> "Tracker":
    """Open the trackers of a command with --html; the local log goes into the folder PAGE.log beside the page.

    A new log replaces an earlier one.
    """
    from saepatch.tracking.open import RunDescription, open_tracker

    path = Path(config.html)
    about = RunDescription(
        path.with_name(f"{path.name}.log"),
        run=path.stem,
        config=asdict(config),
        job_type=job_type,
        axes={"*": "answers"} if job_type == "steer" else {},
    )
    return open_tracker(config.track, about)
