"""The encoder over chunks of rows, and exact selection of its largest values.

Selection has two stages, because a full `topk` over d_sae values takes a large fraction of the encoder's time. The
first finds the largest value of every group of neighbouring latents in one vectorised pass. The k-th largest of these
peaks is a lower bound of the k-th largest value, so that only the k groups whose peaks reach it need to be searched.
"""

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

import numpy as np
import torch
from jaxtyping import Float, Int, Shaped
from torch import Tensor
from torch.nn.functional import embedding, linear

from ..config import SAEConfig
from ..ranks import ALONE, Ranks
from .step import Weights, bfloat16_works

# A chunk's pre-activations should stay in the CPU's cache for the selection; a GPU needs large products.
CHUNK_BYTES = {"cpu": 2**24}
LARGE_CHUNK_BYTES = 2**29
FEWEST_ROWS = 256  # with fewer, packing the weights dominates the product

SMALLEST = torch.finfo(torch.float32).tiny


@dataclass(frozen=True, eq=False)
class Entries:
    """Values of latents in a batch, ordered by position.

    Attributes:
        row: Positions in the batch.
        latent: Latents.
        value: Their values.
    """

    row: Int[Tensor, "n"]
    latent: Int[Tensor, "n"]
    value: Float[Tensor, "n"]


@dataclass(eq=False)
class Encoder:
    """The pre-activations of a batch in chunks of rows, so that they are never all in memory.

    Attributes:
        x: Activations minus `b_dec`, float32.
        W_enc: Encoder, in the precision of the product.
        b_enc: Its bias in the same precision; None: no bias.
        rows: Rows per chunk.
        columns: Latents whose pre-activations are kept, or None.
        n_kept: Number of rows, from the first on, whose pre-activations are kept.
        mean_kept: Mean of `n_kept` over all processes.
        kept: Pre-activations kept in the last iteration over the chunks.
    """

    x: Float[Tensor, "batch d_in"]
    W_enc: Shaped[Tensor, "d_sae d_in"]
    b_enc: Shaped[Tensor, "d_sae"] | None
    rows: int
    columns: Int[Tensor, "columns"] | None = None
    n_kept: int = 0
    mean_kept: float = 0.0
    kept: list[Float[Tensor, "_ columns"]] = field(default_factory=list)

    @classmethod
    def of(cls, weights: Weights, x: Float[Tensor, "batch d_in"], config: SAEConfig) -> "Encoder":
        """The encoder of these weights; its product is in bfloat16 if configured and supported by the device."""
        dtype = product_dtype(config, x.device)
        W_enc, b_enc = weights["W_enc"].to(dtype), weights["b_enc"].to(dtype)
        size = CHUNK_BYTES.get(x.device.type, LARGE_CHUNK_BYTES)
        return cls(x - weights["b_dec"], W_enc, b_enc, max(FEWEST_ROWS, size // (4 * len(W_enc))))

    def chunks(self) -> Iterator[tuple[int, Float[Tensor, "rows d_sae"]]]:
        """The index of each chunk's first row, and its pre-activations in float32."""
        self.kept = []
        for start in range(0, len(self.x), self.rows):
            pre = product(self.x[start : start + self.rows].to(self.W_enc.dtype), self.W_enc, self.b_enc).float()
            if self.columns is not None and start < self.n_kept:
                self.kept.append(pre[: self.n_kept - start].index_select(1, self.columns))
            yield start, pre


def product_dtype(config: SAEConfig, device: torch.device) -> torch.dtype:
    """Precision of the large matrix products: as configured, but float32 where bfloat16 would be emulated."""
    half = config.precision == "bfloat16" and bfloat16_works(device)
    return torch.bfloat16 if half else torch.float32


def product(
    x: Shaped[Tensor, "n d_in"], W: Shaped[Tensor, "m d_in"], b: Shaped[Tensor, "m"] | None = None
) -> Shaped[Tensor, "n m"]:
    """x Wᵀ + b. Uses oneDNN on the CPU, which torch does for bfloat16 only: MKL takes twice as long on AMD."""
    if (
        x.device.type == "cpu"
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
    ):
        return torch.ops.mkldnn._linear_pointwise(x, W, b, "none", [], "")
    return linear(x, W, b)


def select_rows(encoder: Encoder, k: int, shards: Ranks = ALONE) -> Entries:
    """The k largest pre-activations at each position after a ReLU; those of this process' latents, of all shards."""
    latents, values = [], []
    each = min(k, len(encoder.W_enc))
    for _, pre in encoder.chunks():
        latents.append(largest(pre, each))
        values.append(pre.gather(1, latents[-1]).relu_())
    latent, value = torch.cat(latents), torch.cat(values)
    if shards.size > 1:
        return own_largest(latent, value, k, shards)
    row = torch.arange(len(encoder.x), device=encoder.x.device).repeat_interleave(each)
    return Entries(row, latent.flatten(), value.flatten())


def own_largest(latent: Int[Tensor, "rows each"], value: Float[Tensor, "rows each"], k: int, shards: Ranks) -> Entries:
    """Of the k largest values of each row over all shards' candidates, those of this process."""
    every = torch.cat(shards.gathered(value).unflatten(0, (shards.size, -1)).unbind(0), 1)  # [rows, shards · each]
    mine = torch.zeros_like(every, dtype=torch.bool).scatter_(1, every.topk(k, sorted=False).indices, True)
    start = shards.rank * value.shape[1]
    row, place = mine[:, start : start + value.shape[1]].nonzero(as_tuple=True)
    return Entries(row, latent[row, place], value[row, place])


def select_batch(encoder: Encoder, k: int, ranks: Ranks, shared: bool = False) -> tuple[Entries, Float[Tensor, ""]]:
    """The k · batch largest positive pre-activations over all processes' batches, and the smallest of them (or 0).

    `shared`: the processes have the same batch, and each its own latents.

    The selection is over all batches together, so one process may have more than its share; the returned entries are
    those of this process.

    Values below a bound are skipped. The bound is estimated from the first chunk of rows and checked against the
    result; if it was too high, the result yields a valid one.
    """
    count = k * len(encoder.x) * (1 if shared else ranks.size)
    bound: float | None = None
    while True:
        candidates, bound = _above(encoder, bound, k)
        n = torch.tensor([len(candidates.value)], device=candidates.value.device)
        most = int(ranks.gathered(n).max())
        values = ranks.gathered(torch.nn.functional.pad(candidates.value, (0, most - len(candidates.value))))
        top = values.topk(min(count, len(values)), sorted=False)
        smallest = float(top.values.min()) if len(values) >= count else 0.0
        # The candidates are a subset of all values, so their k-th largest is at most the true one: a valid bound.
        highest = float(ranks.gathered(torch.tensor([bound], device=values.device)).max())
        if smallest >= highest or highest <= SMALLEST:
            break
        bound = max(smallest, SMALLEST)
    chosen = torch.zeros(len(values), dtype=torch.bool, device=values.device)
    chosen[top.indices] = True
    own = chosen[ranks.rank * most :][: len(candidates.value)].nonzero().squeeze(1)
    active = top.values[top.values > 0]
    lowest = active.min() if len(active) else values.new_zeros(())
    return Entries(candidates.row[own], candidates.latent[own], candidates.value[own]), lowest


def _above(encoder: Encoder, bound: float | None, k: int) -> tuple[Entries, float]:
    """All pre-activations that reach the bound (above 0), and the bound; None: a bound is estimated for k per row."""
    parts = []
    for start, pre in encoder.chunks():
        size = _group(pre.shape[1], 1)
        groups = pre.view(-1, size)
        peaks = groups.amax(1)
        if bound is None:
            # The variance of the counts per row is about their mean; the margin is eight standard errors.
            expected = math.ceil(k * len(pre) * (1 + 8 / math.sqrt(len(pre))))
            bound = max(_nth_largest(peaks, min(expected, len(peaks))), SMALLEST)
        near = _positions(peaks >= bound)
        values = embedding(near, groups)
        hits = _positions((values >= bound).flatten())
        place = near[hits // size] * size + hits % size
        parts.append((place + start * pre.shape[1], values.flatten()[hits]))
    place, value = (torch.cat(part) for part in zip(*parts))
    assert bound is not None
    d_sae = len(encoder.W_enc)
    return Entries(place // d_sae, place % d_sae, value), bound


def largest(values: Float[Tensor, "rows n"], k: int) -> Int[Tensor, "rows k"]:
    """Columns of the k largest values of each row, unordered; ties are broken arbitrarily."""
    rows, n = values.shape
    size = _group(n, 4 * k)
    if size == 1:
        return _largest(values, k)
    groups = _largest(values.view(rows, -1, size).amax(-1), k)
    first = torch.arange(rows, device=values.device).unsqueeze(1) * (n // size)
    inside = embedding((groups + first).flatten(), values.view(-1, size)).view(rows, -1)
    place = _largest(inside, k)
    return groups.gather(1, place // size) * size + place % size


def ordered(ids: Int[Tensor, "n"], count: int) -> tuple[Int[Tensor, "n"], Int[Tensor, "ends"]]:
    """The stable order that sorts ids below `count`, and where each id begins in it, with the total at the end."""
    if ids.device.type == "cpu":
        # numpy uses a radix sort for 16 bits, which is many times faster than torch's sort.
        keys = ids.numpy().astype(np.uint16 if count <= 2**16 else np.int64)
        order = torch.from_numpy(np.argsort(keys, kind="stable"))
    else:
        order = torch.argsort(ids, stable=True)
    ends = torch.bincount(ids, minlength=count).cumsum(0)
    return order, torch.cat([ends.new_zeros(1), ends])


def _group(n: int, fewest: int) -> int:
    """Size of equal groups of which there are at least `fewest`; 1: no groups."""
    return next((size for size in (32, 16, 8) if n % size == 0 and n // size >= fewest), 1)


# On the CPU numpy's vectorised selection is several times faster than torch's.
def _largest(values: Float[Tensor, "rows n"], k: int) -> Int[Tensor, "rows k"]:
    if values.device.type != "cpu":
        return values.topk(k, sorted=False).indices
    n = values.shape[1]
    return torch.from_numpy(np.argpartition(values.numpy(), n - k, axis=1)[:, n - k :].copy())


def _nth_largest(values: Float[Tensor, "n"], nth: int) -> float:
    if values.device.type != "cpu":
        return float(values.topk(nth, sorted=False).values.min())
    return float(np.partition(values.numpy(), len(values) - nth)[len(values) - nth])


def _positions(mask: Shaped[Tensor, "n"]) -> Int[Tensor, "_"]:
    if mask.device.type != "cpu":
        return mask.nonzero().squeeze(1)
    return torch.from_numpy(np.flatnonzero(mask.numpy()))
