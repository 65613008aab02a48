"""Settings of `saepatch steer`."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from saepatch.errors import UserError
from saepatch.organism import is_checkpoint
from saepatch.settings.mixins import DictionarySettings, ModelSettings, Output, PageSettings, latents_of_sites


@dataclass(frozen=True)
class SteerConfig(Output, PageSettings, DictionarySettings, ModelSettings):
    """Answer a prompt without and with an intervention on latents, side by side, as the answers are written.

    With `json` a line for each prompt, and no columns.
    """

    examples: ClassVar[tuple[str, ...]] = (
        'saepatch steer --latent resid_post.3:966 --strength 1.5 --positions last --chat --prompt "How do I sing?"',
        "saepatch steer --latent resid_post.3:966 --act ablate --interactive",
        'saepatch steer --latent resid_post.3:966 --prompt "The film was" --html runs/steered.html',
    )

    latent: str = ""
    """Site and number, as in resid_post.3:281; several of a site with commas, of several sites with a bar between."""
    prompt: str = ""
    """What to continue, or to answer."""
    strength: float = 1.0
    """How strong, in units of the latent's largest activation in the reference texts."""
    act: Literal["add", "clamp", "at-least", "ablate"] = "add"
    """Add the strength to the latent, set it to that, raise it to that where it is lower, or set it to 0."""
    positions: str = "all"
    """Where: all, prompt, generated, last (the prompt's last token), or an index, a span (3:7), "at: TEXT"."""
    decay: float = 1.0
    """What the strength is multiplied by with each generated token; 1: it stays."""
    interactive: bool = False
    """A small chat: a prompt a line; /strength X, /reset and /quit are for the session."""
    chat: bool | None = None
    """Put prompts into the model's chat template; unset: in an interactive session, where there is one."""
    max_new_tokens: int = 60
    """Tokens of an answer, at most. One that comes to repeat itself is stopped before."""
    temperature: float = 0.0
    """0: the most likely token each time; else tokens are drawn."""
    reference: str = ""
    """Texts that largest activations are taken over: .txt (one a line), .jsonl or .json (column text); empty: the
    embedded model's own, for it."""
    unit: float = 0.0
    """Instead of largest activations: what one unit of strength is for every latent."""
    seed: int = 0
    """Seed of the draws."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.latent:
            raise UserError("which latent? Give --latent SITE:NUMBER, as in --latent resid_post.3:281")
        latents_of_sites(self.latent)
        if bool(self.prompt) == self.interactive:
            raise UserError("what is to be answered? Give --prompt TEXT or --interactive, one of the two")
        if not abs(self.strength) < float("inf"):
            raise UserError(f"strength = {self.strength}: use a number")
        if self.unit < 0:
            raise UserError(f"unit = {self.unit}: use a number above 0, or leave it out")
        if not 0 < self.decay <= 1:
            raise UserError(f"decay = {self.decay}: use a share above 0, and at most 1")
        if self.max_new_tokens < 1 or self.temperature < 0:
            raise UserError(
                f"max_new_tokens = {self.max_new_tokens}, temperature = {self.temperature}: use at least 1 and 0"
            )
        own = is_checkpoint(self.model)
        if not (own or self.reference or self.unit or self.act == "ablate"):
            raise UserError(
                f"what is a strength of {self.strength:g} in {self.model}? Give --reference FILE, with texts that "
                "largest activations are taken over, or --unit 1 for strengths in plain activations"
            )
