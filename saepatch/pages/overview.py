"""The first part of a run's page: headline figures, warnings, splice quality, provenance."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from saepatch.pages.cards import dead_latents
from saepatch.pages.sweeps.curves import controls_reach
from saepatch.pages.sweeps.run_data import RunData
from saepatch.pages.sweeps.run_maps import positions_of
from saepatch.records.figures import renamed_figures
from saepatch.records.statistics import FLAGGED, why_no_q
from saepatch.report import Facts, Headline, Notices, Section, Simple, Table
from saepatch.report.text import number, with_interval
from saepatch.runs.kinds import name_of

FEW = 10  # pairs
MIXED = 0.5  # warn where more than this share of positions have different tokens in different pairs
RECOVERED = 0.9  # warn where a dictionary recovers less of the cross-entropy


def overview(run: RunData) -> list[Section]:
    """Headline, warnings, splice quality."""
    sections = [headline_section(_headline(run), notices(run), _about_effects(run))]
    if run.reading and run.reading["splice"]:
        sections.append(splice_section(run.reading["splice"]))
    return sections


def headline_section(
    figures: Mapping[str, str], warnings: Sequence[str], text: str = "95 % intervals in brackets."
) -> Section:
    """The first section of every page: a few large figures, and warnings."""
    blocks: list[Simple] = [Headline(figures), *([Notices(warnings)] if warnings else [])]
    return Section("Results", text, blocks)


def lead(run: RunData) -> str:
    """One paragraph on what was run and the largest effects."""
    count = len(run.pairs.examples)
    done = "estimated from gradients" if run.is_screen else "patched, each edit run exactly"
    what = "latents and error terms" if run.is_screen else f"{run.settings['component']}s"
    text = (
        f"In {run.folder.model}, {what} at {run.folder.sites} were {done}, on {count:,} prompt pair{'s' * (count > 1)} "
        f"of {run.folder.task}: {run.summary['rows']:,} rows."
    )
    for direction in run.directions:
        top = _top(run, direction)
        if top and top[0]["effect"] is not None:
            text += f" The largest effect of {direction} is {name_of(top[0])}, {_effect(top[0])} of the gap."
    return text


def _top(run: RunData, direction: str) -> list[dict[str, Any]]:
    return run.summary["screens"][direction]["top"] if run.is_screen else run.summary["top"][direction]


def _effect(line: dict[str, Any]) -> str:
    effect = line["effect"]
    if not isinstance(effect, dict):
        return number(effect, ".3f")
    return with_interval(effect["value"], effect["low"], effect["high"], ".3f", effect.get("reason", ""))


def _headline(run: RunData) -> dict[str, str]:
    items = {f"{run.metric}, {side}": number(run.summary[side]) for side in ("clean", "corrupted")}
    kind = "estimate" if run.is_screen else "effect"
    for direction in run.directions:
        if top := _top(run, direction):
            items[f"largest {kind}, {direction}: {name_of(top[0])}"] = _effect(top[0])
        if run.is_screen and (pearson := run.summary["screens"][direction].get("pearson")) is not None:
            items[f"Pearson of estimates with exact effects, {direction}"] = number(pearson, ".3f")
    return items


def _about_effects(run: RunData) -> str:
    text = (
        f"Effects are shares of the gap between the clean and the corrupted run in {run.metric}, ratios of means "
        "over all pairs: 0 is the base run, 1 the source run; values are not clipped."
    )
    if not run.is_screen and any(key.role == "single" for key in run.changes.keys):
        text += (
            " The largest edit was selected on the pairs on which it is measured, so its effect is biased upwards "
            "(selection bias): measure it on other pairs before quoting it."
        )
    return text


def splice_section(quality: Sequence[Mapping[str, Any]], where: str = "this run's prompts") -> Section:
    """Splice quality of each dictionary."""
    quality = [renamed_figures(line) for line in quality]
    formats = {
        "CE recovered": ".4f",
        "ordinary zeroed": ".4f",
        "FVU": ".4f",
        "L0": ".1f",
        "alive": ".0%",
        "KL": ".4f",
        "identity error": ".1e",
    }
    keys = ("site", "ce_recovered", "ce_recovered_ordinary", "fvu", "l0", "alive_share", "kl", "identity_error")
    caption = (
        f"Over {quality[0]['tokens']:,} tokens of {where}. CE recovered: share of the cross-entropy lost by zeroing "
        "the site at every position that the reconstruction keeps; ordinary zeroed: the same where BOS keeps its value "
        "in the baseline, too. Alive: latents that fire in these tokens. Identity error: largest "
        "logit change when the site is written as reconstruction + error term."
    )
    text = "How well the model works when each dictionary is a bottleneck, with the error term dropped."
    rows = [[line.get(key) for key in keys] for line in quality]
    return Section("Splice quality", text, [Table(["site", *formats], rows, caption, formats)])


def splice_notices(quality: Sequence[Mapping[str, Any]]) -> list[str]:
    """Warnings about dictionaries that recover too little of the cross-entropy."""
    quality = [renamed_figures(line) for line in quality]
    kept = {line["site"]: line.get("ce_recovered", line.get("ce_recovered_ordinary")) for line in quality}
    return [
        f"The dictionary at {site} recovers only {number(share, '.1%')} of the cross-entropy on these prompts: much of "
        "the model's computation there is in the error term."
        for site, share in kept.items()
        if share is not None and share < RECOVERED
    ]


def notices(run: RunData) -> list[str]:
    """Warnings, a sentence each."""
    return [*_of_pairs(run), *(_unverified(run) if run.is_screen else _untested(run)), *_of_latents(run)]


def _of_pairs(run: RunData) -> Iterator[str]:
    settings, count = run.settings, len(run.pairs.examples)
    if run.gap != run.gap:
        yield (
            f"The clean and corrupted runs differ by less than {settings['min_gap']} in {run.metric} on average: "
            "there is no gap to normalise by, and effects are left out. Check the pairs and their answers."
        )
    if small := run.summary["pairs_with_too_small_a_gap"]:
        yield (
            f"{small} of {count} pairs have a gap below {settings['min_gap']}: they count in ratios of means, but "
            "have no normalised effect of their own."
        )
    if count < FEW:
        yield too_few(count, "pair")
    if run.reading and count > 1 and any(key.position.isdigit() for key in run.changes.keys):
        columns = run.reading["prompts"]["shared"]["clean"]
        mixed = sum(token is None for token in columns)
        if mixed > MIXED * len(columns):
            yield (
                f"At {mixed} of {len(columns)} positions the prompts' tokens differ: a map over all pairs is a mean "
                "over different tokens there. Look at single pairs, or give pairs of one form."
            )


def too_few(count: int, what: str) -> str:
    """The warning about a small sample."""
    return f"{count} {what}{'s' * (count > 1)}: too few to generalise to others."


def needs_reading(out: Path | str) -> str:
    """The warning about a page without the contents that need the model."""
    return f"Tokens and latent cards are missing: they need the model. `saepatch report {out} --read` adds them."


def _of_latents(run: RunData) -> list[str]:
    notices = dead_latents(run.cards, "Patching them changes nothing.") + controls_reach(run)[:5]
    notices += splice_notices((run.reading or {}).get("splice", ()))
    if run.reading is None:
        notices.append(needs_reading(run.folder.path))
    return notices


def _unverified(run: RunData) -> Iterator[str]:
    for direction, screen in run.summary["screens"].items():
        if not screen.get("verified_top") and not screen.get("verified_random"):
            yield (
                f"{direction}: no estimate was verified exactly, so the accuracy of the screen is unknown. Run "
                "`saepatch attribute` with --verify and --sample."
            )
        elif not screen.get("verified_random"):
            yield f"{direction}: no random node was verified, so it is unknown what the screen missed (use --sample)."
        elif (pearson := screen.get("pearson")) is not None and pearson < 0.7:
            yield f"{direction}: estimates and exact effects agree badly (Pearson {number(pearson, '.2f')})."
    if run.sizes:
        yield "Estimates are magnitudes (GradDrop): they do not show whether an effect is towards the source run."


def _untested(run: RunData) -> Iterator[str]:
    small = sum(line.get("within_rounding", False) for top in run.summary["top"].values() for line in top)
    if small:
        yield (
            f"{small} of the largest effects are within rounding, which alone may change the metric by "
            f"{number(run.summary['rounding'], '.1g')} of the gap in this run: they are no effects."
        )
    for direction, top in run.summary["top"].items():
        tested = [line["q"] for line in top if line["q"] is not None]
        own = run.own(direction)
        unable = why_no_q(len(run.pairs.examples), int((run.changes.counts[own] >= 2).sum()))
        if top and unable and min(tested, default=1.0) > FLAGGED:
            yield f"{direction}: {unable}. Look at the intervals, or give more pairs."
        elif top and (not tested or min(tested) > FLAGGED):
            why = "." if tested else ", since none could be tested: each changes something in at most one pair."
            yield (f"{direction}: none of the largest edits is significant at a false discovery rate of 5 %{why}")


def facts(run: RunData) -> Facts:
    """Provenance: the model, the dictionaries, the settings."""
    summary, settings = run.summary, run.settings
    items = {
        "model": f"{run.folder.model} ({summary['model']['hash']})",
        **dictionary_facts(summary["dictionaries"]),
        "pairs": f"{run.folder.task}, {settings['split']}: {len(run.pairs.examples):,}",
        "positions": positions_of(run),
        "metric": run.metric,
        "corruption": settings["corruption"] or "the pair's corrupted prompt",
        "precision": settings["dtype"],
        **({"rounding": f"{run.summary['rounding']:.1g} of the gap"} if "rounding" in run.summary else {}),
        **({"method": settings["method"]} if run.is_screen else {}),
        "finished": run.folder.finished,
        **run.provenance,
        **({"shards": str(summary["shards"])} if summary["shards"] > 1 else {}),
    }
    return Facts(items)


def dictionary_facts(dictionaries: Mapping[str, Mapping[str, str]]) -> dict[str, str]:
    """Name and hash of each site's dictionary."""
    return {f"dictionary {site}": f"{known['name']} ({known['hash']})" for site, known in dictionaries.items()}
