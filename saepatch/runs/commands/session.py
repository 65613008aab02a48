"""`saepatch steer`: prompts answered with and without an intervention on latents, once or as a chat."""

import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

from saepatch.data.texts import load_texts
from saepatch.dictionaries.active_values import StrengthUnits
from saepatch.dictionaries.dictionary import Dictionary
from saepatch.dictionaries.latent_set import LatentSet
from saepatch.dictionaries.loading import load_sae
from saepatch.errors import UserError
from saepatch.model.language_model import LanguageModel
from saepatch.model.sites import Site
from saepatch.runs.interpret import read_model, read_positions
from saepatch.settings.mixins import latents_of_sites
from saepatch.settings.steer import SteerConfig
from saepatch.splicing.interventions import Ablate, AtLeast, Clamp, Intervention, Steer
from saepatch.steering.contrasts import corpus_units
from saepatch.steering.streaming import Sampling, Written, side_by_side

log = logging.getLogger(__name__)

ACTS: dict[str, type[Steer] | type[Clamp] | type[AtLeast]] = {"add": Steer, "clamp": Clamp, "at-least": AtLeast}
ENDED = {"loop": " […: it repeats itself]", "length": " […]", "context": " […: the model's context is full]"}


@dataclass(eq=False)
class Session:
    """A model, the latents to act on, and (in a chat) the turns so far: without and with the intervention."""

    model: LanguageModel
    dictionaries: dict[Site, Dictionary]
    latents: dict[Site, tuple[int, ...]]
    units: dict[Site, tuple[float, ...]]
    maxima: dict[Site, tuple[float, ...]]
    """Largest activations in the reference texts; empty where none were read."""
    warnings: list[str]
    """What is odd about the units, a sentence each."""
    config: SteerConfig
    strength: float
    turns: tuple[list[dict[str, str]], list[dict[str, str]]] = field(default_factory=lambda: ([], []))
    prompts: tuple[str, str] = ("", "")
    """The prompts of the last answers, without and with the intervention."""

    @property
    def chats(self) -> bool:
        """Whether prompts are put into the model's chat template as requests."""
        chat = self.config.chat
        return bool(self.model.tokenizer.chat_template) and self.config.interactive if chat is None else chat

    def interventions(self) -> list[Intervention]:
        """The requested interventions, one for each site."""
        config, positions = self.config, read_positions(self.config.positions)
        interventions: list[Intervention] = []
        for site, ids in self.latents.items():
            if config.act == "ablate":
                interventions.append(Ablate(ids, positions=positions, site=site))
            else:
                intervention = ACTS[config.act](ids, self.strength, self.units[site], positions, site, config.decay)
                interventions.append(intervention)
        return interventions

    def answer(self, prompt: str) -> Iterator[tuple[Written, Written]]:
        """Yield both continuations as they grow, without and with the intervention; a chat remembers both."""
        prompts = (prompt, prompt)
        if self.chats:
            if not self.model.tokenizer.chat_template:
                raise UserError(f"the tokenizer of {self.model.name!r} has no chat template: leave --chat out")
            for turns in self.turns:
                turns.append({"role": "user", "content": prompt})
            prompts = (self.model.chat(self.turns[0]), self.model.chat(self.turns[1]))
        self.prompts = prompts
        sampling = Sampling(self.config.max_new_tokens, self.config.temperature, self.config.seed)
        both = (Written(), Written())
        try:
            for both in side_by_side(self.model, self.dictionaries, self.interventions(), prompts, sampling):
                yield both
        except BaseException:  # a request without an answer does not enter the chat
            for turns in self.turns if self.chats else ():
                turns.pop()
            raise
        for turns, written in zip(self.turns, both, strict=True) if self.chats else ():
            turns.append({"role": "assistant", "content": written.text.strip()})

    def reset(self) -> None:
        """Forget the conversation so far."""
        for turns in self.turns:
            turns.clear()

    @property
    def title(self) -> str:
        """The intervention in a few words."""
        where = ", ".join(f"{site}:{','.join(map(str, ids))}" for site, ids in self.latents.items())
        return f"{self.config.act} {where}" + ("" if self.config.act == "ablate" else f" × {self.strength:g}")

    def record(self, prompt: str, bare: Written, steered: Written) -> dict[str, Any]:
        """One answer as JSON values."""
        return {
            "prompt": prompt,
            "before": bare.text,
            "after": steered.text,
            "before_ended": bare.ended,
            "after_ended": steered.ended,
            "act": self.config.act,
            "latents": LatentSet.of(self.latents).facts(),
            "strength": self.strength,
            "units": {str(site): list(units) for site, units in self.units.items()},
            "quantile": self.config.quantile if self.maxima else None,
            "maxima": {str(site): list(maxima) for site, maxima in self.maxima.items()},
            "positions": self.config.positions,
            "decay": self.config.decay,
            "chat": self.chats,
            "temperature": self.config.temperature,
            "seed": self.config.seed,
            "model": f"{self.model.name} ({self.model.fingerprint})",
            "dictionaries": {str(s): f"{d.name} ({d.fingerprint})" for s, d in self.dictionaries.items()},
        }


def texts_of(both: tuple[Written, Written]) -> list[str]:
    """Both texts, each marked with the reason it was cut off, if it was."""
    return [written.text + ENDED.get(written.ended, "") for written in both]


def open_session(config: SteerConfig) -> Session:
    """Load the model and the dictionaries, and measure the latents' units of strength.

    Units that are far below a latent's largest activation are warned about.

    Raises:
        UserError: the model or a dictionary cannot be loaded, they do not fit together, or a latent never fires in the
            reference texts.
    """
    sites = latents_of_sites(config.latent)
    read_positions(config.positions)
    texts = load_texts(config.reference or "organism") if not config.unit and config.act != "ablate" else []
    model = read_model(config)
    every = config.every_position
    dictionaries = {site: load_sae(config.sae, site, model.device, every_position=every) for site in sites}

    def measured(dictionary: Dictionary, ids: tuple[int, ...]) -> StrengthUnits:
        return corpus_units(model, dictionary, texts, ids, config.quantile)

    session = session_on(model, dictionaries, config, measured, len(texts))
    for warning in session.warnings:
        log.warning("%s", warning)
    return session


def session_on(
    model: LanguageModel,
    dictionaries: Mapping[Site, Dictionary],
    config: SteerConfig,
    measured: Callable[[Dictionary, tuple[int, ...]], StrengthUnits],
    texts: int,
) -> Session:
    """A session on a loaded model. `measured` gives latents' units over so many texts, where the settings give none.

    Raises:
        UserError: a dictionary is not there or does not fit the model, or a latent never fires in the texts.
    """
    latents = latents_of_sites(config.latent)
    chosen: dict[Site, Dictionary] = {}
    units: dict[Site, tuple[float, ...]] = {}
    maxima: dict[Site, tuple[float, ...]] = {}
    warnings: list[str] = []
    for site, ids in latents.items():
        if site not in dictionaries:
            raise UserError(f"there is no dictionary at {site}: use one of {', '.join(map(str, dictionaries))}")
        chosen[site] = dictionaries[site]
        chosen[site].check(model)
        chosen[site].check_ids(ids)
        units[site] = (config.unit or 1.0,) * len(ids)
        if not config.unit and config.act != "ablate":
            measures = measured(chosen[site], ids)
            units[site], maxima[site] = tuple(measures.unit.tolist()), tuple(measures.maximum.tolist())
            warnings += measures.warnings(ids)
            if silent := [latent for latent, unit in zip(ids, units[site], strict=True) if not unit]:
                raise UserError(
                    f"latent {silent[0]} of {site} never fires in the {texts} reference texts, so there is no "
                    "activation to scale its strength by: give other texts with --reference, or --unit 1"
                )
    return Session(model, chosen, latents, units, maxima, warnings, config, config.strength)
