"""Training steps of TopK, BatchTopK and Matryoshka dictionaries, whose cost depends on the active latents only.

The losses are those of sae_lens' `TopKTrainingSAE`, `BatchTopKTrainingSAE` and `MatryoshkaBatchTopKTrainingSAE` for
decoder rows of norm 1: squared error summed over d_in, for matryoshka at every level (Bussmann et al. 2025, arXiv
2503.17547); for dead latents the auxiliary loss of Gao et al. 2024 (arXiv 2406.04093), over a share of the positions.

Only the encoder is a dense product. With k of d_sae latents active, decoding sums k weighted rows of `W_dec`;
the gradient of a latent's weights is a weighted sum of the rows of the batch where it was active. Both are an
`embedding_bag`, the second over entries sorted by latent. Gradients are written by hand, without autograd.
"""

import math
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor
from torch.nn.functional import embedding_bag

from ..config import SAEConfig
from ..ranks import ALONE, Ranks
from .selection import (
    Encoder,
    Entries,
    largest,
    ordered,
    own_largest,
    product,
    product_dtype,
    select_batch,
    select_rows,
)
from .step import Moment, Step, Weights


def topk(
    weights: Weights,
    x: Float[Tensor, "batch d_in"],
    config: SAEConfig,
    now: Moment,
    ranks: Ranks,
    shards: Ranks = ALONE,
) -> Step:
    """The step of a TopK dictionary: the `config.k` largest positive latents of each position are active.

    `shards` are the processes among which the latents are divided, in equal ranges, here as below.
    """
    encoder = _encoder(weights, x, config, now, ranks, shards)
    entries = select_rows(encoder, config.k, shards)
    return _step(weights, encoder, entries, config, [shards.size * len(weights["W_dec"])], shards=shards)


def batchtopk(
    weights: Weights,
    x: Float[Tensor, "batch d_in"],
    config: SAEConfig,
    now: Moment,
    ranks: Ranks,
    shards: Ranks = ALONE,
) -> Step:
    """The step of a BatchTopK dictionary: `config.k` latents are active on average, over all processes' batches."""
    encoder = _encoder(weights, x, config, now, ranks, shards)
    entries, smallest = _of_batch(encoder, config.k, ranks, shards)
    return _step(weights, encoder, entries, config, [shards.size * len(weights["W_dec"])], smallest, shards)


def matryoshka(
    weights: Weights,
    x: Float[Tensor, "batch d_in"],
    config: SAEConfig,
    now: Moment,
    ranks: Ranks,
    shards: Ranks = ALONE,
) -> Step:
    """The step of a Matryoshka dictionary: BatchTopK, with a reconstruction by the latents of each level alone.

    The loss has a term `mse_WIDTH` for every inner level.
    """
    encoder = _encoder(weights, x, config, now, ranks, shards)
    entries, smallest = _of_batch(encoder, config.k, ranks, shards)
    widths = config.widths(shards.size * len(weights["W_dec"]))
    return _step(weights, encoder, entries, config, widths, smallest, shards)


def _of_batch(encoder: Encoder, k: int, ranks: Ranks, shards: Ranks) -> tuple[Entries, Float[Tensor, ""]]:
    return select_batch(encoder, k, shards, shared=True) if shards.size > 1 else select_batch(encoder, k, ranks)


@dataclass(frozen=True, eq=False)
class LossPart:
    """A part of the loss, from which its gradients are computed.

    Attributes:
        entries: The values that are decoded.
        pulls: The gradient with respect to each value.
        source: For each entry, the row of `errors` that its decoder row's gradient uses.
        errors: The gradient with respect to each reconstruction.
    """

    entries: Entries
    pulls: Float[Tensor, "n"]
    source: Int[Tensor, "n"]
    errors: Float[Tensor, "bags d_in"]


def _encoder(
    weights: Weights, x: Float[Tensor, "batch d_in"], config: SAEConfig, now: Moment, ranks: Ranks, shards: Ranks
) -> Encoder:
    encoder = Encoder.of(weights, x, config)
    if now.dead is not None and config.aux_coefficient and (shards.size > 1 or bool(now.dead.any())):
        encoder.columns = now.dead.nonzero().squeeze(1)
        # The first rows of the whole batch, whose rows are distributed over the processes in turn.
        rows = max(ranks.size, math.ceil(config.aux_share * len(x) * ranks.size))
        encoder.n_kept, encoder.mean_kept = -((ranks.rank - rows) // ranks.size), rows / ranks.size
    return encoder


def _step(
    weights: Weights,
    encoder: Encoder,
    entries: Entries,
    config: SAEConfig,
    widths: list[int],
    smallest: Float[Tensor, ""] | None = None,
    shards: Ranks = ALONE,
) -> Step:
    share, squares, residual = _reconstruct(weights["W_dec"], encoder.x, entries, widths, shards)
    losses = {"mse": squares[-1], **{f"mse_{width}": square for width, square in zip(widths[:-1], squares)}}
    shares = [share]
    if encoder.columns is not None:
        losses["auxiliary"], dead = _auxiliary(weights["W_dec"], encoder, residual, config, shards)
        shares.append(dead)
    fired = torch.zeros(len(weights["W_dec"]), dtype=torch.bool, device=encoder.x.device)
    active = entries.value > 0
    fired[entries.latent[active]] = True
    # The first level's errors include those of all levels, and the bias is in every level.
    b_dec = share.errors[: len(encoder.x)].sum(0)
    gradients = _gradients(weights, encoder.x, shares, b_dec, shards)
    return Step(losses, gradients, fired, shards.sum_(active.sum()) / len(encoder.x), smallest)


def _reconstruct(
    W_dec: Float[Tensor, "d_sae d_in"],
    x: Float[Tensor, "batch d_in"],
    entries: Entries,
    widths: list[int],
    shards: Ranks,
) -> tuple[LossPart, Float[Tensor, "levels"], Float[Tensor, "batch d_in"]]:
    """The squared error at every level, its gradient, and the whole dictionary's residual of x (minus b_dec)."""
    batch, levels = len(x), len(widths)
    bag = entries.row
    if levels > 1:
        bounds = torch.tensor(widths, device=x.device)
        bag = bag + batch * torch.bucketize(entries.latent + shards.rank * len(W_dec), bounds, right=True)
        order, offsets = ordered(bag, batch * levels)
        bag = bag[order]
        entries = Entries(entries.row[order], entries.latent[order], entries.value[order])
    else:
        offsets = torch.searchsorted(bag, torch.arange(batch + 1, device=x.device))
    errors = embedding_bag(
        entries.latent, W_dec, offsets, per_sample_weights=entries.value, mode="sum", include_last_offset=True
    ).view(levels, batch, -1)
    errors = shards.sum_(errors)
    errors[0] -= x
    for level in range(1, levels):  # cumsum is many times slower
        errors[level] += errors[level - 1]
    squares = torch.stack([error.flatten().dot(error.flatten()) for error in errors]) / batch
    residual = -errors[-1]
    errors.mul_(2 / batch)
    for level in reversed(range(levels - 1)):  # a latent belongs to its own level and all wider ones
        errors[level] += errors[level + 1]
    errors = errors.view(levels * batch, -1)
    pulls = torch.ops.aten._embedding_bag_per_sample_weights_backward(
        errors, W_dec, entries.latent, offsets[:-1], bag, 0, -1
    )
    return LossPart(entries, pulls.mul_(entries.value > 0), bag, errors), squares, residual


def _auxiliary(
    W_dec: Float[Tensor, "d_sae d_in"],
    encoder: Encoder,
    residual: Float[Tensor, "batch d_in"],
    config: SAEConfig,
    shards: Ranks,
) -> tuple[Float[Tensor, ""], LossPart]:
    """The auxiliary loss (reconstruction of the residual by the dead latents closest to activity) and its gradients."""
    dead = encoder.columns
    assert dead is not None
    pre, residual = torch.cat(encoder.kept), residual[: encoder.n_kept]
    most = max(1, W_dec.shape[1] // 2)
    counts = shards.gathered(torch.tensor([len(dead)], device=dead.device))
    k = min(most, int(counts.sum()))
    weight = config.aux_coefficient * k / most
    if shards.size > 1:
        return _auxiliary_of_shards(W_dec, encoder, pre, residual, (k, int(counts.max())), weight, shards)
    place = largest(pre, k)
    latent, value = dead[place], pre.gather(1, place)
    errors = embedding_bag(latent, W_dec, per_sample_weights=value, mode="sum").sub_(residual)
    loss = errors.square().sum() * (weight / encoder.mean_kept)
    errors.mul_(2 * weight / encoder.mean_kept)
    # With this many entries per row, one dense product is faster than separate dot products.
    dtype = product_dtype(config, W_dec.device)
    pulls = product(errors.to(dtype), W_dec.index_select(0, dead).to(dtype)).gather(1, place).float()
    source = torch.arange(len(pre), device=dead.device).repeat_interleave(k)
    return loss, LossPart(Entries(source, latent.flatten(), value.flatten()), pulls.flatten(), source, errors)


def _auxiliary_of_shards(
    W_dec: Float[Tensor, "d_sae d_in"],
    encoder: Encoder,
    pre: Float[Tensor, "rows dead"],
    residual: Float[Tensor, "rows d_in"],
    sizes: tuple[int, int],
    weight: float,
    shards: Ranks,
) -> tuple[Float[Tensor, ""], LossPart]:
    """The same, where each process has its own dead latents; `sizes` are of the selection and of the most of them."""
    dead, (k, most) = encoder.columns, sizes
    assert dead is not None
    each = min(k, most)
    pre = torch.nn.functional.pad(pre, (0, max(0, each - pre.shape[1])), value=-torch.inf)  # as many in every process
    value, place = pre.topk(each)
    chosen = own_largest(place, value, k, shards)
    chosen = Entries(chosen.row, dead[chosen.latent], chosen.value)
    bags = torch.searchsorted(chosen.row, torch.arange(len(pre) + 1, device=dead.device))
    errors = embedding_bag(
        chosen.latent, W_dec, bags, per_sample_weights=chosen.value, mode="sum", include_last_offset=True
    )
    errors = shards.sum_(errors).sub_(residual)
    loss = errors.square().sum() * (weight / encoder.mean_kept)
    errors.mul_(2 * weight / encoder.mean_kept)
    pulls = torch.linalg.vecdot(errors[chosen.row], W_dec[chosen.latent])
    return loss, LossPart(chosen, pulls, chosen.row, errors)


def _gradients(
    weights: Weights,
    x: Float[Tensor, "batch d_in"],
    shares: list[LossPart],
    b_dec: Float[Tensor, "d_in"],
    shards: Ranks,
) -> Weights:
    """Gradients of all weights; `b_dec` is the gradient of the bias through the decoder."""
    if len(shares) == 1:
        entries, pulls, source, errors = shares[0].entries, shares[0].pulls, shares[0].source, shares[0].errors
        row, latent, value = entries.row, entries.latent, entries.value
    else:
        row = torch.cat([share.entries.row for share in shares])
        latent = torch.cat([share.entries.latent for share in shares])
        value = torch.cat([share.entries.value for share in shares])
        pulls = torch.cat([share.pulls for share in shares])
        source = torch.cat([shares[0].source, shares[1].source + len(shares[0].errors)])
        errors = torch.cat([share.errors for share in shares])
    order, offsets = ordered(latent, len(weights["W_dec"]))

    def summed(table: Tensor, index: Tensor, factors: Tensor) -> Tensor:
        index, factors = index.index_select(0, order), factors.index_select(0, order)
        return embedding_bag(index, table, offsets, per_sample_weights=factors, mode="sum", include_last_offset=True)

    b_enc = torch.zeros_like(weights["b_enc"]).index_add_(0, latent, pulls)
    return {
        "W_enc": summed(x, row, pulls),
        "W_dec": summed(errors, source, value),
        "b_enc": b_enc,
        "b_dec": b_dec - shards.sum_(b_enc @ weights["W_enc"]),  # the encoder reads x - b_dec
    }
