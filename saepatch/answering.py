"""`saepatch restore`: answers under restoration, part by part, so that a run can be stopped and goes on."""

import hashlib
import json
import logging
import shlex
from collections.abc import Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch

from saepatch.answers import Answers, Request, read_requests, write_answers
from saepatch.config import RestoreConfig
from saepatch.controls import control_sets
from saepatch.dictionaries import Dictionary
from saepatch.errors import UserError
from saepatch.judges import Answer, Judge, read_judge
from saepatch.metrics import refusal_log_odds
from saepatch.models import LanguageModel, load_model
from saepatch.pages.restored import restored_page, see
from saepatch.parts import ANSWERS, Record, part_file, refuse_if_other, refuse_other_command
from saepatch.progress import Check, Meter, stoppable
from saepatch.quality import latent_statistics
from saepatch.restoring import CleanMeans, CleanPrompts, Donor, OtherModel
from saepatch.results import (
    AnswerRow,
    Provenance,
    check_writable,
    output_folder,
    read_about,
    read_rows,
    write_json,
    write_rows,
    write_yaml,
)
from saepatch.safety import assistant_header, first_tokens, restorations
from saepatch.safety_latents import clean_means, find_safety_latents
from saepatch.settings import read_dictionaries, read_latents, read_sites
from saepatch.sites import Site
from saepatch.splicing import splice
from saepatch.tracking import open_tracker

log = logging.getLogger(__name__)

# Settings that say where and how a run goes, not what comes out of it: they may change from one start to the next.
FREE = ("out", "track", "device", "progress", "quiet", "json", "trust_remote_code")
FOLDER = ANSWERS  # of the parts


@dataclass(frozen=True)
class Set:
    """Latents that are restored together, by site (None: all); `draw` counts the controls of one kind."""

    condition: str
    draw: int
    latents: Mapping[Site, tuple[int, ...] | None]

    def facts(self) -> dict[str, Any]:
        latents = {str(site): None if ids is None else list(ids) for site, ids in self.latents.items()}
        return {"condition": self.condition, "draw": self.draw, "latents": latents}

    @classmethod
    def read(cls, given: Mapping[str, Any]) -> "Set":
        latents = {Site.parse(site): None if ids is None else tuple(ids) for site, ids in given["latents"].items()}
        return cls(given["condition"], given["draw"], latents)


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
    refusal_ids: set[int]
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


def run_restore(config: RestoreConfig) -> Answers:
    """Answer every prompt bare, restored and under every control; what is on the disk already is not run again.

    Raises:
        UserError: settings that do not fit, or a folder that holds another run.
        KeyboardInterrupt: the run was stopped, by Ctrl-C or SIGTERM; what is written stays, and how to go on is said.
    """
    with stoppable() as check:
        torch.manual_seed(config.seed)
        plan = prepare(config)
        try:
            _work(plan, check)
        except KeyboardInterrupt:
            total = plan.record.parts
            again = f"saepatch restore --config {shlex.quote(str(plan.folder / 'config.yaml'))}"
            raise KeyboardInterrupt(
                f"{total - len(plan.left)} of {total} parts are written; to go on from there: {again}"
            ) from None
    rows = [row for number in range(plan.record.parts) for row in read_rows(part_file(plan.folder, number))]
    provenance = _provenance(plan)
    found = Answers.of(config, plan.record, [_row(row) for row in rows])
    dictionaries, requests = list(plan.sites.values()), [one.prompt for one in plan.requests]
    restored = next(one for one in plan.sets if one.condition == "restored")
    seen = see(plan.model, plan.other, dictionaries, restored.latents, found, requests, _donors(plan))
    write_answers(found, provenance, restored_page(found, provenance, seen), Path(config.out))
    return found


def _donors(plan: Plan) -> list[str] | None:
    """What the donor reads before each answer; None where it reads nothing, but says means."""
    if plan.means is not None:
        return None
    return [one.prompt if plan.other else one.clean or "" for one in plan.requests]


def _row(given: Mapping[str, Any]) -> AnswerRow:
    return AnswerRow(**{name: given[name] for name in AnswerRow.__dataclass_fields__})


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
        _need_clean(requests, config.prompts)
    latents = _given(config)
    names = [site for site in latents or () if site is not None]
    sites = {one.site: one for one in read_dictionaries(config.sae, read_sites(config.site) or names, model)}
    refusal_ids = _refusal_ids(model, requests[0].prompt, config.refusals)
    template = (assistant_header(model) or 1) if config.template < 0 else config.template
    settings = {name: value for name, value in asdict(config).items() if name not in FREE}
    record = Record(
        "restore",
        settings if other is None else settings | {"donor's weights": other.fingerprint},
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
    select = read_requests(config.select, model, config.chat, 0) if config.select else []
    means = _means(config, model, sites, select, template) if config.donor == "means" else None
    if before is None:
        chosen = _chosen(config, model, other, sites, latents, select, template, refusal_ids)
        edits = [one.facts() for one in _with_controls(config, model, sites, chosen, requests)]
        record = replace(record, edits=edits)
    output_folder(folder)
    write_yaml(asdict(config), folder / "config.yaml")
    return Plan(config, model, other, sites, requests, means, template, judge, refusal_ids, before or record, folder)


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


def _need_clean(requests: Sequence[Request], source: str) -> None:
    if lacking := [one.example for one in requests if one.clean is None]:
        raise UserError(
            f"prompt {lacking[0]} of {source!r} has no clean prompt for the donor to read: give each a clean one, or "
            "another --donor (means, or an aligned model)"
        )


def _given(config: RestoreConfig) -> dict[Site | None, tuple[int, ...]] | None:
    """The latents that are spelt out, by site; None: none are."""
    if not config.latents.strip():
        return None
    try:
        groups = read_latents(config.latents.replace(";", ","))
    except ValueError as error:
        raise UserError(
            f"latents {config.latents!r}: write numbers with commas, of several sites as in "
            "'resid_post.3: 417,3 | resid_post.4: 5'"
        ) from error
    return {site: some[0] for site, some in groups.items()}


def _means(
    config: RestoreConfig,
    model: LanguageModel,
    sites: Mapping[Site, Dictionary],
    select: Sequence[Request],
    template: int,
) -> CleanMeans:
    _need_clean(select, config.select)
    clean = [one.clean or "" for one in select]
    return clean_means(model, sites, clean, template=template, max_new_tokens=config.tokens)


def _chosen(
    config: RestoreConfig,
    model: LanguageModel,
    other: LanguageModel | None,
    sites: Mapping[Site, Dictionary],
    latents: Mapping[Site | None, tuple[int, ...]] | None,
    select: Sequence[Request],
    template: int,
    refusal_ids: set[int],
) -> dict[Site, tuple[int, ...] | None]:
    """What is restored: what is spelt out, the first of a ranking, or all."""
    if latents is not None:
        if None in latents and len(sites) > 1:
            raise UserError(
                f"latents {config.latents!r} are of one dictionary, and there are {', '.join(map(str, sites))}: give a "
                "--site, or the latents of each, as in 'resid_post.3: 281 | resid_post.4: 5'"
            )
        found: dict[Site, tuple[int, ...] | None] = {
            next(iter(sites)) if site is None else site: ids for site, ids in latents.items()
        }
        for site, ids in found.items():
            if site not in sites:
                raise UserError(f"latents of {site} are to be restored, but --site is {config.site!r}: leave it out")
            sites[site].check_ids(ids or ())
        return found
    if not select:
        return dict.fromkeys(sites)
    if other is None:
        _need_clean(select, config.select)
    donor = OtherModel(other, template) if other else CleanPrompts(tuple(o.clean or "" for o in select), template)
    ranked = find_safety_latents(
        model,
        sites,
        [one.prompt for one in select],
        donor,
        refusal_ids=refusal_ids if config.ranking == "attribution" else (),
        max_fvu=config.max_fvu,
        max_new_tokens=config.tokens,
    )
    return dict(ranked.top(config.k, config.ranking))


def _with_controls(
    config: RestoreConfig,
    model: LanguageModel,
    sites: Mapping[Site, Dictionary],
    chosen: Mapping[Site, tuple[int, ...] | None],
    requests: Sequence[Request],
) -> list[Set]:
    """What is restored and, where it is not everything, sets with as many latents a site beside it."""
    sets = [Set("restored", 0, chosen)]
    some = {site: ids for site, ids in chosen.items() if ids is not None}
    if not config.controls or len(some) < len(chosen) or not some:
        return sets
    tokens = model.tokenize([text for one in requests for text in (one.prompt, one.clean) if text is not None], "left")
    drawn = {}
    for site, ids in some.items():
        try:
            statistics = latent_statistics(model, sites[site], tokens)
            drawn[site] = control_sets(ids, len(ids), statistics, config.seed, config.controls)
        except UserError as error:
            log.warning("no controls: at %s %s", site, error)
            return sets
    for kind, role in enumerate(("random", "matched")):
        for draw in range(config.controls):
            sets.append(Set(role, draw, {site: both[kind][draw] for site, both in drawn.items()}))
    return sets


def _work(plan: Plan, check: Check) -> None:
    config, left = plan.config, plan.left
    done = plan.record.parts - len(left)
    if done and not config.quiet:
        log.info("%d of %d parts are there already", done, plan.record.parts)
    before = sum((read_about(part_file(plan.folder, n)) or {}).get("answers", 0) for n in range(plan.record.parts))
    tracker = open_tracker(config.track, Path(config.out), run="restore", config=asdict(config), resume=done > 0)
    with tracker, Meter(plan.record.parts, done, before, config, tracker, "answers") as meter:
        for number in left:
            requests = plan.requests[number * config.part : (number + 1) * config.part]
            rows: list[AnswerRow] = []
            conditions: list[str | Set] = ["bare", "donor", *plan.sets]
            for condition in conditions:
                check()
                rows += _rows(plan, requests, condition)
                meter.ran(len(requests))
            about = {"run": plan.record.key, "answers": len(rows)}
            if not (plan.folder / "run.json").exists():  # with the first part: settings that fail leave nothing behind
                write_json(asdict(plan.record), plan.folder / "run.json")
            write_rows([(rows, _provenance(plan))], part_file(plan.folder, number), about, AnswerRow)
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
        wanted = {site: ids for site, ids in condition.latents.items() if ids != ()}
        edits = restorations(plan.sites, plan.donor(requests), wanted, error=plan.config.error)
        inside = splice(model, [plan.sites[site] for site in wanted], edits) if wanted else inside
        draw = condition.draw
        size = sum(plan.sites[site].d_sae if ids is None else len(ids) for site, ids in wanted.items())
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


def _provenance(plan: Plan) -> Provenance:
    """Of several dictionaries the hash is taken over all of their hashes."""
    hashes = [one.fingerprint for one in plan.sites.values()]
    whole = hashes[0] if len(hashes) == 1 else hashlib.sha256(" ".join(hashes).encode()).hexdigest()[:16]
    return Provenance(plan.model.name, plan.model.fingerprint, plan.config.sae, whole, plan.config.seed)
