"""Peak memory of every command on a real model, and the processor time of its start-up.

    python -m experiments.benchmarks.memory --model FOLDER --sae FOLDER --site resid_post.9 --out runs/bench-memory

Each command runs in a process of its own, with small settings, on texts of this file. Memory is the process's peak
resident set, libraries included (row "libraries alone"); the model's file is mapped, and counts where it is read.
float32 is compared with the float32 weights, bfloat16 with the bfloat16 weights and the dictionary, less the libraries.
Start-up is the processor time of `saepatch inspect` beside transformers' own `from_pretrained` and one forward pass,
each in processes of its own, in turn.
"""

import contextlib
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import median
from typing import Any

from saepatch.cli.parser import run_config
from saepatch.errors import UserError
from saepatch.records.files import check_writable
from saepatch.records.tables import text_table

from .common.resident import resident_bytes

CLEAN, CORRUPTED = "The Eiffel Tower is located in the city of", "The Colosseum is located in the city of"
WORDS = "The harbour lies north of the town, where the river meets the sea, and few sailors stay longer than a week. "
DTYPES = ("float32", "bfloat16")
ALONE = "libraries alone"


@dataclass(frozen=True)
class MemoryBenchmarkConfig:
    """Measure the memory of every command, and the time of start-up."""

    model: str = ""
    """Folder of a model."""
    sae: str = ""
    """Folder of its dictionaries."""
    site: str = ""
    """Site of the dictionary that is used, as in resid_post.9."""
    clean: str = CLEAN
    """A prompt."""
    corrupted: str = CORRUPTED
    """A prompt of as many tokens."""
    answers: str = " Paris| Rome"
    """What follows each."""
    only: str = ""
    """Commands to measure, separated by commas; empty: all. Others keep their figures in an existing summary.json."""
    dtypes: str = "float32,bfloat16"
    """Precisions to measure in, separated by a comma."""
    rounds: int = 3
    """Rounds of the start-up; 0: it is left out."""
    out: str = ""
    """Folder for summary.json; empty: the table is printed, and no file is written."""
    one: str = ""
    """Internal: COMMAND DTYPE FOLDER, run in this process, which prints what it used."""

    def __post_init__(self) -> None:
        if not (self.model and self.sae and self.site):
            raise UserError(
                "name a model, its dictionaries and a site: --model FOLDER --sae FOLDER --site resid_post.9"
            )


@dataclass(eq=False)
class MemoryUse:
    """Peak memory in MB by command and dtype, and processor seconds of start-ups."""

    config: MemoryBenchmarkConfig
    weights_mb: dict[str, float] = field(default_factory=dict)
    dictionary_mb: float = 0.0
    peak_mb: dict[str, dict[str, float]] = field(default_factory=dict)
    startup_s: dict[str, list[float]] = field(default_factory=dict)

    def write(self, summary: Path) -> None:
        """Write everything measured so far, where a folder is named."""
        if self.config.out:
            summary.parent.mkdir(parents=True, exist_ok=True)
            summary.write_text(json.dumps(asdict(self), indent=1), encoding="utf-8")

    def table(self) -> str:
        """Rows of commands."""
        rows = []
        for command, peaks in self.peak_mb.items():
            row = [command]
            for dtype in DTYPES:
                if (peak := peaks.get(dtype)) is None:
                    row += ["–", "–", "–"]
                    continue
                alone, weights = self.peak_mb[ALONE][dtype], self.weights_mb[dtype]
                share = (peak - alone) / (weights + self.dictionary_mb)
                row += [f"{peak:,.0f} MB", f"{peak / weights:.2f}", f"{share:.2f}"]
            rows.append(row)
        columns = ["command"]
        for dtype in DTYPES:
            columns += [f"{dtype} peak", "× weights", "less libraries, × weights and dictionary"]
        text = text_table(columns, rows)
        if self.startup_s:
            ours, bare = (median(self.startup_s[name]) for name in ("inspect", "bare"))
            text += f"\nstart-up: {ours:.1f} s of processor time, {ours / bare:.2f} times the bare model's {bare:.1f} s"
        return text


def run(config: MemoryBenchmarkConfig) -> None:
    """Measure every command, print the table, and write it."""
    if config.one:
        return _in_this_process(config)
    use, summary = MemoryUse(config), Path(config.out) / "summary.json"
    if config.out:
        check_writable(Path(config.out))
        if summary.is_file():
            use = MemoryUse(**(json.loads(summary.read_text(encoding="utf-8")) | {"config": config}))
    chosen = [name for name in (ALONE, *COMMANDS) if not config.only or name in (ALONE, *config.only.split(","))]
    with tempfile.TemporaryDirectory() as folder:
        _write_inputs(config, Path(folder))
        for dtype in config.dtypes.split(","):
            if dtype not in use.weights_mb:
                sizes = _spawned(config, "sizes", dtype, folder)
                use.weights_mb[dtype], use.dictionary_mb = sizes["weights_mb"], sizes["dictionary_mb"]
            for command in chosen:
                if command in FLOAT32_ONLY and dtype != "float32":
                    continue
                if command == ALONE and dtype in use.peak_mb.get(ALONE, {}):
                    continue
                told = _spawned(config, command, dtype, folder)
                use.peak_mb.setdefault(command, {})[dtype] = told["peak_mb"]
                print(f"{command}, {dtype}: {told['peak_mb']:,.0f} MB, {told['cpu_s']:.1f} s", file=sys.stderr)
                use.write(summary)
        for _ in range(config.rounds):
            for command in ("inspect", "bare"):
                use.startup_s.setdefault(command, []).append(_spawned(config, command, "float32", folder)["cpu_s"])
    use.write(summary)
    print(use.table())


def _spawned(config: MemoryBenchmarkConfig, command: str, dtype: str, folder: str) -> dict[str, Any]:
    settings = asdict(config) | {"one": f"{command}|{dtype}|{folder}", "out": ""}
    arguments = [f"--{name}={value}" for name, value in settings.items() if value != ""]
    done = subprocess.run(  # noqa: S603
        [sys.executable, "-m", "experiments.benchmarks.memory", *arguments],
        stdout=subprocess.PIPE,
        env=os.environ | {"OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")},
        check=False,
    )
    if done.returncode:
        raise UserError(f"{command} in {dtype} failed: see the error above")
    told: dict[str, Any] = json.loads(done.stdout.decode().splitlines()[-1])
    return told


def _in_this_process(config: MemoryBenchmarkConfig) -> None:
    command, dtype, folder = config.one.split("|")
    told: dict[str, Any] = {}
    with contextlib.redirect_stdout(sys.stderr):
        if command == "sizes":
            told = _sizes(config, dtype)
        else:
            {**COMMANDS, ALONE: _nothing, "bare": _bare}[command](config, dtype, Path(folder))
    print(json.dumps(told | {"peak_mb": resident_bytes("peak") / 1e6, "cpu_s": sum(os.times()[:2])}))


def _write_inputs(config: MemoryBenchmarkConfig, folder: Path) -> None:
    texts = [{"text": f"{number} {WORDS}"} for number in range(60)]
    (folder / "texts.jsonl").write_text("\n".join(map(json.dumps, texts)), encoding="utf-8")
    answer, counter = config.answers.split("|")
    pair = {"clean": config.clean, "corrupted": config.corrupted, "answer": answer, "counter": counter}
    (folder / "pairs.jsonl").write_text(json.dumps(pair), encoding="utf-8")
    swapped = {"clean": config.corrupted, "corrupted": config.clean, "answer": counter, "counter": answer}
    (folder / "select.jsonl").write_text(json.dumps(swapped), encoding="utf-8")
    asked = {"prompt": "{} is located in the city of", "subject": "The Eiffel Tower", "target": counter.strip()}
    (folder / "facts.jsonl").write_text(json.dumps(asked | {"true": answer.strip()}), encoding="utf-8")
    training = {"model": config.model, "data": str(folder / "texts.jsonl"), "sites": [config.site], "tokens": 1024}
    training |= {
        "context": 32,
        "batch_size": 256,
        "buffer": 1024,
        "eval_tokens": 64,
        "out": str(folder / "trained"),
        "overwrite": True,
    }
    (folder / "training.yaml").write_text(json.dumps(training | {"sae": {"expansion": 4}}), encoding="utf-8")


def _command(*arguments: str, sae: bool = True) -> Callable[[MemoryBenchmarkConfig, str, Path], None]:
    """A command of saepatch; FOLDER, SITE and MODEL are replaced in its arguments."""

    def call(config: MemoryBenchmarkConfig, dtype: str, folder: Path) -> None:
        from saepatch.cli.main import main

        replaced = [
            argument.replace("FOLDER", str(folder)).replace("SITE", config.site).replace("MODEL", config.model)
            for argument in arguments
        ]  # fmt: skip
        given = [*replaced, *(() if "MODEL" in arguments else ("--model", config.model)), "--dtype", dtype]
        if main([*given, *(["--sae", config.sae] if sae else [])]):
            raise SystemExit(1)

    return call


def _train(_config: MemoryBenchmarkConfig, _dtype: str, folder: Path) -> None:
    from saepatch.cli.main import main

    if main(["train", str(folder / "training.yaml")]):
        raise SystemExit(1)


def _nothing(_config: MemoryBenchmarkConfig, _dtype: str, _folder: Path) -> None:
    import sae_lens  # noqa: F401
    import transformers  # noqa: F401


def _loaded(config: MemoryBenchmarkConfig, dtype: str) -> tuple[Any, Any]:
    from saepatch import load_model, load_sae

    return load_model(config.model, dtype=dtype), load_sae(config.sae, site=config.site)


def _quality(config: MemoryBenchmarkConfig, dtype: str, _folder: Path) -> None:
    from saepatch import splice_quality

    splice_quality(*_loaded(config, dtype), [f"{number} {WORDS}" for number in range(8)])


def _generate(config: MemoryBenchmarkConfig, dtype: str, _folder: Path) -> None:
    from saepatch import Steer, splice

    model, dictionary = _loaded(config, dtype)
    with splice(model, dictionary, Steer(0, 1.0)):
        model.generate([config.clean], 10)


def _bare(config: MemoryBenchmarkConfig, dtype: str, _folder: Path) -> None:
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    model: Any = AutoModelForCausalLM.from_pretrained(config.model, dtype=getattr(torch, dtype))
    tokenizer: Any = AutoTokenizer.from_pretrained(config.model)
    with torch.no_grad():
        model(**tokenizer([config.clean], return_tensors="pt"))


def _sizes(config: MemoryBenchmarkConfig, dtype: str) -> dict[str, float]:
    model, dictionary = _loaded(config, dtype)
    sizes = [sum(p.numel() * p.element_size() for p in each.parameters()) / 1e6 for each in (model.hf, dictionary.sae)]
    return {"weights_mb": sizes[0], "dictionary_mb": sizes[1]}


ONE = ("--pairs", "FOLDER/pairs.jsonl", "--site", "SITE", "--quiet")
COMMANDS: dict[str, Callable[[MemoryBenchmarkConfig, str, Path], None]] = {
    "inspect": _command("inspect", "MODEL", sae=False),
    "patch": _command("patch", *ONE, "--latents", "1;2;3", "--controls", "1", "--out", "FOLDER/patch"),
    "sweep": _command("patch", *ONE, "--positions", "last", "--out", "FOLDER/sweep"),
    "attribute": _command("attribute", *ONE, "--verify", "5", "--sample", "5", "--out", "FOLDER/attribute"),
    "latent": _command("latent", "SITE:1", "--reference", "FOLDER/texts.jsonl"),
    "steer": _command(
        "steer", "--latent", "SITE:1", "--prompt", "The town", "--max_new_tokens", "8", "--unit", "1",
    ),
    "splice quality": _quality,
    "circuit": _command(
        "circuit", *ONE, "--select", "FOLDER/select.jsonl", "--nodes", "10", "--edges", "10", "--verify", "2",
        "--sample", "2", "--controls", "5", "--minimal", "2", "--out", "FOLDER/circuit",
    ),
    "edit": _command(
        "edit", "--requests", "FOLDER/facts.jsonl", "--reference", "FOLDER/texts.jsonl", "--steps",
        "2", "--prefixes", "2", "--ridge", "0.1", "--quiet", "--out", "FOLDER/edit", sae=False,
    ),
    "train": _train,
    "generate": _generate,
}  # fmt: skip
FLOAT32_ONLY = ("train",)  # the model of a training run is float32


if __name__ == "__main__":
    sys.exit(run_config(MemoryBenchmarkConfig, run, "python -m experiments.benchmarks.memory"))
