"""The page of `saepatch steer`: answers without and with an intervention, and the edited latents."""

import math
from collections.abc import Sequence
from dataclasses import dataclass

from saepatch.data.texts import load_texts
from saepatch.organism import is_checkpoint
from saepatch.pages.cards import cards_section, coloured
from saepatch.pages.overview import dictionary_facts, headline_section
from saepatch.reading.cards import Card, ReadText, read_latents, read_texts
from saepatch.records.provenance import command_line, versions
from saepatch.report import Comparison, Facts, Page, Section, Simple, Table, token_text
from saepatch.report.text import number
from saepatch.runs.commands.session import Session
from saepatch.steering.fluency import perplexity
from saepatch.steering.streaming import Written

SURPRISING = 10.0  # warn above this multiple of the bare answer's perplexity
TITLES = ("before", "after")


@dataclass(frozen=True)
class SteeredAnswer:
    """One request with both answers, their perplexities under the bare model, and the bare model's activations on both
    texts."""

    prompt: str
    strength: float
    answers: tuple[str, str]
    perplexities: tuple[float, float]
    texts: tuple[ReadText, ...]


def listen(session: Session, prompt: str, both: tuple[Written, Written], texts: Sequence[str]) -> SteeredAnswer:
    """Describe an answer that was just generated; `texts` are the answers as displayed."""
    model = session.model
    site, latents = max(session.latents.items(), key=lambda pair: len(pair[1]))
    named = [
        (f"{name}, read again by the bare model", read + written.text)
        for name, read, written in zip(TITLES, session.prompts, both)
    ]
    before, after = (perplexity(model, [read], [written.ids]) for read, written in zip(session.prompts, both))
    coloured = read_texts(model, session.dictionaries[site], latents, named)
    return SteeredAnswer(prompt, session.strength, (texts[0], texts[1]), (before, after), coloured)


def read_cards(session: Session) -> tuple[Card, ...]:
    """Cards of the edited latents over the reference texts; empty without texts."""
    config = session.config
    if not config.reference and not is_checkpoint(config.model):
        return ()
    texts = load_texts(config.reference or "organism")
    return tuple(
        card
        for site, latents in session.latents.items()
        for card in read_latents(session.model, session.dictionaries[site], latents, texts)
    )


def steered_page(session: Session, answers: Sequence[SteeredAnswer], cards: Sequence[Card]) -> Page:
    """The page of the answers so far."""
    last = answers[-1]
    lead = (
        f"{len(answers)} request{'s' * (len(answers) > 1)} to {session.model.name}, answered without and with an "
        f"intervention on latents: {session.title}."
    )
    items = {
        "the last answer's perplexity under the bare model, before": number(last.perplexities[0]),
        "… after": number(last.perplexities[1]),
    }
    blocks: list[Simple] = []
    for answer in answers:
        columns = list(zip((TITLES[0], f"{TITLES[1]}, × {answer.strength:g}"), answer.answers))
        blocks += [Comparison(answer.prompt, columns, changes=True), *coloured(answer.texts)]
    if len(answers) > 1:
        rows = [(token_text(answer.prompt), answer.strength, *answer.perplexities) for answer in answers]
        blocks.append(
            Table(
                ["request", "strength", *(f"perplexity {name}" for name in TITLES)],
                rows,
                "Perplexity of each answer given its own prompt, under the bare model.",
            )
        )
    text = (
        "Marked: words that differ from the answer before. Below, both texts in the bare model. Colours: activation of "
        "the edited latents of one site at each token."
    )
    sections = [headline_section(items, [*session.warnings, *notices(answers)], ""), Section("Answers", text, blocks)]
    if cards:
        sections.append(cards_section(cards, "The edited latents", "reference texts", ""))
    return Page("Steered answers", lead, sections, _facts(session))


def notices(answers: Sequence[SteeredAnswer]) -> list[str]:
    """Warnings, a sentence each."""
    warnings = [
        f"{len(answers)} request{'s' * (len(answers) > 1)}: an illustration, not a measurement of how often this works."
    ]
    for answer in answers:
        (before, after), request = answer.perplexities, token_text(answer.prompt)
        if math.isfinite(before) and after > SURPRISING * before:
            warnings.append(
                f"The bare model finds the steered answer to “{request}” {number(after / before, ',.0f')} "
                "times as perplexing as its own: the strength may be too high for fluent text."
            )
        if answer.answers[0] == answer.answers[1]:
            warnings.append(f"The intervention changes nothing in the answer to “{request}”.")
    return warnings


def _facts(session: Session) -> Facts:
    config = session.config
    dictionaries = {
        str(site): {"name": dictionary.name, "hash": dictionary.fingerprint}
        for site, dictionary in session.dictionaries.items()
    }
    units, largest = (
        "; ".join(f"{site}: {', '.join(map(number, some))}" for site, some in each.items())
        for each in (session.units, session.maxima)
    )
    taken = f" ({config.quantile:g} quantile of the positive activations in the reference texts)" if largest else ""
    return Facts(
        {"model": f"{session.model.name} ({session.model.fingerprint})"}
        | dictionary_facts(dictionaries)
        | {
            "intervention": session.title,
            "one unit of strength": "–" if config.act == "ablate" else units + taken,
            "largest activation": largest or "–",
            "positions": config.positions,
            "decay": number(config.decay),
            "sampling": f"temperature {config.temperature:g}" if config.temperature else "most likely token",
            "seed": str(config.seed),
            "command": command_line(),
            "versions": ", ".join(f"{name} {version}" for name, version in versions().items()),
        }
    )
