"""Settings of `saepatch edit`."""

import re
from dataclasses import dataclass
from typing import ClassVar, Literal

from saepatch.errors import UserError
from saepatch.settings.mixins import ModelSettings, Output, Progress, Tracked, check_shard


@dataclass(frozen=True)
class EditConfig(Output, Progress, Tracked, ModelSettings):
    """Edit facts in a model's MLP weights, and measure what changes and what breaks; can be stopped and resumed."""

    examples: ClassVar[tuple[str, ...]] = (
        "saepatch edit --requests organism --method memit --layers 3,4 --token last --weight 100 --clamp 4",
        "saepatch edit --requests facts.jsonl --method rome --layers 5 --apply each --model gpt2 --reference wiki.txt",
    )
    command: ClassVar[str] = "edit"
    requests: str = ""
    """Facts to change: organism (landmarks and capitals of the embedded model); a .jsonl, .json, .csv or .parquet file,
    a folder saved by `datasets`, or a dataset, OWNER/NAME, with prompt (as in "{} is in the city of"), subject, target
    and true, and optionally the questions to measure on: paraphrases, neighbourhood, reversal and ripple."""
    split: str = "train"
    """Split of a dataset; files have none."""
    n: int = 0
    """Maximum number of requests; 0: all."""
    method: Literal["rome", "rome-original", "memit", "emmet", "alphaedit"] = "rome"
    """rome: one fact at a time at one layer, with the same key throughout (r-ROME); rome-original: with the mixed keys
    of the first published code; memit, emmet, alphaedit: all facts in one update, spread over layers."""
    layers: str = ""
    """Layers to edit: one for rome, as in 5; one or several for the others, as in 3,4,5 or 3-5; empty: the one a third
    of the way up, as published for GPT-2, and for methods that spread up to four below it, too."""
    token: Literal["subject", "last"] = "subject"
    """Token at which facts are edited: the subject's last one, or the prompt's."""
    apply: Literal["together", "each"] = "together"
    """together: one delta with all facts, saved as delta.safetensors; each: every fact alone on the unedited model."""
    delta: str = ""
    """A delta of the same model, saved by an earlier run, to add the edits to."""
    reference: str = ""
    """Texts over which the keys' covariance is measured: a .txt file (one text per line), .jsonl, .csv, .parquet or
    .json (column text); empty: the embedded model's own texts."""
    cache: str = ""
    """Folder in which covariances are kept, by the model's weights, for other runs; empty: inside the run's folder."""
    ridge: float = 0.0
    """Share of the covariance's mean diagonal that is added to its diagonal, where too few texts leave it singular."""
    weight: float = 0.0
    """λ of memit (15000) and alphaedit (10); 0: these."""
    threshold: float = 0.02
    """Eigenvalues of the covariance below this span the null space of alphaedit."""
    prefixes: int = -1
    """Number of sampled prefixes before each prompt, of 10 tokens; 0: the bare prompt alone; -1: as published."""
    clamp: float = 0.0
    """Largest norm of a value's change, relative to the value's own norm; 0: 4 for rome, 0.75 for the others."""
    steps: int = 20
    """Largest number of steps in the search for each value."""
    tokens: int = 20
    """Tokens of the texts generated before and after; at least 3, since their variety is measured."""
    seed: int = 0
    """Seed of prefixes, of sampled texts and of bootstrap draws."""
    shard: str = "0/1"
    """Share of the requests to measure: I/N counting from 0, or auto to take it from a Slurm job array or torchrun;
    `saepatch merge` merges the shards."""
    part: int = 16
    """Number of requests per write: at most so many are lost when the run is killed."""
    out: str = "runs/edit"
    """Folder for report.html, summary.json, results.parquet and delta.safetensors."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.requests:
            raise UserError("no requests: give --requests FILE.jsonl, one object with prompt, subject, target and true")
        if self.method.startswith("rome") and len(self.layer_numbers) > 1:
            raise UserError(f"layers {self.layers}: rome edits one layer; give one, or --method memit")
        at_least = {"n": 0, "ridge": 0, "weight": 0, "prefixes": -1, "clamp": 0, "steps": 1, "tokens": 3, "part": 1}
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise UserError(f"{name} = {getattr(self, name)}: use at least {least}")
        if not self.threshold > 0:
            raise UserError(f"threshold = {self.threshold}: use a number above 0")
        if self.delta and self.apply == "each":
            raise UserError("apply each edits the unedited model: leave --delta out, or use --apply together")
        check_shard(self.shard)
        if not self.out:
            raise UserError("out is empty: give a folder for the results")

    @property
    def layer_numbers(self) -> tuple[int, ...]:
        """The layers, in order; none where the setting is empty.

        Raises:
            UserError: the text names no layer, or cannot be parsed.
        """
        if not self.layers.strip():
            return ()
        numbers: set[int] = set()
        for part in self.layers.split(","):
            match = re.fullmatch(r"\s*(\d{1,5})(?:-(\d{1,5}))?\s*", part)
            if match is None:
                raise UserError(f"layers {self.layers!r}: give --layers, as in 5, 3,4,5 or 3-5")
            numbers |= set(range(int(match[1]), int(match[2] or match[1]) + 1))
        if not numbers:
            raise UserError(f"layers {self.layers!r} name no layer: put the lower number first, as in 3-5")
        return tuple(sorted(numbers))
