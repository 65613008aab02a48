"""Quality of a splice: dictionaries whose figures are known beforehand, and the same figures by plain arithmetic."""

import math

import pytest
import torch
from tiny import FAMILIES, random_dictionary, random_sae, tiny_model

from saepatch.dictionaries.dictionary import Dictionary
from saepatch.dictionaries.loading import adopt
from saepatch.errors import UserError
from saepatch.measure import quality as measuring
from saepatch.measure.quality import latent_statistics, splice_qualities, splice_quality
from saepatch.model.hooks import capture, edit_sites
from saepatch.model.language_model import Tokens
from saepatch.model.sites import Site
from saepatch.pages.overview import splice_notices, splice_section
from saepatch.reading.cards import read_latents
from saepatch.records.figures import renamed_figures
from saepatch.splicing.splice import record_latents, splice

TEXTS = ["the cat sat on the mat", "a dog", "birds fly high up in the sky", "two of them"]
SITE = Site(1)


@pytest.fixture(scope="module")
def model():
    return tiny_model()


def standard(decoder_scale: float, bias: torch.Tensor | None = None) -> Dictionary:
    """ReLU(x) and ReLU(-x) as latents: with `decoder_scale` 1 it explains everything, with 0 nothing but the bias."""
    sae = random_sae("standard", d_sae=32)
    both = torch.cat([torch.eye(16), -torch.eye(16)])
    sae.load_state_dict(
        {
            "W_enc": both.T.clone(),
            "b_enc": torch.zeros(32),
            "W_dec": decoder_scale * both,
            "b_dec": torch.zeros(16) if bias is None else bias,
        }
    )
    return adopt(sae, SITE, "made by hand")


def figures(model, dictionary, tokens, batch_size=32):
    quality = dict(vars(splice_quality(model, dictionary, tokens, batch_size)))
    assert quality.pop("site") == SITE
    return quality


def test_a_perfect_dictionary_recovers_everything(model):
    quality = splice_quality(model, standard(1.0), model.tokenize(TEXTS))
    assert quality.ce_recovered == pytest.approx(1, abs=1e-5)
    assert quality.ce_recovered_ordinary == pytest.approx(1, abs=1e-5)
    assert quality.ce_recovered_mean == pytest.approx(1, abs=1e-5)
    assert quality.kl == pytest.approx(0, abs=1e-5)
    assert quality.fvu == pytest.approx(0, abs=1e-9)
    assert quality.l0 == pytest.approx(16)
    assert quality.alive_share == 1
    assert quality.identity_error < 1e-4


def test_a_dictionary_that_says_nothing_is_the_ablation(model):
    tokens = model.tokenize(TEXTS)
    silent = splice_quality(model, standard(0.0), tokens)
    assert silent.ce_spliced == pytest.approx(silent.ce_zero_ordinary, abs=1e-5)
    assert silent.ce_recovered_ordinary == pytest.approx(0, abs=1e-4)
    assert abs(silent.ce_zero - silent.ce_zero_ordinary) > 0.01  # BOS counts
    x = capture(model.hf, model.layout, [SITE], model.inputs(tokens))[SITE][tokens.ordinary]
    mean = splice_quality(model, standard(0.0, x.mean(0)), tokens)
    assert mean.ce_spliced == pytest.approx(mean.ce_mean, abs=1e-5)
    assert mean.ce_recovered_mean == pytest.approx(0, abs=1e-4)
    assert mean.fvu == pytest.approx(1, abs=1e-5)
    assert mean.ce_zero == pytest.approx(silent.ce_zero)


def test_figures_against_plain_arithmetic(model):
    """One text at a time, no padding: nothing is shared with the implementation but the model's forward."""
    dictionary = random_dictionary("resid_post.1")
    losses, spliced, divergence, errors, values, active = [], [], [], [], [], []
    for text in TEXTS:
        tokens = model.tokenize([text])
        targets = tokens.input_ids[0, 2:]
        x = capture(model.hf, model.layout, [SITE], model.inputs(tokens))[SITE]
        acts = dictionary.sae.encode(x)
        decoded = dictionary.sae.decode(acts)
        plain = model.logits(tokens)[0, 1:-1].double().log_softmax(-1)
        kept_bos = torch.cat([x[:, :1], decoded[:, 1:]], 1)
        with edit_sites(model.layout, {SITE: lambda _, new=kept_bos: new}):
            dropped = model.logits(tokens)[0, 1:-1].double().log_softmax(-1)
        losses.append(-plain[range(len(targets)), targets])
        spliced.append(-dropped[range(len(targets)), targets])
        divergence.append((plain.exp() * (plain - dropped)).sum(-1))
        values.append(x[0, 1:])
        errors.append((x - decoded)[0, 1:])
        active.append(acts[0, 1:] != 0)
    quality = splice_quality(model, dictionary, model.tokenize(TEXTS))
    x, error, on = torch.cat(values), torch.cat(errors), torch.cat(active)
    assert quality.ce_model == pytest.approx(float(torch.cat(losses).mean()), abs=1e-5)
    assert quality.ce_spliced == pytest.approx(float(torch.cat(spliced).mean()), abs=1e-5)
    assert quality.kl == pytest.approx(float(torch.cat(divergence).mean()), abs=1e-5)
    assert quality.fvu == pytest.approx(float(error.pow(2).sum() / (x - x.mean(0)).pow(2).sum()), rel=1e-4)
    assert quality.l0 == pytest.approx(float(on.sum(-1).float().mean()))
    assert quality.alive_share == pytest.approx(float(on.any(0).float().mean()))
    assert quality.tokens == len(x)


class Bridge:
    """Our model as sae_lens' evaluation drives a model: losses a token, and hooks that write a site."""

    def __init__(self, model):
        self.model = model

    def __call__(self, ids, return_type="both", loss_per_token=True, **_):
        logits = self.model.hf(input_ids=ids).logits
        return logits, -logits[:, :-1].log_softmax(-1).gather(-1, ids[:, 1:, None])[..., 0]

    def run_with_hooks(self, ids, fwd_hooks, return_type="both", **_):
        ((_, hook),) = fwd_hooks
        with torch.no_grad(), edit_sites(self.model.layout, {SITE: lambda x: hook(x, None)}):
            return self(ids, return_type)


def test_cross_entropy_recovered_is_that_of_sae_lens(model):
    """Of its evaluation as it runs, over rows of one length, BOS among the tokens it ignores."""
    from sae_lens.evals import get_downstream_reconstruction_metrics
    from sae_lens.training.activation_scaler import ActivationScaler

    dictionary = random_dictionary("resid_post.1")
    dictionary.sae.cfg.metadata.hook_name = SITE.hook_name
    tokens = model.tokenize(["the cat sat on a mat", "birds fly high up, ha"[:20], "two of them, or more"])
    store = type("Store", (), {"get_batch_tokens": lambda _self, _n: tokens.input_ids})()
    theirs = get_downstream_reconstruction_metrics(
        dictionary.sae, Bridge(model), store, ActivationScaler(), True, True, 1, 3, ignore_tokens=[model.bos_id]
    )
    ours = splice_quality(model, dictionary, tokens)
    assert ours.ce_model == pytest.approx(theirs["ce_loss_without_sae"], abs=2e-5)
    assert ours.ce_spliced == pytest.approx(theirs["ce_loss_with_sae"], abs=2e-5)
    assert ours.ce_zero == pytest.approx(theirs["ce_loss_with_ablation"], abs=2e-5)
    assert ours.ce_recovered == pytest.approx(theirs["ce_loss_score"], abs=2e-5)
    assert abs(ours.ce_recovered_ordinary - theirs["ce_loss_score"]) > 1e-3


def test_cross_entropy_recovered_is_that_of_saebench(model):
    """SAEBench's core evaluation, as its formula says: padding and BOS are spliced past and not counted, zeros go
    everywhere."""
    dictionary, tokens = random_dictionary("resid_post.1"), model.tokenize(TEXTS)
    kept = (tokens.attention_mask.bool() & (tokens.input_ids != model.bos_id))[..., None]

    def loss(write):
        with torch.no_grad(), edit_sites(model.layout, {SITE: write}):
            logits = model.hf(**model.inputs(tokens)).logits
        losses = -logits[:, :-1].log_softmax(-1).gather(-1, tokens.input_ids[:, 1:, None])[..., 0]
        counted = kept[:, :-1, 0] & tokens.attention_mask[:, 1:].bool()
        return float(losses[counted].double().mean())

    original = loss(lambda x: x)
    ablated = loss(torch.zeros_like)
    replaced = loss(lambda x: torch.where(kept, dictionary.sae.decode(dictionary.sae.encode(x)).to(x.dtype), x))
    ours = splice_quality(model, dictionary, tokens)
    assert ours.ce_recovered == pytest.approx((ablated - replaced) / (ablated - original), abs=2e-5)


def test_figures_of_earlier_versions_keep_their_meaning():
    old = {"ce_zero": 9.4, "ce_ablated": 9.4, "ce_recovered": 0.984, "fvu": 0.1}
    assert renamed_figures(old) == {
        "ce_zero_ordinary": 9.4,
        "ce_ablated_ordinary": 9.4,
        "ce_recovered_ordinary": 0.984,
        "fvu": 0.1,
    }
    new = {"ce_recovered": 0.970, "ce_recovered_ordinary": 0.984}
    assert renamed_figures(new) == new
    dictionary = random_dictionary()
    dictionary.sae.cfg.metadata.model_fingerprint, dictionary.sae.cfg.metadata.metrics = "f" * 16, old
    assert "ce_recovered" not in dictionary.trained_on["f" * 16]
    line = {
        "site": "resid_post.3",
        "tokens": 9,
        "l0": 16.0,
        "alive_share": 1.0,
        "kl": 0.1,
        "identity_error": 0.0,
        **old,
    }
    (table,) = splice_section([line]).blocks
    assert table.rows[0][:3] == ["resid_post.3", None, 0.984]
    assert splice_notices([line]) == []
    assert len(splice_notices([line | {"ce_recovered": 0.2}])) == 1  # of the old definition, and low


@pytest.mark.parametrize("architecture", ["topk", "jumprelu", "standard", "gated"])
def test_padding_and_batches_change_nothing(model, architecture):
    dictionary = random_dictionary("resid_post.1", architecture)
    right = figures(model, dictionary, model.tokenize(TEXTS, side="right"))
    left = figures(model, dictionary, model.tokenize(TEXTS, side="left"))
    alone = figures(model, dictionary, model.tokenize(TEXTS, side="left"), batch_size=1)  # no padding is left
    for name in right.keys() - {"identity_error"}:
        assert left[name] == pytest.approx(right[name], rel=1e-4, abs=1e-5), name
        assert alone[name] == pytest.approx(right[name], rel=1e-4, abs=1e-5), name
    assert right["identity_error"] < 1e-4


@pytest.mark.parametrize("family", FAMILIES)
def test_passes_from_the_site_on_are_as_good_as_whole_ones(family, monkeypatch):
    model = tiny_model(family)
    tokens = model.tokenize(TEXTS)
    sites = [f"{stream}.1" for stream in model.layout.streams]
    dictionaries = [random_dictionary(site, d_in=model.width(Site.parse(site))) for site in sites]
    quick = splice_qualities(model, dictionaries, tokens)
    monkeypatch.setattr(measuring, "can_skip", lambda *_: False)
    for (one, _), (other, _) in zip(quick, splice_qualities(model, dictionaries, tokens), strict=True):
        assert one.site == other.site
        for name in vars(one).keys() - {"site"}:
            assert getattr(one, name) == pytest.approx(getattr(other, name), rel=1e-4, abs=1e-5), (one.site, name)


def test_it_measures_what_a_splice_does(model):
    dictionary, tokens = random_dictionary("resid_post.1"), model.tokenize(TEXTS)
    with splice(model, dictionary, error="drop"):
        spliced = model.logits(tokens).double().log_softmax(-1)[:, :-1]
    follow = tokens.ordinary[:, :-1] & tokens.ordinary[:, 1:]
    loss = -spliced.gather(-1, tokens.input_ids[:, 1:, None])[..., 0][follow].mean()
    assert splice_quality(model, dictionary, tokens).ce_spliced == pytest.approx(float(loss), abs=1e-6)


def test_a_model_that_hands_on_more_than_the_stream_is_run_whole(model, monkeypatch):
    """A block whose output depends on another having run: going on from the site would leave that out."""
    tokens, dictionary = model.tokenize(TEXTS), random_dictionary("resid_post.1")
    first, last = model.layout.blocks[0].mlp, model.layout.blocks[2].mlp
    seen = {}
    handles = [
        first.register_forward_hook(lambda _m, _a, output: seen.update(handed=output)),
        last.register_forward_hook(lambda _m, _a, output: output + seen.pop("handed", 0)),
    ]
    try:
        quick = splice_quality(model, dictionary, tokens)
        monkeypatch.setattr(measuring, "can_skip", lambda *_: False)
        seen.clear()
        assert splice_quality(model, dictionary, tokens) == quick
    finally:
        for handle in handles:
            handle.remove()


def test_nothing_is_left_on_the_model(model):
    tokens = model.tokenize(TEXTS)
    before = model.logits(tokens)
    splice_quality(model, random_dictionary("resid_post.1"), tokens)
    assert torch.equal(model.logits(tokens), before)


def test_latent_statistics(model):
    dictionary = random_dictionary("resid_post.1")
    tokens = model.tokenize(TEXTS)
    statistics = latent_statistics(model, dictionary, tokens, batch_size=2)
    x = capture(model.hf, model.layout, [SITE], model.inputs(tokens))[SITE][tokens.ordinary]
    acts = dictionary.sae.encode(x)
    on = acts > 0
    torch.testing.assert_close(statistics.frequency, on.float().mean(0))
    torch.testing.assert_close(statistics.maximum, acts.amax(0))
    torch.testing.assert_close(statistics.mean_active, acts.sum(0) / on.sum(0).clamp(min=1))
    torch.testing.assert_close(statistics.mean, acts.mean(0))
    torch.testing.assert_close(statistics.norm, dictionary.W_dec.norm(dim=-1))
    assert torch.equal(statistics.alive, on.any(0))
    assert statistics.tokens == int(tokens.ordinary.sum())
    torch.testing.assert_close(statistics.unit, _quantile(acts), rtol=1 / 512, atol=0)
    torch.testing.assert_close(statistics.unit_reach, statistics.unit * statistics.norm)


def test_what_a_normalising_dictionary_writes_is_measured_with_its_scale(model):
    dictionary = random_dictionary("resid_post.1", normalize_activations="layer_norm")
    tokens = model.tokenize(TEXTS)
    statistics = latent_statistics(model, dictionary, tokens, batch_size=2)
    written = dictionary.written(model.capture(tokens, [SITE])[SITE])[tokens.ordinary]
    torch.testing.assert_close(statistics.reach, written.amax(0) * statistics.norm)
    torch.testing.assert_close(statistics.unit_reach, _quantile(written) * statistics.norm, rtol=1 / 512, atol=0)


def _quantile(acts, share=0.95):
    """By sorting: the smallest value that the share of the positive activations does not exceed."""
    columns = [sorted(value for value in column if value > 0) for column in acts.T.tolist()]
    return torch.tensor([column[math.ceil(share * len(column)) - 1] if column else 0.0 for column in columns])


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_first_tokens_can_be_left_out_of_a_bottleneck_and_of_its_figures(model, side):
    """Beside a plain hook that writes the reconstruction from the third token on."""
    dictionary, tokens = random_dictionary("resid_post.1"), model.tokenize(TEXTS, side)
    place = tokens.attention_mask.cumsum(-1) - 1
    later = (place >= 3) & tokens.attention_mask.bool()
    seen = {}

    def bottleneck(x):
        seen["x"] = x
        return torch.where(later[..., None], dictionary.sae.decode(dictionary.sae.encode(x)), x)

    with edit_sites(model.layout, {SITE: bottleneck}):
        expected = model.logits(tokens)
    with splice(model, dictionary, error="drop", first=3):
        real = tokens.attention_mask.bool()
        torch.testing.assert_close(model.logits(tokens)[real], expected[real], rtol=1e-4, atol=1e-4)
    quality = splice_quality(model, dictionary, tokens, batch_size=3, first=3)
    assert quality.tokens == int(later.sum()) < splice_quality(model, dictionary, tokens).tokens
    x = seen["x"][later]
    gone = ((x - dictionary.sae.decode(dictionary.sae.encode(x))) ** 2).sum() / ((x - x.mean(0)) ** 2).sum()
    assert quality.fvu == pytest.approx(float(gone), rel=1e-4)
    counted = later[:, :-1] & later[:, 1:]
    loss = expected[:, :-1].log_softmax(-1).gather(-1, tokens.input_ids[:, 1:, None])[..., 0]
    assert quality.ce_spliced == pytest.approx(float(-loss[counted].mean()), rel=1e-4)
    with pytest.raises(UserError, match="first = 3"):
        with splice(model, dictionary, first=3):
            pass


def test_bad_input(model):
    tokens = model.tokenize(TEXTS)
    with pytest.raises(UserError, match="reads width 8"):
        splice_quality(model, random_dictionary("resid_post.1", d_in=8), tokens)
    with pytest.raises(UserError, match="batch size 0"):
        splice_quality(model, random_dictionary("resid_post.1"), tokens, batch_size=0)
    with pytest.raises(UserError, match="no ordinary token is followed"):
        splice_quality(model, random_dictionary("resid_post.1"), model.tokenize(["a", "b"]))
    nothing = Tokens(tokens.input_ids, tokens.attention_mask, torch.zeros_like(tokens.ordinary))
    with pytest.raises(UserError, match="only BOS and padding"):
        latent_statistics(model, random_dictionary("resid_post.1"), nothing)


def test_activations_that_are_not_finite_are_named(model):
    tokens = model.tokenize(["a dog", "the cat"])

    def overflow(x):
        x = x.clone()
        x[1, 3] = float("inf")
        return x

    message = r"activations at resid_post.1 of tiny-llama are NaN or infinite in '<bos>the cat'…, at position 3 \('e'\)"
    with edit_sites(model.layout, {SITE: overflow}):
        for measure in (latent_statistics, splice_quality):
            with pytest.raises(UserError, match=message):
                measure(model, standard(1.0), tokens)
        with pytest.raises(UserError, match=message):
            read_latents(model, standard(1.0), [0], tokens)
        with pytest.raises(UserError, match=message):
            record_latents(model, standard(1.0), tokens)


def test_a_threshold_that_was_never_estimated_is_warned_about(model, caplog):
    tokens, dictionary = model.tokenize(TEXTS), random_dictionary("resid_post.1", "jumprelu")
    latent_statistics(model, dictionary, tokens)
    assert not caplog.records
    dictionary.sae.threshold.data.zero_()
    latent_statistics(model, dictionary, tokens)
    assert "active latents per position on this text, and all of its thresholds are 0" in caplog.text
    dictionary.sae.threshold.data.fill_(1e-3)
    dictionary.sae.cfg.metadata.k = 2
    caplog.clear()
    active = float(latent_statistics(model, dictionary, tokens).frequency.sum())
    assert f"has {active:.1f} active latents per position on this text, and it was trained for 2" in caplog.text
