"""Corrupted runs made without a corrupted prompt.

`GaussianNoise` adds noise to the embeddings of the clean prompt's subject tokens; `Zero` and `Mean` ablate the patched
component, so that noising a unit ablates it. For resample ablation, use pairs made by
`saepatch.data.batches.resampled`.
"""

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Protocol, runtime_checkable

import numpy as np
import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saepatch.data.batches import PairBatch
from saepatch.engine.components import Component, ErrorTerm, LatentUnits, Patchable, as_components
from saepatch.engine.passes.kept_run import KeptRun
from saepatch.errors import UserError
from saepatch.model.hooks import edit_embeddings, embed_tokens, is_spliced
from saepatch.model.language_model import LanguageModel, Tokens
from saepatch.model.positions import Positions
from saepatch.model.sites import Site
from saepatch.splicing.splice import whole_prompt


@runtime_checkable
class Corruption(Protocol):
    """Makes the corrupted run. There are `samples` runs of each pair, over which effects are averaged.

    `at_component` is whether the corruption acts on the patched component, of which there can then be only one.
    """

    @property
    def samples(self) -> int: ...
    @property
    def at_component(self) -> bool: ...
    def run(
        self, model: LanguageModel, batch: PairBatch, components: Sequence[Component], clean: KeptRun, keep_cache: bool
    ) -> KeptRun:
        """The corrupted run of a batch in which each pair is repeated `samples` times."""
        ...


@dataclass(frozen=True)
class GaussianNoise:
    """The clean prompt with normal noise on the embeddings of its subject tokens: causal tracing.

    The noise's standard deviation is `sigma` times that of all token embeddings of the model. Each sample of each pair
    has its own noise, which depends only on `seed`, the clean prompt and the sample's number. Corrupted prompts are
    ignored.

    Source: Meng et al. 2022, "Locating and Editing Factual Associations in GPT", section 2.1, with their defaults for
    `sigma` and `samples`.

    Raises:
        UserError: on use, where a prompt does not contain the subject.
    """

    subject: Positions
    sigma: float = 3.0
    samples: int = 10
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.sigma > 0:
            raise UserError(f"sigma = {self.sigma}: noise needs a standard deviation above 0")
        if self.samples < 1:
            raise UserError(f"samples = {self.samples}: use at least 1")
        if self.seed < 0:
            raise UserError(f"seed = {self.seed}: use 0 or more")

    @property
    def at_component(self) -> bool:
        return False

    def run(
        self, model: LanguageModel, batch: PairBatch, components: Sequence[Component], clean: KeptRun, keep_cache: bool
    ) -> KeptRun:
        noise = self._noise(model, batch)
        # Edited passes resume from the run's sites, so the noise is needed only in this pass.
        with edit_embeddings(model.hf, lambda x: x + noise.to(x)):
            return KeptRun(model, batch.clean, {component.site for component in components}, keep_cache=keep_cache)

    def _noise(self, model: LanguageModel, batch: PairBatch) -> Float[Tensor, "batch pos d_embed"]:
        where = _chosen(model, batch, self.subject, self.samples).cpu().numpy()
        images = batch.clean.images
        if images is not None and bool((images.here.cpu().numpy() & where).any()):
            raise UserError(
                "noise is added to the embeddings of a text's tokens, which a picture replaces: corrupt pictures by a "
                "pair with another one"
            )
        width, spread = _embeddings(model)
        noise = np.zeros((*where.shape, width), dtype=np.float32)
        for row, (pair, chosen) in enumerate(zip(batch.pairs, where, strict=True)):
            # drawn only for the subject's tokens, on the CPU: independent of padding, batching, order and device
            text = int.from_bytes(hashlib.sha256(pair.clean.encode()).digest()[:8], "big")
            draw = np.random.default_rng((self.seed, text, row % self.samples))
            noise[row, chosen] = self.sigma * spread * draw.standard_normal((int(chosen.sum()), width))
        return torch.from_numpy(noise)


@dataclass(frozen=True)
class Zero:
    """The clean prompt with every unit of the patched component set to 0 (for latents, the error term is kept).

    Noising a unit is then its zero ablation, as a share of the effect of ablating all units; denoising restores only
    that unit in the run where all are ablated. `positions` are those of the ablation, independent of the sweep's own.
    """

    positions: Positions = "all"

    @property
    def samples(self) -> int:
        return 1

    @property
    def at_component(self) -> bool:
        return True

    def run(
        self, model: LanguageModel, batch: PairBatch, components: Sequence[Component], clean: KeptRun, keep_cache: bool
    ) -> KeptRun:
        return _ablated(model, batch, components, clean, keep_cache, self.positions, torch.zeros(()))


@dataclass(frozen=True, eq=False)
class Mean:
    """As `Zero`, but every unit is set to its mean over reference prompts: `Mean.over(model, dictionary, tokens)`.

    `values` are [pos, values], one mean for each of a prompt's own tokens (including BOS), or [values], the same for
    all tokens. `of` is the site and kind of the averaged component, which is checked where given.
    """

    values: Float[Tensor, "*pos values"] = field(repr=False)
    positions: Positions = "all"
    of: tuple[Site, str] | None = None

    @property
    def samples(self) -> int:
        return 1

    @property
    def at_component(self) -> bool:
        return True

    @classmethod
    @torch.no_grad()
    def over(
        cls,
        model: LanguageModel,
        what: Patchable,
        tokens: Tokens,
        by_position: bool = True,
        positions: Positions = "all",
        batch_size: int = 32,
    ) -> "Mean":
        """Means of a component (or a dictionary's latents) over prompts: at each position, or over all ordinary ones.

        Raises:
            UserError: means by position over prompts of unequal token length, no ordinary position, a component that
                does not fit the model, or a model that is inside a splice.
        """
        (component,) = as_components(model, what)
        if is_spliced(model.layout):
            raise UserError("means are taken on the unedited model, but it is inside a splice: leave the splice first")
        lengths = sorted(set(tokens.lengths.tolist()))
        if by_position and len(lengths) != 1:
            raise UserError(
                f"reference prompts have {lengths[0]} to {lengths[-1]} tokens, so their positions do not correspond: "
                "give prompts of equal token length, or take one mean for all positions (by_position=False)"
            )
        total, n = torch.zeros((), dtype=torch.float64, device=model.device), 0
        for batch in tokens.batches(batch_size):
            x = model.capture(batch, [component.site])[component.site]
            values = component.read(x).double()
            if by_position:
                total = total + values[batch.attention_mask.bool()].unflatten(0, (len(batch), -1)).sum(0)
                n += len(batch)
            else:
                where = batch.ordinary
                if isinstance(component, LatentUnits | ErrorTerm):
                    where = component.dictionary.known(model, batch).ordinary
                total = total + values[where].sum(0)
                n += int(where.sum())
        if not n:
            raise UserError(
                "the tokens hold nothing besides BOS, padding and what a dictionary was not trained on: give at least "
                "one ordinary token"
            )
        return cls((total / n).float(), positions, (component.site, component.kind))

    def run(
        self, model: LanguageModel, batch: PairBatch, components: Sequence[Component], clean: KeptRun, keep_cache: bool
    ) -> KeptRun:
        (component,) = components
        if self.of is not None and self.of != (component.site, component.kind):
            raise UserError(
                f"means of {self.of[1]!r} at {self.of[0]}, but {component.kind!r} at {component.site} is patched: take "
                "the means of the patched component"
            )
        values = self.values.to(model.device)
        if values.ndim == 2:
            for row, length in enumerate(batch.clean.lengths.tolist()):
                if length != len(values):
                    raise UserError(
                        f"{_name(batch, row)} has {length} tokens, but the means are for {len(values)} positions: take "
                        "means over prompts of that length, or by_position=False"
                    )
            values = values[whole_prompt(model, batch.clean).index.clamp(min=0)]
        return _ablated(model, batch, components, clean, keep_cache, self.positions, values)


def _ablated(
    model: LanguageModel,
    batch: PairBatch,
    components: Sequence[Component],
    clean: KeptRun,
    keep_cache: bool,
    positions: Positions,
    values: Float[Tensor, "*batch_pos_values"],
) -> KeptRun:
    """The clean run again, with all units of the component set to values at the chosen positions."""
    (component,) = components
    x = clean.values[component.site]
    own = component.read(x)
    if values.ndim and values.shape[-1] != own.shape[-1]:
        raise UserError(
            f"{values.shape[-1]} means, but {component.kind!r} at {component.site} has {own.shape[-1]} values: take "
            "the means of the patched component"
        )
    where = _chosen(model, batch, positions)
    if isinstance(component, LatentUnits | ErrorTerm):
        where = component.dictionary.editable(model, batch.clean.input_ids, where, positions)
    written = torch.where(where[..., None], values.to(own), own)
    new = component.write(x, written, where).applied(x)
    run = KeptRun(model, batch.clean, {component.site}, {component.site: lambda _: new}, keep_cache)
    run.written = written
    return run


def _chosen(
    model: LanguageModel, batch: PairBatch, positions: Positions, samples: int = 1
) -> Bool[Tensor, "batch pos"]:
    """Mask of the positions in the clean prompts; each pair has `samples` consecutive rows."""
    rows = []
    for row in range(0, len(batch), samples):
        try:
            where = whole_prompt(model, batch.clean.rows([row])).select(positions)
        except UserError as error:
            raise UserError(f"{_name(batch, row)}: {error}") from error
        if not bool(where.any()):
            raise UserError(f"{_name(batch, row)}: positions {positions!r} select no token of it: choose others")
        rows.append(where)
    return torch.cat(rows).repeat_interleave(samples, 0)


def _name(batch: PairBatch, row: int) -> str:
    pair = batch.pairs[row]
    return f"pair {pair.example or int(batch.index[row])}: the clean prompt {pair.clean!r}"


@torch.no_grad()
def _embeddings(model: LanguageModel) -> tuple[int, float]:
    """Width of the token embeddings, and the standard deviation of all their entries.

    Embeddings are looked up, not read from the weights, since some families (Gemma) scale them.
    """
    total = squares = 0.0
    n = width = 0
    for ids in torch.arange(int(model.config.get_text_config().vocab_size), device=model.device).split(4096):
        embedded = embed_tokens(model.hf)(ids).double()
        total, squares = total + float(embedded.sum()), squares + float((embedded**2).sum())
        n, width = n + embedded.numel(), embedded.shape[-1]
    return width, float(np.sqrt(squares / n - (total / n) ** 2))
