"""SAEBench's core evaluation beside our figures: the same where they mean the same."""

import pytest

from experiments.benchmarks import sae_bench
from experiments.benchmarks.sae_bench import SaeBenchConfig, Store, compared, rows_of, theirs
from saepatch.dictionaries.loading import load_sae
from saepatch.errors import UserError
from saepatch.measure.quality import splice_quality
from saepatch.model.loading.load import load_model


def test_rows_are_full_and_begin_with_bos():
    model = load_model("organism")
    tokens = rows_of(SaeBenchConfig(rows=3, context=20), model)
    assert tokens.input_ids.shape == (3, 20)
    assert tokens.attention_mask.all()
    assert (tokens.input_ids[:, 0] == model.bos_id).all()
    assert tokens.ordinary.sum() == 3 * 19
    with pytest.raises(UserError, match="lower --rows"):
        rows_of(SaeBenchConfig(rows=10**6), model)
    store = Store(tokens.input_ids, 2)
    assert [len(store.get_batch_tokens(2)) for _ in range(2)] == [2, 1]
    store.reset_input_dataset()
    assert store.get_batch_tokens(2).equal(tokens.input_ids[:2])


def test_what_is_missing_is_named(monkeypatch):
    monkeypatch.setattr(sae_bench, "find_spec", lambda library: None)
    with pytest.raises(UserError, match="pip install --no-deps sae-bench"):
        sae_bench.main(SaeBenchConfig())
    for wrong in ({"rows": 0}, {"context": 2}):
        with pytest.raises(UserError, match="use at least"):
            SaeBenchConfig(**wrong)


def test_figures_that_mean_the_same_agree():
    pytest.importorskip("sae_bench", reason="SAEBench is not installed: pip install --no-deps sae-bench")
    model, dictionary = load_model("organism"), load_sae("organism", "resid_post.3")
    tokens = rows_of(SaeBenchConfig(rows=8, context=32), model)
    rows = list(compared(splice_quality(model, dictionary, tokens), theirs(model, dictionary, tokens, 4)))
    for name, ours, other in rows[:5]:
        assert ours == pytest.approx(other, rel=1e-4), name
    assert [name.split()[0] for name, *_ in rows[5:]] == ["KL(model", "1", "1"]  # other definitions: docs/sae-bench.md
