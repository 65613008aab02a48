"""The interface of a training step: its weights, its inputs, its results.

A step is a function `(weights, x, config, now, ranks) -> Step`. It writes nothing: the learner applies the gradients.

Weights are float32 and named as sae_lens names them, with one difference: `W_enc` is latent-major, `[d_sae, d_in]` like
`W_dec`, so that a latent's weights lie together. Rows of `W_dec` have norm 1 at all times (the learner sees to it), so
that no penalty needs their norms. The encoder reads `x - b_dec`, in every architecture.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from ..config import SAEConfig
from ..ranks import Ranks

Weights = dict[str, Tensor]


@dataclass(frozen=True, eq=False)
class Moment:
    """What a step depends on beside the weights and the batch.

    Attributes:
        dead: Latents that have not been active for `config.dead_after` tokens, or None where none is dead.
        sparsity: Coefficient of the sparsity penalty, its warm-up applied.
        p: Exponent of the standard SAE's penalty.
    """

    dead: Bool[Tensor, "d_sae"] | None = None
    sparsity: float = 1.0
    p: float = 1.0


@dataclass(frozen=True, eq=False)
class Step:
    """The result of a step on this process's share of a batch.

    Attributes:
        losses: Terms of the loss by name, each a mean over the batch; `mse` (summed over d_in) is always among them.
        gradients: Gradient of the sum of the terms, by name of the weights.
        fired: Latents that were active at one position or more.
        l0: Active latents at a position, on average.
        smallest: Smallest active value over the batches of all processes (batchtopk, matryoshka); 0 where none is.
    """

    losses: dict[str, Float[Tensor, ""]]
    gradients: Weights
    fired: Bool[Tensor, "d_sae"]
    l0: Float[Tensor, ""]
    smallest: Float[Tensor, ""] | None = None


StepFunction = Callable[[Weights, Float[Tensor, "batch d_in"], SAEConfig, Moment, Ranks], Step]


def bfloat16_works(device: torch.device) -> bool:
    """Whether matrix products in bfloat16 run on the device, and not by emulation."""
    if device.type == "cpu":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return device.type != "cuda" or torch.cuda.is_bf16_supported()
