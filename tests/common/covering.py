"""The coverage of intervals by simulation, and the table of it in `docs/statistics.md`.

`PYTHONPATH=. python tests/common/covering.py` runs it whole (minutes) and writes the table anew.
"""

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np

from saepatch.records.statistics import RatioBootstrap

DOCUMENT = Path(__file__).parents[2] / "docs" / "statistics.md"
BEGIN, END = "<!-- coverage -->\n", "<!-- /coverage -->\n"
Draw = Callable[[np.random.Generator, int], tuple[np.ndarray, np.ndarray]]


def _few(share: float) -> Draw:
    def draw(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        gap = rng.lognormal(0.5, 0.5, n)
        return gap * (rng.random(n) < share) * rng.beta(4, 2, n), gap

    return draw


def _shares_of_skewed_gaps(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    gap = rng.lognormal(0.5, 0.8, n)
    return gap * rng.beta(2, 2, n), gap


def _normal_gaps(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
    gap = rng.normal(3, 1.5, n)
    return 0.4 * gap + 0.5 * rng.normal(size=n), gap


def _outcomes(up: float, down: float) -> Draw:
    def draw(rng: np.random.Generator, n: int) -> tuple[np.ndarray, np.ndarray]:
        return rng.choice([1.0, 0.0, -1.0], size=n, p=[up, 1 - up - down, down]), np.ones(n)

    return draw


KINDS: dict[str, Draw] = {
    "normal values": lambda rng, n: (rng.normal(1, 1, n), np.ones(n)),
    "exponential values": lambda rng, n: (rng.exponential(1, n), np.ones(n)),
    "skewed values": lambda rng, n: (rng.lognormal(0, 1, n), np.ones(n)),
    "normal gaps": _normal_gaps,
    "shares of skewed gaps": _shares_of_skewed_gaps,
    "one effect, skewed gaps": lambda rng, n: (0.5 + 0.1 * rng.normal(size=n), rng.lognormal(0.5, 0.8, n)),
    "effect on 5 of 10 pairs": _few(0.5),
    "effect on 3 of 10 pairs": _few(0.3),
    "effect on 2 of 10 pairs": _few(0.2),
    "effect on 1 of 10 pairs": _few(0.1),
    "0/1 differs": _outcomes(0.2, 0.2),
    "0/1 differs one way": _outcomes(0.5, 0.0),
    "0/1 seldom differs": _outcomes(0.1, 0.02),
}


SIZES = (10, 20, 30, 100)  # examples


@cache
def true_ratio(draw: Draw) -> float:
    top, bottom = draw(np.random.default_rng(1), 4_000_000)
    return float(top.mean() / bottom.mean())


def coverage(draw: Draw, n: int, trials: int, draws: int = 1000) -> tuple[float, float]:
    """In how many of the trials an interval is given, and how many of those hold the true ratio (NaN: none)."""
    rng = np.random.default_rng(n)
    true = true_ratio(draw)
    seeds = [RatioBootstrap(np.ones(n), draws=draws, seed=seed)._counts for seed in range(20)]  # most of the time
    given = []
    for trial in range(trials):
        top, bottom = draw(rng, n)
        ratios = RatioBootstrap(bottom, draws=draws)
        ratios._counts = seeds[trial % len(seeds)]
        interval = ratios.of(top)
        if not interval.reason:
            given.append(interval.low <= true <= interval.high)
    return len(given) / trials, float(np.mean(given)) if given else float("nan")


def table(trials: int, draws: int = 1000) -> str:
    """Coverage among the intervals that are given; in brackets the share of samples that are given one, below 1."""
    lines = ["| | " + " | ".join(f"n = {n}" for n in SIZES) + " |", "|---|" + "---|" * len(SIZES)]
    for kind, draw in KINDS.items():
        cells = []
        for n in SIZES:
            shown, covered = coverage(draw, n, trials, draws)
            known = "withheld" if shown * trials < 20 else f"{covered:.3f}"
            cells.append(known + (f" ({shown:.2f})" if shown < 0.995 else ""))
        lines.append(f"| {kind} | " + " | ".join(cells) + " |")
    return "\n".join(lines) + "\n"


def main() -> None:
    text = DOCUMENT.read_text(encoding="utf-8")
    before, rest = text.split(BEGIN)
    DOCUMENT.write_text(before + BEGIN + table(2000) + END + rest.split(END)[1], encoding="utf-8")


if __name__ == "__main__":
    main()
