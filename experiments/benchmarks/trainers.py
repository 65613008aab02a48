"""Two trainers of the same dictionary on the same activations: ours, and sae_lens'.

Each starts from its own initial weights, as in normal use, unless `start` replaces them.
"""

import tempfile
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from multiprocessing import get_context
from typing import Any, Literal

import torch
from jaxtyping import Float
from torch import Tensor

from training.config import Architecture, SAEConfig, TrainingConfig
from training.ranks import ALONE
from training.steps.learner import Learner, new_weights, schedule
from training.steps.step import Weights

from .common.resident import resident_bytes

OURS, SAE_LENS = "ours", "sae_lens"
DEAD_AFTER = 1000  # steps without activation, as in sae_lens' trainer
MATRYOSHKA_LEVELS = (1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0)
_SAMPLE = 4096  # rows from which our trainer sets its scale and bias
_THEIR_NAMES = {"matryoshka": "matryoshka_batchtopk"}


@dataclass(frozen=True)
class Task:
    """Settings of a training run, the same for both trainers.

    Attributes:
        steps: Length of the schedules.
        sparsity: Coefficient of the penalty (standard, gated: L1; jumprelu: L0), after a warm-up of `sparsity_warmup`.
        warmup: Share of the steps over which the learning rate rises.
        decay: Share of the steps, at the end, over which it falls to 0.
        precision: Precision of our large products; sae_lens uses float32, its trainer's default.
        compile: Whether our step is compiled.
    """

    architecture: Architecture
    d_in: int
    d_sae: int
    k: int
    batch: int
    steps: int = 1000
    lr: float = 3e-4
    sparsity: float = 1.0
    sparsity_warmup: float = 0.0
    warmup: float = 0.0
    decay: float = 0.0
    precision: Literal["float32", "bfloat16"] = "float32"
    compile: bool = False
    seed: int = 0

    @property
    def widths(self) -> list[int]:
        """Number of latents of each level of matryoshka."""
        return [round(level * self.d_sae) for level in MATRYOSHKA_LEVELS]


class Side(ABC):
    """A trainer with its dictionary.

    Args:
        task: Settings of the run.
        sample: Activations of the training distribution.
    """

    @abstractmethod
    def __init__(self, task: Task, sample: Float[Tensor, "n d_in"]) -> None: ...

    @abstractmethod
    def step(self, x: Float[Tensor, "batch d_in"]) -> None:
        """Take a whole training step."""

    @abstractmethod
    def start(self, weights: Weights) -> None:
        """Replace the weights, with names and layout of `training.steps.step` and rows of `W_dec` of norm 1."""

    @abstractmethod
    def kill(self, latents: Tensor) -> None:
        """Mark these latents as dead."""

    @abstractmethod
    def loss(self, x: Float[Tensor, "batch d_in"]) -> float:
        """Squared error of a batch, encoded as in training, summed over d_in; takes no step."""

    @abstractmethod
    def dictionary(self) -> Any:
        """The inference dictionary, as saved."""


class Ours(Side):
    """This project's `Learner`."""

    def __init__(self, task: Task, sample: Float[Tensor, "n d_in"]) -> None:
        sae = SAEConfig(
            architecture=task.architecture,
            k=task.k,
            d_sae=task.d_sae,
            levels=list(MATRYOSHKA_LEVELS),
            sparsity=task.sparsity,
            sparsity_warmup=task.sparsity_warmup,
            penalty="step",
            dead_after=DEAD_AFTER * task.batch,
            precision=task.precision,
        )
        run = TrainingConfig(
            sae=sae,
            tokens=task.steps * task.batch,
            batch_size=task.batch,
            buffer=task.batch,
            lr=task.lr,
            warmup=task.warmup,
            decay=task.decay,
            compile=task.compile,
        )
        self.task, self.learner = task, Learner.new(sample[:_SAMPLE], run, task.seed)

    def step(self, x: Tensor) -> None:
        factor = schedule(self.learner.updates, self.task.steps, self.task.warmup, self.task.decay)
        self.learner.step(x, self.task.lr * max(factor, 0.0))

    def start(self, weights: Weights) -> None:
        self.learner.scale = 1.0
        for name, value in self.learner.weights.items():
            value.copy_(weights[name])

    def kill(self, latents: Tensor) -> None:
        self.learner.idle[latents] = 2 * self.learner.config.dead_after

    @torch.no_grad()
    def loss(self, x: Tensor) -> float:
        learner = self.learner
        step = learner.step_function(learner.weights, x * learner.scale, learner.config, learner.moment(), ALONE)
        return float(step.losses["mse"]) / learner.scale**2

    def dictionary(self) -> Any:
        return self.learner.finish()


class SaeLens(Side):
    """sae_lens' `SAETrainer`, with its defaults for the architecture."""

    def __init__(self, task: Task, sample: Float[Tensor, "n d_in"]) -> None:
        from sae_lens.config import LoggingConfig, SAETrainerConfig
        from sae_lens.saes.sae import TrainingSAE
        from sae_lens.training.sae_trainer import SAETrainer

        torch.manual_seed(task.seed)
        name = _THEIR_NAMES.get(task.architecture, task.architecture)
        sae = TrainingSAE.from_dict({"architecture": name, "d_in": task.d_in, "d_sae": task.d_sae, **_options(task)})
        config = SAETrainerConfig(
            total_training_samples=task.steps * task.batch,
            train_batch_size_samples=task.batch,
            lr=task.lr,
            lr_end=task.lr if task.decay else 0.0,  # None fails an assertion; unused at a constant rate
            lr_warm_up_steps=round(task.warmup * task.steps),
            lr_decay_steps=round(task.decay * task.steps),
            dead_feature_window=DEAD_AFTER,
            logger=LoggingConfig(log_to_wandb=False),
            autocast=False,
        )
        self.trainer: Any = SAETrainer(cfg=config, sae=sae, data_provider=_nothing())

    def step(self, x: Tensor) -> None:
        self.trainer.step(x)
        self.trainer.n_training_steps += 1

    @torch.no_grad()
    def start(self, weights: Weights) -> None:
        for name, value in weights.items():
            getattr(self.trainer.sae, name).copy_(value.T if name == "W_enc" else value)

    def kill(self, latents: Tensor) -> None:
        self.trainer.n_forward_passes_since_fired[latents] = 2 * DEAD_AFTER

    @torch.no_grad()
    def loss(self, x: Tensor) -> float:
        sae = self.trainer.sae
        return float((sae.decode(sae.encode_with_hidden_pre(x)[0]) - x).square().sum(-1).mean())

    def dictionary(self) -> Any:
        from sae_lens import SAE

        with tempfile.TemporaryDirectory(prefix="sae-") as folder:
            self.trainer.sae.save_inference_model(folder)
            return SAE.load_from_disk(folder).eval().requires_grad_(False)


SIDES: dict[str, type[Side]] = {OURS: Ours, SAE_LENS: SaeLens}


def _options(task: Task) -> dict[str, Any]:
    """Options of sae_lens' config for the architecture."""
    warm_up = round(task.sparsity_warmup * task.steps)
    if task.architecture in ("standard", "gated"):
        return {"l1_coefficient": task.sparsity, "l1_warm_up_steps": warm_up}
    if task.architecture == "jumprelu":
        return {"l0_coefficient": task.sparsity, "l0_warm_up_steps": warm_up}
    return {"k": task.k} | ({"matryoshka_widths": task.widths} if task.architecture == "matryoshka" else {})


def _nothing() -> Iterator[Tensor]:
    """The data for the trainer's own loop, which is not used."""
    return iter(())


@dataclass(frozen=True, eq=False)
class Planted:
    """Activations with planted structure: each is a sum of a few out of many directions, plus noise.

    Their mean norm is √d_in.

    Attributes:
        directions: Unit vectors.
        active: Number of directions summed in each row.
        noise: Standard deviation of the noise, relative to that of the structure.
    """

    directions: Float[Tensor, "features d_in"]
    active: int
    noise: float = 0.1

    @classmethod
    def of(cls, d_in: int, active: int, seed: int) -> "Planted":
        """Twice as many random directions as dimensions."""
        directions = torch.randn(2 * d_in, d_in, generator=torch.Generator().manual_seed(seed))
        return cls(torch.nn.functional.normalize(directions, dim=-1), active)

    def rows(self, n: int, seed: int) -> Float[Tensor, "n d_in"]:
        """`n` activations, the same for the same seed."""
        generator = torch.Generator().manual_seed(seed)
        features, d_in = self.directions.shape
        chosen = torch.rand(n, features, generator=generator).topk(self.active, sorted=False).indices
        values = 0.5 + torch.rand(n, self.active, generator=generator)
        sums = torch.zeros(n, features).scatter_(1, chosen, values) @ self.directions
        scale = (d_in / self.active) ** 0.5
        return scale * sums + self.noise * torch.randn(n, d_in, generator=generator)


@torch.no_grad()
def quality(
    dictionary: Any, x: Float[Tensor, "n d_in"], directions: Float[Tensor, "features d_in"]
) -> dict[str, float]:
    """Quality of an inference dictionary on rows that are sums of the directions.

    Returns:
        fvu: Fraction of variance unexplained.
        l0: Mean number of active latents per row.
        mmcs: Mean over the directions of the largest cosine with a decoder row (mean max cosine similarity).
    """
    acts = dictionary.encode(x)
    error = (dictionary.decode(acts) - x).square().sum()
    cosines = directions @ torch.nn.functional.normalize(dictionary.W_dec, dim=-1).T
    return {
        "fvu": float(error / (x - x.mean(0)).square().sum()),
        "l0": float((acts != 0).float().sum(-1).mean()),
        "mmcs": float(cosines.amax(-1).mean()),
    }


def fit(
    side: type[Side],
    task: Task,
    rows: Callable[[int], Float[Tensor, "batch d_in"]],
) -> Side:
    """A trainer after all steps, where step i is on the batch `rows(i)`."""
    trainer = side(task, rows(0))
    for step in range(task.steps):
        trainer.step(rows(step))
    return trainer


def start_weights(task: Task) -> Weights:
    """Our initial weights, with which about half of all latents of standard, gated and jumprelu are active."""
    config = SAEConfig(architecture=task.architecture, k=task.k, d_sae=task.d_sae)
    return new_weights(task.d_in, task.d_sae, config, task.seed)


def settled_weights(task: Task, x: Float[Tensor, "batch d_in"]) -> Weights:
    """Weights with which `k` latents of standard, gated or jumprelu are active per row of x, on average."""
    weights = start_weights(task)
    weights["W_enc"] = weights["W_dec"].clone()  # about the gain that training reaches
    pre = (x @ weights["W_enc"].T).flatten()
    bound = float(pre.topk(task.k * len(x), sorted=False).values.min())
    for name in ("b_enc", "b_gate", "b_mag"):
        if name in weights and "threshold" not in weights:
            weights[name].fill_(-bound)
    if "threshold" in weights:
        weights["threshold"].fill_(bound)
    return weights


def peak_mb(side: str, task: Task, threads: int) -> float:
    """Peak resident memory of training in a process of its own, minus that before the dictionary is made, in MB."""
    with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
        return fresh.submit(_peak_mb, side, task, threads).result()


def _peak_mb(side: str, task: Task, threads: int) -> float:
    torch.set_num_threads(threads)
    small = Task(task.architecture, d_in=16, d_sae=64, k=4, batch=32, precision=task.precision)
    x = Planted.of(small.d_in, small.k, 0).rows(small.batch, 0)
    SIDES[side](small, x).step(x)  # load libraries and set up, before measuring
    x = torch.randn(task.batch, task.d_in, generator=torch.Generator().manual_seed(task.seed))
    before = resident_bytes("now")
    made = SIDES[side](task, x)
    for _ in range(3):
        made.step(x)
    return max(0, resident_bytes("peak") - before) / 2**20
