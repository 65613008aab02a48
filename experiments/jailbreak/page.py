"""The report, summary and rows of the experiment on both halves of a jailbreak."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Float

from saepatch.pages.charts import WILSON, cell
from saepatch.records.rows import write_records
from saepatch.records.statistics import Interval, bootstrap_mean, wilson_share
from saepatch.report import Cell, Facts, Page, Section, Table
from saepatch.restoration.answering import Answered
from saepatch.restoration.restore import judge

from ..common.tracked import conclude
from ..common.words import percent
from ..restoration.settings import Setting
from .results import BOTH, DONE, HALVES, SHIFT, JailbreakConfig, JailbreakResults


def share(several: Sequence[Answered]) -> Interval:
    return wilson_share(np.mean([answered.refused for answered in several], axis=0))


def shares(results: JailbreakResults) -> dict[str, dict[str, Interval]]:
    """Shares refused, by prompts and condition."""
    return {
        name: {condition: share(several) for condition, several in some.items() if several}
        for name, some in results.answers.items()
    }


def gap(results: JailbreakResults, one: str, other: str) -> Interval:
    """Paired difference of refusals of jailbroken requests between two conditions."""

    def refused(condition: str) -> Float[np.ndarray, "prompts"]:
        several = results.answers["jailbroken"][condition]
        return np.asarray(np.mean([answered.refused for answered in several], axis=0), float)

    return bootstrap_mean(refused(one) - refused(other))


def verdict(results: JailbreakResults) -> str:
    """What each half of the jailbreak is, does alone, and does in the other direction."""
    ranked, refused = results.found, shares(results)
    jailbroken, benign = refused["jailbroken"], refused["benign"]
    text = (
        f"Of {ranked.active} latents that are on from the assistant's turn on, the jailbreak suppresses "
        f"{ranked.significant['suppressed']} and amplifies {ranked.significant['amplified']} (paired test, q < 0.05); "
        f"{ranked.share['suppressed']:.0%} of the change is suppression. Jailbroken requests refused: "
        f"{percent(jailbroken['nothing'])}; "
    )
    for half in HALVES:
        random = f"random, as many as {half}"
        beside = f" (random {percent(jailbroken[random])})" if random in jailbroken else ""
        text += f"{results.sizes[half]} {DONE[half]}: {percent(jailbroken[DONE[half]])}{beside}; "
    text += f"both: {percent(jailbroken[BOTH])}; CC-Delta at {results.shift.site}: {percent(jailbroken[SHIFT])}. "
    text += f"Carried into the benign run, which refuses {percent(benign['nothing'])}: the suppressed half leaves "
    text += f"{percent(benign['suppressed as in the jailbreak'])}, the amplified half "
    text += f"{percent(benign['amplified as in the jailbreak'])}, both {percent(benign['both as in the jailbreak'])}. "
    harmless = refused["harmless"]
    text += "Harmless requests refused: " + ", ".join(f"{name} {percent(each)}" for name, each in harmless.items())
    return text + "."


def write(config: JailbreakConfig, setting: Setting, results: JailbreakResults) -> None:
    """Write the report, summary, rows and settings, and log them to trackers."""
    refused = shares(results)
    provenance = setting.provenance(config.sae, config.seed)
    write_records([(_rows(setting, results), provenance)], Path(config.out) / "results.parquet")
    differences = {
        f"{one} less {other}": gap(results, one, other)
        for one, other in ((DONE["suppressed"], SHIFT), (BOTH, DONE["suppressed"]), (BOTH, DONE["amplified"]))
    }
    summary: dict[str, Any] = {
        "halves": asdict(results.found) | {"sizes": dict(results.sizes)},
        "shift": asdict(results.shift),
        "refused": {name: {c: i.as_list() for c, i in some.items()} for name, some in refused.items()},
        "differences": {name: each.as_list() for name, each in differences.items()},
        "kl": {name: each.as_list() for name, each in results.costs.items()},
    }
    page = Page(
        "Both halves of a jailbreak",
        verdict(results),
        _sections(results, refused, differences),
        Facts(provenance.facts()),
    )
    conclude(config, "jailbreak", page, summary, {"refused": summary["refused"]})


def _rows(setting: Setting, results: JailbreakResults) -> list[dict[str, Any]]:
    (nested,) = setting.held_out.values()
    report = setting.harmful["report"]
    prompts = {"jailbroken": report.prompts, "benign": report.clean, "harmless": setting.harmless["report"].prompts}
    prompts["nested"] = nested.prompts
    return [
        {"prompts": name, "condition": condition, "draw": draw, "prompt": prompt, "answer": text,
         "outcome": judge(text), "score": score}
        for name, some in results.answers.items()
        for condition, several in some.items()
        for draw, answered in enumerate(several)
        for prompt, text, score in zip(prompts[name], answered.texts, answered.scores, strict=True)
    ]  # fmt: skip


def _sections(
    results: JailbreakResults, refused: Mapping[str, Mapping[str, Interval]], differences: Mapping[str, Interval]
) -> list[Section]:
    table: list[list[Cell]] = [
        [name, condition, cell(each)] for name, some in refused.items() for condition, each in some.items()
    ]
    ranked = results.found
    halves: list[list[Cell]] = [
        [half, ranked.significant[half], ranked.share[half], results.sizes[half],
         ", ".join(f"{site}: {latent}" for site, latent in ranked.ranked[half][:8])]
        for half in HALVES
    ]  # fmt: skip
    columns = ["half", "significant", "share of change", "chosen", "first latents"]
    others: list[list[Cell]] = [[name, cell(each)] for name, each in differences.items()]
    costs: list[list[Cell]] = [[name, cell(each)] for name, each in results.costs.items()]
    return [
        Section("The halves", "", [Table(columns, halves, f"{ranked.active} latents are on.", {columns[2]: ".0%"})]),
        Section(
            "Refusals",
            "Jailbroken, benign: harmful requests of `report`; harmless: requests in jailbreak framings; nested: one "
            "framing in another.",
            [
                Table(["prompts", "condition", "refused"], table, WILSON, {"refused": ".0%"}),
                Table(["paired difference", "refused"], others, "Of refusals of jailbroken requests."),
            ],
        ),
        Section("Cost", "", [Table(["condition", "KL"], costs, "Nats per token of the unedited answers, harmless.")]),
    ]
