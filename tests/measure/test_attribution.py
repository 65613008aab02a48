"""Attribution against what it approximates, exact patches, and against gradients taken by bare passes."""

from itertools import product

import numpy as np
import pytest
import torch
from planted import cancelling_model, confident_model, linear_model, split_dictionary
from tiny import FAMILIES, random_dictionary, tiny_model

from saepatch.data.batches import batch_pairs
from saepatch.data.pairs import PromptPair
from saepatch.engine.components import ErrorTerm, Stream
from saepatch.engine.corruptions import GaussianNoise, Zero
from saepatch.engine.metrics import answer_rank, kl_divergence, logit_difference, probability
from saepatch.errors import UserError
from saepatch.measure.attribution import FirstOrder, GradDrop, IntegratedGradients, attribute, integrated_gradients
from saepatch.measure.patching import patch_components, patch_latents
from saepatch.measure.results.screen import ERROR
from saepatch.model.hooks import edit_sites
from saepatch.splicing.interventions import Patch
from saepatch.splicing.splice import record_latents, splice

pytestmark = pytest.mark.whole

PAIRS = [
    PromptPair("the cat sat", "the dog sat", "x", "y"),
    PromptPair("one big tree", "one red tree", "p", "q"),
    PromptPair("abc", "abd", "r", "s"),
]


def site_effect(model, dictionary, pair, positions="all"):
    """m(site patched) − m(corrupted): every latent and the error term."""
    batch = batch_pairs(model, [pair])
    with splice(model, dictionary, Patch(record_latents(model, dictionary, batch.clean), None, positions, error=True)):
        patched = logit_difference(model.next_logits(batch.corrupted), batch)
    return float(patched - logit_difference(model.next_logits(batch.corrupted), batch))


@pytest.mark.parametrize(
    ("site", "positions"),
    [pytest.param("resid_pre.1", "all", marks=pytest.mark.slow), ("mlp_out.1", "last")],
)
def test_completeness(site, positions):
    model, dictionary = tiny_model(), random_dictionary(site)
    latents, errors = integrated_gradients(model, dictionary, PAIRS, positions, steps=60)
    for row, pair in enumerate(PAIRS):
        effect = site_effect(model, dictionary, pair, positions)
        assert float(latents[row].sum() + errors[row]) == pytest.approx(effect, abs=0.02 * max(1.0, abs(effect)))


@pytest.mark.slow
def test_more_steps_come_closer():
    model, dictionary = tiny_model(), random_dictionary("resid_post.0")
    truth = np.array([site_effect(model, dictionary, pair) for pair in PAIRS])
    gaps = []
    for steps in (1, 10, 100):
        latents, errors = integrated_gradients(model, dictionary, PAIRS, steps=steps)
        gaps.append(np.abs((latents.sum(1) + errors).numpy() - truth).max())
    assert gaps[2] < gaps[1] < gaps[0]


@pytest.mark.parametrize("normalisation", ["none", "layer_norm"])
def test_one_small_change_is_the_exact_effect(normalisation):
    """Where the way is short the metric is linear along it, and each latent's share is its own exact effect."""
    model = tiny_model()
    dictionary = random_dictionary(architecture="standard", normalize_activations=normalisation)
    pairs = [PromptPair("abcdef", "abcdeg", "x", "y")]
    with torch.no_grad():  # two letters that are nearly the same to the model
        table = model.hf.get_input_embeddings().weight
        g, f = model.encode("g")[1], model.encode("f")[1]
        table[f] = table[g] + 1e-2 * torch.randn(16, generator=torch.Generator().manual_seed(0))
    latents, _ = integrated_gradients(model, dictionary, pairs)
    exact = patch_latents(model, dictionary, pairs)
    assert np.abs(exact.change).max() > 1e-3
    np.testing.assert_allclose(latents.numpy(), exact.change, atol=0.05 * np.abs(exact.change).max())


def test_latents_that_do_not_differ_get_nothing_and_batches_do_not_matter():
    model, dictionary = tiny_model(), random_dictionary()
    latents, errors = integrated_gradients(model, dictionary, PAIRS)
    ran = patch_latents(model, dictionary, PAIRS).ran
    assert (latents.numpy()[~ran] == 0).all()
    alone = [integrated_gradients(model, dictionary, [pair], batch_size=1) for pair in PAIRS]
    torch.testing.assert_close(torch.cat([a for a, _ in alone]), latents, atol=1e-5, rtol=1e-4)
    torch.testing.assert_close(torch.cat([e for _, e in alone]), errors, atol=1e-5, rtol=1e-4)
    with pytest.raises(UserError, match="steps = 0"):
        integrated_gradients(model, dictionary, PAIRS, steps=0)


def all_exact(model, dictionaries, pairs, **options):
    """Attribution with every node run exactly, too: (attribution, estimates, exact effects)."""
    found = attribute(model, dictionaries, pairs, verify=10**6, **options)
    assert found.verified is not None
    assert len(found.verified.index) == len(found)
    return found, found.verified.estimated, found.verified.exact


def scores(found):
    """Scores by (pair, site, kind, unit, position)."""
    edits = [found.edit(i) for i in range(len(found))]
    return {
        (int(pair), edit.site, edit.kind, edit.units, edit.position): float(score)
        for pair, edit, score in zip(found.pair, edits, found.score, strict=True)
    }


def same_scores(a, b, atol=1e-5):
    a, b = scores(a), scores(b)
    assert a.keys() == b.keys()
    for key, value in a.items():
        assert value == pytest.approx(b[key], rel=1e-4, abs=atol), key


def plain_gradient(model, dictionary, pair, direction, dropped=None):
    """Base gradient at a block's output by a bare forward and backward, with one block's contribution dropped."""
    batch = batch_pairs(model, [pair])
    base, source = (batch.corrupted, batch.clean) if direction == "denoise" else (batch.clean, batch.corrupted)
    block, held, handles = model.layout.blocks[dictionary.site.layer], [], []

    def leaf(_module, _args, output):
        x = output[0] if isinstance(output, tuple) else output
        held.append(x.detach().requires_grad_())
        return (held[0], *output[1:]) if isinstance(output, tuple) else held[0]

    def past(_module, args, kwargs, output):
        entered = args[0] if args else kwargs["hidden_states"]
        x = output[0] if isinstance(output, tuple) else output
        new = entered + (x - entered).detach()
        return (new, *output[1:]) if isinstance(output, tuple) else new

    handles.append(block.register_forward_hook(leaf))
    if dropped is not None:
        handles.append(model.layout.blocks[dropped].register_forward_hook(past, with_kwargs=True))
    try:
        logits = model.hf(input_ids=base.input_ids).logits[:, -1]
    finally:
        for handle in handles:
            handle.remove()
    gradient = torch.autograd.grad(logit_difference(logits, batch).sum(), held[0])[0][0].float().numpy()
    runs = [record_latents(model, dictionary, tokens) for tokens in (base, source)]
    return gradient, *((b - a)[0].numpy() for a, b in ((getattr(r, n) for r in runs) for n in ("acts", "error")))


def expected_scores(model, dictionary, direction):
    """By first order and by GradDrop over the two later blocks, from bare passes; zeros left out."""
    sign, rows = 1 if direction == "denoise" else -1, dictionary.rows.numpy()
    plain, sizes = {}, {}
    for number, pair in enumerate(PAIRS):
        for dropped in (None, 1, 2):
            g, acts, error = plain_gradient(model, dictionary, pair, direction, dropped)
            by_latent, of_error = acts * (g @ rows.T), (error * g).sum(-1, keepdims=True)
            for kind, values in (("latent", by_latent), ("error", of_error)):
                for position, unit in zip(*np.nonzero(values), strict=True):
                    key = (number, dictionary.site, kind, (int(unit),), int(position))
                    if dropped is None:
                        plain[key] = sign * values[position, unit]
                    else:
                        sizes[key] = sizes.get(key, 0) + abs(values[position, unit]) / 2
    return {"first order": plain, "graddrop": sizes}


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("family", FAMILIES)
def test_first_order_and_graddrop_are_what_a_bare_backward_pass_gives(family, direction):
    model, dictionary = tiny_model(family), random_dictionary("resid_post.0")
    wanted = expected_scores(model, dictionary, direction)
    for method in (FirstOrder(), GradDrop()):
        found = attribute(model, dictionary, PAIRS, direction=direction, method=method)
        assert found.method == method.name
        got = scores(found)
        assert max(abs(value) for value in got.values()) > 1e-3
        for key in got.keys() | wanted[method.name].keys():
            expected = wanted[method.name].get(key, 0.0)
            assert got.get(key, 0.0) == pytest.approx(expected, rel=1e-3, abs=2e-5), key


def test_a_bfloat16_model_with_a_float32_dictionary():
    model, dictionary = tiny_model(), random_dictionary("resid_post.0")
    model.hf.to(torch.bfloat16)
    wanted = expected_scores(model, dictionary, "denoise")
    for method in (FirstOrder(), GradDrop()):
        got = scores(attribute(model, dictionary, PAIRS, method=method))
        largest = max(map(abs, got.values()))
        for key in got.keys() | wanted[method.name].keys():
            expected = wanted[method.name].get(key, 0.0)
            assert got.get(key, 0.0) == pytest.approx(expected, rel=2e-2, abs=1e-2 * largest), key
    found = attribute(model, dictionary, PAIRS, method=IntegratedGradients(4), verify=100, sample=100)
    assert found.verified.pearson() > 0.5


# One method a family by default.
SEVERAL = [
    pytest.param(method, family, id=f"{method.name}-{family}", marks=[] if number % 3 == 0 else pytest.mark.slow)
    for number, (method, family) in enumerate(
        product((FirstOrder(), IntegratedGradients(2), GradDrop()), ("llama", "gpt2", "gpt_neox", "gemma2"))
    )
]


@pytest.mark.parametrize(("method", "family"), SEVERAL)
def test_several_sites_at_once_are_each_site_alone(family, method):
    model = tiny_model(family)
    several = [
        random_dictionary(site, seed=i) for i, site in enumerate(["resid_post.1", "mlp_out.1", "attn_out.1", "z.1"])
    ]
    several += [random_dictionary("resid_pre.0", seed=5), random_dictionary("resid_post.2", seed=6)]
    for direction in ("denoise", "noise"):
        together = attribute(model, several, PAIRS, direction=direction, method=method)
        apart = [attribute(model, one, PAIRS, direction=direction, method=method) for one in several]
        assert len(together) == sum(map(len, apart))
        wanted = {key: value for one in apart for key, value in scores(one).items()}
        for key, value in scores(together).items():
            assert value == pytest.approx(wanted[key], rel=1e-3, abs=2e-5), key
    with pytest.raises(UserError, match="one tensor"):
        attribute(model, [random_dictionary("resid_post.0"), random_dictionary("resid_pre.1")], PAIRS)


@pytest.mark.parametrize("family", ["llama", "gpt_neox", "gpt2"])
@pytest.mark.parametrize("method", [FirstOrder(), GradDrop()], ids=lambda m: m.name)
def test_several_sites_of_a_corrupted_base_run_in_any_order(family, method):
    model, corruption = tiny_model(family), GaussianNoise(slice(2, 6), samples=2)
    several = [random_dictionary(site, "standard", seed=i) for i, site in enumerate(["attn_out.1", "z.1", "mlp_out.1"])]
    apart = [attribute(model, one, PAIRS[:2], corruption=corruption, method=method) for one in several]
    wanted = {key: value for one in apart for key, value in scores(one).items()}
    for given in (several[:2], several[1::-1], several, several[::-1]):
        together = scores(attribute(model, given, PAIRS[:2], corruption=corruption, method=method))
        sites = {dictionary.site for dictionary in given}
        assert together == pytest.approx({k: v for k, v in wanted.items() if k[1] in sites}, rel=1e-3, abs=2e-5)


@pytest.mark.parametrize("family", ["llama", "gemma3_text", "opt"])
def test_prompts_aligned_from_the_right(family):
    """Equal prompts give the same nodes, counted from the end; of unequal ones, those that exact patching has, too."""
    model, dictionary = tiny_model(family), random_dictionary()
    left, right = (attribute(model, dictionary, PAIRS, align=align) for align in ("equal", "right"))
    lengths = [len(model.encode(pair.clean)) for pair in PAIRS]
    order = [np.lexsort((one.position, one.unit, one.pair)) for one in (left, right)]
    for name in ("pair", "unit"):
        assert np.array_equal(getattr(left, name)[order[0]], getattr(right, name)[order[1]])
    shift = np.array(lengths)[left.pair[order[0]]]
    assert np.array_equal(left.position[order[0]] - shift, right.position[order[1]])
    np.testing.assert_allclose(left.score[order[0]], right.score[order[1]], atol=2e-5)
    unequal = [PromptPair("a cat sat", "the horse sat", "x", "y"), PromptPair("abcdef", "abc", "x", "y")]
    found, _, exact = all_exact(model, dictionary, unequal, align="right")
    assert (found.position < 0).all()
    near = found.position[found.verified.index] >= -4  # all that one block sees through a sliding window of 4
    assert np.count_nonzero(exact[near]) > 0.9 * near.sum()
    swept = patch_latents(model, dictionary, unequal, each_position=True, align="right")
    ran = {
        (int(p), *swept.edits[e].units, swept.edits[e].position) for p, e in zip(*np.nonzero(swept.ran), strict=True)
    }
    latents = found.unit >= 0
    columns = (found.pair, found.unit, found.position)
    assert ran == set(zip(*(column[latents].tolist() for column in columns), strict=True))


def test_batches_and_order_change_nothing():
    model, dictionary = tiny_model(), random_dictionary()
    whole = attribute(model, dictionary, PAIRS)
    same_scores(whole, attribute(model, dictionary, PAIRS, batch_size=1))
    turned = attribute(model, dictionary, PAIRS[::-1])
    np.testing.assert_allclose(turned.clean[::-1], whole.clean, atol=1e-5)
    assert scores(turned).keys() == {(2 - key[0], *key[1:]) for key in scores(whole)}


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("method", [FirstOrder(), IntegratedGradients(2)], ids=lambda m: m.name)
@pytest.mark.parametrize(
    "changes",
    [{}, {"architecture": "jumprelu"}, {"architecture": "standard", "normalize_activations": "layer_norm"}],
    ids=["topk", "jumprelu", "layer_norm"],
)
def test_on_a_linear_model_every_estimate_is_exact(direction, method, changes):
    model = linear_model()
    several = [random_dictionary(f"resid_post.{i}", d_in=12, seed=i, **changes) for i in range(3)]
    found, estimated, exact = all_exact(model, several, PAIRS, direction=direction, method=method)
    assert {found.edit(i).kind for i in range(len(found))} == {"latent", "error"}
    assert len(set(found.position.tolist())) > 3
    np.testing.assert_allclose(estimated, exact, atol=1e-5 * max(1.0, np.abs(exact).max()))
    assert np.abs(exact).max() > 0.1


def test_flat_gradient_after_a_confident_wrong_answer():
    """Planted: first order sees nothing where the probability is saturated; the mean gradient on the way sees it."""
    model, dictionary = confident_model(), split_dictionary("resid_post.0", 3)
    pairs = [PromptPair("abp", "abn", "x", "y")]
    for direction in ("denoise", "noise"):
        options = {"metric": probability, "direction": direction}
        plain, estimated, exact = all_exact(model, dictionary, pairs, **options)
        assert plain.edit(int(plain.verified.index[0])).units == (2,)
        assert exact[0] > 0.99
        assert abs(estimated[0]) < 0.01
        _, estimated, exact = all_exact(model, dictionary, pairs, method=IntegratedGradients(), **options)
        assert estimated[0] == pytest.approx(exact[0], abs=0.01)


def test_cancelling_paths():
    """Planted: the direct path and one through a later block cancel at the base run, and not on the way.

    GradDrop's size is 6 without block 1, which is the mean over the blocks after the site; midpoints of three steps are
    on either side of the kink, where they belong, so that integrated gradients are exact.
    """
    model, pairs = cancelling_model(), [PromptPair("abb", "abs", "x", "y")]
    for site, size in (("resid_pre.0", 6 / 3), ("resid_post.0", 6 / 2), ("resid_pre.1", 6 / 2)):
        dictionary = split_dictionary(site, 3)
        for method, wanted in ((FirstOrder(), 0), (GradDrop(), size), (IntegratedGradients(3), 4)):
            found, estimated, exact = all_exact(model, dictionary, pairs, method=method)
            (place,) = np.flatnonzero(found.unit[found.verified.index] == 2)
            assert exact[place] == pytest.approx(4)
            assert estimated[place] == pytest.approx(wanted, abs=1e-5)


def test_graddrop_behind_the_last_block_is_the_size_of_first_order():
    model, dictionary = tiny_model(), random_dictionary("resid_post.2")
    plain, sizes = (attribute(model, dictionary, PAIRS, method=method) for method in (FirstOrder(), GradDrop()))
    np.testing.assert_allclose(sizes.score, np.abs(plain.score), rtol=1e-5)


def test_verified_effects_are_those_of_the_sweep():
    model, several = tiny_model(), [random_dictionary("resid_post.0"), random_dictionary("mlp_out.1", seed=1)]
    found = attribute(model, several, PAIRS, direction="noise", verify=7, sample=9, seed=3)
    verified = found.verified
    assert (verified.largest, verified.sampled, verified.others) == (7, 9, len(found) - 7)
    assert len(set(verified.index.tolist())) == 16
    sizes = np.abs(found.score)
    assert sizes[verified.index[:7]].min() >= np.delete(sizes, verified.index[:7]).max()
    np.testing.assert_array_equal(verified.estimated, found.score[verified.index])
    for node, exact in zip(verified.index, verified.exact, strict=True):
        edit, dictionary = found.edit(int(node)), several[found.site[node]]
        what = ErrorTerm(dictionary) if edit.kind == "error" else dictionary
        effects = patch_components(model, what, [PAIRS[found.pair[node]]], [edit], direction="noise")
        assert effects.change[0, 0] == pytest.approx(exact, abs=1e-5)
    again, other = (attribute(model, several, PAIRS, direction="noise", sample=9, seed=s) for s in (3, 4))
    assert again.verified.largest == 0
    assert not np.array_equal(again.verified.index, other.verified.index)
    with pytest.raises(UserError, match="verify=-1"):
        attribute(model, several, PAIRS, verify=-1)


def test_positions_and_base_metrics():
    model, dictionary = tiny_model(), random_dictionary()
    found = attribute(model, dictionary, PAIRS, positions="last")
    lengths = np.array([len(model.encode(pair.clean)) for pair in PAIRS])
    assert np.array_equal(found.position, lengths[found.pair] - 1)
    whole = scores(attribute(model, dictionary, PAIRS))
    for key, value in scores(found).items():
        assert value == pytest.approx(whole[key], abs=1e-6)
    swept = patch_latents(model, dictionary, PAIRS, [(0,)], controls=0)
    np.testing.assert_allclose(found.clean, swept.clean, atol=1e-5)
    np.testing.assert_allclose(found.corrupted, swept.corrupted, atol=1e-5)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_corruptions(direction):
    """Estimates are exact on a linear model, whatever makes the corrupted run."""
    model = linear_model()
    several = [random_dictionary(f"resid_post.{i}", d_in=12, seed=i) for i in (1, 0)]
    noise = GaussianNoise(1, samples=3)
    for dictionaries, corruption in ((several, noise), (several[0], Zero())):
        found, estimated, exact = all_exact(model, dictionaries, PAIRS, direction=direction, corruption=corruption)
        np.testing.assert_allclose(estimated, exact, atol=2e-5 * max(1.0, np.abs(exact).max()))
        swept = patch_latents(model, several[0], PAIRS, [(0,)], controls=0, corruption=corruption)
        np.testing.assert_allclose(found.corrupted, swept.corrupted, atol=1e-4)
        assert (ERROR in found.unit) == (corruption is noise)
    with pytest.raises(UserError, match="one dictionary at a time"):
        attribute(model, several, PAIRS, corruption=Zero())


def test_a_metric_that_is_flat_at_the_base_run(caplog):
    model, dictionary = tiny_model(), random_dictionary()
    metric = kl_divergence(model.next_logits(batch_pairs(model, PAIRS).clean))
    options = {"direction": "noise", "metric": metric}
    attribute(model, dictionary, PAIRS, **options)
    assert "the metric kl_divergence is flat at the base run" in caplog.text
    assert "use IntegratedGradients" in caplog.text
    caplog.clear()
    attribute(model, dictionary, PAIRS, method=IntegratedGradients(2), **options)
    attribute(model, dictionary, PAIRS)
    assert caplog.text == ""


@pytest.mark.parametrize("direction", [pytest.param("denoise", marks=pytest.mark.slow), "noise"])
def test_kl_from_the_clean_run_is_screened_as_with_that_reference(direction):
    model, dictionary = tiny_model(), random_dictionary()
    batch = batch_pairs(model, PAIRS)
    given = kl_divergence(model.next_logits(batch.clean))
    for method in (FirstOrder(), IntegratedGradients(3)):
        options = {"direction": direction, "method": method, "verify": 4, "sample": 3, "batch_size": 2}
        own, expected = (
            attribute(model, dictionary, PAIRS, metric=metric, **options) for metric in (kl_divergence(), given)
        )
        np.testing.assert_allclose(own.clean, 0, atol=1e-9)
        np.testing.assert_allclose(own.corrupted, expected.corrupted, rtol=1e-4, atol=1e-9)
        if direction == "noise" and isinstance(method, FirstOrder):  # flat there: all are rounding
            assert np.abs(own.score).max() < 1e-5 * np.abs(own.gap).max()
        else:
            np.testing.assert_allclose(own.score, expected.score, rtol=1e-3, atol=1e-8)
            np.testing.assert_allclose(own.verified.exact, expected.verified.exact, rtol=1e-3, atol=1e-8)
    # completeness: latents and error terms together are the way from one run's divergence to the other's
    many = attribute(
        model, dictionary, PAIRS, metric=kl_divergence(), method=IntegratedGradients(60), direction=direction
    )
    whole = patch_components(model, Stream(dictionary.site), PAIRS, metric=kl_divergence(), direction=direction)
    total = np.bincount(many.pair, weights=many.score, minlength=len(PAIRS))
    np.testing.assert_allclose(total, whole.change[:, 0], rtol=0.02, atol=1e-6)


class TopLogit:
    """A metric that cannot be hashed."""

    def __eq__(self, other):
        return True

    def __call__(self, logits, batch):
        return logits.max(-1).values


def test_a_metric_that_cannot_be_hashed():
    model, dictionary = tiny_model(), random_dictionary()
    found = attribute(model, dictionary, PAIRS, metric=TopLogit(), verify=2)
    assert found.metric == "TopLogit"
    np.testing.assert_allclose(
        found.clean, model.next_logits(batch_pairs(model, PAIRS).clean).max(-1).values, rtol=1e-5
    )


def mean_logit(logits, batch):
    return logits.mean()


def test_bad_input():
    model, dictionary = tiny_model(), random_dictionary()
    with pytest.raises(UserError, match="answer_rank has no gradient"):
        attribute(model, dictionary, PAIRS, metric=answer_rank)
    with pytest.raises(UserError, match=r"metric mean_logit returns values of shape \(\) for \d examples"):
        attribute(model, dictionary, PAIRS, metric=mean_logit)
    for method in (FirstOrder(), IntegratedGradients(1)):
        model.hf.train()
        with pytest.raises(UserError, match="in training mode"):
            attribute(model, dictionary, PAIRS, method=method)
        model.hf.eval()
    with pytest.raises(UserError, match="batch_size = 0"):
        attribute(model, dictionary, PAIRS, batch_size=0)
    with pytest.raises(UserError, match="nothing to patch|nothing can be patched"):
        attribute(model, [], PAIRS)
    with pytest.raises(UserError, match="width 12"):
        attribute(model, random_dictionary(d_in=12), PAIRS)
    with pytest.raises(UserError, match="splice"), splice(model, dictionary):
        attribute(model, dictionary, PAIRS)
    same = attribute(model, dictionary, [PromptPair("same", "same", "x", "y")], verify=3, sample=3)
    assert len(same) == 0
    with pytest.raises(UserError, match="no effect to rank by"):
        same.top(3)


def test_no_hook_is_left_and_no_weight_has_a_gradient():
    model, dictionary = tiny_model(), random_dictionary()
    for method in (FirstOrder(), IntegratedGradients(1), GradDrop()):
        with torch.inference_mode():
            attribute(model, dictionary, PAIRS, method=method)
    with pytest.raises(UserError, match="no gradient"):
        attribute(model, dictionary, PAIRS, metric=answer_rank, method=GradDrop())
    for module in model.hf.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in module.__dict__
    assert all(p.grad is None and not p.requires_grad for p in model.hf.parameters())


@pytest.fixture
def handing_on():
    """A model whose last block also adds what an MLP of the first one emitted."""
    model, seen = tiny_model("gpt2", seed=5), {}
    first, last = model.layout.blocks[0].mlp, model.layout.blocks[2].mlp
    handles = [
        first.register_forward_hook(lambda _m, _a, output: seen.update(handed=output)),
        last.register_forward_hook(lambda _m, _a, output: output + 3 * seen.pop("handed", 0)),
    ]
    yield model
    for handle in handles:
        handle.remove()


def test_blocks_that_hand_on_more_than_the_stream_are_not_skipped(handing_on):
    """Steps of integrated gradients start at the site; without the blocks before, the last would lack a part."""
    model, dictionary = handing_on, random_dictionary("resid_post.1", "standard")
    pairs = [PromptPair("my hen ran", "my cow ran", "x", "y")]
    batch = batch_pairs(model, pairs)
    found = attribute(model, dictionary, pairs, method=IntegratedGradients(4))
    source, base = (model.capture(t, [dictionary.site])[dictionary.site] for t in (batch.clean, batch.corrupted))
    gradient = torch.zeros_like(base)
    for step in range(4):
        x = (base + (step + 0.5) / 4 * (source - base)).requires_grad_()
        with torch.enable_grad(), edit_sites(model.layout, {dictionary.site: lambda _, x=x: x}):
            logits = model.hf(batch.corrupted.input_ids).logits[0, -1]
            gradient += torch.autograd.grad(logits[batch.answer[0]] - logits[batch.counter[0]], x)[0] / 4
    change = dictionary.activations(source)[0] - dictionary.activations(base)[0]
    expected = (change * (gradient @ dictionary.rows.T)).sum(1)[0]
    scores = torch.zeros(dictionary.d_sae)
    for unit, score in zip(found.unit.tolist(), found.score.tolist()):
        scores[unit] += score * (unit != ERROR)
    torch.testing.assert_close(scores, expected, atol=1e-4, rtol=1e-3)


def test_models_of_recurrent_states_have_integrated_gradients():
    model = tiny_model("rwkv", attention_hidden_size=16, context_length=64)
    pairs = [PromptPair("a hen", "a cow", "x", "y")]
    found = attribute(model, random_dictionary("resid_post.0"), pairs, method=IntegratedGradients(2))
    assert found.score.any()
