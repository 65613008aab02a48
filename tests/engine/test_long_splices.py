"""Splices of long prompts: encoded, edited and decoded some positions at a time, with the numbers of the whole."""

from contextlib import nullcontext

import pytest
import torch
from bare_hooks import hooked
from tiny import random_dictionary, tiny_model

from saepatch.dictionaries.dictionary import Dictionary
from saepatch.errors import UserError
from saepatch.model.positions import At
from saepatch.records import memory
from saepatch.splicing import site_edit
from saepatch.splicing.donors import CleanMeans, CleanPrompts, OtherModel, Restore
from saepatch.splicing.interventions import Ablate, AtLeast, Clamp, Needs, Patch, Steer, SteerAtNorm
from saepatch.splicing.splice import record_latents, splice

PROMPTS = ["a long prompt about the cat that sat", "a short one of a cat"]
OTHERS = ["q wide prompt about the dog that ran", "q tall ones of a dog"]
DICTIONARIES = {
    "topk": {},
    "standard": {},  # whose latents are encoded alone
    "normalising": {"architecture": "standard", "normalize_activations": "layer_norm"},
}


def dictionary_of(name):
    return random_dictionary("resid_post.1", **({"architecture": name} | DICTIONARIES[name]))


def interventions(model, dictionary, tokens, other):
    """One of each kind; some choose positions that lie in one part, or in several."""
    generator, source = torch.Generator().manual_seed(0), record_latents(model, dictionary, other)
    by_position, means = torch.rand(tokens.width, 2, generator=generator), torch.rand(48, generator=generator)
    clean, aligned = CleanPrompts(tuple(OTHERS), template=None), OtherModel(tiny_model(seed=1), template=5)
    return {
        "patch": Patch(source, (1, 2, 30)),
        "patch of everything": Patch(source, error=True, positions="every"),
        "ablation by position": Ablate((3, 4), by_position),
        "ablation": Ablate(to=0.5, positions="last"),
        "clamp": Clamp((5, 6, 7), 2.0, positions=slice(-7, None)),
        "at least": AtLeast(8, 1.0, positions=At("cat")),
        "steer": Steer((9, 10), 3.0, positions=-1),
        "steer at norm": SteerAtNorm(11, 4.0),
        "restore from prompts": Restore(clean, tuple(range(24))),
        "restore from a model": Restore(aligned, error=True),
        "restore means": Restore(CleanMeans({dictionary.site: means}, template=5)),
    }


@pytest.fixture
def few_at_once(monkeypatch):
    """Let splices encode 5 positions of two prompts at a time; a list of the numbers that were made at once."""

    def patched():
        sizes, activations = [], Dictionary.activations

        def spied(self, x):
            sizes.append(x.shape[:2].numel() * self.d_sae)
            return activations(self, x)

        monkeypatch.setattr(site_edit, "NUMBERS", 5 * 2 * 48)
        monkeypatch.setattr(Dictionary, "activations", spied)
        return sizes

    return patched


@pytest.mark.parametrize(("name", "side"), [("topk", "left"), ("standard", "right"), ("normalising", "left")])
def test_the_numbers_are_those_of_the_whole(few_at_once, name, side):
    model, dictionary = tiny_model(), dictionary_of(name)
    tokens, other = (model.tokenize(texts, side) for texts in (PROMPTS, OTHERS))
    several = interventions(model, dictionary, tokens, other)
    if side == "right":
        del several["restore from prompts"], several["restore from a model"], several["restore means"]
    runs = {kind: ((item,), {}) for kind, item in several.items()}
    runs |= {"bottleneck": ((several["steer"], several["clamp"]), {"error": "drop", "first": 2})}
    runs |= {"all, recorded": (tuple(several[kind] for kind in ("patch", "ablation", "steer")), {"record": True})}
    expected, bare = {}, model.next_logits(tokens)
    for kind, (items, options) in runs.items():
        with splice(model, dictionary, items, **options) as run:
            expected[kind] = model.next_logits(tokens), run.latents
    latents = record_latents(model, dictionary, tokens)
    sizes = few_at_once()
    for kind, (items, options) in runs.items():
        with splice(model, dictionary, items, **options) as run:
            logits = model.next_logits(tokens)
        torch.testing.assert_close(logits, expected[kind][0], atol=2e-6, rtol=1e-5, msg=kind)
        assert (logits - bare).abs().max() > 1e-3, kind
        for site, recorded in run.latents.items():
            same_latents(recorded, expected[kind][1][site])
    same_latents(record_latents(model, dictionary, tokens), latents)
    assert max(sizes) == 5 * 2 * 48
    assert len(sizes) > 40


def same_latents(one, other):
    assert vars(one).keys() == vars(other).keys()
    for name, value in vars(one).items():
        if value is None:
            assert getattr(other, name) is None
        else:
            torch.testing.assert_close(value, getattr(other, name), atol=2e-6, rtol=1e-5)


def test_against_a_plain_hook(few_at_once):
    """Latents set to 2 at the positions of words that lie in two parts."""
    model, dictionary = tiny_model(), random_dictionary()
    tokens, ids = model.tokenize(PROMPTS[:1]), (3, 20)
    start = tokens.width - len("cat that sat")

    def edit(x):
        acts = dictionary.activations(x)[0]
        moved = sum((2 - acts[..., [latent]]) * dictionary.W_dec[latent] for latent in ids)
        here = (torch.arange(x.shape[1]) >= start) & (torch.arange(x.shape[1]) < start + len("cat that"))
        return x + moved * here[:, None]

    handle = hooked(model, dictionary.site, edit)
    expected = model.next_logits(tokens)
    handle.remove()
    sizes = few_at_once()
    with splice(model, dictionary, Clamp(ids, 2.0, positions=At("cat that"))):
        torch.testing.assert_close(model.next_logits(tokens), expected, atol=2e-6, rtol=1e-5)
    assert sizes == [10 * 48, 7 * 48]  # no other part of the prompt was encoded


def test_generation_continues_after_a_prompt_in_parts(few_at_once):
    model, dictionary = tiny_model(), random_dictionary()
    steer = Steer((9, 10), 3.0, decay=0.8)
    with splice(model, dictionary, steer):
        whole = model.continue_ids(PROMPTS, 6)
    few_at_once()
    with splice(model, dictionary, steer):
        assert model.continue_ids(PROMPTS, 6) == whole
    assert model.continue_ids(PROMPTS, 6) != whole


def test_a_source_whose_prompts_end_elsewhere_is_refused_in_parts_too(few_at_once):
    model, dictionary = tiny_model(), random_dictionary()
    left, right = (model.tokenize(PROMPTS, side) for side in ("left", "right"))
    source = record_latents(model, dictionary, right)
    few_at_once()
    with pytest.raises(UserError, match="end in other columns"), splice(model, dictionary, Patch(source, 1)):
        model.next_logits(left)


class Cumulated:
    """Of a user: each latent becomes the sum of its values up to the position."""

    latents, positions, site = (1, 2, 3), "all", None

    def edit(self, acts, _):
        return acts.cumsum(1)


def test_a_class_that_edits_in_its_own_way_does_not_inherit_what_is_read(few_at_once):
    class Running(Clamp):
        def edit(self, acts, seen):
            return acts.cumsum(1)

    class Declared(Running):
        needs = Needs(neighbours=False)

    model, dictionary = tiny_model(), random_dictionary()
    with splice(model, dictionary, Running((1, 2), 1.0)):
        expected = model.next_logits(PROMPTS)
    sizes = few_at_once()
    with splice(model, dictionary, Running((1, 2), 1.0)):
        assert torch.equal(model.next_logits(PROMPTS), expected)
    assert len(sizes) == 1
    with splice(model, dictionary, Declared((1, 2), 1.0)):
        assert not torch.allclose(model.next_logits(PROMPTS), expected, atol=1e-4)


def test_interventions_that_may_read_other_positions_run_whole_or_are_refused(few_at_once, monkeypatch):
    model, dictionary = tiny_model(), random_dictionary()
    tokens = model.tokenize(PROMPTS)
    with splice(model, dictionary, Cumulated()):
        expected = model.next_logits(tokens)
    sizes = few_at_once()
    monkeypatch.setattr(memory, "SMALL", 0)
    with splice(model, dictionary, Cumulated()):
        assert torch.equal(model.next_logits(tokens), expected)
    assert sizes == [tokens.input_ids.numel() * 48]
    monkeypatch.setattr(memory, "free_memory", lambda: 4 * 4 * 48 * tokens.input_ids.numel() - 1)
    with pytest.raises(UserError, match=r"48 latents at 37 positions of 2 prompts.*Needs\(neighbours=False\)"):
        with splice(model, dictionary, Cumulated()):
            model.next_logits(tokens)
    own = Cumulated()
    own.needs = Needs(neighbours=False)
    with splice(model, dictionary, own):
        model.next_logits(tokens)
    record_latents(model, dictionary, tokens)  # half as much
    monkeypatch.setattr(memory, "free_memory", lambda: 2 * 4 * 48 * tokens.input_ids.numel() - 1)
    for record in (lambda: record_latents(model, dictionary, tokens), lambda: recording(model, dictionary, tokens)):
        with pytest.raises(UserError, match="GB at least"):
            record()


def recording(model, dictionary, tokens):
    with splice(model, dictionary, record=True):
        model.next_logits(tokens)


@pytest.mark.parametrize(("family", "attention", "size"), [
    ("llama", "eager", 4 * 4), ("gemma3_text", "sdpa", 5), ("llama", "sdpa", 0),
])  # fmt: skip
def test_masks_and_scores_that_do_not_fit_are_refused(monkeypatch, family, attention, size):
    """Bytes for each pair of tokens: four heads' scores; a mask of windows; nothing in a plainly causal pass."""
    model, dictionary = tiny_model(family), random_dictionary()
    model.hf.set_attn_implementation(attention)
    tokens = model.tokenize(PROMPTS[:1])
    monkeypatch.setattr(memory, "SMALL", 0)
    for free, refused in ((size * tokens.width**2, False), (size * tokens.width**2 - 1, size > 0)):
        monkeypatch.setattr(memory, "free_memory", lambda free=free: free)
        for run in (lambda: model.next_logits(tokens), lambda: model.hf(input_ids=tokens.input_ids)):
            fits = pytest.raises(UserError, match="shorten the prompts") if refused else nullcontext()
            with fits, splice(model, dictionary, Steer(3, 1.0)):
                run()


def test_what_is_free_is_asked_of_the_machine(monkeypatch):
    free = memory.free_memory()
    assert free is None or free > 2**20
    monkeypatch.setattr(memory, "free_memory", lambda: memory.SMALL - 1)
    memory.check_memory(memory.SMALL - 1, "little", "nothing")
    with pytest.raises(UserError, match="take 0.3 GB at least, and 0.3 GB are free: wait"):
        memory.check_memory(memory.SMALL, "these", "wait")
    monkeypatch.setattr(memory, "free_memory", lambda: None)
    memory.check_memory(2**80, "everything", "nothing is known of this machine")
