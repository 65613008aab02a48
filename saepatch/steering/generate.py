"""Text under an intervention: steering interventions, continuations, and their evaluation."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from saepatch.dictionaries.dictionary import Dictionary
from saepatch.dictionaries.loading import adopt
from saepatch.engine.components import Directions
from saepatch.errors import UserError
from saepatch.model.language_model import LanguageModel
from saepatch.model.positions import Positions
from saepatch.splicing.interventions import Intervention, Steer
from saepatch.splicing.splice import splice
from saepatch.steering.fluency import continuation_nll


def equal_norm_steer(
    dictionary: Dictionary,
    latents: Sequence[int],
    maxima: Float[Tensor, "d_sae"],
    norm: float,
    strength: float = 1.0,
    positions: Positions = "all",
) -> Steer:
    """Add latents in proportion to their corpus maxima, so that together they move the site by `strength · norm`.

    With equal `norm`, one latent and ten perturb the residual stream equally far, so that only the direction differs.
    The norm is that at the site, independent of a dictionary's normalisation of its input.

    Raises:
        UserError: none of the latents fires in the reference corpus.
    """
    ids = list(latents)
    together = (maxima[ids, None] * dictionary.rows[ids]).sum(0).norm()
    if not float(together) > 0:
        raise UserError(f"latents {ids} never fire in the reference corpus, so they have no maximum: choose others")
    factor = norm / float(together)
    return Steer(tuple(ids), strength, tuple(factor * float(maxima[i]) for i in ids), positions, scaled=False)


@dataclass(frozen=True)
class Concept:
    """A steering target: prompts with and without the concept, prompts to continue, and a judge of continuations.

    Latents are chosen on `present` and `absent` at `positions`, and steered there. Strengths are chosen on `tune`;
    results are measured on `report`. `prefixes` are texts that ask for the concept in words before a prompt.
    """

    name: str
    present: tuple[str, ...]
    absent: tuple[str, ...]
    tune: tuple[str, ...]
    report: tuple[str, ...]
    shown: Callable[[str], bool]
    positions: str = "all"
    prefixes: tuple[str, ...] = ()


@dataclass(frozen=True)
class Steered:
    """Continuations under one intervention: which of them show the concept, and their log-probability.

    Attributes:
        texts: The continuations.
        shown: Whether each shows the concept.
        ids: Their token ids.
        nll: Negative log-probability of each under the unedited model, summed over its tokens, in nats.
    """

    texts: tuple[str, ...]
    shown: tuple[bool, ...]
    ids: tuple[tuple[int, ...], ...]
    nll: tuple[float, ...]

    @property
    def success(self) -> float:
        """Share of the continuations that show the concept."""
        return sum(self.shown) / len(self.shown)

    @property
    def perplexity(self) -> float:
        """Perplexity over all tokens together, under the unedited model; NaN without tokens."""
        count = sum(map(len, self.ids))
        return math.exp(sum(self.nll) / count) if count else float("nan")


def generate_steered(
    model: LanguageModel,
    dictionary: Dictionary | None,
    prompts: Sequence[str],
    intervention: Intervention | None,
    shows_concept: Callable[[str], bool],
    max_new_tokens: int = 24,
    prefix: str = "",
) -> Steered:
    """Continue prompts greedily under an intervention (or none), judge each continuation, and compute its nll.

    Args:
        dictionary: The intervention's dictionary; unused without an intervention.
        shows_concept: Judge of a continuation's text.
        prefix: Text before every prompt that asks for the concept in words, instead of an intervention. The nll of
            continuations is computed without it.

    Raises:
        UserError: an intervention without a dictionary.
    """
    if intervention is not None and dictionary is None:
        raise UserError("an intervention without a dictionary: give the dictionary of its latents")
    asked = [with_prefix(model, prefix, prompt) for prompt in prompts]
    with nullcontext() if intervention is None or dictionary is None else splice(model, dictionary, intervention):
        ids = model.continue_ids(asked, max_new_tokens)
    texts = model.tokenizer.batch_decode(ids)
    return Steered(
        tuple(texts),
        tuple(map(shows_concept, texts)),
        tuple(map(tuple, ids)),
        tuple(continuation_nll(model, prompts, ids)),
    )


def with_prefix(model: LanguageModel, prefix: str, prompt: str) -> str:
    """The prompt with a text in front; after the BOS text where the prompt begins with one."""
    bos = model.tokenizer.bos_token or ""
    return f"{bos}{prefix}{prompt.removeprefix(bos)}" if bos and prompt.startswith(bos) else prefix + prompt


def direction_dictionary(directions: Directions, device: str | torch.device = "cpu") -> Dictionary:
    """Directions as a dictionary for steering, whose latent j is never active and adds row j.

    `Steer(0, 3.0)` moves the site by 3 times the first direction.
    """
    from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig

    rows = directions.rows.detach().float().cpu()
    sae = StandardSAE(StandardSAEConfig(d_in=rows.shape[1], d_sae=len(rows)))
    with torch.no_grad():
        for parameter in sae.parameters():
            parameter.zero_()
        sae.W_dec.copy_(rows)
    return adopt(sae.to(device), directions.site, directions.name)
