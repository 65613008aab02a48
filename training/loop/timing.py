"""Estimates of a run's time, from timed steps and forward passes on random data, and from earlier runs."""

import json
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
import yaml
from torch import nn

from saepatch.model.language_model import LanguageModel, Tokens
from saepatch.model.loading.discovery import layout_of
from saepatch.model.sites import Site

from ..config import TrainingConfig
from ..data.activations import forward
from ..steps.learner import Learner

SAMPLED = 2.0  # seconds for which each kind of work is timed, or less in a shorter run
_PARTS = 4  # parts of a sample; the fastest and the slowest give the range
_LARGEST_MODEL = 2**27  # parameters of the largest model that is built and timed; others are estimated from products
_LARGEST_STEP = 2**24  # weights of the largest dictionary matrix that is timed; times of others are scaled
_PRODUCTS = 2.0  # assumed upper ratio of a forward pass's time to that of its matrix products
_EVALUATED = 6  # forward passes of an evaluation per site


@dataclass(frozen=True)
class TimeRange:
    """Lower and upper estimate in seconds at the machine's present load, and the seconds of work that were timed."""

    low: float
    high: float
    sampled: float

    def times(self, factor: float) -> "TimeRange":
        """The estimate for `factor` times the work."""
        return TimeRange(factor * self.low, factor * self.high, self.sampled)

    def line(self) -> str:
        return (
            f"time: about {_duration(self.low)} to {_duration(self.high)}, estimated from {self.sampled:.2g} s of "
            "such steps and forward passes; longer if the machine gets busier"
        )


def estimate(
    config: TrainingConfig,
    model: LanguageModel,
    widths: dict[Site, tuple[int, int]],
    flops: float,
    device: torch.device,
) -> TimeRange:
    """Estimate the time of a run from steps on noise and forward passes of a random model of the same shape.

    Lower estimate: the fastest steps and forward passes, overlapping if they are prefetched. Upper estimate: the
    slowest, one after the other, with all evaluations.

    Args:
        config: The run.
        model: Its model, on the meta device.
        widths: The width and the number of latents of each site.
        flops: FLOPs of all forward passes of the model.
        device: The device to run on.
    """
    steps = _steps(config, widths, device)
    passes = _forwards(config, model, list(widths), flops, device)
    together = max if config.prefetch else sum
    tokens = config.steps * config.batch_size
    times = 1 + (tokens // config.eval_every if config.eval_every else 0)
    evaluation = times * (1 + _EVALUATED * len(widths)) * config.eval_tokens / tokens
    tuning = 3 * config.finetune_tokens * len(widths) / tokens
    low = together((steps.low, passes.low)) + tuning * passes.low
    high = steps.high + passes.high * (1 + evaluation + tuning)
    return TimeRange(low, high, steps.sampled + passes.sampled)


def _steps(config: TrainingConfig, widths: dict[Site, tuple[int, int]], device: torch.device) -> TimeRange:
    """Time of all steps of all sites, scaled from steps of the largest dictionary."""
    d_in, d_sae = max(widths.values(), key=lambda shape: shape[0] * shape[1])
    timed = min(d_sae, max(config.sae.k, _LARGEST_STEP // d_in, 512))
    run = replace(config, sae=replace(config.sae, d_sae=timed), ema=0.0 if timed < d_sae else config.ema)
    x = torch.randn(config.batch_size, d_in, generator=torch.Generator().manual_seed(0)).to(device)
    learner = Learner.new(x, run, 0)
    each = _timed(lambda: learner.step(x, run.lr * 1e-3), device, config.steps)
    return each.times(config.steps * sum(a * b for a, b in widths.values()) / (d_in * timed))


def _forwards(
    config: TrainingConfig, model: LanguageModel, sites: list[Site], flops: float, device: torch.device
) -> TimeRange:
    """Time of all forward passes of the model."""
    weights = sum(weight.numel() for weight in model.hf.parameters())
    if weights > _LARGEST_MODEL:
        inner = min(4 * model.d_model, 8192)
        rows = min(config.forward_tokens, 2048)
        a, b = (torch.ones(size, dtype=model.dtype, device=device) for size in ((rows, model.d_model),
                                                                                (model.d_model, inner)))  # fmt: skip
        product = _timed(lambda: a @ b, device, 10**9)
        run = product.times(flops / (2.0 * rows * model.d_model * inner))
        return replace(run, high=_PRODUCTS * run.high)
    random_model = _random_model(model, device)
    n = max(1, min(config.forward_tokens, config.batch_size * config.steps) // config.context)
    ids = torch.arange(n * config.context, device=device).view(n, -1) % int(model.config.get_text_config().vocab_size)
    tokens = Tokens(ids, torch.ones_like(ids), torch.ones_like(ids, dtype=torch.bool))
    total = config.batch_size * config.steps / ids.numel()
    each = _timed(lambda: forward(random_model, sites, tokens, ()), device, max(1, round(total)))
    return each.times(total)


def _random_model(model: LanguageModel, device: torch.device) -> LanguageModel:
    """A model of the same shape with random weights."""
    from transformers import AutoModelForCausalLM

    with torch.random.fork_rng(devices=[]):
        hf: nn.Module = AutoModelForCausalLM.from_config(model.config, dtype=model.dtype).to(device).eval()
    blocks = layout_of(hf, model.config).blocks
    return LanguageModel(hf, None, model.name, replace(model.layout, blocks=blocks))


def _timed(work: Callable[[], object], device: torch.device, most: int) -> TimeRange:
    """Time of one call after a first, untimed one: fastest and slowest part of a sample of at most `most` calls."""
    seconds: list[float] = []
    _once(work, device)
    start = time.perf_counter()
    while len(seconds) < max(1, most) and (not seconds or time.perf_counter() - start < SAMPLED):
        seconds.append(_once(work, device))
    size = -(-len(seconds) // _PARTS)
    means = [sum(part) / len(part) for i in range(0, len(seconds), size) if (part := seconds[i : i + size])]
    return TimeRange(min(means), max(means), sum(seconds))


def _once(work: Callable[[], object], device: torch.device) -> float:
    start = time.perf_counter()
    work()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    elif device.type == "mps":
        torch.mps.synchronize()
    return time.perf_counter() - start


def earlier_runs(config: TrainingConfig, widths: dict[Site, tuple[int, int]]) -> Iterator[str]:
    """A line for each finished run in a sibling folder that trained dictionaries of the same shapes."""
    for place in sorted(config.out.parent.glob("*/summary.json")):
        try:
            summary = json.loads(place.read_text(encoding="utf-8"))
            before: dict[str, Any] = yaml.safe_load((place.parent / "config.yaml").read_text(encoding="utf-8"))
            sae, seconds, tokens = before["sae"], float(summary["seconds"]), int(summary["training_tokens"])
            alike = set(summary["sites"]) == set(map(str, widths)) and all(
                before[name] == config.to_dict()[name] for name in ("model", "device", "batch_size", "finetune_tokens")
            )
            alike &= (sae["architecture"], sae["k"]) == (config.sae.architecture, config.sae.k)
            alike &= all((sae["d_sae"] or sae["expansion"] * d_in) == d_sae for d_in, d_sae in widths.values())
        except (OSError, ValueError, KeyError, TypeError, yaml.YAMLError):
            continue  # not a training run
        if alike and seconds > 0 and tokens > 0:
            whole = seconds / tokens * config.steps * config.batch_size
            yield (
                f"a similar earlier run ({place.parent}) took {_duration(seconds)} for {tokens:,} tokens: "
                f"{_duration(whole)} for this run's tokens"
            )


def _duration(seconds: float) -> str:
    for unit, size in (("days", 86_400), ("hours", 3600), ("minutes", 60)):
        if seconds >= 2 * size:
            return f"{seconds / size:.2g} {unit}" if seconds < 100 * size else f"{seconds / size:,.0f} {unit}"
    return f"{seconds:.0f} seconds" if seconds >= 10 else f"{seconds:.2g} seconds"
