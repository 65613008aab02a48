"""Processes of a data-parallel run, and communication between them."""

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
from jaxtyping import Bool, Shaped
from torch import Tensor

from saepatch.errors import UserError


@dataclass(frozen=True)
class Ranks:
    """Rank of this process among `size`; with a single process, every exchange returns its input.

    `data` is a second process group (gloo, on the CPU) for the thread that fills buffers, so that its collective
    operations do not mix with those of the training loop.
    """

    rank: int = 0
    size: int = 1
    data: Any = None

    @property
    def first(self) -> bool:
        """Whether this process logs and saves."""
        return self.rank == 0

    def mean_(self, tensors: Iterable[Tensor]) -> None:
        """Replace each tensor by its mean over the processes."""
        if self.size == 1:
            return
        from torch import distributed

        for tensor in tensors:
            distributed.all_reduce(tensor)
            tensor /= self.size

    def sum_(self, tensor: Tensor) -> Tensor:
        """Replace a tensor by its sum over the processes; returns it."""
        if self.size > 1:
            from torch import distributed

            distributed.all_reduce(tensor)
        return tensor

    def rows_of_all(self, x: Shaped[Tensor, "rows d"]) -> Shaped[Tensor, "all_rows d"]:
        """The whole batch, in order, whose rows are distributed over the processes in turn."""
        return self.gathered(x).unflatten(0, (self.size, -1)).transpose(0, 1).flatten(0, 1)

    def any(self, mask: Bool[Tensor, "n"]) -> Bool[Tensor, "n"]:
        """Where the mask is true in at least one process."""
        if self.size == 1:
            return mask
        from torch import distributed

        anywhere = mask.to(torch.uint8)
        distributed.all_reduce(anywhere, op=distributed.ReduceOp.MAX)
        return anywhere.bool()

    def gathered(self, values: Shaped[Tensor, "n"]) -> Shaped[Tensor, "m"]:
        """The values of all processes, concatenated; each process must pass the same number of values."""
        if self.size == 1:
            return values
        from torch import distributed

        parts = [torch.empty_like(values) for _ in range(self.size)]
        distributed.all_gather(parts, values.contiguous())
        return torch.cat(parts)


ALONE = Ranks()


@contextmanager
def joined(device: torch.device) -> Iterator[Ranks]:
    """Join the processes started by `torchrun`; without torchrun, a single process.

    Raises:
        UserError: the processes cannot connect to each other.
    """
    if int(os.environ.get("WORLD_SIZE", "1")) == 1:
        yield ALONE
        return
    from torch import distributed

    # One process evaluates and saves while the others wait.
    timeout = timedelta(hours=2)
    try:
        distributed.init_process_group("nccl" if device.type == "cuda" else "gloo", timeout=timeout)
        data = distributed.new_group(backend="gloo", timeout=timeout)
    except (RuntimeError, ValueError) as error:
        raise UserError(
            f"the processes cannot connect to each other ({str(error).splitlines()[0]}): start them with "
            "torchrun --nproc-per-node N -m training CONFIG.yaml"
        ) from error
    try:
        yield Ranks(distributed.get_rank(), distributed.get_world_size(), data)
    finally:
        distributed.destroy_process_group()
