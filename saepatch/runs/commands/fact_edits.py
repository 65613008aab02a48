"""`saepatch edit`: facts edited together or one by one, and measured part by part."""

import logging
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from tqdm import tqdm

from saepatch.data.edit_requests import EditRequest, load_edit_requests
from saepatch.data.texts import load_texts
from saepatch.errors import UserError
from saepatch.facts.contexts import Sampled
from saepatch.facts.covariances import Covariances
from saepatch.facts.delta import Delta, edited
from saepatch.facts.evaluation import Around, evaluate_edit, score_answers
from saepatch.facts.generation import FluencySettings
from saepatch.facts.methods import AlphaEdit, EditMethod, Emmet, Memit, Rome, edit_each, edit_facts
from saepatch.facts.projections import projection
from saepatch.model.language_model import LanguageModel
from saepatch.organism import is_checkpoint
from saepatch.records.provenance import json_hash
from saepatch.records.rows import EditRow
from saepatch.runs.driver import Count, Finished, PartContent, Place, drive, write_record
from saepatch.runs.interpret import read_model
from saepatch.runs.parts import Record
from saepatch.runs.progress import LOG_EVERY, shows_bar
from saepatch.settings.edit import EditConfig
from saepatch.tracking.open import Tracker

log = logging.getLogger(__name__)

DELTA = "delta.safetensors"


@dataclass(frozen=True, eq=False)
class FactEdits:
    """A shard of a run with everything needed to run its parts. `delta` is None where each fact is edited alone."""

    config: EditConfig
    model: LanguageModel
    requests: Sequence[EditRequest]  # of the shard
    everyone: Sequence[EditRequest]  # of all shards
    method: EditMethod
    covariances: Covariances
    delta: Delta | None
    record: Record
    place: Place
    unit: str = "questions"

    @property
    def source(self) -> str:
        return Path(self.config.requests).stem

    def run_part(self, number: int, count: Count) -> PartContent:
        requests = self.requests[number * self.config.part : (number + 1) * self.config.part]
        around, norms = self._edits(requests)
        edit = self.delta if self.delta is not None else around
        fluent = FluencySettings(tokens=self.config.tokens, seed=self.config.seed)
        measured = evaluate_edit(self.model, requests, edit, self.config.method, fluent, edited_with=self.everyone)
        count(len(measured.rows))
        before = self.model.generate([request.text for request in requests], self.config.tokens)
        after: list[str] = []
        with edited(self.model, self.delta) if self.delta is not None else nullcontext():
            for request in requests:
                with nullcontext() if self.delta is not None else around(request):
                    after += self.model.generate([request.text], self.config.tokens)
        texts = [[request.text, *both] for request, *both in zip(requests, before, after, strict=True)]
        about: dict[str, Any] = {
            "fluency": {name: list(both) for name, both in measured.fluency.items()},
            "texts": texts,
            "norms": norms,
            "known_before": _known_before(self.model, requests),
        }
        return PartContent([(list(measured.rows), self.record.provenance(""))], about, EditRow)

    def _edits(self, requests: Sequence[EditRequest]) -> tuple[Around, list[dict[str, float]]]:
        """The context of each request, edited alone, and ‖ΔW‖/‖W‖ by layer of every delta."""
        if self.delta is not None:
            return lambda _: nullcontext(), [_norms(self.delta, self.model)]
        deltas = edit_each(self.model, requests, self.method, self.covariances)
        named = {request.example: delta for request, delta in zip(requests, deltas, strict=True)}
        return lambda request: edited(self.model, named[request.example]), [_norms(d, self.model) for d in deltas]


def _norms(delta: Delta, model: LanguageModel) -> dict[str, float]:
    return {str(layer): norm for layer, norm in delta.relative_norms(model).items()}


def _known_before(model: LanguageModel, requests: Sequence[EditRequest]) -> list[str]:
    """Names of requests whose target is already the model's answer."""
    scores = score_answers(model, [(request.text, request.target) for request in requests])
    return [request.example for request, score in zip(requests, scores, strict=True) if score.accuracy == 1]


def run_fact_edits(config: EditConfig, conclude: Callable[[FactEdits, Tracker], None] | None = None) -> Finished:
    """Run the missing parts of a shard; see `saepatch.runs.driver.drive`."""
    return drive(config, prepare, conclude)


def prepare(config: EditConfig) -> FactEdits:
    """Load everything a run needs, check that it fits together, and (unless each fact is edited alone) make the delta.

    Raises:
        UserError: something does not fit, or the folder holds another run.
    """
    place = Place.of(config)
    requests = load_edit_requests(config.requests, config.split, config.n)
    texts = load_texts(_reference(config))
    model = read_model(config, config.shard)
    method = read_method(config, model)
    earlier = Delta.load(config.delta) if config.delta else None
    if earlier is not None and earlier.model_hash != model.fingerprint:
        raise UserError(
            f"{config.delta} belongs to {earlier.model} with weights {earlier.model_hash}, but {model.name} has "
            f"weights {model.fingerprint}: load the model that was edited"
        )
    if known := _known_before(model, requests):
        what = "the target is already the model's answer in %d of %d requests, such as %s: they do not test the edit"
        log.warning(what, len(known), len(requests), known[0])
    own = requests[place.shard :: place.shards]
    record = Record(
        config.command,
        place.settings
        | {"reference's texts": json_hash(texts)}
        | ({} if earlier is None else {"earlier edits": json_hash(earlier.examples)}),
        {"name": model.name, "hash": model.fingerprint},
        {},
        {"count": len(requests), "hash": json_hash([asdict(request) for request in requests])},
        place.shard,
        place.shards,
        -(-len(own) // config.part),
    )
    record = place.agreed(record)
    cache = Path(config.cache) if config.cache else place.folder / "covariances"
    covariances = Covariances.over(model, method.layers, texts, cache, config.ridge)
    delta = None
    if config.apply == "together":
        delta = _make_delta(config, model, requests, method, covariances, earlier, record, place)
    return FactEdits(config, model, own, requests, method, covariances, delta, record, place)


def _make_delta(
    config: EditConfig,
    model: LanguageModel,
    requests: Sequence[EditRequest],
    method: EditMethod,
    covariances: Covariances,
    earlier: Delta | None,
    record: Record,
    place: Place,
) -> Delta:
    """The delta of all requests; continues a delta of the first ones that a stopped run has saved."""
    path, before = place.folder / DELTA, () if earlier is None else earlier.examples
    started = bool(place.records) and path.exists()
    delta = Delta.load(path) if started else earlier
    done = len(delta.examples) - len(before) if delta is not None and started else 0
    groups = [[request] for request in requests] if method.one_by_one else [list(requests)]
    left = groups[done if method.one_by_one else (1 if done else 0) :]
    if done and left:
        log.info("resuming: %d of %d facts are edited", done, len(requests))
    last = time.monotonic()
    with tqdm(total=len(requests), initial=done, unit="fact", disable=not shows_bar(config)) as bar:
        for group in left:
            delta = edit_facts(model, group, method, covariances, after=delta)
            write_record(record, place.folder)
            delta.save(path)
            bar.update(len(group))
            if bar.disable and time.monotonic() - last >= LOG_EVERY:
                last, edits = time.monotonic(), len(delta.examples) - len(before)
                log.info("%d of %d facts are edited", edits, len(requests))
    assert delta is not None
    if place.shard == 0 or place.shards == 1:
        delta.save(place.out / DELTA)
    return delta


def _usual_layers(config: EditConfig, model: LanguageModel) -> tuple[int, ...]:
    """A third of the way up: 8 of GPT-2 medium's 24 layers, 12 of large's 36 (ROME); the layers up to it (MEMIT)."""
    last = round(model.n_layers / 3)
    first = last if config.method.startswith("rome") else max(0, last - 4)
    named = f"layer {last} is" if first == last else f"layers {first} to {last} are"
    log.info("%s edited, since --layers is empty; a causal trace (trace_fact) shows where facts are recalled", named)
    return tuple(range(first, last + 1))


def _reference(config: EditConfig) -> str:
    if not config.reference and not is_checkpoint(config.model):
        raise UserError(
            f"no reference texts for {config.model}: give --reference FILE, texts of the kind that the edit should "
            "leave alone"
        )
    return config.reference or "organism"


def read_method(config: EditConfig, model: LanguageModel) -> EditMethod:
    """The method that the settings describe.

    Raises:
        UserError: the model has no such layer, or one that cannot be edited.
    """
    layers, weight = config.layer_numbers or _usual_layers(config, model), config.weight
    if layers[-1] >= model.n_layers:
        raise UserError(f"layers {config.layers}: the model has {model.n_layers} layers, 0 to {model.n_layers - 1}")
    for layer in layers:
        projection(model, layer)
    method: Rome | Memit | Emmet | AlphaEdit
    if config.method in ("rome", "rome-original"):
        method = Rome(layers[0], original=config.method == "rome-original")
    elif config.method == "memit":
        method = Memit(layers, weight) if weight else Memit(layers)
    elif config.method == "emmet":
        method = Emmet(layers)
    else:
        method = AlphaEdit(layers, config.threshold, weight) if weight else AlphaEdit(layers, config.threshold)
    search = replace(method.search, steps=config.steps, clamp=config.clamp or method.search.clamp)
    prefixes = replace(method.prefixes, seed=config.seed)
    if config.prefixes >= 0:
        prefixes = Sampled(((10, config.prefixes),) if config.prefixes else (), prefixes.apart, seed=config.seed)
    return replace(method, search=search, prefixes=prefixes, token=config.token)
