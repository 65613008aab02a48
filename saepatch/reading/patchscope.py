"""Patchscopes: the model explains a latent whose direction is written into an explanation prompt."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from saepatch.dictionaries.dictionary import Dictionary
from saepatch.errors import UserError
from saepatch.model.hooks import edit_sites
from saepatch.model.language_model import LanguageModel, Tokens
from saepatch.model.lens import INSIDE, stream_directions
from saepatch.model.positions import Positions
from saepatch.model.sites import Site
from saepatch.splicing.splice import whole_prompt

SCALES = (0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, 8.0)
BATCH = 64  # prompts per generation, one for each latent and scale


@dataclass(frozen=True)
class Reading:
    """The model's text about one latent at one scale.

    Attributes:
        latent: Number of the latent.
        scale: Norm of the written vector, in units of the placeholder's norm at the site.
        text: The generated text.
        self_similarity: Cosine of the latent's direction with the last block's output at the last prompt token.
        entropy: Entropy of the first generated token's distribution, in nats.
    """

    latent: int
    scale: float
    text: str
    self_similarity: float
    entropy: float


def read_by_patchscope(
    model: LanguageModel,
    dictionary: Dictionary,
    latents: Sequence[int],
    prompt: str,
    placeholder: Positions,
    scales: Sequence[float] = SCALES,
    site: Site | str | None = None,
    max_new_tokens: int = 12,
) -> list[list[Reading]]:
    """Replace the residual stream at a placeholder of an explanation prompt by `scale · direction`, and generate.

    Returns, for each latent, a reading at each scale; `best_reading` picks one of them.

    Args:
        prompt: An explanation prompt, such as `What is the meaning of the word X? It is`.
        placeholder: The tokens to overwrite, as in `At(" X")`.
        scales: Norms, in units of the placeholder's norm at the site.
        site: Site to write at. None: the dictionary's own; for `z` and `neurons`, whose directions are multiplied by
            their output projection, `resid_post` of the same layer. An earlier site of the residual stream leaves the
            model more layers to interpret the direction.

    Raises:
        UserError: a latent, site or placeholder does not exist, the site does not have the residual stream's width,
            or a scale is not above 0.

    Source: Patchscopes (Ghandeharioun et al. 2024) and SelfIE (Chen et al. 2024), on dictionaries' directions as in
    "Self-explaining SAE features" (Kharlapenko et al. 2024), which also proposes both measures of a scale.
    """
    dictionary.check(model)
    dictionary.check_ids(tuple(latents))
    own = Site(dictionary.site.layer, "resid_post") if dictionary.site.stream in INSIDE else dictionary.site
    target = own if site is None else Site.parse(site)
    if target.stream in INSIDE or model.width(target) != model.d_model:
        raise UserError(f"{target} does not have the width of the residual stream: use a site such as resid_post.0")
    if not scales or min(scales) <= 0:
        raise UserError(f"scales {list(scales)}: give numbers above 0")
    tokens = model.tokenize([prompt], side="left")
    where = whole_prompt(model, tokens).select(placeholder)
    if tokens.input_ids.shape[1] < 2 or not bool(where.any()):
        raise UserError(f"the placeholder {placeholder!r} selects no token of {prompt!r}: choose another")
    cells = [(latent, scale) for latent in latents for scale in scales]
    readings: list[Reading] = []
    for start in range(0, len(cells), BATCH):
        readings += _read(model, dictionary, cells[start : start + BATCH], tokens, where, target, max_new_tokens)
    return [readings[i : i + len(scales)] for i in range(0, len(readings), len(scales))]


@torch.no_grad()
def _read(
    model: LanguageModel,
    dictionary: Dictionary,
    cells: Sequence[tuple[int, float]],
    tokens: Tokens,
    where: Bool[Tensor, "1 pos"],
    target: Site,
    max_new_tokens: int,
) -> list[Reading]:
    prompts = tokens.rows([0] * len(cells))
    rows = dictionary.rows[[latent for latent, _ in cells]]
    directions = stream_directions(model, dictionary.site, rows).float()
    directions = directions / directions.norm(dim=-1, keepdim=True)
    scales = torch.tensor([scale for _, scale in cells], device=directions.device)
    last = Site(model.n_layers - 1, "resid_post")
    with _written(model, target, scales[:, None] * directions, where):
        output = model.capture(prompts, [last])[last][:, -1].float()
        log_p = model.next_logits(prompts).float().log_softmax(-1)
        ids = model.generate_ids(prompts, max_new_tokens)
    entropy = -(log_p.exp() * log_p.masked_fill(log_p.isneginf(), 0)).sum(-1)
    similar = cosine_similarity(output, directions.to(output.device), dim=-1)
    texts = [model.continuation(row, skip_special_tokens=True) for row in ids.tolist()]
    columns = (cells, texts, similar.tolist(), entropy.tolist())
    return [Reading(latent, scale, text, s, e) for (latent, scale), text, s, e in zip(*columns, strict=True)]


@contextmanager
def _written(
    model: LanguageModel, target: Site, values: Float[Tensor, "batch width"], where: Bool[Tensor, "1 pos"]
) -> Iterator[None]:
    """Replace the site at the prompt's placeholder by each row's value times the norm that was there."""
    width = where.shape[1]

    def write(x: Tensor) -> Tensor:
        if x.shape[1] < width:  # a generated token, with the prompt in the cache
            return x
        size = x[:, :width].float().norm(dim=-1, keepdim=True)
        new = torch.where(where[..., None], size * values[:, None], x[:, :width].float())
        return torch.cat([new.to(x.dtype), x[:, width:]], 1)

    with edit_sites(model.layout, {target: write}, model.device):
        yield


def best_reading(readings: Sequence[Reading]) -> Reading:
    """The reading with the largest standardised self-similarity minus standardised entropy over the scales.

    That is, where the latent is still present and the model is most certain. Ties: the first scale.
    """
    if not readings:
        raise UserError("there are no readings to choose from: give at least one scale")
    similar, entropy = (
        torch.tensor([getattr(reading, name) for reading in readings], dtype=torch.float64)
        for name in ("self_similarity", "entropy")
    )
    score = _standardised(similar) - _standardised(entropy)
    return readings[int(score.argmax())]


def _standardised(values: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    return (values - values.mean()) / values.std(correction=0).clamp(min=1e-9)
