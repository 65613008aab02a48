"""Cards of latents against direct computation."""

import json
import math
import re
from dataclasses import asdict

import pytest
import torch
from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig
from tiny import D_MODEL, FAMILIES, random_dictionary, tiny_model

from saepatch.cli.main import main
from saepatch.dictionaries.loading import adopt
from saepatch.errors import UserError
from saepatch.model.hooks import capture
from saepatch.model.lens import final_norm
from saepatch.model.sites import Site
from saepatch.reading.cards import Card, logit_lens, neuronpedia, read_latents
from saepatch.records.files import write_json
from saepatch.report import token_text
from saepatch.splicing.interventions import Steer
from saepatch.splicing.splice import splice
from saepatch.steering.contrasts import output_scores

TEXTS = ["the cat sat", "a dog", "the cat sat", "xyz xyz", "é"]


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def test_a_card_says_what_the_latent_does(model):
    dictionary, tokens = random_dictionary("resid_post.1"), model.tokenize(TEXTS)
    ids = [7, 0, 31]
    cards = read_latents(model, dictionary, ids, tokens, examples=3, top=5, batch_size=2)
    apart = []
    for text in TEXTS:  # one by one, without padding
        one = model.tokenize([text])
        x = capture(model.hf, model.layout, [dictionary.site], model.inputs(one))[dictionary.site]
        apart.append(dictionary.encode(x).acts[0, 1:])  # without the BOS
    whole = torch.cat(apart)
    for card, latent in zip(cards, ids):
        acts = whole[:, latent]
        active = acts[acts != 0]
        assert (card.latent, card.site, card.texts, card.tokens) == (latent, "resid_post.1", 5, len(whole))
        assert card.frequency == pytest.approx(len(active) / len(whole))
        assert card.maximum == pytest.approx(float(acts.max().clamp(min=0)), abs=1e-5)
        positive = sorted(active[active > 0].tolist())
        expected = positive[math.ceil(0.95 * len(positive)) - 1] if positive else 0
        assert card.unit == pytest.approx(expected, rel=1 / 512)
        if len(active):
            assert card.mean_active == pytest.approx(float(active.mean()), abs=1e-5)
        assert sum(card.counts) == len(active)
        assert card.norm == pytest.approx(float(dictionary.rows[latent].norm()), abs=1e-5)
        best = sorted((float(own[:, latent].max()) for i, own in enumerate(apart) if i != 2), reverse=True)
        assert [max(e.acts) for e in card.examples] == pytest.approx([b for b in best if b > 0][:3], abs=2e-4)
        for example in card.examples:
            assert "".join(example.tokens) == "<bos>" + TEXTS[example.text].replace("é", "⟨C3⟩⟨A9⟩")
            assert list(example.acts) == pytest.approx([0, *apart[example.text][:, latent].tolist()], abs=2e-4)
        cosines = torch.nn.functional.cosine_similarity(dictionary.rows, dictionary.rows[latent], dim=-1)
        cosines[latent] = -2
        assert [n for n, _ in card.neighbours] == cosines.topk(5).indices.tolist()
        assert [c for _, c in card.neighbours] == pytest.approx(cosines.topk(5).values.tolist(), abs=1e-4)


def test_a_latent_that_never_fires(model, tmp_path):
    dictionary = random_dictionary(architecture="jumprelu")
    dictionary.sae.threshold.data.fill_(1e9)
    (card,) = read_latents(model, dictionary, [3], model.tokenize(TEXTS))
    assert card.dead
    assert (card.counts, card.examples, card.maximum) == ((), (), 0.0)
    write_json(asdict(card), tmp_path / "card.json")
    stored = json.loads((tmp_path / "card.json").read_text())
    again = Card.read(stored)
    assert again.mean_active != again.mean_active
    del stored["unit"]  # as in runs of older versions
    assert math.isnan(Card.read(stored).unit)
    assert not Card.read(stored).warning
    assert repr(again) == repr(card)


def test_a_long_text_is_cut_around_its_peak(model):
    dictionary = random_dictionary()
    (card,) = read_latents(model, dictionary, [5], model.tokenize(["the quick brown fox jumps over a lazy dog, again"]))
    for example in card.examples:
        assert len(example.tokens) == len(example.acts) <= 33
    with pytest.raises(UserError, match="out of range"):
        read_latents(model, dictionary, [48], model.tokenize(TEXTS))


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_the_lens_is_the_final_norm_and_the_unembedding(family):
    model, dictionary = tiny_model(family), random_dictionary()
    direction = dictionary.rows[[4, 9]].double()
    if family == "gpt2":
        norm = model.hf.transformer.ln_f
        centred = direction - direction.mean(-1, keepdim=True)
        x = centred / centred.pow(2).mean(-1, keepdim=True).sqrt() * norm.weight.double()
    else:
        weight = model.hf.model.norm.weight.double()
        x = direction / direction.pow(2).mean(-1, keepdim=True).sqrt() * (1 + weight if family == "gemma2" else weight)
    logits = x @ model.hf.get_output_embeddings().weight.double().T
    logits -= logits.mean(-1, keepdim=True)
    lens = logit_lens(model, dictionary, [4, 9], top=6)
    assert lens.how == "through the final norm"
    for row, raised, lowered in zip(logits, lens.raises, lens.lowers):
        assert [value for _, value in raised] == pytest.approx(row.topk(6).values.tolist(), abs=1e-3)
        assert [value for _, value in lowered] == pytest.approx((-(-row).topk(6).values).tolist(), abs=1e-3)
        assert [name for name, _ in raised] == model.token_texts(row.topk(6).indices.tolist())


@pytest.mark.parametrize("family", FAMILIES)
def test_the_final_norm_of_every_family(family):
    model = tiny_model(family)
    norm = final_norm(model)
    assert norm is not None
    last = Site(model.n_layers - 1, "resid_post")
    tokens = model.tokenize(["abc"])
    x = capture(model.hf, model.layout, [last], model.inputs(tokens))[last]
    own = model.hf.get_output_embeddings()(norm(x))
    truth = model.logits(tokens)
    assert (own.argsort(-1) == truth.argsort(-1)).float().mean() > 0.99


POST_NORMS = {"z": "post_attention_layernorm", "neurons": "post_feedforward_layernorm"}


@pytest.mark.parametrize(("stream", "d_in"), [("z", D_MODEL), ("z", 2 * D_MODEL), ("neurons", 32)])
@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2", "phi"])
def test_the_lens_of_what_is_no_stream_goes_through_its_projection(family, stream, d_in):
    if stream == "z" and d_in != D_MODEL and family in ("gpt2", "phi"):
        pytest.skip("heads of any width are the others'")
    wide = {"head_dim": 8} if d_in == 2 * D_MODEL else {}
    model = tiny_model(family, **({"n_inner": 32} if family == "gpt2" else wide))
    dictionary = random_dictionary(f"{stream}.1", d_in=d_in)
    block, row = model.layout.blocks[1], dictionary.rows[4]
    if family == "gpt2":
        direction = row @ (block.attn.c_proj.weight if stream == "z" else block.mlp.c_proj.weight)
    elif family == "phi":
        direction = row @ (block.self_attn.dense.weight if stream == "z" else block.mlp.fc2.weight).T
    else:
        direction = row @ (block.self_attn.o_proj.weight if stream == "z" else block.mlp.down_proj.weight).T
    if family == "gemma2":
        direction = direction * (1 + getattr(block, POST_NORMS[stream]).weight)
    at_stream = adopt(StandardSAE(StandardSAEConfig(d_in=D_MODEL, d_sae=1)), Site(1), "by hand")
    at_stream.sae.W_dec.data[0] = direction
    expected, found = logit_lens(model, at_stream, [0], top=6), logit_lens(model, dictionary, [4], top=6)
    assert [name for name, _ in found.raises[0]] == [name for name, _ in expected.raises[0]]
    assert [v for _, v in found.raises[0]] == pytest.approx([v for _, v in expected.raises[0]], abs=1e-3)
    assert f"output projection of {stream}.1" in found.how
    maxima, steered = torch.ones(48), []
    (score,) = output_scores(model, dictionary, [4], maxima, ["a b"], strength=3.0, top=6).tolist()
    with splice(model, dictionary, Steer(4, 3.0)):
        steered = model.next_logits(model.tokenize(["a b"]))[0].softmax(-1)
    words = [[model.token_texts([i])[0] for i in range(259)].index(name) for name, _ in expected.raises[0]]
    order = steered.argsort(descending=True).tolist()
    best = (1 - min(map(order.index, words)) / 259) * float(steered[words].max())
    assert score == pytest.approx(best, rel=1e-3)


def test_neuronpedia_is_only_what_looks_like_a_name():
    dictionary = random_dictionary()
    for given, wanted in (
        ("gpt2-small/8-res-jb", "gpt2-small/8-res-jb"),
        ("javascript:x", ""),
        ("a/../b", ""),
        (None, ""),
    ):
        dictionary.sae.cfg.metadata.neuronpedia_id = given
        assert neuronpedia(dictionary) == wanted


def test_tokens_are_told_apart():
    told = [token_text(t) for t in (" a", "a", "a ", " ", "", "\n", "\n\n", "\u202e", "</s>", "  x")]
    assert told == ["␣a", "a", "a␣", "␣", "∅", "↵", "↵↵", "⟨U+202E⟩", "</s>", "␣␣x"]


@pytest.mark.parametrize("name", ["organism-other", "organism/", "my-organism"])
def test_a_model_of_a_similar_name_is_not_the_embedded_one(name, capsys):
    """Whose texts it would be described over."""
    assert main(["latent", "resid_post.3:100", "--model", name]) == 2
    assert f"no texts to search for examples of {name}" in capsys.readouterr().err


def test_the_command_prints_a_card(tmp_path, capsys):
    page = tmp_path / "card.html"
    texts = tmp_path / "texts.txt"
    texts.write_text("Then Julia and Victor met at the beach, and Julia passed the hat to\nThe film was great.\n")
    assert main(["latent", "resid_post.3:100", "--reference", str(texts), "--html", str(page)]) == 0
    told = capsys.readouterr().out
    assert "latent 100 at resid_post.3" in told
    assert "in 2 texts" in told
    assert "raises" in told
    assert "[[" in told
    source = page.read_text()
    assert "Latent 100 at resid_post.3" in source
    score = re.search(r"^output +(\S+): how far", told, re.M)[1]
    assert f"Output score {score}: how far" in source
    assert "In the model" not in source
    explained = ["--explain", "The <i>meaning</i> of X is"]
    assert main(["latent", "resid_post.3:100", "--reference", str(texts), "--html", str(page), *explained]) == 0
    best = re.search(r"^said +\* (\S+) ", capsys.readouterr().out, re.M)[1]
    rows = re.findall(r"<tr>(.*?)</tr>", page.read_text().partition("In the model")[2].partition("<tbody>")[2])
    cells = [re.findall(r"<bdi>(.*?)</bdi>", row) for row in rows]
    assert [float(scale) for _, scale, chosen in cells if chosen == "yes"] == [float(best)]
    assert main(["latent", "resid_post.3:100,7", "--reference", str(texts), "--html", str(page)]) == 0
    both = capsys.readouterr().out
    alone = told.partition("\n\nPage")[0]
    assert both.startswith(alone + "\n\nlatent 7 at resid_post.3")
    shown = page.read_text()
    assert "latent-resid_post.3-100" in shown
    assert "latent-resid_post.3-7" in shown
    assert main(["latent", "resid_post.3:100,7", "--reference", str(texts), "--json"]) == 0
    assert [one["latent"] for one in json.loads(capsys.readouterr().out)["latents"]] == [100, 7]
    assert main(["latent", "resid_post.3:100,", "--reference", str(texts)]) == 2
    assert main(["latent", "resid_post.3:9999", "--reference", str(texts)]) == 2
    assert main(["latent", "resid_post.3"]) == 2
    assert main(["latent", "resid_post.3:1", "--reference", str(tmp_path / "no.txt")]) == 2
    assert "text per line" in capsys.readouterr().err
