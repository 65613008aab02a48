"""Queries, keys and values: exact patches against bare hooks on the projections, estimates against exact patches."""

import numpy as np
import pytest
import torch
from planted import Attending, planted_model, saturated_model
from tiny import random_dictionary, tiny_model
from transformers.masking_utils import ALL_MASK_ATTENTION_FUNCTIONS
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from saepatch.data.batches import batch_pairs
from saepatch.data.pairs import PromptPair
from saepatch.engine.components import Edit
from saepatch.engine.metrics import answer_rank, kl_divergence, logit_difference
from saepatch.errors import UserError
from saepatch.measure.attention import PARTS, attribute_attention, patch_attention
from saepatch.model.replaced import attention_replaced
from saepatch.model.sites import Site
from saepatch.splicing.splice import splice

pytestmark = pytest.mark.whole

PAIRS = [
    PromptPair("the cat sat", "the dog sat", "x", "y", "a"),
    PromptPair("one big tree", "one red tree", "p", "q", "b"),
    PromptPair("abc", "abd", "r", "s", "c"),
]
# families whose queries, keys and values are each what one linear map gives, rotated or normed head by head at most
FAMILIES = ["llama", "mistral", "qwen2", "qwen3", "gemma2", "gemma3_text", "phi", "opt", "gpt2"]


class Bare:
    """One pair's runs by bare hooks: the projections' outputs are what is patched."""

    def __init__(self, model, pair, direction):
        self.model, self.batch = model, batch_pairs(model, [pair])
        both = self.batch.corrupted, self.batch.clean
        self.base, self.source = both if direction == "denoise" else both[::-1]
        self.kept = {}

    def projection(self, layer, what):
        """The module that makes it, and where in its output: first column and width of a head."""
        block, text = self.model.layout.blocks[layer], self.model.config.get_text_config()
        width = getattr(text, "head_dim", None) or self.model.d_model // self.model.n_heads
        if self.model.config.model_type == "gpt2":
            return block.attn.c_attn, PARTS.index(what) * self.model.d_model, width
        return getattr(block.self_attn, {"query": "q_proj", "key": "k_proj", "value": "v_proj"}[what]), 0, width

    def run(self, tokens, hooks):
        handles = [module.register_forward_hook(hook) for module, hook in hooks]
        try:
            return self.model.hf(input_ids=tokens.input_ids).logits[:, -1]
        finally:
            for handle in handles:
                handle.remove()

    def patched(self, layer, what, head, position):
        """The metric, and z of the layer, with one head's part at one position set to the source run's."""
        module, start, width = self.projection(layer, what)
        columns = slice(start + head * width, start + (head + 1) * width)
        if module not in self.kept:
            self.run(self.source, [(module, lambda _m, _a, output: self.kept.update({module: output.detach()}))])
        kept = self.kept[module]

        def patch(_module, _args, output):
            new = output.clone()
            new[:, position, columns] = kept[:, position, columns]
            return new

        z = []
        _, output_map = self.output(layer)
        handle = output_map.register_forward_pre_hook(lambda _m, args: z.append(args[0].detach()))
        try:
            logits = self.run(self.base, [(module, patch)])
        finally:
            handle.remove()
        return float(logit_difference(logits, self.batch)), z[0]

    def output(self, layer):
        return layer, self.model.layout.module(Site(layer, "z"))

    def gradient(self, layer):
        """z of the base run, and the gradient of the metric there."""
        held = []

        def leaf(_module, args):
            held.append(args[0].detach().requires_grad_())
            return (held[0],)

        handle = self.output(layer)[1].register_forward_pre_hook(leaf)
        try:
            logits = self.run(self.base, [])
        finally:
            handle.remove()
        return held[0].detach(), torch.autograd.grad(logit_difference(logits, self.batch).sum(), held[0])[0]


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize("family", FAMILIES)
def test_patches_and_estimates_against_bare_hooks(family, direction):
    """Exact patches are those of the projections; estimates are `(z patched − z) · gradient`, all exact before that."""
    model, sign = tiny_model(family), 1 if direction == "denoise" else -1
    found = attribute_attention(model, PAIRS, direction=direction, verify=10**6)
    assert found.method == "first order, QK-fix"
    assert {found.edit(i).kind for i in range(len(found))} == set(PARTS)
    bare = [Bare(model, pair, direction) for pair in PAIRS]
    gradients = [[one.gradient(layer) for layer in range(3)] for one in bare]
    verified, rng = found.verified, np.random.default_rng(0)
    moved = 0
    for place in rng.choice(len(found), 40, replace=False):
        node = int(verified.index[place])
        pair, edit = int(found.pair[node]), found.edit(node)
        metric, z = bare[pair].patched(edit.site.layer, edit.kind, edit.units[0], edit.position)
        base = found.corrupted if direction == "denoise" else found.clean
        assert verified.exact[place] == pytest.approx(sign * (metric - base[pair]), abs=2e-5), edit
        z_base, gradient = gradients[pair][edit.site.layer]
        estimate = sign * float(((z - z_base) * gradient).sum())
        assert found.score[node] == pytest.approx(estimate, rel=1e-3, abs=2e-5), edit
        moved += abs(estimate) > 1e-3
    assert moved > 5


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "mistral"])
def test_without_the_fix_estimates_are_gradients_times_change(family):
    model = tiny_model(family)
    found = attribute_attention(model, PAIRS, qk_fix=False)
    bare, expected = Bare(model, PAIRS[0], "denoise"), {}
    for layer in range(3):
        for what in PARTS:
            module, start, width = bare.projection(layer, what)
            kept, held = [], []

            def leaf(_module, _args, output, held=held):
                held.append(output.detach().requires_grad_())
                return held[0]

            bare.run(bare.source, [(module, lambda _m, _a, output, kept=kept: kept.append(output.detach()))])
            logits = bare.run(bare.base, [(module, leaf)])
            gradient = torch.autograd.grad(logit_difference(logits, bare.batch).sum(), held[0])[0]
            product = ((kept[0] - held[0].detach()) * gradient)[0]
            heads = model.n_heads if what == "query" or family in ("gpt2", "opt") else 2
            by_head = product[:, start : start + heads * width].unflatten(-1, (heads, width)).sum(-1)
            for position, head in np.ndindex(*by_head.shape):
                expected[layer, what, head, position] = float(by_head[position, head])
    nodes = [node for node in range(len(found)) if found.pair[node] == 0]
    assert len(nodes) > 50
    for node in nodes:
        edit = found.edit(node)
        key = (edit.site.layer, edit.kind, edit.units[0], edit.position)
        assert found.score[node] == pytest.approx(expected[key], rel=1e-3, abs=2e-5), key


@pytest.mark.parametrize("direction", ["denoise", "noise"])
@pytest.mark.parametrize(
    ("pair", "kind", "position"),
    [
        (PromptPair("ABq", "ABr", "x", "y"), "query", 3),
        (PromptPair("ADq", "aDq", "x", "y"), "key", 1),
    ],
)
def test_saturated_softmax(pair, kind, position, direction):
    """Planted: the head turns from one token to the other, and no gradient says so; the QK-fix does."""
    model = saturated_model()
    plain, fixed = (attribute_attention(model, [pair], fix, direction=direction, verify=10) for fix in (False, True))
    for found in (plain, fixed):
        assert (float(found.clean[0]), float(found.corrupted[0])) == pytest.approx((2, -2))
        edit = found.edit(int(found.verified.index[0]))
        assert (edit.kind, edit.position) == (kind, position)
        assert found.verified.exact[0] == pytest.approx(4)
    assert abs(plain.verified.estimated[0]) < 1e-5
    assert fixed.verified.estimated[0] == pytest.approx(4, abs=1e-5)


def test_keys_far_beyond_what_a_float_resolves():
    """A key with all of the attention, patched to one with none: what is left of the softmax is worked out apart."""
    model = saturated_model()
    with torch.no_grad():
        model.hf.get_input_embeddings().weight[:, 1:3] *= 10  # scores of 400
    found = attribute_attention(model, [PromptPair("ADq", "aDq", "x", "y")], direction="noise", verify=10)
    assert found.verified.exact[0] == pytest.approx(4)
    assert found.verified.estimated[0] == pytest.approx(4)


def by_node(found):
    """Scores by (example, site, kind, head, position)."""
    edits = [found.edit(node) for node in range(len(found))]
    return {
        (found.examples[pair], edit.site, edit.kind, edit.units[0], edit.position): score
        for pair, edit, score in zip(found.pair, edits, found.score, strict=True)
    }


def test_batches_alignment_and_positions():
    model = tiny_model("qwen3")
    whole = by_node(attribute_attention(model, PAIRS))
    alone = [by_node(attribute_attention(model, [pair])) for pair in PAIRS]
    assert whole == pytest.approx({node: score for one in alone for node, score in one.items()}, abs=1e-5)
    right = by_node(attribute_attention(model, PAIRS, align="right", batch_size=2))
    lengths = {pair.example: len(model.encode(pair.clean)) for pair in PAIRS}
    assert right == pytest.approx({(*n[:4], n[4] - lengths[n[0]]): score for n, score in whole.items()}, abs=1e-5)
    last = by_node(attribute_attention(model, PAIRS, positions="last"))
    assert last == pytest.approx({n: score for n, score in whole.items() if n[4] == lengths[n[0]] - 1}, abs=1e-5)
    with torch.no_grad():  # where attention has little say, what follows is as good as linear in it
        for layer in range(3):
            model.layout.module(Site(layer, "z")).weight.mul_(0.01)
    unequal = [PromptPair("a cat sat", "the horse sat", "x", "y"), PromptPair("abcdef", "abc", "x", "y")]
    found = attribute_attention(model, unequal, align="right", verify=10**6)
    assert (found.position < 0).all()
    assert found.verified.pearson() > 0.99


def test_exact_patches_in_batches():
    """Many edits at once, at several layers, are each edit alone; no position means all; several heads go together."""
    model = tiny_model("llama")
    edits = [
        (pair, Edit(Site(layer, "z"), units, position, kind))
        for pair in range(3)
        for layer in (0, 2)
        for kind in PARTS
        for units, position in (((0, 1), None), ((1,), -1), ((0,), 3))
    ]
    together = patch_attention(model, PAIRS, edits)
    alone = [patch_attention(model, PAIRS, [edit])[0] for edit in edits]
    np.testing.assert_allclose(together, alone, atol=1e-5)
    np.testing.assert_allclose(patch_attention(model, PAIRS, edits, batch_size=4), alone, atol=1e-5)
    from_the_end = [(pair, edit) for pair, edit in edits if edit.position != 3]
    equal, right = (patch_attention(model, PAIRS, from_the_end, align=align) for align in ("equal", "right"))
    np.testing.assert_allclose(equal, right, atol=1e-5)
    assert len(set(np.round(together, 5))) > 20


class Tempered(Attending):
    """Does something of its own with the attention unless it is looked at."""

    def forward(self, hidden_states):
        out = super().forward(hidden_states)
        return out if self.config._attn_implementation != "sdpa" else 2 * out - hidden_states


def test_attention_that_cannot_be_seen_is_refused():
    with pytest.raises(UserError, match="does not use transformers' attention interface"):
        attribute_attention(tiny_model("bloom"), PAIRS)
    with pytest.raises(UserError, match="GptOssAttention computes attention with"):
        attribute_attention(tiny_model("gpt_oss", layer_types=["full_attention"] * 3, rope_parameters=None), PAIRS)
    block = Tempered((1, 2), (3, 4), (5, 6), (7, 8))
    odd = planted_model(9, [block], {"a": {5: 1.0}}, {"x": {7: 1.0}}, others=1.0)
    with pytest.raises(UserError, match="is not a masked softmax"):
        attribute_attention(odd, [PromptPair("abc", "cba", "x", "y")])


def test_bad_input():
    model = tiny_model()
    with pytest.raises(UserError, match="answer_rank has no gradient"):
        attribute_attention(model, PAIRS, metric=answer_rank)
    for edit, complaint in [
        (Edit(Site(7, "z"), (0,), 1, "query"), "an edit of query at z.7"),
        (Edit(Site(1, "z"), (0,), 1, "latent"), "an edit of latent"),
        (Edit(Site(1, "resid_post"), (0,), 1, "query"), "an edit of query at resid_post.1: use query, key, value at z"),
        (Edit(Site(1, "z"), (2,), 1, "key"), "use 0 to 1"),
        (Edit(Site(1, "z"), (0,), 40, "key"), "position 40 is out of range"),
    ]:
        with pytest.raises(UserError, match=complaint):
            patch_attention(model, PAIRS, [(0, edit)])
    for pair in (-1, 3):
        with pytest.raises(UserError, match=f"an edit of pair {pair}: use 0 to 2"):
            patch_attention(model, PAIRS, [(0, Edit(Site(1, "z"), (0,), 1, "key")), (pair, edit)])
    assert len(patch_attention(model, PAIRS, [])) == 0
    with pytest.raises(UserError, match="returns values of shape"):
        attribute_attention(model, PAIRS, metric=lambda logits, batch: logits)
    model.hf.train()
    with pytest.raises(UserError, match="in training mode"):
        attribute_attention(model, PAIRS)
    with pytest.raises(UserError, match="in training mode"):
        patch_attention(model, PAIRS, [(0, Edit(Site(1, "z"), (0,), 1, "key"))])
    model.hf.eval()
    with pytest.raises(UserError, match="splice"), splice(model, random_dictionary()):
        attribute_attention(model, PAIRS)


def test_estimates_of_values_are_exact_where_the_difference_is_small():
    """z is linear in v, the metric is not linear in z: estimates get right as the differences get small."""
    model, pairs = tiny_model(), [PromptPair("abcdef", "abcdeg", "x", "y")]
    g, f = model.encode("g")[1], model.encode("f")[1]
    with torch.no_grad():
        model.hf.get_input_embeddings().weight[f] = model.hf.get_input_embeddings().weight[g] + 1e-2
    found = attribute_attention(model, pairs, verify=10**6)
    values = np.array(found.kinds)[found.site[found.verified.index]] == "value"
    estimated, exact = found.verified.estimated[values], found.verified.exact[values]
    np.testing.assert_allclose(estimated, exact, atol=0.05 * np.abs(exact).max())


def test_a_metric_that_is_flat_at_the_base_run(caplog):
    model = tiny_model()
    metric = kl_divergence(model.next_logits(batch_pairs(model, PAIRS).clean))
    attribute_attention(model, PAIRS, direction="noise", metric=metric)
    assert "the metric kl_divergence is flat at the base run" in caplog.text


def test_kl_from_the_clean_run_is_screened_as_with_that_reference():
    model = tiny_model()
    given = kl_divergence(model.next_logits(batch_pairs(model, PAIRS).clean))
    own, expected = (
        attribute_attention(model, PAIRS, metric=metric, verify=4, batch_size=2) for metric in (kl_divergence(), given)
    )
    np.testing.assert_allclose(own.score, expected.score, rtol=1e-3, atol=1e-9)
    np.testing.assert_allclose(own.verified.exact, expected.verified.exact, rtol=1e-3, atol=1e-9)
    assert (own.gap < 0).all()


def test_nothing_of_the_replaced_attention_is_left():
    model = tiny_model("gemma2")
    before, tables = model.config._attn_implementation, (ALL_ATTENTION_FUNCTIONS, ALL_MASK_ATTENTION_FUNCTIONS)
    names = [set(table) for table in tables]
    attribute_attention(model, PAIRS[:1])
    with pytest.raises(ZeroDivisionError):
        with attention_replaced(model.hf, lambda *_, **__: 1 / 0):
            assert model.config._attn_implementation != before
            model.next_logits(model.tokenize(["abc"]))
    assert model.config._attn_implementation == before
    assert all(
        module.config._attn_implementation == before for module in model.hf.modules() if hasattr(module, "config")
    )
    assert [set(table) for table in tables] == names


def test_a_bfloat16_model():
    narrow, wide = tiny_model("qwen2"), tiny_model("qwen2")
    narrow.hf.to(torch.bfloat16)
    wide.hf.load_state_dict({name: value.float() for name, value in narrow.hf.state_dict().items()})
    found, wanted = (by_node(attribute_attention(model, PAIRS)) for model in (narrow, wide))
    assert found.keys() == wanted.keys()
    assert np.corrcoef([[found[node], wanted[node]] for node in wanted], rowvar=False)[0, 1] > 0.95
