"""A study of a real language model that anyone can repeat: every stage on pairs that the model gets right.

    python -m experiments.real --model google/gemma-3-270m --data TEXTS.jsonl --out runs/real [--quick true]

Stages: the tasks' accuracies; patching by layer, position, head and MLP, with the roles of heads for indirect objects;
causal tracing of facts; dictionaries at three depths (trained, or given with --sae); their latents on every task,
beside neurons, principal components and other directions; steering; restoration. What does not apply to a model is left
out with its reason. Every result is kept as it is measured, and the same command continues from there.
"""

import logging
import sys
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from saepatch.data.texts import load_texts
from saepatch.dictionaries.dictionary import Dictionary
from saepatch.engine.passes.shared_runs import shared_runs
from saepatch.errors import UserError
from saepatch.model.language_model import LanguageModel
from saepatch.model.loading.load import load_model
from saepatch.model.sites import Site
from saepatch.records.clock import stage
from saepatch.records.provenance import json_hash, versions
from saepatch.runs.measurements import measurements
from saepatch.runs.ownership import check_owner

from ..common.kept import KeptResults
from ..common.tracked import show
from .claims import (
    OtherRun,
    direction_claims,
    latents_claims,
    patching_claims,
    restoration_claims,
    steering_claims,
    tracing_claims,
)
from .page import printed, write
from .results import RealResults
from .settings import QUICK, RealConfig
from .stages.dictionaries import dictionaries, qualities, task_latents
from .stages.patching import patching
from .stages.restoration import RestoredBehaviour, restoration
from .stages.steering import SteeredConcept, steer
from .stages.tasks import TASKS, TaskPairs, read_task
from .stages.texts import concepts
from .stages.tracing import trace

log = logging.getLogger(__name__)

UNREACHED = "neither steering nor a prompt makes the model show it, as far as the list of words tells"


def run(config: RealConfig) -> RealResults:
    """Run or resume the study; files go to `config.out`.

    Raises:
        UserError: an output folder that cannot be written or holds another run, a model that cannot be loaded, or a
            model that gets too few pairs of every task right.
    """
    config = replace(config, **QUICK) if config.quick else config  # type: ignore[arg-type]
    torch.manual_seed(config.seed)
    out, seconds = Path(config.out), dict[str, float]()
    check_owner(out, "real")
    beside = OtherRun.read(config.beside) if config.beside else None
    with stage("load", seconds, log):
        model = load_model(config.model, config.device, config.dtype)
    with measurements(out, "real", _deciding(config, model)) as kept:
        results = replace(_measure(config, model, KeptResults(kept, seconds)), beside=beside)
        show(config, "real", *write(results, out))
    sys.stdout.write(f"{printed(results)}\n\nReport: {out / 'report.html'}   Figures: {out / 'summary.json'}\n")
    return results


def _deciding(config: RealConfig, model: LanguageModel) -> dict[str, Any]:
    """By name, what must be the same for results to belong to one run."""
    free = ("out", "quick", "device", "track", "data", "sae", "beside")
    return {
        "settings": {name: value for name, value in asdict(config).items() if name not in free},
        "model's weights": model.fingerprint,
        **({"data's texts": json_hash(load_texts(config.data))} if config.data else {}),
        "versions": versions(),
    }


def _measure(config: RealConfig, model: LanguageModel, kept: KeptResults) -> RealResults:
    tasks, usable = dict[str, TaskPairs](), dict[str, TaskPairs]()
    for name in config.tasks:
        most = config.beside_worked if usable else config.pairs
        tasks[name] = read_task(model, name, most, config.seed, kept)
        if not tasks[name].reason:
            usable[name] = tasks[name]
    left_out = {TASKS[name].title: task.reason for name, task in tasks.items() if task.reason}
    for name, reason in left_out.items():
        log.warning("%s left out: %s", name, reason)
    if not usable:
        raise UserError(f"{config.model} gets no task right: " + "; ".join(map(": ".join, left_out.items())))
    with shared_runs():
        patched = patching(model, usable, config.group, config.seed, kept)
    if not patched.heads:
        left_out["Heads"] = f"the layout of {model.name} offers no attention heads"
    if not patched.roles:
        left_out["Roles of heads"] = "they are defined for indirect objects, on models with attention heads"
    traced = None
    if "facts" in usable:
        traced = trace(model, usable["facts"], config.traced, config.samples, config.seed, kept)
    else:
        left_out["Causal tracing"] = "it needs the facts"
    saes, measured, latents = {}, [], {}
    if config.data or config.sae:
        saes = dictionaries(config, model, kept)
        measured = qualities(config, model, saes, kept) if config.data else []
        latents = {name: task_latents(config, model, saes, task, kept) for name, task in usable.items()}
    else:
        left_out["Dictionaries, latents, steering and restoration"] = "neither --data nor --sae is given"
    steered, restored, omitted = _generate(config, model, saes, kept)
    left_out |= omitted
    claims = [
        *patching_claims(patched),
        *(tracing_claims(traced) if traced else ()),
        *latents_claims(latents),
        *direction_claims(latents),
        *steering_claims([each for each in steered if each.reached]),
        *restoration_claims(restored),
    ]
    return RealResults(
        config,
        model,
        tasks,
        patched,
        traced,
        measured,
        latents,
        steered,
        restored,
        claims,
        None,
        left_out,
        kept.seconds,
        kept.processor,
    )


def _generate(
    config: RealConfig, model: LanguageModel, saes: Mapping[Site, Dictionary], kept: KeptResults
) -> tuple[list[SteeredConcept], RestoredBehaviour | None, dict[str, str]]:
    """Steering and restoration, and the reasons for what is left out of them."""
    steered, left_out = list[SteeredConcept](), dict[str, str]()
    if not saes:
        return steered, None, left_out
    for concept in concepts():
        try:
            steered.append(steer(config, model, saes, concept, kept))
        except UserError as error:  # as of prompts longer than the context, or too few latents that are ever active
            left_out[f"Steering: {concept.name}"] = str(error)
    left_out |= {f"Steering: {each.name}": UNREACHED for each in steered if not each.reached}
    try:
        restored = restoration(config, model, saes, kept)
    except UserError as error:
        restored = str(error)
    if isinstance(restored, str):
        return steered, None, left_out | {"Restoration": restored}
    return steered, restored, left_out


def main(config: RealConfig) -> None:
    run(config)
