"""Settings of `saepatch steer`."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from saepatch.errors import UserError
from saepatch.organism import is_checkpoint
from saepatch.settings.mixins import DictionarySettings, ModelSettings, Output, PageSettings, latents_of_sites


@dataclass(frozen=True)
class SteerConfig(Output, PageSettings, DictionarySettings, ModelSettings):
    """Answer a prompt without and with an intervention on latents, streamed side by side.

    With `json`, one line per prompt and no columns.
    """

    examples: ClassVar[tuple[str, ...]] = (
        'saepatch steer --latent resid_post.3:966 --strength 1.5 --positions last --chat --prompt "How do I sing?"',
        "saepatch steer --latent resid_post.3:966 --act ablate --interactive",
        'saepatch steer --latent resid_post.3:966 --prompt "The film was" --html runs/steered.html',
    )

    latent: str = ""
    """Site and number, as in resid_post.3:281; separate latents of one site by commas, sites by bars."""
    prompt: str = ""
    """Text to continue or to answer."""
    strength: float = 1.0
    """Steering strength, in units of a large activation of the latent in the reference texts (see quantile)."""
    act: Literal["add", "clamp", "at-least", "ablate"] = "add"
    """Add the strength to the latent, set it to that, raise it to that where it is lower, or set it to 0."""
    positions: str = "all"
    """Where: all, prompt, generated, last (the prompt's last token), or an index, a span (3:7), "at: TEXT",
    "turn: ROLE" (of a chat)."""
    decay: float = 1.0
    """Factor on the strength for each generated token; 1: no decay."""
    interactive: bool = False
    """An interactive chat, one prompt per line; /strength X, /reset and /quit control it."""
    chat: bool | None = None
    """Put prompts into the model's chat template; unset: only in an interactive session of a model that has one."""
    max_new_tokens: int = 60
    """Maximum number of tokens of an answer. An answer that repeats itself is stopped earlier."""
    temperature: float = 0.0
    """0: greedy decoding; above 0: tokens are sampled."""
    reference: str = ""
    """Texts over which units are taken: .txt (one per line), .jsonl or .json (column text); empty: the embedded model's
    own texts."""
    quantile: float = 0.95
    """Share of its positive activations that a latent's unit is not below; 1: its largest, even if it is an outlier."""
    unit: float = 0.0
    """Activation that one unit of strength means for every latent, instead of that quantile."""
    seed: int = 0
    """Seed for sampling."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.latent:
            raise UserError("no latent: give --latent SITE:NUMBER, as in --latent resid_post.3:281")
        latents_of_sites(self.latent)
        if bool(self.prompt) == self.interactive:
            raise UserError("nothing to answer, or two things: give either --prompt TEXT or --interactive")
        if not abs(self.strength) < float("inf"):
            raise UserError(f"strength = {self.strength}: use a finite number")
        if self.unit < 0:
            raise UserError(f"unit = {self.unit}: use a number above 0, or leave it out")
        if not 0 < self.quantile <= 1:
            raise UserError(f"quantile = {self.quantile}: use a share above 0 and at most 1 (the largest activation)")
        if not 0 < self.decay <= 1:
            raise UserError(f"decay = {self.decay}: use a number above 0 and at most 1")
        if self.max_new_tokens < 1 or self.temperature < 0:
            raise UserError(
                f"max_new_tokens = {self.max_new_tokens}, temperature = {self.temperature}: use at least 1 and 0"
            )
        own = is_checkpoint(self.model)
        if not (own or self.reference or self.unit or self.act == "ablate"):
            raise UserError(
                f"no unit for a strength of {self.strength:g} in {self.model}: give --reference FILE, texts over which "
                "activations are read, or --unit 1 for strengths in plain activations"
            )
