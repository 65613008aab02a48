"""Fine-tune a trained dictionary through the splice, on the KL of the model's predictions and the squared error."""

import math
from collections.abc import Callable, Iterator, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from saepatch.engine.passes.whole_pass import WholePass, can_skip, edited_logits, whole_pass
from saepatch.errors import UserError
from saepatch.model.language_model import LanguageModel, Tokens, refuse_training
from saepatch.model.sites import Site

from ..config import TrainingConfig
from ..ranks import ALONE, Ranks

_LOGITS_AT_ONCE = 2**27  # elements; the graph of a pass from the site on holds a few times as many


def finetune(
    model: LanguageModel,
    site: Site,
    reconstruct: Callable[[Float[Tensor, "batch pos d_in"]], Float[Tensor, "batch pos d_in"]],
    parameters: Sequence[Tensor],
    batches: Iterator[Tokens],
    config: TrainingConfig,
    after_step: Callable[[], None],
    ranks: Ranks = ALONE,
) -> Iterator[dict[str, float]]:
    """Train for `config.finetune_tokens` on squared error plus KL(model || spliced); yields the figures of each step.

    At ordinary positions the site's value is replaced by the reconstruction, without the error term; other positions
    keep the model's value. Both losses are means over ordinary positions, and at every step the divergence is scaled to
    the same size as the squared error. The model's weights are constant and get no gradient. The learning rate falls
    from `config.finetune_lr` to 0. No hooks stay on the model between steps.

    Args:
        model: The model that the dictionary is spliced into.
        site: The site of the splice.
        reconstruct: The dictionary's reconstruction of the site's value, differentiable in `parameters`.
        parameters: Leaf tensors that require a gradient; changed in place.
        batches: Text, this process's share of each batch. All processes' batches have the same weight.
        config: The run.
        after_step: Called after each step to restore the constraints on the parameters.
        ranks: The processes of the run.

    Yields:
        kl (nats per token) and fvu of the batch, from before the step; lr; tokens so far, over all processes.

    Raises:
        UserError: the text ends before `config.finetune_tokens`, or a loss is not finite.

    Source: after Karvonen 2025, "Revisiting End-to-End Sparse Autoencoder Training: A Short Finetune Is All You Need".
    """
    refuse_training(model)
    optimiser = torch.optim.Adam(parameters, lr=config.finetune_lr, betas=(config.beta1, config.beta2))
    done, skip = 0, None
    while done < config.finetune_tokens:
        batch = next(batches, None)
        if batch is None:
            raise UserError(
                f"the text ended after {done:,} of {config.finetune_tokens:,} tokens of fine-tuning: "
                "lower finetune_tokens, or give more text"
            )
        kept = whole_pass(model, [site], batch)
        if skip is None:
            skip = can_skip(model, kept, site)
        gradients, figures = _gradients(model, kept, site, reconstruct, parameters, skip, ranks)
        lr = config.finetune_lr * (1 - done / config.finetune_tokens)
        _step(optimiser, parameters, gradients, lr, config.clip)
        after_step()
        done += round(figures.pop("tokens"))
        yield {**figures, "lr": lr, "tokens": float(done)}


def _gradients(
    model: LanguageModel,
    kept: WholePass,
    site: Site,
    reconstruct: Callable[[Tensor], Tensor],
    parameters: Sequence[Tensor],
    skip: bool,
    ranks: Ranks,
) -> tuple[tuple[Tensor | None, ...], dict[str, float]]:
    """Gradients of `mse + (mse / kl) · kl`, the ratio held fixed, and the figures of the batch."""
    x, ordinary = kept.values[site], kept.tokens.ordinary
    n = int(ordinary.sum())
    if not n:
        raise UserError("a batch of fine-tuning holds only BOS and padding: give longer text")
    with torch.enable_grad():
        reconstruction = reconstruct(x.float())
    error = torch.where(ordinary[..., None], reconstruction.detach() - x.float(), 0)
    divergence, towards_kl = _divergence(model, kept, site, reconstruction.detach(), skip)
    values = x[ordinary].float()
    variance = (values - values.mean(0)).pow(2).sum() / n
    means = torch.stack([error.pow(2).sum() / n, divergence, variance, torch.tensor(float(n), device=x.device)])
    ranks.mean_([means])
    mse, kl, variance_, tokens = means.tolist()
    if not (math.isfinite(mse) and math.isfinite(kl)):
        raise UserError(f"fine-tuning at {site}: the squared error is {mse}, the KL {kl}: lower finetune_lr")
    # In units of the variance, so that Adam's epsilon means the same at every site.
    towards = (2 / n * error + mse / max(kl, 1e-12) * towards_kl) / max(variance_, 1e-30)
    gradients: tuple[Tensor | None, ...] = torch.autograd.grad(reconstruction, parameters, towards, allow_unused=True)
    ranks.mean_([gradient for gradient in gradients if gradient is not None])
    return gradients, {"kl": kl, "fvu": mse / max(variance_, 1e-30), "tokens": tokens * ranks.size}


def _divergence(
    model: LanguageModel, kept: WholePass, site: Site, reconstruction: Float[Tensor, "batch pos d_in"], skip: bool
) -> tuple[Float[Tensor, ""], Float[Tensor, "batch pos d_in"]]:
    """KL(model || spliced), averaged over ordinary positions, and its gradient with respect to the reconstruction.

    Rows are processed in chunks, since the graph of all logits would dominate memory.
    """
    batch, pos, vocabulary = kept.logits.shape
    n, at_once = int(kept.tokens.ordinary.sum()), max(1, _LOGITS_AT_ONCE // (pos * vocabulary))
    total, gradient = torch.zeros((), device=kept.logits.device), torch.zeros_like(reconstruction)
    for start in range(0, batch, at_once):
        rows = slice(start, start + at_once)
        part = kept.rows(rows)
        ordinary = part.tokens.ordinary
        if not bool(ordinary.any()):
            continue
        with torch.enable_grad():
            leaf = reconstruction[rows].detach().requires_grad_()
            x = part.values[site]
            bottleneck = torch.where(ordinary[..., None], leaf.to(x.dtype), x)
            spliced = edited_logits(model, part, site, bottleneck, skip)[ordinary].float().log_softmax(-1)
            plain = part.logits[ordinary].float().log_softmax(-1)
            # A token with probability 0 (-inf) contributes nothing to the divergence; without this it would be NaN.
            gap = torch.where(plain.isneginf(), 0.0, plain - spliced)
            kl = (plain.exp() * gap).sum() / n
            (gradient[rows],) = torch.autograd.grad(kl, leaf)
        total += kl.detach()
    return total, gradient


@torch.no_grad()
def _step(
    optimiser: torch.optim.Optimizer,
    parameters: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    lr: float,
    clip: float,
) -> None:
    for parameter, gradient in zip(parameters, gradients, strict=True):
        parameter.grad = gradient
    if clip:
        torch.nn.utils.clip_grad_norm_(parameters, clip)
    for group in optimiser.param_groups:
        group["lr"] = lr
    optimiser.step()
    optimiser.zero_grad(set_to_none=True)
