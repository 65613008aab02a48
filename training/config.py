"""Settings of a training run, written to disk beside its dictionaries."""

import math
import re
from dataclasses import asdict, dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Literal

from saepatch.errors import UserError
from saepatch.settings.checks import check_values
from saepatch.tracking.open import read_spec

# Site imports torch, which would make --help slow. (With postponed annotations, jsonargparse would import it.)
if TYPE_CHECKING:
    from saepatch.model.sites import Site

Architecture = Literal["standard", "gated", "jumprelu", "topk", "batchtopk", "matryoshka"]

BUFFER = 65_536  # tokens in a buffer by default,
BUFFER_BYTES = 2**30  # unless they take more than this: a bound of the machine's free memory would change the numbers


@dataclass
class SAEConfig:
    """Settings of the dictionary trained at each site.

    Attributes:
        architecture: standard (L1), gated, jumprelu, topk, batchtopk or matryoshka (nested BatchTopK).
        k: Number of active latents: at each position (topk), on average (batchtopk, matryoshka), or the target of
            jumprelu's quadratic penalty. In other architectures it follows from `sparsity`.
        expansion: Latents per dimension of the site; ignored if `d_sae` is set.
        d_sae: Number of latents; none: `expansion` times the site's width.
        levels: Nested shares of the dictionary, each trained to reconstruct alone (matryoshka); ends with 1.
        sparsity: Coefficient of the sparsity penalty (standard, gated, jumprelu).
        sparsity_warmup: Share of the steps over which that coefficient rises to its value.
        p_end: Exponent that the L1 penalty is annealed to (standard); 1 keeps L1.
        penalty: JumpReLU's penalty: step (its L0), tanh, or quadratic (the squared distance of its L0 from `k`).
        tanh_scale: Steepness of the tanh penalty.
        threshold: Initial value of jumprelu's thresholds.
        bandwidth: Width of the straight-through estimator of jumprelu's jump.
        estimate_inputs: Pass the straight-through estimate on to the encoder too (jumprelu).
        threshold_rate: Weight of each batch's smallest active value in the running threshold (batchtopk, matryoshka).
        aux_coefficient: Weight of the auxiliary loss, in which dead latents reconstruct the residual (topk,
            batchtopk, matryoshka).
        aux_share: Share of a batch's positions (the first ones) used for the auxiliary loss; more is slower.
        dead_after: Number of tokens without activation after which a latent counts as dead.
        bias: Initial decoder bias: the mean or the geometric median of the activations, or zero.
        precision: Precision of the large matrix products in training: float32 or bfloat16. Weights are float32.
    """

    architecture: Architecture = "topk"
    k: int = 32
    expansion: int = 8
    d_sae: int | None = None
    levels: list[float] = field(default_factory=lambda: [1 / 16, 1 / 8, 1 / 4, 1 / 2, 1.0])
    sparsity: float = 1.0
    sparsity_warmup: float = 0.1
    p_end: float = 1.0
    penalty: Literal["step", "tanh", "quadratic"] = "quadratic"
    tanh_scale: float = 4.0
    threshold: float = 0.01
    bandwidth: float = 0.05
    estimate_inputs: bool = False
    threshold_rate: float = 0.01
    aux_coefficient: float = 1.0
    aux_share: float = 0.125
    dead_after: int = 100_000
    bias: Literal["mean", "median", "zero"] = "mean"
    precision: Literal["float32", "bfloat16"] = "float32"

    def __post_init__(self) -> None:
        check_values(SAEConfig, vars(self), "sae.")
        _positive("sae", k=self.k, expansion=self.expansion, dead_after=self.dead_after, bandwidth=self.bandwidth)
        _positive("sae", tanh_scale=self.tanh_scale, aux_share=self.aux_share)
        _shares("sae", aux_share=self.aux_share)
        _shares("sae", sparsity_warmup=self.sparsity_warmup, threshold_rate=self.threshold_rate)
        if self.d_sae is not None:
            _positive("sae", d_sae=self.d_sae)
            self.check_width(self.d_sae)
        for name in ("aux_coefficient", "sparsity", "threshold"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise UserError(f"sae.{name} is {value}: use 0 or more")
        if not 0 < self.p_end <= 1:
            raise UserError(f"sae.p_end is {self.p_end}: use more than 0 and at most 1 (1 keeps the L1 penalty)")
        levels = self.levels
        if not levels or levels[-1] != 1 or levels[0] <= 0 or any(a >= b for a, b in pairwise(levels)):
            raise UserError(f"sae.levels is {levels}: use increasing shares that end with 1, as in [0.25, 1]")

    def width(self, d_in: int) -> int:
        """Number of latents at a site of this width."""
        width = self.d_sae if self.d_sae is not None else self.expansion * d_in
        self.check_width(width)
        return width

    def widths(self, d_sae: int) -> list[int]:
        """Number of latents in each level of a matryoshka dictionary.

        Raises:
            UserError: two levels are equal after rounding, or one is empty.
        """
        widths = [round(level * d_sae) for level in self.levels]
        if widths[0] < 1 or any(a >= b for a, b in pairwise(widths)):
            raise UserError(f"sae.levels {self.levels} of {d_sae} latents are {widths}: leave out the smallest levels")
        return widths

    def check_width(self, d_sae: int) -> None:
        """Raises UserError when there are fewer latents than `k`."""
        if self.k > d_sae:
            raise UserError(f"sae.k is {self.k}, but the dictionary has {d_sae} latents: lower k or widen it")


@dataclass
class TrainingConfig:
    """Settings of a training run: the model and sites, the text, and the training of the dictionaries.

    Attributes:
        model: `organism`, `organism-base`, a folder, or a Hugging Face id.
        revision: Revision of `model` on the hub: a branch, a tag or a commit; empty: its main branch.
        prepend_bos: Begin every row with BOS if the tokenizer adds none (GPT-2's does not), or with the token of the
            given text if the tokenizer has no BOS.
        trust_remote_code: Run code that comes with the model. Leave off unless you trust its author.
        also: Further models with the same tokenizer and widths to train the dictionaries on, such as the base model of
            an aligned one; forward passes alternate among all models.
        data: A .jsonl, .json, .parquet, .csv or .txt file, a folder of such files, or the id of a dataset on the hub.
        subset: Configuration of a hub dataset that has several.
        split: Split of a hub dataset.
        streaming: Read a hub dataset during training instead of downloading it first.
        text_column: Column that holds the text, or messages (role and content, for the model's chat template), or token
            ids.
        sites: Site strings such as resid_post.3, or `all`: resid_post of every layer.
        out: Folder for the dictionaries, the log, the checkpoints and the summary.
        overwrite: Replace existing dictionaries in `out`.
        resume: Continue from the newest intact checkpoint in `out`, if there is one.
        initial: Dictionaries to begin with in place of random ones, such as those of a finished run that gets more
            tokens: a folder with one for each site, or anything that --sae takes. Optimiser and schedule begin anew.
        sae: Settings of the dictionary.
        tokens: Tokens to train on; a shorter text is read again, each time in another order.
        batch_size: Tokens in a training step, over all processes.
        context: Tokens in a row given to the model, BOS included; longer documents are cut.
        pack: Fill rows with several documents instead of padding them.
        special_tokens: Also train on the tokenizer's special tokens, such as a chat template's markers (never on BOS
            and padding).
        forward_tokens: Tokens in a forward pass of the model, padding included.
        buffer: Size of the buffer in which activations are shuffled, in tokens; 0: 65,536, or as many as take 1 GB
            over all sites, but at least 8 batches.
        prefetch: Fill the next buffer in a thread during training (single process only).
        cache: Folder that caches activations for other runs over the same text; empty: no cache.
        cache_gb: Maximal size of the cache; activations that do not fit are computed again.
        lr: Learning rate of Adam.
        beta1: Adam's decay of the mean gradient.
        beta2: Adam's decay of the mean squared gradient.
        warmup: Share of the steps over which the learning rate rises to `lr`.
        decay: Share of the steps at the end over which it falls to 0.
        clip: Maximal norm of each dictionary's gradient; 0: no clipping.
        ema: Decay of the exponential moving average of the weights, which is saved in their place; 0: no averaging.
        finetune_tokens: Tokens of fine-tuning through the splice (KL of the model's predictions and squared error),
            after `tokens`; 0: none.
        finetune_lr: Learning rate of the fine-tuning.
        held_out: Share of the documents that is kept for evaluation and never trained on.
        eval_tokens: Tokens of held-out text to evaluate on.
        eval_every: Tokens between two evaluations during training; 0: only at the end.
        log_every: Steps between two lines of the log.
        checkpoint_every: Tokens between two checkpoints; 0: only when the run is stopped.
        save_every: Tokens between two sets of finished dictionaries, in `out/snapshots/TOKENS`; 0: only at the end.
        keep_checkpoints: Number of newest checkpoints to keep.
        seed: Random seed.
        device: Device of the model and the dictionaries, such as cpu or cuda.
        dtype: Precision of the model; dictionaries are float32.
        compile: Compile the steps that become faster by it (needs a C++ compiler; takes a minute at the start).
        track: none, wandb, wandb:offline, wandb:online, trackio, or several separated by commas. A local log is always
            written.
        upload: Upload the dictionaries to W&B; otherwise only their path and hash are logged.
        sweep: Values to try by setting, as in {sae.k: [8, 16], lr: [1.0e-3, 3.0e-3]}: one run for every combination,
            each in a folder of `out` such as sae.k=8,lr=0.001. Or the YAML file of a W&B sweep (grid or random).
        point: One run of a sweep by its values, as in {sae.k: 8, lr: 0.001}, in the folder of `out` that the sweep
            gives it: what an agent of W&B runs.
        shard: Share of a sweep's runs to run here, as I/N with I from 0 to N-1.
        shard_latents: Under torchrun, give each process an equal range of every dictionary's latents, which it trains
            on whole batches, instead of a copy (topk, batchtopk, matryoshka).
        dry_run: Print shapes, memory and an estimate of the time instead of training; no weights are loaded.
    """

    # Not in --help, but in --help_all.
    seldom: ClassVar[frozenset[str]] = frozenset(
        {
            *("also", "subset", "split", "streaming", "text_column", "pack", "special_tokens", "held_out"),
            *("forward_tokens", "prefetch", "cache", "cache_gb", "beta1", "beta2", "warmup", "decay", "clip", "ema"),
            *("finetune_lr", "eval_tokens", "log_every", "keep_checkpoints", "compile", "upload", "point"),
            *("buffer", "context", "sae.levels", "sae.sparsity_warmup", "sae.p_end", "sae.penalty", "sae.tanh_scale"),
            *("sae.threshold", "sae.bias", "sae.bandwidth", "sae.estimate_inputs", "sae.threshold_rate"),
            *("sae.aux_coefficient", "sae.aux_share", "sae.dead_after", "sae.precision"),
        }
    )

    model: str = "organism"
    revision: str = ""
    prepend_bos: bool | str = False
    trust_remote_code: bool = False
    also: list[str] = field(default_factory=list)
    data: str = ""
    subset: str | None = None
    split: str = "train"
    streaming: bool = False
    text_column: str = "text"
    sites: list[str] | str = "all"
    out: Path = Path("runs/saes")
    overwrite: bool = False
    resume: bool = False
    initial: str = ""
    sae: SAEConfig = field(default_factory=SAEConfig)
    tokens: int = 2_000_000
    batch_size: int = 1024
    context: int = 256
    pack: bool = False
    special_tokens: bool = False
    forward_tokens: int = 8192
    buffer: int = 0
    prefetch: bool = True
    cache: str = ""
    cache_gb: float = 20.0
    lr: float = 3e-3
    beta1: float = 0.9
    beta2: float = 0.999
    warmup: float = 0.02
    decay: float = 0.3
    clip: float = 1.0
    ema: float = 0.0
    finetune_tokens: int = 0
    finetune_lr: float = 1e-4
    held_out: float = 0.05
    eval_tokens: int = 20_000
    eval_every: int = 0
    log_every: int = 50
    checkpoint_every: int = 2_000_000
    save_every: int = 0
    keep_checkpoints: int = 2
    seed: int = 0
    device: str = "cpu"
    dtype: str = "float32"
    compile: bool = False
    track: str = "none"
    upload: bool = False
    sweep: dict[str, list[Any]] | str = field(default_factory=dict)
    point: dict[str, Any] = field(default_factory=dict)
    shard: str = "0/1"
    shard_latents: bool = False
    dry_run: bool = False

    def buffer_tokens(self, token_bytes: int) -> int:
        """Tokens in the buffer, where the activations of one token at all sites take `token_bytes`."""
        return self.buffer or max(8 * self.batch_size, min(BUFFER, BUFFER_BYTES // token_bytes))

    def __post_init__(self) -> None:
        check_values(TrainingConfig, vars(self))
        _positive("", tokens=self.tokens, batch_size=self.batch_size, forward_tokens=self.forward_tokens)
        _positive("", lr=self.lr, finetune_lr=self.finetune_lr, eval_tokens=self.eval_tokens, log_every=self.log_every)
        _positive("", keep_checkpoints=self.keep_checkpoints, cache_gb=self.cache_gb)
        for name in ("checkpoint_every", "save_every", "eval_every", "finetune_tokens", "clip"):
            value = getattr(self, name)
            if not (math.isfinite(value) and value >= 0):
                raise UserError(f"{name} is {value}: use 0 or more")
        for name in ("beta1", "beta2", "ema"):
            value = getattr(self, name)
            if not 0 <= value < 1:
                raise UserError(f"{name} is {value}: use 0 or more, and less than 1")
        read_spec(self.track)
        if self.context < 2:
            raise UserError(f"context is {self.context}: a row needs at least 2 tokens")
        if self.tokens < self.batch_size:
            raise UserError(f"tokens is {self.tokens}, less than one batch of {self.batch_size}: raise it")
        if self.buffer and self.buffer < self.batch_size:
            raise UserError(f"buffer is {self.buffer}, less than one batch of {self.batch_size}: raise it")
        _shares("", warmup=self.warmup, decay=self.decay)
        if self.warmup + self.decay > 1:
            raise UserError(f"warmup {self.warmup} and decay {self.decay} add up to more than 1: lower one")
        if not 0 < self.held_out < 1:
            raise UserError(f"held_out is {self.held_out}: use a share of the documents between 0 and 1, as in 0.05")
        if isinstance(self.sites, list) and not self.sites:
            raise UserError("sites is empty: name at least one, as in resid_post.3, or use 'all'")
        if self.sites != "all":
            self.sites_of(0)
        if self.sweep and self.point:
            raise UserError(f"sweep = {self.sweep!r} and point = {self.point!r}: give one of them")
        share = re.fullmatch(r"(\d{1,9})/(\d{1,9})", self.shard)
        if share is None or int(share[1]) >= int(share[2]):
            raise UserError(f"shard {self.shard!r}: write I/N with I from 0 to N-1, as in 0/4")

    @property
    def site_names(self) -> list[str]:
        return [self.sites] if isinstance(self.sites, str) else self.sites

    @property
    def steps(self) -> int:
        return self.tokens // self.batch_size

    def sites_of(self, n_layers: int) -> "list[Site]":
        """The sites of a model with this many layers, sorted and without repetitions."""
        from saepatch.model.sites import Site

        if self.sites == "all":
            return [Site(layer) for layer in range(n_layers)]
        return sorted({Site.parse(site) for site in self.site_names})

    def to_dict(self) -> dict[str, Any]:
        """The settings as plain values for a YAML file."""
        return {**asdict(self), "out": str(self.out)}


def _positive(prefix: str, **values: float) -> None:
    for name, value in values.items():
        if not (math.isfinite(value) and value > 0):
            raise UserError(f"{prefix + '.' if prefix else ''}{name} is {value}: use a number above 0")


def _shares(prefix: str, **values: float) -> None:
    for name, value in values.items():
        if not 0 <= value <= 1:
            raise UserError(f"{prefix + '.' if prefix else ''}{name} is {value}: use a share between 0 and 1")
