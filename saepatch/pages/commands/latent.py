"""`saepatch latent`: cards of latents in the terminal."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import torch

from saepatch.data.texts import load_texts
from saepatch.dictionaries.active_values import QUANTILE
from saepatch.dictionaries.loading import load_sae
from saepatch.errors import UserError
from saepatch.model.language_model import LanguageModel
from saepatch.reading.card_blocks import card_blocks, latent_card
from saepatch.reading.cards import Card, read_latents
from saepatch.reading.patchscope import Reading, best_reading, read_by_patchscope
from saepatch.report import Details, Facts, Page, Section, Simple, Table, token_text
from saepatch.report.text import number
from saepatch.runs.interpret import read_model
from saepatch.settings.latent import LatentConfig
from saepatch.settings.mixins import latents_of_sites
from saepatch.steering.contrasts import output_scores

BLOCKS = " ▁▂▃▄▅▆▇█"


@dataclass(frozen=True)
class ReadLatent:
    """A latent's card, its output score (NaN where it never fires), and the model's explanations, if requested."""

    card: Card
    output_score: float
    model_hash: str
    readings: tuple[Reading, ...] = ()

    def facts(self) -> dict[str, Any]:
        return asdict(self.card) | {
            "output_score": self.output_score,
            "said": [asdict(reading) for reading in self.readings],
        }


def read_named(config: LatentConfig) -> list[ReadLatent]:
    """Load the model and the dictionary, and describe the latents in one pass over the texts.

    Raises:
        UserError: the model, dictionary or texts cannot be read, or do not fit.
    """
    ((site, ids),) = latents_of_sites(config.latent).items()
    texts = load_texts(config.reference or "organism")
    model = read_model(config)
    dictionary = load_sae(config.sae, site, model.device, every_position=config.every_position)
    cards = read_latents(model, dictionary, ids, texts)
    units = torch.zeros(dictionary.d_sae)
    units[list(ids)] = torch.tensor([card.unit for card in cards])
    scores = output_scores(model, dictionary, ids, units).tolist()
    readings: Sequence[Sequence[Reading]] = [()] * len(ids)
    if config.explain:
        readings = read_by_patchscope(model, dictionary, ids, config.explain, _placeholder(model, config.explain))
    return [
        ReadLatent(card, math.nan if card.dead else score, model.fingerprint, tuple(explained))
        for card, score, explained in zip(cards, scores, readings, strict=True)
    ]


def _placeholder(model: LanguageModel, prompt: str) -> int:
    """Index of the prompt's last token that is an X."""
    for position, token in reversed(list(enumerate(model.token_texts(model.encode(prompt))))):
        if token.strip() == "X":
            return position
    raise UserError(f"the X of {prompt!r} is not a separate token in this model: put it elsewhere, between spaces")


def latent_lines(latent: ReadLatent) -> Iterator[str]:
    """A latent as lines of text."""
    card = latent.card
    yield f"latent {card.latent} at {card.site} of {card.dictionary} ({card.dictionary_hash})"
    yield (
        f"fires at {number(card.frequency, '.2%')} of {card.tokens:,} tokens in {card.texts:,} texts, mean "
        f"{number(card.mean_active)} where active, {QUANTILE:g} quantile {number(card.unit)}, maximum "
        f"{number(card.maximum)}; norm {number(card.norm)}"
    )
    if card.warning:
        yield f"warning    {card.warning}"
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
    yield f"output     {number(latent.output_score)}: how far adding it raises the tokens it promotes (0 to 1)"
    if latent.readings:
        best = best_reading(latent.readings)
        for reading in latent.readings:
            mark = "*" if reading is best else " "
            yield f"said       {mark} {reading.scale:<4g} {token_text(reading.text).replace('␣', ' ')}"
    yield "examples   [active tokens, the largest in double brackets]" if card.examples else "examples   none"
    for example in card.examples:
        peak = example.acts.index(max(example.acts))
        shown = (_marked(token, act, at == peak) for at, (token, act) in enumerate(zip(example.tokens, example.acts)))
        yield f"  {number(max(example.acts)):>8}  " + "".join(shown)


def latent_page(latents: Sequence[ReadLatent], facts: Mapping[str, str]) -> Page:
    """A page about one latent, or about several with a card each."""
    card = latents[0].card
    read = f"Read on {card.texts:,} texts ({card.tokens:,} tokens)."
    if len(latents) > 1:
        known = {latent.card.anchor for latent in latents}
        sections = [
            Section(f"Latent {item.card.latent}", _score(item), [latent_card(item.card, known, _readings(item))])
            for item in latents
        ]
        return Page(f"Latents at {card.site}", read, sections, Facts(facts))
    fires = "fired nowhere in them" if card.dead else f"fires at {number(card.frequency, '.2%')} of their tokens"
    sections = [Section("The latent", _score(latents[0]), card_blocks(card, set()))]
    if latents[0].readings:
        sections.append(Section("In the model's words", "", _readings(latents[0])))
    if links := latent_card(card, set()).links:
        sections.append(Section("Elsewhere", "", [Details("elsewhere", links[0][0], "", [], links)]))
    return Page(f"Latent {card.latent} at {card.site}", f"{read} It {fires}.", sections, Facts(facts))


def _score(latent: ReadLatent) -> str:
    return (
        f"Output score {number(latent.output_score)}: how far adding it raises the tokens it promotes (0 to 1)."
        if math.isfinite(latent.output_score)
        else "No output score: it is measured at one unit of the latent's activation, and the latent never fires."
    )


def _readings(latent: ReadLatent) -> list[Simple]:
    if not latent.readings:
        return []
    best = best_reading(latent.readings)
    rows = [(token_text(r.text).replace("␣", " "), r.scale, r is best) for r in latent.readings]
    caption = (
        "The model's continuation of the explanation prompt with the latent written in. Scale: in units of the "
        "placeholder's norm. Best: the scale where the latent is still present and the model is most certain."
    )
    return [Table(["said", "scale", "best"], rows, caption)]


def _marked(token: str, act: float, peak: bool) -> str:
    text = token_text(token).replace("␣", " ")
    return f"[[{text}]]" if peak else f"[{text}]" if act else text
