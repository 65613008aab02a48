"""Run all stages of the demo and write its rows, summary and report."""

import logging
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from saepatch import organism
from saepatch.demo import looks, stages
from saepatch.demo.page import page
from saepatch.demo.results import Findings, RestoredRefusals, Steering
from saepatch.dictionaries.dictionary import Dictionary
from saepatch.dictionaries.loading import load_saes
from saepatch.errors import UserError
from saepatch.measure.quality import splice_qualities
from saepatch.model.language_model import LanguageModel
from saepatch.model.sites import Site
from saepatch.organism.checks import evaluate_organism
from saepatch.pages import track_page
from saepatch.pages.charts import effect_chart
from saepatch.reading.cards import read_texts
from saepatch.records.clock import stage
from saepatch.records.files import output_folder, write_json
from saepatch.records.provenance import Provenance, versions
from saepatch.records.rows import write_rows
from saepatch.report import KEPT, Page, keep_page, write_figure, write_page
from saepatch.runs.interpret import read_model
from saepatch.runs.ownership import check_owner
from saepatch.settings.demo import DemoConfig
from saepatch.tracking.open import RunDescription, Tracker, open_tracker

log = logging.getLogger(__name__)


def run_demo(config: DemoConfig) -> Findings:
    """Measure splice quality, patching, restoration and steering on the embedded model; writes to `config.out`.

    Raises:
        UserError: the output folder cannot be written or holds another run, or a model, site or dictionary does not
            fit.
    """
    torch.manual_seed(config.seed)
    check_owner(Path(config.out), "demo", KEPT)
    clock: dict[str, float] = {}
    with stage("load", clock, log):
        model = read_model(config)
        saes = load_saes(config.sae, model.device, every_position=config.every_position)
        for dictionary in saes.values():
            dictionary.check(model)
        for site in (config.ioi_site, config.steering_site, config.safety_site):
            if site:
                _at(saes, site)
    out = output_folder(config.out)
    about = RunDescription(out, run="demo", config=asdict(config), job_type="demo", axes={"splice/*": "layer"})
    with open_tracker(config.track, about) as tracker:
        findings = _measure(config, model, saes, clock, tracker)
        tracker.summarise(_headline(findings))
        track_page(_write(findings, out), out / "report.html", tracker)
    return findings


def _measure(
    config: DemoConfig, model: LanguageModel, saes: dict[Site, Dictionary], clock: dict[str, float], tracker: Tracker
) -> Findings:
    n, seed, bars = config.pairs, config.seed, not (config.quiet or config.json)
    with stage("tasks", clock, log):
        measures = evaluate_organism(model.hf, model.tokenizer, seed=seed)
    with stage("splice", clock, log):
        measured = splice_qualities(model, list(saes.values()), model.tokenize(organism.texts()))
        quality = [each for each, _ in measured]
        statistics = {site: each for site, (_, each) in zip(saes, measured, strict=True)}
        for layer, each in enumerate(quality):
            tracker.log({"splice/ce_recovered": each.ce_recovered, "splice/fvu": each.fvu}, layer)
    with stage("patching", clock, log):
        dictionary = _at(saes, config.ioi_site)
        patching = stages.patching(model, dictionary, statistics[dictionary.site], n, seed, bars)
    with stage("restoration", clock, log):
        site = config.safety_site
        dictionary = _at(saes, site) if site else stages.choose_safety_site(model, saes, n, seed)
        restoration = stages.restoration(model, dictionary, statistics[dictionary.site], n, seed)
    with stage("steering", clock, log):
        dictionary = _at(saes, config.steering_site)
        stats = statistics[dictionary.site]
        steering = [stages.steering(model, dictionary, stats, c, seed) for c in stages.chosen_concepts(model, n, seed)]
    with stage("single latents", clock, log):
        best = [edit.units[0] for edit in patching.singles[0].top(looks.BY_POSITION)]
        maps = looks.read_maps(model, list(saes.values()), n, seed, bars)
        few = looks.CARDS
        lists = [(patching.dictionary, best), (_at(saes, restoration.site), restoration.latents[:few])]
        lists += [(_at(saes, each.site), each.of("top10").sets[0][:few]) for each in steering]
        lists += [(sae, maps.leading(site, looks.LEADING)) for site, sae in saes.items()]
        cards = looks.read_cards(model, lists)
        restored = read_texts(model, _at(saes, restoration.site), restoration.latents, _answers(restoration))
        steered = {
            each.concept: read_texts(model, _at(saes, each.site), each.of("top1").sets[0], _continued(each))
            for each in steering
        }
    return Findings(
        config, model, saes, measures, quality, patching, restoration, steering, maps, cards, restored, steered, clock
    )


def _answers(restoration: RestoredRefusals) -> list[tuple[str, str]]:
    """Prompts with their answers: as the jailbroken model reads them, and as the donor reads them."""
    named = []
    for (prompt, plain, restored, _), donor in zip(restoration.examples[:2], restoration.donors):
        named.append(("Jailbroken, nothing restored", prompt + plain))
        named.append(("What is restored: the donor reads the benign prompt and the answer", donor + restored))
    return named


def _continued(steering: Steering) -> list[tuple[str, str]]:
    """The first prompt with its continuations, to be read again without steering."""
    prompt = steering.prompts[0]
    return [(f"{name}, read again", prompt + steering.of(name).outcomes[0].texts[0]) for name in ("unsteered", "top1")]


def _at(saes: dict[Site, Dictionary], site: str) -> Dictionary:
    wanted = Site.parse(site)
    for known, dictionary in saes.items():
        if known.same_tensor(wanted):
            return dictionary
    raise UserError(f"there is no dictionary for {site}: use one of {', '.join(map(str, saes))}")


def _headline(results: Findings) -> dict[str, float]:
    sixteen = results.patching.denoise.sizes.index(16)
    return {
        "patching/denoise_top16": results.patching.denoise.top[sixteen].value,
        "patching/denoise_random16": results.patching.denoise.random[sixteen].value,
        "restoration/refused_jailbroken": results.restoration.rates["jailbroken"].value,
        "restoration/refused_restored": results.restoration.rates["restored"].value,
    }


def summary(results: Findings) -> dict[str, Any]:
    """Content of summary.json."""
    p, r = results.patching, results.restoration
    return {
        "model": results.config.model,
        "tasks": results.tasks,
        "splice": [{"site": str(q.site)} | {key: getattr(q, key) for key in SPLICE_KEYS} for q in results.quality],
        "patching": {
            "task": "ioi",
            "pairs": p.pairs,
            "site": p.site,
            "clean": p.clean,
            "corrupted": p.corrupted,
            "ranking": "each prompt's own, by integrated gradients on it; denoise_fixed: one for all, made on select",
            **{
                f"{direction}_{line}": _points(curve.sizes, getattr(curve, line))
                for direction, curve in (("denoise", p.denoise), ("noise", p.noise))
                for line in ("top", "random", "matched")
            },
            "denoise_differing": _points(p.denoise.sizes, p.denoise.differing or ()),
            "denoise_every": p.denoise.every.value,
            "denoise_fixed": _points(p.fixed.sizes, p.fixed.top),
            "self_patch_error": p.self_patch_error,
        },
        "restoration": {
            "site": r.site,
            "latents": len(r.latents),
            "share_of_dictionary": r.share_of_dictionary,
            "share_of_alive": r.share_of_alive,
            "share_of_active": r.share_of_active,
            **{f"refused_{name}": r.rates[name].value for name in REFUSED},
            **{f"refused_{name}_control": r.rates[name].value for name in ("random", "matched", "differing")},
            "rates": {name: list(asdict(interval).values()) for name, interval in r.rates.items()},
        },
        "steering": _steering(results.steering[0]),
        "steering_all": [_steering(each) for each in results.steering],
        "seconds": results.seconds,
        "versions": versions(),
        "seed": results.config.seed,
    }


REFUSED = ("clean", "jailbroken", "restored", "restored_generated", "harmless_clamped", "harmless_restored")
SPLICE_KEYS = (
    *("ce_recovered", "ce_recovered_ordinary", "fvu", "l0", "alive_share", "identity_error"),
    *("ce_model", "ce_spliced", "kl"),
)


def _points(sizes: tuple[int, ...], intervals: tuple[Any, ...]) -> list[list[float]]:
    return [[k, interval.value] for k, interval in zip(sizes, intervals, strict=True)]


def _steering(steering: Steering) -> dict[str, Any]:
    return {"concept": steering.concept} | {
        c.name: {"success": c.success, "perplexity": c.perplexity, "strength": c.strength} for c in steering.conditions
    }


def _write(results: Findings, out: Path) -> Page:
    import yaml

    p = results.patching
    rows = [row for effects in p.singles for row in effects.rows("ioi")]
    for ranked, curve in (
        ("ranked on the pair", p.denoise),
        ("ranked on the pair", p.noise),
        ("ranked on select", p.fixed),
    ):
        rows += [row for each in curve.effects for row in replace(each, method=f"exact, {ranked}").rows("ioi")]
    rows += results.maps.rows()
    dictionary = results.patching.dictionary
    provenance = Provenance(
        model=results.model.name,
        model_hash=results.model.fingerprint,
        dictionary=dictionary.name,
        dictionary_hash=dictionary.fingerprint,
        seed=results.config.seed,
    )
    others = {str(site): sae for site, sae in results.saes.items() if sae is not dictionary}
    parts = [([row for row in rows if row.site not in others], provenance)]
    for site, sae in others.items():  # rows of latents name their dictionary
        own = replace(provenance, dictionary=sae.name, dictionary_hash=sae.fingerprint)
        parts.append(([row for row in rows if row.site == site and row.component == "latent"], own))
    streams = [row for row in rows if row.site in others and row.component != "latent"]
    write_rows([*parts, (streams, provenance)], out / "results.parquet")
    (out / "config.yaml").write_text(yaml.safe_dump(asdict(results.config)), encoding="utf-8")
    for name, curve in {"denoise": p.denoise, "noise": p.noise, "denoise_fixed": p.fixed}.items():
        write_figure(effect_chart(f"ioi at {p.site}: {name}", curve, p.pairs), out / f"{name}.svg")
    write_json(summary(results), out / "summary.json")
    drawn = page(results, provenance)
    keep_page(drawn, out / KEPT)
    write_page(drawn, out / "report.html")
    return drawn
