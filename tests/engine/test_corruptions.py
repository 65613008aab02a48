"""Corrupted runs against plain hooked forwards written out by hand, for every component and both directions."""

import hashlib

import numpy as np
import pytest
import torch
from tiny import random_dictionary, tiny_model

from saepatch.data.batches import batch_pairs, resampled
from saepatch.data.pairs import PromptPair
from saepatch.engine.components import Directions, Edit, ErrorTerm, Heads, LatentUnits, Stream
from saepatch.engine.corruptions import Corruption, GaussianNoise, Mean, Zero
from saepatch.engine.metrics import logit_difference
from saepatch.engine.passes.kept_run import KeptRun
from saepatch.errors import UserError
from saepatch.measure.patching import patch_components, patch_edits, patch_heads, patch_latents, patch_streams
from saepatch.model.hooks import SpliceError, edit_embeddings
from saepatch.model.positions import At
from saepatch.model.sites import READ_AT_INPUT, Site
from saepatch.splicing.splice import splice

pytestmark = pytest.mark.whole

PAIRS = [
    PromptPair("the cat sat", "the dog sat", "x", "y", "a"),
    PromptPair("a cat ran off", "a dog ran off", "p", "q", "b"),
    PromptPair("one cat sat", "one dog sat", "r", "s", "c"),
]
CAT = At(" cat")
SPAN = [slice(5, 8), slice(3, 6), slice(5, 8)]  # where each prompt says "cat", after its BOS


def same(text):
    return PromptPair(text, text, "x", "y")


def forward(model, pair, site, change=None, noise=None, span=None):
    """One clean prompt through the bare model: what the site held, and the metric; changes added by bare hooks."""
    batch, held, handles = batch_pairs(model, [pair]), [], []
    module = model.layout.module(site)

    def see(x):
        held.append(x)
        return x if change is None else x + change

    def on_input(_module, args, kwargs):
        if args:
            return (see(args[0]), *args[1:]), kwargs
        return args, kwargs | {"hidden_states": see(kwargs["hidden_states"])}

    def on_output(_module, _args, output):
        return (see(output[0]), *output[1:]) if isinstance(output, tuple) else see(output)

    def disturb(_module, _args, output):
        out = output.clone()
        out[0, span] += noise
        return out

    if noise is not None:
        handles.append(model.hf.get_input_embeddings().register_forward_hook(disturb))
    if site.stream in READ_AT_INPUT:
        handles.append(module.register_forward_pre_hook(on_input, with_kwargs=True))
    else:
        handles.append(module.register_forward_hook(on_output))
    try:
        logits = model.hf(input_ids=batch.clean.input_ids).logits[:, -1]
    finally:
        for handle in handles:
            handle.remove()
    return held[0], float(logit_difference(logits, batch))


def draw(model, pair, sample, seed=0, sigma=3.0, tokens=3):
    weight = model.hf.get_input_embeddings().weight
    spread = float(weight.double().std(correction=0)) * float(
        getattr(model.hf.get_input_embeddings(), "embed_scale", 1)
    )
    text = int(hashlib.sha256(pair.clean.encode()).hexdigest()[:16], 16)
    normal = np.random.default_rng((seed, text, sample)).standard_normal((tokens, weight.shape[1]))
    return torch.from_numpy(sigma * spread * normal).float()


@pytest.mark.parametrize(
    ("family", "site", "direction"),
    [
        *(("llama", f"{stream}.0", "denoise") for stream in ("resid_pre", "resid_post", "attn_out", "mlp_out", "z")),
        ("llama", "resid_post.2", "noise"),
        ("gpt2", "resid_pre.1", "noise"),
        ("gpt2", "z.1", "denoise"),
        ("gemma3_text", "resid_post.0", "denoise"),  # scales its embeddings
        ("gemma3_text", "resid_post.0", "noise"),
        ("phi", "attn_out.0", "denoise"),  # MLP beside attention: both read the noised stream
        ("phi", "attn_out.0", "noise"),
        ("opt", "resid_post.1", "denoise"),
    ],
)
def test_noise_is_one_plain_forward_a_sample(family, site, direction):
    model, dictionary = tiny_model(family), random_dictionary(site)
    groups = [(3,), (1, 2, 7), tuple(range(48))]
    noise = GaussianNoise(CAT, samples=3, seed=5)
    effects = patch_latents(
        model, dictionary, PAIRS, groups, direction=direction, corruption=noise, controls=0, batch_size=2
    )
    for row, (pair, span) in enumerate(zip(PAIRS, SPAN, strict=True)):
        clean, own = forward(model, pair, dictionary.site)
        runs = [forward(model, pair, dictionary.site, None, draw(model, pair, s, 5), span) for s in range(3)]
        assert effects.clean[row] == pytest.approx(own, abs=2e-5)
        assert effects.corrupted[row] == pytest.approx(np.mean([value for _, value in runs]), abs=5e-5)
        for column, group in enumerate(groups):
            found = []
            for sample, (noised, _) in enumerate(runs):
                acts = [dictionary.encode(x).acts for x in (noised, clean)]
                change = (acts[1] - acts[0])[..., list(group)] @ dictionary.W_dec[list(group)]
                change[:, 0] = 0  # BOS
                if direction == "denoise":
                    value = forward(model, pair, dictionary.site, change, draw(model, pair, sample, 5), span)[1]
                else:
                    value = forward(model, pair, dictionary.site, -change)[1]
                found.append(value)
            assert effects.patched[row, column] == pytest.approx(np.mean(found), abs=5e-5), (pair.example, group)


def test_noise_is_the_same_whatever_the_batch_the_list_and_the_name_of_the_subject():
    model, dictionary = tiny_model(), random_dictionary()
    noise, some = GaussianNoise(CAT, samples=2), [(latent,) for latent in range(0, 48, 4)]
    whole = patch_latents(model, dictionary, PAIRS, some, corruption=noise, controls=0)
    for batch_size in (1, 2, 100):
        again = patch_latents(model, dictionary, PAIRS, some, corruption=noise, controls=0, batch_size=batch_size)
        np.testing.assert_allclose(again.corrupted, whole.corrupted, atol=2e-5)
        np.testing.assert_allclose(again.patched, whole.patched, atol=2e-5)
    last = patch_latents(model, dictionary, PAIRS[:0:-1], some, corruption=noise, controls=0)
    np.testing.assert_allclose(last.patched, whole.patched[:0:-1], atol=2e-5)
    alike = [PAIRS[0], PAIRS[2]]
    by_text, by_span, by_index = (
        patch_latents(model, dictionary, alike, [(1, 2)], corruption=GaussianNoise(subject), controls=0).corrupted
        for subject in (CAT, slice(5, 8), (5, 6, 7))
    )
    assert np.array_equal(by_text, by_span)
    assert np.array_equal(by_text, by_index)
    one = Edit(dictionary.site, (1, 2))
    listed = patch_edits(model, dictionary, PAIRS, [(2, one), (0, one)], corruption=noise)
    group = patch_latents(model, dictionary, PAIRS, [(1, 2)], corruption=GaussianNoise(CAT, samples=2), controls=0)
    np.testing.assert_allclose(listed, group.patched[[2, 0], 0], atol=2e-5)


def test_noise_has_its_size_and_is_at_the_subject_only():
    model = tiny_model("gpt2")
    model.hf.get_input_embeddings().weight.data += 1  # the unit is their spread about their mean
    batch = batch_pairs(model, [PAIRS[0]])
    batch = batch.rows([0] * 400)
    site = Site(0, "resid_pre")
    clean = KeptRun(model, batch.clean, [site])
    noised = GaussianNoise(CAT, sigma=2.0, samples=400).run(model, batch, [Stream(site)], clean, True)
    change = noised.values[site] - clean.values[site]
    spread = model.hf.get_input_embeddings().weight.std()
    assert float(change[:, SPAN[0]].std() / spread) == pytest.approx(2.0, rel=0.02)
    change[:, SPAN[0]] = 0
    assert not change.any()
    others = [
        patch_streams(model, PAIRS, corruption=GaussianNoise(CAT, **options)).corrupted[0]
        for options in ({}, {"seed": 1}, {"samples": 9}, {"sigma": 1.0})
    ]
    assert len(set(others)) == 4


def test_causal_tracing_over_layers_and_positions():
    """Restoring the embeddings' own stream at the subject undoes the noise; before the subject there is nothing."""
    model = tiny_model()
    pairs = [PAIRS[0], PAIRS[2]]
    effects = patch_streams(model, pairs, stream="resid_pre", corruption=GaussianNoise(CAT, samples=2))
    assert min(edit.position for edit in effects.edits) == 5
    together = patch_components(
        model, Stream(Site(0, "resid_pre")), pairs, positions=CAT, corruption=GaussianNoise(CAT, samples=2)
    )
    np.testing.assert_allclose(together.patched[:, 0], effects.clean, atol=2e-5)


@pytest.mark.parametrize(
    ("make", "complaint"),
    [
        (
            lambda: GaussianNoise(At(" cow")),
            "pair b: the clean prompt 'a cat ran off': .*' cow' as whole tokens 0 times",
        ),
        (lambda: GaussianNoise(40), "pair b: .*position 40 is out of range"),
        (lambda: GaussianNoise("generated"), "'a cat ran off': positions 'generated' select no token"),
        (lambda: GaussianNoise(CAT, sigma=0.0), "sigma = 0.0: noise needs"),
        (lambda: GaussianNoise(CAT, samples=0), "samples = 0: use at least 1"),
        (lambda: GaussianNoise(CAT, seed=-1), "seed = -1: use 0 or more"),
        (lambda: Zero(positions=At(" cow")), "pair b: .*' cow' as whole tokens 0 times"),
        (lambda: Mean(torch.zeros(7)), r"7 means, but 'latent' at resid_post.1 has 48 values"),
        (
            lambda: Mean(torch.zeros(7, 48)),
            "pair b: the clean prompt 'a cat ran off' has 14 tokens, but the means are for 7 positions",
        ),
        (lambda: Mean(torch.zeros(48), of=(Site(0), "latent")), "means of 'latent' at resid_post.0, but 'latent' at"),
    ],
)
def test_bad_corruptions(make, complaint):
    with pytest.raises(UserError, match=complaint):
        patch_latents(tiny_model(), random_dictionary(), PAIRS, [(1,)], corruption=make(), controls=0)


def test_embeddings_are_edited_inside_the_context_only():
    model = tiny_model()
    tokens = model.tokenize(["abc"])
    plain = model.logits(tokens)
    with edit_embeddings(model.hf, lambda x: x * 2):
        assert not torch.equal(model.logits(tokens), plain)
    assert torch.equal(model.logits(tokens), plain)
    with pytest.raises(SpliceError, match="no token was embedded"):
        with edit_embeddings(model.hf, lambda x: x):
            pass
    with pytest.raises(ValueError, match="mine"):
        with edit_embeddings(model.hf, lambda x: x * 2):
            raise ValueError("mine")
    assert torch.equal(model.logits(tokens), plain)
    with pytest.raises(UserError, match="does not name its token embeddings"):
        with edit_embeddings(torch.nn.Linear(2, 2), lambda x: x):
            pass


def parts(component, x):
    """What each unit of a component writes into a site's value, by its definition: [units, batch, pos, width]."""
    if isinstance(component, LatentUnits):
        latents = component.dictionary.encode(x)
        scale = 1 if latents.scale is None else latents.scale
        return torch.einsum("bpu,uw->ubpw", latents.acts, component.dictionary.rows) * scale
    if isinstance(component, ErrorTerm):
        return component.dictionary.encode(x).error[None]
    if isinstance(component, Directions):
        return torch.einsum("bpw,uw,uv->ubpv", x, component.rows, component.rows)
    if isinstance(component, Heads):
        size = x.shape[-1] // component.units
        head = torch.arange(x.shape[-1]) // size
        return torch.stack([x * (head == unit) for unit in range(component.units)])
    return x[None]


ROWS = torch.linalg.qr(torch.randn(16, 5, generator=torch.Generator().manual_seed(1)))[0].T.contiguous()
COMPONENTS = {
    "topk": lambda: LatentUnits(random_dictionary("resid_post.1")),
    "standard": lambda: LatentUnits(random_dictionary("mlp_out.0", "standard")),
    "scaled": lambda: LatentUnits(random_dictionary("resid_pre.2", "jumprelu", normalize_activations="layer_norm")),
    "error": lambda: ErrorTerm(random_dictionary("resid_post.0")),
    "embeddings": lambda: Stream(Site(0, "resid_pre")),
    "attention": lambda: Stream(Site(1, "attn_out")),
    "heads": lambda: Heads(0, 4),
    "directions": lambda: Directions(Site(1), ROWS, "five"),
}


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("name", COMPONENTS)
def test_zero_ablation_of_each_unit_and_of_all(name, direction):
    """Noising takes one unit's part out of the clean run; denoising puts it back where all were taken out."""
    model, component = tiny_model(), COMPONENTS[name]()
    units = sorted({0, component.units // 2, component.units - 1})
    edits = [Edit(component.site, (unit,), kind=component.kind) for unit in units]
    edits.append(Edit(component.site, tuple(range(component.units)), kind=component.kind))
    effects = patch_components(model, component, PAIRS, edits, direction=direction, corruption=Zero(), batch_size=2)
    for row, pair in enumerate(PAIRS):
        x, own = forward(model, pair, component.site)
        part = parts(component, x)
        part[:, :, 0] = 0  # BOS
        every = part.sum(0)
        assert effects.clean[row] == pytest.approx(own, abs=2e-5)
        assert effects.corrupted[row] == pytest.approx(forward(model, pair, component.site, -every)[1], abs=5e-5)
        for column, edit in enumerate(edits):
            mine = part[list(edit.units)].sum(0)
            change = mine - every if direction == "denoise" else -mine
            expected = forward(model, pair, component.site, change)[1]
            assert effects.patched[row, column] == pytest.approx(expected, abs=5e-5), (pair.example, edit.units)
    np.testing.assert_allclose(effects.normalised[:, -1], 1.0, atol=1e-3)


def test_ablated_latents_are_those_meant_not_those_encoded_again():
    """TopK finds other latents in what is left: a sweep that read the ablated run again would patch those."""
    model, dictionary = tiny_model(), random_dictionary()
    batch = batch_pairs(model, PAIRS[:1])
    clean = KeptRun(model, batch.clean, [dictionary.site])
    ablated = Zero().run(model, batch, [LatentUnits(dictionary)], clean, True)
    assert dictionary.encode(ablated.values[dictionary.site]).acts[:, 1:].any()
    active = set(dictionary.encode(clean.values[dictionary.site]).acts[0, 1:].any(0).nonzero().flatten().tolist())
    for direction in ("denoise", "noise"):
        effects = patch_latents(model, dictionary, PAIRS[:1], direction=direction, corruption=Zero())
        assert set(effects.ran[0].nonzero()[0].tolist()) == active
        assert "".join(effects.tokens[0][1:]) == PAIRS[0].clean  # whatever prompt the pair has besides


def test_ablation_at_some_positions():
    model, dictionary = tiny_model(), random_dictionary()
    effects = patch_latents(
        model, dictionary, PAIRS, [tuple(range(48))], direction="noise", corruption=Zero(positions=CAT), controls=0
    )
    for row, (pair, span) in enumerate(zip(PAIRS, SPAN, strict=True)):
        x, _ = forward(model, pair, dictionary.site)
        change = torch.zeros_like(x)
        change[:, span] = -parts(LatentUnits(dictionary), x).sum(0)[:, span]
        assert effects.corrupted[row] == pytest.approx(forward(model, pair, dictionary.site, change)[1], abs=5e-5)
    np.testing.assert_allclose(effects.normalised, 1.0, atol=1e-3)
    last = patch_latents(
        model,
        dictionary,
        PAIRS,
        [(1,)],
        positions="last",
        direction="noise",
        corruption=Zero(positions=CAT),
        controls=0,
    )
    assert not last.ran.any()  # what is patched is not what was ablated


REFERENCE = ["the cow ran", "one pig sat", "abcdefghijk"]


@pytest.mark.parametrize(("by_position", "direction"), [(True, "denoise"), (False, "noise")])
@pytest.mark.parametrize("name", COMPONENTS)
def test_mean_ablation(name, by_position, direction):
    """As zero ablation, with the mean over reference prompts in each unit's place."""
    model, component = tiny_model(), COMPONENTS[name]()
    pairs = [PAIRS[0], PAIRS[2]] if by_position else PAIRS
    reference = model.tokenize(REFERENCE if by_position else [*REFERENCE, "of other length"])
    mean = Mean.over(model, component, reference, by_position, batch_size=2)
    values = torch.cat([component.read(forward(model, same(t), component.site)[0]) for t in REFERENCE])
    if by_position:
        torch.testing.assert_close(mean.values, values.mean(0), atol=1e-5, rtol=1e-5)
    else:
        more = component.read(forward(model, same("of other length"), component.site)[0])
        together = torch.cat([values[:, 1:].flatten(0, 1), more[0, 1:]])
        torch.testing.assert_close(mean.values, together.mean(0), atol=1e-5, rtol=1e-5)
    units = sorted({0, component.units // 2, component.units - 1})
    edits = [Edit(component.site, (unit,), kind=component.kind) for unit in units]
    edits.append(Edit(component.site, tuple(range(component.units)), kind=component.kind))
    effects = patch_components(model, component, pairs, edits, direction=direction, corruption=mean)
    for row, pair in enumerate(pairs):
        x, _ = forward(model, pair, component.site)
        part = mean_parts(component, x, mean.values) - parts(component, x)
        part[:, :, 0] = 0
        every = part.sum(0)
        assert effects.corrupted[row] == pytest.approx(forward(model, pair, component.site, every)[1], abs=5e-5)
        for column, edit in enumerate(edits):
            mine = part[list(edit.units)].sum(0)
            change = every - mine if direction == "denoise" else mine
            expected = forward(model, pair, component.site, change)[1]
            assert effects.patched[row, column] == pytest.approx(expected, abs=5e-5), (pair.example, edit.units)
    np.testing.assert_allclose(effects.normalised[:, -1], 1.0, atol=2e-3)


def mean_parts(component, x, mean):
    """What each unit would write into this run if it held its mean."""
    if isinstance(component, LatentUnits):
        scale = component.dictionary.encode(x).scale  # the run's own
        mean = mean.expand(*x.shape[:2], -1)
        return torch.einsum("bpu,uw->ubpw", mean, component.dictionary.rows) * (1 if scale is None else scale)
    if isinstance(component, Directions):
        return torch.einsum("bpu,uw->ubpw", mean.expand(*x.shape[:2], -1), component.rows)
    if isinstance(component, Heads):
        return parts(component, mean.expand_as(x))
    return mean.expand_as(x)[None]


def test_means_need_prompts_that_line_up():
    model, dictionary = tiny_model(), random_dictionary()
    with pytest.raises(UserError, match="reference prompts have 4 to 6 tokens"):
        Mean.over(model, dictionary, model.tokenize(["abc", "abcde"]))
    with splice(model, dictionary):
        model.logits(model.tokenize(["abc"]))
        with pytest.raises(UserError, match="inside a splice"):
            Mean.over(model, dictionary, model.tokenize(["abc"]))


def test_what_is_ablated_is_one_component():
    model = tiny_model()
    with pytest.raises(UserError, match="patch one component at a time"):
        patch_heads(model, PAIRS, corruption=Zero())
    assert "tensor" not in repr(Mean(torch.zeros(3)))
    for corruption in (Zero(), Mean(torch.zeros(3)), GaussianNoise(CAT)):
        assert isinstance(corruption, Corruption)


def test_resampled_pairs_take_another_prompt_of_their_length_with_another_answer():
    model = tiny_model()
    pairs = [PromptPair(f"{a}{b}c", "???", a, "?", f"{a}{b}") for a in "pqr" for b in "1234"]
    pairs += [PromptPair("longer one", "?", "x", "?", "l1"), PromptPair("longer two", "?", "y", "?", "l2")]
    drawn = resampled(model, pairs, seed=3)
    by_prompt = {pair.clean: pair for pair in pairs}
    for pair, new in zip(pairs, drawn, strict=True):
        other = by_prompt[new.corrupted]
        assert (new.clean, new.answer, new.example) == (pair.clean, pair.answer, pair.example)
        assert new.counter == other.answer != pair.answer
        assert len(new.corrupted) == len(new.clean)
    assert drawn == resampled(model, pairs, seed=3) != resampled(model, pairs, seed=4)
    two = [PromptPair("ab", "?", "x", "?"), PromptPair("cd", "?", "y", "?")]
    assert [pair.corrupted for pair in resampled(model, two)] == ["cd", "ab"]
    assert patch_latents(model, random_dictionary(), drawn, [(1,)], controls=0).patched.shape == (14, 1)
    with pytest.raises(UserError, match="pair l1: no other clean prompt has 11 tokens and another answer than 'x'"):
        resampled(model, pairs[:-1])
    with pytest.raises(UserError, match="pair 0: no other"):
        resampled(model, [PromptPair("ab", "?", "x", "?"), PromptPair("ab", "?", "y", "?")])  # one prompt, two answers
