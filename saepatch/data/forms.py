"""Pairs of one form, in which a position has the same meaning in every pair."""

from collections.abc import Sequence

from saepatch.data.pairs import PromptPair
from saepatch.model.language_model import LanguageModel
from saepatch.report import token_text


def largest_group(model: LanguageModel, pairs: Sequence[PromptPair], frames: Sequence[str]) -> list[PromptPair]:
    """The largest group of pairs from one frame whose positions correspond; `frames` names each pair's template.

    Tokens shared by all prompts of a frame belong to the frame; two prompts correspond where these tokens are at the
    same positions.
    """
    by_frame: dict[str, list[tuple[PromptPair, list[int], list[int]]]] = {}
    for frame, pair in zip(frames, pairs, strict=True):
        by_frame.setdefault(frame, []).append((pair, model.encode(pair.clean), model.encode(pair.corrupted)))
    groups: dict[tuple[object, ...], list[PromptPair]] = {}
    for frame, members in by_frame.items():
        own = set.intersection(*(set(ids) for _, *both in members for ids in both))
        for pair, *both in members:
            anchors = tuple(tuple((i, token) for i, token in enumerate(ids) if token in own) for ids in both)
            groups.setdefault((frame, len(both[0]), anchors), []).append(pair)
    return max(groups.values(), key=len)


def position_labels(model: LanguageModel, pairs: Sequence[PromptPair]) -> list[str]:
    """Label of each position: its number and token; where tokens differ by pair, the first pair's in brackets."""
    rows = [model.encode(text) for pair in pairs for text in (pair.clean, pair.corrupted)]
    labels = []
    for position, column in enumerate(zip(*rows, strict=True)):
        clean, corrupted = map(token_text, model.token_texts(column[:2]))
        shown = clean if clean == corrupted else f"{clean}/{corrupted}"
        labels.append(f"{position} {shown if len(set(column)) == 1 else f'[{shown}]'}")
    return labels
