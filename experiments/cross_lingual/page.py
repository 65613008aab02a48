"""The report, summary and rows of the experiment on languages."""

from dataclasses import asdict
from pathlib import Path
from typing import Any

from saepatch.model.language_model import LanguageModel
from saepatch.pages.charts import INTERVALS, WILSON, band, cell
from saepatch.records.provenance import Provenance
from saepatch.records.rows import write_records
from saepatch.records.statistics import Interval
from saepatch.report import Block, Cell, Facts, LineChart, Page, Section, Table

from ..common.tracked import conclude
from .results import CrossLingualConfig, CrossLingualResults, DepthOf

NAMES = ("own", "transfer", "matched", "home")


def write(config: CrossLingualConfig, model: LanguageModel, results: CrossLingualResults) -> None:
    """Write the report, summary, rows and settings, and log them to trackers."""
    provenance = Provenance(model.name, model.fingerprint, config.sae, "", config.seed)
    write_records([(rows(results), provenance)], Path(config.out) / "results.parquet")
    figures: dict[str, Any] = {
        "pairs": dict(results.counts),
        "left_out": dict(results.left_out),
        "shared": {
            site: {name: _figures(asdict(each)) for name, each in some.items()} for site, some in results.shared.items()
        },
        "depth": {
            name: {
                "concept": {str(n): share.as_list() for n, share in zip(each.layers, each.concept, strict=True)},
                "language": {str(n): share.as_list() for n, share in zip(each.layers, each.language, strict=True)},
                "unpatched": list(each.unpatched),
            }
            for name, each in results.depth.items()
        },
    }
    given = {name: text for name, text in provenance.facts().items() if config.sae or name != "dictionary"}
    page = Page("What do languages share?", verdict(results), _sections(results), Facts(given))
    conclude(config, "cross-lingual", page, figures, {"depth": figures["depth"]})


def _figures(shared: dict[str, Any]) -> dict[str, Any]:
    return {n: [v["value"], v["low"], v["high"]] if isinstance(v, dict) else v for n, v in shared.items()}


def rows(results: CrossLingualResults) -> list[dict[str, Any]]:
    """One row for each figure: by site and languages for latents, by layer and languages for depths."""
    made = []
    for site, some in results.shared.items():
        for name, each in some.items():
            for what in ("overlap", "chance", "ceiling"):
                made.append(_row(name, site, what, Interval.withheld(getattr(each, what), 0, "of one ranking")))
            made += [_row(name, site, what, getattr(each, what)) for what in NAMES]
    for name, depth in results.depth.items():
        for what, shares in (("concept", depth.concept), ("language", depth.language)):
            made += [_row(name, f"resid_post.{layer}", what, s) for layer, s in zip(depth.layers, shares, strict=True)]
    return made


def _row(languages: str, site: str, what: str, figure: Interval) -> dict[str, Any]:
    return {"languages": languages, "site": site, "what": what, "value": figure.value, "low": figure.low,
            "high": figure.high, "n": figure.n}  # fmt: skip


def crossing(depth: DepthOf, shares: tuple[Interval, ...]) -> str:
    """The first layer from which on the source wins in most prompts."""
    ahead = [share.value > 0.5 for share in shares]
    start = next((layer for i, layer in enumerate(depth.layers) if all(ahead[i:])), None)
    return "no layer" if start is None else f"layer {start}"


def verdict(results: CrossLingualResults) -> str:
    """What is shared at the site where most transfers, and where concept and language are decided."""
    text = ""
    for name in results.depth:
        sites = {site: some[name] for site, some in results.shared.items()}
        if sites:
            site = max(sites, key=lambda each: sites[each].own.value)
            best = sites[site]
            text += (
                f"{name}, at {site} (where the target language's own latents do most): overlap {best.overlap:.0%} "
                f"(chance {best.chance:.0%}, halves of one language {best.ceiling:.0%}); transfer {best.transfer}, own "
                f"{best.own}, matched {best.matched}, in its own language {best.home}. "
            )
        depth = results.depth[name]
        text += (
            f"{name}: the last token's state brings its country along from {crossing(depth, depth.concept)} on, its "
            f"language from {crossing(depth, depth.language)} on. "
        )
    return text.strip()


def _sections(results: CrossLingualResults) -> list[Section]:
    counts = ", ".join(f"{count} parallel pairs on {split}" for split, count in results.counts.items())
    left = ", ".join(f"{name}: {count}" for name, count in results.left_out.items())
    columns = ["languages", "site", "overlap", "chance", "ceiling", *NAMES]
    table: list[list[Cell]] = [
        [name, site, each.overlap, each.chance, each.ceiling, *(cell(getattr(each, what)) for what in NAMES)]
        for site, some in results.shared.items()
        for name, each in some.items()
    ]
    caption = (
        "Overlap of A's first latents with B's, on other pairs of countries; chance: with latents matched to B's in "
        "frequency and size; ceiling: within A. Own: what B's latents restore in B; transfer: A's in B; matched: "
        f"latents matched to A's, in B; home: A's in A. {INTERVALS}"
    )
    charts: list[Block] = [
        LineChart(
            name,
            "layer",
            "share of prompts",
            [band("concept", depth.layers, depth.concept), band("language", depth.layers, depth.language)],
            f"Unpatched: concept {depth.unpatched[0]:.0%}, language {depth.unpatched[1]:.0%}. {WILSON}",
            y_range=(0.0, 1.0),
            y_format=".0%",
        )
        for name, depth in results.depth.items()
    ]
    shares = dict.fromkeys(columns[2:5], ".0%")
    return [
        *([Section("Shared latents", f"{counts}; left out: {left}.", [Table(columns, table, caption, shares)])]
          if table else []),
        Section("Depth", "How often the source's concept, or its language, is likelier than the target's own.", charts),
    ]  # fmt: skip
