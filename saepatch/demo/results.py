"""The demo's results, from which its summary, rows and report are written."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from saepatch.data.pairs import PromptPair
from saepatch.dictionaries.dictionary import Dictionary
from saepatch.engine.components import PatchDirection
from saepatch.measure.curves import Curve
from saepatch.measure.quality import SpliceQuality
from saepatch.measure.results.effects import Effects
from saepatch.model.language_model import LanguageModel
from saepatch.model.sites import Site
from saepatch.organism.checks import Measures
from saepatch.reading.cards import Card, ReadText
from saepatch.records.rows import Row
from saepatch.records.statistics import Interval
from saepatch.settings.demo import DemoConfig
from saepatch.steering.generate import Steered

Both = Mapping[PatchDirection, Effects]


@dataclass(frozen=True, eq=False)
class Patching:
    """Indirect object identification at one site.

    In `denoise` and `noise`, the top latents are chosen for each prompt, by integrated gradients on that prompt. In
    `fixed`, one set serves all prompts; it is ranked on the `select` split, which has other names.
    """

    site: str
    pairs: int
    clean: float
    corrupted: float
    denoise: Curve
    noise: Curve
    fixed: Curve
    singles: tuple[Effects, Effects]  # every latent separately, on `report`: denoising, noising
    self_patch_error: float
    dictionary: Dictionary


@dataclass(frozen=True, eq=False)
class RestoredRefusals:
    """Refusals of jailbroken `report` prompts with latents restored from the benign framing.

    `rates` are shares of prompts. Those ending in `_generated` judge whole answers generated under restoration; the
    others check the top next token, with latents patched at the last prompt position.
    """

    site: str
    latents: tuple[int, ...]
    share_of_dictionary: float
    share_of_alive: float
    share_of_active: float  # as a multiple of the mean number of latents active at a position
    rates: Mapping[str, Interval]
    curve: tuple[tuple[int, Interval, Interval], ...]  # number of latents, top, random
    examples: tuple[tuple[str, str, str, str], ...]  # prompt, then answers: jailbroken, restored, random latents
    donors: tuple[str, ...]  # the benign prompts of the examples


@dataclass(frozen=True)
class Condition:
    """One way to steer: sets of latents (several for random ones), strength, and the result of each set.

    `strength` is in units of the norm of the top latent's maximum.
    """

    name: str
    sets: tuple[tuple[int, ...], ...]
    strength: float
    outcomes: tuple[Steered, ...]

    @property
    def shown(self) -> Float[np.ndarray, "prompts"]:
        """For each prompt, the share of sets under which its continuation shows the concept."""
        return np.mean([outcome.shown for outcome in self.outcomes], 0)

    @property
    def success(self) -> float:
        return float(self.shown.mean())

    @property
    def perplexity(self) -> float:
        """Geometric mean over the sets."""
        return float(np.exp(np.mean([np.log(outcome.perplexity) for outcome in self.outcomes])))


@dataclass(frozen=True)
class Steering:
    """Steering with the top 1 and top 10 latents at equal norm, compared with random latents and the bare model."""

    concept: str
    site: str
    positions: str
    prompts: tuple[str, ...]
    conditions: tuple[Condition, ...]
    tried: tuple[Condition, ...]  # at every strength, on `tune`

    def of(self, name: str) -> Condition:
        return next(condition for condition in self.conditions if condition.name == name)


@dataclass(frozen=True, eq=False)
class PositionMaps:
    """Effects by layer, head and position: streams and latents over pairs of one form, heads over more pairs.

    `clean` and `corrupted` name the positions of the group's prompts: the token if all agree, else None. `latents` has
    every latent of every dictionary, patched separately at each position.
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
        """Rows of every edit; positions are named by the pair's tokens, except for heads."""
        rows: list[Row] = []
        for effects in (*self.streams.values(), *self.latents.values()):
            rows += effects.rows("ioi", self.tokens)
        for effects in self.heads.values():
            rows += effects.rows("ioi")
        return rows

    def leading(self, site: Site, count: int) -> list[int]:
        """Latents of a site with the largest denoising effects at a single position."""
        effects = self.latents["denoise"]
        ranked = (effects.edits[i] for i in np.argsort(-np.abs(effects.ratios()), kind="stable"))
        return list(dict.fromkeys(edit.units[0] for edit in ranked if edit.site == site))[:count]


@dataclass(eq=False)
class Findings:
    """All results of a demo run."""

    config: DemoConfig
    model: LanguageModel
    saes: dict[Site, Dictionary]
    tasks: Measures
    quality: list[SpliceQuality]
    patching: Patching
    restoration: RestoredRefusals
    steering: list[Steering]
    maps: PositionMaps
    cards: tuple[Card, ...]
    restoration_texts: tuple[ReadText, ...]
    steering_texts: dict[str, tuple[ReadText, ...]]
    """Texts coloured by activation, by concept."""
    seconds: dict[str, float] = field(default_factory=dict)
