"""Sections of the report on dictionaries, their latents, steering and restoration."""

from collections.abc import Mapping, Sequence
from typing import Any

from saepatch.pages.charts import INTERVALS, WILSON, band, cell, size_chart
from saepatch.report import Block, LineChart, Section, Table

from ..pairs.findings import NAMES
from .stages.dictionaries import LATENTS, MASSIVE, SIZES, DictionaryQuality, TaskLatents
from .stages.restoration import RestoredBehaviour
from .stages.steering import SteeredConcept
from .stages.tasks import TASKS

# Published dictionaries of residual streams of comparable models: name, L0, FVU by depth, where the figures stand.
REFERENCES = (
    ("Gemma 2 2B, BatchTopK Matryoshka, 32k latents, 750 M tokens", "40", "0.20 at block 6, 0.27 at 12, 0.22 at 18",
     "model card of chanind/gemma-2-2b-batch-topk-matryoshka-saes-w-32k-l0-40 (1 − explained variance)"),
    ("GPT-2 small, L1, 25k latents, 300 M tokens", "23, 51, 70", "0.001 at block 3, 0.10 at 6, 0.23 at 9",
     "sae_lens' directory, gpt2-small-res-jb (1 − variance explained)"),
)  # fmt: skip


def dictionaries_section(qualities: Sequence[DictionaryQuality]) -> Section:
    columns = ["site", "measured on", "FVU", "L0", "CE recovered", "BOS", "massive tokens", "massive", "FVU, others"]
    rows = [
        (q.site, "held-out text" if q.held_out else "the first texts", q.fvu, q.l0, q.ce_recovered, q.bos_share,
         q.massive_tokens, q.massive_share, q.fvu_others)
        for q in qualities
    ]  # fmt: skip
    caption = (
        f"BOS and massive: their shares of the sum of |x|² over all tokens; massive tokens: share of ordinary tokens "
        f"whose norm is above {MASSIVE:g} medians; FVU, others: at the other ordinary tokens. The last four are over "
        "the beginnings of the first texts."
    )
    formats = dict.fromkeys(columns[5:8], ".1%") | {"FVU": ".3f", "CE recovered": ".3f", "FVU, others": ".3f"}
    published = Table(
        ["published dictionaries", "L0", "FVU", "source"],
        REFERENCES,
        "For comparison: other models, other texts, and far more training tokens.",
    )
    return Section("Dictionaries", "", [Table(columns, rows, caption, formats), published])


def latent_figures(latents: TaskLatents) -> dict[str, Any]:
    verified = latents.attribution.verified
    assert verified is not None
    return {
        **{
            d: {str(k): top.as_list() for k, top in zip(curve.sizes, curve.top, strict=True)}
            for d, curve in latents.curves.items()
        },
        "pearson": verified.pearson(),
        "missed_at_most": verified.missed(max(1, verified.largest // 5))[2] if verified.sampled else 0.0,
    }


def latents_chart(name: str, latents: TaskLatents) -> LineChart:
    """Latents, their controls and other directions patched together, denoising."""
    curve = latents.curves["denoise"]
    kinds = {"latents": curve.top, "random latents": curve.random, "matched latents": curve.matched}
    series = [band(kind, curve.sizes, effects) for kind, effects in kinds.items()]
    for kind, other in latents.others.items():
        if kind != LATENTS and other.sizes:
            effects = other.effects["denoise"]
            series.append(band(kind, other.sizes, [effects.of(number) for number in range(len(other.sizes))]))
    caption = f"At {latents.site}. All latents together, error term kept: {curve.every}. {INTERVALS}"
    return size_chart(f"{TASKS[name].title}: what few units restore", "units patched together", series, caption)


def latents_section(latents: Mapping[str, TaskLatents]) -> Section:
    columns = ["task", "site", "direction", "latents", "effect", "random", "matched"]
    rows = [
        (TASKS[name].title, site.site, NAMES[d], k, *map(cell, (top, random, matched)))
        for name, site in latents.items()
        for d, curve in site.curves.items()
        for k, top, random, matched in zip(curve.sizes, curve.top, curve.random, curve.matched, strict=True)
    ]
    checked = [
        (TASKS[name].title, site.site, len(site.attribution), figures["pearson"], figures["missed_at_most"])
        for name, site in latents.items()
        for figures in (latent_figures(site),)
    ]
    chosen = [
        (TASKS[name].title, site, restored, "chosen" if site == of.site else "")
        for name, of in latents.items()
        for site, restored in of.on_select.items()
    ]
    blocks: list[Block] = [
        *(latents_chart(name, of) for name, of in latents.items()),
        Table(
            ["task", "site", "effect on select", ""],
            chosen,
            f"What at most {max(SIZES)} latents of a site restore on half of the select pairs, ranked on the other "
            "half. The site with the largest effect is measured on report.",
            {"effect on select": ".3f"},
        ),
        Table(columns, rows, f"The first latents by attribution on select, patched together. {INTERVALS}"),
        Table(
            ["task", "site", "nodes", "Pearson", "missed, at most"],
            checked,
            "Attribution against exact effects: the correlation over verified nodes, and the upper bound (95 %) on "
            "nodes that were not run with an effect as large as the upper fifth of those verified.",
            {"Pearson": ".3f", "missed, at most": ",.0f"},
        ),
    ]
    compared = [
        (TASKS[name].title, site.site, kind, NAMES[d], k, cell(effects.of(number)))
        for name, site in latents.items()
        for kind, other in site.others.items()
        for d, effects in other.effects.items()
        for number, k in enumerate(other.sizes)
    ]
    blocks.append(
        Table(
            ["task", "site", "directions", "direction", "number", "effect"],
            compared,
            f"Latents beside as many other directions, each kind ranked by attribution on select. {INTERVALS}",
        )
    )
    return Section("Latents", "", blocks)


def steering_section(steered: Sequence[SteeredConcept]) -> Section:
    rows = [
        (each.name, name, *map(cell, (point.success, point.degenerate, point.perplexity, point.kl)),
         point.norm or "", each.prefixes.get(name, ""))
        for each in steered
        for name, point in {"unsteered": each.unsteered, **each.chosen}.items()
    ]  # fmt: skip
    texts = [
        (each.name, name, point.texts[0])
        for each in steered
        for name, point in {"unsteered": each.unsteered, **each.chosen}.items()
    ]
    columns = ["concept", "method", "success", "degenerate", "perplexity", "KL", "strength", "prefix"]
    caption = (
        f"Report prompts, each method at the strength that was best on tune, within ten times the perplexity without "
        f"steering. Success: share of continuations that the concept's list of words tells. Strength: norm of the "
        f"perturbation in units of the site's median norm. KL: nats per token. {WILSON}"
    )
    sites = ", ".join(f"{each.name}: latents {', '.join(map(str, each.latents))} of {each.site}" for each in steered)
    formats = {"success": ".0%", "degenerate": ".0%", "perplexity": ".1f", "KL": ".2f"}
    blocks = [
        Table(columns, rows, caption, formats),
        Table(["concept", "method", "first continuation"], texts, "The first report prompt of each concept."),
    ]
    return Section("Steering", f"{sites}.", blocks)


def restoration_section(restored: RestoredBehaviour) -> Section:
    rows = [(name, cell(restored.share(name)), answers.texts[0]) for name, answers in restored.answers.items()]
    text = (
        f"The prompt asks for English. Restored at {restored.site} ({restored.d_sae} latents), at the last token of "
        "the prompt and at all generated tokens, from the run on the prompt that asks for French."
    )
    caption = f"Share of answers whose first line is in French, over {restored.prompts} report prompts. {WILSON}"
    table = Table(["restored", "in French", "first answer"], rows, caption, {"in French": ".0%"})
    return Section("Restoration of a suppressed behaviour", text, [table])


def steering_figures(steered: Sequence[SteeredConcept]) -> dict[str, Any]:
    return {
        each.name: {
            name: {
                "success": point.success.as_list(),
                "perplexity": point.perplexity.as_list(),
                "kl": point.kl.as_list(),
                "strength": point.norm,
            }
            for name, point in {"unsteered": each.unsteered, **each.chosen}.items()
        }
        for each in steered
    }


def direction_figures(latents: TaskLatents) -> dict[str, Any]:
    return {
        kind: {
            d: {str(k): effects.of(number).as_list() for number, k in enumerate(other.sizes)}
            for d, effects in other.effects.items()
        }
        for kind, other in latents.others.items()
        if kind != LATENTS
    }
