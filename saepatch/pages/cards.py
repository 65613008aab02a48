"""Blocks for cards of latents and for texts coloured by activations (from `saepatch.reading.cards`)."""

from collections.abc import Callable, Sequence

from saepatch.reading.cards import Card, ReadText
from saepatch.report import Chips, ColouredTokens, Details, Facts, Histogram, Link, Section, Simple, token_text
from saepatch.report.text import number

FEW_PROMPTS = "These prompts are few and similar, so they do not show what a latent responds to in other text."


def anchors_of(cards: Sequence[Card]) -> dict[tuple[str, str], str]:
    """Anchors of the cards by (site, latent)."""
    return {(card.site, str(card.latent)): card.anchor for card in cards}


def cards_section(
    cards: Sequence[Card],
    which: str,
    where: str,
    caution: str = FEW_PROMPTS,
    effects_of: Callable[[Card], Sequence[Simple]] = lambda card: (),
) -> Section:
    """A card for each latent; `effects_of` returns blocks on the run's effects, shown before the latent itself."""
    known = {card.anchor for card in cards}
    text = (
        f"{which}: where they fire in {where} ({cards[0].texts:,} texts, {cards[0].tokens:,} tokens), which tokens "
        f"their directions promote, and which latents are similar. {caution}"
    )
    return Section("Latents", text.strip(), [latent_card(card, known, effects_of(card)) for card in cards])


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
        "mean where it fires": number(card.mean_active),
        "length of its direction": number(card.norm),
    }
    blocks: list[Simple] = [Facts(facts)]
    for place, example in enumerate(card.examples):
        caption = f"up to {number(max(example.acts))}, text {example.text + 1}"
        caption += "" if place else ". Deeper colours: stronger activations, within each example"
        blocks.append(ColouredTokens(_tokens(example.tokens), example.acts, caption))
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


def coloured(texts: Sequence[ReadText]) -> list[Simple]:
    """Texts coloured by the summed activations of the edited latents."""
    return [
        ColouredTokens(
            _tokens(text.tokens),
            text.acts,
            f"{text.name}: sum of the acting latents' activations, at most {number(max(text.acts))}",
        )
        for text in texts
    ]


def _tokens(tokens: Sequence[str]) -> list[str]:
    return [token_text(token) + " " for token in tokens]


def dead_latents(cards: Sequence[Card], consequence: str) -> list[str]:
    """A warning about latents that never fired, if there are any."""
    dead = [f"{card.site} {card.latent}" for card in cards if card.dead]
    return [f"Never active in this run's prompts: {', '.join(dead)}. {consequence}"] if dead else []
