"""Judged answers: their shares, their table, and what `saepatch restore` writes. Reading them needs no model."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np

from saepatch.errors import UserError
from saepatch.records.documents import load_yaml
from saepatch.records.files import write_json, write_yaml
from saepatch.records.provenance import Provenance, versions
from saepatch.records.rows import AnswerRow, read_about, read_rows, write_rows
from saepatch.records.statistics import Interval, bootstrap_mean, wilson_share
from saepatch.records.tables import text_table
from saepatch.restoration.judges import OUTCOMES, Answer, Judge, judge_version, read_judge
from saepatch.runs.catalogue import read_json
from saepatch.runs.parts import Record, part_files
from saepatch.settings.restore import RestoreConfig

log = logging.getLogger(__name__)

ORDER = ("bare", "restored", "random", "matched", "donor")
WILSON = "Intervals: 95 % Wilson score over prompts; of several random sets the mean for each prompt, for these sets."


@dataclass(frozen=True, eq=False)
class Share:
    """One condition over one group of prompts ("": all): each outcome's share of prompts, and the refusal score."""

    condition: str
    group: str
    latents: int
    prompts: int
    outcomes: dict[str, Interval]
    score: Interval


@dataclass(frozen=True, eq=False)
class Answers:
    """What came of a run of `saepatch restore`: its rows with their provenance, and shares by condition."""

    config: RestoreConfig
    record: Record
    parts: Sequence["Part"]
    shares: Sequence[Share]
    fvu: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """By site, what the dictionary leaves unexplained of the model and of the donor; empty where they are one."""

    @classmethod
    def of(
        cls,
        config: RestoreConfig,
        record: Record,
        parts: Sequence["Part"],
        fvu: Mapping[str, tuple[float, float]] | None = None,
    ) -> "Answers":
        rows = [row for some, _ in parts for row in some]
        groups = sorted({row.harmful for row in rows} - {""})
        wanted = [("", list(rows)), *((group, [r for r in rows if r.harmful == group]) for group in groups)]
        shares = []
        for group, some in wanted:
            for condition in ORDER:
                if mine := [row for row in some if row.condition == condition]:
                    shares.append(_share(condition, group, mine, config.seed))
        return cls(config, record, parts, shares, fvu or {})

    @property
    def rows(self) -> list[AnswerRow]:
        return [row for rows, _ in self.parts for row in rows]

    def share(self, condition: str, group: str = "") -> Share:
        return next(one for one in self.shares if (one.condition, one.group) == (condition, group))

    def table(self) -> str:
        """The outcomes as text."""
        kinds = {share.group for share in self.shares}
        shown = [share for kind in ("yes", "no", "") for share in self.shares if share.group == kind]
        rows = [
            [self.label(share), *(share.outcomes[name] for name in OUTCOMES), f"{share.score.value:.2f}"]
            for share in shown
            if share.group or len(kinds) == 1  # of both kinds together none is the answer
        ]
        lines = [text_table(["", *OUTCOMES, "refusal score"], rows)]
        return "\n".join([*lines, f"{self.shares[0].prompts} prompts. {WILSON}"])

    def label(self, one: Share) -> str:
        kind = {"": "", "yes": ", harmful", "no": ", harmless"}[one.group]
        size = f" ({one.latents} latent{'s' * (one.latents > 1)})" if one.latents else ""
        return f"{one.condition}{size}{kind}"

    def summary(self) -> dict[str, Any]:
        """As summary.json holds it."""
        restored = next(given for given in self.record.edits or () if given["condition"] == "restored")
        return {
            "work": "restore",
            "settings": self.record.settings,
            "model": self.record.model,
            "dictionaries": self.record.dictionaries,
            "fvu_of_model_and_donor": dict(self.fvu),
            "latents": restored["latents"],
            "rows": len(self.rows),
            "conditions": [
                {
                    "condition": one.condition,
                    "harmful": {"": None, "yes": True, "no": False}[one.group],
                    "latents": one.latents,
                    "prompts": one.prompts,
                    **{name: [e.value, e.low, e.high] for name, e in one.outcomes.items()},
                    "refusal_score": [one.score.value, one.score.low, one.score.high],
                }
                for one in self.shares
            ],
            "versions": versions(),
        }


def _share(condition: str, group: str, rows: Sequence[AnswerRow], seed: int) -> Share:
    """Draws of one condition are put together prompt by prompt."""
    examples = list(dict.fromkeys(row.example for row in rows))
    place = {example: number for number, example in enumerate(examples)}
    count, scores = np.zeros(len(examples)), np.zeros(len(examples))
    hits: dict[str, np.ndarray] = {name: np.zeros(len(examples)) for name in OUTCOMES}
    for row in rows:
        at = place[row.example]
        count[at] += 1
        scores[at] += row.score
        hits[row.outcome][at] += 1
    return Share(
        condition,
        group,
        rows[0].latents,
        len(examples),
        {name: wilson_share(some / count) for name, some in hits.items()},
        bootstrap_mean(scores / count, seed=seed),
    )


Part = tuple[list[AnswerRow], Provenance]


def write_answers(answers: Answers, out: Path) -> None:
    """Write results.parquet, summary.json and config.yaml."""
    write_rows(answers.parts, out / "results.parquet", kind=AnswerRow)
    write_yaml(asdict(answers.config), out / "config.yaml")
    write_json(answers.summary(), out / "summary.json")


def merge_answers(out: Path, records: Sequence[Record]) -> Answers:
    """The same of a run whose parts are all there, without its model.

    Raises:
        UserError: its settings cannot be read.
    """
    path = records[0].folder(out) / "config.yaml"
    try:
        config = RestoreConfig(**load_yaml(path) | {"out": str(out), "shard": "0/1"})
    except TypeError as error:
        raise UserError(f"cannot read {path} ({error}): start one of the shards again, which writes it") from error
    answers = read_answers(config, records, read_judge(config.judge), judge_version(config.judge))
    if not answers.fvu and (out / "summary.json").exists():  # of parts that did not say it
        known = read_json(out / "summary.json").get("fvu_of_model_and_donor", {})
        answers = replace(answers, fvu={site: (mine, theirs) for site, (mine, theirs) in known.items()})
    write_answers(answers, out)
    return answers


def read_answers(config: RestoreConfig, records: Sequence[Record], judge: Judge, judged: str) -> Answers:
    """What the parts of all shards hold; verdicts that another version of the judge gave are given anew.

    `judged` is the judge's version; empty where it is quicker to judge again than to ask.
    """
    out, changed = Path(config.out), 0
    placed: list[tuple[int, AnswerRow, Provenance]] = []
    fvu: dict[str, tuple[float, float]] = {}
    for record in records:
        numbers: dict[str, int] = {}  # a shard has every N-th prompt
        for file in part_files(out, [record]):
            about = read_about(file) or {}
            rows = [read_row(row) for row in read_rows(file)]
            fvu = fvu or {site: (mine, theirs) for site, (mine, theirs) in about.get("fvu", {}).items()}
            if not judged or about.get("judge") != judged:
                before = [row.outcome for row, _ in rows]
                rows = [(replace(r, outcome=judge(Answer(r.prompt, r.answer, r.score))), whose) for r, whose in rows]
                changed += sum(outcome != row.outcome for outcome, (row, _) in zip(before, rows, strict=True))
                if judged:  # a judge of one's own may cost something: it is asked once
                    write_rows(grouped(rows), file, {**about, "judge": judged}, AnswerRow)
            for row, whose in rows:
                number = numbers.setdefault(row.example, record.shard + record.shards * len(numbers))
                placed.append((number if record.shards > 1 else 0, row, whose))
    if changed:
        log.warning("the judge is another than when this run began: %d answers are judged otherwise now", changed)
    ordered = [(row, whose) for _, row, whose in sorted(placed, key=lambda entry: entry[0])]
    return Answers.of(config, records[0], grouped(ordered), fvu)


def read_row(row: Mapping[str, Any]) -> tuple[AnswerRow, Provenance]:
    """A row of a file of answers."""
    answer, whose = ({f.name: row[f.name] for f in fields(kind)} for kind in (AnswerRow, Provenance))
    return AnswerRow(**answer), Provenance(**whose)


def grouped(rows: Sequence[tuple[AnswerRow, Provenance]]) -> list[Part]:
    """Rows in their order, neighbours of one provenance together."""
    return [([row for row, _ in some], whose) for whose, some in groupby(rows, key=lambda row: row[1])]
