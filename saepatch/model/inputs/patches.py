"""Which part of a picture each image token stands for.

Processors shrink, crop, tile or pad pictures, each in its own way. A picture whose colours say where they are goes
through the processor, and what comes out is read back; nothing is known of any family.
"""

from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

INSIDE = 0.5  # share of a pixel that has to come from the picture, not from padding


def patches_seen(processor: Any, size: tuple[int, int], token_id: int | None) -> Float[Tensor, "tokens 4"]:
    """Left, top, right and bottom of the part that each token of a picture stands for, in pixels of the picture.

    Parts that lie in padding are empty (all 0), those of unknown arrangements NaN.

    Args:
        size: Width and height of the picture.
    """
    width, height = size
    across, down = (np.arange(n) + 0.5 for n in size)
    ramp = np.full((height, width, 3), 255.0)
    ramp[..., 0], ramp[..., 1] = 255 * across / width, 255 * down[:, None] / height
    outs = [_processed(processor, colours) for colours in (ramp, np.zeros_like(ramp), np.full_like(ramp, 255.0))]
    count = int((outs[0]["input_ids"] == token_id).sum())
    cells = [_cells(out["pixel_values"].double(), count) for out in outs]
    if any(cell is None for cell in cells):
        return torch.full((count, 4), torch.nan)
    shown, black, white = (cell for cell in cells if cell is not None)
    span = white - black  # [tokens, 3, pixels]
    within = span[:, :2].amin(1) > INSIDE * span.max()
    boxes = torch.zeros(count, 4)
    for axis, extent in enumerate(size):
        share = (shown[:, axis] - black[:, axis]) / span[:, axis].where(within, torch.ones(()).double())
        low = share.where(within, torch.inf).amin(-1)
        high = share.where(within, -torch.inf).amax(-1)
        half = (high - low) / 2 / max(round(share.shape[-1] ** 0.5) - 1, 1)  # pixels have a width
        edges = torch.stack([low - half, high + half], -1).clamp(0, 1) * extent
        boxes[:, axis::2] = edges.where(within.any(-1)[:, None], torch.zeros(()).double()).float()
    return boxes


def _processed(processor: Any, colours: Float[np.ndarray, "height width 3"]) -> Any:
    from PIL import Image

    picture = Image.fromarray(colours.round().astype(np.uint8))
    return processor(text=[str(processor.image_token)], images=[[picture]], return_tensors="pt")


def _cells(pixels: Float[Tensor, "..."], count: int) -> Float[Tensor, "tokens 3 pixels"] | None:
    """The pixels that each token stands for; None: their arrangement is unknown."""
    if pixels.ndim == 2:  # patches in the order of tokens, several to a token, with colours first
        return (
            None
            if len(pixels) % count
            else pixels.reshape(len(pixels), 3, -1).unflatten(0, (count, -1)).transpose(1, 2).flatten(2)
        )
    views = pixels.flatten(0, -4)  # the whole picture, or tiles of it
    height, width = views.shape[-2:]
    each, rest = divmod(count, len(views))
    rows = round((each * height / width) ** 0.5)
    if rest or not rows or each % rows or height % rows or width % (each // rows):
        return None
    cells = views.unflatten(-2, (rows, -1)).unflatten(-1, (each // rows, -1))  # [views, 3, rows, y, columns, x]
    return cells.permute(0, 2, 4, 1, 3, 5).flatten(0, 2).flatten(2)
