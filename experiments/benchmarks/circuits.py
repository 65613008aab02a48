"""How fast are the edges of a circuit, compared with other ways of computing them?

    python -m experiments.benchmarks.circuits --out runs/bench-circuits

A random model of GPT-2's shape, one random TopK dictionary at the inputs of two neighbouring blocks in its middle, a
few prompt pairs. Timed in rounds, each variant once a round: ours, all edges between the two sites' nodes and to the
logits; attribution of all nodes of both sites on the same pairs; a loop of one backward pass for each active downstream
latent, as public latent-circuit code makes it (a few latents, scaled to all); our exact path patches of the edges with
the largest estimates, and the same by three whole hooked runs each. Ratios are medians over rounds; all variants must
agree. The clock is the process's own time on one thread.
"""

import logging
import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import numpy as np
import torch
from torch import Tensor

from saepatch.circuits.edges.edge_list import Edges
from saepatch.circuits.edges.estimates import EdgeOptions, edges
from saepatch.circuits.edges.paths import path_patches
from saepatch.circuits.nodes import Edge, Paths, node_sites
from saepatch.cli.parser import run_config
from saepatch.data.pairs import PromptPair
from saepatch.dictionaries.dictionary import Dictionary
from saepatch.engine.options import SweepOptions
from saepatch.measure.attribution import attribute
from saepatch.model.hooks import Edit as Hooked
from saepatch.model.hooks import edit_sites
from saepatch.model.language_model import LanguageModel
from saepatch.records.tables import text_table

from .common.cases import make_case, make_subject
from .common.measuring import BenchmarkConfig, Clock, all_versions, check_counts, write_results

log = logging.getLogger("experiments.benchmarks")
Act = Callable[[], Any]


@dataclass(frozen=True)
class CircuitBenchmarkConfig(BenchmarkConfig):
    """Time all edges between two sites, and exact path patches, beside loops."""

    tokens: int = 16
    """Tokens of the prompts."""
    pairs: int = 4
    """Prompt pairs of a batch."""
    differ: float = 0.33
    """Where the two prompts differ, as a share of their tokens."""
    rounds: int = 3
    """How often each variant is run."""
    patches: int = 64
    """Exact path patches of a round."""
    loop: int = 8
    """Downstream latents for which the loop runs in a round."""
    naive: int = 4
    """Edges that are patched by three hooked runs in a round."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(
            pairs=self.pairs, rounds=self.rounds, patches=self.patches, loop=self.loop, naive=self.naive,
            tokens=self.tokens,
        )  # fmt: skip


@dataclass(eq=False)
class CircuitTimes:
    """Seconds of each variant in each round, and how far they agree."""

    config: CircuitBenchmarkConfig
    seconds: dict[str, list[float]] = field(default_factory=dict)
    total: int = 0
    downstream: int = 0
    worst_estimate: float = 0.0
    worst_exact: float = 0.0
    peak_mb: float = 0.0
    peak_mb_all_kept: float = 0.0

    def ratio(self, over: str, under: str, factor: float = 1.0) -> float:
        return median(factor * a / b for a, b in zip(self.seconds[over], self.seconds[under], strict=True))

    def summary(self) -> dict[str, Any]:
        config = self.config
        return {
            "ratios": {
                "edges_over_attribution": self.ratio("edges", "attribution"),
                "loop_over_edges": self.ratio("loop", "edges", self.downstream / config.loop),
                "naive_over_path_patches": self.ratio("naive", "patches", config.patches / config.naive),
            },
            "edges": self.total,
            "downstream_latents": self.downstream,
            "seconds": {name: median(times) for name, times in self.seconds.items()},
            "worst_estimate": self.worst_estimate,
            "worst_exact": self.worst_exact,
            "peak_mb": self.peak_mb,
            "peak_mb_all_kept": self.peak_mb_all_kept,
            "settings": asdict(config),
            "versions": all_versions(),
        }

    def table(self) -> str:
        summary = self.summary()
        rows = [[name, f"{value:.2f}"] for name, value in summary["ratios"].items()]
        rows += [[f"{name}, s", f"{value:.3f}"] for name, value in summary["seconds"].items()]
        rows += [[name, f"{summary[name]:,}"] for name in ("edges", "downstream_latents")]
        rows += [[name, f"{summary[name]:.2g}"] for name in ("worst_estimate", "worst_exact")]
        rows += [[name, f"{summary[name]:,.0f}"] for name in ("peak_mb", "peak_mb_all_kept")]
        return text_table(["circuits", ""], rows)


def run(config: CircuitBenchmarkConfig) -> None:
    """Measure, print the table, and write summary.json if a folder is given."""
    clock = config.prepare()
    subject = make_subject("gpt2", config.size, config.device, config.seed)
    layer = config.size.layer
    both = [subject.dictionary(layer), subject.dictionary(layer + 1)]
    pairs = []
    for number in range(config.pairs):
        case = make_case(subject, config.tokens, 1, config.differ + 0.1 * number / config.pairs)
        pairs.append(case.pair)
    write_results(_measure(config, subject.model, both, pairs, clock), config.out)


def _measure(
    config: CircuitBenchmarkConfig,
    model: LanguageModel,
    both: Sequence[Dictionary],
    pairs: Sequence[PromptPair],
    clock: Clock,
) -> CircuitTimes:
    times, options = CircuitTimes(config), SweepOptions(batch_size=config.pairs)
    how = EdgeOptions(verify=0, sample=0)
    result = edges(model, both, pairs, how, options)  # untimed: includes work done once per model
    times.total = result.total
    order = np.argsort(-np.abs(result.score))
    into_latents = [int(i) for i in order if result.parts[result.names[4, i]][1] == "latent"]
    listed = [(int(result.pair[i]), result.edge(i)) for i in into_latents[: config.patches]]
    loop = _Loop(model, both, pairs, result)
    times.downstream, nodes = len(loop.latents), node_sites(model, both)
    chosen = np.random.default_rng(config.seed).choice(times.downstream, config.loop).tolist()
    exact: dict[str, Any] = {}
    variants: dict[str, Act] = {
        "edges": lambda: edges(model, both, pairs, how, options),
        "attribution": lambda: attribute(model, both, pairs, options=options),
        "loop": lambda: exact.update(loop=loop.run(chosen)),
        "patches": lambda: exact.update(ours=path_patches(model, nodes, pairs, listed, Paths(), SweepOptions())),
        "naive": lambda: exact.update(naive=[loop.naive(*edge) for edge in listed[: config.naive]]),
    }
    for _ in range(config.rounds):
        for name, act in variants.items():
            start = clock()
            act()
            times.seconds.setdefault(name, []).append(clock() - start)
    times.worst_estimate = exact["loop"]
    times.worst_exact = max(abs(a - b) for a, b in zip(exact["naive"], exact["ours"], strict=False))
    times.peak_mb = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    edges(model, both, pairs, EdgeOptions(keep=10**7, verify=0, sample=0), options)
    times.peak_mb_all_kept = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
    return times


class _Loop:
    """The same edges by one backward pass per downstream latent, and path patches by three hooked runs each."""

    def __init__(
        self, model: LanguageModel, both: Sequence[Dictionary], pairs: Sequence[PromptPair], result: Edges
    ) -> None:
        self.model, (self.up, self.down), self.pairs, self.result = model, both, pairs, result
        wanted = [n for n, (site, kind) in enumerate(result.parts) if site == self.down.site and kind == "latent"]
        columns = result.names[[0, 5, 6]][:, result.names[4] == wanted[0]]
        self.latents = np.unique(columns, axis=1).T.tolist()  # pair, latent, position of those that keep an edge

    def run(self, chosen: Sequence[int]) -> float:
        """Largest difference from our estimates, over the edges that were kept."""
        worst, result = 0.0, self.result
        for pair, latent, position in (self.latents[i] for i in chosen):
            base, source = (self._values(getattr(self.pairs[pair], side)) for side in ("corrupted", "clean"))
            leaf = base[0].clone().requires_grad_()
            held: list[Tensor] = []
            edits = {self.up.site: _set_to(leaf), self.down.site: _kept_in(held)}
            with torch.enable_grad(), edit_sites(self.model.layout, edits):
                tokens = self.model.tokenize([self.pairs[pair].corrupted])
                logits = self.model.call(tokens, last=True)[0, -1]
                acts = self.down.sae.encode(held[0])  # type: ignore[operator]
                answer, counter = (self.model.encode(f"{side}")[-1] for side in self._answers(pair))
                g = torch.autograd.grad(logits[answer] - logits[counter], held[0], retain_graph=True)[0]
                jacobian = torch.autograd.grad(acts[0, position, latent], leaf)[0][0]
            slope = float(g[0, position] @ self.down.rows[latent])
            with torch.no_grad():
                change = self.up.activations(source[0])[0][0] - self.up.activations(base[0])[0][0]
                scores = change * (jacobian @ self.up.rows.T) * slope
            mine = (result.names[0] == pair) & (result.names[5] == latent) & (result.names[6] == position)
            mine &= (result.names[1] == 0) & (result.names[4] == 2)
            ours = result.names[:, mine]
            theirs = scores[ours[3], ours[2]].numpy()
            worst = max(worst, float(np.abs(theirs - result.score[mine]).max(initial=0.0)))
        return worst

    def _answers(self, pair: int) -> tuple[str, str]:
        return self.pairs[pair].answer, self.pairs[pair].counter

    @torch.no_grad()
    def _values(self, text: str) -> list[Tensor]:
        sites = [self.up.site, self.down.site]
        values = self.model.capture(self.model.tokenize([text]), sites)
        return [values[site] for site in sites]

    @torch.no_grad()
    def naive(self, pair: int, edge: Edge) -> float:
        """The change of the metric by one edge into a latent: three whole runs under hooks, and the base's metric."""
        text, other = self.pairs[pair].corrupted, self.pairs[pair].clean
        base, source, tokens = self._values(text), self._values(other), self.model.tokenize([text])
        q, p = edge.up.position, edge.down.position
        assert q is not None
        assert p is not None
        if edge.up.kind == "latent":
            acts = [self.up.activations(x[0][:, q : q + 1])[0][0, 0, edge.up.unit] for x in (base, source)]
            vector = (acts[1] - acts[0]) * self.up.rows[edge.up.unit]
        else:
            vector = self.up.encode(source[0]).error[0, q] - self.up.encode(base[0]).error[0, q]
        held: list[Tensor] = []
        first, second = base[0].clone(), base[1].clone()
        first[0, q] += vector
        with edit_sites(self.model.layout, {self.up.site: _set_to(first), self.down.site: _kept_in(held)}):
            self.model.call(tokens)
        before, after = (self.down.activations(x[:, p : p + 1])[0][0, 0, edge.down.unit] for x in (base[1], held[0]))
        second[0, p] += (after - before) * self.down.rows[edge.down.unit]
        with edit_sites(self.model.layout, {self.down.site: _set_to(second)}):
            logits = self.model.call(tokens)[0, -1]
        plain = self.model.call(tokens)[0, -1]
        answer, counter = (self.model.encode(side)[-1] for side in self._answers(pair))
        return float((logits - plain)[answer] - (logits - plain)[counter])


def _set_to(value: Tensor) -> Hooked:
    return lambda _: value


def _kept_in(held: list[Tensor]) -> Hooked:
    def see(x: Tensor) -> Tensor:
        held.append(x)
        return x

    return see


if __name__ == "__main__":
    sys.exit(run_config(CircuitBenchmarkConfig, run, "python -m experiments.benchmarks.circuits"))
