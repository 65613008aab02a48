"""How fast is training from texts to dictionaries, compared with sae_lens' own runner, and in how much memory?

    python -m experiments.benchmarks.end_to_end --model google/gemma-3-270m --data TEXTS.jsonl --out runs/end-to-end

Both sides train TopK dictionaries of the same sites on the same texts, each in a process of its own: forward passes
of the model up to the last site, a buffer of activations, training steps; the time of our evaluation is left out (its
memory is not). sae_lens runs transformer_lens' `HookedTransformer`, its fastest class: it stops at the last site
(with several sites, its runner for several dictionaries). The clock starts once the libraries and the model are
loaded. It is processor time of all threads, which other load on the machine affects little; wall time stands beside
it. Peak memory is that of the whole process. The saved dictionaries are evaluated by the same code on held-out texts.
"""

import logging
import sys
import tempfile
import time
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from dataclasses import asdict, astuple, dataclass, field, replace
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from typing import Any

import torch

from saepatch.cli.parser import run_config
from saepatch.data.texts import load_texts
from saepatch.dictionaries.dictionary import Dictionary
from saepatch.dictionaries.loading import load_saes
from saepatch.errors import UserError
from saepatch.model.language_model import LanguageModel, Tokens
from saepatch.model.loading.load import load_model
from saepatch.model.sites import Site
from saepatch.records.files import check_writable
from saepatch.records.provenance import versions
from saepatch.records.tables import text_table

from .common.measuring import check_counts, write_results
from .common.peers import missing
from .common.resident import resident_bytes

log = logging.getLogger("experiments.benchmarks")  # by name: run as a module, this file is `__main__`

OURS, SAE_LENS = "saepatch", "sae_lens"
HELD_OUT = 32  # texts that are evaluated on, and trained on by neither side


@dataclass(frozen=True)
class EndToEndConfig:
    """Time training from texts to dictionaries, compared with sae_lens' runner."""

    model: str = ""
    """Model: a folder, or a Hugging Face id."""
    data: str = ""
    """Texts: a .jsonl, .json, .csv, .parquet or .txt file."""
    out: str = ""
    """Folder for summary.json; empty: the table is printed, and no file is written."""
    sites: tuple[str, ...] = ("resid_post.9",)
    """Sites in the residual stream, trained together."""
    tokens: int = 32_768
    """Tokens to train on."""
    expansion: int = 8
    """Number of latents per dimension of the site."""
    k: int = 32
    """Number of active latents per token."""
    context: int = 128
    """Tokens of a row of text."""
    batch_size: int = 1024
    """Tokens of a training step."""
    buffer: int = 16_384
    """Tokens of the buffer of activations."""
    lr: float = 1e-3
    """Learning rate; both sides scale activations to a mean norm of √d_in."""
    rounds: int = 1
    """Number of runs of each side, in turn; medians are reported."""
    threads: int = 1
    """Threads of the processor in each process."""
    seed: int = 0
    """Seed of initial weights and of the order of texts."""

    def __post_init__(self) -> None:
        if not self.model or not self.data:
            raise UserError("give a model and texts, as in --model google/gemma-3-270m --data TEXTS.jsonl")
        check_counts(**{name: getattr(self, name) for name in ("tokens", "k", "context", "batch_size", "buffer")})
        check_counts(expansion=self.expansion, rounds=self.rounds, threads=self.threads)
        if wrong := [site for site in self.sites if Site.parse(site).stream != "resid_post"]:
            raise UserError(f"site {wrong[0]}: use sites in the residual stream, as in resid_post.9")


@dataclass(frozen=True)
class Trained:
    """One run: seconds of processor and wall time, peak memory of its process and memory before training (MB)."""

    processor: float
    wall: float
    peak_mb: float
    loaded_mb: float


@dataclass(eq=False)
class EndToEndResults:
    config: EndToEndConfig
    runs: dict[str, list[Trained]] = field(default_factory=dict)
    fvu: dict[str, dict[str, float]] = field(default_factory=dict)

    def of(self, side: str) -> Trained:
        """Medians over rounds."""
        rounds = zip(*map(astuple, self.runs[side]), strict=True)
        return Trained(*map(median, rounds))

    def summary(self) -> dict[str, Any]:
        ratios = {}
        if SAE_LENS in self.runs:
            ours, theirs = asdict(self.of(OURS)), asdict(self.of(SAE_LENS))
            ratios = {name: theirs[name] / ours[name] for name in ("processor", "wall", "peak_mb")}
        return {
            "ratios": ratios,
            "tokens_per_second": {side: self.speeds(side) for side in self.runs},
            "runs": {side: [asdict(run) for run in runs] for side, runs in self.runs.items()},
            "fvu": self.fvu,
            "config": asdict(self.config),
            "versions": versions("transformer-lens"),
        }

    def speeds(self, side: str) -> dict[str, float]:
        """Tokens a second by clock."""
        return {name: self.config.tokens / getattr(self.of(side), name) for name in ("processor", "wall")}

    def table(self) -> str:
        columns = ["", "tokens per s (processor)", "tokens per s (wall)", "peak MB", "MB before training", "FVU"]
        rows = [
            [
                side,
                *(f"{speed:,.0f}" for speed in self.speeds(side).values()),
                *(f"{mb:,.0f}" for mb in (self.of(side).peak_mb, self.of(side).loaded_mb)),
                ", ".join(f"{fvu:.4f}" for fvu in self.fvu[side].values()),
            ]
            for side in self.runs
        ]
        lines = [text_table(columns, rows)]
        lines += [f"sae_lens / saepatch, {name}: {ratio:.2f}" for name, ratio in self.summary()["ratios"].items()]
        return "\n".join(lines)


def run(config: EndToEndConfig) -> None:
    """Measure, print the table, and write summary.json if a folder is given."""
    if config.out:
        check_writable(config.out)
    texts = load_texts(config.data)
    if len(texts) <= HELD_OUT:
        raise UserError(f"{config.data} has {len(texts)} texts: give more than {HELD_OUT}, which are held out")
    results = EndToEndResults(config)
    sides = {OURS: _ours, SAE_LENS: _sae_lens}
    if why := missing("transformer_lens"):
        log.warning("sae_lens left out: %s", why)
        del sides[SAE_LENS]
    model = load_model(config.model)
    held_out = model.pad([model.encode(text)[: config.context] for text in texts[:HELD_OUT]])
    with tempfile.TemporaryDirectory(prefix="end-to-end-") as folder:
        for number in range(config.rounds):
            for side, train in sides.items():
                out = Path(folder) / f"{side}-{number}"
                log.info("round %d of %d: %s", number + 1, config.rounds, side)
                with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as fresh:
                    results.runs.setdefault(side, []).append(fresh.submit(train, config, str(out)).result())
        for side in sides:
            saes = load_saes(str(Path(folder) / f"{side}-0"))
            results.fvu[side] = {str(site): _fvu(model, dictionary, held_out) for site, dictionary in saes.items()}
    write_results(results, config.out)


@torch.no_grad()
def _fvu(model: LanguageModel, dictionary: Dictionary, tokens: Tokens) -> float:
    """Fraction of variance unexplained at ordinary tokens."""
    x = model.capture(tokens, [dictionary.site])[dictionary.site][tokens.ordinary]
    error = dictionary.encode(x).error.double()
    return float(error.square().sum() / (x.double() - x.double().mean(0)).square().sum())


def _ours(config: EndToEndConfig, out: str) -> Trained:
    from training.config import SAEConfig, TrainingConfig
    from training.loop import trainer
    from training.loop.trainer import train_saes

    torch.set_num_threads(config.threads)
    model, texts = load_model(config.model), load_texts(config.data)[HELD_OUT:]
    settings = TrainingConfig(
        model=config.model,
        data=config.data,
        sites=list(config.sites),
        out=Path(out),
        sae=SAEConfig(architecture="topk", k=config.k, expansion=config.expansion),
        tokens=config.tokens,
        batch_size=config.batch_size,
        context=config.context,
        buffer=config.buffer,
        lr=config.lr,
        eval_tokens=1,
        held_out=1 / len(texts),
        seed=config.seed,
    )
    with _apart(trainer, "evaluate_all") as evaluation:
        whole = _timed(lambda: train_saes(model, texts, settings, Path(out)))
    assert evaluation.wall
    return replace(whole, processor=whole.processor - evaluation.processor, wall=whole.wall - evaluation.wall)


@dataclass
class _Spent:
    processor: float = 0.0
    wall: float = 0.0


@contextmanager
def _apart(module: Any, name: str) -> Iterator[_Spent]:
    """Time the calls of a function of a module: ours evaluates what it saves, which sae_lens' runner does not."""
    function, spent = getattr(module, name), _Spent()

    def timed(*args: Any) -> Any:
        used, start = time.process_time(), time.monotonic()
        try:
            return function(*args)
        finally:
            spent.processor += time.process_time() - used
            spent.wall += time.monotonic() - start

    setattr(module, name, timed)
    try:
        yield spent
    finally:
        setattr(module, name, function)


def _sae_lens(config: EndToEndConfig, out: str) -> Trained:
    from datasets import Dataset
    from sae_lens import LanguageModelSAERunnerConfig, SAETrainingRunner
    from sae_lens.multi_sae_training_runner import MultiSAETrainingRunner, MultiSAETrainingRunnerConfig
    from sae_lens.saes.topk_sae import TopKTrainingSAEConfig
    from transformer_lens import HookedTransformer

    from .common.peers import hooked_transformer

    torch.set_num_threads(config.threads)
    ours = load_model(config.model)
    model = hooked_transformer(HookedTransformer, ours)
    model.set_tokenizer(ours.tokenizer)
    width = ours.d_model
    del ours
    texts = Dataset.from_dict({"text": load_texts(config.data)[HELD_OUT:]})
    sae = TopKTrainingSAEConfig(
        d_in=width, d_sae=config.expansion * width, k=config.k, normalize_activations="expected_average_only_in"
    )
    hooks, shared = {site: f"blocks.{Site.parse(site).layer}.hook_resid_post" for site in config.sites}, _shared(config)
    if len(hooks) == 1:
        (site, hook), *_ = hooks.items()
        settings = LanguageModelSAERunnerConfig(
            sae=sae, hook_name=hook, output_path=f"{out}/{site}", is_dataset_tokenized=False, verbose=False, **shared
        )
        runner: Any = SAETrainingRunner(settings, override_dataset=texts, override_model=model)
    else:
        several = MultiSAETrainingRunnerConfig(
            saes={site: replace(sae) for site in hooks}, hook_names=hooks, output_path=out, **shared
        )
        runner = MultiSAETrainingRunner(several, override_dataset=texts, override_model=model)
    return _timed(runner.run)


def _shared(config: EndToEndConfig) -> dict[str, Any]:
    """Settings of both of sae_lens' runners."""
    from sae_lens import LoggingConfig

    return {
        "model_name": config.model,
        "dataset_path": config.data,
        "streaming": False,
        "context_size": config.context,
        "store_batch_size_prompts": max(1, config.buffer // config.context // 8),
        "n_batches_in_buffer": 8,
        "n_batches_for_norm_estimate": 8,
        "training_tokens": config.tokens,
        "train_batch_size_tokens": config.batch_size,
        "lr": config.lr,
        "lr_decay_steps": round(0.3 * config.tokens / config.batch_size),
        "seed": config.seed,
        "device": "cpu",
        "exclude_special_tokens": True,
        "n_eval_batches": 0,
        "checkpoint_path": None,
        "model_from_pretrained_kwargs": {},
        "logger": LoggingConfig(log_to_wandb=False, eval_every_n_wandb_logs=10**9),
    }


def _timed(train: Any) -> Trained:
    loaded = resident_bytes("now") / 2**20
    used, start = time.process_time(), time.monotonic()
    train()
    return Trained(time.process_time() - used, time.monotonic() - start, resident_bytes("peak") / 2**20, loaded)


if __name__ == "__main__":
    sys.exit(run_config(EndToEndConfig, run, "python -m experiments.benchmarks.end_to_end"))
