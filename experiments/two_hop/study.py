"""Do facts of two hops compose, and if not, why? States are moved between prompts, layers and positions.

    python -m experiments.two_hop --out runs/two_hop
    python -m experiments.two_hop --model FOLDER --sae "" --layer_step 3 --out runs/two_hop_real

Only questions whose hops the model knows one by one are used. A cosine lens says at which layers the bridge stands at
the subject and at the last token, in the form of a mention or of an answer. Cross-patching says from where, and into
where, the second hop can take a bridge. Back-patching and forward-patching say whether the same prompt's own states,
moved, would repair the answer. The best move is chosen on `select` and reported on `report`; a maximum over all moves
stands beside the same search for a random wrong answer. A stopped run continues when the same command is given again.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
from jaxtyping import Float

from saepatch.dictionaries.dictionary import Dictionary
from saepatch.dictionaries.loading import load_saes
from saepatch.errors import UserError
from saepatch.measure.controls import DRAWS
from saepatch.model.language_model import LanguageModel
from saepatch.model.loading.load import load_model
from saepatch.model.positions import Positions
from saepatch.model.sites import Site
from saepatch.reading.cosine_lens import Mention
from saepatch.reading.cross_patch import CrossPatched, CrossQuery, Move, TwoHop, cross_patch, cross_queries
from saepatch.records.statistics import Interval, wilson_share
from saepatch.runs.measurements import measurements
from saepatch.runs.ownership import check_owner
from saepatch.splicing.splice import record_latents

from ..common.kept import KeptResults, deciding
from .page import write
from .questions import QuestionSet, last_of, likeliest, organism_questions, right, written_questions
from .results import HopShares, KeptSweep, LensAt, MovedLatents, MoveSweep, TwoHopConfig, TwoHopResults

EMBEDDING = Site(0, "resid_pre")
SUBJECT, LAST = "subject", "last token"


def main(config: TwoHopConfig) -> None:
    out = Path(config.out)
    check_owner(out, "two-hop")
    model = load_model(config.model, config.device, config.dtype)
    saes = load_saes(config.sae, config.device) if config.sae else {}
    decides = deciding(config, model, saes, ("out", "track", "device"))
    questions = organism_questions(model) if config.model == "organism" else written_questions(model)
    with measurements(out, "two-hop", decides) as kept:
        results = study(config, model, saes, questions, KeptResults(kept, {}))
    write(config, model, results)


def study(
    config: TwoHopConfig,
    model: LanguageModel,
    saes: Mapping[Site, Dictionary],
    questions: QuestionSet,
    kept: KeptResults,
) -> TwoHopResults:
    run = _TwoHopRun(config, model, questions, kept)
    return TwoHopResults(
        asked={split: len(some) for split, some in questions.questions.items()},
        left_out=questions.left_out,
        shares=kept.get("shares", HopShares, run.shares),
        lenses=run.lenses(),
        sweeps=[run.sweep(name, pairs) for name, pairs in run.kinds().items()],
        latents={str(site): run.latents(dictionary) for site, dictionary in saes.items()},
    )


Pairs = Callable[[str], tuple[Sequence[CrossQuery], Mapping[str, int]]]


@dataclass(frozen=True, eq=False)
class _TwoHopRun:
    """The measurements of one run, each kept by its name."""

    config: TwoHopConfig
    model: LanguageModel
    questions: QuestionSet
    kept: KeptResults

    @property
    def sites(self) -> list[Site]:
        """Where states are read and written: what enters the first block, and blocks' outputs up to the last."""
        step, last = self.config.layer_step, self.model.n_layers - 1
        return [EMBEDDING, *(Site(layer) for layer in range(last % step, last + 1, step))]

    def some(self, split: str, recalled: bool = False) -> list[TwoHop]:
        """At most `queries` questions of a split, drawn at random."""
        asked = self.questions.hops(split, recalled)
        return Random(f"{split}/{self.config.seed}").sample(asked, min(self.config.queries, len(asked)))

    def shares(self) -> HopShares:
        def share(asked: Sequence[tuple[str, str]]) -> Interval:
            return wilson_share(np.array(right(self.model, asked), float))

        composed, recalled = (self.questions.hops("report", kind) for kind in (False, True))
        return HopShares(
            share([(hops.prompt, hops.answer) for hops in composed]),
            share([(hops.prompt, hops.answer) for hops in recalled]) if recalled else None,
            share([(hops.prompt, f" {hops.bridge}") for hops in composed]),
        )

    def lenses(self) -> dict[str, LensAt]:
        """By form of the bridge and position: where the bridge stands in questions that have to be composed."""
        every = [EMBEDDING, *(Site(layer) for layer in range(self.model.n_layers))]
        lenses = {}
        for form, mentions in (("mention", self.questions.mentions()), ("answer", self.questions.as_answers())):
            for position in (SUBJECT, LAST):
                held: dict[str, list[Mention]] = {}
                for hops in self.questions.hops("report"):
                    if hops.bridge in mentions:
                        at = hops.at if position == SUBJECT else "last"
                        held.setdefault(hops.bridge, []).append(Mention(hops.prompt, at))
                among = {bridge: some for bridge, some in mentions.items() if bridge in held}
                name = f"as {form}, at the {position}"
                if len(among) > 1:
                    measure = partial(LensAt.measured, self.model, among, held, every)
                    lenses[name] = self.kept.get(f"lens/{name}", LensAt, measure)
        return lenses

    def kinds(self) -> dict[str, Pairs]:
        """The kinds of moves, by name: functions of a split that give queries and what was left out."""
        first, second = self.questions.first, self.questions.second
        kinds: dict[str, Pairs] = {
            "a mention of another bridge → subject": lambda split: self._across(second, split),
            "first hop, subject → subject": lambda split: self._across(self._firsts(first, SUBJECT), split),
            "first hop, last token → subject": lambda split: self._across(self._firsts(first, LAST), split),
        }
        if len({hops.relation for hops in second}) > 1:
            for position in (SUBJECT, LAST):
                kinds[f"another question, {position} → {position}"] = partial(self._other_relations, position=position)
        for source, target in ((SUBJECT, SUBJECT), (LAST, LAST), (LAST, SUBJECT)):
            kinds[f"the same question, {source} → {target}"] = partial(self._own, read=source, write=target)
        return kinds

    def _firsts(self, first: Mapping[str, Sequence[str]], position: str) -> list[TwoHop]:
        """Prompts of the first hop alone, as sources of bridges; none of a subject whose answer is recalled."""
        asked = [q.hops for some in self.questions.questions.values() for q in some if not q.recalled]
        prompts = {hops.subject: (prompt, hops.bridge) for hops in asked for prompt in first[hops.subject][:1]}

        def at(prompt: str, subject: str) -> Positions:
            return last_of(self.model, prompt, subject) if position == SUBJECT else "last"

        return [TwoHop(prompt, name, bridge, "", "", at(prompt, name)) for name, (prompt, bridge) in prompts.items()]

    def _across(self, sources: Sequence[TwoHop], split: str) -> tuple[Sequence[CrossQuery], Mapping[str, int]]:
        crossed = cross_queries(sources, self.some(split), self.questions.known)
        return self._draw(crossed.queries, split), crossed.left_out

    def _other_relations(self, split: str, position: str) -> tuple[Sequence[CrossQuery], Mapping[str, int]]:
        """Questions into questions of another relation."""
        asked = [hops if position == SUBJECT else replace(hops, at="last") for hops in self.some(split)]
        queries, left_out = list[CrossQuery](), dict[str, int]()
        for target in asked:
            others = [source for source in asked if source.relation != target.relation]
            crossed = cross_queries(others, [target], self.questions.known)
            queries += crossed.queries
            left_out = {name: left_out.get(name, 0) + count for name, count in crossed.left_out.items()}
        return self._draw(queries, split), left_out

    def _draw(self, queries: Sequence[CrossQuery], split: str) -> Sequence[CrossQuery]:
        count = min(self.config.queries, len(queries))
        return Random(f"{split}/{self.config.seed}/pairs").sample(list(queries), count)

    def _own(self, split: str, read: str, write: str) -> tuple[Sequence[CrossQuery], Mapping[str, int]]:
        """Questions that the model answers wrongly, moved within themselves."""

        def at(hops: TwoHop, position: str) -> Positions:
            return hops.at if position == SUBJECT else "last"

        asked = self.questions.hops(split)
        yes = right(self.model, [(hops.prompt, hops.answer) for hops in asked])
        wrong = [hops for hops, known in zip(asked, yes, strict=True) if not known]
        queries = [
            CrossQuery(h.prompt, h.prompt, h.answer, h.answer, at(h, read), at(h, write), h.subject) for h in wrong
        ]
        return self._draw(queries, split), {"answered right as they are": sum(yes)}

    def sweep(self, name: str, pairs: Pairs) -> MoveSweep:
        moves = [Move(read, write) for read in self.sites for write in self.sites]
        patched, left_out = dict[str, CrossPatched](), Counter[str]()
        for split in self.questions.questions:
            queries, reasons = pairs(split)
            left_out.update(reasons)
            if not queries:
                raise UserError(f"no {split} queries of kind {name!r}: use a model that knows more, or more --queries")
            measure = partial(self._patch, queries, moves)
            arrays = self.kept.get(f"moves/{name}/{split}", KeptSweep, measure)
            patched[split] = CrossPatched(tuple(queries), tuple(moves), **vars(arrays))
        return MoveSweep(name, patched, left_out)

    def _patch(self, queries: Sequence[CrossQuery], moves: Sequence[Move]) -> KeptSweep:
        patched = cross_patch(self.model, queries, moves, self.questions.answers)
        return KeptSweep(**{name: getattr(patched, name) for name in KeptSweep.__dataclass_fields__})

    def latents(self, dictionary: Dictionary) -> MovedLatents:
        """The last token's latents, between questions: what is transferred is what the model concluded there."""

        def queries(split: str) -> Sequence[CrossQuery]:
            recalled = self.questions.hops(split, recalled=True)
            if not recalled:
                return self._other_relations(split, LAST)[0]
            sources = [replace(hops, at="last") for hops in recalled]
            targets = [replace(hops, at="last") for hops in self.some(split)]
            return self._draw(cross_queries(sources, targets, self.questions.known).queries, split)

        measure = partial(self._moved, dictionary, queries("select"), queries("report"))
        return self.kept.get(f"latents/{dictionary.site}", MovedLatents, measure)

    def _moved(
        self, dictionary: Dictionary, select: Sequence[CrossQuery], report: Sequence[CrossQuery]
    ) -> MovedLatents:
        """Latents ranked on `select` by mean size of what they would move; random ones of those that differ at all."""
        sizes = np.zeros(dictionary.d_sae)
        for query in select:
            source, target = (
                record_latents(self.model, dictionary, self.model.tokenize([text])).acts[0, -1]
                for text in (query.source, query.target)
            )
            sizes += ((source - target).abs() * dictionary.rows.norm(dim=-1)).double().cpu().numpy()
        ranked, count = np.argsort(-sizes, kind="stable"), self.config.latents
        others = ranked[count : int((sizes > 0).sum())]
        rng, move = np.random.default_rng(self.config.seed), [Move(dictionary.site, dictionary.site)]

        def hits(latents: Sequence[int] | None) -> Float[np.ndarray, "queries"]:
            patched = cross_patch(
                self.model, report, move, self.questions.answers, None if latents is None else dictionary, latents
            )
            return patched.given()[:, 0].astype(float)

        draws = [rng.choice(others, min(count, len(others)), replace=False).tolist() for _ in range(DRAWS)]
        tokens = likeliest(self.model, [query.target for query in report])
        plain = [
            token == self.model.encode(query.target + query.wanted)[-1]
            for token, query in zip(tokens, report, strict=True)
        ]
        return MovedLatents(
            wilson_share(hits(None)),
            wilson_share(hits(ranked[:count].tolist())),
            wilson_share(np.mean([hits(draw) for draw in draws], axis=0)),
            wilson_share(np.array(plain, float)),
        )
