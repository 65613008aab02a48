"""What is encoded and decoded for an edit: as little as will do, and the same as the whole way."""

import pytest
import torch
from tiny import random_dictionary, random_sae, tiny_model

from saepatch.dictionaries.dictionary import Dictionary
from saepatch.dictionaries.loading import adopt
from saepatch.errors import UserError
from saepatch.model.sites import Site
from saepatch.splicing.interventions import Ablate, AtLeast, Clamp, Patch, Steer
from saepatch.splicing.site_edit import SiteEdit
from saepatch.splicing.splice import record_latents, splice

ARCHITECTURES = ["standard", "jumprelu", "gated", "topk"]
EDITS = [
    Steer(7, 2.5),
    Steer([7, 9], 1.5, unit=(2.0, 3.0), positions="last"),
    Clamp([9, 7], 3.0, unit=(1.0, 0.5)),
    AtLeast([7, 11, 30], 0.4),
    Ablate([3, 7, 9], to=torch.tensor([0.1, 0.2, 0.3])),
    [Clamp(7, 1.0), Steer([9, 7], 2.0), AtLeast(3, 1.0, positions=[0, 2])],
    Ablate(None, to=0.05),
]


def saved_batchtopk(tmp_path) -> Dictionary:
    """A BatchTopK dictionary as sae_lens saves it for inference: with its threshold."""
    from sae_lens import SAE
    from sae_lens.saes.batchtopk_sae import BatchTopKTrainingSAE, BatchTopKTrainingSAEConfig

    sae = BatchTopKTrainingSAE(BatchTopKTrainingSAEConfig(d_in=16, d_sae=48, k=6.0))
    generator = torch.Generator().manual_seed(0)
    for parameter in sae.parameters():
        parameter.data = 0.3 * torch.randn(parameter.shape, generator=generator)
    sae.topk_threshold = torch.tensor(0.4, dtype=sae.topk_threshold.dtype)
    sae.save_inference_model(tmp_path)
    return adopt(SAE.load_from_disk(tmp_path), Site(1), "batchtopk")


def logits(model, dictionary, edit, tokens, record):
    with splice(model, dictionary, edit, record=record):
        return model.next_logits(tokens)


@pytest.mark.parametrize("subtract", [True, False], ids=["b_dec off the input", "input as it is"])
@pytest.mark.parametrize("architecture", [*ARCHITECTURES, "batchtopk"])
def test_the_short_way_equals_the_whole_way(architecture, subtract, tmp_path):
    model = tiny_model()
    if architecture == "batchtopk":
        dictionary = saved_batchtopk(tmp_path)
        dictionary.sae.cfg.apply_b_dec_to_input = subtract
    else:
        dictionary = random_dictionary(architecture=architecture, apply_b_dec_to_input=subtract)
    tokens = model.tokenize(["the cat sat", "a dog", "birds fly high up"])
    plain = model.next_logits(tokens)
    for edit in EDITS:
        short, whole = (logits(model, dictionary, edit, tokens, record) for record in (False, True))
        torch.testing.assert_close(short, whole, atol=2e-5, rtol=1e-4)
        assert (short - plain).abs().max() > 1e-3, edit


@pytest.mark.parametrize("architecture", ARCHITECTURES)
@pytest.mark.parametrize("normalisation", ["layer_norm", "constant_norm_rescale"])
def test_dictionaries_that_normalise_take_the_long_way(architecture, normalisation):
    model = tiny_model()
    dictionary = random_dictionary(architecture=architecture, normalize_activations=normalisation)
    assert dictionary.alone([7]) is None
    assert not SiteEdit(model, dictionary, dictionary.site, [Steer(7, 1.0)]).blind
    tokens = model.tokenize(["the cat sat", "a dog"])
    for edit in EDITS:
        short, whole = (logits(model, dictionary, edit, tokens, record) for record in (False, True))
        torch.testing.assert_close(short, whole, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_only_what_is_read_is_encoded_and_only_what_is_written_decoded(architecture, monkeypatch):
    model, dictionary = tiny_model(), random_dictionary(architecture=architecture)
    assert (dictionary.alone([1]) is None) == (architecture == "topk")  # and have the check made, once
    calls = []
    for name in ("encode", "decode"):
        method = getattr(type(dictionary.sae), name)

        def counted(self, x, method=method, name=name):
            calls.append((name, self.W_dec.shape[0]))
            return method(self, x)

        monkeypatch.setattr(type(dictionary.sae), name, counted)
    tokens = model.tokenize(["the cat sat"])
    wide = 48 if architecture == "topk" else None

    def made(edit, **options):
        calls.clear()
        with splice(model, dictionary, edit, **options):
            model.next_logits(tokens)
        return calls[:]

    assert made(()) == []
    assert made(Steer(7, 1.0)) == []
    assert made([Steer(7, 1.0), Steer([3, 9], 1.0)]) == []
    assert made(Clamp(7, 1.0)) == [("encode", wide or 1)]
    assert made([Clamp(7, 1.0), Steer([3, 7], 1.0)]) == [("encode", wide or 2)]
    assert made(AtLeast([7, 9], 1.0, positions="last")) == [("encode", wide or 2)]
    assert made(Ablate(range(40), 1.0)) == [("encode", 48)]  # most of it: not worth a copy
    assert made(Ablate(None, 1.0)) == [("encode", 48)]
    for options in ({"record": True}, {"error": "drop"}):
        assert ("encode", 48) in made(Steer(7, 1.0), **options)
    source = record_latents(model, dictionary, tokens)
    assert ("encode", 48) in made(Patch(source, [7], error=True))
    assert made(Patch(source, [7])) == [("encode", wide or 1)]


def test_passes_in_which_nothing_acts_are_left_alone(monkeypatch):
    model, dictionary = tiny_model(), random_dictionary()
    seen = []
    encode = type(dictionary.sae).encode
    monkeypatch.setattr(type(dictionary.sae), "encode", lambda sae, x: seen.append(x.shape[1]) or encode(sae, x))
    with splice(model, dictionary, Clamp(3, 2.0, positions="prompt")):
        model.generate(["abcdef"], 4)
    assert seen == [7]
    seen.clear()
    with splice(model, dictionary, Clamp(3, 2.0, positions="generated")):
        model.generate(["abcdef"], 4)
    assert seen == [1, 1, 1]


def test_subclasses_and_watched_dictionaries_are_run_whole():
    from sae_lens.saes.standard_sae import StandardSAE

    class Odd(StandardSAE):
        def encode(self, x):
            acts = super().encode(x)
            return acts / (1 + acts.sum(-1, keepdim=True))

    sae = random_sae("standard")
    odd = Odd(sae.cfg)
    odd.load_state_dict(sae.state_dict())
    assert adopt(odd, Site(1), "odd").alone([3]) is None
    plain = adopt(sae, Site(1), "plain")
    assert plain.alone([3]) is not None
    handle = plain.sae.hook_sae_acts_post.register_forward_hook(lambda *_: None)
    assert plain.alone([3]) is None
    handle.remove()
    assert plain.alone([3]) is not None


def test_a_latent_that_comes_out_otherwise_alone_is_seen(monkeypatch):
    from sae_lens.saes.standard_sae import StandardSAE

    encode = StandardSAE.encode
    monkeypatch.setattr(StandardSAE, "encode", lambda sae, x: encode(sae, x) / sae.W_enc.shape[1])
    assert random_dictionary(architecture="standard").alone([3]) is None


def test_taking_latents_apart_leaves_the_dictionary_and_the_random_state():
    dictionary = random_dictionary(architecture="jumprelu")
    before, state = dictionary.fingerprint, torch.get_rng_state()
    few = dictionary.alone([5, 2])
    assert few is not None
    assert few.d_sae == 2
    assert torch.equal(few.W_dec, dictionary.W_dec[[5, 2]])
    assert torch.equal(torch.get_rng_state(), state)
    assert (dictionary.d_sae, Dictionary(dictionary.sae, Site(1), "same").fingerprint) == (48, before)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_few_positions_are_decoded_by_their_active_rows(architecture):
    dictionary = random_dictionary(architecture=architecture, d_sae=2000)
    x = torch.randn(2, 3, 16, generator=torch.Generator().manual_seed(0))
    latents = dictionary.encode(x)
    expected = dictionary.sae.decode(dictionary.sae.encode(x))
    torch.testing.assert_close(latents.reconstruction, expected, atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(latents.reconstruction + latents.error, x, atol=1e-4, rtol=1e-4)


def test_at_least_raises_what_is_below_and_nothing_else():
    model, dictionary = tiny_model(), random_dictionary(architecture="standard")
    tokens = model.tokenize(["abcdef"])
    acts = record_latents(model, dictionary, tokens).acts
    middle = float(acts[0, 1:, 5].median())
    assert (acts[0, 1:, 5] > middle).any()
    expected = acts.clone()
    expected[0, 1:, 5] = expected[0, 1:, 5].clamp(min=middle)
    with splice(model, dictionary, AtLeast(5, 0.5, unit=2 * middle)):
        found = model.next_logits(tokens)
    with splice(model, dictionary, Ablate(None, to=expected)):
        torch.testing.assert_close(found, model.next_logits(tokens), atol=1e-5, rtol=1e-4)
    with splice(model, dictionary, AtLeast(range(48), 0.0)):  # no latent is below 0
        torch.testing.assert_close(model.next_logits(tokens), _plain(model, tokens), atol=1e-6, rtol=1e-6)


def _plain(model, tokens):
    from saepatch.model.hooks import unedited

    with unedited(model.layout):
        return model.next_logits(tokens)


@pytest.mark.parametrize("decay", [0.0, -0.5, 1.5, float("nan")])
def test_a_decay_is_a_share(decay):
    for kind in (Steer, Clamp, AtLeast):
        with pytest.raises(UserError, match="decay"):
            kind(3, 1.0, decay=decay)


def test_units_are_one_or_one_for_each():
    model, dictionary = tiny_model(), random_dictionary()
    for kind in (Steer, Clamp, AtLeast):
        with pytest.raises(UserError, match="2 units for 3 latents"):
            with splice(model, dictionary, kind([1, 2, 3], 1.0, unit=(1.0, 2.0))):
                model.next_logits(model.tokenize(["abc"]))
