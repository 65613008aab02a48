"""Answers under restoration, kept on the disk as they come: an experiment that was stopped goes on from them."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool
from numpy import ndarray

from saepatch.dictionaries.dictionary import Dictionary
from saepatch.engine.metrics import refusal_log_odds
from saepatch.model.language_model import LanguageModel
from saepatch.model.sites import Site
from saepatch.records.files import write_json
from saepatch.records.rows import AnswerRow
from saepatch.restoration.restore import Outcome, judge, restorations
from saepatch.runs.parts import refuse_if_other
from saepatch.splicing.donors import Donor
from saepatch.splicing.splice import splice

from .settings import Asked, Setting

log = logging.getLogger("experiments.safety")

SAID_EVERY = 50  # runs between two lines in the log
Latents = Mapping[Site, tuple[int, ...]]
Dictionaries = Mapping[Site, Dictionary]


@dataclass(frozen=True, eq=False)
class Answered:
    """Answers of one run: texts, and refusal scores (nats) after the prompts."""

    texts: tuple[str, ...]
    scores: tuple[float, ...]

    @property
    def refused(self) -> Bool[ndarray, "prompts"]:
        return self.are("refuse")

    def are(self, outcome: Outcome) -> Bool[ndarray, "prompts"]:
        return np.array([judge(text) == outcome for text in self.texts], dtype=bool)

    @property
    def opened(self) -> Bool[ndarray, "prompts"]:
        """Where the first token is more likely a refusal's than not, whatever comes after it."""
        return np.array(self.scores, dtype=float) > 0


@dataclass(frozen=True, eq=False)
class Told:
    """A run as its rows tell it: who answered what."""

    model: LanguageModel
    asked: Asked
    harmful: bool
    answered: Answered


class Runs:
    """Every run of an experiment. Those that are on the disk already are not run again, until it is finished."""

    def __init__(self, out: Path, deciding: dict[str, Any], refusal_ids: set[int], tokens: int) -> None:
        self._file, self._about = out / "runs.jsonl", out / "runs.json"
        self._refusal_ids, self.tokens = refusal_ids, tokens
        self._kept: dict[str, Answered] = {}
        self.rows: dict[tuple[str, str, str, int, int], Told] = {}
        self._done = 0
        if self._about.exists():
            refuse_if_other(out, json.loads(self._about.read_text(encoding="utf-8")), deciding)
            self._read()
        write_json(deciding, self._about)

    def _read(self) -> None:
        lines = self._file.read_text(encoding="utf-8").split("\n")[:-1] if self._file.exists() else []
        for line in lines:
            one = json.loads(line)
            self._kept[one["key"]] = Answered(tuple(one["texts"]), tuple(one["scores"]))
        self._file.write_text("".join(f"{line}\n" for line in lines), encoding="utf-8")  # less one that was cut short
        log.info("%d runs are there already", len(self._kept))

    def forget(self) -> None:
        """Remove what a stopped experiment would go on from."""
        self._file.unlink(missing_ok=True)
        self._about.unlink(missing_ok=True)

    def bare(self, setting: Setting, asked: Asked, harmful: bool = True, name: str = "bare") -> Answered:
        """Nothing restored."""
        return self._keep(
            setting, asked, (name, 0, 0), harmful, ["bare"], lambda: self._answers(setting.model, asked.prompts)
        )

    def donor(self, setting: Setting, asked: Asked, harmful: bool = True, name: str = "donor") -> Answered:
        """What the donor itself answers."""
        model = setting.other or setting.model
        what = ["donor", asked.clean]
        return self._keep(setting, asked, (name, 0, 0), harmful, what, lambda: self._answers(model, asked.clean), model)

    def restored(
        self,
        setting: Setting,
        asked: Asked,
        name: str,
        latents: Latents | None,
        dictionaries: Dictionaries | None = None,
        harmful: bool = True,
        error: bool = False,
        donor: Donor | None = None,
        draw: int = 0,
        positions: str = "all",
    ) -> Answered:
        """Latents restored from the setting's donor, or from another; None: all, at all sites."""
        there = setting.sites if dictionaries is None else dictionaries
        wanted: Mapping[Site, tuple[int, ...] | None] = dict.fromkeys(there) if latents is None else latents
        wanted = {site: ids for site, ids in wanted.items() if ids != ()}
        donor = donor or setting.donor(asked)
        told = {str(site): [there[site].fingerprint, ids] for site, ids in wanted.items()}
        size = sum(there[site].d_sae if ids is None else len(ids) for site, ids in wanted.items())

        def run() -> Answered:
            edits = restorations(there, donor, wanted, positions, error)
            inside = splice(setting.model, [there[site] for site in wanted], edits) if wanted else nullcontext()
            with inside:
                return self._answers(setting.model, asked.prompts)

        what = ["restored", type(donor).__name__, donor.template, asked.clean, told, error, positions]
        return self._keep(setting, asked, (name, size, draw), harmful, what, run)

    def reconstructed(self, setting: Setting, asked: Asked) -> Answered:
        """Nothing restored, the error terms left out."""

        def run() -> Answered:
            with splice(setting.model, setting.sites, error="drop"):
                return self._answers(setting.model, asked.prompts)

        what = ["reconstructed", {str(site): one.fingerprint for site, one in setting.sites.items()}]
        return self._keep(setting, asked, ("reconstruction only", 0, 0), True, what, run)

    def _answers(self, model: LanguageModel, prompts: Sequence[str]) -> Answered:
        texts = model.generate(prompts, self.tokens, batch_size=len(prompts))
        scores = refusal_log_odds(model.next_logits(model.tokenize(prompts, "left")), self._refusal_ids)
        return Answered(tuple(texts), tuple(scores.tolist()))

    def _keep(
        self,
        setting: Setting,
        asked: Asked,
        name: tuple[str, int, int],
        harmful: bool,
        what: list[Any],
        run: Callable[[], Answered],
        model: LanguageModel | None = None,
    ) -> Answered:
        models = [one.fingerprint for one in (setting.model, setting.other) if one is not None]
        told = json.dumps([setting.name, models, asked.prompts, what])
        key = hashlib.sha256(told.encode()).hexdigest()[:24]
        if key not in self._kept:
            self._kept[key] = found = run()
            line = json.dumps({"key": key, "texts": found.texts, "scores": found.scores}, ensure_ascii=False)
            with self._file.open("a", encoding="utf-8") as file:
                file.write(line + "\n")
        self._done += 1
        if self._done % SAID_EVERY == 0:
            log.info("  %d runs", self._done)
        condition, size, draw = name
        place = setting.name, condition, str(harmful), size, draw
        if place in self.rows and self.rows[place].asked.prompts != asked.prompts:
            raise AssertionError(f"two runs are called {condition!r} and asked different prompts")
        self.rows[place] = Told(model or setting.model, asked, harmful, self._kept[key])
        return self._kept[key]

    def answer_rows(self, setting: Setting, model: LanguageModel) -> list[AnswerRow]:
        """Every answer that a model gave in a setting, a row each."""
        return [
            AnswerRow(
                setting=setting.name,
                example=f"{condition}-{number:04d}",
                prompt=prompt,
                harmful="yes" if told.harmful else "no",
                condition=condition,
                latents=size,
                draw=draw,
                answer=text,
                outcome=judge(text),
                score=score,
            )
            for (name, condition, _, size, draw), told in self.rows.items()
            if name == setting.name and told.model is model
            for number, (prompt, text, score) in enumerate(
                zip(told.asked.prompts, told.answered.texts, told.answered.scores, strict=True)
            )
        ]
