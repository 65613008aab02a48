"""Run a model once, then resume from one of its sites as often as needed, with the site edited.

An edited pass skips the blocks before the site and all positions before the first edited one, whose keys and values
come from the kept run; in a model that keeps more than these (recurrent states), it skips the blocks only. It runs the
model's own blocks, so masks, positions, grouped queries, sliding windows and soft caps are the model's. Every way of
resuming is compared with a whole forward pass before it is used; one that does not agree is dropped, with the reason
logged.
"""

import logging
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from functools import partial
from typing import Any, NamedTuple

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import DynamicCache
from transformers.cache_utils import Cache

from saepatch.engine.passes.kept_cache import Before, cache_before
from saepatch.engine.passes.pieces import (
    Later,
    Pieces,
    downstream,
    next_logits_in_pieces,
    piece_of,
    real_start,
    runs_in_pieces,
)
from saepatch.engine.passes.shortcuts import at_edited, at_last, find_maps, forget_maps, kept_outputs, quick_activations
from saepatch.errors import UserError
from saepatch.model.finite import check_finite
from saepatch.model.hooks import Edit, edit_sites, is_spliced
from saepatch.model.language_model import LanguageModel, Tokens, refuse_training
from saepatch.model.replaced import forwards_replaced, only_logits_of, skip_blocks
from saepatch.model.sites import Site

log = logging.getLogger(__name__)

Ways = tuple[str, ...]
WAYS: Ways = ("shortcuts", "cache", "blocks", "whole")  # fastest first; the last is always right
ON_CACHE = ("shortcuts", "cache")  # these skip columns, too; "blocks" skips only the blocks before the site
PROBED = 1024  # columns of a long prompt on which ways of resuming are checked, in four pieces
Checked = dict[tuple[tuple[Site, ...], bool], tuple[str, bool, int]]


class KeptRun:
    """One forward pass over a batch whose prompts end in the same column, kept so that edited passes resume from it.

    `logits` are those after each prompt's last token; `values[site]` is the site's value.
    """

    @torch.no_grad()
    def __init__(
        self,
        model: LanguageModel,
        tokens: Tokens,
        sites: Collection[Site],
        edits: Mapping[Site, Edit] | None = None,
        keep_cache: bool = True,
        piece: int | None = None,
    ) -> None:
        refuse_training(model)
        if is_spliced(model.layout):
            raise UserError("a sweep runs the unedited model, but it is inside a splice: leave the splice first")
        if not bool(tokens.attention_mask[:, -1].all()):
            raise ValueError("resuming needs prompts that end in the last column: pad on the left")
        self.model, self.tokens = model, tokens
        # columns per pass of a long prompt; edits of whole prompts are not cut
        self.piece = piece or (piece_of(tokens.width) if runs_in_pieces(model, tokens.width) and not edits else None)
        self.values: dict[Site, Tensor] = {}
        # By edited sites and whether few logits are asked for: the way that agrees with whole passes, whether it does
        # when few logits are unembedded, and up to how many tokens this was checked. Sweeps share it (`KnownWays`).
        self.checked: Checked = {}
        self.written: Tensor | None = None  # the values that an ablation wrote into the component's units
        wanted = {*sites, *(entry(site) for site in sites)}
        changed, parts = dict(edits or {}), dict[Site, list[Tensor]]()

        def keep(site: Site) -> Edit:
            def see(x: Tensor) -> Tensor:
                new = changed[site](x) if site in changed else x
                if site in wanted:
                    before = parts.get(site, []) if self.piece else []  # a block that runs twice: its last value
                    parts[site] = [*before, new.to(model.device)]  # a model may be spread over several
                return new

            return see

        hooks = {site: keep(site) for site in {*wanted, *changed}}
        with edit_sites(model.layout, hooks):
            self._cache, self.logits = self._first_pass(keep_cache, parts)
        self.values = {site: some[0] if len(some) == 1 else torch.cat(some, 1) for site, some in parts.items()}
        for site, value in self.values.items():
            check_finite(model, site, value, tokens)
        self._kept: dict[Site, dict[nn.Module, Tensor]] = {}  # outputs of the first block's maps, by site

    def _first_pass(
        self, keep_cache: bool, parts: dict[Site, list[Tensor]]
    ) -> tuple[Any, Float[Tensor, "batch vocab"]]:
        model, tokens = self.model, self.tokens
        if keep_cache and model.takes_cache:
            cache = DynamicCache()  # keys and values of every column; unusable for models with recurrent states
            try:
                return cache, next_logits_in_pieces(model, tokens, self.piece or tokens.width, cache)
            except (IndexError, AttributeError, TypeError, ValueError, NotImplementedError) as error:
                log.info("%s does not run with a key-value cache (%s): no columns are skipped", model.name, error)
                parts.clear()  # of the pass that failed
        return None, next_logits_in_pieces(model, tokens, self.piece or tokens.width)

    def split(self, n: int) -> tuple["KeptRun", "KeptRun"]:
        """The first `n` rows and the other rows, as separate runs that share this run's memory."""
        return self._part(slice(0, n)), self._part(slice(n, None))

    def _part(self, rows: slice) -> "KeptRun":
        part: KeptRun = object.__new__(KeptRun)
        part.model, part.tokens, part.logits = self.model, self.tokens.rows(rows), self.logits[rows]
        part.piece = self.piece
        part.values = {site: value[rows] for site, value in self.values.items()}
        part.checked, part.written, part._kept, part._cache = {}, None, {}, None
        if self._cache is not None and self.can_repeat:
            part._cache = Cache(layers=[Before(kept, rows) for kept in self._cache.layers])
        return part

    def again(self) -> "KeptRun":
        """The same run, with nothing checked yet; it shares this run's memory."""
        return self._part(slice(None))

    @property
    def can_repeat(self) -> bool:
        """Whether parts of the run have all that it has: a recurrent model's states cannot be cut."""
        return all(getattr(kept, "keys", None) is not None for kept in self.cache_layers)

    @property
    def size(self) -> int:
        """Bytes of the values, logits, keys and values that are kept."""
        kept = [*self.values.values(), self.logits]
        kept += [each for layer in self.cache_layers for each in (layer.keys, layer.values)]
        return sum(each.numel() * each.element_size() for each in kept)

    @property
    def width(self) -> int:
        """Number of columns of the batch."""
        return self.tokens.width

    @property
    def cache_layers(self) -> list[Any]:
        """Keys and values of every column, by layer."""
        return [] if self._cache is None else list(self._cache.layers)

    @property
    def has_cache(self) -> bool:
        """Whether keys and values are kept, so that passes may start at later columns."""
        return self._cache is not None

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

        `only` are the vocabulary ids whose logits are needed; None: all. `later` are edits of downstream sites.
        """
        later = later or {}
        way, few = self._way((site, *later), only is not None)
        if only is None or few:
            return self._go(way, site, rows, first, change, only, later)
        return self._go(way, site, rows, first, change, None, later)[:, only]

    def way(self, site: Site) -> str:
        """The fastest way of resuming from a site that agrees with whole passes: one of `WAYS`."""
        return self._way((site,), False)[0]

    def pieces(self, site: Site, rows: Int[Tensor, "edits"]) -> Pieces:
        """Passes of some rows in pieces that start at a site."""
        return Pieces(self.model, self.tokens.rows(rows), partial(self.cache_before, rows), site.enters, self.piece)

    def cache_before(self, rows: Int[Tensor, "edits"], first: int) -> Cache:
        """The keys and values of some rows before column `first`, for passes that start there."""
        return cache_before([self._cache], rows, first)

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
        start = self.tokens.rows(rows).block_start(first) if way in ON_CACHE else 0
        if start < first:
            change = nn.functional.pad(change, (0, 0, first - start, 0))
            first, unedited = start, first - start
        old = self.values[site][rows, first:]
        edited = {site: (old + change).to(old.dtype)}
        if entry(site) != site:
            edited[entry(site)] = self.values[entry(site)][rows, first:]
        if way in ON_CACHE and self.piece and change.shape[1] > self.piece:
            with only_logits_of(model.hf, only) if only is not None else nullcontext():
                logits = self.pieces(site, rows).logits(edited, first, later, unedited)[0]
            return logits if only is None or logits.shape[-1] == len(only) else logits[:, only]
        cache = self.cache_before(rows, first) if first else None
        with ExitStack() as stack:
            if way != "whole":
                stack.enter_context(skip_blocks(model.layout, site.enters))
            if way == "shortcuts":
                stack.enter_context(self._shortcuts(site, rows, first, change, later))
            if only is not None:
                stack.enter_context(only_logits_of(model.hf, only))
            set_to = {target: _set_to(value) for target, value in edited.items()}
            live = downstream(later, unedited, (0, change.shape[1]), model.device)
            stack.enter_context(edit_sites(model.layout, set_to | live))
            logits = model.call(self.tokens.rows(rows), first, last=True, cache=cache)[:, -1]
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
        """Skip what the first and the last block of the pass need not compute."""
        layers, starts = self.model.n_layers, site.enters
        forwards: dict[nn.Module, Any] = {}
        if self.model.dtype == torch.float32:  # in half precision the fused kernel rounds differently
            forwards |= quick_activations(self.model.layout.blocks[starts:])
        if starts < layers and change.shape[1] > 1:
            if all(other.enters > starts for other in later):  # no part of the first block is edited
                forwards |= self._kept_elsewhere(site, rows, first, change)
            if all(other.order <= (layers - 1, 0) for other in later):  # nor of the last block, nor its output
                last = find_maps(self.model, layers - 1)
                forwards |= {m: at_last(m, m in last.wide) for m in last.stays if m not in forwards}
        with forwards_replaced(forwards):
            yield

    def _kept_elsewhere(
        self, site: Site, rows: Int[Tensor, "edits"], first: int, change: Float[Tensor, "edits columns width"]
    ) -> dict[nn.Module, Any]:
        edited = change.ne(0).any(-1)
        if entry(site) != site or not bool((edited.sum(-1) == 1).all()):
            return {}  # several positions are edited, or a site inside the block
        if site not in self._kept:
            self._kept[site] = kept_outputs(self.model, site.enters, self.values[site], self.tokens)
        column = edited.int().argmax(-1)
        return {m: at_edited(m, out[rows, first:], column) for m, out in self._kept[site].items()}

    def _way(self, sites: tuple[Site, ...], few: bool) -> tuple[str, bool]:
        """The fastest way that agrees with whole passes on one row; and whether it may unembed few logits, if asked."""
        way, may, width = self.checked.get((sites, few), ("", False, 0))
        if width < self.width and self.piece and self.width > PROBED and self._cache is not None:
            start = real_start(self.tokens, PROBED)
            way, may = KeptRun(self.model, start, list(self.values), piece=PROBED // 4)._way(sites, few)
            self.checked[sites, few] = (way, may, self.width)
        elif width < self.width:
            probes = self._probes(sites)
            candidates = [way for way in WAYS if self._cache is not None or way not in ON_CACHE]
            verified = (self._verified(way, sites, probes, few) for way in candidates)
            way, may = next(result for result in verified if result is not None)
            self.checked[sites, few] = (way, may, self.width)
        return way, may

    def _verified(
        self, way: str, sites: Sequence[Site], probes: "_Probes", few: bool, again: bool = True
    ) -> tuple[str, bool] | None:
        for only in (probes.few, None) if few else (None,):
            if self._agrees(way, sites, probes, only):
                return way, only is not None
        if again and way == WAYS[0] and forget_maps(self.model):  # the model may have changed since it was probed
            return self._verified(way, sites, probes, few, again=False)
        return None

    def _probes(self, sites: tuple[Site, ...]) -> "_Probes":
        """Edits that take different paths, by whole passes: of one position in the middle, of all from there on, and
        of the last one, in the row with most padding."""
        images = self.tokens.images
        row = self.tokens.lengths.argmin().cpu().reshape(1)
        if images is not None:  # a row with pictures, and the end of one
            row = images.here.any(-1).int().argmax().cpu().reshape(1)
        generator = torch.Generator().manual_seed(0)
        middle, last = self.width // 2, self.width - 1
        edited = sorted({(middle, 1), (middle, self.width - middle), (last, 1)})
        if images is not None:
            edited.append((int(images.here[int(row)].nonzero()[-1]), 1))
        columns = [first for first, _ in edited]
        changes = [[self._noise(site, row, *where, generator) for site in sites] for where in edited]
        both = [
            torch.cat([nn.functional.pad(change, (0, 0, first, 0)) for first, change in zip(columns, own, strict=True)])
            for own in zip(*changes, strict=True)
        ]
        later = {site: _adding(noise) for site, noise in zip(sites[1:], both[1:], strict=True)}
        whole = self._go(WAYS[-1], sites[0], row.expand(len(columns)), 0, both[0], None, later).float()
        few = torch.tensor([self.logits.shape[-1] - 1, 0])
        return _Probes(row, columns, changes, whole, self.logits[row].float(), few)

    def _agrees(self, way: str, sites: Sequence[Site], probes: "_Probes", only: Int[Tensor, "some"] | None) -> bool:
        """Compare the probes' edits with whole passes."""
        if way == WAYS[-1] and only is None:
            return True
        resumed = []
        for first, (change, *others) in zip(probes.columns, probes.changes, strict=True):
            later = {other: _adding(noise) for other, noise in zip(sites[1:], others, strict=True)}
            try:
                resumed.append(self._go(way, sites[0], probes.row, first, change, only, later).float())
            except Exception as error:  # families fail in many ways; whole passes always work
                log.info("%s at %s: %s fails (%s), so the next way is used", self.model.name, sites[0], way, error)
                return False
        whole, before = (x if only is None else x[:, only] for x in (probes.whole, probes.before))
        errors, moved = ((some - whole).abs().amax(-1) for some in (torch.cat(resumed), before))
        worst, scale, exact = float(errors.max()), float(whole.abs().max()), self.model.dtype == torch.float32
        # each edit by its own effect, which a larger one of another edit must not hide
        small = bool((errors <= 5e-6 * scale + 0.02 * moved).all())
        if worst <= (1e-4 if exact else 5e-2) * scale and (small or not exact):
            return True
        log.log(
            logging.INFO if way == WAYS[0] else logging.WARNING,  # only without a cache is the next way slow
            "%s at %s: resuming by %r%s differs from whole passes by %.1e, so the next way is used",
            self.model.name, sites[0], way, "" if only is None else " with few logits", worst,
        )  # fmt: skip
        return False

    def _noise(
        self, site: Site, row: Int[Tensor, "1"], first: int, columns: int, generator: torch.Generator
    ) -> Float[Tensor, "1 all_columns width"]:
        """A random change of some columns, on the scale of the site's values."""
        old = self.values[site][row, first:]
        change = torch.zeros_like(old)
        noise = torch.randn(columns, old.shape[-1], generator=generator).to(old)
        change[:, :columns] = noise * old.std().clamp(min=1e-3)
        return change


class _Probes(NamedTuple):
    """Edits by which ways of resuming are checked: `changes[column][site]` of one row, and the logits they give."""

    row: Int[Tensor, "1"]
    columns: list[int]  # the first changed column of each edit
    changes: list[list[Float[Tensor, "1 columns width"]]]
    whole: Float[Tensor, "edits vocab"]  # by whole passes
    before: Float[Tensor, "1 vocab"]  # unedited
    few: Int[Tensor, "some"]


def entry(site: Site) -> Site:
    """Where an edited pass sets the residual stream: the site itself if it is one, otherwise its block's input."""
    return site if site.stream in ("resid_pre", "resid_post") else Site(site.layer, "resid_pre")


def _set_to(value: Tensor) -> Edit:
    return lambda x: value.to(x.device)


def _adding(change: Tensor) -> Callable[[Tensor, int], Tensor]:
    return lambda x, before: x + change[:, before : before + x.shape[1]]
