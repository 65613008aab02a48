"""Answers under restoration. Each run is made once and kept, so that a stopped experiment can be resumed."""

import hashlib
import json
import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from saepatch.dictionaries.dictionary import Dictionary
from saepatch.model.language_model import LanguageModel
from saepatch.model.sites import Site
from saepatch.records.rows import AnswerRow
from saepatch.restoration.answering import Answered
from saepatch.restoration.restore import judge
from saepatch.runs.measurements import Measurements
from saepatch.splicing.donors import Donor
from saepatch.splicing.splice import splice

from .settings import PairedPrompts, Setting

log = logging.getLogger("experiments.safety")

LOGGED_EVERY = 50  # runs between log messages
Latents = Mapping[Site, tuple[int, ...]]
Dictionaries = Mapping[Site, Dictionary]


@dataclass(frozen=True, eq=False)
class Restored:
    """What a run restores.

    Attributes:
        name: The condition, as in the rows.
        latents: Latents by site; None: all, at all sites.
        dictionaries: Dictionaries by site; None: those of the setting's sites.
        harmful: Whether the prompts are harmful.
        error: Whether the error term is restored too.
        donor: None: the setting's donor.
        draw: Number of the random set.
        positions: Positions that are restored.
    """

    name: str
    latents: Latents | None
    dictionaries: Dictionaries | None = None
    harmful: bool = True
    error: bool = False
    donor: Donor | None = None
    draw: int = 0
    positions: str = "all"


@dataclass(frozen=True, eq=False)
class SafetyRun:
    """The answers of a model to prompts."""

    model: LanguageModel
    requests: PairedPrompts
    harmful: bool
    answered: Answered


class Runs:
    """All runs of an experiment. Runs already on disk are not repeated."""

    def __init__(self, kept: Measurements, refusal_ids: set[int], tokens: int) -> None:
        self._kept, self._refusal_ids, self.tokens = kept, refusal_ids, tokens
        self._answered: dict[str, Answered] = {}
        self.rows: dict[tuple[str, str, str, int, int], SafetyRun] = {}
        self._done = 0

    def bare(self, setting: Setting, requests: PairedPrompts, harmful: bool = True, name: str = "bare") -> Answered:
        """Nothing restored."""
        run = SafetyRun(
            setting.model, requests, harmful, self._once(setting, requests, ["bare"], setting.model, requests.prompts)
        )
        return self._named(setting, (name, 0, 0), run)

    def donor(self, setting: Setting, requests: PairedPrompts, harmful: bool = True, name: str = "donor") -> Answered:
        """Answers of the donor itself."""
        model = setting.other or setting.model
        answered = self._once(setting, requests, ["donor", requests.clean], model, requests.clean)
        return self._named(setting, (name, 0, 0), SafetyRun(model, requests, harmful, answered))

    def restored(self, setting: Setting, requests: PairedPrompts, what: Restored) -> Answered:
        """Answers with latents restored from the setting's donor, or from another."""
        sites = setting.sites if what.dictionaries is None else what.dictionaries
        latents: Mapping[Site, tuple[int, ...] | None] = dict.fromkeys(sites) if what.latents is None else what.latents
        latents = {site: ids for site, ids in latents.items() if ids != ()}
        donor = what.donor or setting.donor(requests)
        ids = {str(site): [sites[site].fingerprint, ids] for site, ids in latents.items()}
        size = sum(sites[site].d_sae if ids is None else len(ids) for site, ids in latents.items())
        decides = ["restored", type(donor).__name__, donor.template, requests.clean, ids, what.error, what.positions]

        def run() -> Answered:
            with setting.restored(latents, donor, what.error, what.positions, sites):
                return self._answers(setting.model, requests.prompts)

        answered = self._once(setting, requests, decides, setting.model, requests.prompts, run)
        return self._named(
            setting, (what.name, size, what.draw), SafetyRun(setting.model, requests, what.harmful, answered)
        )

    def reconstructed(self, setting: Setting, requests: PairedPrompts) -> Answered:
        """Answers with nothing restored and the error terms left out."""

        def run() -> Answered:
            with splice(setting.model, setting.sites, error="drop"):
                return self._answers(setting.model, requests.prompts)

        decides = ["reconstructed", {str(site): dictionary.fingerprint for site, dictionary in setting.sites.items()}]
        answered = self._once(setting, requests, decides, setting.model, requests.prompts, run)
        return self._named(setting, ("reconstruction only", 0, 0), SafetyRun(setting.model, requests, True, answered))

    def _answers(self, model: LanguageModel, prompts: Sequence[str]) -> Answered:
        return Answered.by(model, prompts, self.tokens, self._refusal_ids)

    def _once(
        self,
        setting: Setting,
        requests: PairedPrompts,
        decides: list[Any],
        model: LanguageModel,
        prompts: Sequence[str],
        run: Callable[[], Answered] | None = None,
    ) -> Answered:
        """The answers of `run` (without it, the model's own), made once for each combination of the arguments."""
        models = [model.fingerprint for model in (setting.model, setting.other) if model is not None]
        whole = json.dumps([setting.name, models, requests.prompts, decides])
        key = hashlib.sha256(whole.encode()).hexdigest()[:24]
        if key not in self._answered:
            kept = self._kept.get(key, lambda: vars(self._answers(model, prompts) if run is None else run()))
            self._answered[key] = Answered(tuple(kept["texts"]), tuple(kept["scores"]))
        self._done += 1
        if self._done % LOGGED_EVERY == 0:
            log.info("  %d runs", self._done)
        return self._answered[key]

    def _named(self, setting: Setting, name: tuple[str, int, int], run: SafetyRun) -> Answered:
        """Record a run under the name of its rows: condition, number of latents, draw."""
        condition, size, draw = name
        place = setting.name, condition, str(run.harmful), size, draw
        if place in self.rows and self.rows[place].requests.prompts != run.requests.prompts:
            raise AssertionError(f"two runs are called {condition!r} but have different prompts")
        self.rows[place] = run
        return run.answered

    def answer_rows(self, setting: Setting, model: LanguageModel) -> list[AnswerRow]:
        """A row for each answer of a model in a setting."""
        return [
            AnswerRow(
                setting=setting.name,
                example=f"{condition}-{number:04d}",
                prompt=prompt,
                harmful="yes" if run.harmful else "no",
                condition=condition,
                latents=size,
                draw=draw,
                answer=text,
                outcome=judge(text),
                score=score,
            )
            for (name, condition, _, size, draw), run in self.rows.items()
            if name == setting.name and run.model is model
            for number, (prompt, text, score) in enumerate(
                zip(run.requests.prompts, run.answered.texts, run.answered.scores, strict=True)
            )
        ]
