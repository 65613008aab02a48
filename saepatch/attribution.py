"""Attribution patching: what each latent contributes to an effect, from gradients instead of one run an edit."""

from collections.abc import Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from saepatch.dictionaries import Dictionary
from saepatch.errors import UserError
from saepatch.hooks import edit_sites, skip_blocks
from saepatch.metrics import Metric, logit_difference
from saepatch.models import LanguageModel, Tokens
from saepatch.positions import Positions
from saepatch.prompts import PairBatch, PromptPair, batch_pairs, same_length_batches
from saepatch.splicing import line_up, record_latents, whole_prompt


def integrated_gradients(
    model: LanguageModel,
    dictionary: Dictionary,
    pairs: Sequence[PromptPair],
    positions: Positions = "all",
    metric: Metric = logit_difference,
    steps: int = 10,
    batch_size: int = 64,
) -> tuple[Float[Tensor, "pairs d_sae"], Float[Tensor, "pairs"]]:
    """Share of each latent, and of the error term, in the change that patching the clean run's site makes.

    `Σ_p Δf_j,p · (mean gradient_p · d_j)` with the gradient of the metric averaged at the midpoints of `steps` equal
    parts of the way from the corrupted to the clean run's site (Sundararajan et al. 2017; on latents, Marks et al.
    2024). In units of the metric. Latents and error together approach `m(site patched) − m(corrupted)` as `steps`
    grows (completeness).

    Raises:
        UserError: pairs that do not line up, or fewer than one step.
    """
    if steps < 1:
        raise UserError(f"{steps} steps: integrate over at least 1")
    dictionary.check(model)
    latents = torch.zeros(len(pairs), dictionary.d_sae, dtype=torch.float64)
    errors = torch.zeros(len(pairs), dtype=torch.float64)
    for part in same_length_batches(batch_pairs(model, pairs), batch_size):
        base, source = (record_latents(model, dictionary, t) for t in (part.corrupted, part.clean))
        where = whole_prompt(model, part.corrupted).select(positions) & line_up(part.corrupted, part.clean)
        start = base.reconstruction + base.error
        end = source.reconstruction + source.error
        way = torch.where(where[..., None], end - start, torch.zeros_like(start))
        gradient = torch.zeros_like(start)
        for step in range(steps):
            gradient += _gradient(model, dictionary, part, start + (step + 0.5) / steps * way, metric) / steps
        acts = torch.where(where[..., None], source.acts - base.acts, torch.zeros_like(base.acts))
        # a dictionary that normalises its input writes Δf in the scale of the base run
        along = gradient @ base.rows.T if base.scale is None else (gradient * base.scale) @ base.rows.T
        index = part.index.cpu()
        latents[index] = (acts * along).sum(1).double().cpu()
        errors[index] = (way * gradient).sum((1, 2)).double().cpu() - latents[index].sum(-1)
    return latents, errors


def _gradient(
    model: LanguageModel, dictionary: Dictionary, part: PairBatch, x: Float[Tensor, "batch pos d"], metric: Metric
) -> Float[Tensor, "batch pos d"]:
    """Gradient of the metric with respect to the site, at a value of it; blocks before the site are skipped."""
    site = dictionary.site
    leaf = x.detach().to(model.dtype).requires_grad_()
    with (
        torch.enable_grad(),
        skip_blocks(model.layout, site.blocks_before),
        edit_sites(model.layout, {site: lambda _: leaf}),
    ):
        value = metric(_next_logits(model, part.corrupted), part).sum()
        return torch.autograd.grad(value, leaf)[0].to(x.dtype)


def _next_logits(model: LanguageModel, tokens: Tokens) -> Float[Tensor, "batch vocab"]:
    logits = model.hf(**model.inputs(tokens)).logits
    return logits[torch.arange(len(tokens), device=logits.device), tokens.last]
