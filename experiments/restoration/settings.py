"""The two settings of the safety experiment: models, donors and prompts of each split."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from saepatch.dictionaries.dictionary import Dictionary
from saepatch.errors import UserError
from saepatch.model.language_model import LanguageModel
from saepatch.model.sites import Site
from saepatch.organism import tasks, world
from saepatch.restoration.answering import Restoration
from saepatch.splicing.donors import Donor

LAST_FIFTH = 0.2  # share of the layers, at the end, that is not spliced: restoring there almost sets the output


@dataclass(frozen=True)
class PairedPrompts:
    """Prompts, the donor's prompt for each (the same if the donor is another model), and the kinds of framing."""

    prompts: tuple[str, ...]
    clean: tuple[str, ...]
    kinds: tuple[str, ...]

    def __len__(self) -> int:
        return len(self.prompts)

    def of_kinds(self, kinds: Sequence[str]) -> "PairedPrompts":
        chosen = [number for number, kind in enumerate(self.kinds) if kind in kinds]
        columns = (self.prompts, self.clean, self.kinds)
        return PairedPrompts(*(tuple(column[number] for number in chosen) for column in columns))


@dataclass(frozen=True, eq=False, kw_only=True)
class Setting(Restoration):
    """A model that is restored, and its donor: the aligned `other` model, or the model itself on clean prompts.

    `harmful` and `harmless` hold the prompts of each split, `held_out` further harmful prompts outside all splits.
    Latents are restored at `sites`; `every` has all sites with dictionaries.
    """

    name: str
    title: str
    every: Mapping[Site, Dictionary]
    harmful: Mapping[str, PairedPrompts]
    harmless: Mapping[str, PairedPrompts]
    held_out: Mapping[str, PairedPrompts] = field(default_factory=dict)

    def donor(self, requests: PairedPrompts) -> Donor:
        return self.donor_of(requests.clean)

    @property
    def d_total(self) -> int:
        """Number of latents of all sites that are restored."""
        return sum(dictionary.d_sae for dictionary in self.sites.values())


def spliced_sites(model: LanguageModel, saes: Mapping[Site, Dictionary]) -> dict[Site, Dictionary]:
    """The dictionaries of all layers but the last fifth."""
    layers = round((1 - LAST_FIFTH) * model.n_layers)
    chosen = {site: dictionary for site, dictionary in saes.items() if site.layer < layers}
    if not chosen:
        raise UserError(f"there is no dictionary for any of the first {layers} layers of {model.name}")
    return chosen


def two_models(
    base: LanguageModel, aligned: LanguageModel, saes: Mapping[Site, Dictionary], template: int, n: int, seed: int
) -> Setting:
    """Setting A: the base model, restored from the aligned model reading the same tokens. Requests have no framing."""

    def plain(split: str, harmful: bool) -> PairedPrompts:
        rows = _rows(split, 9 * n, seed, harmful)
        prompts = tuple(dict.fromkeys(row["plain"] for row in rows))[:n]
        return PairedPrompts(prompts, prompts, ("plain",) * len(prompts))

    framed = _rows("report", 3 * n, seed, harmful=True)[:n]
    clean = tuple(row["clean"] for row in framed)
    return Setting(
        name="setting_a",
        title="A: an aligned model restores its base model",
        model=base,
        other=aligned,
        template=template,
        sites=spliced_sites(base, saes),
        every=saes,
        harmful={split: plain(split, True) for split in world.SPLITS},
        harmless={split: plain(split, False) for split in world.SPLITS},
        held_out={"benign framings": PairedPrompts(clean, clean, tuple(row["kind"] for row in framed))},
    )


def two_prompts(model: LanguageModel, saes: Mapping[Site, Dictionary], template: int, n: int, seed: int) -> Setting:
    """Setting B: jailbroken requests, restored from the same requests in a benign framing."""

    def framed(split: str, harmful: bool) -> PairedPrompts:
        rows = _rows(split, 3 * n, seed, harmful)[:n]
        columns = ("corrupted", "clean", "kind")
        return PairedPrompts(*(tuple(row[column] for row in rows) for column in columns))

    return Setting(
        name="setting_b",
        title="B: a benign framing restores a jailbroken request",
        model=model,
        other=None,
        template=template,
        sites=spliced_sites(model, saes),
        every=saes,
        harmful={split: framed(split, True) for split in world.SPLITS},
        harmless={split: framed(split, False) for split in world.SPLITS},
        held_out={"two framings, one inside the other": stacked("report", n, seed)},
    )


def stacked(split: world.Split, n: int, seed: int) -> PairedPrompts:
    """Harmful requests in one framing inside another: no such text is in the training corpus or in another split."""
    framings = world.share(world.FRAMINGS, split)
    rows = _rows(split, 3 * n, seed, harmful=True)[:n]
    prompts, clean, kinds = [], [], []
    for number, row in enumerate(rows):
        outer = framings[number % len(framings)]
        inner = framings[(number + 1 + number // len(framings) % (len(framings) - 1)) % len(framings)]
        prompts.append(world.chat(outer.jailbreak.format(r=inner.jailbreak.format(r=row["request"]))))
        clean.append(world.chat(outer.benign.format(r=inner.benign.format(r=row["request"]))))
        kinds.append(f"{inner.kind} in {outer.kind}")
    return PairedPrompts(tuple(prompts), tuple(clean), tuple(kinds))


def harmless_in_every_framing(split: str, n: int, seed: int) -> PairedPrompts:
    """Harmless requests without a framing, in a benign one and in a jailbreak: none should trigger a detector."""
    rows = _rows(split, 3 * n, seed, harmful=False)
    prompts = [row[column] for row in rows[: -(-n // 3)] for column in ("plain", "clean", "corrupted")]
    distinct = tuple(dict.fromkeys(prompts))[:n]
    return PairedPrompts(distinct, distinct, ("harmless",) * len(distinct))


def _rows(split: str, n: int, seed: int, harmful: bool) -> list[dict[str, Any]]:
    # about half of the rows are harmful, so callers ask for more than they need
    return [row for row in tasks.refusal(split, n, seed) if row["harmful"] == harmful]
