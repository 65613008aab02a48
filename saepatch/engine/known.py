"""Positions of a sweep whose tokens its dictionaries were not trained on; these are not patched."""

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
    """Chosen positions at which a component may be patched: its dictionary was trained on both prompts' tokens."""
    assert part.where is not None
    where = part.where
    if isinstance(component, LatentUnits | ErrorTerm):
        excluded = component.dictionary.excluded_tokens(model)
        for tokens in (part.clean, part.corrupted):
            where = without_tokens(tokens.input_ids, where, excluded)
    return where


def check_known(model: LanguageModel, components: Sequence[Component], whole: PairBatch, positions: Positions) -> None:
    """Check a sweep's positions against the tokens that its dictionaries were trained on; logs those that are left out.

    Raises:
        UserError: an explicitly selected position holds a token that a dictionary was not trained on, or all
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
