"""Cards of latents in the JSON that SAEDashboard writes and Neuronpedia reads."""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from saepatch.errors import UserError
from saepatch.model.sites import Site
from saepatch.reading.cards import Card, Example
from saepatch.records.files import atomic

TOP = {"bin_min": -1.0, "bin_contains": -1.0}  # what SAEDashboard writes of the group "top activations"
# fields that cards do not measure: alignment with neurons and correlations over activations
UNMEASURED = tuple(
    f"{what}_{column}"
    for what, columns in {
        "neuron_alignment": ("indices", "values", "l1"),
        "correlated_neurons": ("indices", "l1", "pearson"),
        "correlated_features": ("indices", "l1", "pearson"),
    }.items()
    for column in columns
)


def neuronpedia_batch(cards: Sequence[Card], model_id: str, sae_set: str, dataset: str = "") -> dict[str, Any]:
    """Cards of one site as a batch of features, the content of a `batch-N.json` of SAEDashboard 0.8.

    Logits are those of the cards' logit lens, histogram values the middles of bins. Figures that cards do not have
    (alignment with neurons, correlations, the distribution of logits) are empty lists.

    Args:
        model_id: Neuronpedia's name of the model, such as "gpt2-small".
        sae_set: Name of the set of dictionaries, such as "res-jb".
        dataset: Name of the texts the cards were read on.

    Raises:
        UserError: there are no cards, or they are of several sites.
    """
    sites = {card.site for card in cards}
    if len(sites) != 1:
        named = ", ".join(sorted(sites)) or "none"
        raise UserError(f"a batch of features has cards of one site, not {named}: write one file a site")
    features = [_feature(card, dataset) for card in cards]
    layer = Site.parse(sites.pop()).layer
    return {"model_id": model_id, "layer": layer, "sae_set": sae_set, "sae_id_suffix": None, "features": features}


def write_neuronpedia(cards: Sequence[Card], path: str | Path, model_id: str, sae_set: str, dataset: str = "") -> Path:
    """Write `neuronpedia_batch` as JSON; returns the path.

    Raises:
        UserError: as for `neuronpedia_batch`.
    """
    batch, path = neuronpedia_batch(cards, model_id, sae_set, dataset), Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    with atomic(path) as temporary:
        temporary.write_text(json.dumps(batch, ensure_ascii=False, allow_nan=False), encoding="utf-8")
    return path


def _feature(card: Card, dataset: str) -> dict[str, Any]:
    middles = [(low + high) / 2 for low, high in zip(card.edges, card.edges[1:])]
    return {
        "feature_index": card.latent,
        **{name: [] for name in UNMEASURED},
        "neg_str": [token for token, _ in card.lowers],
        "neg_values": [round(value, 3) for _, value in card.lowers],
        "pos_str": [token for token, _ in card.raises],
        "pos_values": [round(value, 3) for _, value in card.raises],
        "frac_nonzero": card.frequency,
        "freq_hist_data_bar_values": [round(middle, 3) for middle in middles],
        "freq_hist_data_bar_heights": list(card.counts),
        "logits_hist_data_bar_heights": [],
        "logits_hist_data_bar_values": [],
        "n_prompts_total": card.texts,
        "n_tokens_in_prompt": max((len(example.tokens) for example in card.examples), default=0),
        "dataset": dataset,
        "activations": [_activation(example, card.maximum) for example in card.examples],
        "decoder_weights_dist": [],
        "vector": [],
    }


def _activation(example: Example, maximum: float) -> dict[str, Any]:
    values = [round(act, 3) for act in example.acts]
    return {
        **TOP,
        "bin_max": round(maximum, 3),
        "tokens": list(example.tokens),
        "values": values,
        "qualifying_token_index": values.index(max(values)),
    }
