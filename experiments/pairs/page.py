"""The report of an experiment and the files beside it."""

from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np

from saepatch.measure.attribution import Attribution
from saepatch.measure.effects import Map, describe
from saepatch.pages.charts import (
    INTERVALS,
    attribution_chart,
    cell,
    comparison_chart,
    effect_chart,
    head_map,
    position_map,
)
from saepatch.records.files import write_json, write_yaml
from saepatch.records.provenance import Provenance, versions
from saepatch.records.rows import Row, write_rows
from saepatch.records.statistics import Interval
from saepatch.report import KEPT, Chart, Facts, Page, Section, Table, keep_page, write_figure, write_page

from .findings import AGREEMENT, NAMES, NO_HEADS, Found, largest, latent_rows, said, unsure, verdict
from .stages import CHOOSE_BY, DENSE, DIRECTIONS, Both


def write(found: Found, out: Path) -> Page:
    """Write the rows, the settings, the figures, the report and the summary; returns the report."""
    sae, model = found.best.dictionary, found.model
    provenance = Provenance(model.name, model.fingerprint, sae.name, sae.fingerprint, found.config.seed)
    write_rows([(rows(found), provenance)], out / "results.parquet")
    write_yaml(asdict(found.config) | {"sizes": list(found.config.sizes)}, out / "config.yaml")
    drawn = charts(found)
    for name, chart in drawn.items():
        write_figure(chart, out / f"{name}.svg")
    drawn_page = page(found, drawn, provenance)
    keep_page(drawn_page, out / KEPT)
    write_page(drawn_page, out / "report.html")
    write_json(summary(found), out / "summary.json")
    return drawn_page


def rows(found: Found) -> list[Row]:
    """Every exact effect; of attribution, the nodes that were checked, each method's estimate beside the exact one."""
    task = found.question.task
    maps = [found.streams[d] for d in DIRECTIONS] + [found.latents[d] for d in DIRECTIONS]
    alone = [found.tops[d] for d in DIRECTIONS]
    alone += [] if found.heads is None else [found.heads[d] for d in DIRECTIONS]
    alone += [one for d in DIRECTIONS for one in found.curves[d].effects]
    alone += [kind.effects[d] for kind in found.kinds[1:] for d in DIRECTIONS]  # latents are those of the curves
    made = [row for effects in maps for row in effects.rows(task, found.group_tokens)]
    made += [row for effects in alone for row in effects.rows(task)]
    for one in found.agreements:
        made += _checked(one.attribution).rows(task, found.tokens)
    return made


def _checked(found: Attribution) -> Attribution:
    """The nodes that were run exactly alone: all others of a large dictionary would be millions of rows."""
    assert found.verified is not None
    kept = found.verified.index
    columns = {name: getattr(found, name)[kept] for name in ("pair", "site", "unit", "position", "score")}
    return replace(found, **columns, verified=replace(found.verified, index=np.arange(len(kept))))


def charts(found: Found) -> dict[str, Chart]:
    """Every figure, by the name of its file."""
    site, group = found.best.site, f"n = {found.group} report pairs"
    tokens = (
        "Positions before the first change have no effect and are left out. Tokens in brackets differ from pair to "
        "pair, and are the first pair's, clean/corrupted. 0: base run, 1: source run."
    )
    drawn: dict[str, Chart] = {}
    for d in DIRECTIONS:
        title = f"{NAMES[d].capitalize()}: layer × position"
        caption = f"Each layer's output patched at one position, {group} of one form. {tokens}"
        drawn[f"layer_position_{d}"] = position_map(title, Map.of(found.streams[d]), found.columns, caption)
    for d in DIRECTIONS if found.heads is not None else ():
        title = f"{NAMES[d].capitalize()}: attention heads"
        caption = f"Each head's output z patched at all positions, n = {found.pairs} report pairs."
        drawn[f"layer_head_{d}"] = head_map(title, found.heads[d], found.model.n_heads, caption)  # type: ignore[index]
    for d in DIRECTIONS:
        title = f"{NAMES[d].capitalize()}: latents of {site} × position"
        caption = f"Each latent patched alone at one position, {group} of one form. {tokens}"
        cells = Map.of(found.latents[d])
        units = [name.removeprefix(f"{site} ") for name in cells.labels]
        drawn[f"latent_position_{d}"] = position_map(title, cells, found.columns, caption, units)
    for d in DIRECTIONS:
        drawn[d] = effect_chart(
            f"{NAMES[d].capitalize()}: the first latents of {site} together", found.curves[d], found.pairs
        )
    signed = [one.attribution for one in found.agreements if one.pearson == one.pearson]
    drawn["attribution"] = attribution_chart(
        "Attribution against exact effects",
        signed or [one.attribution for one in found.agreements],
        found.tokens,
        f"One point a node (a latent or an error term, at one position of one pair): for each method the "
        f"{found.config.verify} with the largest estimates and {found.config.sample} drawn at random from the others. "
        "GradDrop gives sizes without a sign, so it stands in the table alone.",
    )
    drawn["baselines"] = comparison_chart(
        f"Latents and other directions at {site}",
        [
            (kind.name, kind.sizes, [kind.effects["denoise"].of(i) for i in range(len(kind.sizes))])
            for kind in found.kinds
        ],
        f"Denoising, n = {found.pairs} report pairs; one set for all of them, ranked on select. {INTERVALS}",
    )
    return drawn


def page(found: Found, drawn: Mapping[str, Chart], provenance: Provenance) -> Page:
    facts = provenance.facts() | {"time": ", ".join(f"{name} {s:.0f} s" for name, s in found.seconds.items())}
    sections = [
        _prompts(found),
        _where(found, drawn),
        _site(found),
        _latents(found, drawn),
        _attribution(found, drawn),
        _directions(found, drawn),
    ]
    return Page(found.question.title, _lead(found), sections, Facts(facts))


def _lead(found: Found) -> str:
    curve = found.curves["denoise"]
    k = CHOOSE_BY if CHOOSE_BY in curve.sizes else curve.sizes[-1]
    place = curve.sizes.index(k)
    words = verdict(found.kinds, found.compared[-1], seed=found.config.seed)
    return (
        f"At {found.best.site} of {found.config.model}, chosen on other prompts, {k} latents restore "
        f"{curve.top[place]} of {found.question.difference}; {k} random live ones restore {curve.random[place]}. "
        f"{words}"
    )


def _prompts(found: Found) -> Section:
    effects = found.tops["denoise"]
    text = (
        f"{found.question.prompts} Over {found.pairs} report pairs {found.question.difference} is "
        f"{effects.clean.mean():.2f} in the clean run and {effects.corrupted.mean():.2f} in the corrupted one; the "
        f"right answer is ahead in {(effects.clean > 0).mean():.0%} of clean and {(effects.corrupted < 0).mean():.0%} "
        "of corrupted prompts. Everything is chosen on `select`; names, templates and objects of `report` are others."
    )
    table = Table(
        ["run", "prompt", "answer"],
        [
            row
            for pair in found.examples
            for row in (("clean", pair.clean, pair.answer), ("corrupted", pair.corrupted, pair.counter))
        ],
        f"The first {len(found.examples)} report pairs.",
    )
    if warning := unsure(effects, found.model.name):
        text += f"\n\n{warning}"
    return Section("The prompts", text, [table])


def _where(found: Found, drawn: Mapping[str, Chart]) -> Section:
    names = [name for name in drawn if name.startswith("layer_")]
    text = (
        "Denoising patches the clean run into the corrupted one (what is sufficient?), noising the other way round "
        "(what is necessary?). Whole layers at one position, and single attention heads at all of them, say where the "
        "difference between the two prompts is carried."
    )
    if found.heads is None:
        text += "\n\n" + NO_HEADS.format(model=found.model.name)
    return Section("Where: layers, positions, heads", text, [drawn[name] for name in names])


def _site(found: Found) -> Section:
    table = Table(
        ["site", "CE recovered", "select: denoise", "report: denoise", "report: noise"],
        [
            (
                f"{one.site}{' *' if one is found.best else ''}",
                one.ce_recovered,
                cell(one.chosen_by),
                *(cell(one.report[d]) for d in DIRECTIONS),
            )
            for one in found.sites
        ],
        f"The first {CHOOSE_BY} latents of each site's ranking, patched together at all positions; * is chosen. CE "
        f"recovered: share of the cross-entropy lost by zeroing the site that the reconstruction keeps. {INTERVALS}",
        {"CE recovered": ".4f"},
    )
    text = (
        "At every site that has a dictionary each latent is patched alone on `select`, and the latents are ranked by "
        f"what they restore. The site whose first {CHOOSE_BY} together restore most there is looked at below."
    )
    return Section("The site", text, [table])


def _latents(found: Found, drawn: Mapping[str, Chart]) -> Section:
    found_latents = latent_rows(found)
    table = Table(
        ["latent", "denoising", "q", "random", "matched", "noising"],
        [
            (int(name), cell(denoise), q, *(None if c is None else c.value for c in controls), cell(noise))
            for name, denoise, *controls, noise, q, _, _ in found_latents
        ],
        f"The first {len(found_latents)} latents of the ranking on select, in order of their effect on report, each "
        f"alone at all positions; n = {found.pairs} report pairs. Controls of denoising: means over single random live "
        "latents, and over ones that fire as often and write as much. q: false discovery rate of denoising among these "
        f"latents. {INTERVALS}",
        {"latent": "d", "q": ".2g"} | dict.fromkeys(("denoising", "random", "matched", "noising"), ".3f"),
    )
    text = (
        "All are ranked on `select`, so nothing here has been chosen on the prompts it is measured on. Error terms are "
        "kept; nothing is clipped."
    )
    blocks = [drawn[name] for name in drawn if name.startswith("latent_")]
    return Section("Latents at the chosen site", text, [*blocks, table, *(drawn[d] for d in DIRECTIONS)])


def _attribution(found: Found, drawn: Mapping[str, Chart]) -> Section:
    count = found.agreements[0].nodes
    table = Table(
        list(AGREEMENT),
        [(one.attribution.method, *one.correlations) for one in found.agreements],
        f"All methods on the same {count} nodes: those that any had checked. Sizes: |estimate| against |exact|.",
        dict.fromkeys(AGREEMENT[1:], ".3f"),
    )
    text = (
        "Attribution estimates the effect of every latent and error term at every position from gradients; exact "
        f"patching runs each edit. {len(found.agreements[0].attribution)} nodes differ between the runs of the report "
        "pairs. Denoising, in units of the metric."
    )
    rank = found.agreements[0].bound[0]
    heads = [f"effect of its no. {rank}", "as large in the draw", "not run", "as large, at most"]
    missed = Table(
        ["method", *heads],
        [
            (
                one.attribution.method,
                one.attribution.verified.threshold(one.bound[0]),
                *(one.bound[i] for i in (1, 3, 2)),
            )
            for one in found.agreements
            if one.attribution.verified is not None
        ],
        f"What each method can have missed: of the nodes that were not run, how many at most have an exact effect as "
        f"large as number {rank} of its {found.config.verify} largest estimates (95 % confidence, from the random draw "
        f"of {found.config.sample}).",
        {heads[3]: ",.0f"},
    )
    return Section("Attribution against exact", text, [table, drawn["attribution"], missed])


def _directions(found: Found, drawn: Mapping[str, Chart]) -> Section:
    tables = [
        Table(
            [NAMES[d], *(f"k = {k}" for k in found.compared)],
            [(kind.name, *(cell(kind.at(k, d, found.config.seed)) for k in found.compared)) for kind in found.kinds],
            f"{NAMES[d].capitalize()} with the first k of each kind together, at all positions; n = {found.pairs} "
            f"report pairs. {INTERVALS}",
            {f"k = {k}": ".3f" for k in found.compared},
        )
        for d in DIRECTIONS
    ]
    sae = found.best.dictionary
    text = (
        "The same experiment with other directions of the same site: its single dimensions, the principal components "
        f"of its values on the select prompts, and the {DENSE} (one direction). Units of each kind are ranked on "
        "`select` by their own exact effect, then the first k are patched together. Two things to weigh: principal "
        "components and means are taken from the select prompts of this very task, the dictionary was trained without "
        f"them; and it offers {sae.d_sae} latents to choose from, the site {sae.d_in} dimensions. All latents, the "
        f"error term kept, restore {found.curves['denoise'].every}; all dimensions are the site itself. Differences "
        "are paired by prompt.\n\n"
        f"Denoising. {' '.join(said(found))}\n\nNoising. {' '.join(said(found, 'noise'))}"
    )
    return Section("Latents against other directions", text, [drawn["baselines"], *tables])


def summary(found: Found) -> dict[str, Any]:
    effects = found.tops["denoise"]
    seed = found.config.seed
    return {
        "task": found.question.task,
        "model": found.config.model,
        "site": str(found.best.site),
        "ce_recovered": {str(one.site): one.ce_recovered for one in found.sites},
        "chosen_by": {str(one.site): _point(one.chosen_by) for one in found.sites},
        "pairs": found.pairs,
        "pairs_of_maps": found.group,
        "clean": float(effects.clean.mean()),
        "corrupted": float(effects.corrupted.mean()),
        "clean_right": float((effects.clean > 0).mean()),
        **{
            f"{d}_{name}": [[k, *_point(i)] for k, i in zip(found.curves[d].sizes, line, strict=True)]
            for d in DIRECTIONS
            for c in [found.curves[d]]
            for name, line in (("top", c.top), ("random", c.random), ("matched", c.matched))
        },
        "layer_position": _largest(found, found.streams),
        "heads": None if found.heads is None else _largest(found, found.heads),
        "latents": [
            {
                "latent": int(name),
                "denoise": _point(d),
                "noise": _point(n),
                "q_denoise": q,
                "q_noise": r,
                "differs": differs,
            }
            for name, d, _, _, n, q, r, differs in latent_rows(found)
        ],
        "attribution": [dict(zip(AGREEMENT, (one.attribution.method, *one.correlations))) for one in found.agreements],
        "directions": {
            kind.name: {
                d: {str(k): _point(kind.effects[d].of(i, seed)) for i, k in enumerate(kind.sizes)} for d in DIRECTIONS
            }
            for kind in found.kinds
        },
        "verdicts": {d: said(found, d) for d in DIRECTIONS},
        "seed": seed,
        "versions": versions(),
    }


def _largest(found: Found, effects: Both) -> list[dict[str, Any]]:
    """The largest cells of a map."""
    return [
        {
            "site": str(edit.site),
            "unit": describe(edit),
            "position": None if edit.position is None else found.columns[edit.position],
            "denoise": _point(denoise),
            "noise": None if noise is None else _point(noise),
        }
        for edit, denoise, noise in largest(effects)
    ]


def _point(interval: Interval) -> list[float]:
    return [interval.value, interval.low, interval.high]
