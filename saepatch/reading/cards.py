"""What a latent is about: its top examples, how often and how strongly it fires, what it writes, its neighbours.

A run leaves these of its top latents in `reading.json`, with the tokens of its prompts, so that its report is made of
files alone.
"""

import logging
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import islice
from typing import Any

import torch
from torch import Tensor, nn

from saepatch.dictionaries.dictionary import Dictionary
from saepatch.model.language_model import LanguageModel, Tokens
from saepatch.model.lens import INSIDE, final_norm, stream_directions
from saepatch.reading.activity import Activity
from saepatch.splicing.splice import record_latents

log = logging.getLogger(__name__)

CELLS = 2**26  # activations that are held at once
PART = 256  # latents whose directions are read at once


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
    """A histogram of its activations that are not 0: one edge more than bins, the last at or above the largest."""
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

    @property
    def anchor(self) -> str:
        """Its name on a page, which links lead to."""
        return f"latent-{self.site}-{self.latent}"

    @staticmethod
    def read(given: dict[str, Any]) -> "Card":
        """A card as `asdict` and JSON left it; a missing number is NaN again."""
        nan = float("nan")
        examples = tuple(Example(e["text"], tuple(e["tokens"]), tuple(e["acts"])) for e in given["examples"])
        pairs = {name: tuple((each[0], each[1]) for each in given[name]) for name in ("raises", "lowers", "neighbours")}
        numbers = {name: nan if given[name] is None else given[name] for name in ("mean_active", "maximum", "norm")}
        plain = {"edges": tuple(given["edges"]), "counts": tuple(given["counts"]), "examples": examples}
        return Card(**given | numbers | plain | pairs)


def read_latents(
    model: LanguageModel,
    dictionary: Dictionary,
    latents: Sequence[int],
    texts: Tokens | Iterable[str],
    examples: int = 6,
    top: int = 10,
    batch_size: int = 32,
) -> list[Card]:
    """Cards of any number of latents over some texts: one pass that stops at the dictionary's site.

    Texts stream by, a batch at a time; what is kept of them is counts and each latent's own examples.

    Args:
        latents: Ids; a card each, in their order.
        texts: Where to look for examples, tokenised or not (a generator will do); BOS and padding are left out.
        examples: Texts a card shows, the one with the largest activation first.
        top: Tokens that a direction raises and lowers, and neighbours, a card shows.
        batch_size: Texts at a time; fewer where a dictionary's activations of so many would be large.

    Raises:
        UserError: the dictionary does not belong to the model, or has no such latent.
    """
    dictionary.check(model)
    dictionary.check_ids(tuple(latents))
    activity = _activity(model, dictionary, latents, _batches(model, texts, batch_size), examples)
    cards = []
    for start in range(0, len(latents), PART):
        some = latents[start : start + PART]
        lens, near = logit_lens(model, dictionary, some, top), _neighbours(dictionary, some, top)
        for place, latent in enumerate(some):
            cards.append(_card(model, dictionary, latent, activity, start + place, lens, place, near[place]))
    return cards


def _batches(model: LanguageModel, texts: Tokens | Iterable[str], size: int) -> Iterator[Tokens]:
    if isinstance(texts, Tokens):
        yield from texts.batches(size)
        return
    stream = iter(texts)
    while some := list(islice(stream, size)):
        yield model.tokenize(some)


@torch.no_grad()
def _activity(
    model: LanguageModel, dictionary: Dictionary, latents: Sequence[int], batches: Iterable[Tokens], examples: int
) -> Activity:
    ids, few = list(latents), dictionary.alone(latents)
    activity = Activity(len(ids), examples)
    for batch in batches:
        x = model.capture(batch, [dictionary.site])[dictionary.site]
        width = len(ids) if few is not None else dictionary.d_sae
        rows = max(1, CELLS // (x.shape[1] * max(1, width)))
        for start in range(0, len(x), rows):
            part = batch.rows(slice(start, start + rows))
            acts = (few or dictionary).activations(x[start : start + rows])[0]
            acts = acts if few is not None else acts[..., ids]
            activity.add(part.input_ids, part.attention_mask.bool(), part.ordinary, acts)
    return activity


def _card(
    model: LanguageModel,
    dictionary: Dictionary,
    latent: int,
    activity: Activity,
    column: int,
    lens: "Lens | None",
    row: int,
    neighbours: tuple[tuple[int, float], ...],
) -> Card:
    """The card of the latent in a column of the activity and a row of the lens."""
    count = int(activity.count[column])
    counts, edges = activity.histogram(column)
    return Card(
        site=str(dictionary.site),
        latent=int(latent),
        dictionary=dictionary.name,
        dictionary_hash=dictionary.fingerprint,
        neuronpedia=neuronpedia(dictionary),
        texts=activity.texts,
        tokens=activity.tokens,
        frequency=count / max(1, activity.tokens),
        maximum=float(activity.maximum[column]),
        mean_active=float(activity.total[column]) / count if count else float("nan"),
        norm=float(dictionary.rows[latent].float().norm()),
        edges=tuple(round(edge, 4) for edge in edges),
        counts=counts,
        examples=tuple(
            Example(peak.text, tuple(model.token_texts(peak.ids)), tuple(round(act, 4) for act in peak.acts))
            for peak in activity.peaks[column]
        ),
        lens="" if lens is None else lens.how,
        raises=() if lens is None else lens.raises[row],
        lowers=() if lens is None else lens.lowers[row],
        neighbours=neighbours,
    )


@torch.no_grad()
def _neighbours(dictionary: Dictionary, latents: Sequence[int], top: int) -> list[tuple[tuple[int, float], ...]]:
    rows = nn.functional.normalize(dictionary.rows.float(), dim=-1)
    ids = torch.tensor(list(latents), dtype=torch.long, device=rows.device)
    cosines = rows[ids] @ rows.T
    cosines[torch.arange(len(ids), device=rows.device), ids] = -2.0  # not itself
    best = cosines.topk(min(top, rows.shape[0] - 1))
    return [
        tuple((int(latent), round(float(value), 4)) for latent, value in zip(ids, values))
        for ids, values in zip(best.indices.tolist(), best.values.tolist())
    ]


# Texts by activation


@dataclass(frozen=True)
class ReadText:
    """A text as the model reads it: its tokens, and the sum of some latents' activations at each."""

    name: str
    tokens: tuple[str, ...]
    acts: tuple[float, ...]


@torch.no_grad()
def read_texts(
    model: LanguageModel, dictionary: Dictionary, latents: Sequence[int], named: Sequence[tuple[str, str]]
) -> tuple[ReadText, ...]:
    """Read (name, text) pairs, nothing edited; the latents that count are `latents`, BOS and template as they come."""
    texts = []
    for name, text in named:
        tokens = model.tokenize([text])
        acts = record_latents(model, dictionary, tokens).acts[0][:, list(latents)].sum(-1).float().cpu()
        acts = acts * tokens.ordinary[0].cpu()
        texts.append(ReadText(name, tuple(model.token_texts(tokens.input_ids[0].tolist())), tuple(acts.tolist())))
    return tuple(texts)


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
    The logits are `W_U (norm(d) - norm(0))`, less its mean over the vocabulary: which tokens the direction speaks for
    on its direct way out, later layers left aside, with the stream's own size left aside, too (nostalgebraist, 2020,
    applied to a direction). The final norm is the one that, after the last block, gives the model's own logits; where
    none does, the unembedding alone is used, and `how` says so. None where the unembedding is not held in memory or has
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
        tuple((name, round(value, 4)) for name, value in zip(model.token_texts(row), numbers))
        for row, numbers in zip(ids.tolist(), values.tolist())
    )


def neuronpedia(dictionary: Dictionary) -> str:
    """The dictionary's name on Neuronpedia (`gpt2-small/8-res-jb`); empty where sae_lens does not know one."""
    cfg: Any = dictionary.sae.cfg
    named = str(cfg.metadata.get("neuronpedia_id") or "")
    return named if re.fullmatch(r"[\w.-]+/[\w.-]+", named) else ""
