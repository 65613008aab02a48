"""Settings that commands share: models, dictionaries, trackers, output.

In `--help`, a command's own settings come before these.
"""

import re
from dataclasses import dataclass
from typing import Literal

from saepatch.dictionaries.latent_set import LatentSet
from saepatch.errors import UserError
from saepatch.model.sites import Site
from saepatch.settings.checks import check_values

# Settings that do not affect the results: they may differ when a run is resumed. The revision of a model is among
# them, since a run compares the weights themselves.
FREE = frozenset(
    {"out", "track", "shard", "batch_size", "progress", "quiet", "json", "cache"}
    | {"device", "device_map", "revision", "trust_remote_code"}
)


class Settings:
    """Settings that are validated on construction."""

    def __post_init__(self) -> None:
        """Raises UserError for invalid values; subclasses add their own checks."""
        check_values(type(self), vars(self))


@dataclass(frozen=True, kw_only=True)
class ModelSettings(Settings):
    """Which model, and how it is loaded."""

    model: str = "organism"
    """The embedded model (organism, organism-base), a folder, or a Hugging Face id."""
    revision: str = ""
    """Revision of the model on the Hugging Face hub: a branch, a tag or a commit; empty: its main branch."""
    device: str = "cpu"
    """Where to run: cpu, cuda, cuda:1 or mps."""
    device_map: str = ""
    """auto: spread a model that is too large for one device over all available devices."""
    dtype: str = "float32"
    """Precision of the model: float32, bfloat16 or float16."""
    prepend_bos: bool | str = False
    """Prepend a BOS where the tokenizer does not; a token: prepend that one, for a tokenizer without BOS."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Leave off unless you trust its author."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.device_map not in ("", "auto"):
            raise UserError(f"device_map {self.device_map!r}: use auto, or leave it empty")


@dataclass(frozen=True, kw_only=True)
class DictionarySettings(Settings):
    """Which dictionaries are loaded."""

    sae: str = "organism"
    """Dictionaries: organism, a folder (of one dictionary, or with one sub-folder per site), or RELEASE/SAE_ID."""
    every_position: bool = False
    """Read and edit latents at special tokens, too, where a dictionary says that it was not trained on them."""


@dataclass(frozen=True, kw_only=True)
class Tracked(Settings):
    """Where a run is logged."""

    track: str = "none"
    """Besides the local log: none, wandb, wandb:offline, wandb:online, trackio, or several, separated by commas."""


@dataclass(frozen=True, kw_only=True)
class PageSettings(Settings):
    """An HTML page of what the command prints."""

    html: str = ""
    """HTML file to write the output to as well, with more about the latents."""
    track: str = "none"
    """Log the page to wandb, wandb:offline, wandb:online, trackio, or several, separated by commas; the local log is
    next to the page of --html, in FILE.log/."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.track != "none" and not self.html:
            raise UserError(f"track = {self.track!r} logs the page, and there is none: give --html FILE")


@dataclass(frozen=True, kw_only=True)
class Progress(Settings):
    """How progress is shown."""

    progress: Literal["auto", "bar", "log"] = "auto"
    """A bar, or a log line every 30 seconds; auto: a bar where the output is a terminal."""


@dataclass(frozen=True, kw_only=True)
class Output(Settings):
    """How results are printed."""

    json: bool = False
    """Print the results as one JSON object on standard output, for programs; implies quiet."""
    quiet: bool = False
    """Print only warnings, errors and results: no progress, no notes."""


def latents_of_sites(text: str) -> dict[Site, tuple[int, ...]]:
    """Latents listed in a text, grouped by site.

    Raises:
        UserError: the text cannot be parsed, or names no site.
    """
    if not (latents := LatentSet.parse(text).spelt()):
        raise UserError(
            f"latent {text!r}: write its site, a colon and its number, as in resid_post.3:281; several as in "
            "'resid_post.3: 281, 17 | resid_post.4: 5'"
        )
    return latents


def check_shard(text: str) -> None:
    """Raises UserError where a shard is neither I/N nor auto."""
    match = re.fullmatch(r"(\d{1,9})/(\d{1,9})", text)
    if text != "auto" and not (match and int(match[1]) < int(match[2])):
        raise UserError(f"shard {text!r}: write I/N with I from 0 to N-1, as in 0/4, or auto")
