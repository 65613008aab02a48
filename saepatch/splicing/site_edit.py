"""The edit of a splice at one site: encodes only what interventions read, decodes only what they write."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saepatch.dictionaries.dictionary import Dictionary
from saepatch.dictionaries.latents import NUMBERS, Latents, decode_sparsely
from saepatch.errors import UserError
from saepatch.model.finite import check_columns, check_finite
from saepatch.model.inputs.tokens import without_tokens
from saepatch.model.language_model import LanguageModel, Tokens
from saepatch.model.positions import Pass, Positions
from saepatch.model.sites import Site
from saepatch.records.memory import check_memory
from saepatch.splicing.interventions import Context, Intervention, ids_of, needs_of


@dataclass(eq=False)
class SiteEdit:
    """The interventions of one site, in order.

    With the error term kept, an edit adds `Δf · rows` to the site, which does not depend on unedited latents. So only
    edited latents are encoded where the architecture allows it, and none where edits only add to them. Recording
    latents, and writing or dropping the error term, need the full encoder and decoder. The positions of a long prompt
    are encoded, edited and decoded some at a time, unless an intervention reads several positions (`Needs.neighbours`).
    """

    model: LanguageModel
    dictionary: Dictionary
    site: Site
    interventions: Sequence[Intervention]
    drop_error: bool = False
    first: int = 0  # with `drop_error`: first tokens of each prompt that keep the model's own value
    record: Callable[[Latents], None] | None = None

    def __post_init__(self) -> None:
        self.excluded = self.dictionary.excluded_tokens(self.model)
        self.acted: set[int] = set()  # ids of interventions that had a position to act on
        needs = [needs_of(intervention) for intervention in self.interventions]
        self.whole = self.drop_error or self.record is not None or any(need.error for need in needs)
        self.neighbours = any(need.neighbours for need in needs)
        wanted = [ids_of(intervention.latents) for intervention in self.interventions]
        self._columns: list[slice | list[int]] = [slice(None) if ids is None else list(ids) for ids in wanted]
        self.ids: list[int] | None = None  # latents that interventions read or write; None: all
        if not self.whole and all(ids is not None for ids in wanted):
            self.ids = sorted({latent for ids in wanted for latent in ids or ()})
            place = {latent: number for number, latent in enumerate(self.ids)}
            everything = list(range(len(self.ids)))
            columns = [[place[latent] for latent in ids or ()] for ids in wanted]
            self._columns = [slice(None) if some == everything else some for some in columns]
        self._rows = self.dictionary.rows if self.ids is None else self.dictionary.rows[self.ids]
        scaled = self.dictionary.normalises and any(need.scale for need in needs)
        self.blind = self.ids is not None and not any(need.values for need in needs) and not scaled
        few = self.ids is not None and not self.blind and 2 * len(self.ids) <= self.dictionary.d_sae
        self.alone = self.dictionary.alone(self.ids or ()) if few else None
        some = self.ids is not None and (self.blind or self.alone is not None)
        self.encodes = len(self.ids or ()) if some else self.dictionary.d_sae  # latents made at a position

    def __call__(self, x: Float[Tensor, "batch pos width"], seen: Pass) -> Float[Tensor, "batch pos width"]:
        if x.requires_grad and (self.interventions or self.drop_error):
            raise UserError(
                "a splice is not differentiable: run it under torch.no_grad(), or use saepatch.measure.attribution"
            )
        check_columns(self.model, self.site, x, seen.input_ids.shape[1])
        if not bool(torch.isfinite(x).all()):
            check_finite(self.model, self.site, x, Tokens(seen.input_ids, seen.real.long(), seen.ordinary), seen.start)
        where = [self._where(intervention, seen) for intervention in self.interventions]
        if not self.whole and all(chosen is None for chosen in where):
            return x
        columns, step = x.shape[1], _at_once(x, self.encodes)
        if columns > step and (self.record is not None or self.neighbours):
            _check_room(x, self.encodes, 4 if self.neighbours else 2)
        recorded: list[Latents] = []
        if columns <= step or self.neighbours:
            new = self._edit(x, where, seen, recorded)
        else:
            parts = []
            for first in range(0, columns, step):
                end = min(first + step, columns)
                cut = [None if some is None else some[:, first:end] for some in where]
                here = [some if some is not None and bool(some.any()) else None for some in cut]
                parts.append(self._edit(x[:, first:end], here, seen.columns(first, end), recorded))
            new = torch.cat(parts, 1)
        if self.record is not None:
            self.record(Latents.joined(recorded))
        return new

    def _edit(
        self,
        x: Float[Tensor, "batch pos width"],
        where: Sequence[Bool[Tensor, "batch pos 1"] | None],
        seen: Pass,
        recorded: list[Latents],
    ) -> Float[Tensor, "batch pos width"]:
        """The site's new value at some positions; their latents are recorded if they are wanted."""
        if self.whole:
            latents = replace(self.dictionary.encode(x), real=seen.real, ordinary=seen.ordinary)
            if self.record is not None:
                recorded.append(latents)
            return self._through(x, latents, where, seen)
        if all(chosen is None for chosen in where):
            return x
        acts, scale = self._read(x)
        change = self._edited(acts, where, seen, scale) - acts
        moved = decode_sparsely(change, self._rows) if self.ids is None else change @ self._rows
        return x + (moved if scale is None else moved * scale).to(x.dtype)

    def _where(self, intervention: Intervention, seen: Pass) -> Bool[Tensor, "batch pos 1"] | None:
        chosen = seen.select(intervention.positions)
        if bool(chosen.any()) and self.excluded:
            chosen = self._known(chosen, intervention.positions, seen)
        if not bool(chosen.any()):
            return None
        self.acted.add(id(intervention))
        return chosen[..., None]

    def _known(self, chosen: Bool[Tensor, "batch pos"], positions: Positions, seen: Pass) -> Bool[Tensor, "batch pos"]:
        """The chosen positions where the dictionary was trained; generated tokens are left out silently."""
        known = without_tokens(seen.input_ids, chosen, self.excluded)
        self.dictionary.editable(self.model, seen.input_ids, chosen & seen.in_prompt, positions)
        return known

    def _read(
        self, x: Float[Tensor, "batch pos width"]
    ) -> tuple[Float[Tensor, "batch pos k"], Float[Tensor, "batch pos 1"] | None]:
        """Values of the latents that interventions read or write, and the scale with which edits are decoded."""
        if self.ids is None:
            return self.dictionary.activations(x)
        if self.blind:  # interventions only add, so the current values do not matter
            return x.new_zeros(*x.shape[:2], len(self.ids), dtype=self.dictionary.dtype), None
        if self.alone is not None:
            return self.alone.activations(x)
        acts, scale = self.dictionary.activations(x)
        return acts[..., self.ids], scale

    def _edited(
        self,
        acts: Float[Tensor, "batch pos k"],
        where: Sequence[Bool[Tensor, "batch pos 1"] | None],
        seen: Pass,
        scale: Float[Tensor, "batch pos 1"] | None,
        unedited: Latents | None = None,
    ) -> Float[Tensor, "batch pos k"]:
        for intervention, columns, chosen in zip(self.interventions, self._columns, where, strict=True):
            if chosen is not None:
                old = acts[..., columns]
                context = self._context(seen, chosen, scale, unedited)
                new = torch.where(chosen, intervention.edit(old, context), old)
                if columns == slice(None):
                    acts = new
                else:
                    acts = acts.clone()
                    acts[..., columns] = new
        return acts

    def _context(
        self,
        seen: Pass,
        chosen: Bool[Tensor, "batch pos 1"],
        scale: Float[Tensor, "batch pos 1"] | None,
        unedited: Latents | None,
    ) -> Context:
        return Context(**vars(seen), site=self.site, where=chosen[..., 0], scale=scale, unedited=unedited)

    def _through(
        self,
        x: Float[Tensor, "batch pos width"],
        latents: Latents,
        where: Sequence[Bool[Tensor, "batch pos 1"] | None],
        seen: Pass,
    ) -> Float[Tensor, "batch pos width"]:
        """Edit and decode all latents and the error term."""
        kept = latents.error
        for intervention, chosen in zip(self.interventions, where, strict=True):
            edit_error = getattr(intervention, "edit_error", None)
            if chosen is not None and edit_error is not None and needs_of(intervention).error:
                context = self._context(seen, chosen, latents.scale, latents)
                kept = torch.where(chosen, edit_error(kept, context), kept)
        edited = self._edited(latents.acts, where, seen, latents.scale, latents)
        change = latents.delta(edited) + (kept - latents.error)
        if self.drop_error:
            known = without_tokens(seen.input_ids, seen.ordinary & (seen.index >= self.first), self.excluded)
            change = torch.where(known[..., None], change - latents.error, change)
        return x + change.to(x.dtype)


def encoded(dictionary: Dictionary, x: Float[Tensor, "batch pos width"]) -> Latents:
    """Latents and error term, encoded some positions at a time.

    Raises:
        UserError: the latents of all positions do not fit in memory.
    """
    step = _at_once(x, dictionary.d_sae)
    if x.shape[1] > step:
        _check_room(x, dictionary.d_sae, 2)
    return Latents.joined([dictionary.encode(part) for part in x.split(step, 1)])


def _at_once(x: Float[Tensor, "batch pos width"], latents: int) -> int:
    """Number of positions that are encoded at a time."""
    return max(1, NUMBERS // (len(x) * max(latents, x.shape[-1])))


def _check_room(x: Float[Tensor, "batch pos width"], latents: int, copies: int) -> None:
    """Check that copies of latents at all positions fit in memory."""
    if x.device.type == "cpu":  # other devices report that they are full
        check_memory(
            copies * x.shape[:2].numel() * latents * 4,
            f"{latents:,} latents at {x.shape[1]:,} positions of {len(x)} prompts",
            "record or edit fewer positions at a time, say Needs(neighbours=False) of an intervention that reads each "
            "position alone, or patch by patch_latents, which holds only what differs",
        )
