"""A model's own description of a latent: its direction is written into an explanation prompt, and text generated."""

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
BATCH = 64  # prompts that are written at a time, one for each latent and scale


@dataclass(frozen=True)
class Reading:
    """What the model wrote about one latent at one scale.

    Attributes:
        latent: Its number.
        scale: Norm of what was written, in units of the norm that the placeholder had there.
        text: What was generated.
        self_similarity: Cosine of the latent's direction with the last block's output where the text begins.
        entropy: Of the first token's distribution, in nats.
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
    """Write `scale · direction` over the residual stream at a placeholder of an explanation prompt, and generate.

    Returns, for each latent, a reading at each scale; `best_reading` picks one of them.

    Args:
        prompt: One that asks, or sets an example, such as `What is the meaning of the word X? It is`.
        placeholder: The tokens that are written over, as in `At(" X")`.
        scales: Norms, in units of the norm that the placeholder has at the site.
        site: Where to write; the dictionary's own if not given, or the stream after its block where that is of heads'
            values or of an MLP's units: these are brought through their output projection. An earlier one of the
            residual stream gives the model more layers to read it with.

    Raises:
        UserError: a latent, site or placeholder that there is not, a site that is not of the residual stream's width,
            or scales that are not above 0.

    Source: Patchscopes (Ghandeharioun et al. 2024) and SelfIE (Chen et al. 2024), on dictionaries' directions as in
    "Self-explaining SAE features" (Kharlapenko et al. 2024), which also proposes both measures of a scale.
    """
    dictionary.check(model)
    dictionary.check_ids(tuple(latents))
    own = Site(dictionary.site.layer, "resid_post") if dictionary.site.stream in INSIDE else dictionary.site
    at = own if site is None else Site.parse(site)
    if at.stream in INSIDE or model.width(at) != model.d_model:
        raise UserError(f"{at} is no place of the residual stream to write a latent at: use one such as resid_post.0")
    if not scales or min(scales) <= 0:
        raise UserError(f"scales {list(scales)}: give numbers above 0")
    tokens = model.tokenize([prompt], side="left")
    where = whole_prompt(model, tokens).select(placeholder)
    if tokens.input_ids.shape[1] < 2 or not bool(where.any()):
        raise UserError(f"the placeholder {placeholder!r} is at no token of {prompt!r}")
    cells = [(latent, scale) for latent in latents for scale in scales]
    readings: list[Reading] = []
    for start in range(0, len(cells), BATCH):
        readings += _read(model, dictionary, cells[start : start + BATCH], tokens, where, at, max_new_tokens)
    return [readings[i : i + len(scales)] for i in range(0, len(readings), len(scales))]


@torch.no_grad()
def _read(
    model: LanguageModel,
    dictionary: Dictionary,
    cells: Sequence[tuple[int, float]],
    tokens: Tokens,
    where: Bool[Tensor, "1 pos"],
    at: Site,
    max_new_tokens: int,
) -> list[Reading]:
    prompts = tokens.rows([0] * len(cells))
    rows = dictionary.rows[[latent for latent, _ in cells]]
    directions = stream_directions(model, dictionary.site, rows).float()
    directions = directions / directions.norm(dim=-1, keepdim=True)
    scales = torch.tensor([scale for _, scale in cells], device=directions.device)
    last = Site(model.n_layers - 1, "resid_post")
    with _written(model, at, scales[:, None] * directions, where):
        held = model.capture(prompts, [last])[last][:, -1].float()
        log_p = model.next_logits(prompts).float().log_softmax(-1)
        ids = model.generate_ids(prompts, max_new_tokens)
    entropy = -(log_p.exp() * log_p.masked_fill(log_p.isneginf(), 0)).sum(-1)
    similar = cosine_similarity(held, directions.to(held.device), dim=-1)
    texts = model.tokenizer.batch_decode(ids, skip_special_tokens=True)
    columns = (cells, texts, similar.tolist(), entropy.tolist())
    return [Reading(latent, scale, text, s, e) for (latent, scale), text, s, e in zip(*columns, strict=True)]


@contextmanager
def _written(
    model: LanguageModel, at: Site, values: Float[Tensor, "batch width"], where: Bool[Tensor, "1 pos"]
) -> Iterator[None]:
    """Put each row's value over what the site holds at the prompt's placeholder, in lengths of what was there."""
    width = where.shape[1]

    def write(x: Tensor) -> Tensor:
        if x.shape[1] < width:  # a generated token, read with the prompt's keys and values in the cache
            return x
        size = x[:, :width].float().norm(dim=-1, keepdim=True)
        new = torch.where(where[..., None], size * values[:, None], x[:, :width].float())
        return torch.cat([new.to(x.dtype), x[:, width:]], 1)

    with edit_sites(model.layout, {at: write}):
        yield


def best_reading(readings: Sequence[Reading]) -> Reading:
    """The reading at the scale where the latent is still present and the model is most certain.

    The largest of standardised self-similarity minus standardised entropy over the scales; the smaller scale of equals.
    """
    if not readings:
        raise UserError("there is no reading to choose from: give at least one scale")
    similar, entropy = (
        torch.tensor([getattr(reading, name) for reading in readings], dtype=torch.float64)
        for name in ("self_similarity", "entropy")
    )
    score = _standardised(similar) - _standardised(entropy)
    return readings[int(score.argmax())]


def _standardised(values: Float[Tensor, "n"]) -> Float[Tensor, "n"]:
    return (values - values.mean()) / values.std(correction=0).clamp(min=1e-9)
