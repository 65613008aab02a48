"""The report of an experiment on pairs, and its other files."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from saepatch.engine.components import PATCH_DIRECTIONS
from saepatch.measure.attribution import Attribution
from saepatch.measure.results.effects import Effects, describe
from saepatch.measure.results.screen_display import attribution_chart
from saepatch.pages.charts import INTERVALS, band, cell, effect_chart, size_chart
from saepatch.pages.sweeps.maps import EditTable, draw_map, head_map, site_and_position, unit_and_position
from saepatch.records.files import write_json, write_yaml
from saepatch.records.provenance import Provenance, versions
from saepatch.records.rows import Row, write_rows
from saepatch.report import KEPT, Chart, Facts, HeatMap, Page, Section, Table, keep_page, write_figure, write_page
from saepatch.runs.parts import EditKey

from .findings import AGREEMENT, NAMES, NO_HEADS, StudyResults, largest, latent_rows, unsure, verdict, verdicts
from .stages import CHOOSE_BY, DENSE, Both


def write(study: StudyResults, out: Path) -> Page:
    """Write rows, settings, figures, report and summary; returns the report."""
    sae, model = study.best.dictionary, study.model
    provenance = Provenance(model.name, model.fingerprint, sae.name, sae.fingerprint, study.config.seed)
    write_rows([(rows(study), provenance)], out / "results.parquet")
    write_yaml(asdict(study.config) | {"sizes": list(study.config.sizes)}, out / "config.yaml")
    drawn = charts(study)
    for name, chart in drawn.items():
        write_figure(chart, out / f"{name}.svg")
    drawn_page = page(study, drawn, provenance)
    keep_page(drawn_page, out / KEPT)
    write_page(drawn_page, out / "report.html")
    write_json(summary(study), out / "summary.json")
    return drawn_page


def rows(study: StudyResults) -> list[Row]:
    """Rows of all exact effects, and of attribution's verified nodes: exact effect and each method's estimate."""
    task = study.question.task
    maps = [study.streams[d] for d in PATCH_DIRECTIONS] + [study.latents[d] for d in PATCH_DIRECTIONS]
    alone = [study.tops[d] for d in PATCH_DIRECTIONS]
    alone += [] if study.heads is None else [study.heads[d] for d in PATCH_DIRECTIONS]
    alone += [effects for d in PATCH_DIRECTIONS for effects in study.curves[d].effects]
    alone += [
        kind.effects[d] for kind in study.kinds[1:] for d in PATCH_DIRECTIONS
    ]  # the first are latents, as in the curves
    made = [row for effects in maps for row in effects.rows(task, study.group_tokens)]
    made += [row for effects in alone for row in effects.rows(task)]
    for agreement in study.agreements:
        made += _checked(agreement.attribution).rows(task, study.tokens)
    return made


def _checked(attribution: Attribution) -> Attribution:
    """Only the nodes that were run exactly: all nodes of a large dictionary would be millions of rows."""
    verified = attribution.verified
    assert verified is not None
    columns = {
        name: getattr(attribution, name)[verified.index] for name in ("pair", "site", "unit", "position", "score")
    }
    return replace(attribution, **columns, verified=replace(verified, index=np.arange(len(verified.index))))


def _by_position(title: str, effects: Effects, units: bool, study: StudyResults, caption: str) -> HeatMap:
    """A map of sites, or of single units of one site, by position, over the pairs of one form."""
    edits = EditTable.of(effects)
    positions = sorted({edit.position for edit in effects.edits if edit.position is not None})
    place: Callable[[EditKey], tuple[Any, int]] = unit_and_position if units else site_and_position
    names = {place(key)[0]: key.latent if units else key.site for key in edits.keys}
    columns = {position: study.columns[position] for position in positions}
    caption = (
        f"{caption}, n = {study.group} report pairs of one form. Positions before the first difference have no effect "
        "and are left out. Tokens in brackets vary by pair; those of the first pair are shown, clean/corrupted. 0: "
        "base run, 1: source run."
    )
    numbers = [number for number, changed in enumerate(edits.changed) if changed]
    return replace(draw_map(title, edits, numbers, place, names, columns, caption), keys=None)


def charts(study: StudyResults) -> dict[str, Chart]:
    """All figures by file name."""
    site, heads, names = study.best.site, study.heads, {d: NAMES[d].capitalize() for d in PATCH_DIRECTIONS}
    drawn: dict[str, Chart] = {}
    for d in PATCH_DIRECTIONS:
        title, caption = f"{names[d]}: layer × position", "Each layer's output patched at one position"
        drawn[f"layer_position_{d}"] = _by_position(title, study.streams[d], False, study, caption)
    for d, effects in (heads or {}).items():
        edits = EditTable.of(effects)
        caption = f"Each head's output z patched at all positions, n = {study.pairs} report pairs."
        chart = head_map(f"{names[d]}: attention heads", edits, edits.ran("head"), study.model.n_heads, caption)
        drawn[f"layer_head_{d}"] = replace(chart, keys=None)
    for d in PATCH_DIRECTIONS:
        title = f"{names[d]}: latents of {site} × position"
        caption = "Each latent patched alone at one position"
        drawn[f"latent_position_{d}"] = _by_position(title, study.latents[d], True, study, caption)
    for d in PATCH_DIRECTIONS:
        drawn[d] = effect_chart(f"{names[d]}: the first latents of {site} together", study.curves[d], study.pairs)
    signed = [agreement.attribution for agreement in study.agreements if agreement.pearson == agreement.pearson]
    drawn["attribution"] = attribution_chart(
        "Attribution against exact effects",
        signed or [agreement.attribution for agreement in study.agreements],
        study.tokens,
        f"One point per node (a latent or an error term, at one position of one pair): for each method the "
        f"{study.config.verify} with the largest estimates and {study.config.sample} drawn at random from the others. "
        "GradDrop estimates magnitudes without a sign, so only the table shows it.",
    )
    drawn["baselines"] = size_chart(
        f"Latents and other directions at {site}",
        "directions patched together",
        [
            band(kind.name, kind.sizes, [kind.effects["denoise"].of(i) for i in range(len(kind.sizes))])
            for kind in study.kinds
        ],
        f"Denoising, n = {study.pairs} report pairs; one set for all pairs, ranked on select. {INTERVALS}",
    )
    return drawn


def page(study: StudyResults, drawn: Mapping[str, Chart], provenance: Provenance) -> Page:
    facts = provenance.facts() | {"time": ", ".join(f"{name} {s:.0f} s" for name, s in study.seconds.items())}
    sections = [
        _prompts(study),
        _where(study, drawn),
        _site(study),
        _latents(study, drawn),
        _attribution(study, drawn),
        _directions(study, drawn),
    ]
    return Page(study.question.title, _lead(study), sections, Facts(facts))


def _lead(study: StudyResults) -> str:
    curve = study.curves["denoise"]
    k = CHOOSE_BY if CHOOSE_BY in curve.sizes else curve.sizes[-1]
    place = curve.sizes.index(k)
    words = verdict(study.kinds, study.compared[-1], seed=study.config.seed)
    return (
        f"At {study.best.site} of {study.config.model}, chosen on other prompts, {k} latents restore "
        f"{curve.top[place]} of {study.question.difference}; {k} random live latents restore {curve.random[place]}. "
        f"{words}"
    )


def _prompts(study: StudyResults) -> Section:
    effects = study.tops["denoise"]
    text = (
        f"{study.question.prompts} Over {study.pairs} report pairs {study.question.difference} is "
        f"{effects.clean.mean():.2f} in the clean run and {effects.corrupted.mean():.2f} in the corrupted one; the "
        f"right answer is ahead in {(effects.clean > 0).mean():.0%} of clean and {(effects.corrupted < 0).mean():.0%} "
        "of corrupted prompts. All rankings and choices are made on `select`; `report` has other names, templates and "
        "objects."
    )
    table = Table(
        ["run", "prompt", "answer"],
        [
            row
            for pair in study.examples
            for row in (("clean", pair.clean, pair.answer), ("corrupted", pair.corrupted, pair.counter))
        ],
        f"The first {len(study.examples)} report pairs.",
    )
    if warning := unsure(effects, study.model.name):
        text += f"\n\n{warning}"
    return Section("The prompts", text, [table])


def _where(study: StudyResults, drawn: Mapping[str, Chart]) -> Section:
    names = [name for name in drawn if name.startswith("layer_")]
    text = (
        "Denoising patches clean values into the corrupted run (what is sufficient?), noising patches corrupted values "
        "into the clean run (what is necessary?). Whole layers at one position, and single attention heads at all "
        "positions, show where the difference between the two prompts is carried."
    )
    if study.heads is None:
        text += "\n\n" + NO_HEADS.format(model=study.model.name)
    return Section("Where: layers, positions, heads", text, [drawn[name] for name in names])


def _site(study: StudyResults) -> Section:
    table = Table(
        ["site", "CE recovered", "select: denoise", "report: denoise", "report: noise"],
        [
            (
                f"{candidate.site}{' *' if candidate is study.best else ''}",
                candidate.ranked.ce_recovered,
                cell(candidate.ranked.chosen_by),
                *(cell(candidate.ranked.report[d]) for d in PATCH_DIRECTIONS),
            )
            for candidate in study.sites
        ],
        f"The first {CHOOSE_BY} latents of each site's ranking, patched together at all positions; * marks the chosen "
        "site; select: the half that was not ranked on. CE recovered: share of the loss from zeroing the site at every "
        f"position that the reconstruction avoids. {INTERVALS}",
        {"CE recovered": ".4f"},
    )
    text = (
        "At every site with a dictionary, each latent is patched alone on one half of the `select` pairs, and latents "
        f"are ranked by how much they restore. The site whose first {CHOOSE_BY} latents together restore most on the "
        "other half is chosen: on the pairs used for ranking, the first latents look better than they are."
    )
    return Section("The site", text, [table])


def _latents(study: StudyResults, drawn: Mapping[str, Chart]) -> Section:
    latents = latent_rows(study)
    table = Table(
        ["latent", "denoising", "q", "random", "matched", "noising"],
        [
            (int(name), cell(denoise), q, *(None if c is None else c.value for c in controls), cell(noise))
            for name, denoise, *controls, noise, q, _, _ in latents
        ],
        f"The first {len(latents)} latents of the ranking on select, in order of their effect on report, each patched "
        f"alone at all positions; n = {study.pairs} report pairs. Controls of denoising: means over single latents, "
        "random live ones or ones matched in firing frequency and size. q: false discovery rate of denoising over "
        f"these latents. {INTERVALS}",
        {"latent": "d", "q": ".2g"} | dict.fromkeys(("denoising", "random", "matched", "noising"), ".3f"),
    )
    text = (
        "Latents are ranked on `select` and measured on `report`, so there is no selection bias. Error terms are kept; "
        "nothing is clipped."
    )
    blocks = [drawn[name] for name in drawn if name.startswith("latent_")]
    return Section("Latents at the chosen site", text, [*blocks, table, *(drawn[d] for d in PATCH_DIRECTIONS)])


def _attribution(study: StudyResults, drawn: Mapping[str, Chart]) -> Section:
    count = study.agreements[0].nodes
    table = Table(
        list(AGREEMENT),
        [(agreement.attribution.method, *agreement.correlations) for agreement in study.agreements],
        f"All methods on the same {count} nodes: those that were verified for any method. Sizes: |estimate| against "
        "|exact|.",
        dict.fromkeys(AGREEMENT[1:], ".3f"),
    )
    text = (
        "Attribution estimates the effect of every latent and error term at every position from gradients; exact "
        f"patching runs each edit. {len(study.agreements[0].attribution)} nodes differ between the runs of the report "
        "pairs. Denoising, in units of the metric."
    )
    rank = study.agreements[0].bound[0]
    heads = [f"effect of its no. {rank}", "as large in the sample", "not run", "as large, at most"]
    missed = Table(
        ["method", *heads],
        [
            (
                agreement.attribution.method,
                agreement.attribution.verified.threshold(agreement.bound[0]),
                *(agreement.bound[i] for i in (1, 3, 2)),
            )
            for agreement in study.agreements
            if agreement.attribution.verified is not None
        ],
        f"Upper bound on what each method missed: the number of nodes, of those not run, with an exact effect as large "
        f"as number {rank} of its {study.config.verify} largest estimates (95 % confidence, from the random sample of "
        f"{study.config.sample}).",
        {heads[3]: ",.0f"},
    )
    return Section("Attribution against exact", text, [table, drawn["attribution"], missed])


def _directions(study: StudyResults, drawn: Mapping[str, Chart]) -> Section:
    tables = [
        Table(
            [NAMES[d], *(f"k = {k}" for k in study.compared)],
            [(kind.name, *(cell(kind.at(k, d, study.config.seed)) for k in study.compared)) for kind in study.kinds],
            f"{NAMES[d].capitalize()} with the first k of each kind together, at all positions; n = {study.pairs} "
            f"report pairs. {INTERVALS}",
            {f"k = {k}": ".3f" for k in study.compared},
        )
        for d in PATCH_DIRECTIONS
    ]
    sae = study.best.dictionary
    text = (
        "The same experiment with other directions of the same site: its single dimensions, the principal components "
        f"of its values on the half of `select` used for ranking, and the {DENSE} (one direction). Units of each kind "
        "are ranked on that half by their own exact effect, then the first k are patched together. Two caveats: "
        "principal components and means are fitted to prompts of this task, while the dictionary was trained without "
        f"them; and there are {sae.d_sae} latents to choose from, but {sae.d_in} dimensions. All latents together, "
        f"with the error term kept, restore {study.curves['denoise'].every}; all dimensions together are the site "
        "itself. Differences are paired by prompt.\n\n"
        f"Denoising. {' '.join(verdicts(study))}\n\nNoising. {' '.join(verdicts(study, 'noise'))}"
    )
    return Section("Latents against other directions", text, [drawn["baselines"], *tables])


def summary(study: StudyResults) -> dict[str, Any]:
    effects = study.tops["denoise"]
    seed = study.config.seed
    return {
        "task": study.question.task,
        "model": study.config.model,
        "site": str(study.best.site),
        "ce_recovered": {str(candidate.site): candidate.ranked.ce_recovered for candidate in study.sites},
        "chosen_by": {str(candidate.site): candidate.ranked.chosen_by.as_list() for candidate in study.sites},
        "pairs": study.pairs,
        "pairs_of_maps": study.group,
        "clean": float(effects.clean.mean()),
        "corrupted": float(effects.corrupted.mean()),
        "clean_right": float((effects.clean > 0).mean()),
        **{
            f"{d}_{name}": [[k, *i.as_list()] for k, i in zip(study.curves[d].sizes, line, strict=True)]
            for d in PATCH_DIRECTIONS
            for c in [study.curves[d]]
            for name, line in (("top", c.top), ("random", c.random), ("matched", c.matched))
        },
        "layer_position": _largest(study, study.streams),
        "heads": None if study.heads is None else _largest(study, study.heads),
        "latents": [
            {
                "latent": int(name),
                "denoise": d.as_list(),
                "noise": n.as_list(),
                "q_denoise": q,
                "q_noise": r,
                "differs": differs,
            }
            for name, d, _, _, n, q, r, differs in latent_rows(study)
        ],
        "attribution": [
            dict(zip(AGREEMENT, (agreement.attribution.method, *agreement.correlations)))
            for agreement in study.agreements
        ],
        "directions": {
            kind.name: {
                d: {str(k): kind.effects[d].of(i, seed).as_list() for i, k in enumerate(kind.sizes)}
                for d in PATCH_DIRECTIONS
            }
            for kind in study.kinds
        },
        "verdicts": {d: verdicts(study, d) for d in PATCH_DIRECTIONS},
        "seed": seed,
        "versions": versions(),
    }


def _largest(study: StudyResults, effects: Both) -> list[dict[str, Any]]:
    """The largest cells of a map, as summary.json holds them."""
    return [
        {
            "site": str(edit.site),
            "unit": describe(edit),
            "position": None if edit.position is None else study.columns[edit.position],
            "denoise": denoise.as_list(),
            "noise": None if noise is None else noise.as_list(),
        }
        for edit, denoise, noise in largest(effects)
    ]
