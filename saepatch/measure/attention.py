"""Attribution of attention queries, keys and values, with the QK-fix of AtP* (Kramár et al. 2024).

A saturated softmax is flat, so first-order estimates for queries and keys vanish even where patching them would move
all of the attention. The QK-fix recomputes the attention probabilities exactly under the patched query or key, and
linearises from there: `(p_patched − p_base) · v · ∂m/∂z`.

Queries, keys and values are read through transformers' attention interface, as attention itself receives them: after
rotary embedding and their norms, before keys and values are repeated for grouped queries. A node is one head's query,
key or value at one position; with grouped queries, keys and values are numbered by key-value head. Its edit has the
site `z` of its layer, and the kind "query", "key" or "value".
"""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float
from numpy import ndarray
from torch import Tensor, nn
from typing_extensions import Unpack

from saepatch.data.batches import PairBatch, batch_pairs, own_positions, same_length_batches
from saepatch.data.pairs import PromptPair
from saepatch.engine.components import Edit
from saepatch.engine.gradients import Readout
from saepatch.engine.metrics import metric_name
from saepatch.engine.options import SweepKeywords, SweepOptions, with_keywords
from saepatch.engine.plan import column_of
from saepatch.engine.softmax import LEAST, additive_mask, attention_scores, refuse_unusual, repeated_heads
from saepatch.errors import UserError
from saepatch.measure.results.screen import Attribution
from saepatch.model.hooks import graph_through, is_spliced
from saepatch.model.language_model import LanguageModel, Tokens, refuse_training
from saepatch.model.replaced import attention_replaced
from saepatch.model.sites import Site
from saepatch.splicing.splice import choose_positions

PARTS = ("query", "key", "value")


def attribute_attention(
    model: LanguageModel,
    pairs: Sequence[PromptPair],
    qk_fix: bool = True,
    verify: int = 0,
    sample: int = 0,
    seed: int = 0,
    options: SweepOptions | None = None,
    **keywords: Unpack[SweepKeywords],
) -> Attribution:
    """Estimate the effect of patching every query, key and value of every attention head separately.

    Cost: two forward passes and one backward pass per batch. Queries and keys use the QK-fix, or (without `qk_fix`) the
    first-order estimate; values always use the latter. z is linear in v, but the metric is not linear in z: estimates
    for large differences of values (layer 0) are poor. In the organism, those estimates have a Pearson correlation of
    0.28 with exact effects, and near 1 when the differences are scaled down: so verify. Arguments are those of
    `saepatch.attribute`, without corruption.

    Raises:
        UserError: the model's attention does not use transformers' interface, or is not plain softmax attention (as
            with sinks or biases); the model is in training mode; or an option is unknown.
    """
    chosen = _without_corruption(with_keywords(options or SweepOptions(), keywords))
    clean, corrupted, layers = np.zeros(len(pairs)), np.zeros(len(pairs)), list[int]()
    scored: list[dict[str, ndarray]] = []
    whole = choose_positions(model, batch_pairs(model, pairs, align=chosen.align), chosen.positions)
    for part in same_length_batches(whole, chosen.batch_size or 16):
        tokens, others = (part.corrupted, part.clean) if chosen.denoises else (part.clean, part.corrupted)
        layers = layers or _checked_layers(model, tokens)
        readout = Readout.of(chosen.metric, part, model)
        source, metric_there = _run(model, others, readout)
        base, metric_here, gradients = _gradients(model, tokens, readout)
        ends = (metric_there, metric_here) if chosen.denoises else (metric_here, metric_there)
        index = part.index.cpu().numpy()
        clean[index], corrupted[index] = (end.detach().double().cpu().numpy() for end in ends)
        for number, layer in enumerate(layers):
            estimate = partial(_estimate, base[layer], source[layer], gradients[layer], qk_fix=qk_fix)
            place = partial(own_positions, tokens, align=chosen.align)
            scored += _scored(base[layer], source[layer], estimate, part, place, number)
    columns = {name: np.concatenate([entries[name] for entries in scored]) for name in scored[0]}
    result = Attribution(
        method="first order, QK-fix" if qk_fix else "first order",
        sites=tuple(Site(layer, "z") for layer in layers for _ in PARTS),
        kinds=PARTS * len(layers),
        examples=tuple(pair.example or str(number) for number, pair in enumerate(pairs)),
        clean=clean,
        corrupted=corrupted,
        pair=columns["pair"],
        site=columns["site"],
        unit=columns["unit"],
        position=columns["position"],
        score=columns["score"] if chosen.denoises else -columns["score"],
        **chosen.labels,
    )
    result.warn_if_flat("use another metric, or patch exactly")

    def exact(edits: list[tuple[int, Edit]]) -> Float[ndarray, "nodes"]:
        return patch_attention(model, pairs, edits, replace(chosen, batch_size=None))

    return result.verify(verify, sample, exact, seed) if verify or sample else result


def _without_corruption(options: SweepOptions) -> SweepOptions:
    if options.corruption is not None:
        raise UserError(f"{options.corruption}: attention is patched between a pair's prompts; leave corruption out")
    return options


def _scored(
    base: "_Seen",
    source: "_Seen",
    estimate: Callable[[str], Tensor],
    part: PairBatch,
    place: Callable[[Tensor, Tensor], Tensor],
    layer: int,
) -> Iterator[dict[str, ndarray]]:
    """Estimates for one layer's queries, keys and values that differ between the runs, as columns of a screen."""
    assert part.where is not None
    index = part.index.cpu().numpy()
    for offset, what in enumerate(PARTS):
        change, score = source.of(what) - base.of(what), estimate(what)
        row, head, column = (change.ne(0).any(-1) & part.where[:, None]).nonzero(as_tuple=True)
        entries = {"unit": head, "position": place(row, column), "score": score[row, head, column].double()}
        columns = {name: entry.cpu().numpy() for name, entry in entries.items()}
        yield columns | {"pair": index[row.cpu().numpy()], "site": np.full(len(row), len(PARTS) * layer + offset)}


@torch.no_grad()
def patch_attention(
    model: LanguageModel,
    pairs: Sequence[PromptPair],
    edits: Sequence[tuple[int, Edit]],
    options: SweepOptions | None = None,
    **keywords: Unpack[SweepKeywords],
) -> Float[ndarray, "edits"]:
    """The metric under edits of queries, keys or values, each of one pair (given by its index), run exactly.

    An edit names its layer (`Site(layer, "z")`), heads (`units`), `kind` and position; None: all chosen positions.

    Raises:
        UserError: there is no such pair, layer, head or position; otherwise as for `attribute_attention`.
    """
    chosen = _without_corruption(with_keywords(options or SweepOptions(), keywords))
    for pair, edit in edits:
        if not 0 <= pair < len(pairs):
            raise UserError(f"an edit of pair {pair}: use 0 to {len(pairs) - 1}")
        if edit.others:
            raise UserError(f"an edit at {edit.place}: patch queries, keys and values of one layer at a time")
    values, size = np.full(len(edits), np.nan), chosen.batch_size or 64
    layers: list[int] = []
    whole = choose_positions(model, batch_pairs(model, pairs, align=chosen.align), chosen.positions)
    for part in same_length_batches(whole, 64):
        place = {pair: row for row, pair in enumerate(part.index.tolist())}
        mine = [number for number, (pair, _) in enumerate(edits) if pair in place]
        if not mine:
            continue
        tokens, others = (part.corrupted, part.clean) if chosen.denoises else (part.clean, part.corrupted)
        layers = layers or _checked_layers(model, tokens)
        readout = Readout.of(chosen.metric, part, model)
        part = replace(part, clean_logits=readout.part.clean_logits)
        assert part.where is not None
        source, _ = _run(model, others, readout)
        for start in range(0, len(mine), size):
            some = mine[start : start + size]
            rows = [place[edits[number][0]] for number in some]
            edited = _Edited([edits[number][1] for number in some], rows, tokens, part.where, source)
            _, metric = _run(model, tokens.rows(rows), Readout.of(chosen.metric, part.rows(rows), model), edited)
            values[some] = metric.double().cpu().numpy()
    return values


@torch.no_grad()
def attention_patterns(model: LanguageModel, tokens: Tokens) -> dict[int, Float[Tensor, "batch heads pos pos"]]:
    """Attention probabilities by layer, from each position (third axis) to each (last axis), of the unedited model.

    Raises:
        UserError: the model's attention cannot be read, as for `attribute_attention`.
    """
    layers, attention = _checked_layers(model, tokens), _Attention(model)
    with attention_replaced(model.hf, attention):
        model.next_logits(tokens)
    return {layer: attention.seen[layer].probabilities for layer in layers}


@dataclass(frozen=True, eq=False)
class _Seen:
    """Inputs of one attention layer, and outputs of its heads before the output projection."""

    query: Float[Tensor, "batch heads pos width"]
    key: Float[Tensor, "batch kv pos width"]
    value: Float[Tensor, "batch kv pos vwidth"]
    z: Float[Tensor, "batch heads pos vwidth"]
    bias: Tensor | None  # the additive mask
    scaling: float
    softcap: float | None

    def of(self, what: str) -> Float[Tensor, "batch heads pos _"]:
        return {"query": self.query, "key": self.key, "value": self.value}[what]

    @property
    def probabilities(self) -> Float[Tensor, "batch heads pos pos"]:
        scores = attention_scores(self.query, self.key, self.bias, self.scaling, self.softcap)
        return scores.clamp(min=LEAST).softmax(-1, dtype=torch.float32)


class _Attention:
    """Softmax attention as computed by transformers' own functions, recording each layer's inputs."""

    def __init__(self, model: LanguageModel, edit: Callable[[int, str, Tensor], Tensor] | None = None) -> None:
        self.layers: dict[nn.Module, int] = {
            module: layer for layer, block in enumerate(model.layout.blocks) for module in block.modules()
        }
        self.seen: dict[int, _Seen] = {}
        self.edit = edit

    def __call__(
        self,
        module: nn.Module,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None,
        scaling: float | None = None,
        softcap: float | None = None,
        **options: Any,
    ) -> tuple[Tensor, None]:
        layer = self.layers.get(module, -1)
        refuse_unusual(module, options)
        if layer in self.seen or layer < 0:
            raise UserError(
                f"{type(module).__name__} computes attention with several attentions per block: patch heads' outputs "
                "instead"
            )
        if self.edit is not None:
            query, key, value = (self.edit(layer, what, x) for what, x in zip(PARTS, (query, key, value), strict=True))
        scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
        bias = additive_mask(module, query, key, attention_mask)
        scores = attention_scores(query, key, bias, scaling, softcap)
        z = scores.softmax(-1, dtype=torch.float32).to(value.dtype) @ repeated_heads(value, query.shape[1])
        self.seen[layer] = _Seen(query, key, value, z, bias, scaling, softcap)
        return z.transpose(1, 2).contiguous(), None


def _run(
    model: LanguageModel,
    tokens: Tokens,
    readout: Readout,
    edit: Callable[[int, str, Tensor], Tensor] | None = None,
    grad: bool = False,
) -> tuple[dict[int, _Seen], Float[Tensor, "batch"]]:
    """Inputs of every attention layer in one pass over prompts that end in the last column, and the metric."""
    attention = _Attention(model, edit)
    with torch.set_grad_enabled(grad), readout.running(model), attention_replaced(model.hf, attention):
        return attention.seen, readout(model.call(tokens, last=True)[:, -1])


def _gradients(
    model: LanguageModel, tokens: Tokens, readout: Readout
) -> tuple[dict[int, _Seen], Float[Tensor, "batch"], dict[int, dict[str, Tensor]]]:
    """The base run, its metric, and gradients at each layer's queries, keys, values and heads' outputs `z`."""
    with graph_through(model.layout, [Site(0, "resid_pre")]):
        seen, metric = _run(model, tokens, readout, grad=True)
    if not metric.requires_grad:
        raise UserError(f"{metric_name(readout.metric)} has no gradient: use a smooth metric, or patch exactly")
    leaves = {
        (layer, what): x
        for layer, inputs in seen.items()
        for what, x in (*((part, inputs.of(part)) for part in PARTS), ("z", inputs.z))
    }
    taken = torch.autograd.grad(metric.sum(), list(leaves.values()), allow_unused=True, materialize_grads=True)
    gradients: dict[int, dict[str, Tensor]] = {layer: {} for layer in seen}
    for (layer, what), gradient in zip(leaves, taken, strict=True):
        gradients[layer][what] = gradient
    return seen, metric, gradients


@torch.no_grad()
def _checked_layers(model: LanguageModel, tokens: Tokens) -> list[int]:
    """The layers whose attention can be replaced, after a check that the replacement gives the model's logits."""
    refuse_training(model)
    if is_spliced(model.layout):
        raise UserError("attention is patched in the unedited model, but it is inside a splice: leave the splice first")
    few = tokens.rows(slice(0, 1))
    plain = model.next_logits(few).float()
    attention = _Attention(model)
    with attention_replaced(model.hf, attention):
        ours = model.next_logits(few).float()
    if not attention.seen:
        raise UserError(
            f"the attention of {model.name!r} ({model.config.model_type}) does not use transformers' attention "
            "interface, so its queries and keys cannot be read: patch heads' outputs instead (patch_heads)"
        )
    gap, scale = float((ours - plain).abs().max()), max(1.0, float(plain.abs().max()))
    if not gap <= (1e-4 if model.dtype == torch.float32 else 5e-2) * scale:
        raise UserError(
            f"the attention of {model.name!r} is not a masked softmax of scaled dot products (logits differ by "
            f"{gap:.1e}): patch heads' outputs instead (patch_heads)"
        )
    return sorted(attention.seen)


@torch.no_grad()
def _estimate(
    base: _Seen, source: _Seen, gradients: Mapping[str, Tensor], what: str, qk_fix: bool
) -> Float[Tensor, "batch heads pos"]:
    if what == "value" or not qk_fix:
        wide = torch.promote_types(base.query.dtype, torch.float32)
        return ((source.of(what).to(wide) - base.of(what).to(wide)) * gradients[what].to(wide)).sum(-1)
    return (_query_fix if what == "query" else _key_fix)(base, source, gradients["z"])


def _precise(x: Tensor) -> Tensor:
    return x.float() if x.device.type == "mps" else x.double()  # mps has no float64


def _query_fix(
    base: _Seen, source: _Seen, gradient: Float[Tensor, "batch heads pos vwidth"]
) -> Float[Tensor, "batch heads pos"]:
    """`Σ_j (p'_j − p_j) v_j · g` for each query position, with p' the probabilities under the patched query."""
    key, along = _precise(base.key), _along(base, gradient)
    old, new = (
        attention_scores(_precise(q), key, base.bias, base.scaling, base.softcap).clamp(min=LEAST).softmax(-1)
        for q in (base.query, source.query)
    )
    return ((new - old) * along).sum(-1)


def _along(base: _Seen, gradient: Float[Tensor, "batch heads pos vwidth"]) -> Float[Tensor, "batch heads pos pos"]:
    """Derivative of the metric by the attention weight of query t (rows) on key j (columns): `v_j · g_t`."""
    return _precise(gradient) @ repeated_heads(_precise(base.value), gradient.shape[1]).transpose(-1, -2)


def _key_fix(
    base: _Seen, source: _Seen, gradient: Float[Tensor, "batch heads pos vwidth"]
) -> Float[Tensor, "batch kv pos"]:
    """The same for each key separately, which changes its own weight in the softmax of every later query.

    With o the log-sum-exp of all other scores and ȳ their weighted mean value, the key's weight is
    `a = sigmoid(score − o)`, and `z = a v + (1 − a) ȳ`: the change is `(a' − a)(v − ȳ)`. For each row's largest score,
    o and ȳ are computed directly, since subtracting the key from a sum it dominates would leave only rounding.
    """
    query, along = _precise(base.query), _along(base, gradient)
    old, new = (
        attention_scores(query, _precise(key), base.bias, base.scaling, base.softcap).clamp(min=LEAST)
        for key in (base.key, source.key)
    )
    largest, top = old.max(-1, keepdim=True)
    is_top = torch.zeros_like(old, dtype=torch.bool).scatter_(-1, top, True)
    weights = (old - largest).exp()
    total = weights.sum(-1, keepdim=True)
    without_top = old.masked_fill(is_top, LEAST)
    others = torch.where(is_top, without_top.logsumexp(-1, keepdim=True), largest + (total - weights).log())
    mean = (weights / total * along).sum(-1, keepdim=True)
    of_others = torch.where(
        is_top,
        (without_top.softmax(-1) * along).sum(-1, keepdim=True),
        (mean - weights / total * along) / (1 - weights / total),
    )
    change = (new - others).sigmoid() - (old - others).sigmoid()
    by_head = (change * (along - of_others)).sum(-2)
    return by_head.unflatten(1, (base.key.shape[1], -1)).sum(2)


class _Edited:
    """Writes a source run's queries, keys or values into rows of a batch, each row with its own edit."""

    def __init__(
        self,
        edits: Sequence[Edit],
        rows: Sequence[int],
        tokens: Tokens,
        where: Bool[Tensor, "batch pos"],
        source: Mapping[int, _Seen],
    ) -> None:
        self.source, self.rows = source, list(rows)
        self.masks: dict[tuple[int, str], Bool[Tensor, "edits heads pos"]] = {}
        for number, (edit, row) in enumerate(zip(edits, rows, strict=True)):
            layer = edit.site.layer
            if edit.kind not in PARTS or edit.site.stream != "z" or layer not in source:
                raise UserError(
                    f"an edit of {edit.kind} at {edit.site}: use {', '.join(PARTS)} at z of an attention layer"
                )
            heads = source[layer].of(edit.kind).shape[1]
            if not edit.units or not all(0 <= unit < heads for unit in edit.units):
                raise UserError(f"{edit.kind} of heads {edit.units} at layer {layer}: use 0 to {heads - 1}")
            columns = where[row].clone()
            if edit.position is not None:
                column = column_of(edit.position, int(tokens.lengths[row]), len(columns))
                columns &= torch.arange(len(columns), device=columns.device) == column
            blank = torch.zeros(len(rows), heads, len(columns), dtype=torch.bool, device=columns.device)
            self.masks.setdefault((layer, edit.kind), blank)[number, list(edit.units)] = columns

    def __call__(self, layer: int, what: str, x: Tensor) -> Tensor:
        mask = self.masks.get((layer, what))
        return x if mask is None else torch.where(mask[..., None], self.source[layer].of(what)[self.rows], x)
