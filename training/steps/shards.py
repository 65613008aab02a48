"""Dictionaries whose latents are divided among processes: each holds an equal range of them, and trains it."""

from collections.abc import Mapping
from functools import partial

import torch
from torch import Tensor

from saepatch.errors import UserError

from ..config import SAEConfig
from ..ranks import Ranks
from .learner import DESIGNS, Learner


def check_shards(config: SAEConfig, d_sae: int, finetune_tokens: int, ranks: Ranks) -> None:
    """Raises UserError for settings under which latents cannot be divided among the processes."""
    able = [name for name, design in DESIGNS.items() if design.selects]
    if config.architecture not in able:
        raise UserError(f"shard_latents is for {', '.join(able)}, not for {config.architecture}: leave it out")
    if d_sae % ranks.size:
        raise UserError(f"{d_sae} latents cannot be divided among {ranks.size} processes: use a multiple")
    if finetune_tokens:
        raise UserError(
            f"finetune_tokens is {finetune_tokens}, which needs whole dictionaries: leave shard_latents out"
        )


def sharded(learner: Learner, ranks: Ranks, device: torch.device | str) -> Learner:
    """This process' range of a whole dictionary's latents, on a device."""
    if ranks.size == 1:
        return learner
    tensors, numbers = learner.tensors(), learner.numbers()
    each = len(tensors["idle"]) // ranks.size
    own = slice(ranks.rank * each, (ranks.rank + 1) * each)
    mine = {
        name: (value[own].clone() if _of_latents(name, value) else value).to(device) for name, value in tensors.items()
    }
    part = Learner.restored(mine, numbers, learner.run)
    part.shards = ranks
    part.step_function = partial(part.step_function, shards=ranks)  # type: ignore[call-arg]
    return part


def whole(learner: Learner) -> Learner:
    """The whole dictionary, assembled on the first process, in main memory, a tensor at a time; elsewhere its part.

    Every process calls this.
    """
    shards = learner.shards
    if shards.size == 1:
        return learner
    tensors: Mapping[str, Tensor] = learner.tensors()
    full: dict[str, Tensor] = {}
    for name, value in tensors.items():
        every = shards.gathered(value) if _of_latents(name, value) else value
        if shards.first:
            full[name] = every.cpu()
    return Learner.restored(full, learner.numbers(), learner.run) if shards.first else learner


def _of_latents(name: str, value: Tensor) -> bool:
    """Whether a tensor has a row for each latent."""
    return value.ndim > 0 and "b_dec" not in name.split("/")
