"""What a trained dictionary is worth, on text it was not trained on."""

from collections.abc import Sequence

from saepatch.dictionaries import Dictionary
from saepatch.errors import UserError
from saepatch.models import LanguageModel, Tokens
from saepatch.quality import latent_statistics, splice_quality
from training.activations import rows

DENSE = 0.1  # a latent active at more than this share of positions tells little about any of them


def held_out_tokens(model: LanguageModel, documents: Sequence[str], context: int, eval_tokens: int) -> Tokens:
    """About `eval_tokens` tokens of documents, each cut to one row, in a padded batch ordered by length.

    Raises:
        UserError: no document has two ordinary tokens in a row.
    """
    chosen: list[list[int]] = []
    n = 0
    for document in documents:
        if n >= eval_tokens:
            break
        row = rows(model, [document], context)[:1]  # later pieces would lack what they follow from
        chosen += row
        n += sum(map(len, row))
    if not any(len(row) > 2 for row in chosen):
        raise UserError("the held-out documents are too short to evaluate on: raise held_out or give longer text")
    return model.pad(sorted(chosen, key=len))


def evaluate(model: LanguageModel, dictionary: Dictionary, tokens: Tokens, batch_size: int = 32) -> dict[str, float]:
    """The figures of `metrics.json`: the splice's quality, and the share of dense latents.

    `ce_ablated`, and with it `ce_recovered`, is against zero ablation. `eval_tokens` counts the positions evaluated on.
    """
    quality = dict(vars(splice_quality(model, dictionary, tokens, batch_size)))
    frequency = latent_statistics(model, dictionary, tokens, batch_size).frequency
    del quality["site"]
    return {
        "eval_tokens": quality.pop("tokens"),
        **quality,
        "ce_ablated": quality["ce_zero"],
        "dense_share": float((frequency > DENSE).float().mean()),
        "max_frequency": float(frequency.max()),
    }
