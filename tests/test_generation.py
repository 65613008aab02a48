"""Splices while text is generated: caches, padding, donors, nesting."""

import pytest
import torch
from tiny import random_dictionary, tiny_model

from saepatch.errors import UserError
from saepatch.interventions import Patch, Steer
from saepatch.restoring import CleanPrompts, Restore
from saepatch.sites import Site
from saepatch.splicing import record_latents, splice

PROMPTS = ["the cat sat", "a dog", "birds fly high up"]


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2", "gpt_neox"])
def test_steered_generation_is_the_same_cached_uncached_batched_and_alone(family):
    model, dictionary = tiny_model(family), random_dictionary()
    for positions in ("all", "generated", "prompt", "last"):
        with splice(model, dictionary, Steer(3, 3.0, positions=positions)):
            tokens = model.tokenize(PROMPTS, "left")
            batched = model.generate_ids(tokens, 12)
            options = {"max_new_tokens": 12, "do_sample": False, "pad_token_id": 2}
            inputs = {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask}
            uncached = model.hf.generate(**inputs, use_cache=False, **options)[:, tokens.input_ids.shape[1] :]
            alone = [model.generate_ids(model.tokenize([p], "left"), 12)[0].tolist() for p in PROMPTS]
        assert torch.equal(batched, uncached)
        for row, single in zip(batched.tolist(), alone, strict=True):
            assert row[: len(single)] == single
    assert torch.equal(model.generate_ids(tokens, 12), _bare(model, tokens))


def _bare(model, tokens):
    out = model.hf.generate(
        input_ids=tokens.input_ids,
        attention_mask=tokens.attention_mask,
        max_new_tokens=12,
        do_sample=False,
        pad_token_id=2,
    )
    return out[:, tokens.input_ids.shape[1] :]


@pytest.mark.parametrize("use_cache", [True, False])
def test_restoring_everything_from_the_donor(use_cache):
    """With the site before which the runs differ restored whole, the donor's own text comes out."""
    model = tiny_model()
    dictionary = random_dictionary("resid_pre.0", "standard", d_sae=2 * 16)
    sae = dictionary.sae
    with torch.no_grad():  # latents that are x and -x: no error term, so latents are the whole site
        eye = torch.eye(16)
        sae.W_enc.copy_(torch.cat([eye, -eye], 1))
        sae.W_dec.copy_(torch.cat([eye, -eye], 0))
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    donors, recipients = ["abcdef", "ghi"], ["abcxxf", "zhi"]
    tokens = model.tokenize(recipients, "left")

    def run():
        out = model.hf.generate(
            input_ids=tokens.input_ids,
            attention_mask=tokens.attention_mask,
            max_new_tokens=10,
            do_sample=False,
            use_cache=use_cache,
            pad_token_id=2,
        )
        return out[:, tokens.input_ids.shape[1] :]

    wanted = model.generate_ids(model.tokenize(donors, "left"), 10)
    assert not torch.equal(run(), wanted)
    with splice(model, dictionary, Restore(CleanPrompts(tuple(donors), template=3))):
        assert torch.equal(run(), wanted)
    with splice(model, dictionary, Restore(CleanPrompts(tuple(recipients), template=3))):
        restored_from_itself = run()
    assert torch.equal(restored_from_itself, run())


def test_restore_refuses_what_it_cannot_follow():
    model, dictionary = tiny_model(), random_dictionary()
    with pytest.raises(UserError, match="num_beams=1"), splice(model, dictionary, Restore(CleanPrompts(("abc",)))):
        tokens = model.tokenize(["abc"])
        model.hf.generate(input_ids=tokens.input_ids, num_beams=2, max_new_tokens=3, pad_token_id=2)
    with (
        pytest.raises(UserError, match="2 donor prompts for 1"),
        splice(model, dictionary, Restore(CleanPrompts(("abc", "d")))),
    ):
        model.next_logits(model.tokenize(["abc"]))
    with pytest.raises(UserError, match="side='left'"), splice(model, dictionary, Restore(CleanPrompts(("abc", "d")))):
        model.next_logits(model.tokenize(["abc", "d"], "right"))


def test_a_source_padded_on_the_other_side_is_refused():
    model, dictionary = tiny_model(), random_dictionary()
    source = record_latents(model, dictionary, model.tokenize(["xbc", "xbcdefgh"], "right"))
    with pytest.raises(UserError, match="end in other columns"), splice(model, dictionary, Patch(source)):
        model.generate(["abc", "abcdefgh"], 3)
    left = record_latents(model, dictionary, model.tokenize(["xbc", "xbcdefgh"], "left"))
    with splice(model, dictionary, Patch(left)):
        both = model.generate(["abc", "abcdefgh"], 5)
    with splice(model, dictionary, Patch(record_latents(model, dictionary, model.tokenize(["xbc"])))):
        assert model.generate(["abc"], 5) == both[:1]


def test_nested_splices_leave_a_donor_alone():
    """An outer splice must act on the run that is restored, not on its donor: as one splice of both does."""
    model = tiny_model()
    below, above = random_dictionary("resid_post.0"), random_dictionary("resid_post.1", seed=1)
    tokens = model.tokenize(["abcdef"], "left")
    donor = Restore(CleanPrompts(("xyzxyzxyz",), template=2))
    with splice(model, below, Steer(3, 5.0)), splice(model, above, donor):
        nested = model.next_logits(tokens)
    both = [Steer(3, 5.0, site=Site(0)), Restore(CleanPrompts(("xyzxyzxyz",), template=2), site=Site(1))]
    with splice(model, [below, above], both):
        torch.testing.assert_close(model.next_logits(tokens), nested)


def test_a_donor_never_lends_its_bos():
    model, dictionary = tiny_model(), random_dictionary()
    with pytest.raises(UserError, match="2 tokens beside BOS"):
        with splice(model, dictionary, Restore(CleanPrompts(("xy",), template=3))):
            model.next_logits(model.tokenize(["abcdefg"], "left"))


def test_a_prompt_that_did_not_run_inside_is_refused():
    model, dictionary = tiny_model(), random_dictionary()
    first, second = (model.tokenize([text]).input_ids for text in ("abcdef", "ghi"))
    step = torch.tensor([[70]])
    with splice(model, dictionary, Steer(3, 9.0, positions="last")):
        outside = model.hf(input_ids=first, use_cache=True).past_key_values
        other = model.hf(input_ids=second, use_cache=True).past_key_values
        model.hf(input_ids=step, past_key_values=other)
        with pytest.raises(UserError, match="another prompt"):
            model.hf(input_ids=step, past_key_values=outside)
    with pytest.raises(UserError, match="did not run inside"), splice(model, dictionary, Steer(3, 9.0)):
        model.hf(input_ids=step, past_key_values=outside)


def test_prompts_in_chunks_and_guessed_tokens_are_refused():
    model, dictionary = tiny_model(), random_dictionary()
    tokens = model.tokenize(["abcdefgh"])
    options = {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask, "pad_token_id": 2}
    with pytest.raises(UserError, match="in one pass"), splice(model, dictionary, Steer(3, 1.0, positions="last")):
        model.hf.generate(**options, max_new_tokens=3, prefill_chunk_size=4)
    with (
        pytest.raises(UserError, match="without an assistant"),
        splice(model, dictionary, Restore(CleanPrompts(("abc",)))),
    ):
        model.hf.generate(**options, max_new_tokens=3, prompt_lookup_num_tokens=3)


def test_beams_and_several_sequences_keep_their_prompts():
    model, dictionary = tiny_model(), random_dictionary()
    tokens = model.tokenize(PROMPTS, "left")
    options = {"input_ids": tokens.input_ids, "attention_mask": tokens.attention_mask, "pad_token_id": 2}
    with splice(model, dictionary, Steer(3, 4.0, positions="prompt")):
        several = model.hf.generate(**options, max_new_tokens=4, num_return_sequences=2, num_beams=2)
        alone = [
            model.hf.generate(
                input_ids=model.tokenize([p]).input_ids,
                max_new_tokens=4,
                num_return_sequences=2,
                num_beams=2,
                pad_token_id=2,
            )
            for p in PROMPTS
        ]
    for row, prompt in enumerate(PROMPTS):
        width = len(model.encode(prompt))
        assert torch.equal(several[2 * row : 2 * row + 2, -4:], alone[row][:, width:][:, -4:]), prompt
