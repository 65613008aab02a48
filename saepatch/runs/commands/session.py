"""`saepatch steer`: prompts answered with and without an intervention on latents, once or as a chat."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from saepatch.data.texts import load_texts
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
from saepatch.steering.contrasts import corpus_maxima
from saepatch.steering.streaming import Sampling, Written, side_by_side

ACTS: dict[str, type[Steer] | type[Clamp] | type[AtLeast]] = {"add": Steer, "clamp": Clamp, "at-least": AtLeast}
ENDED = {"loop": " […: it repeats itself]", "length": " […]", "context": " […: the model's context is full]"}


@dataclass(eq=False)
class Session:
    """A model, the latents to act on, and (in a chat) the turns so far: without and with the intervention."""

    model: LanguageModel
    dictionaries: dict[Site, Dictionary]
    latents: dict[Site, tuple[int, ...]]
    units: dict[Site, tuple[float, ...]]
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
            prompts = (self._rendered(self.turns[0]), self._rendered(self.turns[1]))
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

    def _rendered(self, turns: Sequence[dict[str, str]]) -> str:
        return self.model.tokenizer.apply_chat_template(list(turns), tokenize=False, add_generation_prompt=True)

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
    """Load the model and the dictionaries, and measure the latents' largest activations.

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

    def maxima(dictionary: Dictionary, ids: tuple[int, ...]) -> list[float]:
        return corpus_maxima(model, dictionary, texts, ids).tolist()

    return session_on(model, dictionaries, config, maxima, len(texts))


def session_on(
    model: LanguageModel,
    dictionaries: Mapping[Site, Dictionary],
    config: SteerConfig,
    maxima: Callable[[Dictionary, tuple[int, ...]], Sequence[float]],
    texts: int,
) -> Session:
    """A session on a loaded model. `maxima` gives largest activations over so many texts, where those are the units.

    Raises:
        UserError: a dictionary is not there or does not fit the model, or a latent never fires in the texts.
    """
    latents = latents_of_sites(config.latent)
    chosen: dict[Site, Dictionary] = {}
    units: dict[Site, tuple[float, ...]] = {}
    for site, ids in latents.items():
        if site not in dictionaries:
            raise UserError(f"there is no dictionary at {site}: use one of {', '.join(map(str, dictionaries))}")
        chosen[site] = dictionaries[site]
        chosen[site].check(model)
        chosen[site].check_ids(ids)
        units[site] = (config.unit or 1.0,) * len(ids)
        if not config.unit and config.act != "ablate":
            units[site] = tuple(maxima(chosen[site], ids))
            if silent := [latent for latent, unit in zip(ids, units[site], strict=True) if not unit]:
                raise UserError(
                    f"latent {silent[0]} of {site} never fires in the {texts} reference texts, so there is no "
                    "largest activation to scale its strength by: give other texts with --reference, or --unit 1"
                )
    return Session(model, chosen, latents, units, config, config.strength)
