"""What attention heads do for an indirect object, by the criteria used for GPT-2 small (Wang et al. 2022).

A role is given only where 95 % intervals over prompts say so: of a head's total effect (patched, everything after it
reacts), of its direct effect on the logits, and of where it attends.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float

from saepatch.data.batches import batch_pairs, same_length_batches
from saepatch.data.pairs import PromptPair
from saepatch.engine.components import PATCH_DIRECTIONS
from saepatch.measure.attention import attention_patterns
from saepatch.model.language_model import LanguageModel, Tokens
from saepatch.model.positions import At
from saepatch.records.statistics import Interval, bootstrap_mean
from saepatch.splicing.splice import whole_prompt

from ...pairs.stages import Both
from .tasks import BATCH

LEAST = 0.02  # smallest effect of a head with a role, as a share of the gap
MOVER, NEGATIVE, INHIBITION, DUPLICATE = "name mover", "negative", "S-inhibition-like", "duplicate-token-like"
ROLES: Mapping[str, str] = {
    MOVER: "direct effect above 0; the last token attends more to the indirect object than to the repeated name",
    NEGATIVE: "direct effect below 0; the last token attends more to the indirect object than to the repeated name",
    INHIBITION: "total effect above 0, less than half of it direct; the last token attends more to the repeated name",
    DUPLICATE: "total effect above 0, less than half of it direct; the repeated name attends more to its first mention "
    "than to the indirect object",
}


@dataclass(frozen=True, eq=False)
class HeadAttention:
    """Attention of each head (all layers in order) in the clean prompts: from the last token to the indirect object and
    to the second mention of the repeated name (S2), and from S2 to its first mention and to the indirect object."""

    to_object: Float[np.ndarray, "pairs heads"]
    to_repeated: Float[np.ndarray, "pairs heads"]
    to_first: Float[np.ndarray, "pairs heads"]
    from_repeated_to_object: Float[np.ndarray, "pairs heads"]


@dataclass(frozen=True)
class HeadRole:
    """A head's figures; `role` is empty where none of the criteria hold."""

    layer: int
    head: int
    total: Interval
    noising: Interval
    direct: Interval
    object_over_repeated: Interval
    first_over_object: Interval
    role: str


def head_attention(model: LanguageModel, pairs: Sequence[PromptPair]) -> HeadAttention:
    """Read the attention between the names of pairs of the task `ioi`."""
    values: dict[int, list[Float[np.ndarray, heads]]] = {}
    for part in same_length_batches(batch_pairs(model, pairs), BATCH):
        layers = attention_patterns(model, part.clean)
        every = torch.cat([layers[layer] for layer in sorted(layers)], 1)  # [batch, all heads, pos, pos]
        for row, pair in enumerate(part.pairs):
            own = part.clean.rows([row])
            io, first, repeated = (
                _place(model, own, at) for at in (At(pair.answer, 0), At(pair.counter, 0), At(pair.counter, -1))
            )
            last = every.shape[-1] - 1
            ends = [(last, io), (last, repeated), (repeated, first), (repeated, io)]
            values[int(part.index[row])] = [every[row, :, a, b].cpu().numpy() for a, b in ends]
    return HeadAttention(*(np.stack([values[pair][i] for pair in range(len(pairs))]) for i in range(4)))


def _place(model: LanguageModel, tokens: Tokens, at: At) -> int:
    """Column of a name's last token."""
    return int(whole_prompt(model, tokens).select(at)[0].nonzero().max())


def head_roles(heads: Both, direct: Both, attention: HeadAttention) -> list[HeadRole]:
    """The role of every head."""
    roles = []
    for number, edit in enumerate(heads["denoise"].edits):
        object_over = bootstrap_mean(attention.to_object[:, number] - attention.to_repeated[:, number])
        first_over = bootstrap_mean(attention.to_first[:, number] - attention.from_repeated_to_object[:, number])
        total, noising = heads["denoise"].of(number), heads["noise"].of(number)
        own = direct["denoise"].of(number)
        role = role_of(total, own, object_over, first_over)
        roles.append(HeadRole(edit.site.layer, edit.units[0], total, noising, own, object_over, first_over, role))
    return roles


def role_of(total: Interval, direct: Interval, object_over_repeated: Interval, first_over_object: Interval) -> str:
    """The first role whose criteria hold (see `ROLES`); intervals that were withheld satisfy none."""
    if direct.value >= LEAST and direct.low > 0 and object_over_repeated.low > 0:
        return MOVER
    if direct.value <= -LEAST and direct.high < 0 and object_over_repeated.low > 0:
        return NEGATIVE
    indirect = total.value >= LEAST and total.low > 0 and abs(direct.value) < total.value / 2
    if indirect and object_over_repeated.high < 0:
        return INHIBITION
    return DUPLICATE if indirect and first_over_object.low > 0 else ""


def direction_gap(heads: Both, most: int = 10) -> Interval:
    """Denoising minus noising, summed over the `most` heads with the largest effect in the mean of both directions."""
    changes = [heads[d].change for d in PATCH_DIRECTIONS]
    top = np.argsort(-(changes[0] + changes[1]).mean(0), kind="stable")[:most]
    return heads["denoise"].ratio(changes[0][:, top].sum(1) - changes[1][:, top].sum(1))
