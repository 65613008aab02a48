"""Cards of latents as blocks of a report."""

from collections.abc import Sequence

from saepatch.dictionaries.active_values import QUANTILE
from saepatch.reading.cards import Card
from saepatch.report.blocks import Chips, ColouredTokens, Details, Facts, Histogram, Link, Simple
from saepatch.report.text import number, token_text


def latent_card(card: Card, known: set[str], effects: Sequence[Simple] = ()) -> Details:
    """One card; `known` are the anchors to which its neighbours can link."""
    summary = "never fired here" if card.dead else f"fires at {number(card.frequency, '.1%')} of tokens"
    if card.raises:
        summary += ", raises " + " ".join(token_text(token) for token, _ in card.raises[:4])
    links = []
    if card.neuronpedia:
        name = f"{card.neuronpedia}/{card.latent}"
        links = [(f"{name} on Neuronpedia", f"https://www.neuronpedia.org/{name}")]
    return Details(card.anchor, f"{card.site} {card.latent}", summary, [*effects, *card_blocks(card, known)], links)


def card_blocks(card: Card, known: set[str]) -> list[Simple]:
    """The blocks of a card about the latent itself."""
    facts = {
        "dictionary": f"{card.dictionary} ({card.dictionary_hash})",
        "fires at": f"{number(card.frequency, '.2%')} of {card.tokens:,} tokens",
        "largest": number(card.maximum),
        f"unit of strength ({QUANTILE:g} quantile where it fires)": number(card.unit),
        "mean where it fires": number(card.mean_active),
        "length of its direction": number(card.norm),
    }
    if card.warning:
        facts["warning"] = card.warning
    blocks: list[Simple] = [Facts(facts)]
    for place, example in enumerate(card.examples):
        caption = f"up to {number(max(example.acts))}, text {example.text + 1}"
        caption += "" if place else ". Deeper colours: stronger activations, within each example"
        blocks.append(ColouredTokens(as_words(example.tokens), example.acts, caption))
    for example in card.lower:
        share = max(example.acts) / card.maximum if card.maximum else 0.0
        caption = f"weaker: up to {number(max(example.acts))} ({share:.0%} of the largest), text {example.text + 1}"
        blocks.append(ColouredTokens(as_words(example.tokens), example.acts, caption))
    if card.counts:
        blocks.append(Histogram("Non-zero activations", "activation", "tokens", card.edges, card.counts))
    if card.lens:
        raises, lowers = ([(token_text(token), value) for token, value in side] for side in (card.raises, card.lowers))
        blocks.append(Chips(f"its direction raises ({card.lens})", raises, ".2f"))
        blocks.append(Chips("and lowers", lowers, ".2f"))
    near: list[tuple[str | Link, float | int | None]] = []
    for latent, cosine in card.neighbours:
        name = f"latent-{card.site}-{latent}"
        near.append((Link(str(latent), name) if name in known else str(latent), cosine))
    blocks.append(Chips("most similar directions of the dictionary, by cosine", near, ".2f"))
    return blocks


def as_words(tokens: Sequence[str]) -> list[str]:
    """Tokens with a space after each, so that lines can break between them."""
    return [token_text(token) + " " for token in tokens]
