"""Transcoders: dictionaries that read what an MLP reads and write what it adds (Dunefsky et al. 2024).

A skip-transcoder adds a linear map of its input to what it writes (Paulo et al. 2025). The site is `mlp` (`Site`): one
tensor of both, of which edits write the first part. So latents, error term and edits mean the same as for an
autoencoder: the error term is what the MLP adds minus the reconstruction, and travels with the latents.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import torch
from jaxtyping import Float
from torch import Tensor, nn

from saepatch.dictionaries.dictionary import Dictionary
from saepatch.dictionaries.latents import Latents
from saepatch.errors import UserError
from saepatch.model.hooks import unedited
from saepatch.model.sites import TRANSCODED, Site

if TYPE_CHECKING:
    from saepatch.model.language_model import LanguageModel

# Under TransformerLens' names. Some files give `hook_mlp_in` or `ln2.hook_normalized`, which are other tensors, for
# what the MLP reads: the check by reconstruction decides.
READS = ("mlp.hook_in", "hook_mlp_in", "ln2.hook_normalized")
WRITES = ("hook_mlp_out", "mlp.hook_out")
HF_READS = r"(?:\w+\.)*?(\d{1,9})\.(?:mlp\.input|\w*(?:norm|ln_)\w*\.output)"
HF_WRITES = r"(?:\w+\.)*?(\d{1,9})\.(?:mlp\.output|\w*norm\w*\.output)"
PROBE = (
    "The old harbour lies to the north of the town, where the river meets the sea. In the spring of 1887 a merchant "
    "named Thomas built a wooden house there, and his family sold rope, salt and lamps to the sailors. Most of them "
    "came from far away, and few stayed for longer than a week."
)


def is_transcoder(architecture: str) -> bool:
    """Whether dictionaries of an architecture of sae_lens write another tensor than they read."""
    return "transcoder" in architecture


def site_of_transcoder(metadata: Mapping[str, Any]) -> Site:
    """The MLP that metadata name by the tensors read and written: by Hugging Face's names, where they are given.

    Raises:
        UserError: they name other tensors than those of one MLP, or none.
    """
    hf, lens = ([metadata.get(part + end) for end in ("", "_out")] for part in ("hf_hook_name", "hook_name"))
    forms = [rf"blocks\.(\d{{1,9}})\.(?:{'|'.join(map(re.escape, names))})" for names in (READS, WRITES)]
    given, forms = (hf, [HF_READS, HF_WRITES]) if all(isinstance(name, str) for name in hf) else (lens, forms)
    reads, writes = (re.fullmatch(form, str(name)) for form, name in zip(forms, given, strict=True))
    if reads is None or writes is None or reads[1] != writes[1]:
        raise UserError(
            f"it reads {given[0]!r} and writes {given[1]!r}: transcoders are spliced that read what one MLP reads and "
            "write what it adds"
        )
    return Site(int(reads[1]), TRANSCODED)


@dataclass(frozen=True, eq=False, repr=False)
class Transcoder(Dictionary):
    """A transcoder of sae_lens at an `mlp` site, whose values are [what it writes, what it reads]."""

    _checked: "WeakKeyDictionary[LanguageModel, float]" = field(default_factory=WeakKeyDictionary)

    def __post_init__(self) -> None:
        if self.site.stream != TRANSCODED:
            raise UserError(f"{self.name!r} is a {self.architecture}, at {self.site}: its site is mlp.LAYER")
        if self.normalises:
            raise UserError(f"{self.name!r} is a {self.architecture} that normalises its input: these are not spliced")
        if self.W_dec.shape[1] != self.d_out:
            raise UserError(f"{self.name!r} writes width {self.W_dec.shape[1]}, not {self.d_out}, as its cfg says")

    @property
    def d_out(self) -> int:
        return int(self.cfg.d_out)

    @property
    def d_in(self) -> int:
        """Width of the site: what is written and what is read."""
        return self.d_out + int(self.cfg.d_in)

    @property
    def writes(self) -> slice:
        return slice(0, self.d_out)

    @cached_property
    def rows(self) -> Float[Tensor, "d_sae d_in"]:
        return nn.functional.pad(self.W_dec, (0, int(self.cfg.d_in)))

    @torch.no_grad()
    def activations(self, x: Float[Tensor, "batch pos d_in"]) -> tuple[Float[Tensor, "batch pos d_sae"], None]:
        return self.sae.encode(x[..., self.d_out :].to(self.dtype)), None  # type: ignore[operator]

    @torch.no_grad()
    def encode(self, x: Float[Tensor, "batch pos d_in"]) -> Latents:
        x = x.to(self.dtype)
        read = x[..., self.d_out :]
        acts, _ = self.activations(x)
        written = self.sae.decode(acts)  # type: ignore[operator]
        if (skip := getattr(self.sae, "W_skip", None)) is not None:
            written = written + read @ skip.detach().T
        reconstruction = torch.cat([written, read], -1)
        return Latents(acts, x - reconstruction, reconstruction, self.rows)

    @cached_property
    def _separable(self) -> bool:
        """Whether each latent depends on its own weights only: not where the largest k are chosen."""
        from sae_lens.saes.transcoder import JumpReLUSkipTranscoder, JumpReLUTranscoder, SkipTranscoder
        from sae_lens.saes.transcoder import Transcoder as Plain

        known = (Plain, SkipTranscoder, JumpReLUTranscoder, JumpReLUSkipTranscoder)
        return type(self.sae) in known and isinstance(self.sae.activation_fn, nn.ReLU)

    @torch.no_grad()
    def check(self, model: "LanguageModel", site: Site | None = None) -> None:
        """Check that it fits the model, and that it reconstructs what the MLP adds from what the MLP reads.

        Names in files are often wrong about the tensors, and a transcoder on another tensor gives plausible numbers.

        Raises:
            UserError: width, site or device differ, or its error is larger than that of a constant.
        """
        super().check(model, site)
        if model not in self._checked:
            self._checked[model] = self._reconstructs(model)

    def _reconstructs(self, model: "LanguageModel") -> float:
        """The fraction of variance unexplained on a text, by the tensor that it is checked on."""
        ids, after = model.encode(PROBE)[: model.context], Site(self.site.layer, "resid_post")
        tokens = model.pad([ids])
        with unedited(model.layout):
            values = model.capture(tokens, [self.site, after])
        known = self.known(model, tokens).ordinary[0]
        x, stream = (values[site][0, known].to(self.dtype) for site in (self.site, after))
        y = x[:, self.writes]
        before = stream - y
        centred = before - before.mean(-1, keepdim=True)
        read = {
            "what the MLP reads": x[:, self.d_out :],
            "the stream before the MLP's norm (hook_mlp_in)": before,
            "that stream normalised, without the norm's weights (ln2.hook_normalized)": before
            / before.square().mean(-1, keepdim=True).sqrt(),
            "that stream centred and normalised, without the norm's weights (ln2.hook_normalized)": centred
            / centred.square().mean(-1, keepdim=True).sqrt(),
        }
        variance = (y - y.mean(0)).square().sum()
        errors = [self.encode(torch.cat([y, given], -1)[None]).error.square().sum() for given in read.values()]
        own, *others = (fvu := torch.stack(errors) / variance).tolist()
        best = int(fvu.argmin())
        if own < 1 and not (min(others) < own / 2):
            return float(own)
        instead = f"; on {list(read)[best]} it leaves {fvu[best]:.2g}" if best and fvu[best] < 1 else ""
        raise UserError(
            f"transcoder {self.name} leaves {own:.2g} of the variance of what the MLP of block {self.site.layer} of "
            f"{model.name} adds{instead}: it is not of this tensor of this model, or its weights are damaged"
        )


def adopt_transcoder(sae: nn.Module, site: Site, name: str) -> Transcoder:
    """Wrap a transcoder of sae_lens.

    Raises:
        UserError: the site is not an MLP's, or it normalises its input.
    """
    return Transcoder(sae.eval().requires_grad_(False), site, name)


def refuse_transcoder(dictionary: Dictionary, what: str) -> None:
    """Raises UserError for a transcoder given to what takes dictionaries that write what they read."""
    if isinstance(dictionary, Transcoder):
        raise UserError(
            f"{dictionary.name} is a transcoder, and {what} take dictionaries that write what they read: splice, "
            "patch, attribute, steer or read it instead"
        )


CROSS_LAYER = re.compile(r"(?:^|[/_\-.])clt(?:$|[/_\-.])", re.IGNORECASE)


def refuse_cross_layer(*names: object) -> None:
    """Raises UserError for a cross-layer transcoder, which loaders turn into a transcoder by summing its decoders."""
    if named := [str(name) for name in names if CROSS_LAYER.search(str(name or ""))]:
        raise UserError(
            f"{named[0]!r} is a cross-layer transcoder: each latent writes several layers, and sae_lens sums these "
            "decoders into one, which reconstructs none of them: use transcoders of single layers"
        )
