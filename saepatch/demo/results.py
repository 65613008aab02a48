"""The demo's results: the values that its summary, its rows and its report are written from."""

from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np
from jaxtyping import Float

from saepatch.data.pairs import PromptPair
from saepatch.dictionaries.dictionary import Dictionary
from saepatch.engine.components import PatchDirection
from saepatch.measure.curves import Curve
from saepatch.measure.effects import Effects
from saepatch.measure.quality import SpliceQuality
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

    The top latents of `denoise` and `noise` are each prompt's own, ranked by integrated gradients on that prompt. Those
    of `fixed` are one set for all prompts, ranked on the `select` split, whose names are others.
    """

    site: str
    pairs: int
    clean: float
    corrupted: float
    denoise: Curve
    noise: Curve
    fixed: Curve
    singles: tuple[Effects, Effects]  # every latent alone, on `report`: denoising, noising
    self_patch_error: float
    dictionary: Dictionary


@dataclass(frozen=True, eq=False)
class RestoredRefusals:
    """Refusals under jailbreak, on `report` prompts, with latents restored from the benign framing.

    `rates` are shares of prompts: those ending in `_generated` judge a whole answer written under the restoration, the
    others look at the top next token with latents patched at the last prompt position.
    """

    site: str
    latents: tuple[int, ...]
    share_of_dictionary: float
    share_of_alive: float
    share_of_active: float  # of the number of latents active at one position
    rates: Mapping[str, Interval]
    curve: tuple[tuple[int, Interval, Interval], ...]  # number of latents, top, random
    examples: tuple[tuple[str, str, str, str], ...]  # prompt, then answers: jailbroken, restored, random latents
    donors: tuple[str, ...]  # the benign prompts of the examples


@dataclass(frozen=True)
class Condition:
    """One way to steer: which latents (several sets for random ones), how strongly, and what came of each set.

    `strength` is in norms of the top latent's maximum.
    """

    name: str
    sets: tuple[tuple[int, ...], ...]
    strength: float
    outcomes: tuple[Steered, ...]

    @property
    def shown(self) -> Float[np.ndarray, "prompts"]:
        """Share of the sets that show the concept, for each prompt."""
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
    """Top-1 against top-10 latents at equal norm of the perturbation, beside random ones and the bare model."""

    concept: str
    site: str
    positions: str
    prompts: tuple[str, ...]
    conditions: tuple[Condition, ...]
    tried: tuple[Condition, ...]  # every strength, on `tune`

    def of(self, name: str) -> Condition:
        return next(condition for condition in self.conditions if condition.name == name)


@dataclass(frozen=True, eq=False)
class PositionMaps:
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
        rows: list[Row] = []
        for effects in (*self.streams.values(), *self.latents.values()):
            rows += effects.rows("ioi", self.tokens)
        for effects in self.heads.values():
            rows += effects.rows("ioi")
        return rows

    def leading(self, site: Site, count: int) -> list[int]:
        """Latents of a site with the largest effects at one position, denoising."""
        effects = self.latents["denoise"]
        ranked = (effects.edits[i] for i in np.argsort(-np.abs(effects.ratios()), kind="stable"))
        return list(dict.fromkeys(edit.units[0] for edit in ranked if edit.site == site))[:count]


@dataclass(eq=False)
class Findings:
    """Everything the demo rows: what the summary and the report are written from."""

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
    """By concept."""
    seconds: dict[str, float] = field(default_factory=dict)
