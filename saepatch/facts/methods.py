"""Methods that edit facts, as frozen values: ROME, MEMIT, EMMET, AlphaEdit. `edit_facts` makes a `Delta` with one."""

import logging
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

from jaxtyping import Float
from torch import Tensor

from saepatch.data.edit_requests import EditRequest
from saepatch.engine.passes.kept_run import Checked
from saepatch.errors import UserError
from saepatch.facts.contexts import Contexts, FactToken, Sampled
from saepatch.facts.covariances import NULL, Covariances
from saepatch.facts.delta import Delta, WeightChange, applied
from saepatch.facts.projections import for_stream, projection
from saepatch.facts.updates import Left, Right, alphaedit_update, emmet_update, memit_update, rome_update
from saepatch.facts.values import Place, Values, ValueSearch, find_values, warn_of_spaces
from saepatch.model.hooks import is_spliced
from saepatch.model.language_model import LanguageModel
from saepatch.model.sites import Site

log = logging.getLogger(__name__)

SPREAD = ValueSearch(clamp=0.75)  # of methods that edit the residual stream


@dataclass(frozen=True, eq=False)
class Editing:
    """What a method's update needs: the facts' contexts and values, covariances, and the keys of earlier edits."""

    contexts: Contexts
    values: Values
    covariances: Covariances
    after: Delta

    @property
    def model(self) -> LanguageModel:
        return self.contexts.model

    def earlier(self, layer: int, keys: Right) -> Float[Tensor, "keys earlier"]:
        """Keys of the facts that were edited before at this layer."""
        change = self.after.at(layer)
        return keys[:, :0] if change is None else change.keys.to(keys.device)


@runtime_checkable
class EditMethod(Protocol):
    """How requests become changes of weights."""

    @property
    def name(self) -> str: ...
    @property
    def layers(self) -> Sequence[int]:
        """The edited layers, in order."""
        ...

    @property
    def one_by_one(self) -> bool:
        """Whether several requests are edited one after another, rather than in one update."""
        ...

    @property
    def prefixes(self) -> Sampled: ...
    @property
    def token(self) -> FactToken: ...
    @property
    def search(self) -> ValueSearch: ...
    def place(self, model: LanguageModel) -> Place:
        """Where values are searched."""
        ...

    def changes(self, editing: Editing) -> list[WeightChange]:
        """The changes that write the values."""
        ...


@dataclass(frozen=True)
class Rome:
    """Rank-one edits of one MLP projection, one fact at a time.

    With `original`, the inverse covariance is applied to the mean key over prefixes and all else is taken in the bare
    prompt, as in the first published code. There, an edit may be scaled up so far that it ruins the model; by default
    the mean key is used throughout (r-ROME).

    Source: Meng et al. 2022 (https://arxiv.org/abs/2202.05262); Gupta et al. 2024, "Rebuilding ROME"
    (https://arxiv.org/abs/2403.07175).
    """

    layer: int
    original: bool = False
    prefixes: Sampled = field(default_factory=lambda: Sampled(((5, 10), (10, 10)), apart=False))
    search: ValueSearch = field(default_factory=ValueSearch)
    token: FactToken = "subject"

    @property
    def name(self) -> str:
        return "rome-original" if self.original else "rome"

    @property
    def layers(self) -> tuple[int, ...]:
        return (self.layer,)

    @property
    def one_by_one(self) -> bool:
        return True

    def place(self, model: LanguageModel) -> Place:
        return projection(model, self.layer)

    def changes(self, editing: Editing) -> list[WeightChange]:
        states = editing.contexts.states(Site(self.layer, "neurons"))
        mean = editing.contexts.mean(states)[0]
        solved = editing.covariances.solve(self.layer, mean[:, None])[:, 0]
        key = states[0, 0] if self.original else mean
        # v* is δ more than the projection makes of the key, so the gap v* - (Wk + b) is δ for either key
        left, right = rome_update(editing.values.delta[0], key, solved)
        return [WeightChange(self.layer, left, right, key[:, None])]


class _Spread(ABC):
    """Base of methods that edit several facts in one update and share it out over layers."""

    layers: tuple[int, ...]

    @property
    def one_by_one(self) -> bool:
        return False

    def place(self, model: LanguageModel) -> Place:
        site = Site(self.layers[-1])
        model.layout.module(site)  # raises where there is no such layer
        return site

    def changes(self, editing: Editing) -> list[WeightChange]:
        """Write the values layer by layer: each takes its share of what is still missing at the last layer."""
        model, contexts, last = editing.model, editing.contexts, Site(self.layers[-1])
        target = contexts.states(last, bare=True)[:, 0] + editing.values.delta
        changes: list[WeightChange] = []
        for number, layer in enumerate(self.layers):
            with applied(model, changes):
                states = contexts.states(Site(layer, "neurons"))
                missing = target - contexts.states(last, bare=True)[:, 0]
                share = missing / (len(self.layers) - number)
                residuals = for_stream(model, projection(model, layer), states[:, 0], share)
            keys = contexts.mean(states).T
            changes.append(WeightChange(layer, *self.update(editing, layer, residuals.T, keys), keys))
        return changes

    @abstractmethod
    def update(self, editing: Editing, layer: int, residuals: Left, keys: Right) -> tuple[Left, Right]:
        """The factors of one layer's change."""


@dataclass(frozen=True)
class Memit(_Spread):
    """Many facts in one update, spread over several layers; the residual is measured anew after each.

    `weight` is λ, how much the reference text counts against the facts.

    Source: Meng et al. 2023 (https://arxiv.org/abs/2210.07229).
    """

    layers: tuple[int, ...]
    weight: float = 15000.0
    prefixes: Sampled = field(default_factory=Sampled)
    search: ValueSearch = SPREAD
    token: FactToken = "subject"

    def __post_init__(self) -> None:
        _check_layers(self.layers)
        _check_weight(self.weight)

    @property
    def name(self) -> str:
        return "memit"

    def update(self, editing: Editing, layer: int, residuals: Left, keys: Right) -> tuple[Left, Right]:
        return memit_update(residuals, keys, editing.covariances.solve(layer, keys), self.weight)


@dataclass(frozen=True)
class Emmet(_Spread):
    """As `Memit`, with facts met exactly instead of in a least-squares sense: ROME for several facts at once.

    Source: Gupta et al. 2024, "A Unified Framework for Model Editing" (https://arxiv.org/abs/2403.14236).
    """

    layers: tuple[int, ...]
    prefixes: Sampled = field(default_factory=Sampled)
    search: ValueSearch = SPREAD
    token: FactToken = "subject"

    def __post_init__(self) -> None:
        _check_layers(self.layers)

    @property
    def name(self) -> str:
        return "emmet"

    def update(self, editing: Editing, layer: int, residuals: Left, keys: Right) -> tuple[Left, Right]:
        return emmet_update(residuals, keys, editing.covariances.solve(layer, keys))


@dataclass(frozen=True)
class AlphaEdit(_Spread):
    """As `Memit`, with the change projected onto the null space of C, and the keys of earlier edits preserved.

    `threshold` bounds the eigenvalues of C that span the null space; `weight` is λ.

    Source: Fang et al. 2025 (https://arxiv.org/abs/2410.02355).
    """

    layers: tuple[int, ...]
    threshold: float = NULL
    weight: float = 10.0
    prefixes: Sampled = field(default_factory=Sampled)
    search: ValueSearch = SPREAD
    token: FactToken = "subject"

    def __post_init__(self) -> None:
        _check_layers(self.layers)
        _check_weight(self.weight)
        if not self.threshold > 0:
            raise UserError(f"threshold = {self.threshold}: use a number above 0, such as 0.02")

    @property
    def name(self) -> str:
        return "alphaedit"

    def update(self, editing: Editing, layer: int, residuals: Left, keys: Right) -> tuple[Left, Right]:
        null = editing.covariances.null_space(layer, self.threshold)
        return alphaedit_update(residuals, keys, null, editing.earlier(layer, keys), self.weight)


def edit_facts(
    model: LanguageModel,
    requests: Sequence[EditRequest],
    method: EditMethod,
    covariances: Covariances,
    after: Delta | None = None,
    checked: Checked | None = None,
) -> Delta:
    """Edit requests together, on top of an earlier delta: one update, or (ROME) one after another.

    The model is the unedited one, and so is the model of the returned delta, which includes `after`. Weights are as
    before when this returns. `checked` is what earlier edits of the same model found of its passes: see `find_values`.

    Raises:
        UserError: no requests, a layer that does not exist or cannot be edited, covariances or a delta of other
            weights, or an answer or subject that has no tokens of its own.
    """
    delta = _checked(model, requests, method, covariances, after)
    warn_of_spaces(requests)
    checked = {} if checked is None else checked
    prefixes = method.prefixes.prefixes(model)  # of the unedited model, as in the original code
    for group in [[request] for request in requests] if method.one_by_one else [requests]:
        with applied(model, delta.changes):
            contexts = Contexts(model, group, prefixes, method.token)
            values = find_values(contexts, method.place(model), method.search, checked)
            changes = method.changes(Editing(contexts, values, covariances, delta))
        delta = delta.then(changes, [request.example or request.subject for request in group])
    model.note_restored(delta.model_hash)
    return delta


def edit_each(
    model: LanguageModel, requests: Sequence[EditRequest], method: EditMethod, covariances: Covariances
) -> list[Delta]:
    """A delta for every request, each alone on the unedited model; their values are searched in one batch.

    Raises:
        UserError: as `edit_facts`.
    """
    start = _checked(model, requests, method, covariances, None)
    warn_of_spaces(requests)
    contexts = Contexts(model, requests, method.prefixes.prefixes(model), method.token)
    values = find_values(contexts, method.place(model), method.search)
    deltas = []
    for number, request in enumerate(requests):
        editing = Editing(contexts.one(number), values.one(number), covariances, start)
        deltas.append(start.then(method.changes(editing), [request.example or request.subject]))
    model.note_restored(start.model_hash)
    return deltas


def _checked(
    model: LanguageModel,
    requests: Sequence[EditRequest],
    method: EditMethod,
    covariances: Covariances,
    after: Delta | None,
) -> Delta:
    if not requests:
        raise UserError("there are no requests: give at least one")
    if is_spliced(model.layout):
        raise UserError("weights are edited on the unedited model, but it is inside a splice: leave the splice first")
    for layer in method.layers:
        projection(model, layer)
    here = model.fingerprint
    for what, other in (
        ("covariances", covariances.model_hash),
        ("earlier delta", here if after is None else after.model_hash),
    ):
        if other != here:
            raise UserError(
                f"the {what} belong to weights {other}, but {model.name} has weights {here}: measure or edit this model"
            )
    return Delta.none(model, method.name) if after is None else after


def _check_layers(layers: Sequence[int]) -> None:
    if not layers or list(layers) != sorted(set(layers)) or min(layers) < 0:
        raise UserError(f"layers {list(layers)}: give at least one, each once, in rising order")


def _check_weight(weight: float) -> None:
    if not weight > 0:
        raise UserError(f"weight = {weight}: use a number above 0")
