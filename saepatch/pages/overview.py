"""The first part of a run's page: what ran, what came of it, and what to know before trusting it."""

from collections.abc import Sequence
from typing import Any

from saepatch.pages.curves import controls_reach
from saepatch.pages.left import Left
from saepatch.pages.maps import positions_of
from saepatch.report import Facts, Headline, Notices, Section, Simple, Table
from saepatch.report.text import number
from saepatch.runs.catalogue import name_of

FEW = 10  # pairs
MIXED = 0.5  # of the positions: more that differ between pairs, and a map over all pairs says little
RECOVERED = 0.9  # of the cross-entropy: less, and the dictionary is no bottleneck to trust


def overview(left: Left) -> list[Section]:
    """Headline, warnings, splice quality."""
    warnings = notices(left)
    blocks: list[Simple] = [Headline(_headline(left))]
    if warnings:
        blocks.append(Notices(warnings))
    sections = [Section("What came out", _said(left), blocks)]
    if left.reading and left.reading["splice"]:
        sections.append(splice_section(left.reading["splice"]))
    return sections


def lead(left: Left) -> str:
    """One paragraph that says what was done, and what was largest."""
    count, summary = len(left.pairs.examples), left.run.summary
    done = "estimated from gradients" if left.is_screen else "patched, each edit run exactly"
    what = "latents and error terms" if left.is_screen else f"{left.run.settings['component']}s"
    text = (
        f"In {left.run.model}, {what} at {left.run.sites} were {done}, on {count:,} prompt pair{'s' * (count > 1)} "
        f"of {left.run.task}: {summary['rows']:,} rows."
    )
    for direction in left.directions:
        top = _top(left, direction)
        if top and top[0]["effect"] is not None:
            text += f" The largest effect of {direction} is {name_of(top[0])}, {_effect(top[0])} of the gap."
    return text


def _top(left: Left, direction: str) -> list[dict[str, Any]]:
    summary = left.run.summary
    return summary["screens"][direction]["top"] if left.is_screen else summary["top"][direction]


def _effect(line: dict[str, Any]) -> str:
    effect = line["effect"]
    if not isinstance(effect, dict):
        return number(effect, ".3f")
    if effect["low"] is None:
        return number(effect["value"], ".3f")
    return f"{number(effect['value'], '.3f')} [{number(effect['low'], '.3f')}, {number(effect['high'], '.3f')}]"


def _headline(left: Left) -> dict[str, str]:
    summary = left.run.summary
    items = {
        f"{left.metric}, clean": number(summary["clean"]),
        f"{left.metric}, corrupted": number(summary["corrupted"]),
    }
    for direction in left.directions:
        if top := _top(left, direction):
            items[f"largest {'estimate' if left.is_screen else 'effect'}, {direction}: {name_of(top[0])}"] = _effect(
                top[0]
            )
        if left.is_screen and (pearson := summary["screens"][direction].get("pearson")) is not None:
            items[f"Pearson of estimates with exact effects, {direction}"] = number(pearson, ".3f")
    return items


def _said(left: Left) -> str:
    text = (
        f"Effects are shares of the gap between the clean and the corrupted run in {left.metric}, ratios of means "
        "over all pairs: 0 is the base run, 1 the source run, nothing is clipped."
    )
    if not left.is_screen and any(key.role == "single" for key in left.changes.keys):
        text += (
            " The largest of many edits was chosen on the pairs that it is measured on, so its effect is too large on "
            "average: measure it again on other pairs before quoting it."
        )
    return text


def splice_section(found: Sequence[dict[str, Any]]) -> Section:
    """What each dictionary keeps, over a run's own prompts."""
    columns = ["site", "CE recovered", "FVU", "L0", "alive", "KL", "identity error"]
    rows = [
        [q["site"], q["ce_recovered"], q["fvu"], q["l0"], q["alive_share"], q["kl"], q["identity_error"]] for q in found
    ]
    formats = {"CE recovered": ".4f", "FVU": ".4f", "L0": ".1f", "alive": ".0%", "KL": ".4f", "identity error": ".1e"}
    caption = (
        f"Over {found[0]['tokens']:,} tokens of this run's prompts. CE recovered: share of the cross-entropy lost by "
        "zeroing the site that the reconstruction keeps. Alive: latents that fire in these few tokens. Identity error: "
        "largest logit change when the site is written as reconstruction + error term."
    )
    text = "How much of the model each dictionary keeps when it is a bottleneck, with its error term dropped."
    return Section("Splice quality", text, [Table(columns, rows, caption, formats)])


def notices(left: Left) -> list[str]:
    """What a reader has to know, in words."""
    summary, settings, count = left.run.summary, left.run.settings, len(left.pairs.examples)
    found = []
    small = summary["pairs_with_too_small_a_gap"]
    if left.gap != left.gap:
        found.append(
            f"The clean and corrupted runs differ by less than {settings['min_gap']} in {left.metric} on average: "
            "there is no gap to take shares of, and effects are left out. Look at the pairs and their answers."
        )
    if small:
        found.append(
            f"{small} of {count} pairs have a gap below {settings['min_gap']}: they count in ratios of means, but "
            "have no effect of their own."
        )
    if count < FEW:
        found.append(f"{count} pair{'s' * (count > 1)}: too few for an interval that means much.")
    found += _forms(left)
    found += _unverified(left) if left.is_screen else _untested(left)
    found += _dead(left) + controls_reach(left)[:5]
    for one in (left.reading or {}).get("splice", ()):
        if one["ce_recovered"] is not None and one["ce_recovered"] < RECOVERED:
            found.append(
                f"The dictionary at {one['site']} keeps only {number(one['ce_recovered'], '.1%')} of the cross-entropy "
                "on these prompts: much of what the model does there is in its error term."
            )
    if left.reading is None:
        found.append(
            f"Tokens and latent cards are missing: they need the model. `saepatch report {left.run.path} --read true` "
            "adds them."
        )
    return found


def _forms(left: Left) -> list[str]:
    """Positions that are one by one those of pairs that are not of one form."""
    if not left.reading or len(left.pairs.examples) < 2 or not any(key.position.isdigit() for key in left.changes.keys):
        return []
    columns = left.reading["prompts"]["shared"]["clean"]
    mixed = sum(token is None for token in columns)
    if mixed <= MIXED * len(columns):
        return []
    return [
        f"At {mixed} of {len(columns)} positions the prompts' tokens differ: a map over all pairs is a mean over "
        "different tokens there. Look at pairs alone, or give pairs of one form."
    ]


def _unverified(left: Left) -> list[str]:
    found = []
    for direction, screen in left.run.summary["screens"].items():
        if not screen.get("verified_top") and not screen.get("verified_random"):
            found.append(
                f"{direction}: no estimate was run exactly, so nothing here says whether the screen is right. Run "
                "`saepatch attribute` with --verify and --sample."
            )
        elif not screen.get("verified_random"):
            found.append(
                f"{direction}: no random node was run exactly, so what the screen missed is unknown (--sample)."
            )
        elif (pearson := screen.get("pearson")) is not None and pearson < 0.7:
            found.append(f"{direction}: estimates and exact effects agree badly (Pearson {number(pearson, '.2f')}).")
    if left.sizes:
        found.append(
            "Estimates are sizes without a sign (GradDrop): towards or away from the source run, they do not say."
        )
    return found


def _untested(left: Left) -> list[str]:
    found = []
    for direction, top in left.run.summary["top"].items():
        tested = [line["q"] for line in top if line["q"] is not None]
        if top and (not tested or min(tested) > 0.05):
            found.append(
                f"{direction}: none of the largest edits stands out from chance at a false discovery rate of 5 %"
                + ("." if tested else ", for none could be tested: each changes something in one pair at most.")
            )
    return found


def _dead(left: Left) -> list[str]:
    dead = [f"{card.site} {card.latent}" for card in left.cards if card.dead]
    if not dead:
        return []
    return [f"Never active in this run's prompts: {', '.join(dead)}. Patching what is off in both runs does nothing."]


def facts(left: Left) -> Facts:
    """Where all this comes from."""
    summary, settings = left.run.summary, left.run.settings
    items = {
        "model": f"{left.run.model} ({summary['model']['hash']})",
        **{f"dictionary {site}": f"{one['name']} ({one['hash']})" for site, one in summary["dictionaries"].items()},
        "pairs": f"{left.run.task}, {settings['split']}: {len(left.pairs.examples):,}",
        "positions": positions_of(left),
        "metric": left.metric,
        "corruption": settings["corruption"] or "the pair's corrupted prompt",
        "precision": settings["dtype"],
        **({"method": settings["method"]} if left.is_screen else {}),
        "finished": left.run.finished,
        **left.provenance,
    }
    if summary["shards"] > 1:
        items |= {"shards": str(summary["shards"])}
    return Facts(items)
