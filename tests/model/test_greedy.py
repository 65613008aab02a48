"""Greedy is the largest logit at every step, whatever a checkpoint's generation_config.json asks for."""

import inspect
import re

import pytest
import torch
from tiny import tiny_model
from transformers import GenerationConfig, GenerationMixin

from saepatch.model.greedy import NEUTRAL
from saepatch.model.loading.load import load_model
from saepatch.steering.streaming import Sampling, stream

PROMPTS = ["the cat sat", "a dog", "birds fly high up"]
TOKENS = 24
SETTINGS = {
    "repetition_penalty": 5.0,
    "encoder_repetition_penalty": 5.0,
    "no_repeat_ngram_size": 1,
    "encoder_no_repeat_ngram_size": 1,
    "bad_words_ids": [[70], [80], [90, 91]],
    "min_length": 30,
    "min_new_tokens": 20,
    "forced_bos_token_id": 50,
    "forced_eos_token_id": 1,
    "exponential_decay_length_penalty": [1, 9.0],
    "suppress_tokens": list(range(60, 200)),
    "begin_suppress_tokens": list(range(3, 200)),
    "sequence_bias": [[[100], 50.0]],
    "guidance_scale": 3.0,
    "renormalize_logits": True,
    "remove_invalid_values": True,
    "watermarking_config": {"greenlist_ratio": 0.25, "bias": 50.0},
    "do_sample": True,
    "temperature": 2.0,
    "num_beams": 3,
    "stop_strings": ["a", "e", "i"],
    "max_time": 0.0,
    "prompt_lookup_num_tokens": 3,
}


def by_argmax(model, prompt):
    """Whole passes without a cache, one token after another."""
    ids = list(model.encode(prompt))
    start = len(ids)
    while len(ids) - start < TOKENS:
        with torch.no_grad():
            token = int(model.hf(input_ids=torch.tensor([ids])).logits[0, -1].argmax())
        if token == 1:  # the end
            break
        ids.append(token)
    return [token for token in ids[start:] if token not in model.tokenizer.all_special_ids]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("model")
    model = tiny_model()
    model.hf.save_pretrained(path)
    model.tokenizer.save_pretrained(path)
    return path


# All together by default; each alone among the slow tests.
ALONE = [pytest.param([name], marks=pytest.mark.slow) for name in SETTINGS]


@pytest.mark.parametrize("names", [*ALONE, list(SETTINGS)], ids=lambda names: names[0])
def test_what_a_checkpoint_generates_with_does_not_act(folder, tmp_path, names):
    model = load_model(str(folder))
    expected = [by_argmax(model, prompt) for prompt in PROMPTS]
    given = GenerationConfig.from_dict({"eos_token_id": 1, "bos_token_id": 0, "pad_token_id": 2})
    for name in names:
        setattr(given, name, SETTINGS[name])
    given.update(**{name: SETTINGS[name] for name in names})
    model.hf.generation_config = given
    assert model.continue_ids(PROMPTS, TOKENS) == expected
    texts = [model.tokenizer.decode(ids) for ids in expected]
    assert model.generate(PROMPTS, TOKENS) == texts
    for prompt, ids in zip(PROMPTS, expected, strict=True):
        *_, last = stream(model, prompt, Sampling(TOKENS))
        assert list(last.ids) == ids[: len(last.ids)]  # it stops where a text has come to loop


def test_a_folder_that_asks_for_a_penalty(folder, tmp_path):
    model = tiny_model()
    model.hf.generation_config.repetition_penalty = 5.0
    model.hf.save_pretrained(tmp_path)
    model.tokenizer.save_pretrained(tmp_path)
    loaded = load_model(str(tmp_path))
    assert loaded.hf.generation_config.repetition_penalty == 5.0
    assert loaded.continue_ids(PROMPTS, TOKENS) == [by_argmax(loaded, prompt) for prompt in PROMPTS]
    tokens = loaded.tokenize(PROMPTS, "left")
    plain = loaded.hf.generate(
        input_ids=tokens.input_ids, attention_mask=tokens.attention_mask, max_new_tokens=TOKENS, do_sample=False
    )
    assert not torch.equal(plain[:, tokens.input_ids.shape[1] :], loaded.generate_ids(tokens, TOKENS))


def test_a_text_ends_at_every_end_token(folder):
    """As `stream` has it; the files of a checkpoint say it in different places."""
    model = load_model(str(folder))
    ids = by_argmax(model, PROMPTS[0])
    ends = [next(n for n in range(2, TOKENS) if ids[n] not in ids[:n]), TOKENS - 1]
    for places in (
        [("generation_config", ends[0])],
        [("config", ends[0])],
        [("generation_config", ends[1]), ("config", ends[0])],
    ):
        model = load_model(str(folder))
        model.hf.generation_config.eos_token_id = model.hf.config.eos_token_id = None
        for place, end in places:
            getattr(model.hf, place).eos_token_id = [ids[end]]
        found, *_ = model.continue_ids(PROMPTS, TOKENS)  # one is padded once it has ended
        assert found == ids[: ends[0]]
        *_, last = stream(model, PROMPTS[0], Sampling(TOKENS))
        assert list(last.ids) == ids[: ends[0]]


def test_every_processor_of_the_installed_transformers_is_known():
    """Those that act without sampling, read from transformers' own source."""
    source = inspect.getsource(GenerationMixin._get_logits_processor)
    sampling = source[source.index("if generation_config.do_sample:") : source.index("# Watermarking")]
    named = set(re.findall(r"generation_config\.(\w+)", source.replace(sampling, "")))
    about = {"_eos_token_tensor", "num_beams", "max_length", "use_cache", "do_sample"}
    assert {name for name in named if not name.startswith("_")} - about <= set(NEUTRAL)
