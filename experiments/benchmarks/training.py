"""How fast is training compared with sae_lens' trainer, and are dictionaries as good after as many tokens?

    python -m experiments.benchmarks.training --out runs/training

**Speed.** A whole step without data loading: `training.steps.learner.Learner.step` against `SAETrainer.step` with its
defaults (float32, no autocast). Both have the same weights and the same activations, sums of planted directions with
noise. In each round all variants run in turn, a few steps each; a variant's ratio in a round is the ratio of medians,
and the figure is the median over rounds. The clock is processor time, which other load on the machine affects little;
wall time is reported too. In `settled` variants, `k` latents are active per position, as late in training; otherwise
standard, gated and jumprelu have their initial weights, with which half of all latents are active. In `dead` variants,
half the dictionary is dead and learns from the auxiliary loss.

**Quality.** Both train from their own initial weights on the same rows at the same rate; the saved dictionaries are
evaluated on held-out rows. Where a penalty determines the number of active latents, our penalty is tuned to match
theirs (within 2 %, in at most 6 runs), since more active latents alone lower the error.

**Memory.** Peak resident memory of a process of its own, minus that before its dictionary is made: weights, gradients,
Adam's moments and temporaries of a step.
"""

import logging
import math
import os
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from importlib.util import find_spec
from statistics import median
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from saepatch.cli.parser import run_config
from saepatch.errors import UserError
from saepatch.records.files import check_writable
from saepatch.records.provenance import versions
from saepatch.records.tables import text_table

from .common.measuring import write_results
from .trainers import (
    OURS,
    SAE_LENS,
    SIDES,
    Planted,
    Side,
    Task,
    fit,
    peak_mb,
    quality,
    settled_weights,
    start_weights,
)
from .training_settings import VARIANTS, TrainingBenchmark, Variant

log = logging.getLogger("experiments.benchmarks")  # by name: run as a module, this file is `__main__`

POOL = 4  # number of batches that the timed steps cycle through
HELD_OUT = 8192
PENALISED = ("standard", "gated", "jumprelu")  # others have `k` active latents


@dataclass(eq=False)
class Times:
    """Milliseconds per step in each round: processor time and wall time."""

    cpu: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)


@dataclass(eq=False)
class Speed:
    """Times of our variants by name, and of sae_lens' steps by variant."""

    ours: dict[str, Times]
    theirs: dict[Variant, Times]

    def ratios(self, name: str, clock: Literal["cpu", "wall"] = "cpu") -> list[float]:
        """Time of sae_lens relative to ours, in each round."""
        theirs = self.theirs[VARIANTS[name].peer]
        return [b / a for a, b in zip(getattr(self.ours[name], clock), getattr(theirs, clock), strict=True)]

    def auxiliary(self) -> dict[str, float]:
        """Time that half a dictionary of dead latents adds to a step, relative to a step without dead latents."""
        dead, alive = "topk_dead_fp32", "topk_fp32"
        if not {dead, alive} <= set(self.ours):
            return {}
        sides = {
            OURS: (self.ours[dead], self.ours[alive]),
            SAE_LENS: (self.theirs[VARIANTS[dead]], self.theirs[VARIANTS[alive]]),
        }
        return {
            side: median(a / b - 1 for a, b in zip(with_dead.cpu, without.cpu, strict=True))
            for side, (with_dead, without) in sides.items()
        }


def time_steps(config: TrainingBenchmark) -> Speed:
    """Run all variants, and the steps that they are compared with, in rounds."""
    planted = Planted.of(config.d_in, config.k, config.seed)
    pool = [planted.rows(config.batch, seed) for seed in range(POOL)]
    groups: dict[Variant, dict[str, Side]] = {}
    for name, variant in config.chosen.items():
        group = groups.setdefault(variant.peer, {})
        if not group:
            group[SAE_LENS] = prepared(config, SAE_LENS, variant.peer, pool[0])
        group[name] = prepared(config, OURS, variant, pool[0])
    speed = Speed({name: Times() for name in config.variants}, {peer: Times() for peer in groups})
    for sides in groups.values():
        for side in sides.values():
            side.step(pool[0])  # allocate optimiser state and set up libraries, untimed
    for number in range(config.rounds):
        log.info("round %d of %d", number + 1, config.rounds)
        for peer, sides in groups.items():
            for name, side in sides.items():
                times = speed.theirs[peer] if name == SAE_LENS else speed.ours[name]
                cpu, wall = zip(*(_ms(side, pool[i % POOL]) for i in range(config.steps)))
                times.cpu.append(median(cpu))
                times.wall.append(median(wall))
    return speed


def prepared(config: TrainingBenchmark, side: str, variant: Variant, x: Float[Tensor, "batch d_in"]) -> Side:
    """A trainer in the state in which the variant is timed."""
    task = config.timed_task(variant)
    trainer = SIDES[side](task, x)
    weights = settled_weights(task, x) if variant.state == "settled" else start_weights(task)
    if variant.state == "dead":
        dead = torch.randperm(task.d_sae, generator=torch.Generator().manual_seed(task.seed))[: task.d_sae // 2]
        weights["b_enc"][dead] = -float((x @ weights["W_enc"].T).max())  # so that they stay dead
        trainer.kill(dead)
    trainer.start(weights)
    return trainer


def _ms(side: Side, x: Tensor) -> tuple[float, float]:
    cpu, wall = time.process_time(), time.perf_counter()
    side.step(x)
    return 1e3 * (time.process_time() - cpu), 1e3 * (time.perf_counter() - wall)


Figures = dict[str, dict[str, float]]  # by trainer: fvu, l0, mmcs


def compare_quality(config: TrainingBenchmark, rate: float) -> dict[str, Figures]:
    """For each variant, figures of both saved dictionaries on held-out rows."""
    planted = Planted.of(config.quality_d_in, config.quality_k, config.seed)
    held_out = planted.rows(HELD_OUT, seed=-1)
    known: dict[tuple[str, Task], dict[str, float]] = {}

    def figures(side: str, task: Task) -> dict[str, float]:
        if (side, task) not in known:
            log.info("%s, %s, %s: penalty %.3g", side, task.architecture, task.precision, task.sparsity)
            fitted = fit(SIDES[side], task, lambda step: planted.rows(task.batch, step))
            known[side, task] = quality(fitted.dictionary(), held_out, planted.directions)
        return known[side, task]

    def both(variant: Variant) -> Figures:
        theirs = figures(SAE_LENS, config.quality_task(variant.peer, rate))
        task = config.quality_task(variant, rate)
        if variant.architecture not in PENALISED:
            return {OURS: figures(OURS, task), SAE_LENS: theirs}
        return {
            OURS: at_l0(theirs["l0"], lambda penalty: figures(OURS, replace(task, sparsity=penalty))),
            SAE_LENS: theirs,
        }

    return {name: both(variant) for name, variant in config.chosen.items() if variant.state == "start"}


def at_l0(l0: float, figures: Callable[[float], dict[str, float]], runs: int = 6) -> dict[str, float]:
    """Figures at the penalty that gives a target L0, or the closest of at most `runs` runs.

    L0 is about a power of the penalty, so the secant method is applied to logarithms.
    """
    penalty, measured = 1.0, figures(1.0)
    tried = [(penalty, measured)]
    for _ in range(runs - 1):
        away = math.log(max(measured["l0"], 1e-3) / l0)
        if abs(away) <= 0.02:
            break
        slope = -0.7
        if len(tried) > 1:
            (a, of_a), (b, of_b) = tried[-2:]
            slope = min(-0.2, math.log(max(of_b["l0"], 1e-3) / max(of_a["l0"], 1e-3)) / math.log(b / a))
        penalty *= math.exp(-away / slope)
        measured = figures(penalty)
        tried.append((penalty, measured))
    return min((of for _, of in tried), key=lambda of: abs(math.log(max(of["l0"], 1e-3) / l0)))


def measure_memory(config: TrainingBenchmark) -> dict[str, dict[str, float]]:
    """For each variant, the peak memory of each trainer in MB."""
    known: dict[tuple[str, Variant], float] = {}

    def peak(side: str, variant: Variant) -> float:
        if (side, variant) not in known:
            log.info("memory of %s, %s", side, variant.architecture)
            known[side, variant] = peak_mb(side, config.timed_task(variant), config.threads)
        return known[side, variant]

    return {
        name: {OURS: peak(OURS, variant), SAE_LENS: peak(SAE_LENS, variant.peer)}
        for name, variant in config.chosen.items()
        if variant.state == "start"
    }


@dataclass(eq=False)
class TrainingResults:
    """All measurements."""

    config: TrainingBenchmark
    speed: Speed
    quality: dict[float, dict[str, Figures]]  # by learning rate
    memory: dict[str, dict[str, float]]
    load: list[float]  # load average of the machine, at the beginning and the end

    def summary(self) -> dict[str, Any]:
        speed, last = self.speed, self.quality[max(self.quality)] if self.quality else {}
        walls = {name: speed.ratios(name, "wall") for name in speed.ours}
        ratios = {name: speed.ratios(name) for name in speed.ours}
        return {
            "ratios": {name: median(rounds) for name, rounds in ratios.items()},
            "wall_ratios": {name: median(rounds) for name, rounds in walls.items()},
            "spread": {name: [min(rounds), max(rounds)] for name, rounds in ratios.items()},
            "ms": {name: self._ms(name) for name in speed.ours},
            **{
                what: {name: {side: figures[what] for side, figures in sides.items()} for name, sides in last.items()}
                for what in ("fvu", "l0", "mmcs")
            },
            "quality_by_rate": {f"{rate:g}": figures for rate, figures in self.quality.items()},
            "peak_mb": self.memory,
            "auxiliary": speed.auxiliary(),
            "threads": self.config.threads,
            "load": self.load,
            "config": asdict(self.config),
            "versions": versions(),
        }

    def _ms(self, name: str) -> dict[str, float]:
        theirs = self.speed.theirs[VARIANTS[name].peer]
        return {OURS: median(self.speed.ours[name].cpu), SAE_LENS: median(theirs.cpu)}

    def table(self) -> str:
        """The printed tables: a row per variant."""
        summary = self.summary()
        head = ("times sae_lens", "lowest", "highest", "wall", "ms", "theirs", "MB", "theirs")
        rows = []
        for name in self.speed.ours:
            low, high = summary["spread"][name]
            ms, mb = summary["ms"][name], summary["peak_mb"].get(name)
            ratios = (summary["ratios"][name], low, high, summary["wall_ratios"][name])
            memory = [f"{mb[side]:.0f}" if mb else "" for side in (OURS, SAE_LENS)]
            rows.append([name, *(f"{r:.2f}" for r in ratios), f"{ms[OURS]:.1f}", f"{ms[SAE_LENS]:.1f}", *memory])
        lines = [text_table(["", *head], rows)]
        what = ("fvu", "l0", "mmcs")
        for rate, sides_by_name in self.quality.items():
            rows = [
                [name, *(f"{sides[side][figure]:.4f}" for figure in what for side in (OURS, SAE_LENS))]
                for name, sides in sides_by_name.items()
            ]
            heads = [word for figure in what for word in (figure, "theirs")]
            lines.append(text_table([f"learning rate {rate:g}", *heads], rows))
        if shares := summary["auxiliary"]:
            lines.append(f"half a dictionary of dead latents: {shares[OURS]:.0%} longer, theirs {shares[SAE_LENS]:.0%}")
        return "\n".join([*lines, f"load of the machine: {self.load[0]:.1f} before, {self.load[-1]:.1f} after"])


def run(given: TrainingBenchmark) -> None:
    """Measure, print the table, and write summary.json if a folder is given."""
    if given.out:
        check_writable(given.out)
    if find_spec("sae_lens") is None:
        raise UserError("sae_lens is not installed: pip install sae-lens")
    config = given.shaped()
    torch.set_num_threads(config.threads)
    load = [os.getloadavg()[0]]
    memory = measure_memory(config) if config.memory else {}
    speed = time_steps(config)
    compared = {rate: compare_quality(config, rate) for rate in config.quality_rates}
    results = TrainingResults(config, speed, compared, memory, [*load, os.getloadavg()[0]])
    write_results(results, config.out)


if __name__ == "__main__":
    sys.exit(run_config(TrainingBenchmark, run, "python -m experiments.benchmarks.training"))
