"""Settings of the training benchmark: variants and shapes."""

from dataclasses import dataclass, replace
from typing import Literal

from saepatch.errors import UserError
from training.config import Architecture

from .common.measuring import check_counts
from .trainers import Task

HOLD = 1e-5  # learning rate of the timed steps, so low that weights stay close to their initial values


@dataclass(frozen=True)
class Variant:
    """One training step of ours, and the state of the dictionary in which it is timed."""

    architecture: Architecture
    precision: Literal["float32", "bfloat16"] = "float32"
    state: Literal["start", "settled", "dead"] = "start"

    @property
    def peer(self) -> "Variant":
        """The variant of sae_lens' step to compare with."""
        return replace(self, precision="float32")


VARIANTS: dict[str, Variant] = {
    "topk_fp32": Variant("topk"),
    "topk_bf16": Variant("topk", "bfloat16"),
    "topk_dead_fp32": Variant("topk", state="dead"),
    "batchtopk_fp32": Variant("batchtopk"),
    "batchtopk_bf16": Variant("batchtopk", "bfloat16"),
    "matryoshka_fp32": Variant("matryoshka"),
    "jumprelu_fp32": Variant("jumprelu"),
    "jumprelu_bf16": Variant("jumprelu", "bfloat16"),
    "jumprelu_settled_fp32": Variant("jumprelu", state="settled"),
    "jumprelu_settled_bf16": Variant("jumprelu", "bfloat16", "settled"),
    "standard_fp32": Variant("standard"),
    "standard_settled_fp32": Variant("standard", state="settled"),
    "gated_fp32": Variant("gated"),
    "gated_settled_fp32": Variant("gated", state="settled"),
}


@dataclass(frozen=True)
class TrainingBenchmark:
    """Time training steps against sae_lens, and compare the dictionaries after as many tokens."""

    out: str = ""
    """Folder for summary.json; empty: the table is printed, and no file is written."""
    variants: tuple[str, ...] = tuple(VARIANTS)
    """Variants to measure."""
    rounds: int = 5
    """Number of rounds in which all variants are timed; medians are reported."""
    steps: int = 3
    """Steps of each variant per round."""
    threads: int = 1
    """Threads of torch. With more than one, use the wall-time ratios: processor time is summed over threads."""
    d_in: int = 512
    """Width of the timed activations."""
    d_sae: int = 8192
    """Latents of the timed dictionaries."""
    batch: int = 2048
    """Rows per timed step."""
    k: int = 32
    """Number of active latents, and of directions summed in each row of the activations."""
    quality_rates: tuple[float, ...] = (3e-3,)
    """Learning rates at which quality is compared; `fvu` is that of the largest. Empty: no comparison."""
    quality_steps: int = 1500
    """Steps of the quality runs."""
    quality_d_in: int = 64
    """Width of the activations in quality runs."""
    quality_d_sae: int = 512
    """Latents of the dictionaries in quality runs."""
    quality_batch: int = 512
    """Rows per step in quality runs."""
    quality_k: int = 8
    """Number of active latents in quality runs."""
    memory: bool = True
    """Also measure memory, in a process of its own for each variant and trainer."""
    compile: bool = False
    """Let torch compile those of our steps that gain from it."""
    quick: bool = False
    """Tiny shapes, to test in seconds that the benchmark runs; its figures mean nothing."""
    seed: int = 0
    """Seed of the data and of the weights."""

    def __post_init__(self) -> None:
        check_counts(rounds=self.rounds, steps=self.steps, threads=self.threads, quality_steps=self.quality_steps)
        if unknown := [name for name in self.variants if name not in VARIANTS]:
            raise UserError(f"unknown variant {unknown[0]!r}: use {', '.join(VARIANTS)}")
        if not self.variants:
            raise UserError("no variants: give at least one")

    @property
    def chosen(self) -> dict[str, Variant]:
        return {name: VARIANTS[name] for name in self.variants}

    def shaped(self) -> "TrainingBenchmark":
        """The settings, with tiny shapes if `quick` is set."""
        if not self.quick:
            return self
        return replace(
            self,
            rounds=min(self.rounds, 2),
            steps=min(self.steps, 2),
            d_in=16,
            d_sae=64,
            batch=32,
            k=4,
            quality_d_in=16,
            quality_d_sae=64,
            quality_batch=32,
            quality_k=4,
            quality_steps=20,
            quick=False,
        )

    def timed_task(self, variant: Variant) -> Task:
        return Task(
            variant.architecture,
            self.d_in,
            self.d_sae,
            self.k,
            self.batch,
            lr=HOLD,
            precision=variant.precision,
            compile=self.compile,
            seed=self.seed,
        )

    def quality_task(self, variant: Variant, rate: float) -> Task:
        return Task(
            variant.architecture,
            self.quality_d_in,
            self.quality_d_sae,
            self.quality_k,
            self.quality_batch,
            steps=self.quality_steps,
            lr=rate,
            sparsity_warmup=0.1,
            warmup=0.05,
            decay=0.2,
            precision=variant.precision,
            seed=self.seed,
        )
