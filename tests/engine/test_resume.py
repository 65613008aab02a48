"""Resumed passes against whole ones with a bare hook: every family, every site, every way of resuming."""

import gc
import logging
import sys
import weakref

import pytest
import torch
from tiny import FAMILIES, byte_tokenizer, random_dictionary, tiny_model

from saepatch.data.batches import batch_pairs
from saepatch.data.pairs import PromptPair
from saepatch.engine.components import Directions, Edit, ErrorTerm, Heads, LatentUnits, Stream
from saepatch.engine.metrics import log_probability, logit_difference
from saepatch.engine.passes import kept_run as resume
from saepatch.engine.passes.kept_run import KeptRun
from saepatch.engine.passes.shortcuts import Maps, find_maps
from saepatch.errors import UserError
from saepatch.measure.patching import patch_components, patch_edits, patch_heads, patch_latents, patch_streams
from saepatch.model.language_model import LanguageModel
from saepatch.model.loading.load import load_model
from saepatch.model.positions import At
from saepatch.model.sites import Site
from saepatch.splicing.splice import splice

pytestmark = pytest.mark.whole

PAIR = PromptPair("the cat sat on it", "the dog sat in it", "x", "y", "a")
UNEQUAL = [PromptPair("a cat sat", "the horse sat", "x", "y"), PromptPair("abcdef", "abc", "x", "y")]


def by_hand(model, site, tokens, changes):
    """Next-token logits with a change added to a site, by a bare hook in one whole forward pass."""
    module = model.layout.module(site)

    def on_output(_module, _args, output):
        return (output[0] + changes, *output[1:]) if isinstance(output, tuple) else output + changes

    def on_input(_module, args, kwargs):
        if args:
            return (args[0] + changes, *args[1:]), kwargs
        return args, {**kwargs, "hidden_states": kwargs["hidden_states"] + changes}

    if site.stream in ("resid_pre", "z"):
        handle = module.register_forward_pre_hook(on_input, with_kwargs=True)
    else:
        handle = module.register_forward_hook(on_output)
    try:
        return model.logits(tokens)[:, -1]
    finally:
        handle.remove()


def force(run, site, way):
    for few in (True, False):
        run.checked[(site,), few] = (way, few, 10**6)


@pytest.fixture
def ways(monkeypatch):
    """Which way every edited pass took, and how many columns its run had."""
    taken, plain = [], KeptRun._way

    def spy(run, *asked):
        way, few = plain(run, *asked)
        taken.append((way, run.width))
        return way, few

    monkeypatch.setattr(KeptRun, "_way", spy)
    return taken


@pytest.mark.parametrize("family", FAMILIES)
def test_every_way_gives_what_a_whole_pass_gives(family):
    """At one to all blocks after the site, at the first, a middle and the last position, padded and not."""
    model = tiny_model(family)
    padded = model.pad([model.encode("a short one"), model.encode("one that is longer")], side="left")
    plain = model.tokenize(["one text here", "two text here"])
    generator = torch.Generator().manual_seed(0)
    for tokens in (plain, padded):
        for layer in range(-1, model.n_layers):
            site = Site(layer) if layer >= 0 else Site(0, "resid_pre")
            run = KeptRun(model, tokens, [site])
            for first in (1, run.width // 2, run.width - 1):
                change = torch.randn(2, run.width - first, model.d_model, generator=generator)
                for one in (True, False):  # only one position edited, or all from there on
                    edit = change.clone()
                    edit[:, one or run.width :] = 0
                    whole = torch.zeros(2, run.width, model.d_model)
                    whole[:, first:] = edit
                    expected = by_hand(model, site, tokens, whole)
                    for way in resume.WAYS:
                        force(run, site, way)
                        found = run.resume(site, torch.tensor([0, 1]), first, edit)
                        torch.testing.assert_close(found, expected, atol=2e-5, rtol=1e-5)
                        some = torch.tensor([7, 3, 200])
                        found = run.resume(site, torch.tensor([1, 1]), first, edit[[1, 1]], some)
                        torch.testing.assert_close(found, expected[[1, 1]][:, some], atol=2e-5, rtol=1e-5)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_family_passes_the_check_of_the_quickest_way(family, caplog, ways):
    """So that no family falls back in silence."""
    model, dictionary = tiny_model(family), random_dictionary("resid_post.0")
    with caplog.at_level(logging.INFO, "saepatch"):
        patch_latents(model, dictionary, [PAIR])
    assert set(ways) == {(resume.WAYS[0], len(model.encode(PAIR.clean)))}
    assert not caplog.records


def test_what_a_block_need_not_compute():
    for family, own, stays in (("llama", 3, 5), ("gpt2", 1, 3), ("phi", 5, 4), ("opt", 3, 2)):
        maps = find_maps(tiny_model(family), 1)
        assert (len(maps.own), len(maps.stays)) == (own, stays), family


def test_shortcuts_meet_where_one_block_is_left(monkeypatch):
    """The only block is the first and the last: every shortcut of both kinds is in force at once."""
    model, dictionary = tiny_model(), random_dictionary("resid_post.1")
    used = []
    plain = resume.forwards_replaced
    monkeypatch.setattr(resume, "forwards_replaced", lambda forwards: used.append(set(forwards)) or plain(forwards))
    effects = patch_latents(model, dictionary, [PAIR], each_position=True)
    maps = find_maps(model, 2)
    assert {*maps.own, *maps.stays} in used
    monkeypatch.setattr(resume, "WAYS", ("whole",))
    whole = patch_latents(model, dictionary, [PAIR], each_position=True)
    assert effects.edits == whole.edits
    torch.testing.assert_close(torch.tensor(effects.patched), torch.tensor(whole.patched), atol=2e-5, rtol=0)


def test_a_way_that_is_wrong_is_dropped(monkeypatch, caplog, ways):
    model, dictionary = tiny_model(), random_dictionary("resid_post.0")
    right = patch_latents(model, dictionary, [PAIR])
    ways.clear()
    last = model.layout.blocks[-1]
    wrong = Maps((), (last.self_attn.k_proj,), frozenset({last.self_attn.k_proj}))
    monkeypatch.setattr(resume, "find_maps", lambda model, layer: wrong)
    with caplog.at_level(logging.INFO, "saepatch"):
        again = patch_latents(model, dictionary, [PAIR])
    assert {way for way, _ in ways} == {"cache"}
    assert "differs from whole passes" in caplog.text
    torch.testing.assert_close(torch.tensor(again.patched), torch.tensor(right.patched), atol=2e-5, rtol=0)


def test_a_model_without_a_usable_cache_skips_blocks_alone(monkeypatch, caplog, ways):
    model, dictionary = tiny_model(), random_dictionary("resid_post.0")
    right = patch_latents(model, dictionary, [PAIR])

    ways.clear()
    plain = LanguageModel.inputs

    def broken(model, tokens, start=0, last=False, cache=None):
        if start:
            raise NotImplementedError("no such cache")
        return plain(model, tokens, start, last, cache)

    monkeypatch.setattr(LanguageModel, "inputs", broken)
    with caplog.at_level(logging.INFO, "saepatch"):
        again = patch_latents(model, dictionary, [PAIR])
    assert {way for way, _ in ways} == {"blocks"}
    assert "no such cache" in caplog.text
    torch.testing.assert_close(torch.tensor(again.patched), torch.tensor(right.patched), atol=2e-5, rtol=0)


def test_longer_prompts_are_checked_again(monkeypatch):
    """What agrees within a sliding window may not beyond it."""
    model, dictionary = tiny_model("mistral"), random_dictionary("resid_post.0")
    checked, plain = [], KeptRun._agrees
    monkeypatch.setattr(KeptRun, "_agrees", lambda run, *rest: checked.append(run.width) or plain(run, *rest))
    short = PromptPair("ab", "ac", "x", "y")
    patch_latents(model, dictionary, [short])
    patch_latents(model, dictionary, [short, PAIR, PAIR])
    patch_latents(model, dictionary, [short])
    assert checked == [3, 18]  # not once a pair, and the longest of a sweep alone


def test_a_model_that_was_changed_in_place_is_probed_again():
    """While the last attention wrote nothing, its queries and keys seemed not to matter to other positions."""
    model, dictionary = tiny_model(), random_dictionary("resid_post.0")
    weight = model.layout.blocks[-1].self_attn.o_proj.weight
    kept = weight.detach().clone()
    before = model.fingerprint
    weight.data.zero_()
    patch_latents(model, dictionary, [PAIR], each_position=True)
    with torch.no_grad():
        weight.copy_(kept)
    again = patch_latents(model, dictionary, [PAIR], each_position=True)
    fresh = patch_latents(tiny_model(), dictionary, [PAIR], each_position=True)
    torch.testing.assert_close(torch.tensor(again.patched), torch.tensor(fresh.patched), atol=2e-5, rtol=0)
    with torch.no_grad():
        weight.mul_(2)
    assert model.fingerprint != before


def add_one(_module, _args, out):
    return out + 1


def changes_of(model):
    """In-place changes of a model after which its passes must be compared with whole ones again, by name."""
    attention, mlp = model.layout.blocks[1].self_attn, model.layout.blocks[1].mlp
    source = sys.modules[type(mlp).__module__]
    return {
        "weights": lambda patched: attention.o_proj.weight.mul_(1.5),
        "weights, unseen by their version": lambda patched: attention.o_proj.weight.data.mul_(1.5),
        "one weight": lambda patched: mlp.up_proj.weight.data[3, 5].add_(1e-3),
        "a hook": lambda patched: mlp.register_forward_hook(add_one),
        "a replaced forward": lambda patched: patched.setitem(vars(mlp), "forward", lambda x: x),
        "another activation": lambda patched: setattr(mlp, "act_fn", torch.nn.Tanh().eval()),
        "an attribute": lambda patched: patched.setattr(attention, "scaling", 0.1),
        "attention": lambda patched: model.hf.set_attn_implementation("eager"),
        "the family's code": lambda patched: patched.setattr(source, "rotate_half", lambda x: x),
    }


@pytest.mark.parametrize("change", changes_of(tiny_model()))
def test_checks_are_remembered_until_the_model_changes(change, monkeypatch):
    model, dictionary = tiny_model(), random_dictionary("resid_post.0")
    checked, plain = [], KeptRun._agrees
    monkeypatch.setattr(KeptRun, "_agrees", lambda run, *rest: checked.append(rest[0]) or plain(run, *rest))
    for direction in ("denoise", "noise"):
        patch_latents(model, dictionary, [PAIR], direction=direction)
    assert checked == ["shortcuts"]
    patch_streams(model, [PAIR])
    assert len(checked) == 3  # a site each, of which one is known
    with torch.no_grad():
        changes_of(model)[change](monkeypatch)
    checked.clear()
    patch_latents(model, dictionary, [PAIR])
    assert checked[:1] == ["shortcuts"]


def test_remembered_checks_do_not_keep_a_model_alive():
    model, dictionary = tiny_model(), random_dictionary("resid_post.0")
    vars(model.hf)["forward"] = model.hf.forward  # a method of the model itself
    patch_latents(model, dictionary, [PAIR])
    there = weakref.ref(model.hf)
    del vars(model.hf)["forward"], model
    gc.collect()
    assert there() is None


def test_a_hook_on_the_unembedding_is_heeded():
    model, dictionary = tiny_model(), random_dictionary("resid_post.0")

    def add(_module, _args, out):
        out = out.clone()
        out[..., 0] += 5
        return out

    handle = model.hf.lm_head.register_forward_hook(add)
    try:
        found = patch_latents(model, dictionary, [PAIR])
        every = patch_latents(model, dictionary, [PAIR], metric=lambda logits, batch: logit_difference(logits, batch))
    finally:
        handle.remove()
    torch.testing.assert_close(torch.tensor(found.patched), torch.tensor(every.patched), atol=2e-5, rtol=0)


def test_a_model_in_training_mode_is_refused():
    model, dictionary = tiny_model("gpt2"), random_dictionary("resid_post.0")
    model.hf.train()
    with pytest.raises(UserError, match="in training mode"):
        patch_latents(model, dictionary, [PAIR])


def test_padding_that_a_model_does_not_know_is_refused():
    """Its recurrence runs over padding, too."""
    model = tiny_model("recurrent_gemma", attention_window_size=8, lru_width=16, num_key_value_heads=4)
    with pytest.raises(UserError, match="padding on the left changes this model's results"):
        patch_components(model, Stream(Site(0)), UNEQUAL, align="right")


def test_metrics_that_are_not_one_value_an_example_are_refused_and_none_writes_into_the_logits():
    model, dictionary = tiny_model(), random_dictionary("resid_post.0")
    with pytest.raises(UserError, match=r"returns values of shape \(\) for 1 examples"):
        patch_latents(model, dictionary, [PAIR], metric=lambda logits, batch: logit_difference(logits, batch).mean())

    def in_place(logits, batch):
        return logit_difference(logits.div_(2), batch)

    halved = patch_latents(model, dictionary, [PAIR], metric=in_place)
    whole = patch_latents(model, dictionary, [PAIR])
    torch.testing.assert_close(torch.tensor(2 * halved.change), torch.tensor(whole.change), atol=2e-5, rtol=0)


def test_positions_are_those_of_the_clean_prompts_in_both_directions():
    model, dictionary = tiny_model(), random_dictionary("resid_post.0")
    pairs = [PromptPair("the cat sat", "the dog sat", "x", "y"), PromptPair("a bad cat", "a bad dog", "x", "y")]
    for direction in ("denoise", "noise"):
        found = patch_latents(model, dictionary, pairs, positions=At("cat"), each_position=True, direction=direction)
        at = [{found.edits[i].position for i in row.nonzero()[0]} for row in found.ran]
        assert at[0] <= {5, 6, 7}
        assert at[1] <= {7, 8, 9}
        assert all(at)
    batch = batch_pairs(model, [*pairs, PAIR])
    mask = torch.zeros(3, batch.clean.input_ids.shape[1], dtype=torch.bool)
    mask[0, 5], mask[1, 8], mask[2, 9] = True, True, True
    found = patch_latents(model, dictionary, [*pairs, PAIR], positions=mask, each_position=True, batch_size=1)
    assert {found.edits[i].position for _, i in zip(*found.ran.nonzero(), strict=True)} <= {5, 8, 9}
    with pytest.raises(UserError, match="nothing to patch|nothing can be patched"):
        patch_latents(model, dictionary, pairs, positions="generated")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_each_latent_at_each_position_equals_one_plain_pass(family, direction):
    model, dictionary = tiny_model(family), random_dictionary("resid_post.0")
    effects = patch_latents(model, dictionary, [PAIR], each_position=True, direction=direction)
    batch = batch_pairs(model, [PAIR])
    base, source = (batch.corrupted, batch.clean) if direction == "denoise" else (batch.clean, batch.corrupted)
    acts = []
    for tokens in (base, source):
        with splice(model, dictionary, record=True) as run:
            model.logits(tokens)
        acts.append(run.latents[dictionary.site].acts[0])
    differ = (acts[1] - acts[0]).nonzero().tolist()
    differ = [(pos, latent) for pos, latent in differ if pos > 0]  # not at BOS
    assert {(e.position, e.units[0]) for e in effects.edits} == set(map(tuple, differ))
    assert effects.ran.all()
    for number, edit in list(enumerate(effects.edits))[:: max(1, len(effects.edits) // 12)]:
        change = torch.zeros(1, base.input_ids.shape[1], model.d_model)
        difference = acts[1][edit.position, edit.units[0]] - acts[0][edit.position, edit.units[0]]
        change[0, edit.position] = difference * dictionary.W_dec[edit.units[0]]
        expected = logit_difference(by_hand(model, dictionary.site, base, change), batch)
        assert abs(effects.patched[0, number] - float(expected)) <= 1e-5


@pytest.mark.parametrize("family", FAMILIES)
def test_streams_and_heads_equal_one_plain_pass(family):
    model = tiny_model(family)
    batch = batch_pairs(model, [PAIR])
    sweeps = [(patch_streams(model, [PAIR], stream), stream) for stream in model.layout.streams if stream != "z"]
    sweeps.append((patch_heads(model, [PAIR], each_position=True), "z"))
    for effects, stream in sweeps:
        assert {edit.site.layer for edit in effects.edits} == set(range(model.n_layers))
        for number, edit in list(enumerate(effects.edits))[::5]:
            clean, corrupted = (
                KeptRun(model, t, [edit.site]).values[edit.site] for t in (batch.clean, batch.corrupted)
            )
            change = torch.zeros_like(clean)
            change[:, edit.position] = (clean - corrupted)[:, edit.position]
            if stream == "z":
                by_head = change.unflatten(-1, (model.n_heads, -1))
                by_head[:, :, [h for h in range(model.n_heads) if h != edit.units[0]]] = 0
                change = by_head.flatten(-2)
            expected = logit_difference(by_hand(model, edit.site, batch.corrupted, change), batch)
            assert abs(effects.patched[0, number] - float(expected)) <= 1e-5, edit


def test_the_first_and_last_cells_of_the_stream_map_are_known():
    """Before any block, a position that does not differ does nothing; after the last one the last position is all."""
    model = tiny_model()
    effects = patch_streams(model, [PAIR], "resid_pre")
    at_start = {edit.position for edit in effects.edits if edit.site.layer == 0}
    ids = [model.encode(text) for text in (PAIR.clean, PAIR.corrupted)]
    assert at_start == {i for i, (a, b) in enumerate(zip(*ids, strict=True)) if a != b}
    last = patch_streams(model, [PAIR])
    end = [e for e in last.edits if e.site.layer == model.n_layers - 1]
    for edit in end:
        expected = 1.0 if edit.position == len(ids[0]) - 1 else 0.0
        assert last.of(edit).value == pytest.approx(expected, abs=1e-5)


def test_latents_and_error_term_make_up_the_stream():
    """All latents and the error term together are the whole site, for a component list in one sweep."""
    model, dictionary = tiny_model(), random_dictionary("resid_post.1")
    every = Edit(dictionary.site, tuple(range(48)), role="every")
    error = Edit(dictionary.site, (0,), kind="error")
    effects = patch_components(model, [LatentUnits(dictionary), ErrorTerm(dictionary)], [PAIR], [every, error])
    assert effects.ran.all()
    run = KeptRun(model, batch_pairs(model, [PAIR]).corrupted, [dictionary.site])
    source = KeptRun(model, batch_pairs(model, [PAIR]).clean, [dictionary.site])
    parts = [dictionary.encode(r.values[dictionary.site]).error for r in (run, source)]
    change = parts[1] - parts[0]
    change[:, 0] = 0
    expected = logit_difference(by_hand(model, dictionary.site, run.tokens, change), batch_pairs(model, [PAIR]))
    assert abs(effects.patched[0, 1] - float(expected)) <= 1e-5
    whole = patch_components(model, Stream(dictionary.site), [PAIR])
    change = source.values[dictionary.site] - run.values[dictionary.site]
    expected = logit_difference(by_hand(model, dictionary.site, run.tokens, change), batch_pairs(model, [PAIR]))
    assert abs(whole.patched[0, 0] - float(expected)) <= 1e-5


def test_directions_together_are_the_whole_stream_and_have_to_be_orthonormal():
    model = tiny_model()
    site = Site(1)
    rotation = torch.linalg.qr(torch.randn(16, 16, generator=torch.Generator().manual_seed(0))).Q
    directions = Directions(site, rotation, "random rotation")
    together = [Edit(site, tuple(range(16)), kind="direction")]
    found = patch_components(model, directions, [PAIR], together).patched
    whole = patch_components(model, Stream(site), [PAIR]).patched
    assert found == pytest.approx(whole, abs=1e-5)
    with pytest.raises(UserError, match="not orthonormal"):
        Directions(site, torch.ones(2, 16), "ones")
    with pytest.raises(UserError, match="width 4"):
        patch_components(model, Directions(site, torch.eye(4), "four"), [PAIR])


def test_prompts_aligned_from_the_right_name_positions_from_the_end():
    model, dictionary = tiny_model(), random_dictionary("resid_post.0")
    effects = patch_latents(model, dictionary, UNEQUAL, each_position=True, align="right")
    assert all(edit.position < 0 for edit in effects.edits)
    listed = [(int(p), effects.edits[i]) for p, i in zip(*effects.ran.nonzero(), strict=True)]
    again = patch_edits(model, dictionary, UNEQUAL, listed, align="right")
    assert again == pytest.approx(effects.patched[effects.ran], abs=1e-5)


def test_a_list_of_edits_equals_the_sweep_and_counts_what_changes_nothing():
    model, dictionary = tiny_model(), random_dictionary("resid_post.1")
    pairs = [PAIR, PromptPair("abc", "abd", "r", "s", "c")]
    effects = patch_latents(model, dictionary, pairs, each_position=True, metric=log_probability)
    listed = [(int(p), effects.edits[i]) for p, i in zip(*effects.ran.nonzero(), strict=True)][::-3]
    values = patch_edits(model, dictionary, pairs, listed, metric=log_probability)
    expected = [effects.patched[p, effects.edits.index(e)] for p, e in listed]
    assert values == pytest.approx(expected, abs=1e-5)
    still = Edit(dictionary.site, (0,), 1)  # "t" or "a" is in both prompts
    assert patch_edits(model, dictionary, pairs, [(1, still)], metric=log_probability)[0] == pytest.approx(
        effects.corrupted[1], abs=1e-6
    )
    with pytest.raises(UserError, match="position 99 is out of range"):
        patch_edits(model, dictionary, pairs, [(0, Edit(dictionary.site, (0,), 99))])
    with pytest.raises(UserError, match="which is not swept"):
        patch_edits(model, dictionary, pairs, [(0, Edit(Site(0), (0,), 1))])


def test_several_dictionaries_in_one_sweep_are_what_each_gives_alone():
    model = tiny_model()
    both = [random_dictionary("resid_post.0"), random_dictionary("mlp_out.1", seed=1)]
    together = patch_latents(model, both, [PAIR], each_position=True)
    alone = [patch_latents(model, one, [PAIR], each_position=True) for one in both]
    assert together.edits == tuple(edit for one in alone for edit in one.edits)
    expected = torch.cat([torch.tensor(one.patched) for one in alone], 1)
    torch.testing.assert_close(torch.tensor(together.patched), expected, atol=1e-5, rtol=0)
    with pytest.raises(UserError, match="latents by site"):
        patch_latents(model, both, [PAIR], [3])
    named = patch_latents(model, both, [PAIR], {Site(1, "mlp_out"): [3]}, controls=0)
    assert [edit.site for edit in named.edits] == [Site(1, "mlp_out")]


def test_a_sweep_inside_a_splice_is_refused():
    model, dictionary = tiny_model(), random_dictionary()
    with splice(model, dictionary):
        with pytest.raises(UserError, match="inside a splice"):
            patch_latents(model, dictionary, [PAIR])
        model.logits(model.tokenize(["a"]))


def test_bfloat16_model_with_a_float32_dictionary():
    model, dictionary = tiny_model(), random_dictionary("resid_post.0")
    exact = patch_latents(model, dictionary, [PAIR], each_position=True)
    model.hf.bfloat16()
    rough = patch_latents(model, dictionary, [PAIR], each_position=True)
    shared = [e for e in rough.edits if e in exact.edits]
    assert len(shared) > 20
    a = [exact.change[0, exact.edits.index(e)] for e in shared]
    b = [rough.change[0, rough.edits.index(e)] for e in shared]
    assert torch.corrcoef(torch.tensor([a, b]))[0, 1] > 0.9


def test_heads_of_another_number_are_refused():
    with pytest.raises(UserError, match="3 heads at layer"):
        patch_components(tiny_model(), Heads(0, 3), [PAIR])


def test_a_model_that_is_offloaded_to_disk_gives_the_same_effects(tmp_path):
    """Blocks that lie on disk run as in memory, and the model is known by the same fingerprint."""
    tiny_model().hf.save_pretrained(tmp_path / "model")
    byte_tokenizer().save_pretrained(tmp_path / "model")
    name = str(tmp_path / "model")
    whole = load_model(name)
    modules = {"model.embed_tokens": "cpu", "model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    layers = {f"model.layers.{layer}": "cpu" if layer == 0 else "disk" for layer in range(3)}
    spread = load_model(name, device_map=modules | layers, offload_folder=str(tmp_path / "offload"))
    assert any(parameter.is_meta for parameter in spread.hf.parameters())
    assert spread.fingerprint == whole.fingerprint
    for site in ("resid_post.0", "mlp_out.1"):
        dictionary = random_dictionary(site)
        found, expected = (patch_latents(model, dictionary, [PAIR], each_position=True) for model in (spread, whole))
        assert found.edits == expected.edits
        torch.testing.assert_close(torch.tensor(found.patched), torch.tensor(expected.patched), atol=1e-5, rtol=0)


def test_a_family_without_attention_caches_skips_blocks_alone(ways):
    """Short convolutions keep a state that is no cache of keys and values."""
    model = tiny_model("lfm2", layer_types=["conv", "full_attention", "conv"])
    dictionary = random_dictionary("resid_post.0")
    effects = patch_latents(model, dictionary, [PAIR], each_position=True)
    assert {way for way, _ in ways} == {"blocks"}
    listed = [(0, edit) for edit in effects.edits]
    batch = batch_pairs(model, [PAIR])
    clean, corrupted = (
        KeptRun(model, t, [dictionary.site]).values[dictionary.site] for t in (batch.clean, batch.corrupted)
    )
    acts = [dictionary.encode(x).acts[0] for x in (corrupted, clean)]
    for number, (_, edit) in list(enumerate(listed))[::10]:
        change = torch.zeros_like(clean)
        difference = acts[1][edit.position, edit.units[0]] - acts[0][edit.position, edit.units[0]]
        change[0, edit.position] = difference * dictionary.W_dec[edit.units[0]]
        expected = logit_difference(by_hand(model, dictionary.site, batch.corrupted, change), batch)
        assert abs(effects.patched[0, number] - float(expected)) <= 1e-5


def test_a_batch_that_does_not_fit_is_halved(monkeypatch, caplog):
    model, dictionary = tiny_model(), random_dictionary("resid_post.0")
    right = patch_latents(model, dictionary, [PAIR], each_position=True)
    plain, sizes = KeptRun.resume, []

    def small(run, site, rows, *rest):
        if len(rows) > 5:
            raise torch.OutOfMemoryError("no room")
        sizes.append(len(rows))
        return plain(run, site, rows, *rest)

    monkeypatch.setattr(KeptRun, "resume", small)
    again = patch_latents(model, dictionary, [PAIR], each_position=True)
    assert sum(sizes) == len(right.edits) > 50
    torch.testing.assert_close(torch.tensor(again.patched), torch.tensor(right.patched), atol=2e-5, rtol=0)

    def never(*_):
        raise torch.OutOfMemoryError("no room")

    monkeypatch.setattr(KeptRun, "resume", never)
    with pytest.raises(UserError, match="a single edit of a prompt of 18 tokens does not fit"):
        patch_latents(model, dictionary, [PAIR])


MORE_FAMILIES = {
    "gpt_neo": {
        "hidden_size": 16,
        "num_layers": 3,
        "num_heads": 4,
        "attention_types": [[["global", "local"], 1], [["global"], 1]],
        "max_position_embeddings": 64,
        "intermediate_size": 32,
        "window_size": 4,
    },
    "gptj": {"n_embd": 16, "n_layer": 3, "n_head": 4, "n_positions": 64, "rotary_dim": 4},
    "bloom": {"hidden_size": 16, "n_layer": 3, "n_head": 4},
    "mixtral": {"num_local_experts": 3},
    "qwen3_moe": {"num_experts": 3, "moe_intermediate_size": 16, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 3, "num_experts_per_tok": 2, "sliding_window": 4},
    "cohere2": {"sliding_window": 4},
    "olmo2": {},
    "olmo3": {"sliding_window": 4},
    "phi3": {},
    "stablelm": {},
    "starcoder2": {},
    "granite": {},
}


@pytest.mark.slow
@pytest.mark.parametrize("family", MORE_FAMILIES)
def test_more_families_equal_whole_passes(family, monkeypatch):
    """Mixtures of experts, position biases, other layouts: whatever way is taken, the numbers are the same."""
    model, dictionary = tiny_model(family, **MORE_FAMILIES[family]), random_dictionary("resid_post.0")
    for align, pairs in (("equal", [PAIR]), ("right", UNEQUAL)):
        found = patch_latents(model, dictionary, pairs, each_position=True, align=align)
        with monkeypatch.context() as patched:
            patched.setattr(resume, "WAYS", ("whole",))
            whole = patch_latents(model, dictionary, pairs, each_position=True, align=align)
        assert found.edits == whole.edits
        torch.testing.assert_close(torch.tensor(found.patched), torch.tensor(whole.patched), atol=1e-5, rtol=0)


class LowRank(torch.nn.Module):
    """A linear map and what a low-rank adapter adds to it."""

    def __init__(self, base, rank):
        super().__init__()
        self.base, self.down = base, torch.nn.Linear(base.in_features, rank, bias=False)
        self.up = torch.nn.Linear(rank, base.out_features, bias=False)

    def forward(self, x):
        return self.base(x) + self.up(self.down(x))


def test_an_adapter_in_the_last_block_is_patched_at_several_positions():
    """Each of its maps can run at the last position alone, but not all of them together."""
    model, dictionary = tiny_model("qwen3", seed=3), random_dictionary("resid_post.1", "standard")
    for layer in model.hf.model.layers:
        for name in ("q_proj", "o_proj"):
            setattr(layer.self_attn, name, LowRank(getattr(layer.self_attn, name), 3).requires_grad_(False))
    model.hf.eval()
    effects = patch_latents(model, dictionary, [PAIR], [[2, 30, 41]], controls=0)
    batch = batch_pairs(model, [PAIR])
    kept = KeptRun(model, batch.corrupted, [dictionary.site])
    source = KeptRun(model, batch.clean, [dictionary.site])
    component = LatentUnits(dictionary, ids=(2, 30, 41))
    old = kept.values[dictionary.site]
    changes = component.write(old, component.read(source.values[dictionary.site]), batch.corrupted.ordinary)
    logits = by_hand(model, dictionary.site, batch.corrupted, changes.applied(old) - old)
    answer, counter = int(batch.answer[0]), int(batch.counter[0])
    assert changes.pos.unique().numel() > 1
    assert abs(float(effects.patched[0, 0]) - float(logits[0, answer] - logits[0, counter])) < 2e-5
    assert kept.way(dictionary.site) == "shortcuts"


def test_a_small_effect_that_a_way_loses_is_not_hidden_by_a_large_one(monkeypatch):
    model, site = tiny_model(), Site(0)
    run = KeptRun(model, model.tokenize(["some text"]), [site])
    before = torch.full((1, 259), 100.0)
    whole = torch.cat([before + 5e-3, before + 10])  # of two edits, the first of which the way does not make
    probes = run._probes((site,))
    probes = probes._replace(columns=[4, 4], changes=probes.changes[:2], whole=whole, before=before)
    for lost, agrees in ((before, False), (whole[:1], True)):
        given = iter([lost, whole[1:]])
        monkeypatch.setattr(KeptRun, "_go", lambda *_, given=given: next(given))
        assert run._agrees("cache", (site,), probes, None) == agrees


@pytest.mark.parametrize(("piece", "fails"), [(None, 1), (4, 2)])
def test_values_of_a_pass_that_failed_are_not_kept(piece, fails):
    """The blocks before the failing one have run: their values of that pass are dropped."""
    model, site = tiny_model(), Site(0)
    tokens = model.tokenize(["abc abc abc"])
    right, calls = KeptRun(model, tokens, [site]), []

    def fail(*_):
        calls.append(None)
        if len(calls) == fails:
            raise NotImplementedError("no cache for you")

    handle = model.layout.blocks[-1].register_forward_pre_hook(fail)
    try:
        run = KeptRun(model, tokens, [site], piece=piece)
    finally:
        handle.remove()
    assert not run.has_cache
    torch.testing.assert_close(run.values[site], right.values[site])
    torch.testing.assert_close(run.logits, right.logits)
