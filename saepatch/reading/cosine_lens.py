"""How far states represent an entity, by layer: distinguishes "computed late" from "never computed"."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import cosine_similarity

from saepatch.errors import UserError
from saepatch.model.language_model import LanguageModel
from saepatch.model.positions import Positions
from saepatch.model.sites import Site
from saepatch.records.statistics import Interval, wilson_share
from saepatch.splicing.splice import whole_prompt

ROUNDING = 1e-6  # share of a state's norm below which differences are rounding


@dataclass(frozen=True)
class Mention:
    """A prompt and the position (the last, if several) whose state should represent an entity."""

    prompt: str
    at: Positions = "last"


@dataclass(frozen=True, eq=False)
class CosineLens:
    """Cosines of states with the centroids of entities, by site.

    Attributes:
        sites: The sites, in order.
        entities: The entities, in order.
        cohesion: Mean cosine of an entity's states with the centroid of its other states.
        cosines: Cosine of every held-out state with every entity's centroid.
        own: For each held-out state, the number of its entity.
    """

    sites: tuple[Site, ...]
    entities: tuple[str, ...]
    cohesion: Float[np.ndarray, "sites entities"]
    cosines: Float[np.ndarray, "sites states entities"]
    own: tuple[int, ...]

    @property
    def alignment(self) -> Float[np.ndarray, "sites states"]:
        """Cosine of each held-out state with its own entity's centroid."""
        return self.cosines[:, np.arange(len(self.own)), list(self.own)]

    @property
    def nearest(self) -> Bool[np.ndarray, "sites states"]:
        """Whether a held-out state's nearest centroid is its own entity's; by chance, one in the number of entities."""
        return self.cosines.argmax(-1) == np.array(self.own)

    def share_nearest(self) -> list[Interval]:
        """By site, the share of held-out states nearest to their own entity, with Wilson intervals."""
        return [wilson_share(row.astype(float)) for row in self.nearest]


def cosine_lens(
    model: LanguageModel,
    mentions: Mapping[str, Sequence[Mention]],
    held_out: Mapping[str, Sequence[Mention]],
    sites: Sequence[Site | str],
) -> CosineLens:
    """Cosines between held-out states and the centroids of entities' states, at some sites.

    All states have the mean over entities' centroids subtracted: without it, every cosine in a residual stream is
    large. Held-out states have their own mean subtracted (with each entity counting once), since other prompts and
    positions have other means. Where states do not differ at all, cosines are 0. States of an entity that is
    never computed are nearest to its centroid no more often than by chance, at any site; those of one computed late
    are from some layer on.

    Args:
        mentions: For each of at least two entities, at least two prompts in which a state should represent it.
        held_out: Other prompts, for the same entities or some of them.
        sites: Sites of the residual stream.

    Raises:
        UserError: fewer than two entities or two mentions of one, or a held-out entity without mentions.
    """
    if len(mentions) < 2 or any(len(some) < 2 for some in mentions.values()):
        raise UserError("a cosine lens needs at least two entities with two mentions each: give more mentions")
    if unknown := sorted(set(held_out) - set(mentions)):
        raise UserError(f"{unknown[0]!r} is held out but has no mentions: give at least two")
    places = tuple(map(Site.parse, sites))
    entities = tuple(mentions)
    states = {name: _states(model, some, places) for name, some in mentions.items()}
    others = {name: _states(model, some, places) for name, some in held_out.items() if some}
    own = tuple(entities.index(name) for name, some in others.items() for _ in range(some.shape[1]))
    cohesion, cosines = [], []
    for number in range(len(places)):
        mine = {name: some[number] for name, some in states.items()}
        centroids = torch.stack([some.mean(0) for some in mine.values()])
        middle = centroids.mean(0)
        cohesion.append([_cohesion(_without(middle, some)) for some in mine.values()])
        held = [some[number] for some in others.values()]
        centred = _without(torch.stack([some.mean(0) for some in held]).mean(0), torch.cat(held))
        cosines.append(cosine_similarity(centred[:, None], _without(middle, centroids)[None], dim=-1).numpy())
    return CosineLens(places, entities, np.array(cohesion), np.stack(cosines), own)


def _without(middle: Float[Tensor, "width"], states: Float[Tensor, "states width"]) -> Float[Tensor, "states width"]:
    """States minus their centre; zeros where they differ from it only by rounding."""
    centred = states - middle
    return centred * (centred.norm(dim=-1, keepdim=True) > ROUNDING * states.norm(dim=-1, keepdim=True))


def _cohesion(states: Float[Tensor, "states width"]) -> float:
    """Mean cosine of each state with the mean of the others."""
    rest = (states.sum(0) - states) / (len(states) - 1)
    return float(cosine_similarity(states, rest, dim=-1).mean())


def _states(
    model: LanguageModel, mentions: Sequence[Mention], sites: Sequence[Site]
) -> Float[Tensor, "sites mentions width"]:
    """The state of each mention at each site, in float64."""
    out = []
    for mention in mentions:
        tokens = model.tokenize([mention.prompt])
        chosen = whole_prompt(model, tokens).select(mention.at)[0].nonzero().flatten()
        if not len(chosen):
            raise UserError(f"positions {mention.at!r} select no token of {mention.prompt!r}: choose others")
        held = model.capture(tokens, sites)
        out.append(torch.stack([held[site][0, int(chosen[-1])].double().cpu() for site in sites]))
    return torch.stack(out, 1)
