"""The demo's report: what was found, said in words first."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

from saepatch import report
from saepatch.demo.sections import cards, overview, trade_off, where
from saepatch.measure.controls import DRAWS
from saepatch.pages.cards import coloured
from saepatch.pages.charts import INTERVALS, band, cell, effect_chart
from saepatch.pages.left import anchor
from saepatch.records.provenance import Provenance
from saepatch.records.statistics import wilson_share
from saepatch.report import BarChart, Bars, Block, Comparison, LineChart, Page, Section, Table
from saepatch.restoration.judges import SAID
from saepatch.restoration.restore import judge

if TYPE_CHECKING:
    from saepatch.demo.run import Findings
    from saepatch.demo.stages import Condition, Steering
    from saepatch.reading.cards import ReadText


SHARES = "Intervals: 95 % Wilson score over prompts."


def page(found: "Findings", provenance: Provenance) -> Page:
    """The report of a demo run."""
    patching, restoration = found.patching, found.restoration
    sixteen = patching.denoise.sizes.index(16)
    rates, k = restoration.rates, len(restoration.latents)
    lead = (
        f"In {found.config.model}, patching 16 of {patching.dictionary.d_sae} latents at {patching.site}, chosen for "
        "each prompt by its own gradients, restores "
        f"{percent(patching.denoise.top[sixteen].value)} of the logit difference on indirect objects; 16 random live "
        f"ones restore {percent(patching.denoise.random[sixteen].value)}, and one set of 16 chosen on prompts with "
        f"other names {percent(patching.fixed.top[sixteen].value)}. Restoring {k} latents at {restoration.site} raises "
        f"refusals of jailbroken requests from {percent(rates['jailbroken'].value)} to "
        f"{percent(rates['restored'].value)}; as many random latents reach {percent(rates['random'].value)}."
    )
    sections = [overview(found), _model(found), _splice(found), _patching(found), where(found), _restoration(found)]
    sections += [_steering(one, found.steering_texts.get(one.concept, ())) for one in found.steering]
    sections.append(cards(found))
    facts = provenance.facts() | {
        "time": ", ".join(f"{stage} {seconds:.0f} s" for stage, seconds in found.seconds.items())
    }
    return Page("saepatch: latents patched, restored and steered", lead, sections, report.Facts(facts))


def percent(share: float) -> str:
    """A share as whole percents, without a minus before a zero."""
    return f"{round(100 * share)} %"


def _model(found: "Findings") -> Section:
    pairs = [(task, m.get("accuracy"), m.get("top1")) for task, m in found.tasks.items() if "accuracy" in m]
    others = [
        (task, measure.replace("_", " "), value)
        for task, measures in found.tasks.items()
        for measure, value in measures.items()
        if measure not in ("accuracy", "top1")
    ]
    text = (
        "The embedded model is small and its behaviours are planted: tasks, a bias in loan decisions, refusal, and "
        "jailbreaks that defeat it were trained in, so the ground truth is known. Measured on prompts of the `report` "
        "split. Accuracy counts clean and corrupted prompts whose right answer has a higher logit than its "
        "counterpart's, top 1 those where it is the top token."
    )
    tables = [
        Table(["task", "accuracy", "top 1"], pairs, formats={"accuracy": ".1%", "top 1": ".1%"}),
        Table(["task", "measure", "value"], others, formats={"value": ".1%"}),
    ]
    return Section("The model and its tasks", text, tables)


def _splice(found: "Findings") -> Section:
    columns = ["site", "CE recovered", "FVU", "L0", "alive", "KL", "identity error"]
    rows = [(str(q.site), q.ce_recovered, q.fvu, q.l0, q.alive_share, q.kl, q.identity_error) for q in found.quality]
    formats = {"CE recovered": ".4f", "FVU": ".4f", "L0": ".1f", "alive": ".0%", "KL": ".4f", "identity error": ".1e"}
    caption = (
        f"Over {found.quality[0].tokens:,} tokens of held-out text. CE recovered: share of the cross-entropy lost by "
        "zeroing the site that the dictionary's reconstruction keeps. Identity error: largest logit change when the "
        "site is written as reconstruction + error term."
    )
    text = "How much of the model each dictionary keeps when it is a bottleneck, with its error term dropped."
    named = {f"dictionary {site}": f"{one.name} ({one.fingerprint})" for site, one in found.saes.items()}
    return Section("Splice quality", text, [Table(columns, rows, caption, formats), report.Facts(named)])


def _patching(found: "Findings") -> Section:
    p = found.patching
    denoise, noise = p.singles
    best = [edit.units[0] for edit in denoise.top(12)]
    cards = {card.latent: anchor(card) for card in found.cards if card.site == p.site}
    rows = [
        (
            report.Link(str(latent), cards[latent]) if latent in cards else str(latent),
            cell(denoise.of(latent)),
            cell(noise.of(latent)),
            int(denoise.ran[:, latent].sum()),
        )
        for latent in best
    ]
    table = Table(
        ["latent", "denoising", "noising", "pairs where it differs"],
        rows,
        f"The 12 latents that restore most alone at {p.site}, at all positions; n = {p.pairs} pairs. {INTERVALS}",
    )
    text = (
        f"The clean prompt names the indirect object once (logit difference {p.clean:.2f}); in the corrupted one the "
        f"other name is the answer ({p.corrupted:.2f}). Denoising patches clean latents into the corrupted run "
        "(sufficiency), noising corrupted latents into the clean run (necessity), at all positions, error term kept. 0 "
        "is the base run, 1 the source run; nothing is clipped. Patching a run with itself changes no logit by more "
        f"than {p.self_patch_error:.1g}.\n\n"
        "In the first two charts the top latents are each prompt's own, ranked by integrated gradients on that prompt, "
        "then patched exactly. In the third they are one fixed set, ranked on the `select` split, whose names are "
        "others: what it lacks against the first is how far the latents stand for single names. Random and matched "
        "latents mostly do not differ between the two prompts, so that patching them is no edit at all; the hardest "
        "control is drawn from those that differ in the pair."
    )
    blocks: list[Block] = [
        effect_chart("Denoising: each prompt's own top latents", p.denoise, p.pairs),
        effect_chart("Noising: each prompt's own top latents", p.noise, p.pairs),
        effect_chart("Denoising: one set of latents for all prompts", p.fixed, p.pairs),
        table,
    ]
    return Section("Patching: indirect objects", text, blocks)


RATES = {
    "clean": "benign framing",
    "jailbroken": "jailbreak framing",
    "restored": "jailbreak, restored",
    "restored_generated": "jailbreak, restored: whole answers",
    "random": "jailbreak, random latents",
    "random_generated": "jailbreak, random: whole answers",
    "matched": "jailbreak, matched random latents",
    "differing": "jailbreak, random ones that differ",
    "whole_site": "jailbreak, whole site restored",
    "harmless": "harmless in a jailbreak framing",
    "harmless_restored": "harmless, restored",
    "harmless_restored_generated": "harmless, restored: whole answers",
    "harmless_clamped": "harmless, set to a refusal's mean",
}


def _restoration(found: "Findings") -> Section:
    r, n = found.restoration, found.restoration.rates["restored"].n
    values = [r.rates[key] for key in RATES]
    bars = Bars("refused", [v.value for v in values], [v.low for v in values], [v.high for v in values])
    chart = BarChart(
        "Share of prompts refused",
        list(RATES.values()),
        [bars],
        caption=f"n = {n} requests of the report split (harmless ones apart: {r.rates['harmless'].n}). {SHARES}",
        value_range=(0.0, 1.0),
        value_format=".0%",
    )
    sizes = tuple(k for k, _, _ in r.curve)
    width = len(r.latents) / r.share_of_dictionary
    shares = tuple(k / width for k in sizes)
    lines = LineChart(
        "Refusals against the share of latents restored",
        f"share of the dictionary's {width:,.0f} latents restored (log scale)",
        "share refused",
        [
            band("top latents", shares, tuple(top for _, top, _ in r.curve)),
            band("random live latents", shares, tuple(other for _, _, other in r.curve)),
        ],
        f"n = {n} jailbroken requests (report split), {', '.join(map(str, sizes))} latents; refusals by the first "
        f"token of the answer; random: mean of {DRAWS} draws. {SHARES}",
        log_x=True,
        y_range=(0.0, 1.0),
        y_format=".0%",
        x_format=".1%",
    )
    text = (
        "Each harmful request is asked in a benign and in a jailbreak framing of equal length. Latents at "
        f"{r.site} are ranked on `select` by the change score S·‖d‖ at the last prompt position, their number is "
        f"chosen on `tune`, and all figures are from `report`. Restored: {len(r.latents)} latents, "
        f"{r.share_of_dictionary:.1%} of the dictionary, {r.share_of_alive:.1%} of its live latents. "
        f"That is {r.share_of_active:.1f} times the number of latents active at one position: few against the "
        "dictionary, not against what is active. What spares harmless requests is the donor, which reads their own "
        "benign framing: with the same latents set to their mean over refused requests, "
        f"{percent(r.rates['harmless_clamped'].value)} of harmless ones are refused.\n\n"
        "First-token figures patch the last prompt position. For whole answers a donor run reads the benign prompt "
        "and the tokens written so far, and the latents follow it at every step; "
        f"{r.rates['restored_degenerate_generated'].value:.0%} of those answers are degenerate text."
    )
    comparisons = [
        Comparison(
            prompt,
            [
                (f"{name}: {SAID[judge(text)]}", text)
                for name, text in zip(("jailbroken", "restored", "random latents"), texts)
            ],
            changes=True,
        )
        for prompt, *texts in r.examples
    ]
    blocks: list[Block] = [chart, lines, *comparisons, *coloured(found.restoration_texts)]
    return Section("Restoration: refusals under jailbreak", text, blocks)


def _sets(condition: "Condition") -> str:
    if len(condition.sets) > 1:
        return f"{len(condition.sets)} draws of {len(condition.sets[0])}"
    return ", ".join(map(str, *condition.sets)) if condition.sets else "–"


def _steering(s: "Steering", read: Sequence["ReadText"]) -> Section:
    rows = [(c.name, _sets(c), c.strength, cell(wilson_share(c.shown)), c.perplexity) for c in s.conditions]
    table = Table(
        ["condition", "latents", "strength", "success", "perplexity"],
        rows,
        f"n = {len(s.prompts)} prompts of the report split; each condition's strength was chosen on `tune`. {SHARES} "
        "Perplexity of the continuations under the unsteered model.",
        {"success": ".0%", "perplexity": ".2f", "strength": ".1f"},
    )
    text = (
        f"Latents at {s.site} are chosen by contrast on `select`, at positions `{s.positions}`, and added at the same. "
        "One latent, ten latents and random ones move the stream equally far at equal strength (in units of the top "
        "latent's largest activation)."
    )
    comparisons = [
        Comparison(
            prompt,
            [(f"{c.name}: {SHOWN[c.outcomes[0].shown[i]]}", c.outcomes[0].texts[i]) for c in s.conditions],
            changes=True,
        )
        for i, prompt in enumerate(s.prompts[:4])
    ]
    return Section(f"Steering: {s.concept}", text, [table, trade_off(s), *comparisons, *coloured(read)])


SHOWN = {True: "shows it", False: "does not"}
