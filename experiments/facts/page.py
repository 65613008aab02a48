"""The report, summary and rows of the experiment on facts."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from saepatch.facts.evaluation import EditEvaluation
from saepatch.model.language_model import LanguageModel
from saepatch.pages.charts import cell
from saepatch.records.provenance import Provenance
from saepatch.records.rows import EditRow, write_rows
from saepatch.report import Block, Cell, Facts, HeatMap, LineChart, Page, Section, Series, Table

from ..common.tracked import conclude
from .claims import SEQUENCE_KINDS, FactClaim, differences_to_rome, still_hold
from .settings import FactsConfig
from .stages import LayerTrace, MeasuredSequence, correlation

KINDS = ("efficacy", "paraphrase", "neighbourhood", "reversal", "ripple")


@dataclass(frozen=True, eq=False)
class FactResults:
    """All results: causal traces, single edits by layer ("TOKEN/LAYER") and by method, sequences, verdicts."""

    known: int
    requests: int
    traces: tuple[LayerTrace, ...]
    by_layer: Mapping[str, EditEvaluation]
    token: str
    layer: int
    singles: Mapping[str, EditEvaluation]
    sequences: tuple[MeasuredSequence, ...]
    claims: tuple[FactClaim, ...]
    left_out: Mapping[str, str]

    def edited_at(self, token: str) -> dict[int, float]:
        """Mean P(new) - P(true) after single edits, by layer."""
        own = {name: each for name, each in self.by_layer.items() if name.startswith(f"{token}/")}
        return {int(name.split("/")[1]): each.magnitude("efficacy").value for name, each in own.items()}

    def correlations(self) -> dict[str, float]:
        """Pearson correlation over layers of what an MLP restores with what an edit of it achieves."""
        by_token = {}
        for trace in self.traces:
            for token in ("subject", "last"):
                if len(edits := self.edited_at(token)) > 2:
                    restored = [trace.of(token)[layer] for layer in edits]
                    by_token[f"{trace.corruption}, {token}"] = correlation(restored, list(edits.values()))
        return by_token


def write(config: FactsConfig, model: LanguageModel, results: FactResults) -> None:
    """Write the report, summary, rows and settings, and log them to trackers."""
    out = Path(config.out)
    provenance = Provenance(
        model.name, model.fingerprint, config.sae and f"{config.sae}/{config.site}", "", config.seed
    )
    rows: list[EditRow] = [row for each in results.singles.values() for row in each.rows]
    write_rows([(rows, provenance)], out / "results.parquet", kind=EditRow)
    given = {name: text for name, text in provenance.facts().items() if config.sae or name != "dictionary"}
    page = Page("Editing facts", headline(results), _sections(results), Facts(given))
    summary = {
        "known": results.known,
        "requests": results.requests,
        "token": results.token,
        "layer": results.layer,
        "correlations": results.correlations(),
        "by_layer": {name: _figures(each) for name, each in results.by_layer.items()},
        "single_edits": {name: _figures(each) for name, each in results.singles.items()},
        "sequences": {
            run.method: {
                str(step.edits): _figures(step.evaluation)
                | {"earlier_hold": still_hold(step, earlier).as_list(), "loss": step.loss, "norms": step.norms}
                for earlier, step in zip([0, *(step.edits for step in run.steps)], run.steps, strict=False)
            }
            for run in results.sequences
        },
        "sequences_minus_rome": {
            method: {
                str(edits): {kind: figure.as_list() for kind, figure in figures.items()}
                for edits, figures in steps.items()
            }
            for method, steps in differences_to_rome(results.sequences).items()
        },
        "left_out": dict(results.left_out),
        "claims": [{**asdict(each), "figure": each.figure.as_list()} for each in results.claims],
    }
    conclude(config, "facts", page, summary, {"correlations": results.correlations()})


def headline(results: FactResults) -> str:
    """The result in a few sentences."""
    rome = results.singles["ROME"]
    shown = ", ".join(f"{kind} {rome.success(kind).value:.0%}" for kind in rome.kinds if rome.left(kind)[0])
    last = next((run.steps[-1] for run in results.sequences if run.method == "ROME" and run.steps), None)
    count = "" if last is None else f"{last.edits} edit{'s' * (last.edits > 1)}"
    kept = "" if last is None else f" After {count} in sequence, {_kept(last.evaluation)}."
    where = f"layer {results.layer}, the {'subject' if results.token == 'subject' else 'prompt'}'s last token"
    return f"Single edits by ROME at {where}: {shown}.{kept}"


def _kept(evaluation: EditEvaluation) -> str:
    kinds = [kind for kind in ("efficacy", "neighbourhood") if kind in evaluation.kinds]
    return ", ".join(f"{kind} {evaluation.success(kind).value:.0%}" for kind in kinds)


def _figures(evaluation: EditEvaluation) -> dict[str, Any]:
    facts = evaluation.facts()
    return {"method": evaluation.method, **facts}


def _sections(results: FactResults) -> list[Section]:
    claims = Table(
        ["claim", "measured", "figure", "verdict"],
        [[each.claim, each.measured, cell(each.figure), each.verdict] for each in results.claims],
        "A claim is shown where the whole 95 % interval over facts lies on its side.",
        {"figure": ".3f"},
    )
    left_out = "".join(f"\n\nLeft out: {name}: {why}" for name, why in results.left_out.items())
    text = f"The model knows {results.known} of {results.requests} facts.{left_out}"
    return [
        Section("Verdicts", text, [claims]),
        _where(results),
        Section("Single edits, by weights and by latents", SINGLES, [_table(results.singles)]),
        _in_sequence(results),
    ]


SINGLES = (
    "Every fact is edited alone. Latents are chosen on facts of other prompts, and act at the last token of any "
    "prompt, whatever its subject. Reversal and ripple: counted questions only."
)


def _where(results: FactResults) -> Section:
    blocks: list[Block] = []
    for trace in results.traces:
        for name, shares in (("states", trace.states), ("MLP outputs", trace.mlps)):
            caption = f"Share of the gap that clean {name} restore; {trace.facts} facts. Corrupted: {trace.corruption}."
            layers = [str(layer) for layer in range(len(shares))]
            title = f"Causal tracing, {trace.corruption}: {name}"
            blocks.append(
                HeatMap(title, layers, list(trace.columns), shares, caption, "layer", "token", value_format=".2f")
            )
    series = []
    for token in ("subject", "last"):
        if edits := results.edited_at(token):
            series.append(Series(f"edit, {token}", list(map(float, edits)), list(edits.values())))
            for trace in results.traces[:1]:
                restored = [trace.of(token)[layer] for layer in edits]
                series.append(Series(f"trace, {token}", list(map(float, edits)), restored))
    chart = LineChart(
        "Trace and single edits by layer",
        "layer",
        "restored share; P(new) - P(true)",
        series,
        "Trace: MLP outputs, token replacement. Edits: ROME.",
    )
    rows: list[list[Cell]] = [[name, value] for name, value in results.correlations().items()]
    table = Table(["trace, token", "correlation over layers"], rows, formats={"correlation over layers": ".2f"})
    return Section("Does the trace tell where to edit?", blocks=[*blocks, chart, table])


def _table(evaluations: Mapping[str, EditEvaluation]) -> Table:
    kinds = [kind for kind in KINDS if any(kind in each.kinds for each in evaluations.values())]
    rows: list[list[Cell]] = []
    for name, each in evaluations.items():
        n = len({row.example for row in each.rows})
        shares = [cell(each.success(kind)) if kind in each.kinds else None for kind in kinds]
        magnitudes = [cell(each.magnitude(kind)) if kind in each.kinds else None for kind in kinds[:3]]
        rows.append([name, n, *shares, cell(each.score), *magnitudes, cell(each.fluency_change())])
    sizes = [f"P: {kind}" for kind in kinds[:3]]
    columns = ["edit", "facts", *kinds, "harmonic mean", *sizes, "n-gram entropy"]
    formats = dict.fromkeys((*kinds, "harmonic mean"), ".0%") | dict.fromkeys((*sizes, "n-gram entropy"), ".2f")
    caption = (
        "Success by kind of question, with 95 % intervals over facts; P: mean P(right) - P(other); entropy in bits."
    )
    return Table(columns, rows, caption, formats)


def _in_sequence(results: FactResults) -> Section:
    blocks: list[Block] = []
    for kind in ("efficacy", "neighbourhood"):
        series = []
        for run in results.sequences:
            points = [step.evaluation.success(kind) for step in run.steps]
            x = [float(step.edits) for step in run.steps]
            ends = ([getattr(point, end) for point in points] for end in ("value", "low", "high"))
            series.append(Series(run.method, x, *ends))
        title = f"{kind.capitalize()} of all edits so far"
        blocks.append(LineChart(title, "edits", "success", series, log_x=True, y_range=(0.0, 1.0), y_format=".0%"))
    losses = [
        Series(run.method, [float(s.edits) for s in run.steps], [s.loss for s in run.steps])
        for run in results.sequences
    ]
    blocks.append(LineChart("Loss of held-out texts", "edits", "nats a token", losses, log_x=True))
    blocks += [_steps(results), _beside_rome(results)]
    return Section("Edits in sequence", "One after another, on top of all earlier edits.", blocks)


def _steps(results: FactResults) -> Table:
    rows: list[list[Cell]] = []
    for run in results.sequences:
        for number, step in enumerate(run.steps):
            each = step.evaluation
            rows.append([
                run.method,
                step.edits,
                *(cell(each.success(kind)) if kind in each.kinds else None for kind in KINDS[:3]),
                cell(each.accuracy("efficacy")),
                cell(still_hold(step, run.steps[number - 1].edits)) if number else None,
                *(cell(each.magnitude(kind)) if kind in each.kinds else None for kind in SEQUENCE_KINDS),
                step.loss,
                max(step.norms.values()),
            ])  # fmt: skip
    shares = [*KINDS[:3], "likeliest token", "earlier edits hold"]
    sizes, norm = [f"P: {kind}" for kind in SEQUENCE_KINDS], "largest ‖ΔW‖/‖W‖"
    formats = dict.fromkeys(shares, ".0%") | dict.fromkeys([*sizes, norm], ".2f") | {"held-out loss": ".3f"}
    caption = "Earlier edits: up to the checkpoint before. P: mean P(right) - P(other). 95 % intervals over facts."
    return Table(["edit", "edits", *shares, *sizes, "held-out loss", norm], rows, caption, formats)


def _beside_rome(results: FactResults) -> Table:
    rows: list[list[Cell]] = []
    for method, steps in differences_to_rome(results.sequences).items():
        rows += [[method, edits, *map(cell, figures.values())] for edits, figures in steps.items()]
    caption = "P(right) - P(other) minus the same after ROME's edits, with 95 % intervals over facts."
    columns = ["edit, minus ROME", "edits", *SEQUENCE_KINDS]
    return Table(columns, rows, caption, dict.fromkeys(SEQUENCE_KINDS, ".2f"))
