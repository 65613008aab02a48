"""Text under an intervention: steering interventions, continuations, and their evaluation."""

import math
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor

from saepatch.dictionaries.dictionary import Dictionary
from saepatch.dictionaries.loading import adopt
from saepatch.engine.components import Directions
from saepatch.errors import UserError
from saepatch.model.language_model import LanguageModel
from saepatch.model.positions import Positions
from saepatch.report.blocks import Comparison, Simple
from saepatch.report.notebook import Shown
from saepatch.splicing.donors import Restore
from saepatch.splicing.interventions import Intervention, Steer
from saepatch.splicing.splice import Dictionaries, Interventions, splice
from saepatch.steering.fluency import continuation_nll


def equal_norm_steer(
    dictionary: Dictionary,
    latents: Sequence[int],
    units: Float[Tensor, "d_sae"],
    norm: float,
    strength: float = 1.0,
    positions: Positions = "all",
) -> Steer:
    """Add latents in proportion to their units of strength (`latent_statistics(…).unit`, or `.maximum`).

    Together they move the site by `strength · norm`.

    With equal `norm`, one latent and ten perturb the residual stream equally far, so that only the direction differs.
    The norm is that at the site, independent of a dictionary's normalisation of its input.

    Raises:
        UserError: none of the latents fires in the reference corpus.
    """
    ids = list(latents)
    together = (units[ids, None] * dictionary.rows[ids]).sum(0).norm()
    if not float(together) > 0:
        raise UserError(
            f"latents {ids} never fire in the reference corpus, so they have no unit of strength: choose others"
        )
    factor = norm / float(together)
    return Steer(tuple(ids), strength, tuple(factor * float(units[i]) for i in ids), positions, scaled=False)


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
    texts = [model.continuation(row) for row in ids]
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


@dataclass(frozen=True, eq=False, repr=False)
class Generations(Shown):
    """Greedy continuations of prompts by the unedited model and under a splice; shown side by side in a notebook."""

    prompts: tuple[str, ...]
    unedited: tuple[str, ...]
    edited: tuple[str, ...]
    edit: str

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def changed(self) -> int:
        """Number of prompts that are continued differently."""
        return sum(one != other for one, other in zip(self.unedited, self.edited, strict=True))

    @property
    def title(self) -> str:
        """Heading shown above the texts."""
        return f"Without and with {self.edit}: {self.changed} of {len(self)} prompts continued differently"

    def __repr__(self) -> str:
        lines = [self.title]
        for prompt, one, other in list(zip(self.prompts, self.unedited, self.edited, strict=True))[:2]:
            lines += [f"prompt   {_short(prompt)}", f"  unedited {_short(one)}", f"  edited   {_short(other)}"]
        return "\n".join(lines)

    def blocks(self) -> list[Simple]:
        """Every prompt with both texts; words that differ are marked."""
        columns = zip(self.unedited, self.edited, strict=True)
        named = [[("unedited", one), (f"with {self.edit}", other)] for one, other in columns]
        return [Comparison(prompt, texts, changes=True) for prompt, texts in zip(self.prompts, named, strict=True)]

    def to_pandas(self) -> Any:
        """A pandas frame with the columns prompt, unedited, edited (all `string`) and changed (`bool`)."""
        import pandas as pd

        texts = {"prompt": self.prompts, "unedited": self.unedited, "edited": self.edited}
        frame = pd.DataFrame({name: pd.array(list(column), dtype="string") for name, column in texts.items()})
        return frame.assign(changed=[a != b for a, b in zip(self.unedited, self.edited, strict=True)])


def _short(text: str, most: int = 90) -> str:
    shown = repr(text)
    return shown if len(shown) <= most else shown[: most - 1] + "…"


def compare_generations(
    model: LanguageModel,
    dictionaries: Dictionaries,
    interventions: Interventions,
    prompts: Sequence[str],
    max_new_tokens: int = 40,
    batch_size: int = 64,
) -> Generations:
    """Continue prompts greedily without and with interventions.

    Raises:
        UserError: as for `splice`, or a prompt is empty or too long.
        SpliceError: an intervention acted nowhere.
    """
    unedited = model.generate(prompts, max_new_tokens, batch_size)
    with splice(model, dictionaries, interventions):
        edited = model.generate(prompts, max_new_tokens, batch_size)
    several = [interventions] if not isinstance(interventions, Sequence) else interventions
    names = " and ".join(describe_edit(each) for each in several)
    return Generations(tuple(prompts), tuple(unedited), tuple(edited), names or "the dictionary spliced")


def describe_edit(intervention: Intervention | Restore) -> str:
    """An intervention in a few words: its kind, latents, strength and positions."""
    parts = [type(intervention).__name__]
    latents = getattr(intervention, "latents", None)
    if isinstance(latents, int):
        parts.append(str(latents))
    elif isinstance(latents, Sequence):
        parts.append(",".join(map(str, latents[:4])) + (", …" if len(latents) > 4 else ""))
    if isinstance(strength := getattr(intervention, "strength", None), float | int):
        parts.append(f"× {strength:g}")
    if isinstance(positions := getattr(intervention, "positions", None), str):
        parts.append(f"({positions})")
    return " ".join(parts)
