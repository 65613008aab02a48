"""The search for a value: the vector which, written at one token, makes the model state the new fact."""

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from saepatch.data.edit_requests import EditRequest
from saepatch.errors import UserError
from saepatch.facts.contexts import Contexts, answer_ids
from saepatch.facts.projections import Projection
from saepatch.model.hooks import edit_sites
from saepatch.model.inputs.padding import FAILURES
from saepatch.model.language_model import LanguageModel, Tokens, refuse_training
from saepatch.model.replaced import forwards_replaced, skip_blocks
from saepatch.model.sites import Site

log = logging.getLogger(__name__)

ESSENCE = "{} is a"  # the prompt at which the model's predictions are kept
CELLS = 2**26  # logits held for one batch of facts
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


def find_values(contexts: Contexts, place: Place, search: ValueSearch) -> Values:
    """Search the values of all facts, many in one batch; only the blocks from the edited one on are run.

    Raises:
        UserError: an answer does not begin with a token of its own, or a loss is not finite.
    """
    model = contexts.model
    refuse_training(model)
    most = max(len(answer_ids(model, request.text, request.target)) for request in contexts.requests)
    rows = len(contexts.prefixes.texts) + 1
    size = max(1, CELLS // (rows * most * model.vocabulary))
    parts = []
    for start in range(0, len(contexts.requests), size):
        part = replace(contexts, requests=contexts.requests[start : start + size])
        parts.append(_ValueBatch(part, place, search).run())
    return Values(*(torch.cat([getattr(part, name) for part in parts]) for name in ("delta", "loss", "steps")))


class _ValueBatch:
    """One batch of facts: rows of every fact (prefixes, then the essence prompt), padded on the left."""

    def __init__(self, contexts: Contexts, place: Place, search: ValueSearch) -> None:
        self.model, self.place, self.search = contexts.model, place, search
        self.facts, self.each = len(contexts.requests), len(contexts.prefixes.texts) + 1
        self.targets = [answer_ids(self.model, request.text, request.target) for request in contexts.requests]
        self.most = max(map(len, self.targets))
        ids, last = self._rows(contexts)
        self.groups = self._groups(ids, last)

    def _rows(self, contexts: Contexts) -> tuple[list[list[int]], list[int]]:
        """Token ids of all rows, answers without their last token included, and each edited position."""
        ids, last = [], []
        for number, request in enumerate(contexts.requests):
            for prefix in range(self.each - 1):
                row = number * (self.each - 1) + prefix
                ids.append(contexts.rows[row] + self.targets[number][:-1])
                last.append(contexts.last[row])
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
            groups.append(_ResumedRows(self.model, self.place, tokens, rows, at, min(self.most, tokens.width)))
        return groups

    def run(self) -> Values:
        start = self._first()
        delta = torch.zeros_like(start)
        moments = [torch.zeros_like(start), torch.zeros_like(start)]
        norm = start.norm(dim=1, keepdim=True)
        loss = torch.full((self.facts,), torch.nan, dtype=torch.float64, device=start.device)
        steps = torch.zeros(self.facts, dtype=torch.long, device=start.device)
        active = list(range(self.facts))
        with torch.no_grad():
            before = self._essence(self._logits(delta, active), active)
        for step in range(1, self.search.steps + 1):
            with torch.enable_grad():
                leaf = delta.clone().requires_grad_()
                losses = self._losses(leaf, active, before, norm)
                gradient = torch.autograd.grad(losses.sum(), leaf)[0]
            loss[active], steps[active] = losses.detach().double(), step
            if not bool(torch.isfinite(losses).all()):
                raise UserError(f"the loss of an edit is not finite at step {step}: use a smaller lr, or float32")
            active = [fact for fact, value in zip(active, losses.tolist(), strict=True) if value >= self.search.stop]
            if not active or step == self.search.steps:
                break
            moved = _adam(delta, gradient, moments, step, self.search.lr)
            longest = self.search.clamp * norm
            moved = moved * (longest / moved.norm(dim=1, keepdim=True).clamp(min=1e-12)).clamp(max=1)
            delta[active] = moved[active]
        return Values(delta.double(), loss, steps)

    def _first(self) -> Float[Tensor, "facts width"]:
        """What δ is added to in the bare prompts."""
        rows = {row: group.start[i] for group in self.groups for i, row in enumerate(group.numbers)}
        return torch.stack([rows[fact * self.each] for fact in range(self.facts)]).float()

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


class _ResumedRows:
    """Rows that run together, resumed at the edited block where that gives the same logits as whole passes."""

    def __init__(
        self, model: LanguageModel, place: Place, tokens: Tokens, numbers: list[int], at: list[int], columns: int
    ) -> None:
        self.model, self.place, self.tokens, self.numbers = model, place, tokens, numbers
        self.at, self.columns = torch.tensor(at, device=model.device), columns
        self.layer = place.layer
        self.entry = Site(self.layer, "resid_pre") if isinstance(place, Projection) else place
        sites = {self.entry} | ({Site(self.layer, "neurons")} if isinstance(place, Projection) else set())
        seen = model.capture(tokens, sites)
        self.entered = seen[self.entry]
        picked = torch.arange(len(at), device=model.device), self.at
        if isinstance(place, Projection):
            self.start = place.value(seen[Site(self.layer, "neurons")][picked])
        else:
            self.start = self.entered[picked]
        self.skips = self._agrees()

    @torch.no_grad()
    def _agrees(self) -> bool:
        """Whether passes that begin at the edited block give the logits of whole passes."""
        rows = list(range(min(2, len(self.numbers))))
        zero = torch.zeros(len(rows), self.start.shape[1], device=self.model.device)
        whole = self._pass(rows, zero, skip=False).float()
        try:
            resumed = self._pass(rows, zero, skip=True).float()
        except FAILURES:
            return False
        tolerance = 1e-4 if self.model.dtype == torch.float32 else 5e-2
        return bool((resumed - whole).abs().max() <= tolerance * whole.abs().max())

    def logits(self, rows: Sequence[int], delta: Float[Tensor, "rows width"]) -> Float[Tensor, "rows columns vocab"]:
        """Logits of the last columns with δ added at each row's position."""
        return self._pass(rows, delta, self.skips)

    def _pass(self, rows: Sequence[int], delta: Tensor, skip: bool) -> Tensor:
        model, tokens = self.model, self.tokens.rows(list(rows))
        at = torch.arange(len(rows), device=model.device), self.at[list(rows)]

        def add(x: Tensor) -> Tensor:
            where = at[0].to(x.device), at[1].to(x.device)
            shaped = x.reshape(len(rows), -1, x.shape[-1])  # some MLPs flatten batch and positions
            return shaped.index_put(where, delta.to(x), accumulate=True).reshape(x.shape)

        with ExitStack() as stack:
            if isinstance(self.place, Projection):
                stack.enter_context(_output_edited(self.place.module, add))
                if skip:
                    stack.enter_context(skip_blocks(model.layout, self.layer))
                    entered = self.entered[list(rows)]
                    stack.enter_context(edit_sites(model.layout, {self.entry: lambda x: entered.to(x)}))
            elif skip:
                stack.enter_context(skip_blocks(model.layout, self.entry.enters))
                left = self.entered[list(rows)]
                stack.enter_context(edit_sites(model.layout, {self.entry: lambda x: add(left.to(x))}))
            else:
                stack.enter_context(edit_sites(model.layout, {self.entry: add}))
            return model.call(tokens, last=self.columns)


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
