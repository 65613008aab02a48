"""Activations that are not finite, named where they are first seen."""

import torch
from jaxtyping import Float
from torch import Tensor

from saepatch.errors import UserError
from saepatch.model.language_model import LanguageModel
from saepatch.model.sites import Site
from saepatch.model.tokens import Tokens


def check_finite(
    model: LanguageModel, site: Site, x: Float[Tensor, "batch pos width"], tokens: Tokens, read: int = 0
) -> None:
    """See that what a site holds at the tokens of a batch, of whose rows `read` columns were read before, is finite.

    Raises:
        UserError: it is not; site, text, position and token are named.
    """
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
