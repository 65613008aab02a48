"""Fine-tuning through the splice: its gradients by hand, what it improves, and what it leaves of the model."""

from itertools import cycle

import pytest
import torch
from tiny import D_MODEL, random_sae, tiny_model
from torch import Tensor

from saepatch.dictionaries.dictionary import Dictionary
from saepatch.errors import UserError
from saepatch.measure.quality import splice_quality
from saepatch.model.hooks import capture
from saepatch.model.loading.load import load_model
from saepatch.model.sites import Site
from saepatch.organism import texts
from training.config import TrainingConfig
from training.steps import finetune as finetuning
from training.steps.finetune import finetune

pytestmark = pytest.mark.whole

TEXTS = ["the cat sat on the mat", "a dog", "birds fly high up in the sky", "two of them"]
FOREVER = 10**9


def weights(d_in: int = D_MODEL, d_sae: int = 32, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    W = torch.nn.functional.normalize(torch.randn(d_sae, d_in, generator=generator), dim=-1)
    return [W.clone().requires_grad_(), W.clone().requires_grad_(), torch.zeros(d_in, requires_grad=True)]


def topk(parameters: list[Tensor], k: int = 4):
    W_enc, W_dec, b_dec = parameters

    def reconstruct(x: Tensor) -> Tensor:
        values, at = ((x - b_dec) @ W_enc.T).relu().topk(k)
        return torch.einsum("bpk,bpkd->bpd", values, W_dec[at]) + b_dec

    return reconstruct


def config(**changes) -> TrainingConfig:
    return TrainingConfig(**({"finetune_tokens": FOREVER, "finetune_lr": 1e-3, "clip": 0.0} | changes))


def first_gradients(model, site, parameters, tokens, monkeypatch, reconstruct=None):
    """The gradients of the first step, and its figures."""
    caught = []
    monkeypatch.setattr(finetuning, "_step", lambda _, __, gradients, *rest: caught.extend(gradients))
    steps = finetune(model, site, reconstruct or topk(parameters), parameters, iter([tokens]), config(), lambda: None)
    return caught, next(steps)


def by_hand(model, site, reconstruct, parameters, tokens):
    """Both losses in one graph of a whole pass, hooked with plain torch."""
    ordinary = tokens.ordinary
    seen = {}

    def hook(_module, _args, output):
        x = output[0] if isinstance(output, tuple) else output
        seen["x"], seen["r"] = x, reconstruct(x)
        new = torch.where(ordinary[..., None], seen["r"], x)
        return (new, *output[1:]) if isinstance(output, tuple) else new

    inputs = model.inputs(tokens)
    plain = model.hf(**inputs).logits.detach()[ordinary].log_softmax(-1)
    handle = model.layout.module(site).register_forward_hook(hook)
    spliced = model.hf(**inputs).logits[ordinary].log_softmax(-1)
    handle.remove()
    x, r = seen["x"][ordinary], seen["r"][ordinary]
    mse = (x - r).pow(2).sum(-1).mean()
    variance = (x - x.mean(0)).pow(2).sum(-1).mean()
    kl = (plain.exp() * (plain - spliced)).sum(-1).mean()
    loss = (mse + (mse / kl).detach() * kl) / variance
    return (
        torch.autograd.grad(loss, parameters, allow_unused=True),
        float(kl.detach()),
        float((mse / variance).detach()),
    )


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("site", [Site(0), Site(2), Site(1, "mlp_out"), Site(1, "attn_out")], ids=str)
@pytest.mark.parametrize("side", ["left", "right"])
def test_gradients_are_those_of_one_whole_graph(family, site, side, monkeypatch):
    model = tiny_model(family)
    tokens, parameters = model.tokenize(TEXTS, side=side), weights()
    expected, kl, fvu = by_hand(model, site, topk(parameters), parameters, tokens)
    for at_once in (2**27, 1):  # all rows, and one at a time
        monkeypatch.setattr(finetuning, "_LOGITS_AT_ONCE", at_once)
        found, figures = first_gradients(model, site, parameters, tokens, monkeypatch)
        for one, other in zip(found, expected, strict=True):
            torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-6 * float(other.abs().max()))
        assert figures["kl"] == pytest.approx(kl, rel=1e-4)
        assert figures["fvu"] == pytest.approx(fvu, rel=1e-4)
        assert figures["tokens"] == int(tokens.ordinary.sum())


def test_a_model_that_cannot_resume_is_run_whole(monkeypatch):
    model, parameters = tiny_model(), weights()
    tokens = model.tokenize(TEXTS)
    quick, _ = first_gradients(model, Site(1), parameters, tokens, monkeypatch)
    monkeypatch.setattr(finetuning, "can_skip", lambda *_: False)
    whole, _ = first_gradients(model, Site(1), parameters, tokens, monkeypatch)
    for one, other in zip(quick, whole, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-7)


def test_positions_beside_the_text_count_for_nothing(monkeypatch):
    """What the dictionary makes of BOS and padding does not reach a loss."""
    model, parameters = tiny_model(), weights()
    tokens = model.tokenize(TEXTS)

    def spoilt(x):
        return torch.where(tokens.ordinary[..., None], topk(parameters)(x), 1e3 * x + parameters[2])

    plain, figures = first_gradients(model, Site(1), parameters, tokens, monkeypatch)
    other, others = first_gradients(model, Site(1), parameters, tokens, monkeypatch, spoilt)
    assert figures == others
    for one, two in zip(plain, other, strict=True):
        torch.testing.assert_close(one, two)


def test_a_parameter_without_a_say_is_left_as_it_is():
    model, parameters = tiny_model(), weights()
    silent = torch.ones(3, requires_grad=True)
    steps = finetune(
        model, Site(1), topk(parameters), [*parameters, silent], cycle([model.tokenize(TEXTS)]), config(), lambda: None
    )
    for _ in range(3):
        next(steps)
    assert torch.equal(silent, torch.ones(3))


def test_the_rate_falls_to_zero_and_the_tokens_are_kept_to():
    model, parameters = tiny_model(), weights()
    tokens = model.tokenize(TEXTS)
    n, after = int(tokens.ordinary.sum()), []
    steps = finetune(
        model,
        Site(1),
        topk(parameters),
        parameters,
        cycle([tokens]),
        config(finetune_tokens=4 * n, clip=1.0),
        lambda: after.append(1),
    )
    found = list(steps)
    assert [row["tokens"] for row in found] == [n, 2 * n, 3 * n, 4 * n]
    assert [row["lr"] for row in found] == pytest.approx([1e-3, 0.75e-3, 0.5e-3, 0.25e-3])
    assert len(after) == 4


def test_too_little_text_and_bad_losses_are_errors():
    model, parameters = tiny_model(), weights()
    tokens = model.tokenize(TEXTS)
    with pytest.raises(UserError, match="the text ended after"):
        list(finetune(model, Site(1), topk(parameters), parameters, iter([tokens]), config(), lambda: None))
    with torch.no_grad():
        parameters[2].fill_(float("nan"))
    with pytest.raises(UserError, match="lower finetune_lr"):
        next(finetune(model, Site(1), topk(parameters), parameters, iter([tokens]), config(), lambda: None))


@pytest.mark.parametrize("trainable", [False, True])
def test_the_model_is_as_it_was(trainable):
    """Its weights, their flags and gradients, its hooks and forwards; after an exception, too."""
    model, parameters = tiny_model(), weights()
    for weight in model.hf.parameters():
        weight.requires_grad_(trainable)
    before = {name: value.clone() for name, value in model.hf.state_dict().items()}
    tokens = model.tokenize(TEXTS)
    next(finetune(model, Site(1), topk(parameters), parameters, iter([tokens]), config(), lambda: None))

    def broken(x):
        raise KeyError("a bug")

    with pytest.raises(KeyError):
        next(finetune(model, Site(1), broken, parameters, iter([tokens]), config(), lambda: None))
    for name, value in model.hf.state_dict().items():
        assert torch.equal(value, before[name]), name
    for weight in model.hf.parameters():
        assert weight.grad is None
        assert weight.requires_grad == trainable
    for module in model.hf.modules():
        assert not module._forward_hooks
        assert not module._forward_pre_hooks
        assert "forward" not in module.__dict__
        assert not module.training
    assert torch.is_grad_enabled()


@pytest.fixture(scope="module")
def organism():
    return load_model("organism")


def test_an_undertrained_dictionary_improves_on_held_out_text(organism):
    model, site, k = organism, Site(3), 8
    documents = texts()
    train, held_out = model.tokenize(documents[:48]), model.tokenize(documents[100:124])
    with torch.no_grad():
        x = capture(model.hf, model.layout, [site], model.inputs(train))[site][train.ordinary]
    parameters = weights(model.d_model, 256)
    optimiser = torch.optim.Adam(parameters, lr=3e-3)
    for step in range(150):
        batch = x[torch.randint(len(x), (256,), generator=torch.Generator().manual_seed(step))][None]
        loss = (topk(parameters, k)(batch) - batch).pow(2).sum(-1).mean()
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()

    def quality():
        W_enc, W_dec, b_dec = (value.detach().clone() for value in parameters)
        sae = random_sae("topk", model.d_model, 256, k=k)
        sae.load_state_dict({"W_enc": W_enc.T.contiguous(), "W_dec": W_dec, "b_dec": b_dec, "b_enc": torch.zeros(256)})
        return splice_quality(model, Dictionary(sae, site, "undertrained"), held_out)

    before = quality()
    batches = cycle(list(train.batches(8)))
    n = 36 * int(train.ordinary.sum()) // 6
    list(
        finetune(
            model, site, topk(parameters, k), parameters, batches, config(finetune_tokens=n, clip=1.0), lambda: None
        )
    )
    after = quality()
    assert after.kl < 0.92 * before.kl
    assert after.ce_recovered > before.ce_recovered
