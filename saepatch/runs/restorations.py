"""`saepatch restore`: answers under restoration, part by part, so that a run can be stopped and goes on."""

import hashlib
import json
import logging
import shlex
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import torch

from saepatch.dictionaries.dictionary import Dictionary
from saepatch.dictionaries.latent_set import LatentSet
from saepatch.engine.metrics import refusal_log_odds
from saepatch.errors import UserError
from saepatch.model.language_model import LanguageModel
from saepatch.model.loading import load_model
from saepatch.model.sites import Site
from saepatch.records.files import check_writable, output_folder, write_json, write_yaml
from saepatch.records.provenance import Provenance
from saepatch.records.rows import AnswerRow, read_about, read_rows, write_rows
from saepatch.restoration.judges import Answer, Judge, judge_version, read_judge
from saepatch.restoration.ranking import clean_means
from saepatch.restoration.restore import MEASURED_ON, assistant_header, first_tokens, restorations, shared_quality
from saepatch.runs.answers import Answers, Request, read_requests
from saepatch.runs.interpret import read_dictionaries, read_sites
from saepatch.runs.parts import ANSWERS, Record, keep_run, known_run, part_file, refuse_if_other, refuse_other_command
from saepatch.runs.progress import Check, Meter, stoppable
from saepatch.runs.restored_sets import (
    Set,
    check_apart,
    chosen_latents,
    need_clean,
    not_harmless,
    with_controls,
)
from saepatch.settings.answering import RestoreConfig
from saepatch.splicing.donors import CleanMeans, CleanPrompts, Donor, OtherModel
from saepatch.splicing.splice import splice
from saepatch.tracking.open import RunDescription, Tracker, open_tracker

log = logging.getLogger(__name__)

# Settings that say where and how a run goes, not what comes out of it: they may change from one start to the next.
FREE = ("out", "track", "device", "progress", "quiet", "json", "trust_remote_code")
FOLDER = ANSWERS  # of the parts


@dataclass(frozen=True, eq=False)
class Plan:
    """Everything that working through the parts takes."""

    config: RestoreConfig
    model: LanguageModel
    other: LanguageModel | None
    sites: Mapping[Site, Dictionary]
    requests: Sequence[Request]
    means: CleanMeans | None
    template: int
    judge: Judge
    judged: str
    """The judge's version; empty where it is quicker to judge again than to ask."""
    refusal_ids: set[int]
    fvu: Mapping[str, tuple[float, float]]
    """By site, what the dictionary leaves unexplained of the model and of the donor; empty where they are one."""
    record: Record
    folder: Path

    @property
    def sets(self) -> list[Set]:
        return [Set.read(given) for given in self.record.edits or ()]

    @property
    def left(self) -> list[int]:
        """Numbers of the parts that are not there yet, or that are damaged."""
        files = [part_file(self.folder, number) for number in range(self.record.parts)]
        return [n for n, file in enumerate(files) if (read_about(file) or {}).get("run") != self.record.key]

    def donor(self, requests: Sequence[Request]) -> Donor:
        if self.means is not None:
            return self.means
        if self.other is not None:
            return OtherModel(self.other, self.template)
        return CleanPrompts(tuple(one.clean or "" for one in requests), self.template)


def run_restore(config: RestoreConfig, conclude: Callable[[Plan, Answers, Tracker], None]) -> Answers:
    """Answer every prompt bare, restored and under every control; what is on the disk already is not run again.

    `conclude` gets what was found, to show it: files, a page, the tracker.

    Raises:
        UserError: settings that do not fit, or a folder that holds another run.
        KeyboardInterrupt: the run was stopped, by Ctrl-C or SIGTERM; what is written stays, and how to go on is said.
    """
    with stoppable() as check:
        torch.manual_seed(config.seed)
        plan = prepare(config)
        try:
            with _tracker(plan) as tracker:
                keep_run(plan.folder, tracker.run_id)
                _work(plan, tracker, check)
                found = Answers.of(config, plan.record, _judged(plan), plan.fvu)
                conclude(plan, found, tracker)
                return found
        except KeyboardInterrupt:
            total = plan.record.parts
            again = f"saepatch restore --config {shlex.quote(str(plan.folder / 'config.yaml'))}"
            raise KeyboardInterrupt(
                f"{total - len(plan.left)} of {total} parts are written; to go on from there: {again}"
            ) from None


def _tracker(plan: Plan) -> Tracker:
    about = RunDescription(
        Path(plan.config.out),
        run=f"restore-{Path(plan.config.prompts).stem}",
        config=asdict(plan.config),
        run_id=known_run(plan.folder),
        job_type="restore",
        axes={"*": "answers"},
    )
    return open_tracker(plan.config.track, about, resume=len(plan.left) < plan.record.parts)


def _judged(plan: Plan) -> list[AnswerRow]:
    """The rows of all parts; verdicts that another version of the judge gave are given anew."""
    rows: list[AnswerRow] = []
    changed = 0
    for number in range(plan.record.parts):
        file = part_file(plan.folder, number)
        mine = [AnswerRow(**{name: row[name] for name in AnswerRow.__dataclass_fields__}) for row in read_rows(file)]
        if not plan.judged or (read_about(file) or {}).get("judge") != plan.judged:
            before, mine = mine, [replace(r, outcome=plan.judge(Answer(r.prompt, r.answer, r.score))) for r in mine]
            changed += sum(one.outcome != other.outcome for one, other in zip(before, mine, strict=True))
            if plan.judged:  # a judge of one's own may cost something: it is asked once
                about = {**(read_about(file) or {}), "judge": plan.judged}
                write_rows(provenances(plan, mine), file, about, AnswerRow)
        rows += mine
    if changed:
        log.warning("the judge is another than when this run began: %d answers are judged otherwise now", changed)
    return rows


def donors(plan: Plan) -> list[str] | None:
    """What the donor reads before each answer; None where it reads nothing, but says means."""
    if plan.means is not None:
        return None
    return [one.prompt if plan.other else one.clean or "" for one in plan.requests]


def prepare(config: RestoreConfig) -> Plan:
    """Load what a run needs, see that all of it fits, and choose what is restored."""
    out = Path(config.out)
    check_writable(out)
    refuse_other_command(out, FOLDER)
    judge = read_judge(config.judge)
    model = _load(config, config.model)
    requests = read_requests(config.prompts, model, config.chat, config.n)
    other = _load(config, config.donor) if config.donor not in ("clean", "means") else None
    if config.donor == "clean":
        need_clean(requests, config.prompts)
    latents = LatentSet.parse(config.latents)
    sites = {one.site: one for one in read_dictionaries(config.sae, read_sites(config.site) or list(latents), model)}
    refusal_ids = _refusal_ids(model, requests[0].prompt, config.refusals)
    template = (assistant_header(model) or 1) if config.template < 0 else config.template
    select = read_requests(config.select, model, config.chat, 0) if config.select else []
    if select:
        check_apart(select, requests, config)
    settings = {name: value for name, value in asdict(config).items() if name not in FREE}
    if other is not None:
        settings["donor's weights"] = other.fingerprint
    if select:  # means over them are taken again at every start
        settings["select's texts"] = _hash(select)
    record = Record(
        "restore",
        settings,
        {"name": model.name, "hash": model.fingerprint},
        {str(site): {"name": one.name, "hash": one.fingerprint} for site, one in sites.items()},
        {"count": len(requests), "hash": _hash(requests)},
        0,
        1,
        -(-len(requests) // config.part),
    )
    folder = out / FOLDER
    there = folder / "run.json"
    before = None if not there.exists() else Record(**json.loads(there.read_text(encoding="utf-8")))
    if before is not None:
        refuse_if_other(out, before.decides, record.decides)
    fvu = {} if other is None else _shared(config, model, other, sites, requests)
    means = _means(config, model, sites, select, template) if config.donor == "means" else None
    if before is None:
        chosen = chosen_latents(config, model, other, sites, latents, select, template, refusal_ids)
        edits = [one.facts() for one in with_controls(config, model, sites, chosen, requests)]
        record = replace(record, edits=edits)
    output_folder(folder)
    write_yaml(asdict(config), folder / "config.yaml")
    judged = judge_version(config.judge)
    whole = before or record
    return Plan(config, model, other, sites, requests, means, template, judge, judged, refusal_ids, fvu, whole, folder)


def _load(config: RestoreConfig, name: str) -> LanguageModel:
    return load_model(name, config.device, config.dtype, config.prepend_bos, config.trust_remote_code)


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


def _work(plan: Plan, tracker: Tracker, check: Check) -> None:
    config, left = plan.config, plan.left
    there = sorted(set(range(plan.record.parts)) - set(left))
    if there and not config.quiet:
        log.info("%d of %d parts are there already", len(there), plan.record.parts)
    before = sum((read_about(part_file(plan.folder, number)) or {})["answers"] for number in there)
    with Meter(plan.record.parts, len(there), before, config, tracker, "answers") as meter:
        for number in left:
            requests = plan.requests[number * config.part : (number + 1) * config.part]
            rows: list[AnswerRow] = []
            conditions: list[str | Set] = ["bare", "donor", *plan.sets]
            for condition in conditions:
                check()
                new = _rows(plan, requests, condition)
                meter.ran(len(new))
                rows += new
            about = {"run": plan.record.key, "answers": len(rows), "judge": plan.judged}
            if not (plan.folder / "run.json").exists():  # with the first part: settings that fail leave nothing behind
                write_json(asdict(plan.record), plan.folder / "run.json")
            write_rows(provenances(plan, rows), part_file(plan.folder, number), about, AnswerRow)
            meter.part_done()


@torch.no_grad()
def _rows(plan: Plan, requests: Sequence[Request], condition: str | Set) -> list[AnswerRow]:
    """One part's answers under one condition; means answer nothing themselves."""
    model, prompts = plan.model, [one.prompt for one in requests]
    inside: Any = nullcontext()
    draw, size = 0, 0
    if condition == "donor":
        if plan.means is not None:
            return []
        model, prompts = (plan.other, prompts) if plan.other else (model, [one.clean or "" for one in requests])
    elif isinstance(condition, Set):
        wanted = LatentSet.of({site: ids for site, ids in condition.latents.items() if ids != ()})
        edits = restorations(plan.sites, plan.donor(requests), wanted, error=plan.config.error)
        inside = splice(model, [plan.sites[site] for site in wanted], edits) if wanted else inside
        draw = condition.draw
        size = wanted.size(plan.sites)
    with inside:
        texts = model.generate(prompts, plan.config.tokens, batch_size=len(prompts))
        scores = refusal_log_odds(model.next_logits(model.tokenize(prompts, "left")), plan.refusal_ids).tolist()
    return [
        AnswerRow(
            setting=plan.config.donor,
            example=one.example,
            prompt=one.prompt,
            harmful=one.harmful,
            condition=condition if isinstance(condition, str) else condition.condition,
            latents=size,
            draw=draw,
            answer=text,
            outcome=plan.judge(Answer(one.prompt, text, score)),
            score=score,
        )
        for one, text, score in zip(requests, texts, scores, strict=True)
    ]


def _hash(requests: Sequence[Request]) -> str:
    told = json.dumps([[one.example, one.prompt, one.clean, one.harmful] for one in requests])
    return hashlib.sha256(told.encode()).hexdigest()[:16]


def provenance(plan: Plan, model: LanguageModel | None = None) -> Provenance:
    """Of several dictionaries the hash is taken over all of their hashes."""
    hashes = [one.fingerprint for one in plan.sites.values()]
    whole = hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()[:16]
    model = model or plan.model
    return Provenance(model.name, model.fingerprint, plan.config.sae, whole, plan.config.seed)


def provenances(plan: Plan, rows: Sequence[AnswerRow]) -> list[tuple[list[AnswerRow], Provenance]]:
    """Rows in their order, those that another model answered under its name."""
    return [
        (list(some), provenance(plan, plan.other if donor else None))
        for donor, some in groupby(rows, key=lambda row: row.condition == "donor")
    ]
