"""A sparse autoencoder at one site: encoding, decoding of edits, and checks against the model."""

import logging
from collections.abc import Sequence
from copy import copy
from dataclasses import dataclass, replace
from functools import cached_property, lru_cache
from typing import TYPE_CHECKING, Any

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor, nn

from saepatch.dictionaries.checks import check_fit
from saepatch.dictionaries.latents import Latents
from saepatch.errors import UserError
from saepatch.model.fingerprint import fingerprint
from saepatch.model.inputs.tokens import without_tokens
from saepatch.model.positions import GROUPS, Positions
from saepatch.model.sites import Site
from saepatch.records.figures import renamed_figures

if TYPE_CHECKING:
    from saepatch.model.inputs.tokens import Tokens
    from saepatch.model.language_model import LanguageModel

log = logging.getLogger(__name__)


BY_LATENT = frozenset({"W_enc", "W_dec", "b_enc", "b_dec", "threshold", "b_gate", "b_mag", "r_mag"})


FEW = 16  # up to this many positions, decoding only the active latents is cheaper than decoding all


@dataclass(frozen=True, eq=False, repr=False)
class Dictionary:
    """A sae_lens SAE and the site it reads and writes.

    With `every_position` it counts as trained on all tokens, whatever its metadata: see `excluded_tokens`.
    """

    sae: nn.Module
    site: Site
    name: str
    every_position: bool = False

    def __repr__(self) -> str:
        return (
            f"Dictionary({self.name!r} at {self.site}: {self.architecture}, {self.d_sae} latents of width {self.d_in})"
        )

    @property
    def cfg(self) -> Any:
        return self.sae.cfg

    @property
    def d_in(self) -> int:
        return int(self.cfg.d_in)

    @property
    def writes(self) -> slice:
        """The columns of the site's value that it reconstructs: all, but for a transcoder."""
        return slice(None)

    @property
    def d_sae(self) -> int:
        return int(self.cfg.d_sae)

    @property
    def architecture(self) -> str:
        return str(self.cfg.architecture())

    @property
    def dtype(self) -> torch.dtype:
        return self.W_dec.dtype

    @property
    def W_dec(self) -> Float[Tensor, "d_sae d_in"]:
        return self.sae.W_dec.detach()  # type: ignore[operator]

    @cached_property
    def rows(self) -> Float[Tensor, "d_sae d_in"]:
        """What one unit of each latent adds to the site: `W_dec`, normalised rows where the SAE rescales by norms."""
        if getattr(self.cfg, "rescale_acts_by_decoder_norm", False):
            return self.W_dec / self.W_dec.norm(dim=-1, keepdim=True)
        return self.W_dec

    @cached_property
    def fingerprint(self) -> str:
        """First 16 hexadecimal digits of the SHA-256 of all weights."""
        return fingerprint(self.sae.state_dict())

    def excluded_tokens(self, model: "LanguageModel") -> tuple[int, ...]:
        """Ids of the tokens that it was not trained on, according to its metadata (`exclude_special_tokens`).

        Like BOS, they are not edited (`editable`), keep the model's own value in a bottleneck, and are left out of
        figures, statistics and cards. Without the entry, there are none. `true` means the same as in sae_lens: BOS,
        EOS, padding and separators, but no chat markers.

        Raises:
            UserError: the entry is not a list of ids.
        """
        stated = None if self.every_position else self.cfg.metadata.get("exclude_special_tokens")
        if stated is None or stated is False:
            return ()
        if stated is True:
            stated = _special_tokens(model.tokenizer)
        if not isinstance(stated, list | tuple) or not all(type(token) is int for token in stated):
            raise UserError(
                f"dictionary {self.name} says exclude_special_tokens = {stated!r}, which is not a list of token ids: "
                "load it with every_position=True, or correct its cfg.json"
            )
        return tuple(sorted(stated))

    def editable(
        self,
        model: "LanguageModel",
        input_ids: Int[Tensor, "batch pos"],
        chosen: Bool[Tensor, "batch pos"],
        positions: Positions,
    ) -> Bool[Tensor, "batch pos"]:
        """The chosen positions at which it may be read and edited: those that hold tokens it was trained on.

        Logs once that other positions are left out.

        Raises:
            UserError: `positions` select such a position explicitly, by an index or a text.
        """
        known = without_tokens(input_ids, chosen, self.excluded_tokens(model))
        left_out = chosen & ~known
        if not bool(left_out.any()):
            return known
        tokens = model.token_texts(input_ids[left_out].unique().tolist())
        names = ", ".join(map(repr, tokens[:3])) + (", …" if len(tokens) > 3 else "")
        which = f"tokens that dictionary {self.name} was not trained on ({names})"
        if not (isinstance(positions, str) and positions in GROUPS):
            raise UserError(
                f"positions {positions!r} select {which}: choose others, or use it there as well, with "
                "every_position=True (--every_position)"
            )
        if not self._notes:
            self._notes.append(which)
            log.warning(
                "%d of %d positions hold %s: they are left out (included with every_position=True, --every_position)",
                int(left_out.sum()), int(chosen.sum()), which,
            )  # fmt: skip
        return known

    @cached_property
    def _notes(self) -> list[str]:
        return []

    def known(self, model: "LanguageModel", tokens: "Tokens") -> "Tokens":
        """The batch, ordinary where the dictionary was trained."""
        return tokens.without(self.excluded_tokens(model))

    @property
    def normalises(self) -> bool:
        """Whether the SAE normalises its inputs and rescales its reconstructions."""
        return self.cfg.normalize_activations != "none"

    @torch.no_grad()
    def activations(
        self, x: Float[Tensor, "batch pos d_in"]
    ) -> tuple[Float[Tensor, "batch pos d_sae"], Float[Tensor, "batch pos 1"] | None]:
        """Latents of a site's value, and the scale they are decoded with (as in `Latents`), without decoding."""
        acts = self.sae.encode(x.to(self.dtype))  # type: ignore[operator]
        # sae_lens stores the input's normalisation as state that `decode` consumes: read it first.
        scale: Any = None
        if self.cfg.normalize_activations == "layer_norm":
            scale = self.sae.ln_std
        elif self.cfg.normalize_activations == "constant_norm_rescale":
            scale = 1 / self.sae.x_norm_coeff  # type: ignore[operator]
        return acts, scale

    @torch.no_grad()
    def written(self, x: Float[Tensor, "batch pos d_in"]) -> Float[Tensor, "batch pos d_sae"]:
        """What each latent writes along its row: its activation, times the scale where the SAE normalises."""
        acts, scale = self.activations(x)
        return acts if scale is None else acts * scale

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "batch pos d_in"]) -> Latents:
        """Latents and error term of a site's value, in the dictionary's dtype."""
        x = x.to(self.dtype)
        acts, scale = self.activations(x)
        reconstruction = self._decode(acts)
        return Latents(acts, x - reconstruction, reconstruction, self.rows, scale)

    def _decode(self, acts: Float[Tensor, "batch pos d_sae"]) -> Float[Tensor, "batch pos d_in"]:
        """The reconstruction; from the active rows only where these are few, as in a step of generation."""
        if acts.shape[:2].numel() <= FEW and self._rows_and_bias and not _hooked(self.sae):
            active = acts.flatten(0, 1).ne(0).any(0).nonzero().flatten()
            if 8 * len(active) <= self.d_sae:
                return acts[..., active] @ self.W_dec[active] + self.sae.b_dec.detach()  # type: ignore[operator]
        return self.sae.decode(acts)  # type: ignore[operator]

    @cached_property
    def _rows_and_bias(self) -> bool:
        """Whether decoding is `acts @ W_dec + b_dec`."""
        from sae_lens.saes.topk_sae import TopKSAE

        if getattr(self.cfg, "rescale_acts_by_decoder_norm", False) or self.normalises:
            return False
        return type(self.sae) in (*_latent_by_latent(), TopKSAE)

    def alone(self, ids: Sequence[int]) -> "Dictionary | None":
        """A dictionary of only these latents; None where latents cannot be computed independently of each other.

        It runs the SAE's encoder on the weights of these latents. Its activations and edits are those of the full
        dictionary; its error term is meaningless.
        """
        if not ids or not self._separable or _hooked(self.sae):
            return None
        return self._only(ids)

    def _only(self, ids: Sequence[int]) -> "Dictionary":
        sae: Any = copy(self.sae)
        chosen = torch.tensor(list(ids), device=self.W_dec.device)
        weights: dict[str, Any] = dict(self.sae._parameters)
        for name, weight in weights.items():
            if weight is not None and name not in ("b_dec", "W_skip"):
                few = weight.detach().index_select(1 if name == "W_enc" else 0, chosen)
                weights[name] = nn.Parameter(few, requires_grad=False)
        sae.__dict__["_parameters"] = weights
        sae.cfg = copy(self.cfg)
        sae.cfg.d_sae = len(ids)
        return replace(self, sae=sae)

    @cached_property
    def _separable(self) -> bool:
        """Whether a latent can be computed without the others: tested once, on inputs that activate some latents."""
        if type(self.sae) not in _latent_by_latent() or self.normalises:
            return False
        if not {name for name, weight in self.sae._parameters.items() if weight is not None} <= BY_LATENT:
            return False
        ids = list(range(0, self.d_sae, 1 + self.d_sae // 8))
        columns = self.sae.W_enc.detach()[:, ids].T  # type: ignore[operator]
        x = torch.cat([size * columns / columns.norm(dim=-1, keepdim=True).clamp(min=1e-6) for size in (1, 10, 100)])
        few, all_of_them = self._only(ids).activations(x[None])[0], self.activations(x[None])[0][..., ids]
        close = 1e-4 if self.dtype == torch.float32 else 5e-2
        same = torch.allclose(few, all_of_them, rtol=close, atol=close * float(all_of_them.abs().max()))
        if not same:
            log.info("%s: latents encoded alone differ from latents encoded together: all are encoded", self.name)
        return same

    def check_ids(self, ids: tuple[int, ...]) -> None:
        """Raises UserError for a latent that the dictionary does not have."""
        for latent in ids:
            if not 0 <= latent < self.d_sae:
                raise UserError(f"latent {latent} is out of range: {self.name} has {self.d_sae}, 0 to {self.d_sae - 1}")

    def metrics_on(self, model: "LanguageModel") -> dict[str, float]:
        """Metrics that training measured on held-out text with this exact model; empty if there are none."""
        return dict(self.trained_on.get(model.fingerprint) or {})

    @property
    def trained_on(self) -> dict[str, dict[str, float]]:
        """Metrics that training measured, by the fingerprint of each training model; empty where none are recorded."""
        metadata = self.cfg.metadata
        first = {"model_fingerprint": metadata.get("model_fingerprint"), "metrics": metadata.get("metrics")}
        models = [first, *(metadata.get("also_trained_on") or [])]
        return {
            model["model_fingerprint"]: renamed_figures(model["metrics"] or {})
            for model in models
            if model["model_fingerprint"]
        }

    def check(self, model: "LanguageModel", site: Site | None = None) -> None:
        """Check that the dictionary fits the site of the model.

        Raises:
            UserError: width, site or device differ.
        """
        check_fit(self, model, site or self.site)


@lru_cache(maxsize=8)
def _special_tokens(tokenizer: Any) -> tuple[int, ...]:
    """The ids that sae_lens leaves out for `exclude_special_tokens: true`."""
    from sae_lens.util import get_special_token_ids

    return tuple(get_special_token_ids(tokenizer))


def _latent_by_latent() -> tuple[type[nn.Module], ...]:
    """sae_lens' SAE classes that compute each latent from its own weights; subclasses may not."""
    from sae_lens.saes.gated_sae import GatedSAE
    from sae_lens.saes.jumprelu_sae import JumpReLUSAE
    from sae_lens.saes.standard_sae import StandardSAE

    return StandardSAE, JumpReLUSAE, GatedSAE


def _hooked(sae: nn.Module) -> bool:
    """Whether the SAE has hooks, which require it to run in full."""
    return any(module._forward_hooks or module._forward_pre_hooks for module in sae.modules())
