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
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from random import Random

import numpy as np
from jaxtyping import Float, Int

from saepatch.dictionaries.dictionary import Dictionary
from saepatch.dictionaries.loading import load_saes
from saepatch.errors import UserError
from saepatch.measure.controls import DRAWS
from saepatch.model.language_model import LanguageModel
from saepatch.model.loading.load import load_model
from saepatch.model.positions import Positions
from saepatch.model.sites import Site
from saepatch.reading.cosine_lens import Mention, cosine_lens
from saepatch.reading.cross_patch import CrossPatched, CrossQuery, Move, TwoHop, cross_patch, cross_queries
from saepatch.records.provenance import versions
from saepatch.records.statistics import Interval, bootstrap_mean, wilson_share
from saepatch.runs.measurements import measurements
from saepatch.runs.ownership import check_owner
from saepatch.splicing.splice import record_latents
from saepatch.tracking.open import read_spec

from ..common.kept import KeptResults
from .questions import QuestionSet, last_of, likeliest, organism_questions, right, written_questions

WRONG = 20  # random wrong answers of each question, for the null of a maximum
EMBEDDING = Site(0, "resid_pre")
SUBJECT, LAST = "subject", "last token"


@dataclass(frozen=True)
class TwoHopConfig:
    """Ask why questions of two hops fail or succeed: cosine lens, cross-, back- and forward-patching."""

    out: str = "runs/two_hop"
    """Folder for summary.json, report.html, results.parquet and config.yaml."""
    model: str = "organism"
    """The embedded model, a folder, or a Hugging Face id."""
    sae: str = "organism"
    """Dictionaries whose latents are moved: organism, or a folder with one sub-folder per site; empty: none."""
    queries: int = 24
    """Maximum number of questions, or pairs of prompts, of each kind and split."""
    layer_step: int = 1
    """States are moved from and to every so many layers."""
    latents: int = 16
    """Number of latents that are moved."""
    device: str = "cpu"
    """Where to run."""
    dtype: str = "float32"
    """Precision of the model."""
    seed: int = 0
    """Seed of the choice of questions, of random latents and of wrong answers."""
    track: str = "none"
    """Trackers besides the local log, separated by commas: none, wandb, wandb:offline, wandb:online, trackio."""

    def __post_init__(self) -> None:
        read_spec(self.track)
        if self.queries < 6 or min(self.layer_step, self.latents) < 1:
            raise UserError(
                f"queries = {self.queries}, layer_step = {self.layer_step}, latents = {self.latents}: use at least 6, "
                "1 and 1"
            )


@dataclass(frozen=True, eq=False)
class KeptSweep:
    """The arrays of a `CrossPatched`, and how many pairs were left out, by reason."""

    answers: tuple[str, ...]
    log_p: Float[np.ndarray, "queries moves answers"]
    likeliest: Int[np.ndarray, "queries moves"]
    plain_log_p: Float[np.ndarray, "queries answers"]
    plain_likeliest: Int[np.ndarray, "queries"]
    ids: Int[np.ndarray, "queries answers"]


@dataclass(frozen=True, eq=False)
class Sweep:
    """One kind of moves on both splits: what was moved, from and to where."""

    name: str
    split: Mapping[str, CrossPatched]
    left_out: Mapping[str, int]

    @property
    def report(self) -> CrossPatched:
        return self.split["report"]

    def among(self, back: bool | None = None) -> list[int]:
        """The moves to an earlier site (back), to a later one (False), or all."""
        orders = [(move.read.order, move.write.order) for move in self.report.moves]
        return [i for i, (read, write) in enumerate(orders) if back is None or (read > write if back else read < write)]

    def chosen(self, back: bool | None = None) -> tuple[Move, Interval]:
        """The best of these moves on `select`, ties broken by the answer's probability, and its share on `report`."""
        mine, select = self.among(back), self.split["select"]
        p = np.exp(select.log_p[np.arange(len(select.queries)), :, select.places()]).mean(0)
        score = select.given().mean(0) + 1e-3 * p
        best = mine[int(score[mine].argmax())]
        return self.report.moves[best], self.report.share(best)

    def any_of(self, back: bool, seed: int) -> tuple[Interval, Interval, Interval]:
        """Share of questions that some move repairs; of wrong answers that some move yields; and their difference."""
        mine, found = self.among(back), self.report
        hits = found.given()[:, mine].any(1).astype(float)
        random, null = Random(seed), np.zeros(len(hits))
        for _ in range(WRONG):
            wrong = [random.choice([a for a in found.answers if a not in (q.wanted, q.own)]) for q in found.queries]
            null += found.given(wrong)[:, mine].any(1)
        null /= WRONG
        return wilson_share(hits), wilson_share(null), bootstrap_mean(hits - null, seed=seed)


@dataclass(frozen=True, eq=False)
class LensAt:
    """The cosine lens of one form of the bridge at one position of the questions on `report`."""

    sites: tuple[str, ...]
    nearest: tuple[Interval, ...]
    alignment: tuple[float, ...]
    cohesion: tuple[float, ...]
    chance: float

    @classmethod
    def measured(
        cls,
        model: LanguageModel,
        mentions: Mapping[str, Sequence[Mention]],
        held_out: Mapping[str, Sequence[Mention]],
        sites: Sequence[Site],
    ) -> "LensAt":
        lens = cosine_lens(model, mentions, held_out, sites)
        means = [tuple(values.mean(1).tolist()) for values in (lens.alignment, lens.cohesion)]
        nearest = tuple(lens.share_nearest())
        return cls(tuple(map(str, lens.sites)), nearest, means[0], means[1], 1 / len(lens.entities))


@dataclass(frozen=True, eq=False)
class HopShares:
    """Shares of questions of `report` answered right, by kind, and answered with the bridge."""

    composed: Interval
    recalled: Interval | None
    bridge: Interval


@dataclass(frozen=True)
class MovedLatents:
    """Shares of questions that take over the source's answer, from one site of the last token into the same site."""

    whole: Interval
    chosen: Interval
    random: Interval
    unpatched: Interval


@dataclass(frozen=True, eq=False)
class TwoHopResults:
    """All results of the study."""

    asked: Mapping[str, int]
    left_out: Mapping[str, int]
    shares: HopShares
    lenses: Mapping[str, LensAt]
    sweeps: Sequence[Sweep]
    latents: Mapping[str, MovedLatents]


def main(config: TwoHopConfig) -> None:
    from .page import write

    out = Path(config.out)
    check_owner(out, "two_hop")
    model = load_model(config.model, config.device, config.dtype)
    saes = load_saes(config.sae, config.device) if config.sae else {}
    decides = {
        "settings": {name: value for name, value in asdict(config).items() if name not in ("out", "track", "device")},
        "model's weights": model.fingerprint,
        "dictionaries": {str(site): dictionary.fingerprint for site, dictionary in saes.items()},
        "versions": versions(),
    }
    questions = organism_questions(model) if config.model == "organism" else written_questions(model)
    with measurements(out, "two_hop", decides) as kept:
        results = study(config, model, saes, questions, KeptResults(kept, {}))
    write(config, model, results)


def study(
    config: TwoHopConfig,
    model: LanguageModel,
    saes: Mapping[Site, Dictionary],
    questions: QuestionSet,
    kept: KeptResults,
) -> TwoHopResults:
    run = _Run(config, model, questions, kept)
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
class _Run:
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
        found = {}
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
                    found[name] = self.kept.get(f"lens/{name}", LensAt, measure)
        return found

    def kinds(self) -> dict[str, Pairs]:
        """The kinds of moves, by name: functions of a split that give queries and what was left out."""
        one, two = self.questions.first, self.questions.second
        kinds: dict[str, Pairs] = {
            "a mention of another bridge → subject": lambda split: self._across(two, split),
            "first hop, subject → subject": lambda split: self._across(self._firsts(one, SUBJECT), split),
            "first hop, last token → subject": lambda split: self._across(self._firsts(one, LAST), split),
        }
        if len({hops.relation for hops in two}) > 1:
            for position in (SUBJECT, LAST):
                kinds[f"another question, {position} → {position}"] = partial(self._other_relations, position=position)
        for read, write in ((SUBJECT, SUBJECT), (LAST, LAST), (LAST, SUBJECT)):
            kinds[f"the same question, {read} → {write}"] = partial(self._own, read=read, write=write)
        return kinds

    def _firsts(self, one: Mapping[str, Sequence[str]], position: str) -> list[TwoHop]:
        """Prompts of the first hop alone, as sources of bridges; none of a subject whose answer is recalled."""
        asked = [q.hops for some in self.questions.questions.values() for q in some if not q.recalled]
        prompts = {hops.subject: (prompt, hops.bridge) for hops in asked for prompt in one[hops.subject][:1]}

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

    def sweep(self, name: str, pairs: Pairs) -> Sweep:
        moves = [Move(read, write) for read in self.sites for write in self.sites]
        found, left_out = dict[str, CrossPatched](), Counter[str]()
        for split in self.questions.questions:
            queries, reasons = pairs(split)
            left_out.update(reasons)
            if not queries:
                raise UserError(f"no {split} queries of kind {name!r}: use a model that knows more, or more --queries")
            measure = partial(self._patch, queries, moves)
            arrays = self.kept.get(f"moves/{name}/{split}", KeptSweep, measure)
            found[split] = CrossPatched(tuple(queries), tuple(moves), **vars(arrays))
        return Sweep(name, found, left_out)

    def _patch(self, queries: Sequence[CrossQuery], moves: Sequence[Move]) -> KeptSweep:
        found = cross_patch(self.model, queries, moves, self.questions.answers)
        return KeptSweep(**{name: getattr(found, name) for name in KeptSweep.__dataclass_fields__})

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
            found = cross_patch(
                self.model, report, move, self.questions.answers, None if latents is None else dictionary, latents
            )
            return found.given()[:, 0].astype(float)

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
