"""Figures of a run's report in one SVG file, as in the README and the docs.

python -m experiments.picture --run runs/demo --out docs/figures/report.svg
"""

import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saepatch.cli.parser import run_config
from saepatch.errors import UserError
from saepatch.report import KEPT, Chart, Page, read_page, write_figures
from saepatch.runs.catalogue import read_json

TITLES = (
    "Denoising: each prompt's own top latents",
    "Layer × position: denoise",
    "Refusals against the share of latents restored",
    "Latents of ",  # followed by the patched site
)


@dataclass(frozen=True)
class PictureConfig:
    """Draw figures of a run's report side by side."""

    run: str = "runs/demo"
    """Folder of a run of the demo or of an experiment."""
    titles: tuple[str, ...] = TITLES
    """How the titles of the figures begin."""
    out: str = "docs/figures/report.svg"
    """File for the picture."""


def main(config: PictureConfig) -> None:
    page = read_page(read_json(Path(config.run) / KEPT))
    charts = [_named(page, title) for title in config.titles]
    path = write_figures(charts, Path(config.out))
    sys.stdout.write(f"Picture: {path} ({path.stat().st_size / 1000:.0f} kB)\n")


def _named(page: Page, title: str) -> Chart:
    for section in page.sections:
        for chart in _charts(section.blocks):
            if chart.title.startswith(title):
                return chart
    titles = dict.fromkeys(chart.title for section in page.sections for chart in _charts(section.blocks))
    raise UserError(f"the report has no figure called {title!r}: it has {', '.join(map(repr, titles)) or 'none'}")


def _charts(blocks: Sequence[Any]) -> Iterator[Chart]:
    for block in blocks:
        if isinstance(block, Chart):
            yield block
        for _, inner in getattr(block, "options", ()):
            yield from _charts(inner)


if __name__ == "__main__":
    sys.exit(run_config(PictureConfig, main, "python -m experiments.picture"))
