"""Measure the organism's saved dictionaries again, updating the figures in their files but not the weights."""

import json
from itertools import islice
from pathlib import Path
from typing import Any

from saepatch.dictionaries.loading import load_saes
from saepatch.model.language_model import LanguageModel

from ..config import TrainingConfig
from ..data.texts import as_documents, split
from ..loop.evaluate import evaluate_all, held_out_tokens
from . import corpus

DOCUMENTS = 100_000  # documents of the aligned corpus for training and evaluating dictionaries


def training_texts(seed: int) -> list[str]:
    """The documents that the dictionaries of a seed are trained and evaluated on."""
    return list(islice(corpus.documents(corpus.ALIGNED, seed + 2), DOCUMENTS))


def measure_again(folder: Path, models: list[LanguageModel], seed: int) -> None:
    """Evaluate each dictionary in a folder as at the end of training, and update its `cfg.json` and `metrics.json`.

    Args:
        folder: Output folder of training, with a subfolder per site.
        models: The model they were trained on, followed by the further ones in the order of their metadata.
        seed: Seed of the training.
    """
    settings = TrainingConfig(seed=seed)
    _, held_out = split(as_documents(training_texts(seed)), settings.held_out, seed)
    tokens = held_out_tokens(models[0], held_out, settings.context, settings.eval_tokens)
    dictionaries = load_saes(str(folder), models[0].device)
    evaluated = [evaluate_all(model, list(dictionaries.values()), tokens) for model in models]
    for site, *evaluations in zip(dictionaries, *evaluated, strict=True):
        place = folder / str(site)
        cfg: dict[str, Any] = json.loads((place / "cfg.json").read_text(encoding="utf-8"))
        metadata = cfg["metadata"]
        metadata["metrics"] = _updated(metadata["metrics"], evaluations[0].figures)
        for other, evaluation in zip(metadata.get("also_trained_on", []), evaluations[1:], strict=True):
            other["metrics"] = _updated(other["metrics"], evaluation.figures)
        (place / "cfg.json").write_text(json.dumps(cfg), encoding="utf-8")
        text = json.dumps(metadata["metrics"], indent=2) + "\n"
        (place / "metrics.json").write_text(text, encoding="utf-8")


def _updated(before: dict[str, float], now: dict[str, float]) -> dict[str, float]:
    """The new figures, with the old ones that only training can know."""
    return {**now, **{name: value for name, value in before.items() if name in ("tokens", "seconds")}}
