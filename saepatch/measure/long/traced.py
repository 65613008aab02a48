"""Results of a sparse trace, and their display."""

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray
from torch import Tensor

from saepatch.measure.long.sparse import BlockAttention
from saepatch.report.blocks import Cell, Facts, HeatMap, Simple, Table
from saepatch.report.notebook import Figure, Shown
from saepatch.report.text import number, token_text

COLUMNS = 32  # of the strip: longer prompts are drawn in stretches of several blocks
EXCERPT = 12  # tokens of a block that tables quote
READ = ("layer", "head", "positions", "begins", "attention", "trace")  # columns of the table of blocks


@dataclass(frozen=True)
class ReadBlock:
    """A block that a head's last position reads: its positions, the text it begins with, its share of the softmax.

    `kept` says whether the trace kept it.
    """

    layer: int
    head: int
    first: int
    last: int
    begins: str
    attention: float
    kept: bool

    @property
    def positions(self) -> str:
        return f"{self.first:,}–{self.last:,}"

    @property
    def trace(self) -> str:
        return "kept" if self.kept else "dropped"


@dataclass(frozen=True)
class AgainstDense:
    """The traced pass against the whole model, at the next token.

    Attributes:
        next_token: The whole model's next token.
        kept: Whether the traced pass has the same.
        kl: Divergence of the traced pass from the whole model, in nats.
        compared: The two tokens whose logit difference is compared.
        difference, difference_traced: That difference, in the whole model and in the traced pass.
    """

    next_token: str
    kept: bool
    kl: float
    compared: tuple[str, str]
    difference: float
    difference_traced: float


@dataclass(frozen=True, eq=False, repr=False)
class AttentionTrace(Shown):
    """Which blocks of a prompt each head reads in a sparse pass, and exactly what it dropped.

    Attributes:
        model: Name of the model.
        tokens: The texts of the prompt's tokens.
        block: Positions of a block.
        k: Key blocks chosen for each head and query block.
        chosen: By layer, the chosen key blocks for each head and query block; −1: there were fewer. The first block,
            the own, the one before it and those cut by a window's edge are kept besides.
        exact: By layer, measurements over the whole prompt for some query blocks, the last among them.
        next_token: The most likely next token of the traced pass.
        against: The traced pass against the whole model; None: it did not run.
        tried: Where the least k was searched: by k, whether the next token was kept.
    """

    model: str
    tokens: tuple[str, ...]
    block: int
    k: int
    chosen: Mapping[int, Int[Tensor, "heads blocks k"]]
    exact: Mapping[int, tuple[BlockAttention, ...]]
    next_token: str
    against: AgainstDense | None = None
    tried: Mapping[int, bool] = field(default_factory=dict)

    @property
    def layers(self) -> tuple[int, ...]:
        return tuple(self.exact)

    @property
    def blocks_of_prompt(self) -> int:
        """Number of blocks of the prompt."""
        return -(-len(self.tokens) // self.block)

    def dropped(self, layer: int) -> Float[ndarray, "heads queries"]:
        """Share of the softmax on keys that were not kept, for each head and measured query, in order of position."""
        return np.concatenate([part.dropped.cpu().numpy() for part in self.exact[layer]], 1)

    def dropped_at_end(self, layer: int) -> Float[ndarray, "heads"]:
        """The same for the prompt's last position alone, whose next token is predicted."""
        return self.exact[layer][-1].dropped[:, -1].cpu().numpy()

    def recall(self, layer: int) -> Float[ndarray, "heads"]:
        """Mean share of the k key blocks with most attention that were chosen; NaN: there were never more than k."""
        values = np.stack([part.recall.cpu().numpy() for part in self.exact[layer]])
        known = ~np.isnan(values)
        return np.where(known.any(0), np.where(known, values, 0).sum(0) / np.maximum(known.sum(0), 1), np.nan)

    def read(self, layer: int) -> Float[ndarray, "heads blocks"]:
        """Attention of the prompt's last position on each block of the prompt, over all keys: rows sum to 1.

        Where heads have a sink of their own (gpt-oss), rows sum to what it leaves.
        """
        return self.exact[layer][-1].last.cpu().numpy()

    def __repr__(self) -> str:
        return f"{self.summary()}\n.plot() draws which blocks the last position reads"

    def summary(self) -> str:
        """What was traced and what was lost, in lines."""
        lines = [f"{self.title}: {len(self.tokens):,} tokens in {self.blocks_of_prompt} blocks, k = {self.k}"]
        return "\n".join([*lines, *(f"{name}: {text}" for name, text in self._facts().items())])

    def facts(self) -> dict[str, Any]:
        """The trace as JSON values; attention of the last position is that of each head, over all keys."""
        return {
            "model": self.model,
            "tokens": len(self.tokens),
            "block": self.block,
            "k": self.k,
            "next_token": self.next_token,
            "against": None if self.against is None else asdict(self.against),
            "tried": {str(k): kept for k, kept in self.tried.items()},
            "layers": {
                str(layer): {
                    "dropped": float(self.dropped(layer).mean()),
                    "dropped_at_end": self.dropped_at_end(layer).tolist(),
                    "recall": [None if np.isnan(share) else float(share) for share in self.recall(layer)],
                    "read": self.read(layer).tolist(),
                }
                for layer in self.layers
            },
            "most_read": [asdict(each) for each in self.most_read()],
        }

    def most_read(self, most: int = 10) -> list["ReadBlock"]:
        """The blocks that the last position reads most, by head, without the prompt's first and last two."""
        return [
            ReadBlock(
                layer,
                head,
                block * self.block,
                min(len(self.tokens), (block + 1) * self.block) - 1,
                "".join(self.tokens[block * self.block : block * self.block + EXCERPT]),
                share,
                bool(self.exact[layer][-1].kept[head, block]),
            )
            for share, layer, head, block in self._most_read(most)
        ]

    @property
    def title(self) -> str:
        """What stands above the blocks of a report."""
        return f"Sparse attention trace of {self.model}"

    def _facts(self) -> dict[str, str]:
        queries = sum(part.dropped.shape[1] for part in self.exact[self.layers[0]])
        dropped = [self.dropped(layer) for layer in self.layers]
        end = np.array([self.dropped_at_end(layer).max() for layer in self.layers])
        facts = {
            "next token": token_text(self.next_token),
            f"attention dropped, mean of {queries:,} queries": number(float(np.concatenate(dropped).mean()), ".2%"),
            "the most by one query": number(float(max(x.max() for x in dropped)), ".1%"),
            "the most by a head at the last position": number(float(end.max()), ".1%"),
        }
        recall = np.concatenate([self.recall(layer) for layer in self.layers])
        if not np.isnan(recall).all():
            facts["recall of the true top k"] = number(float(np.nanmean(recall)), ".1%")
        if (whole := self.against) is not None:
            kept = "kept" if whole.kept else f"lost (the whole model: {token_text(whole.next_token)})"
            change = whole.difference_traced - whole.difference
            names = " − ".join(token_text(token) for token in whole.compared)
            facts["next token"] += f", {kept}"
            facts["divergence from the whole model"] = f"{number(whole.kl)} nats"
            facts[f"logit difference {names}"] = f"{number(whole.difference)}, by tracing {change:+.3g}"
        if self.tried:
            facts["tried"] = ", ".join(f"{k} {'keeps' if kept else 'loses'}" for k, kept in sorted(self.tried.items()))
        return facts

    def blocks(self) -> list[Simple]:
        """What was lost, the strip over the document, and the blocks that the last position reads most."""
        head = {"tokens": f"{len(self.tokens):,}", "blocks": f"{self.blocks_of_prompt} of {self.block} tokens"}
        return [Facts(head | {"k": str(self.k)} | self._facts()), self.plot().chart, self._table()]

    def plot(self) -> Figure:
        """The strip: attention of the last position on stretches of the document, by layer (mean of its heads)."""
        together = -(-self.blocks_of_prompt // COLUMNS)
        starts = np.arange(0, self.blocks_of_prompt, together)
        rows = [np.add.reduceat(self.read(layer).mean(0), starts).tolist() for layer in self.layers]
        wide = together * self.block
        bounds = [*(starts * self.block).tolist(), len(self.tokens)]
        columns = [f"{first:,}–{end - 1:,}" for first, end in pairwise(bounds)]
        caption = f"Share of the whole softmax, exact, mean over heads; each column holds {wide:,} positions."
        title = "What the last position reads"
        names = [f"layer {layer}" for layer in self.layers]
        return Figure(HeatMap(title, names, columns, rows, caption, column_label="positions", value_format=".2f"))

    def _table(self) -> Table:
        rows: list[list[Cell]] = [
            [each.layer, each.head, each.positions, token_text(each.begins) + "…", each.attention, each.trace]
            for each in self.most_read()
        ]
        caption = "The blocks that the last position reads most, by head, without the prompt's first and last two."
        return Table(list(READ), rows, caption, {"layer": "d", "head": "d", "attention": ".1%"})

    def _most_read(self, most: int) -> Iterator[tuple[float, int, int, int]]:
        """The largest shares with their layer, head and block; the sink and the last two blocks are left out."""
        shares = []
        for layer in self.layers:
            far = self.read(layer)[:, 1:-2]
            for at in np.argsort(-far, axis=None, kind="stable")[:most].tolist():
                head, block = divmod(at, far.shape[1])
                shares.append((float(far[head, block]), layer, head, block + 1))
        yield from sorted(shares, reverse=True)[:most]
