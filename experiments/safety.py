"""How few latents bring refusals back?

    python -m experiments.safety --out runs/safety

Latents are restored while the model generates, in two settings. A: the organism's base model, which answers everything,
is restored from the aligned model reading the same tokens (Chen et al. 2024, on latents). B: the aligned model under a
jailbreak is restored from itself reading the same request in a benign framing. Latents of all layers but the last fifth
share one budget (layers are added where `tune` shows that even the whole residual would not restore refusals). Latents
are ranked on `select`, ranking and number are chosen on `tune`, and all figures are from `report`. A stopped run
continues when the same command is given again.
"""

import copy
import logging
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from saepatch import organism
from saepatch.cli.parser import run_config
from saepatch.dictionaries.loading import load_saes
from saepatch.errors import UserError
from saepatch.measure.quality import LatentStatistics, latent_statistics
from saepatch.model.language_model import LanguageModel
from saepatch.model.loading.load import load_model, wrap_model
from saepatch.model.sites import Site
from saepatch.organism import world
from saepatch.records.clock import stage
from saepatch.restoration.restore import assistant_header, first_tokens, restore
from saepatch.runs.measurements import measurements
from saepatch.runs.ownership import check_owner
from saepatch.splicing.donors import OtherModel

from .common.tracked import show
from .restoration.curves import choose, dense, measure, neurons, rank
from .restoration.guards import guards
from .restoration.page import printed, write
from .restoration.probes import (
    by_kind,
    depths,
    extended,
    held_out,
    layers,
    utility,
)
from .restoration.results import SETTINGS, Result, SafetyConfig, SafetyResults
from .restoration.runs import Restored, Runs
from .restoration.settings import Setting, two_models, two_prompts

log = logging.getLogger("experiments.safety")  # by name: run as a module, this file is `__main__`


def run(config: SafetyConfig) -> SafetyResults:
    """Measure both settings; files go to `config.out`, and tables to the terminal.

    Raises:
        UserError: an output folder that cannot be written or holds another run, models and dictionaries that do not
            fit, or a chat template without an assistant's turn.
    """
    torch.manual_seed(config.seed)
    clock: dict[str, float] = {}
    out = Path(config.out)
    check_owner(out, "safety")
    with measurements(out, "safety", _deciding(config), earlier="runs.jsonl") as kept:
        with stage("load", clock, log):
            model = load_model(config.model, config.device)
            made = {"setting_a": _setting_a, "setting_b": _setting_b}
            settings = [made[name](config, model) for name in SETTINGS if name in config.settings]
            refusal_ids = first_tokens(model, world.chat("a"), [f" {text}" for text in world.REFUSAL_OPENINGS])
            runs = Runs(kept, refusal_ids, config.tokens)
        results = [_measure(config, setting, refusal_ids, runs, clock) for setting in settings]
        whole = SafetyResults(config, model, results, runs, clock)
        show(config, "safety", *write(whole, out))
    sys.stdout.write(f"{printed(whole)}\n\nReport: {out / 'report.html'}   Figures: {out / 'summary.json'}\n")
    return whole


def _setting_a(config: SafetyConfig, model: LanguageModel) -> Setting:
    saes = load_saes(config.shared_sae, config.device)
    base = load_model(config.base, config.device)
    return two_models(base, model, saes, _template(config, model), config.prompts, config.seed)


def _setting_b(config: SafetyConfig, model: LanguageModel) -> Setting:
    saes = load_saes(config.sae, config.device)
    return two_prompts(model, saes, _template(config, model), config.prompts, config.seed)


def _template(config: SafetyConfig, model: LanguageModel) -> int:
    header = config.template or assistant_header(model)
    if header is None:
        raise UserError(f"the chat template of {model.name!r} does not open an assistant's turn: give --template")
    return header


def _deciding(config: SafetyConfig) -> dict[str, Any]:
    """By name, what must be the same for answers to belong to one run."""
    free = ("out", "device", "settings", "track")
    # The names of kept answers include models and dictionaries, so a later run may add the other setting.
    kept = {name: value for name, value in asdict(config).items() if name not in free}
    return kept | {"sizes": list(config.sizes)}


def _measure(
    config: SafetyConfig, setting: Setting, refusal_ids: set[int], runs: Runs, clock: dict[str, float]
) -> Result:
    sizes, seed, name = list(config.sizes), config.seed, setting.name
    with stage(f"{name}: ranking", clock, log):
        setting = extended(setting, runs)
        requests = setting.harmful["report"]
        ranked = rank(setting, setting.harmful["select"], refusal_ids, runs, config.max_fvu)
        choice = choose(setting, ranked, setting.harmful["tune"], sizes, runs)
        top = ranked.top(choice.latents, choice.ranking)
    with stage(f"{name}: curve", clock, log):
        curve = measure(setting, ranked, choice.ranking, sizes, _statistics(setting), runs, config.draws, seed)
    with stage(f"{name}: baselines", clock, log):
        units = neurons(setting, sizes, runs, config.draws, seed)
        direction = dense(setting, runs)
        residual = runs.restored(setting, requests, Restored("full residual", None, error=True))
        everything = runs.restored(setting, requests, Restored("all latents", None))
        reconstruction = runs.reconstructed(setting, requests)
    with stage(f"{name}: layers and framings", clock, log):
        by_depth, by_layer = depths(setting, runs), layers(setting, top, runs)
        others = held_out(setting, top, sizes, refusal_ids, runs)
    with stage(f"{name}: utility and guards", clock, log):
        cost = utility(setting, setting.harmless["report"], top, "utility", runs)
        guarded = guards(setting, top, runs, config.prompts, seed)
    restored = runs.restored(setting, requests, Restored("top", top))
    return Result(
        setting=setting,
        choice=choice,
        latents=sum(map(len, top.values())),
        curve=curve,
        neurons=units,
        dense=direction,
        residual=residual,
        everything=everything,
        reconstruction=reconstruction,
        depths=by_depth,
        layers=by_layer,
        kinds=dict(by_kind(setting, restored)),
        held_out=others,
        utility=cost,
        guards=guarded,
        quality=dict(ranked.quality),
        exact=_exact(setting, runs) if setting.other is not None else None,
        examples=(curve.bare, restored, everything, curve.donor),
    )


def _statistics(setting: Setting) -> tuple[dict[Site, LatentStatistics], dict[Site, LatentStatistics]]:
    """Statistics of latents over held-out text, and over the prompts and clean prompts of `select`."""
    model, requests = setting.model, setting.harmful["select"]
    text = model.tokenize(organism.texts())
    prompts = model.tokenize([*requests.prompts, *requests.clean])
    over_text, over_prompts = (
        {site: latent_statistics(model, dictionary, tokens) for site, dictionary in setting.sites.items()}
        for tokens in (text, prompts)
    )
    return over_text, over_prompts


def _exact(setting: Setting, runs: Runs) -> bool:
    """Whether restoring the last site whole reproduces the donor, in a model that differs from it only up to there."""
    donor, last = setting.other, max(setting.sites)
    assert donor is not None
    mixed = wrap_model(copy.deepcopy(donor.hf), donor.tokenizer, "mixed")
    for layer in range(last.layer + 1):
        mixed.layout.blocks[layer].load_state_dict(setting.model.layout.blocks[layer].state_dict())
    prompts = setting.harmful["report"].prompts[:16]
    texts = restore(
        mixed, setting.sites[last], prompts, OtherModel(donor), None, "every", error=True, max_new_tokens=runs.tokens
    )
    return texts == donor.generate(prompts, runs.tokens)


def main(config: SafetyConfig) -> None:
    run(config)


if __name__ == "__main__":
    sys.exit(run_config(SafetyConfig, main, "python -m experiments.safety"))
