"""Covariances of keys over reference texts, which tell an update what not to disturb; streamed, and kept on disk."""

import hashlib
import json
import logging
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
from jaxtyping import Float
from safetensors import SafetensorError, safe_open
from torch import Tensor

from saepatch.data.texts import token_batches
from saepatch.errors import UserError
from saepatch.facts.projections import projection
from saepatch.model.language_model import LanguageModel, refuse_training
from saepatch.model.sites import Site
from saepatch.records.files import output_folder, write_tensors

log = logging.getLogger(__name__)

BLOCK = 256  # rows of a matrix that are accumulated at a time, on and above the diagonal alone
NULL = 2e-2  # eigenvalues of C below this span AlphaEdit's null space

Square = Float[Tensor, "keys keys"]


@dataclass(frozen=True, eq=False)
class Covariances:
    """C = E[k kᵀ] of the keys of some layers, in float64, with the fingerprint of the model they were measured on.

    `ridge` · mean(diagonal of C) is added to the diagonal, where too few texts leave C singular.
    """

    model_hash: str
    matrices: Mapping[int, Square]
    tokens: int
    ridge: float = 0.0
    _factors: dict[int, Square] = field(default_factory=dict, init=False, repr=False)
    _null: dict[tuple[int, float], Square] = field(default_factory=dict, init=False, repr=False)

    @classmethod
    @torch.no_grad()
    def over(
        cls,
        model: LanguageModel,
        layers: Collection[int],
        texts: Sequence[str],
        cache: Path | None = None,
        ridge: float = 0.0,
        batch_size: int = 32,
    ) -> "Covariances":
        """Measure the covariances of several layers in one pass over texts; padding and BOS are left out.

        Memory: one float64 matrix [d_mlp, d_mlp] per layer. With `cache`, a folder, matrices are kept by the model's
        fingerprint (not by its name, which stays the same when weights are edited), the texts' tokens and the layer.

        Raises:
            UserError: a layer does not exist or cannot be edited, or the texts hold no ordinary token.
        """
        refuse_training(model)
        for layer in layers:
            projection(model, layer)
        paths = {} if cache is None else _paths(cache, model, texts, layers)
        known = {layer: entry for layer, path in paths.items() if (entry := _read(path)) is not None}
        missing = [layer for layer in dict.fromkeys(layers) if layer not in known]
        if missing:
            sums, tokens = _accumulate(model, missing, texts, batch_size)
            for layer in missing:
                known[layer] = sums[layer], tokens
                if cache is not None:
                    output_folder(cache, "cache")
                    write_tensors({"covariance": sums[layer].cpu()}, paths[layer], {"tokens": json.dumps(tokens)})
        matrices = {layer: known[layer][0].to(model.device) for layer in layers}
        return cls(model.fingerprint, matrices, min(known[layer][1] for layer in layers), ridge)

    @classmethod
    def identity(cls, model: LanguageModel, layers: Collection[int]) -> "Covariances":
        """C = I for comparison. Logs a warning: an edit with C = I is neither ROME nor MEMIT."""
        log.warning("covariances are replaced by the identity: what is computed is neither ROME nor MEMIT")
        widths = {layer: projection(model, layer).matrix.shape[1] for layer in layers}
        made = {layer: torch.eye(n, dtype=torch.float64, device=model.device) for layer, n in widths.items()}
        return cls(model.fingerprint, made, 0)

    def solve(self, layer: int, keys: Float[Tensor, "keys facts"]) -> Float[Tensor, "keys facts"]:
        """C⁻¹ of keys.

        Raises:
            UserError: the layer was not measured, or C is singular.
        """
        if layer not in self._factors:
            matrix = self.matrix(layer)
            factor, failed = torch.linalg.cholesky_ex(matrix)
            spread = factor.diagonal().square()
            if bool(failed) or float(spread.min()) < 1e-13 * float(spread.max()):
                raise UserError(
                    f"the covariance of layer {layer} over {self.tokens:,} tokens is singular ({len(matrix)} "
                    "dimensions): give more reference texts, or a ridge such as 0.001 (--ridge)"
                )
            self._factors[layer] = factor
        return torch.cholesky_solve(keys, self._factors[layer])

    def matrix(self, layer: int) -> Square:
        """C of a layer, its ridge included."""
        if layer not in self.matrices:
            raise UserError(
                f"no covariance of layer {layer}, only of {', '.join(map(str, self.matrices))}: measure it, too"
            )
        matrix = self.matrices[layer]
        if not self.ridge:
            return matrix
        return matrix + self.ridge * matrix.diagonal().mean() * torch.eye(len(matrix)).to(matrix)

    def null_space(self, layer: int, below: float = NULL) -> Square:
        """Projection onto the eigenvectors of C whose eigenvalues are smaller than `below`.

        Raises:
            UserError: there are none.
        """
        if (layer, below) not in self._null:
            values, vectors = torch.linalg.eigh(self.matrix(layer))
            chosen = vectors[:, values < below]
            if not chosen.shape[1]:
                raise UserError(
                    f"layer {layer}: no eigenvalue of the covariance is below {below:g} (the smallest is "
                    f"{float(values[0]):.3g}), so AlphaEdit may change nothing: raise its threshold"
                )
            log.info("layer %d: the null space has %d of %d dimensions", layer, chosen.shape[1], len(values))
            self._null[layer, below] = chosen @ chosen.T
        return self._null[layer, below]


def _accumulate(
    model: LanguageModel, layers: Sequence[int], texts: Sequence[str], batch_size: int
) -> tuple[dict[int, Square], int]:
    """E[k kᵀ] of each layer, from one pass over the texts, and the number of tokens."""
    widths = {layer: projection(model, layer).matrix.shape[1] for layer in layers}
    sums = {layer: torch.zeros(n, n, dtype=torch.float64, device=model.device) for layer, n in widths.items()}
    sites, tokens = [Site(layer, "neurons") for layer in layers], 0
    by_length = sorted(texts, key=len)  # so that batches hold little padding
    for batch in token_batches(model, by_length, batch_size, sum(widths.values())):
        for site, keys in model.capture(batch, sites).items():
            _add_products(sums[site.layer], keys[batch.ordinary])
        tokens += int(batch.ordinary.sum())
    if not tokens:
        raise UserError("the reference texts hold no token besides BOS: give other texts")
    for total in sums.values():
        for start in range(0, len(total), BLOCK):
            rows = slice(start, start + BLOCK)
            total[start:, rows] = total[rows, start:].T.clone()
            corner = total[rows, rows]
            total[rows, rows] = corner.triu() + corner.triu(1).T
        total /= tokens
    return sums, tokens


def _add_products(total: Square, keys: Float[Tensor, "tokens keys"]) -> None:
    """Add kᵀk to a float64 sum, on and above the diagonal, a batch's products being summed in float32.

    Their error is relative to each neuron's own size, of the order of the keys' own rounding.
    """
    own = keys.to(torch.promote_types(keys.dtype, torch.float32))
    for start in range(0, len(total), BLOCK):
        total[start : start + BLOCK, start:] += own[:, start : start + BLOCK].T @ own[:, start:]


def _paths(cache: Path, model: LanguageModel, texts: Sequence[str], layers: Collection[int]) -> dict[int, Path]:
    """The file of each layer, named by the tokens: the same texts have others with another tokenizer or a BOS."""
    digest = hashlib.sha256(repr(model.bos_id).encode())
    for text in texts:
        digest.update(repr(model.encode(text)).encode())
    name = f"covariance-{model.fingerprint}-{digest.hexdigest()[:16]}"
    return {layer: cache / f"{name}-{layer}.safetensors" for layer in layers}


def _read(path: Path) -> tuple[Square, int] | None:
    """A kept covariance and its number of tokens; None where there is none, or the file is damaged."""
    try:
        with safe_open(path, "pt") as file:
            return file.get_tensor("covariance"), int(file.metadata()["tokens"])
    except (OSError, SafetensorError, KeyError, ValueError, TypeError):
        return None
