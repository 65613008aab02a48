"""Text that a model generates about edited facts, and how varied it is."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch

from saepatch.data.edit_requests import EditRequest
from saepatch.errors import UserError
from saepatch.facts.contexts import sample_ids
from saepatch.model.language_model import LanguageModel

WEIGHTS = {2: 2 / 3, 3: 4 / 3}  # of the entropies of bigrams and trigrams, in the original code


@dataclass(frozen=True)
class FluencySettings:
    """Texts of `tokens` tokens, sampled from the `top_k` likeliest after each fact's prompt, seeded."""

    tokens: int = 40
    top_k: int = 5
    seed: int = 0

    def __post_init__(self) -> None:
        if self.tokens < 3 or self.top_k < 1 or self.seed < 0:
            raise UserError(
                f"tokens = {self.tokens}, top_k = {self.top_k}, seed = {self.seed}: use at least 3, 1 and 0"
            )


def fluency(model: LanguageModel, requests: Sequence[EditRequest], settings: FluencySettings) -> list[float]:
    """Entropy of n-grams of a text generated after each request's prompt, in bits: low for repetitive text.

    Each request has its own random numbers, so that its text does not depend on the others.
    """
    generators = [torch.Generator().manual_seed(settings.seed) for _ in requests]
    ids = sample_ids(model, [request.text for request in requests], settings.tokens, settings.top_k, generators)
    return list(map(ngram_entropy, ids))


def ngram_entropy(ids: Sequence[int]) -> float:
    """Mean of the entropies of bigrams and trigrams of tokens, weighted 2/3 and 4/3, in bits.

    Source: Meng et al. 2022, after Zhang et al. 2018; over tokens instead of words.
    """
    entropies = []
    for n, weight in WEIGHTS.items():
        counts = np.array(list(Counter(zip(*(ids[i:] for i in range(n)), strict=False)).values()), dtype=float)
        shares = counts / counts.sum()
        entropies.append(weight * float(-(shares * np.log2(shares)).sum()))
    return float(np.mean(entropies))
