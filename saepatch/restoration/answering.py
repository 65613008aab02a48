"""The model, donor and sites of a restoration, and the answers under it."""

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
"""Latents to restore at each site; None: every latent."""


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
        """Mask of the answers with this outcome by the keyword judge."""
        return np.array([judge(text) == outcome for text in self.texts], dtype=bool)

    @property
    def opened(self) -> Bool[ndarray, "prompts"]:
        """Mask of prompts after which the next token more likely than not begins a refusal."""
        return np.array(self.scores, dtype=float) > 0


@dataclass(frozen=True, eq=False, kw_only=True)
class Restoration:
    """A model whose latents are restored at some sites, and its donor.

    Attributes:
        other: The donor, where it is another model on the same tokens; None: the model itself on clean prompts.
        template: Number of tokens at the end of prompts that are restored, in addition to generated tokens.
        means: Means of latents over clean prompts, restored instead of a donor run.
    """

    model: LanguageModel
    other: LanguageModel | None
    sites: Mapping[Site, Dictionary]
    template: int
    means: CleanMeans | None = None

    def donor_of(self, clean: Sequence[str]) -> Donor:
        """The donor for prompts with these clean counterparts."""
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
        """Restore latents from a donor inside the context; `sites` replaces the restoration's own dictionaries.

        Raises:
            UserError: a site has no dictionary; otherwise as for `saepatch.splicing.donors.Restore`.
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
        """Provenance of the model's answers; for several dictionaries, the hash is over all their hashes."""
        hashes = [dictionary.fingerprint for dictionary in (dictionaries or self.sites).values()]
        whole = hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()[:16]
        return Provenance(self.model.name, self.model.fingerprint, sae, whole, seed)
