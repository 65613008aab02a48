"""`saepatch restore`: answers under restoration, part by part."""

import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

from saepatch.data.requests import Request, read_requests
from saepatch.dictionaries.dictionary import Dictionary
from saepatch.dictionaries.latent_set import LatentSet
from saepatch.errors import UserError
from saepatch.measure.results.effects import precision_of
from saepatch.model.language_model import LanguageModel
from saepatch.model.sites import Site
from saepatch.records.provenance import Provenance, json_hash
from saepatch.records.rows import AnswerRow
from saepatch.restoration.answering import Answered, Restoration
from saepatch.restoration.judges import Answer, Judge, judge_version, read_judge
from saepatch.restoration.ranking import clean_means
from saepatch.restoration.restore import MEASURED_ON, assistant_header, first_tokens, shared_quality
from saepatch.runs.commands.answers import Answers, read_answers
from saepatch.runs.commands.restored_sets import (
    Set,
    check_apart,
    chosen_latents,
    need_clean,
    not_harmless,
    with_controls,
)
from saepatch.runs.driver import Count, Finished, PartContent, Place, drive
from saepatch.runs.interpret import read_dictionaries, read_model, read_sites
from saepatch.runs.parts import Record
from saepatch.settings.restore import RestoreConfig
from saepatch.splicing.donors import CleanMeans
from saepatch.tracking.open import Tracker

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False, kw_only=True)
class RestorePlan(Restoration):
    """A shard of a run of `saepatch restore` with everything needed to run its parts."""

    config: RestoreConfig
    requests: Sequence[Request]  # of the shard
    judge: Judge
    judge_version: str
    """See `saepatch.restoration.judges.judge_version`; empty: answers are always judged again."""
    refusal_ids: set[int]
    fvu: Mapping[str, tuple[float, float]]
    """By site, the dictionary's FVU on the model and on the donor; empty where both are the same model."""
    record: Record
    place: Place
    unit: str = "answers"

    @property
    def source(self) -> str:
        return Path(self.config.prompts).stem

    @property
    def sets(self) -> list[Set]:
        return [Set.read(facts) for facts in self.record.edits or ()]

    def run_part(self, number: int, count: Count) -> PartContent:
        requests = self.requests[number * self.config.part : (number + 1) * self.config.part]
        parts: list[tuple[list[AnswerRow], Provenance]] = []
        conditions: list[str | Set] = ["bare", "donor", *self.sets]
        own = self.provenance(self.config.sae, self.config.seed)
        for condition in conditions:
            rows = _rows(self, requests, condition)
            count(len(rows))
            other = self.other if condition == "donor" else None
            parts.append((rows, own if other is None else replace(own, model=other.name, model_hash=other.fingerprint)))
        return PartContent(parts, {"judge": self.judge_version, "fvu": dict(self.fvu)}, AnswerRow)

    def donors(self) -> list[str] | None:
        """The donor's prompt for each request; None where the donor is a set of means and reads no prompts."""
        if self.means is not None:
            return None
        return [request.prompt if self.other else request.clean or "" for request in self.requests]


def run_restore(config: RestoreConfig, conclude: Callable[[RestorePlan, Answers, Tracker], None]) -> Finished:
    """Answer every prompt bare, restored and under every control; parts that are already on disk are not run again.

    `conclude` is called with the answers of an unsharded run, to write files and a page and to log to the tracker. See
    `saepatch.runs.driver.drive`.
    """

    def show(plan: RestorePlan, tracker: Tracker) -> None:
        answers = read_answers(config, [plan.record], plan.judge, plan.judge_version)
        conclude(plan, replace(answers, fvu=plan.fvu), tracker)

    return drive(config, prepare, show)


def prepare(config: RestoreConfig) -> RestorePlan:
    """Load everything a run needs, check that it fits together, and choose the latents to restore.

    Raises:
        UserError: something does not fit, or the folder holds another run.
    """
    place = Place.of(config)
    judge = read_judge(config.judge)
    model = read_model(config, config.shard)
    requests = read_requests(config.prompts, model, config.chat, config.n)
    other = None
    if config.donor not in ("clean", "means"):
        other = read_model(replace(config, model=config.donor, revision=""), config.shard)
    if config.donor == "clean":
        need_clean(requests, config.prompts)
    latents = LatentSet.parse(config.latents)
    dictionaries = read_dictionaries(config, read_sites(config.site) or list(latents), model)
    sites = {dictionary.site: dictionary for dictionary in dictionaries}
    refusal_ids = _refusal_ids(model, requests[0].prompt, config.refusals)
    template = (assistant_header(model) or 1) if config.template < 0 else config.template
    select = read_requests(config.select, model, config.chat, 0) if config.select else []
    if select:
        check_apart(select, requests, config)
    record = place.agreed(_record(config, place, model, other, sites, requests, select))
    fvu = {} if other is None else _shared(config, model, other, sites, requests)
    means = _means(config, model, sites, select, template) if config.donor == "means" else None
    if not place.records:
        chosen = chosen_latents(config, model, other, sites, latents, select, template, refusal_ids)
        record = replace(record, edits=[s.facts() for s in with_controls(config, model, sites, chosen, requests)])
    return RestorePlan(
        model=model,
        other=other,
        sites=sites,
        template=template,
        means=means,
        config=config,
        requests=requests[place.shard :: place.shards],
        judge=judge,
        judge_version=judge_version(config.judge),
        refusal_ids=refusal_ids,
        fvu=fvu,
        record=record,
        place=place,
    )


def _record(
    config: RestoreConfig,
    place: Place,
    model: LanguageModel,
    other: LanguageModel | None,
    sites: Mapping[Site, Dictionary],
    requests: Sequence[Request],
    select: Sequence[Request],
) -> Record:
    settings = dict(place.settings)
    if other is not None:
        settings["donor's weights"] = other.fingerprint
    if select:  # their texts determine the means, which are not stored
        settings["select's texts"] = _hash(select)
    count = len(requests[place.shard :: place.shards])
    return Record(
        config.command,
        settings,
        {"name": model.name, "hash": model.fingerprint},
        {str(site): {"name": dictionary.name, "hash": dictionary.fingerprint} for site, dictionary in sites.items()},
        {"count": len(requests), "hash": _hash(requests)},
        place.shard,
        place.shards,
        -(-count // config.part),
    )


def _refusal_ids(model: LanguageModel, prompt: str, refusals: str) -> set[int]:
    """First tokens of refusals, with and without a leading space, since chat templates differ in this."""
    tokens: set[int] = set()
    for text in filter(None, map(str.strip, refusals.split("|"))):
        for opening in (text, f" {text}"):
            with suppress(UserError):  # an opening that merges with the prompt's last token cannot begin an answer
                tokens |= first_tokens(model, prompt, [opening])
    if not tokens:
        raise UserError(
            f"refusals {refusals!r}: after the prompts, none begins with a token of its own: give other openings"
        )
    return tokens


def _shared(
    config: RestoreConfig,
    model: LanguageModel,
    other: LanguageModel,
    sites: Mapping[Site, Dictionary],
    requests: Sequence[Request],
) -> dict[str, tuple[float, float]]:
    """Check that each dictionary fits both models, on the first prompts and the donor's answers to them."""
    prompts = [request.prompt for request in requests[:MEASURED_ON]]
    texts = other.continue_ids(prompts, config.max_new_tokens)
    tokens = model.pad([[*model.encode(prompt), *text] for prompt, text in zip(prompts, texts, strict=True)])
    both = {site: shared_quality(model, other, sae, tokens, config.max_fvu) for site, sae in sites.items()}
    return {str(site): (own.fvu, donors.fvu) for site, (own, donors) in both.items()}


def _means(
    config: RestoreConfig,
    model: LanguageModel,
    sites: Mapping[Site, Dictionary],
    select: Sequence[Request],
    template: int,
) -> CleanMeans:
    select = not_harmless(select, config.select)
    need_clean(select, config.select)
    clean = [request.clean or "" for request in select]
    return clean_means(model, sites, clean, template=template, max_new_tokens=config.max_new_tokens)


@torch.no_grad()
def _rows(plan: RestorePlan, requests: Sequence[Request], condition: str | Set) -> list[AnswerRow]:
    """One part's answers under one condition; none for a donor that is a set of means."""
    model, prompts, clean = plan.model, [r.prompt for r in requests], [r.clean or "" for r in requests]
    restoring: Any = nullcontext()
    draw, size = 0, 0
    if condition == "donor":
        if plan.means is not None:
            return []
        model, prompts = (plan.other, prompts) if plan.other else (model, clean)
    elif isinstance(condition, Set):
        restoring = plan.restored(condition.latents, plan.donor_of(clean), plan.config.error)
        draw, size = condition.draw, condition.latents.size(plan.sites)
    with restoring:
        answered = Answered.by(model, prompts, plan.config.max_new_tokens, plan.refusal_ids)
    return [
        AnswerRow(
            setting=plan.config.donor,
            example=request.example,
            prompt=request.prompt,
            harmful=request.harmful,
            condition=condition if isinstance(condition, str) else condition.condition,
            latents=size,
            draw=draw,
            answer=text,
            outcome=plan.judge(Answer(request.prompt, text, score)),
            score=score,
            precision=precision_of(model.hf)[0],
        )
        for request, text, score in zip(requests, answered.texts, answered.scores, strict=True)
    ]


def _hash(requests: Sequence[Request]) -> str:
    return json_hash([[r.example, r.prompt, r.clean, r.harmful] for r in requests])
