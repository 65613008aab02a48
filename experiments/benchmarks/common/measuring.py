"""Code shared by the benchmarks: settings of the random models, clocks, writing of results."""

import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch

from saepatch.errors import UserError
from saepatch.model.loading.load import usable_device
from saepatch.records.files import check_writable, output_folder, write_json
from saepatch.records.provenance import versions

from .cases import Size

LIBRARIES = ("transformer-lens", "nnsight")
Clock = Callable[[], float]


@dataclass(frozen=True)
class BenchmarkConfig:
    """Settings of a benchmark with random models and random dictionaries."""

    out: str = ""
    """Folder for summary.json; empty: the table is printed, and no file is written."""
    layers: int = 12
    """Blocks of the models; the dictionary is in the middle."""
    width: int = 768
    """Width of the residual stream."""
    heads: int = 12
    """Attention heads; the Llama shape has a third as many key-value heads."""
    vocabulary: int = 0
    """Size of the vocabulary; 0: the shape's own."""
    latents: int = 24576
    """Number of latents of the dictionaries."""
    k: int = 64
    """Number of latents of the TopK dictionary that are active per position."""
    seed: int = 0
    """Seed of weights, dictionaries and prompts."""
    device: str = "cpu"
    """Where to run: cpu or cuda."""

    def __post_init__(self) -> None:
        if self.layers < 2:
            raise UserError(f"layers = {self.layers}: use at least 2, since the dictionary is between two layers")
        if self.device not in ("cpu", "cuda"):
            raise UserError(f"device = {self.device!r}: use cpu or cuda")

    @property
    def size(self) -> Size:
        return Size(self.layers, self.width, self.heads, self.vocabulary, self.latents, self.k)

    def prepare(self) -> Clock:
        """Check folder and device and set torch up; returns the clock.

        Raises:
            UserError: the folder cannot be written, or there is no such device.
        """
        if self.out:
            check_writable(self.out)
        usable_device(self.device)
        torch.set_num_threads(1)
        # Without a handler, the first message of another library would set one up.
        logging.getLogger().addHandler(logging.NullHandler())
        return clock_of(self.device)


@runtime_checkable
class Results(Protocol):
    """Results of a benchmark: a table for the terminal, and figures for summary.json."""

    def table(self) -> str: ...

    def summary(self) -> dict[str, Any]: ...


def write_results(results: Results, out: str) -> None:
    """Print the table, and write summary.json if a folder is given."""
    sys.stdout.write(results.table() + "\n")
    if out:
        write_json(results.summary(), output_folder(out) / "summary.json")


def check_counts(**counts: int) -> None:
    """Raises UserError where a count is below 1."""
    for name, value in counts.items():
        if value < 1:
            raise UserError(f"{name} = {value}: use at least 1")


def clock_of(device: str) -> Clock:
    """A clock in seconds: processor time on the CPU, synchronised wall time on a GPU."""
    if device == "cpu":
        return time.process_time

    def wall() -> float:
        torch.cuda.synchronize()
        return time.perf_counter()

    return wall


def all_versions() -> dict[str, str]:
    """Versions of all libraries that results depend on, including those compared with."""
    return versions(*LIBRARIES)
