"""Activations of several sites from shared forward passes, as a stream of shuffled batches that can be resumed."""

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
from saepatch.model.hooks import watching
from saepatch.model.language_model import LanguageModel, Tokens
from saepatch.model.sites import Site

from ..config import TrainingConfig
from ..ranks import ALONE, Ranks
from .cache import RoundCache, cache_key, model_facts
from .document import Document
from .prefetch import ahead, go_on
from .rows import Body, bos_before, cut, text_positions, token_batches, tokenised
from .texts import Streamed, fingerprint, in_order, mixed_seed

log = logging.getLogger(__name__)

Batch = dict[Site, Float[Tensor, "batch _"]]
Rows = dict[Site, Shaped[Tensor, "n _"]]

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)  # stored as they are; other dtypes become float32
_POLL = 0.2  # seconds between checks whether a thread that waits for the model should end


@dataclass(frozen=True)
class Position:
    """Position in a stream, as plain numbers that can be stored in a checkpoint.

    Attributes:
        epoch: Epoch in which the round begins.
        document: Index in the epoch's order at which the round begins.
        offset: Number of tokens of that document used by earlier rounds.
        round: Number of the round.
        batch: Number of batches of the round already yielded.
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
    """Activations of several sites at ordinary positions (no BOS, padding, other special tokens), one forward for all.

    The stream consists of rounds: documents are read until they hold `buffer` tokens, the model runs over them,
    and the activations are yielded in random order, `config.batch_size` at a time. Tokens that do not fill a round's
    last batch are dropped, a random few. The documents are read again when they end, each time in another order. All
    of this is determined by `config.seed`, the documents and the sizes: prefetching, the cache and the number of
    processes change no batch.

    Attributes:
        model: Model that computes the activations; its forward pass stops at the last site needed.
        documents: Texts. Each is cut to rows of `config.context` tokens; `config.pack` puts several into a row.
        sites: Sites to capture; row i of every site is the same token.
        config: The sizes, the seed, prefetching and the cache.
        ranks: The processes that share a round's forward passes; each gets every size-th row of a batch. All of them
            must take the same batches and stop at the same one.
        epochs: Number of times to read the documents; every batch is then yielded, a round's last one perhaps smaller.
        also: Further models with the same tokenizer and widths; a round's forward passes alternate among all models.

    Raises:
        UserError: the batch cannot be divided among the processes.
    """

    model: LanguageModel
    documents: Sequence[Document] | Streamed
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
        """Tokens excluded from training: BOS, padding and, unless `special_tokens` is set, all other special tokens."""
        tokenizer = self.model.tokenizer
        if self.config.special_tokens:
            return {tokenizer.bos_token_id, tokenizer.pad_token_id} - {None}
        return set(tokenizer.all_special_ids)

    @cached_property
    def buffer(self) -> int:
        """Tokens in a round."""
        return self.config.buffer_tokens(sum(map(self.model.width, self.sites)) * self.model.dtype.itemsize)

    @cached_property
    def fingerprint(self) -> str:
        """Hash of the documents in their order."""
        return fingerprint(self.documents)

    def __iter__(self) -> Iterator[Batch]:
        with closing(self.batches()) as batches:
            for batch, _ in batches:
                yield batch

    def batches(
        self, start: Position = START, needed: int | None = None
    ) -> Generator[tuple[Batch, Position], None, None]:
        """Batches `{site: [batch_size, width]}` in float32 on the model's device, each with the position after it.

        The stream may end once `needed` batches are out: no further round is computed ahead. From any of these
        positions, a stream of the same documents and settings continues bit for bit, at the cost of the forward passes
        of one round. Close the generator to end its thread.

        Raises:
            UserError: the documents hold no text, or cannot be read.
        """
        stopping = threading.Event()
        rounds = self._rounds(start, stopping)
        # Not with several processes: a thread that is ahead would wait for the others in a round they never start.
        if self.config.prefetch and self.ranks.size == 1:
            held = -start.batch

            def enough(filled: _Round) -> bool:
                nonlocal held
                held += self._count(filled)
                return needed is not None and held >= needed

            rounds = ahead(rounds, stopping, enough)
        with closing(rounds):
            skipped = start.batch
            for filled in rounds:
                yield from self._yielded(filled, skipped)
                skipped = 0

    @contextmanager
    def paused(self) -> Iterator[None]:
        """Context in which the stream runs no forward pass: its hooks would disturb other uses of the model."""
        with self._running:
            yield

    def check_evaluated(self, tokens: Tokens) -> None:
        """Log if some of these tokens are special and therefore not trained on."""
        evaluated, trained = int(tokens.ordinary.sum()), int(text_positions(tokens, self.special).sum())
        if trained < evaluated:
            log.info(
                "%d of the %d held-out positions are special tokens, such as chat markers: they are excluded from "
                "training and figures; --special_tokens true trains on them",
                evaluated - trained,
                evaluated,
            )

    def token_batches(self, seed: int, size: int) -> Iterator[Tokens]:
        """Endless padded batches of the documents for other uses, in an order of their own.

        A batch has at most `size` tokens, unless a single row has more. Tokens excluded from training are not ordinary
        in them.
        """
        stream = replace(self, config=replace(self.config, seed=seed), epochs=None)
        for ids, end in stream._read(START):
            parts = list(token_batches(self.model, ids, size))
            for i in torch.randperm(len(parts), generator=_generator(seed, "parts", end.round)).tolist():
                yield parts[i].without(self.special)

    def _count(self, filled: _Round) -> int:
        """Number of batches of a round."""
        n, size = len(next(iter(filled.rows.values()))), self.config.batch_size
        return n // size if self.epochs is None else -(-n // size)

    def _yielded(self, filled: _Round, skipped: int) -> Iterator[tuple[Batch, Position]]:
        n, size, count = len(next(iter(filled.rows.values()))), self.config.batch_size, self._count(filled)
        for i in range(skipped, count):
            own = slice(i * size + self.ranks.rank, min((i + 1) * size, n), self.ranks.size)
            # Copied, so that a kept batch does not keep the whole round in memory.
            batch = {
                site: x[own].to(self.model.device, torch.float32, copy=True).contiguous()
                for site, x in filled.rows.items()
            }
            yield batch, replace(filled.start, batch=i + 1) if i + 1 < count else filled.end

    def _rounds(self, start: Position, stopping: threading.Event) -> Generator[_Round, None, None]:
        cache = self._cache()
        place, reading = replace(start, batch=0), None
        while True:
            filled = self._cached(cache, place) if cache is not None else None
            if filled is not None:
                reading = None  # it is behind the cached rounds
            else:
                reading = reading or self._read(place)
                try:
                    read = next(reading, None)
                except BaseException:
                    self._agreed(False)  # so that the other processes, waiting in `_exchange`, stop too
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

    def _cached(self, cache: RoundCache, place: Position) -> _Round | None:
        """The round from the cache if every process finds it there; otherwise all must take part in computing it."""
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
        """Rows of token ids of each round, with the position at which the next round begins."""
        special = self.special
        ids: list[list[int]] = []
        n, number = 0, start.round + 1
        bodies = self._bodies(start)
        for row, (epoch, document, offset) in cut(
            bodies, self.config.context, bos_before(self.model), self.config.pack, special
        ):
            ids.append(row)
            n += sum(token not in special for token in row)
            if n >= self.buffer:
                yield ids, Position(epoch, document, offset, number)
                ids, n, number = [], 0, number + 1
        if ids:
            yield ids, Position(self.epochs or 0, round=number)

    def _bodies(self, start: Position) -> Iterator[Body]:
        """Tokenised documents, epoch after epoch."""
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
                raise UserError("the documents contain no tokens besides special ones: give text")
            epoch, document = epoch + 1, 0
            log.info("all documents have been read %d times", epoch)

    def _filled(self, ids: list[list[int]], number: int, stopping: threading.Event) -> Rows:
        """Activations of a round in the order in which they are yielded."""
        parts = list(token_batches(self.model, ids, self.config.forward_tokens))
        sizes = [int(text_positions(part, self.special).sum()) for part in parts]
        n = sum(sizes)
        # Rows are written to their shuffled places directly: this saves a copy, and the cache is read sequentially.
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
            # Asked again before every block: a pass may take longer than the end of the program waits for its thread.
            with watching(model.layout.blocks, lambda *_: go_on(stopping), (), lambda *_: None):
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
        """Compute every size-th part here, and receive the other parts from the other processes."""
        from torch import distributed

        rank, size, group = self.ranks.rank, self.ranks.size, self.ranks.data
        own: dict[Site, list[Tensor]] = {site: [] for site in self.sites}
        failure: BaseException | None = None
        try:
            for model, part in turns[rank::size]:
                for site, x in self._forward(model, part, stopping).items():
                    own[site].append(x.to("cpu", filled[site].dtype))
        except BaseException as error:  # report it to the other ranks first, or they would wait forever
            failure = error
        if not self._agreed(failure is None):
            raise failure or UserError(
                "another process of the run failed or stopped while computing activations: see its error message, and "
                "continue from the last checkpoint with --resume true"
            )
        for source in range(size):
            if not places[source::size]:
                continue
            at = torch.cat(list(places[source::size]))
            for site, x in filled.items():
                block = torch.cat(own.pop(site)) if source == rank else x.new_empty(len(at), x.shape[1])
                distributed.broadcast(
                    block.view(torch.uint8), src=source, group=group
                )  # as bytes, since gloo does not support every dtype
                x[at] = block


def forward(model: LanguageModel, sites: Sequence[Site], tokens: Tokens, special: Collection[int]) -> Rows:
    """Values of each site at the positions of a batch that are trained on, in the model's dtype and on its device."""
    with torch.no_grad():
        captured = model.capture(tokens, sites)
    kept = text_positions(tokens, special)
    return {site: captured[site][kept.to(captured[site].device)] for site in sites}


def _name(place: Position) -> str:
    return f"{place.round:06d}-{place.epoch}-{place.document}-{place.offset}"


def _generator(*facts: int | str) -> torch.Generator:
    return torch.Generator().manual_seed(mixed_seed(*facts))
