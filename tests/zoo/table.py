"""docs/models.md: one line a model type, and how many come out right."""

from collections import Counter

import transformers

from zoo.checks import CHECKS, RIGHT
from zoo.shapes import TYPES

Row = dict[str, str]
STREAMS = ("attn_out", "mlp_out", "z", "neurons")  # every type that loads has resid_pre and resid_post


def outcome(row: Row) -> str:
    """What became of a type: the worst of its verdicts."""
    if row.get("bare") not in (RIGHT, "?"):
        return "not run by transformers"
    verdicts = [row.get("load", ""), *(row.get(check, RIGHT) for check in CHECKS)]
    for word in ("crash", "wrong"):
        if any(verdict.startswith(word) for verdict in verdicts):
            return word
    return "refused" if any(row.get(check, "refused") != RIGHT for check in ("load", "identity", "patch")) else RIGHT


def summary(rows: list[Row]) -> str:
    counts = Counter(map(outcome, rows))
    run = len(rows) - counts["not run by transformers"]
    share = counts[RIGHT] / max(1, run)
    examined = (
        f"{len(rows)} types" if len(rows) >= len(TYPES) else f"{len(rows)} types examined (there are {len(TYPES)})"
    )
    return (
        f"Of {examined} transformers runs {run} on text at this size. Patched right: {counts[RIGHT]} "
        f"({share:.1%}); refused in one line: {counts['refused']}; wrong without a word: {counts['wrong']}; "
        f"with a traceback: {counts['crash']}."
    )


def _cell(text: str) -> str:
    return text.replace("|", "\\|").replace("<", "&lt;")


def _sites(row: Row) -> str:
    counts = dict(part.rsplit(" ", 1) for part in row["sites"].split(", "))
    layers = row["layers"]
    return ", ".join(
        stream if counts[stream] == layers else f"{stream} ({counts[stream]} of {layers})"
        for stream in STREAMS
        if stream in counts
    )


def page(rows: list[Row]) -> str:
    """The page, in Markdown."""
    lines = [
        "# Model types",
        "",
        f"Written by `make zoo`, with transformers {transformers.__version__}: every causal-LM and image-text-to-text "
        "type, as a tiny random model made from its default config, loaded from a folder and run on text alone.",
        "",
        summary(rows),
        "",
        "Each type is checked beside plain torch hooks on single rows: a splice that changes nothing; `attn_out` and "
        "`mlp_out`, which are together what a block writes; patching after the first block and before the last; rows "
        "padded on either side; attribution beside autograd; greedy generation; and steered generation with a cache "
        "and without. *Padding* is where rows may be padded; elsewhere they run one length at a time, or are refused.",
        "",
        "| type | class | sites beside the residual stream | padding | outcome |",
        "|---|---|---|---|---|",
    ]
    for row in rows:
        result = outcome(row)
        if result == "not run by transformers":
            continue
        remarks = [f"{check}: {row[check]}" for check in ("load", *CHECKS) if row.get(check, RIGHT) != RIGHT]
        sites = _sites(row) if "sites" in row else ""
        words = "; ".join([result, *remarks])
        cells = (row["type"], row.get("class", ""), sites, row.get("padding", ""), words)
        lines.append("| " + " | ".join(map(_cell, cells)) + " |")
    left = [row for row in rows if outcome(row) == "not run by transformers"]
    lines += ["", "## Not run by transformers on text alone", ""]
    lines += [f"- {row['type']}: {_cell(row['bare'])}" for row in left]
    return "\n".join(lines) + "\n"
