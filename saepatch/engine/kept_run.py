"""Run a model once, then go on from one of its sites as often as needed, with the site edited.

An edited pass skips the blocks before the site and every position before the first edited one, whose keys and values
are those of the kept run. It runs through the model's own blocks, so masks, positions, grouped queries, sliding windows
and soft-caps are the model's. Before a way of resuming is used it is compared with a whole forward pass; one that does
not agree is dropped, with the reason logged.
"""

import logging
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import Cache, DynamicLayer

from saepatch.engine.shortcuts import at_edited, at_last, find_maps, forget_maps, kept_outputs, quick_activations
from saepatch.errors import UserError
from saepatch.model.hooks import Edit, edit_sites, forwards_replaced, is_spliced, only_logits_of, skip_blocks
from saepatch.model.language_model import LanguageModel, Tokens, refuse_training
from saepatch.model.sites import Site

log = logging.getLogger(__name__)

Ways = tuple[str, ...]
WAYS: Ways = ("shortcuts", "cache", "whole")  # from the quickest to the one that is always right
Checked = dict[tuple[Site, ...], tuple[str, bool, int]]
# Sites downstream of the one that a pass resumes from, each with the function that makes its new value, from column
# `first` on, of what it holds there.
Later = Mapping[Site, Edit]


class KeptRun:
    """One forward pass over a batch whose prompts end in the same column, kept so that edited passes resume from it.

    `logits` are those after each prompt's last token, `values[site]` what the sites held.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: LanguageModel,
        tokens: Tokens,
        sites: Collection[Site],
        edits: Mapping[Site, Edit] | None = None,
        keep_cache: bool = True,
    ) -> None:
        refuse_training(model)
        if is_spliced(model.layout):
            raise UserError("a sweep runs the model itself, and it is inside a splice: leave the splice first")
        if not bool(tokens.attention_mask[:, -1].all()):
            raise ValueError("resuming needs prompts that end in the last column: pad on the left")
        self.model, self.tokens = model, tokens
        self.values: dict[Site, Tensor] = {}
        # By the sites that are edited: the way that agrees with whole passes, whether it does where few logits are
        # unembedded, and up to which number of tokens. Runs of one sweep share it; it is not kept for longer: models
        # change in place.
        self.checked: Checked = {}
        self.written: Tensor | None = None  # what an ablation wrote into the units of what is patched
        wanted = {*sites, *(entry(site) for site in sites)}
        changed = dict(edits or {})

        def keep(site: Site) -> Edit:
            def see(x: Tensor) -> Tensor:
                new = changed[site](x) if site in changed else x
                if site in wanted:
                    self.values[site] = new.to(model.device)  # a model may be spread over several
                return new

            return see

        hooks = {site: keep(site) for site in {*wanted, *changed}}
        with edit_sites(model.layout, hooks):
            self._cache, self.logits = self._first_pass(keep_cache)
        self._kept: dict[Site, dict[nn.Module, Tensor]] = {}  # what maps of the first block gave, by site

    def _first_pass(self, keep_cache: bool) -> tuple[Any, Float[Tensor, "batch vocab"]]:
        model, tokens = self.model, self.tokens
        if keep_cache and model.takes_cache:
            cache = DynamicCache()  # keys and values of every column; a model of recurrent states cannot use it
            try:
                return cache, model.call(tokens, last=True, cache=cache)[:, -1].to(model.device)
            except (IndexError, AttributeError, TypeError, ValueError, NotImplementedError) as error:
                log.info("%s runs without a cache of keys and values (%s): all passes are whole", model.name, error)
        return None, model.call(tokens, last=True)[:, -1].to(model.device)

    def split(self, n: int) -> tuple["KeptRun", "KeptRun"]:
        """The first `n` rows and the others, as runs of their own; they share this one's memory."""
        return self._part(slice(0, n)), self._part(slice(n, None))

    def _part(self, rows: slice) -> "KeptRun":
        part: KeptRun = object.__new__(KeptRun)
        part.model, part.tokens, part.logits = self.model, self.tokens.rows(rows), self.logits[rows]
        part.values = {site: value[rows] for site, value in self.values.items()}
        part.checked, part.written, part._kept, part._cache = {}, None, {}, None
        if self._cache is not None and all(getattr(kept, "keys", None) is not None for kept in self._cache.layers):
            part._cache = Cache(layers=[_Before(kept, rows) for kept in self._cache.layers])
        return part

    @property
    def width(self) -> int:
        """Columns of the batch."""
        return self.tokens.width

    def resume(
        self,
        site: Site,
        rows: Int[Tensor, "edits"],
        first: int,
        change: Float[Tensor, "edits columns width"],
        only: Int[Tensor, "some"] | None = None,
        later: Later | None = None,
    ) -> Float[Tensor, "edits logits"]:
        """Next-token logits of some rows with `change` added to the site from column `first` on.

        `only` names the vocabulary ids whose logits are needed; None: all of them. `later` edits sites downstream.
        """
        later = later or {}
        way, few = self._way((site, *later))
        if few or only is None:
            return self._go(way, site, rows, first, change, only, later)
        return self._go(way, site, rows, first, change, None, later)[:, only]

    @torch.no_grad()
    def _go(
        self,
        way: str,
        site: Site,
        rows: Int[Tensor, "edits"],
        first: int,
        change: Float[Tensor, "edits columns width"],
        only: Int[Tensor, "some"] | None,
        later: Later,
    ) -> Float[Tensor, "edits logits"]:
        model, unedited = self.model, 0
        if way == "whole" and first:
            change = nn.functional.pad(change, (0, 0, first, 0))
            first, unedited = 0, first
        old = self.values[site][rows, first:]
        edited = {site: (old + change).to(old.dtype)}
        if entry(site) != site:
            edited[entry(site)] = self.values[entry(site)][rows, first:]
        cache = Cache(layers=[_Before(kept, rows, first) for kept in self._cache.layers]) if first else None
        with ExitStack() as stack:
            if way != "whole":
                stack.enter_context(skip_blocks(model.layout, site.enters))
            if way == "shortcuts":
                stack.enter_context(self._shortcuts(site, rows, first, change, later))
            if only is not None:
                stack.enter_context(only_logits_of(model.hf, only))
            set_to = {at: _set_to(value) for at, value in edited.items()}
            live = {at: _from_column(unedited, edit, model.device) for at, edit in later.items()}
            stack.enter_context(edit_sites(model.layout, set_to | live))
            logits = model.call(self.tokens.rows(rows), first, last=True, cache=cache)[:, -1].to(model.device)
        if only is not None and logits.shape[-1] != len(only):
            logits = logits[:, only]
        return logits

    @contextmanager
    def _shortcuts(
        self,
        site: Site,
        rows: Int[Tensor, "edits"],
        first: int,
        change: Float[Tensor, "edits columns width"],
        later: Collection[Site],
    ) -> Iterator[None]:
        """What the first and the last block of the pass need not compute."""
        layers, starts = self.model.n_layers, site.enters
        forwards: dict[nn.Module, Any] = {}
        if self.model.dtype == torch.float32:  # in half precision another kernel rounds otherwise than the kept run's
            forwards |= quick_activations(self.model.layout.blocks[starts:])
        if starts < layers and change.shape[1] > 1:
            if all(at.enters > starts for at in later):  # no part of the first block is edited
                forwards |= self._kept_elsewhere(site, rows, first, change)
            if all(at.order <= (layers - 1, 0) for at in later):  # nor of the last, nor what it gives
                last = find_maps(self.model, layers - 1)
                forwards |= {m: at_last(m, m in last.wide) for m in last.stays if m not in forwards}
        with forwards_replaced(forwards):
            yield

    def _kept_elsewhere(
        self, site: Site, rows: Int[Tensor, "edits"], first: int, change: Float[Tensor, "edits columns width"]
    ) -> dict[nn.Module, Any]:
        edited = change.ne(0).any(-1)
        if entry(site) != site or not bool((edited.sum(-1) == 1).all()):
            return {}  # several positions edited, or a block whose own parts are
        if site not in self._kept:
            self._kept[site] = kept_outputs(self.model, site.enters, self.values[site], self.tokens)
        column = edited.int().argmax(-1)
        return {m: at_edited(m, out[rows, first:], column) for m, out in self._kept[site].items()}

    def _way(self, sites: tuple[Site, ...]) -> tuple[str, bool]:
        """The quickest way that agrees with whole passes on one of this run's rows; and whether few logits do, too."""
        way, few, width = self.checked.get(sites, ("", True, 0))
        if width < self.width:
            candidates = WAYS if self._cache is not None else WAYS[-1:]
            way, few = next(seen for way in candidates if (seen := self._seen_to_agree(way, sites)) is not None)
            self.checked[sites] = (way, few, self.width)
        return way, few

    def _seen_to_agree(self, way: str, sites: Sequence[Site], again: bool = True) -> tuple[str, bool] | None:
        if self._agrees(way, sites, None):
            return way, self._agrees(way, sites, torch.tensor([self.logits.shape[-1] - 1, 0]))
        if again and way == WAYS[0] and forget_maps(self.model):  # the model may have been another when it was probed
            return self._seen_to_agree(way, sites, again=False)
        return None

    def _agrees(self, way: str, sites: Sequence[Site], only: Int[Tensor, "some"] | None) -> bool:
        """Compare edits of one position, in the middle and at the end, with whole passes."""
        if way == WAYS[-1] and only is None:
            return True
        worst, scale, moved = 0.0, 0.0, 0.0
        row = self.tokens.lengths.argmin().cpu().reshape(1)  # the most padded one
        generator = torch.Generator().manual_seed(0)
        site = sites[0]
        for first in sorted({self.width // 2, self.width - 1}):
            change, *others = (self._noise(at, row, first, generator) for at in sites)
            later = {at: _adding(noise) for at, noise in zip(sites[1:], others, strict=True)}
            whole = self._go(WAYS[-1], site, row, first, change, None, later).float()
            before = self.logits[row].float()
            try:
                resumed = self._go(way, site, row, first, change, only, later).float()
            except Exception as error:  # whatever a family does not expect; whole passes always work
                log.info("%s at %s: %s fails (%s), so the next way is taken", self.model.name, site, way, error)
                return False
            if only is not None:
                whole, before = whole[:, only], before[:, only]
            worst, scale = max(worst, float((resumed - whole).abs().max())), max(scale, float(whole.abs().max()))
            moved = max(moved, float((whole - before).abs().max()))
        exact = self.model.dtype == torch.float32
        if worst <= (1e-4 if exact else 5e-2) * scale and (worst <= 1e-6 * scale + 0.02 * moved or not exact):
            return True
        log.log(
            logging.INFO if way == WAYS[0] else logging.WARNING,  # the next way costs little then, or a lot
            "%s at %s: resuming by %r%s differs from whole passes by %.1e, so the next way is taken",
            self.model.name, site, way, "" if only is None else " with few logits", worst,
        )  # fmt: skip
        return False

    def _noise(
        self, site: Site, row: Int[Tensor, "1"], first: int, generator: torch.Generator
    ) -> Float[Tensor, "1 columns width"]:
        """A change of the first column, as large as what the site holds."""
        old = self.values[site][row, first:]
        change = torch.zeros_like(old)
        noise = torch.randn(old.shape[-1], generator=generator).to(old)
        change[:, 0] = noise * old.std().clamp(min=1e-3)
        return change


class _Before(DynamicLayer):
    """Some rows of a kept run's keys and values, before a column, as the model's own kind of cache.

    Nothing is copied before the block that needs it runs, and nothing is kept after.
    """

    def __init__(self, kept: DynamicLayer, rows: Int[Tensor, "edits"] | slice, first: int | None = None) -> None:
        super().__init__()
        assert kept.keys is not None, "the kept run has filled its cache"
        assert kept.values is not None
        self.lazy_initialization(kept.keys, kept.values)
        self.keys, self.values = kept.keys[:, :, :first], kept.values[:, :, :first]
        if isinstance(rows, slice):
            self.keys, self.values = self.keys[rows], self.values[rows]
            rows = torch.arange(len(self.keys))
        self._before = self.keys, self.values
        self._rows, self._one = rows, bool((rows == rows[0]).all())

    def update(self, key_states: Tensor, value_states: Tensor, *_: Any, **__: Any) -> tuple[Tensor, Tensor]:
        keys, values = self._before
        return self._with(keys, key_states), self._with(values, value_states)

    def _with(self, before: Tensor, new: Tensor) -> Tensor:
        mine = before[self._rows[:1]].expand(len(new), -1, -1, -1) if self._one else before[self._rows]
        return torch.cat([mine, new], -2)


def entry(site: Site) -> Site:
    """Where an edited pass sets the residual stream to the kept run's: the site itself, if it is that stream."""
    return site if site.stream in ("resid_pre", "resid_post") else Site(site.layer, "resid_pre")


def _set_to(value: Tensor) -> Edit:
    return lambda x: value.to(x.device)


def _adding(change: Tensor) -> Edit:
    return lambda x: x + change


def _from_column(first: int, edit: Edit, device: torch.device) -> Edit:
    """Edit the columns from `first` on, on the device where a dictionary's weights are."""

    def run(x: Tensor) -> Tensor:
        new = edit(x[:, first:].to(device)).to(x)
        return torch.cat([x[:, :first], new], 1) if first else new

    return run
