"""`saepatch latent`: cards of latents in the terminal."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from saepatch.data.texts import load_texts
from saepatch.dictionaries.loading import load_sae
from saepatch.errors import UserError
from saepatch.model.language_model import LanguageModel
from saepatch.pages.cards import card_blocks, latent_card
from saepatch.pages.left import anchor
from saepatch.reading.cards import Card, read_latents, token_texts
from saepatch.reading.patchscope import Reading, best_reading, read_by_patchscope
from saepatch.report import Card as Folded
from saepatch.report import Facts, Page, Section, Simple, Table, token_text
from saepatch.report.text import number
from saepatch.runs.interpret import read_model
from saepatch.settings.latent import LatentConfig
from saepatch.settings.mixins import latents_of_sites
from saepatch.steering.contrasts import output_scores

BLOCKS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class Found:
    """A latent's card; its output score (NaN where it never fires); what the model says of it, where it was asked."""

    card: Card
    output_score: float
    model_hash: str
    said: tuple[Reading, ...] = ()

    def facts(self) -> dict[str, Any]:
        return asdict(self.card) | {"output_score": self.output_score, "said": [asdict(one) for one in self.said]}


def read_named(config: LatentConfig) -> list[Found]:
    """Load the model and the dictionary, and read the latents on the texts, in one pass over these.

    Raises:
        UserError: one of them cannot be read, or they do not fit.
    """
    ((site, ids),) = latents_of_sites(config.latent).items()
    texts = load_texts(config.data or "organism")
    model = read_model(config)
    dictionary = load_sae(config.sae, site, model.device)
    cards = read_latents(model, dictionary, ids, texts)
    maxima = torch.zeros(dictionary.d_sae)
    maxima[ids] = torch.tensor([card.maximum for card in cards])
    scores = output_scores(model, dictionary, ids, maxima).tolist()
    said: Sequence[Sequence[Reading]] = [()] * len(ids)
    if config.explain:
        said = read_by_patchscope(model, dictionary, ids, config.explain, _placeholder(model, config.explain))
    return [
        Found(card, math.nan if card.dead else score, model.fingerprint, tuple(readings))
        for card, score, readings in zip(cards, scores, said, strict=True)
    ]


def _placeholder(model: LanguageModel, prompt: str) -> int:
    """The place among the prompt's tokens where its last X is, which has to be a token of its own."""
    for at, token in reversed(list(enumerate(token_texts(model, model.encode(prompt))))):
        if token.strip() == "X":
            return at
    raise UserError(f"the X of {prompt!r} is no token of its own to this model: put it elsewhere, between spaces")


def latent_lines(found: Found) -> Iterator[str]:
    """What was found as lines of text."""
    card = found.card
    yield f"latent {card.latent} at {card.site} of {card.dictionary} ({card.dictionary_hash})"
    yield (
        f"fires at {number(card.frequency, '.2%')} of {card.tokens:,} tokens in {card.texts:,} texts, mean "
        f"{number(card.mean_active)} where it does, at most {number(card.maximum)}; length {number(card.norm)}"
    )
    if card.counts:
        top = max(card.counts)
        bars = "".join(BLOCKS[-(-8 * count // top)] for count in card.counts)
        yield f"histogram  {number(card.edges[0])} {bars} {number(card.edges[-1])}"
    for name, tokens in (("raises", card.raises), ("lowers", card.lowers)):
        if tokens:
            yield f"{name:<10} " + "  ".join(f"{token_text(token)} {number(value, '.2f')}" for token, value in tokens)
    yield "neighbours " + "  ".join(f"{latent} {number(cosine, '.2f')}" for latent, cosine in card.neighbours)
    if card.neuronpedia:
        yield f"see        https://www.neuronpedia.org/{card.neuronpedia}/{card.latent}"
    yield f"output     {number(found.output_score)}: how far adding it raises the tokens that it speaks for (0 to 1)"
    if found.said:
        best = best_reading(found.said)
        for one in found.said:
            yield f"said       {'*' if one is best else ' '} {one.scale:<4g} {token_text(one.text).replace('␣', ' ')}"
    yield "examples   [where it fires, the largest in double brackets]" if card.examples else "examples   none"
    for example in card.examples:
        peak = example.acts.index(max(example.acts))
        shown = (_marked(token, act, at == peak) for at, (token, act) in enumerate(zip(example.tokens, example.acts)))
        yield f"  {number(max(example.acts)):>8}  " + "".join(shown)


def latent_page(found: Sequence[Found], facts: Mapping[str, str]) -> Page:
    """A page about one latent of a dictionary, or about several, a card each."""
    one = found[0].card
    read = f"Read on {one.texts:,} texts ({one.tokens:,} tokens). "
    if len(found) > 1:
        known = {anchor(each.card) for each in found}
        cards = [
            Section(f"Latent {each.card.latent}", _score(each), [latent_card(each.card, known, _said(each))])
            for each in found
        ]
        return Page(f"Latents at {one.site}", read.strip(), cards, Facts(facts))
    lead = read + (
        "It fired nowhere in them." if one.dead else f"It fires at {number(one.frequency, '.2%')} of their tokens."
    )
    sections = [Section("The latent", _score(found[0]), card_blocks(one, set()))]
    if found[0].said:
        sections.append(Section("In the model's words", "", _said(found[0])))
    card = latent_card(one, set())
    if card.links:
        text, address = card.links[0]
        sections.append(Section("Elsewhere", "", [Folded("elsewhere", text, "", [], [(text, address)])]))
    return Page(f"Latent {one.latent} at {one.site}", lead, sections, Facts(facts))


def _score(found: Found) -> str:
    return (
        f"Output score {number(found.output_score)}: how far adding it raises the tokens that it speaks for (0 to 1)."
        if math.isfinite(found.output_score)
        else "It has no output score: that is measured at its largest activation, and it has none."
    )


def _said(found: Found) -> list[Simple]:
    if not found.said:
        return []
    best = best_reading(found.said)
    rows = [(token_text(said.text).replace("␣", " "), said.scale, said is best) for said in found.said]
    caption = (
        "What the model goes on with after the explanation prompt with the latent written in. Scale: lengths of "
        "what the placeholder held. Best: where the latent is still there and the model is sure what to say."
    )
    return [Table(["said", "scale", "best"], rows, caption)]


def _marked(token: str, act: float, peak: bool) -> str:
    text = token_text(token).replace("␣", " ")
    return f"[[{text}]]" if peak else f"[{text}]" if act else text
