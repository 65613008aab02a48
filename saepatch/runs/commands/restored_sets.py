"""The latents that a run of `saepatch restore` restores (given, ranked or all), and their control sets."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from saepatch.data.requests import Request
from saepatch.dictionaries.dictionary import Dictionary
from saepatch.dictionaries.latent_set import LatentSet
from saepatch.errors import UserError
from saepatch.measure.controls import control_sets
from saepatch.measure.quality import latent_statistics
from saepatch.model.language_model import LanguageModel
from saepatch.model.sites import Site
from saepatch.restoration.ranking import find_safety_latents
from saepatch.settings.restore import RestoreConfig
from saepatch.splicing.donors import CleanPrompts, OtherModel

log = logging.getLogger(__name__)

RANKED = 64  # default number of latents restored from a ranking


@dataclass(frozen=True)
class Set:
    """Latents restored together, by site (None: all); `draw` numbers the control sets of one kind."""

    condition: str
    draw: int
    latents: LatentSet

    def facts(self) -> dict[str, Any]:
        return {"condition": self.condition, "draw": self.draw, "latents": self.latents.facts()}

    @classmethod
    def read(cls, facts: Mapping[str, Any]) -> "Set":
        return cls(facts["condition"], facts["draw"], LatentSet.from_facts(facts["latents"]))


def chosen_latents(
    config: RestoreConfig,
    model: LanguageModel,
    other: LanguageModel | None,
    sites: Mapping[Site, Dictionary],
    latents: LatentSet,
    select: Sequence[Request],
    template: int,
    refusal_ids: set[int],
) -> LatentSet:
    """The latents to restore: those given, the top of a ranking, or all."""
    if latents:
        given = latents.at(list(sites))
        if other_sites := [site for site in given if site not in sites]:
            raise UserError(f"--latents names {other_sites[0]}, but --site is {config.site!r}: leave --site out")
        given.check(sites)
        return given
    if not select:
        return LatentSet.all_of(sites)
    wanted, select = config.k or RANKED, not_harmless(select, config.select)
    if other is None:
        need_clean(select, config.select)
    donor = (
        OtherModel(other, template)
        if other
        else CleanPrompts(tuple(request.clean or "" for request in select), template)
    )
    ranked = find_safety_latents(
        model,
        sites,
        [request.prompt for request in select],
        donor,
        refusal_ids=refusal_ids if config.ranking == "attribution" else (),
        max_fvu=None,  # checked already when the run was prepared
        max_new_tokens=config.max_new_tokens,
    )
    top = LatentSet.of(ranked.top(wanted, config.ranking))
    if not top:
        raise UserError(
            f"no latent has a score above 0 in the ranking {config.ranking!r} over {config.select!r}, so nothing would "
            "be restored: give other prompts as --select, another --ranking, or --latents"
        )
    if (restored := top.size(sites)) < wanted:
        log.warning(
            "%d latents are restored, not the %d of --k: no others have a score above 0 in the ranking %r", restored,
            wanted, config.ranking,
        )  # fmt: skip
    return top


def not_harmless(select: Sequence[Request], source: str) -> list[Request]:
    """The requests not labelled harmless: on harmless ones the donor shows no behaviour to restore.

    Raises:
        UserError: all are labelled harmless.
    """
    kept = [request for request in select if request.harmful != "no"]
    if not kept:
        raise UserError(
            f"all prompts of {source!r} are harmless: give prompts on which the donor shows the behaviour to restore"
        )
    return kept


def check_apart(select: Sequence[Request], requests: Sequence[Request], config: RestoreConfig) -> None:
    """Raises UserError where latents would be ranked on prompts that are also answered."""
    shared = {request.prompt for request in select} & {request.prompt for request in requests}
    if shared:
        raise UserError(
            f"{len(shared)} prompts of --select {config.select!r} are among those of --prompts {config.prompts!r}: "
            "latents ranked (or means taken) on the evaluation prompts look better than they are: give other prompts"
        )


def need_clean(requests: Sequence[Request], source: str) -> None:
    if lacking := [request.example for request in requests if request.clean is None]:
        raise UserError(
            f"prompt {lacking[0]} of {source!r} has no clean prompt for the donor to read: give every prompt one, "
            "or an aligned model as --donor"
        )


def with_controls(
    config: RestoreConfig,
    model: LanguageModel,
    sites: Mapping[Site, Dictionary],
    chosen: LatentSet,
    requests: Sequence[Request],
) -> list[Set]:
    """The restored set and, unless it holds all latents of a site, control sets of the same size at each site."""
    sets = [Set("restored", 0, chosen)]
    restricted = {site: ids for site, ids in chosen.items() if ids is not None}
    if not config.controls or len(restricted) < len(chosen) or not restricted:
        return sets
    tokens = model.tokenize(
        [text for request in requests for text in (request.prompt, request.clean) if text is not None], "left"
    )
    drawn = {}
    for site, ids in restricted.items():
        try:
            statistics = latent_statistics(model, sites[site], tokens)
            drawn[site] = control_sets(ids, len(ids), statistics, config.seed, config.controls)
        except UserError as error:
            log.warning("no controls: at %s %s", site, error)
            return sets
    for kind, role in enumerate(("random", "matched")):
        for draw in range(config.controls):
            sets.append(Set(role, draw, LatentSet.of({site: both[kind][draw] for site, both in drawn.items()})))
    return sets
