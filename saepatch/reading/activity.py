"""Activity of latents over a stream of texts: counts, histograms, and the stretches where they peak."""

from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saepatch.dictionaries.active_values import ActiveValues

BINS = 20  # bins of a displayed histogram
FINE = 2048  # bins for counting activations of one sign
WINDOW = (24, 8)  # tokens kept before and after the largest activation
BANDS = (0.5, 0.25)  # upper ends of the lower bands of examples, as shares of the maximum; the last one ends at 0
EACH = 2  # examples of a lower band
OCTAVES = 48  # powers of two of magnitudes, from 2^-24, by which candidates for the bands are kept


@dataclass(frozen=True)
class Peak:
    """The stretch of a text around a latent's largest activation: tokens and their activations."""

    text: int
    largest: float
    ids: tuple[int, ...]
    acts: tuple[float, ...]


class Activity:
    """Counts, histograms and peaks of some latents; memory depends on the number of latents, not of texts.

    Attributes:
        texts: Number of texts so far.
        tokens: Number of their ordinary tokens.
        count: Number of these tokens at which each latent is not 0.
        total: Sum of each latent's activations.
        maximum: Largest activation of each latent at any token, with BOS counted as 0.
        peaks: For each latent, stretches of the `examples` texts with the largest positive activations, largest first.
            Repeated stretches are kept once.
        lower: For each latent, candidates for examples of weaker activations: the first `EACH` stretches of each power
            of two. What `bands` takes from them does not depend on the size of batches.
    """

    def __init__(self, latents: int, examples: int) -> None:
        self.texts = self.tokens = 0
        self.examples = examples
        self.count = torch.zeros(latents, dtype=torch.long)
        self.total = torch.zeros(latents, dtype=torch.float64)
        self.maximum = torch.full((latents,), -torch.inf)
        self.values = ActiveValues(latents)
        self.minimum = torch.full((latents,), torch.inf)
        self.peaks: list[list[Peak]] = [[] for _ in range(latents)]
        self.lower: list[list[Peak]] = [[] for _ in range(latents)]
        self._kept = torch.zeros(latents, OCTAVES if examples > 0 else 0, dtype=torch.uint8)
        self._enough = torch.zeros(latents)  # largest activations above this are kept
        # Each latent's bins end at a power of two above its largest magnitude. When that grows, bins are merged in
        # pairs, so that the counts do not depend on the order of the texts.
        self._exponent = torch.zeros(latents, dtype=torch.int32)
        self._bins: list[Int[Tensor, "latents fine"] | None] = [None, None]  # of positive and of negative values

    @torch.no_grad()
    def add(
        self,
        ids: Int[Tensor, "batch pos"],
        real: Bool[Tensor, "batch pos"],
        ordinary: Bool[Tensor, "batch pos"],
        acts: Float[Tensor, "batch pos latents"],
    ) -> None:
        """Add a batch of texts: token ids, masks of non-padding and of ordinary positions, and latents."""
        acts = (acts * ordinary[..., None]).float().cpu()
        ids, real = ids.cpu(), real.cpu()
        largest = acts.masked_fill(~real[..., None], -torch.inf).amax(1)
        self.count += (acts != 0).sum((0, 1))
        self.total += acts.sum((0, 1), dtype=torch.float64)
        self.values.add(acts.flatten(0, 1))
        self.__dict__.pop("units", None)
        self.maximum = torch.maximum(self.maximum, largest.amax(0))
        self.minimum = torch.minimum(self.minimum, acts.masked_fill(~real[..., None], torch.inf).amin((0, 1)))
        self._count_values(acts)
        if self.examples > 0:
            self._keep_peaks(ids, real, acts, largest)
            self._keep_lower(ids, real, acts, largest)
        self.texts += len(ids)
        self.tokens += int(ordinary.sum())

    @cached_property
    def units(self) -> Float[Tensor, "latents"]:
        """The 0.95 quantile of each latent's positive activations so far."""
        return self.values.quantile()

    def _count_values(self, acts: Float[Tensor, "batch pos latents"]) -> None:
        magnitude = acts.abs().amax((0, 1))
        needed = torch.frexp(magnitude).exponent
        fresh = self.count == (acts != 0).sum((0, 1))  # nothing was counted before
        self._exponent = torch.where(fresh, needed, self._exponent)
        while bool((grow := (needed > self._exponent) & (magnitude > 0)).any()):
            for bins in self._bins:
                if bins is not None:
                    joined = bins[grow].view(-1, FINE // 2, 2).sum(-1, dtype=bins.dtype)
                    bins[grow] = torch.cat([joined, torch.zeros_like(joined)], 1)
            self._exponent = self._exponent + grow.int()
        for sign, side in enumerate((acts > 0, acts < 0)):
            latent = side.nonzero()[:, 2]
            if not len(latent):
                continue
            bins = self._bins[sign]
            if bins is None:
                bins = self._bins[sign] = torch.zeros(len(self.count), FINE, dtype=torch.int32)
            share = torch.ldexp(acts[side].abs().double(), -self._exponent[latent])
            place = latent * FINE + (share * FINE).long()
            bins.view(-1).scatter_add_(0, place, torch.ones_like(place, dtype=bins.dtype))

    def histogram(self, latent: int) -> tuple[tuple[int, ...], tuple[float, ...]]:
        """Counts of non-zero activations in bins of equal width, and the edges, from 0 or the minimum to the maximum
        (to the precision of a counting bin). Without any activation: no counts, and the edge 0."""
        if not int(self.count[latent]):
            return (), (0.0,)
        width = 2.0 ** int(self._exponent[latent]) / FINE
        up, down = (torch.zeros(FINE, dtype=torch.int32) if b is None else b[latent] for b in self._bins)
        both = torch.cat([down.flip(0), up])
        used = both.nonzero().flatten()
        first, last = min(FINE, int(used[0])), max(FINE - 1, int(used[-1]))
        joined = -(-(last - first + 1) // BINS)  # counting bins per displayed bin
        counts = torch.cat([both[first:], torch.zeros(BINS * joined, dtype=torch.int32)])[: BINS * joined]
        edges = [(first - FINE + i * joined) * width for i in range(BINS + 1)]
        return tuple(counts.view(BINS, joined).sum(-1).tolist()), tuple(edges)

    def _keep_peaks(
        self,
        ids: Int[Tensor, "batch pos"],
        real: Bool[Tensor, "batch pos"],
        acts: Float[Tensor, "batch pos latents"],
        largest: Float[Tensor, "batch latents"],
    ) -> None:
        rows, latents = (largest > self._enough).nonzero(as_tuple=True)
        for row, latent in zip(rows.tolist(), latents.tolist(), strict=True):
            if float(largest[row, latent]) > float(self._enough[latent]):  # else larger ones of this batch were kept
                self._keep(latent, self._peak(row, latent, ids, real, acts))

    def _keep_lower(
        self,
        ids: Int[Tensor, "batch pos"],
        real: Bool[Tensor, "batch pos"],
        acts: Float[Tensor, "batch pos latents"],
        largest: Float[Tensor, "batch latents"],
    ) -> None:
        octaves = (torch.frexp(largest).exponent + OCTAVES // 2).clamp(0, OCTAVES - 1).long()
        room = self._kept.gather(1, octaves.T).T < EACH
        rows, latents = ((largest > 0) & torch.isfinite(largest) & room).nonzero(as_tuple=True)
        for row, latent in zip(rows.tolist(), latents.tolist(), strict=True):
            octave = int(octaves[row, latent])
            if self._kept[latent, octave] < EACH:
                peak = self._peak(row, latent, ids, real, acts)
                if all(other.ids != peak.ids for other in self.lower[latent]):
                    self._kept[latent, octave] += 1
                    self.lower[latent].append(peak)

    def _peak(
        self,
        row: int,
        latent: int,
        ids: Int[Tensor, "batch pos"],
        real: Bool[Tensor, "batch pos"],
        acts: Float[Tensor, "batch pos latents"],
    ) -> Peak:
        """The stretch around a latent's largest activation in a row."""
        place = int(acts[row, :, latent].masked_fill(~real[row], -torch.inf).argmax())
        start = int(real[row].int().argmax())
        stretch = slice(max(start, place - WINDOW[0]), min(start + int(real[row].sum()), place + WINDOW[1] + 1))
        values = tuple(acts[row, stretch, latent].tolist())
        return Peak(self.texts + row, float(acts[row, place, latent]), tuple(ids[row, stretch].tolist()), values)

    def bands(self, latent: int) -> list[Peak]:
        """Up to `EACH` examples of each lower band of a latent's activations, the stronger band first."""
        top, shown = float(self.maximum[latent]), {peak.ids for peak in self.peaks[latent]}
        found: list[Peak] = []
        for high, low in zip(BANDS, (*BANDS[1:], 0.0), strict=True):
            own = [p for p in self.lower[latent] if low * top < p.largest <= high * top and p.ids not in shown]
            found += sorted(own, key=lambda peak: peak.text)[:EACH]
        return found

    def _keep(self, latent: int, peak: Peak) -> None:
        kept = self.peaks[latent]
        same = next((other for other in kept if other.ids == peak.ids), None)
        if same is not None:
            if peak.largest <= same.largest * (1 + 1e-4):  # repeated, possibly with other rounding in another batch
                return
            kept.remove(same)
        kept.append(peak)
        kept.sort(key=lambda kept_peak: (-kept_peak.largest, kept_peak.text))
        del kept[self.examples :]
        if len(kept) == self.examples:
            self._enough[latent] = kept[-1].largest
