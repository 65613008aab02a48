"""What a dictionary keeps of a model, and how often each of its latents is active."""

from collections.abc import Iterator
from dataclasses import dataclass, field
from functools import partial

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor
from torch.nn.functional import log_softmax

from saepatch.dictionaries import Dictionary
from saepatch.errors import UserError
from saepatch.hooks import Edit, capture, edit_sites
from saepatch.models import LanguageModel, Tokens
from saepatch.sites import Site
from saepatch.splicing import splice


@dataclass(frozen=True)
class SpliceQuality:
    """What the model loses when a dictionary is its bottleneck at one site.

    Cross-entropies and `kl` are in nats a token, means over the places where an ordinary token follows an ordinary one
    (neither is BOS or padding); the other figures are over all ordinary positions.

    Attributes:
        site: Where the dictionary was spliced.
        tokens: Ordinary positions that were looked at.
        ce_model: Cross-entropy of the next token, the model untouched.
        ce_spliced: The same with the error term dropped at ordinary positions.
        ce_zero: The same with the site set to 0 there.
        ce_mean: The same with the site set to its mean there.
        ce_recovered: (ce_zero - ce_spliced) / (ce_zero - ce_model); NaN where the ablation changes nothing.
        ce_recovered_mean: The same against the mean ablation, which is harder to beat.
        kl: KL(model || spliced).
        fvu: Fraction of variance unexplained, sum |x - x̂|² / sum |x - mean(x)|².
        l0: Mean number of active latents.
        alive_share: Share of latents active at least once in these tokens.
        identity_error: Largest absolute difference of a logit between the model and the model whose site is written as
            reconstruction + error. Rounding alone, or the splice is wrong.
    """

    site: Site
    tokens: int
    ce_model: float
    ce_spliced: float
    ce_zero: float
    ce_mean: float
    ce_recovered: float
    ce_recovered_mean: float
    kl: float
    fvu: float
    l0: float
    alive_share: float
    identity_error: float


@dataclass(frozen=True, eq=False)
class LatentStatistics:
    """How each latent of a dictionary behaves on a text: what random controls are matched by, and steering measured in.

    Attributes:
        frequency: Share of ordinary positions where the latent is active (not 0).
        mean_active: Mean activation where it is active; 0 for a latent that never is.
        maximum: Largest activation (a_max); 0 for a latent that is never active.
        norm: Length of the direction one unit of the latent adds to the site.
        tokens: Ordinary positions that were looked at.
    """

    frequency: Float[Tensor, "d_sae"]
    mean_active: Float[Tensor, "d_sae"]
    maximum: Float[Tensor, "d_sae"]
    norm: Float[Tensor, "d_sae"]
    tokens: int

    @property
    def mean(self) -> Float[Tensor, "d_sae"]:
        """Mean activation over all ordinary positions, active or not: what mean ablation ablates to."""
        return self.frequency * self.mean_active

    @property
    def alive(self) -> Bool[Tensor, "d_sae"]:
        return self.frequency > 0


def splice_quality(model: LanguageModel, dictionary: Dictionary, tokens: Tokens, batch_size: int = 32) -> SpliceQuality:
    """Measure what is lost by sending a site through its dictionary.

    Two passes over the tokens, a batch at a time: the second holds the logits of one batch under three runs at most.

    Raises:
        UserError: the dictionary does not belong to the model, or the tokens hold no two ordinary ones in a row.

    Source: the loss recovered of Bricken et al. 2023 ("Towards Monosemanticity"), with both common ablations.
    """
    sums = _site_sums(model, dictionary, tokens, batch_size)
    mean = (sums.x / sums.n).to(model.dtype)
    total = _LossSums()
    for batch in _batches(tokens, batch_size):
        _add_losses(total, model, dictionary, batch, mean)
    if not total.n:
        raise UserError("no ordinary token is followed by another: give texts of at least two tokens beside BOS")
    ce = {name: value / total.n for name, value in total.ce.items()}
    variance = sums.xx - float((sums.x**2).sum()) / sums.n
    return SpliceQuality(
        site=dictionary.site,
        tokens=sums.n,
        ce_model=ce["model"],
        ce_spliced=ce["spliced"],
        ce_zero=ce["zero"],
        ce_mean=ce["mean"],
        ce_recovered=_recovered(ce, "zero"),
        ce_recovered_mean=_recovered(ce, "mean"),
        kl=total.kl / total.n,
        fvu=sums.residual / variance if variance > 0 else float("nan"),
        l0=float(sums.active.sum()) / sums.n,
        alive_share=float((sums.active > 0).double().mean()),
        identity_error=total.identity,
    )


def latent_statistics(
    model: LanguageModel, dictionary: Dictionary, tokens: Tokens, batch_size: int = 32
) -> LatentStatistics:
    """Frequency, mean and maximum of every latent over the ordinary positions of the tokens.

    One pass, a batch at a time, that stops at the dictionary's site.

    Raises:
        UserError: the dictionary does not belong to the model, or there is no ordinary position.
    """
    sums = _site_sums(model, dictionary, tokens, batch_size)
    return LatentStatistics(
        frequency=(sums.active / sums.n).float(),
        mean_active=(sums.acts / sums.active.clamp(min=1)).float(),
        maximum=sums.maximum.float(),
        norm=dictionary.rows.float().norm(dim=-1),
        tokens=sums.n,
    )


@dataclass(eq=False)
class _SiteSums:
    """Sums over ordinary positions, in float64."""

    x: Float[Tensor, "d_model"]
    active: Float[Tensor, "d_sae"]
    acts: Float[Tensor, "d_sae"]
    maximum: Float[Tensor, "d_sae"]
    xx: float = 0.0
    residual: float = 0.0
    n: int = 0


@torch.no_grad()
def _site_sums(model: LanguageModel, dictionary: Dictionary, tokens: Tokens, batch_size: int) -> _SiteSums:
    dictionary.check(model)
    site, zeros = dictionary.site, partial(torch.zeros, dtype=torch.float64, device=model.device)
    sums = _SiteSums(zeros(dictionary.d_in), zeros(dictionary.d_sae), zeros(dictionary.d_sae), zeros(dictionary.d_sae))
    for batch in _batches(tokens, batch_size):
        x = capture(model.hf, model.layout, [site], model.inputs(batch))[site]
        latents = dictionary.encode(x)
        acts, x = latents.acts[batch.ordinary], x[batch.ordinary].double()
        sums.x += x.sum(0)
        sums.xx += float((x**2).sum())
        sums.residual += float((latents.error[batch.ordinary].double() ** 2).sum())
        # Within a batch a fp32 sum is exact enough; over batches it would not be.
        sums.active += (acts != 0).sum(0)
        sums.acts += acts.sum(0)
        if len(acts):
            sums.maximum = torch.maximum(sums.maximum, acts.amax(0))
        sums.n += len(acts)
    if not sums.n:
        raise UserError("the tokens hold nothing beside BOS and padding: give at least one ordinary token")
    return sums


@dataclass(eq=False)
class _LossSums:
    ce: dict[str, float] = field(default_factory=dict)
    kl: float = 0.0
    identity: float = 0.0
    n: int = 0


@torch.no_grad()
def _add_losses(
    total: _LossSums,
    model: LanguageModel,
    dictionary: Dictionary,
    batch: Tokens,
    mean: Float[Tensor, "d_model"],
) -> None:
    # A target stands one column to the right of its predictor, whichever side the padding is on.
    counted = batch.ordinary[:, :-1] & batch.ordinary[:, 1:]
    targets = batch.input_ids[:, 1:][counted]
    if not len(targets):
        return
    real, where = batch.attention_mask.bool(), batch.ordinary[..., None]
    logits = model.logits(batch)
    plain = log_softmax(logits[:, :-1][counted].float(), -1)

    written = _edited(model, dictionary.site, batch, partial(_rewritten, dictionary))
    total.identity = max(total.identity, float((written - logits)[real].abs().max()))
    del logits, written
    with splice(model, dictionary, error="drop"):
        spliced = log_softmax(model.logits(batch)[:, :-1][counted].float(), -1)
    # A token the model rules out altogether (-inf) adds nothing to the divergence, and must not make it NaN.
    gap = torch.where(plain.isneginf(), 0.0, plain - spliced)
    total.kl += float((plain.exp() * gap).sum(-1).double().sum())
    _add_ce(total, "model", plain, targets)
    _add_ce(total, "spliced", spliced, targets)
    del plain, spliced, gap
    for name, value in {"zero": torch.zeros_like(mean), "mean": mean}.items():
        ablated = _edited(model, dictionary.site, batch, partial(_replaced, where, value))
        _add_ce(total, name, log_softmax(ablated[:, :-1][counted].float(), -1), targets)
    total.n += len(targets)


def _add_ce(
    total: _LossSums, name: str, log_probabilities: Float[Tensor, "n vocab"], targets: Int[Tensor, "n"]
) -> None:
    loss = -log_probabilities.gather(-1, targets[:, None]).double().sum()
    total.ce[name] = total.ce.get(name, 0.0) + float(loss)


def _edited(model: LanguageModel, site: Site, batch: Tokens, edit: Edit) -> Float[Tensor, "batch pos vocab"]:
    with edit_sites(model.layout, {site: edit}):
        return model.logits(batch)


def _rewritten(dictionary: Dictionary, x: Float[Tensor, "batch pos d_model"]) -> Float[Tensor, "batch pos d_model"]:
    latents = dictionary.encode(x)
    return (latents.reconstruction + latents.error).to(x.dtype)


def _replaced(
    where: Bool[Tensor, "batch pos 1"], value: Float[Tensor, "d_model"], x: Float[Tensor, "batch pos d_model"]
) -> Float[Tensor, "batch pos d_model"]:
    return torch.where(where, value, x)


def _recovered(ce: dict[str, float], ablation: str) -> float:
    lost = ce[ablation] - ce["model"]
    return (ce[ablation] - ce["spliced"]) / lost if abs(lost) > 1e-9 else float("nan")


def _batches(tokens: Tokens, size: int) -> Iterator[Tokens]:
    """Batches without the columns that are padding in all of their rows."""
    if not hasattr(tokens, "batches"):
        raise UserError("these are no tokens: give model.tokenize(texts)")
    if size < 1:
        raise UserError(f"batch size {size}: use at least 1")
    for batch in tokens.batches(size):
        used = batch.attention_mask.any(0).nonzero().flatten()
        if not len(used):
            continue
        columns = slice(int(used[0]), int(used[-1]) + 1)
        yield Tokens(batch.input_ids[:, columns], batch.attention_mask[:, columns], batch.ordinary[:, columns])
