"""How fast are MEMIT edits and covariances, compared with the original algorithm?

    python -m experiments.benchmarks.facts --out runs/bench-facts

A random model of GPT-2's shape. Ours is timed on all facts; a transcription of the original code (`compute_z`,
`compute_ks`, `execute_memit` and `layer_stats` of https://github.com/kmeng01/memit) on the first few, scaled to all,
since it handles one fact at a time in whole forward passes with logits at every position. Both get the same prefixes
and covariances, and must agree: losses, and the change of every weight. Covariances: the original makes one pass per
layer and sums in float32. The clock is the process's own time on one thread.
"""

import logging
import resource
import sys
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from saepatch.cli.parser import run_config
from saepatch.data.edit_requests import EditRequest
from saepatch.facts.contexts import Contexts, Prefixes, answer_ids
from saepatch.facts.covariances import Covariances
from saepatch.facts.delta import Delta, WeightChange, applied
from saepatch.facts.methods import Editing, Memit
from saepatch.facts.projections import projection
from saepatch.facts.values import ESSENCE, ValueSearch, find_values
from saepatch.model.hooks import edit_sites
from saepatch.model.language_model import LanguageModel
from saepatch.model.sites import Site
from saepatch.records.tables import text_table

from .common.cases import make_subject
from .common.measuring import BenchmarkConfig, Clock, all_versions, check_counts, write_results

log = logging.getLogger("experiments.benchmarks")


@dataclass(frozen=True)
class FactBenchmarkConfig(BenchmarkConfig):
    """Time MEMIT edits and covariances beside a transcription of the original code."""

    facts: int = 100
    """Facts that are edited together."""
    loop: int = 4
    """Facts for which the original is run; its time is scaled to all."""
    steps: int = 20
    """Steps in the search for each value."""
    edited: tuple[int, ...] = (1, 2, 3, 4, 5)
    """Edited layers."""
    texts: int = 64
    """Texts of the covariance."""
    tokens: int = 128
    """Tokens of each text."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(facts=self.facts, loop=self.loop, steps=self.steps, texts=self.texts, tokens=self.tokens)


@dataclass(eq=False)
class FactTimes:
    """Seconds of ours and of the original's, and how far they agree."""

    config: FactBenchmarkConfig
    seconds: dict[str, float] = field(default_factory=dict)
    losses: dict[str, float] = field(default_factory=dict)
    worst_loss: float = 0.0
    worst_delta: float = 0.0
    worst_covariance: float = 0.0
    covariance_mb: float = 0.0

    def summary(self) -> dict[str, Any]:
        config = self.config
        scaled = self.seconds["original_values"] * config.facts / config.loop
        return {
            "ratios": {
                "original_over_values": scaled / self.seconds["values"],
                "original_over_edit": (scaled + self.seconds["original_update"])
                / (self.seconds["values"] + self.seconds["update"]),
                "original_over_covariances": self.seconds["original_covariances"] / self.seconds["covariances"],
            },
            "seconds": self.seconds,
            "losses": self.losses,
            "worst_loss": self.worst_loss,
            "worst_delta": self.worst_delta,
            "worst_covariance": self.worst_covariance,
            "covariance_mb": self.covariance_mb,
            "settings": asdict(config),
            "versions": all_versions(),
        }

    def table(self) -> str:
        summary = self.summary()
        rows = [[name, f"{value:.2f}"] for name, value in summary["ratios"].items()]
        rows += [[f"{name}, s", f"{value:.2f}"] for name, value in self.seconds.items()]
        rows += [[f"loss, {name}", f"{value:.4f}"] for name, value in self.losses.items()]
        rows += [[name, f"{summary[name]:.2g}"] for name in ("worst_loss", "worst_delta", "worst_covariance")]
        return text_table(["facts", ""], [*rows, ["covariance_mb", f"{self.covariance_mb:,.0f}"]])


def run(config: FactBenchmarkConfig) -> None:
    """Measure, print the table, and write summary.json if a folder is given."""
    clock = config.prepare()
    model = make_subject("gpt2", replace(config.size, latents=64, k=4), config.device, config.seed).model
    words = torch.Generator().manual_seed(config.seed)

    def text(length: int) -> str:
        ids = torch.randint(10, model.vocabulary - 10, (length,), generator=words)
        return " ".join(f"w{token}" for token in ids.tolist())

    requests = [
        EditRequest(f"{text(2)} {{}} {text(4)}", text(2), f" {text(1)}", f" {text(1)}", str(number))
        for number in range(config.facts)
    ]
    prefixes = Prefixes((("",), tuple(f"{text(10)} " for _ in range(5))))
    texts = [text(config.tokens) for _ in range(config.texts)]
    write_results(_measure(config, model, (requests, prefixes, texts), clock), config.out)


def _measure(
    config: FactBenchmarkConfig,
    model: LanguageModel,
    given: tuple[list[EditRequest], Prefixes, list[str]],
    clock: Clock,
) -> FactTimes:
    requests, prefixes, texts = given
    times, layers, search = FactTimes(config), config.edited, ValueSearch(clamp=0.75, steps=config.steps)

    def timed(name: str, act: Callable[[], Any]) -> Any:
        start = clock()
        value = act()
        times.seconds[name] = clock() - start
        return value

    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    measured = timed("covariances", lambda: Covariances.over(model, layers, texts))
    times.covariance_mb = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024
    plain = timed("original_covariances", lambda: [_original_covariance(model, layer, texts) for layer in layers])
    for layer, matrix in zip(layers, plain, strict=True):
        gap = (measured.matrices[layer] - matrix).norm() / matrix.norm()
        times.worst_covariance = max(times.worst_covariance, float(gap))
    covariances = replace(measured, ridge=0.01)  # random texts are few
    contexts = Contexts(model, requests, prefixes)
    values = timed("values", lambda: find_values(contexts, Site(layers[-1]), search))
    few = replace(contexts, requests=requests[: config.loop])
    original = timed(
        "original_values", lambda: [_Original(few.one(i), layers[-1], search).run() for i in range(config.loop)]
    )
    losses = torch.tensor([loss for _, loss in original], dtype=torch.float64)
    times.losses = {"ours": float(values.loss[: config.loop].mean()), "original": float(losses.mean())}
    times.worst_loss = float((values.loss[: config.loop] - losses).abs().max())
    editing = Editing(contexts, values, covariances, Delta.none(model, "memit"))
    ours = timed("update", lambda: Memit(layers, search=search).changes(editing))
    theirs = timed("original_update", lambda: _original_update(editing, layers))
    for own, other in zip(ours, theirs, strict=True):
        times.worst_delta = max(times.worst_delta, float((own.matrix - other).norm() / other.norm()))
    return times


class _Original:
    """`compute_z` of one fact: whole forward passes over all prompts, logits at all positions."""

    def __init__(self, contexts: Contexts, layer: int, search: ValueSearch) -> None:
        self.model, self.site, self.search = contexts.model, Site(layer), search
        (request,) = contexts.requests
        self.target = answer_ids(self.model, request.text, request.target)
        rows = [ids + self.target[:-1] for ids in contexts.rows]
        essence, last = contexts.located("", ESSENCE, request.subject)
        self.tokens, self.at = self.model.pad([*rows, essence]), [*contexts.last, last]
        self.ends = [len(ids) for ids in [*rows, essence]]

    def run(self) -> tuple[Tensor, float]:
        """δ, and its loss."""
        model, delta = self.model, torch.zeros(self.model.d_model, requires_grad=True)
        start: list[Tensor] = []

        def add(x: Tensor) -> Tensor:
            if not start:
                start.append(x[0, self.at[0]].detach().clone())
            new = x.clone()
            for row, position in enumerate(self.at):
                new[row, position] = new[row, position] + delta
            return new

        adam, before, loss = torch.optim.Adam([delta], lr=self.search.lr), None, torch.zeros(())
        for step in range(1, self.search.steps + 1):
            adam.zero_grad()
            with torch.enable_grad(), edit_sites(model.layout, {self.site: add}):
                scores = model.call(self.tokens).log_softmax(-1)
            essence = scores[-1, self.ends[-1] - 1]
            before = essence.detach().clone() if before is None else before
            nll = self._nll(scores)
            kl = torch.nn.functional.kl_div(before, essence, log_target=True, reduction="sum")
            loss = nll + self.search.kl * kl + self.search.decay * delta.norm() / start[0].norm() ** 2
            if loss < self.search.stop or step == self.search.steps:
                break
            loss.backward()
            adam.step()
            most = self.search.clamp * start[0].norm()
            if delta.norm() > most:
                with torch.no_grad():
                    delta.mul_(most / delta.norm())
        return delta.detach(), float(loss.detach())

    def _nll(self, scores: Tensor) -> Tensor:
        total = []
        for row, end in enumerate(self.ends[:-1]):
            where = torch.arange(end - len(self.target), end)
            total.append(-scores[row, where, torch.tensor(self.target)].mean())
        return torch.stack(total).mean()


def _original_covariance(model: LanguageModel, layer: int, texts: Sequence[str]) -> Tensor:
    """`layer_stats`: a pass over the texts for one layer, summed in float32."""
    site, total, count = Site(layer, "neurons"), None, 0
    for start in range(0, len(texts), 32):
        tokens = model.tokenize(texts[start : start + 32])
        keys = model.capture(tokens, [site])[site][tokens.ordinary]
        total = keys.T @ keys if total is None else total + keys.T @ keys
        count += len(keys)
    assert total is not None
    return total.double() / count


def _original_update(editing: Editing, layers: Sequence[int]) -> list[Tensor]:
    """`execute_memit`: for each layer a solve with λC + KKᵀ."""
    model, contexts, last = editing.model, editing.contexts, Site(layers[-1])
    target = contexts.states(last, bare=True)[:, 0] + editing.values.delta
    made: list[WeightChange] = []
    for number, layer in enumerate(layers):
        with applied(model, made):
            keys = contexts.mean(contexts.states(Site(layer, "neurons"))).T
            missing = (target - contexts.states(last, bare=True)[:, 0]) / (len(layers) - number)
        matrix = 15000.0 * editing.covariances.matrix(layer) + keys @ keys.T
        delta = missing.T @ torch.linalg.solve(matrix, keys).T
        made.append(WeightChange(layer, delta, torch.eye(len(keys), dtype=torch.float64), keys))
        assert projection(model, layer).matrix.shape == delta.shape
    return [change.left for change in made]


if __name__ == "__main__":
    sys.exit(run_config(FactBenchmarkConfig, run, "python -m experiments.benchmarks.facts"))
