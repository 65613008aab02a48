"""Details for the demo's report: maps of effects, and cards of single latents."""

from collections.abc import Sequence

from saepatch import organism
from saepatch.data.forms import largest_group
from saepatch.data.pairs import pairs_of
from saepatch.demo.results import PositionMaps
from saepatch.dictionaries.dictionary import Dictionary
from saepatch.engine.components import PATCH_DIRECTIONS
from saepatch.measure.patching import patch_heads, patch_latents, patch_streams
from saepatch.model.language_model import LanguageModel
from saepatch.organism import tasks
from saepatch.reading.cards import Card, read_latents

HEAD_PAIRS = 40  # pairs in which heads are patched
BY_POSITION = 12  # latents in the latent × position map
CARDS = 8  # cards per list of latents
LEADING = 3  # latents per site with a card for their effect at one position


def read_maps(
    model: LanguageModel, dictionaries: Sequence[Dictionary], n: int, seed: int, bars: bool = False
) -> PositionMaps:
    """Patch streams, heads and all latents of the `report` pairs, in both directions."""
    rows = list(tasks.task("ioi", "report", n, seed))
    pairs = pairs_of(rows)
    group = largest_group(model, pairs, [f"{row['template']} {row['kind']}" for row in rows])
    texts = [pair.clean for pair in group], [pair.corrupted for pair in group]
    sides = [[model.token_texts(model.encode(text)) for text in side] for side in texts]
    return PositionMaps(
        tuple(group),
        tuple(map(tuple, sides[0])),
        _shared(sides[0]),
        _shared(sides[1]),
        {d: patch_streams(model, group, direction=d) for d in PATCH_DIRECTIONS},
        {d: patch_heads(model, pairs[:HEAD_PAIRS], direction=d) for d in PATCH_DIRECTIONS},
        len(pairs[:HEAD_PAIRS]),
        {d: patch_latents(model, dictionaries, group, each_position=True, direction=d, progress=bars)
         for d in PATCH_DIRECTIONS},
    )  # fmt: skip


def _shared(rows: Sequence[Sequence[str]]) -> tuple[str | None, ...]:
    return tuple(column[0] if len(set(column)) == 1 else None for column in zip(*rows, strict=True))


def read_cards(model: LanguageModel, lists: Sequence[tuple[Dictionary, Sequence[int]]]) -> tuple[Card, ...]:
    """Cards of the latents in each list, over the embedded texts; one card per latent even if it is listed twice."""
    tokens = model.tokenize(organism.texts())
    cards: dict[tuple[str, int], Card] = {}
    for dictionary, latents in lists:
        site = str(dictionary.site)
        unread = [latent for latent in dict.fromkeys(latents) if (site, latent) not in cards]
        if unread:
            cards |= {(card.site, card.latent): card for card in read_latents(model, dictionary, unread, tokens)}
    return tuple(cards.values())
