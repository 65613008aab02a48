"""Whole dictionaries for what one process does with them, where their latents are divided among processes."""

from collections.abc import Callable, Mapping
from functools import wraps
from typing import TYPE_CHECKING, TypeVar

import torch

from saepatch.model.sites import Site

from ..config import TrainingConfig
from ..ranks import Ranks
from ..steps.learner import Learner
from ..steps.shards import sharded, whole

if TYPE_CHECKING:
    from .trainer import Run

Result = TypeVar("Result")


def divided(
    learners: Mapping[Site, Learner], config: TrainingConfig, ranks: Ranks, device: torch.device
) -> dict[Site, Learner]:
    """This process' range of each dictionary's latents, where they are divided among the processes."""
    return {
        site: sharded(learner, ranks, device) if config.shard_latents else learner for site, learner in learners.items()
    }


def assemble(run: "Run") -> bool:
    """Give the first process whole dictionaries, for good."""
    run.learners = {site: whole(learner) for site, learner in run.learners.items()}
    return True


def on_whole_dictionaries(method: "Callable[[Run], Result]") -> "Callable[[Run], Result]":
    """A method of a run whose learners hold every latent on the first process; every process calls it."""

    @wraps(method)
    def run(self: "Run") -> Result:
        own = self.learners
        self.learners = {site: whole(learner) for site, learner in own.items()}
        try:
            return method(self)
        finally:
            self.learners = own

    return run
