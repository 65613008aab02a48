"""Edits of weights as values: which weights change by how much; applied in a context, reverted exactly, saved."""

import json
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from saepatch.errors import UserError
from saepatch.facts.projections import Projection, projection
from saepatch.model.hooks import is_spliced
from saepatch.model.language_model import LanguageModel
from saepatch.records.files import write_tensors

FORMAT = "saepatch delta 1"


@dataclass(frozen=True, eq=False)
class WeightChange:
    """Change of one MLP output projection in column form, Δ = left · rightᵀ, in float64.

    `keys` are the keys of the edited facts, which later edits by AlphaEdit preserve.
    """

    layer: int
    left: Float[Tensor, "out rank"]
    right: Float[Tensor, "d_mlp rank"]
    keys: Float[Tensor, "d_mlp facts"]

    @classmethod
    def of(cls, layer: int, left: Tensor, right: Tensor, keys: Tensor) -> "WeightChange":
        """A change of tensors that were read from a file. Raises ValueError where they do not fit together."""
        shapes = [tuple(part.shape) for part in (left, right, keys)]
        floats = all(part.is_floating_point() for part in (left, right, keys))
        if not floats or any(len(shape) != 2 for shape in shapes):
            raise ValueError(f"layer {layer} has tensors of {shapes}")
        if left.shape[1] != right.shape[1] or len(right) != len(keys):
            raise ValueError(f"layer {layer} has tensors of {shapes}")
        return cls(layer, left, right, keys)

    @property
    def matrix(self) -> Float[Tensor, "out d_mlp"]:
        return self.left @ self.right.T

    @property
    def norm(self) -> float:
        """Frobenius norm, from the factors."""
        return float(((self.left.T @ self.left) * (self.right.T @ self.right)).sum().clamp(min=0).sqrt())

    def then(self, other: "WeightChange") -> "WeightChange":
        """Both changes of one layer together."""
        names = ("left", "right", "keys")
        return WeightChange(self.layer, *(torch.cat([getattr(self, name), getattr(other, name)], 1) for name in names))


@dataclass(frozen=True, eq=False)
class Delta:
    """Changes of a model's weights: `with edited(model, delta):` applies them.

    Attributes:
        model: Name of the model that they belong to.
        model_hash: Fingerprint of its unedited weights; no other model is edited.
        method: What made them, for people.
        examples: Names of the edited facts.
        changes: One per layer, in order of layers.
    """

    model: str
    model_hash: str
    method: str
    examples: tuple[str, ...] = ()
    changes: tuple[WeightChange, ...] = ()

    @classmethod
    def none(cls, model: LanguageModel, method: str) -> "Delta":
        """No change of a model."""
        return cls(model.name, model.fingerprint, method)

    @property
    def layers(self) -> list[int]:
        return [change.layer for change in self.changes]

    def at(self, layer: int) -> WeightChange | None:
        return next((change for change in self.changes if change.layer == layer), None)

    def then(self, changes: Sequence[WeightChange], examples: Sequence[str] = ()) -> "Delta":
        """These changes and further ones of the same model."""
        merged = {change.layer: change for change in self.changes}
        for change in changes:
            merged[change.layer] = merged[change.layer].then(change) if change.layer in merged else change
        ordered = tuple(merged[layer] for layer in sorted(merged))
        return replace(self, changes=ordered, examples=(*self.examples, *examples))

    def relative_norms(self, model: LanguageModel) -> dict[int, float]:
        """‖ΔW‖/‖W‖ by layer, of the unedited weights."""
        return {
            c.layer: c.norm / float(projection(model, c.layer).weight.detach().double().norm()) for c in self.changes
        }

    def save(self, path: str | Path) -> None:
        """Write a safetensors file with the model's hash. Raises UserError where it cannot be written."""
        tensors = {
            f"{change.layer}.{name}": getattr(change, name).detach().cpu().contiguous()
            for change in self.changes
            for name in ("left", "right", "keys")
        }
        facts = {"model": self.model, "model_hash": self.model_hash, "method": self.method, "examples": self.examples}
        try:
            write_tensors(tensors, Path(path), {"format": FORMAT, "delta": json.dumps(facts)})
        except OSError as error:
            raise UserError(f"cannot write {str(path)!r} ({error.strerror}): give another path") from error

    @classmethod
    def load(cls, path: str | Path) -> "Delta":
        """Read what `save` wrote.

        Raises:
            UserError: the file does not exist, is damaged, or is no delta.
        """
        try:
            with safe_open(path, "pt") as file:
                metadata = file.metadata() or {}
                if metadata.get("format") != FORMAT:
                    raise UserError(f"{str(path)!r} is not a delta that saepatch saved: give a file of Delta.save")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118 - no mapping
                facts: Mapping[str, Any] = json.loads(metadata["delta"])
            changes = [
                WeightChange.of(layer, *(tensors[f"{layer}.{part}"] for part in ("left", "right", "keys")))
                for layer in sorted({int(name.partition(".")[0]) for name in tensors})
            ]
            texts = [facts[name] for name in ("model", "model_hash", "method")]
            examples = facts["examples"]
            if not isinstance(examples, list) or not all(isinstance(text, str) for text in (*texts, *examples)):
                raise ValueError("a name is no text")
            name, digits, method = texts
            return cls(name, digits, method, tuple(examples), tuple(changes))
        except (OSError, SafetensorError, KeyError, ValueError, TypeError, RecursionError) as error:
            raise UserError(
                f"cannot read a delta from {str(path)!r} ({error}): check the path, or save it again"
            ) from error


@contextmanager
def edited(model: LanguageModel, delta: Delta) -> Iterator[LanguageModel]:
    """Change the model's weights inside the context; afterwards they are, bit for bit, what they were before.

    Changes are added in float64 and rounded once to the weights' dtype, so that bfloat16 weights are not edited in
    bfloat16. The edit is in the weights themselves: the model generates, is spliced and is saved as edited, on every
    thread that uses it.

    Raises:
        UserError: the delta belongs to another model, or the model is inside a splice or another edit.
    """
    if is_spliced(model.layout):
        raise UserError("the model is inside a splice: edit the weights first, then splice inside that context")
    before = model.fingerprint
    if before != delta.model_hash:
        raise UserError(
            f"the delta belongs to {delta.model} with weights {delta.model_hash}, but {model.name} has weights "
            f"{before}: load the model that was edited, leave any other edit of it first, or make the edit again"
        )
    with applied(model, delta.changes):
        inside = model.weight_versions
        yield model
        untouched = model.weight_versions == inside
    if untouched:
        model.note_restored(before)


@contextmanager
def applied(model: LanguageModel, changes: Sequence[WeightChange]) -> Iterator[None]:
    """Apply changes to whatever weights the model has; for use inside the making of an edit."""
    places = [(projection(model, change.layer), change) for change in changes]
    for at, change in places:
        _check(at, change)
    kept = [(at.weight, at.weight.detach().clone()) for at, _ in places]
    try:
        with torch.no_grad():
            for at, change in places:
                added = change.matrix.to(at.weight.device)
                at.weight.copy_((at.weight.double() + (added.T if at.transposed else added)).to(at.weight.dtype))
        yield
    finally:
        with torch.no_grad():
            for weight, original in kept:
                weight.copy_(original)


def _check(at: Projection, change: WeightChange) -> None:
    shape, own = (len(change.left), len(change.right)), tuple(at.matrix.shape)
    if shape != own:
        raise UserError(f"a change of {shape} for layer {at.layer}, whose projection is {own}: make the edit again")
    if not bool(torch.isfinite(change.left).all() and torch.isfinite(change.right).all()):
        raise UserError(
            f"the change of layer {at.layer} is not finite: make the edit again with fewer facts or a ridge"
        )
