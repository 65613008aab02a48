"""Clean/corrupted prompt pairs, and the aligned batches that patching runs on."""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from jaxtyping import Int
from torch import Tensor

from saepatch.errors import UserError
from saepatch.models import LanguageModel, Tokens


@dataclass(frozen=True)
class PromptPair:
    """Two prompts that differ where it matters: `answer` is right after `clean`, `counter` after `corrupted`.

    Answers are the text that follows the prompt, leading space included, one token each. `example` names the pair.
    """

    clean: str
    corrupted: str
    answer: str
    counter: str
    example: str = ""


@dataclass(frozen=True, eq=False)
class PairBatch:
    """Tokenised pairs: column c of `clean` and column c of `corrupted` line up."""

    pairs: tuple[PromptPair, ...]
    clean: Tokens
    corrupted: Tokens
    answer: Int[Tensor, "batch"]
    counter: Int[Tensor, "batch"]
    index: Int[Tensor, "batch"]  # each row's place in the list of pairs it was made from

    def __len__(self) -> int:
        return len(self.pairs)

    def rows(self, index: Sequence[int]) -> "PairBatch":
        """Some rows, in the given order; a row may appear several times."""
        rows = list(index)
        return PairBatch(
            tuple(self.pairs[i] for i in rows),
            self.clean.rows(rows),
            self.corrupted.rows(rows),
            self.answer[rows],
            self.counter[rows],
            self.index[rows],
        )


def batch_pairs(
    model: LanguageModel,
    pairs: Sequence[PromptPair],
    side: Literal["left", "right"] = "right",
    align: Literal["equal", "right"] = "equal",
) -> PairBatch:
    """Tokenise pairs into one batch.

    `align="equal"` wants both prompts of a pair to have the same number of tokens; `align="right"` lines unequal ones
    up from their last token (and pads on the left).

    Raises:
        UserError: no pairs, an empty prompt, unequal lengths (both token lists are shown), or an answer that is not
            one token after its prompt.
    """
    if not pairs:
        raise UserError("there are no prompt pairs: give at least one")
    if align == "right":
        side = "left"
    tokens = model.tokenize([p.clean for p in pairs] + [p.corrupted for p in pairs], side)
    both = [(model.encode(pair.clean), model.encode(pair.corrupted)) for pair in pairs]
    if align == "equal":
        for number, (pair, (clean, corrupted)) in enumerate(zip(pairs, both, strict=True)):
            if len(clean) != len(corrupted):
                name = pair.example or number
                raise UserError(
                    f"pair {name}: the clean prompt has {len(clean)} tokens, the corrupted one {len(corrupted)}: "
                    f"{_show(model, clean)} against {_show(model, corrupted)}: reword one, "
                    "or line them up from the right (align='right')"
                )
    answers = [_next_token(model, pair.clean, ids, pair.answer) for pair, (ids, _) in zip(pairs, both, strict=True)]
    counters = [_next_token(model, pair.clean, ids, pair.counter) for pair, (ids, _) in zip(pairs, both, strict=True)]
    n = len(pairs)
    return PairBatch(
        tuple(pairs),
        tokens.rows(slice(0, n)),
        tokens.rows(slice(n, 2 * n)),
        torch.tensor(answers, device=model.device),
        torch.tensor(counters, device=model.device),
        torch.arange(n, device=model.device),
    )


def _show(model: LanguageModel, ids: Sequence[int]) -> str:
    return "[" + "|".join(model.tokenizer.convert_ids_to_tokens(list(ids))) + "]"


def _next_token(model: LanguageModel, prompt: str, ids: Sequence[int], answer: str) -> int:
    # Tokenised after the prompt: on its own, " She" can come out otherwise than it does in running text.
    whole = model.encode(prompt + answer)
    if whole[: len(ids)] != list(ids) or len(whole) != len(ids) + 1:
        raise UserError(
            f"answer {answer!r} is not one token after {prompt[-30:]!r} ({_show(model, whole[len(ids) :])}): "
            "use a single token with its leading space, or its first token"
        )
    return whole[-1]


def same_length_batches(batch: PairBatch, size: int) -> Iterator[PairBatch]:
    """Split a batch so that each part needs little or no padding; rows of one length stay in order."""
    lengths = torch.maximum(batch.clean.lengths, batch.corrupted.lengths)
    for length in lengths.unique().tolist():
        rows = (lengths == length).nonzero().flatten().tolist()
        for start in range(0, len(rows), size):
            yield _trim(batch.rows(rows[start : start + size]))


def _trim(batch: PairBatch) -> PairBatch:
    """Drop the columns that are padding in every row."""
    used = (batch.clean.attention_mask | batch.corrupted.attention_mask).any(0).nonzero().flatten()
    keep = slice(int(used[0]), int(used[-1]) + 1)

    def cut(tokens: Tokens) -> Tokens:
        return Tokens(tokens.input_ids[:, keep], tokens.attention_mask[:, keep], tokens.ordinary[:, keep])

    return PairBatch(batch.pairs, cut(batch.clean), cut(batch.corrupted), batch.answer, batch.counter, batch.index)


def load_pairs(source: str, split: str = "report", n: int = 200, seed: int = 0) -> list[PromptPair]:
    """Pairs of one of the embedded model's tasks, or of a JSONL file with `clean, corrupted, answer, counter` fields.

    A file has no splits: its first `n` pairs are returned.

    Raises:
        UserError: an unknown task, a file that cannot be read, or a line that lacks a field.
    """
    if source.endswith((".jsonl", ".json")):
        return _read_jsonl(Path(source))[:n]
    from saepatch.organism import tasks

    if source not in tasks.TASKS:
        raise UserError(f"unknown task {source!r}: use one of {', '.join(tasks.TASKS)}, or a .jsonl file of pairs")
    return pairs_of(tasks.TASKS[source](split, n, seed))


def pairs_of(rows: Any) -> list[PromptPair]:
    """Pairs from any iterable of mappings with `clean, corrupted, answer, counter` (a `datasets.Dataset`, say)."""
    return [_pair(row, str(number)) for number, row in enumerate(rows)]


def _pair(row: Mapping[str, Any], where: str) -> PromptPair:
    if missing := [key for key in ("clean", "corrupted", "answer", "counter") if not isinstance(row.get(key), str)]:
        raise UserError(
            f"pair {where} lacks text for {', '.join(missing)}: each needs clean, corrupted, answer, counter"
        )
    return PromptPair(row["clean"], row["corrupted"], row["answer"], row["counter"], str(row.get("example", where)))


def _read_jsonl(path: Path) -> list[PromptPair]:
    try:
        lines = path.read_text(encoding="utf-8").splitlines()
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read pairs from {str(path)!r}: {error}") from error
    pairs = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
        except json.JSONDecodeError as error:
            raise UserError(f"{path}, line {number}, is not JSON: {error}") from error
        if not isinstance(row, dict):
            raise UserError(f"{path}, line {number}, is not a JSON object with clean, corrupted, answer, counter")
        pairs.append(_pair(row, f"{path}, line {number}"))
    return pairs
