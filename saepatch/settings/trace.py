"""Settings of `saepatch trace`."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from saepatch.errors import UserError
from saepatch.settings.mixins import ModelSettings, Output, PageSettings


@dataclass(frozen=True)
class TraceConfig(Output, PageSettings, ModelSettings):
    """Trace attention in a long document: which blocks each head reads, and what reading only these loses."""

    examples: ClassVar[tuple[str, ...]] = (
        "saepatch trace document.txt --html trace.html",
        'saepatch trace document.txt --model google/gemma-3-270m --k 0 --answer " Paris" --counter " Rome"',
    )

    document: str
    """A text file, read whole as one prompt; the end of the last line is dropped."""
    k: int = 8
    """Blocks of keys that each head reads for each block of queries; 0: the least that keeps the next token."""
    block: int = 64
    """Positions of a block."""
    measured: int = 16
    """Blocks of queries, besides the last, in which the dropped attention is measured; -1: all, in quadratic time."""
    answer: str = ""
    """A token whose logit is compared with that of --counter; empty: the two tokens that the whole model finds
    likeliest."""
    counter: str = ""
    """See --answer."""
    compare: Literal["auto", "yes", "no"] = "auto"
    """Run the whole model too, in quadratic time; auto: up to 8,192 tokens."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if bool(self.answer) != bool(self.counter):
            raise UserError("a logit difference takes two tokens: give both --answer and --counter, or neither")
        if self.k < 0 or self.measured < -1:
            raise UserError(f"k = {self.k}, measured = {self.measured}: use k of 0 or more, and measured of -1 or more")
