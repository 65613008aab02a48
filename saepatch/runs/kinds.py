"""Table of the kinds of runs: how a summary is recognised, its headline, its figures. Light: no model, no torch.

`saepatch.pages` has the page of each kind, by the same names.
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

Summary = Mapping[str, Any]
Figure = float | Sequence[float | None]  # an interval is [value, low, high]
Figures = dict[str, Figure]


@dataclass(frozen=True)
class Kind:
    """One kind of run.

    Attributes:
        name: The command or experiment, as listed by `saepatch runs`.
        keys: Keys that identify its summary; earlier kinds in the table take precedence.
        headline: Returns the main result in a few words.
        figures: Returns the main numbers by name.
        file: Name of the summary's file.
    """

    name: str
    keys: tuple[str, ...]
    headline: Callable[[Summary], str]
    figures: Callable[[Summary], Figures]
    file: str = "summary.json"


def kind_of(summary: Summary) -> Kind:
    """The kind of run that wrote a summary; `UNKNOWN` if none matches."""
    known = [kind for kind in KINDS if kind.name == summary.get("work") or all(key in summary for key in kind.keys)]
    kind = known[0] if known else UNKNOWN
    task = summary.get("task")  # several experiments share this form
    return replace(kind, name=task) if kind is PAIRS and isinstance(task, str) else kind


# Figures


def numbers(values: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Figure]]:
    """Numbers and intervals at any depth, by path, as in `setting_a/dense_direction`."""
    for name, value in values.items():
        if isinstance(value, Mapping):
            yield from numbers(value, f"{prefix}{name}/")
        elif _is_number(value) or _is_interval(value):
            yield f"{prefix}{name}", value


def flat(figures: Figures) -> dict[str, float]:
    """Figures as plain numbers for a tracker: the bounds of an interval become NAME_low and NAME_high."""
    values: dict[str, float] = {}
    for name, figure in figures.items():
        ends = zip(("", "_low", "_high"), figure if isinstance(figure, Sequence) else (figure,))
        values |= {f"{name}{end}": value for end, value in ends if value is not None and value == value}
    return values


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_interval(value: Any) -> bool:
    if not (isinstance(value, list) and len(value) == 3 and all(map(_is_number, value))):
        return False
    middle, low, high = value
    return bool(low <= middle <= high)


def _experiment(summary: Summary) -> Figures:
    """All numbers of a summary except settings, versions and times."""
    omitted = ("config", "seconds", "seed", "settings", "versions")
    return dict(numbers({name: value for name, value in summary.items() if name not in omitted}))


def _pairs(summary: Summary) -> Figures:
    """The numbers of an experiment on pairs, and the effects of the first k latents and of their controls."""
    figures = _experiment(summary)
    for direction in ("denoise", "noise"):
        for name in ("top", "random", "matched"):
            points = summary.get(f"{direction}_{name}", ())
            figures |= {f"{direction}/{name}/{k:g}": [value, low, high] for k, value, low, high in points}
    return figures


def _patchscope(summary: Summary) -> Figures:
    """Shares of readings that name a concept, by where latents are from, where they are written, and the concept."""
    figures: Figures = {f"words/{name}": share for name, share in zip(("chosen", "any"), summary["words"])}
    for reading in summary["readings"]:
        place = f"{reading['site']} at {reading['written_at']}/{reading['concept']}"
        for name in ("own", "own_any", "random", "random_any"):
            figures[f"{place}/{name}"] = [reading[name][end] for end in ("value", "low", "high")]
    return figures


def _sweep(summary: Summary) -> Figures:
    return dict(numbers({run["name"]: run["sites"] for run in summary["runs"]}))


COUNTS = ("pairs", "clean", "corrupted", "rows", "pairs_with_too_small_a_gap")


def _patch(summary: Summary) -> Figures:
    figures: Figures = {name: summary[name] for name in COUNTS if summary.get(name) is not None}
    for direction, top in summary["top"].items():
        if top and top[0]["effect"]["value"] is not None:
            figures[f"{direction}/largest_effect"] = [top[0]["effect"][end] for end in ("value", "low", "high")]
    return figures


def _attribute(summary: Summary) -> Figures:
    figures: dict[str, Any] = {name: summary[name] for name in COUNTS}
    for direction, screen in summary["screens"].items():
        figures |= {f"{direction}/{name}": screen.get(name) for name in ("pearson", "spearman")}
        if screen["top"]:
            figures[f"{direction}/largest_estimate"] = screen["top"][0]["effect"]
    return {name: value for name, value in figures.items() if value is not None}


def _restore(summary: Summary) -> Figures:
    """Share of prompts with each outcome, by condition, as in `restored/refuse` and `harmful/bare/comply`."""
    conditions = summary["conditions"]
    figures: Figures = {"prompts": conditions[0]["prompts"], "rows": summary["rows"]}
    for row in conditions:
        name = {None: "", True: "harmful/", False: "harmless/"}[row["harmful"]] + row["condition"]
        figures |= {f"{name}/{what}": row[what] for what in ("refuse", "comply", "degenerate", "refusal_score")}
    return figures


def _circuit(summary: Summary) -> Figures:
    figures: Figures = {name: summary[name] for name in ("pairs", "nodes", "candidates", "edges", "whole", "empty")}
    figures |= {f"faithfulness/{errors}": share for errors, share in summary["faithfulness"].items()}
    figures["completeness"] = summary["completeness"]
    if summary["random"]:
        figures["random_at_most"] = max(share[0] for share in summary["random"])
    pearson = summary["selected"].get("pearson")
    return figures if pearson is None else figures | {"pearson_of_edges": pearson}


def _edit(summary: Summary) -> Figures:
    figures: Figures = {"facts": summary["pairs"], "score": summary["score"]}
    for kind, measured in summary["kinds"].items():
        figures |= {f"{kind}/{name}": measured[name] for name in ("success", "magnitude", "accuracy")}
    figures |= {f"relative_norm/{layer}": norm for layer, norm in summary["relative_norms"].items()}
    return figures


# Headlines


def _patch_headline(summary: Summary) -> str:
    tops = summary["top"].items()
    return "; ".join(f"{d}: {show_interval(top[0]['effect'])} {name_of(top[0])}" for d, top in tops if top)


def _attribute_headline(summary: Summary) -> str:
    return "; ".join(f"{direction}: {_screen(screen)}" for direction, screen in summary["screens"].items())


def _screen(screen: Mapping[str, Any]) -> str:
    top = f"{show(screen['top'][0]['effect'])} {name_of(screen['top'][0])}" if screen["top"] else "nothing"
    pearson = screen.get("pearson")
    agreement = ", unverified" if pearson is None else f", Pearson {show(pearson)} with exact"
    return f"{top} (estimate{agreement})"


def _restore_headline(summary: Summary) -> str:
    """For each kind of prompts, as in `harmful: 0 % refused, 85 % [77, 91] restored, 0 % random`."""
    parts = []
    for kind in prompt_kinds(summary["conditions"]):
        refused = {row["condition"]: row["refuse"] for row in summary["conditions"] if row["harmful"] == kind}
        name = {True: "harmful: ", False: "harmless: ", None: ""}[kind]
        random = f", {refused['random'][0]:.0%} random" if "random" in refused else ""
        parts.append(f"{name}{refused['bare'][0]:.0%} refused, {show_share(refused['restored'])} restored{random}")
    return "; ".join(parts)


def prompt_kinds(conditions: Sequence[Mapping[str, Any]]) -> list[bool | None]:
    """Kinds of prompts, harmful ones first; None: the prompts are not labelled."""
    kinds = {row["harmful"] for row in conditions}
    return [kind for kind in (True, False) if kind in kinds] or [None]


def _circuit_headline(summary: Summary) -> str:
    value, low, high = summary["faithfulness"]["nodes"]
    share = show_interval({"value": value, "low": low, "high": high})
    random = f", random at most {show(max(r[0] for r in summary['random']))}" if summary["random"] else ""
    return f"{summary['nodes']} of {summary['candidates']} nodes: faithfulness {share}{random}"


def _edit_headline(summary: Summary) -> str:
    return ", ".join(
        f"{kind} {show_share(each['success'])}" for kind, each in summary["kinds"].items() if each["questions"]
    )


def _demo_headline(summary: Summary) -> str:
    kept = dict(summary["patching"]["denoise_top"]).get(16)
    refused = summary["restoration"]["refused_restored"]
    return f"16 latents restore {show(kept)}; {show(refused)} refused once restored"


def _verdict(summary: Summary) -> str:
    """The verdict in an experiment's summary; of several, the first sentence of each."""
    verdict = summary.get("headline", summary.get("verdict"))
    several = summary.get("verdicts")
    verdicts = [verdict] if isinstance(verdict, str) else list(several.values()) if isinstance(several, dict) else []
    if not isinstance(verdict, str):
        verdicts += [part["verdict"] for part in summary.values() if isinstance(part, dict) and "verdict" in part]
    first = [each[0] if isinstance(each, list) and each else each for each in verdicts]
    return " ".join(" ".join(sentence for sentence in first if isinstance(sentence, str)).split())


def _benchmark_headline(summary: Summary) -> str:
    name = "overhead" if "overhead" in summary else "ratios"
    return ", ".join(f"{case} {value:.2f}" for case, value in list(summary[name].items())[:4])


def _training_headline(summary: Summary) -> str:
    parts = []
    for site, row in summary["sites"].items():
        kept = [f"{label} {show(row[name])}" for name, label in (("fvu", "FVU"), ("l0", "L0")) if name in row]
        parts.append(" ".join([f"{site}:", *kept]))
    return "; ".join(parts)


def _sweep_headline(summary: Summary) -> str:
    return f"{len(summary['runs'])} runs finished"


# Formatting


def name_of(line: Mapping[str, Any]) -> str:
    """Name of an edit in a summary, as in `resid_post.3 281 at 14`."""
    component = "" if line["component"] == "latent" else line["component"]
    unit = " ".join(filter(None, (line["site"], component, line["latent"])))
    return f"{unit} at {line['position']}"


def show(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def show_interval(effect: Mapping[str, Any]) -> str:
    if effect.get("low") is None:
        return show(effect["value"])
    return f"{show(effect['value'])} [{show(effect['low'])}, {show(effect['high'])}]"


def show_share(share: Sequence[float]) -> str:
    value, low, high = share
    return f"{value:.0%} [{low:.0%}, {high:.0%}]"


def show_figure(figure: Figure) -> str:
    if isinstance(figure, Sequence):
        return show_interval(dict(zip(("value", "low", "high"), figure)))
    return str(figure) if type(figure) is int else show(figure)


PAIRS = Kind("pairs", ("task", "layer_position"), _verdict, _pairs)
KINDS = (
    Kind("attribute", ("screens",), _attribute_headline, _attribute),
    Kind("patch", ("top",), _patch_headline, _patch),
    Kind("demo", ("restoration", "patching"), _demo_headline, _experiment),
    Kind("restore", ("conditions",), _restore_headline, _restore),
    PAIRS,
    Kind("safety", ("setting_a",), _verdict, _experiment),
    Kind("safety", ("setting_b",), _verdict, _experiment),
    Kind("steering", ("concepts", "verdicts"), _verdict, _experiment),
    Kind("real", ("claims", "accuracy"), _verdict, _experiment),
    Kind("patchscope", ("readings", "words"), _verdict, _patchscope),
    Kind("circuit", ("faithfulness", "completeness"), _circuit_headline, _circuit),
    Kind("facts", ("single_edits", "correlations"), _verdict, _experiment),
    Kind("edit", ("kinds", "relative_norms"), _edit_headline, _edit),
    Kind("audit", ("audit", "parts"), _verdict, _experiment),
    Kind("circuits", ("circuits",), _verdict, _experiment),
    Kind("cross-lingual", ("shared", "depth"), _verdict, _experiment),
    Kind("jailbreak", ("halves", "refused"), _verdict, _experiment),
    Kind("letters", ("letters", "carried"), _verdict, _experiment),
    Kind("two-hop", ("moves", "lens"), _verdict, _experiment),
    Kind("self-repair", ("repaired", "nodes"), _verdict, _experiment),
    Kind("benchmark:training", ("ratios", "quality_by_rate"), _benchmark_headline, _experiment),
    Kind("benchmark:patching", ("ratios", "ms_per_edit"), _benchmark_headline, _experiment),
    Kind("benchmark:generation", ("overhead", "ms_per_token"), _benchmark_headline, _experiment),
    Kind("benchmark:circuits", ("ratios", "downstream_latents"), _benchmark_headline, _experiment),
    Kind("training", ("sites", "identity"), _training_headline, _experiment),
    Kind("training-sweep", ("runs",), _sweep_headline, _sweep, "sweep.json"),
)
UNKNOWN = Kind("", (), _verdict, _experiment)
SUMMARIES = tuple(dict.fromkeys(kind.file for kind in KINDS))
