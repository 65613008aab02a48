"""Results of a screen: an estimated effect for every node that differs, and exact effects for verified nodes.

A node is one unit of one site at one position of one pair: a latent, an error term, a query of an attention head.
"""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from saepatch.engine.components import Edit, PatchDirection
from saepatch.errors import UserError
from saepatch.measure.results.effects import ROUNDING, describe
from saepatch.measure.results.gaps import PairGaps, moved_by, towards_source
from saepatch.model.sites import Site
from saepatch.records.rows import Row
from saepatch.records.tables import text_table
from saepatch.report.blocks import Block, Simple
from saepatch.report.notebook import Figure, Shown

log = logging.getLogger(__name__)

Exact = Callable[[list[tuple[int, Edit]]], Float[ndarray, "nodes"]]
ERROR = -1  # the unit of an error term


@dataclass(frozen=True, eq=False)
class Verification:
    """Exact effects of the nodes with the largest estimates and of a random sample of the others.

    `index` are the nodes: the first `largest` are the top of the screen, the others the sample, drawn uniformly without
    replacement from the `others` nodes below the top; in a screen made in parts, from each part separately: `parts`
    lists (number drawn, number of nodes) in the order of the sample. Exact effects and estimates are in units of the
    metric; with `sizes`, estimates are magnitudes (GradDrop), and are correlated with the magnitudes of exact effects.
    `looks` is the number of samples of growing size at which bounds were or could be taken; they hold jointly.
    """

    index: Int[ndarray, "verified"]
    exact: Float[ndarray, "verified"]
    estimated: Float[ndarray, "verified"]
    largest: int
    others: int
    sizes: bool = False
    parts: tuple[tuple[int, int], ...] = ()
    looks: int = 1

    @property
    def sampled(self) -> int:
        return len(self.index) - self.largest

    def pearson(self, sample_only: bool = False) -> float:
        """Correlation of estimates with exact effects; NaN where there is nothing to correlate."""
        from scipy.stats import pearsonr

        return self._correlation(pearsonr, sample_only)

    def spearman(self, sample_only: bool = False) -> float:
        """Rank correlation of estimates with exact effects; NaN where there is nothing to correlate."""
        from scipy.stats import spearmanr

        return self._correlation(spearmanr, sample_only)

    def _correlation(self, function: Callable[..., tuple[float, float]], sample_only: bool) -> float:
        start = self.largest if sample_only else 0
        estimated, exact = self.estimated[start:], self.exact[start:]
        exact = np.abs(exact) if self.sizes else exact
        if len(exact) < 2 or np.ptp(estimated) == 0 or np.ptp(exact) == 0:
            return float("nan")
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # scipy warns of nearly constant values
            return float(function(estimated, exact)[0])

    def threshold(self, k: int | None = None) -> float:
        """Magnitude of the `k`-th largest exact effect among the verified top; None: of the smallest.

        Raises:
            UserError: the top of the screen was not verified, or has fewer than `k` nodes.
        """
        k = self.largest if k is None else k
        if not 1 <= k <= self.largest:
            raise UserError(
                f"k = {k}, but {self.largest} nodes of the top were verified: use 1 to {self.largest}, or verify more"
            )
        return float(np.sort(np.abs(self.exact[: self.largest]))[-k])

    def missed(self, k: int | None = None, level: float = 0.95) -> tuple[int, float, float]:
        """Bound the number of nodes below the top whose effect is at least as large as `threshold(k)`.

        Returns the number of such nodes in the sample, the upper bound on their share among nodes that were not run (at
        `level`, one-sided), and the corresponding number of nodes. The bound is hypergeometric: the sample is uniform
        and the threshold does not depend on it. For a screen in parts it is the sum of the parts' bounds, which hold
        jointly at `level` (Bonferroni).

        Raises:
            UserError: as for `threshold`, or there is no sample.
        """
        if not self.sampled:
            raise UserError("no random sample, which a bound on missed nodes needs: verify with sample=100 or so")
        is_large = np.abs(self.exact[self.largest :]) >= self.threshold(k)
        drawn, others = np.array(self.parts or [(self.sampled, self.others)], dtype=np.int64).T
        part = np.repeat(np.arange(len(drawn)), drawn)
        large = np.bincount(part[is_large], minlength=len(drawn))
        bounded = max(1, int((drawn < others).sum()))  # a part that was run completely needs no bound
        chance = (1 - level) / self.looks / bounded
        most, left = int(most_large(large, drawn, others, chance).sum()), self.others - self.sampled
        return int(is_large.sum()), most / left if left else 0.0, float(most)

    def recall(self, k: int | None = None, level: float = 0.95) -> float:
        """Lower bound (at `level`) on the share of the `k` truly largest nodes that were run exactly; 0 where unknown.

        Raises:
            UserError: as for `threshold`.
        """
        count = self.largest if k is None else k
        self.threshold(count)
        if self.largest + self.others == len(self.index):
            return 1.0
        return max(0.0, 1 - self.missed(count, level)[2] / count) if self.sampled else 0.0

    def summary(self, what: str = "nodes") -> str:
        """Text on what was run exactly and how well the estimates agree."""
        text = f"run exactly: the {self.largest} {what} with the largest estimates"
        text += f", and {self.sampled} drawn at random from the other {self.others}; agreement of "
        text += f"{'estimated sizes' if self.sizes else 'estimates'} with exact effects: "
        text += f"Pearson {self.pearson():.3f}, Spearman {self.spearman():.3f}"
        if not self.sampled:
            return text
        text += f" (in the random draw alone {self.pearson(True):.3f}, {self.spearman(True):.3f})"
        if not self.largest:
            return text
        ranks = sorted({max(1, self.largest // 5), self.largest})
        return "\n".join([text, *(self._bound(k, what) for k in ranks)])

    def _bound(self, k: int, what: str) -> str:
        large, share, most = self.missed(k)
        which = "the smallest" if k == self.largest else f"number {k}"
        return (
            f"missed: {large} of the {self.sampled} drawn are as large as {which} of these {self.largest} by exact "
            f"effect ({self.threshold(k):.3g}); of the {self.others - self.sampled} {what} that were not run, at most "
            f"{int(most)} are ({share:.2%}, 95 % confidence)"
        )


def most_large(
    large: Int[ndarray, "parts"], drawn: Int[ndarray, "parts"], others: Int[ndarray, "parts"], chance: float
) -> Int[ndarray, "parts"]:
    """Upper bound on the large nodes of each part outside its sample: with more of them, drawing so few or fewer
    would have a probability below `chance`."""
    from scipy.stats import hypergeom

    low, high = large, others - (drawn - large)
    while (low < high).any():
        middle = (low + high + 1) // 2
        likely = hypergeom.cdf(large, others, middle, drawn) > chance
        low, high = np.where(likely, middle, low), np.where(likely, high, middle - 1)
    return low - large


@dataclass(frozen=True, eq=False, repr=False)
class Attribution(PairGaps, Shown):
    """Estimated effect of every node that differs between a base and a source run; all others have no effect.

    Entry i is the node of pair `pair[i]` at `sites[site[i]]`, unit `unit[i]` (-1: the error term) and `position[i]`
    (as in `Edit`). `score[i]` estimates the change of the metric by patching it, from the base run towards the source
    run, in the metric's units (with `sizes`, as from GradDrop: its magnitude). `kinds[s]` is the kind of the units at
    `sites[s]`. `clean` and `corrupted` are the metrics of the two runs.
    """

    direction: PatchDirection
    metric: str
    method: str
    positions: str
    sites: tuple[Site, ...]
    kinds: tuple[str, ...]
    examples: tuple[str, ...]
    clean: Float[ndarray, "pairs"]
    corrupted: Float[ndarray, "pairs"]
    pair: Int[ndarray, "nodes"]
    site: Int[ndarray, "nodes"]
    unit: Int[ndarray, "nodes"]
    position: Int[ndarray, "nodes"]
    score: Float[ndarray, "nodes"]
    min_gap: float = 1e-2
    sizes: bool = False
    verified: Verification | None = None
    precision: str = ""  # the model's dtype
    rounding: float = ROUNDING  # share of the mean gap that rounding alone may change
    tokens: tuple[tuple[str, ...], ...] = ()  # of each pair's base prompt; empty where unknown

    def __len__(self) -> int:
        return len(self.score)

    @property
    def normalised(self) -> Float[ndarray, "nodes"]:
        """`score / gap` of each node's pair: 0 is the base run, 1 the source run; NaN where |gap| < `min_gap`.

        For magnitudes, `score / |gap|`.
        """
        gap = self.usable_gap[self.pair]
        return self.score / (np.abs(gap) if self.sizes else gap)

    def shares(self, means: Float[ndarray, "edits"]) -> Float[ndarray, "edits"]:
        """Mean scores as shares of the mean gap (for magnitudes, of its absolute value); NaN for too small a gap."""
        return means / (abs(self.mean_gap) if self.sizes else self.mean_gap)

    def warn_if_flat(self, advice: str) -> None:
        """Warn where all estimates are within rounding although clean and corrupted runs differ."""
        if len(self) and np.abs(self.score).max() < ROUNDING * np.abs(self.gap).mean():
            log.warning(
                "all estimates are within rounding: the metric %s is flat at the base run (as KL is against the base "
                "run itself), so gradients there carry no information: %s", self.metric, advice,
            )  # fmt: skip

    def edit(self, node: int) -> Edit:
        """The edit that patches one node."""
        return self._edit(int(self.site[node]), int(self.unit[node]), int(self.position[node]))

    def _edit(self, site: int, unit: int, position: int | None) -> Edit:
        kind = "error" if unit == ERROR else self.kinds[site]
        return Edit(self.sites[site], (max(unit, 0),), position, kind)

    def means(self, each_position: bool = True) -> tuple[list[Edit], Float[ndarray, "edits"]]:
        """Edits, and the mean of their scores over all pairs (0 where an edit changes nothing).

        Without `each_position`, scores are summed over positions, and edits act at all positions.
        """
        keys, mean = self.key_means(each_position)
        return [self._named(key, each_position) for key in keys.T], mean

    def _named(self, key: Int[ndarray, "3"], each_position: bool) -> Edit:
        return self._edit(int(key[0]), int(key[1]), int(key[2]) if each_position else None)

    def key_means(self, each_position: bool) -> tuple[Int[ndarray, "3 edits"], Float[ndarray, "edits"]]:
        """Site (an index into `sites`), unit and position of every edit, and the mean of its scores as in `means`."""
        position = self.position if each_position else np.zeros_like(self.position)
        columns = (self.site, self.unit, position)
        sizes = [int(np.ptp(c)) + 1 if len(c) else 1 for c in columns]
        lows = [int(c.min()) if len(c) else 0 for c in columns]
        flat = np.ravel_multi_index([c - low for c, low in zip(columns, lows, strict=True)], sizes)
        unique, inverse = np.unique(flat, return_inverse=True)
        mean = np.bincount(inverse.reshape(-1), weights=self.score, minlength=len(unique)) / len(self.examples)
        keys = [part + low for part, low in zip(np.unravel_index(unique, sizes), lows, strict=True)]
        return np.stack(keys).astype(np.int64), mean

    def top(self, k: int, each_position: bool = True, by_size: bool = False) -> list[Edit]:
        """The `k` edits with the largest estimated ratio of means or, with `by_size`, largest |mean|; largest first.

        Raises:
            UserError: clean and corrupted runs are equal on average, so there is no gap to rank by.
        """
        keys, mean = self.key_means(each_position)
        return [self._named(keys[:, i], each_position) for i in self._order(mean, by_size)[:k]]

    def _order(self, mean: Float[ndarray, "edits"], by_size: bool) -> Int[ndarray, "edits"]:
        self.check_gap(self.metric)
        return np.argsort(-(np.abs(mean) if by_size else self.shares(mean)), kind="stable")

    def summary(self, k: int = 10) -> str:
        """The edits with the largest estimates as a table, and the result of verification."""
        keys, mean = self.key_means(True)
        shares = self.shares(mean)
        rows = []
        for i in self._order(mean, False)[:k]:
            edit = self._named(keys[:, i], True)
            what = " ".join(filter(None, (str(edit.site), "" if edit.kind == "latent" else edit.kind, describe(edit))))
            rows.append([what, edit.position, f"{mean[i]:.4f}", f"{shares[i]:.3f}"])
        lines = [text_table(["what", "at", f"{self.method}, mean", "of the gap"], rows)]
        lines.append(
            f"{self.direction}, {self.metric}: {self.ends()}, positions {self.positions}; {len(self)} nodes differ"
        )
        return "\n".join(lines if self.verified is None else [*lines, self.verified.summary()])

    def __repr__(self) -> str:
        from saepatch.measure.results.screen_display import screen_line

        return screen_line(self)

    @property
    def title(self) -> str:
        """Heading shown above the screen."""
        return f"Estimated effects on {len(self.clean)} pairs ({self.direction}, {self.metric.replace('_', ' ')})"

    def blocks(self) -> list[Simple]:
        """The largest estimates, and the result of verification."""
        from saepatch.measure.results.screen_display import screen_blocks

        return screen_blocks(self)

    def figures(self) -> list[Block]:
        """The figure of `plot`."""
        return [] if self.verified is None else [self.plot().chart]

    def plot(self) -> Figure:
        """Estimated against exact effects of the nodes that were run.

        Raises:
            UserError: none was.
        """
        from saepatch.measure.results.screen_display import screen_figure

        return screen_figure(self)

    def to_frame(self, each_position: bool = True) -> Any:
        """A pandas frame with a row for every latent and error term (at every position), largest |estimate| first.

        Columns: site, component, latent (missing for error terms), position and token (with `each_position`),
        direction, metric, method, ratio_of_means (the estimate as a share of the mean gap), mean_estimate (in the
        metric's units), pairs_changed. Types as in `Effects.to_frame`. Estimates have no interval.
        """
        from saepatch.measure.results.frames import attribution_frame

        return attribution_frame(self, each_position)

    def to_pandas(self) -> Any:
        """A pandas frame with a row for every node of every pair: its estimate and, where it was run, its exact effect.

        Both are changes of the metric; `gap` is the pair's.
        """
        from saepatch.measure.results.frames import nodes_frame

        return nodes_frame(self)

    def rows(self, task: str = "", tokens: Sequence[Sequence[str]] | None = None) -> list[Row]:
        """Flat rows: every node with its estimate, then verified nodes again, with method "exact".

        `patched` is the base run's metric plus the estimate, and NaN for a magnitude, whose direction is unknown.
        `tokens`, the texts of each pair's own tokens, are those of the result if not given. Exact rows have the role
        "top" (largest estimates) or "random" (drawn from all others).
        """
        return list(self.rows_at(None, task, self.tokens or None if tokens is None else tokens))

    def rows_at(self, site: int | None, task: str, tokens: Sequence[Sequence[str]] | None = None) -> Iterator[Row]:
        """The rows of the nodes at one site (an index into `sites`), one by one; None: at all sites."""
        kinds = [("single", np.arange(len(self)), self.score)]
        if (run := self.verified) is not None:
            for role, some in (("top", slice(0, run.largest)), ("random", slice(run.largest, None))):
                kinds.append((role, run.index[some], run.exact[some]))
        for role, nodes, scores in kinds:
            mine = slice(None) if site is None else self.site[nodes] == site
            yield from self._rows(task, tokens, nodes[mine], scores[mine], role)

    def _rows(
        self,
        task: str,
        tokens: Sequence[Sequence[str]] | None,
        nodes: Int[ndarray, "some"],
        scores: Float[ndarray, "some"],
        role: str,
    ) -> Iterator[Row]:
        of_size, whose = self.sizes and role == "single", self.pair[nodes]
        gap = np.abs(self.usable_gap) if of_size else self.usable_gap
        rounding = self.rounding * float(np.abs(self.gap).mean())
        patched = moved_by(scores, self.clean[whose], self.corrupted[whose], self.direction == "denoise")
        for node, score, moved in zip(nodes.tolist(), scores.tolist(), patched.tolist(), strict=True):
            edit, pair = self.edit(node), int(self.pair[node])
            at = int(self.position[node])
            yield Row(
                task=task,
                example=self.examples[pair],
                site=str(edit.site),
                component=edit.kind,
                latent=describe(edit),
                role=role,
                position=str(at),
                token="" if tokens is None else tokens[pair][at],
                direction=self.direction,
                metric=self.metric,
                method=self.method if role == "single" else "exact",
                precision=self.precision,
                rounding=rounding,
                clean=float(self.clean[pair]),
                corrupted=float(self.corrupted[pair]),
                patched=float("nan") if of_size else moved,
                effect=score / float(gap[pair]),
            )

    def verify(self, largest: int, sample: int, exact: Exact, seed: int = 0) -> "Attribution":
        """The same with the `largest` nodes by |score| and a random `sample` of the others run exactly.

        `exact` returns the metric under edits, each of one pair.

        Raises:
            UserError: `largest` or `sample` is negative.
        """
        if min(largest, sample) < 0:
            raise UserError(f"verify={largest}, sample={sample}: use 0 or more")
        order = np.argsort(-np.abs(self.score), kind="stable")
        top, others = order[:largest], order[largest:]
        drawn = np.random.default_rng(seed).permutation(others)[:sample]
        index = np.concatenate([top, drawn])
        values, whose = exact([(int(self.pair[node]), self.edit(int(node))) for node in index]), self.pair[index]
        effects = towards_source(values, self.clean[whose], self.corrupted[whose], self.direction == "denoise")
        estimated = self.score[index]
        return replace(self, verified=Verification(index, effects, estimated, len(top), len(others), self.sizes))
