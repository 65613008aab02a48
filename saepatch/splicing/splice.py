"""The splice context: encode a site, edit its latents, write the change back."""

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor

from saepatch.data.batches import PairBatch
from saepatch.dictionaries.dictionary import Dictionary
from saepatch.dictionaries.latents import Latents
from saepatch.dictionaries.loading import Given, as_dictionaries
from saepatch.errors import UserError
from saepatch.model.finite import check_finite
from saepatch.model.forward import cache_among, check_attention, columns_in, tells_columns
from saepatch.model.hooks import (
    SpliceError,
    before_forward,
    edit_sites,
    is_spliced,
    splice_noted,
)
from saepatch.model.inputs.images import images_among
from saepatch.model.language_model import LanguageModel, Tokens, ordinary
from saepatch.model.positions import Pass, Positions
from saepatch.model.sites import Site
from saepatch.splicing.donors import DonorRun, Restore
from saepatch.splicing.generate_calls import around_generate
from saepatch.splicing.interventions import Intervention, ids_of, needs_of
from saepatch.splicing.site_edit import SiteEdit, encoded

log = logging.getLogger(__name__)

SPECULATIVE = ("assistant_model", "prompt_lookup_num_tokens", "assistant_early_exit")  # options of `generate`

Dictionaries = Given | Sequence[Given] | Mapping[Site, Dictionary] | Mapping[str, Dictionary]
Interventions = Intervention | Restore | Sequence[Intervention | Restore]


@dataclass(eq=False)
class Splice:
    """An active splice. With `record`, `latents[site]` are the unedited latents of the last forward pass."""

    model: LanguageModel
    latents: dict[Site, Latents] = field(default_factory=dict)
    seen: Pass | None = None
    _prompt_ids: Tensor | None = None  # of the current `generate` call
    _generated: bool = False  # whether `generate` was called
    _prompt: tuple[Tensor, int] | None = None  # number of tokens of each prompt, number of columns of the batch
    _cache: Any = None  # the cache that holds this prompt
    _mask: Tensor | None = None  # of the columns read so far, or of the prompt of the current `generate` call
    _read: int = 0  # number of columns that the current `generate` call has read
    _logits_to_keep: int = 0  # of the current pass; 0: all
    _donors: dict[int, DonorRun] = field(default_factory=dict)  # by `id` of the donor


@contextmanager
def splice(
    model: LanguageModel,
    dictionaries: Dictionaries,
    interventions: Interventions = (),
    error: Literal["keep", "drop"] = "keep",
    record: bool = False,
    first: int = 0,
) -> Iterator[Splice]:
    """Splice dictionaries into the model, at one or several sites, for every forward pass inside the context.

    With the error term kept and no intervention the model is unchanged: an edit Δf adds exactly `Δf · W_dec` to the
    site. With the error term dropped the dictionary is a bottleneck: every position carries only the reconstruction,
    except BOS, padding and tokens that the dictionary was not trained on (`Dictionary.excluded_tokens`). Of these,
    only BOS is ever edited, if positions include it explicitly. Works inside `model.hf.generate`, with or without a KV
    cache. Unused latents are not encoded. Not differentiable: see `saepatch.measure.attribution`.

    Args:
        dictionaries: One dictionary, several, or a mapping from sites to dictionaries. A `sae_lens.SAE` is wrapped
            (`wrap_sae`), at the site named in its metadata.
        interventions: One intervention, or several, applied in order.
        record: Keep the unedited latents of the last pass in the yielded value.
        first: With the error term dropped, number of first tokens of each prompt, BOS included, that keep the model's
            own value: massive activations often stand there.

    Raises:
        UserError: a dictionary does not fit the model or site, a latent is unknown, an intervention is on a site that
            is not spliced, or positions are outside a prompt.
        SpliceError: the model did not run through a spliced site inside the context, or an intervention had no
            position to act on in any run.
    """
    sites = by_site(model, dictionaries)
    if error not in ("keep", "drop"):
        raise UserError(f"error term {error!r}: use 'keep' or 'drop'")
    if first < 0 or (first and error == "keep"):
        raise UserError(f"first = {first}: use 0 or more, with error='drop', which it is an exception from")
    chosen, run = list(interventions) if isinstance(interventions, Sequence) else [interventions], Splice(model)
    placed = [(_site_of(intervention, sites), intervention) for intervention in chosen]
    for site, item in placed:
        sites[site].check_ids(ids_of(item.latents) or ())
    acting = [
        (site, item if isinstance(item, Intervention) else item.in_place(site, sites[site], model, run._donors))
        for site, item in placed
    ]
    if error == "drop" and any(needs_of(item).error and hasattr(item, "edit_error") for _, item in acting):
        raise UserError("an intervention with error=True writes the error term, which error='drop' drops: use only one")
    edits = {}
    for site, dictionary in sites.items():
        own = [intervention for other, intervention in acting if other == site]
        keep = partial(run.latents.__setitem__, site) if record else None
        edits[site] = SiteEdit(model, dictionary, site, own, error == "drop", first, record=keep)
    with ExitStack() as stack:
        stack.enter_context(splice_noted(model.layout))
        stack.enter_context(before_forward(model.hf, model.layout, partial(_before_forward, run)))
        stack.enter_context(around_generate(model.hf, partial(_around_generate, run)))
        hooks = {site: partial(_edit, run, edit) for site, edit in edits.items()}
        stack.enter_context(edit_sites(model.layout, hooks, model.device))
        yield run
    for (site, intervention), original in zip(acting, chosen, strict=True):
        if id(intervention) not in edits[site].acted:
            _report_idle(run, original)


def _report_idle(run: Splice, intervention: Intervention | Restore) -> None:
    """Raise SpliceError, or after `generate` warn, that an intervention had no position to act on."""
    message = f"{type(intervention).__name__} acted at no position of any run (positions {intervention.positions})"
    if not run._generated:
        raise SpliceError(message + ": check them against the prompts")
    log.warning("%s: perhaps every answer ended immediately", message)


def _edit(run: Splice, edit: SiteEdit, x: Tensor) -> Tensor:
    assert run.seen is not None
    # some models run their last blocks only at positions whose logits are requested
    at_end = x.shape[1] == run._logits_to_keep < run.seen.input_ids.shape[1]
    return edit(x, run.seen.ending(x.shape[1]) if at_end else run.seen)


def record_latents(model: LanguageModel, dictionary: Dictionary, tokens: Tokens | Sequence[str]) -> Latents:
    """Latents and error term of one unedited forward pass over a batch of tokens or texts; later blocks are not run.

    Raises:
        UserError: the dictionary does not fit the model, or the model is inside a splice, where it would be ambiguous
            whether edited latents are wanted.
    """
    dictionary.check(model)
    if is_spliced(model.layout):
        raise UserError(
            "record_latents runs the unedited model, but the model is inside a splice: call it outside, or take the "
            "latents of edited runs from splice(…, record=True) as run.latents[site]"
        )
    tokens = model.as_tokens(tokens)
    x = model.capture(tokens, [dictionary.site])[dictionary.site]
    check_finite(model, dictionary.site, x, tokens)
    return replace(encoded(dictionary, x), real=tokens.attention_mask.bool(), ordinary=tokens.ordinary)


def choose_positions(model: LanguageModel, batch: PairBatch, positions: Positions) -> PairBatch:
    """The same pairs with the positions where they may be patched, in either direction.

    Positions are resolved on the clean prompts. Positions without a counterpart in the other prompt are left out:
    padding and, where prompts are aligned from the right, an ordinary token against a BOS.

    Raises:
        UserError: no position is left, or a position is outside a prompt.
    """
    clean, corrupted = batch.clean, batch.corrupted
    both = clean.attention_mask.bool() & corrupted.attention_mask.bool() & (clean.ordinary == corrupted.ordinary)
    where = whole_prompt(model, clean).select(positions) & both
    if not bool(where.any()):
        raise UserError(
            f"positions {positions!r} select no token of any pair: choose others, there is nothing to patch"
        )
    return replace(batch, where=where)


def whole_prompt(model: LanguageModel, tokens: Tokens) -> Pass:
    """The pass over whole prompts at once, for choosing positions outside a splice."""
    mask = tokens.attention_mask
    return Pass(
        input_ids=tokens.input_ids,
        ordinary=tokens.ordinary,
        real=mask.bool(),
        index=mask.cumsum(-1) - 1,
        n_prompt=mask.sum(-1),
        start=0,
        width=mask.shape[1],
        decode=model.tokenizer.decode,
        turns=model.turns,
        images=tokens.images,
    )


def by_site(model: LanguageModel, dictionaries: Dictionaries) -> dict[Site, Dictionary]:
    """Dictionaries by site, each checked against the model.

    Raises:
        UserError: a dictionary does not fit the model or site, two are for the same tensor, or there are none.
    """
    named: Iterable[tuple[Site | str, Dictionary]]
    if isinstance(dictionaries, Mapping):
        named = dictionaries.items()
    else:
        named = [(dictionary.site, dictionary) for dictionary in as_dictionaries(dictionaries)]
    sites: dict[Site, Dictionary] = {}
    for name, dictionary in named:
        site = Site.parse(name)
        dictionary.check(model, site)
        if taken := [str(other) for other in sites if other.same_tensor(site)]:
            raise UserError(f"two dictionaries for one site ({taken[0]} and {site}): splice one of them")
        sites[site] = dictionary
    if not sites:
        raise UserError("there is nothing to splice: give at least one dictionary")
    return sites


def _site_of(intervention: Intervention | Restore, sites: Mapping[Site, Dictionary]) -> Site:
    names = ", ".join(map(str, sites))
    if intervention.site is None:
        if len(sites) > 1:
            raise UserError(
                f"{type(intervention).__name__} names no site, but several are spliced: give one of {names}"
            )
        return next(iter(sites))
    site = Site.parse(intervention.site)
    for spliced in sites:
        if spliced.same_tensor(site):
            return spliced
    raise UserError(f"{type(intervention).__name__} acts on {site}, which is not spliced: use one of {names}")


def _around_generate(run: Splice, ids: Tensor | None, options: Mapping[str, Any]) -> None:
    run._prompt_ids, run._prompt, run._cache, run._mask, run._read = ids, None, None, options.get("attention_mask"), 0
    run._generated |= ids is not None
    for donor in run._donors.values():
        donor.reset()
    if ids is None:
        return
    config = options.get("generation_config") or getattr(run.model.hf, "generation_config", None)
    configs = [vars(c) for c in (config, getattr(run.model.hf, "generation_config", None)) if c is not None]
    for name in SPECULATIVE:
        # arguments of `generate` override the generation config, even as None
        if any(source.get(name) is not None for source in ((options,) if name in options else configs)):
            raise UserError(
                f"a splice needs tokens one at a time, and {name} runs the model on drafts of several: "
                f"generate without {name}"
            )
    beams = options.get("num_beams") or getattr(config, "num_beams", None) or 1
    if run._donors and beams != 1:
        raise UserError("Restore follows a single continuation of each prompt: generate with num_beams=1")


def _prompt_of(run: Splice, mask: Tensor, start: int, cache: Any) -> tuple[Tensor, int]:
    """Number of tokens of each prompt, and number of columns of the padded prompts."""
    if run._prompt_ids is not None:
        if run._prompt is not None:
            return run._prompt
        if run._prompt_ids.shape[1] != mask.shape[1]:
            raise UserError("a splice needs the whole prompt in one pass: generate without prefill_chunk_size")
    elif start and run._prompt is not None:
        n_prompt, width = run._prompt
        # The model creates its cache during the first pass, so it is first seen on the second.
        first_seen = run._cache is None and start == width and torch.equal(mask[:, :width].sum(-1), n_prompt)
        if cache is run._cache or first_seen:
            return run._prompt
        raise UserError("the cache holds another prompt than the last one that ran inside this splice: run it inside")
    elif start:
        raise UserError("the cache holds a prompt that did not run inside this splice: run the prompt inside as well")
    return mask.sum(-1), mask.shape[1]


def _whole_mask(run: Splice, mask: Any, ids: Tensor, start: int) -> Tensor:
    """Mask of the non-padding tokens over all columns read so far, including this pass.

    A pass may come without a mask, with a mask of its own columns only (recurrent states), or with the additive
    attention mask (static caches): then the mask follows from the prompt's.
    """
    columns = start + ids.shape[1]
    flat = isinstance(mask, Tensor) and mask.ndim == 2
    if flat and mask.shape[1] >= columns:
        return mask[:, :columns].long()
    generating = run._prompt_ids is not None
    before = run._mask if start or generating else None
    too_short = before is not None and not generating and before.shape[1] < start  # from another prompt: refused later
    if mask is None and (before is None or too_short):
        return torch.ones(ids.shape[0], columns, dtype=torch.long, device=ids.device)
    if before is not None and (mask is None or flat or generating) and (generating or before.shape[1] >= start):
        before = before[:, : start or columns].long()
        before = before.repeat_interleave(len(ids) // len(before), 0)  # one row per beam
        if flat and mask.shape[1] == ids.shape[1]:
            before = torch.cat([before, mask.long()], 1)
        return torch.cat([before, before.new_ones(len(before), columns - before.shape[1])], 1)
    shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
    raise UserError(
        f"attention mask of shape {shape} for {start} cached and {ids.shape[1]} new tokens: a splice needs the "
        "two-dimensional mask over all of them: give `generate` the prompts' attention_mask"
    )


def _before_forward(run: Splice, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    """Determine which tokens of which prompts this pass processes."""
    ids = kwargs.get("input_ids", args[0] if args else None)
    if ids is None:
        raise UserError("a spliced model needs input_ids, to locate positions: do not pass inputs_embeds")
    cache = cache_among(kwargs)
    if cache is None:
        start = 0
    elif run._prompt_ids is not None and not tells_columns(cache):  # recurrent states: `generate`'s columns are counted
        start = run._read
    else:
        start = columns_in(cache)
    mask = _whole_mask(run, kwargs.get("attention_mask", args[1] if len(args) > 1 else None), ids, start)
    generating = run._prompt_ids is not None and not run.model.takes_cache
    run.model.padding.check(mask, cached=start > 0 or generating)
    run._prompt, run._cache = _prompt_of(run, mask, start, cache), cache
    run._mask, run._read = mask, start + ids.shape[1]
    kept = kwargs.get("logits_to_keep")
    run._logits_to_keep = kept if isinstance(kept, int) else 0
    n_prompt, width = run._prompt
    here = mask[:, start:]
    check_attention(run.model.config, mask, start, not bool(mask.all()))
    run.seen = Pass(
        input_ids=ids,
        ordinary=ordinary(ids, here, run.model.bos_id),
        real=here.bool(),
        index=(mask.cumsum(-1) - 1)[:, start:],
        n_prompt=n_prompt,
        start=start,
        width=width,
        decode=run.model.tokenizer.decode,
        turns=run.model.turns,
        images=images_among(kwargs, start),
    )
    for donor in run._donors.values():
        donor.follow(run.seen)
