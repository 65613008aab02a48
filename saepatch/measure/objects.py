"""Object ablation: what a metric is without the image tokens of one object of a picture.

The object's tokens, and those of a rim around it, get the mean vector of all image tokens where the picture enters the
decoder. Three controls ablate as many tokens: drawn at random, of the largest norm (registers), and of the largest
product of gradient and change. Source: Neo et al. 2024, "Towards Interpreting Visual Information Processing in
Vision-Language Models", section 3, whose high-gradient tokens are chosen by integrated gradients instead.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy import ndarray
from torch import Tensor

from saepatch.data.batches import PairBatch, batch_pairs
from saepatch.data.pairs import PromptPair
from saepatch.engine.edited_runs import metric_values
from saepatch.engine.metrics import Metric, as_metric, checked, logit_difference
from saepatch.errors import UserError
from saepatch.model.inputs.images import Images
from saepatch.model.language_model import LanguageModel, refuse_training
from saepatch.records.statistics import Interval, bootstrap_mean
from saepatch.report.blocks import Cell, EstimateCell, Simple, Table
from saepatch.report.notebook import Shown

Box = Sequence[float]  # left, top, right and bottom, in pixels of the picture
SETS = ("object", "object and rim", "random", "registers", "gradient")


@dataclass(frozen=True, eq=False, repr=False)
class ObjectAblation(Shown):
    """The metric of each pair's clean prompt, and with each set of image tokens ablated (`random`: mean over draws).

    `tokens` are the mean sizes of the sets; controls have the size of object and rim, or fewer where a picture has no
    more tokens beside them.
    """

    examples: tuple[str, ...]
    whole: Float[ndarray, "pairs"]
    ablated: Float[ndarray, "sets pairs"]
    tokens: Float[ndarray, "sets"]
    metric: str

    def drop(self, name: str) -> Interval:
        """How far the metric falls when a set of `SETS` is ablated: the mean over pairs, with its interval."""
        return bootstrap_mean(self.whole - self.ablated[SETS.index(name)])

    def __repr__(self) -> str:
        drops = ", ".join(f"{name} {self.drop(name).value:.3f}" for name in SETS)
        return f"{self.title}, {len(self.examples)} pairs: fall of {self.metric} without {drops}"

    @property
    def title(self) -> str:
        return "Object ablation"

    def blocks(self) -> list[Simple]:
        """A table of the sets, with their intervals over pairs."""
        rows: list[list[Cell]] = []
        for number, name in enumerate(SETS):
            drop = self.drop(name)
            cell = EstimateCell(drop.value, drop.low, drop.high, drop.reason)
            rows.append([name, float(self.tokens[number]), float(self.ablated[number].mean()), cell])
        caption = f"n = {len(self.examples)} pairs; {self.metric} of the whole pictures: {self.whole.mean():.3f}."
        return [Table(["ablated", "tokens", self.metric, "fall"], rows, caption)]


def ablate_objects(
    model: LanguageModel,
    pairs: Sequence[PromptPair],
    boxes: Sequence[Box],
    rim: int = 1,
    draws: int = 5,
    seed: int = 0,
    metric: Metric | str = logit_difference,
) -> ObjectAblation:
    """Ablate the object in each pair's clean picture (the last, of several), and as many other image tokens.

    Args:
        pairs: Prompts with pictures; their answers name the object. Corrupted prompts are ignored.
        boxes: The object's box in each picture. Its tokens are those whose part of the picture it overlaps.
        rim: Width of the rim around the object, in tokens.
        draws: Number of random sets.

    Raises:
        UserError: a prompt has no picture, a box lies outside it, or there is not one box for each pair.
    """
    if len(boxes) != len(pairs) or rim < 0 or draws < 1:
        raise UserError(f"{len(boxes)} boxes for {len(pairs)} pairs, rim {rim}, draws {draws}: give one box for each")
    refuse_training(model)
    read = as_metric(metric)
    alone = [batch_pairs(model, [replace(pair, corrupted=pair.clean)]) for pair in pairs]
    pictures = [_pictures(part) for part in alone]
    vectors = torch.cat([images.features[images.here] for images in pictures])
    mean = vectors.float().mean(0).to(vectors.dtype)
    whole, ablated, sizes = np.zeros(len(pairs)), np.zeros((len(SETS), len(pairs))), np.zeros(len(SETS))
    generator = torch.Generator().manual_seed(seed)
    for number, (part, images, box) in enumerate(zip(alone, pictures, boxes, strict=True)):
        before, products = _gradient(model, part, images, mean, read)
        whole[number] = before
        sets = _sets(images, box, rim, draws, products, generator)
        logits = [_next_logits(model, part, images, chosen, mean) for several in sets for chosen in several]
        each = iter(float(metric_values(read, some, part)[0]) for some in logits)
        for row, several in enumerate(sets):
            ablated[row, number] = np.mean([next(each) for _ in several])
            sizes[row] += float(several[0].sum()) / len(pairs)
    names = tuple(pair.example or str(number) for number, pair in enumerate(pairs))
    return ObjectAblation(names, whole, ablated, sizes, getattr(read, "__name__", str(metric)).replace("_", " "))


def _pictures(part: PairBatch) -> Images:
    if part.clean.images is None:
        raise UserError(f"prompt {part.pairs[0].clean[:40]!r} has no picture: give ImagePrompt(text, file)")
    return part.clean.images


def _gradient(
    model: LanguageModel, part: PairBatch, images: Images, mean: Tensor, metric: Metric
) -> tuple[float, Float[Tensor, "pos"]]:
    """The metric, and how much it would fall for each token with the mean vector, to first order."""
    with torch.enable_grad():
        features = images.features.detach().clone().requires_grad_()
        tokens = replace(part.clean, images=replace(images, features=features))
        value = checked(metric, model.call(tokens, last=True)[:, -1], part)[0]
        (gradient,) = torch.autograd.grad(value, features)
    products = (gradient * (images.features - mean)).flatten(2).sum(-1)[0]
    return float(value.detach()), products * images.here[0]


@torch.no_grad()
def _next_logits(
    model: LanguageModel, part: PairBatch, images: Images, chosen: Bool[Tensor, "pos"], mean: Tensor
) -> Float[Tensor, "1 vocab"]:
    features = torch.where(chosen[None, :, None, None], mean, images.features)
    return model.call(replace(part.clean, images=replace(images, features=features)), last=True)[:, -1]


def _sets(
    images: Images, box: Box, rim: int, draws: int, products: Float[Tensor, "pos"], generator: torch.Generator
) -> list[list[Bool[Tensor, "pos"]]]:
    """The sets of tokens to ablate, in the order of `SETS`."""
    here = images.here[0] & (images.picture[0] == images.picture[0].max())
    inner, outer = (_overlapping(images.seen[0], box, width) & here for width in (0, rim))
    if not bool(inner.any()):
        raise UserError(f"box {tuple(box)} overlaps no part of the picture: give left, top, right, bottom in pixels")
    others, size = (here & ~outer).nonzero().flatten().cpu(), int(outer.sum())
    norms = images.features[0].float().flatten(1).norm(dim=-1)

    def of(columns: Tensor) -> Bool[Tensor, "pos"]:
        chosen = torch.zeros_like(here)
        chosen[columns.to(here.device)] = True
        return chosen

    drawn = [of(others[torch.randperm(len(others), generator=generator)[:size]]) for _ in range(draws)]
    registers = of(norms.where(of(others), -torch.inf).topk(min(size, len(others))).indices)
    gradient = of(products.where(here, -torch.inf).topk(size).indices)
    return [[inner], [outer], drawn, [registers], [gradient]]


def _overlapping(seen: Float[Tensor, "pos 4"], box: Box, rim: int) -> Bool[Tensor, "pos"]:
    """Tokens whose part of the picture overlaps the box, after it has grown by `rim` such parts on every side."""
    left, top, right, bottom = seen.unbind(-1)
    wide, tall = right - left, bottom - top
    across = torch.minimum(right, box[2] + rim * wide) - torch.maximum(left, box[0] - rim * wide)
    down = torch.minimum(bottom, box[3] + rim * tall) - torch.maximum(top, box[1] - rim * tall)
    return (across > 0.05 * wide) & (down > 0.05 * tall) & (wide > 0)  # edges are measured to about a twentieth
