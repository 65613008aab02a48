"""Models and dictionaries from memory, folders and a hub; and the errors for what cannot be loaded."""

import json
from dataclasses import replace

import pytest
import torch
from hub import serve, using
from safetensors.torch import load_file, save_file
from tiny import FAMILIES, random_dictionary, random_sae, tiny_model

from saepatch.cli.main import main
from saepatch.dictionaries.loading import load_sae, load_saes
from saepatch.errors import UserError
from saepatch.model.finite import all_finite
from saepatch.model.language_model import LanguageModel
from saepatch.model.loading import load as loading
from saepatch.model.loading.load import load_model
from saepatch.model.sites import Site

pytestmark = pytest.mark.whole


def save_sae(sae, folder, hook="blocks.1.hook_resid_post"):
    sae.cfg.metadata.hook_name = hook
    sae.save_model(folder)
    return folder


@pytest.fixture
def model_folder(tmp_path):
    model = tiny_model()
    folder = tmp_path / "model"
    model.hf.save_pretrained(folder)
    model.tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_offers_its_streams(family):
    streams = set(tiny_model(family).layout.streams)
    assert streams == {"resid_pre", "resid_post", "attn_out", "z"} | ({"mlp_out"} if family != "opt" else set())


def test_an_unknown_family_is_read_off_its_structure(monkeypatch):
    from saepatch.model import families as layouts

    monkeypatch.delitem(layouts.FAMILIES, "llama")
    assert set(tiny_model().layout.streams) == {"resid_pre", "resid_post", "attn_out", "mlp_out", "z"}


def test_streams_that_do_not_add_up_are_not_offered(caplog):
    """Granite scales what its blocks write: attn_out and mlp_out would not mean what they say."""
    from tiny import COMMON
    from tiny import FAMILIES as families

    from saepatch.model import families as layouts

    layouts.FAMILIES["granite"] = layouts.FAMILIES["llama"]
    families["granite"] = COMMON | {"residual_multiplier": 0.3, "attention_multiplier": 1.0}
    try:
        assert set(tiny_model("granite").layout.streams) == {"resid_pre", "resid_post", "z"}
    finally:
        del layouts.FAMILIES["granite"], families["granite"]
    assert "do not add up" in caplog.text


def test_model_from_a_folder(model_folder):
    model = load_model(str(model_folder))
    assert isinstance(model, LanguageModel)
    assert (model.n_layers, model.d_model) == (3, 16)
    assert model.fingerprint == tiny_model().fingerprint
    assert model.fingerprint != tiny_model(seed=1).fingerprint
    assert load_model(str(model_folder), dtype="bfloat16").dtype == torch.bfloat16


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
def test_a_model_is_checked_by_few_logits_with_the_same_result(family, monkeypatch):
    """Of a large vocabulary, unembedding takes most of the time."""
    model, widths = tiny_model(family), []
    plain = loading.run_pass

    def seen(*rest):
        logits = plain(*rest)
        widths.append(logits.shape[-1])
        return logits

    monkeypatch.setattr(loading, "run_pass", seen)
    monkeypatch.setattr(loading, "FEW_LOGITS", 16)
    again = loading.wrap_model(model.hf, model.tokenizer, model.name)
    assert set(widths) == {2 * model.d_model}
    names = ("padding", "step_limit", "last_alone")
    assert [getattr(again, name) for name in names] == [getattr(model, name) for name in names]
    assert (again.layout.paths, again.layout.widths) == (model.layout.paths, model.layout.widths)


def test_large_weights_are_finite_though_their_sum_is_not():
    model = tiny_model()
    weight = model.layout.blocks[0].mlp.up_proj.weight.data
    weight[0, :4] = 3e38
    loading.wrap_model(model.hf, model.tokenizer, model.name)
    weight[0, 1] = -torch.inf
    with pytest.raises(UserError, match=r"NaN or infinite weights in model.layers.0.mlp.up_proj"):
        loading.wrap_model(model.hf, model.tokenizer, model.name)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("value", [torch.nan, torch.inf])
def test_one_weight_that_is_not_finite_is_found_wherever_it_is(dtype, value):
    """Weights are checked in slices: the first, the last, and the ends of one in between."""
    weights = torch.ones((3 << 22) + 5, dtype=dtype)
    assert all_finite(weights)
    for place in (0, (1 << 22) - 1, 1 << 22, -6, -1):
        weights[place] = value
        assert not all_finite(weights)
        weights[place] = 1


def test_models_that_cannot_be_loaded(model_folder, tmp_path):
    with pytest.raises(UserError, match="has no config.json"):
        load_model(str(tmp_path))
    with pytest.raises(UserError, match="'./nowhere' is neither a folder nor a Hugging Face id"):
        load_model("./nowhere")
    with pytest.raises(UserError, match="unknown dtype 'float33'"):
        load_model(str(model_folder), dtype="float33")
    with pytest.raises(UserError, match="unknown option 'offload': use one of device_map, max_memory, offload_folder"):
        load_model(str(model_folder), offload="here")
    weights = load_file(model_folder / "model.safetensors")
    weights["model.norm.weight"][3] = torch.nan
    save_file(weights, model_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="NaN or infinite weights in model.norm.weight"):
        load_model(str(model_folder))
    del weights["model.layers.2.mlp.up_proj.weight"]
    save_file(weights, model_folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(UserError, match="lacks 1 weights .model.layers.2.mlp.up_proj.weight"):
        load_model(str(model_folder))
    whole = (model_folder / "model.safetensors").read_bytes()
    (model_folder / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(UserError, match="cannot load model"):
        load_model(str(model_folder))
    (model_folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="cannot load model"):
        load_model(str(model_folder))
    with pytest.raises(UserError, match="device 'banana' cannot be used here"):
        load_model(str(model_folder), device="banana")


def test_a_model_and_dictionary_that_were_not_made_for_each_other_are_said(caplog):
    model = load_model("organism-base")
    load_sae("organism", "resid_post.3").check(model)
    assert "was trained on another model (d76a5eb77d8bf98f)" in caplog.text
    caplog.clear()
    load_sae("organism", "resid_post.3").check(load_model("organism"))
    assert not caplog.text


def test_bos_in_front_of_texts_whose_tokenizer_adds_none(model_folder):
    from tokenizers import processors

    plain = load_model(str(model_folder))
    plain.tokenizer.backend_tokenizer.post_processor = processors.ByteLevel()
    assert plain.encode("ab")[:1] != [plain.bos_id]
    model = replace(plain, prepend_bos=True)
    assert model.encode("ab") == model.encode("<bos>ab") == [model.bos_id, *plain.encode("ab")]
    assert not model.tokenize(["ab"]).ordinary[0, 0]


@pytest.mark.parametrize("architecture", ["topk", "jumprelu", "standard", "gated"])
def test_dictionary_from_a_folder_is_what_sae_lens_loads(tmp_path, architecture):
    from sae_lens import SAE

    folder = save_sae(random_sae(architecture), tmp_path / "sae")
    dictionary = load_sae(str(folder))
    assert (dictionary.site, dictionary.architecture, dictionary.d_sae) == (Site(1), architecture, 48)
    x = torch.randn(2, 5, 16)
    theirs = SAE.load_from_disk(folder)
    torch.testing.assert_close(dictionary.encode(x).acts, theirs.encode(x))
    torch.testing.assert_close(dictionary.encode(x).reconstruction, theirs.decode(theirs.encode(x)))


def test_dictionaries_of_several_sites(tmp_path):
    for layer in (2, 0):
        save_sae(random_sae(), tmp_path / f"resid_post.{layer}", f"blocks.{layer}.hook_resid_post")
    assert list(load_saes(str(tmp_path))) == [Site(0), Site(2)]
    assert load_sae(str(tmp_path), "resid_post.2").site == Site(2)
    assert load_sae(str(tmp_path), "blocks.2.hook_resid_post").site == Site(2)
    assert load_sae(str(tmp_path), "resid_pre.1").site == Site(0)
    with pytest.raises(UserError, match="has several dictionaries: name a site, one of resid_post.0, resid_post.2"):
        load_sae(str(tmp_path))
    with pytest.raises(UserError, match="no dictionary for resid_post.1: it has resid_post.0, resid_post.2"):
        load_sae(str(tmp_path), "resid_post.1")


def test_dictionaries_that_cannot_be_loaded(tmp_path, caplog):
    with pytest.raises(UserError, match="unknown dictionary 'nosuch': use 'organism', 'organism-shared', a folder"):
        load_sae("nosuch")
    with pytest.raises(UserError, match="'nosuch/deeper' is not a folder, and 'nosuch' is not a release"):
        load_sae("nosuch/deeper")
    with pytest.raises(UserError, match="has no dictionary"):
        load_sae(str(tmp_path), "resid_post.0")
    with pytest.raises(UserError, match="cannot read site 'layer 3'"):
        load_sae(str(tmp_path), "layer 3")
    folder = save_sae(random_sae(), tmp_path / "sae")
    assert load_sae(str(folder), "resid_post.0").site == Site(0)
    assert "states training at resid_post.1: used at resid_post.0, as requested" in caplog.text
    weights = load_file(folder / "sae_weights.safetensors")
    broken = {name: value.clone() for name, value in weights.items()}
    broken["W_dec"][0, 0] = torch.inf
    save_file(broken, folder / "sae_weights.safetensors")
    with pytest.raises(UserError, match="NaN or infinite weights in W_dec"):
        load_sae(str(folder))
    (folder / "sae_weights.safetensors").write_bytes(b"not weights")
    with pytest.raises(UserError, match="cannot read the dictionary"):
        load_sae(str(folder))
    (folder / "sae_weights.safetensors").unlink()
    with pytest.raises(UserError, match="lacks sae_weights.safetensors"):
        load_sae(str(folder))
    nameless = save_sae(random_sae(), tmp_path / "nameless", None)
    cfg = json.loads((nameless / "cfg.json").read_text())
    cfg["metadata"].pop("hook_name", None)
    (nameless / "cfg.json").write_text(json.dumps(cfg))
    with pytest.raises(UserError, match="names no site"):
        load_sae(str(nameless))
    assert load_sae(str(nameless), "resid_post.1").site == Site(1)


def test_dictionaries_that_cannot_be_edited():
    with pytest.raises(UserError, match="expects expected_average_only_in inputs that are not folded"):
        random_dictionary(architecture="standard", normalize_activations="expected_average_only_in")


@pytest.mark.parametrize(
    ("text", "site"),
    [("resid_post.3", Site(3)), ("blocks.0.hook_mlp_out", Site(0, "mlp_out")), ("attn_out.12", Site(12, "attn_out"))],
)
def test_site_names(text, site):
    assert Site.parse(text) == site
    assert Site.parse(str(site)) == site
    assert Site.parse(site.hook_name) == site


@pytest.mark.parametrize("text", ["resid_post", "resid.3", "blocks.3.hook_z", "resid_post.-1", "", "3.resid_post"])
def test_site_names_that_cannot_be_read(text):
    with pytest.raises(UserError, match=r"cannot read site|unknown stream"):
        Site.parse(text)


@pytest.mark.filterwarnings("ignore")  # the hub client's own
def test_model_and_dictionary_from_a_hub(model_folder, tmp_path, capsys):
    saes = tmp_path / "saes"
    save_sae(random_sae(), saes / "resid_post.1")
    other = tiny_model(seed=1)
    other.hf.save_pretrained(tmp_path / "v2")
    other.tokenizer.save_pretrained(tmp_path / "v2")
    repositories = {"acme/tiny": model_folder, "acme/tiny@v2": tmp_path / "v2", "acme/saes": saes}
    with serve(repositories) as endpoint, using(endpoint, tmp_path / "cache"):
        model, dictionary = load_model("acme/tiny"), load_sae("acme/saes/resid_post.1")
        dictionary.check(model)
        with pytest.raises(UserError, match="^cannot load model 'acme/absent'"):
            load_model("acme/absent")
        assert main(["inspect", "acme/tiny", "--revision", "v2", "--json"]) == 0
        assert main(["inspect", "acme/tiny", "--revision", "v3"]) == 2
    assert model.fingerprint == tiny_model().fingerprint
    assert (dictionary.fingerprint, str(dictionary.site)) == (random_dictionary().fingerprint, "resid_post.1")
    assert other.fingerprint != tiny_model().fingerprint
    told = capsys.readouterr()
    assert other.fingerprint in told.out
    assert "error: cannot load model 'acme/tiny'" in told.err


def test_a_folder_has_no_revisions(model_folder):
    with pytest.raises(UserError, match="revision 'v2': .*has no revisions"):
        load_model(str(model_folder), revision="v2")


def test_a_model_that_is_spread_over_devices_is_the_same(model_folder):
    whole, spread = load_model(str(model_folder)), load_model(str(model_folder), device_map="auto")
    tokens = whole.tokenize(["abc def"], "left")
    torch.testing.assert_close(spread.next_logits(tokens), whole.next_logits(tokens))


def test_a_model_without_the_files_of_its_tokenizer_is_refused(tmp_path):
    """transformers makes one without tokens for GPT-2: every prompt would be empty."""
    tiny_model("gpt2").hf.save_pretrained(tmp_path)
    with pytest.raises(UserError, match="the files of its tokenizer are missing"):
        load_model(str(tmp_path))
