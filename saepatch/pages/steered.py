"""A page of `saepatch steer`: answers without and with an intervention, and the latents that act."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

from saepatch.data.texts import load_texts
from saepatch.organism import is_checkpoint
from saepatch.pages.cards import coloured, latent_card
from saepatch.pages.left import anchor
from saepatch.reading.cards import Card, ReadText, read_latents, read_texts
from saepatch.records.provenance import command_line, versions
from saepatch.report import Comparison, Facts, Headline, Notices, Page, Section, Simple, Table, token_text
from saepatch.report.text import number
from saepatch.steering.fluency import perplexity

if TYPE_CHECKING:
    from saepatch.runs.session import Session
    from saepatch.steering.streaming import Written

SURPRISING = 10.0  # times the bare answer's perplexity, from which on a warning is due
TITLES = ("before", "after")


@dataclass(frozen=True)
class Said:
    """One request as each side read it, both answers, their perplexities under the bare model, and both texts read
    again by the bare model."""

    prompt: str
    strength: float
    answers: tuple[str, str]
    perplexities: tuple[float, float]
    texts: tuple[ReadText, ...]


def listen(session: "Session", prompt: str, both: tuple["Written", "Written"], texts: Sequence[str]) -> Said:
    """What a page says of an answer that was just written; `texts` are the answers as they are shown."""
    model = session.model
    site, latents = max(session.latents.items(), key=lambda pair: len(pair[1]))
    named = [
        (f"{name}, read again by the bare model", asked + one.text)
        for name, asked, one in zip(TITLES, session.asked, both)
    ]
    found = [perplexity(model, [asked], [one.ids]) for asked, one in zip(session.asked, both)]
    read = read_texts(model, session.dictionaries[site], latents, named)
    return Said(prompt, session.strength, (texts[0], texts[1]), (found[0], found[1]), read)


def read_cards(session: "Session") -> tuple[Card, ...]:
    """Cards of the latents that act, over the reference texts; none where there are no texts."""
    config = session.config
    if not config.reference and not is_checkpoint(config.model):
        return ()
    tokens = session.model.tokenize(load_texts(config.reference or "organism"))
    return tuple(
        card
        for site, latents in session.latents.items()
        for card in read_latents(session.model, session.dictionaries[site], latents, tokens)
    )


def steered_page(session: "Session", said: Sequence[Said], cards: Sequence[Card]) -> Page:
    """The page of what was said so far."""
    last = said[-1]
    lead = (
        f"{len(said)} request{'s' * (len(said) > 1)} to {session.model.name}, answered without and with an "
        f"intervention on latents: {session.title}."
    )
    items = {
        "the last answer's perplexity under the bare model, before": number(last.perplexities[0]),
        "… after": number(last.perplexities[1]),
    }
    overview: list[Simple] = [Headline(items)]
    if told := notices(said):
        overview.append(Notices(told))
    blocks: list[Simple] = []
    for one in said:
        columns = list(zip((TITLES[0], f"{TITLES[1]}, × {one.strength:g}"), one.answers))
        blocks += [Comparison(one.prompt, columns, changes=True), *coloured(one.texts)]
    if len(said) > 1:
        rows = [(token_text(one.prompt), one.strength, *one.perplexities) for one in said]
        blocks.append(
            Table(
                ["request", "strength", *(f"perplexity {name}" for name in TITLES)],
                rows,
                "Of each answer after what its side had read, under the bare model.",
            )
        )
    text = (
        "Marked: words that the answer before lacks there. Below, both texts as the bare model reads them: the deeper "
        "a colour, the stronger the acting latents of one site are at that token, nothing being edited."
    )
    sections = [Section("What came out", "", overview), Section("Answers", text, blocks)]
    if cards:
        known = {anchor(card) for card in cards}
        about = (
            f"Where the acting latents fire in {cards[0].texts:,} reference texts ({cards[0].tokens:,} tokens), what "
            "their direction writes, which others are like them."
        )
        sections.append(Section("Latents", about, [latent_card(card, known) for card in cards]))
    return Page("Steered answers", lead, sections, _facts(session))


def notices(said: Sequence[Said]) -> list[str]:
    """What a reader has to know, in words."""
    told = [f"{len(said)} request{'s' * (len(said) > 1)}: an impression, and no measurement of how often this works."]
    for one in said:
        (before, after), request = one.perplexities, token_text(one.prompt)
        if math.isfinite(before) and after > SURPRISING * before:
            told.append(
                f"The bare model finds the steered answer to “{request}” {number(after / before, ',.0f')} "
                "times as perplexing as its own: the strength may be more than the model's language bears."
            )
        if one.answers[0] == one.answers[1]:
            told.append(f"The intervention changes nothing in the answer to “{request}”.")
    return told


def _facts(session: "Session") -> Facts:
    config = session.config
    dictionaries = {
        f"dictionary {site}": f"{one.name} ({one.fingerprint})" for site, one in session.dictionaries.items()
    }
    units = "; ".join(f"{site}: {', '.join(map(number, some))}" for site, some in session.units.items())
    return Facts(
        {"model": f"{session.model.name} ({session.model.fingerprint})"}
        | dictionaries
        | {
            "intervention": session.title,
            "one unit of strength": "–" if config.act == "ablate" else units,
            "positions": config.positions,
            "decay": number(config.decay),
            "sampling": f"temperature {config.temperature:g}" if config.temperature else "most likely token",
            "seed": str(config.seed),
            "command": command_line(),
            "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
        }
    )
