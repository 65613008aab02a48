"""Latents that separate two sets of prompts, by every score at once."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor

from saepatch.data.texts import load_texts
from saepatch.dictionaries.dictionary import Dictionary
from saepatch.errors import UserError
from saepatch.model.language_model import LanguageModel
from saepatch.model.lens import stream_directions
from saepatch.model.positions import Positions
from saepatch.model.sites import Site
from saepatch.organism import is_checkpoint
from saepatch.report.blocks import Cell, Simple, Table
from saepatch.report.notebook import Shown
from saepatch.report.text import token_text
from saepatch.steering.contrasts import auroc_contrast, contrast, corpus_units, lens_tokens, output_scores

MEANING = (
    "Contrast: difference of the sets' mean activations, times the length of the latent's row. AUROC: the latent's "
    "maximum over a prompt as a classifier; 0.5 is chance. Output score: whether adding the latent promotes its own "
    "tokens (0 to 1); a latent that scores near 0 detects the concept but steers badly. Their best "
    "latents often differ."
)


@dataclass(frozen=True, eq=False, repr=False)
class SeparatingLatents(Shown):
    """Latents that fire differently on two sets of prompts, with each score; largest contrast first.

    `unit` is the 0.95 quantile of each latent's positive activations over the reference texts (a unit for `Steer`),
    `maximum` the largest one, `promotes` the tokens that its direction raises most.
    """

    site: Site
    latents: Int[Tensor, "latents"]
    contrast: Float[Tensor, "latents"]
    auroc: Float[Tensor, "latents"]
    output_score: Float[Tensor, "latents"]
    unit: Float[Tensor, "latents"]
    maximum: Float[Tensor, "latents"]
    promotes: tuple[tuple[str, ...], ...]

    def __len__(self) -> int:
        return len(self.latents)

    def best(self, score: str = "contrast") -> int:
        """The latent with the largest `contrast`, `auroc` or `output_score`.

        Raises:
            UserError: another score.
        """
        if score not in ("contrast", "auroc", "output_score"):
            raise UserError(f"unknown score {score!r}: use contrast, auroc or output_score")
        return int(self.latents[getattr(self, score).argmax()])

    @property
    def title(self) -> str:
        """Heading shown above the table."""
        return f"{len(self)} latents at {self.site} that separate the prompts"

    def __repr__(self) -> str:
        best = ", ".join(f"{self.best(score)} by {name}" for score, name in SCORES.items())
        return f"{self.title}; best: {best}\nto_pandas() has the table"

    def blocks(self, k: int = 20) -> list[Simple]:
        """The table, and what its columns mean."""
        rows: list[list[Cell]] = []
        columns = (self.contrast, self.auroc, self.output_score, self.unit, self.maximum)
        for latent, tokens, *values in zip(self.latents[:k].tolist(), self.promotes, *(c.tolist() for c in columns)):
            rows.append([latent, *values, " ".join(token_text(token) for token in tokens[:4])])
        names = ["latent", *SCORES.values(), "unit (0.95 quantile)", "largest activation", "promotes"]
        formats = {"latent": "d", "contrast": ".2f", "AUROC": ".3f", "output score": ".3f"}
        return [Table(names, rows, MEANING, formats)]

    def to_pandas(self) -> Any:
        """A pandas frame: latent (`Int64`), promotes (`string`), and contrast, auroc, output_score, unit, maximum."""
        import pandas as pd

        frame = pd.DataFrame({"latent": pd.array(self.latents.tolist(), dtype="Int64")})
        for name in ("contrast", "auroc", "output_score", "unit", "maximum"):
            frame[name] = getattr(self, name).double().cpu().numpy()
        promotes = [" ".join(token_text(token) for token in tokens) for tokens in self.promotes]
        return frame.assign(promotes=pd.array(promotes, dtype="string"))


SCORES = {"contrast": "contrast", "auroc": "AUROC", "output_score": "output score"}


def separating_latents(
    model: LanguageModel,
    dictionary: Dictionary,
    with_concept: Sequence[str],
    without: Sequence[str],
    k: int = 20,
    positions: Positions = "all",
    reference: Iterable[str] | None = None,
) -> SeparatingLatents:
    """The `k` latents with the largest contrast and the `k` with the largest AUROC, with their output scores.

    Args:
        with_concept: Prompts that have the concept.
        without: Prompts that do not.
        k: Number of latents by each of the two scores.
        positions: Positions of the prompts to compare.
        reference: Texts over which the unit and the largest activation of each latent are taken; default: the embedded
            model's texts for the embedded model, otherwise both sets of prompts.

    Raises:
        UserError: a set is empty, or `k` is below 1.
    """
    if not 1 <= k <= dictionary.d_sae:
        raise UserError(f"k = {k}: use 1 to {dictionary.d_sae}")
    contrasts = contrast(model, dictionary, with_concept, without, positions).float()
    aurocs = auroc_contrast(model, dictionary, with_concept, without, positions).float()
    chosen = {*contrasts.topk(k).indices.tolist(), *aurocs.topk(k).indices.tolist()}
    ids = sorted(chosen, key=lambda latent: -float(contrasts[latent]))
    if reference is None:
        reference = load_texts("organism") if is_checkpoint(model.name) else [*with_concept, *without]
    measured = corpus_units(model, dictionary, reference, ids)
    units = torch.zeros(dictionary.d_sae)
    units[ids] = measured.unit.cpu()
    scores = output_scores(model, dictionary, ids, units)
    words = lens_tokens(model, stream_directions(model, dictionary.site, dictionary.rows[ids]), 6)
    promotes = tuple(tuple(model.token_texts(row)) for row in words.tolist())
    where = torch.tensor(ids)
    parts = (contrasts.cpu()[where], aurocs.cpu()[where], scores.cpu(), units[where], measured.maximum.cpu())
    return SeparatingLatents(dictionary.site, where, *parts, promotes)
