"""A dictionary in training: its weights, its optimiser, the recent activity of its latents."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saepatch.errors import UserError

from ..config import SAEConfig, TrainingConfig
from ..ranks import ALONE, Ranks
from . import dense, sparse
from .step import Moment, Step, StepFunction, Weights

_VALUES_AT_ONCE = 2**24  # limit of pre-activations in memory


@dataclass(frozen=True)
class Design:
    """How an architecture is trained and saved.

    Attributes:
        step: The training step.
        saved_as: The architecture in sae_lens that it is saved as; those that select over a batch become JumpReLU
            with the running threshold.
        selects: Whether it selects the largest latents. Otherwise the initial encoder is scaled by d_in / d_sae, so
            that the many latents active at first do not add up to several times the activation.
        biases: Names of the weights of shape [d_sae] in units of the activations.
        gains: Names of the dimensionless weights of shape [d_sae].
    """

    step: StepFunction
    saved_as: str
    selects: bool
    biases: tuple[str, ...] = ("b_enc",)
    gains: tuple[str, ...] = ()


DESIGNS: dict[str, Design] = {
    "standard": Design(dense.standard, "standard", selects=False),
    "gated": Design(dense.gated, "gated", selects=False, biases=("b_gate", "b_mag"), gains=("r_mag",)),
    "jumprelu": Design(dense.jumprelu, "jumprelu", selects=False, biases=("b_enc", "threshold")),
    "topk": Design(sparse.topk, "topk", selects=True),
    "batchtopk": Design(sparse.batchtopk, "jumprelu", selects=True),
    "matryoshka": Design(sparse.matryoshka, "jumprelu", selects=True),
}


def new_weights(d_in: int, d_sae: int, config: SAEConfig, seed: int) -> Weights:
    """Random decoder rows of norm 1, encoder rows parallel to them, biases 0, thresholds as configured."""
    design = DESIGNS[config.architecture]
    generator = torch.Generator().manual_seed(seed)
    rows = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=generator), dim=-1)
    weights = {"W_enc": rows * (1.0 if design.selects else d_in / d_sae), "W_dec": rows, "b_dec": torch.zeros(d_in)}
    for name in design.biases + design.gains:
        weights[name] = torch.full((d_sae,), config.threshold if name == "threshold" else 0.0)
    return weights


def geometric_median(x: Float[Tensor, "n d_in"], iterations: int = 30) -> Float[Tensor, "d_in"]:
    """The point with the smallest sum of distances to all rows, by Weiszfeld's iteration starting at their mean."""
    point = x.mean(0)
    for _ in range(iterations):
        near = 1 / (x - point).norm(dim=-1, keepdim=True).clamp(min=1e-6)
        point = (x * near).sum(0) / near.sum()
    return point


def scale_for(sample: Float[Tensor, "n d_in"]) -> float:
    """The factor that gives activations a mean norm of √d_in.

    Raises:
        UserError: the sample's norms are 0 or not finite.
    """
    norm = float(sample.norm(dim=-1).mean())
    if not (math.isfinite(norm) and norm > 0):
        raise UserError(f"the activations have mean norm {norm}, so they cannot be trained on: check the model")
    return float(sample.shape[-1] ** 0.5 / norm)


def schedule(step: int, steps: int, warmup: float, decay: float) -> float:
    """Factor of the learning rate: linear warm-up over the first share of steps, linear decay to 0 over the last."""
    rise = (step + 1) / max(1.0, warmup * steps)
    fall = (steps - step) / max(1.0, decay * steps)
    return min(1.0, rise, fall)


@dataclass(eq=False)
class Learner:
    """A dictionary in training.

    Activations are multiplied by `scale`, so that their mean norm is √d_in at every site of every model, and one
    learning rate suits all of them.

    Attributes:
        config: The dictionary's settings.
        run: The run's settings (Adam, clipping, EMA).
        weights: See `training.steps.step`; float32.
        scale: Factor of the activations.
        idle: Tokens since each latent was last active.
        threshold: Running mean of a batch's smallest active value (batchtopk, matryoshka), in scaled units.
        average: Exponential moving average of the weights, if requested.
        updates: Number of steps taken.
        shards: The processes among which its latents are divided, in equal ranges; this one has its own range.
    """

    config: SAEConfig
    run: TrainingConfig
    weights: Weights
    scale: float
    idle: Int[Tensor, "d_sae"]
    step_function: StepFunction
    threshold: float = 0.0
    average: Weights | None = None
    updates: int = 0
    shards: Ranks = ALONE
    optimiser: torch.optim.Optimizer = field(init=False)

    def __post_init__(self) -> None:
        self.optimiser = torch.optim.Adam(
            list(self.weights.values()), lr=0.0, betas=(self.run.beta1, self.run.beta2), fused=True
        )

    @classmethod
    def new(cls, sample: Float[Tensor, "n d_in"], run: TrainingConfig, seed: int) -> "Learner":
        """An untrained dictionary; the mean norm of sample activations sets the scale, their centre `b_dec`.

        Raises:
            UserError: the sample's norms are 0 or not finite, or the dictionary has fewer than `k` latents.
        """
        config, d_in, scale = run.sae, sample.shape[-1], scale_for(sample)
        weights = {
            name: value.to(sample.device) for name, value in new_weights(d_in, config.width(d_in), config, seed).items()
        }
        if config.bias != "zero":
            centre = sample.mean(0) if config.bias == "mean" else geometric_median(sample)
            weights["b_dec"] = centre * scale
        return cls.of(weights, scale, run)

    @classmethod
    def of(cls, weights: Weights, scale: float, run: TrainingConfig) -> "Learner":
        """A dictionary with these weights and no history."""
        idle = torch.zeros(len(weights["W_dec"]), dtype=torch.long, device=weights["W_dec"].device)
        step: StepFunction = DESIGNS[run.sae.architecture].step
        if run.compile:
            step = dense.compiled(step)
        average = {name: value.clone() for name, value in weights.items()} if run.ema else None
        return cls(run.sae, run, weights, scale, idle, step, average=average)

    @property
    def design(self) -> Design:
        return DESIGNS[self.config.architecture]

    @property
    def estimates_threshold(self) -> bool:
        """Whether it is saved with a single threshold, estimated in training (batchtopk, matryoshka)."""
        return self.design.selects and self.design.saved_as == "jumprelu"

    @property
    def dead(self) -> Bool[Tensor, "d_sae"]:
        return self.idle >= self.config.dead_after

    def moment(self) -> Moment:
        """The inputs of the next step that depend on the progress of training."""
        rise = self.config.sparsity_warmup * self.run.steps
        sparsity = self.config.sparsity * min(1.0, (self.updates + 1) / max(1.0, rise))
        p = 1 - (1 - self.config.p_end) * min(1.0, self.updates / max(1, self.run.steps - 1))
        dead = self.dead
        return Moment(dead if bool(self.shards.any(dead.any()[None])) else None, sparsity, p)

    @torch.no_grad()
    def step(self, x: Float[Tensor, "batch d_in"], rate: float, ranks: Ranks = ALONE) -> Step:
        """Take a step of Adam on this process's share of a batch, with gradients averaged over all processes."""
        if self.shards.size > 1:  # each process trains its latents on the whole batch
            x, ranks = self.shards.rows_of_all(x), ALONE
        step = self.step_function(self.weights, x * self.scale, self.config, self.moment(), ranks)
        ranks.mean_(step.gradients.values())
        self.add_gains(step.gradients)
        for name, value in self.weights.items():
            value.grad = step.gradients[name]
        if self.run.clip:
            self._clip()
        for group in self.optimiser.param_groups:
            group["lr"] = rate
        self.optimiser.step()
        self.optimiser.zero_grad(set_to_none=True)
        self.constrain()
        self.updates += 1
        self.idle += len(x) * ranks.size
        self.idle[ranks.any(step.fired)] = 0
        if step.smallest is not None and (smallest := float(step.smallest)) > 0:
            # Initialised with the first value: starting from 0, it would be far too low in early evaluations.
            mixed = (1 - self.config.threshold_rate) * self.threshold + self.config.threshold_rate * smallest
            self.threshold = mixed if self.threshold else smallest
        if self.average is not None:
            # Average over few steps at first: forgetting the initial weights would take more than 1 / (1 - ema) steps.
            keep = min(self.run.ema, self.updates / (self.updates + 10))
            for name, value in self.weights.items():
                self.average[name].lerp_(value, 1 - keep)
        return step

    def _clip(self) -> None:
        """Limit the norm of the whole dictionary's gradient."""
        if self.shards.size == 1:
            torch.nn.utils.clip_grad_norm_(self.weights.values(), self.run.clip)
            return
        squares = {name: value.grad.square().sum() for name, value in self.weights.items() if value.grad is not None}
        common = squares.pop("b_dec")  # the same in every process
        norm = (self.shards.sum_(torch.stack([*squares.values()]).sum()) + common).sqrt()
        for value in self.weights.values():
            if value.grad is not None:
                value.grad *= (self.run.clip / (norm + 1e-6)).clamp(max=1.0)

    def add_gains(self, gradients: Weights) -> None:
        """Replace the radial part of the decoder's gradient by the gradient of the latents' gains.

        Scaling a latent's decoder row by k is the same function as scaling its encoder row, biases and threshold by k,
        but only the latter changes the penalty on latents' values. A gain that Adam can change as a single number is
        learnt many times faster than through all entries of the encoder row.
        """
        if self.design.selects or ("threshold" in self.weights and self.config.penalty != "tanh"):
            return  # no penalty on values: the decoder's gradient is complete
        W_dec, gradient = self.weights["W_dec"], gradients["W_dec"]
        gain = torch.linalg.vecdot(gradients["W_enc"], self.weights["W_enc"])
        for name in self.design.biases:
            # A straight-through estimate that only reaches the threshold is not the gradient of a common scale.
            if name != "threshold" or self.config.estimate_inputs:
                gain += gradients[name] * self.weights[name]
        gradient.addcmul_((gain - torch.linalg.vecdot(gradient, W_dec)).unsqueeze(-1), W_dec)

    @torch.no_grad()
    def constrain(self) -> None:
        """Restore the constraints that every step relies on: decoder rows of norm 1, thresholds not below 0.

        The norm of a decoder row is moved to its latent's encoder row and biases.
        """
        norms = torch.linalg.vector_norm(self.weights["W_dec"], dim=-1, keepdim=True).clamp_(min=1e-8)
        self.weights["W_dec"].div_(norms)
        self.weights["W_enc"].mul_(norms)
        for name in self.design.biases:
            self.weights[name].mul_(norms.squeeze(1))
        if "threshold" in self.weights:
            self.weights["threshold"].clamp_(min=0)

    def figures(self, x: Float[Tensor, "batch d_in"], step: Step) -> dict[str, float]:
        """Figures for the log, of the batch just trained on, with the weights before its step."""
        variance = (x * self.scale).var(0, correction=0).sum()
        losses = {name: float(value) for name, value in step.losses.items()}
        return {
            "loss": sum(losses.values()),
            **{f"loss/{name}": value for name, value in losses.items()},
            "fvu": losses["mse"] / max(float(variance), 1e-30),
            "l0": float(step.l0),
            "dead": float(self.dead.float().mean()),
        }

    @torch.no_grad()
    def calibrate(self, x: Float[Tensor, "n d_in"]) -> None:
        """Set the threshold (batchtopk, matryoshka) so that `k` latents are active on average on these activations.

        The running mean from training lags behind the weights, the more so the shorter the run.
        """
        if not self.estimates_threshold or not len(x):
            return
        weights, count = self.average or self.weights, self.config.k * len(x)
        width = len(weights["W_enc"])
        each = min(width, 8 * self.config.k)  # values kept per position; rarely are more among the largest of all
        largest = [
            ((rows * self.scale - weights["b_dec"]) @ weights["W_enc"].T + weights["b_enc"]).topk(each).values.flatten()
            for rows in x.split(max(1, _VALUES_AT_ONCE // width))
        ]
        ordered = torch.cat(largest).sort(descending=True).values
        if count < len(ordered) and float(ordered[count - 1]) > 0:
            self.threshold = float(ordered[count - 1 : count + 1].clamp(min=0).double().mean())

    @torch.no_grad()
    def finish(self) -> Any:
        """The dictionary as an sae_lens inference SAE, for unscaled activations.

        The scale is folded into the biases. Decoder rows have norm 1, so a latent's value is the norm of what it adds
        to the site.
        """
        return inference_sae(self.average or self.weights, self.scale, self.threshold, self.config)

    def tensors(self) -> dict[str, Tensor]:
        """The tensors of its state, for a checkpoint."""
        state = {f"weights/{name}": value for name, value in self.weights.items()}
        for name, value in self.weights.items():
            for key, moment in self.optimiser.state[value].items():
                state[f"adam/{name}/{key}"] = moment
        state |= {f"average/{name}": value for name, value in (self.average or {}).items()}
        return {**state, "idle": self.idle}

    def numbers(self) -> dict[str, float]:
        """The rest of its state, for a checkpoint."""
        return {"scale": self.scale, "threshold": self.threshold, "updates": self.updates}

    @classmethod
    def restored(cls, tensors: Mapping[str, Tensor], numbers: Mapping[str, float], run: TrainingConfig) -> "Learner":
        """The learner whose state this is; training continues exactly."""

        def under(prefix: str) -> Weights:
            return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}

        learner = cls.of(under("weights/"), float(numbers["scale"]), run)
        learner.idle = tensors["idle"]
        learner.threshold, learner.updates = float(numbers["threshold"]), int(numbers["updates"])
        if learner.average is not None:
            learner.average = under("average/")
        for name, value in learner.weights.items():
            if moments := under(f"adam/{name}/"):
                learner.optimiser.state[value] = moments
        return learner


@torch.no_grad()
def inference_sae(weights: Weights, scale: float, threshold: float, config: SAEConfig) -> Any:
    """The sae_lens inference SAE with weights that were trained on activations times `scale`."""
    from sae_lens import SAE

    design = DESIGNS[config.architecture]
    d_sae, d_in = weights["W_dec"].shape
    rows = torch.nn.functional.normalize(weights["W_dec"], dim=-1)  # averaged unit rows have norms below 1
    state = {"W_enc": weights["W_enc"].T.contiguous(), "W_dec": rows, "b_dec": weights["b_dec"] / scale}
    # Encoding x·scale and dividing by the scale is encoding x with all biases divided by it, in every architecture.
    state |= {name: weights[name] / scale for name in design.biases}
    state |= {name: weights[name].clone() for name in design.gains}
    if design.selects and design.saved_as == "jumprelu":
        state["threshold"] = torch.full_like(weights["b_enc"], threshold / scale)
    described: dict[str, Any] = {"architecture": design.saved_as, "d_in": d_in, "d_sae": d_sae}
    if design.saved_as == "topk":
        described |= {"k": config.k, "rescale_acts_by_decoder_norm": False}
    described["metadata"] = {"training_architecture": config.architecture}
    if design.selects:
        described["metadata"]["training_k"] = config.k
    sae = SAE.from_dict(described).to(str(rows.device))
    sae.load_state_dict(state)
    return sae.eval().requires_grad_(False)


def reconstruction(
    weights: Weights, scale: float, threshold: float, config: SAEConfig
) -> Callable[[Float[Tensor, "batch pos d_in"]], Float[Tensor, "batch pos d_in"]]:
    """The saved dictionary's reconstruction as a function of the site's value, differentiable in the weights."""
    design = DESIGNS[config.architecture]

    def reconstruct(x: Tensor) -> Tensor:
        pre = (x * scale - weights["b_dec"]) @ weights["W_enc"].T
        if config.architecture == "gated":
            open_ = pre + weights["b_gate"] > 0
            acts = open_ * torch.relu(pre * weights["r_mag"].exp() + weights["b_mag"])
        else:
            pre = pre + weights["b_enc"]
            acts = torch.relu(pre)
            if design.saved_as == "topk":
                kept = pre.topk(config.k, sorted=False)
                acts = torch.zeros_like(pre).scatter(-1, kept.indices, torch.relu(kept.values))
            elif design.saved_as == "jumprelu":
                acts = acts * (pre > (threshold if design.selects else weights["threshold"]))
        return (acts @ weights["W_dec"] + weights["b_dec"]) / scale

    return reconstruct
