"""Quality of a trained dictionary on held-out text."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor
from torch.nn.functional import cosine_similarity, normalize

from saepatch.dictionaries.dictionary import Dictionary
from saepatch.errors import UserError
from saepatch.measure.quality import LatentStatistics, SpliceQuality, splice_qualities
from saepatch.model.language_model import LanguageModel, Tokens

from ..data.document import Document
from ..data.rows import rows

DENSE = 0.1  # share of positions above which a latent counts as dense
ALIKE = 0.9  # cosine above which two latents count as near duplicates
DENSITY_EDGES = tuple(
    -6 + i / 4 for i in range(25)
)  # log10 of the share of positions; rarer latents go into the first bin

ELEMENTS = 2**26  # limit for the largest tensor: logits or latents of a batch, cosines of some latents with all
_COMPARED = 8192  # maximal number of latents whose nearest neighbour is searched; of more, an evenly spaced subset


@dataclass(frozen=True)
class Density:
    """Histogram of the latents' firing frequencies.

    Attributes:
        counts: Number of latents in each bin, without those that never fire.
        edges: Edges of the bins, log10 of the share of ordinary positions where a latent is active.
    """

    counts: tuple[int, ...]
    edges: tuple[float, ...]


@dataclass(frozen=True)
class Evaluation:
    """The figures of a dictionary's `metrics.json`, and the histogram of its latents' firing frequencies."""

    figures: dict[str, float]
    density: Density


def held_out_tokens(model: LanguageModel, documents: Sequence[Document], context: int, eval_tokens: int) -> Tokens:
    """About `eval_tokens` tokens, one row per document, in a padded batch ordered by length.

    Raises:
        UserError: no document has two ordinary tokens in a row.
    """
    return model.pad(held_out_rows(model, documents, context, eval_tokens))


def held_out_rows(
    model: LanguageModel, documents: Sequence[Document], context: int, eval_tokens: int
) -> list[list[int]]:
    """The rows of `held_out_tokens`."""
    chosen: list[list[int]] = []
    n = 0
    for document in documents:
        if n >= eval_tokens:
            break
        row = rows(model, [document], context)[:1]  # later rows would lack their context
        chosen += row
        n += sum(map(len, row))
    if not any(len(row) > 2 for row in chosen):
        raise UserError("the held-out documents are too short to evaluate on: raise held_out or give longer text")
    return sorted(chosen, key=len)


def evaluate_all(
    model: LanguageModel, dictionaries: Sequence[Dictionary], tokens: Tokens, batch_size: int | None = None
) -> list[Evaluation]:
    """Quality of each dictionary, spliced separately: the splice, firing frequencies, geometry of the weights.

    The model's own passes are shared. `ce_ablated`, and so `ce_recovered`, refers to zeros at every position.
    `eval_tokens` is the number of positions evaluated on; `alive_share` refers to these positions.

    Args:
        model: The model they were trained on.
        dictionaries: The dictionaries.
        tokens: Text they were not trained on.
        batch_size: Rows at a time; None: as many as keep logits and latents within a few hundred MB.

    Raises:
        UserError: a dictionary does not belong to the model, or the tokens hold no two ordinary ones in a row.
    """
    if batch_size is None:
        widest = max(int(model.config.get_text_config().vocab_size), *(d.d_sae for d in dictionaries))
        batch_size = max(1, min(64, ELEMENTS // (widest * tokens.input_ids.shape[1])))
    measured = splice_qualities(model, dictionaries, tokens, batch_size)
    return [_evaluation(d, quality, latents) for d, (quality, latents) in zip(dictionaries, measured, strict=True)]


def _evaluation(dictionary: Dictionary, quality: SpliceQuality, latents: LatentStatistics) -> Evaluation:
    measured = {name: float(value) for name, value in vars(quality).items() if name not in ("site", "tokens")}
    figures = {
        "eval_tokens": quality.tokens,
        **measured,
        "explained_variance": 1 - quality.fvu,
        "ce_ablated": quality.ce_zero,
        "dead_share": 1 - quality.alive_share,
        "dense_share": float((latents.frequency > DENSE).float().mean()),
        "max_frequency": float(latents.frequency.max()),
        **geometry(dictionary),
    }
    return Evaluation(figures, density(latents.frequency))


def density(frequency: Float[Tensor, "d_sae"]) -> Density:
    """Histogram of the latents' firing frequencies."""
    active = frequency[frequency > 0].cpu().double().log10().clamp(DENSITY_EDGES[0], DENSITY_EDGES[-1])
    counts, _ = torch.histogram(active, torch.tensor(DENSITY_EDGES, dtype=torch.float64))
    return Density(tuple(map(int, counts.tolist())), DENSITY_EDGES)


@torch.no_grad()
def geometry(dictionary: Dictionary) -> dict[str, float]:
    """Geometry of a dictionary's weights.

    The norms of the decoder's rows; the similarity of latents to their nearest neighbours (cosine of decoder rows, for
    at most 8192 evenly spaced latents); and the cosine between each latent's encoder and decoder vectors.
    """
    W_dec = dictionary.W_dec.float()
    norms, nearest = W_dec.norm(dim=-1), _nearest(normalize(W_dec, dim=-1))
    figures = {
        "decoder_norm_mean": float(norms.mean()),
        "decoder_norm_min": float(norms.min()),
        "decoder_norm_max": float(norms.max()),
        "max_cosine_mean": float(nearest.mean()),
        "max_cosine_share": float((nearest > ALIKE).float().mean()),
    }
    W_enc = getattr(dictionary.sae, "W_enc", None)
    if isinstance(W_enc, Tensor):
        figures["encoder_decoder_cosine"] = float(cosine_similarity(W_enc.detach().float().T, W_dec, dim=-1).mean())
    return figures


def _nearest(rows: Float[Tensor, "d_sae d_in"]) -> Float[Tensor, "n"]:
    """The largest cosine of unit rows with another row, computed in chunks."""
    n = len(rows)
    if n < 2:
        return rows.new_zeros(n)
    chosen = torch.linspace(0, n - 1, min(n, _COMPARED), dtype=torch.float64).round().long().to(rows.device)
    nearest = []
    for chunk in chosen.split(max(1, ELEMENTS // 4 // n)):
        cosines = rows[chunk] @ rows.T
        cosines[torch.arange(len(chunk), device=rows.device), chunk] = -1
        nearest.append(cosines.amax(-1))
    return torch.cat(nearest)
