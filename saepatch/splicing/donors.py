"""Restoration: overwriting latents with those of a donor that runs in parallel during generation.

Dynamic activation patching (Chen et al. 2024, "Finding Safety Neurons in Large Language Models") applied to latents: at
each step the unpatched donor processes its input with its own cache, and the model continues with the donor's latents.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saepatch.dictionaries.dictionary import Dictionary
from saepatch.dictionaries.latents import Latents
from saepatch.errors import UserError
from saepatch.model.hooks import unedited
from saepatch.model.language_model import LanguageModel, Tokens
from saepatch.model.positions import Pass, Positions
from saepatch.model.sites import Site
from saepatch.splicing.interventions import Context, Ids, Needs, ids_of


@dataclass(frozen=True)
class CleanPrompts:
    """The same model, unpatched, as a donor on other prompts, each followed by the generated tokens.

    There is one donor prompt per prompt. Prompts are aligned from the right: only their last `template` tokens (such as
    those of a chat template; None: all), and all generated tokens, have a counterpart.
    """

    prompts: tuple[str, ...]
    template: int | None = 1

    def __post_init__(self) -> None:
        _check_template(self.template)


@dataclass(frozen=True, eq=False)
class OtherModel:
    """Another model as a donor on the same tokens, such as the aligned version of a base model.

    Both models share the tokenizer and the dictionary, which has to fit both: see
    `saepatch.restoration.restore.shared_quality`. With a `template`, only the last `template` tokens of prompts and all
    generated tokens are restored; None: all tokens.
    """

    model: LanguageModel
    template: int | None = None

    def __post_init__(self) -> None:
        _check_template(self.template)


@dataclass(frozen=True, eq=False)
class CleanMeans:
    """A constant donor: each latent's mean over clean runs, by site.

    It applies to the last `template` tokens of prompts (None: all) and to all generated tokens. Means are activations:
    a dictionary that normalises its input writes them in the recipient's scale.
    """

    means: Mapping[Site, Float[Tensor, "_"]]
    template: int | None = 1

    def __post_init__(self) -> None:
        _check_template(self.template)


Donor = CleanPrompts | OtherModel | CleanMeans


def _check_template(template: int | None) -> None:
    if template is not None and template < 0:
        raise UserError(f"template of {template} positions: use 0 (generated tokens only) or more")


def _check_aligned(template: int | None, seen: Pass) -> None:
    if template is not None and not bool(seen.real[:, -1].all()):
        raise UserError("Restore aligns prompts from the right: tokenize them with side='left'")


@dataclass(frozen=True, eq=False)
class Restore:
    """Overwrite latents with those of a donor, at the positions that have a counterpart in the donor's run.

    With `error`, the donor's error term is written as well; with all latents, the site then has the donor's value.
    Dictionaries that normalise their input decode in that input's scale: each latent then writes the same as in the
    donor, its activation there times the donor's scale, and the decoder's bias and mean count as part of the error
    term. Restorations of several sites (one `Restore` each) with the same donor object share one donor run.
    """

    donor: Donor
    latents: Ids = None
    positions: Positions = "all"
    error: bool = False
    site: Site | str | None = None

    def __post_init__(self) -> None:
        if self.error and isinstance(self.donor, CleanMeans):
            raise UserError(
                "Restore(error=True) needs a donor with an error term, and CleanMeans has none: leave it out"
            )

    def in_place(
        self, site: Site, dictionary: Dictionary, recipient: LanguageModel, runs: dict[int, "DonorRun"]
    ) -> "Restoring":
        """The intervention that a splice runs; `runs` maps the id of a donor to its run."""
        donor = self.donor
        if isinstance(donor, CleanMeans):
            if site not in donor.means or donor.means[site].shape != (dictionary.d_sae,):
                raise UserError(
                    f"the clean means have no entry for the {dictionary.d_sae} latents of {site}: measure them there"
                )
            return Restoring(self, site, dictionary, None)
        if isinstance(donor, OtherModel):
            dictionary.check(donor.model, site)
        if id(donor) not in runs:
            runs[id(donor)] = DonorRun(donor, recipient)
        runs[id(donor)].sites.append(site)
        return Restoring(self, site, dictionary, runs[id(donor)])


class DonorRun:
    """The run of a donor in parallel to a splice: its own cache, one step per step of the recipient, never patched."""

    def __init__(self, donor: CleanPrompts | OtherModel, recipient: LanguageModel) -> None:
        self.donor = donor
        self.model = donor.model if isinstance(donor, OtherModel) else recipient
        self.sites: list[Site] = []
        if self.model.tokenizer is not recipient.tokenizer and (
            self.model.tokenizer.get_vocab() != recipient.tokenizer.get_vocab()
        ):
            raise UserError(
                f"{self.model.name} and {recipient.name} have different vocabularies, but the donor reads the "
                "recipient's tokens: use two models with the same tokenizer"
            )
        self.reset()

    def reset(self) -> None:
        """Discard the prompt, so that the next pass starts a new one."""
        self._cache = self.model.new_cache()
        self._tokens: Tokens | None = None  # all tokens read so far
        self._values: dict[Site, list[Tensor]] = {site: [] for site in self.sites}
        self._columns = 0  # number of the prompt's last columns whose values are kept
        self._read = 0  # number of generated tokens read

    def follow(self, seen: Pass) -> None:
        """Make one step: process the prompts on the first pass, then the tokens generated since the last pass."""
        reached = seen.start + seen.input_ids.shape[1] - seen.width
        if reached <= 0:
            self.reset()
            tokens, template = self._prompts(seen), self.donor.template
            self._columns = tokens.width if template is None else template
            self._step(tokens, 0)
        elif self._tokens is None or reached <= self._read:
            raise UserError(
                "Restore follows a single continuation of prompts that ran inside the splice: run the prompts again"
            )
        else:
            new = seen.input_ids[:, -(reached - self._read) :]
            self._read, start = reached, self._tokens.width
            real = torch.ones_like(new)
            self._step(self._tokens.followed_by(Tokens(new, real, real.bool())), start)

    def _prompts(self, seen: Pass) -> Tokens:
        """The donor's prompts."""
        donor, template = self.donor, self.donor.template
        _check_aligned(template, seen)
        if isinstance(donor, OtherModel):
            if seen.start:
                raise UserError("Restore needs the whole prompt in one pass inside the splice: run it without a cache")
            tokens = Tokens(seen.input_ids, seen.real.long(), seen.ordinary, seen.images)
        else:
            if len(donor.prompts) != len(seen.input_ids):
                raise UserError(
                    f"{len(donor.prompts)} donor prompts for {len(seen.input_ids)} prompts: give one for each"
                )
            tokens = self.model.tokenize(donor.prompts, side="left")
        shortest = min(int(where.sum(-1).min()) for where in (tokens.ordinary, seen.ordinary))
        if template is not None and not seen.start and template > shortest:
            raise UserError(
                f"template of {template} positions, but the shortest prompt has {shortest} tokens besides BOS"
            )
        return tokens

    def _step(self, tokens: Tokens, start: int) -> None:
        self._tokens, model = tokens, self.model
        # The pass may stop at the last site only if some block has run: otherwise the cache would stay empty.
        stop = any((site.layer, site.stream) != (0, "resid_pre") for site in self.sites)
        with unedited(model.layout):
            emitted = model.capture(tokens, self.sites, start, self._cache, stop)
        keep = tokens.width - start if self._read else self._columns
        for site, x in emitted.items():
            self._values[site].append(x[:, x.shape[1] - keep :])

    def value(self, site: Site, seen: Pass) -> tuple[Float[Tensor, "batch pos width"], Bool[Tensor, "batch pos"]]:
        """The donor's value of the site at the columns of this pass, and the mask of columns that have one."""
        parts = self._values[site]
        if len(parts) > 1:
            self._values[site] = parts = [torch.cat(parts, 1)]
        first = seen.width - self._columns  # first column of the whole row that has a value
        return _from_column(parts[0], first, seen)


def _from_column(
    values: Float[Tensor, "batch reach width"], first: int, seen: Pass
) -> tuple[Float[Tensor, "batch pos width"], Bool[Tensor, "batch pos"]]:
    """Move values that start at column `first` of the whole row to the columns of this pass, with a validity mask."""
    columns = torch.arange(seen.start, seen.start + seen.input_ids.shape[1], device=values.device) - first
    if not values.shape[1]:  # a prompt pass with template = 0
        values = values.new_zeros(len(values), 1, values.shape[2])
    return values[:, columns.clamp(min=0, max=values.shape[1] - 1)], (columns >= 0) & seen.real


@dataclass(eq=False)
class Restoring:
    """The intervention that a splice runs for a `Restore`, with the donor's run where there is one."""

    restore: Restore
    site: Site
    dictionary: Dictionary
    run: DonorRun | None

    def __post_init__(self) -> None:
        self._ids = ids_of(self.restore.latents)
        self._alone = None if self._ids is None or self.error else self.dictionary.alone(self._ids)
        self._seen: Tensor | None = None  # index of the pass whose encoding is cached; a new object for every pass

    @property
    def latents(self) -> Ids:
        return self.restore.latents

    @property
    def positions(self) -> Positions:
        return self.restore.positions

    @property
    def error(self) -> bool:
        return self.restore.error

    @property
    def needs(self) -> Needs:
        return Needs(error=self.error, neighbours=False)

    def edit(self, acts: Float[Tensor, "batch pos k"], context: Context) -> Float[Tensor, "batch pos k"]:
        """The donor's latents where it has values, rescaled to the recipient where the dictionary normalises."""
        seen, scale = context, context.scale
        donor = self.restore.donor
        if isinstance(donor, CleanMeans):
            if seen.start < seen.width <= seen.start + acts.shape[1]:  # given answers may be padded on the right
                _check_aligned(donor.template, seen)
            mean = donor.means[self.site].to(acts)
            values = (mean if self._ids is None else mean[list(self._ids)]).expand(len(acts), 1, -1)
            template = seen.width if donor.template is None else donor.template
            columns = torch.arange(seen.start, seen.start + acts.shape[1], device=acts.device)
            return torch.where(((columns >= seen.width - template) & seen.real)[..., None], values, acts)
        assert self.run is not None
        x, inside = self.run.value(self.site, seen)
        if self._alone is not None:
            values, theirs = self._alone.activations(x)
        elif self.error:
            values, theirs = self._encoded(x, seen).acts, self._encoded(x, seen).scale
        else:
            values, theirs = self.dictionary.activations(x)
        if self._alone is None and self._ids is not None:
            values = values[..., list(self._ids)]
        if theirs is not None and scale is not None:
            values = values * (theirs / scale.clamp(min=1e-12))
        return torch.where(inside[..., None], values, acts)

    def edit_error(self, error: Float[Tensor, "batch pos width"], context: Context) -> Float[Tensor, "batch pos width"]:
        """The donor's error term where it has values."""
        seen, own = context, context.unedited
        assert self.run is not None
        assert own is not None
        x, inside = self.run.value(self.site, seen)
        donors = self._encoded(x, seen)
        # With normalisation, the decoder's bias and the input's mean are scaled too, and differ between donor and
        # recipient: move them with the error term.
        new = donors.error if donors.scale is None else own.error + (donors.beside - own.beside)
        return torch.where(inside[..., None], new, error)

    def _encoded(self, x: Float[Tensor, "batch pos width"], seen: Pass) -> Latents:
        if self._seen is not seen.index:
            self._seen, self._latents = seen.index, self.dictionary.encode(x)
        return self._latents
