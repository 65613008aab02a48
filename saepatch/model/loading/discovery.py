"""Finds the blocks of a model and, for families that are not listed, the modules that emit each stream.

Streams are found in one forward pass. In most models a block adds the output of its attention to the stream, then that
of its MLP. The two modules whose outputs add up to what the block adds are therefore `attn_out` and `mlp_out`; a block
with only one of them adds its output alone. `z` and `neurons` are the inputs of the linear map at the end of each.
"""

import logging
import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, nn

from saepatch.errors import UserError
from saepatch.model.families import FAMILIES, Family, Layout
from saepatch.model.hooks import first_of, watching
from saepatch.model.inputs.padding import FAILURES

log = logging.getLogger(__name__)

MOST_PARTS = 60  # modules of a block as wide as the stream; of more, the outermost are compared
_MLP = re.compile("mlp|moe|ffn|feed|expert", re.IGNORECASE)
_ATTENTION = re.compile("attention|attn", re.IGNORECASE)
PREFERRED = {2: 0, 1: 1, 3: 2}  # possible numbers of modules that write into the stream in one block, most likely first
UNSUMMED = "the outputs of their modules do not add up to what they write"


def layout_of(hf: nn.Module, config: Any) -> Layout:
    """Find the blocks of a Hugging Face causal LM and, for a family listed in `FAMILIES`, its streams.

    In other families, the blocks are the only `ModuleList` of the decoder whose length is the number of layers.

    Raises:
        UserError: the blocks cannot be told apart from other modules.
    """
    family = FAMILIES.get(config.model_type) or Family(_find_blocks(hf, config))
    try:
        blocks = tuple(hf.get_submodule(family.blocks).children())
    except AttributeError as error:
        raise UserError(f"model type {config.model_type!r} has no blocks at {family.blocks!r}: {error}") from error
    return Layout(blocks, tuple(map(family.paths, blocks)))


def _find_blocks(hf: Any, config: Any) -> str:
    text = config.get_text_config(decoder=True)
    n_layers = getattr(text, "decoder_layers", None) or text.num_hidden_layers  # an encoder may have another depth
    decoder = hf.get_decoder() if hasattr(hf, "get_decoder") else hf  # there may be an image encoder beside it
    names = [name for name, module in hf.named_modules() if module is decoder]
    inside = tuple(f"{name}." for name in names if name) or ("",)
    every = [n for n, module in hf.named_modules() if isinstance(module, nn.ModuleList) and len(module) == n_layers]
    lists = [name for name in every if name.startswith(inside)] or every  # some call their unembedding the decoder
    outermost = [name for name in lists if not any(name.startswith(other + ".") for other in lists)]
    if len(outermost) > 1:
        outermost = [name for name in outermost if _run_on_text(hf, hf.get_submodule(name))]
    if len(outermost) != 1:
        raise UserError(
            f"the blocks of model type {config.model_type!r} cannot be found ({len(outermost)} module lists of "
            f"length {n_layers}): add a line to saepatch.model.families.FAMILIES"
        )
    log.info("model type %r is not in FAMILIES; using the blocks at %r", config.model_type, outermost[0])
    return outermost[0]


@torch.no_grad()
def _run_on_text(hf: nn.Module, blocks: nn.Module) -> bool:
    """Whether all blocks run in a pass over token ids alone; those of an image encoder do not."""
    ran: set[nn.Module] = set()
    members = list(blocks.children())
    ids = torch.arange(6).unsqueeze(0).to(next(hf.parameters()).device)
    try:
        with watching((), lambda *_: None, members, lambda block, *_: ran.add(block)):
            hf(input_ids=ids)
    except FAILURES:
        return False
    return len(ran) == len(members)


@dataclass(frozen=True, eq=False)
class _Call:
    """One call of a module inside a block: copies of its input and output, since models may add in place."""

    path: str
    module: nn.Module
    received: Tensor | None
    emitted: Tensor

    def inside(self, other: "_Call") -> bool:
        return self.path == other.path or self.path.startswith(other.path + ".")


Writers = tuple[_Call, ...]  # the calls whose outputs add up to what the block writes


SeeBlock = Callable[[int, Writers, float, list[_Call]], None]


@torch.no_grad()
def see_writers(hf: nn.Module, layout: Layout, inputs: Mapping[str, Any], see_block: SeeBlock) -> None:
    """Report, for every block in one forward pass, the modules that write into the stream and their multiplier.

    Args:
        layout: The blocks.
        inputs: Arguments of `hf` for a row without padding.
        see_block: Gets the layer, the calls of the writing modules (none where no modules add up to what the block
            writes), the factor that multiplies their outputs, and all calls inside the block.
    """
    number = {block: layer for layer, block in enumerate(layout.blocks)}
    path_of = {module: name for block in layout.blocks for name, module in block.named_modules() if name}
    calls: list[_Call] = []
    known: list[tuple[str, ...]] = []  # paths of the writers of other blocks
    entered: dict[str, Tensor] = {}

    def enter(_module: nn.Module, received: Any) -> None:
        calls.clear()
        entered.clear()
        if isinstance(received, Tensor):
            entered["stream"] = received.clone()

    def see(module: nn.Module, received: Any, output: Any) -> None:
        emitted: Any = first_of(output)
        if not isinstance(emitted, Tensor) or emitted.ndim != 3 or not emitted.is_floating_point():
            return
        if module not in number:
            wanted = isinstance(received, Tensor) and received.ndim == 3
            calls.append(_Call(path_of[module], module, received.clone() if wanted else None, emitted.clone()))
            return
        before = entered.get("stream")
        if before is None or before.shape != emitted.shape:
            return
        writers, factor = _writers(calls, before, emitted, known)
        if writers and factor == 1:
            known.append(tuple(writer.path for writer in writers))
        see_block(number[module], writers, factor, calls)

    with watching(layout.blocks, enter, {*number, *path_of}, see):
        hf(**inputs)


def discover(
    hf: nn.Module, layout: Layout, inputs: Mapping[str, Any], n_heads: int
) -> tuple[Layout, dict[str, list[int]]]:
    """Find `attn_out`, `mlp_out`, `z` and `neurons` of every block in one forward pass.

    Args:
        layout: The blocks, with the residual stream alone.
        inputs: Arguments of `hf` for a row without padding.
        n_heads: Heads of a layer; 0: unknown, and `z` is not searched for.

    Returns:
        The layout with the streams' paths, and the layers without streams, by reason.
    """
    paths, reasons = [dict(offered) for offered in layout.paths], dict[str, list[int]]()

    def name(layer: int, writers: Writers, factor: float, calls: list[_Call]) -> None:
        if writers and factor == 1:
            paths[layer] |= stream_paths(writers, calls, n_heads)
        else:
            reason = f"what they write is multiplied by {factor:.3g}" if writers else UNSUMMED
            reasons.setdefault(reason, []).append(layer)

    see_writers(hf, layout, inputs, name)
    return replace(layout, paths=tuple(paths)), reasons


def _writers(
    calls: Sequence[_Call], entered: Tensor, left: Tensor, known: Sequence[tuple[str, ...]]
) -> tuple[Writers, float]:
    """The modules whose outputs add up to what a block adds (the outermost of equal ones), and their multiplier."""
    wrote = left.float() - entered.float()
    exact = left.dtype == torch.float32
    rounding = 4 * torch.finfo(left.dtype).eps * float(left.float().norm() + entered.float().norm())
    tolerance = (1e-4 if exact else 2e-2) * float(wrote.norm()) + rounding
    parts = [call for call in calls if call.emitted.shape == left.shape]
    if len(parts) > MOST_PARTS:
        parts = [call for call in parts if "." not in call.path]
    for writing in known:
        again = tuple(call for path in writing for call in parts if call.path == path)
        if len(again) == len(writing) and float((_total(again) - wrote).norm()) <= tolerance:
            return again, 1.0
    candidates: list[Writers] = [
        two for two in combinations(parts, 2) if not two[0].inside(two[1]) and not two[1].inside(two[0])
    ]
    candidates += [(call,) for call in parts]
    candidates += combinations([call for call in parts if "." not in call.path], 3)  # an MLP of two modules, say
    gaps = [float((_total(some) - wrote).norm()) for some in candidates]
    best = min(gaps, default=tolerance + 1)
    if best <= tolerance:  # among ties: the fewest modules, then the outermost, then the first
        good = [some for some, gap in zip(candidates, gaps, strict=True) if gap <= 2 * best + rounding]
        return min(good, key=lambda some: (PREFERRED[len(some)], sum(call.path.count(".") for call in some))), 1.0
    for some in candidates:
        total = _total(some)
        factor = float((total * wrote).sum() / total.square().sum().clamp(min=1e-12))
        if len(some) == 2 and abs(factor) > 1e-2 and float((factor * total - wrote).norm()) <= tolerance:
            return some, factor
    return (), 1.0


def _total(writers: Writers) -> Tensor:
    return torch.stack([writer.emitted.float() for writer in writers]).sum(0)


def stream_paths(writers: Writers, calls: Sequence[_Call], n_heads: int) -> dict[str, str]:
    """The paths of the writers' streams. Where there are several writers, the first to run is attention.

    An MLP that is the sum of two modules has no stream, since no module emits what it writes.
    """
    paths = {}
    mlps = [call for call in writers if _MLP.search(type(call.module).__name__) or _MLP.search(call.path)]
    attn: _Call | None = writers[0]
    mlp: _Call | None = writers[1] if len(writers) == 2 else mlps[0] if len(mlps) == 1 else None
    if len(writers) == 1 and mlps:
        attn = None
    elif mlp is attn:
        mlp = None
    if attn is not None:
        paths["attn_out"] = attn.path
        last = _projection(attn, calls)
        if last is not None and n_heads and _attends(last, calls) and last.received.shape[-1] % n_heads == 0:  # type: ignore[union-attr]
            paths["z"] = last.path
    if mlp is not None:
        paths["mlp_out"] = mlp.path
        last = _projection(mlp, calls)
        if last is not None and not _attends(last, calls):
            paths["neurons"] = last.path
    return paths


def _projection(writer: _Call, calls: Sequence[_Call]) -> _Call | None:
    """The linear map whose output is what a writer emits or, if the writer is a norm, what it receives."""
    ends = [writer.emitted] + ([] if writer.received is None else [writer.received])
    for call in calls:
        weight = getattr(call.module, "weight", None)
        if not isinstance(weight, Tensor) or weight.ndim != 2 or call.received is None:
            continue
        if any(end.shape == call.emitted.shape and torch.equal(end, call.emitted) for end in ends):
            return call
    return None


def _attends(call: _Call, calls: Sequence[_Call]) -> bool:
    """Whether a linear map belongs to a module named as attention."""
    return any(_ATTENTION.search(type(other.module).__name__) for other in calls if call.inside(other))
