"""The same edits in other libraries, each set up as its users would for speed.

Each function takes a case and returns a `Runner`. Set-up is not timed: conversion of weights and, where a library uses
them, the cached residual stream and the vectors that edits add to it.
"""

import copy
import tempfile
import warnings
from collections.abc import Callable, Sequence
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from saepatch.engine.metrics import logit_difference
from saepatch.measure.patching import patch_edits
from saepatch.model.language_model import LanguageModel

from .cases import Case

# Runs the case's edits with the given indices and returns the metric of each.
Runner = Callable[[Sequence[int]], list[float]]
Peer = Callable[[Case, int], Runner]
# Names of models whose configuration transformer_lens knows by name alone, by type and width.
OFFICIAL = {("gemma3_text", 640): "google/gemma-3-270m"}


def saepatch(case: Case, batch: int) -> Runner:
    """A whole sweep in saepatch, including its two base runs; it chooses its batches."""
    edits = case.edits

    def run(chosen: Sequence[int]) -> list[float]:
        wanted = [edits[i] for i in chosen]
        return patch_edits(
            case.subject.model, case.dictionary, [case.pair], wanted, direction="denoise", metric=logit_difference
        ).tolist()

    return run


def hooks(case: Case, batch: int) -> Runner:
    """Plain Hugging Face with a forward hook, one forward pass per edit; only the last position is unembedded."""
    return _hooked(case, 1)


def hooks_batched(case: Case, batch: int) -> Runner:
    """The plain batched loop: many edits per forward pass."""
    return _hooked(case, batch)


def _hooked(case: Case, batch: int) -> Runner:
    hf, block = case.subject.hf, case.subject.model.layout.blocks[case.layer - 1]

    def run(chosen: Sequence[int]) -> list[float]:
        values: list[float] = []
        for rows, positions, deltas in _batches(case, chosen, batch):

            def add(_module: Any, _args: Any, output: Any) -> Any:
                x = output[0] if isinstance(output, tuple) else output
                x[rows, positions] += deltas  # noqa: B023
                return output

            handle = block.register_forward_hook(add)
            ids = case.corrupted.expand(len(rows), -1)
            with torch.no_grad():
                values += case.metric(hf(ids, use_cache=False, logits_to_keep=1).logits[:, -1])
            handle.remove()
        return values

    return run


def transformer_lens(case: Case, batch: int) -> Runner:
    """Batches of edits from the cached residual stream on; only the last position is normalised and unembedded."""
    from transformer_lens import HookedTransformer

    model, name = hooked_transformer(HookedTransformer, case.subject.model), f"blocks.{case.layer}.hook_resid_pre"
    with torch.no_grad():
        _, cache = model.run_with_cache(case.corrupted, names_filter=name, stop_at_layer=case.layer + 1)
    resid, layers = cache[name], case.subject.size.layers

    def run(chosen: Sequence[int]) -> list[float]:
        values: list[float] = []
        for rows, positions, deltas in _batches(case, chosen, batch):
            x = resid.repeat(len(rows), 1, 1)
            x[rows, positions] += deltas
            with torch.no_grad():
                end = model(x, start_at_layer=case.layer, stop_at_layer=layers)
                values += case.metric(model.unembed(model.ln_final(end[:, -1:]))[:, 0])
        return values

    return run


def sae_lens(case: Case, batch: int) -> Runner:
    """The SAE with its error term and a hook that sets one latent, one forward pass per edit.

    As in its documentation, the forward pass unembeds every position.
    """
    from sae_lens import HookedSAETransformer

    model, sae = hooked_transformer(HookedSAETransformer, case.subject.model), case.subject.sae
    model.add_sae(sae, use_error_term=True)
    return _set_latent(case, model, f"blocks.{case.layer}.hook_resid_pre.hook_sae_acts_post")


def sae_lens_bridge(case: Case, batch: int) -> Runner:
    """The same through its bridge, which wraps the Hugging Face model, with eager attention."""
    from sae_lens.analysis.sae_transformer_bridge import SAETransformerBridge

    ours = case.subject.model
    hf, tokenizer = copy.deepcopy((case.subject.hf, ours.tokenizer))  # the bridge changes what it wraps
    hf.set_attn_implementation("eager")
    model = SAETransformerBridge.boot_transformers(ours.name, hf_model=hf, tokenizer=tokenizer)
    model.add_sae(case.subject.sae, use_error_term=True)
    return _set_latent(case, model, model.get_sae_hook_name(case.subject.sae))


def _set_latent(case: Case, model: Any, point: str) -> Runner:
    """One forward pass per edit, with a hook that sets one latent."""

    def run(chosen: Sequence[int]) -> list[float]:
        values: list[float] = []
        for i in chosen:

            def patch(acts: Tensor, hook: Any) -> Tensor:
                acts[:, case.positions[i], case.latents[i]] = case.new[i]  # noqa: B023
                return acts

            with torch.no_grad():
                values += case.metric(model.run_with_hooks(case.corrupted, fwd_hooks=[(point, patch)])[:, -1])
        return values

    return run


def nnsight(case: Case, batch: int) -> Runner:
    """One trace per edit; only the last position is unembedded."""
    return _traced(case, 1)


def nnsight_batched(case: Case, batch: int) -> Runner:
    """Many edits per trace, one per row."""
    return _traced(case, batch)


def _traced(case: Case, batch: int) -> Runner:
    import nnsight as library

    # A copy, since the wrapped model keeps hooks, which would slow the other variants.
    model = library.NNsight(copy.deepcopy(case.subject.hf))
    blocks = model.transformer.h if case.subject.shape == "gpt2" else model.model.layers
    block = blocks[case.layer - 1]

    def run(chosen: Sequence[int]) -> list[float]:
        values: list[float] = []
        for rows, positions, deltas in _batches(case, chosen, batch):
            ids = case.corrupted.expand(len(rows), -1)
            with torch.no_grad(), model.trace(ids, use_cache=False, logits_to_keep=1):
                block.output[rows, positions] += deltas
                logits = library.save(model.output.logits)
            values += case.metric(logits[:, -1])
        return values

    return run


def _batches(case: Case, chosen: Sequence[int], batch: int) -> list[tuple[Tensor, Tensor, Tensor]]:
    """Rows, positions and deltas of the edits, `batch` edits at a time."""
    parts = [torch.tensor(chosen[i : i + batch], device=case.deltas.device) for i in range(0, len(chosen), batch)]
    return [(torch.arange(len(part), device=part.device), case.positions[part], case.deltas[part]) for part in parts]


def hooked_transformer(kind: Any, ours: LanguageModel) -> Any:
    """A transformer_lens model with the Hugging Face model's weights, converted by its own loader without folding."""
    from transformer_lens import loading_from_pretrained as loading

    hf: Any = ours.hf
    official = OFFICIAL.get((hf.config.model_type, hf.config.hidden_size))
    with tempfile.TemporaryDirectory(prefix="shape-") as folder, warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # the class is removed in their version 4
        hf.config.save_pretrained(folder)
        cfg = loading.get_pretrained_model_config(official or folder, hf_cfg=hf.config.to_dict(), device=ours.device)
        cfg.tokenizer_name = None
        weights = loading.get_pretrained_state_dict(official or folder, cfg, hf)
        model = kind(cfg)
    model.load_and_process_state_dict(
        weights, fold_ln=False, center_writing_weights=False, center_unembed=False, fold_value_biases=False
    )
    return model.eval().requires_grad_(False)


def bare_passes(case: Case) -> Callable[[], object]:
    """The passes that attribution needs: two forward passes, and one backward pass from the metric to the site."""
    hf, block = case.subject.hf, case.subject.model.layout.blocks[case.layer - 1]

    def run() -> Tensor:
        with torch.no_grad():
            hf(case.clean, use_cache=False, logits_to_keep=1)
        leaves: list[Tensor] = []

        def cut(_module: Any, _args: Any, output: Any) -> Any:
            x = output[0] if isinstance(output, tuple) else output
            leaves.append(x.detach().requires_grad_())
            return (leaves[0], *output[1:]) if isinstance(output, tuple) else leaves[0]

        handle = block.register_forward_hook(cut)
        logits = hf(case.corrupted, use_cache=False, logits_to_keep=1).logits[0, -1]
        handle.remove()
        return torch.autograd.grad(logits[case.answer] - logits[case.counter], leaves[0])[0]

    return run


PEERS: dict[str, Peer] = {
    "sae_lens": sae_lens,
    "sae_lens_bridge": sae_lens_bridge,
    "transformer_lens": transformer_lens,
    "nnsight": nnsight,
    "nnsight_batched": nnsight_batched,
    "hooks": hooks,
}
ON_GPU: dict[str, Peer] = {"hooks_batched": hooks_batched}
OURS = "saepatch"


def missing(peer: str) -> str | None:
    """The reason why a library cannot be run; None if it can."""
    library = peer.removesuffix("_batched").removesuffix("_bridge")
    if library != "hooks" and find_spec(library) is None:
        return f"{library} is not installed"
    return None
