"""The steering experiment's files: rows, summary, figures and report."""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from saepatch.model.language_model import LanguageModel
from saepatch.pages.charts import WILSON, band, cell
from saepatch.records.files import write_json, write_yaml
from saepatch.records.provenance import Provenance, versions
from saepatch.records.rows import write_records
from saepatch.records.statistics import Interval
from saepatch.records.tables import text_table
from saepatch.report import (
    Block,
    Comparison,
    Facts,
    LineChart,
    Page,
    Points,
    ScatterChart,
    Section,
    Table,
    write_figure,
    write_page,
)

from ..common.words import percent
from .baselines import FADE, ONE_TOKEN, PROBE
from .results import SteeringConfig, SteeringResult
from .stages import CANDIDATES, DENSE, NEUTRAL, PROMPTING, RANDOM, UNSTEERED, Point

METRICS = ("success", "degenerate", "perplexity", "kl", "distinct_1", "distinct_2", "repetition")


def write(
    steered: Sequence[SteeringResult], config: SteeringConfig, model: LanguageModel, out: Path, seconds: float
) -> tuple[Page, dict[str, Any]]:
    """Write rows, settings, figures, summary and report; returns the report, and the figures of each concept."""
    parts = []
    for result in steered:
        d = result.site.dictionary
        parts.append(
            (list(rows(result)), Provenance(model.name, model.fingerprint, d.name, d.fingerprint, config.seed))
        )
    write_records(parts, out / "rows.parquet")
    settings = {name: list(value) if isinstance(value, tuple) else value for name, value in asdict(config).items()}
    write_yaml(settings, out / "config.yaml")
    for result in steered:
        for name, chart in charts(result, config).items():
            write_figure(chart, out / f"{result.concept.name.replace(' ', '_')}_{name}.svg")
    figures = summary(steered, config, model)
    write_json(figures, out / "summary.json")
    facts = parts[0][1].facts() | {"time": f"{seconds:.0f} s"}
    lead = " ".join(verdict(result, config.sizes) for result in steered)
    sections = [_method(config), *(_section(result, config) for result in steered)]
    page = Page("Steering: one latent against several", lead, sections, Facts(facts))
    write_page(page, out / "report.html")
    return page, figures["concepts"]


# Words


def level(sizes: Sequence[int]) -> float:
    """Level of each interval of a difference from one latent, for 95 % over all sizes together (Bonferroni)."""
    return 1 - 0.05 / max(1, len(sizes) - 1)


def _compared(gaps: Mapping[int, Interval], at: str) -> str:
    reached = {k: gap for k, gap in gaps.items() if gap.n}
    if not reached:
        return f"At equal {at}, nothing can be compared."
    more = [f"{k} ({gap.value:+.2f})" for k, gap in reached.items() if gap.low > 0]
    fewer = [f"{k} ({gap.value:+.2f})" for k, gap in reached.items() if gap.high < 0]
    if not more and not fewer:
        k = max(reached, key=lambda size: abs(reached[size].value))
        return f"At equal {at}, no number of latents differs significantly from one (largest, {k}: {reached[k]})."
    parts = [f"{', '.join(more)} latents show it more often than one"] if more else []
    parts += [f"{', '.join(fewer)} {'less often' if more else 'latents show it less often than one'}"] if fewer else []
    return f"At equal {at}, {' and '.join(parts)}."


def verdict(steered: SteeringResult, sizes: Sequence[int]) -> str:
    """The conclusion on one concept."""
    single, bare = steered.chosen["top-1"], steered.unsteered
    best = max(sizes, key=lambda k: (steered.chosen[f"top-{k}"].success.value, -k))
    rival = steered.chosen[f"top-{best}"]
    words = (
        f"Towards {steered.concept.name} ({steered.site.dictionary.site}): one latent at its best strength "
        f"succeeds in {single.success.value:.0%} of prompts at perplexity {single.perplexity.value:.2f} (unsteered: "
        f"{bare.success.value:.0%}, {bare.perplexity.value:.2f})"
    )
    if best != 1:
        words += f", {best} latents in {rival.success.value:.0%} at {rival.perplexity.value:.2f}"
    norm = {k: steered.at_equal_norm(k, level(sizes)) for k in sizes[1:]}
    divergence = {k: steered.at_equal_divergence(k, level(sizes)) for k in sizes[1:]}
    return f"{words}. {_compared(norm, 'norm')} {_compared(divergence, 'divergence')}"


def printed(steered: Sequence[SteeringResult]) -> str:
    """The results as text tables."""
    lines = []
    for result in steered:
        lines += ["", f"{result.concept.name} at {result.site.dictionary.site}, n = {len(result.concept.report)}"]
        rows = [
            [
                point.way,
                f"{point.norm:.2f}",
                percent(point.success),
                *(f"{value:.2f}" for value in _measures(point)),
            ]
            for point in _lines(result)
        ]
        heads = ["", "strength", "success", "perplexity", "KL", "distinct-2", "repeated"]
        lines.append(text_table(heads, rows))
        sizes = [int(name.removeprefix("top-")) for name in result.norms if name.startswith("top-")]
        lines.append(verdict(result, sizes))
    return "\n".join(lines[1:])


def _measures(point: Point) -> tuple[float, ...]:
    return point.perplexity.value, point.kl.value, point.distinct(2).value, point.repetition.value


def _lines(steered: SteeringResult) -> list[Point]:
    prefixed = [point for point in (steered.prompting, steered.one_token) if point is not None]
    return [steered.unsteered, *steered.chosen.values(), *prefixed]


# Report


def _method(config: SteeringConfig) -> Section:
    return Section(
        "What is compared",
        f"The top K latents are added in proportion to each one's {config.unit_name}, so that together they move the "
        f"site by a given norm, in units of the first latent's {config.unit_name} times the norm of its decoder row. "
        "At equal norm, all methods move the site equally far. At equal divergence, the norm of each method is solved "
        "for such that KL(model ‖ steered) over the unsteered continuations of `tune` is the same, in nats per "
        "token.\n\n"
        "Latents are ranked by contrast on prompts that are not continued; output scores are measured on the first "
        f"{NEUTRAL} prompts of `tune`. Site and ranking (both by the average over numbers of latents, so that none is "
        "favoured) and each method's strength are chosen on `tune`, among strengths whose perplexity there is at most "
        f"{config.limit:g} times that without steering. All other figures are from `report`. Continuations are greedy, "
        f"at most {config.new_tokens} tokens long. One succeeds if it shows the concept and is not degenerate. "
        "Perplexity is that of the continuations under the unsteered model; distinct-n is the share of distinct "
        "n-grams in a text, repeated the share of 4-grams that occurred before in the text.\n\n"
        f"{RANDOM.capitalize()}: mean of {config.draws} live latents, one at a time, outside the first {CANDIDATES}; "
        "at equal divergence, draws that cannot reach it are replaced. "
        f"{DENSE.capitalize()}: the direction between the site's means with and without the concept. "
        f"{PROMPTING.capitalize()}: a prefix that asks for the concept or demonstrates it, the best on `tune` of those "
        "tried; the perplexity of its continuations is computed without it. "
        f"{ONE_TOKEN.capitalize()}: the best on `tune` of the tokens that most texts with the concept have and others "
        f"lack. {PROBE.capitalize()}: of a logistic regression on states with and without the concept. Fading at kept "
        f"norm: α/(1 + {FADE:g} t) at generated token t, the site rescaled to its norm.",
    )


def _section(steered: SteeringResult, config: SteeringConfig) -> Section:
    columns = ["method", "strength", "success", "degenerate", "perplexity", "KL", "distinct-2", "repeated", "overall"]
    table = Table(
        columns,
        [(p.way, p.norm, cell(p.success), p.degenerate.value, cell(p.perplexity), p.kl.value,
          p.distinct(2).value, p.repetition.value, cell(steered.overall[p.way])) for p in _lines(steered)],
        f"Each at the strength chosen on `tune`; n = {len(steered.concept.report)} report prompts. Success: 95 % "
        "Wilson score intervals; others: 95 % (t and studentised bootstrap). Overall: mean over continuations of the "
        "harmonic mean of concept, instruction and fluency, each from 0 to 2.",
        {"success": ".0%", "degenerate": ".0%", "perplexity": ".2f", "KL": ".2f", "strength": ".2g",
         "distinct-2": ".2f", "repeated": ".2f", "overall": ".2f"},
    )  # fmt: skip
    share = level(config.sizes)
    gaps = Table(
        ["latents", "at equal norm", "at equal divergence", "at the chosen strengths"],
        [
            (
                k,
                cell(steered.at_equal_norm(k, share)),
                cell(steered.at_equal_divergence(k, share)),
                cell(steered.at_chosen(k, share)),
            )
            for k in config.sizes[1:]
        ],
        "Success rate of K latents minus that of one, averaged over the strengths at which both are within the limit "
        "on perplexity (on `tune`), or over the divergences that both reach; "
        f"paired by prompt, {share:.2%} Bonett-Price intervals (95 % for all rows together).",
        {"latents": "d"} | dict.fromkeys(("at equal norm", "at equal divergence", "at the chosen strengths"), "+.2f"),
    )
    first = ", ".join(map(str, steered.order[: max(config.sizes)]))
    text = (
        f"{verdict(steered, config.sizes)}\n\nLatents ranked by {steered.order_name} at positions "
        f"`{steered.concept.positions}` of {steered.site.dictionary.site}: {first}. "
        f"Unit of strength: {steered.unit:.3g}."
    )
    if steered.prompting is not None:
        text += f" Prefix for prompting: `{steered.prefix.strip()}`"
    blocks: list[Block] = [table, *charts(steered, config).values(), gaps, _predicted(steered)]
    blocks += _choices(steered, config)
    bare = steered.unsteered
    columns_of = [
        bare,
        *(steered.chosen[f"top-{k}"] for k in (config.sizes[0], config.sizes[-1])),
        steered.chosen[DENSE],
    ]
    blocks += [
        Comparison(prompt, [(point.way, point.texts[i]) for point in columns_of])
        for i, prompt in enumerate(steered.concept.report[:4])
    ]
    return Section(f"Towards {steered.concept.name}", text, blocks)


def _predicted(steered: SteeringResult) -> Table:
    columns = ["latent", "output score", "KL", "success", "perplexity"]
    return Table(
        columns,
        [(p.latent, p.output_score, p.kl, p.success, p.perplexity) for p in steered.predictions],
        "Before steering, on `tune`: output score, and KL at one unit of strength (nats per token). Then each latent "
        f"alone on `report`, at the strength of top-1 ({steered.chosen['top-1'].norm:g}). Spearman correlation of "
        f"output score and success {rank_correlation(steered, 'output_score', 'success'):.2f}, of KL and perplexity "
        f"{rank_correlation(steered, 'kl', 'perplexity'):.2f}.",
        {"output score": ".3f", "KL": ".3f", "success": ".0%", "perplexity": ".2f"},
    )


def rank_correlation(steered: SteeringResult, one: str, other: str) -> float:
    """Spearman correlation over single latents of two of their figures; NaN where one does not vary."""
    from scipy import stats  # costs half a second

    values = [[getattr(each, name) for each in steered.predictions] for name in (one, other)]
    if any(len(set(each)) < 2 for each in values):
        return math.nan
    return float(stats.spearmanr(*values).statistic)


def _choices(steered: SteeringResult, config: SteeringConfig) -> list[Block]:
    sizes = config.sizes[::2]
    formats = {f"top-{k}": ".0%" for k in sizes}
    sites = Table(
        ["site", *formats],
        [(name, *(p.success.value for p in points)) for name, points in steered.by_site.items()],
        "On `tune`: success at the best strength, with latents ranked by mean difference.",
        formats,
    )
    orders = Table(
        ["ranked by", *formats],
        [(name, *(p.success.value for p in points)) for name, points in steered.by_order.items()],
        "On `tune`: success at the best strength, by ranking.",
        formats,
    )
    return [sites, orders]


def charts(steered: SteeringResult, config: SteeringConfig) -> dict[str, LineChart | ScatterChart]:
    """All figures of one concept by name."""
    n = len(steered.concept.report)
    both = {
        "norm": ("strength: norm of the perturbation", config.strengths, steered.norms),
        "divergence": ("divergence on tune, nats per token", config.divergences, steered.divergences),
    }
    drawn: dict[str, LineChart | ScatterChart] = {}
    for name, (label, xs, points) in both.items():
        drawn[name] = LineChart(
            f"{steered.concept.name}: success at equal {name}",
            label,
            "share that shows the concept",
            [
                band(way, xs, [None if point is None else point.success for point in several])
                for way, several in points.items()
            ],
            f"n = {n} report prompts; {RANDOM}: {_draws(points.get(RANDOM, ()))}. {WILSON}",
            log_x=True,
            y_range=(0.0, 1.0),
            y_format=".0%",
        )
    drawn["price"] = ScatterChart(
        f"{steered.concept.name}: success against perplexity",
        "perplexity under the unsteered model, log10",
        "share that shows the concept",
        [_cloud(way, each) for way, each in steered.norms.items()],
        f"One point per method and strength; n = {n} report prompts.",
    )
    return drawn


def _draws(points: Sequence[Point | None]) -> str:
    """Number of draws that the points are means over."""
    counts = sorted({len(point.draws) for point in points if point is not None})
    if not counts:
        return "none reaches any"
    return f"mean of {counts[0]} draws" if len(counts) == 1 else f"means of {counts[0]} to {counts[-1]} draws"


def _cloud(way: str, points: Sequence[Point]) -> Points:
    xs = [math.log10(point.perplexity.value) if point.perplexity.n else None for point in points]
    return Points(way, xs, [p.success.value for p in points], [f"strength {p.norm:g}" for p in points])


# Files


def rows(steered: SteeringResult) -> Iterator[dict[str, Any]]:
    """A row for each continuation of a report prompt."""
    several: list[tuple[str, float, Point | None]] = [("own", p.norm, p) for p in _lines(steered)]
    for by, points in (("norm", steered.norms), ("divergence", steered.divergences)):
        for each in points.values():
            several += [(by, p.norm, p) for p in each if p is not None]
    for by, norm, point in several:
        if point is None:
            continue
        for number, draw in enumerate(point.draws):
            for i, prompt in enumerate(steered.concept.report):
                kl = None if draw["kl"] is None else draw["kl"][i]
                yield {
                    "concept": steered.concept.name,
                    "site": str(steered.site.dictionary.site),
                    "way": point.way,
                    "draw": number,
                    "compared_by": by,
                    "strength": float(norm),
                    "norm": float(norm * steered.unit),
                    "prompt": prompt,
                    "continuation": draw["texts"][i],
                    "shown": bool(draw["shown"][i]),
                    "nll": float(draw["nll"][i]),
                    "tokens": int(draw["tokens"][i]),
                    "kl": float("nan") if kl is None else float(kl),
                }


def summary(steered: Sequence[SteeringResult], config: SteeringConfig, model: LanguageModel) -> dict[str, Any]:
    """The contents of summary.json; intervals are [value, low, high]."""
    return {
        "model": model.name,
        "sizes": config.sizes,
        "strengths": config.strengths,
        "divergences": config.divergences,
        "concepts": {result.concept.name: _figures(result, config) for result in steered},
        "verdicts": {result.concept.name: verdict(result, config.sizes) for result in steered},
        "seed": config.seed,
        "versions": versions(),
    }


def _figures(steered: SteeringResult, config: SteeringConfig) -> dict[str, Any]:
    share = level(config.sizes)
    return {
        "site": str(steered.site.dictionary.site),
        "positions": steered.concept.positions,
        "prompts": len(steered.concept.report),
        "latents": list(steered.order[: max(config.sizes)]),
        "chosen_by": steered.order_name,
        "unit": steered.unit,
        "prefix": steered.prefix,
        "chosen": {UNSTEERED: _numbers(steered.unsteered)}
        | {way: _numbers(point) for way, point in steered.chosen.items()}
        | ({} if steered.prompting is None else {PROMPTING: _numbers(steered.prompting)})
        | ({} if steered.one_token is None else {ONE_TOKEN: _numbers(steered.one_token)}),
        "one_token_prefix": steered.one_token_prefix,
        "overall": {way: each.as_list() for way, each in steered.overall.items()},
        "predictions": [asdict(each) for each in steered.predictions],
        "predicted": {
            "output score and success": rank_correlation(steered, "output_score", "success"),
            "KL and perplexity": rank_correlation(steered, "kl", "perplexity"),
        },
        "norms": {way: [_numbers(p) for p in points] for way, points in steered.norms.items()},
        "divergences": {
            way: [None if p is None else _numbers(p) for p in points] for way, points in steered.divergences.items()
        },
        "more_than_one_latent": {
            str(k): {
                "norm": steered.at_equal_norm(k, share).as_list(),
                "divergence": steered.at_equal_divergence(k, share).as_list(),
                "own": steered.at_chosen(k, share).as_list(),
            }
            for k in config.sizes[1:]
        },
        "sites": {name: [p.success.value for p in points] for name, points in steered.by_site.items()},
        "chosen_by_success": {name: [p.success.value for p in points] for name, points in steered.by_order.items()},
    }


def _numbers(point: Point) -> dict[str, Any]:
    values = [point.success, point.degenerate, point.perplexity, point.kl]
    values += [point.distinct(1), point.distinct(2), point.repetition]
    return {"strength": point.norm} | {name: value.as_list() for name, value in zip(METRICS, values, strict=True)}
