"""Edits of tiny models: exact writes in every layout, exact reverts, and refusals."""

from dataclasses import replace

import pytest
import torch
from tiny import byte_tokenizer, tiny_model

from saepatch import UserError
from saepatch.data.edit_requests import EditRequest
from saepatch.facts.contexts import Contexts, Prefixes, Sampled, answer_ids, sample_ids, subject_last
from saepatch.facts.covariances import Covariances
from saepatch.facts.delta import Delta, WeightChange, applied, edited
from saepatch.facts.methods import AlphaEdit, Emmet, Memit, Rome, edit_each, edit_facts
from saepatch.facts.projections import projection
from saepatch.facts.values import ValueSearch, find_values
from saepatch.model.sites import Site

TEXTS = [f"{a} is in the {b}." for a in ("cat", "dog", "ox", "Eiffel") for b in ("house", "garden", "big old city")]
BARE = Sampled(())
LOUVRE = EditRequest("The {} in", "Louvre", " R", " P", "louvre")  # the subject within every sliding window
PRADO = EditRequest("You see the {} in", "Prado", " OK", " Ma", "prado")
QUICK = ValueSearch(steps=4)
FAMILIES = ["llama", "gemma3_text", "gpt2", "gpt_neox", "qwen2"]


def covariances(model, layers=(1,), ridge=0.01):
    return Covariances.over(model, layers, TEXTS, ridge=ridge)


def bytes_of(model):
    return {name: weight.view(torch.uint8).clone() for name, weight in model.hf.state_dict().items()}


def same_bytes(model, before):
    return all(torch.equal(weight.view(torch.uint8), before[name]) for name, weight in model.hf.state_dict().items())


@pytest.mark.parametrize("family", FAMILIES)
def test_rome_writes_the_searched_value_in_every_layout(family):
    square = {"n_inner": 16} if family == "gpt2" else {}  # a square Conv1D: its shape shows no transposition
    model = tiny_model(family, **square)
    model.hf.double()
    rome = Rome(1, prefixes=BARE, search=QUICK)
    contexts = Contexts(model, [LOUVRE], Prefixes())
    at = projection(model, 1)
    value = find_values(contexts, at, QUICK)
    key = contexts.states(Site(1, "neurons"))[0, 0]
    wanted = at.value(key) + value.delta[0]
    delta = edit_facts(model, [LOUVRE], rome, covariances(model))
    assert value.delta.norm() > 0.1
    with edited(model, delta):
        assert (projection(model, 1).value(contexts.states(Site(1, "neurons"))[0, 0]) - wanted).abs().max() < 1e-9
    assert (projection(model, 1).value(key) - wanted).abs().max() > 1e-2


def literal_value(model, request, prefixes, layer, search, of_mlp):
    """δ and loss by plain hooks, whole passes of single rows and torch's Adam, at the subject's last token."""
    target = answer_ids(model, request.text, request.target)
    rows = [subject_last(model, prefix, request.prompt, request.subject) for prefix in prefixes]
    rows = [(ids + target[:-1], at) for ids, at in rows] + [subject_last(model, "", "{} is a", request.subject)]
    module = projection(model, layer).module if of_mlp else model.layout.blocks[layer]
    delta = torch.zeros(model.d_model, dtype=model.dtype, requires_grad=True)
    adam, start, before = torch.optim.Adam([delta], lr=search.lr), None, None
    for step in range(1, search.steps + 1):
        scores = []
        for ids, at in rows:

            def add(_module, _inputs, out, at=at):
                nonlocal start
                x = out[0] if isinstance(out, tuple) else out
                start = x[0, at].detach().clone() if start is None else start
                new = torch.cat([x[:, :at], x[:, at : at + 1] + delta, x[:, at + 1 :]], 1)
                return (new, *out[1:]) if isinstance(out, tuple) else new

            handle = module.register_forward_hook(add)
            with torch.enable_grad():
                scores.append(model.hf(torch.tensor([ids]), use_cache=False).logits[0].log_softmax(-1))
            handle.remove()
        before = scores[-1][-1].detach() if before is None else before
        new = scores[-1][-1]
        nll = [-own[-len(target) :].gather(-1, torch.tensor(target)[:, None]).mean() for own in scores[:-1]]
        loss = torch.stack(nll).mean() + search.kl * (new.exp() * (new - before)).sum()
        loss = loss + search.decay * delta.norm() / start.norm() ** 2
        if loss < search.stop or step == search.steps:
            break
        adam.zero_grad()
        loss.backward()
        adam.step()
        with torch.no_grad():
            delta.mul_((search.clamp * start.norm() / delta.norm()).clamp(max=1))
    return delta.detach(), float(loss.detach()), step


@pytest.mark.parametrize("family", FAMILIES)
def test_values_are_those_of_whole_passes_by_plain_hooks(family, monkeypatch):
    """Columns before the edited one come from a kept pass; facts of several lengths are searched together."""
    model = tiny_model(family)
    prefixes = ("", "A dog. ", "The big old ox. ")
    contexts = Contexts(model, [PRADO, LOUVRE], Prefixes((prefixes[:1], prefixes[1:])))
    for place in (projection(model, 1), Site(1)):
        found = find_values(contexts, place, QUICK)
        for number, request in enumerate((PRADO, LOUVRE)):
            delta, loss, steps = literal_value(model, request, prefixes, 1, QUICK, not isinstance(place, Site))
            assert torch.allclose(found.delta[number].float(), delta, atol=2e-3 * float(delta.abs().max()))
            assert float(found.loss[number]) == pytest.approx(loss, rel=1e-4)
            assert int(found.steps[number]) == steps
        monkeypatch.setattr("saepatch.facts.values.KeptRun.way", lambda self, site: "whole")
        whole = find_values(contexts, place, QUICK)
        monkeypatch.undo()
        assert torch.allclose(found.delta, whole.delta, atol=1e-3)


def test_a_search_runs_only_what_depends_on_the_change(monkeypatch):
    model, request = tiny_model("gpt2"), EditRequest("The big old {} in", "Louvre", " R", " P")
    contexts = Contexts(model, [request], Prefixes())
    width, seen = contexts.last[0] + 1, []
    find_values(contexts, Site(1), replace(QUICK, steps=1))
    handle = model.layout.blocks[2].register_forward_pre_hook(lambda _module, args: seen.append(args[0].shape[1]))
    find_values(contexts, Site(1), replace(QUICK, steps=3))
    handle.remove()
    assert max(seen) > width - 1  # the pass that is kept
    after = len(model.encode(request.text)) - width + len(answer_ids(model, request.text, request.target))
    essence = len(model.encode("Louvre is a")) - len(model.encode("Louvre")) + 1
    assert seen[-3:] == [max(after, essence)] * 3


def test_the_search_lowers_the_loss_and_keeps_delta_short():
    model = tiny_model("gpt2")
    contexts = Contexts(model, [LOUVRE, PRADO], Prefixes())
    first = find_values(contexts, Site(1), ValueSearch(steps=1))
    assert first.delta.abs().max() == 0
    found = find_values(contexts, Site(1), ValueSearch(steps=20, clamp=0.75))
    assert (found.loss < first.loss).all()
    states = contexts.states(Site(1))[:, 0]
    assert (found.delta.norm(dim=1) <= 0.75 * states.norm(dim=1) * 1.0001).all()


def test_the_loss_is_that_of_the_definition():
    model = tiny_model("gpt2")
    contexts = Contexts(model, [PRADO], Prefixes((("", "A dog. "),)))
    loss = float(find_values(contexts, Site(1), ValueSearch(steps=1)).loss)
    nll = 0.0
    for prefix in ("", "A dog. "):
        prompt = prefix + PRADO.text
        ids, target = model.encode(prompt), answer_ids(model, prompt, PRADO.target)
        logits = model.logits(model.pad([ids + target]))[0].log_softmax(-1)
        nll -= sum(float(logits[len(ids) - 1 + i, token]) for i, token in enumerate(target)) / len(target) / 2
    assert loss == pytest.approx(nll, abs=1e-4)  # with δ = 0 the other terms vanish


def test_100_edits_are_reverted_bit_for_bit_in_bfloat16():
    model = tiny_model("llama")
    model.hf.bfloat16()
    before, hash_before = bytes_of(model), model.fingerprint
    delta = Delta.none(model, "random")
    for number in range(100):
        generator = torch.Generator().manual_seed(number)
        left, right = (torch.randn(n, 1, dtype=torch.float64, generator=generator) for n in (16, 32))
        change = WeightChange(number % 3, 1e-3 * left, right, right)
        delta = delta.then([change], [str(number)])
        with edited(model, delta):
            assert model.fingerprint != hash_before
    assert same_bytes(model, before)
    assert model.fingerprint == hash_before
    assert len(delta.examples) == 100
    weight = projection(model, 0).weight.detach().clone()
    with edited(model, delta):  # small changes add up before they are rounded to bfloat16
        exact = (weight.double() + delta.changes[0].matrix).to(torch.bfloat16)
        assert torch.equal(projection(model, 0).weight, exact)


def test_weights_are_restored_after_an_exception_and_foreign_changes_are_noticed():
    model = tiny_model("llama")
    before, hash_before = bytes_of(model), model.fingerprint
    delta = Delta.none(model, "x").then(
        [WeightChange(0, torch.ones(16, 1).double(), *[torch.ones(32, 1).double()] * 2)]
    )
    with pytest.raises(KeyError):
        with edited(model, delta):
            raise KeyError("user code")
    assert same_bytes(model, before)
    assert model.fingerprint == hash_before
    with edited(model, delta), torch.no_grad():
        model.hf.get_input_embeddings().weight.add_(1)
    assert model.fingerprint != hash_before


def test_a_delta_is_saved_loaded_and_refused_for_other_weights(tmp_path):
    model = tiny_model("gpt2")
    delta = edit_facts(model, [LOUVRE, PRADO], Memit((0, 1), prefixes=BARE, search=QUICK), covariances(model, (0, 1)))
    delta.save(tmp_path / "delta.safetensors")
    loaded = Delta.load(tmp_path / "delta.safetensors")
    assert (loaded.model_hash, loaded.method, loaded.examples) == (model.fingerprint, "memit", ("louvre", "prado"))
    for own, other in zip(delta.changes, loaded.changes, strict=True):
        assert torch.equal(own.matrix, other.matrix)
        assert own.keys.shape == (64, 2)
    tokens = model.tokenize([LOUVRE.text])
    with edited(model, delta):
        logits = model.next_logits(tokens)
        with pytest.raises(UserError, match="another model|leave any other edit"):
            with edited(model, delta):
                pass
    with edited(model, loaded):
        assert torch.equal(model.next_logits(tokens), logits)
    with pytest.raises(UserError, match="belongs to tiny-gpt2"):
        with edited(tiny_model("gpt2", seed=1), loaded):
            pass
    (tmp_path / "broken.safetensors").write_bytes(b"no")
    for name in ("broken", "missing"):
        with pytest.raises(UserError, match="cannot read a delta"):
            Delta.load(tmp_path / f"{name}.safetensors")


@pytest.mark.parametrize("family", ["llama", "gpt2", "gemma3_text"])
def test_methods_that_spread_bring_the_last_layer_to_its_value(family):
    """EMMET meets keys exactly; so does MEMIT where the reference text does not count."""
    model = tiny_model(family)
    model.hf.double()
    reference = covariances(model, (0, 1))
    contexts = Contexts(model, [LOUVRE, PRADO], Prefixes())
    wanted = contexts.states(Site(1))[:, 0] + find_values(contexts, Site(1), QUICK).delta
    before = (contexts.states(Site(1))[:, 0] - wanted).norm()
    for method in (Emmet((0, 1), prefixes=BARE, search=QUICK), Memit((0, 1), 1e-9, prefixes=BARE, search=QUICK)):
        with edited(model, edit_facts(model, [LOUVRE, PRADO], method, reference)):
            missed = (contexts.states(Site(1))[:, 0] - wanted).norm()
        # behind a norm only the direction can be met
        assert missed < (1e-6 if family != "gemma3_text" else 0.5) * before


def test_alphaedit_leaves_kept_directions_and_earlier_edits():
    model = tiny_model("llama")
    reference = covariances(model, ridge=0.0)
    method = AlphaEdit((1,), threshold=0.05, prefixes=BARE, search=QUICK)
    first = edit_facts(model, [LOUVRE], method, reference)
    both = edit_facts(model, [PRADO], method, reference, after=first)
    assert both.examples == ("louvre", "prado")
    kept = torch.eye(32, dtype=torch.float64) - reference.null_space(1, 0.05)
    assert (both.changes[0].matrix @ kept).abs().max() < 1e-6 * both.changes[0].norm
    added = both.changes[0].matrix - first.changes[0].matrix
    key = first.changes[0].keys[:, 0]
    without = edit_facts(model, [PRADO], method, reference).changes[0].matrix
    assert (added @ key).norm() < (without @ key).norm()
    with pytest.raises(UserError, match="no eigenvalue"):
        edit_facts(model, [LOUVRE], replace(method, threshold=1e-9), covariances(model))


def test_edits_made_each_alone_are_those_made_one_by_one():
    model = tiny_model("llama")
    reference = covariances(model)
    rome = Rome(1, prefixes=Sampled(((3, 2),), apart=False), search=QUICK)
    deltas = edit_each(model, [LOUVRE, PRADO], rome, reference)
    for request, delta in zip([LOUVRE, PRADO], deltas, strict=True):
        alone = edit_facts(model, [request], rome, reference)
        assert torch.allclose(delta.changes[0].matrix, alone.changes[0].matrix, atol=1e-4)
    original = edit_each(model, [LOUVRE, PRADO], replace(rome, original=True), reference)
    ratio = original[0].changes[0].matrix / deltas[0].changes[0].matrix
    assert ratio.std() < 1e-6 * ratio.abs().mean()  # the same direction, scaled by the mismatch of keys
    assert abs(float(ratio.mean()) - 1) > 1e-3


def test_covariances_leave_out_padding_and_bos_and_are_kept_by_weights(tmp_path):
    model = tiny_model("gpt2")
    measured = Covariances.over(model, [0, 1], TEXTS, cache=tmp_path, batch_size=5)
    for layer in (0, 1):
        keys = torch.cat(
            [
                model.capture(model.tokenize([text]), [Site(layer, "neurons")])[Site(layer, "neurons")][0, 1:]
                for text in TEXTS
            ]
        ).double()
        assert measured.tokens == len(keys)
        assert torch.allclose(measured.matrices[layer], keys.T @ keys / len(keys), atol=1e-6)
        assert torch.equal(measured.matrices[layer], measured.matrices[layer].T)
    assert len(list(tmp_path.iterdir())) == 2
    calls = []
    model.hf.register_forward_pre_hook(lambda *_: calls.append(1))
    again = Covariances.over(model, [1], TEXTS, cache=tmp_path)
    assert torch.equal(again.matrices[1], measured.matrices[1])
    assert not calls
    change = WeightChange(0, torch.ones(16, 1).double(), torch.ones(64, 1).double(), torch.ones(64, 1).double())
    with applied(model, [change]):  # the same name, other weights
        stale = Covariances.over(model, [1], TEXTS, cache=tmp_path)
    assert calls
    assert stale.model_hash != measured.model_hash
    with pytest.raises(UserError, match="covariances belong to weights"):
        edit_facts(model, [LOUVRE], Rome(1, prefixes=BARE), stale)


def test_covariances_of_other_tokens_are_not_mixed_up(tmp_path):
    model = tiny_model("gpt2", vocab_size=260)
    other = replace(model, tokenizer=byte_tokenizer())
    other.tokenizer.add_tokens([TEXTS[0][:3]])
    assert other.fingerprint == model.fingerprint
    first, second = (Covariances.over(each, [1], TEXTS, cache=tmp_path) for each in (model, other))
    assert second.tokens < first.tokens
    assert not torch.equal(first.matrices[1], second.matrices[1])
    assert len(list(tmp_path.iterdir())) == 2


def test_a_singular_covariance_is_refused_and_the_identity_is_warned_of(caplog):
    model = tiny_model("llama")
    few = Covariances.over(model, [1], ["ab"])
    with pytest.raises(UserError, match="singular"):
        edit_facts(model, [LOUVRE], Rome(1, prefixes=BARE, search=QUICK), few)
    edit_facts(model, [LOUVRE], Rome(1, prefixes=BARE, search=QUICK), Covariances.identity(model, [1]))
    assert "neither ROME nor MEMIT" in caplog.text


def test_what_cannot_be_edited_is_refused():
    model = tiny_model("llama")
    reference = covariances(model)
    with pytest.raises(UserError, match="the model has 3 layers"):
        edit_facts(model, [LOUVRE], Rome(7), reference)
    with pytest.raises(UserError, match="no covariance of layer 2"):
        edit_facts(model, [LOUVRE], Rome(2, prefixes=BARE, search=QUICK), reference)
    with pytest.raises(UserError, match="no requests"):
        edit_facts(model, [], Rome(1), reference)
    with pytest.raises(UserError, match="rising order"):
        Memit((2, 1))
    with pytest.raises(UserError, match=r"write \{\} once"):
        EditRequest("The Louvre is in", "Louvre", " R", " P")
    with pytest.raises(UserError, match="is the true answer"):
        EditRequest("The {} is in", "Louvre", " P", " P")


def test_the_subjects_last_token_is_found_behind_prefixes():
    model = tiny_model("llama")  # a token is a byte, and BOS comes first
    ids, last = subject_last(model, "The Ox. ", "An {} is an animal", "Ox")
    assert model.tokenizer.decode(ids[last - 1 : last + 1]) == "Ox"
    assert last == len("The Ox. An Ox")
    assert subject_last(model, "", "Ox {} of the Ox", "Ox")[1] == len("Ox Ox")


def test_sampling_on_a_cache_draws_what_whole_passes_draw(monkeypatch):
    model = tiny_model("gemma3_text")
    prompts = ["A dog", "The big old ox in the", "I"]

    def drawn():
        generators = [torch.Generator().manual_seed(seed) for seed in range(3)]
        return sample_ids(model, prompts, 6, 3, generators)

    on_cache = drawn()
    monkeypatch.setattr(type(model), "takes_cache", False)
    assert drawn() == on_cache
    assert [len(row) for row in on_cache] == [6, 6, 6]


def test_prefixes_are_sampled_once_from_the_same_weights(monkeypatch):
    model = tiny_model("llama")
    sampled = Sampled(((3, 2),))
    first = sampled.prefixes(model)
    monkeypatch.setattr("saepatch.facts.contexts.sample_ids", lambda *_: pytest.fail("sampled again"))
    assert sampled.prefixes(model) is first
    monkeypatch.undo()
    with torch.no_grad():
        model.hf.get_output_embeddings().weight.mul_(-1)
    assert sampled.prefixes(model) != first


def test_one_key_writes_the_mean_and_mixed_keys_miss_it():
    """Behind prefixes, r-ROME meets the mean key; the original's update is scaled to meet the bare prompt's."""
    model = tiny_model("llama")
    model.hf.double()
    reference = covariances(model)
    sampled = Sampled(((3, 4),), apart=False)
    contexts, at = Contexts(model, [LOUVRE], sampled.prefixes(model)), projection(model, 1)
    wanted = find_values(contexts, at, QUICK).delta[0]
    states = contexts.states(Site(1, "neurons"))[0]
    bare, mean = states[0], states.mean(0)
    assert (bare - mean).norm() > 0.01 * mean.norm()
    by_mean = torch.linalg.solve(reference.matrix(1), mean)
    for original, met, other in ((False, mean, bare), (True, bare, mean)):
        rome = Rome(1, original, sampled, QUICK)
        change = edit_facts(model, [LOUVRE], rome, reference).changes[0].matrix
        assert torch.allclose(change @ met, wanted, rtol=1e-6, atol=1e-9)
        assert (change @ other - wanted).norm() > 1e-3 * wanted.norm()
        scale = (mean @ by_mean) / (bare @ by_mean) if original else 1.0
        assert torch.allclose(change @ mean, scale * wanted, rtol=1e-6, atol=1e-9)
