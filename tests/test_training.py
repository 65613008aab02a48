"""Training: the stream of activations, the loop, what is saved, and what the command line refuses."""

import json
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from tiny import tiny_model

from saepatch.dictionaries import load_sae, load_saes
from saepatch.errors import UserError
from saepatch.hooks import capture
from saepatch.sites import Site
from training.__main__ import main, read
from training.activations import ActivationStream, rows, split, texts, token_batches
from training.config import SAEConfig, TrainingConfig
from training.trainer import Learner, schedule, train_saes

ROOT = Path(__file__).parents[1]
SITES = [Site(0), Site(2), Site(1, "mlp_out")]
WORDS = ["the", "cat", "sat", "on", "a", "mat", "while", "birds", "fly", "high", "up", "two", "dogs", "run", "home"]
STORIES = ROOT.parent / "shared/models/stories260K"
STORY_TEXTS = ROOT.parent / "shared/data/tinystories_1000.jsonl"


def documents(n=60, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        " ".join(WORDS[i] for i in torch.randint(len(WORDS), (3 + j % 15,), generator=generator)) + f" {j}"
        for j in range(n)
    ]


def small(**changes):
    options = {
        "tokens": 8192,
        "batch_size": 256,
        "context": 32,
        "forward_tokens": 512,
        "buffer": 1024,
        "held_out": 0.1,
        "eval_tokens": 500,
        "log_every": 8,
        "sae": SAEConfig(k=4, d_sae=48, dead_after=4000),
    }
    return TrainingConfig(**(options | changes))


@pytest.fixture(scope="module")
def model():
    return tiny_model()


@pytest.fixture(scope="module")
def trained(model, tmp_path_factory):
    out = tmp_path_factory.mktemp("run") / "saes"
    return out, train_saes(model, documents(), small(data="made up"), out)


def stream(model, **changes):
    options = {"sites": SITES, "batch_size": 128, "context": 32, "forward_tokens": 512, "buffer": 512, "epochs": 1}
    return ActivationStream(model, documents(), **(options | changes))


def assert_same_rows(got, want):
    """The same rows up to order and rounding (sorting would trip over near ties)."""
    assert got.shape == want.shape
    distance = torch.cdist(got, want)
    torch.testing.assert_close(got, want[distance.argmin(1)], atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(want, got[distance.argmin(0)], atol=1e-4, rtol=1e-4)


@pytest.fixture(scope="module")
def plain(model):
    """Activations by one forward a row, without padding, BOS left out."""
    out = {site: [] for site in SITES}
    for row in rows(model, documents(), context=32):
        seen = capture(model.hf, model.layout, SITES, {"input_ids": torch.tensor([row])}, stop=False)
        for site, x in seen.items():
            out[site].append(x[0, 1:])
    return {site: torch.cat(parts) for site, parts in out.items()}


# Activations


def test_activations_are_those_of_a_plain_forward(model, plain):
    batches = list(stream(model))
    for site in SITES:
        assert {len(batch[site]) for batch in batches[:-1]} == {128}
        assert_same_rows(torch.cat([batch[site] for batch in batches]), plain[site])


def test_sites_of_a_batch_are_of_the_same_tokens(model, plain):
    batch = next(iter(stream(model)))
    token = torch.cdist(batch[SITES[1]], plain[SITES[1]]).argmin(-1)
    for site in SITES:
        torch.testing.assert_close(batch[site], plain[site][token], atol=1e-4, rtol=1e-4)


def test_order_follows_from_the_seed(model, plain):
    first, again, other = (list(stream(model, seed=seed)) for seed in (0, 0, 1))
    assert all(torch.equal(a[site], b[site]) for a, b in zip(first, again, strict=True) for site in SITES)
    assert not torch.equal(first[0][SITES[0]], other[0][SITES[0]])
    assert not torch.allclose(first[0][SITES[0]], plain[SITES[0]][:128])


@pytest.mark.parametrize("sizes", [{"forward_tokens": 40}, {"batch_size": 64}, {"buffer": 100_000}])
def test_sizes_change_the_order_alone(model, plain, sizes):
    assert_same_rows(torch.cat([batch[SITES[1]] for batch in stream(model, **sizes)]), plain[SITES[1]])


def test_text_is_read_again_when_it_ends(model):
    endless = iter(ActivationStream(model, documents(5), SITES[:1], batch_size=64, context=32, buffer=128))
    batches = [next(endless)[SITES[0]] for _ in range(40)]
    assert {len(batch) for batch in batches} == {64}
    tokens = sum(len(model.encode(text)) - 1 for text in documents(5))
    # Rounding differs with the rows beside one, so distinct activations are told apart at a coarser grain.
    assert torch.cat(batches).round(decimals=3).unique(dim=0).shape[0] <= 1.2 * tokens


def test_rows_begin_with_bos_and_lose_no_token(model):
    docs = [*documents(8), "x" * 100]
    ids = [model.encode(text)[1:] for text in docs]
    cut = rows(model, docs, context=16)
    assert all(row[0] == model.bos_id and model.bos_id not in row[1:] and len(row) <= 16 for row in cut)
    assert [token for row in cut for token in row[1:]] == [token for document in ids for token in document]
    packed = rows(model, docs, context=16, pack=True)
    assert {len(row) for row in packed[:-1]} == {16}
    assert [t for row in packed for t in row if t != model.bos_id] == [t for document in ids for t in document]


def test_batches_keep_to_their_size(model):
    ids = rows(model, documents(), context=32)
    batches = list(token_batches(model, ids, forward_tokens=100))
    assert all(batch.input_ids.numel() <= 100 for batch in batches)
    assert sum(int(batch.attention_mask.sum()) for batch in batches) == sum(map(len, ids))


def test_held_out_text_is_never_trained_on():
    docs = documents(50) * 3 + ["often"] * 200
    train, held = split(docs, 0.1, seed=0)
    assert not set(train) & set(held)
    assert set(train) | set(held) == set(docs)
    assert len(held) == len(set(held)) == 5
    assert split(docs, 0.1, seed=0)[1] == held != split(docs, 0.1, seed=1)[1]
    assert list(train[2:4]) == [train[2], train[3]]
    assert len(split(["one", "two"], 0.99, seed=0)[0]) == 1
    with pytest.raises(UserError, match="none to train on"):
        split(["same", "same"], 0.5, seed=0)


@pytest.mark.parametrize("kind", ["jsonl", "txt", "parquet", "folder"])
def test_texts_of_every_format(tmp_path, kind):
    import pyarrow as pa
    import pyarrow.parquet as pq

    lines = "".join(json.dumps({"story": text}) + "\n" for text in ["one", "", "two"])
    if kind == "jsonl":
        (tmp_path / "a.jsonl").write_text(lines)
        found = texts(str(tmp_path / "a.jsonl"), "story")
    elif kind == "txt":
        (tmp_path / "a.txt").write_text("one\n\ntwo\n")
        found = texts(str(tmp_path / "a.txt"))
    elif kind == "parquet":
        pq.write_table(pa.table({"story": ["one", None, "two"]}), tmp_path / "a.parquet")
        found = texts(str(tmp_path / "a.parquet"), "story")
    else:
        (tmp_path / "a.jsonl").write_text(json.dumps({"story": "one"}) + "\n")
        (tmp_path / "b.jsonl").write_text(json.dumps({"story": "two"}) + "\n")
        found = texts(str(tmp_path), "story")
    assert list(found) == ["one", "two"]
    assert len(found) == 2


# The loop and what it saves


def test_what_a_run_leaves(trained, model):
    out, found = trained
    files = {"config.yaml", "metrics.jsonl", "metrics.summary.json", "summary.json"}
    assert {p.name for p in out.iterdir()} == files | {"resid_post.0", "resid_post.1", "resid_post.2"}
    summary = json.loads((out / "summary.json").read_text())
    for site, row in found.items():
        assert json.loads((out / str(site) / "metrics.json").read_text()) == row == summary["sites"][str(site)]
        assert {"fvu", "l0", "alive_share", "dense_share", "kl", "tokens", "seconds", "identity_error"} <= row.keys()
        assert {"ce_model", "ce_spliced", "ce_ablated", "ce_recovered"} <= row.keys()
        metadata = json.loads((out / str(site) / "cfg.json").read_text())["metadata"]
        assert metadata["hook_name"] == site.hook_name
        assert metadata["model_fingerprint"] == model.fingerprint
        assert metadata["dataset_path"] == "made up"
        assert metadata["training_tokens"] == 8192
        assert metadata["prepend_bos"] is True
        assert metadata["metrics"] == row
    assert read([str(out / "config.yaml")]).to_dict() == small(data="made up").to_dict()
    log = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in log] == [256, 2304, 4352, 6400, 8192]
    assert log[-1]["resid_post.1/fvu"] < 0.7 * log[0]["resid_post.1/fvu"]


def test_training_helps(trained, model, tmp_path):
    _, found = trained
    untrained = train_saes(model, documents(), small(lr=1e-12, sites=["resid_post.1"]), tmp_path / "untrained")
    assert found[Site(1)]["fvu"] < 0.7 * untrained[Site(1)]["fvu"]
    assert found[Site(1)]["kl"] < untrained[Site(1)]["kl"]
    assert found[Site(1)]["identity_error"] < 1e-4


def test_saved_is_what_was_trained(model, tmp_path):
    from sae_lens import SAE

    x = torch.cat([batch[Site(1)] for batch in stream(model, sites=[Site(1)])])
    learner = Learner.new(x, 48, SAEConfig(k=4), seed=0)
    for step in range(30):
        learner.step(x, 1e-2, step)
    with torch.no_grad():
        acts = learner.sae.encode(x * learner.scale)
        decoded = learner.sae.decode(acts) / learner.scale
    learner.finish().save_model(tmp_path)
    (cfg := json.loads((tmp_path / "cfg.json").read_text()))["metadata"]["hook_name"] = Site(1).hook_name
    (tmp_path / "cfg.json").write_text(json.dumps(cfg))
    theirs, ours = SAE.load_from_disk(tmp_path), load_sae(str(tmp_path)).encode(x[None])
    torch.testing.assert_close(theirs.encode(x), acts / learner.scale, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(theirs.decode(theirs.encode(x)), decoded, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.acts[0], acts / learner.scale, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(ours.reconstruction[0], decoded, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(theirs.W_dec.norm(dim=-1), torch.ones(48))
    assert theirs.cfg.normalize_activations == "none"
    assert theirs.cfg.rescale_acts_by_decoder_norm is False


def test_a_run_is_repeatable_and_sites_do_not_disturb_each_other(trained, model, tmp_path):
    out, found = trained
    alone = train_saes(model, documents(), small(sites=["resid_post.1"]), tmp_path / "alone")
    first, second = load_saes(str(out))[Site(1)], load_saes(str(tmp_path / "alone"))[Site(1)]
    assert first.fingerprint == second.fingerprint
    assert alone[Site(1)]["fvu"] == found[Site(1)]["fvu"]


def test_planted_features_are_found():
    """Sparse sums of known directions: the decoder's rows become those directions."""
    generator = torch.Generator().manual_seed(0)
    truth = torch.nn.functional.normalize(torch.randn(48, 32, generator=generator), dim=-1)
    chosen = torch.rand(20_480, 48, generator=generator).argsort(-1)[:, :3]
    strength = torch.zeros(20_480, 48).scatter_(-1, chosen, 1 + torch.rand(20_480, 3, generator=generator))
    x = 7 * (strength @ truth + 0.5)
    learner = Learner.new(x, 96, SAEConfig(k=3, dead_after=5000), seed=0)
    steps = 400
    for step in range(steps):
        start = step * 256 % len(x)
        learner.step(x[start : start + 256], 5e-3 * schedule(step, steps, 0.02, 0.3), step)
    cosine = (truth @ learner.finish().W_dec.T).amax(-1)
    assert cosine.mean() > 0.95, f"mean max cosine {cosine.mean():.3f}"


def test_schedule():
    rates = [schedule(step, 100, 0.1, 0.2) for step in range(100)]
    assert rates[0] == pytest.approx(0.1)
    assert rates[9] == rates[50] == rates[80] == 1
    assert rates[99] == pytest.approx(0.05)
    assert [schedule(step, 10, 0, 0) for step in (0, 9)] == [1, 1]


def test_a_loss_that_is_not_finite_stops_the_run(model, tmp_path):
    with pytest.raises(UserError, match=r"the loss at resid_post\.\d is (nan|inf) at step \d+: lower lr"):
        train_saes(model, documents(), small(lr=1e30, warmup=0.0), tmp_path / "run")
    assert not list((tmp_path / "run").glob("resid_post*"))


def test_dictionaries_are_not_overwritten_unasked(trained, model):
    out, _ = trained
    before = (out / "resid_post.1" / "sae_weights.safetensors").read_bytes()
    with pytest.raises(UserError, match=r"holds resid_post\.1 already: .* --overwrite true"):
        train_saes(model, documents(), small(sites=["resid_post.1"]), out)
    assert (out / "resid_post.1" / "sae_weights.safetensors").read_bytes() == before


def test_overwrite(model, tmp_path):
    for seed in (0, 1):
        config = small(sites="resid_post.1", overwrite=True, tokens=1024, seed=seed)
        train_saes(model, documents(), config, tmp_path / "run")
    assert json.loads((tmp_path / "run/resid_post.1/cfg.json").read_text())["metadata"]["seed"] == 1
    assert not list((tmp_path / "run").glob(".*"))


# Bad input


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"sites": ["resid_post.3"]}, "3 layers, 0 to 2"),
        ({"context": 65}, "longer than the 64 positions"),
        ({"sae": SAEConfig(k=200)}, "sae.k is 200, but the dictionary has 128 latents"),
    ],
)
def test_what_does_not_fit_the_model(model, tmp_path, changes, message):
    with pytest.raises(UserError, match=message):
        train_saes(model, documents(), small(**changes), tmp_path / "run")
    assert not list(tmp_path.iterdir())


def test_text_that_is_too_short(model, tmp_path):
    with pytest.raises(UserError, match="too short to evaluate on"):
        train_saes(model, ["a", "b", "c", "d"], small(), tmp_path / "run")
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["nowhere.yaml"], "no config file 'nowhere.yaml'"),
        (["--nonsense", "3"], "nonsense"),
        (["--sae.nonsense", "3"], "nonsense"),
        (["--tokens", "many"], "tokens"),
        (["--sae.k", "0"], "sae.k is 0: use a number above 0"),
        (["--sae.k", "9", "--sae.d_sae", "8"], "sae.k is 9, but the dictionary has 8 latents"),
        (["--sites", "resid_pots.1"], "unknown stream 'resid_pots'"),
        (["--sites", "[]"], "sites is empty"),
        (["--held_out", "1"], "held_out is 1"),
        (["--warmup", "0.8", "--decay", "0.8"], "more than the whole run"),
        (["--tokens", "100"], "less than one batch of 1024"),
        (["--buffer", "100"], "less than one batch of 1024"),
        (["--context", "1"], "at least 2 tokens"),
        (["--lr", "0"], "lr is 0"),
        (["--track", "pigeon"], "track is 'pigeon'"),
        (["--out", "run"], "no data to train on"),
        (["--data", "nowhere.jsonl"], "no file or folder 'nowhere.jsonl'"),
        (["--data", "a.pickle"], "kind of file that cannot be read"),
        (["--data", "empty.jsonl"], "empty.jsonl"),
        (["--data", "broken.jsonl"], "cannot read data 'broken.jsonl'"),
        (["--data", "blank.jsonl"], "holds no text"),
        (["--data", "numbers.jsonl"], "holds int, not text"),
        (["--data", "good.jsonl", "--text_column", "body"], r"no column 'body': .*\(text\)"),
        (["--data", "good.jsonl", "--model", "nowhere/at/all"], "'nowhere/at/all'"),
        (["--data", "good.jsonl", "--out", "good.jsonl/run"], "cannot write to 'good.jsonl/run'"),
    ],
)
def test_command_line_refusals(tmp_path, monkeypatch, capsys, arguments, message):
    monkeypatch.chdir(tmp_path)
    files = {"a.pickle": "x", "empty.jsonl": "", "broken.jsonl": "{'text", "blank.jsonl": '{"text": " "}\n'}
    files |= {"numbers.jsonl": '{"text": 3}\n', "good.jsonl": '{"text": "one two"}\n{"text": "three four"}\n'}
    for name, content in files.items():
        (tmp_path / name).write_text(content)
    assert main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.count("\n") == 1, captured.err
    assert captured.err.startswith("error: ")
    assert re.search(message, captured.err), captured.err
    assert sorted(p.name for p in tmp_path.iterdir()) == sorted(files)


def test_presets_are_valid():
    presets = sorted((ROOT / "training/configs").glob("*.yaml"))
    assert {preset.stem for preset in presets} >= {"organism", "stories260k"}
    for preset in presets:
        config = read([str(preset), "--sae.k", "7", "--out", "elsewhere"])
        assert (config.sae.k, config.out) == (7, Path("elsewhere"))


# A model nobody here made


def test_real_model_from_the_command_line(tmp_path, capsys):
    if not (STORIES.is_dir() and STORY_TEXTS.is_file()):
        pytest.skip(f"no real model at {STORIES}")
    small_run = ["--tokens", "60_000", "--eval_tokens", "3000", "--sites", "[resid_post.0, resid_post.2]"]
    given = ["training/configs/stories260k.yaml", "--model", str(STORIES), "--data", str(STORY_TEXTS)]
    assert main([str(ROOT / given[0]), *given[1:], *small_run, "--out", str(tmp_path / "run")]) == 0
    assert "resid_post.2" in capsys.readouterr().out
    summary = json.loads((tmp_path / "run/summary.json").read_text())
    assert summary["sites"]["resid_post.2"]["ce_recovered"] > 0.9
    assert set(load_saes(str(tmp_path / "run"))) == {Site(0), Site(2)}


def test_an_interrupted_run_leaves_no_dictionary(tmp_path):
    if not (STORIES.is_dir() and STORY_TEXTS.is_file()):
        pytest.skip(f"no real model at {STORIES}")
    command = [sys.executable, "-m", "training", "--log_every", "1"]
    command += ["--model", str(STORIES), "--data", str(STORY_TEXTS)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    out = tmp_path / "run"
    run = subprocess.Popen(
        [*command, "--out", str(out)],
        cwd=ROOT,
        env=environment,
        stderr=subprocess.PIPE,
        text=True,
        # a shell starts its background jobs deaf to SIGINT, and children inherit that
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    )
    log = out / "metrics.jsonl"
    for _ in range(600):
        if log.is_file() and log.read_text().count("\n") > 2:
            break
        assert run.poll() is None, run.stderr.read()
        time.sleep(0.1)
    run.send_signal(signal.SIGINT)
    _, said = run.communicate(timeout=60)
    assert run.returncode == 130
    assert "interrupted" in said.splitlines()[-1]
    assert "Traceback" not in said
    assert [p.name for p in out.iterdir()] == ["metrics.jsonl"]
