"""Positions of a sweep that hold tokens its dictionaries were not trained on: these are not patched."""

from collections.abc import Sequence

from jaxtyping import Bool
from torch import Tensor

from saepatch.data.batches import PairBatch
from saepatch.engine.components import Component, ErrorTerm, LatentUnits
from saepatch.errors import UserError
from saepatch.model.inputs.tokens import without_tokens
from saepatch.model.language_model import LanguageModel
from saepatch.model.positions import Positions


def known_where(model: LanguageModel, component: Component, part: PairBatch) -> Bool[Tensor, "batch pos"]:
    """Where a component may be patched: at the chosen positions whose tokens, in both prompts, its dictionary knows."""
    assert part.where is not None
    where = part.where
    if isinstance(component, LatentUnits | ErrorTerm):
        excluded = component.dictionary.excluded_tokens(model)
        for tokens in (part.clean, part.corrupted):
            where = without_tokens(tokens.input_ids, where, excluded)
    return where


def check_known(model: LanguageModel, components: Sequence[Component], whole: PairBatch, positions: Positions) -> None:
    """See that the positions of a sweep are those that its dictionaries know, or say that some are left out.

    Raises:
        UserError: a position that is named in particular holds a token that a dictionary was not trained on, or all
            positions do.
    """
    assert whole.where is not None
    for component in components:
        if isinstance(component, LatentUnits | ErrorTerm):
            for tokens in (whole.clean, whole.corrupted):
                component.dictionary.editable(model, tokens.input_ids, whole.where, positions)
            if not bool(known_where(model, component, whole).any()):
                raise UserError(
                    f"positions {positions!r} select only tokens that dictionary {component.dictionary.name} was not "
                    "trained on: choose others, or load it with every_position=True (--every_position)"
                )
