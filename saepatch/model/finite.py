"""Checks of a site's activations: they are finite, and there is one per token."""

import torch
from jaxtyping import Float
from torch import Tensor

from saepatch.errors import UserError
from saepatch.model.inputs.tokens import Tokens
from saepatch.model.language_model import LanguageModel
from saepatch.model.sites import Site


def check_finite(
    model: LanguageModel, site: Site, x: Float[Tensor, "batch pos width"], tokens: Tokens, read: int = 0
) -> None:
    """Check that a site's values at the tokens of a batch are finite; `read` columns of its rows are in the cache.

    Raises:
        UserError: one is not; the message names site, text, position and token.
    """
    check_columns(model, site, x, tokens.width)
    broken = ~torch.isfinite(x).all(-1) & tokens.attention_mask.bool().to(x.device)
    if not bool(broken.any()):
        return
    row, column = broken.nonzero()[0].tolist()
    mask = tokens.attention_mask[row].bool()
    ids = tokens.input_ids[row][mask].tolist()
    position = int(mask[:column].sum())
    (name,) = model.token_texts(ids[position : position + 1])
    position += read
    text = "".join(model.token_texts(ids[:12]))
    raise UserError(
        f"activations at {site} of {model.name} are NaN or infinite in {text!r}…, at position {position} ({name!r}), "
        f"in {str(model.dtype).removeprefix('torch.')}: use --dtype float32 or bfloat16, or leave this text out"
    )


def check_columns(model: LanguageModel, site: Site, x: Tensor, width: int) -> None:
    """Raises UserError where a site does not have one value per token, such as in a model that pads rows itself."""
    if x.shape[1] != width:
        raise UserError(
            f"{site} of {model.name} holds {x.shape[1]} columns for {width} tokens, so positions cannot be told apart "
            "there (some models pad rows to whole chunks): give prompts of another length"
        )


def all_finite(weights: Tensor) -> bool:
    """Whether no weight is NaN or infinite. A check of sums takes a tenth of the time of checking each.

    In slices, since a sum of narrow values is taken over a copy in float32.
    """
    wide = torch.float32 if weights.is_floating_point() else None
    slices = weights.detach().flatten().split(1 << 22) if weights.layout == torch.strided else [weights.detach()]
    return all(torch.isfinite(part.sum(dtype=wide)) or torch.isfinite(part).all() for part in slices)
