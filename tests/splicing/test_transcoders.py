"""Transcoders beside plain hooks on two modules, one whole pass an edit."""

from contextlib import contextmanager

import pytest
import torch
from sae_lens.saes import transcoder as of_sae_lens
from tiny import D_MODEL, random_dictionary, random_sae, tiny_model

from saepatch.circuits.nodes import node_sites
from saepatch.circuits.residual.direct import direct_attribution
from saepatch.data.batches import batch_pairs
from saepatch.data.pairs import PromptPair
from saepatch.dictionaries.loading import adopt, load_sae, wrap_sae
from saepatch.dictionaries.transcoder import PROBE
from saepatch.engine.components import ErrorTerm, Stream
from saepatch.engine.metrics import logit_difference
from saepatch.errors import UserError
from saepatch.measure.attribution import FirstOrder, attribute
from saepatch.measure.patching import patch_components, patch_latents
from saepatch.measure.quality import splice_quality
from saepatch.model.sites import Site
from saepatch.splicing.interventions import Ablate, Steer
from saepatch.splicing.splice import record_latents, splice

D_SAE = 24
CLASSES = {
    "transcoder": (of_sae_lens.Transcoder, of_sae_lens.TranscoderConfig),
    "skip_transcoder": (of_sae_lens.SkipTranscoder, of_sae_lens.SkipTranscoderConfig),
    "jumprelu_transcoder": (of_sae_lens.JumpReLUTranscoder, of_sae_lens.JumpReLUTranscoderConfig),
    "jumprelu_skip_transcoder": (of_sae_lens.JumpReLUSkipTranscoder, of_sae_lens.JumpReLUSkipTranscoderConfig),
}
# what reads and what writes, in a block of each family
MODULES = {"llama": ("mlp", "mlp"), "gemma3_text": ("mlp", "post_feedforward_layernorm"), "gpt2": ("mlp", "mlp")}
PAIRS = [PromptPair("the cat sat", "the dog sat", "x", "y", "a"), PromptPair("abc", "abd", "r", "s", "c")]


@contextmanager
def modules_hooked(model, layer, edit):
    """Plain hooks on the module that reads and the module that writes: `edit(read, written)`."""
    read = {}
    block, (reads, writes) = model.layout.blocks[layer], MODULES[model.config.model_type]
    first = block.get_submodule(reads).register_forward_pre_hook(lambda _m, args: read.update(x=args[0]))
    second = block.get_submodule(writes).register_forward_hook(lambda _m, _args, y: edit(read["x"], y))
    try:
        yield
    finally:
        first.remove()
        second.remove()


def seen(model, layer, text):
    """What the MLP reads and what it adds, at every token of a text."""
    kept = []
    with modules_hooked(model, layer, lambda x, y: kept.append((x[0], y[0]))), torch.no_grad():
        model.hf(input_ids=torch.tensor([model.encode(text)]))
    return kept[0]


def fitted(model, layer, kind="transcoder", reads=lambda x: x, **metadata):
    """A transcoder whose decoder is the least-squares fit of what the MLP adds, without BOS."""
    sae_class, cfg_class = CLASSES[kind]
    sae = sae_class(cfg_class(d_in=D_MODEL, d_out=D_MODEL, d_sae=D_SAE, apply_b_dec_to_input=False))
    generator = torch.Generator().manual_seed(0)
    for name, weight in sae.named_parameters():
        weight.data = 0.4 * torch.randn(weight.shape, generator=generator)
        if name == "threshold":
            weight.data = weight.data.abs()
    x, y = (part[1:] for part in seen(model, layer, PROBE))
    x = reads(x)
    if hasattr(sae, "W_skip"):
        y = y - x @ sae.W_skip.T
    acts = torch.cat([sae.encode(x), torch.ones(len(x), 1)], -1)
    fit = torch.linalg.lstsq(acts.double(), y.double(), driver="gelsd").solution.float()
    sae.W_dec.data, sae.b_dec.data = fit[:-1].contiguous(), fit[-1].contiguous()
    for name, value in metadata.items():
        setattr(sae.cfg.metadata, name, value)
    return sae


CASES = [("llama", 1, "transcoder"), ("gemma3_text", 0, "jumprelu_skip_transcoder"), ("llama", 2, "skip_transcoder")]
CASES += [pytest.param(("gpt2", 1, "jumprelu_transcoder"), marks=pytest.mark.whole)]


@pytest.fixture(params=CASES, ids=lambda case: "-".join(map(str, case)))
def case(request):
    family, layer, kind = request.param
    model = tiny_model(family, max_position_embeddings=512, n_positions=512)
    sae = fitted(model, layer, kind)
    return model, layer, sae, adopt(sae, Site(layer, "mlp"), kind)


def logits(model, ids, layer, edit):
    with modules_hooked(model, layer, edit), torch.no_grad():
        return model.hf(input_ids=ids).logits


def test_splicing_changes_nothing_and_a_bottleneck_is_the_transcoder(case):
    model, layer, sae, dictionary = case
    tokens = model.tokenize(["the cat sat"])
    with torch.no_grad():
        plain = model.hf(input_ids=tokens.input_ids).logits
    with splice(model, dictionary, record=True) as run:
        torch.testing.assert_close(model.call(tokens), plain, rtol=1e-5, atol=1e-5)
    x, y = seen(model, layer, "the cat sat")
    latents = run.latents[Site(layer, "mlp")]
    torch.testing.assert_close(latents.acts[0], sae.encode(x))
    assert 0 < float((latents.acts > 0).float().mean()) < 1
    error = (y - sae(x)).detach()
    torch.testing.assert_close(latents.error[0, :, :D_MODEL], error, rtol=1e-4, atol=1e-5)
    assert not latents.error[..., D_MODEL:].any()

    def replaced(x, y):
        return torch.cat([y[:, :1], sae(x)[:, 1:]], 1)  # BOS keeps the model's own

    with splice(model, dictionary, error="drop"):
        spliced = model.call(tokens)
    torch.testing.assert_close(spliced, logits(model, tokens.input_ids, layer, replaced), rtol=1e-4, atol=1e-4)
    assert (spliced - plain).abs().max() > 1e-3


def test_latents_are_ablated_and_steered(case):
    model, layer, sae, dictionary = case
    tokens = model.tokenize(["the cat sat"])
    active = int(record_latents(model, dictionary, tokens).acts[0, -1].argmax())

    def ablated(x, y):
        written = (sae.encode(x)[..., active, None] * sae.W_dec[active]).detach()
        written[:, 0] = 0
        return y - written

    for ids in (active, [active, (active + 1) % D_SAE]):
        with splice(model, dictionary, Ablate(ids)):
            got = model.call(tokens)
        if ids == active:
            torch.testing.assert_close(got, logits(model, tokens.input_ids, layer, ablated), rtol=1e-4, atol=1e-4)

    def steered(_x, y):
        return y + torch.tensor([0.0, *[1.0] * (y.shape[1] - 1)])[:, None] * 2.5 * sae.W_dec[3].detach()

    with splice(model, dictionary, Steer(3, 2.5)):
        got = model.call(tokens)
    torch.testing.assert_close(got, logits(model, tokens.input_ids, layer, steered), rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("direction", ["denoise", "noise"])
def test_sweeps_are_one_hooked_pass_an_edit(case, direction):
    model, layer, sae, dictionary = case
    groups = [(0,), (3,), (1, 2, 7), tuple(range(D_SAE))]
    effects = patch_latents(model, dictionary, PAIRS, groups, direction=direction, controls=0)
    apart = patch_latents(model, dictionary, PAIRS, groups[-1:], direction=direction, controls=0, each_position=True)
    errors = patch_components(model, ErrorTerm(dictionary), PAIRS, direction=direction)
    for row, pair in enumerate(PAIRS):
        batch = batch_pairs(model, [pair])
        texts = (pair.corrupted, pair.clean) if direction == "denoise" else (pair.clean, pair.corrupted)
        (x, y), (from_x, from_y) = (seen(model, layer, text) for text in texts)
        change = (sae.encode(from_x) - sae.encode(x)).detach()
        change[0] = 0
        ids = torch.tensor([model.encode(texts[0])])

        def measured(added, ids=ids, batch=batch):
            return float(logit_difference(logits(model, ids, layer, lambda _x, written: written + added)[:, -1], batch))

        for column, group in enumerate(groups):
            added = change[:, list(group)] @ sae.W_dec[list(group)].detach()
            assert abs(effects.patched[row, column] - measured(added)) < 2e-5, group
        for column, edit in enumerate(apart.edits):
            if apart.ran[row, column]:
                here = torch.zeros_like(change)
                here[edit.position] = change[edit.position]
                assert abs(apart.patched[row, column] - measured(here @ sae.W_dec.detach())) < 2e-5
        error = ((from_y - sae(from_x)) - (y - sae(x))).detach()
        error[0] = 0
        assert abs(errors.patched[row, 0] - measured(error)) < 2e-5


def test_attribution_is_the_change_of_latents_times_the_gradient(case):
    model, layer, sae, dictionary = case
    found = attribute(model, dictionary, PAIRS, method=FirstOrder(), verify=4)
    score = {(p, u, t): s for p, u, t, s in zip(found.pair, found.unit, found.position, found.score, strict=True)}
    for row, pair in enumerate(PAIRS):
        batch = batch_pairs(model, [pair])
        (x, y), (from_x, from_y) = (seen(model, layer, text) for text in (pair.corrupted, pair.clean))
        leaf = torch.zeros_like(y).requires_grad_()
        ids = torch.tensor([model.encode(pair.corrupted)])
        with modules_hooked(model, layer, lambda _x, y, leaf=leaf: y + leaf):
            logit_difference(model.hf(input_ids=ids).logits[:, -1], batch).sum().backward()
        change = (sae.encode(from_x) - sae.encode(x)).detach() * (leaf.grad @ sae.W_dec.detach().T)
        error = (((from_y - sae(from_x)) - (y - sae(x))).detach() * leaf.grad).sum(-1)
        for place, unit in change[1:].nonzero().tolist():
            assert abs(score.get((row, unit, place + 1), 0.0) - float(change[place + 1, unit])) < 1e-4
        for place in range(1, len(y)):
            assert abs(score.get((row, -1, place), 0.0) - float(error[place])) < 1e-4


def test_two_sites_at_once_are_each_alone():
    model = tiny_model(max_position_embeddings=512)
    transcoder, before = adopt(fitted(model, 1), Site(1, "mlp"), "t"), random_dictionary("resid_post.0")
    both = attribute(model, [before, transcoder], PAIRS)
    for number, dictionary in enumerate((before, transcoder)):
        alone, mine = attribute(model, dictionary, PAIRS), both.site == number
        assert len(alone.score) == int(mine.sum())
        torch.testing.assert_close(torch.tensor(both.score[mine]), torch.tensor(alone.score), rtol=1e-4, atol=1e-6)
        assert abs(alone.score).max() > 1e-3


def test_quality_is_of_what_is_written(case):
    model, layer, sae, dictionary = case
    texts = ["the cat sat on it", "one big tree"]
    both = [seen(model, layer, text) for text in texts]
    x, y = (torch.cat([part[1:] for part in parts]).double() for parts in zip(*both, strict=True))
    with torch.no_grad():
        error = y - sae(x.float()).double()
    expected = float(error.square().sum() / (y - y.mean(0)).square().sum())
    quality = splice_quality(model, dictionary, texts)
    assert abs(quality.fvu - expected) < 1e-4
    assert quality.identity_error < 1e-4
    losses = []
    for text in texts:
        ids = torch.tensor([model.encode(text)])
        out = logits(model, ids, layer, lambda x, y: torch.cat([y[:, :1], sae(x)[:, 1:]], 1))
        losses += (-out[0, 1:-1].log_softmax(-1).gather(-1, ids[0, 2:, None])[:, 0]).tolist()
    assert abs(quality.ce_spliced - sum(losses) / len(losses)) < 1e-4


def test_what_it_reads_is_checked_by_reconstruction():
    model = tiny_model("gemma3_text", max_position_embeddings=512)
    with torch.no_grad():
        for block in model.layout.blocks:
            block.pre_feedforward_layernorm.weight.normal_(0, 2)

    def before_weights(x):
        return x / (1 + model.layout.blocks[1].pre_feedforward_layernorm.weight.detach())

    named = {"hook_name": "blocks.1.ln2.hook_normalized", "hook_name_out": "blocks.1.hook_mlp_out"}
    wrong = wrap_sae(fitted(model, 1, reads=before_weights, **named))
    with pytest.raises(UserError, match=r"of the variance of what the MLP .*normalised.*hook_normalized.* leaves 0"):
        record_latents(model, wrong, ["the cat"])
    right = fitted(model, 1, **named)
    record_latents(model, wrap_sae(right), ["the cat"])
    right.W_dec.data = -right.W_dec.data
    with pytest.raises(UserError, match="its weights are damaged"), splice(model, wrap_sae(right)):
        pass


LENS = {"hook_name": "blocks.2.hook_mlp_in", "hook_name_out": "blocks.2.hook_mlp_out"}
HF = ("model.layers.1.pre_feedforward_layernorm.output", "model.layers.1.post_feedforward_layernorm.output")


def test_the_names_of_hugging_face_win(tmp_path):
    model = tiny_model(max_position_embeddings=512)
    assert wrap_sae(fitted(model, 1, **LENS)).site == Site(2, "mlp")
    sae = fitted(model, 1, **LENS, hf_hook_name=HF[0], hf_hook_name_out=HF[1])
    assert wrap_sae(sae).site == Site(1, "mlp")
    sae.save_model(tmp_path)
    loaded = load_sae(str(tmp_path))
    assert loaded.site == Site(1, "mlp")
    tokens = model.tokenize(["the cat"])
    x, _ = seen(model, 1, "the cat")
    torch.testing.assert_close(record_latents(model, loaded, tokens).acts[0], sae.encode(x), rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        (LENS | {"hook_name_out": "blocks.3.hook_mlp_out"}, "reads 'blocks.2.hook_mlp_in' and writes 'blocks.3"),
        ({"hook_name": "blocks.1.hook_resid_pre", "hook_name_out": "blocks.1.hook_mlp_out"}, "what one MLP reads"),
        (LENS | {"sae_lens_release": "mntss-gemma-2-2b-2.5m-clt-as-per-layer"}, "is a cross-layer transcoder"),
        (LENS | {"sae_id": "clt/width_262k_l0_big/params_layer_3"}, "is a cross-layer transcoder"),
    ],
)
def test_other_tensors_and_cross_layer_transcoders_are_refused(metadata, message):
    with pytest.raises(UserError, match=message):
        wrap_sae(fitted(tiny_model(), 1, **metadata))


def test_what_takes_no_transcoder_says_so():
    model = tiny_model(max_position_embeddings=512)
    dictionary = wrap_sae(fitted(model, 1), Site(1, "mlp"))
    with pytest.raises(UserError, match="transcoder"):
        node_sites(model, dictionary)
    with pytest.raises(UserError, match="transcoder"):
        direct_attribution(model, dictionary, ["the cat"], targets=[[5]])
    with pytest.raises(UserError, match="this layer offers"):
        patch_components(model, Stream(Site(1, "mlp")), PAIRS)
    with pytest.raises(UserError, match="its site is mlp.LAYER"):
        adopt(fitted(model, 1), Site(1), "t")
    with pytest.raises(UserError, match="write the same|two dictionaries"):
        adopted = adopt(random_sae(), Site(1, "mlp_out"), "autoencoder")
        with splice(model, [dictionary, adopted]):
            pass
