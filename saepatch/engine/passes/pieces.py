"""Passes over long prompts in pieces: each piece runs on the keys and values of the columns before it.

Memory for T columns, `b` bytes a number: keys and values `2 · b · layers · T · kv_heads · head_width`, what is kept of
sites `b · T · width` each, and the activations and the mask (`5 · piece · T` bytes) of one piece. With gradients, the
keys and values are held twice (they, and their gradients), and one piece's graph. Only the last column is unembedded.
Edits further downstream see one piece at a time, too.
"""

from collections.abc import Callable, Collection, Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor
from transformers.cache_utils import Cache, DynamicLayer

from saepatch.model.hooks import Edit, edit_sites, graph_through
from saepatch.model.language_model import LanguageModel, Tokens
from saepatch.model.replaced import skip_blocks
from saepatch.model.sites import Site

# Edits of sites downstream of the one that a pass resumes from: functions of the site's value in some columns, and of
# the number of columns between the first edited one and these.
Later = Mapping[Site, Callable[[Tensor, int], Tensor]]
PIECE = 4096  # columns: shorter prompts run whole
MASK = 2**25  # entries of a piece's mask


def piece_of(width: int) -> int:
    """Columns of a piece: so many that the mask of a piece and all columns before it stays small."""
    return max(256, min(PIECE, MASK // width))


def runs_in_pieces(model: LanguageModel, width: int) -> bool:
    """Whether prompts of a width run in pieces: they are long, and the model continues from a cache."""
    return width > PIECE and model.takes_cache and model.step_limit is None


def next_logits_in_pieces(
    model: LanguageModel, tokens: Tokens, piece: int | None = None, cache: Any = None
) -> Float[Tensor, "batch vocab"]:
    """Logits after prompts that end in the last column; models that do not continue from a cache run whole."""
    piece = piece or piece_of(tokens.width)
    if tokens.width <= piece or not model.takes_cache or model.step_limit is not None:
        return model.call(tokens, last=True, cache=cache)[:, -1]
    cache = model.new_cache() if cache is None else cache
    for start in range(0, tokens.width, piece):
        logits = model.call(tokens.columns(start + piece), start, last=True, cache=cache)
    return logits[:, -1]


class _Growing(DynamicLayer):
    """Keys and values of the columns before a piece, to which each piece adds its own."""

    def __init__(self, before: Any) -> None:
        super().__init__()
        assert before.keys is not None, "the kept run filled its cache"
        assert before.values is not None
        self.lazy_initialization(before.keys, before.values)
        self.keys, self.values, self._update = before.keys, before.values, before.update

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.keys, self.values = self._update(key_states, value_states)
        self._update = super().update
        return self.keys, self.values


class _Leaves(DynamicLayer):
    """Keys and values of the columns before a piece as leaves of its graph; `new` are those of the piece."""

    def __init__(self, keys: Tensor, values: Tensor, end: int) -> None:
        super().__init__()
        self.lazy_initialization(keys, values)
        self.keys, self.values = (x[:, :, :end].detach().requires_grad_() for x in (keys, values))
        self.new: tuple[Tensor, ...] = ()

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        self.new = key_states, value_states
        assert self.keys is not None
        assert self.values is not None
        return torch.cat([self.keys, key_states], -2), torch.cat([self.values, value_states], -2)


class Pieces:
    """Passes in pieces that start at a block: columns before the first one, and keys of earlier blocks, are kept ones.

    Args:
        tokens: The rows of the pass.
        before: The kept keys and values of these rows before a column.
        skip: Number of blocks that do not run.
    """

    def __init__(
        self, model: LanguageModel, tokens: Tokens, before: Callable[[int], Cache], skip: int, piece: int | None = None
    ) -> None:
        self.model, self.tokens, self.before, self.skip = model, tokens, before, skip
        self.piece = piece or piece_of(tokens.width)

    def _edits(self, values: Mapping[Site, Tensor], start: int, end: int) -> dict[Site, Edit]:
        return {site: lambda x, value=value[:, start:end]: value.to(x) for site, value in values.items()}  # type: ignore[misc]

    def logits(
        self,
        values: Mapping[Site, Float[Tensor, "batch columns _"]],
        first: int = 0,
        later: Later | None = None,
        unedited: int = 0,
    ) -> tuple[Float[Tensor, "batch vocab"], list[DynamicLayer]]:
        """Logits after the last column, with sites set from column `first` on; and all columns' keys and values.

        `later` edits sites in the columns after the first `unedited` ones.
        """
        growing: list[Any] = [_Growing(layer) for layer in self.before(first).layers[self.skip :]]
        for start in range(first, self.tokens.width, self.piece):
            end = min(start + self.piece, self.tokens.width)
            cache = self.before(start)
            cache.layers[self.skip :] = growing
            edits = self._edits(values, start - first, end - first)
            edits |= downstream(later or {}, unedited, (start - first, end - first), self.model.device)
            with skip_blocks(self.model.layout, self.skip), edit_sites(self.model.layout, edits):
                logits = self.model.call(self.tokens.columns(end), start, last=True, cache=cache)
        return logits[:, -1], growing

    def gradients(
        self,
        values: Mapping[Site, Float[Tensor, "batch pos _"]],
        sites: Collection[Site],
        metric: Callable[[Tensor], Float[Tensor, "batch"]],
        kept: Collection[DynamicLayer],
    ) -> tuple[Float[Tensor, "batch"], dict[Site, Tensor], dict[Site, Tensor]]:
        """The metric, the sites' values and gradients there, of a pass whose keys and values of all columns are `kept`.

        Pieces run from the last to the first. Each gets the gradients of its keys and values from the pieces after it,
        and hands on those of the columns before it. `values` are what the pass starts from.
        """
        held = [(layer.keys, layer.values) for layer in kept]
        owed = [tuple(torch.zeros_like(x) for x in pair if x is not None) for pair in held]
        by_site: dict[Site, list[tuple[Tensor, Tensor]]] = {site: [] for site in sites}
        result: Tensor | None = None
        for start in reversed(range(0, self.tokens.width, self.piece)):
            end = min(start + self.piece, self.tokens.width)
            leaves: list[Any] = [_Leaves(keys, values, start) for keys, values in held]
            cache = self.before(start)
            cache.layers[self.skip :] = leaves
            layout, edits = self.model.layout, self._edits(values, start, end)
            with torch.enable_grad(), skip_blocks(layout, self.skip), edit_sites(layout, edits):
                with graph_through(layout, sites) as emitted:
                    logits = self.model.call(self.tokens.columns(end), start, last=True, cache=cache)[:, -1]
                ends = [(new, due[:, :, start:end]) for leaf, pair in zip(leaves, owed, strict=True)
                        for new, due in zip(leaf.new, pair, strict=True)]  # fmt: skip
                if result is None:
                    result = metric(logits)
                    ends.append((result, torch.ones_like(result)))
            ends = [(out, due) for out, due in ends if out.requires_grad]
            wanted = [*emitted.values(), *(x for leaf in leaves for x in (leaf.keys, leaf.values))]
            taken = torch.autograd.grad(
                [out for out, _ in ends], wanted, [due for _, due in ends], allow_unused=True, materialize_grads=True
            )
            for (site, x), gradient in zip(emitted.items(), taken, strict=False):
                by_site[site].append((x.detach().to(self.model.device), gradient.to(self.model.device)))
            for due, gradient in zip((x for pair in owed for x in pair), taken[len(emitted) :], strict=True):
                due[:, :, :start] += gradient
        assert result is not None
        whole = {
            site: [torch.cat(parts[::-1], 1) for parts in zip(*some, strict=True)] for site, some in by_site.items()
        }
        return (
            result.detach(),
            {site: values for site, (values, _) in whole.items()},
            {site: gradients for site, (_, gradients) in whole.items()},
        )


def downstream(later: Later, unedited: int, columns: tuple[int, int], device: torch.device) -> dict[Site, Edit]:
    """The edits in a pass over some of the columns (the first `unedited` stay as they are), on a device."""
    skipped, before, width = max(0, unedited - columns[0]), max(0, columns[0] - unedited), columns[1] - columns[0]

    def edit_of(edit: Callable[[Tensor, int], Tensor]) -> Edit:
        def run(x: Tensor) -> Tensor:
            if x.shape[1] != width:
                raise ValueError(f"an edit of {width} columns, but the block runs at {x.shape[1]}")
            if width <= skipped:
                return x
            new = edit(x[:, skipped:].to(device), before).to(x)
            return torch.cat([x[:, :skipped], new], 1) if skipped else new

        return run

    return {site: edit_of(edit) for site, edit in later.items()}


def real_start(tokens: Tokens, columns: int) -> Tokens:
    """The first tokens of the shortest prompt of a batch, without padding."""
    row = int(tokens.lengths.argmin())
    alone = tokens.alone(row)
    return alone.columns(min(columns, alone.width))
