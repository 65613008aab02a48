"""What a latent is about: its top examples, how often and how strongly it fires, what it writes, its neighbours.

A run leaves these of its top latents in `reading.json`, with the tokens of its prompts, so that its report is made of
files alone.
"""

import logging
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saepatch.dictionaries import Dictionary
from saepatch.hooks import capture
from saepatch.lens import INSIDE, final_norm, stream_directions
from saepatch.models import LanguageModel, Tokens

log = logging.getLogger(__name__)

BINS = 20  # of an activation histogram
WINDOW = (24, 8)  # tokens of an example before and after its largest activation


@dataclass(frozen=True)
class Example:
    """A stretch of a text, the activation at each of its tokens, and which text it is from."""

    text: int
    tokens: tuple[str, ...]
    acts: tuple[float, ...]


@dataclass(frozen=True)
class Card:
    """What is known of one latent. Shares and counts are over the ordinary positions of the texts that were read."""

    site: str
    latent: int
    dictionary: str
    dictionary_hash: str
    neuronpedia: str
    texts: int
    tokens: int
    frequency: float
    """Share of positions where it is not 0."""
    maximum: float
    mean_active: float
    """Mean over the positions where it is not 0; NaN if there are none."""
    norm: float
    """Of what one unit of it adds to the site."""
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    """A histogram of its activations that are not 0."""
    examples: tuple[Example, ...]
    lens: str
    """How `raises` and `lowers` were found; empty where they could not be."""
    raises: tuple[tuple[str, float], ...]
    lowers: tuple[tuple[str, float], ...]
    """Tokens whose logits its direction raises and lowers most, with the logit over the vocabulary's mean."""
    neighbours: tuple[tuple[int, float], ...]
    """Latents of the same dictionary with the most similar directions, by cosine."""

    @property
    def dead(self) -> bool:
        """Whether it fired nowhere in the texts that were read."""
        return self.frequency == 0

    @staticmethod
    def read(given: dict[str, Any]) -> "Card":
        """A card as `asdict` and JSON left it; a missing number is NaN again."""
        nan = float("nan")
        examples = tuple(Example(one["text"], tuple(one["tokens"]), tuple(one["acts"])) for one in given["examples"])
        pairs = {name: tuple((each[0], each[1]) for each in given[name]) for name in ("raises", "lowers", "neighbours")}
        numbers = {name: nan if given[name] is None else given[name] for name in ("mean_active", "maximum", "norm")}
        plain = {"edges": tuple(given["edges"]), "counts": tuple(given["counts"]), "examples": examples}
        return Card(**given | numbers | plain | pairs)


def read_latents(
    model: LanguageModel,
    dictionary: Dictionary,
    latents: Sequence[int],
    tokens: Tokens,
    examples: int = 6,
    top: int = 10,
    batch_size: int = 32,
) -> list[Card]:
    """Cards of some latents over some texts: one pass that stops at the dictionary's site.

    Args:
        latents: Ids; a card each, in their order.
        tokens: The texts to look for examples in; BOS and padding are left out.
        examples: Texts a card shows, the one with the largest activation first.
        top: Tokens that a direction raises and lowers, and neighbours, a card shows.

    Raises:
        UserError: the dictionary does not belong to the model, or has no such latent.
    """
    dictionary.check(model)
    dictionary.check_ids(tuple(latents))
    ids = torch.tensor(list(latents), dtype=torch.long, device=model.device)
    acts = _activations(model, dictionary, ids, tokens, batch_size)
    lens = logit_lens(model, dictionary, latents, top)
    near = _neighbours(dictionary, ids, top)
    texts = [
        token_texts(model, row[mask].tolist()) for row, mask in zip(tokens.input_ids, tokens.attention_mask.bool())
    ]
    cards = []
    for column, latent in enumerate(latents):
        mine = [each[:, column] for each in acts]
        cards.append(_card(dictionary, latent, mine, tokens, texts, examples, lens, near[column], column))
    return cards


@torch.no_grad()
def _activations(
    model: LanguageModel, dictionary: Dictionary, ids: Tensor, tokens: Tokens, batch_size: int
) -> list[Float[Tensor, "_ latents"]]:
    """Of each text the latents at its own tokens; 0 at a BOS."""
    found = []
    for batch in tokens.batches(batch_size):
        x = capture(model.hf, model.layout, [dictionary.site], model.inputs(batch))[dictionary.site]
        acts = dictionary.activations(x)[0][..., ids] * batch.ordinary[..., None]
        found += [row[mask].float().cpu() for row, mask in zip(acts, batch.attention_mask.bool())]
    return found


def _card(
    dictionary: Dictionary,
    latent: int,
    acts: Sequence[Float[Tensor, "_"]],
    tokens: Tokens,
    texts: Sequence[Sequence[str]],
    examples: int,
    lens: "Lens | None",
    neighbours: tuple[tuple[int, float], ...],
    column: int,
) -> Card:
    together = torch.cat(list(acts))
    active = together[together != 0]
    count = int(tokens.ordinary.sum())
    counts, edges = _histogram(active)
    best = sorted(range(len(acts)), key=lambda i: -float(acts[i].max()))
    shown: list[Example] = []
    for text in best:  # a text that stands there twice is shown once
        example = _example(text, texts[text], acts[text])
        if len(shown) < examples and float(acts[text].max()) > 0 and example.tokens not in {e.tokens for e in shown}:
            shown.append(example)
    return Card(
        site=str(dictionary.site),
        latent=int(latent),
        dictionary=dictionary.name,
        dictionary_hash=dictionary.fingerprint,
        neuronpedia=neuronpedia(dictionary),
        texts=len(acts),
        tokens=count,
        frequency=len(active) / max(1, count),
        maximum=float(together.max()),
        mean_active=float(active.mean()),
        norm=float(dictionary.rows[latent].float().norm()),
        edges=edges,
        counts=counts,
        examples=tuple(shown),
        lens="" if lens is None else lens.how,
        raises=() if lens is None else lens.raises[column],
        lowers=() if lens is None else lens.lowers[column],
        neighbours=neighbours,
    )


def _example(number: int, tokens: Sequence[str], acts: Float[Tensor, "pos"]) -> Example:
    """The stretch around the largest activation."""
    peak = int(acts.argmax())
    stretch = slice(max(0, peak - WINDOW[0]), peak + WINDOW[1] + 1)
    return Example(number, tuple(tokens[stretch]), tuple(round(value, 4) for value in acts[stretch].tolist()))


def _histogram(active: Float[Tensor, "n"]) -> tuple[tuple[int, ...], tuple[float, ...]]:
    if not len(active):
        return (), (0.0,)
    low, high = min(0.0, float(active.min())), max(0.0, float(active.max()))
    counts = torch.histc(active, BINS, low, high)
    edges = [low + (high - low) * i / BINS for i in range(BINS + 1)]
    return tuple(int(n) for n in counts.tolist()), tuple(round(edge, 4) for edge in edges)


@torch.no_grad()
def _neighbours(dictionary: Dictionary, ids: Tensor, top: int) -> list[tuple[tuple[int, float], ...]]:
    rows = nn.functional.normalize(dictionary.rows.float(), dim=-1)
    cosines = rows[ids.to(rows.device)] @ rows.T
    cosines[torch.arange(len(ids), device=rows.device), ids.to(rows.device)] = -2.0  # not itself
    best = cosines.topk(min(top, rows.shape[0] - 1))
    return [
        tuple((int(latent), round(float(value), 4)) for latent, value in zip(found, values))
        for found, values in zip(best.indices.tolist(), best.values.tolist())
    ]


# What a direction writes


@dataclass(frozen=True)
class Lens:
    """Tokens that directions raise and lower, and how that was read."""

    how: str
    raises: tuple[tuple[tuple[str, float], ...], ...]
    lowers: tuple[tuple[tuple[str, float], ...], ...]


@torch.no_grad()
def logit_lens(model: LanguageModel, dictionary: Dictionary, latents: Sequence[int], top: int = 10) -> Lens | None:
    """The logits of each latent's direction alone, through the final norm and the unembedding.

    A direction of heads' values or of an MLP's units is what their output projection makes of it, and `how` says so.
    The logits are `W_U (norm(d) - norm(0))`, less its mean over the vocabulary: which tokens the direction speaks for on its
    direct way out, later layers left aside, with the stream's own size left aside, too (nostalgebraist, 2020, applied
    to a direction). The final norm is the one that, after the last block, gives the model's own logits; where none
    does, the unembedding alone is used, and `how` says so. None where the unembedding is not held in memory or has
    another width.
    """
    head: Any = model.hf.get_output_embeddings()  # type: ignore[operator]
    if head is None or head.weight.is_meta or head.weight.shape[-1] != model.d_model:
        return None
    norm = final_norm(model)
    how = "through the final norm" if norm is not None else "through the unembedding alone: no final norm was found"
    if dictionary.site.stream in INSIDE:
        how = f"through the output projection of {dictionary.site}, {how}"
    directions = stream_directions(model, dictionary.site, dictionary.rows[list(latents)])
    directions = nn.functional.normalize(directions.float(), dim=-1) * model.d_model
    x = torch.cat([directions, torch.zeros_like(directions[:1])]).to(head.weight)[None]
    logits = head((x if norm is None else norm(x)).to(head.weight))[0].float()
    logits = logits[:-1] - logits[-1]
    logits -= logits.mean(-1, keepdim=True)
    up, down = logits.topk(top), (-logits).topk(top)
    return Lens(how, _named(model, up.indices, up.values), _named(model, down.indices, -down.values))


def _named(model: LanguageModel, ids: Tensor, values: Tensor) -> tuple[tuple[tuple[str, float], ...], ...]:
    return tuple(
        tuple((name, round(value, 4)) for name, value in zip(token_texts(model, row), numbers))
        for row, numbers in zip(ids.tolist(), values.tolist())
    )


# Tokens and addresses


def token_texts(model: LanguageModel, ids: Sequence[int]) -> list[str]:
    """Tokens as texts. One that is part of a character shows its bytes, as in ⟨E2 80⟩, or its piece."""
    return [_token_text(model.tokenizer, int(token)) for token in ids]


def _token_text(tokenizer: Any, token: int) -> str:
    try:
        text = tokenizer.decode([token])
        piece = tokenizer.convert_ids_to_tokens(token)
    except (IndexError, OverflowError, TypeError):  # an unembedding has more rows than its tokenizer has tokens
        return f"⟨id {token}⟩"
    if piece is None:
        return f"⟨id {token}⟩"
    if "\ufffd" not in text:
        return text
    known = _byte_signs()
    if all(sign in known for sign in piece):
        return "⟨" + " ".join(f"{known[sign]:02X}" for sign in piece) + "⟩"
    return str(piece)


def _byte_signs() -> dict[str, int]:
    """The signs that byte-level BPE (Radford et al., 2019) writes bytes as."""
    plain = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    rest = [byte for byte in range(256) if byte not in plain]
    return {chr(byte): byte for byte in plain} | {chr(256 + n): byte for n, byte in enumerate(rest)}


def neuronpedia(dictionary: Dictionary) -> str:
    """The dictionary's name on Neuronpedia (`gpt2-small/8-res-jb`); empty where sae_lens does not know one."""
    cfg: Any = dictionary.sae.cfg
    named = str(cfg.metadata.get("neuronpedia_id") or "")
    return named if re.fullmatch(r"[\w.-]+/[\w.-]+", named) else ""
