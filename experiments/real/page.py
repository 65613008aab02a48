"""The report of the study, its summary and what the terminal shows."""

from collections.abc import Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from saepatch.measure.results.effects import Effects
from saepatch.pages.charts import INTERVALS, WILSON, bars, cell
from saepatch.pages.sweeps.maps import EditTable, draw_map, head_map, site_and_position
from saepatch.records.files import write_json, write_yaml
from saepatch.records.provenance import Provenance, versions
from saepatch.records.tables import text_table
from saepatch.report import KEPT, BarChart, Block, Facts, HeatMap, Page, Section, Table, keep_page, write_page

from ..pairs.findings import NAMES
from .claims import Claim, OtherRun
from .results import RealResults, write_results
from .sections import (
    dictionaries_section,
    direction_figures,
    latent_figures,
    latents_section,
    restoration_section,
    steering_figures,
    steering_section,
)
from .stages.heads import LEAST, ROLES
from .stages.patching import PatchingStage, TaskMap
from .stages.tasks import SPLITS, TASKS
from .stages.tracing import Tracing


def write(results: RealResults, out: Path) -> tuple[Page, dict[str, Any]]:
    """Write settings, report and summary; returns the report and the summary."""
    drawn, facts = page(results), summary(results)
    write_yaml(asdict(results.config), out / "config.yaml")
    keep_page(drawn, out / KEPT)
    write_page(drawn, out / "report.html")
    write_json(facts, out / "summary.json")
    write_results(results, out)
    return drawn, facts


def printed(results: RealResults) -> str:
    """The claims as a table, and what was left out."""
    columns = ["claim", "figure", "verdict"]
    rows: list[tuple[str, ...]] = [(claim.claim, str(claim.figure), claim.verdict) for claim in results.claims]
    if results.beside:
        columns.append(f"in {results.beside.name}")
        rows = [(*row, results.beside.verdict(claim)) for row, claim in zip(rows, results.claims, strict=True)]
    left = [f"left out: {name}: {reason}" for name, reason in results.left_out.items()]
    return "\n".join([text_table(columns, rows), *left])


def summary(results: RealResults) -> dict[str, Any]:
    """The figures for other programs: intervals are [value, low, high]."""
    patched = results.patched
    return {
        "verdict": _lead(results),
        "claims": [
            {"claim": c.claim, "measured": c.measured, "figure": c.figure.as_list(), "verdict": c.verdict}
            for c in results.claims
        ],
        "accuracy": {
            name: {split: share.as_list() for split, share in task.accuracy.items()}
            for name, task in results.tasks.items()
        },
        "pairs": {
            name: {split: len(task.framed[split]) for split in SPLITS}
            for name, task in results.tasks.items()
            if not task.reason
        },
        "left_out": dict(results.left_out),
        "patching": {
            "task": patched.worked,
            "layers": {
                name: {d: [effects.of(i).as_list() for i in range(len(effects.edits))] for d, effects in by.items()}
                for name, by in patched.layers.items()
            },
            "heads": {d: _by_unit(effects) for d, effects in patched.heads.items()},
            "direct": {d: _by_unit(effects) for d, effects in patched.direct.items()},
            "roles": {
                role: [f"{head.layer}.{head.head}" for head in patched.roles if head.role == role] for role in ROLES
            },
        },
        "dictionaries": {quality.site: asdict(quality) for quality in results.qualities},
        "latents": {
            name: {"on_select": of.on_select, of.site: latent_figures(of) | direction_figures(of)}
            for name, of in results.latents.items()
        },
        "steering": steering_figures(results.steered),
        "restored": {name: results.restored.share(name).as_list() for name in results.restored.answers}
        if results.restored
        else {},
        "config": asdict(results.config),
        "seconds": dict(results.seconds),
        "processor_seconds": dict(results.processor),
        "versions": versions(),
    }


def _by_unit(effects: Effects) -> dict[str, list[float]]:
    """Effects of heads by `LAYER.HEAD`."""
    return {
        f"{edit.site.layer}.{edit.units[0]}": effects.of(number).as_list() for number, edit in enumerate(effects.edits)
    }


def page(results: RealResults) -> Page:
    model = results.model
    provenance = Provenance(model.name, model.fingerprint, results.config.sae, "", results.config.seed)
    time = ", ".join(
        f"{name} {seconds:.0f} s" + (f" (processor {used:.0f} s)" if (used := results.processor.get(name)) else "")
        for name, seconds in results.seconds.items()
    )
    sections = [
        claims_section(results.claims, results.beside),
        _tasks(results),
        *_patching(results.patched, model.n_heads),
    ]
    sections += [_tracing(results.traced)] if results.traced else []
    sections += [dictionaries_section(results.qualities)] if results.qualities else []
    sections += [latents_section(results.latents)] if results.latents else []
    sections += [steering_section(results.steered)] if results.steered else []
    sections += [restoration_section(results.restored)] if results.restored else []
    return Page(
        f"A real model: {model.name}", _lead(results), sections, Facts(provenance.facts() | {"time by stage": time})
    )


def _lead(results: RealResults) -> str:
    """The verdicts in a few sentences."""
    counts = {verdict: sum(c.verdict == verdict for c in results.claims) for verdict in ("shown", "not shown")}
    return (
        f"{len(results.claims)} claims tested on pairs that {results.model.name} gets right: {counts['shown']} shown, "
        f"{counts['not shown']} not shown, {len(results.claims) - sum(counts.values())} the opposite."
    )


def claims_section(claims: Sequence[Claim], beside: OtherRun | None = None) -> Section:
    others = [f"in {beside.name}"] if beside else []
    table = Table(
        ["claim", "measured", "figure", "verdict", *others],
        [
            (
                claim.claim,
                claim.measured,
                cell(claim.figure),
                claim.verdict,
                *([beside.verdict(claim)] if beside else []),
            )
            for claim in claims
        ],
        f"Effects are shares of the gap between clean and corrupted runs. {INTERVALS} A verdict follows from the "
        "interval alone: “not shown” where it contains the bound.",
    )
    return Section("Claims and verdicts", "", [table])


def _tasks(results: RealResults) -> Section:
    rows = [
        (TASKS[name].title, TASKS[name].prompts, *(cell(task.accuracy.get(split)) for split in SPLITS),
         len(task.framed.get("report", ())), task.reason)
        for name, task in results.tasks.items()
    ]  # fmt: skip
    examples = [
        (TASKS[name].title, pair.clean, pair.answer, pair.corrupted, pair.counter)
        for name, task in results.tasks.items()
        for pair in (task.pairs("report")[:1] if not task.reason else ())
    ]
    columns = ["task", "prompts", *(f"right, {split}" for split in SPLITS), "pairs used", "left out because"]
    blocks = [
        Table(columns, rows, f"A pair is right if the answer is ahead after the clean prompt and the counter-answer "
              f"after the corrupted one. {WILSON}", dict.fromkeys(columns[2:4], ".0%")),
        Table(["task", "clean", "answer", "corrupted", "counter-answer"], examples, "The first report pair of each."),
    ]  # fmt: skip
    reasons = " ".join(f"{name}: {reason}." for name, reason in results.left_out.items())
    return Section("Tasks", f"Left out: {reasons}" if reasons else "", blocks)


def _patching(patched: PatchingStage, n_heads: int) -> list[Section]:
    title = TASKS[patched.worked].title
    text = (
        "Denoising patches clean values into the corrupted run, noising corrupted values into the clean run. 0: base "
        "run, 1: source run."
    )
    blocks: list[Block] = []
    for name, by in patched.layers.items():
        labels = [str(edit.site) for edit in by["denoise"].edits]
        several = [bars(NAMES[d], [effects.of(i) for i in range(len(labels))]) for d, effects in by.items()]
        caption = f"n = {len(by['denoise'].clean)} report pairs. {INTERVALS}"
        blocks.append(BarChart(f"{title}: {name}", labels, several, "effect", caption))
    for kind, by in (("total effect", patched.heads), ("direct effect on the logits", patched.direct)):
        for d, effects in by.items():
            edits = EditTable.of(effects)
            caption = f"Each head's output z patched at all positions, n = {len(effects.clean)} report pairs."
            name = f"{NAMES[d].capitalize()}: heads, {kind}"
            blocks.append(replace(head_map(name, edits, edits.ran("head"), n_heads, caption), keys=None))
    sections = [Section(f"{title}: layers and heads", text, blocks)]
    if patched.roles:
        sections.append(_roles(patched))
    maps = [
        map_chart(f"{TASKS[name].title}, {NAMES[d]}: layer × position", task, effects)
        for name, task in patched.maps.items()
        for d, effects in task.effects.items()
    ]
    return [*sections, Section("Layer × position", "Each layer's output patched at one position.", maps)]


def map_chart(title: str, task: TaskMap | Tracing, effects: Effects) -> HeatMap:
    """A map of sites by position over the pairs of one form."""
    edits = EditTable.of(effects)
    positions = sorted({edit.position for edit in effects.edits if edit.position is not None})
    names = {key.site: key.site for key in edits.keys}
    columns = {position: task.columns[position] for position in positions}
    numbers = [number for number, changed in enumerate(edits.changed) if changed]
    caption = f"n = {task.pairs} report pairs of one form; tokens in brackets vary by pair."
    return replace(draw_map(title, edits, numbers, site_and_position, names, columns, caption), keys=None)


def _roles(patched: PatchingStage) -> Section:
    columns = ["head", "role", "total, denoising", "total, noising", "direct", "object over name", "first over object"]
    largest = np.argsort([-max(abs(h.total.value), abs(h.direct.value)) for h in patched.roles], kind="stable")[:12]
    shown = [h for i, h in enumerate(patched.roles) if h.role or i in largest]
    rows = [
        (f"{h.layer}.{h.head}", h.role, *map(cell, (h.total, h.noising, h.direct, h.object_over_repeated,
                                                    h.first_over_object)))
        for h in shown
    ]  # fmt: skip
    caption = (
        "Heads with a role, and the twelve with the largest effects. Object over name: attention from the last token "
        "to the indirect object minus that to the repeated name; first over object: attention from the repeated name "
        f"to its first mention minus that to the indirect object. {INTERVALS} They are not corrected for the number of "
        "heads."
    )
    text = f"Criteria, with effects of at least {LEAST:g} of the gap: " + "; ".join(map(": ".join, ROLES.items())) + "."
    return Section("Roles of heads", text, [Table(columns, rows, caption)])


def _tracing(traced: Tracing) -> Section:
    text = (
        "Clean values are restored in corrupted runs: with noise on the subject's embeddings (3 standard deviations of "
        "all embeddings), or with another subject. MLPs are restored in windows of a quarter of the layers, named by "
        "the middle one."
    )
    kinds = (("states", traced.states), ("MLP windows", traced.mlps))
    maps = [map_chart(f"{name}: {kind}", traced, effects) for kind, by in kinds for name, effects in by.items()]
    return Section("Causal tracing of facts", text, maps)
