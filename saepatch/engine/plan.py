"""The plan of a batch's edits: which change something, their order, and how many run at a time."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Int
from torch import Tensor

from saepatch.engine.components import Changes
from saepatch.engine.metrics import Metric, bytes_per_logit
from saepatch.engine.passes.kept_run import KeptRun
from saepatch.errors import UserError
from saepatch.model.language_model import LanguageModel, Tokens

# Units at one position, or (None) at all chosen positions. An edit has one or several of these.
Units = tuple[Sequence[int], int | None]
CPU_MEMORY = 2**28  # limit in bytes for the activations of one batch of edits; larger batches are no faster


@dataclass(frozen=True, eq=False)
class EditPlan:
    """Edits in order of the first column they change; edit e makes the changes `entries[starts[e]:starts[e + 1]]`."""

    row: Int[Tensor, "edits"]
    group: Int[Tensor, "edits"]
    first: Int[Tensor, "edits"]
    starts: Int[Tensor, "bounds"]
    entries: Int[Tensor, "entries"]

    def __len__(self) -> int:
        return len(self.row)


def plan(
    changes: Changes, asked: Sequence[Sequence[Sequence[Units]] | None], tokens: Tokens, each_position: bool
) -> EditPlan:
    """Plan the edits of each row (None: every unit alone), leaving out edits that change nothing.

    Raises:
        UserError: a position is outside a prompt.
    """
    row, pos, unit = (t.cpu().numpy() for t in (changes.row, changes.pos, changes.unit))
    bounds = np.searchsorted(row, np.arange(len(asked) + 1))
    width = tokens.input_ids.shape[1]
    entries, groups = [], []
    member = np.zeros(int(unit.max()) + 1 if len(unit) else 1, dtype=bool)
    for number, (mine, length) in enumerate(zip(asked, tokens.lengths.tolist(), strict=True)):
        here = np.arange(bounds[number], bounds[number + 1])
        if mine is None:
            entries.append(here)
            groups.append(unit[here])
            continue
        for group, (units, position) in ((group, some) for group, parts in enumerate(mine) for some in parts):
            ids = np.array([u for u in units if u < len(member)], dtype=np.int64)
            member[ids] = True
            chosen = here[member[unit[here]]]
            member[ids] = False
            if position is not None:
                chosen = chosen[pos[chosen] == column_of(position, length, width)]
            entries.append(chosen)
            groups.append(np.full(len(chosen), group))
    entry = np.concatenate(entries) if entries else np.zeros(0, dtype=np.int64)
    number_of = np.concatenate(groups) if groups else np.zeros(0, dtype=np.int64)
    apart = pos[entry] if each_position else np.zeros(len(entry), dtype=np.int64)
    keys, inverse = np.unique(np.stack([row[entry], number_of, apart]), axis=1, return_inverse=True)
    edit, n = inverse.reshape(-1), keys.shape[1]
    first = np.full(n, np.iinfo(np.int64).max)
    np.minimum.at(first, edit, pos[entry])
    order = np.lexsort((keys[1], keys[0], first))
    place = np.empty(n, dtype=np.int64)
    place[order] = np.arange(n)
    sorted_entries = np.argsort(place[edit], kind="stable")
    starts = np.concatenate([[0], np.cumsum(np.bincount(place[edit], minlength=n))])
    return EditPlan(*(torch.from_numpy(np.ascontiguousarray(a, dtype=np.int64)) for a in (
        keys[0][order], keys[1][order], first[order], starts, entry[sorted_entries])))  # fmt: skip


def column_of(position: int, length: int, width: int) -> int:
    """The column of a position in a prompt that is padded on the left.

    Raises:
        UserError: the position is outside the prompt.
    """
    if not -length <= position < length:
        raise UserError(f"position {position} is out of range: the prompt has {length} tokens")
    return (width if position < 0 else width - length) + position


def batches(
    model: LanguageModel, base: KeptRun, planned: EditPlan, metric: Metric, batch_size: int | None, live: int = 0
) -> Iterator[slice]:
    """Split the edits, ordered by first column, into batches that each start at one column.

    An edit that starts later than its batch processes unneeded columns; it joins the batch if that costs less than
    another pass. `live` is the number of units that are read again in every edited run.
    """
    first = planned.first.tolist()
    (tokens, most), worth = _at_once(model, base.width, metric, live), _pass_worth(model)
    start = 0
    while start < len(first):
        columns = base.width - first[start]
        limit = batch_size or max(1, min(tokens // columns, most))
        end, wasted = start, 0
        while end < len(first) and end - start < limit:
            after = end
            while after < len(first) and first[after] == first[end]:
                after += 1
            wasted += (min(after, start + limit) - end) * (first[end] - first[start])
            if wasted > worth:
                break
            end = min(after, start + limit)
        yield slice(start, end)
        start = end


def _pass_worth(model: LanguageModel) -> int:
    """Fixed cost of a pass (reading weights, Python overhead), in tokens through a block."""
    if model.device.type != "cpu":
        return 4096
    block = sum(p.numel() for p in model.layout.blocks[0].parameters())
    return 10 + 10_000_000 // max(block, 1)


def _at_once(model: LanguageModel, width: int, metric: Metric, live: int) -> tuple[int, int]:
    """Maximum tokens and maximum edits per batch, so that a block's activations and scores, and logits, fit."""
    config = model.config.get_text_config()
    wide = getattr(config, "intermediate_size", None) or 4 * model.d_model
    memory = CPU_MEMORY
    if model.device.type == "cuda":
        memory = int(0.4 * torch.cuda.mem_get_info(model.device)[0])
    per_token = 4 * (4 * wide + 12 * model.d_model + 3 * getattr(config, "num_attention_heads", 1) * width) + 12 * live
    per_edit = 8 * model.d_model * width + bytes_per_logit(metric) * int(config.vocab_size)
    return memory // per_token, max(1, memory // per_edit)
