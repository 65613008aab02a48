"""Latents that a context shifts, found by a paired test on requests with and without it; and the shift undone."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from saepatch.errors import UserError
from saepatch.model.language_model import LanguageModel
from saepatch.model.positions import Positions
from saepatch.model.sites import Site
from saepatch.records.statistics import FLAGGED, false_discovery
from saepatch.splicing.interventions import Steer
from saepatch.splicing.splice import Dictionaries, by_site


@dataclass(frozen=True, eq=False)
class ContextShift:
    """How a context changes each latent, at the ends of prompts.

    Attributes:
        lost: By site, the mean over requests of a latent without the context, less with it: above 0 the context
            suppresses it, below 0 it amplifies it.
        q: By site, the latent's q value (false discovery rate over the latents of all sites); NaN where it is never on.
        template: Number of tokens at the end of prompts that were compared.
    """

    lost: Mapping[Site, Float[np.ndarray, "_"]]
    q: Mapping[Site, Float[np.ndarray, "_"]]
    template: int

    def significant(self, sign: int = 0, level: float = FLAGGED) -> dict[Site, tuple[int, ...]]:
        """Latents below a q value, by site: all, those the context suppresses (1), or those it amplifies (-1)."""
        chosen = {}
        for site, q in self.q.items():
            mine = (q <= level) & (self.lost[site] != 0) & ((sign == 0) | (np.sign(self.lost[site]) == sign))
            if mine.any():
                chosen[site] = tuple(np.flatnonzero(mine).tolist())
        return chosen

    def undone(
        self,
        sites: Collection[Site] | None = None,
        strength: float = 1.0,
        level: float = FLAGGED,
        in_answer: bool = True,
    ) -> list[Steer]:
        """Interventions that add to every significant latent what it lost, at the ends of prompts and in the answer.

        Shifts of several sites add up: what an earlier site regains changes later sites as well. None: all sites.
        """
        edits = []
        for site, ids in self.significant(level=level).items():
            if sites is not None and site not in sites:
                continue
            unit = tuple(self.lost[site][list(ids)].tolist())
            places: tuple[Positions, ...] = (slice(-self.template, None), *(["generated"] if in_answer else []))
            edits += [Steer(ids, strength, unit, positions, site) for positions in places]
        return edits


@torch.no_grad()
def find_context_shift(
    model: LanguageModel,
    dictionaries: Dictionaries,
    prompts: Sequence[str],
    clean: Sequence[str],
    template: int = 1,
    batch_size: int = 32,
) -> ContextShift:
    """Test every latent with and without a context, as a jailbreak: same requests, paired, corrected over latents.

    Args:
        model: The model.
        dictionaries: One, or several at different sites.
        prompts: Requests in the context.
        clean: The same requests without it, or in a harmless one.
        template: Tokens at the end of prompts over which latents are averaged.
        batch_size: Prompts per forward pass.

    Raises:
        UserError: fewer than two requests, not one clean prompt for each, or a template below 1, longer than a prompt
            or with a token that a dictionary was not trained on.

    Source: CC-Delta, which compares latents of harmful requests with and without a jailbreak's context and steers by
    the mean difference of those that pass a paired test.
    """
    if len(prompts) < 2 or len(prompts) != len(clean):
        raise UserError(
            f"{len(prompts)} prompts and {len(clean)} clean ones: give at least two, and one clean for each"
        )
    if template < 1:
        raise UserError(f"template of {template} positions: use at least 1")
    sites = by_site(model, dictionaries)
    parts: dict[Site, list[list[Float[np.ndarray, "batch _"]]]] = {site: [[], []] for site in sites}
    for side, texts in enumerate((clean, prompts)):
        for start in range(0, len(texts), batch_size):
            tokens = model.tokenize(texts[start : start + batch_size], "left")
            if (shortest := int(tokens.lengths.min())) < template:
                raise UserError(f"template of {template} positions: a prompt has {shortest} tokens, so use fewer")
            held, last = model.capture(tokens, sites), tokens.input_ids[:, -template:]
            for site, dictionary in sites.items():
                dictionary.editable(model, last, torch.ones_like(last, dtype=torch.bool), slice(-template, None))
                acts = dictionary.activations(held[site][:, -template:])[0].float().mean(1)
                parts[site][side].append(acts.double().cpu().numpy())
    gaps = {site: np.concatenate(both[0]) - np.concatenate(both[1]) for site, both in parts.items()}
    every = np.concatenate(list(gaps.values()), 1)
    q = false_discovery(every, every != 0)
    ends = np.cumsum([gap.shape[1] for gap in gaps.values()])[:-1]
    return ContextShift(
        {site: gap.mean(0) for site, gap in gaps.items()},
        dict(zip(gaps, np.split(q, ends), strict=True)),
        template,
    )
