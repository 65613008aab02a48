"""Sections with cards of latents, and texts coloured by activations (from `saepatch.reading.cards`)."""

from collections.abc import Callable, Sequence

from saepatch.reading.card_blocks import as_words, latent_card
from saepatch.reading.cards import Card, ReadText
from saepatch.report import ColouredTokens, Section, Simple
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


def coloured(texts: Sequence[ReadText]) -> list[Simple]:
    """Texts coloured by the summed activations of the edited latents."""
    return [
        ColouredTokens(
            as_words(text.tokens),
            text.acts,
            f"{text.name}: sum of the acting latents' activations, at most {number(max(text.acts))}",
        )
        for text in texts
    ]


def dead_latents(cards: Sequence[Card], consequence: str) -> list[str]:
    """A warning about latents that never fired, if there are any."""
    dead = [f"{card.site} {card.latent}" for card in cards if card.dead]
    return [f"Never active in this run's prompts: {', '.join(dead)}. {consequence}"] if dead else []
