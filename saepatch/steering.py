"""Steering: choose latents by contrast, generate under an intervention, and see what it costs."""

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from saepatch.dictionaries import Dictionary
from saepatch.errors import UserError
from saepatch.interventions import Intervention, Steer
from saepatch.models import LanguageModel, Tokens
from saepatch.positions import Positions
from saepatch.splicing import record_latents, splice, whole_prompt


@torch.no_grad()
def latent_means(
    model: LanguageModel,
    dictionary: Dictionary,
    tokens: Tokens,
    positions: Positions = "all",
    batch_size: int = 64,
) -> Float[Tensor, "sequences d_sae"]:
    """Mean of each latent over each sequence's chosen positions; "all" are those without BOS and padding."""
    means = []
    for part in tokens.batches(batch_size):
        acts = record_latents(model, dictionary, part).acts
        weight = whole_prompt(model, part).select(positions)[..., None].to(acts.dtype)
        means.append((acts * weight).sum(1) / weight.sum(1).clamp(min=1))
    return torch.cat(means)


def contrast(
    model: LanguageModel,
    dictionary: Dictionary,
    with_concept: Sequence[str],
    without: Sequence[str],
    positions: Positions = "all",
) -> Float[Tensor, "d_sae"]:
    """Difference of the means of per-sequence latent means, times the norm of each latent's row.

    The norm makes latents compare by how much they write, not by the units of their activations.
    """
    if not with_concept or not without:
        raise UserError("a contrast needs prompts with the concept and prompts without: one of the two sets is empty")
    means = [
        latent_means(model, dictionary, model.tokenize(texts), positions).mean(0) for texts in (with_concept, without)
    ]
    return (means[0] - means[1]) * dictionary.rows.norm(dim=-1)


def equal_norm_steer(
    dictionary: Dictionary,
    latents: Sequence[int],
    maxima: Float[Tensor, "d_sae"],
    norm: float,
    strength: float = 1.0,
    positions: Positions = "all",
) -> Steer:
    """Add latents in proportion to their corpus maxima, so that together they move the site by `strength · norm`.

    With equal `norm`, one latent and ten perturb the stream equally far, so that only the direction differs.
    """
    ids = list(latents)
    together = (maxima[ids, None] * dictionary.rows[ids]).sum(0).norm()
    if not float(together) > 0:
        raise UserError(f"latents {ids} never fire in the reference corpus, so they have no maximum to steer by")
    factor = norm / float(together)
    return Steer(tuple(ids), strength, tuple(factor * float(maxima[i]) for i in ids), positions)


@dataclass(frozen=True)
class Steered:
    """Continuations under one intervention: which of them show the concept, and the cost in fluency."""

    texts: tuple[str, ...]
    shown: tuple[bool, ...]
    perplexity: float

    @property
    def success(self) -> float:
        """Share of the continuations that show the concept."""
        return sum(self.shown) / len(self.shown)


def generate_steered(
    model: LanguageModel,
    dictionary: Dictionary,
    prompts: Sequence[str],
    intervention: Intervention | None,
    shows_concept: Callable[[str], bool],
    max_new_tokens: int = 24,
) -> Steered:
    """Continue prompts greedily under an intervention (or none), judge each continuation, and price it.

    The perplexity is that of the continuations under the model without the intervention.
    """
    with splice(model, dictionary, intervention) if intervention is not None else nullcontext():
        ids = model.continue_ids(prompts, max_new_tokens)
    texts = model.tokenizer.batch_decode(ids)
    return Steered(tuple(texts), tuple(map(shows_concept, texts)), perplexity(model, prompts, ids))


@torch.no_grad()
def perplexity(model: LanguageModel, prompts: Sequence[str], continuations: Sequence[Sequence[int]]) -> float:
    """Perplexity of continuations (token ids) given their prompts, over all their tokens together; NaN without any.

    Ids and not texts: tokenised again, a text can fall apart into other tokens than those that were generated.
    """
    total, count = 0.0, 0
    for prompt, new in zip(prompts, continuations, strict=True):
        if not new:
            continue
        before = model.encode(prompt)
        start, ids = len(before), [*before, *new]
        logits = model.logits(model.pad([ids]))[0, start - 1 : -1].double()
        targets = torch.tensor(ids[start:], device=logits.device)
        total -= float(logits.log_softmax(-1).gather(-1, targets[:, None]).sum())
        count += len(targets)
    return float(torch.tensor(total / count).exp()) if count else float("nan")
