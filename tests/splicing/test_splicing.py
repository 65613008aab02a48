"""The identity tests, and every intervention against a plain hand-written hook."""

import pytest
import torch
from tiny import FAMILIES, random_dictionary, tiny_model

from saepatch.errors import UserError
from saepatch.model.hooks import SpliceError, capture
from saepatch.model.language_model import LanguageModel
from saepatch.model.positions import At
from saepatch.model.sites import Site
from saepatch.splicing.interventions import Ablate, Clamp, Needs, Patch, Steer
from saepatch.splicing.splice import record_latents, splice

PROMPTS = ["the cat sat", "a dog", "birds fly high up"]


def hooks_left(model: LanguageModel) -> int:
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.hf.modules())
    return hooks + ("generate" in model.hf.__dict__) + sum("forward" in m.__dict__ for m in model.hf.modules())


def by_hand(model, site, tokens, edit):
    """Logits with a bare torch hook on the block's output: the reference every splice is compared with."""

    def hook(_module, _args, output):
        x = output[0] if isinstance(output, tuple) else output
        new = edit(x)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handle = model.layout.blocks[site.layer].register_forward_hook(hook)
    try:
        return model.next_logits(tokens)
    finally:
        handle.remove()


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("architecture", ["topk", "jumprelu", "standard", "gated"])
def test_kept_error_is_the_model(family, architecture):
    model = tiny_model(family)
    tokens = model.tokenize(PROMPTS)
    plain = model.logits(tokens)
    for site in ("resid_pre.0", "resid_post.0", "resid_post.2"):
        dictionary = random_dictionary(site, architecture)
        x = capture(model.hf, model.layout, [dictionary.site], model.inputs(tokens))[dictionary.site]
        latents = dictionary.encode(x)
        assert latents.error.norm() > 0.1 * x.norm(), "a dictionary that explains everything tests nothing"
        torch.testing.assert_close(latents.reconstruction + latents.error, x)
        with splice(model, dictionary):
            spliced = model.logits(tokens)
        real = tokens.attention_mask.bool()
        assert (spliced - plain)[real].abs().max() <= 1e-4
    assert hooks_left(model) == 0


@pytest.mark.parametrize("family", FAMILIES)
def test_padding_on_either_side_changes_nothing(family):
    model, dictionary = tiny_model(family), random_dictionary()
    steer = Steer(3, 2.0)
    with splice(model, dictionary, steer):
        alone = torch.cat([model.next_logits(model.tokenize([p])) for p in PROMPTS])
        left = model.next_logits(model.tokenize(PROMPTS, "left"))
        right = model.next_logits(model.tokenize(PROMPTS, "right"))
    torch.testing.assert_close(left, alone, atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(right, alone, atol=2e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", ["topk", "jumprelu", "standard", "gated"])
def test_edits_equal_a_plain_hook(architecture):
    model, dictionary = tiny_model(), random_dictionary("resid_post.1", architecture)
    tokens = model.tokenize(["abcdef", "ghijkl"])
    sae, rows = dictionary.sae, dictionary.W_dec

    def steered(x):
        x = x.clone()
        x[:, 1:] += 2.5 * rows[7]  # column 0 is the BOS
        return x

    def clamped(x):
        f = sae.encode(x)
        x = x.clone()
        x[:, -1] += (3.0 - f[:, -1, 7, None]) * rows[7] + (3.0 - f[:, -1, 9, None]) * rows[9]
        return x

    def ablated_and_dropped(x):
        f = sae.encode(x)
        f[..., :20] = 0
        y = x.clone()
        y[:, 1:] = sae.decode(f)[:, 1:]
        return y

    cases = [
        (Steer(7, 2.5), "keep", steered),
        (Clamp([7, 9], 3.0, positions="last"), "keep", clamped),
        (Ablate(range(20)), "drop", ablated_and_dropped),
    ]
    for intervention, error, edit in cases:
        expected = by_hand(model, dictionary.site, tokens, edit)
        with splice(model, dictionary, intervention, error=error):
            found = model.next_logits(tokens)
        assert (expected - model.next_logits(tokens)).abs().max() > 1e-2
        torch.testing.assert_close(found, expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("normalisation", ["layer_norm", "constant_norm_rescale"])
def test_normalising_dictionaries_write_in_the_site_units(normalisation):
    model = tiny_model()
    dictionary = random_dictionary(architecture="standard", normalize_activations=normalisation)
    tokens = model.tokenize(["abcdef", "ghijkl"])

    def edit(x):
        f = dictionary.sae.encode(x)
        before = dictionary.sae.decode(f)
        f = dictionary.sae.encode(x)
        f[..., 5] = 4.0
        y = x.clone()
        y[:, 1:] = (x - before + dictionary.sae.decode(f))[:, 1:]
        return y

    expected = by_hand(model, dictionary.site, tokens, edit)
    with splice(model, dictionary, Clamp(5, 4.0)):
        torch.testing.assert_close(model.next_logits(tokens), expected, atol=1e-5, rtol=1e-5)


def test_rescaled_topk_writes_unit_rows():
    model = tiny_model()
    dictionary = random_dictionary(rescale_acts_by_decoder_norm=True)
    tokens = model.tokenize(["abcdef"])
    row = dictionary.W_dec[4] / dictionary.W_dec[4].norm()
    expected = by_hand(model, dictionary.site, tokens, lambda x: torch.cat([x[:, :1], x[:, 1:] + 2 * row], 1))
    with splice(model, dictionary, Steer(4, 2.0)):
        torch.testing.assert_close(model.next_logits(tokens), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("side", ["left", "right"])
def test_patching_all_and_the_error_gives_the_source_run(side):
    model, dictionary = tiny_model(), random_dictionary("resid_post.1")
    clean, corrupted = model.tokenize(["abcdefg", "hij"], side), model.tokenize(["axcdefg", "hkj"], side)
    source = record_latents(model, dictionary, clean)
    with splice(model, dictionary, Patch(source, error=True)):
        patched = model.next_logits(corrupted)
    torch.testing.assert_close(patched, model.next_logits(clean), atol=1e-5, rtol=1e-5)
    with splice(model, dictionary, Patch(record_latents(model, dictionary, corrupted))):
        itself = model.next_logits(corrupted)
    assert (itself - model.next_logits(corrupted)).abs().max() <= 1e-5
    with splice(model, dictionary, Patch(source)):  # latents alone: not the source run, nor the base run
        partly = model.next_logits(corrupted)
    assert (partly - patched).abs().max() > 1e-3
    assert (partly - itself).abs().max() > 1e-3


def test_patch_of_one_latent_at_one_position_equals_a_plain_hook():
    model, dictionary = tiny_model(), random_dictionary()
    clean, corrupted = model.tokenize(["abcdefg", "hijklmn"]), model.tokenize(["axcdefg", "hxjklmn"])
    source = record_latents(model, dictionary, clean)
    base = record_latents(model, dictionary, corrupted)
    latent = int((source.acts - base.acts)[:, 2].abs().sum(0).argmax())
    change = (source.acts - base.acts)[:, 2, latent, None] * dictionary.W_dec[latent]

    def edit(x):
        x = x.clone()
        x[:, 2] += change
        return x

    expected = by_hand(model, dictionary.site, corrupted, edit)
    with splice(model, dictionary, Patch(source, latent, positions=2)):
        torch.testing.assert_close(model.next_logits(corrupted), expected, atol=1e-5, rtol=1e-5)
    assert (expected - model.next_logits(corrupted)).abs().max() > 1e-4


def test_bos_and_padding_are_left_alone_unless_named():
    model, dictionary = tiny_model(), random_dictionary()
    tokens = model.tokenize(["abc", "abcdef"], "left")
    site = dictionary.site
    plain = capture(model.hf, model.layout, [site], model.inputs(tokens))[site]

    def after(intervention):
        with splice(model, dictionary, intervention):
            out = capture(model.hf, model.layout, [Site(2, "resid_pre")], model.inputs(tokens))
        return (out[Site(2, "resid_pre")] - plain).abs().sum(-1) > 1e-6

    assert torch.equal(after(Steer(3, 2.0)), tokens.ordinary)
    named = after(Steer(3, 2.0, positions=0))
    assert torch.equal(named, tokens.input_ids == model.bos_id)


def test_positions_agree_under_padding():
    model, dictionary = tiny_model(), random_dictionary()
    texts = ["a cat ran", "one cat sat here"]
    for positions in (1, -2, slice(2, 4), [1, -1], At(" cat"), "last", "prompt", "all"):
        found = []
        for side in ("left", "right"):
            with splice(model, dictionary, Steer(3, 2.0, positions=positions)):
                found.append(model.next_logits(model.tokenize(texts, side)))
        with splice(model, dictionary, Steer(3, 2.0, positions=positions)):
            alone = torch.cat([model.next_logits(model.tokenize([text])) for text in texts])
        torch.testing.assert_close(found[0], alone, atol=2e-5, rtol=1e-4)
        torch.testing.assert_close(found[1], alone, atol=2e-5, rtol=1e-4)
        assert (alone - torch.cat([model.next_logits(model.tokenize([t])) for t in texts])).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("positions", "complaint"),
    [
        (99, "position 99 is out of range"),
        (-99, "position -99 is out of range"),
        (slice(50, 60), "is empty for a prompt"),
        (At("zebra"), "contains 'zebra' as whole tokens 0 times"),
        (At("cat", occurrence=5), "no occurrence 5"),
        ("everywhere", "unknown positions 'everywhere'"),
        (torch.ones(1, 2, dtype=torch.bool), "positions mask"),
    ],
)
def test_bad_positions(positions, complaint):
    model, dictionary = tiny_model(), random_dictionary()
    with pytest.raises(UserError, match=complaint), splice(model, dictionary, Steer(3, 1.0, positions=positions)):
        model.next_logits(model.tokenize(["a cat ran"]))
    assert hooks_left(model) == 0


def test_ablations():
    model, dictionary = tiny_model(), random_dictionary()
    tokens = model.tokenize(["abcdef", "ghijkl", "mnopqr"])
    latents = record_latents(model, dictionary, tokens)

    def recorded(intervention):
        with splice(model, dictionary, intervention):
            x = capture(model.hf, model.layout, [Site(2, "resid_pre")], model.inputs(tokens))[Site(2, "resid_pre")]
        return x - (latents.reconstruction + latents.error)

    mean = latents.acts[:, 1:].mean((0, 1))
    everything = recorded(Ablate(None, to=mean))
    expected = (mean - latents.acts) @ dictionary.W_dec
    expected[:, 0] = 0
    torch.testing.assert_close(everything, expected, atol=1e-5, rtol=1e-4)
    by_position = latents.acts.mean(0)
    torch.testing.assert_close(
        recorded(Ablate([2, 5], to=by_position[:, [2, 5]]))[:, 1:],
        ((by_position - latents.acts)[..., [2, 5]] @ dictionary.W_dec[[2, 5]])[:, 1:],
        atol=1e-5,
        rtol=1e-4,
    )
    resampled = Ablate.resample(latents, seed=3)
    assert isinstance(resampled.to, torch.Tensor)
    for row in range(3):  # nobody receives their own latents
        assert not torch.equal(resampled.to[row], latents.acts[row])
        assert any(torch.equal(resampled.to[row], latents.acts[other]) for other in range(3))
    draws = {tuple(Ablate.resample(latents, seed=seed).to.sum((1, 2)).tolist()) for seed in range(8)}
    assert len(draws) > 1  # a seed decides who takes whose
    with pytest.raises(UserError, match="ablation values are for 5"):
        recorded(Ablate([2, 5], to=torch.zeros(5)))


def test_interventions_compose_in_order():
    model, dictionary = tiny_model(), random_dictionary()
    tokens = model.tokenize(["abcdef"])

    def run(*interventions):
        with splice(model, dictionary, interventions):
            return model.next_logits(tokens)

    torch.testing.assert_close(run(Clamp(3, 1.0), Steer(3, 2.0)), run(Clamp(3, 3.0)))
    torch.testing.assert_close(run(Steer(3, 2.0), Clamp(3, 1.0)), run(Clamp(3, 1.0)))


def test_several_sites_at_once():
    model = tiny_model()
    first, second = random_dictionary("resid_post.0"), random_dictionary("resid_post.2", seed=1)
    tokens = model.tokenize(["abcdef"])
    with splice(model, first, Steer(1, 2.0)), splice(model, second, Steer(2, 2.0)):
        nested = model.next_logits(tokens)
    at_both = [Steer(1, 2.0, site="resid_post.0"), Steer(2, 2.0, site=Site(2))]
    with splice(model, [first, second], at_both, record=True) as run:
        together = model.next_logits(tokens)
    torch.testing.assert_close(together, nested)
    assert set(run.latents) == {Site(0), Site(2)}
    with pytest.raises(UserError, match="names no site"), splice(model, [first, second], Steer(1, 2.0)):
        pass
    with pytest.raises(UserError, match="not spliced"), splice(model, first, Steer(1, 2.0, site="resid_post.2")):
        pass


def test_a_splice_that_never_ran_is_an_error_and_exceptions_leave_no_hook():
    model, dictionary = tiny_model(), random_dictionary()
    with pytest.raises(SpliceError, match="resid_post.1"), splice(model, dictionary):
        pass
    with pytest.raises(KeyError), splice(model, dictionary):
        model.next_logits(model.tokenize(["abc"]))
        raise KeyError("the user's own")
    assert hooks_left(model) == 0


def test_dictionaries_that_do_not_belong():
    model = tiny_model()
    with pytest.raises(UserError, match="width 12.*width 16"), splice(model, random_dictionary(d_in=12)):
        pass
    with pytest.raises(UserError, match=r"trained at resid_post.1 .*not at resid_post.2"):
        with splice(model, {"resid_post.2": random_dictionary("resid_post.1")}):
            pass
    with pytest.raises(UserError, match="3 layers"), splice(model, random_dictionary("resid_post.7")):
        pass
    with pytest.raises(UserError, match="latent 48 is out of range"):
        with splice(model, random_dictionary(), Steer(48, 1.0)):
            pass
    # resid_pre of layer L+1 is resid_post of layer L
    with splice(model, {"resid_pre.2": random_dictionary("resid_post.1")}):
        model.next_logits(model.tokenize(["abc"]))


def test_resampling_stays_among_prompts_of_one_length():
    model, dictionary = tiny_model(), random_dictionary()
    tokens = model.tokenize(["abc", "abcdefgh", "xyz", "ijklmnop", "uvw"])
    latents = record_latents(model, dictionary, tokens)
    to = Ablate.resample(latents, seed=1).to
    assert isinstance(to, torch.Tensor)
    short, long = [0, 2, 4], [1, 3]
    for rows in (short, long):
        for row in rows:
            assert any(torch.equal(to[row], latents.acts[other]) for other in rows if other != row)
    uneven = record_latents(model, dictionary, model.tokenize(["abc", "abcdefgh", "xyz"]))
    with pytest.raises(UserError, match="example 1 is the only one with 9 tokens"):
        Ablate.resample(uneven)


def test_recorded_latents_know_their_padding():
    model, dictionary = tiny_model(), random_dictionary()
    tokens = model.tokenize(PROMPTS)
    with splice(model, dictionary, record=True) as run:
        model.next_logits(tokens)
    recorded = run.latents[dictionary.site]
    assert recorded.real is not None
    assert recorded.ordinary is not None
    assert torch.equal(recorded.real, tokens.attention_mask.bool())
    assert torch.equal(recorded.ordinary, tokens.ordinary)


def test_error_terms_compose():
    model, dictionary = tiny_model(), random_dictionary()
    clean, corrupted = model.tokenize(["abcdefg"]), model.tokenize(["axcxefg"])
    source = record_latents(model, dictionary, clean)
    with splice(model, dictionary, Patch(source, error=True)):
        at_once = model.next_logits(corrupted)
    halves = [Patch(source, range(24), error=True), Patch(source, range(24, 48), error=True)]
    with splice(model, dictionary, halves):
        torch.testing.assert_close(model.next_logits(corrupted), at_once)
    with pytest.raises(UserError, match="use only one"), splice(model, dictionary, halves, error="drop"):
        pass


def test_latents_are_not_recorded_inside_a_splice_but_by_it():
    """Bare or edited latents: inside a splice either could be meant, so neither is given silently."""
    model = tiny_model()
    below, above = random_dictionary("resid_post.0"), random_dictionary("resid_post.1", seed=1)
    tokens = model.tokenize(["abcdef"])
    bare = record_latents(model, above, tokens).acts
    with splice(model, [below, above], Steer(3, 50.0, site="resid_post.0"), record=True) as run:
        edited = model.logits(tokens)
        with pytest.raises(UserError, match="record=True"):
            record_latents(model, above, tokens)
    assert not torch.allclose(run.latents[Site(1)].acts, bare)
    assert torch.equal(record_latents(model, above, tokens).acts, bare)
    with splice(model, below, Steer(3, 50.0)):
        assert torch.equal(model.logits(tokens), edited)
        inside = _unspliced(model, tokens)
    assert torch.equal(inside, model.logits(tokens))


def _unspliced(model, tokens):
    from saepatch.model.hooks import unedited

    with unedited(model.layout):
        return model.logits(tokens)


def test_an_intervention_that_never_acts_is_an_error():
    model, dictionary = tiny_model(), random_dictionary()
    with pytest.raises(SpliceError, match="Steer acted at no position of any run"):
        with splice(model, dictionary, Steer(3, 5.0, positions="generated")):
            model.next_logits(model.tokenize(["abc"]))


def test_two_dictionaries_for_one_tensor_are_refused():
    model = tiny_model()
    for second in ("resid_post.1", "resid_pre.2"):
        with pytest.raises(UserError, match="two dictionaries for one site"):
            with splice(model, [random_dictionary("resid_post.1"), random_dictionary(second, seed=1)]):
                pass


def test_a_splice_does_not_pretend_to_be_differentiable():
    model, dictionary = tiny_model(), random_dictionary()
    embedded = model.hf.get_input_embeddings()
    embedded.weight.requires_grad_()
    try:
        with pytest.raises(UserError, match="not differentiable"), splice(model, dictionary, error="drop"):
            model.hf(**model.inputs(model.tokenize(["abc"])))
    finally:
        embedded.weight.requires_grad_(False)


def test_bfloat16_model_with_float32_dictionary():
    model, dictionary = tiny_model(), random_dictionary()
    model.hf.to(torch.bfloat16)
    tokens = model.tokenize(["abcdef"])
    with splice(model, dictionary):
        assert torch.equal(model.next_logits(tokens), model.next_logits(tokens))
    with splice(model, dictionary, Steer(3, 5.0)):
        assert model.next_logits(tokens).dtype == torch.bfloat16


class TowardsError:
    """Of a user: adds as much of a latent as the error term has along its row, and halves the error term."""

    latents, positions, site, needs = 3, (2, 3), None, Needs(error=True)

    def __init__(self, row):
        self.row, self.contexts = row, []

    def edit(self, acts, context):
        self.contexts.append(context)
        return acts + (context.error @ self.row)[..., None] / context.scale

    def edit_error(self, error, context):
        return error / 2


def test_an_intervention_of_ones_own_sees_scale_error_and_positions():
    """On a dictionary that normalises its input, against a hook by hand."""
    model = tiny_model()
    dictionary = random_dictionary("resid_post.1", "standard", normalize_activations="layer_norm")
    tokens, row = model.tokenize(["the cat sat", "the dog ran"]), dictionary.rows[3]
    own = TowardsError(row)

    def edit(x):
        error = dictionary.encode(x).error
        added = (error @ row)[..., None] * row - error / 2
        where = torch.zeros(x.shape[1], 1)
        where[[2, 3]] = 1
        return x + where * added

    expected = by_hand(model, dictionary.site, tokens, edit)
    with splice(model, dictionary, own):
        torch.testing.assert_close(model.next_logits(tokens), expected, atol=1e-5, rtol=1e-5)
    (context,) = own.contexts
    assert context.site == dictionary.site
    assert context.where.nonzero()[:, 1].tolist() == [2, 3, 2, 3]
    assert context.scale.shape == (*tokens.input_ids.shape, 1)
    assert (expected - model.next_logits(tokens)).abs().max() > 1e-2
    with pytest.raises(UserError, match="drops: use only one"), splice(model, dictionary, own, error="drop"):
        pass


def test_interventions_of_the_latents_and_the_pass_alone():
    """Those written before there was a context: it is the pass, too."""

    class Older:
        latents, positions, site = (1, 2), "all", None

        def edit(self, acts, seen):
            return torch.where(seen.in_prompt[..., None], 2 * acts, acts)

    class ReadsErrorUnasked(Older):
        def edit(self, acts, seen):
            return acts + seen.error.sum()

    model, dictionary = tiny_model(), random_dictionary()
    tokens = model.tokenize(PROMPTS)
    acts = record_latents(model, dictionary, tokens).acts
    with splice(model, dictionary, Older()):
        doubled = model.next_logits(tokens)
    with splice(model, dictionary, Ablate((1, 2), 2 * acts[..., [1, 2]])):
        torch.testing.assert_close(doubled, model.next_logits(tokens), atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match="needs = Needs"), splice(model, dictionary, ReadsErrorUnasked()):
        model.next_logits(tokens)


def test_texts_are_recorded_as_tokens_are():
    model, dictionary = tiny_model(), random_dictionary()
    texts = ["the cat", "a much longer text"]
    tokens = model.tokenize(texts)
    assert torch.equal(record_latents(model, dictionary, texts).acts, record_latents(model, dictionary, tokens).acts)
    assert torch.equal(model.logits(texts), model.logits(tokens))
    assert torch.equal(model.next_logits(texts), model.next_logits(tokens))
    for call in (lambda text: record_latents(model, dictionary, text), model.logits, model.generate, model.tokenize):
        with pytest.raises(UserError, match=r"one string, 'the cat': give a list of texts"):
            call("the cat")
