"""Cards in the JSON of SAEDashboard and Neuronpedia."""

import json

import pytest
from tiny import random_dictionary, tiny_model

from saepatch.errors import UserError
from saepatch.reading.cards import read_latents
from saepatch.reading.neuronpedia import neuronpedia_batch, write_neuronpedia

# parameters of SAEDashboard 0.8's NeuronpediaDashboardBatch, …Feature and …Activation
BATCH = {"model_id", "layer", "sae_set", "sae_id_suffix", "features"}
FEATURE = {
    *("feature_index", "neuron_alignment_indices", "neuron_alignment_values", "neuron_alignment_l1"),
    *("correlated_neurons_indices", "correlated_neurons_l1", "correlated_neurons_pearson"),
    *("correlated_features_indices", "correlated_features_l1", "correlated_features_pearson"),
    *("neg_str", "neg_values", "pos_str", "pos_values", "frac_nonzero", "freq_hist_data_bar_values"),
    *("freq_hist_data_bar_heights", "logits_hist_data_bar_heights", "logits_hist_data_bar_values"),
    *("n_prompts_total", "n_tokens_in_prompt", "dataset", "activations", "decoder_weights_dist", "vector"),
}
ACTIVATION = {"bin_min", "bin_max", "bin_contains", "tokens", "values", "qualifying_token_index"}


@pytest.fixture(scope="module")
def cards():
    return read_latents(tiny_model(), random_dictionary(), [3, 5], ["the cat sat", "one big tree", "a red hen"])


def test_cards_are_features_with_the_fields_of_the_dashboard(cards, tmp_path):
    path = write_neuronpedia(cards, tmp_path / "deep" / "batch-0.json", "tiny", "random", "three texts")
    batch = json.loads(path.read_text(encoding="utf-8"))
    assert set(batch) == BATCH
    assert (batch["model_id"], batch["layer"], batch["sae_set"]) == ("tiny", 1, "random")
    for card, feature in zip(cards, batch["features"], strict=True):
        assert set(feature) == FEATURE
        assert feature["feature_index"] == card.latent
        assert feature["frac_nonzero"] == card.frequency
        assert feature["pos_str"] == [token for token, _ in card.raises]
        assert sum(feature["freq_hist_data_bar_heights"]) == round(card.frequency * card.tokens)
        assert len(feature["freq_hist_data_bar_values"]) == len(feature["freq_hist_data_bar_heights"])
        for example, activation in zip(card.examples, feature["activations"], strict=True):
            assert set(activation) == ACTIVATION
            assert activation["values"] == [round(act, 3) for act in example.acts]
            assert activation["values"][activation["qualifying_token_index"]] == max(activation["values"])
    with pytest.raises(UserError, match="cards of one site, not none"):
        neuronpedia_batch([], "tiny", "random")


@pytest.mark.slow
def test_the_dashboard_reads_what_was_written(cards):
    dashboard = pytest.importorskip("sae_dashboard.neuronpedia.neuronpedia_dashboard")
    batch = neuronpedia_batch(cards, "tiny", "random")
    assert dashboard.NeuronpediaDashboardBatch(**batch).to_dict() == batch
