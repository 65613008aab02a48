"""Turn the settings of a sweep into values: positions, method, pairs, model, dictionaries, components, corruption."""

import hashlib
import logging
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from saepatch.data.batches import batch_pairs
from saepatch.data.pairs import PromptPair, load_pairs
from saepatch.dictionaries.dictionary import Dictionary
from saepatch.dictionaries.latent_set import LatentSet
from saepatch.dictionaries.loading import load_sae, load_saes
from saepatch.engine.chosen import check_answers
from saepatch.engine.components import (
    PATCH_DIRECTIONS,
    Component,
    ErrorTerm,
    Heads,
    LatentUnits,
    PatchDirection,
    Stream,
)
from saepatch.engine.corruptions import Corruption, GaussianNoise, Mean, Zero
from saepatch.engine.gradients import FirstOrder, GradDrop, IntegratedGradients, Method
from saepatch.engine.options import SweepOptions
from saepatch.errors import UserError
from saepatch.model.language_model import LanguageModel
from saepatch.model.loading.load import load_model
from saepatch.model.positions import NAMED, At, Positions, Turn
from saepatch.model.sites import Site
from saepatch.records.provenance import json_hash
from saepatch.settings.mixins import DictionarySettings, ModelSettings
from saepatch.settings.sweeps import AttributeConfig, PatchConfig, SweepConfig
from saepatch.splicing.splice import whole_prompt

log = logging.getLogger(__name__)


def read_positions(text: str) -> Positions:
    """Parse positions: `all`, `last`, `5`, `-1`, `3:7`, `1,4`, `at: Mary`, `turn: user`, `image` or `image: 0,0,64,32`.

    Raises:
        UserError: the text is none of these.
    """
    text = text.strip()
    if text in NAMED:
        return text
    if re.fullmatch(r"-?\d{1,9}", text):
        return int(text)
    if match := re.fullmatch(r"(-?\d{1,9})?:(-?\d{1,9})?", text):
        return slice(*(None if bound is None else int(bound) for bound in match.groups()))
    if re.fullmatch(r"-?\d{1,9}(\s*,\s*-?\d{1,9})+", text):
        return [int(part) for part in text.split(",")]
    if text.startswith("at:") and text[3:].strip():
        return At(text[3:].strip())
    if match := re.fullmatch(r"image(?::\s*([\d.]+(?:\s*,\s*[\d.]+){3}))?", text):
        return At.image(None if match[1] is None else _box(match[1]))
    if match := re.fullmatch(r"turn:\s*(\w+)(?:\s+(-?\d{1,9}))?", text):
        return Turn(match[1], int(match[2] or -1))
    raise UserError(
        f"unknown positions {text!r}: use {', '.join(NAMED)}, an index, a span (3:7), several (1,4), 'at: TEXT', "
        "'image', a box of it (image: LEFT,TOP,RIGHT,BOTTOM) or 'turn: ROLE'"
    )


def _box(text: str) -> tuple[float, float, float, float]:
    try:
        left, top, right, bottom = map(float, text.split(","))
    except ValueError as error:
        raise UserError(f"box {text!r}: write four numbers, in pixels: LEFT,TOP,RIGHT,BOTTOM") from error
    return left, top, right, bottom


def read_method(config: AttributeConfig) -> Method:
    if config.method == "integrated-gradients":
        return IntegratedGradients(config.steps)
    return GradDrop() if config.method == "graddrop" else FirstOrder()


def read_directions(direction: str) -> list[PatchDirection]:
    return [each for each in PATCH_DIRECTIONS if direction in (each, "both")]


def read_shard(text: str, environment: Mapping[str, str] | None = None) -> tuple[int, int]:
    """Index of this process' shard and the number of shards; `auto` takes them from torchrun or a Slurm job array.

    Raises:
        UserError: `auto`, but neither torchrun nor a job array is running.
    """
    if text != "auto":
        index, count = text.split("/")
        return int(index), int(count)
    variables = os.environ if environment is None else environment
    if "RANK" in variables and "WORLD_SIZE" in variables:
        return int(variables["RANK"]), int(variables["WORLD_SIZE"])
    try:
        task, first, tasks = (int(variables[f"SLURM_ARRAY_TASK_{key}"]) for key in ("ID", "MIN", "COUNT"))
    except KeyError as error:
        raise UserError(
            "shard auto: this is neither under torchrun (RANK, WORLD_SIZE) nor in a Slurm job array "
            "(SLURM_ARRAY_TASK_ID, …_MIN, …_COUNT): name the shard, as in --shard 0/4"
        ) from error
    number = (task - first) // int(variables.get("SLURM_ARRAY_TASK_STEP", 1))
    if number >= tasks:
        raise UserError(
            f"shard auto: array task {task} is out of range for {tasks} tasks from {first}: submit the array without "
            f"gaps, as in --array=0-{tasks - 1}"
        )
    return number, tasks


def read_pairs(config: SweepConfig) -> tuple[str, list[PromptPair]]:
    """The task's name, and all pairs under unique names."""
    if config.clean:
        answer, counter = config.answers.split("|")
        return "inline", [PromptPair(config.clean, config.corrupted or config.clean, answer, counter, "inline")]
    pairs = load_pairs(config.pairs, config.split, config.n, config.seed)
    if not pairs:
        raise UserError(f"{config.pairs!r} holds no pairs: give another source")
    _warn_of_equal(pairs, bool(config.corruption))
    return Path(config.pairs).stem.partition(":")[0], distinct_names(pairs)


def _warn_of_equal(pairs: Sequence[PromptPair], corrupted_otherwise: bool) -> None:
    same = [pair for pair in pairs if pair.answer == pair.counter]
    if same:
        log.warning(
            "%d of %d pairs have the same answer and counter, such as %s: their logit difference is always 0",
            len(same), len(pairs), same[0].example,
        )  # fmt: skip
    same = [pair for pair in pairs if pair.clean == pair.corrupted]
    if same and not corrupted_otherwise:
        log.warning(
            "%d of %d pairs have the same clean and corrupted prompt, such as %s: patching them changes nothing",
            len(same), len(pairs), same[0].example,
        )  # fmt: skip


def distinct_names(pairs: Sequence[PromptPair]) -> list[PromptPair]:
    """The pairs, with a number appended to names used more than once: rows identify a pair by its name."""
    uses = Counter(pair.example for pair in pairs)
    if all(uses[pair.example] == 1 for pair in pairs):
        return list(pairs)
    log.warning("several pairs are named %r: repeated names get a number appended", uses.most_common(1)[0][0])
    return [
        pair if uses[pair.example] == 1 else replace(pair, example=f"{pair.example}#{number}")
        for number, pair in enumerate(pairs)
    ]


def pairs_hash(pairs: Sequence[PromptPair]) -> str:
    """First 16 hexadecimal digits of the SHA-256 of all pairs' texts and names."""
    return json_hash([[p.clean, p.corrupted, p.answer, p.counter, p.example, *_pictures(p)] for p in pairs])


def _pictures(pair: PromptPair) -> list[str]:
    """Hashes of the pictures of a pair's prompts."""
    files = [file for prompt in (pair.clean, pair.corrupted) for file in getattr(prompt, "images", ())]
    try:
        return [hashlib.sha256(Path(file).read_bytes()).hexdigest() for file in files]
    except OSError as error:
        raise UserError(f"cannot read picture {error.filename!r} of pair {pair.example}: check its path") from error


def read_model(settings: ModelSettings, shard: str = "") -> LanguageModel:
    """Load the model; under torchrun each process uses its own GPU."""
    device = settings.device
    if device == "cuda" and shard == "auto" and "LOCAL_RANK" in os.environ:
        device = f"cuda:{os.environ['LOCAL_RANK']}"
    return load_model(
        settings.model,
        device,
        settings.dtype,
        prepend_bos=settings.prepend_bos,
        trust_remote_code=settings.trust_remote_code,
        device_map=settings.device_map or None,
        revision=settings.revision or None,
    )


def read_subject(config: SweepConfig) -> At | None:
    """The text whose embeddings are corrupted with noise; None: no noise."""
    kind, _, text = config.corruption.partition(":")
    return At(text.strip()) if kind == "noise" else None


def read_corruption(
    config: SweepConfig, model: LanguageModel, groups: Sequence[Sequence[Component]], pairs: Sequence[PromptPair]
) -> Corruption | None:
    """The corruption, or None where corrupted runs read the corrupted prompts. Means are over all pairs' clean prompts.

    Raises:
        UserError: an ablation with several components; it corrupts the one component that is patched.
    """
    if (subject := read_subject(config)) is not None:
        return GaussianNoise(subject, seed=config.seed)
    if not config.corruption:
        return None
    components = [component for group in groups for component in group]
    if len(components) > 1:
        sites = ", ".join(str(component.site) for component in components)
        raise UserError(f"corruption {config.corruption} ablates the patched component: give one --site of {sites}")
    if config.corruption == "zero":
        return Zero()
    return Mean.over(model, components[0], model.tokenize([pair.clean for pair in pairs]), by_position=False)


def base_prompt(config: SweepConfig, direction: PatchDirection) -> str:
    """The prompt of a pair that edits are applied to: `clean` or `corrupted`."""
    return "corrupted" if direction == "denoise" and not config.corruption else "clean"


def check_pairs(
    config: SweepConfig,
    model: LanguageModel,
    pairs: Sequence[PromptPair],
    options: SweepOptions,
) -> None:
    """Check, before hours of work, that every pair can be run.

    Raises:
        UserError: a pair cannot; the message names it.
    """
    wanted = [where for where in (options.positions, read_subject(config)) if where is not None]
    for start in range(0, len(pairs), 64):
        batch = batch_pairs(model, pairs[start : start + 64], align=config.align, spelled=True)
        check_answers(batch, options)
        for row, pair in enumerate(batch.pairs):
            for where in wanted:  # positions refer to the clean prompts
                try:
                    whole_prompt(model, batch.clean.rows([row])).select(where)
                except UserError as error:
                    raise UserError(f"pair {pair.example}: {error}") from error


def read_dictionaries(config: DictionarySettings, sites: Sequence[Site], model: LanguageModel) -> list[Dictionary]:
    """The dictionaries at the given sites (none: all in `sae`), each checked against the model."""
    every = config.every_position
    if sites:
        dictionaries = [load_sae(config.sae, site, model.device, every_position=every) for site in sites]
    else:
        dictionaries = list(load_saes(config.sae, model.device, every_position=every).values())
    for dictionary in dictionaries:
        dictionary.check(model)
    return dictionaries


def read_sites(text: str) -> list[Site]:
    return list(dict.fromkeys(Site.parse(part.strip()) for part in text.split(",") if part.strip()))


def read_components(config: SweepConfig, model: LanguageModel) -> list[list[Component]]:
    """The components to patch, in groups swept together: each dictionary's latents separately, others all together."""
    if not isinstance(config, PatchConfig):
        return [[LatentUnits(dictionary) for dictionary in read_dictionaries(config, read_sites(config.site), model)]]
    if config.component in ("latent", "error"):
        dictionaries = read_dictionaries(config, _latent_sites(config), model)
        LatentSet.parse(config.latents).at([dictionary.site for dictionary in dictionaries])
        if config.component == "error":
            return [[ErrorTerm(dictionary) for dictionary in dictionaries]]
        return [[LatentUnits(dictionary)] for dictionary in dictionaries]
    heads = config.component == "head"
    stream = "z" if heads else "resid_post"
    sites = read_sites(config.site) or [Site(layer, stream) for layer in range(model.n_layers)]
    if misplaced := [site for site in sites if heads and site.stream != "z"]:
        raise UserError(f"site {misplaced[0]}: heads are at z.LAYER, as in --site z.{misplaced[0].layer}")
    components: list[Component] = [Heads(at.layer, model.n_heads) if heads else Stream(at) for at in sites]
    for component in components:
        component.check(model)
    return [components]


def _latent_sites(config: PatchConfig) -> list[Site]:
    """The sites named by `site` or `latents`; empty: every site with a dictionary."""
    sites, named = read_sites(config.site), list(LatentSet.parse(config.latents))
    if sites and named and set(sites) != set(named):
        raise UserError(
            f"latents are given for {', '.join(map(str, named))}, but site is {config.site!r}: leave --site out"
        )
    return sites or named
