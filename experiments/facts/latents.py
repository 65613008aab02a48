"""The same facts moved by latents: chosen on other facts that have the same answers, then set or ablated."""

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch

from saepatch.data.edit_requests import EditRequest
from saepatch.dictionaries.dictionary import Dictionary
from saepatch.model.language_model import LanguageModel
from saepatch.splicing.interventions import Ablate, Clamp
from saepatch.splicing.splice import record_latents, splice

TOP = 8  # latents of the larger sets

LatentEdit = Callable[[EditRequest], AbstractContextManager[object]]


@dataclass(frozen=True)
class AnswerLatents:
    """Latents of one answer at the prompt's last token: the ids with the largest lead over other answers, largest
    first, and the values of all latents, both means over facts with that answer."""

    ids: tuple[int, ...]
    values: tuple[float, ...]


def latents_of_answers(model: LanguageModel, sae: Dictionary, facts: Sequence[EditRequest]) -> dict[str, AnswerLatents]:
    """Latents of each answer, from facts that have it as their present answer."""
    tokens = model.tokenize([fact.text for fact in facts])
    acts = record_latents(model, sae, tokens).acts[torch.arange(len(facts)), tokens.last].cpu()
    of_answers = {}
    for answer in dict.fromkeys(fact.true for fact in facts):
        mine = torch.tensor([fact.true == answer for fact in facts])
        own = acts[mine].mean(0)
        lead = own - acts[~mine].mean(0)
        of_answers[answer] = AnswerLatents(tuple(lead.topk(TOP).indices.tolist()), tuple(own.tolist()))
    return of_answers


def latent_edits(model: LanguageModel, sae: Dictionary, known: dict[str, AnswerLatents]) -> dict[str, LatentEdit]:
    """Edits by latents at the last token, by name: their values for the new answer are written."""

    def write(request: EditRequest, ids: Sequence[int]) -> Clamp:
        values = known[request.target].values
        return Clamp(tuple(ids), 1.0, tuple(values[i] for i in ids), "last")

    def ablate(request: EditRequest) -> Ablate:
        return Ablate(known[request.true].ids, positions="last")

    return {
        "patch 1 latent": lambda request: splice(model, sae, write(request, known[request.target].ids[:1])),
        f"patch {TOP} latents": lambda request: splice(model, sae, write(request, known[request.target].ids)),
        f"ablate {TOP}, patch {TOP}": lambda request: splice(
            model, sae, [ablate(request), write(request, known[request.target].ids)]
        ),
        "patch all latents": lambda request: splice(model, sae, write(request, range(sae.d_sae))),
        f"ablate {TOP} latents": lambda request: splice(model, sae, ablate(request)),
    }
