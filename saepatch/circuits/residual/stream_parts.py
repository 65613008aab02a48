"""The parts that the residual stream is a sum of: embeddings, and what attention and MLP of every block write."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saepatch.circuits.residual.unembedding import tolerance_of
from saepatch.errors import UserError
from saepatch.model.hooks import first_of, watching
from saepatch.model.language_model import LanguageModel, Tokens
from saepatch.model.loading.discovery import see_writers, stream_paths
from saepatch.model.sites import Site

WRITING = ("attn_out", "mlp_out")


@dataclass(frozen=True)
class StreamPart:
    """A summand of the residual stream or of a logit.

    `kind`: "embeddings", "attn_out", "mlp_out" or "block PATH" (another module that writes into the stream);
    "b_dec", "error" or "normalisation" of the dictionary at `site`; "final norm bias", "unembedding bias". `layer` is
    that of a block's part, else None.
    """

    kind: str
    layer: int | None = None
    site: Site | None = None

    def __str__(self) -> str:
        place = self.site if self.layer is None else self.layer
        return (
            self.kind if place is None else f"{self.kind}.{place}" if self.site is None else f"{self.site} {self.kind}"
        )


@dataclass(frozen=True, eq=False)
class _Writer:
    part: StreamPart
    module: nn.Module
    factor: float  # what multiplies the module's output before it is added


@dataclass(frozen=True, eq=False)
class StreamRun:
    """One forward pass: what each part wrote, and the stream before block 0, before block 1, …, after the last."""

    wrote: Mapping[StreamPart, Float[Tensor, "batch pos d_model"]]
    streams: Sequence[Float[Tensor, "batch pos d_model"]]
    logits: Float[Tensor, "batch last vocab"]


@dataclass(frozen=True, eq=False)
class StreamParts:
    """Runs a model and records every part of its residual stream. Edits made by the caller's hooks are recorded too."""

    model: LanguageModel
    writers: tuple[_Writer, ...]

    @classmethod
    def of(cls, model: LanguageModel) -> "StreamParts":
        """The parts of a model's stream, checked on a probe: what each block's parts write is what the block adds.

        Raises:
            UserError: a block writes something that its modules' outputs do not add up to.
        """
        layout = model.layout
        listed = [
            _Writer(StreamPart(stream, layer), layout.module(Site(layer, stream)), 1.0)
            for layer, paths in enumerate(layout.paths)
            for stream in WRITING
            if stream in paths
        ]
        open_layers = cls(model, tuple(listed))._open_layers()
        if open_layers:
            discovered = _discovered(model, open_layers)
            listed = [writer for writer in listed if writer.part.layer not in open_layers] + discovered
        listed.sort(key=lambda writer: writer.part.layer or 0)
        parts = cls(model, tuple(listed))
        if unclosed := parts._open_layers():
            raise UserError(
                f"{model.name}: what the modules of block {unclosed[0]} emit does not add up to what it writes into "
                "the residual stream, so the stream has no parts to attribute to"
            )
        return parts

    @torch.no_grad()
    def run(self, tokens: Tokens, last: bool = False) -> StreamRun:
        """One forward pass over a batch without padding; `last`: with the logits of the last position alone."""
        blocks = self.model.layout.blocks
        writer_of: dict[nn.Module, _Writer] = {writer.module: writer for writer in self.writers}
        layer_of = {block: layer for layer, block in enumerate(blocks)}
        wrote: dict[StreamPart, Tensor] = {}
        streams: dict[int, Tensor] = {}

        def enter(_module: nn.Module, received: Any) -> None:
            streams[0] = received.clone()  # models may add to it in place
            wrote[StreamPart("embeddings")] = streams[0]

        def leave(module: nn.Module, _received: Any, output: Any) -> None:
            emitted = first_of(output)
            if module in writer_of:
                writer = writer_of[module]
                wrote[writer.part] = emitted.clone() if writer.factor == 1 else emitted * writer.factor
            if module in layer_of:
                streams[layer_of[module] + 1] = emitted.clone()

        if tokens.images is not None and tokens.images.features.shape[2] > 1:
            raise UserError(
                f"{self.model.name} adds features of a picture to the stream after its first blocks, which are no part "
                "of what its modules write: give prompts of text"
            )
        with watching(blocks[:1], enter, {**writer_of, **layer_of}, leave):
            logits = self.model.call(tokens, last=int(last))
        return StreamRun(wrote, [streams[number] for number in sorted(streams)], logits)

    def _open_layers(self) -> list[int]:
        """Layers whose parts do not add up to what the block writes."""
        run, layers = self.run(self.model.probe()), []
        for layer, (before, after) in enumerate(zip(run.streams[:-1], run.streams[1:], strict=True)):
            parts = [value for part, value in run.wrote.items() if part.layer == layer]
            total = torch.stack([before.double(), *(value.double() for value in parts)]).sum(0)
            size = max(float(value.abs().max()) for value in (before, after, *parts))
            if not float((total - after.double()).abs().max()) <= tolerance_of(after.dtype) * size:
                layers.append(layer)
        return layers


def _discovered(model: LanguageModel, layers: Sequence[int]) -> list[_Writer]:
    """The modules that write into the stream in blocks whose sites the layout does not list, with their factors."""
    writers: list[_Writer] = []

    def see(layer: int, calls: Sequence[Any], factor: float, within: Sequence[Any]) -> None:
        if layer not in layers or not calls:
            return
        paths = stream_paths(tuple(calls), within, 0)
        stream_of = {path: stream for stream, path in paths.items() if stream in WRITING}
        for call in calls:
            part = StreamPart(stream_of.get(call.path, f"block {call.path}"), layer)
            writers.append(_Writer(part, call.module, factor))

    with torch.no_grad():
        see_writers(model.hf, model.layout, model.inputs(model.probe()), see)
    return writers
