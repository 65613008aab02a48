"""Judged answers of `saepatch restore`: their shares, table and files. Reading them needs no model."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from saepatch.errors import UserError
from saepatch.records.documents import load_yaml
from saepatch.records.files import plain, write_json, write_yaml
from saepatch.records.provenance import Provenance, versions
from saepatch.records.rows import AnswerRow, grouped, read_about, read_row, read_rows, write_rows
from saepatch.records.statistics import Interval, bootstrap_mean, wilson_share
from saepatch.records.tables import text_table
from saepatch.report import KEPT
from saepatch.restoration.judges import OUTCOMES, Answer, Judge, judge_version, read_judge
from saepatch.runs.catalogue import read_json
from saepatch.runs.parts import Record, part_files
from saepatch.settings.checks import current_names
from saepatch.settings.restore import RestoreConfig

log = logging.getLogger(__name__)

ORDER = ("bare", "restored", "random", "matched", "donor")
WILSON = "Intervals: 95 % Wilson score over prompts; several random sets are averaged per prompt, for these sets only."


@dataclass(frozen=True, eq=False)
class Share:
    """Share of prompts with each outcome, and mean refusal score: one condition, one group of prompts ("": all)."""

    condition: str
    group: str
    latents: int
    prompts: int
    outcomes: dict[str, Interval]
    score: Interval


@dataclass(frozen=True, eq=False)
class Answers:
    """Results of a run of `saepatch restore`: rows with their provenance, and shares by condition."""

    config: RestoreConfig
    record: Record
    parts: Sequence["Part"]
    shares: Sequence[Share]
    fvu: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    """By site, the dictionary's FVU on the model and on the donor; empty where both are the same model."""

    @classmethod
    def of(
        cls,
        config: RestoreConfig,
        record: Record,
        parts: Sequence["Part"],
        fvu: Mapping[str, tuple[float, float]] | None = None,
    ) -> "Answers":
        rows = [row for part_rows, _ in parts for row in part_rows]
        groups = sorted({row.harmful for row in rows} - {""})
        by_group = [("", list(rows)), *((group, [r for r in rows if r.harmful == group]) for group in groups)]
        shares = []
        for group, group_rows in by_group:
            for condition in ORDER:
                if own := [row for row in group_rows if row.condition == condition]:
                    shares.append(_share(condition, group, own, config.seed))
        return cls(config, record, parts, shares, fvu or {})

    @property
    def rows(self) -> list[AnswerRow]:
        return [row for rows, _ in self.parts for row in rows]

    def share(self, condition: str, group: str = "") -> Share:
        return next(share for share in self.shares if (share.condition, share.group) == (condition, group))

    def table(self) -> str:
        """Table of the outcomes as text."""
        kinds = {share.group for share in self.shares}
        shown = [share for kind in ("yes", "no", "") for share in self.shares if share.group == kind]
        rows = [
            [self.label(share), *(share.outcomes[name] for name in OUTCOMES), f"{share.score.value:.2f}"]
            for share in shown
            if share.group or len(kinds) == 1  # shares over both kinds together mean nothing
        ]
        lines = [text_table(["", *OUTCOMES, "refusal score"], rows)]
        return "\n".join([*lines, f"{self.shares[0].prompts} prompts. {WILSON}"])

    def label(self, share: Share) -> str:
        kind = {"": "", "yes": ", harmful", "no": ", harmless"}[share.group]
        size = f" ({share.latents} latent{'s' * (share.latents > 1)})" if share.latents else ""
        return f"{share.condition}{size}{kind}"

    def summary(self) -> dict[str, Any]:
        """Content of summary.json."""
        restored = next(edit for edit in self.record.edits or () if edit["condition"] == "restored")
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
                    "condition": share.condition,
                    "harmful": {"": None, "yes": True, "no": False}[share.group],
                    "latents": share.latents,
                    "prompts": share.prompts,
                    **{name: interval.as_list() for name, interval in share.outcomes.items()},
                    "refusal_score": share.score.as_list(),
                }
                for share in self.shares
            ],
            "versions": versions(),
        }


def _share(condition: str, group: str, rows: Sequence[AnswerRow], seed: int) -> Share:
    """The share of one condition; several draws are averaged prompt by prompt."""
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
        {name: wilson_share(hit_counts / count) for name, hit_counts in hits.items()},
        bootstrap_mean(scores / count, seed=seed),
    )


Part = tuple[list[AnswerRow], Provenance]


def write_answers(answers: Answers, out: Path) -> None:
    """Write results.parquet, summary.json and config.yaml."""
    write_rows(answers.parts, out / "results.parquet", kind=AnswerRow)
    write_yaml(asdict(answers.config), out / "config.yaml")
    write_json(answers.summary(), out / "summary.json")


def merge_answers(out: Path, records: Sequence[Record]) -> Answers:
    """Read the answers of a complete run and write its results; needs no model.

    Raises:
        UserError: its settings cannot be read.
    """
    path = records[0].folder(out) / "config.yaml"
    try:
        config = RestoreConfig(**current_names(RestoreConfig, load_yaml(path)) | {"out": str(out), "shard": "0/1"})
    except TypeError as error:
        raise UserError(f"cannot read {path} ({error}): start one of the shards again, which rewrites it") from error
    answers = read_answers(config, records, read_judge(config.judge), judge_version(config.judge))
    if not answers.fvu and (out / "summary.json").exists():  # parts of earlier versions lack it
        known = read_json(out / "summary.json").get("fvu_of_model_and_donor", {})
        answers = replace(answers, fvu={site: (own, donors) for site, (own, donors) in known.items()})
    if (out / "summary.json").exists() and read_json(out / "summary.json").get("conditions") != _conditions(answers):
        (out / KEPT).unlink(missing_ok=True)  # the stored page has other figures
    write_answers(answers, out)
    return answers


def _conditions(answers: Answers) -> Any:
    return plain(answers.summary()["conditions"])


def read_answers(config: RestoreConfig, records: Sequence[Record], judge: Judge, version: str) -> Answers:
    """Read the parts of all shards; answers judged by another version of the judge are judged again.

    `version` is the judge's version (`judge_version`); empty: always judge again.
    """
    out, changed = Path(config.out), 0
    placed: list[tuple[int, AnswerRow, Provenance]] = []
    fvu: dict[str, tuple[float, float]] = {}
    for record in records:
        numbers: dict[str, int] = {}  # a shard has every N-th prompt
        for file in part_files(out, [record]):
            about = read_about(file) or {}
            rows = [read_row(row, AnswerRow) for row in read_rows(file)]
            fvu = fvu or {site: (own, donors) for site, (own, donors) in about.get("fvu", {}).items()}
            if not version or about.get("judge") != version:
                before = [row.outcome for row, _ in rows]
                rows = [
                    (replace(r, outcome=judge(Answer(r.prompt, r.answer, r.score))), provenance)
                    for r, provenance in rows
                ]
                changed += sum(outcome != row.outcome for outcome, (row, _) in zip(before, rows, strict=True))
                if version:  # a custom judge may be expensive: keep its verdicts
                    write_rows(grouped(rows), file, {**about, "judge": version}, AnswerRow)
            for row, provenance in rows:
                number = numbers.setdefault(row.example, record.shard + record.shards * len(numbers))
                placed.append((number if record.shards > 1 else 0, row, provenance))
    if changed:
        log.warning("the judge has changed since this run began: %d answers have another outcome now", changed)
    ordered = [(row, provenance) for _, row, provenance in sorted(placed, key=lambda entry: entry[0])]
    return Answers.of(config, records[0], grouped(ordered), fvu)


def _judged(row: AnswerRow, judge: Judge) -> AnswerRow:
    return replace(row, outcome=judge(Answer(row.prompt, row.answer, row.score)))
