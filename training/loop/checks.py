"""Checks of the models before training starts."""

from collections.abc import Sequence

from saepatch.errors import UserError
from saepatch.model.language_model import LanguageModel
from saepatch.model.sites import Site

from ..config import TrainingConfig
from ..data.rows import bos_before
from ..ranks import ALONE, Ranks
from ..steps.shards import check_shards


def check_model(model: LanguageModel, sites: Sequence[Site], config: TrainingConfig, ranks: Ranks = ALONE) -> None:
    """Raises UserError if the model lacks a site or has too few positions, or the settings do not fit each other."""
    for site in sites:
        model.layout.module(site)
        d_sae = config.sae.width(model.width(site))
        if config.sae.architecture == "matryoshka":
            config.sae.widths(d_sae)
        if config.shard_latents:
            check_shards(config.sae, d_sae, config.finetune_tokens, ranks)
    if config.batch_size % ranks.size:
        raise UserError(
            f"batch_size {config.batch_size} cannot be divided among {ranks.size} processes: "
            f"use a multiple, as in {-(-config.batch_size // ranks.size) * ranks.size}"
        )
    limit = model.context
    if limit is not None and config.context > limit:
        raise UserError(f"context {config.context} is longer than the {limit} positions of {model.name!r}: lower it")
    if config.pack and model.tokenizer is not None and bos_before(model) is None:  # a skeleton may have none
        raise UserError(
            f"pack puts several documents into a row, but the tokenizer of {model.name!r} adds no BOS between them: "
            "set prepend_bos (true, or a token's text, as in '<|endoftext|>', where there is no BOS), or pack: false"
        )


def check_also(
    model: LanguageModel, also: Sequence[LanguageModel], sites: Sequence[Site], config: TrainingConfig
) -> None:
    """Raises UserError if a further model has another vocabulary or other widths than the first, or if the run uses a
    setting that works with one model only."""
    if also and config.finetune_tokens:
        raise UserError(
            f"finetune_tokens is {config.finetune_tokens}, but fine-tuning works with a single model: use 0 with --also"
        )
    names = [model.name, *(other.name for other in also)]
    if twice := {name for name in names if names.count(name) > 1}:
        raise UserError(f"{sorted(twice)[0]} is given twice: name each model only once in --model and --also")
    for other in also:
        known = model.tokenizer is not None and other.tokenizer is not None  # a skeleton may have none
        if known and model.tokenizer.get_vocab() != other.tokenizer.get_vocab():
            raise UserError(f"{other.name} and {model.name} have different vocabularies: use models of one tokenizer")
        check_model(other, sites, config)
        for site in sites:
            if other.width(site) != model.width(site):
                raise UserError(
                    f"{site} has width {model.width(site)} in {model.name} and {other.width(site)} in {other.name}: "
                    "use models of the same width"
                )
