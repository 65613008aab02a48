"""What a dry run says, against counts made another way; and the presets."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
import yaml
from hub import serve
from tiny import byte_tokenizer, random_dictionary, tiny_model
from tokenizers import processors
from transformers import AutoModelForCausalLM, Gemma2Config, GPT2Config, LlamaConfig

from saepatch.model.sites import Site
from training.__main__ import main, read
from training.config import SAEConfig, TrainingConfig
from training.loop import checkpoints, timing
from training.loop import plan as planning
from training.loop.plan import plan
from training.loop.skeleton import skeleton
from training.steps.learner import Learner

pytestmark = pytest.mark.whole

CONFIGS = Path(__file__).parents[2] / "training/configs"
# The models of the presets as their makers describe them, with their published number of parameters.
MODELS = {
    "gpt2": (GPT2Config(), 124_439_808),
    "gemma-2-2b": (Gemma2Config(), 2_614_341_888),
    "llama-3.1-8b": (
        LlamaConfig(
            hidden_size=4096,
            intermediate_size=14_336,
            num_hidden_layers=32,
            num_attention_heads=32,
            num_key_value_heads=8,
            vocab_size=128_256,
            max_position_embeddings=131_072,
        ),
        8_030_261_248,
    ),
}


def small(**changes):
    return TrainingConfig(**({"context": 32, "sae": SAEConfig(k=4, d_sae=48)} | changes))


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with its tokenizer, and weights that would break whoever reads them."""
    path = tmp_path_factory.mktemp("model")
    model = tiny_model()
    model.config.save_pretrained(path)
    byte_tokenizer().save_pretrained(path)
    (path / "model.safetensors").write_bytes(b"no weights")
    return path


@pytest.fixture(autouse=True)
def short_samples(monkeypatch):
    """Hardly any time is spent on timing steps."""
    monkeypatch.setattr(timing, "SAMPLED", 0.0)
    monkeypatch.setattr(timing, "_LARGEST_STEP", 2**14)


@pytest.mark.parametrize("name", sorted(path.stem for path in CONFIGS.glob("*.yaml")))
def test_presets_are_read(name):
    config = read([str(CONFIGS / f"{name}.yaml")])
    assert config.steps > 100
    assert config.batch_size <= config.buffer_tokens(4)
    assert config.sae.d_sae % 2**9 == 0


def test_every_model_has_its_preset():
    assert {path.stem for path in CONFIGS.glob("*.yaml")} == {*MODELS, "organism", "stories260k"}


@pytest.mark.parametrize("name", MODELS)
def test_presets_dry_run_without_weights(name, tmp_path, capsys):
    described, published = MODELS[name]
    described.save_pretrained(tmp_path)
    preset = read([str(CONFIGS / f"{name}.yaml")])
    assert main([str(CONFIGS / f"{name}.yaml"), "--dry_run", "--model", str(tmp_path), "--device", "meta"]) == 0
    out = capsys.readouterr().out
    assert f"{published:,} parameters" in out
    sites = preset.sites_of(described.num_hidden_layers)
    for site in sites:
        row = next(line for line in out.splitlines() if line.startswith(f"{site} ")).split()
        d_in, d_sae = described.hidden_size, preset.sae.d_sae
        assert row[1:] == [f"{d_in:,}", f"{d_sae:,}", f"{2 * d_in * d_sae + d_sae + d_in:,}"]
    assert f"{preset.tokens // preset.batch_size:,} steps" in out
    found = plan(TrainingConfig(**(vars(preset) | {"model": str(tmp_path), "device": "meta"})))
    assert 1e10 < found.total < 8e10, "one GPU, as the preset says"
    assert found.n_blocks == max(site.layer for site in sites) + 1


def test_parameters_are_those_that_a_learner_has(folder):
    x = torch.randn(64, 16)
    for architecture in ("standard", "gated", "jumprelu", "topk", "batchtopk", "matryoshka"):
        config = small(model=str(folder), sae=SAEConfig(architecture=architecture, k=4, d_sae=48))
        weights = Learner.new(x, config, 0).weights
        shape = planning.Shape(Site(0), 16, 48, architecture)
        assert shape.parameters == sum(value.numel() for value in weights.values()), architecture


@pytest.mark.parametrize("family", ["gpt2", "gemma2", "phi", "opt"])
def test_a_skeleton_has_the_widths_and_sizes_of_the_model(family, tmp_path):
    model = tiny_model(family, **({} if family in ("gpt2", "opt", "phi") else {"head_dim": 8}))
    model.config.save_pretrained(tmp_path)
    bare, _ = skeleton(str(tmp_path), "float32")
    assert all(weight.is_meta for weight in bare.hf.parameters())
    assert sum(w.numel() for w in bare.hf.parameters()) == sum(w.numel() for w in model.hf.parameters())
    for site in model.layout.sites:
        assert bare.width(site) == model.width(site), site


def test_memory_counts_what_it_says(folder):
    config = small(
        model=str(folder),
        sites=["resid_post.0", "z.1"],
        dtype="bfloat16",
        tokens=50_000,
        batch_size=128,
        buffer=1000,
        ema=0.99,
    )
    found = plan(config).memory
    hf = AutoModelForCausalLM.from_config(tiny_model().config, dtype=torch.bfloat16)
    one = 2 * 16 * 48 + 48 + 16
    assert found["model"] == sum(t.numel() * t.itemsize for t in (*hf.parameters(), *hf.buffers()))
    assert found["dictionaries"] == 4 * 2 * one
    assert found["their gradients (a site at a time)"] == 4 * one
    assert found["Adam"] == 8 * 2 * one
    assert found["their running mean"] == 4 * 2 * one
    assert found["pre-activations (a site at a time)"] == 128 * 48 * 4
    assert found["buffer of activations, twice"] == 2 * 1000 * 2 * 16 * 2
    assert found["first batches"] == 16_384 * 2 * 16 * 4
    once = plan(TrainingConfig(**(vars(config) | {"prefetch": False, "ema": 0.0}))).memory
    assert once["buffer of activations"] == 1000 * 2 * 16 * 2
    assert "their running mean" not in once


def test_work_of_a_run(folder):
    config = small(model=str(folder), sites=["resid_post.1"], tokens=1000, batch_size=100)
    work = plan(config).work
    # q and o [16, 16], k and v [16, 8], three matrices of the MLP [16, 32]; scores and values over 32 positions.
    block = 2 * (2 * 16 * 16 + 2 * 16 * 8 + 3 * 16 * 32) + 4 * 32 * 16
    assert work.model == 2 * block * 1000
    assert work.dictionaries == (2 * 16 * 48 + 8 * 4 * 16) * 1000
    dense = small(model=str(folder), sites=["resid_post.1"], tokens=1000, batch_size=100)
    dense.sae.architecture = "jumprelu"
    assert plan(dense).work.dictionaries == 5 * 2 * 16 * 48 * 1000
    earlier = small(model=str(folder), sites=["resid_pre.1"], tokens=1000, batch_size=100)
    assert plan(earlier).work.model == block * 1000
    assert plan(earlier).n_blocks == 1


def test_disk_is_what_checkpoints_take(folder, tmp_path):
    from runs_of_training import documents

    from training.loop.checkpoints import FOLDER
    from training.loop.trainer import train_saes

    config = small(model=str(folder), tokens=2048, batch_size=128, buffer=256, eval_tokens=200, checkpoint_every=512)
    config = TrainingConfig(**(vars(config) | {"keep_checkpoints": 2}))
    seen = []

    from training.loop import checkpoints

    real = checkpoints.save

    def save(out, checkpoint, keep):
        place = real(out, checkpoint, keep)
        seen.append(sum(path.stat().st_size for path in (out / FOLDER).rglob("*.safetensors")))
        return place

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(checkpoints, "save", save)
        train_saes(tiny_model(), documents(), config, tmp_path / "out")
    planned = plan(config).disk
    dictionaries = sum(path.stat().st_size for path in (tmp_path / "out").glob("*/sae_weights.safetensors"))
    assert dictionaries == pytest.approx(planned["dictionaries"], rel=0.1)  # headers of the files besides
    kept = planned["checkpoints (2, and one being written)"] * 2 / 3
    assert max(seen) == pytest.approx(kept, rel=0.2)


def test_epochs(folder, tmp_path):
    texts = ["aaaa", "bbbb bbbb", "c" * 31] * 10  # a byte is a token
    (tmp_path / "data.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    config = small(model=str(folder), data=str(tmp_path / "data.jsonl"), held_out=0.1, tokens=8800, batch_size=88)
    tokens = sum(map(len, texts)) * 0.9
    assert plan(config).epochs == pytest.approx(8800 / tokens)
    assert f"the text is read {8800 / tokens:.2g} times" in "\n".join(plan(config).lines())
    assert plan(small(model=str(folder), data="owner/data")).epochs is None


def test_what_does_not_fit_is_said(folder):
    lines = plan(small(model=str(folder), buffer=10**12)).lines()
    assert lines[-1].startswith("warning: ")
    assert "is more than the" in lines[-1]
    no_data = "warning: there is no data to train on: give --data"
    assert [line for line in plan(small(model=str(folder))).lines() if line.startswith("warning")] == [no_data]


def test_a_device_that_is_not_here(folder):
    if torch.cuda.is_available():
        pytest.skip("there is one")
    lines = plan(small(model=str(folder), device="cuda")).lines()
    assert "time: not estimated, cuda is not available" in lines
    assert any(
        line.startswith("time: about ") and "estimate" in line for line in plan(small(model=str(folder))).lines()
    )


def test_the_time_is_that_of_the_steps_themselves(folder, monkeypatch):
    """Whatever makes a step slow is in the estimate, which products alone would not show."""
    own = Learner.step
    monkeypatch.setattr(timing, "SAMPLED", 0.1)
    monkeypatch.setattr(Learner, "step", lambda *given: time.sleep(0.01) or own(*given))
    config = small(model=str(folder), sites=["resid_post.0", "resid_post.1"], batch_size=64, tokens=64_000)
    time_of_run = plan(config).time
    assert 2 * 1000 * 0.01 <= time_of_run.low <= time_of_run.high
    assert f" to {timing._duration(time_of_run.high)}, estimated from " in time_of_run.line()


def test_earlier_runs_of_the_kind_are_named(folder, tmp_path):
    config = small(model=str(folder), sites=["resid_post.0"], out=tmp_path / "new", batch_size=64, tokens=6400)
    for name, changes in {"like": {}, "other": {"batch_size": 32}}.items():
        (tmp_path / name).mkdir()
        text = yaml.safe_dump(replace(config, **changes).to_dict())
        (tmp_path / name / "config.yaml").write_text(text)
        content = {"seconds": 117.0, "training_tokens": 3200, "sites": {"resid_post.0": {}}}
        (tmp_path / name / "summary.json").write_text(json.dumps(content))
    (tmp_path / "broken").mkdir()
    (tmp_path / "broken" / "summary.json").write_text("[")
    (line,) = plan(config).earlier
    assert line.startswith(f"a similar earlier run ({tmp_path / 'like'}) took 117 seconds for 3,200 tokens: ")
    assert line.endswith("3.9 minutes for this run's tokens")


def test_mistakes(folder, capsys):
    def failed(*arguments):
        assert main([*arguments, "--dry_run"]) == 2
        out, err = capsys.readouterr()
        assert out == ""
        assert err.count("\n") == 1
        return err

    assert "'./nowhere' is neither a folder nor a Hugging Face id" in failed("--model", "./nowhere")
    assert "the model has 3 layers" in failed("--model", str(folder), "--sites", "[resid_post.7]", "--context", "16")
    assert "unknown dtype 'int3'" in failed("--model", str(folder), "--dtype", "int3")
    assert "longer than the 64 positions" in failed("--model", str(folder), "--context", "65")
    assert "lower k or widen it" in failed("--model", str(folder), "--context", "16", "--sae.k", "500")


def test_code_that_comes_with_a_model_is_not_run(tmp_path, capsys):
    settings = {"model_type": "mine", "auto_map": {"AutoConfig": "mine.Mine", "AutoModelForCausalLM": "mine.MineLM"}}
    (tmp_path / "config.json").write_text(json.dumps(settings))
    (tmp_path / "mine.py").write_text("raise SystemExit('code of the model was run')")
    assert main(["--model", str(tmp_path), "--dry_run"]) == 2
    assert capsys.readouterr().err.startswith("error: cannot read the config of model")


@pytest.mark.slow
def test_a_model_on_the_hub_and_one_that_is_not(tmp_path):
    """The endpoint is read when huggingface_hub is imported, so it takes a process of its own."""
    MODELS["gemma-2-2b"][0].save_pretrained(tmp_path / "gemma")
    script = (
        "from training.__main__ import main\n"
        "preset = 'training/configs/gemma-2-2b.yaml'\n"
        "assert main([preset, '--dry_run', '--device', 'meta', '--revision', 'v2']) == 0\n"
        "assert main([preset, '--dry_run', '--device', 'meta', '--revision', 'v3']) == 2\n"
        "print(main([preset, '--dry_run', '--device', 'meta']))\n"
        "print(main([preset, '--dry_run', '--model', 'google/absent']))\n"
    )
    with serve(dict.fromkeys(("google/gemma-2-2b", "google/gemma-2-2b@v2"), tmp_path / "gemma")) as endpoint:
        environment = os.environ | {
            "HF_ENDPOINT": endpoint,
            "HF_HOME": str(tmp_path / "cache"),
            "HF_HUB_DISABLE_XET": "1",
        }
        done = subprocess.run(
            [sys.executable, "-W", "ignore", "-c", script],
            cwd=CONFIGS.parents[1],
            env=environment,
            capture_output=True,
            text=True,
            check=False,
        )
    assert "2,614,341,888 parameters" in done.stdout, done.stderr[-2000:]
    assert done.stdout.splitlines()[-2:][0] == "0"
    assert done.stdout.splitlines()[-1] == "2"
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    assert len(errors) == 2
    assert "cannot read the config of model 'google/gemma-2-2b'" in errors[0]
    assert "cannot read the config of model 'google/absent'" in errors[1]
    assert "Traceback" not in done.stderr


def test_help_is_quick():
    script = (
        "import sys\n"
        "from training.__main__ import main\n"
        "try:\n    main(['--help'])\nexcept SystemExit:\n    pass\n"
        "print(sorted({'torch', 'sae_lens', 'transformers', 'datasets', 'wandb'} & set(sys.modules)))\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=CONFIGS.parents[1], capture_output=True, text=True, check=True
    )
    assert "--sweep" in done.stdout
    assert done.stdout.splitlines()[-1] == "[]"


def refused(capsys, *arguments):
    """What both the run and its dry run say, which has to be the same."""
    said = []
    capsys.readouterr()
    for more in ([], ["--dry_run"]):
        assert main([*map(str, arguments), *more]) == 2
        said.append(capsys.readouterr().err)
    assert said[0] == said[1]
    return said[0]


def test_the_dry_run_refuses_what_the_run_refuses(tmp_path, capsys):
    model = tiny_model()
    for name in ("model", "other"):
        model.hf.save_pretrained(tmp_path / name)
    plain = byte_tokenizer()
    plain.save_pretrained(tmp_path / "model")
    plain.add_tokens(["more"])
    plain.save_pretrained(tmp_path / "other")
    (tmp_path / "texts.txt").write_text("".join(f"A text, number {i}.\n" for i in range(50)))
    (tmp_path / "alike.txt").write_text("A text.\n" * 50)
    (tmp_path / "short.txt").write_text("a\nb\nc\n")
    given = ["--model", tmp_path / "model", "--out", tmp_path / "out", "--context", 32, "--sae.k", 4, "--data"]
    texts = tmp_path / "texts.txt"
    assert "vocabularies" in refused(capsys, *given, texts, "--also", f"[{tmp_path / 'other'}]")
    assert "no revisions" in refused(capsys, *given, texts, "--revision", "main")
    assert "not in the vocabulary" in refused(capsys, *given, texts, "--prepend_bos", "<|end|>")
    assert "1 distinct documents" in refused(capsys, *given, tmp_path / "alike.txt")
    assert "too short to evaluate on" in refused(capsys, *given, tmp_path / "short.txt")
    random_dictionary("resid_post.1", "topk").sae.save_model(tmp_path / "sae" / "resid_post.1")
    initial = ["--initial", tmp_path / "sae", "--sites", "[resid_post.1]"]
    assert "48 latents, not 32: set sae.d_sae to 48" in refused(capsys, *given, texts, *initial, "--sae.d_sae", 32)
    bare = byte_tokenizer()
    bare.bos_token, bare._tokenizer.post_processor = None, processors.TemplateProcessing(single="$A")
    bare.save_pretrained(tmp_path / "model")
    assert "adds no BOS between them" in refused(capsys, *given, texts, "--pack", "true")
    assert "has no BOS" in refused(capsys, *given, texts, "--prepend_bos", "true")


def test_a_dry_run_sees_what_a_checkpoint_is_of_and_every_run_of_a_sweep(folder, tmp_path, capsys):
    place = tmp_path / "out" / "checkpoints" / f"{1000:015d}"
    place.mkdir(parents=True)
    config = small(model=str(folder), lr=1e-3)
    (place / "state.json").write_text(json.dumps({"config": checkpoints.identifying_settings(config)}))
    given = ["--model", str(folder), "--context", "32", "--sae.k", "4", "--sae.d_sae", "48", "--dry_run", "--resume"]
    assert main([*given, "--out", str(tmp_path / "out"), "--lr", "0.002"]) == 2
    assert "holds a run with lr 0.001" in capsys.readouterr().err
    assert main([*given, "--out", str(tmp_path / "out"), "--lr", "0.001"]) == 0
    assert "no data to train on" in capsys.readouterr().out
    assert main([*given, "--out", str(tmp_path / "sweep"), "--sweep", "{sites: [resid_post.0, resid_post.9]}"]) == 2
    assert "resid_post.9" in capsys.readouterr().err


def test_a_plan_says_that_it_saw_no_tokenizer(tmp_path, capsys):
    tiny_model().config.save_pretrained(tmp_path)
    found = plan(small(model=str(tmp_path), device="meta", pack=True))
    assert "no tokenizer for" in found.warnings()[1]


def test_the_default_buffer_is_bounded_by_a_share_of_memory():
    config = small(batch_size=1024, buffer=0)
    assert config.buffer_tokens(640 * 4) == 65_536
    assert config.buffer_tokens(18 * 640 * 4) == 2**30 // (18 * 640 * 4)
    assert config.buffer_tokens(2**30) == 8 * 1024  # enough to shuffle
    assert small(batch_size=128, buffer=256).buffer_tokens(2**40) == 256
