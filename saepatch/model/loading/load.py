"""Load a causal language model and its tokenizer, and check its sites by a real forward pass."""

import logging
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, nullcontext, suppress
from dataclasses import replace
from functools import partial
from typing import Any, TypedDict

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from saepatch.errors import UserError
from saepatch.model.families import FAMILIES, Layout
from saepatch.model.fingerprint import stored_tensors
from saepatch.model.finite import all_finite
from saepatch.model.forward import probe_steps
from saepatch.model.hooks import Edit, SpliceError, edit_sites, first_of, watching
from saepatch.model.inputs.padding import FAILURES
from saepatch.model.inputs.tokens import Tokens, name_bos
from saepatch.model.language_model import LanguageModel
from saepatch.model.loading.discovery import discover, layout_of
from saepatch.model.loading.padded_rows import padding_of, run_pass, warn_of_shared_batches
from saepatch.model.loading.sources import from_pretrained, source_of, with_adapter
from saepatch.model.other_tools import inner_model
from saepatch.model.replaced import only_logits_of
from saepatch.model.sites import Site

log = logging.getLogger(__name__)

FEW_LOGITS = 2048  # vocabulary ids whose logits are compared when a model is checked


class Spread(TypedDict, total=False):
    """Options of transformers and accelerate that spread a model over several devices."""

    device_map: str | dict[str, Any] | None
    max_memory: Mapping[int | str, int | str] | None
    offload_folder: str | None


def load_model(
    name: str,
    device: str | torch.device = "cpu",
    dtype: str | torch.dtype = "float32",
    prepend_bos: bool | str = False,
    trust_remote_code: bool = False,
    *,
    revision: str | None = None,
    merge_adapter: bool = False,
    **spread: Unpack[Spread],
) -> LanguageModel:
    """Load a model and check its sites by a real forward.

    Args:
        name: `organism`, `organism-base`, a Hugging Face id, a folder of a model, a .gguf file (its weights are
            expanded, and its quantisation becomes part of the model's name in results; needs `saepatch[gguf]`), or a
            folder of a PEFT adapter such as LoRA, whose config names the model below it (needs `saepatch[peft]`).
        device: Device for the weights; unused with `device_map`.
        prepend_bos: Prepend a BOS to every text where the tokenizer does not (as GPT-2's), since many dictionaries were
            trained that way; for a tokenizer without a BOS (as Qwen's), the text of the token to use instead.
        revision: Branch, tag or commit of the model's repository on the hub; None: its main branch.
        merge_adapter: Add an adapter's weights to the model's instead of computing them beside, which is faster.
        **spread: `device_map` (such as "auto") spreads a model that one device cannot hold over several and, within
            `max_memory`, over main memory and `offload_folder`, as transformers and accelerate do.

    Raises:
        UserError: there is no such model, revision, device or option, weights are missing, damaged, NaN or quantised in
            a way that transformers does not know, or the blocks cannot be found.
    """
    if unknown := [option for option in spread if option not in Spread.__annotations__]:
        raise UserError(f"unknown option {unknown[0]!r}: use one of {', '.join(Spread.__annotations__)}")
    source = source_of(name)
    resolved = getattr(torch, dtype, None) if isinstance(dtype, str) else dtype
    if not isinstance(resolved, torch.dtype) or not resolved.is_floating_point:
        raise UserError(f"unknown dtype {dtype!r}: use float32, bfloat16 or float16")
    device = usable_device(device)
    options: dict[str, Any] = {"trust_remote_code": trust_remote_code}
    if revision is not None:
        if source.local:
            raise UserError(f"revision {revision!r}: {name!r} is on this machine and has no revisions: leave it out")
        options["revision"] = revision
    spreads = spread.get("device_map") is not None
    placement = {key: value for key, value in spread.items() if spreads and value is not None}
    hf, tokenizer, missing, processor = from_pretrained(source, resolved, options, placement)
    if isinstance(prepend_bos, str):
        name_bos(tokenizer, prepend_bos)
    if missing:
        raise UserError(
            f"model {name!r} lacks {len(missing)} weights ({missing[0]}, …): its files are incomplete, fetch them again"
        )
    hf = hf if placement else hf.to(device)
    if source.adapter:
        hf = with_adapter(hf, source, merge_adapter)
    return replace(wrap_model(hf, tokenizer, source.title), prepend_bos=bool(prepend_bos), processor=processor)


def usable_device(device: str | torch.device) -> torch.device:
    """The device, after a test that a tensor can be created on it.

    Raises:
        UserError: torch does not know the device, or this machine has none.
    """
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError) as error:
        reason = str(error).splitlines()[0][:60]
        raise UserError(
            f"device {str(device)!r} cannot be used here ({reason}): use cpu, or cuda or mps where available"
        ) from error


def wrap_model(hf: Any, tokenizer: Any = None, name: str = "") -> LanguageModel:
    """Wrap a causal LM that is in memory already; it is put in eval mode, without gradients for weights.

    Args:
        hf: A model of transformers; a PEFT model with adapters, a TransformerBridge of TransformerLens or a
            LanguageModel of nnsight, of which the transformers model inside is taken, unchanged.
        tokenizer: Its tokenizer, or the processor of a model that reads pictures; that of a bridge or of nnsight's
            model where it is not given.
        name: Its name in results; default: the name or path in its config.

    Raises:
        UserError: weights that are not finite, blocks that cannot be found, no tokenizer, or a model of another library
            without a transformers model inside.
    """
    processor = tokenizer if hasattr(tokenizer, "image_processor") else None
    hf, tokenizer, name = inner_model(hf, tokenizer if processor is None else processor.tokenizer, name)
    if hasattr(hf, "_orig_mod") or getattr(hf, "_compiled_call_impl", None) is not None:
        raise UserError(
            f"model {name!r} is compiled, and compiled code bypasses hooks: give the model itself (its _orig_mod), "
            "not compiled"
        )
    for parameter, value in hf.named_parameters():
        if not value.is_meta and not all(map(all_finite, stored_tensors(value))):
            raise UserError(
                f"model {name!r} has NaN or infinite weights in {parameter}: the file is damaged, fetch it again"
            )
    hf.eval().requires_grad_(False)
    model = LanguageModel(hf, tokenizer, name, layout_of(hf, hf.config), processor=processor)
    if model.appended:
        ends = "".join(model.token_texts(model.appended))
        log.info("the tokenizer of %r appends %s to every text: it is dropped from prompts", name, ends)
    return check_sites(model)


@contextmanager
def _fewer_logits(model: LanguageModel, tokens: Tokens) -> Iterator[None]:
    """Unembed enough vocabulary ids to tell any two values of the residual stream apart, where the model allows it.

    The unembedding of a large vocabulary takes most of the time of a short pass.
    """
    count = max(FEW_LOGITS, 2 * model.d_model)
    if count >= model.vocabulary // 2 or not model.takes_cache:  # without a cache, padding is probed by `generate`
        yield
        return
    whole = model.call(tokens)
    ids = torch.linspace(0, whole.shape[-1] - 1, count).long()
    with only_logits_of(model.hf, ids):
        try:
            few = model.call(tokens)
        except FAILURES:
            few = whole
    expected = whole[..., ids.to(whole.device)]
    same = few.shape == expected.shape and torch.allclose(few, expected, 1e-3, 1e-4 * float(expected.abs().max()))
    with only_logits_of(model.hf, ids) if same else nullcontext():
        yield


@torch.no_grad()
def check_sites(model: LanguageModel) -> LanguageModel:
    """Run a few tokens and check that every site emits [batch, pos, width] and that editing it changes the logits.

    `attn_out` and `mlp_out` must add up to what a block adds to the residual stream; where they do not (as with scaled
    residuals), these two streams are not offered, with a warning. `z` is not offered for layers where it is not the
    concatenation of the heads, nor `neurons` for layers whose MLP has no single set of them (a mixture of experts).

    Raises:
        UserError: a residual site emits another shape, or an edit of a site does not change the logits.
    """
    tokens = model.probe()
    model = replace(model, layout=_layout_seen(model, tokens))
    with _fewer_logits(model, tokens):
        return _checked_sites(model, tokens)


def _checked_sites(model: LanguageModel, tokens: Tokens) -> LanguageModel:
    steps = probe_steps(partial(run_pass, model), model.new_cache, tokens)
    model = replace(model, step_limit=steps)
    model = replace(model, padding=padding_of(model))
    warn_of_shared_batches(model)
    seen, overwritten = _emitted(model, tokens)
    model = replace(model, last_alone=_last_alone(model, tokens, seen))
    layout = model.layout.without(_not_offered(model, seen))
    widths = {site: seen[site].shape[-1] for site in layout.all_sites}
    layout = replace(layout, widths=widths, overwritten=overwritten)
    model = replace(model, layout=layout)
    plain = model.call(tokens)
    for site in _one_of_each_kind(model):
        noise = torch.randn(seen[site].shape, generator=torch.Generator().manual_seed(0)).to(seen[site])
        scale = seen[site].float().std().clamp(min=1e-3).to(noise.dtype)
        with edit_sites(layout, {site: lambda x, noise=noise, scale=scale: x + scale * noise}):  # type: ignore[misc]
            edited = model.call(tokens)
        if torch.equal(plain, edited):
            raise UserError(
                f"editing site {site} of {model.name!r} leaves the logits unchanged: "
                "check saepatch.model.families.FAMILIES"
            )
    return model


def _layout_seen(model: LanguageModel, tokens: Tokens) -> Layout:
    """The layout completed by one forward pass: what blocks return and, for families not listed, the streams.

    Raises:
        UserError: a block does not run, or does not return a single stream.
    """
    emitted: dict[nn.Module, Any] = {}
    layout, inputs = model.layout, model.inputs(tokens)
    with watching((), lambda *_: None, layout.blocks, lambda block, _, output: emitted.update({block: output})):
        model.hf(**inputs)
    if missing := [layer for layer, block in enumerate(layout.blocks) if block not in emitted]:
        raise UserError(f"blocks {missing} of {model.name!r} do not run on text alone, so they have no sites")
    shape, expected = tuple(first_of(emitted[layout.blocks[0]]).shape), (1, tokens.width, model.d_model)
    if shape != expected:
        streams = next((n for n in (*shape[:1], *shape[2:3]) if n != 1), 0) if len(shape) == 4 else 0
        several = f"the model keeps {streams} residual streams side by side" if streams else "that is no stream"
        raise UserError(
            f"the blocks of {model.name!r} give tensors of shape {shape}, not {expected}: {several}, and a site is "
            "one stream of shape [batch, pos, width]"
        )
    layout = replace(layout, tuple_blocks=isinstance(emitted[layout.blocks[0]], tuple | list))
    if model.config.model_type in FAMILIES:
        return layout
    layout, reasons = discover(model.hf, layout, inputs, model.n_heads)
    for reason, layers in reasons.items():
        log.info("attn_out and mlp_out of %r are not offered in %d blocks: %s", model.name, len(layers), reason)
    return layout


def _emitted(model: LanguageModel, tokens: Tokens, last: bool = False) -> tuple[dict[Site, Tensor], frozenset[Site]]:
    """What every site emits in one pass, and those sites whose tensor the model then changes in place.

    `neurons` may be missing, as in a mixture of experts.
    """
    held: dict[Site, tuple[Tensor, Tensor]] = {}
    edits: dict[Site, Edit] = {
        site: lambda x, site=site: held.setdefault(site, (x, x.clone()))[0]  # type: ignore[misc]
        for site in model.layout.all_sites
    }
    units = {site: edits.pop(site) for site in model.layout.all_sites if site.stream == "neurons"}
    with edit_sites(model.layout, edits), suppress(SpliceError), edit_sites(model.layout, units):
        model.call(tokens, last=last)
    changed = frozenset(site for site, (after, before) in held.items() if not torch.equal(after, before))
    return {site: before for site, (_, before) in held.items()}, changed


def _last_alone(model: LanguageModel, tokens: Tokens, seen: Mapping[Site, Tensor]) -> bool:
    """Whether sites have the values of a whole pass when only the last logits are requested.

    A model may then run its last blocks only at the last position.
    """
    try:
        again, _ = _emitted(model, tokens, last=True)
    except FAILURES:
        return False
    return all(again[site].shape == value.shape for site, value in seen.items())


def _not_offered(model: LanguageModel, seen: Mapping[Site, Tensor]) -> set[Site]:
    """The sites whose values do not match the definition of their stream.

    Raises:
        UserError: a site that should have the width of the residual stream has another shape.
    """
    odd: set[Site] = set()
    for site in model.layout.all_sites:
        shape = tuple(seen[site].shape) if site in seen else ()
        if site.stream == "neurons":
            odd |= {site} if len(shape) != 3 or shape[:2] != (1, 6) else set()
        elif site.stream == "z":
            odd |= {site} if shape[:-1] != (1, 6) or not model.n_heads or shape[-1] % model.n_heads else set()
        elif shape != (1, 6, model.d_model):
            raise UserError(
                f"site {site} emits {shape}, not (1, 6, {model.d_model}): check saepatch.model.families.FAMILIES"
            )
    if heads := sorted(site for site in odd if site.stream == "z"):
        log.warning(
            "%s of %r has shape %s, which is not %d concatenated heads: not offered%s",
            heads[0], model.name, tuple(seen[heads[0]].shape), model.n_heads,
            "" if len(heads) == 1 else f", nor are {len(heads) - 1} more",
        )  # fmt: skip
    if units := sorted(site for site in odd if site.stream == "neurons"):
        log.info("%d layers of %r have no single set of MLP neurons: not offered there", len(units), model.name)
    added = {site for site in model.layout.all_sites if site.stream in ("attn_out", "mlp_out")}
    if model.config.model_type in FAMILIES and not _streams_add_up(model, seen):
        log.warning("attn_out and mlp_out of %r do not add up to what a block writes: not offered", model.name)
        odd |= added
    return odd


def _one_of_each_kind(model: LanguageModel) -> list[Site]:
    """For every stream and module path, the middle site."""
    kinds: dict[tuple[str, str], list[Site]] = {}
    for site in model.layout.all_sites:
        kinds.setdefault((site.stream, model.layout.paths[site.layer][site.stream]), []).append(site)
    return [sites[len(sites) // 2] for sites in kinds.values()]


def _streams_add_up(model: LanguageModel, seen: Mapping[Site, Tensor]) -> bool:
    """Whether, in every layer that offers both, attn_out plus mlp_out equals what the block adds."""
    tolerance = 1e-3 if model.dtype == torch.float32 else 5e-2
    for layer in range(model.n_layers):
        before, after, *parts = (Site(layer, s) for s in ("resid_pre", "resid_post", "attn_out", "mlp_out"))
        if any(site not in seen for site in parts):
            continue
        wrote = seen[after].float() - seen[before].float()
        added = sum(seen[site].float() for site in parts)
        if (added - wrote).norm() > tolerance * (wrote.norm() + seen[before].float().norm()):
            return False
    return True
