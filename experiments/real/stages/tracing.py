"""Stage "tracing": causal tracing of facts, with Gaussian noise on the subject and with another subject instead."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np

from saepatch.data.forms import position_labels
from saepatch.engine.corruptions import Corruption, GaussianNoise
from saepatch.facts.tracing import WINDOW, corrupted_positions, restore_windows
from saepatch.measure.results.effects import Effects
from saepatch.model.language_model import LanguageModel
from saepatch.records.statistics import Interval, bootstrap_mean

from ...common.kept import KeptResults
from .patching import one_form
from .tasks import TaskPairs

SIGMA = 3.0  # standard deviations of the model's embeddings
TOKENS, NOISE = "token replacement", "Gaussian noise"


@dataclass(frozen=True, eq=False)
class Tracing:
    """Restoration of clean states, and of windows of MLPs, in corrupted runs, over `pairs` facts of one form.

    `states` and `mlps` are effects by corruption; an edit's site is that of its middle layer. `subject` are the
    positions of the subject's tokens.
    """

    columns: Sequence[str]
    pairs: int
    subject: tuple[int, ...]
    states: Mapping[str, Effects]
    mlps: Mapping[str, Effects]


def trace(model: LanguageModel, task: TaskPairs, most: int, samples: int, seed: int, kept: KeptResults) -> Tracing:
    """Trace facts of one form: subjects of one length in one template."""
    pairs = one_form(model, task.framed["report"], most)
    subject = corrupted_positions(model, pairs)
    corruptions: dict[str, Corruption | None] = {
        TOKENS: None,
        NOISE: GaussianNoise(subject, sigma=SIGMA, samples=samples, seed=seed),
    }
    states, mlps = {}, {}
    for name, corruption in corruptions.items():
        restore = partial(restore_windows, model, pairs, subject[0], corruption)
        states[name] = kept.get(f"tracing/states/{name}", Effects, partial(restore, "resid_post", 1))
        if "mlp_out" in model.layout.streams:
            width = max(1, round(WINDOW * model.n_layers))
            mlps[name] = kept.get(f"tracing/mlps/{name}", Effects, partial(restore, "mlp_out", width))
    return Tracing(position_labels(model, pairs), len(pairs), subject, states, mlps)


def early_mlps(traced: Tracing, corruption: str, position: int) -> np.ndarray:
    """Change of the metric by MLP windows at one position, mean over windows of the first half of layers [pairs]."""
    effects = traced.mlps[corruption]
    half = max(edit.site.layer for edit in effects.edits) / 2
    mine = [i for i, edit in enumerate(effects.edits) if edit.position == position and edit.site.layer <= half]
    return effects.change[:, mine].mean(1)


def subject_over_last(traced: Tracing, corruption: str, seed: int = 0) -> Interval:
    """Early MLPs at the subject's last token minus the same at the last token of the prompt, as a share of the gap."""
    effects = traced.mlps[corruption]
    last = max(edit.position or 0 for edit in effects.edits)
    change = early_mlps(traced, corruption, traced.subject[-1]) - early_mlps(traced, corruption, last)
    return effects.ratio(change, seed)


def noise_over_tokens(traced: Tracing, seed: int = 0) -> Interval:
    """Early MLPs at the subject's last token under Gaussian noise minus the same under token replacement, each as a
    share of its own mean gap, paired by prompt."""
    gaps = {name: effects.gap.mean() for name, effects in traced.mlps.items()}
    shares = {name: early_mlps(traced, name, traced.subject[-1]) / gap for name, gap in gaps.items()}
    return bootstrap_mean(shares[NOISE] - shares[TOKENS], seed=seed)
