"""What a training run is told. Written to disk beside what it makes."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from saepatch.errors import UserError
from saepatch.sites import Site
from saepatch.tracking import SPECS


@dataclass
class SAEConfig:
    """The dictionary that is trained at each site.

    Attributes:
        k: Latents active at each position (TopK).
        expansion: Latents per dimension of the model, where `d_sae` does not say.
        d_sae: Number of latents; none for `expansion` times the model's width.
        aux_coefficient: Weight of the loss that has dead latents explain what the living ones leave over.
        dead_after: Tokens without activation after which a latent counts as dead.
    """

    k: int = 32
    expansion: int = 8
    d_sae: int | None = None
    aux_coefficient: float = 1.0
    dead_after: int = 100_000

    def __post_init__(self) -> None:
        _positive("sae", k=self.k, expansion=self.expansion, dead_after=self.dead_after)
        if self.d_sae is not None:
            _positive("sae", d_sae=self.d_sae)
            self.check_width(self.d_sae)
        if not (math.isfinite(self.aux_coefficient) and self.aux_coefficient >= 0):
            raise UserError(f"sae.aux_coefficient is {self.aux_coefficient}: use 0 or more")

    def width(self, d_model: int) -> int:
        """Number of latents for a model of this width."""
        width = self.d_sae if self.d_sae is not None else self.expansion * d_model
        self.check_width(width)
        return width

    def check_width(self, d_sae: int) -> None:
        """Raises UserError when there are fewer latents than `k`."""
        if self.k > d_sae:
            raise UserError(f"sae.k is {self.k}, but the dictionary has {d_sae} latents: lower k or widen it")


@dataclass
class TrainingConfig:
    """One run: which activations, of which model, over which text, and how the dictionaries are fitted to them.

    Attributes:
        model: `organism`, `organism-base`, a folder, or a Hugging Face id.
        data: A .jsonl, .json, .parquet, .csv or .txt file, a folder of such files, or the id of a dataset on the hub.
        text_column: Where the text stands in each record.
        sites: Site strings such as resid_post.3, or `all`: resid_post of every layer.
        out: Folder for the dictionaries, the log and the summary.
        overwrite: Replace dictionaries that are in `out` already.
        sae: The dictionary.
        tokens: Tokens to train on; the text is read again, in another order, where it is shorter.
        batch_size: Tokens in a training step.
        context: Tokens in a row given to the model, BOS included; longer documents are cut.
        pack: Fill rows with several documents instead of padding them.
        forward_tokens: Tokens in a forward pass of the model, padding included.
        buffer: Activations that are mixed at a time, in tokens.
        lr: Learning rate of Adam.
        warmup: Share of the steps over which the learning rate rises to `lr`.
        decay: Share of the steps over which it falls to 0 at the end.
        held_out: Share of the documents that is kept for evaluation and never trained on.
        eval_tokens: Tokens of held-out text to evaluate on.
        log_every: Steps between two lines of the log.
        seed: Seed of everything random.
        device: Where the model and the dictionaries are, such as cpu or cuda.
        dtype: Precision of the model; dictionaries are float32.
        track: none, wandb, wandb:offline or wandb:online. A local log is always written.
    """

    model: str = "organism"
    data: str = ""
    text_column: str = "text"
    sites: list[str] | str = "all"
    out: Path = Path("runs/saes")
    overwrite: bool = False
    sae: SAEConfig = field(default_factory=SAEConfig)
    tokens: int = 2_000_000
    batch_size: int = 1024
    context: int = 256
    pack: bool = False
    forward_tokens: int = 8192
    buffer: int = 65_536
    lr: float = 3e-3
    warmup: float = 0.02
    decay: float = 0.3
    held_out: float = 0.05
    eval_tokens: int = 20_000
    log_every: int = 50
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    track: str = "none"

    def __post_init__(self) -> None:
        _positive("", tokens=self.tokens, batch_size=self.batch_size, forward_tokens=self.forward_tokens)
        _positive("", lr=self.lr, eval_tokens=self.eval_tokens, log_every=self.log_every)
        if self.track not in SPECS:
            raise UserError(f"track is {self.track!r}: use one of {', '.join(SPECS)}")
        if self.context < 2:
            raise UserError(f"context is {self.context}: a row needs at least 2 tokens")
        if self.tokens < self.batch_size:
            raise UserError(f"tokens is {self.tokens}, less than one batch of {self.batch_size}: raise it")
        if self.buffer < self.batch_size:
            raise UserError(f"buffer is {self.buffer}, less than one batch of {self.batch_size}: raise it")
        for name, share in {"warmup": self.warmup, "decay": self.decay}.items():
            if not 0 <= share <= 1:
                raise UserError(f"{name} is {share}: use a share of the steps between 0 and 1")
        if self.warmup + self.decay > 1:
            raise UserError(f"warmup {self.warmup} and decay {self.decay} are more than the whole run: lower one")
        if not 0 < self.held_out < 1:
            raise UserError(f"held_out is {self.held_out}: use a share of the documents between 0 and 1, as in 0.05")
        if isinstance(self.sites, list) and not self.sites:
            raise UserError("sites is empty: name at least one, as in resid_post.3, or use 'all'")
        for site in [] if self.sites == "all" else self.site_names:
            Site.parse(site)

    @property
    def site_names(self) -> list[str]:
        return [self.sites] if isinstance(self.sites, str) else self.sites

    @property
    def steps(self) -> int:
        return self.tokens // self.batch_size

    def sites_of(self, n_layers: int) -> list[Site]:
        """The sites of a model with this many layers, each once, by layer."""
        if self.sites == "all":
            return [Site(layer) for layer in range(n_layers)]
        return sorted({Site.parse(site) for site in self.site_names})

    def to_dict(self) -> dict[str, Any]:
        """Plain values, as a YAML file takes them."""
        return {**asdict(self), "out": str(self.out)}


def _positive(prefix: str, **values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"{prefix + '.' if prefix else ''}{name} is {value}: use a number above 0")
