"""Causal tracing: which clean states, restored in a corrupted run, bring the fact back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np
from jaxtyping import Float

from saepatch.data.forms import position_labels
from saepatch.data.pairs import PromptPair
from saepatch.dictionaries.dictionary import Dictionary
from saepatch.engine.components import Edit, EditPart, ErrorTerm, Patchable, Stream
from saepatch.engine.corruptions import Corruption, GaussianNoise
from saepatch.engine.options import SweepOptions
from saepatch.errors import UserError
from saepatch.measure.patching import patch_components
from saepatch.measure.results.effects import Effects
from saepatch.model.language_model import LanguageModel
from saepatch.model.positions import Positions
from saepatch.report import HeatMap
from saepatch.splicing.splice import whole_prompt

WINDOW = 0.25  # share of the layers whose MLPs are restored together


@dataclass(frozen=True, eq=False)
class FactTrace:
    """Effects of restoring clean values at one position, by kind: "states", "MLP outputs", "latents", "error terms".

    Attributes:
        columns: A label for each position of the prompt, with its token.
        subject: Positions of the subject's tokens.
        pairs: Number of facts.
        effects: An edit is at one layer or, where `window` layers are restored together, is named by the middle one.
        window: Number of layers restored together, by kind.
    """

    columns: tuple[str, ...]
    subject: tuple[int, ...]
    pairs: int
    effects: Mapping[str, Effects]
    window: Mapping[str, int]

    def values(self, kind: str) -> tuple[list[int], Float[np.ndarray, "layers positions"]]:
        """Layers, and the share of the gap that is restored at each and at each position; NaN where not traced."""
        effects = self.effects[kind]
        layers = sorted({edit.site.layer for edit in effects.edits})
        table = np.full((len(layers), len(self.columns)), np.nan)
        for number, edit in enumerate(effects.edits):
            table[layers.index(edit.site.layer), edit.position] = effects.of(number).value
        return layers, table

    def by_layer(self, kind: str, position: int) -> dict[int, float]:
        """The share of the gap that is restored at one position, by layer; -1 is the last position."""
        layers, table = self.values(kind)
        return dict(zip(layers, table[:, position].tolist(), strict=True))

    def heat_map(self, kind: str) -> HeatMap:
        """The map of one kind, for a report."""
        layers, table = self.values(kind)
        first = self.subject[0]
        together = "" if self.window[kind] == 1 else f", {self.window[kind]} layers together, named by the middle one"
        caption = f"Share of the gap that clean {kind} restore{together}. {self.pairs} facts. "
        return HeatMap(
            f"Causal tracing: {kind}",
            [str(layer) for layer in layers],
            list(self.columns[first:]),
            table[:, first:].tolist(),
            caption + f"Corrupted: {_named(self.effects[kind])}, at tokens {first} to {self.subject[-1]}.",
            "layer",
            "token",
            value_format=".2f",
        )


def _named(effects: Effects) -> str:
    return effects.corruption or "another subject in its place"


def trace_fact(
    model: LanguageModel,
    pairs: Sequence[PromptPair] | PromptPair,
    dictionaries: Sequence[Dictionary] = (),
    corruption: GaussianNoise | None = None,
    window: int | None = None,
    options: SweepOptions | None = None,
) -> FactTrace:
    """Trace facts of one form: prompts of equal length whose subjects are at the same positions.

    The corrupted run has the corrupted prompt's subject (token replacement) or, with `corruption`, noise on the
    embeddings of the clean prompt's subject. In it, the clean run's values are restored at each layer and position:
    residual streams, outputs of `window` MLPs together (None: a quarter of the layers), and, for each dictionary, all
    its latents and its error term.

    Raises:
        UserError: prompts of different forms, or a corruption without a subject.

    Source: Meng et al. 2022, "Locating and Editing Factual Associations in GPT", section 2.1. Token replacement is
    recommended by Zhang and Nanda 2024, "Towards Best Practices of Activation Patching".
    """
    several = [pairs] if isinstance(pairs, PromptPair) else list(pairs)
    subject = corrupted_positions(model, several, None if corruption is None else corruption.subject)
    restore = partial(restore_windows, model, several, subject[0], corruption, options=options)
    effects, windows = {"states": restore("resid_post", 1)}, {"states": 1}
    if "mlp_out" in model.layout.streams:
        windows["MLP outputs"] = max(1, round(WINDOW * model.n_layers)) if window is None else window
        effects["MLP outputs"] = restore("mlp_out", windows["MLP outputs"])
    if dictionaries:
        kinds: dict[str, list[Patchable]] = {
            "latents": list(dictionaries),
            "error terms": [ErrorTerm(each) for each in dictionaries],
        }
        for name, components in kinds.items():
            kind = "latent" if name == "latents" else "error"
            parts = [
                [EditPart(each.site, tuple(range(each.d_sae)) if kind == "latent" else (0,), position, kind)]
                for each in dictionaries
                for position in range(subject[0], len(model.encode(several[0].clean)))
            ]
            edits = [Edit.of(part, "every" if kind == "latent" else "single") for part in parts]
            effects[name], windows[name] = _restored(model, components, several, edits, corruption, options), 1
    return FactTrace(tuple(position_labels(model, several)), subject, len(several), effects, windows)


def corrupted_positions(
    model: LanguageModel, pairs: Sequence[PromptPair], subject: Positions | None = None
) -> tuple[int, ...]:
    """The subject's positions in prompts of one form: those given, or from the first to the last token that varies.

    Raises:
        UserError: prompts of unequal length, equal prompts, or subjects at different positions.
    """
    rows = [model.encode(text) for pair in pairs for text in (pair.clean, pair.corrupted)]
    if not rows or len(set(map(len, rows))) > 1:
        raise UserError(
            f"facts of one form have prompts of one length, not {sorted(set(map(len, rows)))}: trace others"
        )
    if subject is not None:
        tokens = model.tokenize([pair.clean for pair in pairs])
        chosen = whole_prompt(model, tokens).select(subject)
        if bool((chosen != chosen[:1]).any()):
            raise UserError("the subjects stand at different positions: trace facts of one form")
        return tuple(chosen[0].nonzero().flatten().tolist())
    ids = np.array(rows)
    varies = np.flatnonzero((ids != ids[0]).any(0))
    if not len(varies):
        raise UserError("clean and corrupted prompts are equal: give another subject, or GaussianNoise")
    return tuple(range(int(varies[0]), int(varies[-1]) + 1))


def restore_windows(
    model: LanguageModel,
    pairs: Sequence[PromptPair],
    first: int,
    corruption: Corruption | None,
    stream: str,
    width: int,
    options: SweepOptions | None = None,
) -> Effects:
    """Effects of clean values at `width` consecutive layers of a stream, at each position from `first` on.

    Raises:
        UserError: a window wider than the model is deep, or otherwise as `patch_components`.
    """
    sites = model.layout.of_stream(stream)
    if not 1 <= width <= len(sites):
        raise UserError(f"a window of {width} layers: {stream} is at {len(sites)}, so use 1 to {len(sites)}")
    edits, named = [], []
    for start in range(len(sites) - width + 1):
        for position in range(first, len(model.encode(pairs[0].clean))):
            parts = [EditPart(site, (0,), position, "stream") for site in sites[start : start + width]]
            edits.append(Edit.of(parts, "single"))
            named.append(Edit(sites[start + width // 2], (0,), position, "stream"))
    effects = _restored(model, [Stream(site) for site in sites], pairs, edits, corruption, options)
    return replace(effects, edits=tuple(named))


def _restored(
    model: LanguageModel,
    components: Sequence[Patchable],
    pairs: Sequence[PromptPair],
    edits: Sequence[Edit],
    corruption: Corruption | None,
    options: SweepOptions | None,
) -> Effects:
    return patch_components(model, components, pairs, edits, options, corruption=corruption)
