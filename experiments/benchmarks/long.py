"""Time and memory of passes over long prompts: a sparse trace beside the model's own attention.

    python -m experiments.benchmarks.long --out runs/bench-long

Random models of 2 layers: a small Llama shape, and Gemma 3 270M's shape (of its 18 layers: one with a sliding window,
one without). Each pass runs in a process of its own, after one over a short prompt. Seconds are processor time of one
thread; memory is the peak of the process beyond what it held before the pass (its weights and libraries), and, for the
whole, with them. "patterns kept" is eager attention with `output_attentions=True`. With --model a folder's model is
measured instead. Attribution is first order, of every latent of a random TopK dictionary at the first block's output,
at every position of two prompts that differ in the middle; patching is of 8 latents, each at all positions. A splice
is a bottleneck: one whole pass in which the site carries only the reconstruction, with 8 latents set to 0. --only runs
the passes whose names hold a text, such as "gemma".
"""

import multiprocessing
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, Gemma3TextConfig, LlamaConfig, PreTrainedTokenizerFast

from saepatch.cli.parser import run_config
from saepatch.data.pairs import PromptPair
from saepatch.dictionaries.dictionary import Dictionary
from saepatch.dictionaries.loading import adopt
from saepatch.engine.components import Edit, EditPart, LatentUnits
from saepatch.engine.gradients import GradDrop
from saepatch.engine.passes.pieces import next_logits_in_pieces
from saepatch.errors import UserError
from saepatch.measure.attribution import attribute
from saepatch.measure.long.trace import trace_attention
from saepatch.measure.patching import patch_by_pair, patch_latents
from saepatch.model.language_model import LanguageModel, Tokens
from saepatch.model.loading.load import load_model, wrap_model
from saepatch.model.sites import Site
from saepatch.records.files import check_writable
from saepatch.records.tables import text_table
from saepatch.splicing.interventions import Ablate
from saepatch.splicing.splice import splice

from .common.measuring import all_versions, check_counts, write_results
from .common.resident import resident_bytes

SHORT = 600  # tokens of the pass before the measured one
WAYS = (
    "trace", "trace, every query measured", "whole model", "patterns kept", "attribution", "8 latents patched",
    "graddrop", "two sites patched", "splice",
)  # fmt: skip
GEMMAS = ("trace", "attribution", "8 latents patched", "splice")  # of the ways, for its shape
LATENTS = 4096  # of the dictionary at the first block's output


@dataclass(frozen=True)
class LongBenchmarkConfig:
    """Time passes over long prompts, and measure their memory."""

    out: str = ""
    """Folder for summary.json; empty: the table is printed, and no file is written."""
    model: str = ""
    """Folder of a model, measured instead of the random ones."""
    shortest: int = 4096
    """Tokens of the prompt on which all ways run."""
    longest: int = 32768
    """Tokens of the longest prompt of the small shape (and of a given model)."""
    gemma: int = 16384
    """Tokens of the prompt of Gemma's shape; 0: it is left out."""
    only: str = ""
    """Run only passes whose names hold this text."""
    k: int = 8
    """Key blocks chosen for each head and query block."""
    block: int = 64
    """Positions of a block."""
    seed: int = 0
    """Seed of weights and prompts."""

    def __post_init__(self) -> None:
        check_counts(shortest=self.shortest, longest=self.longest, k=self.k, block=self.block)


@dataclass(frozen=True)
class LongPass:
    """One measured pass: the model ("small", "gemma" or a folder), the number of tokens, and how they run."""

    model: str
    tokens: int
    way: str

    @property
    def name(self) -> str:
        return f"{self.model}, {self.tokens:,} tokens: {self.way}"


@dataclass(eq=False)
class LongTimes:
    """Seconds and peak memory of each pass."""

    config: LongBenchmarkConfig
    seconds: dict[LongPass, float] = field(default_factory=dict)
    added_mb: dict[LongPass, float] = field(default_factory=dict)
    peak_mb: dict[LongPass, float] = field(default_factory=dict)

    def ratios(self) -> dict[str, float]:
        """How time and memory grow with the prompt, and against attention with patterns kept, of passes that ran."""
        config, name = self.config, self.config.model or "small"
        trace, every, _, patterns, *_ = (LongPass(name, config.shortest, way) for way in WAYS)
        long, grown = replace(trace, tokens=config.longest), f"{config.longest:,} over {config.shortest:,} tokens"
        pairs = {
            f"time, {grown}": (self.seconds, long),
            f"memory, {grown}": (self.added_mb, long),
            "time, patterns kept over trace": (self.seconds, patterns),
            "memory, patterns kept over trace": (self.added_mb, patterns),
            "time, every query measured over trace": (self.seconds, every),
        }
        ran = {name: pair for name, pair in pairs.items() if {trace, pair[1]} <= pair[0].keys()}
        return {name: figures[run] / figures[trace] for name, (figures, run) in ran.items()}

    def summary(self) -> dict[str, Any]:
        passes = [
            asdict(run) | {"seconds": self.seconds[run], "added_mb": self.added_mb[run], "peak_mb": self.peak_mb[run]}
            for run in self.seconds
        ]
        return {
            "ratios": self.ratios(),
            "passes": passes,
            "settings": asdict(self.config),
            "versions": all_versions(),
        }

    def table(self) -> str:
        rows = [
            [run.name, f"{self.seconds[run]:.2f}"] + [f"{memory[run]:,.0f}" for memory in (self.added_mb, self.peak_mb)]
            for run in self.seconds
        ]
        ratios = [[name, f"{value:.2f}"] for name, value in self.ratios().items()]
        tables = [text_table(["pass", "s", "MB added", "MB, whole process"], rows)]
        return "\n\n".join(tables + ([text_table(["ratio", ""], ratios)] if ratios else []))


def passes(config: LongBenchmarkConfig) -> list[LongPass]:
    """The passes to measure."""
    name = config.model or "small"
    some = [LongPass(name, config.shortest, way) for way in WAYS]
    some += [LongPass(name, config.longest, way) for way in WAYS if way not in (WAYS[1], WAYS[3])]
    if config.gemma and not config.model:
        some += [LongPass("gemma", config.gemma, way) for way in GEMMAS]
    chosen = [run for run in some if config.only in run.name]
    if not chosen:
        raise UserError(f"no pass is named {config.only!r}: use a part of one of {'; '.join(run.name for run in some)}")
    return chosen


def run(config: LongBenchmarkConfig) -> None:
    """Measure, print the table, and write summary.json if a folder is given."""
    if config.out:
        check_writable(config.out)
    if not Path("/proc/self/clear_refs").exists():
        raise UserError("peak memory is read from /proc, which only Linux has: run the benchmark there")
    times = LongTimes(config)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, context, max_tasks_per_child=1) as alone:
        for run in passes(config):
            times.seconds[run], times.added_mb[run], times.peak_mb[run] = alone.submit(measured, run, config).result()
    write_results(times, config.out)


def measured(run: LongPass, config: LongBenchmarkConfig) -> tuple[float, float, float]:
    """Seconds of a pass, MB that it adds at its peak, and the peak of the process with weights and libraries."""
    torch.set_num_threads(1)
    model = random_model(run.model, config.seed) if run.model in ("small", "gemma") else load_model(run.model)
    act = _act(run.way, config)
    with torch.no_grad():
        act(model, random_tokens(model, min(SHORT, run.tokens), config.seed))
        before = resident_bytes("now") / 2**20
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # the peak is counted anew from here
        start = time.process_time()
        kept = act(model, random_tokens(model, run.tokens, config.seed))
        seconds, peak = time.process_time() - start, resident_bytes("peak") / 2**20
        del kept
    return seconds, max(peak - before, 0.1), peak


def _act(way: str, config: LongBenchmarkConfig) -> Callable[[LanguageModel, Tokens], Any]:
    def trace(model: LanguageModel, tokens: Tokens, measured: int | None = 16) -> Any:
        return trace_attention(model, tokens, config.k, block=config.block, measured=measured, compare=False)

    def patterns(model: LanguageModel, tokens: Tokens) -> Any:
        model.hf.set_attn_implementation("eager")  # type: ignore[operator]
        return model.hf(input_ids=tokens.input_ids, output_attentions=True, logits_to_keep=1, use_cache=False)

    def attribution(model: LanguageModel, tokens: Tokens) -> Any:
        return attribute(model, _dictionary(model, config.seed), [_pair(model, tokens)])

    def latents(model: LanguageModel, tokens: Tokens) -> Any:
        return patch_latents(model, _dictionary(model, config.seed), [_pair(model, tokens)], range(8), controls=0)

    def graddrop(model: LanguageModel, tokens: Tokens) -> Any:
        return attribute(model, _dictionary(model, config.seed), [_pair(model, tokens)], method=GradDrop())

    def two_sites(model: LanguageModel, tokens: Tokens) -> Any:
        components = [LatentUnits(_dictionary(model, config.seed, layer)) for layer in range(2)]
        edit = Edit.of([EditPart(component.site, tuple(range(8))) for component in components])
        return patch_by_pair(model, components, [_pair(model, tokens)], [[edit]])

    def spliced(model: LanguageModel, tokens: Tokens) -> Any:
        with splice(model, _dictionary(model, config.seed), Ablate(range(8)), error="drop"):
            return model.next_logits(tokens)

    ways: tuple[Callable[[LanguageModel, Tokens], Any], ...] = (
        trace, lambda model, tokens: trace(model, tokens, None), next_logits_in_pieces, patterns, attribution, latents,
        graddrop, two_sites, spliced,
    )  # fmt: skip
    return dict(zip(WAYS, ways, strict=True))[way]


def _pair(model: LanguageModel, tokens: Tokens) -> PromptPair:
    """Two prompts of these tokens that differ in the middle one, and two words to compare."""
    words = [f"w{number}" for number in tokens.input_ids[0].tolist()]
    other = [*words]
    other[len(words) // 2] = "w1" if words[len(words) // 2] != "w1" else "w2"
    return PromptPair(" ".join(words), " ".join(other), " w3", " w4", "long")


def _dictionary(model: LanguageModel, seed: int, layer: int = 0) -> Dictionary:
    from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

    sae: Any = TopKSAE(TopKSAEConfig(d_in=model.d_model, d_sae=LATENTS, k=32))
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for weight in sae.parameters():
            weight.copy_(torch.randn(weight.shape, generator=generator) * weight.shape[-1] ** -0.5)
    return adopt(sae, Site(layer, "resid_post"), "random topk")


def random_model(shape: str, seed: int) -> LanguageModel:
    """A random model of 2 layers: "small", of a Llama shape, or "gemma", of Gemma 3 270M's."""
    torch.manual_seed(seed)
    common: dict[str, Any] = {"num_hidden_layers": 2, "num_attention_heads": 4, "max_position_embeddings": 2**17}
    if shape == "small":
        config: Any = LlamaConfig(
            vocab_size=512, hidden_size=256, intermediate_size=1024, num_key_value_heads=2, head_dim=64, **common
        )
    else:
        kinds = ["sliding_attention", "full_attention"]
        config = Gemma3TextConfig(
            vocab_size=262144, hidden_size=640, intermediate_size=2048, num_key_value_heads=1, head_dim=256,
            query_pre_attn_scalar=256, sliding_window=512, layer_types=kinds, **common,
        )  # fmt: skip
    hf = AutoModelForCausalLM.from_config(config).eval()
    return wrap_model(hf, _words(config.vocab_size), f"{shape} shape")


def _words(vocabulary: int) -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(models.WordLevel({f"w{number}": number for number in range(vocabulary)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="w0", pad_token="w0")


def random_tokens(model: LanguageModel, number: int, seed: int) -> Tokens:
    """One row of random tokens."""
    generator = torch.Generator().manual_seed(seed)
    ids = torch.randint(1, model.vocabulary, (1, number), generator=generator).to(model.device)
    return Tokens(ids, torch.ones_like(ids), torch.ones_like(ids, dtype=torch.bool))


if __name__ == "__main__":
    sys.exit(run_config(LongBenchmarkConfig, run, "python -m experiments.benchmarks.long"))
