"""Positions of a chat's turns, by role, in several styles of chat templates."""

import pytest
from tiny import random_dictionary, tiny_model

import saepatch as sp
from saepatch.runs.interpret import read_positions
from saepatch.splicing.splice import whole_prompt

LOOP = "{% for m in messages %}"
TEMPLATES = {
    "chatml": LOOP + "<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    "default system": "{% if messages[0]['role'] != 'system' %}<|system|>\nBe kind.<|end|>\n{% endif %}"
    + LOOP + "<|{{ m['role'] }}|>\n{{ m['content'] }}<|end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|assistant|>\n{% endif %}",
    "gemma": "{% if messages[0]['role'] == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    + LOOP + "<start_of_turn>{{ 'model' if m['role'] == 'assistant' else m['role'] }}\n{{ m['content'] | trim }}"
    "<end_of_turn>\n{% endfor %}{% if add_generation_prompt %}<start_of_turn>model\n{% endif %}",
    "llama 2": "{% set s = '' %}{% if messages[0]['role'] == 'system' %}"
    "{% set s = '<<SYS>>\n' + messages[0]['content'] + '\n<</SYS>>\n\n' %}"
    "{% set messages = messages[1:] %}{% endif %}" + LOOP
    + "{% if m['role'] == 'user' %}[INST] {{ s if loop.first else '' }}{{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }} </s>{% endif %}{% endfor %}",
}  # fmt: skip
CHAT = [
    {"role": "user", "content": "How do I bake?"},
    {"role": "assistant", "content": "Like this."},
    {"role": "user", "content": "And user then?"},
    {"role": "assistant", "content": "Eat it."},
]


def model_with(template):
    model = tiny_model(max_position_embeddings=512)
    model.tokenizer.chat_template = TEMPLATES[template]
    return model


def selected(model, text, turn):
    tokens = model.tokenize([text])
    where = whole_prompt(model, tokens).select(turn)
    return model.tokenizer.decode(tokens.input_ids[where])


@pytest.mark.parametrize("template", TEMPLATES)
@pytest.mark.parametrize("length", [1, 2, 3, 4])
@pytest.mark.parametrize("ready", [True, False])
def test_turns_are_the_contents(template, length, ready):
    model = model_with(template)
    text = model.chat(CHAT[:length], ready)
    for role in ("user", "assistant"):
        contents = [turn["content"] for turn in CHAT[:length] if turn["role"] == role]
        for number, content in enumerate(contents):
            for occurrence in (number, number - len(contents)):
                assert selected(model, text, sp.Turn(role, occurrence)) == content
        with pytest.raises(sp.UserError, match=f"has {len(contents)} turns of '{role}'"):
            selected(model, text, sp.Turn(role, len(contents)))


@pytest.mark.parametrize("template", ["chatml", "default system", "llama 2"])
def test_system_messages(template):
    model = model_with(template)
    text = model.chat([{"role": "system", "content": "Be brief."}, *CHAT])
    assert selected(model, text, sp.Turn("system")) == "Be brief."
    assert selected(model, text, sp.Turn("user", 0)) == "How do I bake?"
    assert selected(model, text, sp.Turn("assistant")) == "Eat it."


def test_an_edit_acts_on_a_turn_alone():
    model, dictionary = model_with("chatml"), random_dictionary("resid_post.1", "standard")
    text, turn = model.chat(CHAT[:3]), sp.Turn("user", 0)
    tokens = model.tokenize([text])
    where = whole_prompt(model, tokens).select(turn)
    with sp.splice(model, dictionary, sp.Steer([3], 5.0, positions=turn)):
        ours = model.next_logits(tokens)
    with sp.splice(model, dictionary, sp.Steer([3], 5.0, positions=where)):
        mask = model.next_logits(tokens)
    assert (ours == mask).all()
    assert 0 < int(where.sum()) < tokens.width


def test_prompts_that_are_no_chats():
    model = model_with("chatml")
    with pytest.raises(sp.UserError, match="does not begin as chats of this model do"):
        selected(model, "How do I bake?", sp.Turn("user"))
    model.tokenizer.chat_template = "{{ messages[0]['content'] }}"
    with pytest.raises(sp.UserError, match="drops or repeats messages"):
        selected(tiny_like(model), "How do I bake?", sp.Turn("user"))
    model.tokenizer.chat_template = None
    with pytest.raises(sp.UserError, match="no chat template"):
        selected(tiny_like(model), "How do I bake?", sp.Turn("user"))


def tiny_like(model):
    """The model anew, since it keeps what its template writes."""
    return sp.LanguageModel(model.hf, model.tokenizer, model.name, model.layout)


def test_as_settings():
    assert read_positions("turn: user") == sp.Turn("user")
    assert read_positions("turn: assistant 0") == sp.Turn("assistant", 0)
    with pytest.raises(sp.UserError, match="turn: ROLE"):
        read_positions("turn:")
