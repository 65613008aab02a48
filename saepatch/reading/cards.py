"""Cards of latents: top examples, firing frequency and strength, promoted tokens, nearest neighbours.

A run stores the cards of its top latents in `reading.json`, with the tokens of its prompts, so that its report can be
made from files alone.
"""

import logging
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from saepatch.data.texts import token_batches
from saepatch.dictionaries.active_values import StrengthUnits
from saepatch.dictionaries.dictionary import Dictionary
from saepatch.model.finite import check_finite
from saepatch.model.language_model import LanguageModel, Tokens
from saepatch.model.lens import INSIDE, final_norm, stream_directions
from saepatch.reading.activity import Activity, Peak
from saepatch.report.blocks import Simple
from saepatch.report.notebook import Shown
from saepatch.report.text import number
from saepatch.splicing.splice import record_latents

log = logging.getLogger(__name__)

CELLS = 2**26  # activations in memory at once
PART = 256  # latents whose directions are unembedded at once


@dataclass(frozen=True)
class Example:
    """A stretch of a text with the activation at each token; `text` is the text's index."""

    text: int
    tokens: tuple[str, ...]
    acts: tuple[float, ...]


@dataclass(frozen=True, repr=False)
class Card(Shown):
    """Description of one latent. Shares and counts are over the ordinary positions of the texts read."""

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
    unit: float
    """The 0.95 quantile of its positive activations, which outliers do not move; NaN in runs of older versions."""
    mean_active: float
    """Mean over the positions where it is not 0; NaN if there are none."""
    norm: float
    """Norm of what one unit of it adds to the site."""
    edges: tuple[float, ...]
    counts: tuple[int, ...]
    """A histogram of its non-zero activations: one more edge than counts, the last at or above the maximum."""
    examples: tuple[Example, ...]
    lens: str
    """How `raises` and `lowers` were computed; empty where they could not be."""
    raises: tuple[tuple[str, float], ...]
    lowers: tuple[tuple[str, float], ...]
    """Tokens whose logits its direction raises and lowers most, with the logit minus the vocabulary's mean."""
    neighbours: tuple[tuple[int, float], ...]
    """Latents of the same dictionary with the most similar directions, by cosine."""
    lower: tuple[Example, ...] = ()
    """Examples of weaker activations: at most half of the maximum, then at most a quarter; none in older runs."""

    @property
    def dead(self) -> bool:
        """Whether it never fired in the texts read."""
        return self.frequency == 0

    @property
    def warning(self) -> str:
        """Says where its largest activation is far above its unit; else empty."""
        return "".join(StrengthUnits(torch.tensor([self.unit]), torch.tensor([self.maximum])).warnings([self.latent]))

    @property
    def anchor(self) -> str:
        """Its anchor on a page, for links."""
        return f"latent-{self.site}-{self.latent}"

    def __repr__(self) -> str:
        if self.dead:
            return f"{self.title}: never active in {self.tokens:,} tokens"
        raises = ", ".join(repr(token) for token, _ in self.raises[:4])
        rate = f"active at {number(self.frequency, '.2%')} of {self.tokens:,} tokens, at most {number(self.maximum)}"
        return f"{self.title}: {rate}" + (f"\nraises {raises}" if raises else "")

    @property
    def title(self) -> str:
        """Heading shown above the card."""
        return f"Latent {self.latent} at {self.site}"

    def blocks(self) -> list[Simple]:
        """The card's blocks, as in reports."""
        from saepatch.reading.card_blocks import card_blocks

        return card_blocks(self, set())

    @staticmethod
    def read(content: dict[str, Any]) -> "Card":
        """A card from the JSON of its `asdict`; null numbers become NaN."""
        nan = float("nan")
        examples, lower = (
            tuple(Example(e["text"], tuple(e["tokens"]), tuple(e["acts"])) for e in content.get(name, ()))
            for name in ("examples", "lower")
        )
        pairs = {key: tuple((pair[0], pair[1]) for pair in content[key]) for key in ("raises", "lowers", "neighbours")}
        numbers = {
            key: nan if (value := content.get(key)) is None else value
            for key in ("mean_active", "maximum", "unit", "norm")
        }
        plain = {
            "edges": tuple(content["edges"]),
            "counts": tuple(content["counts"]),
            "examples": examples,
            "lower": lower,
        }
        return Card(**content | numbers | plain | pairs)


def read_latents(
    model: LanguageModel,
    dictionary: Dictionary,
    latents: Sequence[int],
    texts: Tokens | Iterable[str],
    examples: int = 6,
    top: int = 10,
    batch_size: int = 32,
) -> list[Card]:
    """Cards of any number of latents over some texts, in one pass that stops at the dictionary's site.

    Texts are streamed in batches; only counts and each latent's examples are kept.

    Args:
        latents: Ids; the cards are in their order.
        texts: Texts to search for examples, tokenised or not (may be a generator); BOS and padding are left out. Long
            texts are read in rows of at most 1,024 tokens, each counted as a text.
        examples: Number of examples per card, largest activation first.
        top: Number of promoted and suppressed tokens, and of neighbours, per card.
        batch_size: Texts per pass; reduced where the dictionary's activations would take too much memory.

    Raises:
        UserError: the dictionary does not fit the model, or has no such latent.
    """
    dictionary.check(model)
    dictionary.check_ids(tuple(latents))
    activity = _activity(model, dictionary, latents, token_batches(model, texts, batch_size, model.d_model), examples)
    cards = []
    for start in range(0, len(latents), PART):
        some = latents[start : start + PART]
        lens, near = logit_lens(model, dictionary, some, top), _neighbours(dictionary, some, top)
        for place, latent in enumerate(some):
            cards.append(_card(model, dictionary, latent, activity, start + place, lens, place, near[place]))
    return cards


@torch.no_grad()
def _activity(
    model: LanguageModel, dictionary: Dictionary, latents: Sequence[int], batches: Iterable[Tokens], examples: int
) -> Activity:
    ids, few = list(latents), dictionary.alone(latents)
    activity = Activity(len(ids), examples)
    for batch in batches:
        x = model.capture(batch, [dictionary.site])[dictionary.site]
        check_finite(model, dictionary.site, x, batch)
        width = len(ids) if few is not None else dictionary.d_sae
        rows = max(1, CELLS // (x.shape[1] * max(1, width)))
        for start in range(0, len(x), rows):
            part = batch.rows(slice(start, start + rows))
            acts = (few or dictionary).activations(x[start : start + rows])[0]
            acts = acts if few is not None else acts[..., ids]
            known = dictionary.known(model, part).ordinary
            activity.add(part.input_ids, part.attention_mask.bool(), known, acts)
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
        unit=float(activity.units[column]),
        mean_active=float(activity.total[column]) / count if count else float("nan"),
        norm=float(dictionary.rows[latent].float().norm()),
        edges=tuple(round(edge, 4) for edge in edges),
        counts=counts,
        examples=_examples(model, activity.peaks[column]),
        lower=_examples(model, activity.bands(column)),
        lens="" if lens is None else lens.how,
        raises=() if lens is None else lens.raises[row],
        lowers=() if lens is None else lens.lowers[row],
        neighbours=neighbours,
    )


def _examples(model: LanguageModel, peaks: Sequence[Peak]) -> tuple[Example, ...]:
    return tuple(
        Example(peak.text, tuple(model.token_texts(peak.ids)), tuple(round(act, 4) for act in peak.acts))
        for peak in peaks
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
    """A text's tokens with the summed activation of some latents at each."""

    name: str
    tokens: tuple[str, ...]
    acts: tuple[float, ...]


@torch.no_grad()
def read_texts(
    model: LanguageModel, dictionary: Dictionary, latents: Sequence[int], named: Sequence[tuple[str, str]]
) -> tuple[ReadText, ...]:
    """Run the unedited model over (name, text) pairs and sum the activations of `latents` at each token (0 at BOS)."""
    texts = []
    for name, text in named:
        tokens = model.tokenize([text])
        acts = record_latents(model, dictionary, tokens).acts[0][:, list(latents)].sum(-1).float().cpu()
        acts = acts * dictionary.known(model, tokens).ordinary[0].cpu()
        texts.append(ReadText(name, tuple(model.token_texts(tokens.input_ids[0].tolist())), tuple(acts.tolist())))
    return tuple(texts)


# What a direction writes


@dataclass(frozen=True)
class Lens:
    """Tokens that directions raise and lower, and how they were computed."""

    how: str
    raises: tuple[tuple[tuple[str, float], ...], ...]
    lowers: tuple[tuple[tuple[str, float], ...], ...]


@torch.no_grad()
def logit_lens(model: LanguageModel, dictionary: Dictionary, latents: Sequence[int], top: int = 10) -> Lens | None:
    """The logit lens of each latent's direction, through the final norm and the unembedding.

    The logits are `W_U (norm(d) - norm(0))` minus their mean over the vocabulary: the tokens the direction promotes on
    its direct path, without later layers and independent of the residual stream's norm (nostalgebraist 2020, applied to
    a direction). Directions of `z` or `neurons` are first multiplied by their output projection. The final norm is the
    one that reproduces the model's logits after the last block; where there is none, the unembedding alone is used;
    `how` records both. Returns None where the unembedding is not in memory or has another width.
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
    """The dictionary's id on Neuronpedia (`gpt2-small/8-res-jb`); empty where sae_lens has none."""
    cfg: Any = dictionary.sae.cfg
    identifier = str(cfg.metadata.get("neuronpedia_id") or "")
    return identifier if re.fullmatch(r"[\w.-]+/[\w.-]+", identifier) else ""
