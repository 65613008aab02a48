"""The safety experiment's report, and its other files."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

from saepatch.pages.charts import WILSON, band, bars, cell
from saepatch.records.files import write_json, write_yaml
from saepatch.records.provenance import Provenance
from saepatch.records.rows import AnswerRow, write_rows
from saepatch.records.tables import text_table
from saepatch.report import (
    BarChart,
    Block,
    Chart,
    Comparison,
    Facts,
    LineChart,
    Page,
    Reference,
    Section,
    Series,
    Table,
    write_figure,
    write_page,
)

from .curves import SHARE_LIMIT, share_of
from .guards import FALSE_ALARMS
from .results import Result, SafetyResults
from .summary import acceptance, few, percent, spoken, summary, verdict


def write(experiment: SafetyResults, out: Path) -> tuple[Page, dict[str, Any]]:
    """Write rows, settings, figures, report and summary; returns the report, and the summary's figures by setting."""
    provenance = {result.setting.name: _provenance(experiment, result) for result in experiment.results}
    parts = []
    for result in experiment.results:
        for model in (result.setting.model, result.setting.other):
            if model is not None:
                whose = replace(provenance[result.setting.name], model=model.name, model_hash=model.fingerprint)
                parts.append((experiment.runs.answer_rows(result.setting, model), whose))
    write_rows(parts, out / "results.parquet", kind=AnswerRow)
    lists = {"sizes": list(experiment.config.sizes), "settings": list(experiment.config.settings)}
    write_yaml(asdict(experiment.config) | lists, out / "config.yaml")
    drawn = {result.setting.name: charts(result) for result in experiment.results}
    for setting, some in drawn.items():
        for name, chart in some.items():
            write_figure(chart, out / f"{setting}_{name}.svg")
    report, figures = page(experiment, drawn, provenance), summary(experiment)
    write_page(report, out / "report.html")
    write_json(figures, out / "summary.json")
    return report, {setting: figures[setting] for setting in drawn}


def _provenance(experiment: SafetyResults, result: Result) -> Provenance:
    setting, config = result.setting, experiment.config
    return setting.provenance(config.sae if setting.other is None else config.shared_sae, config.seed, setting.every)


def charts(result: Result) -> dict[str, Chart]:
    """The figures of one setting by file name."""
    curve, n = result.curve, len(result.setting.harmful["report"])
    sizes = [point.latents for point in curve.points]
    references = [
        Reference(float(result.dense.refused.mean()), "dense direction"),
        Reference(float(result.residual.refused.mean()), "whole residual"),
    ]

    refusals = LineChart(
        f"Refusals against latents restored ({result.setting.name})",
        "latents restored, over all sites together",
        "share of prompts refused",
        [
            band("top latents", sizes, [point.refused for point in curve.points]),
            band("random latents, as many per layer", sizes, [point.random for point in curve.points]),
            band("matched in frequency and size", sizes, [point.matched for point in curve.points]),
            band("later ranks, k to 2k", sizes, [point.later for point in curve.points]),
            band("harmless prompts, top latents", sizes, [point.harmless for point in curve.points]),
        ],
        f"n = {n} harmful requests of the report split, {len(result.setting.harmless['report'])} harmless ones; "
        f"answers judged by keywords. Bare {spoken(share_of([curve.bare]))}, donor {spoken(share_of([curve.donor]))}. "
        f"{WILSON}",
        log_x=True,
        references=references,
        y_range=(0.0, 1.0),
        y_format=".0%",
    )
    scores = LineChart(
        f"Refusal score against latents restored ({result.setting.name})",
        "latents restored, over all sites together",
        "refusal score, nats",
        [band("top latents", sizes, [point.score for point in curve.points])],
        "Log odds of a refusal's first token after the prompt; above 0 it is more likely than all others together, "
        "which need not lead to a refusal. Intervals: 95 % over prompts (t and studentised bootstrap).",
        log_x=True,
    )
    drawn: dict[str, Chart] = {"refusals": refusals, "scores": scores, "roc": _roc(result), "layers": _layers(result)}
    if result.neurons is not None:
        drawn["neurons"] = _neurons(result)
    return drawn


def _neurons(result: Result) -> LineChart:
    assert result.neurons is not None
    lines = []
    for name, curve in (("latents", result.curve), ("neurons (MLP units)", result.neurons)):
        shares = [point.latents / curve.total for point in curve.points]
        lines.append(band(name, shares, [point.refused for point in curve.points]))
        lines.append(band(f"random {name}", shares, [point.random for point in curve.points]))
    return LineChart(
        f"Latents and neurons at equal shares ({result.setting.name})",
        "share of the dictionary, or of all neurons, restored",
        "share of prompts refused",
        lines,
        f"The original claim is about {SHARE_LIMIT:.0%} of the neurons. {result.curve.total:,} latents of "
        f"{len(result.setting.sites)} layers; {result.neurons.total:,} neurons of all layers, ranked by change score. "
        f"{WILSON}",
        log_x=True,
        y_range=(0.0, 1.0),
        y_format=".0%",
    )


def _roc(result: Result) -> LineChart:
    detector = result.guards.detector
    return LineChart(
        f"The detector's ROC ({result.setting.name})",
        "share of harmless prompts flagged",
        "share of harmful prompts flagged",
        [Series(f"{len(detector.latents)} latents", [x for x, _ in detector.roc], [y for _, y in detector.roc])],
        f"On report prompts; area {detector.auroc:.3f}. The threshold, set on tune to flag at most {FALSE_ALARMS:.0%} "
        f"of harmless prompts, flags {percent(float(detector.alarmed.mean()))} here, and "
        f"{percent(float(detector.caught.mean()))} of harmful ones.",
        y_range=(0.0, 1.0),
    )


def _layers(result: Result) -> BarChart:
    names = [f"{layer.site} ({layer.latents})" for layer in result.layers]
    return BarChart(
        f"Which layers matter ({result.setting.name})",
        names,
        [
            bars("alone", [share_of([layer.alone]) for layer in result.layers]),
            bars("left out", [share_of([layer.without]) for layer in result.layers]),
        ],
        "share of prompts refused",
        f"The {result.latents} latents chosen on tune; in brackets, the number at each site. {WILSON}",
        value_range=(0.0, 1.0),
        value_format=".0%",
    )


def page(
    experiment: SafetyResults, drawn: Mapping[str, Mapping[str, Chart]], provenance: Mapping[str, Provenance]
) -> Page:
    lead = " ".join(f"{result.setting.title}: {verdict(result)}" for result in experiment.results)
    by_setting = {name: each.facts() for name, each in provenance.items()}
    facts = {}
    for setting, labels in by_setting.items():
        for label, value in labels.items():
            same = len({other[label] for other in by_setting.values()}) == 1
            facts[label if same else f"{label} ({setting})"] = value
    for result in experiment.results:
        if result.setting.other is not None:
            other = result.setting.other
            facts[f"donor ({result.setting.name})"] = f"{other.name} ({other.fingerprint})"
    facts["time"] = ", ".join(f"{name} {s:.0f} s" for name, s in experiment.seconds.items())
    sections = [part for result in experiment.results for part in _sections(result, drawn[result.setting.name])]
    return Page("How few latents bring refusals back?", lead, [_method(experiment), *sections], Facts(facts))


def _method(experiment: SafetyResults) -> Section:
    text = (
        "While the model answers, latents are overwritten with those of a donor, at all positions from the assistant's "
        "turn on; the donor reads the tokens written so far, with a cache of its own. The latents of all layers but "
        "the last fifth share one budget. The two models of setting A are read through dictionaries trained on both. "
        "Latents are ranked on `select`, by change score, signed difference or attribution of the refusal score; the "
        "ranking and the number of latents are chosen on `tune`; all figures are from `report`, which has other "
        "templates, verbs, targets and framings. Keywords classify answers as refusal, compliance or degenerate text; "
        "an answer that is neither a refusal nor useful counts as compliance.\n\n"
        "Random controls have as many latents at each layer, drawn from all that fire on text; matched ones have about "
        "the same firing frequency and size on the prompts used for ranking. The embedded model is small and its "
        "refusals are planted: these figures are about the method, not about large models."
    )
    return Section("Method", text)


def _sections(result: Result, drawn: Mapping[str, Chart]) -> list[Section]:
    return [_curve(result, drawn), _beside(result, drawn), _guards(result, drawn)]


def _curve(result: Result, drawn: Mapping[str, Chart]) -> Section:
    curve, choice = result.curve, result.choice
    columns = ["latents", "of dictionary", "of alive", "of active", "refused", "random", "matched", "later", "harmless"]
    rows = [
        (
            point.latents,
            point.latents / curve.total,
            point.latents / curve.alive,
            point.latents / curve.active,
            *map(cell, (point.refused, point.random, point.matched, point.later, point.harmless)),
        )
        for point in curve.points
    ]
    formats = {"latents": "d", "of dictionary": ".2%", "of alive": ".2%", "of active": ".2f"}
    formats |= dict.fromkeys(columns[4:], ".0%")
    table = Table(columns, rows, f"On report prompts. {WILSON}", formats)
    text = (
        f"{verdict(result)}\n\nChosen on `tune`: {result.latents} latents ranked by {choice.ranking}, with which "
        f"{spoken(choice.refused)} of its prompts were refused."
    )
    examples = [
        Comparison(
            prompt,
            [(name, answered.texts[i]) for name, answered in zip(EXAMPLES, result.examples, strict=True)],
            ["cannot"],
        )
        for i, prompt in enumerate(result.setting.harmful["report"].prompts[:4])
    ]
    return Section(result.setting.title, text, [drawn["refusals"], drawn["scores"], table, *examples])


EXAMPLES = ("bare", "restored", "all latents restored", "donor")


def _beside(result: Result, drawn: Mapping[str, Chart]) -> Section:
    curve, point = result.curve, few(result)
    controls = Table(
        ["condition", "refused"],
        [
            ("nothing restored", cell(share_of([curve.bare]))),
            (f"{point.latents} latents", cell(point.refused)),
            ("dense direction, one per site", cell(share_of([result.dense]))),
            ("all latents of the sites", cell(share_of([result.everything]))),
            ("whole residual", cell(share_of([result.residual]))),
            ("reconstruction only", cell(share_of([result.reconstruction]))),
            ("the donor itself", cell(share_of([curve.donor]))),
        ],
        WILSON,
        {"refused": ".0%"},
    )
    depth = Table(
        ["up to", "whole residual", "all latents", "first token of a refusal most likely"],
        [
            (str(d.last), cell(share_of([d.residual])), cell(share_of([d.latents])), float(d.latents.opened.mean()))
            for d in result.depths
        ],
        "All sites up to one restored whole: an upper bound for any latents there.",
        dict.fromkeys(("whole residual", "all latents", "first token of a refusal most likely"), ".0%"),
    )
    framings = Table(
        ["framings held out", "prompts", "bare", "donor", "restored", "latents"],
        [
            (h.name, h.prompts, cell(h.bare), cell(h.donor), cell(h.restored), ", ".join(map(str, h.latents)))
            for h in result.held_out
        ],
        f"Kinds of framing: each half is held out in turn, with all choices made on the other half. {WILSON}",
        dict.fromkeys(("bare", "donor", "restored"), ".0%"),
    )
    kinds = Table(["kind of framing", "refused"], list(result.kinds.items()), "", {"refused": ".0%"})
    blocks: list[Block] = [drawn["neurons"]] if "neurons" in drawn else []
    blocks += [controls, depth, drawn["layers"], framings, kinds]
    return Section(f"{result.setting.name}: baselines, layers, framings", "", blocks)


def _guards(result: Result, drawn: Mapping[str, Chart]) -> Section:
    cost, guarded = result.utility, result.guards
    table = Table(
        ["guard", "harmful refused", "harmless refused", "times the bare model's time"],
        [(g.name, cell(g.refused), cell(g.harmless_refused), g.times) for g in guarded.guards],
        f"{len(guarded.harmless)} harmless prompts. Time: processor time of generation relative to the bare model, all "
        f"answers of equal length; for the triggered guard, computed from how often it is on, plus the time to read "
        f"its detector. {WILSON}",
        {"harmful refused": ".0%", "harmless refused": ".0%", "times the bare model's time": ".2f"},
    )
    names = ["refused", "degenerate", "KL (nats)", "CE bare", "CE restored"]
    rows = [
        (name, *map(cell, (u.refused, u.degenerate, u.kl, u.ce_bare, u.ce)))
        for name, u in (("restored from the setting's donor", cost), ("always-on guard", guarded.utility))
    ]
    utility = Table(
        ["harmless prompts", *names],
        rows,
        "KL(bare ‖ restored) and cross-entropy per token, over the bare model's answers.",
        {"refused": ".0%", "degenerate": ".0%", "KL (nats)": ".4f", "CE bare": ".4f", "CE restored": ".4f"},
    )
    held = [name.replace("_", " ") for name, value in acceptance(result).items() if value]
    failed = [name.replace("_", " ") for name, value in acceptance(result).items() if value is False]
    text = (
        "Guards use only what is available in deployment: in setting A the aligned model; in setting B, where an "
        "incoming request has no clean prompt, means of the latents over clean prompts, set at the last prompt "
        "position. The triggered guard restores only where a detector exceeds its threshold: a weighted sum of latents "
        "of the bare model's run over the prompt "
        f"({'largest values' if result.guards.detector.reading == 'largest' else 'at its last position'}).\n\n"
        f"Criteria met: {', '.join(held) or 'none'}. Failed: {', '.join(failed) or 'none'}."
    )
    return Section(f"{result.setting.name}: guards and utility", text, [table, drawn["roc"], utility])


def printed(experiment: SafetyResults) -> str:
    """The results as text tables."""
    parts = []
    for result in experiment.results:
        rows = [
            (
                point.latents,
                percent(point.latents / result.curve.total),
                *("–" if share is None else spoken(share) for share in (point.refused, point.random, point.matched)),
                "–" if point.harmless is None else percent(point.harmless.value),
            )
            for point in result.curve.points
        ]
        heads = [result.setting.name, "of dictionary", "refused", "random", "matched", "harmless refused"]
        parts += [text_table(heads, rows), verdict(result)]
    return "\n\n".join(parts)
