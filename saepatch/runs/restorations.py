"""`saepatch restore`: answers under restoration, part by part, and its parts put together."""

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
from saepatch.model.language_model import LanguageModel
from saepatch.model.sites import Site
from saepatch.records.provenance import Provenance, json_hash
from saepatch.records.rows import AnswerRow
from saepatch.restoration.answering import Answered, Restoration
from saepatch.restoration.judges import Answer, Judge, judge_version, read_judge
from saepatch.restoration.ranking import clean_means
from saepatch.restoration.restore import MEASURED_ON, assistant_header, first_tokens, shared_quality
from saepatch.runs.answers import Answers, read_answers
from saepatch.runs.driver import Count, Finished, PartContent, Place, drive
from saepatch.runs.interpret import read_dictionaries, read_model, read_sites
from saepatch.runs.parts import Record
from saepatch.runs.restored_sets import (
    Set,
    check_apart,
    chosen_latents,
    need_clean,
    not_harmless,
    with_controls,
)
from saepatch.settings.restore import RestoreConfig
from saepatch.splicing.donors import CleanMeans
from saepatch.tracking.open import Tracker

log = logging.getLogger(__name__)


@dataclass(frozen=True, eq=False, kw_only=True)
class RestorePlan(Restoration):
    """Everything that working through the parts of a shard takes."""

    config: RestoreConfig
    requests: Sequence[Request]  # of the shard
    judge: Judge
    judged: str
    """The judge's version; empty where it is quicker to judge again than to ask."""
    refusal_ids: set[int]
    fvu: Mapping[str, tuple[float, float]]
    """By site, what the dictionary leaves unexplained of the model and of the donor; empty where they are one."""
    record: Record
    place: Place
    unit: str = "answers"

    @property
    def source(self) -> str:
        return Path(self.config.prompts).stem

    @property
    def sets(self) -> list[Set]:
        return [Set.read(given) for given in self.record.edits or ()]

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
        return PartContent(parts, {"judge": self.judged, "fvu": dict(self.fvu)}, AnswerRow)

    def donors(self) -> list[str] | None:
        """What the donor reads before each answer; None where it reads nothing, but says means."""
        if self.means is not None:
            return None
        return [request.prompt if self.other else request.clean or "" for request in self.requests]


def run_restore(config: RestoreConfig, conclude: Callable[[RestorePlan, Answers, Tracker], None]) -> Finished:
    """Answer every prompt bare, restored and under every control; what is on the disk already is not run again.

    `conclude` gets what came out of a run of one shard, to show it: files, a page, the tracker. See
    `saepatch.runs.driver.drive`.
    """

    def show(plan: RestorePlan, tracker: Tracker) -> None:
        answers = read_answers(config, [plan.record], plan.judge, plan.judged)
        conclude(plan, replace(answers, fvu=plan.fvu), tracker)

    return drive(config, prepare, show)


def prepare(config: RestoreConfig) -> RestorePlan:
    """Load what a run needs, see that all of it fits, and choose what is restored.

    Raises:
        UserError: it does not fit, or the folder holds another run.
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
    sites = {one.site: one for one in read_dictionaries(config.sae, read_sites(config.site) or list(latents), model)}
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
        judged=judge_version(config.judge),
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
    if select:  # means over them are taken again at every start
        settings["select's texts"] = _hash(select)
    mine = len(requests[place.shard :: place.shards])
    return Record(
        config.command,
        settings,
        {"name": model.name, "hash": model.fingerprint},
        {str(site): {"name": dictionary.name, "hash": dictionary.fingerprint} for site, dictionary in sites.items()},
        {"count": len(requests), "hash": _hash(requests)},
        place.shard,
        place.shards,
        -(-mine // config.part),
    )


def _refusal_ids(model: LanguageModel, prompt: str, refusals: str) -> set[int]:
    """First tokens of refusals, with a space before them and without: which one it is depends on the chat template."""
    found: set[int] = set()
    for text in filter(None, map(str.strip, refusals.split("|"))):
        for opening in (text, f" {text}"):
            with suppress(UserError):  # one that merges with the prompt's end is not how an answer begins
                found |= first_tokens(model, prompt, [opening])
    if not found:
        raise UserError(f"refusals {refusals!r}: none starts on a token of its own after the prompts")
    return found


def _shared(
    config: RestoreConfig,
    model: LanguageModel,
    other: LanguageModel,
    sites: Mapping[Site, Dictionary],
    requests: Sequence[Request],
) -> dict[str, tuple[float, float]]:
    """See that each dictionary fits both models, on the first prompts and the donor's answers to them."""
    prompts = [one.prompt for one in requests[:MEASURED_ON]]
    texts = other.continue_ids(prompts, config.tokens)
    tokens = model.pad([[*model.encode(prompt), *text] for prompt, text in zip(prompts, texts, strict=True)])
    both = {site: shared_quality(model, other, one, tokens, config.max_fvu) for site, one in sites.items()}
    return {str(site): (mine.fvu, theirs.fvu) for site, (mine, theirs) in both.items()}


def _means(
    config: RestoreConfig,
    model: LanguageModel,
    sites: Mapping[Site, Dictionary],
    select: Sequence[Request],
    template: int,
) -> CleanMeans:
    select = not_harmless(select, config.select)
    need_clean(select, config.select)
    clean = [one.clean or "" for one in select]
    return clean_means(model, sites, clean, template=template, max_new_tokens=config.tokens)


@torch.no_grad()
def _rows(plan: RestorePlan, requests: Sequence[Request], condition: str | Set) -> list[AnswerRow]:
    """One part's answers under one condition; means answer nothing themselves."""
    model, prompts, clean = plan.model, [r.prompt for r in requests], [r.clean or "" for r in requests]
    inside: Any = nullcontext()
    draw, size = 0, 0
    if condition == "donor":
        if plan.means is not None:
            return []
        model, prompts = (plan.other, prompts) if plan.other else (model, clean)
    elif isinstance(condition, Set):
        inside = plan.restored(condition.latents, plan.donor_of(clean), plan.config.error)
        draw, size = condition.draw, condition.latents.size(plan.sites)
    with inside:
        answered = Answered.by(model, prompts, plan.config.tokens, plan.refusal_ids)
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
        )
        for request, text, score in zip(requests, answered.texts, answered.scores, strict=True)
    ]


def _hash(requests: Sequence[Request]) -> str:
    return json_hash([[r.example, r.prompt, r.clean, r.harmful] for r in requests])
