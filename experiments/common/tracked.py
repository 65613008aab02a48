"""The end of an experiment: its files, and logging to trackers."""

import sys
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import Any, Protocol, cast, runtime_checkable

from saepatch.pages.tracked import track_dictionaries, track_page
from saepatch.records.files import write_json, write_yaml
from saepatch.records.provenance import versions
from saepatch.report import Page, write_page
from saepatch.runs.kinds import flat, numbers
from saepatch.tracking.open import RunDescription, open_tracker


@runtime_checkable
class TrackedSettings(Protocol):
    """The settings of an experiment that logging needs."""

    @property
    def out(self) -> str: ...
    @property
    def track(self) -> str: ...
    @property
    def sae(self) -> str: ...


def conclude(
    config: TrackedSettings, run: str, page: Page, summary: Mapping[str, Any], figures: Mapping[str, Any]
) -> None:
    """Write report, summary and settings, log them to trackers, and print the verdict, which is the page's lead.

    Args:
        config: The experiment's settings.
        run: The run's name.
        page: The report.
        summary: Content of summary.json besides the verdict and the versions.
        figures: Figures for the trackers, as for `show`.
    """
    out = Path(config.out)
    write_page(page, out / "report.html")
    write_json({"verdict": page.lead, **summary, "versions": versions()}, out / "summary.json")
    write_yaml(asdict(cast(Any, config)), out / "config.yaml")
    show(config, run, page, figures)
    sys.stdout.write(f"{page.lead}\nReport: {out / 'report.html'}   Figures: {out / 'summary.json'}\n")


def show(config: TrackedSettings, run: str, page: Page, summary: Mapping[str, Any]) -> None:
    """Write the local log, and log to the trackers that the settings name.

    Args:
        config: The experiment's settings; its folder already holds `report.html`.
        run: The run's name.
        page: The report.
        summary: Figures at any depth: numbers, and intervals as [value, low, high].
    """
    out = Path(config.out)
    about = RunDescription(out, run=run, config=asdict(cast(Any, config)), job_type="experiment")
    with open_tracker(config.track, about) as tracker:
        tracker.summarise(flat(dict(numbers(summary))))
        track_page(page, out / "report.html", tracker)
        for sae in dict.fromkeys((config.sae, getattr(config, "shared_sae", config.sae))):
            track_dictionaries(sae, tracker)
