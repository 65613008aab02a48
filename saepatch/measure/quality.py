"""Splice quality of a dictionary, and statistics of its latents."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from torch.nn.functional import log_softmax

from saepatch.data.texts import token_batches
from saepatch.dictionaries.active_values import ActiveValues
from saepatch.dictionaries.checks import warn_of_threshold
from saepatch.dictionaries.dictionary import Dictionary
from saepatch.dictionaries.latents import Latents
from saepatch.engine.passes.whole_pass import WholePass, can_skip, edited_logits, few_positions, whole_pass
from saepatch.errors import UserError
from saepatch.model.finite import check_finite
from saepatch.model.language_model import LanguageModel, Tokens
from saepatch.model.sites import Site
from saepatch.report.blocks import Simple, Table
from saepatch.report.notebook import Shown
from saepatch.report.text import number


@dataclass(frozen=True, repr=False)
class SpliceQuality(Shown):
    """What the model loses when a dictionary is its bottleneck at one site.

    Cross-entropies and `kl` are in nats per token, means over positions where an ordinary token follows an ordinary
    token (neither BOS nor padding); the other figures are over all ordinary positions. Tokens that the dictionary was
    not trained on (`Dictionary.excluded_tokens`) count as ordinary only as targets.

    Attributes:
        site: Where the dictionary was spliced.
        tokens: Number of ordinary positions measured.
        ce_model: Cross-entropy of the next token in the unedited model.
        ce_spliced: The same with the error term dropped at ordinary positions.
        ce_zero: The same with the site set to 0 at every position, BOS included.
        ce_zero_ordinary: The same with the site set to 0 at ordinary positions only, BOS unchanged.
        ce_mean: The same with the site set to its mean at ordinary positions.
        ce_recovered: (ce_zero - ce_spliced) / (ce_zero - ce_model), the field's figure: sae_lens' `ce_loss_score` with
            BOS among its `ignore_tokens`, SAEBench's with special tokens excluded. NaN where ablation changes nothing.
        ce_recovered_ordinary: The same against `ce_zero_ordinary`. Too favourable: a model with only BOS intact is
            often worse than a uniform prediction.
        ce_recovered_mean: The same against the mean ablation, which is harder to beat.
        kl: KL(model || spliced).
        fvu: Fraction of variance unexplained, sum |x - x̂|² / sum |x - mean(x)|².
        l0: Mean number of active latents.
        alive_share: Share of latents active at least once in these tokens.
        identity_error: Largest absolute difference of a logit between the model and the model whose site is written as
            reconstruction + error. More than rounding means that the splice is wrong.
    """

    site: Site
    tokens: int
    ce_model: float
    ce_spliced: float
    ce_zero: float
    ce_zero_ordinary: float
    ce_mean: float
    ce_recovered: float
    ce_recovered_ordinary: float
    ce_recovered_mean: float
    kl: float
    fvu: float
    l0: float
    alive_share: float
    identity_error: float

    def __repr__(self) -> str:
        return (
            f"{self.title}: {number(self.ce_recovered, '.1%')} of the loss recovered (over zeros), "
            f"{number(self.ce_recovered_mean, '.1%')} (over the mean)\n"
            f"cross-entropy {self.ce_model:.3f} → {self.ce_spliced:.3f} nats, KL {number(self.kl)}, FVU "
            f"{number(self.fvu)}, L0 {number(self.l0)}, {number(self.alive_share, '.1%')} of latents active"
        )

    @property
    def title(self) -> str:
        """Heading shown above the figures."""
        return f"Splice quality at {self.site} over {self.tokens:,} tokens"

    def blocks(self) -> list[Simple]:
        """The figures, with their units."""
        nats, share = "nats per token", "share"
        rows: list[tuple[str, float, str]] = [
            ("cross-entropy of the model", self.ce_model, nats),
            ("spliced: the dictionary alone", self.ce_spliced, nats),
            ("site set to 0", self.ce_zero, nats),
            ("site set to its mean", self.ce_mean, nats),
            ("loss recovered, over zeros", self.ce_recovered, share),
            ("loss recovered, over the mean", self.ce_recovered_mean, share),
            ("KL(model ‖ spliced)", self.kl, nats),
            ("variance unexplained (FVU)", self.fvu, share),
            ("active latents (L0)", self.l0, "per token"),
            ("latents active at least once", self.alive_share, share),
            ("largest difference of a logit, error kept", self.identity_error, "logits"),
        ]
        return [Table(["", "value", "unit"], [(what, number(value), unit) for what, value, unit in rows])]


@dataclass(frozen=True, eq=False)
class LatentStatistics:
    """Statistics of each latent on a text, used to match controls and as units of steering strength.

    Attributes:
        frequency: Share of ordinary positions where the latent is active (not 0).
        mean_active: Mean activation where it is active; 0 for a latent that never is.
        maximum: Largest activation (a_max); 0 for a latent that is never active.
        unit: The 0.95 quantile of the positive activations, which outliers do not move, as a unit of strength.
        norm: Length of the direction one unit of the latent adds to the site, before a normalising dictionary's scale.
        reach: Largest length that the latent writes to the site: maximum of activation times scale, times `norm`.
        unit_reach: The 0.95 quantile of that length, where the latent is positive.
        tokens: Number of ordinary positions measured.
    """

    frequency: Float[Tensor, "d_sae"]
    mean_active: Float[Tensor, "d_sae"]
    maximum: Float[Tensor, "d_sae"]
    unit: Float[Tensor, "d_sae"]
    norm: Float[Tensor, "d_sae"]
    reach: Float[Tensor, "d_sae"]
    unit_reach: Float[Tensor, "d_sae"]
    tokens: int

    @property
    def mean(self) -> Float[Tensor, "d_sae"]:
        """Mean activation over all ordinary positions, active or not: the value for mean ablation."""
        return self.frequency * self.mean_active

    @property
    def alive(self) -> Bool[Tensor, "d_sae"]:
        return self.frequency > 0


def splice_quality(
    model: LanguageModel, dictionary: Dictionary, tokens: Tokens | Sequence[str], batch_size: int = 32, first: int = 0
) -> SpliceQuality:
    """Measure what is lost when a site is replaced by its reconstruction.

    Two passes over the tokens, or over texts in rows of at most 1,024 tokens, in batches of at most `batch_size` rows;
    memory: the logits of one batch under at most three runs, which bounds the batch for large vocabularies.

    The `first` tokens of each row, BOS included, keep the model's own value and count in no figure (`splice` has the
    same): massive activations often stand there.

    Raises:
        UserError: the dictionary does not fit the model, or no ordinary token follows another.

    Source: the loss recovered of Bricken et al. 2023 ("Towards Monosemanticity"), as in sae_lens' `evals.py` and in the
    core evaluation of SAEBench (Karvonen et al. 2025), both of which zero every position; with two other ablations.
    """
    return splice_qualities(model, [dictionary], tokens, batch_size, first)[0][0]


def splice_qualities(
    model: LanguageModel,
    dictionaries: Sequence[Dictionary],
    tokens: Tokens | Sequence[str],
    batch_size: int = 32,
    first: int = 0,
) -> list[tuple[SpliceQuality, LatentStatistics]]:
    """`splice_quality` and `latent_statistics` of several dictionaries, each spliced separately.

    They share the model's unedited passes; the five edited passes of each dictionary begin at its site.

    Raises:
        UserError: a dictionary does not fit the model, or no ordinary token follows another.
    """
    for dictionary in dictionaries:
        dictionary.check(model)
    means = _means(model, dictionaries, tokens, batch_size, first)
    width = max(model.vocabulary, *(dictionary.d_sae for dictionary in dictionaries))
    measures = [_Measure(model, each, mean, first) for each, mean in zip(dictionaries, means, strict=True)]
    for batch in token_batches(model, tokens, batch_size, width):
        kept = whole_pass(model, [d.site for d in dictionaries], batch)
        for measure in measures:
            measure.add(kept)
    return [(measure.quality(), measure.sums.statistics(measure.dictionary)) for measure in measures]


def latent_statistics(
    model: LanguageModel, dictionary: Dictionary, tokens: Tokens | Sequence[str], batch_size: int = 32
) -> LatentStatistics:
    """Frequency, mean and maximum of every latent over the ordinary positions of the tokens.

    One pass over the tokens, or over texts in rows of at most 1,024 tokens, which stops at the dictionary's site.

    Raises:
        UserError: the dictionary does not fit the model, or there is no ordinary position.
    """
    dictionary.check(model)
    sums, site = _SiteSums.of(dictionary), dictionary.site
    for batch in token_batches(model, tokens, batch_size, dictionary.d_sae):
        x = model.capture(batch, [site])[site]
        check_finite(model, site, x, batch)
        sums.add(dictionary.encode(x), x[..., dictionary.writes], dictionary.known(model, batch))
    if not sums.n:
        raise UserError(_NOTHING)
    return sums.statistics(dictionary)


_NOTHING = "the tokens are only BOS and padding: give at least one ordinary token"


@dataclass(eq=False)
class _SiteSums:
    """Sums over ordinary positions, in float64."""

    x: Float[Tensor, "d_model"]
    active: Float[Tensor, "d_sae"]
    acts: Float[Tensor, "d_sae"]
    values: ActiveValues
    written: ActiveValues | None  # activations times the scale, where the dictionary normalises its input
    xx: float = 0.0
    residual: float = 0.0
    n: int = 0

    @classmethod
    def of(cls, dictionary: Dictionary) -> "_SiteSums":
        zeros = torch.zeros(dictionary.d_sae, dtype=torch.float64, device=_accurate(dictionary.W_dec[:1]).device)
        values = ActiveValues(dictionary.d_sae)
        written = ActiveValues(dictionary.d_sae) if dictionary.normalises else None
        width = len(range(dictionary.d_in)[dictionary.writes])
        return cls(zeros.new_zeros(width), zeros, zeros.clone(), values, written)

    @torch.no_grad()
    def add(self, latents: Latents, x: Float[Tensor, "batch pos d_model"], batch: Tokens) -> None:
        acts, ordinary = latents.acts[batch.ordinary], _accurate(x[batch.ordinary])
        self.x += ordinary.sum(0)
        self.xx += float((ordinary**2).sum())
        self.residual += float((_accurate(latents.error[batch.ordinary]) ** 2).sum())
        # float32 is accurate enough within a batch, but not over many.
        self.active += _accurate((acts != 0).sum(0))
        self.acts += _accurate(acts.sum(0))
        self.values.add(acts)
        if self.written is not None:
            self.written.add(acts if latents.scale is None else acts * latents.scale[batch.ordinary])
        self.n += len(acts)

    def statistics(self, dictionary: Dictionary) -> LatentStatistics:
        warn_of_threshold(dictionary, float(self.active.sum()) / self.n)
        device, norm = dictionary.W_dec.device, dictionary.rows.float().norm(dim=-1)
        unit = self.values.quantile().to(device)
        written = self.values if self.written is None else self.written
        return LatentStatistics(
            frequency=(self.active / self.n).float().to(device),
            mean_active=(self.acts / self.active.clamp(min=1)).float().to(device),
            maximum=self.values.maximum.to(device),
            unit=unit,
            norm=norm,
            reach=written.maximum.to(device) * norm,
            unit_reach=(unit if self.written is None else self.written.quantile().to(device)) * norm,
            tokens=self.n,
        )


def _accurate(x: Tensor) -> Tensor:
    """The values in float64; on the CPU where the device has none."""
    return x.cpu().double() if x.device.type == "mps" else x.double()


@torch.no_grad()
def _means(
    model: LanguageModel,
    dictionaries: Sequence[Dictionary],
    tokens: Tokens | Sequence[str],
    batch_size: int,
    first: int,
) -> list[Float[Tensor, "d_model"]]:
    """Mean of each dictionary's site over the ordinary positions it was trained on; one pass, up to the last site."""
    sums, counts = [torch.zeros(()) for _ in dictionaries], [0 for _ in dictionaries]
    for batch in token_batches(model, tokens, batch_size, model.d_model):
        values = model.capture(batch, {d.site for d in dictionaries})
        for place, dictionary in enumerate(dictionaries):
            check_finite(model, dictionary.site, values[dictionary.site], batch)
            known = dictionary.known(model, batch).after(first).ordinary
            total = _accurate(values[dictionary.site][known]).sum(0)
            sums[place], counts[place] = sums[place].to(total) + total, counts[place] + int(known.sum())
    if not all(counts):
        raise UserError(_NOTHING)
    return [(total / n).to(model.dtype).to(model.device) for total, n in zip(sums, counts, strict=True)]


class _Measure:
    """Sums over batches for the splice quality of one dictionary."""

    def __init__(
        self, model: LanguageModel, dictionary: Dictionary, mean: Float[Tensor, "d_model"], first: int
    ) -> None:
        self.model, self.dictionary, self.mean, self.first = model, dictionary, mean, first
        self.sums = _SiteSums.of(dictionary)
        self.ce: dict[str, float] = {}
        self.kl = self.identity = 0.0
        self.n = 0
        self._skip: bool | None = None  # whether edited passes can begin at the site; tested on the first batch

    @torch.no_grad()
    def add(self, kept: WholePass) -> None:
        batch, x = kept.tokens, kept.values[self.dictionary.site]
        latents = self.dictionary.encode(x)
        known = self.dictionary.known(self.model, batch).after(self.first)
        self.sums.add(latents, x[..., self.dictionary.writes], known)
        # The target is one column to the right of the predicting token, whichever side is padded.
        counted = known.ordinary[:, :-1] & batch.ordinary[:, 1:]
        if not bool(counted.any()):
            return
        if self._skip is None:
            self._skip = can_skip(self.model, kept, self.dictionary.site)
        where = known.ordinary[..., None]
        written = self._logits(kept, (latents.reconstruction + latents.error).to(x.dtype))
        for some in few_positions(batch.attention_mask.bool(), written.shape[-1]):
            gap = (written[some] - kept.logits[some]).abs().max()
            self.identity = float(torch.maximum(gap, gap.new_tensor(self.identity)))  # NaN stays NaN
        del written

        bottleneck = x - torch.where(where, latents.error, 0).to(x.dtype)  # as `splice` writes it
        spliced, losses = self._logits(kept, bottleneck), []
        for row, column in few_positions(counted, spliced.shape[-1]):
            before, after = (log_softmax(logits[row, column].float(), -1) for logits in (kept.logits, spliced))
            # A token with probability 0 adds nothing to the divergence, and must not make it NaN.
            gap = torch.where(before.isneginf(), 0.0, before - after)
            self.kl += float(_accurate((before.exp() * gap).sum(-1)).sum())
            target = batch.input_ids[row, column + 1, None]
            losses.append(torch.cat([log_p.gather(-1, target) for log_p in (before, after)], -1))
        for name, loss in zip(("model", "spliced"), -_accurate(torch.cat(losses)).sum(0), strict=True):
            self._add_ce(name, float(loss))
        del spliced
        zero_ordinary, mean = (torch.where(where, value, x) for value in (torch.zeros_like(self.mean), self.mean))
        for name, value in {"zero": torch.zeros_like(x), "zero_ordinary": zero_ordinary, "mean": mean}.items():
            self._add_ce(name, _loss(self._logits(kept, value), counted, batch))
        self.n += int(counted.sum())

    def _logits(self, kept: WholePass, value: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos vocab"]:
        return edited_logits(self.model, kept, self.dictionary.site, value, bool(self._skip))

    def _add_ce(self, name: str, loss: float) -> None:
        self.ce[name] = self.ce.get(name, 0.0) + loss

    def quality(self) -> SpliceQuality:
        if not self.n:
            raise UserError("no ordinary token is followed by another: give texts of at least two tokens besides BOS")
        sums, ce = self.sums, {name: value / self.n for name, value in self.ce.items()}
        variance = sums.xx - float((sums.x**2).sum()) / sums.n
        return SpliceQuality(
            site=self.dictionary.site,
            tokens=sums.n,
            ce_model=ce["model"],
            ce_spliced=ce["spliced"],
            ce_zero=ce["zero"],
            ce_zero_ordinary=ce["zero_ordinary"],
            ce_mean=ce["mean"],
            ce_recovered=_recovered(ce, "zero"),
            ce_recovered_ordinary=_recovered(ce, "zero_ordinary"),
            ce_recovered_mean=_recovered(ce, "mean"),
            kl=self.kl / self.n,
            fvu=sums.residual / variance if variance > 0 else float("nan"),
            l0=float(sums.active.sum()) / sums.n,
            alive_share=float((sums.active > 0).double().mean()),
            identity_error=self.identity,
        )


def _loss(logits: Float[Tensor, "batch pos vocab"], counted: Bool[Tensor, "batch predicting"], batch: Tokens) -> float:
    """Cross-entropy summed over the counted positions, each of which predicts the token to its right."""
    gained = [
        log_softmax(logits[row, column].float(), -1).gather(-1, batch.input_ids[row, column + 1, None])
        for row, column in few_positions(counted, logits.shape[-1])
    ]
    return -float(_accurate(torch.cat(gained)).sum())


def _recovered(ce: dict[str, float], ablation: str) -> float:
    lost = ce[ablation] - ce["model"]
    return (ce[ablation] - ce["spliced"]) / lost if abs(lost) > 1e-9 else float("nan")
