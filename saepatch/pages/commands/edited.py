"""The page of `saepatch edit`: what changed, what broke, and texts before and after."""

from collections.abc import Iterator

from saepatch.facts.evaluation import EditEvaluation
from saepatch.pages.charts import bars, cell, estimate_text
from saepatch.pages.overview import headline_section
from saepatch.report import BarChart, Cell, Comparison, Facts, Page, Section, Table
from saepatch.runs.catalogue import RunFolder
from saepatch.runs.commands.fact_results import EditResults, read_edits

SHOWN = 12  # facts whose texts are shown side by side
LISTED = 200  # questions in the list
BROKEN = 0.9  # success of neighbourhood questions below this causes a warning


def page_of_edits(run: RunFolder) -> Page:
    """The page of a finished run, from its files."""
    results = read_edits(run.path)
    measured, settings = results.evaluation, results.record.settings
    estimates = {kind: measured.success(kind) for kind in measured.kinds if measured.left(kind)[0]}
    if measured.score.n:
        estimates["harmonic mean"] = measured.score
    figures = {name: estimate_text(each, ".0%") for name, each in estimates.items()}
    count = results.record.pairs["count"]
    layers = f"layer{'s' * (len(results.norms) > 1)} {', '.join(results.norms)}"
    how = "in one delta" if settings["apply"] == "together" else "each alone"
    lead = f"{count} facts edited {how} by {settings['method']} at {layers} of {results.record.model['name']}."
    sections = [
        headline_section(figures, list(_warnings(results)), "Success, with 95 % intervals over facts in brackets."),
        _success(measured, count),
        _texts(results),
        _questions(measured),
    ]
    return Page(f"saepatch edit: {run.task} in {run.model}", lead, sections, _facts(results))


def _warnings(results: EditResults) -> Iterator[str]:
    measured = results.evaluation
    if results.too_weak:
        yield results.too_weak
    if results.known_before:
        yield f"In {len(results.known_before)} requests the target was the model's answer before the edit."
    for kind in measured.kinds:
        counted, asked = measured.left(kind)
        if counted < asked:
            why = (
                "they are about edited subjects" if kind == "neighbourhood" else "the model lacks what they presuppose"
            )
            yield f"{asked - counted} of {asked} {kind} questions do not count: {why}."
    if "neighbourhood" in measured.kinds and measured.success("neighbourhood").value < BROKEN:
        yield "The edit also changes answers about other subjects."


def _success(measured: EditEvaluation, count: int) -> Section:
    kinds = [kind for kind in measured.kinds if measured.left(kind)[0]]
    chart = BarChart(
        "Success before and after",
        kinds,
        [
            bars("before", [measured.success(kind, before=True) for kind in kinds]),
            bars("after", [measured.success(kind) for kind in kinds]),
        ],
        "share of questions",
        f"n = {count} facts. The right answer, once the fact is edited, is likelier than the other.",
        value_range=(0.0, 1.0),
        value_format=".0%",
    )
    rows: list[list[Cell]] = [
        [
            kind,
            cell(measured.success(kind)),
            cell(measured.magnitude(kind)),
            cell(measured.magnitude(kind, before=True)),
            cell(measured.accuracy(kind)),
            "{} of {}".format(*measured.left(kind)),
        ]
        for kind in measured.kinds
    ]
    columns = ["questions", "success", "P(right) - P(other)", "the same before", "accuracy", "counted"]
    formats = {"success": ".0%", "P(right) - P(other)": ".3f", "the same before": ".3f", "accuracy": ".0%"}
    caption = "P: geometric mean over an answer's tokens. Accuracy: share of its tokens that are the likeliest."
    return Section("What changed and what broke", blocks=[chart, Table(columns, rows, caption, formats)])


def _texts(results: EditResults) -> Section:
    shown = [
        Comparison(prompt, [("before", before), ("after", after)], changes=True)
        for prompt, before, after in results.texts[:SHOWN]
    ]
    text = f"Greedy continuations of the first {len(shown)} prompts. Marked: words that differ."
    if results.evaluation.fluency:
        change = estimate_text(results.evaluation.fluency_change())
        text += f"\n\nEntropy of n-grams of sampled text: change {change} bits."
    return Section("Texts before and after", text, shown)


def _questions(measured: EditEvaluation) -> Section:
    rows: list[list[Cell]] = [
        [row.example, row.kind, row.prompt, row.target, row.other, row.magnitude_before, row.magnitude, row.counted]
        for row in measured.rows[:LISTED]
    ]
    columns = ["fact", "kind", "prompt", "right", "other", "before", "after", "counted"]
    caption = f"The first {len(rows)} of {len(measured.rows)} questions, with P(right) - P(other) before and after."
    table = Table(columns, rows, caption, {"before": ".3f", "after": ".3f", "counted": "d"})
    return Section("Questions", blocks=[table])


def _facts(results: EditResults) -> Facts:
    record = results.record
    given = {name: text for name, text in record.provenance("").facts().items() if name != "dictionary"}
    norms = ", ".join(f"{norm:.3f} at layer {layer}" for layer, norm in results.norms.items())
    return Facts({"model": given.pop("model"), "‖ΔW‖/‖W‖": norms} | given)
