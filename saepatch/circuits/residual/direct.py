"""Direct logit attribution: what each part of the residual stream adds to a logit through the final norm alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from numpy import ndarray
from torch import Tensor

from saepatch.circuits.residual.attributed import DirectAttribution
from saepatch.circuits.residual.stream_parts import StreamPart, StreamParts, StreamRun
from saepatch.circuits.residual.unembedding import Unembedding, read_unembedding, tolerance_of
from saepatch.data.batches import batch_pairs
from saepatch.data.pairs import PromptPair
from saepatch.dictionaries.dictionary import Dictionary
from saepatch.dictionaries.transcoder import refuse_transcoder
from saepatch.errors import UserError
from saepatch.model.inputs.padding import by_length
from saepatch.model.language_model import LanguageModel, Tokens, refuse_training
from saepatch.model.positions import Positions
from saepatch.model.sites import Site
from saepatch.splicing.splice import whole_prompt

STREAMS = ("resid_pre", "resid_post")


@torch.no_grad()
def direct_attribution(
    model: LanguageModel,
    dictionaries: Dictionary | Sequence[Dictionary],
    prompts: Tokens | Sequence[str] | Sequence[PromptPair],
    targets: Sequence[Sequence[int]] | Int[Tensor, "prompts targets"] | None = None,
    counters: Sequence[Sequence[int]] | Int[Tensor, "prompts targets"] | None = None,
    positions: Positions = "last",
) -> DirectAttribution:
    """Attribute next-token logits to the parts of the residual stream (Elhage et al. 2021; nostalgebraist 2020).

    The final norm's scale keeps its value in the run, which makes the logit linear in the stream after the last block:
    `z_t = W_U[t] · (γ ⊙ P x / σ + β) + b_U[t]`, with the model's logit multiplier. Rows are the embeddings, what
    attention and MLP of every block write, β and b_U. A dictionary at attn_out or mlp_out replaces that row, and one in
    the residual stream all rows before it, by its active latents, `b_dec` and the error term; by the error term alone
    at BOS, padding and tokens that it was not trained on. Logits are those before a soft cap.

    Args:
        model: Any model whose blocks write sums of module outputs.
        dictionaries: At most one in the residual stream, and any at attn_out or mlp_out after it; may be empty.
        prompts: Texts, a tokenised batch, or prompt pairs, of which the clean prompts are read.
        targets: Token ids to attribute, as many for every prompt; None: each pair's answer.
        counters: Token ids whose logits are subtracted, aligned with `targets`; with pairs and no targets, each pair's
            counter-answer.
        positions: Positions whose next-token logits are attributed; by default the last of each prompt.

    Returns:
        Rows that sum to each logit, up to 1e-4 of the largest row (5e-2 in models narrower than float32).

    Raises:
        UserError: the model's logits are not such a sum, rows do not add up, dictionaries overlap, or targets do not
            fit the prompts or the vocabulary.
    """
    refuse_training(model)
    several = [dictionaries] if isinstance(dictionaries, Dictionary) else list(dictionaries)
    tokens, wanted, less = _read_targets(model, prompts, targets, counters)
    stream, replaced = _places(model, several)
    unembedding = read_unembedding(model)
    sums = _LogitSums(StreamParts.of(model), unembedding, stream, replaced)
    mask = _chosen(model, tokens, positions)
    groups = []
    for rows, columns, part in by_length(tokens):
        for start in range(0, len(rows), 32):
            some = rows[start : start + 32]
            where = mask[some, columns[start : start + 32]]
            if bool(where.any()):
                groups.append(sums.of(part.rows(slice(start, start + 32)), some[:, 0], where, wanted, less))
    return _joined(groups)


def _read_targets(
    model: LanguageModel, prompts: Any, targets: Any, counters: Any
) -> tuple[Tokens, Int[Tensor, "prompts targets"], Int[Tensor, "prompts targets"] | None]:
    if isinstance(prompts, Tokens):
        tokens = prompts
    elif len(prompts) and isinstance(prompts[0], PromptPair):
        batch = batch_pairs(model, prompts, align="right")
        tokens = model.tokenize([pair.clean for pair in prompts])
        if targets is None:
            targets = batch.answer[:, None]
            counters = batch.counter[:, None] if counters is None else counters
    else:
        tokens = model.tokenize(list(prompts))
    if targets is None:
        raise UserError("there are no targets: give token ids for every prompt, or prompt pairs with answers")
    wanted = _ids(model, targets, len(tokens), "targets")
    less = None if counters is None else _ids(model, counters, len(tokens), "counters")
    if less is not None and less.shape != wanted.shape:
        raise UserError(f"counters have shape {tuple(less.shape)}, targets {tuple(wanted.shape)}: give one per target")
    return tokens, wanted, less


def _ids(model: LanguageModel, given: Any, prompts: int, what: str) -> Int[Tensor, "prompts targets"]:
    try:
        ids = torch.as_tensor(given, device=model.device)
    except (ValueError, TypeError) as error:
        raise UserError(f"{what} are not as many token ids for every prompt: {error}") from error
    if ids.ndim != 2 or len(ids) != prompts or not ids.shape[1] or ids.is_floating_point():
        raise UserError(f"{what} have shape {tuple(ids.shape)}: give token ids [{prompts} prompts, targets]")
    if not bool(((ids >= 0) & (ids < model.vocabulary)).all()):
        raise UserError(f"{what} name a token outside the vocabulary, whose ids are 0 to {model.vocabulary - 1}")
    return ids


def _places(
    model: LanguageModel, dictionaries: Sequence[Dictionary]
) -> tuple[tuple[int, Dictionary] | None, dict[StreamPart, Dictionary]]:
    """The dictionary in the residual stream with the number of blocks before it, and those that replace a part."""
    stream: tuple[int, Dictionary] | None = None
    replaced: dict[StreamPart, Dictionary] = {}
    for dictionary in dictionaries:
        dictionary.check(model)
        site = dictionary.site
        refuse_transcoder(dictionary, "direct attributions")
        if site.stream in STREAMS:
            if stream is not None:
                raise UserError(
                    f"dictionaries at {stream[1].site} and {site} both describe the residual stream, so their latents "
                    "are not parts of one sum: attribute to one at a time"
                )
            stream = site.blocks_before, dictionary
        elif site.stream in ("attn_out", "mlp_out"):
            if StreamPart(site.stream, site.layer) in replaced:
                raise UserError(f"two dictionaries at {site}: give one")
            replaced[StreamPart(site.stream, site.layer)] = dictionary
        else:
            raise UserError(
                f"dictionary at {site}: its latents act on the stream through a projection; give dictionaries of the "
                "residual stream, attn_out or mlp_out"
            )
    for part, dictionary in replaced.items():
        if stream is not None and (part.layer or 0) < stream[0]:
            raise UserError(
                f"{dictionary.site} is a part of {stream[1].site}, whose latents replace it: leave one of them out"
            )
    return stream, replaced


def _chosen(model: LanguageModel, tokens: Tokens, positions: Positions) -> Bool[Tensor, "batch pos"]:
    whole = whole_prompt(model, tokens)
    mask = whole.select(positions)
    if not bool(mask.any()):
        raise UserError(f"positions {positions!r} select no token of these prompts: choose others")
    return mask


@dataclass(frozen=True, eq=False)
class _LogitSums:
    """Attributes the logits of batches of prompts of one length."""

    parts: StreamParts
    unembedding: Unembedding
    stream: tuple[int, Dictionary] | None
    replaced: dict[StreamPart, Dictionary]

    def of(
        self,
        tokens: Tokens,
        numbers: Int[Tensor, "rows"],
        where: Bool[Tensor, "rows pos"],
        targets: Int[Tensor, "prompts targets"],
        counters: Int[Tensor, "prompts targets"] | None,
    ) -> DirectAttribution:
        run, (row, column) = self.parts.run(tokens), where.nonzero(as_tuple=True)
        wanted = targets[numbers[row]]
        x, sides = run.streams[-1][row, column], [(1.0, wanted)]
        if counters is not None:
            sides.append((-1.0, counters[numbers[row]]))
        read, sigma = self.unembedding, self.unembedding.sigma(x)
        toward = torch.stack([sign * read.directions(sigma, ids) for sign, ids in sides]).sum(0)
        logits = [read.logits(x, ids) for _, ids in sides]
        emitted = [run.logits[row, column].double().gather(1, ids) for _, ids in sides]
        known = {d.site: d.known(self.parts.model, tokens).ordinary[row, column] for d in self._dictionaries}
        effects, entries = self._rows(run, row, column, known, toward)
        constants = zip(*([sign * some for some in read.constants(ids)] for sign, ids in sides), strict=True)
        for name, both in zip(("final norm bias", "unembedding bias"), constants, strict=True):
            effects[StreamPart(name)] = torch.stack(both).sum(0)
        slopes = [read.slope(some).cpu().numpy() for some in logits]
        result = DirectAttribution(
            prompt=numbers[row].cpu().numpy(),
            position=column.cpu().numpy(),
            target=wanted.cpu().numpy(),
            counter=None if counters is None else sides[1][1].cpu().numpy(),
            logit=_difference(logits),
            emitted=_difference(emitted),
            cap=read.cap,
            slope=slopes[0],
            counter_slope=slopes[1] if counters is not None else None,
            parts=tuple(effects),
            effect=torch.stack(list(effects.values()), 1).cpu().numpy(),
            sites=tuple(dictionary.site for dictionary in self._dictionaries),
            latents=torch.cat([some[0] for some in entries], 1).cpu().numpy(),
            activation=torch.cat([some[1] for some in entries]).cpu().numpy(),
            latent_effect=torch.cat([some[2] for some in entries]).cpu().numpy(),
        )
        self._check(result, _difference([read.capped(some) for some in logits]))
        return result

    @property
    def _dictionaries(self) -> list[Dictionary]:
        return [*([] if self.stream is None else [self.stream[1]]), *self.replaced.values()]

    def _rows(
        self,
        run: StreamRun,
        row: Int[Tensor, "positions"],
        column: Int[Tensor, "positions"],
        known: Mapping[Site, Bool[Tensor, "positions"]],
        toward: Float[Tensor, "positions targets d_model"],
    ) -> tuple[dict[StreamPart, Float[Tensor, "positions targets"]], list[tuple[Tensor, Tensor, Tensor]]]:
        """Effects of all parts, and of each dictionary's active latents: places, activations and effects."""
        effects: dict[StreamPart, Tensor] = {}
        none = torch.zeros(3, 0, dtype=torch.long, device=toward.device)
        entries = [(none, toward.new_zeros(0), toward.new_zeros(0, toward.shape[1]))]
        values: list[tuple[Dictionary, Tensor]] = []
        first = 0
        if self.stream is not None:
            first = self.stream[0]
            values.append((self.stream[1], run.streams[first]))
        for part, value in run.wrote.items():
            if self.stream is not None and (part.layer is None or part.layer < first):
                continue
            if part in self.replaced:
                values.append((self.replaced[part], value))
            else:
                effects[part] = _along(toward, value[row, column])
        for dictionary, value in values:
            more, active = _of_dictionary(dictionary, value[row, column], known[dictionary.site], toward)
            effects |= more
            active[0][1] = self._dictionaries.index(dictionary)
            entries.append(active)
        return effects, entries

    def _check(self, result: DirectAttribution, capped: Float[ndarray, "positions targets"]) -> None:
        """Raises UserError where rows do not add up to the logits, or these are not the model's."""
        tolerance = tolerance_of(self.parts.model.dtype)
        largest = np.maximum(np.abs(result.effect).max(1), np.abs(result.logit))
        np.maximum.at(largest, result.latents[0], np.abs(result.latent_effect))
        for off, what in (
            (result.total - result.logit, "the rows"),
            (capped - result.emitted, "final norm and unembedding"),
        ):
            gap = float((np.abs(off) / largest).max())
            if not gap <= tolerance:
                raise UserError(
                    f"{self.parts.model.name}: {what} give logits that differ from the model's by {gap:.1e} of the "
                    f"largest row (allowed: {tolerance:g}): its logits cannot be attributed directly"
                )


def _difference(both: Sequence[Float[Tensor, "positions targets"]]) -> Float[ndarray, "positions targets"]:
    return (both[0] - both[1] if len(both) > 1 else both[0]).cpu().numpy()


def _along(
    toward: Float[Tensor, "positions targets d_model"], value: Float[Tensor, "positions d_model"]
) -> Float[Tensor, "positions targets"]:
    return torch.einsum("ntd,nd->nt", toward, value.to(toward))


def _of_dictionary(
    dictionary: Dictionary,
    x: Float[Tensor, "positions d_model"],
    known: Bool[Tensor, "positions"],
    toward: Float[Tensor, "positions targets d_model"],
) -> tuple[dict[StreamPart, Float[Tensor, "positions targets"]], tuple[Tensor, Tensor, Tensor]]:
    """Effects of a dictionary's b_dec (with what its normalisation adds) and error term, and of its active latents."""
    latents = dictionary.encode(x[:, None])
    acts = latents.acts[:, 0].to(toward) * known[:, None]  # elsewhere the whole value is the error term
    at, latent = acts.nonzero(as_tuple=True)
    used, place = latent.unique(return_inverse=True)
    by_row = torch.einsum("ntd,kd->ntk", toward, latents.rows[used].to(toward))
    activation = acts[at, latent]
    written = activation if latents.scale is None else activation * latents.scale[at, 0, 0].to(toward)
    effect = written[:, None] * by_row[at, :, place]
    rebuilt = latents.reconstruction[:, 0].to(toward) * known[:, None]
    total = torch.zeros_like(toward[..., 0]).index_add_(0, at, effect)
    error = _along(toward, x.to(toward) - rebuilt)
    constant = _along(toward, rebuilt) - total
    places = torch.stack([at, torch.zeros_like(at), latent])
    parts = {StreamPart("b_dec", None, dictionary.site): constant, StreamPart("error", None, dictionary.site): error}
    return parts, (places, activation, effect)


def _joined(groups: Sequence[DirectAttribution]) -> DirectAttribution:
    """Groups as one result, in the order of the prompts."""
    first, starts = groups[0], np.cumsum([0, *(len(group.prompt) for group in groups)])
    order = np.lexsort(
        (np.concatenate([group.position for group in groups]), np.concatenate([group.prompt for group in groups]))
    )
    rank = np.argsort(order)

    def joined(name: str) -> Any:
        return np.concatenate([getattr(group, name) for group in groups])[order]

    latents = [
        np.stack([rank[group.latents[0] + start], group.latents[1], group.latents[2]])
        for group, start in zip(groups, starts, strict=False)
    ]
    by_position = ("prompt", "position", "target", "logit", "emitted", "slope", "effect")
    optional = {} if first.counter is None else {name: joined(name) for name in ("counter", "counter_slope")}
    return replace(
        first,
        **{name: joined(name) for name in by_position},
        **optional,
        latents=np.concatenate(latents, 1),
        activation=np.concatenate([group.activation for group in groups]),
        latent_effect=np.concatenate([group.latent_effect for group in groups]),
    )
