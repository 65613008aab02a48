"""What the benchmark of training measures, and on which shapes."""

from dataclasses import dataclass, replace
from typing import Literal

from saepatch.errors import UserError
from training.config import Architecture

from .measuring import check_counts
from .trainers import Task

HOLD = 1e-5  # learning rate of the timed steps: weights stay where they were put


@dataclass(frozen=True)
class Variant:
    """One of our steps, and the state it is timed in."""

    architecture: Architecture
    precision: Literal["float32", "bfloat16"] = "float32"
    state: Literal["start", "settled", "dead"] = "start"

    @property
    def peer(self) -> "Variant":
        """The step of sae_lens that it is compared with."""
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
    """Time steps of training side by side with sae_lens, and compare what comes of as many tokens."""

    out: str = ""
    """Folder for summary.json; empty: the table is printed and nothing is written."""
    variants: tuple[str, ...] = tuple(VARIANTS)
    """What to measure."""
    rounds: int = 5
    """How often all variants are timed; medians are reported."""
    steps: int = 3
    """Steps of each variant in a round."""
    threads: int = 1
    """Threads of torch. With more than one, look at the wall's ratios: the process's time is that of all of them."""
    d_in: int = 512
    """Width of the timed activations."""
    d_sae: int = 8192
    """Latents of the timed dictionaries."""
    batch: int = 2048
    """Rows of a timed step."""
    k: int = 32
    """Active latents; as many directions are in each row of the activations."""
    quality_rates: tuple[float, ...] = (3e-3,)
    """Learning rates at which quality is compared; `fvu` is that of the last. Empty: no comparison."""
    quality_steps: int = 1500
    """Steps of those runs."""
    quality_d_in: int = 64
    """Width of their activations."""
    quality_d_sae: int = 512
    """Latents of their dictionaries."""
    quality_batch: int = 512
    """Rows of their steps."""
    quality_k: int = 8
    """Active latents in them."""
    memory: bool = True
    """Measure memory, too: a process for each variant and side."""
    compile: bool = False
    """Have torch compile those of our steps that gain from it."""
    quick: bool = False
    """Tiny shapes: whether it runs, in seconds; no figure of it means anything."""
    seed: int = 0
    """Seed of the data and of the weights."""

    def __post_init__(self) -> None:
        check_counts(rounds=self.rounds, steps=self.steps, threads=self.threads, quality_steps=self.quality_steps)
        if unknown := [name for name in self.variants if name not in VARIANTS]:
            raise UserError(f"unknown variant {unknown[0]!r}: use {', '.join(VARIANTS)}")
        if not self.variants:
            raise UserError("no variants: name at least one")

    @property
    def chosen(self) -> dict[str, Variant]:
        return {name: VARIANTS[name] for name in self.variants}

    def shaped(self) -> "TrainingBenchmark":
        """With the tiny shapes, where these are asked for."""
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
