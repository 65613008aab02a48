"""Cards of latents, from what `saepatch.reading.cards` wrote."""

from collections.abc import Sequence

import numpy as np

from saepatch.pages.left import Left, anchor
from saepatch.reading.cards import Card as Reading
from saepatch.reading.cards import ReadText
from saepatch.report import Card, Cell, Chips, Facts, Histogram, Link, Section, Simple, Table, Tokens, token_text
from saepatch.report.text import number

EFFECTS = 8  # of a card, in this run


def cards(left: Left) -> Section | None:
    """A card for each latent that was read, largest effects first."""
    if not left.cards:
        return None
    known = set(left.anchors.values())
    first = left.cards[0]
    text = (
        f"Of the latents with the largest effects: where they fire in this run's own prompts ({first.texts:,} texts, "
        f"{first.tokens:,} tokens), what their direction writes, which others are like them. These prompts are few "
        "and of one kind: what a latent is about in other text, they cannot say."
    )
    return Section("Latents", text, [latent_card(one, known, _effects(left, one)) for one in left.cards])


def latent_card(one: Reading, known: set[str], more: Sequence[Simple] = ()) -> Card:
    """One card; `known` are the anchors that its neighbours can lead to."""
    summary = "never fired here" if one.dead else f"fires at {number(one.frequency, '.1%')} of tokens"
    if one.raises:
        summary += ", raises " + " ".join(token_text(token) for token, _ in one.raises[:4])
    links = []
    if one.neuronpedia:
        address = f"https://www.neuronpedia.org/{one.neuronpedia}/{one.latent}"
        links = [(f"{one.neuronpedia}/{one.latent} on Neuronpedia", address)]
    return Card(anchor(one), f"{one.site} {one.latent}", summary, [*more, *card_blocks(one, known)], links)


def card_blocks(one: Reading, known: set[str]) -> list[Simple]:
    """What a card shows of a latent itself."""
    facts = {
        "dictionary": f"{one.dictionary} ({one.dictionary_hash})",
        "fires at": f"{number(one.frequency, '.2%')} of {one.tokens:,} tokens",
        "largest": number(one.maximum),
        "mean where it fires": number(one.mean_active),
        "length of its direction": number(one.norm),
    }
    blocks: list[Simple] = [Facts(facts)]
    for place, example in enumerate(one.examples):
        caption = f"up to {number(max(example.acts))}, text {example.text + 1}"
        caption += "" if place else ". The deeper a colour, the stronger, within one example"
        blocks.append(Tokens([token_text(token) + " " for token in example.tokens], example.acts, caption))
    if one.counts:
        blocks.append(Histogram("Activations that are not 0", "activation", "tokens", one.edges, one.counts))
    if one.lens:
        raises, lowers = ([(token_text(token), value) for token, value in side] for side in (one.raises, one.lowers))
        blocks.append(Chips(f"its direction raises ({one.lens})", raises, ".2f"))
        blocks.append(Chips("and lowers", lowers, ".2f"))
    near: list[tuple[str | Link, float | int | None]] = []
    for latent, cosine in one.neighbours:
        name = f"latent-{one.site}-{latent}"
        near.append((Link(str(latent), name) if name in known else str(latent), cosine))
    blocks.append(Chips("most similar directions of the dictionary, by cosine", near, ".2f"))
    return blocks


def coloured(read: Sequence[ReadText]) -> list[Simple]:
    """Texts coloured by the acting latents' activations."""
    return [
        Tokens(
            [token_text(token) + " " for token in one.tokens],
            one.acts,
            f"{one.name}: sum of the acting latents' activations, at most {number(max(one.acts))}",
        )
        for one in read
    ]


def _effects(left: Left, one: Reading) -> list[Simple]:
    """The latent's largest effects in the run, alone or in a group."""
    keys = left.changes.keys
    mine = [
        number
        for direction in left.directions
        for number in left.own(direction)
        if keys[number].site == one.site
        and keys[number].component == "latent"
        and str(one.latent) in keys[number].latent.split(",")
    ]
    mine = sorted(mine, key=lambda n: -abs(float(np.nan_to_num(left.effects[n]))))[:EFFECTS]
    if not mine:
        return []
    rows: list[list[Cell]] = [
        [keys[n].direction, keys[n].latent, keys[n].position, interval, int(left.changes.counts[n])]
        for n, interval in zip(mine, left.intervals(mine))
    ]
    columns = ["direction", "patched", "position", "effect", "pairs changed"]
    what = "estimated effects" if left.is_screen else "effects"
    return [Table(columns, rows, f"Its largest {what} in this run.", {"effect": ".3f", "pairs changed": "d"})]
