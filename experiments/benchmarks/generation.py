"""How much does a splice slow generation down, compared with other libraries?

    python -m experiments.benchmarks.generation --out runs/generation

A random model of GPT-2 small's shape with random dictionaries at the middle layer; greedy generation with a KV cache.
Each round runs every variant once, between two runs of the bare model, and divides by the mean of these two; the
reported overhead is the median over rounds, minus 1. The clock is processor time of one thread (wall time on a GPU).
Variants that make the same edit must generate the same tokens, and different ones from the bare model.

`one_latent` is the larger overhead of adding to one latent and of clamping one (in a JumpReLU dictionary, whose latents
can be computed individually). `full_splice` encodes and decodes a whole TopK dictionary at every step, computes the
error term, and clamps one latent. sae-lens' bridge makes the same clamp with its error term, in its own `generate`.
"""

import copy
import gc
import logging
import sys
import tempfile
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor

from saepatch.cli.parser import run_config
from saepatch.dictionaries.dictionary import Dictionary
from saepatch.dictionaries.loading import adopt
from saepatch.errors import UserError
from saepatch.model.hooks import capture
from saepatch.model.sites import Site
from saepatch.records.tables import text_table
from saepatch.splicing.interventions import Clamp, Steer
from saepatch.splicing.splice import splice

from .common.cases import VOCABULARIES, Subject, make_subject
from .common.measuring import BenchmarkConfig, Clock, all_versions, check_counts, write_results
from .common.peers import missing

log = logging.getLogger("experiments.benchmarks")  # by name: run as a module, this file is `__main__`

LATENT = 7
PEERS = ("sae_lens_bridge", "nnsight")
Generate = Callable[[], Int[Tensor, "1 new"]]


@dataclass(frozen=True)
class GenerationConfig(BenchmarkConfig):
    """Time generation under a splice, compared with the bare model and with other libraries."""

    shape: str = "gpt2"
    """Shape of the model: gpt2 or llama."""
    peers: tuple[str, ...] = PEERS
    """Libraries to compare with; those not installed are skipped, with the reason."""
    rounds: int = 7
    """Number of runs of each variant; medians are reported."""
    tokens: int = 32
    """Number of tokens of the prompt."""
    new_tokens: int = 48
    """Number of tokens generated in each run."""

    def __post_init__(self) -> None:
        super().__post_init__()
        check_counts(rounds=self.rounds, tokens=self.tokens, new_tokens=self.new_tokens)
        if self.latents <= LATENT:
            raise UserError(f"latents = {self.latents}: use more than {LATENT}, the index of the edited latent")
        if self.shape not in VOCABULARIES:
            raise UserError(f"unknown shape {self.shape!r}: use {' or '.join(VOCABULARIES)}")
        if unknown := [peer for peer in self.peers if peer not in PEERS]:
            raise UserError(f"unknown peer {unknown[0]!r}: use {', '.join(PEERS)}")


@dataclass(frozen=True, eq=False)
class GenerationTask:
    """A prompt to continue, dictionaries at the middle layer, and a strength at which edits change the text."""

    subject: Subject
    topk: Dictionary
    jumprelu: Dictionary
    ids: Int[Tensor, "1 pos"]
    new_tokens: int
    strength: float

    @property
    def block(self) -> int:
        return self.subject.size.layer - 1

    def options(self) -> dict[str, Any]:
        """Options of plain `generate`: exactly `new_tokens` tokens, greedily."""
        return {
            "attention_mask": torch.ones_like(self.ids),
            "max_new_tokens": self.new_tokens,
            "do_sample": False,
            "pad_token_id": 0,
            "eos_token_id": None,
        }

    def generate(self) -> Int[Tensor, "1 new"]:
        with torch.no_grad():
            return self.subject.hf.generate(self.ids, **self.options())[:, self.ids.shape[1] :]

    def spliced(self, dictionary: Dictionary, edit: Any, record: bool = False) -> Generate:
        def run() -> Int[Tensor, "1 new"]:
            with splice(self.subject.model, dictionary, edit, record=record):
                return self.generate()

        return run


@torch.no_grad()
def make_task(config: GenerationConfig) -> GenerationTask:
    """A task whose strength is three times the mean norm of the activations at the middle layer."""
    subject = make_subject(config.shape, config.size, config.device, config.seed)
    topk = subject.dictionary(config.size.layer)
    generator = torch.Generator().manual_seed(config.seed)
    ids = torch.randint(1, subject.hf.config.vocab_size, (1, config.tokens), generator=generator).to(config.device)
    x = capture(subject.hf, subject.model.layout, [topk.site], {"input_ids": ids, "use_cache": False})[topk.site]
    strength = 3 * float(x.norm(dim=-1).mean())
    return GenerationTask(subject, topk, _jumprelu(topk, x), ids, config.new_tokens, strength)


def _jumprelu(topk: Dictionary, x: Tensor) -> Dictionary:
    """A JumpReLU dictionary of the same weights, with one threshold that about k latents pass on the prompt."""
    from sae_lens.saes.jumprelu_sae import JumpReLUSAE, JumpReLUSAEConfig

    sae = JumpReLUSAE(JumpReLUSAEConfig(d_in=topk.d_in, d_sae=topk.d_sae, device=str(x.device)))
    before = (x - topk.sae.b_dec) @ topk.sae.W_enc + topk.sae.b_enc  # type: ignore[operator]
    k = int(topk.sae.cfg.k)  # type: ignore[union-attr,arg-type]
    threshold = before.topk(k, dim=-1).values[..., -1].median().clamp(min=1e-3)
    state = {name: weight.clone() for name, weight in topk.sae.state_dict().items()}
    sae.load_state_dict(state | {"threshold": threshold.expand(topk.d_sae).clone()})
    return adopt(sae, Site.parse(topk.site), "random jumprelu")


def ours(task: GenerationTask) -> dict[str, Generate]:
    """The variants of saepatch."""
    add, clamp = Steer(LATENT, task.strength), Clamp(LATENT, task.strength)
    return {
        "no_edit": task.spliced(task.topk, ()),
        "add_one": task.spliced(task.topk, add),
        "clamp_one": task.spliced(task.jumprelu, clamp),
        "full_clamp_topk": task.spliced(task.topk, clamp),
        "full_splice": task.spliced(task.topk, clamp, record=True),
    }


def by_hand(task: GenerationTask, change: Callable[[Tensor], Tensor]) -> Generate:
    """Generation with a plain torch hook, the reference for all variants."""

    def run() -> Int[Tensor, "1 new"]:
        def hook(_module: Any, _args: Any, output: Any) -> Any:
            x = output[0] if isinstance(output, tuple) else output
            new = x + change(x)
            return (new, *output[1:]) if isinstance(output, tuple) else new

        handle = task.subject.model.layout.blocks[task.block].register_forward_hook(hook)
        try:
            return task.generate()
        finally:
            handle.remove()

    return run


def references(task: GenerationTask) -> dict[str, Generate]:
    """Each edit by a plain hook, through the SAEs' own encoders."""
    row = task.topk.rows[LATENT]

    def clamped(dictionary: Dictionary) -> Callable[[Tensor], Tensor]:
        def change(x: Tensor) -> Tensor:
            return (task.strength - dictionary.sae.encode(x)[..., LATENT, None]) * row  # type: ignore[operator]

        return change

    return {
        "no_edit": task.generate,
        "add": by_hand(task, lambda x: task.strength * row),
        "clamp": by_hand(task, clamped(task.jumprelu)),
        "full": by_hand(task, clamped(task.topk)),
    }


def sae_lens_bridge(task: GenerationTask) -> Generate:
    """The bridge's own `generate`, with the TopK SAE and its error term attached and a hook that clamps the latent."""
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

    hf = copy.deepcopy(task.subject.hf)  # the bridge changes the model it wraps
    with tempfile.TemporaryDirectory(prefix="shape-") as folder:
        hf.config.save_pretrained(folder)
        model = SAETransformerBridge.boot_transformers(
            folder, hf_model=hf, tokenizer=task.subject.model.tokenizer, device=str(task.ids.device)
        )
    sae = copy.deepcopy(task.subject.sae)
    model.add_sae(sae, use_error_term=True)
    point = model.get_sae_hook_name(sae)

    def clamp(acts: Tensor, hook: Any) -> Tensor:
        acts[..., LATENT] = task.strength
        return acts

    def run() -> Int[Tensor, "1 new"]:
        hooked: AbstractContextManager[Any] = model.hooks(fwd_hooks=[(point, clamp)])
        with hooked, torch.no_grad():
            out = model.generate(
                task.ids,
                max_new_tokens=task.new_tokens,
                do_sample=False,
                stop_at_eos=False,
                return_type="tokens",
                verbose=False,
                prepend_bos=False,
            )
        return out[:, task.ids.shape[1] :]

    return run


def nnsight(task: GenerationTask) -> Generate:
    """A traced `generate` in which one vector is added at every step."""
    import nnsight as library

    model = library.NNsight(copy.deepcopy(task.subject.hf))  # the wrapped model keeps its hooks
    blocks = model.transformer.h if task.subject.shape == "gpt2" else model.model.layers
    block, options = blocks[task.block], task.options()
    vector, steps = task.strength * task.topk.rows[LATENT], task.new_tokens

    def run() -> Int[Tensor, "1 new"]:
        with torch.no_grad(), model.trace(task.ids, fn="generate", **options) as tracer:
            for _ in tracer.iter[:steps]:
                block.output[:] += vector
            out = library.save(tracer.result)
        return out[:, task.ids.shape[1] :]

    return run


# The reference whose tokens each variant must generate.
EDIT_OF = {
    "no_edit": "no_edit",
    "add_one": "add",
    "clamp_one": "clamp",
    "full_clamp_topk": "full",
    "full_splice": "full",
    "sae_lens_bridge": "full",
    "nnsight": "add",
}


@dataclass(eq=False)
class GenerationResults:
    """Seconds of each variant in each round, and their ratio to the bare model's before and after."""

    config: GenerationConfig
    seconds: dict[str, list[float]] = field(default_factory=dict)
    ratios: dict[str, list[float]] = field(default_factory=dict)
    left_out: dict[str, str] = field(default_factory=dict)

    def overhead(self, variant: str) -> float:
        """Slowdown relative to the bare model: 0.05 is 5 %."""
        return median(self.ratios[variant]) - 1

    def summary(self) -> dict[str, Any]:
        overhead = {name: self.overhead(name) for name in self.ratios}
        one_latent = max(overhead["add_one"], overhead["clamp_one"])
        return {
            "overhead": {"one_latent": one_latent, **overhead},
            "ms_per_token": {name: 1e3 * median(s) / self.config.new_tokens for name, s in self.seconds.items()},
            "left_out": self.left_out,
            "config": asdict(self.config),
            "versions": all_versions(),
        }

    def table(self) -> str:
        """The printed table: a row per variant."""
        rows = []
        for name, seconds in self.seconds.items():
            over = "" if name == "bare" else f"{100 * self.overhead(name):+.1f} %"
            rows.append([name, f"{1e3 * median(seconds) / self.config.new_tokens:.2f}", over])
        lines = [text_table(["", "ms per token", "over bare"], rows)]
        return "\n".join([*lines, *(f"skipped: {name} ({why})" for name, why in self.left_out.items())])


def run(config: GenerationConfig) -> None:
    """Measure, print the table, and write summary.json if a folder is given.

    Raises:
        AssertionError: variants that make the same edit generated different tokens.
    """
    clock = config.prepare()
    needs = {"sae_lens_bridge": "transformer_lens", "nnsight": "nnsight"}
    results = GenerationResults(
        config, left_out={p: why for p in config.peers if (why := missing(needs[p])) is not None}
    )
    task = make_task(config)
    variants = ours(task)
    for name, make in (("sae_lens_bridge", sae_lens_bridge), ("nnsight", nnsight)):
        if name in config.peers and name not in results.left_out:
            variants[name] = make(task)
    check(task, variants)
    measure(results, task.generate, variants, clock)
    write_results(results, config.out)


def measure(results: GenerationResults, bare: Generate, variants: dict[str, Generate], clock: Clock) -> None:
    """Run all variants in rounds, each between two runs of the bare model."""
    results.seconds = {name: [] for name in ("bare", *variants)}
    results.ratios = {name: [] for name in variants}
    for number in range(results.config.rounds):
        log.info("round %d of %d", number + 1, results.config.rounds)
        before = _seconds(clock, bare)
        for name, variant in variants.items():
            here, after = _seconds(clock, variant), _seconds(clock, bare)
            results.seconds[name].append(here)
            results.seconds["bare"].append(after)
            results.ratios[name].append(2 * here / (before + after))
            before = after


def check(task: GenerationTask, variants: dict[str, Generate]) -> None:
    """Run every variant once, untimed, and compare its tokens with the reference."""
    expected = {name: reference() for name, reference in references(task).items()}
    for name, tokens in expected.items():
        assert name == "no_edit" or not torch.equal(tokens, expected["no_edit"]), f"the edit {name} changes no token"
    for name, variant in variants.items():
        tokens = variant()
        assert torch.equal(tokens, expected[EDIT_OF.get(name, "no_edit")]), f"{name} writes other tokens: {tokens}"


def _seconds(clock: Clock, act: Callable[[], object]) -> float:
    gc.collect()
    start = clock()
    act()
    return clock() - start


if __name__ == "__main__":
    sys.exit(run_config(GenerationConfig, run, "python -m experiments.benchmarks.generation"))
