"""Donors: another model, other prompts, means; their own cache, one step for each of the recipient's."""

import copy

import pytest
import torch
from tiny import byte_tokenizer, random_dictionary, tiny_model

from saepatch.errors import UserError
from saepatch.model.hooks import SpliceError, capture
from saepatch.model.loading.load import wrap_model
from saepatch.model.sites import Site
from saepatch.restoration.restore import answer_log_probs
from saepatch.splicing.donors import CleanMeans, CleanPrompts, OtherModel, Restore
from saepatch.splicing.interventions import Ablate, Steer
from saepatch.splicing.splice import record_latents, splice

pytestmark = pytest.mark.whole

PROMPTS = ["the cat sat", "a dog", "birds fly high up"]


def generated(model, tokens, n=8, **options):
    out = model.hf.generate(
        input_ids=tokens.input_ids,
        attention_mask=tokens.attention_mask,
        **({"max_new_tokens": n, "do_sample": False, "pad_token_id": 2} | options),
    )
    return out[:, tokens.input_ids.shape[1] :]


def changed_up_to(model, layer, seed=9):
    """A copy whose blocks up to a layer, that one included, have other weights."""
    hf = copy.deepcopy(model.hf)
    generator = torch.Generator().manual_seed(seed)
    other = wrap_model(hf, model.tokenizer, "changed")
    for block in other.layout.blocks[: layer + 1]:
        for weight in block.parameters():
            weight.data += 0.2 * torch.randn(weight.shape, generator=generator)
    return other


@pytest.mark.parametrize("use_cache", [True, False], ids=["cached", "uncached"])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "gemma3_text", "opt", "gpt_neox"])
def test_all_of_a_model_that_differs_up_to_the_site_is_that_model(family, use_cache):
    """Setting A, every latent and the error at every position: the donor's own tokens, exactly."""
    aligned = tiny_model(family)
    base, dictionary = changed_up_to(aligned, 1), random_dictionary("resid_post.1")
    tokens = base.tokenize(PROMPTS, "left")
    wanted, plain = generated(aligned, tokens), generated(base, tokens, use_cache=use_cache)
    donor = OtherModel(aligned)
    with splice(base, dictionary, Restore(donor, None, "every", error=True)):
        restored = generated(base, tokens, use_cache=use_cache)
        again = generated(base, tokens, use_cache=use_cache)
    assert torch.equal(restored, wanted)
    assert torch.equal(again, wanted)
    assert not torch.equal(plain, wanted)
    with splice(base, dictionary, Restore(donor)):  # without error terms and BOS it is neither
        partly = generated(base, tokens, use_cache=use_cache)
    assert not torch.equal(partly, plain)
    assert torch.equal(generated(base, tokens), plain)


def written_apart(dictionary, x):
    """What each latent adds to a site's value, by the SAE's own decoder: the difference that setting it to 0 makes."""
    sae = dictionary.sae
    acts = sae.encode(x)
    whole = sae.decode(acts)
    parts = []
    for latent in range(acts.shape[-1]):
        without = acts.clone()
        without[..., latent] = 0
        sae.encode(x)  # a decoder uses up the scale of the input that was encoded last
        parts.append(whole - sae.decode(without))
    return torch.stack(parts, -1)


@pytest.mark.parametrize("normalise", ["layer_norm", "constant_norm_rescale"])
def test_dictionaries_that_normalise_write_in_the_donors_scale(normalise):
    aligned, dictionary = tiny_model(), random_dictionary(normalize_activations=normalise)
    base, site = changed_up_to(aligned, 1), Site(1)
    tokens, ids = base.tokenize(PROMPTS, "left"), [3, 9, 17, 30, 41]
    mine, theirs = (capture(m.hf, m.layout, [site], m.inputs(tokens))[site] for m in (base, aligned))
    assert not torch.allclose(*(dictionary.activations(x)[1][tokens.ordinary] for x in (mine, theirs)), rtol=0.02)

    def site_under(restore):
        with splice(base, dictionary, restore):
            return capture(base.hf, base.layout, [site], base.inputs(tokens), stop=False)[site]

    real = tokens.attention_mask.bool()
    whole = site_under(Restore(OtherModel(aligned), None, "every", error=True))
    torch.testing.assert_close(whole[real], theirs[real], atol=1e-4, rtol=1e-4)
    own, others = (written_apart(dictionary, x)[..., ids].sum(-1) for x in (mine, theirs))
    some = site_under(Restore(OtherModel(aligned), ids))
    expected = torch.where(tokens.ordinary[..., None], mine - own + others, mine)
    torch.testing.assert_close(some[real], expected[real], atol=1e-4, rtol=1e-4)
    every = site_under(Restore(OtherModel(aligned)))  # the bias and the mean stay the recipient's
    own, others = (written_apart(dictionary, x).sum(-1) for x in (mine, theirs))
    expected = torch.where(tokens.ordinary[..., None], mine - own + others, mine)
    torch.testing.assert_close(every[real], expected[real], atol=1e-4, rtol=1e-4)


def stepwise(base, aligned, dictionary, ids, text, template, n=8):
    """Setting A by hand, no cache: both models read the whole row again for every token."""
    row, start = base.encode(text), len(base.encode(text))
    for _ in range(n):
        tokens = base.pad([row])
        theirs, mine = (record_latents(m, dictionary, tokens).acts for m in (aligned, base))
        change = torch.zeros_like(mine)
        change[..., ids] = (theirs - mine)[..., ids]
        change[:, : start - template if template is not None else 1] = 0
        change[tokens.input_ids == base.bos_id] = 0  # one that was generated, too

        def add(_module, _args, output, change=change):
            moved = change @ dictionary.W_dec
            return (output[0] + moved, *output[1:]) if isinstance(output, tuple) else output + moved

        handle = base.layout.blocks[1].register_forward_hook(add)
        row = [*row, int(base.logits(tokens)[0, -1].argmax())]
        handle.remove()
        if row[-1] == 1:
            break
    return row[start:]


@pytest.mark.parametrize("architecture", ["topk", "jumprelu"])
@pytest.mark.parametrize("template", [None, 3, 0])
def test_another_model_restores_what_a_loop_by_hand_does(architecture, template):
    aligned, dictionary = tiny_model(), random_dictionary("resid_post.1", architecture)
    base, ids = changed_up_to(aligned, 1), [3, 9, 17, 30, 41]
    tokens = base.tokenize(PROMPTS, "left")
    plain = generated(base, tokens)
    runs = []
    for use_cache in (True, False):
        with splice(base, dictionary, Restore(OtherModel(aligned, template), ids)):
            runs.append(generated(base, tokens, use_cache=use_cache))
    assert torch.equal(*runs)
    assert not torch.equal(runs[0], plain)
    for row, text in zip(runs[0].tolist(), PROMPTS, strict=True):
        expected = stepwise(base, aligned, dictionary, ids, text, template)
        assert row[: len(expected)] == expected


def test_several_sites_share_one_donor_step(monkeypatch):
    aligned = tiny_model()
    base = changed_up_to(aligned, 0)
    below, above = random_dictionary("resid_post.0"), random_dictionary("resid_post.1", seed=1)
    tokens = base.tokenize(PROMPTS, "left")
    steps = []
    aligned.hf.register_forward_pre_hook(
        lambda _m, _a, kwargs: steps.append(kwargs["input_ids"].shape), with_kwargs=True
    )
    donor = OtherModel(aligned, template=2)
    both = [Restore(donor, [3, 5], site="resid_post.0"), Restore(donor, range(9), site="resid_post.1", error=True)]
    with splice(base, [below, above], both):
        together = generated(base, tokens, 6, min_new_tokens=6)
    width = tokens.input_ids.shape[1]
    assert steps == [(3, width)] + [(3, 1)] * 5
    steps.clear()
    apart = [Restore(OtherModel(aligned, template=2), i.latents, site=i.site, error=i.error) for i in both]
    with splice(base, [below, above], apart):
        assert torch.equal(generated(base, tokens, 6, min_new_tokens=6), together)
    assert len(steps) == 12
    for only, dictionary in ((both[0], below), (both[1], above)):
        with splice(base, dictionary, only):
            assert not torch.equal(generated(base, tokens, 6, min_new_tokens=6), together)


def test_donors_stop_at_the_last_site():
    model, dictionary = tiny_model(), random_dictionary("resid_post.0")
    tokens = model.tokenize(PROMPTS, "left")
    late = []
    model.layout.blocks[2].register_forward_hook(lambda *_: late.append(1))
    with splice(model, dictionary, Restore(CleanPrompts(("one cat sat", "xyz", "abc")))):
        generated(model, tokens, 4, min_new_tokens=4)
    assert len(late) == 4


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "gpt2", "opt"])
def test_clean_prompts_batched_equal_each_alone(family):
    model, dictionary = tiny_model(family), random_dictionary()
    donors = ("one cat sat", "xyz", "a bird flies quite low")
    tokens = model.tokenize(PROMPTS, "left")
    with splice(model, dictionary, Restore(CleanPrompts(donors, 3), [3, 9, 30])):
        together, uncached = (generated(model, tokens, use_cache=use_cache) for use_cache in (True, False))
    assert torch.equal(together, uncached)
    for row, prompt, donor in zip(together.tolist(), PROMPTS, donors, strict=True):
        with splice(model, dictionary, Restore(CleanPrompts((donor,), 3), [3, 9, 30])):
            alone = generated(model, model.tokenize([prompt]))[0].tolist()
        assert row[: len(alone)] == alone
    assert not torch.equal(together, generated(model, tokens))


def test_sampling_under_a_donor():
    aligned, dictionary = tiny_model(), random_dictionary()
    base = changed_up_to(aligned, 1)
    tokens = base.tokenize(PROMPTS, "left")
    options = {"do_sample": True, "top_k": 10, "temperature": 0.7}
    torch.manual_seed(3)
    wanted = generated(aligned, tokens, **options)
    torch.manual_seed(3)
    with splice(base, dictionary, Restore(OtherModel(aligned), positions="every", error=True)):
        assert torch.equal(generated(base, tokens, **options), wanted)


def test_clean_means_are_ablations_to_them():
    model, dictionary = tiny_model(), random_dictionary()
    mean = record_latents(model, dictionary, model.tokenize(["xyz", "uvw"])).acts.mean((0, 1))
    tokens, ids = model.tokenize(PROMPTS, "left"), [3, 9, 17]
    for template, prompt in ((1, "last"), (None, "prompt"), (2, [-1, -2])):
        to = [Ablate(ids, mean[ids], positions) for positions in (prompt, "generated")]
        with splice(model, dictionary, to):
            expected = generated(model, tokens)
        with splice(model, dictionary, Restore(CleanMeans({dictionary.site: mean}, template), ids)):
            assert torch.equal(generated(model, tokens), expected)
            beams = generated(model, tokens, num_beams=2)
        with splice(model, dictionary, to):
            assert torch.equal(generated(model, tokens, num_beams=2), beams)
    assert not torch.equal(expected, generated(model, tokens))


def test_means_need_prompts_that_end_together():
    model, dictionary = tiny_model(), random_dictionary()
    means = {dictionary.site: torch.ones(48)}
    assert len(set(map(len, PROMPTS))) > 1
    for template in (0, 1, 3):
        with splice(model, dictionary, Restore(CleanMeans(means, template))):
            model.logits(model.tokenize(PROMPTS, "left"))
            with pytest.raises(UserError, match="side='left'"):
                model.logits(model.tokenize(PROMPTS, "right"))
    with splice(model, dictionary, Restore(CleanMeans(means, None))):  # all tokens: no end to line up
        right = model.next_logits(model.tokenize(PROMPTS, "right"))
        assert torch.allclose(right, model.next_logits(model.tokenize(PROMPTS, "left")), atol=1e-4)
    answers = [[3, 4, 5], [6], [7, 8]]
    with splice(model, dictionary, Restore(CleanMeans(means, 1))):  # answers may end apart
        together = answer_log_probs(model, PROMPTS, answers)
        alone = [answer_log_probs(model, [p], [a])[0] for p, a in zip(PROMPTS, answers, strict=True)]
    assert all(torch.allclose(one, other, atol=1e-4) for one, other in zip(together, alone, strict=True))


def test_a_donor_under_somebody_elses_splice_is_still_unpatched():
    aligned, dictionary = tiny_model(), random_dictionary()
    base = changed_up_to(aligned, 1)
    tokens = base.tokenize(PROMPTS, "left")
    with splice(base, dictionary, Restore(OtherModel(aligned))):
        expected = generated(base, tokens)
        with splice(aligned, dictionary, Steer(3, 50.0)):
            assert torch.equal(generated(base, tokens), expected)
            generated(aligned, tokens, 1)


def test_what_a_donor_cannot_follow_is_refused():
    aligned, dictionary = tiny_model(), random_dictionary()
    base, mean = changed_up_to(aligned, 1), torch.zeros(48)
    tokens = base.tokenize(PROMPTS, "left")
    with pytest.raises(UserError, match="num_beams=1"), splice(base, dictionary, Restore(OtherModel(aligned))):
        generated(base, tokens, num_beams=2)
    base.hf.generation_config.num_beams = 2
    with pytest.raises(UserError, match="num_beams=1"), splice(base, dictionary, Restore(OtherModel(aligned))):
        generated(base, tokens)
    base.hf.generation_config.num_beams = 1
    with pytest.raises(UserError, match="width 16"):
        narrow = tiny_model(hidden_size=24)
        with splice(base, dictionary, Restore(OtherModel(narrow))):
            pass
    tokenizer = byte_tokenizer()
    tokenizer.add_tokens(["new"])
    with pytest.raises(UserError, match="different vocabularies"):
        with splice(base, dictionary, Restore(OtherModel(wrap_model(aligned.hf, tokenizer, "other")))):
            pass
    with pytest.raises(UserError, match="CleanMeans has none"):
        Restore(CleanMeans({dictionary.site: mean}), error=True)
    with pytest.raises(UserError, match="the clean means have no entry"):
        with splice(base, dictionary, Restore(CleanMeans({Site(0): mean}))):
            pass
    with pytest.raises(UserError, match="template of -1"):
        OtherModel(aligned, template=-1)
    with pytest.raises(UserError, match="template of 9 positions.*5 tokens"):
        with splice(base, dictionary, Restore(OtherModel(aligned, template=9))):
            generated(base, tokens)
    with pytest.raises(UserError, match="drops: use only one"):
        with splice(base, dictionary, Restore(OtherModel(aligned), error=True), error="drop"):
            pass
    with pytest.raises(SpliceError, match="Restore acted at no position"):
        with splice(base, dictionary, Restore(OtherModel(aligned), positions="generated")):
            base.next_logits(tokens)


def test_a_cache_that_was_cut_back_is_refused():
    aligned, dictionary = tiny_model(), random_dictionary()
    base = changed_up_to(aligned, 1)
    ids, step = base.tokenize(["abcdef"]).input_ids, torch.tensor([[70]])
    with splice(base, dictionary, Restore(OtherModel(aligned))), torch.no_grad():
        cache = base.hf(input_ids=ids, use_cache=True).past_key_values
        base.hf(input_ids=step, past_key_values=cache)
        cache.crop(-1)
        with pytest.raises(UserError, match="single continuation"):
            base.hf(input_ids=step, past_key_values=cache)


def test_where_a_donor_has_no_values_the_recipients_error_term_stays():
    model, dictionary = tiny_model(), random_dictionary("resid_post.1")
    tokens, site = model.tokenize(["birds fly high up"], "left"), Site(1)
    before = capture(model.hf, model.layout, [site], model.inputs(tokens))[site]
    with splice(model, dictionary, Restore(CleanPrompts(("a dog",), 2), None, "every", error=True)):
        after = capture(model.hf, model.layout, [site], model.inputs(tokens), stop=False)[site]
    torch.testing.assert_close(after[:, :-2], before[:, :-2], atol=1e-5, rtol=1e-5)
    assert not torch.allclose(after[:, -2:], before[:, -2:], atol=1e-2)
