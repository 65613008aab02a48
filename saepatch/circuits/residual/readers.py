"""Attention heads that read a latent's token: where later layers attend, beside what the latent adds to the logits."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float, Int
from numpy import ndarray

from saepatch.dictionaries.dictionary import Dictionary
from saepatch.engine.components import LatentUnits
from saepatch.errors import UserError
from saepatch.measure.attention import attention_patterns
from saepatch.model.inputs.padding import by_length
from saepatch.model.language_model import LanguageModel
from saepatch.model.sites import Site
from saepatch.records.statistics import Interval, bootstrap_mean
from saepatch.records.tables import text_table


@dataclass(frozen=True, eq=False)
class ReadingHeads:
    """Attention of later heads from each prompt's last token to the token at which a latent is most active.

    Prompts are those in which the latent is active at all; `position` is that token's index in the prompt's own tokens.
    """

    latent: str
    prompt: Int[ndarray, "prompts"]
    position: Int[ndarray, "prompts"]
    heads: tuple[tuple[int, int], ...]
    attention: Float[ndarray, "prompts heads"]

    def top(self, k: int = 5) -> list[tuple[tuple[int, int], Interval]]:
        """The heads (layer, head) with the largest mean attention, with intervals over prompts."""
        order = np.argsort(-self.attention.mean(0), kind="stable")[:k]
        return [(self.heads[i], bootstrap_mean(self.attention[:, i])) for i in order.tolist()]

    def summary(self, k: int = 5) -> str:
        """The heads that attend most to the latent's token, as a table."""
        rows = [[f"{layer}.{head}", str(mean)] for (layer, head), mean in self.top(k)]
        table = text_table(["head", "mean attention from the last token"], rows)
        return f"{table}\nto the token where {self.latent} is most active, in {len(self.prompt)} prompts"


@torch.no_grad()
def reading_heads(
    model: LanguageModel, dictionary: Dictionary, latent: int, prompts: Sequence[str], batch_size: int = 32
) -> ReadingHeads:
    """Which later heads attend from the last token to where a latent is most active.

    BOS and tokens that the dictionary was not trained on do not count.

    Raises:
        UserError: there is no such latent, it is active in none of the prompts, no attention layer comes after the
            dictionary, or the model's attention cannot be read.
    """
    if not 0 <= latent < dictionary.d_sae:
        raise UserError(f"latent {latent} is out of range: {dictionary.name} has {dictionary.d_sae}, from 0")
    tokens, site, name = model.tokenize(list(prompts)), dictionary.site, f"{dictionary.site} {latent}"
    unit = LatentUnits(dictionary, ids=(latent,))
    reads: list[tuple[int, int, list[float]]] = []
    heads: list[tuple[int, int]] = []
    for rows, _, part in by_length(tokens):
        for start in range(0, len(rows), batch_size):
            some = slice(start, start + batch_size)
            few = part.rows(some)
            known = dictionary.known(model, few).ordinary
            acts = unit.read(model.capture(few, [site])[site])[..., 0] * known
            peak, at = acts.max(-1)
            patterns = attention_patterns(model, few)
            layers = [layer for layer in sorted(patterns) if site.order < Site(layer, "z").order]
            heads = [(layer, head) for layer in layers for head in range(patterns[layer].shape[1])]
            if not heads:
                raise UserError(f"no attention layer comes after {site}, so no head reads {name}")
            last = torch.cat([patterns[layer][:, :, -1] for layer in layers], 1)  # [rows, heads, pos]
            for row in peak.gt(0).nonzero().flatten().tolist():
                reads.append((int(rows[some][row, 0]), int(at[row]), last[row, :, at[row]].tolist()))
    if not reads:
        raise UserError(f"{name} is active in none of the {len(prompts)} prompts: give others")
    reads.sort()
    prompt, position, attention = (np.array(column) for column in zip(*reads, strict=True))
    return ReadingHeads(name, prompt, position, tuple(heads), attention)
