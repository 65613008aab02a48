"""Streams that are what `generate` writes, side by side; columns; and `saepatch steer` as a user meets it."""

import io
import json
import re
import subprocess
import sys
from dataclasses import replace
from html import escape

import pytest
import torch
from tiny import random_dictionary, random_sae, tiny_model

from saepatch.cli.columns import Live, columns
from saepatch.cli.main import main
from saepatch.data.texts import load_texts
from saepatch.dictionaries.active_values import StrengthUnits
from saepatch.dictionaries.loading import load_sae
from saepatch.errors import UserError
from saepatch.measure.quality import latent_statistics
from saepatch.model.loading.load import load_model
from saepatch.model.sites import Site
from saepatch.pages.commands.latent import ReadLatent, latent_lines
from saepatch.pages.commands.steered import listen, notices, steered_page
from saepatch.reading.card_blocks import card_blocks
from saepatch.reading.cards import read_latents
from saepatch.report.text import number
from saepatch.runs.commands import session as opening
from saepatch.runs.commands.session import open_session, texts_of
from saepatch.settings.steer import SteerConfig
from saepatch.splicing.interventions import Ablate, Clamp, Steer
from saepatch.splicing.splice import record_latents, splice
from saepatch.steering.fluency import perplexity
from saepatch.steering.streaming import Sampling, side_by_side, stream

pytestmark = pytest.mark.whole


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "opt", "mistral"])
@pytest.mark.parametrize("positions", ["all", "last", "generated"])
def test_streams_are_what_generate_writes(family, positions):
    model, dictionary = tiny_model(family), random_dictionary()
    edit = Clamp(3, 4.0, positions=positions)
    bare = model.generate(["the cat sat"], 8)[0]
    with splice(model, dictionary, edit):
        steered = model.generate(["the cat sat"], 8)[0]
    steps = list(side_by_side(model, dictionary, edit, ("the cat sat", "the cat sat"), Sampling(8)))
    assert bare.startswith(steps[-1][0].text)
    assert steered.startswith(steps[-1][1].text)
    assert {one.ended for one in steps[-1]} <= {"length", "end", "loop"}
    assert len(steps) == max(len(one.ids) + (one.ended == "end") for one in steps[-1])
    assert [len(step[0].ids) for step in steps[:3]] == [1, 2, 3]  # one token at a time


def test_draws_are_those_of_the_seed():
    model = tiny_model()
    first, again, other = (list(stream(model, "the cat", Sampling(12, 1.0, seed)))[-1] for seed in (0, 0, 1))
    assert first == again
    assert first.ids != other.ids
    both = list(side_by_side(model, random_dictionary(), Steer(3, 0.0), ("the cat", "the cat"), Sampling(12, 1.0)))[-1]
    assert both[0] == both[1]  # with nothing added, the same draws


def test_a_stream_stops_at_the_end_of_text_at_a_loop_and_at_the_context():
    model = tiny_model(tie_word_embeddings=False)
    weight = model.hf.lm_head.weight
    with torch.no_grad():
        weight.zero_()
    assert next(stream(model, "ab", Sampling(40))).ids == (0,)  # all alike: the first token, over and over
    assert [w.ended for w in stream(model, "ab", Sampling(40))] == ["", "", "", "loop"]
    sampled = list(stream(tiny_model(max_position_embeddings=16), "abcdefghij", Sampling(40, 5.0)))[-1]
    assert (sampled.ended, len(sampled.ids)) == ("context", 5)
    stopping = tiny_model()
    stopping.hf.generation_config.eos_token_id = list(range(259))
    assert [(w.ids, w.ended) for w in stream(stopping, "ab")] == [((), "end")]
    steps = list(side_by_side(stopping, random_dictionary(), Ablate(3, positions="generated"), ("ab", "ab")))
    assert [one.ended for one in steps[-1]] == ["end", "end"]
    one = list(side_by_side(tiny_model(), random_dictionary(), Steer(3, 9.0, positions="generated"), ("ab", "ab"),
                            Sampling(1)))  # fmt: skip
    assert [len(each.ids) for each in one[-1]] == [1, 1]  # no generated token was read, so nothing was edited
    for given in ({"max_new_tokens": 0}, {"temperature": -1.0}):
        with pytest.raises(UserError, match="use"):
            Sampling(**given)


def test_columns_wrap_and_show_control_characters():
    lines = columns(["one two three four five six seven", "a\x1b[31mb"], ["before", "after"], 51)
    assert lines[0].split("│")[1].strip() == "after"
    assert lines[2].split("│")[0].strip() == "one two three four five"
    assert lines[3].strip("│ ").startswith("six seven")
    assert all(len(line) <= 51 for line in lines)
    assert "\x1b" not in "".join(lines)


def test_growing_text_is_drawn_over_itself_on_a_terminal_only():
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    screen = Terminal()
    live = Live(screen, 80, 24)
    live.show(["a"])
    live.show(["a b", "c"])
    live.show(["a b", "c"], last=True)
    assert screen.getvalue() == "a\n\x1b[1A\r\x1b[Ja b\nc\n\x1b[2A\r\x1b[Ja b\nc\n"
    plain = io.StringIO()
    live = Live(plain, 80, 24)
    live.show(["a"])
    live.show(["a b"], last=True)
    assert plain.getvalue() == "a b\n"


STEERED = ["steer", "--latent", "resid_post.3:5", "--unit", "1", "--strength", "400", "--json"]


@pytest.mark.slow
def test_the_command_as_a_process():
    done = subprocess.run([sys.executable, "-m", "saepatch", *STEERED, "--prompt", "The film was"],
                          capture_output=True, text=True, check=True)  # fmt: skip
    said = json.loads(done.stdout)
    assert said["before"] != said["after"]
    assert said["units"] == {"resid_post.3": [1.0]}


def test_a_conversation_is_read_from_the_standard_input(capsys, monkeypatch):
    asked = "How do I rent a car?\n/strength 0\nHow do I sell a car?\n/strength many\n/reset\nHow do I rent a car?\n"
    monkeypatch.setattr(sys, "stdin", io.StringIO(asked))
    assert main([*STEERED, "--interactive", "--positions", "last"]) == 0
    done = capsys.readouterr()
    lines = [json.loads(line) for line in done.out.splitlines()]
    assert [line["prompt"] for line in lines] == [
        "How do I rent a car?",
        "How do I sell a car?",
        "How do I rent a car?",
    ]
    assert all(line["chat"] for line in lines)
    assert lines[2]["before"] == lines[2]["after"] == lines[0]["before"]  # strength 0, and a fresh start
    assert "strength 'many' is not a number" in done.err


def test_columns_from_the_command(capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "120")
    given = ["--latent", "resid_post.3:5,6 | resid_post.4: 7", "--act", "ablate", "--prompt", "The film was"]
    assert main(["steer", *given, "--max_new_tokens", "3"]) == 0
    out = capsys.readouterr().out
    assert "before" in out
    assert "after: ablate resid_post.3:5,6, resid_post.4:7" in out
    assert "[…]" in out


def test_strength_is_in_units_of_a_quantile_or_of_the_largest_activation(tmp_path, capsys):
    model, sae = tiny_model(), random_sae()
    model.hf.save_pretrained(tmp_path / "model")
    model.tokenizer.save_pretrained(tmp_path / "model")
    sae.cfg.metadata.hook_name = "blocks.1.hook_resid_post"
    sae.save_model(tmp_path / "saes")
    (tmp_path / "t.jsonl").write_text('{"text": "the cat"}\n{"text": "a dog"}\n')
    given = ["steer", "--model", str(tmp_path / "model"), "--sae", str(tmp_path / "saes"), "--prompt", "ab", "--json"]
    given += ["--reference", str(tmp_path / "t.jsonl"), "--max_new_tokens", "4"]
    dictionary = random_dictionary()
    tokens = model.tokenize(["the cat", "a dog"])
    maximum = latent_statistics(model, dictionary, tokens).maximum
    latent, dead = int(maximum.argmax()), int(maximum.argmin())
    assert main([*given, "--latent", f"resid_post.1:{latent}", "--strength", "2", "--quantile", "1"]) == 0
    said = json.loads(capsys.readouterr().out)
    assert said["units"]["resid_post.1"] == [pytest.approx(float(maximum[latent]), rel=1e-5)]
    assert (said["quantile"], said["maxima"]) == (1.0, said["units"])
    with splice(model, dictionary, Steer(latent, 2.0, float(maximum[latent]))):
        assert model.generate(["ab"], 4)[0].startswith(said["after"])
    assert main([*given, "--latent", f"resid_post.1:{latent}", "--quantile", "0.5"]) == 0
    at_most = json.loads(capsys.readouterr().out)
    x = model.capture(tokens, [dictionary.site])[dictionary.site]
    fires = sorted(value for value in dictionary.activations(x)[0][tokens.ordinary][:, latent].tolist() if value > 0)
    assert at_most["units"]["resid_post.1"] == [pytest.approx(fires[(len(fires) - 1) // 2], rel=1 / 512)]
    assert at_most["maxima"] == said["maxima"]
    assert main([*given, "--latent", f"resid_post.1:{latent}", "--quantile", "0"]) == 2
    assert "quantile = 0.0" in capsys.readouterr().err
    assert float(maximum[dead]) == 0
    assert main([*given, "--latent", f"resid_post.1:{dead}"]) == 2
    assert "never fires in the 2 reference texts" in capsys.readouterr().err


def test_a_unit_far_below_the_largest_activation_is_warned_about(caplog, monkeypatch):
    far = StrengthUnits(torch.tensor([2.0]), torch.tensor([30.0]))
    monkeypatch.setattr(opening, "corpus_units", lambda *_: far)
    session = open_session(SteerConfig(latent="resid_post.3:966", prompt="The film was", chat=False))
    assert session.units == {Site(3): (2.0,)}
    assert session.maxima == {Site(3): (30.0,)}
    (warning,) = session.warnings
    assert warning in caplog.text
    assert "latent 966: its largest activation, 30, is 15 times the 0.95 quantile of its activations, 2:" in warning
    both = list(session.answer("The film was"))[-1]
    page = steered_page(session, [listen(session, "The film was", both, texts_of(both))], ())
    assert warning in str(page.sections[0].blocks[-1])
    (card,) = read_latents(session.model, session.dictionaries[Site(3)], [966], ["The film was"])
    assert not card.warning
    odd = ReadLatent(replace(card, unit=2.0, maximum=30.0), 0.5, session.model.fingerprint)
    assert f"warning    {warning}" in list(latent_lines(odd))
    assert warning in str(card_blocks(odd.card, set())[0])


def test_a_page_of_answers(tmp_path, capsys, monkeypatch):
    """What is said on it is what was written; it is written anew after each answer, and JSON stays a line each."""
    path = tmp_path / "new" / "steered.html"
    given = ["steer", "--latent", "resid_post.3:966,761", "--interactive", "--strength", "3", "--html", str(path)]
    monkeypatch.setattr("sys.stdin", io.StringIO("How do I <i>rent</i>?\n/strength 0\nThe film was\n"))
    assert main([*given, "--json", "--chat", "false", "--max_new_tokens", "12"]) == 0
    said = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [one["strength"] for one in said] == [3.0, 0.0]
    source = path.read_text()
    assert "<i>" not in source
    assert "How do I &lt;i&gt;rent&lt;/i&gt;?" in source
    assert "2 requests: an illustration" in source
    assert "changes nothing in the answer to “The film was”" in source
    for one in said:
        assert escape(one["before"].strip()) in source
    assert {"latent-resid_post.3-966", "latent-resid_post.3-761"} <= set(re.findall(r'id="([^"]+)"', source))
    model, dictionary = load_model("organism"), load_sae("organism", "resid_post.3")
    acts = record_latents(model, dictionary, model.tokenize(["The film was" + said[1]["before"]])).acts[0][1:]
    largest = number(float(acts[:, [966, 761]].sum(-1).max()))
    assert (
        f"before, read again by the bare model: sum of the acting latents&#39; activations, at most {largest}" in source
    )

    session = open_session(SteerConfig(latent="resid_post.3:966", prompt="The film was", unit=1.0, chat=False))
    both = list(session.answer("The film was"))[-1]
    heard = listen(session, "The film was", both, texts_of(both))
    assert heard.perplexities[0] == pytest.approx(perplexity(model, ["The film was"], [both[0].ids]))
    surprising = replace(heard, perplexities=(2.0, 22.0), answers=("a", "b"))
    assert "11 times as perplexing" in notices([surprising])[1]
    assert len(notices([replace(surprising, perplexities=(2.0, 19.0))])) == 1


def test_a_request_that_failed_is_no_part_of_the_chat():
    config = SteerConfig(latent="resid_post.3:5", unit=1.0, interactive=True, positions="5000")
    session = open_session(config)
    with pytest.raises(UserError, match="out of range"):
        list(session.answer("Hello!"))
    assert session.turns == ([], [])
    session.config = replace(config, positions="all", max_new_tokens=4)
    last = list(session.answer("Hello!"))[-1]
    assert [turns[1]["content"] for turns in session.turns] == [one.text.strip() for one in last]


def test_mistakes(capsys, tmp_path):
    for given, said in (
        (["--latent", "281", "--prompt", "a"], "write its site, a colon"),
        (["--latent", "resid_post.3:281"], "give either --prompt TEXT or --interactive"),
        (["--latent", "resid_post.3:281", "--prompt", "a", "--interactive"], "or two things: give either"),
        (["--latent", "resid_post.3:99999", "--prompt", "a"], "out of range"),
        (["--latent", "resid_post.9:1", "--prompt", "a"], "has no dictionary"),
        (["--latent", "resid_post.3:281", "--prompt", "a", "--positions", "somewhere"], "unknown positions"),
        (["--latent", "resid_post.3:281", "--prompt", "a", "--model", "gpt2"], "give --reference FILE"),
        (["--latent", "resid_post.3:281", "--prompt", "a", "--temperature", "-1"], "temperature = -1"),
        (["--latent", "resid_post.3:281", "--prompt", "a", "--strength", ".inf"], "strength is inf"),
        (
            ["--latent", "resid_post.3:281", "--prompt", "a", "--reference", str(tmp_path / "x.txt")],
            "cannot read texts",
        ),
    ):
        assert main(["steer", *given]) == 2, given
        assert said in capsys.readouterr().err


def test_texts_of_files(tmp_path):
    for name, raw in (
        ("a.txt", "x y\n\nz\n"),
        ("a.jsonl", '{"text": "x y"}\n"z"\n'),
        ("a.json", '["x y", {"text": "z"}]'),
        ("e.jsonl", '{"text": "x y"}\r\n"z"'),
    ):
        (tmp_path / name).write_text(raw)
        assert load_texts(str(tmp_path / name)) == ["x y", "z"]
    (tmp_path / "f.jsonl").write_text('{"text": "a\u2028b"}\n', encoding="utf-8")  # a separator that ends no line
    assert load_texts(str(tmp_path / "f.jsonl")) == ["a\u2028b"]
    for name, raw in (("b.txt", "\n"), ("b.jsonl", '{"story": "x"}\n'), ("c.jsonl", "{"), ("d.json", "[3]")):
        (tmp_path / name).write_text(raw)
        with pytest.raises(UserError, match="text"):
            load_texts(str(tmp_path / name))
    assert len(load_texts("organism")) > 50
