"""Hierarchical sparse tracing: which blocks of a long prompt each head reads, in time O(T log T) and memory O(T)."""

import logging
from collections.abc import Collection
from dataclasses import dataclass, replace
from typing import TypedDict

import torch
from jaxtyping import Float
from torch import Tensor
from typing_extensions import Unpack

from saepatch.engine.options import with_keywords
from saepatch.engine.passes.pieces import next_logits_in_pieces
from saepatch.errors import UserError, reason_of
from saepatch.measure.long.masks import mask_rule
from saepatch.measure.long.sparse import SparseAttention
from saepatch.measure.long.traced import AgainstDense, AttentionTrace
from saepatch.model.hooks import is_spliced
from saepatch.model.language_model import LanguageModel, Tokens, refuse_training
from saepatch.model.replaced import attention_replaced

log = logging.getLogger(__name__)

COMPARED = 8192  # longest prompt, in tokens, on which the whole model runs too by default


@dataclass(frozen=True, kw_only=True)
class TraceOptions:
    """Options of `trace_attention`, which also accepts each as a keyword.

    Attributes:
        block: Positions of a block, of queries and of keys.
        measured: Number of query blocks, evenly spaced and besides the last, whose attention over the whole prompt is
            measured: the dropped mass, and recall. Time for each is linear in the prompt. None: every block, which
            makes the time quadratic (the memory stays linear).
        compare: Run the whole model too, in quadratic time, and compare next tokens; None: up to 8,192 tokens.
        answer, counter: Texts of one token each, whose logit difference is compared; None: the two tokens that the
            whole model finds likeliest.
        piece: Positions that run at a time, each piece on the keys and values of those before it.

    Raises:
        UserError: a number is below 1.
    """

    block: int = 64
    measured: int | None = 16
    compare: bool | None = None
    answer: str | None = None
    counter: str | None = None
    piece: int = 1024

    def __post_init__(self) -> None:
        for name in ("block", "piece"):
            if getattr(self, name) < 1:
                raise UserError(f"{name} = {getattr(self, name)}: use at least 1")
        if self.measured is not None and self.measured < 0:
            raise UserError(f"measured = {self.measured}: use 0 or more, or None for every block")


class TraceKeywords(TypedDict, total=False):
    """The options of `TraceOptions` as keywords."""

    block: int
    measured: int | None
    compare: bool | None
    answer: str | None
    counter: str | None
    piece: int


@torch.no_grad()
def trace_attention(
    model: LanguageModel,
    prompt: str | Tokens,
    k: int | None = 8,
    options: TraceOptions | None = None,
    **keywords: Unpack[TraceKeywords],
) -> AttentionTrace:
    """Run the model on one prompt with each head reading few blocks, and report what is lost and which blocks are read.

    For each head and each block of queries, a hierarchical search chooses `k` blocks of keys
    (`saepatch.measure.long.choosing`). The prompt's first block (the attention sink), the own block, the one before it
    and those that a sliding window's edge cuts are kept besides. The forward pass never holds a matrix of all
    positions: it goes through transformers' attention interface, and masks are rules of positions. Where `k` is at
    least the number of blocks, the pass equals the model's own up to rounding.

    That the next token is kept is weak evidence. The softmax mass that each query lost is therefore measured exactly,
    against the log-sum-exp over all keys, for the query blocks given by `measured`; and, where `compare` runs the whole
    model, the divergence of the next token's distribution and the change of the logit difference.

    Args:
        prompt: One text, or its tokens, without padding.
        k: Key blocks that are chosen for each head and query block. None: the least number that keeps the next token,
            by doubling and bisection, after a run of the whole model. More blocks need not keep it in general: the
            result holds what was tried.

    Raises:
        UserError: there are several prompts or padding, an option is invalid, the model is in training mode or inside
            a splice, or its attention cannot be replaced: it does not use transformers' interface, is not a softmax of
            scaled dot products (position biases), or is not causal within a window.
    """
    chosen = with_keywords(options or TraceOptions(), keywords)
    if k is not None and k < 1:
        raise UserError(f"k = {k}: use at least 1 block, or None for the least number that keeps the next token")
    refuse_training(model)
    if is_spliced(model.layout):
        raise UserError("attention is traced in the unedited model, but it is inside a splice: leave the splice first")
    tokens = model.tokenize([prompt]) if isinstance(prompt, str) else prompt
    if len(tokens) != 1 or tokens.padded:
        raise UserError(f"{len(tokens)} prompts, or padding: attention is traced in one prompt without padding")
    chosen = replace(chosen, piece=-(-chosen.piece // chosen.block) * chosen.block)  # blocks must not straddle pieces
    _check(model, tokens, chosen)
    compare = tokens.width <= COMPARED if chosen.compare is None else chosen.compare
    dense = next_logits_in_pieces(model, tokens, chosen.piece) if compare or k is None else None
    tried: dict[int, bool] = {}
    if k is None:
        assert dense is not None
        k, tried = _least(model, tokens, chosen, int(dense.argmax()))
    attention, logits = _sparse(model, tokens, k, chosen, _measured(tokens, chosen))
    against = None if dense is None else _against(model, prompt, tokens, logits, dense, chosen)
    return AttentionTrace(
        model=model.name,
        tokens=tuple(model.token_texts(tokens.input_ids[0].tolist())),
        block=chosen.block,
        k=k,
        chosen={layer: torch.cat(parts, 1) for layer, parts in sorted(attention.chosen.items())},
        exact={layer: tuple(parts) for layer, parts in sorted(attention.exact.items())},
        next_token=model.token_texts([int(logits.argmax())])[0],
        against=against,
        tried=tried,
    )


def _blocks(tokens: Tokens, options: TraceOptions) -> int:
    return -(-tokens.width // options.block)


def _measured(tokens: Tokens, options: TraceOptions) -> set[int]:
    """Numbers of the query blocks that are measured: the last, and some evenly spaced ones."""
    blocks = _blocks(tokens, options)
    if options.measured is None or options.measured >= blocks - 1:
        return set(range(blocks))
    return {*(number * (blocks - 1) // max(1, options.measured) for number in range(options.measured)), blocks - 1}


def _sparse(
    model: LanguageModel, tokens: Tokens, k: int, options: TraceOptions, measured: Collection[int]
) -> tuple[SparseAttention, Float[Tensor, "1 vocab"]]:
    attention = SparseAttention(model, min(k, _blocks(tokens, options)), options.block, measured)
    with attention_replaced(model.hf, attention, mask_rule):
        logits = next_logits_in_pieces(model, tokens, options.piece)
    return attention, logits


def _check(model: LanguageModel, tokens: Tokens, options: TraceOptions) -> None:
    """Compare a pass over the prompt's first blocks in which every block is kept with the model's own.

    Raises:
        UserError: no layer's attention was replaced, or the logits differ.
    """
    reason = ""
    few = tokens.columns(min(tokens.width, max(4 * options.block + 1, 128)))
    try:
        attention, ours = _sparse(model, few, few.width, options, ())
    except (TypeError, AttributeError, IndexError) as error:  # from code that computes with the mask itself
        attention, reason = None, f" ({reason_of(error)})"
    if attention is None or not attention.chosen:
        raise UserError(
            f"the attention of {model.name!r} ({model.config.model_type}) does not use transformers' attention "
            f"interface{reason}, so it cannot be traced: patch heads' outputs instead (patch_heads)"
        )
    plain = model.call(few, last=True)[:, -1].float()
    gap, scale = float((ours.float() - plain).abs().max()), max(1.0, float(plain.abs().max()))
    if not gap <= (1e-4 if model.dtype == torch.float32 else 5e-2) * scale:
        raise UserError(
            f"the attention of {model.name!r} is not a masked softmax of scaled dot products (logits differ by "
            f"{gap:.1e}), so it cannot be traced: patch heads' outputs instead (patch_heads)"
        )


def _least(model: LanguageModel, tokens: Tokens, options: TraceOptions, token: int) -> tuple[int, dict[int, bool]]:
    """The least k found that keeps the next token: by doubling, then by bisection between the last two."""
    blocks, tried = _blocks(tokens, options), dict[int, bool]()

    def keeps(k: int) -> bool:
        tried[k] = int(_sparse(model, tokens, k, options, ())[1].argmax()) == token
        log.info("k = %d: the next token is %s", k, "kept" if tried[k] else "lost")
        return tried[k]

    low, high = 0, 1
    while high < blocks and not keeps(high):
        low, high = high, 2 * high
    high = min(high, blocks)  # every block: the whole model
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if keeps(middle) else (middle, high)
    return high, tried


def _against(
    model: LanguageModel, prompt: str | Tokens, tokens: Tokens, traced: Tensor, dense: Tensor, options: TraceOptions
) -> AgainstDense:
    ours, whole = (x[0].double().cpu().log_softmax(-1) for x in (traced, dense))
    answer, counter = whole.topk(2).indices.tolist()
    given = [
        other if text is None else _token(model, prompt, tokens, text)
        for text, other in ((options.answer, answer), (options.counter, counter))
    ]
    answer, counter = given
    return AgainstDense(
        next_token=model.token_texts([int(whole.argmax())])[0],
        kept=int(whole.argmax()) == int(ours.argmax()),
        kl=float((whole.exp() * (whole - ours)).sum()),
        compared=tuple(model.token_texts([answer, counter])),  # type: ignore[arg-type]
        difference=float(whole[answer] - whole[counter]),
        difference_traced=float(ours[answer] - ours[counter]),
    )


def _token(model: LanguageModel, prompt: str | Tokens, tokens: Tokens, text: str) -> int:
    """The token that a text is after the prompt."""
    before = tokens.input_ids[0].tolist()
    after = model.encode(prompt + text)[len(before) :] if isinstance(prompt, str) else model.encode(text)
    after = [token for token in after if token != model.bos_id]
    if len(after) != 1:
        raise UserError(f"{text!r} is {len(after)} tokens after the prompt: give one token, with its leading space")
    return after[0]
