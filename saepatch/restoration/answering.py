"""Who is restored from whom, and where: one value, and the answers that are given under it."""

import hashlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from jaxtyping import Bool
from numpy import ndarray

from saepatch.dictionaries.dictionary import Dictionary
from saepatch.engine.metrics import refusal_log_odds
from saepatch.model.language_model import LanguageModel
from saepatch.model.positions import Positions
from saepatch.model.sites import Site
from saepatch.records.provenance import Provenance
from saepatch.restoration.restore import Outcome, judge, restorations
from saepatch.splicing.donors import CleanMeans, CleanPrompts, Donor, OtherModel
from saepatch.splicing.splice import splice

Latents = Mapping[Site, tuple[int, ...] | None]
"""What is restored at each site; None: every latent."""


@dataclass(frozen=True, eq=False)
class Answered:
    """Answers to some prompts: texts, and refusal scores (nats) after the prompts."""

    texts: tuple[str, ...]
    scores: tuple[float, ...]

    @classmethod
    def by(cls, model: LanguageModel, prompts: Sequence[str], tokens: int, refusal_ids: set[int]) -> "Answered":
        """Greedy answers of at most `tokens` tokens, all prompts in one batch."""
        texts = model.generate(prompts, tokens, batch_size=len(prompts))
        scores = refusal_log_odds(model.next_logits(model.tokenize(prompts, "left")), refusal_ids)
        return cls(tuple(texts), tuple(scores.tolist()))

    @property
    def refused(self) -> Bool[ndarray, "prompts"]:
        return self.are("refuse")

    def are(self, outcome: Outcome) -> Bool[ndarray, "prompts"]:
        """Which answers the keyword judge calls so."""
        return np.array([judge(text) == outcome for text in self.texts], dtype=bool)

    @property
    def opened(self) -> Bool[ndarray, "prompts"]:
        """Where the first token is more likely a refusal's than not, whatever comes after it."""
        return np.array(self.scores, dtype=float) > 0


@dataclass(frozen=True, eq=False, kw_only=True)
class Restoration:
    """A model whose latents are restored at some sites, and its donor.

    Attributes:
        other: The donor, where it is another model that reads the same tokens; None: the model itself on clean prompts.
        template: How many tokens at the end of prompts are restored, beside those that are generated.
        means: What is restored instead of a donor run: latents' means over clean prompts.
    """

    model: LanguageModel
    other: LanguageModel | None
    sites: Mapping[Site, Dictionary]
    template: int
    means: CleanMeans | None = None

    def donor_of(self, clean: Sequence[str]) -> Donor:
        """The donor for prompts whose clean counterparts these are."""
        if self.means is not None:
            return self.means
        return (
            CleanPrompts(tuple(clean), self.template) if self.other is None else OtherModel(self.other, self.template)
        )

    @contextmanager
    def restored(
        self,
        latents: Latents,
        donor: Donor,
        error: bool = False,
        positions: Positions = "all",
        sites: Mapping[Site, Dictionary] | None = None,
    ) -> Iterator[None]:
        """Restore latents from a donor inside the block; `sites` are other dictionaries than the restoration's own.

        Raises:
            UserError: latents of a site without a dictionary, or what `saepatch.splicing.donors.Restore` refuses.
        """
        sites = self.sites if sites is None else sites
        latents = {site: ids for site, ids in latents.items() if ids != ()}
        if not latents:
            yield
            return
        edits = restorations(sites, donor, latents, positions, error)
        with splice(self.model, [sites[site] for site in latents], edits):
            yield

    def provenance(self, sae: str, seed: int, dictionaries: Mapping[Site, Dictionary] | None = None) -> Provenance:
        """Of the model's answers; of several dictionaries the hash is taken over all of their hashes."""
        hashes = [dictionary.fingerprint for dictionary in (dictionaries or self.sites).values()]
        whole = hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()[:16]
        return Provenance(self.model.name, self.model.fingerprint, sae, whole, seed)
