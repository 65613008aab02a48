"""Results as flat rows with provenance, in parquet."""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from itertools import groupby
from pathlib import Path
from typing import Any, TypeVar

from saepatch.records.files import atomic
from saepatch.records.provenance import Provenance

ABOUT = b"saepatch"  # metadata key in the parquet file
ADDED: dict[str, Any] = {"precision": "", "rounding": float("nan")}  # columns that older files lack
ROWS = b"saepatch_rows"  # metadata key of the number of rows


@dataclass(frozen=True)
class Row:
    """One measured value: one edit of one example.

    `component` is what was patched: "latent", "error", "stream", "head", "query", "key", "value", or a kind of
    direction ("direction", "dimension", "principal component", "mean difference"). `latent` lists the patched units and
    `position` the positions, as text ("417", "3,17", "all"); `token` is the text at a single position. `role` is why
    the units were chosen: "single" (all are swept; those that differ between a pair's runs have a row), "given", "top",
    "random", "matched", "differing" or "every". `effect` is normalised (0: base run, 1: source run), and NaN where the
    clean and corrupted runs are too close to divide by their difference. `corruption` is how the corrupted run was
    made, where not by the pair's corrupted prompt. `precision` is the model's dtype, and `rounding` what rounding alone
    may change in `patched`, in the metric's units: a smaller change is no effect.
    """

    task: str
    example: str
    site: str
    component: str
    latent: str
    role: str
    position: str
    token: str
    direction: str
    metric: str
    method: str
    clean: float
    corrupted: float
    patched: float
    effect: float
    corruption: str = ""
    precision: str = ""
    rounding: float = float("nan")


@dataclass(frozen=True)
class AnswerRow:
    """One model's answer to one prompt under one condition.

    `setting` names the donor and the restored model, `condition` what was restored ("bare": nothing), `latents` the
    number of latents; `draw` numbers random sets of latents. `outcome` is refuse, comply or degenerate; `score` is the
    refusal score (nats) after the prompt, NaN where it was not measured. `precision` is the answering model's dtype.
    """

    setting: str
    example: str
    prompt: str
    harmful: str
    condition: str
    latents: int
    draw: int
    answer: str
    outcome: str
    score: float
    precision: str = ""


@dataclass(frozen=True)
class CircuitRow:
    """The metric of one pair in a run in which some nodes of a circuit, or others beside it, act.

    `variant` is what acts: "circuit", "complement" (all but the circuit), "random" (another circuit of its size and
    layers), "circuit without some" and "model without some" (knock-outs of random nodes of the circuit), "without" (the
    circuit but for the node in `node`), or "edges" (the circuit's edges alone). `errors` is what error terms do:
    "nodes", "kept" or "dropped". `draw` numbers random draws, `size` counts the nodes (or edges) that act or, in
    knock-outs, do not. `whole` and `empty` are the metric when everything acts and when nothing does.
    """

    task: str
    example: str
    variant: str
    errors: str
    draw: int
    size: int
    node: str
    metric: str
    value: float
    whole: float
    empty: float
    precision: str = ""


@dataclass(frozen=True)
class EditRow:
    """One question asked of a model before and after an edit of facts.

    `example` is the edited fact, `method` what edited it, and `kind` efficacy, paraphrase, neighbourhood, reversal or
    ripple. `target` is the right answer once edited (for neighbourhood, the one that stays right), `other` the answer
    it is compared with. Negative log-likelihoods are means over an answer's tokens, in nats; accuracies are shares of
    the target's tokens that are the likeliest under teacher forcing. `counted` is 0 where the model did not know before
    what the question presupposes, or a neighbourhood question is about a subject that was edited, too. `precision` is
    the model's dtype.
    """

    example: str
    method: str
    kind: str
    prompt: str
    target: str
    other: str
    target_nll_before: float
    other_nll_before: float
    accuracy_before: float
    target_nll: float
    other_nll: float
    accuracy: float
    counted: int = 1
    precision: str = ""

    @property
    def success(self) -> bool:
        """Whether the target is likelier than the other answer after the edit."""
        return self.target_nll < self.other_nll

    @property
    def success_before(self) -> bool:
        return self.target_nll_before < self.other_nll_before

    @property
    def magnitude(self) -> float:
        """P(target) - P(other) after the edit, each the geometric mean over the answer's tokens."""
        return math.exp(-self.target_nll) - math.exp(-self.other_nll)

    @property
    def magnitude_before(self) -> float:
        return math.exp(-self.target_nll_before) - math.exp(-self.other_nll_before)


RowKind = type[Row] | type[AnswerRow] | type[CircuitRow] | type[EditRow]
SomeRow = TypeVar("SomeRow", Row, AnswerRow, CircuitRow, EditRow)


def write_rows(
    parts: Iterable[tuple[Iterable[Row | AnswerRow | CircuitRow | EditRow], Provenance]],
    path: Path,
    about: Mapping[str, Any] | None = None,
    kind: RowKind = Row,
) -> int:
    """Write rows, each part with its own provenance, to one parquet file, atomically.

    One part is held in memory at a time. `about`, any JSON value, goes into the file's metadata, where `read_about`
    finds it without reading a row. All rows are of one `kind`. Returns the number of rows.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    names = [f.name for f in (*fields(kind), *fields(Provenance))]
    arrow = {str: pa.string(), float: pa.float64(), int: pa.int64()}  # explicit: an empty table has no types to infer
    schema = pa.schema([(f.name, arrow[f.type]) for f in (*fields(kind), *fields(Provenance))])  # type: ignore[index]
    if about is not None:
        schema = schema.with_metadata({ABOUT: json.dumps(about)})
    total = 0
    with atomic(path) as temporary, pq.ParquetWriter(temporary, schema) as writer:
        for rows, provenance in parts:
            constants = asdict(provenance)
            columns: dict[str, list[Any]] = {name: [] for name in names}
            for row in rows:
                for name, value in (vars(row) | constants).items():
                    columns[name].append(value)
            if columns["example"]:
                writer.write_table(pa.table(columns, schema=schema))
            total += len(columns["example"])
        writer.add_key_value_metadata({ROWS: str(total)})
    return total


def write_records(parts: Iterable[tuple[Sequence[Mapping[str, Any]], Provenance]], path: Path) -> int:
    """Write flat records of other kinds, such as generated texts, to parquet, each part with its provenance.

    All records have the same keys. The file is written atomically. Returns the number of records.
    """
    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{**record, **asdict(provenance)} for records, provenance in parts for record in records]
    with atomic(path) as temporary:
        pq.write_table(pa.Table.from_pylist(rows), temporary)
    return len(rows)


def read_about(path: Path) -> dict[str, Any] | None:
    """What was written about the rows; None where the file is missing, damaged, lacks rows or has no such metadata."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        file = pq.read_metadata(path)
        metadata = file.metadata or {}
        if int(metadata.get(ROWS, file.num_rows)) != file.num_rows:
            return None
        about = json.loads(metadata.get(ABOUT, b"null"))
    except (OSError, ValueError, pa.ArrowException):
        return None
    return about if isinstance(about, dict) else None


def read_rows(path: Path) -> list[dict[str, Any]]:
    """Rows of a parquet file as dictionaries, provenance included."""
    import pyarrow.parquet as pq

    return pq.read_table(path).to_pylist()


def read_row(row: Mapping[str, Any], kind: type[SomeRow]) -> tuple[SomeRow, Provenance]:
    """A row of some kind and its provenance from one row of a file; older files lack the precision."""
    row = {"precision": ""} | dict(row)
    own, source = ({f.name: row[f.name] for f in fields(some)} for some in (kind, Provenance))
    return kind(**own), Provenance(**source)


def grouped(rows: Sequence[tuple[SomeRow, Provenance]]) -> list[tuple[list[SomeRow], Provenance]]:
    """Rows in their order, consecutive rows of one provenance grouped."""
    return [([row for row, _ in group], provenance) for provenance, group in groupby(rows, key=lambda row: row[1])]
