"""A finished run read back from its folder, for notebooks."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from saepatch.errors import UserError
from saepatch.measure.results.frames import typed_frame
from saepatch.pages.run import page_of
from saepatch.pages.sweeps.run_data import RunData, read_run_data
from saepatch.report import Facts, Notices, Page, Simple, fragment, write_page
from saepatch.report.text import number
from saepatch.runs.catalogue import RunFolder, read_run


def load_run(path: str | Path) -> "LoadedRun":
    """Read the finished run or experiment in a folder; no model is loaded.

    Raises:
        UserError: the folder holds no finished run, or its files are damaged.
    """
    return LoadedRun(read_run(Path(path)))


@dataclass(frozen=True, eq=False, repr=False)
class LoadedRun:
    """A finished run: its summary, settings, rows and page. It shows its headline in a notebook."""

    folder: RunFolder

    @property
    def path(self) -> Path:
        """The run's folder."""
        return self.folder.path

    @property
    def summary(self) -> dict[str, Any]:
        """The content of `summary.json`."""
        return self.folder.summary

    @property
    def settings(self) -> dict[str, Any]:
        """The settings it ran with."""
        return self.folder.settings

    def __repr__(self) -> str:
        about = ", ".join(filter(None, (self.folder.task, self.folder.model, self.folder.sites)))
        where = f"{self.folder.work or 'run'} in {str(self.path)!r} ({about}; {self.folder.finished})"
        return f"{where}\n{self.folder.headline}"

    def _repr_html_(self) -> str:
        folder = self.folder
        named = {"model": folder.model, "pairs": folder.task, "sites": folder.sites, "finished": folder.finished}
        named |= {"number of pairs": "" if folder.count is None else number(folder.count)}
        facts = Facts({name: text for name, text in named.items() if text})
        blocks: list[Simple] = [Notices([folder.headline]), facts] if folder.headline else [facts]
        return fragment(blocks, f"{folder.work or 'run'}: {self.path.name}")

    @cached_property
    def data(self) -> RunData:
        """Rows, pairs and cards of a run of `patch` or `attribute`.

        Raises:
            UserError: the run is of another kind, or a file is damaged.
        """
        return read_run_data(self.path)

    def to_frame(self, intervals: bool = True) -> Any:
        """A pandas frame with a row for every edit of a run of `patch` or `attribute`, controls included.

        Columns: site, component, units (text), latent (the number of a single one), role, position (missing: all
        together), direction, ratio_of_means, low, high, why_no_interval, pairs_changed, and q where the summary has it.
        Types as in `Effects.to_frame`.

        Raises:
            UserError: the run is of another kind, or a file is damaged.
        """
        data, keys = self.data, self.data.changes.keys
        columns: dict[str, Any] = {
            "site": (str, [key.site for key in keys]),
            "component": (str, [key.component for key in keys]),
            "units": (str, [key.latent for key in keys]),
            "latent": (int, [int(key.latent) if key.latent.isdigit() else None for key in keys]),
            "role": (str, [key.role for key in keys]),
            "position": (int, [int(key.position) if _is_number(key.position) else None for key in keys]),
            "direction": (str, [key.direction for key in keys]),
            "ratio_of_means": (float, data.effects),
        }
        if intervals:
            cells = data.intervals(range(len(keys)))
            columns["low"] = float, [np.nan if cell.low is None else cell.low for cell in cells]
            columns["high"] = float, [np.nan if cell.high is None else cell.high for cell in cells]
            columns["why_no_interval"] = str, [cell.reason or None for cell in cells]
        columns["pairs_changed"] = int, data.changes.counts.tolist()
        columns["q"] = float, [data.q.get(key, np.nan) for key in keys]
        about = {"metric": data.metric, "pairs": len(data.pairs.examples), "mean_gap": data.gap}
        return typed_frame(columns, about)

    def to_pandas(self) -> Any:
        """The run's rows (`results.parquet`, otherwise its other table) as a pandas frame, as they are in the file.

        Raises:
            UserError: the run has no table.
        """
        import pandas as pd

        tables = sorted(self.path.glob("*.parquet"), key=lambda path: (path.name != "results.parquet", path.name))
        tables = [path for path in tables if path.name != "pairs.parquet"]
        if not tables:
            raise UserError(f"{str(self.path)!r} has no table of rows: see .summary")
        return pd.read_parquet(tables[0], dtype_backend="numpy_nullable")

    def page(self) -> Page:
        """The run's report as a value.

        Raises:
            UserError: the run is of a kind without a page.
        """
        return page_of(self.path)

    def report(self, path: str | Path) -> Path:
        """Write the run's report as one HTML file; returns its path.

        Raises:
            UserError: the run has none, or the file cannot be written.
        """
        return write_page(self.page(), Path(path))


def _is_number(text: str) -> bool:
    return text.removeprefix("-").isdigit()
