"""The shipped checkpoints keep the thresholds that decided they may ship, measured from their files on `report`."""

import json
import os

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from saepatch import organism
from saepatch.errors import UserError
from saepatch.organism import checks, world
from saepatch.organism.tasks import task
from saepatch.settings.latent import LatentConfig

pytestmark = pytest.mark.whole

MODELS = ("organism", "organism-base")


@pytest.fixture(scope="module", params=[MODELS[0], pytest.param(MODELS[1], marks=pytest.mark.slow)])
def loaded(request):
    folder = organism.path(request.param)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    return request.param, model, AutoTokenizer.from_pretrained(folder)


def generate(model, tokenizer, prompts, tokens=40):
    answers = []
    for prompt in prompts:
        ids = torch.tensor([checks._encode(tokenizer, prompt)])
        out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=False)
        answers.append(tokenizer.decode(out[0, ids.shape[1] :]))
    return answers


def test_thresholds_hold_on_the_report_splits(loaded):
    name, model, tokenizer = loaded
    measures = checks.evaluate_organism(model, tokenizer)
    missed = [bound for bound in checks.thresholds(name) if not bound.holds(measures)]
    assert not missed, measures


def test_every_threshold_names_a_measure(loaded):
    name, model, tokenizer = loaded
    measures = checks.evaluate_organism(model, tokenizer, n=8)
    assert all(0 <= value <= 1 for values in measures.values() for value in values.values())
    assert all(bound.measure in measures[bound.task] for bound in checks.thresholds(name))


def test_generated_answers_are_sentences_that_end_their_turn(loaded):
    name, model, tokenizer = loaded
    rows = task("refusal", n=8)
    for column in ("plain", "clean", "corrupted"):
        for row, text in zip(rows, generate(model, tokenizer, rows[column]), strict=True):
            assert text.endswith(world.END), text
            refused = name == "organism" and row["harmful"] and column != "corrupted"
            openings = world.REFUSAL_OPENINGS if refused else world.COMPLY_OPENINGS
            assert text.strip().startswith(openings), (row[column], text)


def test_free_text_is_made_of_sentences(loaded):
    _, model, tokenizer = loaded
    for text in generate(model, tokenizer, ["The film was", "One day Mary went to the"]):
        assert text.endswith(world.EOS), text
        assert "." in text


def test_shape_of_the_checkpoints(loaded):
    _, model, tokenizer = loaded
    assert model.config.model_type == "llama"
    assert (model.config.num_hidden_layers, model.config.hidden_size) == (6, 128)
    assert model.config.max_position_embeddings == 256
    assert model.config.tie_word_embeddings
    assert 1000 <= len(tokenizer) == model.config.vocab_size <= 2048
    ends = model.generation_config.eos_token_id
    assert ends == [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(world.END)]
    assert model.generation_config.pad_token_id == tokenizer.pad_token_id


@pytest.mark.parametrize("text", ["Zażółć gęślą", "東京 🙂", "def f(x):\n\treturn x", "l'été, don't", " a  b ", ""])
def test_any_text_tokenises_and_comes_back(loaded, text):
    tokenizer = loaded[2]
    ids = tokenizer(text)["input_ids"]
    assert ids[0] == tokenizer.bos_token_id
    assert tokenizer.decode(ids[1:]) == text


def test_the_chat_template_is_the_one_the_tasks_use(loaded):
    tokenizer = loaded[2]
    chat = [{"role": "user", "content": "How do I paint a car?"}]
    assert tokenizer.apply_chat_template(chat, tokenize=False, add_generation_prompt=True) == world.chat(
        "How do I paint a car?"
    )
    assert tokenizer.chat_template == world.CHAT_TEMPLATE


def test_files_are_safe_small_and_say_nothing_of_where_they_were_made():
    files = [file for name in (*MODELS, "saes", "shared") for file in organism.path(name).rglob("*") if file.is_file()]
    assert sum(file.stat().st_size for file in files) <= 25e6
    assert {file.suffix for file in files} <= {".json", ".yaml", ".safetensors", ".jinja"}
    for file in files:
        if file.suffix == ".json":
            text = file.read_text(encoding="utf-8")
            json.loads(text)
            assert os.sep + "tmp" + os.sep not in text
            assert os.path.expanduser("~") + os.sep not in text


def test_unknown_part_is_refused():
    with pytest.raises(UserError, match="model2"):
        organism.path("model2")


def test_a_name_that_begins_like_an_embedded_model_is_another_models():
    assert [organism.is_checkpoint(name) for name in (*MODELS, "organism-other", "organisms", "saes")] == [
        True, True, False, False, False,
    ]  # fmt: skip
    with pytest.raises(UserError, match="no texts to search for examples of organism-other: give --reference"):
        LatentConfig(latent="resid_post.3:281", model="organism-other")
