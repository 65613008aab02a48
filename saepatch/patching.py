"""Exact activation patching of latents: the effect of every edit, each run through the model's own later blocks."""

import logging
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from tqdm import tqdm

from saepatch.dictionaries import Dictionary
from saepatch.errors import UserError
from saepatch.hooks import edit_sites, skip_blocks
from saepatch.latents import Latents
from saepatch.metrics import Metric, logit_difference, metric_name
from saepatch.models import LanguageModel, Tokens
from saepatch.positions import Positions
from saepatch.prompts import PairBatch, PromptPair, batch_pairs, same_length_batches
from saepatch.results import Row
from saepatch.sites import Site
from saepatch.splicing import line_up, record_latents, whole_prompt
from saepatch.statistics import Interval, bootstrap_mean, bootstrap_ratio

log = logging.getLogger(__name__)

Direction = Literal["denoise", "noise"]
Group = tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Effects:
    """What patching each group of latents does to the metric, for every pair.

    `patched[pair, group]` is the metric under the edit. Denoising patches the clean run's latents into the corrupted
    run (are they sufficient?), noising the other way round (are they necessary?). `ran` is false where the two runs
    have the same latents, so the edit is nothing and `patched` is the base run's own value.
    """

    site: Site
    direction: Direction
    metric: str
    position: str
    groups: tuple[Group, ...]
    examples: tuple[str, ...]
    clean: Float[np.ndarray, "pairs"]
    corrupted: Float[np.ndarray, "pairs"]
    patched: Float[np.ndarray, "pairs groups"]
    ran: Bool[np.ndarray, "pairs groups"]
    min_gap: float
    roles: tuple[str, ...] = ()  # of the groups, for their rows; none: "single" for all

    @property
    def _sign_and_base(self) -> tuple[float, Float[np.ndarray, "pairs"]]:
        return (1.0, self.corrupted) if self.direction == "denoise" else (-1.0, self.clean)

    @property
    def gap(self) -> Float[np.ndarray, "pairs"]:
        """Metric of the clean run minus that of the corrupted run."""
        return self.clean - self.corrupted

    @property
    def change(self) -> Float[np.ndarray, "pairs groups"]:
        """How far each edit moves the metric from the base run towards the source run, in the metric's units."""
        sign, base = self._sign_and_base
        return sign * (self.patched - base[:, None])

    @property
    def normalised(self) -> Float[np.ndarray, "pairs groups"]:
        """`change / gap`, not clipped: 0 is the base run, 1 the source run; NaN where |gap| < `min_gap`."""
        usable = np.abs(self.gap) >= self.min_gap
        gap = np.where(usable, self.gap, np.nan)
        return self.change / gap[:, None]

    @property
    def missing(self) -> int:
        """Pairs whose gap is too small to divide by."""
        return int((np.abs(self.gap) < self.min_gap).sum())

    def of(self, group: int, seed: int = 0) -> Interval:
        """Ratio of means of the group at this index, bootstrapped over pairs: the headline effect."""
        return bootstrap_ratio(self.change[:, group], self.gap, seed=seed)

    def mean_of_ratios(self, group: int, seed: int = 0) -> Interval:
        """Mean of the per-pair normalised effects, pairs with too small a gap left out."""
        return bootstrap_mean(self.normalised[:, group], seed=seed)

    def ratios(self) -> Float[np.ndarray, "groups"]:
        """Ratio of means of every group, without intervals.

        Raises:
            UserError: clean and corrupted runs are the same on average, so there is nothing to divide by.
        """
        if not abs(float(self.gap.mean())) >= self.min_gap:
            raise UserError(
                f"the clean and corrupted runs differ by {self.gap.mean():.2g} in {self.metric} on average, less than "
                f"{self.min_gap}: there is no effect to rank latents by; look at the pairs and their answers"
            )
        return self.change.mean(0) / self.gap.mean()

    def top(self, k: int) -> list[Group]:
        """The `k` groups with the largest ratio of means, largest first."""
        order = np.argsort(-self.ratios(), kind="stable")[:k]
        return [self.groups[i] for i in order]

    def rows(self, task: str, method: str = "exact") -> list[Row]:
        """Flat rows: each group on each pair, with the base run's own value where the edit was nothing.

        Of latents that were swept alone ("single"), only the edits that ran: all others did nothing.
        """
        normalised = self.normalised
        roles = self.roles or ("single",) * len(self.groups)
        names = [
            "all" if role == "every" else ",".join(map(str, g)) for g, role in zip(self.groups, roles, strict=True)
        ]
        wanted = self.ran | np.array([role != "single" for role in roles])[None]
        return [
            Row(
                task=task,
                example=self.examples[pair],
                site=str(self.site),
                latents=names[group],
                role=roles[group],
                position=self.position,
                direction=self.direction,
                metric=self.metric,
                method=method,
                clean=float(self.clean[pair]),
                corrupted=float(self.corrupted[pair]),
                patched=float(self.patched[pair, group]),
                effect=float(normalised[pair, group]),
            )
            for pair, group in zip(*np.nonzero(wanted), strict=True)
        ]


def patch_latents(
    model: LanguageModel,
    dictionary: Dictionary,
    pairs: Sequence[PromptPair],
    latents: Sequence[int | Sequence[int]] | None = None,
    positions: Positions = "all",
    direction: Direction = "denoise",
    metric: Metric = logit_difference,
    min_gap: float = 1e-2,
    align: Literal["equal", "right"] = "equal",
    batch_size: int = 64,
    progress: bool = False,
) -> Effects:
    """Patch each latent, or group of latents, between the runs of every pair, each alone, error term kept.

    `latents` lists single latents or groups that are patched together; None means every latent, each alone. Only edits
    that change something are run; they resume after the site, `batch_size` at a time. `align` is that of `batch_pairs`.

    Raises:
        UserError: unknown latents, an unknown direction, or pairs that do not line up.
    """
    if direction not in ("denoise", "noise"):
        raise UserError(f"unknown direction {direction!r}: use 'denoise' or 'noise'")
    dictionary.check(model)
    groups = _groups(latents, dictionary)
    batch = batch_pairs(model, pairs, align=align)
    clean, corrupted = np.empty(len(pairs)), np.empty(len(pairs))
    patched, ran = np.empty((len(pairs), len(groups))), np.zeros((len(pairs), len(groups)), dtype=bool)
    bar = tqdm(total=len(pairs), desc=f"{direction} {dictionary.site}", unit="pair", disable=not progress, leave=False)
    with bar:
        for part in same_length_batches(batch, batch_size):
            index = part.index.cpu().numpy()
            clean[index] = metric(model.next_logits(part.clean), part).cpu().numpy()
            corrupted[index] = metric(model.next_logits(part.corrupted), part).cpu().numpy()
            base, source = (part.corrupted, part.clean) if direction == "denoise" else (part.clean, part.corrupted)
            patched[index] = (corrupted if direction == "denoise" else clean)[index][:, None]
            sweep = _Sweep(model, dictionary, part, base, source, positions)
            for row, group, value in sweep.run(groups, metric, batch_size):
                patched[index[row], group] = value
                ran[index[row], group] = True
            bar.update(len(part))
    return Effects(
        site=dictionary.site,
        direction=direction,
        metric=metric_name(metric),
        position=positions if isinstance(positions, str) else repr(positions),
        groups=groups,
        examples=tuple(pair.example or str(number) for number, pair in enumerate(pairs)),
        clean=clean,
        corrupted=corrupted,
        patched=patched,
        ran=ran,
        min_gap=min_gap,
    )


def _groups(latents: Sequence[int | Sequence[int]] | None, dictionary: Dictionary) -> tuple[Group, ...]:
    if latents is None:
        return tuple((latent,) for latent in range(dictionary.d_sae))
    groups = tuple((int(g),) if isinstance(g, (int, np.integer)) else tuple(int(i) for i in g) for g in latents)
    if not groups or not all(groups):
        raise UserError("there are no latents to patch: give at least one, and no empty group")
    for group in groups:
        dictionary.check_ids(group)
    return groups


class _Sweep:
    """All edits over one batch of pairs of one length."""

    def __init__(
        self,
        model: LanguageModel,
        dictionary: Dictionary,
        batch: PairBatch,
        base: Tokens,
        source: Tokens,
        positions: Positions,
    ) -> None:
        self.model, self.site, self.batch, self.base = model, dictionary.site, batch, base
        self.latents: Latents = record_latents(model, dictionary, base)
        where = whole_prompt(model, base).select(positions) & line_up(base, source)
        change = record_latents(model, dictionary, source).acts - self.latents.acts
        self.change = torch.where(where[..., None], change, torch.zeros_like(change))
        self.x = self.latents.reconstruction + self.latents.error

    def run(self, groups: Sequence[Group], metric: Metric, batch_size: int) -> Iterator[tuple[int, int, float]]:
        """(row, group index, metric) of every edit that changes something."""
        differs = self.change.ne(0).any(1).cpu()  # [row, latent]
        edits = [
            (row, number)
            for row in range(len(self.batch))
            for number, group in enumerate(groups)
            if bool(differs[row, list(group)].any())
        ]
        for start in range(0, len(edits), batch_size):
            chunk = edits[start : start + batch_size]
            rows = [row for row, _ in chunk]
            x = torch.stack([self.x[row] + self._delta(row, groups[number]) for row, number in chunk])
            values = metric(self._resume(x, self.base.rows(rows)), self.batch.rows(rows))
            for (row, number), value in zip(chunk, values.tolist(), strict=True):
                if math.isnan(value):
                    raise UserError(
                        f"the metric is NaN for pair {self.batch.pairs[row].example!r}, latents {groups[number]}"
                    )
                yield row, number, value

    def _delta(self, row: int, group: Group) -> Float[Tensor, "pos d_model"]:
        ids = list(group)
        delta = self.change[row][:, ids] @ self.latents.rows[ids]
        return delta if self.latents.scale is None else delta * self.latents.scale[row]

    def _resume(self, x: Float[Tensor, "edits pos d_model"], tokens: Tokens) -> Float[Tensor, "edits vocab"]:
        """Next-token logits with the site set to `x`; blocks before it have no say any more and are skipped."""
        value = x.to(self.model.dtype)
        with (
            skip_blocks(self.model.layout, self.site.blocks_before),
            edit_sites(self.model.layout, {self.site: lambda _: value}),
        ):
            return self.model.next_logits(tokens)
