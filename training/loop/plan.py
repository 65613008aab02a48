"""Estimates of a run: shapes, memory, disk, time. No weights are loaded; the model is built on the meta device."""

import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from textwrap import indent

import torch

from saepatch.errors import UserError
from saepatch.model.language_model import LanguageModel
from saepatch.model.loading.load import usable_device
from saepatch.model.sites import Site
from saepatch.records.tables import text_table

from ..config import TrainingConfig
from .evaluate import ELEMENTS
from .skeleton import check_run
from .timing import TimeRange, earlier_runs, estimate
from .trainer import FIRST_TOKENS

_EVALUATED_RUNS = 3  # runs of an evaluation whose logits or latents are in memory at the same time
_SAMPLED = 200  # documents tokenised to estimate the number of tokens
_MATRICES = {"standard": 5, "jumprelu": 5, "gated": 8}  # dense products per step; the others have one


@dataclass(frozen=True)
class Shape:
    """The dictionary of one site."""

    site: Site
    d_in: int
    d_sae: int
    architecture: str

    @property
    def parameters(self) -> int:
        vectors = {"standard": 1, "topk": 1, "jumprelu": 2, "batchtopk": 1, "matryoshka": 1, "gated": 3}
        return 2 * self.d_in * self.d_sae + vectors[self.architecture] * self.d_sae + self.d_in


@dataclass(frozen=True, eq=False)
class Compute:
    """Computation of a whole run.

    Attributes:
        model: FLOPs of the model's forward passes (and, in fine-tuning, backward passes).
        dictionaries: FLOPs of the dictionaries' steps.
    """

    model: float
    dictionaries: float


@dataclass(frozen=True, eq=False)
class Plan:
    """Estimates of a run.

    Attributes:
        config: The run.
        n_parameters: Parameters of the model.
        n_layers: Layers of the model.
        n_blocks: Blocks that a forward pass runs.
        shapes: The dictionaries.
        memory: Bytes of memory by purpose.
        available: Bytes of memory on the device; None if unknown.
        disk: Bytes on disk by purpose.
        epochs: Number of times the text is read; None if unknown.
        work: FLOPs.
        time: Seconds; None if the device is not available.
        earlier: A line for each similar earlier run.
        tokenizer_missing: Why the tokenizer could not be loaded; empty where it was.
    """

    config: TrainingConfig
    n_parameters: int
    n_layers: int
    n_blocks: int
    shapes: list[Shape]
    memory: dict[str, int]
    available: int | None
    disk: dict[str, int]
    epochs: float | None
    work: Compute
    time: TimeRange | None
    earlier: list[str]
    tokenizer_missing: str

    @property
    def total(self) -> int:
        return sum(self.memory.values())

    def lines(self) -> list[str]:
        """The plan as text."""
        config = self.config
        lines = [
            f"model {config.model}: {self.n_parameters:,} parameters in {config.dtype}; "
            f"a forward pass runs {self.n_blocks} of {self.n_layers} blocks",
            text_table(
                ["site", "d_in", "d_sae", "parameters"],
                [[s.site, f"{s.d_in:,}", f"{s.d_sae:,}", f"{s.parameters:,}"] for s in self.shapes],
            ),
        ]
        lines += [f"memory on {config.device}", _sizes({**self.memory, "total": self.total})]
        lines += ["disk", _sizes(self.disk)]
        steps = f"{config.steps:,} steps of {config.batch_size:,} tokens, {config.steps * config.batch_size:,} in total"
        lines.append(steps + (f"; the text is read {self.epochs:.2g} times" if self.epochs is not None else ""))
        lines.append(f"work: {self.work.model:.2g} FLOP in the model, {self.work.dictionaries:.2g} in the dictionaries")
        lines.append(
            f"time: not estimated, {config.device} is not available" if self.time is None else self.time.line()
        )
        return [*lines, *self.earlier, *self.warnings()]

    def warnings(self) -> list[str]:
        """Warnings about what could not be checked, and about memory that the device does not have."""
        unchecked = [] if self.config.data else ["warning: there is no data to train on: give --data"]
        if self.tokenizer_missing:
            unchecked += [
                f"warning: no tokenizer for {self.config.model} ({self.tokenizer_missing}): BOS, vocabularies and the "
                "length of the text are not checked"
            ]
        if self.available is None or self.total <= self.available:
            return unchecked
        return [
            *unchecked,
            f"warning: {_gb(self.total)} GB is more than the {_gb(self.available)} GB of {self.config.device}: lower "
            "buffer, sae.d_sae or the number of sites, or use another device",
        ]


def plan(config: TrainingConfig, others: Sequence[TrainingConfig] = ()) -> Plan:
    """Estimate the shapes, memory, disk space and time of a run.

    Args:
        config: The run.
        others: Further runs of the same sweep, which are checked as well.

    Raises:
        UserError: the model's config cannot be read, or the run would be refused.
    """
    model, tokenizer_missing = check_run(config, others)
    sites = config.sites_of(model.n_layers)
    shapes = [_shape(model, site, config) for site in sites]
    blocks = max(site.blocks_before if site.stream == "resid_pre" else site.layer + 1 for site in sites)
    work = _work(model, shapes, blocks, config)
    try:
        device = usable_device(config.device)
    except UserError:
        device = None
    widths = {shape.site: (shape.d_in, shape.d_sae) for shape in shapes}
    return Plan(
        config,
        sum(weight.numel() for weight in model.hf.parameters()),
        model.n_layers,
        blocks,
        shapes,
        memory(model, shapes, config),
        _available(device),
        disk(shapes, config),
        _epochs(config, model),
        work,
        None if device is None or device.type == "meta" else estimate(config, model, widths, work.model, device),
        list(earlier_runs(config, widths)),
        tokenizer_missing,
    )


def _shape(model: LanguageModel, site: Site, config: TrainingConfig) -> Shape:
    d_in = model.width(site)
    return Shape(site, d_in, config.sae.width(d_in), config.sae.architecture)


def memory(model: LanguageModel, shapes: list[Shape], config: TrainingConfig) -> dict[str, int]:
    """Bytes of memory on the device by purpose, summed over all phases of a run, although they do not all overlap."""
    text = model.config.get_text_config()
    width = model.dtype.itemsize
    weights = sum(s.parameters for s in shapes)
    largest = max(shapes, key=lambda s: s.parameters)
    d_in = sum(s.d_in for s in shapes)
    low = config.sae.precision == "bfloat16" and config.sae.architecture not in _MATRICES
    inner = 4 * model.d_model + 3 * int(getattr(text, "intermediate_size", 0) or 4 * model.d_model)
    first = max(1, min(config.steps, FIRST_TOKENS // config.batch_size)) * config.batch_size
    widest = max(int(text.vocab_size), largest.d_sae)
    rows = max(1, min(64, ELEMENTS // (widest * config.context), -(-config.eval_tokens // config.context)))
    return {
        "model" if not config.also else f"{1 + len(config.also)} models of this size": (1 + len(config.also))
        * sum(t.numel() * t.itemsize for t in (*model.hf.parameters(), *model.hf.buffers())),
        "its forward pass (roughly)": config.forward_tokens * (d_in + inner) * width,
        "dictionaries": 4 * weights,
        "their gradients (a site at a time)": 4 * largest.parameters,
        "Adam": 8 * weights,
        **({"their running mean": 4 * weights} if config.ema else {}),
        "pre-activations (a site at a time)": config.batch_size * largest.d_sae * (2 if low else 4),
        "buffer of activations" + (", twice" if config.prefetch else ""): (
            config.buffer_tokens(d_in * width) * d_in * width * (2 if config.prefetch else 1)
        ),
        "first batches": 4 * first * d_in,
        "copies of the dictionaries in an evaluation": 4 * weights,
        "logits of an evaluation": _EVALUATED_RUNS * rows * config.context * widest * width,
    }


def disk(shapes: list[Shape], config: TrainingConfig) -> dict[str, int]:
    """Bytes in `out` and in the cache, by purpose."""
    weights = sum(s.parameters for s in shapes)
    # Weights, Adam's two moments, the moving average; tokens since each latent was active.
    checkpoint = (16 if config.ema else 12) * weights + 8 * sum(s.d_sae for s in shapes)
    sizes = {
        "dictionaries": 4 * weights,
        f"checkpoints ({config.keep_checkpoints}, and one being written)": checkpoint * (config.keep_checkpoints + 1),
    }
    return sizes | ({"cache of activations, at most": int(config.cache_gb * 1e9)} if config.cache else {})


def _work(model: LanguageModel, shapes: list[Shape], blocks: int, config: TrainingConfig) -> Compute:
    """FLOPs of a run: two per matrix weight and token, plus attention's products over whole rows."""
    each = [
        sum(weight.numel() for weight in block.parameters() if weight.ndim > 1)
        for block in model.layout.blocks[:blocks]
    ]
    heads = [width for site, width in model.layout.widths.items() if site.stream == "z"]
    attended = 4 * config.context * max(heads, default=model.d_model)
    token = sum(2 * weights + attended for weights in each)
    tokens = config.steps * config.batch_size
    # Fine-tuning: for every site, two forward passes of the whole model and a backward pass through activations only.
    whole = 2 * sum(weight.numel() for weight in model.hf.parameters() if weight.ndim > 1)
    tuned = 3 * whole * config.finetune_tokens * len(shapes)
    steps = 0
    for s in shapes:
        dense = _MATRICES.get(s.architecture, 1)
        sparse = 0 if s.architecture in _MATRICES else 8 * config.sae.k * s.d_in  # decode; three gradients
        if s.architecture == "matryoshka":
            sparse *= len(config.sae.levels)
        steps += 2 * dense * s.d_in * s.d_sae + sparse
    return Compute(float(token * tokens + tuned), float(steps * tokens))


def _available(device: torch.device | None) -> int | None:
    """Bytes of memory of the device; for the CPU, those that this process may use."""
    if device is None:
        return None
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    if device.type == "mps":
        return int(torch.mps.recommended_max_memory())
    try:
        memory = os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    except (AttributeError, ValueError, OSError):  # not available on this system
        return None
    limit = Path("/sys/fs/cgroup/memory.max")  # of a container
    text = limit.read_text().strip() if limit.is_file() else ""
    return min(memory, int(text)) if text.isdigit() else memory


def _epochs(config: TrainingConfig, model: LanguageModel) -> float | None:
    """Number of times a run would read its text; known for local files if the tokenizer can be loaded."""
    local = config.data and not config.streaming and Path(config.data).expanduser().exists()
    if not local or model.tokenizer is None:
        return None
    from ..data.rows import tokenised
    from ..data.texts import texts

    documents = texts(config.data, config.text_column)
    assert not hasattr(documents, "read")
    stride = max(1, len(documents) // _SAMPLED)
    sampled = [documents[i] for i in range(0, len(documents), stride)][:_SAMPLED]
    special = set(model.tokenizer.all_special_ids)
    counts = [sum(token not in special for token in ids) for _, ids in tokenised(model, enumerate(sampled))]
    tokens = sum(counts) / len(counts) * len(documents) * (1 - config.held_out)
    return config.steps * config.batch_size / tokens if tokens else None


def _sizes(sizes: dict[str, int]) -> str:
    return indent(text_table([], [[name, f"{_gb(size)} GB"] for name, size in sizes.items()]), "  ")


def _gb(size: int) -> str:
    return f"{size / 1e9:,.3f}" if size < 1e10 else f"{size / 1e9:,.1f}"
