"""Activations of several sites out of one forward pass, as a stream of shuffled batches that can begin anywhere."""

import logging
import threading
from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import closing, contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path

import torch
from jaxtyping import Float, Shaped
from torch import Tensor

from saepatch.errors import UserError
from saepatch.model.language_model import LanguageModel, Tokens
from saepatch.model.sites import Site

from ..config import TrainingConfig
from ..ranks import ALONE, Ranks
from .cache import RoundCache, cache_key, model_facts
from .prefetch import ahead, go_on
from .rows import Body, bos_before, cut, text_positions, token_batches, tokenised
from .texts import Streamed, fingerprint, in_order, mixed_seed

log = logging.getLogger(__name__)

Batch = dict[Site, Float[Tensor, "batch _"]]
Rows = dict[Site, Shaped[Tensor, "n _"]]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # that activations are kept in; any other becomes float32
_POLL = 0.2  # seconds after which a thread that waits for the model looks whether it should end


@dataclass(frozen=True)
class Position:
    """Where a stream is; plain numbers, so that `dataclasses.asdict` of it can be written down.

    Attributes:
        epoch: Reading of the documents that the round begins in.
        document: Place in the epoch's order that it begins at.
        offset: Tokens of that document that earlier rounds had.
        round: Number of the round.
        batch: Batches of the round that were given out.
    """

    epoch: int = 0
    document: int = 0
    offset: int = 0
    round: int = 0
    batch: int = 0


START = Position()


@dataclass(frozen=True, eq=False)
class _Round:
    start: Position
    end: Position
    rows: Rows  # shuffled already


@dataclass(frozen=True, eq=False)
class ActivationStream:
    """Activations at ordinary positions (no BOS, padding or other special token) of several sites, one forward for all.

    The stream goes in rounds: documents are read until they hold `config.buffer` tokens, the model runs over them, and
    the activations are given out in a random order, `config.batch_size` at a time. What does not fill a round's last
    batch, a random few of its tokens, is left out. The documents are read again when they end, each time in another
    order. All of it follows from `config.seed`, the documents and the sizes: neither prefetching, the cache nor the
    number of processes changes a batch.

    Attributes:
        model: Whose activations; its forward stops at the last site that is needed.
        documents: Texts; each cut to rows of `config.context` tokens, or with `config.pack` rows filled with several.
        sites: Where to look; row i of every site is the same token.
        config: The sizes, the seed, prefetching and the cache.
        ranks: The processes that share the forwards of a round; each gets every size-th row of a batch. They are to
            take the same batches and to stop at the same one.
        epochs: How often to read the documents; then every batch is given out, a round's last one perhaps smaller.
        also: Further models of the same tokenizer and widths; a round's forward passes take turns among all.

    Raises:
        UserError: the batch cannot be divided among the processes.
    """

    model: LanguageModel
    documents: Sequence[str] | Streamed
    sites: Sequence[Site]
    config: TrainingConfig
    ranks: Ranks = ALONE
    epochs: int | None = None
    also: Sequence[LanguageModel] = ()
    _running: threading.RLock = field(default_factory=threading.RLock, init=False, repr=False)

    def __post_init__(self) -> None:
        size, batch_size = self.ranks.size, self.config.batch_size
        if batch_size % size:
            more = -(-batch_size // size) * size
            raise UserError(
                f"batch_size {batch_size} cannot be divided among {size} processes: use a multiple, as in {more}"
            )

    @cached_property
    def special(self) -> set[int]:
        """Tokens that are not learnt from: BOS and padding, and unless the run asks for them all others beside text."""
        tokenizer = self.model.tokenizer
        if self.config.special_tokens:
            return {tokenizer.bos_token_id, tokenizer.pad_token_id} - {None}
        return set(tokenizer.all_special_ids)

    @cached_property
    def fingerprint(self) -> str:
        """Tells other documents, or another order of them, apart."""
        return fingerprint(self.documents)

    def __iter__(self) -> Iterator[Batch]:
        with closing(self.batches()) as batches:
            for batch, _ in batches:
                yield batch

    def batches(self, start: Position = START) -> Generator[tuple[Batch, Position], None, None]:
        """Batches `{site: [batch_size, width]}` in float32 on the model's device, each with the position after it.

        From any of these positions a stream of the same documents and settings gives what this one gives from there,
        bit for bit, at the cost of the forwards of one round. Close the generator to end its thread.

        Raises:
            UserError: the documents hold no text, or cannot be read.
        """
        stopping = threading.Event()
        rounds = self._rounds(start, stopping)
        # Not with others: a thread that is ahead in one process alone would wait for them in a round that none wants.
        if self.config.prefetch and self.ranks.size == 1:
            rounds = ahead(rounds, stopping)
        with closing(rounds):
            skipped = start.batch
            for filled in rounds:
                yield from self._given(filled, skipped)
                skipped = 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """No forward of the stream runs inside: for whoever runs or splices the model, and would meet its hooks."""
        with self._running:
            yield

    def check_evaluated(self, tokens: Tokens) -> None:
        """Say where some of these tokens are not trained on."""
        evaluated, trained = int(tokens.ordinary.sum()), int(text_positions(tokens, self.special).sum())
        if trained < evaluated:
            log.info(
                "%d of the %d held-out positions are special tokens, as a chat's markers: nothing is trained on them, "
                "and figures leave them out; --special_tokens true trains on them",
                evaluated - trained,
                evaluated,
            )

    def token_batches(self, seed: int, size: int) -> Iterator[Tokens]:
        """Padded batches of at most `size` tokens of the documents for other uses, without end, in an order of their
        own; a single row may be larger. Tokens that are not learnt from are not ordinary in them."""
        stream = replace(self, config=replace(self.config, seed=seed), epochs=None)
        for ids, end in stream._read(START):
            parts = list(token_batches(self.model, ids, size))
            for i in torch.randperm(len(parts), generator=_generator(seed, "parts", end.round)).tolist():
                yield parts[i].without(self.special)

    def _given(self, filled: _Round, skipped: int) -> Iterator[tuple[Batch, Position]]:
        n, size = len(next(iter(filled.rows.values()))), self.config.batch_size
        count = n // size if self.epochs is None else -(-n // size)
        for i in range(skipped, count):
            mine = slice(i * size + self.ranks.rank, min((i + 1) * size, n), self.ranks.size)
            # Copied, so that who keeps a batch does not keep the round.
            batch = {
                site: x[mine].to(self.model.device, torch.float32, copy=True).contiguous()
                for site, x in filled.rows.items()
            }
            yield batch, replace(filled.start, batch=i + 1) if i + 1 < count else filled.end

    def _rounds(self, start: Position, stopping: threading.Event) -> Generator[_Round, None, None]:
        cache = self._cache()
        place, reading = replace(start, batch=0), None
        while True:
            filled = self._kept(cache, place) if cache is not None else None
            if filled is not None:
                reading = None  # it would be behind
            else:
                reading = reading or self._read(place)
                try:
                    read = next(reading, None)
                except BaseException:
                    self._agreed(False)  # the others ask each other in `_exchange`, and stop too
                    raise
                if read is None:
                    return
                ids, end = read
                filled = _Round(place, end, self._filled(ids, place.round, stopping))
                if cache is not None and self.ranks.first:
                    tensors = {str(site): x for site, x in filled.rows.items()}
                    cache.write(_name(place), tensors, {"end": vars(end)})
            place = filled.end
            yield filled

    def _cache(self) -> RoundCache | None:
        config = self.config
        if not config.cache:
            return None
        sizes = {
            name: getattr(config, name)
            for name in ("context", "pack", "buffer", "forward_tokens", "seed", "special_tokens")
        }
        facts = {**sizes, "model": model_facts(self.model), "documents": self.fingerprint, "epochs": self.epochs}
        if self.also:
            facts["also"] = [model_facts(model) for model in self.also]
        return RoundCache(Path(config.cache).expanduser(), cache_key(facts), config.cache_gb * 1e9)

    def _kept(self, cache: RoundCache, place: Position) -> _Round | None:
        """The round from the cache, if every process has it there: otherwise all must help to compute it."""
        cached = cache.read(_name(place), [str(site) for site in self.sites])
        if not self._agreed(cached is not None) or cached is None:
            return None
        tensors, notes = cached
        return _Round(place, Position(**notes["end"]), {site: tensors[str(site)] for site in self.sites})

    def _agreed(self, yes: bool) -> bool:
        if self.ranks.size == 1:
            return yes
        from torch import distributed

        answer = torch.tensor([int(yes)])
        distributed.all_reduce(answer, op=distributed.ReduceOp.MIN, group=self.ranks.data)
        return bool(answer)

    def _read(self, start: Position) -> Iterator[tuple[list[list[int]], Position]]:
        """Rows of token ids of one round after the other, and where the next one begins."""
        special = self.special
        ids: list[list[int]] = []
        n, number = 0, start.round + 1
        bodies = self._bodies(start)
        for row, (epoch, document, offset) in cut(
            bodies, self.config.context, bos_before(self.model), self.config.pack, special
        ):
            ids.append(row)
            n += sum(token not in special for token in row)
            if n >= self.config.buffer:
                yield ids, Position(epoch, document, offset, number)
                ids, n, number = [], 0, number + 1
        if ids:
            yield ids, Position(self.epochs or 0, round=number)

    def _bodies(self, start: Position) -> Iterator[Body]:
        """Documents as tokens, epoch after epoch."""
        special = self.special
        epoch, document, offset = start.epoch, start.document, start.offset
        while self.epochs is None or epoch < self.epochs:
            read = in_order(self.documents, self.config.seed, epoch, document)
            has_text = document > 0
            for place, ids in tokenised(self.model, read):
                has_text = has_text or not special.issuperset(ids)
                yield Body(epoch, place, ids, offset)
                offset = 0
            if not has_text:
                raise UserError("the documents hold no token besides BOS: give text")
            epoch, document = epoch + 1, 0
            log.info("the documents were read to their end %d times", epoch)

    def _filled(self, ids: list[list[int]], number: int, stopping: threading.Event) -> Rows:
        """Activations of a round in the order they are given out in."""
        parts = list(token_batches(self.model, ids, self.config.forward_tokens))
        sizes = [int(text_positions(part, self.special).sum()) for part in parts]
        n = sum(sizes)
        # Each row is put where the shuffle wants it: a copy is spared, and the cache is read in sequence.
        places = torch.randperm(n, generator=_generator(self.config.seed, "round", number))
        dtype = self.model.dtype if self.model.dtype in _DTYPES else torch.float32
        alone = self.ranks.size == 1
        device = self.model.device if alone and not self.config.cache else torch.device("cpu")
        filled = {site: torch.empty(n, self.model.width(site), dtype=dtype, device=device) for site in self.sites}
        models = [self.model, *self.also]
        turns = [(models[(number + i) % len(models)], part) for i, part in enumerate(parts)]
        if alone:
            for (model, part), at in zip(turns, places.to(device).split(sizes), strict=True):
                for site, x in self._forward(model, part, stopping).items():
                    filled[site][at] = x.to(device, dtype)
        else:
            self._exchange(turns, places.split(sizes), filled, stopping)
        return filled

    def _forward(self, model: LanguageModel, part: Tokens, stopping: threading.Event) -> Rows:
        while not self._running.acquire(timeout=_POLL):
            go_on(stopping)
        try:
            go_on(stopping)
            return forward(model, self.sites, part, self.special)
        finally:
            self._running.release()

    def _exchange(
        self,
        turns: Sequence[tuple[LanguageModel, Tokens]],
        places: Sequence[Tensor],
        filled: Rows,
        stopping: threading.Event,
    ) -> None:
        """Compute every size-th part here, and have what the other processes compute of the rest."""
        from torch import distributed

        rank, size, group = self.ranks.rank, self.ranks.size, self.ranks.data
        own: dict[Site, list[Tensor]] = {site: [] for site in self.sites}
        failure: BaseException | None = None
        try:
            for model, part in turns[rank::size]:
                for site, x in self._forward(model, part, stopping).items():
                    own[site].append(x.to("cpu", filled[site].dtype))
        except BaseException as error:  # sent to the other ranks first, which would wait for ever
            failure = error
        if not self._agreed(failure is None):
            raise failure or UserError(
                "another process of the run failed or stopped while activations were computed: see what it says, and "
                "go on from the last checkpoint with --resume true"
            )
        for source in range(size):
            if not places[source::size]:
                continue
            at = torch.cat(list(places[source::size]))
            for site, x in filled.items():
                block = torch.cat(own.pop(site)) if source == rank else x.new_empty(len(at), x.shape[1])
                distributed.broadcast(block.view(torch.uint8), src=source, group=group)  # as bytes: of any dtype
                x[at] = block


def forward(model: LanguageModel, sites: Sequence[Site], tokens: Tokens, special: Collection[int]) -> Rows:
    """What each site emits at the positions of a batch that are learnt from, as the model gives it (device, dtype)."""
    with torch.no_grad():
        captured = model.capture(tokens, sites)
    kept = text_positions(tokens, special)
    return {site: captured[site][kept.to(captured[site].device)] for site in sites}


def _name(place: Position) -> str:
    return f"{place.round:06d}-{place.epoch}-{place.document}-{place.offset}"


def _generator(*facts: int | str) -> torch.Generator:
    return torch.Generator().manual_seed(mixed_seed(*facts))
