"""Documents that are no text: messages of a chat, and token ids."""

import json
from dataclasses import replace

import pytest
import torch
from runs_of_training import documents, small
from tiny import tiny_model

import saepatch as sp
from training.data.activations import ActivationStream
from training.data.document import digest, has_content
from training.data.rows import rows, token_ids
from training.data.texts import fingerprint, split, texts

TEMPLATE = (
    "{% for m in messages %}{% if m['role'] == 'system' %}{{ raise_exception('no system messages') }}{% endif %}"
    "{{ '<' + m['role'] + '> ' + m['content'] + ' ' }}{% endfor %}{% if add_generation_prompt %}{{ '<assistant>' }}"
    "{% endif %}"
)
CHATS = [
    [{"role": "user", "content": text}, {"role": "assistant", "content": text[::-1]}] for text in documents(20, seed=3)
]


@pytest.fixture
def model():
    model = tiny_model()
    tokenizer = model.tokenizer
    before, tokenizer.chat_template = tokenizer.chat_template, TEMPLATE
    yield model
    tokenizer.chat_template = before


def written(path, column, values):
    path.write_text("".join(json.dumps({column: value}) + "\n" for value in values))
    return str(path)


def activations(model, docs):
    stream = ActivationStream(model, docs, [sp.Site(0)], small(batch_size=64, buffer=256, prefetch=False), epochs=1)
    return torch.cat([batch[sp.Site(0)] for batch in stream])


def test_messages_are_read_in_the_chat_template(model, tmp_path):
    docs = texts(written(tmp_path / "chats.jsonl", "messages", CHATS), "messages")
    written_out = [f"<user> {user['content']} <assistant> {answer['content']} " for user, answer in CHATS]
    assert rows(model, docs, 64) == rows(model, written_out, 64)
    assert token_ids(model, CHATS[0]) == model.encode(written_out[0])
    train, held = split(docs, 0.2, seed=0)
    assert len(held) == 4
    assert torch.equal(activations(model, list(train)), activations(model, [
        written_out[CHATS.index(chat)] for chat in train]))  # fmt: skip


def test_token_ids_are_taken_as_they_are(model, tmp_path):
    plain = documents(20, seed=4)
    ids = [model.encode(text) for text in plain]
    docs = texts(written(tmp_path / "ids.jsonl", "input_ids", ids), "input_ids")
    assert rows(model, docs, 64) == rows(model, plain, 64)
    assert torch.equal(activations(model, list(docs)), activations(model, plain))
    assert fingerprint(list(docs)) != fingerprint(plain)


def test_streams_take_them_too(tmp_path):
    docs = texts(written(tmp_path / "chats.jsonl", "messages", CHATS), "messages", streaming=True)
    train, held = split(docs, 0.2, seed=0)
    assert held == CHATS[:4]
    assert [document for _, document in train.read()] == CHATS[4:]


@pytest.mark.parametrize(
    ("document", "problem"),
    [
        (3, "is int, not text"),
        ([1.5, 2.0], "is list of float, not text"),
        ([{"role": "user"}], "is list of dict, not text: give text, a list of messages with role and content"),
        ([True], "is list of bool"),
        ({"role": "user", "content": "a"}, "is dict, not text"),
    ],
)
def test_other_values_are_refused(document, problem, tmp_path):
    with pytest.raises(sp.UserError, match=f"a document {problem}"):
        has_content(document)
    with pytest.raises(sp.UserError, match=f"column 'c' of .* {problem}"):
        texts(written(tmp_path / "a.jsonl", "c", [document]), "c")


def test_what_a_model_cannot_read(model):
    with pytest.raises(sp.UserError, match=r"token 999999 is not in the vocabulary .* whose ids are 0 to"):
        token_ids(model, [3, 999999])
    refused = [{"role": "system", "content": "a"}, *CHATS[0]]
    with pytest.raises(sp.UserError, match=r"refuses messages by system, user, assistant: no system messages"):
        token_ids(model, refused)
    model.tokenizer.chat_template = None
    with pytest.raises(sp.UserError, match="has no chat template"):
        token_ids(replace(model), CHATS[0])


def test_blank_ones_are_left_out_and_equal_ones_are_one(tmp_path):
    docs = texts(written(tmp_path / "a.jsonl", "c", [[], CHATS[0], None, [{"role": "user", "content": "x"}]]), "c")
    assert list(docs) == [CHATS[0], [{"role": "user", "content": "x"}]]
    same = [{"content": turn["content"], "role": turn["role"]} for turn in CHATS[0]]
    assert digest(same) == digest(CHATS[0]) != digest(CHATS[1])
