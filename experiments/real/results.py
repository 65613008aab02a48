"""The results of the study, and as flat rows: exact effects, and generated texts."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saepatch.measure.results.effects import Effects
from saepatch.model.language_model import LanguageModel
from saepatch.records.provenance import Provenance
from saepatch.records.rows import write_records, write_rows

from .claims import Claim, OtherRun
from .settings import RealConfig
from .stages.dictionaries import DictionaryQuality, TaskLatents
from .stages.patching import PatchingStage
from .stages.restoration import RestoredBehaviour, in_french
from .stages.steering import SteeredConcept
from .stages.tasks import TaskPairs
from .stages.tracing import Tracing

ROWS, TEXTS = "results.parquet", "texts.parquet"


@dataclass(frozen=True, eq=False)
class RealResults:
    """Everything that the page and the summary show; `left_out` has the reasons by part of the study."""

    config: RealConfig
    model: LanguageModel
    tasks: Mapping[str, TaskPairs]
    patched: PatchingStage
    traced: Tracing | None
    qualities: Sequence[DictionaryQuality]
    latents: Mapping[str, TaskLatents]
    steered: Sequence[SteeredConcept]
    restored: RestoredBehaviour | None
    claims: list[Claim]
    beside: OtherRun | None
    left_out: Mapping[str, str]
    seconds: Mapping[str, float]
    processor: Mapping[str, float]


def write_results(results: RealResults, out: Path) -> None:
    """Write `results.parquet`, a row for each edit and pair, and `texts.parquet`, a row for each generated text."""
    model, config = results.model, results.config
    provenance = Provenance(model.name, model.fingerprint, config.sae, "", config.seed)
    write_rows(((effects.rows(name), provenance) for name, effects in sweeps(results)), out / ROWS)
    if texts := list(generated(results)):
        write_records([(texts, provenance)], out / TEXTS)


def sweeps(results: RealResults) -> Iterator[tuple[str, Effects]]:
    """Every sweep with the name in the column `task`: the task, and what was patched where the columns do not say."""
    patched = results.patched
    for task, by_position in patched.maps.items():
        yield from _both(f"{task}: map", by_position.effects)
    for stream, by in patched.layers.items():
        yield from _both(f"{patched.worked}: {stream}", by)
    for name, by in (("heads", patched.heads), ("direct", patched.direct), ("together", patched.together)):
        yield from _both(f"{patched.worked}: {name}", by)
    if results.traced:
        yield from _both("facts: states", results.traced.states)
        yield from _both("facts: MLP windows", results.traced.mlps)
    for task, latents in results.latents.items():
        for kind, other in latents.others.items():
            yield from _both(f"{task}: {kind}", other.effects)


def _both(name: str, by: Mapping[Any, Effects]) -> Iterator[tuple[str, Effects]]:
    for effects in by.values():
        yield name, effects


def generated(results: RealResults) -> Iterator[dict[str, Any]]:
    for each in results.steered:
        for name, point in {"unsteered": each.unsteered, **each.chosen}.items():
            for draw, texts in enumerate(point.draws):
                for number, (text, shown) in enumerate(zip(texts["texts"], texts["shown"], strict=True)):
                    yield _text("steering", each.name, name, each.site, draw, number, text, bool(shown))
    if restored := results.restored:
        for name, answers in restored.answers.items():
            for place, text in enumerate(answers.texts):
                draw, number = divmod(place, restored.prompts)
                yield _text("restoration", "French", name, restored.site, draw, number, text, in_french(text))


def _text(
    stage: str, concept: str, method: str, site: str, draw: int, prompt: int, text: str, shown: bool
) -> dict[str, Any]:
    return {
        "stage": stage,
        "concept": concept,
        "method": method,
        "site": site,
        "draw": draw,
        "prompt": prompt,
        "text": text,
        "shown": shown,
    }
