"""How rows of a loaded model may share a batch: how they may be padded, and whether their results stay the same."""

import logging
from dataclasses import replace
from functools import partial
from typing import Any

import torch
from torch import Tensor

from saepatch.model.greedy import greedy_options
from saepatch.model.inputs.padding import FAILURES, Padding, positions_of, probe_padded_steps, probe_padding
from saepatch.model.inputs.tokens import Tokens
from saepatch.model.language_model import LanguageModel

log = logging.getLogger(__name__)


def padding_of(model: LanguageModel) -> Padding:
    """How rows may be padded, probed in two forward passes and three on a cache (more where the first rule fails)."""
    inner = model.config.get_text_config()
    firsts = {int(pad) + 1 for pad in (getattr(inner, "pad_token_id", None),) if pad is not None}
    padding = probe_padding(
        lambda rule, tokens: replace(model, padding=rule).call(tokens), model.probe(), model.pad_id, firsts
    )
    if padding.left and not model.takes_cache:
        padding = replace(padding, cached=_generates_padded(replace(model, padding=padding)))
    elif padding.left:
        model, probe = replace(model, padding=padding), model.probe()
        steps = (1, 2) if model.step_limit is None else (1, 1, 1)
        call = partial(run_pass, model)
        padding = replace(padding, cached=probe_padded_steps(call, model.new_cache, probe, model.pad_id, steps))
    if not (padding.left and padding.right and padding.cached):
        log.info("padding changes the results of %r (safe: %s): prompts run grouped by length", model.name, padding)
    return padding


def _generates_padded(model: LanguageModel) -> bool:
    """Whether `generate`, without a cache, gives a row that is padded on the left the logits of the row alone."""
    probe, generate = model.probe(), getattr(model.hf, "generate", None)
    if generate is None:
        return True
    row = probe.input_ids[0].tolist()
    tokens, alone = model.pad([row, row + row[:3]], "left"), model.call(probe)[0, -1].float()
    options = greedy_options(model.hf, model.tokenizer) | {"return_dict_in_generate": True, "output_logits": True}
    options |= {"max_new_tokens": 1, "use_cache": False, "pad_token_id": model.pad_id}
    if model.padding.first:
        options["position_ids"] = positions_of(tokens, model.padding.first)
    try:
        out = generate(input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, **options)
    except FAILURES:
        return False
    tolerance = (1e-3 if model.dtype == torch.float32 else 5e-2) * float(alone.std())
    return float((out.logits[0][0].to(alone) - alone).abs().amax()) <= tolerance


@torch.no_grad()
def warn_of_shared_batches(model: LanguageModel) -> None:
    """Log a warning where a row's logits change with the rows beside it, as where quantisation scales a whole batch."""
    probe = model.probe()
    ids = probe.input_ids
    rows = torch.cat([ids, ids.flip(1), ids[:, -1:].expand_as(ids)])
    alone = model.call(probe)[0].float()
    beside = model.call(Tokens(rows, probe.attention_mask.expand_as(rows), probe.ordinary.expand_as(rows)))[0]
    change = float((beside.float() - alone).abs().amax() / alone.std())
    if change > (1e-3 if model.dtype == torch.float32 else 5e-2):
        log.warning(
            "results of %r depend on what else is in a batch: logits of one prompt change by up to %.2g of their "
            "standard deviation. Sweeps, attribution and circuits state their rounding; elsewhere, smaller differences "
            "say nothing", model.name, change,
        )  # fmt: skip


def run_pass(model: LanguageModel, tokens: Tokens, start: int, cache: Any) -> Tensor:
    """Logits of a pass, with positional arguments."""
    return model.call(tokens, start, cache=cache)
