"""Results of `saepatch edit`, from the rows of all parts. Needs no model."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from saepatch.facts.evaluation import EditEvaluation
from saepatch.records.files import atomic, write_json
from saepatch.records.provenance import versions
from saepatch.records.rows import EditRow, grouped, read_about, read_row, read_rows, write_rows
from saepatch.runs.parts import Record, complete, part_files

HOLDS = 0.5  # efficacy below this causes a warning


@dataclass(frozen=True, eq=False)
class EditResults:
    """Results of a run: questions before and after, texts, and the size of the change.

    Attributes:
        texts: Each prompt, with its continuation before and after the edit.
        norms: ‖ΔW‖/‖W‖ by layer; means over deltas where each fact is edited alone.
        known_before: Requests whose target was the model's answer already.
    """

    record: Record
    evaluation: EditEvaluation
    texts: Sequence[tuple[str, str, str]]
    norms: dict[str, float]
    known_before: Sequence[str]

    @property
    def too_weak(self) -> str:
        """What to do where most edits do not hold; empty where they do."""
        share = self.evaluation.success("efficacy").value
        if share >= HOLDS:
            return ""
        return (
            f"The new answer is the likelier one in {share:.0%} of the facts: a causal trace (trace_fact) shows where "
            "to edit them (--layers, --token last). More --steps, a larger --clamp and, for memit, a smaller --weight "
            "change more."
        )

    def facts(self) -> dict[str, Any]:
        """Content of summary.json."""
        record = self.record
        return {
            "work": record.work,
            "settings": record.settings,
            "model": record.model,
            "dictionaries": record.dictionaries,
            "pairs": record.pairs["count"],
            "pairs_hash": record.pairs["hash"],
            "rows": len(self.evaluation.rows),
            "shards": record.shards,
            **self.evaluation.facts(),
            "relative_norms": self.norms,
            "known_before": list(self.known_before),
            "versions": versions(),
        }

    def table(self) -> str:
        """The figures as text."""
        settings = self.record.settings
        norms = ", ".join(f"{norm:.3f} at layer {layer}" for layer, norm in self.norms.items())
        lines = [
            f"{settings['method']}, {settings['apply']}: {self.record.pairs['count']} facts; ‖ΔW‖/‖W‖ {norms}",
            self.evaluation.table(),
            "95 % intervals over facts (means of their questions). success: the right answer is the likelier one",
        ]
        if self.too_weak:
            lines.append(self.too_weak)
        if self.known_before:
            lines.append(
                f"the target was already the answer in {len(self.known_before)}: {', '.join(self.known_before)}"
            )
        return "\n".join(lines)


def merge_edits(out: Path, records: Sequence[Record]) -> EditResults:
    """Read the rows of a complete run and write results.parquet, summary.json and config.yaml."""
    rows = [read_row(row, EditRow) for file in part_files(out, records) for row in read_rows(file)]
    write_rows(grouped(rows), out / "results.parquet", kind=EditRow)
    with atomic(out / "config.yaml") as temporary:
        temporary.write_bytes((records[0].folder(out) / "config.yaml").read_bytes())
    results = read_edits(out)
    write_json(results.facts(), out / "summary.json")
    return results


def read_edits(out: Path) -> EditResults:
    """The results of a run whose parts are all written.

    Raises:
        UserError: the folder holds no complete run.
    """
    records = complete(out)
    files = part_files(out, records)
    rows = [read_row(row, EditRow)[0] for file in files for row in read_rows(file)]
    abouts = [read_about(file) or {} for file in files]
    fluency = {name: (both[0], both[1]) for about in abouts for name, both in about["fluency"].items()}
    settings = records[0].settings
    evaluation = EditEvaluation(settings["method"], tuple(rows), fluency, settings["seed"])
    norms = [each for about in abouts for each in about["norms"]]
    means = {layer: float(np.mean([each[layer] for each in norms])) for layer in norms[0]}
    texts = [(prompt, before, after) for about in abouts for prompt, before, after in about["texts"]]
    known = [name for about in abouts for name in about["known_before"]]
    return EditResults(records[0], evaluation, texts, means, known)
