"""Pairs of one form, so that a position means the same in all of them."""

from collections.abc import Sequence

from saepatch.data.pairs import PromptPair
from saepatch.model.language_model import LanguageModel


def largest_group(model: LanguageModel, pairs: Sequence[PromptPair], frames: Sequence[str]) -> list[PromptPair]:
    """The most pairs of one frame whose positions mean the same; `frames` says what each pair was made from.

    Tokens that every prompt of a frame holds are the frame's own; where these stand at the same positions in two
    prompts, so does what stands between them.
    """
    by_frame: dict[str, list[tuple[PromptPair, list[int], list[int]]]] = {}
    for frame, pair in zip(frames, pairs, strict=True):
        by_frame.setdefault(frame, []).append((pair, model.encode(pair.clean), model.encode(pair.corrupted)))
    groups: dict[tuple[object, ...], list[PromptPair]] = {}
    for frame, members in by_frame.items():
        own = set.intersection(*(set(ids) for _, *both in members for ids in both))
        for pair, *both in members:
            places = tuple(tuple((i, token) for i, token in enumerate(ids) if token in own) for ids in both)
            groups.setdefault((frame, len(both[0]), places), []).append(pair)
    return max(groups.values(), key=len)
