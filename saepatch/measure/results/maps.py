"""Effects by unit and position."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
from jaxtyping import Float
from numpy import ndarray

from saepatch.report.blocks import HeatMap, Simple
from saepatch.report.notebook import Figure, Shown
from saepatch.report.text import token_text

SHARES = "Effects as shares of the mean gap; –: no pair ran, since nothing differs there."


@dataclass(frozen=True, eq=False, repr=False)
class Map(Shown):
    """Effects by unit and position, without controls; cells that no pair ran are NaN.

    Effects are shares of the mean gap of all pairs, including pairs too short to have the position: for a map in which
    a position has one meaning, give pairs of one form.
    """

    labels: tuple[str, ...]
    positions: tuple[int, ...]
    values: Float[ndarray, "units positions"]
    tokens: tuple[str, ...] = ()
    """The token at each position: "…" where pairs differ; empty where tokens are unknown."""
    direction: str = ""
    metric: str = ""
    pairs: int = 0

    def __repr__(self) -> str:
        return f"{self.title}: {len(self.labels)} units at {len(self.positions)} positions (.plot() draws it)"

    @property
    def title(self) -> str:
        """Heading shown above the map."""
        about = ", ".join(filter(None, (self.direction, self.metric.replace("_", " "))))
        return "Effects by unit and position" + (f" ({about})" if about else "")

    def blocks(self) -> list[Simple]:
        """The map as a heat map."""
        return [replace(self.plot().chart, title="")]

    def plot(self) -> Figure:
        """The map as a figure: units by position, with the tokens where they are known."""
        texts = self.tokens or ("",) * len(self.positions)
        columns = [f"{at} {token_text(text) if text else ''}".strip() for at, text in zip(self.positions, texts)]
        caption = f"n = {self.pairs} pairs. {SHARES}" if self.pairs else SHARES
        largest = float(np.nanmax(np.abs(self.values), initial=0.0))
        spec = ".2f" if largest >= 0.1 else ".3f"
        chart = HeatMap(self.title, list(self.labels), columns, self.values.tolist(), caption, value_format=spec)
        return Figure(chart)

    def save(self, path: str | Path) -> Path:
        """Write the figure as SVG; returns its path.

        Raises:
            UserError: the name does not end in .svg, or the file cannot be written.
        """
        return self.plot().save(path)
