"""Plain softmax attention as transformers' own functions compute it, for code that replaces them."""

from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saepatch.errors import UserError

LEAST = -1e38  # a score with probability 0 after softmax


def refuse_unusual(module: nn.Module, options: dict[str, Any]) -> None:
    """Raises UserError for attention with sinks or position biases, which is not plain softmax attention."""
    unsupported = [name for name in ("s_aux", "position_bias") if options.get(name) is not None]
    if unsupported or hasattr(module, "sinks"):
        what = unsupported[0] if unsupported else "attention sinks"
        raise UserError(f"{type(module).__name__} computes attention with {what}: patch heads' outputs instead")


def additive_mask(module: nn.Module, query: Tensor, key: Tensor, mask: Tensor | None) -> Tensor | None:
    """The mask that attention adds to its scores; None where every query sees every key."""
    if mask is None and getattr(module, "is_causal", True):
        past = torch.ones(query.shape[-2], key.shape[-2], dtype=torch.bool, device=query.device)
        mask = past.tril(key.shape[-2] - query.shape[-2])
    if mask is not None and mask.dtype == torch.bool:
        return torch.zeros_like(mask, dtype=torch.float32).masked_fill_(~mask, LEAST)
    return mask


def attention_scores(
    query: Float[Tensor, "batch heads queries width"],
    key: Float[Tensor, "batch kv keys width"],
    bias: Tensor | None,
    scaling: float,
    softcap: float | None,
) -> Float[Tensor, "batch heads queries keys"]:
    scores = query @ repeated_heads(key, query.shape[1]).transpose(-1, -2) * scaling
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    return scores if bias is None else scores + bias.to(scores.dtype)


def repeated_heads(x: Float[Tensor, "batch kv pos _"], heads: int) -> Float[Tensor, "batch heads pos _"]:
    """Keys or values, repeated for the query heads that share them."""
    return x if x.shape[1] == heads else x.repeat_interleave(heads // x.shape[1], 1)
