"""What the demo's report shows beside figures: where effects are, what single latents are about, where they are on."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from saepatch import organism
from saepatch.data.pairs import PromptPair, pairs_of
from saepatch.dictionaries.dictionary import Dictionary
from saepatch.engine.components import Direction
from saepatch.measure.effects import Effects
from saepatch.measure.patching import patch_heads, patch_latents, patch_streams
from saepatch.model.language_model import LanguageModel
from saepatch.model.sites import Site
from saepatch.organism import tasks
from saepatch.reading.cards import Card, read_latents, token_texts
from saepatch.records.rows import Row

DIRECTIONS: tuple[Direction, Direction] = ("denoise", "noise")
HEAD_PAIRS = 40  # that heads are patched in
BY_POSITION = 12  # latents
CARDS = 8  # of a list of latents
LEADING = 3  # latents of every site that have cards for what they do at one position

Both = Mapping[Direction, Effects]


@dataclass(frozen=True, eq=False)
class Maps:
    """Effects on indirect objects by place: streams and latents over pairs of one form, heads over more pairs.

    `clean` and `corrupted` name the group's positions: the token where all agree, else None. `latents` are every latent
    of every dictionary at each position, each alone.
    """

    group: tuple[PromptPair, ...]
    tokens: tuple[tuple[str, ...], ...]  # of each pair's clean prompt
    clean: tuple[str | None, ...]
    corrupted: tuple[str | None, ...]
    streams: Both
    heads: Both
    head_pairs: int
    latents: Both

    def rows(self) -> list[Row]:
        """Every edit that was run, positions named where a pair has them."""
        found: list[Row] = []
        for effects in (*self.streams.values(), *self.latents.values()):
            found += effects.rows("ioi", self.tokens)
        for effects in self.heads.values():
            found += effects.rows("ioi")
        return found

    def leading(self, site: Site, count: int) -> list[int]:
        """Latents of a site with the largest effects at one position, denoising."""
        effects = self.latents["denoise"]
        ranked = (effects.edits[i] for i in np.argsort(-np.abs(effects.ratios()), kind="stable"))
        return list(dict.fromkeys(edit.units[0] for edit in ranked if edit.site == site))[:count]


def read_maps(model: LanguageModel, dictionaries: Sequence[Dictionary], n: int, seed: int, bars: bool = False) -> Maps:
    """Patch streams, heads and all latents of the `report` pairs, in both directions."""
    rows = list(tasks.task("ioi", "report", n, seed))
    pairs = pairs_of(rows)
    group = _one_form(model, [(row["template"], row["kind"]) for row in rows], pairs)
    sides = [[token_texts(model, model.encode(text)) for text in side] for side in zip(*_texts(group))]
    return Maps(
        tuple(group),
        tuple(tuple(one) for one in sides[0]),
        _shared(sides[0]),
        _shared(sides[1]),
        {d: patch_streams(model, group, direction=d) for d in DIRECTIONS},
        {d: patch_heads(model, pairs[:HEAD_PAIRS], direction=d) for d in DIRECTIONS},
        len(pairs[:HEAD_PAIRS]),
        {d: patch_latents(model, dictionaries, group, each_position=True, direction=d, progress=bars)
         for d in DIRECTIONS},
    )  # fmt: skip


def _texts(pairs: Sequence[PromptPair]) -> list[tuple[str, str]]:
    return [(pair.clean, pair.corrupted) for pair in pairs]


def _one_form(model: LanguageModel, forms: Sequence[tuple[str, str]], pairs: Sequence[PromptPair]) -> list[PromptPair]:
    """The most pairs of one template and order whose words stand at the same positions."""
    frames: dict[tuple[str, str], list[tuple[PromptPair, list[int], list[int]]]] = {}
    for form, pair in zip(forms, pairs, strict=True):
        frames.setdefault(form, []).append((pair, model.encode(pair.clean), model.encode(pair.corrupted)))
    groups: dict[tuple[object, ...], list[PromptPair]] = {}
    for form, members in frames.items():
        own = set.intersection(*(set(ids) for _, *both in members for ids in both))  # the template's own tokens
        for pair, *both in members:
            places = tuple(tuple((at, token) for at, token in enumerate(ids) if token in own) for ids in both)
            groups.setdefault((form, len(both[0]), places), []).append(pair)
    return max(groups.values(), key=len)


def _shared(rows: Sequence[Sequence[str]]) -> tuple[str | None, ...]:
    return tuple(column[0] if len(set(column)) == 1 else None for column in zip(*rows, strict=True))


def read_cards(model: LanguageModel, wanted: Sequence[tuple[Dictionary, Sequence[int]]]) -> tuple[Card, ...]:
    """Cards of the latents of each list, over the embedded texts; a latent named twice has one card."""
    tokens = model.tokenize(organism.texts())
    found: dict[tuple[str, int], Card] = {}
    for dictionary, latents in wanted:
        site = str(dictionary.site)
        left = [latent for latent in dict.fromkeys(latents) if (site, latent) not in found]
        if left:
            found |= {(card.site, card.latent): card for card in read_latents(model, dictionary, left, tokens)}
    return tuple(found.values())
