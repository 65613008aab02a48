"""Data for the report that needs the model, written to `reading.json` while the model is loaded."""

import base64
import io
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeVar

from saepatch.data.pairs import PromptPair
from saepatch.dictionaries.dictionary import Dictionary
from saepatch.engine.components import ErrorTerm, LatentUnits
from saepatch.errors import UserError
from saepatch.measure.quality import splice_quality
from saepatch.model.inputs.images import ImagePrompt
from saepatch.model.inputs.pictures import read_picture
from saepatch.model.language_model import LanguageModel, Tokens
from saepatch.reading.cards import Card, read_latents
from saepatch.records.documents import load_yaml
from saepatch.records.files import write_json
from saepatch.runs.catalogue import RunFolder, read_json
from saepatch.runs.commands.sweeps import Sweep, prepare
from saepatch.settings.checks import current_names
from saepatch.settings.sweeps import AttributeConfig, PatchConfig, SweepConfig

log = logging.getLogger(__name__)

Result = TypeVar("Result")
Config = TypeVar("Config")

READING = "reading.json"
LATENTS = 24  # latents with a card
TEXTS = 512  # prompts of the run that are searched for examples
SPLICED = 32  # prompts on which splice quality is measured
SHOWN = 12  # pairs stored token by token
PICTURES, PIXELS = 3, 480  # pairs whose pictures are stored, and the longest side of one


def write_reading(sweep: Sweep, out: Path) -> None:
    """Write the run's prompts, splice quality and cards of the summary's top latents to the folder.

    Raises:
        UserError: there is no summary in the folder.
    """
    summary = read_json(out / "summary.json")
    texts = list(dict.fromkeys(text for pair in sweep.pairs for text in _texts(sweep, pair)))[:TEXTS]
    dictionaries = {
        str(component.site): component.dictionary
        for group in sweep.groups
        for component in group
        if isinstance(component, (LatentUnits, ErrorTerm))
    }
    latents: dict[str, list[int]] = {}
    for site, latent in top_latents(summary):
        latents.setdefault(site, []).append(latent)
    splice, cards = read_dictionaries(sweep.model, dictionaries, latents, texts)
    prompts = prompt_tokens(sweep.model, sweep.pairs, bool(sweep.corruption))
    write_json({"prompts": prompts, "splice": splice, "latents": list(map(asdict, cards))}, out / READING)


def read_dictionaries(
    model: LanguageModel,
    dictionaries: Mapping[str, Dictionary],
    latents: Mapping[str, Sequence[int]],
    texts: Sequence[str],
) -> tuple[list[dict[str, Any]], list[Card]]:
    """Splice quality of the dictionaries and cards of some of their latents, measured on a run's prompts."""
    if not dictionaries:
        return [], []
    tokens = model.tokenize(texts)
    few = tokens.rows(slice(0, SPLICED))
    splice = [
        asdict(splice_quality(model, dictionary, few, _batch(dictionary, few))) | {"site": site}
        for site, dictionary in dictionaries.items()
    ]
    cards = [
        card
        for site, ids in latents.items()
        for card in read_latents(model, dictionaries[site], ids, tokens, batch_size=_batch(dictionaries[site], tokens))
    ]
    return splice, cards


def if_possible(read: Callable[[], Result], otherwise: Result) -> Result:
    """Result of `read`, or `otherwise` where it fails; failures are logged, since the results are written already."""
    try:
        return read()
    except (UserError, RuntimeError) as error:  # such as a full device
        log.warning("tokens and cards are left out of the report: %s", str(error).partition("\n")[0])
        return otherwise


def try_reading(sweep: Sweep, out: Path) -> None:
    """`write_reading` at the end of a run, which is complete even if this fails."""
    (out / READING).unlink(missing_ok=True)  # from an earlier start
    if_possible(lambda: write_reading(sweep, out), None)


def _texts(sweep: Sweep, pair: PromptPair) -> tuple[str, ...]:
    return (pair.clean,) if sweep.corruption else (pair.clean, pair.corrupted)


def _batch(dictionary: Dictionary, tokens: Tokens) -> int:
    """Texts per batch, limited by the memory for all latents' activations."""
    return max(1, min(32, 2**26 // (tokens.input_ids.shape[1] * dictionary.d_sae)))


def top_latents(summary: dict[str, Any]) -> list[tuple[str, int]]:
    """(site, id) of a run's top latents, largest effects of each direction first."""
    tops = (
        [screen["top"] for screen in summary["screens"].values()]
        if "screens" in summary
        else [*summary["top"].values()]
    )
    chosen: dict[tuple[str, int], None] = {}
    for place in range(max(map(len, tops), default=0)):
        for top in tops:
            if place < len(top) and top[place]["component"] == "latent":
                chosen |= {(top[place]["site"], unit): None for unit in _units(top[place]["latent"])}
    return list(chosen)[:LATENTS]


def _units(text: str) -> Iterator[int]:
    return (int(unit) for unit in text.split(",") if unit.isdigit())


def prompt_tokens(model: LanguageModel, pairs: Sequence[PromptPair], one_run: bool) -> dict[str, Any]:
    """The first pairs token by token, and the tokens that all pairs share by position; there is no `corrupted` where
    the corrupted run reads the clean prompt."""
    first: list[dict[str, Any]] = []
    shared: dict[str, list[str | None]] = {}
    sides = ("clean",) if one_run else ("clean", "corrupted")
    same_length = True
    for number, pair in enumerate(pairs):
        tokens = {side: model.token_texts(model.encode(getattr(pair, side))) for side in sides}
        same_length &= len(set(map(len, tokens.values()))) == 1
        if number < SHOWN:
            first.append({"example": pair.example, "answer": pair.answer, "counter": pair.counter, **tokens})
            if number < PICTURES and (shown := _pictures(model, pair, sides)):
                first[-1]["pictures"] = shown
        for side, texts in tokens.items():
            shared[side] = list(texts) if number == 0 else _agreeing(shared[side], texts)
    return {"count": len(pairs), "same_length": same_length, "first": first, "shared": shared}


def _pictures(model: LanguageModel, pair: PromptPair, sides: Sequence[str]) -> dict[str, list[dict[str, Any]]]:
    """The pictures of a pair's prompts, by side: each as a data URI, with the part that each position stands for."""
    shown: dict[str, list[dict[str, Any]]] = {}
    for side in sides:
        prompt = getattr(pair, side)
        if not isinstance(prompt, ImagePrompt) or (images := model.tokenize([prompt]).images) is None:
            continue
        for number, file in enumerate(prompt.images):
            picture = read_picture(file)
            mine = (images.picture[0] == number) & (images.seen[0, :, 0] < images.seen[0, :, 2])  # NaN: unknown
            shown.setdefault(side, []).append(
                {
                    "picture": _data_uri(picture),
                    "size": list(picture.size),
                    "positions": mine.nonzero().flatten().tolist(),
                    "boxes": images.seen[0, mine].double().round(decimals=2).tolist(),
                }
            )
    return shown


def _data_uri(picture: Any) -> str:
    """A picture in the text of a page, made smaller where it is large."""
    small = picture.copy()
    small.thumbnail((PIXELS, PIXELS))
    held = io.BytesIO()
    small.save(held, "JPEG", quality=90)
    return f"data:image/jpeg;base64,{base64.b64encode(held.getvalue()).decode()}"


def _agreeing(known: Sequence[str | None], tokens: Sequence[str]) -> list[str | None]:
    """The common token at each position; None where they differ or a prompt is too short."""
    size = max(len(known), len(tokens))
    padded = [*known, *[None] * (size - len(known))]
    return [token if i < len(tokens) and token == tokens[i] else None for i, token in enumerate(padded)]


def read_sweep_again(run: RunFolder) -> None:
    """Load the model and dictionaries of a finished run of patch or attribute again and write `reading.json`.

    Raises:
        UserError: the run's model, dictionaries or pairs no longer exist, or have changed.
    """
    kind: type[SweepConfig] = PatchConfig if run.work == "patch" else AttributeConfig
    write_reading(prepare(stored_settings(kind, run.path, run.path)), run.path)


def stored_settings(kind: type[Config], folder: Path, out: Path) -> Config:
    """Settings of a run from `config.yaml` in a folder, with `out` in place of the original output folder.

    Raises:
        UserError: they cannot be read.
    """
    path = folder / "config.yaml"
    try:
        return kind(**current_names(kind, load_yaml(path)) | {"out": str(out)})
    except TypeError as error:
        raise UserError(f"cannot read {path} ({error}): give the folder of a finished run") from error
