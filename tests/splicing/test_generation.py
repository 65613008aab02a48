"""Splices while text is generated: caches, padding, donors, nesting."""

from dataclasses import replace

import pytest
import torch
from tiny import random_dictionary, tiny_model
from transformers import GenerationConfig

from saepatch.errors import UserError
from saepatch.model.sites import Site
from saepatch.splicing.donors import CleanPrompts, Restore
from saepatch.splicing.interventions import Ablate, AtLeast, Clamp, Patch, Steer
from saepatch.splicing.splice import record_latents, splice, whole_prompt

pytestmark = pytest.mark.whole

PROMPTS = ["the cat sat", "a dog", "birds fly high up"]


def generated(model, tokens, n=8, **options):
    """New token ids from plain `generate`."""
    out = model.hf.generate(
        input_ids=tokens.input_ids,
        attention_mask=tokens.attention_mask,
        **({"max_new_tokens": n, "do_sample": False, "pad_token_id": 2} | options),
    )
    return out[:, tokens.input_ids.shape[1] :]


INTERVENTIONS = {
    "steer": Steer(3, 3.0),
    "steer generated": Steer([3, 5], 3.0, unit=(1.0, 0.5), positions="generated"),
    "steer decaying": Steer(3, 6.0, decay=0.7),
    "clamp prompt": Clamp([3, 7], 4.0, positions="prompt"),
    "clamp decaying": Clamp(3, 5.0, decay=0.5),
    "at least": AtLeast([3, 7], 2.0),
    "at least decaying": AtLeast(range(4), 3.0, decay=0.6),
    "ablate": Ablate(None, to=0.2),
    "last": Steer(3, 8.0, positions="last"),
    "explicit": Steer(3, 40.0, positions=[1, -1]),
    "several": [Clamp(3, 2.0), Steer(5, 3.0, positions="generated", decay=0.8), AtLeast(9, 1.0, positions=-1)],
}


CASES = [(family, name) for family in ("llama", "gpt2", "gemma2") for name in INTERVENTIONS]
CASES += [
    (family, name) for family in ("opt", "gemma3_text", "gpt_neox", "phi", "qwen3") for name in ("several", "last")
]


@pytest.mark.parametrize(("family", "name"), CASES)
def test_generation_is_the_same_cached_uncached_batched_and_alone(family, name):
    model = tiny_model(family)
    dictionary = random_dictionary(architecture="jumprelu" if family in ("llama", "phi") else "topk")
    tokens = model.tokenize(PROMPTS, "left")
    plain = generated(model, tokens)
    with splice(model, dictionary, INTERVENTIONS[name]):
        cached, uncached = (generated(model, tokens, use_cache=use_cache) for use_cache in (True, False))
        alone = [generated(model, model.tokenize([p], "left"))[0].tolist() for p in PROMPTS]
    assert torch.equal(cached, uncached)
    for row, single in zip(cached.tolist(), alone, strict=True):
        assert row[: len(single)] == single
    assert not torch.equal(cached, plain)
    assert torch.equal(generated(model, tokens), plain)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"use_cache": False},
        {"num_beams": 3, "num_return_sequences": 2},
        {"do_sample": True, "top_k": 20, "temperature": 0.8},
        {"do_sample": True, "num_beams": 2},
    ],
    ids=["greedy", "no cache", "beams", "sampling", "sampled beams"],
)
def test_without_an_edit_generation_is_the_bare_model(options):
    for architecture in ("topk", "jumprelu"):
        model, dictionary = tiny_model(), random_dictionary(architecture=architecture)
        tokens = model.tokenize(PROMPTS, "left")

        def run(model=model, tokens=tokens):
            torch.manual_seed(5)
            return generated(model, tokens, **options)

        plain = run()
        for record in (False, True):
            with splice(model, dictionary, record=record):
                assert torch.equal(run(), plain)


@pytest.mark.parametrize("intervention", [Steer(3, 3.0, decay=0.9), Clamp(3, 5.0, positions="generated")])
def test_sampling_with_a_seed_is_the_same_cached_and_uncached(intervention):
    model, dictionary = tiny_model(), random_dictionary()
    tokens = model.tokenize(PROMPTS, "left")
    options = {"do_sample": True, "top_k": 20, "temperature": 0.7}
    runs = []
    for use_cache, seed in ((True, 1), (False, 1), (True, 2)):
        with splice(model, dictionary, intervention):
            torch.manual_seed(seed)
            runs.append(generated(model, tokens, use_cache=use_cache, **options))
    assert torch.equal(runs[0], runs[1])
    assert not torch.equal(runs[0], runs[2])


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize(
    "intervention", [Clamp([3, 7], 4.0), Steer(3, 4.0, decay=0.8), AtLeast(3, 2.0, positions="generated")], ids=str
)
def test_beams_are_the_same_cached_uncached_and_alone(family, intervention):
    """The rows of beams change places at every step."""
    model, dictionary = tiny_model(family), random_dictionary()
    tokens = model.tokenize(PROMPTS, "left")
    options = {"num_beams": 3, "num_return_sequences": 3, "n": 8, "min_new_tokens": 8}
    plain = generated(model, tokens, **options)
    with splice(model, dictionary, intervention):
        cached, uncached = (generated(model, tokens, use_cache=use_cache, **options) for use_cache in (True, False))
        alone = torch.cat([generated(model, model.tokenize([p], "left"), **options) for p in PROMPTS])
    assert torch.equal(cached, uncached)
    assert torch.equal(cached, alone)
    assert not torch.equal(cached, plain)


def test_streamed_tokens_are_those_that_come_back():
    model, dictionary = tiny_model(), random_dictionary()
    tokens = model.tokenize(["the cat sat"])

    class Streamer:
        def __init__(self):
            self.tokens, self.ended = [], False

        def put(self, value):
            self.tokens += value.flatten().tolist()

        def end(self):
            self.ended = True

    streamer = Streamer()
    with splice(model, dictionary, Steer(3, 3.0)):
        together = generated(model, tokens)[0].tolist()
        generated(model, tokens, streamer=streamer)
    assert streamer.tokens[tokens.input_ids.shape[1] :] == together
    assert streamer.ended
    assert together != generated(model, tokens)[0].tolist()


def test_a_decay_is_counted_in_generated_tokens():
    """Against a hand-written loop without a cache that adds what is left at each position."""
    model, dictionary = tiny_model(), random_dictionary()
    ids = model.encode("the cat sat")
    n, row = len(ids), dictionary.W_dec[3]
    for _ in range(8):
        strength = torch.tensor([6.0 * 0.7 ** max(0, i - n) for i in range(len(ids))])
        strength[0] = 0  # BOS

        def add(_module, _args, output, strength=strength):
            return output + strength[None, :, None] * row

        handle = model.layout.blocks[1].register_forward_hook(add)
        ids.append(int(model.hf(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].argmax()))
        handle.remove()
    with splice(model, dictionary, Steer(3, 6.0, decay=0.7)):
        assert generated(model, model.tokenize(["the cat sat"]), 8)[0].tolist() == ids[n:]


def test_a_decay_starts_with_the_second_generated_token():
    model = tiny_model()
    seen = replace(whole_prompt(model, model.tokenize(["abcdef"])), n_prompt=torch.tensor([4]))
    left = Clamp(0, 8.0, decay=0.5).edit(torch.zeros(1, 7, 1), seen)
    assert left.flatten().tolist() == [8, 8, 8, 8, 8, 4, 2]


def test_bos_and_padding_are_never_touched_while_generating():
    """A huge edit everywhere leaves BOS and padding of every pass as they were, unless a position names the BOS."""
    model, dictionary = tiny_model(), random_dictionary()
    tokens = model.tokenize(["a dog", "birds fly high up"], "left")
    touched = []

    def look(_module, args):
        touched.append(args[0].detach().clone())

    handle = model.layout.blocks[2].register_forward_pre_hook(look)
    for positions in (None, "all", 0, "every"):
        steer = Steer(3, 0.0) if positions is None else Steer(3, 1e3, positions=positions)
        with splice(model, dictionary, steer):
            generated(model, tokens, 2)
    handle.remove()
    plain, everywhere, first, every = touched[0::2]
    assert torch.equal((everywhere - plain).abs().amax(-1) > 1, tokens.ordinary)
    assert torch.equal((every - plain).abs().amax(-1) > 1, tokens.attention_mask.bool())
    assert torch.equal((first - plain).abs().amax(-1) > 1, (tokens.input_ids == 0) & tokens.attention_mask.bool())


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
    with pytest.raises(UserError, match="2 tokens besides BOS"):
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
    for intervention in (Steer(3, 1.0), Restore(CleanPrompts(("abc",)))):
        guess = {"prompt_lookup_num_tokens": 3}
        for given in (guess, {"generation_config": GenerationConfig(**guess)}):
            with (
                pytest.raises(UserError, match="generate without prompt_lookup_num_tokens"),
                splice(model, dictionary, intervention),
            ):
                model.hf.generate(**options, max_new_tokens=3, **given)
        model.hf.generation_config.prompt_lookup_num_tokens = 3
        with (
            pytest.raises(UserError, match="generate without prompt_lookup_num_tokens"),
            splice(model, dictionary, intervention),
        ):
            model.hf.generate(**options, max_new_tokens=3)
        model.hf.generation_config.prompt_lookup_num_tokens = None


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
