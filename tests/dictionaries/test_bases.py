"""Units and directions as dictionaries, against plain hooks; the site of the MLPs' units."""

import pytest
import torch
from tiny import tiny_model

from saepatch.data.pairs import PromptPair
from saepatch.dictionaries.bases import directions_of, units_of
from saepatch.errors import UserError
from saepatch.measure.patching import patch_latents
from saepatch.model.hooks import capture
from saepatch.model.loading.load import load_model
from saepatch.model.sites import Site
from saepatch.restoration.ranking import find_safety_latents
from saepatch.restoration.restore import restore
from saepatch.splicing.donors import CleanPrompts
from saepatch.splicing.interventions import Ablate, Patch
from saepatch.splicing.splice import record_latents, splice

PROJECTIONS = {
    "llama": "mlp.down_proj",
    "gpt2": "mlp.c_proj",
    "gpt_neox": "mlp.dense_4h_to_h",
    "phi": "mlp.fc2",
    "gemma3_text": "mlp.down_proj",
}


@pytest.mark.parametrize("family", PROJECTIONS)
def test_neurons_are_what_the_output_projection_reads(family):
    model = tiny_model(family)
    tokens = model.tokenize(["abc def", "xyz"], "left")
    neurons, some = units_of(model, "neurons.1"), [2, 5, 11]
    seen = []

    def silence(_module, args):
        seen.append(args[0].clone())
        x = args[0].clone()
        x[tokens.ordinary[..., None] & torch.isin(torch.arange(x.shape[-1]), torch.tensor(some))] = 0
        return (x, *args[1:])

    handle = model.layout.blocks[1].get_submodule(PROJECTIONS[family]).register_forward_pre_hook(silence)
    expected = model.logits(tokens)
    handle.remove()
    with splice(model, neurons, Ablate(some), record=True) as run:
        found = model.logits(tokens)
    real = tokens.attention_mask.bool()
    torch.testing.assert_close(found[real], expected[real], atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(run.latents[neurons.site].acts, seen[0])
    assert not run.latents[neurons.site].error.any()
    assert (found - model.logits(tokens))[real].abs().max() > 1e-3
    assert neurons.d_sae == model.width(Site(1, "neurons")) == (64 if family == "gpt2" else 32)


def test_a_model_without_such_units_does_not_offer_them():
    model = tiny_model("mixtral", num_local_experts=2, num_experts_per_tok=1)
    with pytest.raises(UserError, match=r"site neurons\.1: this layer offers resid_pre, resid_post"):
        units_of(model, "neurons.1")
    with pytest.raises(UserError, match="the model has 3 layers"):
        units_of(tiny_model(), "neurons.3")


def test_a_direction_is_patched_by_its_coordinate():
    model = tiny_model()
    generator = torch.Generator().manual_seed(3)
    basis = torch.linalg.qr(torch.randn(16, 2, generator=generator)).Q.T
    dictionary = directions_of(basis, "resid_post.1")
    clean, corrupted = model.tokenize(["abcde"]), model.tokenize(["abxde"])
    values = [
        capture(model.hf, model.layout, [Site(1)], model.inputs(tokens))[Site(1)] for tokens in (clean, corrupted)
    ]
    moved = (values[0] - values[1]) @ basis.T @ basis

    handle = model.layout.blocks[1].register_forward_hook(lambda _m, _a, out: out + moved)
    expected = model.logits(corrupted)
    handle.remove()
    with splice(model, dictionary, Patch(record_latents(model, dictionary, clean))):
        torch.testing.assert_close(model.logits(corrupted), expected, atol=1e-5, rtol=1e-4)
    assert (expected - model.logits(corrupted)).abs().max() > 1e-3
    with pytest.raises(UserError, match="the directions are not orthonormal"):
        directions_of(2 * basis, "resid_post.1")
    with pytest.raises(UserError, match="the directions are not orthonormal"):
        directions_of(torch.stack([basis[0], basis[0]]), "resid_post.1")


def test_neurons_are_ranked_and_restored_as_latents_are():
    """All neurons of all layers, from a prompt that differs: by the change score of Chen et al., S alone."""
    model = tiny_model()
    dictionaries = [units_of(model, Site(layer, "neurons")) for layer in range(3)]
    jailbroken, clean = ["abxde now", "tell me all"], ("abcde now", "tell me who")
    donor = CleanPrompts(clean, 2)
    found = find_safety_latents(model, dictionaries, jailbroken, donor, max_new_tokens=3)
    answers = [model.continue_ids([text], 3)[0] for text in clean]
    for dictionary in dictionaries:
        squares = []
        for one, other, answer in zip(jailbroken, clean, answers, strict=True):
            here, there = (
                capture(
                    model.hf, model.layout, [dictionary.site], model.inputs(model.pad([[*model.encode(t), *answer]]))
                )[dictionary.site][0]
                for t in (one, other)
            )
            squares.append((there - here)[-2 - len(answer) :].double() ** 2)
        expected = torch.cat(squares).mean(0).sqrt().float()
        torch.testing.assert_close(found.change[dictionary.site], expected, atol=1e-5, rtol=1e-4)
    top = found.top(40)
    assert restore(model, dictionaries, jailbroken, donor, top, max_new_tokens=6) != model.generate(jailbroken, 6)


def test_neurons_in_a_sweep():
    """An edit of a neuron in a sweep is the same as through a splice."""
    model = tiny_model()
    neurons = units_of(model, "neurons.1")
    pair = PromptPair("abcde", "abxde", "S", "I")
    effects = patch_latents(model, neurons, [pair], [[3], [5]])
    clean, corrupted = model.tokenize(["abcde"]), model.tokenize(["abxde"])
    source = record_latents(model, neurons, clean)
    s, i = (model.encode(text)[-1] for text in "SI")
    for number, unit in enumerate((3, 5)):
        with splice(model, neurons, Patch(source, [unit])):
            logits = model.next_logits(corrupted)[0]
        assert effects.patched[0, number] == pytest.approx(float(logits[s] - logits[i]), abs=1e-4)


def test_the_organism_has_neurons():
    model = load_model("organism")
    assert model.width(Site(5, "neurons")) == model.config.intermediate_size
