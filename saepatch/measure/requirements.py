"""What a sweep needs of each device, from a model's config alone: the model is built on torch's meta device.

Weights, caches, kept values and dictionaries are counted exactly; a pass's activations by a formula (`_activations`,
`docs/machines.md`), which holds for blocks of attention and a gated MLP within a factor of 2.
"""

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn

from saepatch import organism
from saepatch.engine.passes.pieces import PIECE, piece_of
from saepatch.errors import UserError, reason_of
from saepatch.model.loading.discovery import layout_of
from saepatch.model.sites import Site
from saepatch.records.memory import GB
from saepatch.records.tables import text_table
from saepatch.settings.inspect import BYTES, PlanConfig


@dataclass(frozen=True)
class DeviceNeeds:
    """Bytes that a sweep needs of one device, and the blocks that lie there (the first, and the one after the last)."""

    blocks: tuple[int, int]
    weights: int = 0
    caches: int = 0
    kept: int = 0
    dictionaries: int = 0
    latents: int = 0
    activations: int = 0

    @property
    def total(self) -> int:
        return self.weights + self.caches + self.kept + self.dictionaries + self.latents + self.activations


@dataclass(frozen=True)
class Requirements:
    """What a sweep needs, by device.

    Attributes:
        config: What was asked.
        parameters: Parameters of the model.
        shapes: Shapes of what is held, by name.
        devices: The needs of each device.
        operations: Floating-point operations of one pass over the rows (a multiplication and an addition are two).
    """

    config: PlanConfig
    parameters: int
    shapes: dict[str, tuple[int, ...]]
    devices: tuple[DeviceNeeds, ...]
    operations: float

    @property
    def seconds(self) -> float | None:
        """Time of one pass at the given speed; devices work one after another. None: no speed was given."""
        speed = self.config.device_tflops * 1e12
        return self.operations * (3 if self.config.work == "attribute" else 1) / speed if speed else None

    @property
    def too_small(self) -> list[int]:
        """Devices whose memory does not suffice."""
        return [number for number, needs in enumerate(self.devices) if needs.total > self.config.device_gb * GB]

    def facts(self) -> dict[str, Any]:
        """The figures, for `--json`."""
        return {
            "parameters": self.parameters,
            "shapes": self.shapes,
            "devices": [asdict(needs) | {"total": needs.total} for needs in self.devices],
            "operations": self.operations,
            "seconds": self.seconds,
            "too_small": self.too_small,
        }

    def text(self) -> str:
        """A table of devices, the shapes, and whether it fits."""
        names = ("weights", "caches", "kept", "dictionaries", "latents", "activations", "total")
        rows = [
            [f"{number}: blocks {needs.blocks[0]} to {needs.blocks[1] - 1}"]
            + [gigabytes(getattr(needs, name)) for name in names]
            for number, needs in enumerate(self.devices)
        ]
        config = self.config
        lines = [
            f"{config.model}: {self.parameters / 1e9:,.4g} billion parameters, {config.dtype}; {config.work}, "
            f"{config.rows} × {config.tokens} tokens at a time",
            text_table(["device (GB)", *names], rows),
            text_table(["shape", ""], [[name, " × ".join(map(str, shape))] for name, shape in self.shapes.items()]),
        ]
        if self.seconds is not None:
            lines.append(f"one pass: {self.operations:.2e} operations forward, about {self.seconds:.3g} s")
        lines.append(self._verdict())
        return "\n\n".join(lines)

    def _verdict(self) -> str:
        limit = self.config.device_gb
        if not self.too_small:
            return f"It fits into {len(self.devices)} × {limit:g} GB."
        worst = max(self.devices, key=lambda needs: needs.total)
        what = max(asdict(worst) | {"blocks": 0}, key=lambda name: (asdict(worst) | {"blocks": 0})[name])
        which = ", ".join(map(str, self.too_small))
        return (
            f"It does not fit: device {which} needs up to {worst.total / GB:,.1f} GB of {limit:g}, most of it {what}. "
            "Spread the model over more devices (--devices), or run fewer rows or tokens at a time."
        )


def gigabytes(size: int) -> str:
    """Bytes as GB, with two digits or more."""
    return f"{size / GB:,.2f}" if size >= GB or not size else f"{size / GB:.2g}"


def requirements(config: PlanConfig) -> Requirements:
    """What a sweep needs of each device; nothing is loaded but the config.

    Raises:
        UserError: there is no such config, its model is not a causal language model that transformers builds, a site
            is not one of its blocks, or there are more devices than blocks.
    """
    hf = _empty_model(config.model)
    text = hf.config.get_text_config()
    blocks = list(layout_of(hf, hf.config).blocks)
    if config.devices > len(blocks):
        raise UserError(f"devices = {config.devices}, but the model has {len(blocks)} blocks: use fewer")
    sites = [Site.parse(name.strip()) for name in config.site.split(",") if name.strip()]
    for site in sites:
        if not 0 <= site.layer < len(blocks):
            raise UserError(f"{site} is no site of a model with {len(blocks)} blocks: use 0 to {len(blocks) - 1}")
    size, tokens = BYTES[config.dtype], config.rows * config.tokens
    width, heads = _size(text, "hidden_size"), _size(text, "num_attention_heads")
    head = _size(text, "head_dim", width // heads)
    kv = _size(text, "num_key_value_heads", heads)
    long = config.tokens > PIECE
    piece = piece_of(config.tokens) if long else config.tokens
    twice = 2 if long and config.work == "attribute" else 1  # keys and values, and their gradients
    first = min((site.layer for site in sites), default=0)
    needs = []
    for number, (start, end) in enumerate(_spread([_count(block) for block in blocks], config.devices)):
        weights = sum(_count(block) for block in blocks[start:end])
        if number == 0:
            weights += _count(hf.get_input_embeddings())
        if number == config.devices - 1:
            weights += _rest(hf, blocks, alone=config.devices > 1)
        runs = max(0, end - max(start, first)) if config.work == "attribute" else 1
        here = number == 0  # where dictionaries and kept values lie
        needs.append(
            DeviceNeeds(
                blocks=(start, end),
                weights=weights * size,
                caches=twice * 2 * (end - start) * tokens * kv * head * size,
                kept=2 * len(sites) * tokens * width * size if here else 0,
                dictionaries=len(sites) * (2 * width * config.d_sae + config.d_sae + width) * 4 if here else 0,
                latents=3 * bool(sites) * tokens * config.d_sae * 4 if here else 0,
                activations=_activations(text, config.rows * piece, size) * max(1, runs)
                + (5 * piece * config.tokens if long else 0),
            )
        )
    parameters = sum(p.numel() for p in hf.parameters())
    shapes: dict[str, tuple[int, ...]] = {"residual stream": (config.rows, config.tokens, width)}
    shapes["keys, values of a block"] = (2, config.rows, kv, config.tokens, head)
    if sites:
        shapes |= {"latents": (config.rows, config.tokens, config.d_sae), "decoder": (config.d_sae, width)}
    in_blocks = sum(map(_count, blocks))
    operations = 2.0 * tokens * in_blocks + 2.0 * len(blocks) * tokens * config.tokens * heads * head
    return Requirements(config, parameters, shapes, tuple(needs), operations)


def _activations(text: Any, tokens: int, size: int) -> int:
    """Bytes of one block's activations: what a backward pass keeps of it, or what is alive within it."""
    width, heads = _size(text, "hidden_size"), _size(text, "num_attention_heads")
    head, inner = _size(text, "head_dim", width // heads), _size(text, "intermediate_size", 4 * width)
    return tokens * (8 * width + 4 * heads * head + 3 * inner) * size


def _size(text: Any, name: str, otherwise: int = 0) -> int:
    """A size that the config states, the largest where it states one for each layer.

    Raises:
        UserError: it states none, or no positive number, and there is no other.
    """
    value = getattr(text, name, None) or otherwise
    if isinstance(value, list | tuple) and value and all(isinstance(each, int) for each in value):
        value = max(value)
    if not isinstance(value, int) or value < 1:
        raise UserError(
            f"{type(text).__name__} has {name} = {getattr(text, name, None)!r}: plans are made for models of attention "
            "whose config states its sizes, so correct it, or measure a run"
        )
    return value


def _empty_model(name: str) -> Any:
    from transformers import AutoConfig, AutoModelForCausalLM

    folder = organism.path(name) if organism.is_checkpoint(name) else Path(name)
    path = folder / "config.json" if folder.is_dir() else folder
    if not folder.exists():
        raise UserError(f"there is no file or folder {name!r}: give a model's config.json, or its folder")
    if not path.is_file():
        raise UserError(f"{name!r} is no config.json and holds none: give the file, or a model's folder")
    try:
        config = AutoConfig.from_pretrained(path, local_files_only=True)
        with torch.device("meta"):
            return AutoModelForCausalLM.from_config(config)
    except Exception as error:  # of configs that transformers cannot read or build, in many ways
        raise UserError(
            f"{name!r} gives no causal language model ({reason_of(error)}): check its model_type and its sizes"
        ) from error


def _spread(sizes: list[int], devices: int) -> list[tuple[int, int]]:
    """Consecutive blocks for each device, so that each gets as nearly the same number of parameters as it can."""
    bounds, done, total = [0], 0, sum(sizes)
    for number, size in enumerate(sizes):
        left = devices - len(bounds)  # devices after the current one
        due = done + size / 2 >= total * len(bounds) / devices or len(sizes) - number <= left
        if left and due and number > bounds[-1]:
            bounds.append(number)
        done += size
    return list(zip(bounds, [*bounds[1:], len(sizes)], strict=True))


def _count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _rest(hf: Any, blocks: list[nn.Module], alone: bool) -> int:
    """Parameters outside the blocks and the embeddings; a tied head counts again where it lies on another device."""
    inside = {id(p) for block in blocks for p in block.parameters()} | {id(hf.get_input_embeddings().weight)}
    rest = sum(p.numel() for p in hf.parameters() if id(p) not in inside)
    head = hf.get_output_embeddings()
    tied = head is not None and head.weight is hf.get_input_embeddings().weight
    return rest + (head.weight.numel() if tied and alone else 0)
