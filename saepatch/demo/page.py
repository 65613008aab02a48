"""The demo's report, built from the sections of `saepatch.pages`."""

from collections.abc import Sequence
from dataclasses import asdict, replace

from saepatch import report
from saepatch.demo.looks import BY_POSITION
from saepatch.demo.results import Condition, Findings, RestoredRefusals, Steering
from saepatch.engine.components import PatchDirection
from saepatch.measure.controls import DRAWS
from saepatch.pages.cards import anchors_of, cards_section, coloured
from saepatch.pages.charts import INTERVALS, WILSON, band, bars, cell, effect_chart, estimate_text
from saepatch.pages.overview import dictionary_facts, headline_section, splice_section
from saepatch.pages.sweeps.maps import (
    EACH,
    EditTable,
    PromptTokens,
    draw_map,
    edit_table,
    head_map,
    on_one_scale,
    positions_of,
    site_and_position,
    site_key,
    unit_and_position,
    unit_of,
)
from saepatch.reading.cards import Card, ReadText
from saepatch.records.provenance import Provenance
from saepatch.records.statistics import wilson_share
from saepatch.report.text import number
from saepatch.restoration.judges import OUTCOME_WORDS
from saepatch.restoration.restore import judge

KEPT = 0.95  # share of the cross-entropy that a dictionary should keep
CHANCE = 0.05  # a warning is given if random latents lead to a larger share of refusals
SHOWN = {True: "shows it", False: "does not"}


def page(results: Findings, provenance: Provenance) -> report.Page:
    """Build the report of a demo run."""
    patching, restoration = results.patching, results.restoration
    sixteen = patching.denoise.sizes.index(16)
    rates, k = restoration.rates, len(restoration.latents)
    lead = (
        f"In {results.config.model}, patching 16 of {patching.dictionary.d_sae} latents at {patching.site}, chosen for "
        "each prompt by its own gradients, restores "
        f"{percent(patching.denoise.top[sixteen].value)} of the logit difference on indirect objects; 16 random live "
        f"latents restore {percent(patching.denoise.random[sixteen].value)}, and one set of 16 chosen on prompts with "
        f"other names restores {percent(patching.fixed.top[sixteen].value)}. Restoring {k} latents at "
        f"{restoration.site} raises refusals of jailbroken requests from {percent(rates['jailbroken'].value)} to "
        f"{percent(rates['restored'].value)}; as many random latents reach {percent(rates['random'].value)}."
    )
    sections = [headline_section(_headline(results), _notices(results)), _model(results), _splice(results)]
    sections += [_patching(results), _where(results), _restoration(results)]
    sections += [_steering(each, results.steering_texts.get(each.concept, ())) for each in results.steering]
    sections.append(
        cards_section(
            results.cards,
            "Cards of the latents with the largest effects in patching, restoration and steering",
            "texts that the dictionary was not trained on",
            "",
            lambda card: _role(results, card),
        )
    )
    time = ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in results.seconds.items())
    named = {str(site): {"name": sae.name, "hash": sae.fingerprint} for site, sae in results.saes.items()}
    facts = report.Facts(provenance.facts() | dictionary_facts(named) | {"time": time})
    return report.Page("saepatch: latents patched, restored and steered", lead, sections, facts)


def percent(share: float) -> str:
    """A share as a whole percentage, without "-0"."""
    return f"{round(100 * share)} %"


def _headline(results: Findings) -> dict[str, str]:
    p, r = results.patching, results.restoration
    sixteen = p.denoise.sizes.index(16)
    return {
        "16 latents, each prompt's own: logit difference restored": estimate_text(p.denoise.top[sixteen]),
        "16 latents, one set for all prompts": estimate_text(p.fixed.top[sixteen]),
        "16 random live latents": estimate_text(p.denoise.random[sixteen]),
        f"jailbroken requests refused, {len(r.latents)} latents restored": estimate_text(r.rates["restored"], ".0%"),
        "… nothing restored": estimate_text(r.rates["jailbroken"], ".0%"),
        "… as many random latents": estimate_text(r.rates["random"], ".0%"),
    }


def _notices(results: Findings) -> list[str]:
    p, r = results.patching, results.restoration
    sixteen = p.denoise.sizes.index(16)
    warnings = [
        "The model's behaviours were planted: these figures show that the tools find them, and say nothing about "
        "large models."
    ]
    own, fixed = p.denoise.top[sixteen].value, p.fixed.top[sixteen].value
    if fixed < 0.5 * own:
        warnings.append(
            f"Latents ranked on the same prompts they are patched in restore {own:.0%}, one set ranked on other names "
            f"{fixed:.0%}: most of the effect is specific to single names, not to the task."
        )
    if r.rates["harmless_clamped"].value > CHANCE:
        warnings.append(
            f"Setting the {len(r.latents)} latents to their mean over refused requests makes the model refuse "
            f"{r.rates['harmless_clamped'].value:.0%} of harmless requests: they represent refusal, not harmfulness."
        )
    if r.share_of_active >= 0.5:
        warnings.append(
            f"{len(r.latents)} latents are a small share of the dictionary, but {r.share_of_active:.1f} times as many "
            "as are active at one position."
        )
    for quality in results.quality:
        if quality.ce_recovered < KEPT:
            kept = f"{quality.ce_recovered:.1%}"
            warnings.append(f"The dictionary at {quality.site} keeps only {kept} of the cross-entropy.")
        if quality.alive_share < 0.5:
            warnings.append(
                f"{1 - quality.alive_share:.0%} of the latents at {quality.site} never fire in held-out text."
            )
    warnings += [
        f"Restoring {name} latents also leads to {r.rates[name].value:.0%} refusals: the effect is not specific to the "
        "chosen latents."
        for name in ("random", "matched", "differing")
        if r.rates[name].value > CHANCE
    ]
    return warnings


def _model(results: Findings) -> report.Section:
    pairs = [(task, m.get("accuracy"), m.get("top1")) for task, m in results.tasks.items() if "accuracy" in m]
    others = [
        (task, measure.replace("_", " "), value)
        for task, measures in results.tasks.items()
        for measure, value in measures.items()
        if measure not in ("accuracy", "top1")
    ]
    text = (
        "The embedded model is small and its behaviours are planted: tasks, a bias in loan decisions, refusal, and "
        "jailbreaks that defeat it were trained in, so the ground truth is known. Measured on prompts of the `report` "
        "split. Accuracy is the share of clean and corrupted prompts whose right answer has a higher logit than the "
        "wrong one; top 1 is the share where it is the top token."
    )
    tables = [
        report.Table(["task", "accuracy", "top 1"], pairs, formats={"accuracy": ".1%", "top 1": ".1%"}),
        report.Table(["task", "measure", "value"], others, formats={"value": ".1%"}),
    ]
    return report.Section("The model and its tasks", text, tables)


def _splice(results: Findings) -> report.Section:
    return splice_section([asdict(q) | {"site": str(q.site)} for q in results.quality], "held-out text")


def _patching(results: Findings) -> report.Section:
    p = results.patching
    denoise, noise = p.singles
    anchors = anchors_of(results.cards)
    rows = []
    for latent in (edit.units[0] for edit in denoise.top(BY_POSITION)):
        anchor = anchors.get((p.site, str(latent)))
        name = report.Link(str(latent), anchor) if anchor else str(latent)
        rows.append((name, cell(denoise.of(latent)), cell(noise.of(latent)), int(denoise.ran[:, latent].sum())))
    table = report.Table(
        ["latent", "denoising", "noising", "pairs"],
        rows,
        f"The {BY_POSITION} latents at {p.site} that restore most when patched separately, at all positions; "
        f"n = {p.pairs} pairs; in the last column those in which it differs. "
        f"{INTERVALS}",
    )
    text = (
        f"The clean prompt names the indirect object once (logit difference {p.clean:.2f}); in the corrupted prompt, "
        f"the other name is the answer ({p.corrupted:.2f}). Denoising patches clean latents into the corrupted run "
        "(sufficiency), noising corrupted latents into the clean run (necessity), at all positions, keeping the error "
        "term. 0 is the base run, 1 the source run; nothing is clipped. Patching a run with itself changes no logit "
        f"by more than {p.self_patch_error:.1g}.\n\n"
        "In the first two charts, the top latents are chosen for each prompt by integrated gradients on that prompt, "
        "then patched exactly. In the third they are one fixed set, ranked on the `select` split, which has other "
        "names: its distance from the first chart shows how much of the effect is specific to single names. Most "
        "random and matched latents are equal in the two prompts, so that patching them changes nothing; the hardest "
        "control is drawn from the latents that differ in the pair."
    )
    blocks: list[report.Block] = [
        effect_chart("Denoising: each prompt's own top latents", p.denoise, p.pairs),
        effect_chart("Noising: each prompt's own top latents", p.noise, p.pairs),
        effect_chart("Denoising: one set of latents for all prompts", p.fixed, p.pairs),
        table,
    ]
    return report.Section("Patching: indirect objects", text, blocks)


def _where(results: Findings) -> report.Section:
    """Layer and position maps of both directions."""
    maps = results.maps
    names = report.token_text(maps.group[0].answer), report.token_text(maps.group[0].counter)
    text = (
        f"Streams and latents: the {len(maps.group)} pairs of the largest group of one form, so that a position means "
        "the same in all of them. Heads: all positions together, over more pairs. Above the columns are the clean "
        "prompt's tokens, below them the corrupted prompt's (`=`: the same); `…` differs between pairs. In the first "
        f"pair, the answer is {names[0]}, and {names[1]} in the corrupted prompt. `denoise` patches clean values "
        "into the corrupted run, `noise` corrupted values into the clean run. 0 is the base run, 1 the source run.\n\n"
        "Click on a cell (or move with the arrow keys and press Enter) to list its edits: for a layer and position, at "
        f"least the {EACH} latents of that layer's dictionary with the largest effects when patched there separately. "
        "Their effects do not add up to the effect of the layer, where all latents and the error term are patched "
        "together."
    )
    drawn = {direction: _maps(results, direction) for direction in maps.streams}
    kinds = zip(*(charts for charts, _ in drawn.values()), strict=True)
    twins = [heat for kind in kinds for heat in on_one_scale(kind)]  # those of one kind stand side by side
    tables: list[tuple[str, list[report.Simple]]] = [(direction, [table]) for direction, (_, table) in drawn.items()]
    return report.Section("Where: maps", text, [*twins, report.Choice("Edits of", tables)])


def _maps(results: Findings, direction: PatchDirection) -> tuple[list[report.HeatMap], report.Table]:
    """Three maps of a direction, and the table of the edits behind them."""
    maps, site, anchors = results.maps, results.patching.site, anchors_of(results.cards)
    edits = EditTable.of(maps.streams[direction], maps.latents[direction], maps.heads[direction])
    tokens = PromptTokens(maps.clean, maps.corrupted)
    best = [(site, "latent", str(edit.units[0])) for edit in results.patching.singles[0].top(BY_POSITION)]
    streams, latents, heads = (edits.ran(component) for component in ("stream", "latent", "head"))
    chosen = [number for number in latents if unit_of(edits.keys[number]) in best]
    units = [unit for unit in best if unit in {unit_of(edits.keys[number]) for number in chosen}]
    group = f"n = {len(maps.group)} pairs."
    columns, below = tokens.columns(positions_of(edits, streams))
    few, few_below = tokens.columns(positions_of(edits, chosen))
    layers = draw_map(
        f"Layer × position: {direction}",
        edits,
        streams,
        site_and_position,
        {name: name for name in dict.fromkeys(str(edit.site) for edit in maps.streams[direction].edits)},
        columns,
        f"A layer's whole output, {group}",
        lambda key: site_key(key, "latent"),
    )
    single = draw_map(
        f"Latents of {site} × position: {direction}",
        edits,
        chosen,
        unit_and_position,
        {unit: unit[2] for unit in units},
        few,
        f"The {len(units)} latents that restore most at all positions, patched at one position, {group}",
    )
    caption = (
        f"{direction}: the edits behind the cells of these maps. Of {len(maps.latents[direction].edits):,} edits of "
        f"one latent at one position, each run exactly, the table has those in the last map and the {EACH} largest "
        f"of each layer and position, n = {len(maps.group)} pairs; also every head, n = {maps.head_pairs}. {INTERVALS} "
        "An edit that changes nothing in a pair has effect 0 there. Latents without a link have no card here: "
        "`saepatch latent SITE:LATENT` shows one."
    )
    listed = sorted({*edits.largest_by_cell(latents), *chosen}, key=lambda number: -edits.effects[number])
    heads_caption = f"Each head's output z at all positions, n = {maps.head_pairs} pairs."
    charts = [
        replace(layers, columns_below=below),
        head_map(f"Layer × head: {direction}", edits, heads, results.model.n_heads, heads_caption),
        replace(single, columns_below=few_below, anchors=[anchors.get((site, unit[2]), "") for unit in units]),
    ]
    return charts, edit_table(edits, [*listed, *heads], tokens, anchors, caption)


RATES = {
    "clean": "benign framing",
    "jailbroken": "jailbreak framing",
    "restored": "jailbreak, restored",
    "restored_generated": "jailbreak, restored: whole answers",
    "random": "jailbreak, random latents",
    "random_generated": "jailbreak, random: whole answers",
    "matched": "jailbreak, matched random latents",
    "differing": "jailbreak, random latents that differ",
    "whole_site": "jailbreak, whole site restored",
    "harmless": "harmless in a jailbreak framing",
    "harmless_restored": "harmless, restored",
    "harmless_restored_generated": "harmless, restored: whole answers",
    "harmless_clamped": "harmless, latents at refusal mean",
}


def _restoration(results: Findings) -> report.Section:
    r, n = results.restoration, results.restoration.rates["restored"].n
    chart = report.BarChart(
        "Share of prompts refused",
        list(RATES.values()),
        [bars("refused", [r.rates[key] for key in RATES])],
        caption=f"n = {n} requests of the report split (harmless: n = {r.rates['harmless'].n}). {WILSON}",
        value_range=(0.0, 1.0),
        value_format=".0%",
    )
    text = (
        "Each harmful request is put in a benign and in a jailbreak framing of equal length. Latents at "
        f"{r.site} are ranked on `select` by the change score S·‖d‖ at the last prompt position, their number is "
        f"chosen on `tune`, and all figures are from `report`. Restored: {len(r.latents)} latents, "
        f"{r.share_of_dictionary:.1%} of the dictionary, {r.share_of_alive:.1%} of its live latents. "
        f"That is {r.share_of_active:.1f} times the number of latents active at one position: few compared with the "
        "dictionary, but not with the active latents. Harmless requests are spared only because the donor reads their "
        "own benign framing: with the same latents set to their mean over refused requests, "
        f"{percent(r.rates['harmless_clamped'].value)} of harmless requests are refused.\n\n"
        "First-token figures patch the last prompt position. For whole answers, a donor run reads the benign prompt "
        "and the tokens generated so far, and the latents are set to its values at every step; "
        f"{r.rates['restored_degenerate_generated'].value:.0%} of those answers are degenerate text."
    )
    names = ("jailbroken", "restored", "random latents")
    comparisons = [
        _side_by_side(prompt, names, [OUTCOME_WORDS[judge(answer)] for answer in answers], answers)
        for prompt, *answers in r.examples[:4]
    ]
    blocks: list[report.Block] = [chart, _curve(r, n), *comparisons, *coloured(results.restoration_texts[:2])]
    return report.Section("Restoration: refusals under jailbreak", text, blocks)


def _side_by_side(
    prompt: str, names: Sequence[str], outcomes: Sequence[str], texts: Sequence[str]
) -> report.Comparison:
    columns = [(f"{name}: {outcome}", text) for name, outcome, text in zip(names, outcomes, texts, strict=True)]
    return report.Comparison(prompt, columns, changes=True, outcomes=(*OUTCOME_WORDS.values(), *SHOWN.values()))


def _curve(r: RestoredRefusals, n: int) -> report.LineChart:
    """Share of refusals against the share of the dictionary's latents restored."""
    sizes, top, other = zip(*r.curve)
    width = len(r.latents) / r.share_of_dictionary
    shares = [k / width for k in sizes]
    return report.LineChart(
        "Refusals against the share of latents restored",
        f"share of the dictionary's {width:,.0f} latents restored (log scale)",
        "share refused",
        [band("top latents", shares, top), band("random live latents", shares, other)],
        f"n = {n} jailbroken requests (report split), {', '.join(map(str, sizes))} latents; refusals by the first "
        f"token of the answer; random: mean of {DRAWS} draws. {WILSON}",
        log_x=True,
        y_range=(0.0, 1.0),
        y_format=".0%",
        x_format=".1%",
    )


def _steering(s: Steering, texts: Sequence[ReadText]) -> report.Section:
    rows = [(c.name, _sets(c), c.strength, cell(wilson_share(c.shown)), c.perplexity) for c in s.conditions]
    table = report.Table(
        ["condition", "latents", "strength", "success", "perplexity"],
        rows,
        f"n = {len(s.prompts)} prompts of the report split; each condition's strength was chosen on `tune`. {WILSON} "
        "Perplexity of the continuations under the unsteered model.",
        {"success": ".0%", "perplexity": ".2f", "strength": ".1f"},
    )
    text = (
        f"Latents at {s.site} are chosen by contrast on `select` at positions `{s.positions}`, and added at the same "
        "positions. At equal strength (in units of the top latent's largest activation), one latent, ten latents and "
        "random latents move the stream by the same distance."
    )
    names, firsts = [c.name for c in s.conditions], [c.outcomes[0] for c in s.conditions]
    comparisons = [
        _side_by_side(prompt, names, [SHOWN[first.shown[i]] for first in firsts], [first.texts[i] for first in firsts])
        for i, prompt in enumerate(s.prompts[:2])
    ]
    return report.Section(f"Steering: {s.concept}", text, [table, trade_off(s), *comparisons, *coloured(texts)])


def _sets(condition: Condition) -> str:
    if len(condition.sets) > 1:
        return f"{len(condition.sets)} draws of {len(condition.sets[0])}"
    return ", ".join(map(str, *condition.sets)) if condition.sets else "–"


def trade_off(s: Steering) -> report.LineChart:
    """Success against perplexity, for every strength tried."""
    series = []
    for name in dict.fromkeys(condition.name for condition in s.tried):
        own = [condition for condition in s.tried if condition.name == name]
        series.append(report.Series(name, [c.perplexity for c in own], [c.success for c in own]))
    strengths = ", ".join(number(c.strength) for c in s.tried if c.name == s.tried[0].name)
    return report.LineChart(
        "Success against perplexity",
        "perplexity of the continuations under the unsteered model",
        "share of prompts that show the concept",
        series,
        f"On `tune`; strengths along each line: {strengths}.",
        log_x=True,
        y_range=(0.0, 1.0),
        y_format=".0%",
    )


def _role(results: Findings, card: Card) -> list[report.Simple]:
    """The latent's role in this run."""
    roles: dict[str, str] = {}
    p, r = results.patching, results.restoration
    if card.site == p.site:
        for effects in p.singles:
            effect = estimate_text(effects.of(card.latent))
            roles[f"{effects.direction}, patched separately"] = f"{effect} of the logit difference"
    if card.site == r.site and card.latent in r.latents:
        roles["restored under jailbreaks"] = f"number {r.latents.index(card.latent) + 1} of {len(r.latents)}"
    for steering in results.steering:
        ten = steering.of("top10").sets[0]
        if card.site == steering.site and card.latent in ten:
            roles[f"steers towards {steering.concept}"] = f"number {ten.index(card.latent) + 1} of {len(ten)}"
    return [report.Facts(roles)] if roles else []
