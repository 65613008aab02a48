"""The commands that are killed: how each is started, what it leaves, and what of that has to be the same again."""

import json
import re
import shutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from restoring_runs import arguments, make
from runs_of_training import documents

from saepatch.cli.main import main
from saepatch.records.rows import read_rows

# What differs between two runs of the same: when, how long, and (of a run that goes on) by which command.
VOLATILE = {"versions", "seconds", "command", "saepatch_version"}


@dataclass(frozen=True)
class Scenario:
    """One command.

    Attributes:
        name: Of the table.
        command: Its words.
        before: A folder that `out` is a copy of when it starts; None: it starts with none.
        results: Files under `out` whose content is compared.
    """

    name: str
    command: Sequence[str]
    before: Path | None
    results: Sequence[str]

    def reset(self, out: Path) -> None:
        shutil.rmtree(out, ignore_errors=True)
        if self.before is not None:
            shutil.copytree(self.before, out)

    def state(self, out: Path) -> dict[str, Any]:
        """Names of all files and folders, hidden ones too, and the content of the results."""
        names = sorted(str(path.relative_to(out)) for path in out.rglob("*"))
        return {"files": names} | {name: content(out / name) for name in self.results}


def content(path: Path) -> Any:
    if path.suffix == ".parquet":
        return [without(row) for row in read_rows(path)] if path.stem == "results" else path.read_bytes()
    if path.suffix == ".html":  # the minute in which the run finished, or the page was written
        return re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d", "", path.read_text(encoding="utf-8"))
    return without(json.loads(path.read_text())) if path.suffix == ".json" else path.read_bytes()


def without(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: without(item) for key, item in value.items() if key not in VOLATILE}
    return [without(item) for item in value] if isinstance(value, list) else value


def scenarios(folder: Path, out: Path) -> list[Scenario]:
    """All commands, on tiny models made in `folder`; `out` is where each of them writes."""
    folder.mkdir()
    make(folder)
    pairs = [
        {"clean": f"the {a} sat{x}", "corrupted": f"the {b} sat{x}", "answer": "x", "counter": "y"}
        for a, b in (("cat", "dog"), ("cow", "pig"))
        for x in ("", " by", " down", " up")
    ]
    (folder / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    (folder / "texts.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in documents(100)))
    given = ["--model", folder / "model", "--sae", folder / "saes", "--pairs", folder / "pairs.jsonl"]
    sweep = [*map(str, given), "--latents", "resid_post.0: 3; 5", "--batch_size", "8", "--part", "1", "--quiet"]
    sweep += ["--controls", "2"]
    whole, cut = folder / "whole", folder / "cut"
    done(["patch", *sweep, "--out", str(out)])
    shutil.copytree(out, whole)
    (whole / "report.html").unlink()
    shutil.rmtree(out)
    for shard in ("0/2", "1/2"):
        done(["patch", *sweep, "--out", str(out), "--shard", shard])
    shutil.move(out, cut)
    merged = ("results.parquet", "pairs.parquet", "summary.json")
    return [
        Scenario("training", training(folder, out), None, ("resid_post.1/sae_weights.safetensors", "summary.json")),
        Scenario("sweep", ["patch", *sweep, "--out", str(out)], None, merged),
        Scenario(
            "restore",
            ["restore", *arguments(folder, out, latents="resid_post.1: 1,7", part=1, controls=1), "--quiet"],
            None,
            ("results.parquet", "summary.json"),
        ),
        Scenario("report", ["report", str(out)], whole, ("report.html",)),
        Scenario("merge", ["merge", str(out)], cut, (*merged, "report.html")),
    ]


def training(folder: Path, out: Path) -> list[str]:
    settings = {"model": folder / "model", "data": folder / "texts.jsonl", "out": out, "sites": "resid_post.1"}
    settings |= {"tokens": 12_288, "batch_size": 256, "context": 32, "forward_tokens": 512, "buffer": 1024}
    settings |= {"held_out": 0.1, "eval_tokens": 200, "log_every": 8, "checkpoint_every": 1024, "resume": "true"}
    settings |= {"sae.k": 4, "sae.d_sae": 48, "sae.architecture": "batchtopk"}
    return ["train", *(word for name, value in settings.items() for word in (f"--{name}", str(value)))]


def done(command: Sequence[str], run: Callable[[Sequence[str]], int] = main) -> None:
    code = run(command)
    assert code == 0, (command, code)
