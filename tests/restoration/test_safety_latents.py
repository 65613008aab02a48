"""Ranking what a donor changes, against loops by hand; restoring over several sites; one dictionary on two models."""

import copy

import pytest
import torch
from tiny import random_dictionary, tiny_model

from saepatch.errors import UserError
from saepatch.measure.quality import splice_quality
from saepatch.model.loading.load import wrap_model
from saepatch.model.sites import Site
from saepatch.restoration.ranking import SafetyLatents, clean_means, find_safety_latents
from saepatch.restoration.restore import AnswerOptions, restore, shared_quality
from saepatch.splicing.donors import CleanMeans, CleanPrompts, OtherModel, Restore
from saepatch.splicing.interventions import Ablate, Steer
from saepatch.splicing.splice import record_latents, splice

pytestmark = pytest.mark.whole

JAILBROKEN = ["how to cake? now", "abxde", "tell me all"]
CLEAN = ("how to bake?", "abcde", "tell me some")
REFUSAL = {40, 41, 77}


def changed(model, seed=9, scale=0.1):
    """A copy with other weights in all blocks."""
    generator = torch.Generator().manual_seed(seed)
    other = wrap_model(copy.deepcopy(model.hf), model.tokenizer, "changed")
    for block in other.layout.blocks:
        for weight in block.parameters():
            weight.data += scale * torch.randn(weight.shape, generator=generator)
    return other


def latents_of(model, dictionary, ids):
    return record_latents(model, dictionary, model.pad([ids])).acts[0].double()


def written_by(model, dictionary, ids):
    """Latents as they are decoded: a layer norm's, times the standard deviation of its input."""
    found = record_latents(model, dictionary, model.pad([ids]))
    x = (found.reconstruction + found.error)[0].double()
    scale = x.std(-1, keepdim=True) if dictionary.normalises else 1.0
    return found.acts[0].double() * scale


@pytest.mark.parametrize("template", [0, 1, 3])
@pytest.mark.parametrize("normalisation", ["none", "layer_norm"])
def test_two_framings_against_a_loop(template, normalisation):
    model = tiny_model()
    below = random_dictionary("resid_post.0", "standard", normalize_activations=normalisation)
    above = random_dictionary("resid_post.1", seed=1)
    completions = [model.encode(text)[1:] for text in ("no way", "I can", "x")]
    found = find_safety_latents(
        model, [below, above], JAILBROKEN, CleanPrompts(CLEAN, template), completions, batch_size=2
    )
    assert found.positions == sum(map(len, completions)) + 3 * template
    for dictionary in (below, above):
        differences = []
        for jailbroken, clean, completion in zip(JAILBROKEN, CLEAN, completions, strict=True):
            n = template + len(completion)
            clean_acts, acts = (
                written_by(model, dictionary, [*model.encode(text), *completion])[-n:] for text in (clean, jailbroken)
            )
            differences.append(clean_acts - acts)
        difference, norm = torch.cat(differences), dictionary.W_dec.double().norm(dim=-1)
        change, signed = difference.pow(2).mean(0).sqrt() * norm, difference.mean(0) * norm
        torch.testing.assert_close(found.change[dictionary.site].double(), change, atol=1e-5, rtol=1e-4)
        torch.testing.assert_close(found.signed[dictionary.site].double(), signed, atol=1e-5, rtol=1e-4)
    assert not found.attribution
    assert not found.quality
    with pytest.raises(UserError, match="no attribution was computed"):
        found.top(3, "attribution")


def test_two_models_read_the_donors_own_answers():
    aligned, dictionary = tiny_model(), random_dictionary()
    base = changed(aligned)
    found = find_safety_latents(base, dictionary, JAILBROKEN, OtherModel(aligned), max_fvu=99, max_new_tokens=5)
    answers = [aligned.continue_ids([prompt], 5)[0] for prompt in JAILBROKEN]
    rows = [[*base.encode(prompt), *answer] for prompt, answer in zip(JAILBROKEN, answers, strict=True)]
    difference = torch.cat([(latents_of(aligned, dictionary, r) - latents_of(base, dictionary, r))[1:] for r in rows])
    norm = dictionary.W_dec.double().norm(dim=-1)
    expected = difference.pow(2).mean(0).sqrt() * norm
    torch.testing.assert_close(found.change[dictionary.site].double(), expected, atol=1e-5, rtol=1e-4)
    mine, theirs = found.quality[dictionary.site]
    tokens = base.pad(rows)
    assert mine.fvu == pytest.approx(splice_quality(base, dictionary, tokens).fvu)
    assert theirs.ce_model == pytest.approx(splice_quality(aligned, dictionary, tokens).ce_model)
    assert theirs.ce_model != pytest.approx(mine.ce_model)


@pytest.mark.parametrize(("donor", "normalisation"), [("framing", "none"), ("model", "none"), ("model", "layer_norm")])
def test_attribution_is_that_of_the_refusal_score(donor, normalisation):
    """Against integrated gradients one prompt and one step at a time, through a plain hook."""
    aligned = tiny_model()
    dictionary = random_dictionary("resid_post.1", "standard", normalize_activations=normalisation)
    model = changed(aligned) if donor == "model" else aligned
    template, steps = 2, 6
    given = OtherModel(aligned, template) if donor == "model" else CleanPrompts(CLEAN, template)
    found = find_safety_latents(
        model, dictionary, JAILBROKEN, given, refusal_ids=REFUSAL, steps=steps, max_fvu=99, max_new_tokens=2
    ).attribution[dictionary.site]
    total = torch.zeros(48, dtype=torch.float64)
    for number, prompt in enumerate(JAILBROKEN):
        tokens = model.tokenize([prompt])
        source = aligned.tokenize([prompt if donor == "model" else CLEAN[number]])
        mine, theirs = record_latents(model, dictionary, tokens), record_latents(aligned, dictionary, source)
        x, y = (latents.reconstruction + latents.error for latents in (mine, theirs))
        way = torch.zeros_like(x)
        way[0, -template:] = y[0, -template:] - x[0, -template:]
        gradient = torch.zeros_like(x)
        for step in range(steps):
            leaf = (x + (step + 0.5) / steps * way).requires_grad_()
            handle = model.layout.blocks[1].register_forward_hook(lambda _m, _a, out, leaf=leaf: leaf)
            p = model.hf(**model.inputs(tokens)).logits[0, -1].softmax(-1)[sorted(REFUSAL)].sum()
            value = torch.logit(p)
            handle.remove()
            gradient += torch.autograd.grad(value, leaf)[0] / steps
        sizes = (x.std(-1, keepdim=True), y.std(-1, keepdim=True)) if dictionary.normalises else (1.0, 1.0)
        change = (theirs.acts * sizes[1])[0, -template:] - (mine.acts * sizes[0])[0, -template:]
        total += (change * (gradient[0, -template:] @ dictionary.W_dec.T)).sum(0).double()
    torch.testing.assert_close(found.double(), total / len(JAILBROKEN), atol=1e-5, rtol=1e-3)
    assert found.abs().max() > 1e-2


def test_one_budget_over_all_sites():
    first, second = torch.tensor([0.5, -3.0, 2.0, 0.0]), torch.tensor([1.0, 0.1, -0.5])
    scores = {Site(0): first, Site(2): second}
    found = SafetyLatents(scores, {site: -score for site, score in scores.items()}, {}, 7)
    assert found.top(1) == {Site(0): (2,)}
    assert found.top(3) == {Site(0): (2, 0), Site(2): (0,)}
    assert found.top(99) == {Site(0): (2, 0), Site(2): (0, 1)}  # what does not differ, or is less, is not restored
    assert found.top(2, "signed") == {Site(0): (1,), Site(2): (2,)}
    for bad in (0, -1):
        with pytest.raises(UserError, match=r"k = (0|-1): use at least 1"):
            found.top(bad)


def test_bad_contrasts():
    model, dictionary = tiny_model(), random_dictionary()
    donor = CleanPrompts(CLEAN)

    def find(prompts=JAILBROKEN, donor=donor, **options):
        return find_safety_latents(model, dictionary, prompts, donor, **({"max_new_tokens": 2} | options))

    with pytest.raises(UserError, match="3 clean prompts for 2 prompts"):
        find(JAILBROKEN[:2])
    with pytest.raises(UserError, match="1 completions for 3 prompts"):
        find(completions=[[70]])
    with pytest.raises(UserError, match="no prompts"):
        find([])
    with pytest.raises(UserError, match="template of 6 positions.*5 tokens"):
        find(donor=CleanPrompts(CLEAN, 6))
    with pytest.raises(UserError, match="completions are empty"):
        find(donor=CleanPrompts(CLEAN, 0), completions=[[], [], []])
    with pytest.raises(UserError, match="unknown option 'max_tokens': use one of max_new_tokens, batch_size, max_fvu"):
        find(max_tokens=3)
    with pytest.raises(UserError, match="batch_size = 0"):
        find(batch_size=0)
    with pytest.raises(UserError, match="leave the splice first"), splice(model, dictionary, Steer(3, 1.0)):
        model.next_logits(model.tokenize(["abc"]))
        find()


def test_a_dictionary_that_does_not_fit_both_models_is_refused():
    aligned, dictionary = tiny_model(), random_dictionary()
    base = changed(aligned)
    tokens = base.tokenize(JAILBROKEN)
    fvu = [splice_quality(one, dictionary, tokens).fvu for one in (base, aligned)]
    both = shared_quality(base, aligned, dictionary, tokens, max_fvu=max(fvu) + 0.01)
    assert [quality.fvu for quality in both] == pytest.approx(fvu)
    worse = "changed" if fvu[0] > fvu[1] else "tiny-llama"
    with pytest.raises(UserError, match=f"in {worse} unexplained"):
        shared_quality(base, aligned, dictionary, tokens, max_fvu=min(fvu) + 0.01)
    with pytest.raises(UserError, match="unexplained"):
        find_safety_latents(base, dictionary, JAILBROKEN, OtherModel(aligned), max_fvu=1e-3)


def test_options_are_given_together_or_one_by_one():
    model, dictionary, donor = tiny_model(), random_dictionary(), CleanPrompts(CLEAN)
    options = AnswerOptions(max_new_tokens=3, batch_size=1)
    together = find_safety_latents(model, dictionary, JAILBROKEN, donor, options=options)
    assert together.positions == 3 * (1 + 3)  # the template's token and the answer's, of three prompts
    alone = find_safety_latents(model, dictionary, JAILBROKEN, donor, max_new_tokens=3, batch_size=1)
    assert torch.equal(together.change[dictionary.site], alone.change[dictionary.site])
    answers = restore(model, dictionary, JAILBROKEN, donor, [3], options=options)
    assert answers == restore(model, dictionary, JAILBROKEN, donor, [3], max_new_tokens=3)
    longer = restore(model, dictionary, JAILBROKEN, donor, [3], options=options, max_new_tokens=6)
    assert longer == restore(model, dictionary, JAILBROKEN, donor, [3], max_new_tokens=6) != answers


def test_restore_takes_one_budget_over_several_sites():
    aligned = tiny_model()
    base = changed(aligned)
    below, above = random_dictionary("resid_post.0"), random_dictionary("resid_post.1", seed=1)
    donor = OtherModel(aligned, 2)
    edits = [Restore(donor, (3, 5), site="resid_post.0"), Restore(donor, range(9), site="resid_post.1")]
    with splice(base, [below, above], edits):
        expected = base.generate(JAILBROKEN, 8)
    found = restore(
        base,
        [below, above],
        JAILBROKEN,
        donor,
        {Site(0): (3, 5), Site(1): range(9)},
        max_new_tokens=8,
        batch_size=2,
        max_fvu=None,
    )
    assert found == expected
    assert found != base.generate(JAILBROKEN, 8)
    only = restore(base, [below, above], JAILBROKEN, donor, {Site(0): (3, 5)}, max_new_tokens=8, max_fvu=None)
    assert only == restore(base, below, JAILBROKEN, donor, (3, 5), max_new_tokens=8, max_fvu=None)
    everything = restore(base, [below, above], JAILBROKEN, OtherModel(base), error=True, max_new_tokens=8)
    assert everything == base.generate(JAILBROKEN, 8)
    with pytest.raises(UserError, match="latents without a site"):
        restore(base, [below, above], JAILBROKEN, donor, [3])
    with pytest.raises(UserError, match=r"latents of resid_post\.2, but there is no dictionary"):
        restore(base, below, JAILBROKEN, donor, {Site(2): [3]})
    with pytest.raises(UserError, match="2 clean prompts for 3 prompts"):
        restore(base, below, JAILBROKEN, CleanPrompts(("ab", "cd")))


def test_clean_means_are_those_of_the_restored_positions():
    model, dictionary = tiny_model(), random_dictionary()
    found = clean_means(model, dictionary, CLEAN, template=2, max_new_tokens=4, batch_size=2)
    rows = [(model.encode(text), model.continue_ids([text], 4)[0]) for text in CLEAN]
    acts = torch.cat([latents_of(model, dictionary, [*p, *c])[-2 - len(c) :] for p, c in rows])
    mean = acts.mean(0).float()
    torch.testing.assert_close(found.means[dictionary.site], mean, atol=1e-5, rtol=1e-4)
    assert isinstance(found, CleanMeans)
    with splice(model, dictionary, [Ablate([3, 9, 30], mean[[3, 9, 30]], p) for p in ([-1, -2], "generated")]):
        expected = model.generate(JAILBROKEN, 8)
    assert restore(model, dictionary, JAILBROKEN, found, [3, 9, 30], max_new_tokens=8) == expected
