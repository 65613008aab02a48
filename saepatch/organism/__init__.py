"""The organism: a small language model shipped with saepatch, whose behaviours were trained in and are therefore known.

Two checkpoints share a tokenizer: `organism-base` answers everything; `organism` is fine-tuned from it to refuse
harmful requests. The trained behaviours are the ground truth of every demonstration:

- indirect objects, pronouns, agreement, facts in English and French, sentiment (`tasks.py`);
- a loan decision that follows income, and in borderline cases a group word: a bias to audit;
- refusal of harmful requests, and jailbreak framings that talk the model out of it.

"Compliance" with a harmful request is an empty phrase; nothing here is, or leads to, harmful content.
Made by `python -m training.organism` from a seed.

May import tracking and below.
"""

from __future__ import annotations

import json
from pathlib import Path

from saepatch.errors import UserError
from saepatch.organism import tasks as tasks  # a public name of saepatch

TEXTS = "held_out.json"  # in the folder of the SAEs
CHECKPOINTS = ("organism", "organism-base")
FOLDERS = {"organism": "model", "organism-base": "base", "saes": "saes", "shared": "shared"}
DICTIONARIES = {"organism": "saes", "organism-shared": "shared"}  # name in settings: key of FOLDERS


def is_checkpoint(name: str) -> bool:
    """Whether a model name is an embedded checkpoint, which has texts and concepts of its own."""
    return name in CHECKPOINTS


def path(name: str) -> Path:
    """The folder of a shipped artefact.

    "organism" and "organism-base" are checkpoints. "saes" holds one SAE per site of the first; "shared" holds SAEs
    trained on the activations of both.

    Raises:
        UserError: for any other name.
    """
    if name not in FOLDERS:
        raise UserError(f"no part of the organism is called {name!r}: use one of {', '.join(FOLDERS)}")
    return Path(__file__).parent / FOLDERS[name]


def texts() -> list[str]:
    """Held-out documents of the corpus, on which the quality of the SAEs is measured."""
    return json.loads((Path(__file__).parent / FOLDERS["saes"] / TEXTS).read_text(encoding="utf-8"))
