"""How the corrupted run of a pair comes about where it is not simply its corrupted prompt."""

from collections.abc import Sequence
from typing import Protocol, runtime_checkable

from saepatch.components import Component
from saepatch.models import LanguageModel
from saepatch.prompts import PairBatch
from saepatch.resume import Run


@runtime_checkable
class Corruption(Protocol):
    """Makes the corrupted run. `samples` runs are made of each pair, and effects are averaged over them.

    `at_component` says that what is corrupted is the component that is patched, so there can be only one.
    """

    @property
    def samples(self) -> int: ...
    @property
    def at_component(self) -> bool: ...
    def run(
        self, model: LanguageModel, batch: PairBatch, components: Sequence[Component], clean: Run, keep_cache: bool
    ) -> Run:
        """The corrupted run of a batch whose rows are the pairs, each as often as there are samples."""
        ...
