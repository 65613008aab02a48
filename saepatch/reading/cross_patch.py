"""States of one prompt written into another, or into an earlier or later layer of the same prompt."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saepatch.data.batches import answer_token
from saepatch.dictionaries.dictionary import Dictionary
from saepatch.engine.passes.kept_run import Checked, KeptRun
from saepatch.errors import UserError
from saepatch.model.language_model import LanguageModel, Tokens
from saepatch.model.lens import INSIDE
from saepatch.model.positions import Positions
from saepatch.model.sites import Site
from saepatch.records.statistics import Interval, wilson_share
from saepatch.splicing.splice import whole_prompt

ROWS = 64  # prompts in a batch, and edited passes in another


@dataclass(frozen=True)
class CrossQuery:
    """A prompt whose states are read, a prompt into which they are written, and the answers to compare there.

    `wanted` is the answer that the target gives if it takes over what was read; `own` is the target's own. Positions
    select as many tokens of both prompts. For back- and forward-patching, both are the same prompt.
    """

    source: str
    target: str
    wanted: str
    own: str
    read: Positions = "last"
    write: Positions = "last"
    example: str = ""


@dataclass(frozen=True)
class Move:
    """The site where the source is read, and the site where its value is written into the target."""

    read: Site
    write: Site

    def __str__(self) -> str:
        return f"{self.read} → {self.write}"


@dataclass(frozen=True, eq=False)
class CrossPatched:
    """Answers of each query's target after each move, and unpatched.

    Attributes:
        queries: The queries, in order.
        moves: The moves, in order.
        answers: The candidate answers, as given.
        log_p: Log-probability of each candidate after the target, in nats.
        likeliest: The likeliest token of the vocabulary.
        plain_log_p: `log_p` without a patch.
        plain_likeliest: `likeliest` without a patch.
        ids: The candidates' tokens after each target.
    """

    queries: tuple[CrossQuery, ...]
    moves: tuple[Move, ...]
    answers: tuple[str, ...]
    log_p: Float[np.ndarray, "queries moves answers"]
    likeliest: Int[np.ndarray, "queries moves"]
    plain_log_p: Float[np.ndarray, "queries answers"]
    plain_likeliest: Int[np.ndarray, "queries"]
    ids: Int[np.ndarray, "queries answers"]

    def places(self, answers: Sequence[str] | None = None) -> Int[np.ndarray, "queries"]:
        """The place of each query's answer among the candidates; `answers` stand in for the wanted ones."""
        wanted = [query.wanted for query in self.queries] if answers is None else answers
        return np.array([self.answers.index(answer) for answer in wanted], dtype=int)

    def given(self, answers: Sequence[str] | None = None) -> Bool[np.ndarray, "queries moves"]:
        """Whether an answer (the wanted one, or one for each query) is the likeliest token of the vocabulary."""
        rows = np.arange(len(self.queries))
        return self.likeliest == self.ids[rows, self.places(answers)][:, None]

    def given_unpatched(self, answers: Sequence[str] | None = None) -> Bool[np.ndarray, "queries"]:
        """`given` without a patch."""
        rows = np.arange(len(self.queries))
        return self.plain_likeliest == self.ids[rows, self.places(answers)]

    def first_among(self, answers: Sequence[str] | None = None) -> Bool[np.ndarray, "queries moves"]:
        """Whether an answer is the likeliest of the candidates."""
        return self.log_p.argmax(-1) == self.places(answers)[:, None]

    def share(self, move: int) -> Interval:
        """The share of queries in which a move yields the wanted answer, with its Wilson interval."""
        return wilson_share(self.given()[:, move].astype(float))

    def best(self, hits: Bool[np.ndarray, "queries moves"] | None = None) -> int:
        """The move with the most hits (by default, the wanted answer given); ties: the first."""
        return int((self.given() if hits is None else hits).sum(0).argmax())


def layer_moves(layers: Sequence[int], direction: str = "back", stream: str = "resid_post") -> list[Move]:
    """Moves between layers of one stream: back (from later to earlier), forward, same, or all of these.

    Raises:
        UserError: for another direction.
    """
    kept = {"back": (1,), "forward": (-1,), "same": (0,), "all": (-1, 0, 1)}
    if direction not in kept:
        raise UserError(f"no moves are called {direction!r}: use one of {', '.join(kept)}")
    cells = [(read, write) for read in layers for write in layers]
    return [
        Move(Site(read, stream), Site(write, stream))
        for read, write in cells
        if (read > write) - (read < write) in kept[direction]
    ]


@dataclass(frozen=True)
class TwoHop:
    """A question of two hops: from its subject to a bridge, and by a relation from the bridge to the answer."""

    prompt: str
    subject: str
    bridge: str
    relation: str
    answer: str
    at: Positions = "last"


@dataclass(frozen=True)
class Crossed:
    """Queries across questions of two hops, and how many pairs were left out, by reason."""

    queries: tuple[CrossQuery, ...]
    left_out: Mapping[str, int]


def cross_queries(
    sources: Sequence[TwoHop], targets: Sequence[TwoHop], known: Mapping[tuple[str, str], str]
) -> Crossed:
    """All pairs of a source and a target: success is the answer of the target's relation for the source's bridge.

    `known` has these answers, by relation and bridge. Pairs with equal bridges, pairs whose answer would be the
    target's own, and pairs without a known answer are left out and counted: they cannot distinguish a transfer from the
    target's own answer.
    """
    queries, left_out = [], Counter[str]({"equal bridges": 0, "the target's own answer": 0, "no answer known": 0})
    for source in sources:
        for target in targets:
            wanted = known.get((target.relation, source.bridge))
            if source.bridge == target.bridge:
                left_out["equal bridges"] += 1
            elif wanted is None:
                left_out["no answer known"] += 1
            elif wanted == target.answer:
                left_out["the target's own answer"] += 1
            else:
                example = f"{source.subject} → {target.subject}, {target.relation}"
                queries.append(
                    CrossQuery(source.prompt, target.prompt, wanted, target.answer, source.at, target.at, example)
                )
    return Crossed(tuple(queries), dict(left_out))


@torch.no_grad()
def cross_patch(
    model: LanguageModel,
    queries: Sequence[CrossQuery],
    moves: Sequence[Move],
    answers: Sequence[str] = (),
    dictionary: Dictionary | None = None,
    latents: Sequence[int] | None = None,
    rows: int = ROWS,
) -> CrossPatched:
    """Write states of each query's source into its target, by every move, one per run.

    Args:
        queries: Prompts and the positions that are read and written.
        moves: Sites between which states go. From later to earlier layers of one prompt this is back-patching, from
            earlier to later ones forward-patching; from a site into itself nothing changes.
        answers: Candidate answers with their leading space, each one token after every target; those of the queries are
            added.
        dictionary: With it, only `latents` take over the source's values, as this dictionary reads them at both sites;
            the rest of the target's state, the error term included, stays. Tokens that it was not trained on
            (`Dictionary.excluded_tokens`) are neither read nor written.
        latents: Ids; None: all.
        rows: Prompts, and edited passes, that run together.

    Raises:
        UserError: no queries or moves, positions that select no token, different numbers of them or one that the
            dictionary was not trained on, an answer that is not one token, a site that does not have the residual
            stream's width, or a dictionary of another width.

    Source: cross-query semantic patching and back-patching of "Hopping Too Late" (Biran et al. 2024).
    """
    _check(model, queries, moves, dictionary, latents)
    names = tuple(dict.fromkeys([*answers, *(answer for q in queries for answer in (q.wanted, q.own))]))
    prompts = [model.encode(query.target) for query in queries]
    ids = np.array(
        [[answer_token(model, q.target, own, name) for name in names] for q, own in zip(queries, prompts, strict=True)]
    )
    reads = sorted({move.read for move in moves}, key=lambda site: (site.order, site.stream))
    read = _read(model, queries, reads, rows, dictionary)
    shape = (len(queries), len(moves))
    log_p, likeliest = np.zeros((*shape, len(names))), np.zeros(shape, dtype=int)
    plain, plain_likeliest = np.zeros((shape[0], len(names))), np.zeros(shape[0], dtype=int)
    columns = [_columns(model, query.target, query.write, dictionary) for query in queries]
    checked: Checked = {}  # ways of resuming, shared by the groups
    for group in _groups(prompts, columns, rows):
        run = KeptRun(model, model.pad([prompts[i] for i in group], "left"), {move.write for move in moves})
        run.checked = checked
        chosen = torch.from_numpy(ids[group]).to(model.device)
        plain[group], plain_likeliest[group] = _answers(run.logits, chosen)
        for number, move in enumerate(moves):
            cells = [read[i][move.read] for i in group]
            change, first = _change(run, move, cells, [columns[i] for i in group], dictionary, latents)
            logits = run.resume(move.write, torch.arange(len(group), device=model.device), first, change)
            log_p[group, number], likeliest[group, number] = _answers(logits, chosen)
    return CrossPatched(tuple(queries), tuple(moves), names, log_p, likeliest, plain, plain_likeliest, ids)


def _check(
    model: LanguageModel,
    queries: Sequence[CrossQuery],
    moves: Sequence[Move],
    dictionary: Dictionary | None,
    latents: Sequence[int] | None,
) -> None:
    if not queries or not moves:
        raise UserError(f"{len(queries)} queries and {len(moves)} moves: give at least one of each")
    for site in dict.fromkeys(site for move in moves for site in (move.read, move.write)):
        if site.stream in INSIDE or model.width(site) != model.d_model:
            raise UserError(f"{site} does not have the width of the residual stream: use a site such as resid_post.0")
    if dictionary is None and latents is not None:
        raise UserError("latents are given without a dictionary: give the dictionary that reads them")
    if dictionary is not None:
        if dictionary.d_in != model.d_model:
            raise UserError(
                f"dictionary {dictionary.name} has width {dictionary.d_in}, the model {model.d_model}: give one of the "
                "residual stream"
            )
        dictionary.check_ids(tuple(latents or ()))


def _columns(
    model: LanguageModel, prompt: str, positions: Positions, dictionary: Dictionary | None = None
) -> list[int]:
    """Indices of the tokens that positions select in a prompt, without any that the dictionary was not trained on."""
    tokens = model.tokenize([prompt])
    where = whole_prompt(model, tokens).select(positions)
    if dictionary is not None:
        where = dictionary.editable(model, tokens.input_ids, where, positions)
    chosen: list[int] = where[0].nonzero().flatten().tolist()
    if not chosen:
        raise UserError(f"positions {positions!r} select no token of {prompt!r}: choose others")
    return chosen


def _read(
    model: LanguageModel, queries: Sequence[CrossQuery], sites: Sequence[Site], rows: int, dictionary: Dictionary | None
) -> list[dict[Site, Float[Tensor, "positions width"]]]:
    """The states of each query's source at the positions that are read; equal sources are run once."""
    wanted: dict[str, Tokens] = {query.source: model.tokenize([query.source]) for query in queries}
    by_length: dict[int, list[str]] = {}
    for prompt, tokens in wanted.items():
        by_length.setdefault(tokens.width, []).append(prompt)
    states: dict[str, dict[Site, Tensor]] = {}
    for same in by_length.values():
        for start in range(0, len(same), rows):
            part = same[start : start + rows]
            held = model.capture(model.tokenize(part), sites)
            for row, prompt in enumerate(part):
                states[prompt] = {site: value[row] for site, value in held.items()}
    out = []
    for query in queries:
        read = _columns(model, query.source, query.read, dictionary)
        written = _columns(model, query.target, query.write, dictionary)
        if len(read) != len(written):
            raise UserError(
                f"{query.read!r} selects {len(read)} tokens of {query.source!r}, and {query.write!r} {len(written)} of "
                f"{query.target!r}: choose as many of both"
            )
        out.append({site: states[query.source][site][read] for site in sites})
    return out


def _groups(prompts: Sequence[Sequence[int]], columns: Sequence[Sequence[int]], rows: int) -> list[list[int]]:
    """Queries whose targets have equal lengths and are first written at the same token, at most `rows` together."""
    same: dict[tuple[int, int], list[int]] = {}
    for number, (ids, chosen) in enumerate(zip(prompts, columns, strict=True)):
        same.setdefault((len(ids), chosen[0]), []).append(number)
    return [group[start : start + rows] for group in same.values() for start in range(0, len(group), rows)]


def _change(
    run: KeptRun,
    move: Move,
    cells: Sequence[Float[Tensor, "positions width"]],
    columns: Sequence[Sequence[int]],
    dictionary: Dictionary | None,
    latents: Sequence[int] | None,
) -> tuple[Float[Tensor, "rows columns width"], int]:
    """What a move adds to each row of a run, from the first written column on."""
    here = run.values[move.write]
    first = columns[0][0]
    change = torch.zeros_like(here[:, first:])
    for row, (value, chosen) in enumerate(zip(cells, columns, strict=True)):
        old = here[row, chosen]
        change[row, [column - first for column in chosen]] = _taken_over(value, old, dictionary, latents)
    return change, first


def _taken_over(
    value: Float[Tensor, "positions width"],
    old: Float[Tensor, "positions width"],
    dictionary: Dictionary | None,
    latents: Sequence[int] | None,
) -> Float[Tensor, "positions width"]:
    """What to add to `old` so that it, or only some of its latents, has the values of `value`."""
    if dictionary is None:
        return value - old
    ids = slice(None) if latents is None else list(latents)
    gap = dictionary.written(value[None])[0] - dictionary.written(old[None])[0]
    return (gap[:, ids] @ dictionary.rows[ids]).to(old.dtype)


def _answers(
    logits: Float[Tensor, "rows vocab"], chosen: Int[Tensor, "rows answers"]
) -> tuple[Float[np.ndarray, "rows answers"], Int[np.ndarray, "rows"]]:
    """Log-probabilities of the candidates, and the likeliest token."""
    logits = logits.float()
    values = logits.gather(1, chosen).double() - logits.double().logsumexp(-1, keepdim=True)
    return values.cpu().numpy(), logits.argmax(-1).cpu().numpy()
