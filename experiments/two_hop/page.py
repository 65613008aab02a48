"""The report, summary and rows of the study of two-hop facts."""

from pathlib import Path
from typing import Any

import numpy as np

from saepatch.model.language_model import LanguageModel
from saepatch.pages.charts import WILSON, band, cell
from saepatch.records.provenance import Provenance
from saepatch.records.rows import write_records
from saepatch.report import Block, Cell, Facts, HeatMap, LineChart, Page, Reference, Section, Table

from ..common.tracked import conclude
from ..common.words import percent
from .results import MoveSweep, TwoHopConfig, TwoHopResults

OWN = "the same question"
SHARE = ".0%"


def write(config: TwoHopConfig, model: LanguageModel, results: TwoHopResults) -> None:
    """Write the report, summary, rows and settings, and log them to trackers."""
    provenance = Provenance(model.name, model.fingerprint, config.sae, "", config.seed)
    write_records([(rows(results), provenance)], Path(config.out) / "results.parquet")
    given = {name: text for name, text in provenance.facts().items() if config.sae or name != "dictionary"}
    page = Page("Do two hops compose?", verdict(results), _sections(results, config.seed), Facts(given))
    figures = summary(results, config.seed)
    conclude(config, "two-hop", page, figures, {"shares": figures["shares"]})


def rows(results: TwoHopResults) -> list[dict[str, Any]]:
    """One row for each kind of moves, split, query and move."""
    made = []
    for sweep in results.sweeps:
        for split, patched in sweep.split.items():
            given, places = patched.given(), patched.places()
            for i, query in enumerate(patched.queries):
                for j, move in enumerate(patched.moves):
                    made.append(
                        {"moves": sweep.name, "split": split, "example": query.example, "source": query.source,
                         "target": query.target, "read": str(move.read), "write": str(move.write),
                         "wanted": query.wanted, "given": bool(given[i, j]),
                         "log_p": float(patched.log_p[i, j, places[i]]),
                         "unpatched_log_p": float(patched.plain_log_p[i, places[i]])}
                    )  # fmt: skip
    return made


def summary(results: TwoHopResults, seed: int) -> dict[str, Any]:
    sweeps = {}
    for sweep in results.sweeps:
        move, share = sweep.chosen()
        sweeps[sweep.name] = {
            "queries": len(sweep.report.queries),
            "left_out": dict(sweep.left_out),
            "best move on select": str(move),
            "share": share.as_list(),
            "unpatched": float(sweep.report.given_unpatched().mean()),
            **({name: _listed(sweep, back, seed) for name, back in BOTH.items()} if sweep.name.startswith(OWN) else {}),
        }
    shares = {name: each.as_list() for name, each in vars(results.shares).items() if each is not None}
    return {
        "asked": dict(results.asked),
        "left_out": dict(results.left_out),
        "shares": shares,
        "lens": {
            name: {
                "chance": lens.chance,
                "alignment": dict(zip(lens.sites, lens.alignment, strict=True)),
                "nearest": {site: i.as_list() for site, i in zip(lens.sites, lens.nearest, strict=True)},
            }
            for name, lens in results.lenses.items()
        },
        "moves": sweeps,
        "latents": {site: {k: v.as_list() for k, v in vars(each).items()} for site, each in results.latents.items()},
    }


BOTH = {"back": True, "forward": False}


def _listed(sweep: MoveSweep, back: bool, seed: int) -> dict[str, Any]:
    move, share = sweep.chosen(back)
    some, null, gap = sweep.any_of(back, seed)
    return {
        "best move on select": str(move),
        "share": share.as_list(),
        "some move": some.as_list(),
        "some move, wrong answer": null.as_list(),
        "difference": gap.as_list(),
    }


def verdict(results: TwoHopResults) -> str:
    """What the measurements say, in the order of the question."""
    shares = results.shares
    text = f"Of questions whose hops the model knows one by one, it answers {percent(shares.composed)}"
    if shares.recalled is not None:
        text += f", and {percent(shares.recalled)} of those whose answer it has learnt as one fact"
    text += f"; {percent(shares.bridge)} get the bridge for an answer. "
    for form in ("mention", "answer"):
        name, lens = max(
            ((name, lens) for name, lens in results.lenses.items() if name.startswith(f"as {form}")),
            key=lambda item: max(item[1].alignment),
        )
        at = int(np.argmax(lens.alignment))
        text += (
            f"As {'a mention' if form == 'mention' else 'an answer'} the bridge stands out most {name.split(', ')[1]} "
            f"at {lens.sites[at]} (cosine {lens.alignment[at]:.2f}; nearest to its own centroid in "
            f"{percent(lens.nearest[at])}, chance {lens.chance:.0%}). "
        )
    for sweep in results.sweeps:
        if not sweep.name.startswith(OWN):
            move, share = sweep.chosen()
            text += f"{sweep.name[0].upper()}{sweep.name[1:]}: {percent(share)} by {move}. "
    for name, back in BOTH.items():
        own = [sweep for sweep in results.sweeps if sweep.name.startswith(OWN)]
        repaired = [f"{percent(each.chosen(back)[1])} ({each.name.split(', ')[1]})" for each in own]
        text += f"{name.capitalize()}-patching repairs {', '.join(repaired)}. "
    return text.strip()


def _sections(results: TwoHopResults, seed: int) -> list[Section]:
    shares: list[list[Cell]] = [
        [name, cell(each)]
        for name, each in (
            ("questions answered right", results.shares.composed),
            ("questions learnt as one fact, answered right", results.shares.recalled),
            ("answered with the bridge", results.shares.bridge),
        )
    ]
    counts = ", ".join(f"{name}: {count}" for name, count in results.left_out.items())
    asked = ", ".join(f"{count} on {split}" for split, count in results.asked.items())
    first = Table(["share", "value"], shares, f"Questions on `report`. {WILSON}", {"value": SHARE})
    return [
        Section("Questions", f"{asked}. Left out: {counts}.", [first]),
        Section("Where the bridge stands", LENS, [_lens_chart(results), _lens_table(results)]),
        Section("Moves", MOVES, [_moves_table(results), *map(_map, results.sweeps)]),
        Section("Back and forward", BACK, [_back_table(results, seed)]),
        *([Section("Latents", LATENTS, [_latents_table(results)])] if results.latents else []),
    ]


LENS = (
    "Cosines between states in the questions and the bridge's centroid: over prompts that mention it (at the mention), "
    "or over prompts of other subjects that it answers (at the last token)."
)
MOVES = (
    "A state is read at one site and written at another, at the positions named, in the question of another bridge. "
    "Success is the answer of the target's relation for the source's bridge. The move is chosen on `select`."
)
BACK = (
    "Questions that are answered wrongly, repaired by their own states. Some move: any of all pairs of layers repairs "
    "a question. Wrong answer: the same search for a random wrong answer."
)
LATENTS = (
    "The last token's state, or some of its latents, written at the same site of another question. What moves is what "
    "the model concluded at the last token."
)


def _lens_chart(results: TwoHopResults) -> Block:
    series = [band(name, range(len(lens.sites)), lens.nearest) for name, lens in results.lenses.items()]
    chances = sorted({round(lens.chance, 3) for lens in results.lenses.values()})
    return LineChart(
        "Share of questions nearest to their own bridge",
        "blocks that have run",
        "share",
        series,
        WILSON,
        references=[Reference(chance, "chance") for chance in chances],
        y_range=(0, 1),
        y_format=SHARE,
    )


def _lens_table(results: TwoHopResults) -> Block:
    table: list[list[Cell]] = [
        [name, site, cell(nearest), alignment, cohesion]
        for name, lens in results.lenses.items()
        for site, nearest, alignment, cohesion in zip(
            lens.sites, lens.nearest, lens.alignment, lens.cohesion, strict=True
        )
    ]
    columns = ["bridge", "site", "nearest", "alignment", "cohesion"]
    caption = "Alignment: mean cosine with the own bridge's centroid. Cohesion: of the centroid's own states."
    return Table(columns, table, caption, {"nearest": SHARE, "alignment": ".2f", "cohesion": ".2f"})


def _moves_table(results: TwoHopResults) -> Block:
    table: list[list[Cell]] = []
    for sweep in results.sweeps:
        move, share = sweep.chosen()
        plain = float(sweep.report.given_unpatched().mean())
        left = ", ".join(f"{name}: {count}" for name, count in sweep.left_out.items())
        table.append([sweep.name, len(sweep.report.queries), str(move), cell(share), plain, left])
    columns = ["moves", "queries", "best move", "success", "unpatched", "left out"]
    return Table(columns, table, WILSON, {"success": SHARE, "unpatched": SHARE})


def _map(sweep: MoveSweep) -> Block:
    patched = sweep.report
    reads, writes = (list(dict.fromkeys(getattr(move, end) for move in patched.moves)) for end in ("read", "write"))
    share = {(m.read, m.write): value for m, value in zip(patched.moves, patched.given().mean(0).tolist(), strict=True)}
    return HeatMap(
        sweep.name[0].upper() + sweep.name[1:],
        list(map(str, reads)),
        list(map(str, writes)),
        [[share[read, write] for write in writes] for read in reads],
        "Share of queries in which the wanted answer is the likeliest token, on `report`.",
        "read at",
        "written at",
        SHARE,
        scale=1.0,
    )


def _back_table(results: TwoHopResults, seed: int) -> Block:
    table: list[list[Cell]] = []
    for sweep in results.sweeps:
        for name, back in BOTH.items() if sweep.name.startswith(OWN) else ():
            move, share = sweep.chosen(back)
            some, null, gap = sweep.any_of(back, seed)
            table.append([sweep.name, name, str(move), *map(cell, (share, some, null, gap))])
    columns = ["moves", "direction", "best move", "repaired", "some move", "wrong answer", "difference"]
    return Table(columns, table, WILSON, dict.fromkeys(columns[3:6], SHARE) | {"difference": ".2f"})


def _latents_table(results: TwoHopResults) -> Block:
    columns = ["site", "whole", "chosen", "random", "unpatched"]
    table = [[site, *(cell(getattr(each, name)) for name in columns[1:])] for site, each in results.latents.items()]
    return Table(
        columns, table, f"Share that takes over the source's answer. {WILSON}", dict.fromkeys(columns[1:], SHARE)
    )
