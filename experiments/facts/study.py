"""Where are facts recalled, can they be edited there, and how do edits fail?

    python -m experiments.facts --out runs/facts
    python -m experiments.facts --model FOLDER --requests world --reference texts.txt --sae "" --out runs/real

Only facts that the model knows are used: some of them for the causal trace and for choosing layer and token by single
edits, the others for what is reported. Methods are compared on single edits and on sequences of edits, beside edits of
latents that are chosen on facts of other prompts. A stopped run continues when the same command is given again.
"""

import re
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import numpy as np

from saepatch.data.edit_requests import EditRequest, load_edit_requests
from saepatch.data.texts import load_texts
from saepatch.dictionaries.loading import load_sae
from saepatch.errors import UserError
from saepatch.facts.contexts import FactToken
from saepatch.facts.covariances import Covariances
from saepatch.facts.evaluation import AnswerScores, EditEvaluation, evaluate_edit, joined
from saepatch.facts.generation import FluencySettings
from saepatch.facts.methods import AlphaEdit, EditMethod, Rome
from saepatch.facts.values import ValueSearch
from saepatch.model.language_model import LanguageModel
from saepatch.model.loading.load import load_model
from saepatch.records.files import output_folder
from saepatch.records.provenance import json_hash
from saepatch.runs.measurements import measurements
from saepatch.runs.ownership import check_owner

from ..common.kept import KeptResults
from .claims import claims
from .latents import latent_edits, latents_of_answers
from .page import FactResults, write
from .settings import FactsConfig
from .stages import (
    CORRUPTIONS,
    TOKENS,
    LayerTrace,
    MeasuredSequence,
    MethodSettings,
    SequenceMeasure,
    SequenceRun,
    known_requests,
    single_edits,
    trace_layers,
)
from .vocabulary import only_tokens, probability_of, tokens_of
from .world import world_requests

PROBED = 10  # facts after whose prompts the probability of the unembedded tokens is measured


def main(config: FactsConfig) -> None:
    check_owner(Path(config.out), "facts")
    model = load_model(config.model, config.device, config.dtype)
    requests = world_requests() if config.requests == "world" else load_edit_requests(config.requests)
    texts = load_texts(config.reference)
    decides = {
        "settings": {name: value for name, value in asdict(config).items() if name not in ("out", "track", "device")},
        "model's weights": model.fingerprint,
        "facts": json_hash([asdict(request) for request in requests]),
        "reference's texts": json_hash(texts),
    }
    with measurements(Path(config.out), "facts", decides) as kept_file, ExitStack() as stack:
        kept = KeptResults(kept_file, {})
        names = set(kept.value("known", lambda: [request.example for request in known_requests(model, requests)]))
        known = [request for request in requests if request.example in names]
        if len(known) < config.choose + config.singles:
            raise UserError(
                f"{model.name} knows {len(known)} of {len(requests)} facts, fewer than choose = {config.choose} plus "
                f"singles = {config.singles}: lower these, or give more facts"
            )
        left_out = {}
        if config.trim:
            tokens = tokens_of(model, requests, texts)
            measure = partial(probability_of, model, known[:PROBED], tokens)
            share = kept.value("probability of the unembedded tokens", measure)
            left_out["tokens"] = f"only {len(tokens)} are unembedded; they have {share:.1%} after the facts' prompts"
            stack.enter_context(only_tokens(model, tokens))
        results = _study(config, model, (requests, known, texts), kept)
    write(config, model, replace(results, left_out={**left_out, **results.left_out}))


def _study(
    config: FactsConfig,
    model: LanguageModel,
    given: tuple[Sequence[EditRequest], Sequence[EditRequest], list[str]],
    kept: KeptResults,
) -> FactResults:
    """All measurements, from requests, those that the model knows, and texts."""
    requests, known, texts = given
    spread = known[:: max(1, len(known) // config.choose)][: config.choose]  # of every relation
    report = [request for request in known if request not in spread]
    held = max(1, round(config.held_out * len(texts)))
    layers = config.layers or tuple(range(model.n_layers))
    cache = Path(config.out) / "covariances"
    near = sorted({n for each in layers for n in _around(each, config.spread, model.n_layers)})
    covariances = Covariances.over(model, near, texts[held:], cache, config.ridge)
    run = _FactRun(config, model, covariances, kept, texts[:held])
    corruptions = CORRUPTIONS[: 1 + config.noise] if config.traced else ()
    traces = [run.trace(known, corruption) for corruption in corruptions]
    by_layer = run.by_layer(spread, layers)
    token, layer = best(by_layer)
    settings = MethodSettings(token, config.steps, config.sampled, config.weight, config.threshold)
    made = settings.methods(layer, _around(layer, config.spread, model.n_layers))
    chosen = {name: each for name, each in made.items() if not config.methods or _slug(name) in config.methods}
    methods, left_out = usable(chosen, covariances)
    sequences = run.sequences(report, methods)
    singles = {name: run.single(report, name, method) for name, method in methods.items()}
    singles |= run.latents(report, requests)
    spread_pair = ("MEMIT, 1 layer", "MEMIT") if config.batches == "also" else BATCHED_PAIR
    return FactResults(
        known=len(known),
        requests=len(requests),
        traces=tuple(traces),
        by_layer=by_layer,
        token=token,
        layer=layer,
        singles=singles,
        sequences=tuple(sequences),
        left_out=left_out,
        claims=tuple(claims(singles, sequences, spread_pair)),
    )


def _slug(name: str) -> str:
    """The name of a method without spaces and commas."""
    return re.sub(r"\W+", "-", name)


def _around(layer: int, spread: int, layers: int) -> list[int]:
    """So many layers, of which this is the middle one or the first of two."""
    first = layer - (spread - 1) // 2
    return [each for each in range(first, first + spread) if 0 <= each < layers]


def best(by_layer: Mapping[str, EditEvaluation]) -> tuple[FactToken, int]:
    """Token and layer of the largest harmonic mean, then efficacy magnitude; layers are named "TOKEN/LAYER"."""

    def rank(name: str) -> tuple[float, float]:
        measured = by_layer[name]
        return float(np.nan_to_num(measured.score.value)), measured.magnitude("efficacy").value

    name = max(by_layer, key=rank)
    token, layer = name.split("/")
    return ("subject" if token == "subject" else "last"), int(layer)


def usable(methods: Mapping[str, EditMethod], covariances: Covariances) -> tuple[dict[str, EditMethod], dict[str, str]]:
    """The methods that can edit at these layers, and the reason for each of the others."""
    left_out: dict[str, str] = {}
    for name, method in methods.items():
        if isinstance(method, AlphaEdit):
            try:
                for layer in method.layers:
                    covariances.null_space(layer, method.threshold)
            except UserError as error:
                left_out[name] = str(error)
    return {name: method for name, method in methods.items() if name not in left_out}, left_out


BATCHED_PAIR = ("MEMIT, 1 layer, in batches", "MEMIT, in batches")
JUDGED_BY = ("paraphrase", "neighbourhood")  # besides efficacy: layers and sequences


def _judged_by(requests: Sequence[EditRequest]) -> list[EditRequest]:
    """The requests with the questions alone by which layers and sequences are judged."""
    return [replace(r, questions=tuple(q for q in r.questions if q.kind in JUDGED_BY)) for r in requests]


@dataclass(frozen=True, eq=False)
class _FactRun:
    """The measurements of one run, each kept by its name."""

    config: FactsConfig
    model: LanguageModel
    covariances: Covariances
    kept: KeptResults
    held_out: Sequence[str]
    before: dict[tuple[str, str], AnswerScores] = field(default_factory=dict)  # of the unedited model

    def trace(self, requests: Sequence[EditRequest], corruption: str) -> LayerTrace:
        measure = partial(trace_layers, self.model, requests, corruption, self.config.traced, self.config.seed)
        return self.kept.get(f"trace/{corruption}", LayerTrace, measure)

    def by_layer(self, requests: Sequence[EditRequest], layers: Sequence[int]) -> dict[str, EditEvaluation]:
        search = ValueSearch(steps=self.config.steps)
        few, measured = _judged_by(requests), {}
        for token in [each for each in TOKENS if self.config.token in ("", each)]:
            for layer in layers:
                rome = Rome(layer, prefixes=self.config.sampled, search=search, token=token)
                measure = partial(single_edits, self.model, few, rome, self.covariances, known=self.before)
                measured[f"{token}/{layer}"] = self.kept.get(f"layers/{token}/{layer}", EditEvaluation, measure)
        return measured

    def single(self, requests: Sequence[EditRequest], name: str, method: EditMethod) -> EditEvaluation:
        some, tokens = requests[: self.config.singles], self.config.fluency
        fluent = FluencySettings(tokens, seed=self.config.seed) if tokens else None
        measure = partial(single_edits, self.model, some, method, self.covariances, fluent, self.before)
        return self.kept.get(f"singles/{name}", EditEvaluation, measure)

    def latents(
        self, requests: Sequence[EditRequest], all_requests: Sequence[EditRequest]
    ) -> dict[str, EditEvaluation]:
        """Edits by latents of the requests whose two answers occur in facts of other prompts."""
        if not self.config.sae:
            return {}
        sae = load_sae(self.config.sae, self.config.site, self.model.device)
        some = requests[: self.config.singles]
        by_prompt = {}
        for prompt in dict.fromkeys(request.prompt for request in some):
            others = [each for each in all_requests if each.prompt != prompt]
            by_prompt[prompt] = latents_of_answers(self.model, sae, others) if len(others) > 1 else {}
        measured: dict[str, list[EditEvaluation]] = {}
        for prompt, answers in by_prompt.items():
            mine = [r for r in some if r.prompt == prompt and r.target in answers and r.true in answers]
            for name, edit in latent_edits(self.model, sae, answers).items() if mine else ():
                measure = partial(evaluate_edit, self.model, mine, edit, name, FluencySettings(20))
                kept = self.kept.get(f"latents/{name}/{prompt}", EditEvaluation, measure)
                measured.setdefault(name, []).append(kept)
        return {name: joined(parts) for name, parts in measured.items()}

    def sequences(self, requests: Sequence[EditRequest], methods: Mapping[str, EditMethod]) -> list[MeasuredSequence]:
        only = self.config.batches == "only"
        singly = [name for name, each in methods.items() if name != "EMMET" and (each.one_by_one or not only)]
        batched = ("MEMIT", "AlphaEdit", "MEMIT, 1 layer") if only else ("MEMIT", "AlphaEdit")
        return [
            *(self.sequence(requests, name, methods[name], False) for name in singly),
            *(
                self.sequence(requests, f"{name}, in batches", methods[name], True)
                for name in batched
                if name in methods
            ),
        ]

    def sequence(self, requests: Sequence[EditRequest], name: str, method: EditMethod, batch: bool) -> MeasuredSequence:
        few = _judged_by(requests)
        folder = output_folder(Path(self.config.out) / "deltas" / _slug(name))
        run = SequenceRun(self.model, few, method, self.covariances, self.held_out, batch, folder)
        checkpoints = [edits for edits in self.config.checkpoints if edits <= len(few)]
        steps = [
            self.kept.get(f"sequences/{name}/{edits}", SequenceMeasure, partial(run.after, edits, earlier))
            for earlier, edits in zip([0, *checkpoints], checkpoints, strict=False)
        ]
        return MeasuredSequence(name, tuple(steps))
