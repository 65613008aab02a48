"""The results of an experiment on pairs, their tables, and the conclusions drawn from them."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from saepatch.data.pairs import PromptPair
from saepatch.engine.components import PATCH_DIRECTIONS, Edit, PatchDirection
from saepatch.measure.curves import Curve
from saepatch.measure.results.effects import CONTROLS, Effects, describe
from saepatch.model.language_model import LanguageModel
from saepatch.records.statistics import Interval, bootstrap_mean
from saepatch.records.tables import text_table

from .question import Question, StudyConfig
from .stages import CHOOSE_BY, DENSE, Agreement, Both, DirectionKind, RankedSite

NAMES: Mapping[PatchDirection, str] = {"denoise": "denoising", "noise": "noising"}
NO_HEADS = "No map of attention heads: the family of {model} does not offer the heads' outputs (stream `z`)."
TABLED = (1, 4, 16)  # numbers of directions compared in tables, where they were run
CELLS = 5  # number of a map's largest cells that are printed


@dataclass(frozen=True, eq=False)
class StudyResults:
    """All results of one run."""

    question: Question
    config: StudyConfig
    model: LanguageModel
    columns: Sequence[str]  # labels of the positions of the maps, whose pairs have one form
    group: int  # number of pairs of the maps
    examples: Sequence[PromptPair]  # the first report pairs
    tokens: Sequence[Sequence[str]]  # of each report pair's clean prompt
    group_tokens: Sequence[Sequence[str]]
    streams: Both
    heads: Both | None
    sites: Sequence[RankedSite]
    best: RankedSite
    latents: Both  # the first latents by position
    tops: Both  # the first latents at all positions, with controls
    curves: Mapping[PatchDirection, Curve]
    agreements: Sequence[Agreement]
    kinds: Sequence[DirectionKind]
    seconds: Mapping[str, float]

    @property
    def pairs(self) -> int:
        return len(self.tops["denoise"].examples)

    @property
    def compared(self) -> list[int]:
        """The sizes shown in tables."""
        sizes = self.kinds[0].sizes
        return [k for k in TABLED if k in sizes] or list(sizes[:1])


# Words


def unsure(effects: Effects, model: str) -> str:
    """A warning where the model does not distinguish a pair's two prompts; empty where it does."""
    gap = bootstrap_mean(effects.gap)
    if gap.low > 0:
        return ""
    if gap.reason:
        return (
            f"These pairs do not show whether {model} distinguishes clean from corrupted prompts (difference in "
            f"{effects.metric}: {gap}): use more pairs."
        )
    return (
        f"{model} does not distinguish clean from corrupted prompts (difference in {effects.metric}: {gap}), so shares "
        "of that difference mean nothing: use another model."
    )


def verdict(kinds: Sequence[DirectionKind], k: int, direction: PatchDirection = "denoise", seed: int = 0) -> str:
    """Which kind moves the metric most with `k` directions, and whether the difference is significant.

    Latents are the first of `kinds`.
    """
    values = {kind: value for kind in kinds if (value := kind.at(k, direction, seed)) is not None}
    latents, *others = values
    count = "one direction" if k == 1 else f"{k} directions"
    if not others:
        return f"With {count}, there are no other directions to compare latents with."
    rival = max(others, key=lambda kind: values[kind].value)
    ahead, behind = (latents, rival) if values[latents].value >= values[rival].value else (rival, latents)
    gap = ahead.beyond(behind, k, direction, seed)
    if not gap.low > 0:
        return (
            f"With {count}, {ahead} and {behind} do not differ significantly: {values[ahead]} and {values[behind]}, "
            f"difference {gap}."
        )
    return (
        f"With {count}, {ahead} {DONE[direction]} most: {values[ahead]}, against {values[behind]} for {behind}"
        f"{', the best of the others' if behind is rival and len(others) > 1 else ''} (difference {gap})."
    )


def against_dense(kinds: Sequence[DirectionKind], seed: int = 0) -> str:
    """How many latents restore as much as the difference of means; empty where there is no such direction."""
    latents, dense = kinds[0], next((kind for kind in kinds if kind.name == DENSE), None)
    mark = None if dense is None else dense.at(1, seed=seed)
    if mark is None:
        return ""
    values = {k: value for k in latents.sizes if (value := latents.at(k, seed=seed)) is not None}
    enough = [k for k, value in values.items() if value.value >= mark.value]
    most = max(values)
    if not enough:
        many = f"no number of latents tried restores as much ({most} restore {values[most]})"
    elif enough[0] == 1:
        many = f"one latent restores as much ({values[1]})"
    else:
        many = f"it takes {enough[0]} latents to restore as much ({values[enough[0]]})"
    return f"The difference of means, a single direction, restores {mark}; {many}."


# Tables


def largest(effects: Both, k: int = CELLS) -> list[tuple[Edit, Interval, Interval | None]]:
    """The edits that restore most, with their effects by direction."""
    if not effects:
        return []
    denoise, noise = effects["denoise"], effects["noise"]
    known = {edit: number for number, edit in enumerate(noise.edits)}
    return [(edit, denoise.of(edit), noise.of(known[edit]) if edit in known else None) for edit in denoise.top(k)]


def printed(study: StudyResults) -> str:
    """The results as text tables."""
    seed, denoise = study.config.seed, study.tops["denoise"]
    cells = [(f"{e.site} at {study.columns[e.position or 0]}", d, n) for e, d, n in largest(study.streams)]
    heads = [(f"layer {e.site.layer}, head {describe(e)}", d, n) for e, d, n in largest(study.heads or {})]
    sites = [
        (
            f"{candidate.site}{' *' if candidate is study.best else ''}",
            candidate.ranked.chosen_by,
            *(candidate.ranked.report[d] for d in PATCH_DIRECTIONS),
        )
        for candidate in study.sites
    ]
    latents = [(name, *values, f"{q:.2g}", f"{r:.2g}") for name, *values, q, r, _ in latent_rows(study)]
    kinds = [
        (kind.name, *(kind.at(k, d, seed) for d in PATCH_DIRECTIONS for k in study.compared)) for kind in study.kinds
    ]
    count, rank = study.agreements[0].nodes, study.agreements[0].bound[0]
    by_size = ["denoise", "random", "matched", "noise", "random", "matched"]
    return "\n\n".join(
        [
            f"{study.question.task}: {study.pairs} report pairs, {denoise.metric} {denoise.clean.mean():.3f} clean, "
            f"{denoise.corrupted.mean():.3f} corrupted",
            text_table([f"layer × position ({study.group} pairs)", *PATCH_DIRECTIONS], cells),
            text_table(["attention heads", *PATCH_DIRECTIONS], heads)
            if heads
            else NO_HEADS.format(model=study.model.name),
            text_table([f"site (*: chosen), first {CHOOSE_BY} latents", "select: denoise", *REPORTED], sites),
            text_table([f"latents of {study.best.site}", *by_size[:4], "q denoise", "q noise"], latents),
            text_table(["first latents together", *by_size], curve_rows(study)),
            text_table(
                [f"attribution, {count} nodes", *AGREEMENT[1:], f"missed (as its no. {rank})"], agreement_rows(study)
            ),
            text_table(["directions", *(f"{d} k={k}" for d in PATCH_DIRECTIONS for k in study.compared)], kinds),
            "\n".join(filter(None, [*verdicts(study), unsure(denoise, study.model.name)])),
        ]
    )


def verdicts(study: StudyResults, direction: PatchDirection = "denoise") -> list[str]:
    """Conclusions of the comparison of directions."""
    seed = study.config.seed
    words = [verdict(study.kinds, k, direction, seed) for k in study.compared]
    return [*words, *filter(None, [against_dense(study.kinds, seed)] if direction == "denoise" else [])]


def latent_rows(study: StudyResults) -> list[tuple[Any, ...]]:
    """A row per latent: denoising with its controls, noising, q values, and in how many pairs the latent differs."""
    denoise, noise = study.tops["denoise"], study.tops["noise"]
    q, r = denoise.q_values(), noise.q_values()
    rows = []
    for number, edit in enumerate(denoise.edits):
        if edit.role not in CONTROLS:
            controls = (denoise.controls(number, role) for role in ("random", "matched"))
            differs = int(denoise.ran[:, number].sum())
            rows.append(
                (describe(edit), denoise.of(number), *controls, noise.of(number), q[number], r[number], differs)
            )
    return sorted(rows, key=lambda row: -row[1].value)


def curve_rows(study: StudyResults) -> list[tuple[Any, ...]]:
    lines = [line for d in PATCH_DIRECTIONS for c in [study.curves[d]] for line in (c.top, c.random, c.matched)]
    return list(zip(study.curves["denoise"].sizes, *lines, strict=True))


DONE: Mapping[PatchDirection, str] = {"denoise": "restored", "noise": "removed"}
REPORTED = ("report: denoise", "report: noise")
AGREEMENT = ("method", "Pearson", "Spearman", "Pearson of sizes", "Spearman of sizes")  # keys of summary.json, too


def agreement_rows(study: StudyResults) -> list[tuple[str, ...]]:
    """Each method's correlations, and the bound on the nodes that it missed, as text."""
    return [
        (
            agreement.attribution.method,
            *("–" if value != value else f"{value:.3f}" for value in agreement.correlations),
            f"{int(agreement.bound[2])} of {agreement.bound[3]}",
        )
        for agreement in study.agreements
    ]
