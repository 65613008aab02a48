"""The interface of a training step: weights, inputs, results.

A step is a function `(weights, x, config, now, ranks) -> Step`. It changes nothing; the learner applies the gradients.

Weights are float32 and named as in sae_lens, with one difference: `W_enc` is `[d_sae, d_in]` like `W_dec`, so that the
weights of a latent are contiguous. Rows of `W_dec` always have norm 1 (ensured by the learner), so that no penalty
needs their norms. In every architecture, the encoder reads `x - b_dec`.
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
    """Inputs of a step that depend on the progress of training.

    Attributes:
        dead: Latents that have not been active for `config.dead_after` tokens; None if there are none.
        sparsity: Coefficient of the sparsity penalty, including its warm-up.
        p: Exponent of the standard SAE's penalty.
    """

    dead: Bool[Tensor, "d_sae"] | None = None
    sparsity: float = 1.0
    p: float = 1.0


@dataclass(frozen=True, eq=False)
class Step:
    """The result of a step on this process's share of a batch.

    Attributes:
        losses: Terms of the loss by name, each a mean over the batch; always includes `mse` (summed over d_in).
        gradients: Gradient of the sum of the terms, by name of the weights.
        fired: Latents that were active at any position.
        l0: Mean number of active latents per position.
        smallest: Smallest active value over the batches of all processes (batchtopk, matryoshka); 0 if none is active.
    """

    losses: dict[str, Float[Tensor, ""]]
    gradients: Weights
    fired: Bool[Tensor, "d_sae"]
    l0: Float[Tensor, ""]
    smallest: Float[Tensor, ""] | None = None


StepFunction = Callable[[Weights, Float[Tensor, "batch d_in"], SAEConfig, Moment, Ranks], Step]


def bfloat16_works(device: torch.device) -> bool:
    """Whether the device supports matrix products in bfloat16 without emulation."""
    if device.type == "cpu":
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return device.type != "cuda" or torch.cuda.is_bf16_supported()
