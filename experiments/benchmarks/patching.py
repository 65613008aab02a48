"""How fast are exact sweeps of latent edits, compared with other libraries?

    python -m experiments.benchmarks.patching --out runs/patching [--model google/gemma-3-270m]

Random models of two shapes (GPT-2 small; a Llama with grouped queries) with a random TopK dictionary at the middle
layer; one prompt pair of each length; the (latent, position) edits in which its two runs differ most, denoised; the
logit difference after the last token. A model that is given stands beside them, with one pair of indirect objects. All
variants have the same weights and must give the same numbers.

On the CPU the clock is processor time of one thread, which other load on the machine affects little. Each round runs
every variant once: saepatch on all edits, including its two base runs, the others on a slice of the edits. Ratios are
medians over rounds. `common/peers.py` has the set-up of each library; work done once per model is not timed.
On a GPU the clock is wall time, and the comparison is with a plain batched loop.
"""

import gc
import logging
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import torch

from saepatch.cli.parser import run_config
from saepatch.errors import UserError
from saepatch.records.tables import text_table

from .common.cases import Case, Subject, load_subject, make_case, make_subject, real_case
from .common.measuring import BenchmarkConfig, Clock, all_versions, check_counts, write_results
from .common.peers import ON_GPU, OURS, PEERS, Peer, Runner, bare_passes, missing, saepatch

log = logging.getLogger("experiments.benchmarks")  # by name: run as a module, this file is `__main__`

GEMM_ROWS = 512
GEMM_FLOPS = 1e10  # operations of the matrix products that are timed at once
BUSY = 1.25  # rounds of the same sweep that differ by more were disturbed
AT_ONCE = {"cpu": 2048, "cuda": 65536}  # tokens per batch of the other libraries: about their fastest


@dataclass(frozen=True)
class PatchingConfig(BenchmarkConfig):
    """Time exact sweeps of latent edits, compared with other libraries."""

    model: str = ""
    """A model beside the shapes: a folder, or a Hugging Face id; its keys begin with its family, as in gemma_18."""
    threads: int = 1
    """Threads of the processor; with more than one, the clock is wall time."""
    shapes: tuple[str, ...] = ("gpt2", "llama")
    """Shapes of random models: gpt2, llama; may be empty where a model is given."""
    lengths: tuple[int, ...] = (32, 256)
    """Numbers of tokens of the prompts."""
    peers: tuple[str, ...] = tuple(PEERS)
    """Libraries to compare with on the CPU; those not installed are skipped, with the reason."""
    rounds: int = 3
    """Number of runs of each variant; medians are reported."""
    edits: int = 256
    """Number of (latent, position) edits of a sweep: those that differ most."""
    differ: float = 0.67
    """Where the two prompts differ, as a share of their tokens; about two thirds for indirect-object prompts."""
    peer_edits: int = 4
    """Number of edits per round in libraries that run one edit at a time."""
    batch_tokens: int = 0
    """Tokens per batch of libraries that batch; 0: about their fastest, 2048 on the CPU and 65536 on a GPU."""
    curve_tokens: tuple[int, ...] = (16, 32, 64, 128, 256)
    """Curve of saepatch's cost by prompt length; all curves are of the first shape."""
    curve_differ: tuple[float, ...] = (0.05, 0.33, 0.67, 0.9)
    """Curve by the place where the prompts differ, at the first of `lengths`."""
    curve_layers: tuple[int, ...] = (1, 3, 6, 9, 11)
    """Curve by the number of blocks after the dictionary, at the first of `lengths`."""
    curve_edits: tuple[int, ...] = (1, 16, 64, 256, 1024)
    """Curve by the number of edits, at the first of `lengths`."""
    curve_sweep: int = 64
    """Number of edits per sweep of the first three curves."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(rounds=self.rounds, edits=self.edits, peer_edits=self.peer_edits, curve_sweep=self.curve_sweep)
        if not all(0 <= place < 1 for place in (self.differ, *self.curve_differ)):
            raise UserError(f"differ = {self.differ}, curve_differ = {self.curve_differ}: use shares from 0 to below 1")
        if unknown := [peer for peer in self.peers if peer not in PEERS]:
            raise UserError(f"unknown peer {unknown[0]!r}: use {', '.join(PEERS)}")
        if not (self.shapes or self.model) or not self.lengths or min((*self.lengths, *self.curve_tokens)) < 4:
            raise UserError("give at least one shape (or a model) and one length, and no length below 4 tokens")
        if not all(0 < after < self.layers for after in self.curve_layers):
            raise UserError(f"layers = {self.layers}, curve_layers = {self.curve_layers}: use numbers below layers")

    def batch(self, tokens: int) -> int:
        """Number of edits per batch in libraries that batch."""
        return max(1, (self.batch_tokens or AT_ONCE[self.device]) // tokens)


@dataclass(eq=False)
class Compared:
    """One shape and length: milliseconds per edit of each variant in each round."""

    ms: dict[str, list[float]] = field(default_factory=dict)
    floor: list[float] = field(default_factory=list)  # ms of one matrix product with the FLOPs of one edit
    attribution: list[float] = field(default_factory=list)  # in units of two bare forward passes and one backward
    worst: float = 0.0  # largest difference between the metrics of a library and of saepatch
    largest: float = 0.0  # largest effect of an edit, for comparison

    def ratio(self, variant: str) -> float:
        return median(theirs / ours for theirs, ours in zip(self.ms[variant], self.ms[OURS], strict=True))

    @property
    def spread(self) -> float:
        """The longest of our rounds by the shortest: what else ran on the machine."""
        return max(self.ms[OURS]) / min(self.ms[OURS])

    @property
    def floor_ratio(self) -> float:
        return median(ours / floor for ours, floor in zip(self.ms[OURS], self.floor, strict=True))


@dataclass(eq=False)
class PatchingResults:
    """All measurements."""

    config: PatchingConfig
    cases: dict[str, Compared] = field(default_factory=dict)
    curves: dict[str, list[list[float]]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def summary(self) -> dict[str, Any]:
        cases = self.cases
        variants = [(f"{name}_{variant}", case, variant) for name, case in cases.items() for variant in case.ms]
        return {
            "ratios": {key: case.ratio(variant) for key, case, variant in variants if variant != OURS},
            "ms_per_edit": {key: median(case.ms[variant]) for key, case, variant in variants},
            "floor_ratio": {name: case.floor_ratio for name, case in cases.items()},
            "spread": {name: case.spread for name, case in cases.items()},
            "busy": any(case.spread > BUSY for case in cases.values()),
            "max_abs_diff": max(case.worst for case in cases.values()),
            "largest_effect": {name: case.largest for name, case in cases.items()},
            "attribution": {name: median(case.attribution) for name, case in cases.items() if case.attribution},
            "curves": self.curves,
            "left_out": self.left_out,
            "config": asdict(self.config),
            "versions": all_versions(),
        }

    def table(self) -> str:
        """The printed table: a row per variant, a column per case; then the curves."""
        names = list(self.cases)
        variants = list(dict.fromkeys(variant for case in self.cases.values() for variant in case.ms))

        rows = [
            [variant, *(f"{self.cases[name].ratio(variant):.2f}" for name in names)]
            for variant in variants
            if variant != OURS
        ]
        rows.append(["ours, ms per edit", *(f"{median(self.cases[name].ms[OURS]):.2f}" for name in names)])
        rows.append(["ours / floor", *(f"{self.cases[name].floor_ratio:.2f}" for name in names)])
        if all(case.attribution for case in self.cases.values()):
            rows.append(["attribution / bare", *(f"{median(self.cases[n].attribution):.2f}" for n in names)])
        rows.append(["ours, slowest / fastest round", *(f"{self.cases[name].spread:.2f}" for name in names)])
        rows.append(["largest difference", *(f"{self.cases[name].worst:.1e}" for name in names)])
        rows.append(["largest effect", *(f"{self.cases[name].largest:.1e}" for name in names)])
        lines = [text_table(["times our cost per edit", *names], rows)]
        for name, points in self.curves.items():
            if points:
                lines.append(f"ms per edit by {name}: " + ", ".join(f"{n:g}: {ms:.2f}" for n, ms in points))
        if self.summary()["busy"]:
            lines.append(f"busy machine: rounds of one sweep differ by more than {BUSY:g} times")
        return "\n".join([*lines, *(f"skipped: {name} ({why})" for name, why in self.left_out.items())])


def run(config: PatchingConfig) -> None:
    """Measure, print the table, and write summary.json if a folder is given."""
    clock = config.prepare()
    if config.threads > 1:
        torch.set_num_threads(config.threads)
        clock = time.perf_counter if config.device == "cpu" else clock
    results = PatchingResults(config)
    peers = {name: PEERS[name] for name in config.peers} if config.device == "cpu" else ON_GPU
    results.left_out = {name: why for name in peers if (why := missing(name)) is not None}
    for number, shape in enumerate(config.shapes):
        subject = make_subject(shape, config.size, config.device, config.seed)
        for tokens in config.lengths:
            _measure(results, make_case(subject, tokens, config.edits, config.differ), peers, clock)
        if number == 0:
            results.curves = curves(config, subject, clock)
    if config.model:
        subject = load_subject(config.model, config.size, config.device, config.seed)
        _measure(results, real_case(subject, config.edits), peers, clock)
    write_results(results, config.out)


def _measure(results: PatchingResults, case: Case, peers: dict[str, Peer], clock: Clock) -> None:
    config, name = results.config, f"{case.subject.shape}_{case.tokens}"
    log.info("%s, %d tokens, %d edits", case.subject.shape, case.tokens, len(case))
    runners = {peer: set_up(case, config.batch(case.tokens)) for peer, set_up in peers.items() if not missing(peer)}
    results.cases[name] = compare(config, case, runners, clock)
    del runners
    gc.collect()  # other libraries' models are large, and their hooks are reference cycles


def compare(config: PatchingConfig, case: Case, peers: dict[str, Runner], clock: Clock) -> Compared:
    """Run all variants in rounds, each once per round."""
    ours, everything = saepatch(case, 0), range(len(case))
    base = case.base_value()
    compared = Compared({OURS: [], **{name: [] for name in peers}})
    bare, attribution = bare_passes(case), _attribution(case)
    for runner in (ours, *peers.values()):
        runner(everything[:1])  # untimed: work done once per model, such as our choice of how to resume
    for number in range(config.rounds):
        compared.floor.append(1e3 * case.flops / _gemm_rate(case, clock))
        ms, values = _ms(clock, ours, everything)
        compared.ms[OURS].append(ms)
        compared.largest = max(abs(value - base) for value in values)
        for name, peer in peers.items():
            batched = name.endswith("_batched") or name == "transformer_lens"
            n = config.batch(case.tokens) if batched else config.peer_edits
            chosen = [(number * n + i) % len(case) for i in range(n)]
            ms, theirs = _ms(clock, peer, chosen)
            compared.ms[name].append(ms)
            compared.worst = max(compared.worst, *(abs(a - values[i]) for a, i in zip(theirs, chosen, strict=True)))
        compared.attribution.append(_seconds(clock, attribution) / _seconds(clock, bare))
    return compared


def curves(config: PatchingConfig, subject: Subject, clock: Clock) -> dict[str, list[list[float]]]:
    """Cost of saepatch by prompt length, place of the difference, blocks after the dictionary, and edits per sweep."""
    length, layers, edits, differ = config.lengths[0], config.layers, config.curve_sweep, config.differ
    cases: dict[str, list[tuple[float, Case]]] = {
        "tokens": [(n, make_case(subject, n, edits, differ)) for n in config.curve_tokens],
        "differ": [(n, make_case(subject, length, edits, n)) for n in config.curve_differ],
        "layers": [(n, make_case(subject, length, edits, differ, layers - n)) for n in config.curve_layers],
    }
    most = make_case(subject, length, max(config.curve_edits, default=1), differ)
    cases["edits"] = [(n, most.first(n)) for n in config.curve_edits if n <= len(most)]
    points: dict[str, list[list[float]]] = {}
    for name, several in cases.items():
        log.info("curve over %s", name)
        points[name] = []
        for n, case in several:
            ours = saepatch(case, 0)
            ours(range(1))
            times = [_ms(clock, ours, range(len(case)))[0] for _ in range(config.rounds)]
            points[name].append([n, median(times)])
    return points


def _ms(clock: Clock, runner: Runner, chosen: Sequence[int]) -> tuple[float, list[float]]:
    """Milliseconds per edit, and the values."""
    start = clock()
    values = runner(chosen)
    return 1e3 * (clock() - start) / len(chosen), values


def _seconds(clock: Clock, act: Callable[[], object], repeats: int = 3) -> float:
    times = []
    for _ in range(repeats):
        start = clock()
        act()
        times.append(clock() - start)
    return median(times)


def _attribution(case: Case) -> Callable[[], object]:
    from saepatch.measure.attribution import attribute

    return lambda: attribute(case.subject.model, case.dictionary, [case.pair], verify=0)


@torch.no_grad()
def _gemm_rate(case: Case, clock: Clock) -> float:
    """FLOPs per second of a matrix product of about the MLP's shape."""
    width, device = case.subject.size.width, case.subject.model.device
    rows = torch.randn(GEMM_ROWS, width, device=device)
    weight = torch.randn(width, 4 * width, device=device)
    flops = 2.0 * GEMM_ROWS * weight.numel()
    repeats = 1 + int(GEMM_FLOPS / flops)
    return repeats * flops / _seconds(clock, lambda: [rows @ weight for _ in range(repeats)])


if __name__ == "__main__":
    sys.exit(run_config(PatchingConfig, run, "python -m experiments.benchmarks.patching"))
