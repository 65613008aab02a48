"""The search for a value: the vector which, written at one token, makes the model state the new fact."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saepatch.data.edit_requests import EditRequest
from saepatch.engine.passes.kept_run import ON_CACHE, WAYS, Checked, KeptRun
from saepatch.errors import UserError
from saepatch.facts.contexts import Contexts, answer_ids
from saepatch.facts.projections import Projection
from saepatch.model.hooks import edit_sites
from saepatch.model.language_model import refuse_training
from saepatch.model.replaced import forwards_replaced, skip_blocks
from saepatch.model.sites import Site

log = logging.getLogger(__name__)

ESSENCE = "{} is a"  # the prompt at which the model's predictions are kept
CELLS = 2**26  # logits held for one batch of facts
COLUMNS = {"cpu": 512}  # run in one pass, by device: larger batches leave a processor's caches
COLUMNS_ELSEWHERE = 2**14
BETAS, EPSILON = (0.9, 0.999), 1e-8  # of Adam


@dataclass(frozen=True)
class ValueSearch:
    """Settings of the search: Adam on δ, for each fact on its own.

    Loss: mean over prefixes of the new answer's negative log-likelihood a token, + `kl` · KL(edited ‖ unedited) at
    "{subject} is a", + `decay` · ‖δ‖/‖v‖², v being what δ is added to in the bare prompt. Of `steps` evaluations, the
    last takes no step; a fact whose loss is below `stop` ends. After each step ‖δ‖ ≤ `clamp` · ‖v‖.

    Source: the code of Meng et al. 2022 and 2023 (`compute_v`, `compute_z`).
    """

    clamp: float = 4.0
    lr: float = 0.5
    steps: int = 20
    stop: float = 0.05
    kl: float = 0.0625
    decay: float = 0.5

    def __post_init__(self) -> None:
        if min(self.clamp, self.lr) <= 0 or self.steps < 1 or min(self.kl, self.decay) < 0:
            raise UserError(
                f"clamp = {self.clamp}, lr = {self.lr}, steps = {self.steps}, kl = {self.kl}, decay = {self.decay}: "
                "use numbers above 0, at least 1 step, and no negative weight"
            )


@dataclass(frozen=True, eq=False)
class Values:
    """δ of each fact in float64, its last loss, and the number of evaluations."""

    delta: Float[Tensor, "facts width"]
    loss: Float[Tensor, "facts"]
    steps: Int[Tensor, "facts"]

    def one(self, number: int) -> "Values":
        return Values(*(value[number : number + 1] for value in (self.delta, self.loss, self.steps)))


Place = Projection | Site
"""Where δ is added: to an MLP projection's output (ROME), or to a residual stream (MEMIT)."""


def find_values(contexts: Contexts, place: Place, search: ValueSearch, checked: Checked | None = None) -> Values:
    """Search the values of all facts, in batches of facts whose passes have about the same length.

    Only the blocks from the edited one on are run, and only the columns from the first edited token on: all else is
    what it was in one pass before. A model for which such passes do not agree with whole ones runs whole ones.

    Args:
        contexts: Prompts of the facts.
        place: Where δ is added.
        search: Settings.
        checked: Which passes agree, as found by searches in the same model before; extended.

    Raises:
        UserError: an answer does not begin with a token of its own, or a loss is not finite.
    """
    refuse_training(contexts.model)
    checked = {} if checked is None else checked
    numbers: list[int] = []
    parts = []
    for batch in _batches(contexts):
        part = replace(contexts, requests=[contexts.requests[number] for number in batch])
        parts.append(_ValueBatch(part, place, search, checked).run())
        numbers += batch
    back = torch.tensor(numbers).argsort()
    joined = (torch.cat([getattr(part, name) for part in parts]) for name in ("delta", "loss", "steps"))
    return Values(*(value[back.to(value.device)] for value in joined))


def _batches(contexts: Contexts) -> Iterator[list[int]]:
    """Numbers of the facts of each batch: by the number of columns from the edited token on."""
    model, each = contexts.model, len(contexts.prefixes.texts)
    rows, last = contexts.rows, contexts.last
    answers = [len(answer_ids(model, request.text, request.target)) for request in contexts.requests]
    after = [
        max(len(rows[row]) - last[row] for row in range(fact * each, (fact + 1) * each)) + answers[fact] - 1
        for fact in range(len(answers))
    ]
    budget = COLUMNS.get(model.device.type, COLUMNS_ELSEWHERE)
    most = max(1, CELLS // ((each + 1) * max(answers) * model.vocabulary))
    batch: list[int] = []
    for fact in sorted(range(len(after)), key=lambda fact: (after[fact], fact)):
        if batch and (len(batch) == most or (len(batch) + 1) * (each + 1) * after[fact] > budget):
            yield batch
            batch = []
        batch.append(fact)
    yield batch


class _ValueBatch:
    """One batch of facts: rows of every fact (prefixes, then the essence prompt), padded on the left."""

    def __init__(self, contexts: Contexts, place: Place, search: ValueSearch, checked: Checked) -> None:
        self.model, self.place, self.search, self.checked = contexts.model, place, search, checked
        self.facts, self.each = len(contexts.requests), len(contexts.prefixes.texts) + 1
        self.targets = [answer_ids(self.model, request.text, request.target) for request in contexts.requests]
        self.most = max(map(len, self.targets))
        ids, last = self._rows(contexts)
        self.groups = self._groups(ids, last)

    def _rows(self, contexts: Contexts) -> tuple[list[list[int]], list[int]]:
        """Token ids of all rows, answers without their last token included, and each edited position."""
        ids, last = [], []
        rows, places = contexts.rows, contexts.last
        for number, request in enumerate(contexts.requests):
            for prefix in range(self.each - 1):
                row = number * (self.each - 1) + prefix
                ids.append(rows[row] + self.targets[number][:-1])
                last.append(places[row])
            essence, position = contexts.located("", ESSENCE, request.subject)
            ids.append(essence)
            last.append(position)
        return ids, last

    def _groups(self, ids: list[list[int]], last: list[int]) -> list["_ResumedRows"]:
        """One group of rows where left padding leaves the model's results unchanged, else one per length."""
        lengths = [len(row) for row in ids]
        together = [list(range(len(ids)))]
        if not self.model.padding.left:
            together = [[row for row, n in enumerate(lengths) if n == length] for length in sorted(set(lengths))]
        groups = []
        for rows in together:
            tokens = self.model.pad([ids[row] for row in rows], side="left")
            at = [tokens.width - lengths[row] + last[row] for row in rows]
            base = KeptRun(self.model, tokens, _read(self.place))
            base.checked = self.checked
            groups.append(_ResumedRows(base, self.place, rows, at, min(self.most, tokens.width)))
        return groups

    def run(self) -> Values:
        start = self._first()
        delta = torch.zeros_like(start)
        moments = [torch.zeros_like(start), torch.zeros_like(start)]
        norm = start.norm(dim=1, keepdim=True)
        loss = torch.full((self.facts,), torch.nan, dtype=torch.float64, device=start.device)
        steps = torch.zeros(self.facts, dtype=torch.long, device=start.device)
        active = list(range(self.facts))
        before = self._before()
        for step in range(1, self.search.steps + 1):
            moves = step < self.search.steps
            with torch.enable_grad() if moves else torch.no_grad():
                leaf = delta.clone().requires_grad_(moves)
                losses = self._losses(leaf, active, before, norm)
            loss[active], steps[active] = losses.detach().double(), step
            if not bool(torch.isfinite(losses).all()):
                raise UserError(f"the loss of an edit is not finite at step {step}: use a smaller lr, or float32")
            active = [fact for fact, value in zip(active, losses.tolist(), strict=True) if value >= self.search.stop]
            if not active or not moves:
                break
            gradient = torch.autograd.grad(losses.sum(), leaf)[0]
            moved = _adam(delta, gradient, moments, step, self.search.lr)
            longest = self.search.clamp * norm
            moved = moved * (longest / moved.norm(dim=1, keepdim=True).clamp(min=1e-12)).clamp(max=1)
            delta[active] = moved[active]
        return Values(delta.double(), loss, steps)

    def _first(self) -> Float[Tensor, "facts width"]:
        """What δ is added to in the bare prompts."""
        rows = {row: group.start[i] for group in self.groups for i, row in enumerate(group.numbers)}
        return torch.stack([rows[fact * self.each] for fact in range(self.facts)]).float()

    def _before(self) -> Float[Tensor, "facts vocab"]:
        """Log-probabilities after the essence prompts in the unedited model."""
        rows = {row: group.unedited[i] for group in self.groups for i, row in enumerate(group.numbers)}
        essence = torch.stack([rows[fact * self.each + self.each - 1] for fact in range(self.facts)])
        return essence.float().log_softmax(-1)

    def _logits(self, delta: Tensor, active: Sequence[int]) -> dict[int, Float[Tensor, "columns vocab"]]:
        """Logits of the last columns, by row, of the active facts."""
        wanted = {fact * self.each + i for fact in active for i in range(self.each)}
        out: dict[int, Tensor] = {}
        for group in self.groups:
            own = [i for i, row in enumerate(group.numbers) if row in wanted]
            if own:
                facts = torch.tensor([group.numbers[i] // self.each for i in own], device=delta.device)
                logits = group.logits(own, delta[facts])
                out |= {group.numbers[i]: logits[n] for n, i in enumerate(own)}
        return out

    def _essence(self, logits: Mapping[int, Tensor], facts: Sequence[int]) -> Float[Tensor, "facts vocab"]:
        return torch.stack([logits[fact * self.each + self.each - 1][-1] for fact in facts]).float().log_softmax(-1)

    def _losses(
        self, delta: Tensor, active: Sequence[int], before: Float[Tensor, "facts vocab"], norm: Tensor
    ) -> Float[Tensor, "active"]:
        logits = self._logits(delta, active)
        nll = []
        for fact in active:
            target = torch.tensor(self.targets[fact], device=delta.device)
            rows = torch.stack([logits[fact * self.each + i][-len(target) :] for i in range(self.each - 1)])
            scores = rows.float().log_softmax(-1).gather(-1, target.expand(len(rows), -1)[..., None])
            nll.append(-scores.mean())
        new = self._essence(logits, active)
        kl = (new.exp() * (new - before[list(active)])).sum(-1)
        own = delta[list(active)].norm(dim=1) / norm[list(active), 0] ** 2
        return torch.stack(nll) + self.search.kl * kl + self.search.decay * own


def _read(place: Place) -> set[Site]:
    """The sites whose values a search needs: where its passes begin, and the key of an MLP projection."""
    if isinstance(place, Projection):
        return {Site(place.layer, "resid_pre"), Site(place.layer, "neurons")}
    return {place}


class _ResumedRows:
    """Rows that run together, from the edited block and the first edited column on, as far as the model allows it."""

    def __init__(self, base: KeptRun, place: Place, numbers: list[int], at: list[int], columns: int) -> None:
        self.base, self.place, self.numbers, self.columns = base, place, numbers, columns
        self.entry = Site(place.layer, "resid_pre") if isinstance(place, Projection) else place
        way = base.way(self.entry)
        self.skips, self.first = way != WAYS[-1], min(at) if way in ON_CACHE else 0
        self.entered, self.unedited = base.values[self.entry][:, self.first :], base.logits
        places = torch.tensor(at, device=base.model.device)
        self.at = places - self.first
        if isinstance(place, Projection):
            keys = base.values[Site(place.layer, "neurons")]
            self.start = place.value(keys[torch.arange(len(at), device=keys.device), places])
        else:
            self.start = self.entered[torch.arange(len(at), device=places.device), self.at]

    def logits(self, rows: Sequence[int], delta: Float[Tensor, "rows width"]) -> Float[Tensor, "rows columns vocab"]:
        """Logits of the last columns with δ added at each row's position."""
        model, index = self.base.model, torch.tensor(rows, device=self.at.device)
        picked = torch.arange(len(rows), device=index.device), self.at[index]

        def add(x: Tensor) -> Tensor:
            where = picked[0].to(x.device), picked[1].to(x.device)
            shaped = x.reshape(len(rows), -1, x.shape[-1])  # some MLPs flatten batch and positions
            return shaped.index_put(where, delta.to(x), accumulate=True).reshape(x.shape)

        entered = self.entered[index]
        with ExitStack() as stack:
            if self.skips:
                stack.enter_context(skip_blocks(model.layout, self.entry.enters))
            if isinstance(self.place, Projection):
                stack.enter_context(_output_edited(self.place.module, add))
                enter = (lambda x: entered.to(x)) if self.skips else None
            else:
                enter = (lambda x: add(entered.to(x))) if self.skips else add
            stack.enter_context(edit_sites(model.layout, {self.entry: enter}) if enter else nullcontext())
            cache = self.base.cache_before(index, self.first) if self.first else None
            return model.call(self.base.tokens.rows(index), self.first, last=self.columns, cache=cache)


@contextmanager
def _output_edited(module: nn.Module, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """Replace what a module returns by a function of it."""
    plain = module.forward
    with forwards_replaced({module: lambda x: edit(plain(x))}):
        yield


def _adam(delta: Tensor, gradient: Tensor, moments: list[Tensor], step: int, lr: float) -> Tensor:
    """One step of Adam; `moments` are updated. Facts that have ended have no gradient, and are not moved."""
    for i, (beta, power) in enumerate(zip(BETAS, (gradient, gradient.square()), strict=True)):
        moments[i] = beta * moments[i] + (1 - beta) * power
    mean, square = (moment / (1 - beta**step) for moment, beta in zip(moments, BETAS, strict=True))
    return delta - lr * mean / (square.sqrt() + EPSILON)


def warn_of_spaces(requests: Sequence[EditRequest]) -> None:
    """Log a warning where an answer without a leading space follows a word."""
    for request in requests:
        for answer in (request.target, request.true):
            if request.text[-1:].isalnum() and answer[:1].isalnum() and answer.isascii():
                log.warning(
                    "answer %r follows %r without a space: give it with its leading space", answer, request.text
                )
                return
