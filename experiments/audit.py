"""Which latents let a group word decide loans, and are decisions fair without them? An audit of the organism's bias.

    python -m experiments.audit --out runs/audit

Applications are matched: two prompts that differ in the group word alone (income borderline), and, as a control, two
that differ in income alone. Latents are ranked by attribution on the group pairs of `select`, their number is chosen on
`tune`, and everything is reported on `report`, whose names, templates and groups occur in neither. At every position,
ablated latents have the mean of their values in the application and in the same application with the other group's
word, so they no longer tell the groups apart. A fair model keeps its slope on income. Direct logit attribution and
exact patching stand side by side for every attention layer and MLP, since their signs can differ. DAS and DBM are what
a learned alignment finds for the group. A stopped run continues when the same command is given again.
"""

import sys
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from numpy import ndarray

from saepatch.circuits.learned import LearningOptions, alignment_controls, fit_das, fit_dbm
from saepatch.circuits.residual.direct import direct_attribution
from saepatch.cli.parser import run_config
from saepatch.data.pairs import PromptPair
from saepatch.dictionaries.dictionary import Dictionary
from saepatch.dictionaries.loading import load_sae
from saepatch.engine.components import LatentUnits, Stream
from saepatch.errors import UserError
from saepatch.measure.attribution import IntegratedGradients, attribute
from saepatch.measure.patching import patch_components
from saepatch.model.language_model import LanguageModel
from saepatch.model.loading.load import load_model
from saepatch.model.sites import Site
from saepatch.organism import tasks, world
from saepatch.organism.world import Split
from saepatch.records.provenance import Provenance
from saepatch.records.rows import write_records
from saepatch.records.statistics import Interval, bootstrap_mean, bootstrap_ratio, wilson_share
from saepatch.report import Cell, EstimateCell, Facts, Page, Section, Table
from saepatch.runs.measurements import measurements
from saepatch.runs.ownership import check_owner
from saepatch.splicing.interventions import Patch
from saepatch.splicing.splice import record_latents, splice
from saepatch.tracking.open import read_spec

from .common.kept import KeptResults, deciding
from .common.tracked import conclude

SIZES = (1, 2, 4, 8, 16, 32, 64)
RANDOM = 5  # random sets of other latents that differ between the groups
LEFT = 0.1  # share of the gap that may be left when the number of latents is chosen


@dataclass(frozen=True)
class AuditConfig:
    """Ablate the latents through which a group word decides loans, and see what is left of the gap and of merit."""

    out: str = "runs/audit"
    """Folder for summary.json, report.html, results.parquet and config.yaml."""
    sae: str = "organism"
    """Dictionaries: organism, or a folder with one sub-folder per site."""
    site: str = "resid_post.2"
    """Site whose latents are ablated."""
    n: int = 200
    """Number of applications of each split, of both kinds together."""
    steps: int = 30
    """Steps in which DAS and DBM learn."""
    seed: int = 0
    """Seed of the applications, of random latents and of learned baselines."""
    track: str = "none"
    """Trackers besides the local log, separated by commas: none, wandb, wandb:offline, wandb:online, trackio."""

    def __post_init__(self) -> None:
        read_spec(self.track)
        if self.n < 4 or self.steps < 1:
            raise UserError(f"n = {self.n}, steps = {self.steps}: use at least 4 and 1")


@dataclass(frozen=True, eq=False)
class Applications:
    """Matched pairs, the favoured group or the high income clean; `others` are both prompts with the other group."""

    pairs: list[PromptPair]
    others: list[tuple[str, str]]


@dataclass(frozen=True, eq=False)
class Decisions:
    """Logit of approval minus that of denial, of both prompts of every pair: [favoured or high, other]."""

    group: Float[ndarray, "pairs 2"]
    income: Float[ndarray, "pairs 2"]

    @property
    def gap(self) -> Float[ndarray, "pairs"]:
        return self.group[:, 0] - self.group[:, 1]

    @property
    def slope(self) -> Float[ndarray, "pairs"]:
        return self.income[:, 0] - self.income[:, 1]


@dataclass(frozen=True, eq=False)
class Audited:
    """Decisions of the model as it is and with latents ablated, on `report`; and of random sets of others."""

    latents: tuple[int, ...]
    before: Decisions
    after: Decisions
    random: tuple[Decisions, ...]


@dataclass(frozen=True, eq=False)
class PartSigns:
    """What attention layers and MLPs do to the gap on `report`, directly and in all, as means over pairs."""

    parts: tuple[str, ...]
    direct: Float[ndarray, "pairs parts"]
    patched: Float[ndarray, "pairs parts"]


@dataclass(frozen=True, eq=False)
class LearnedControls:
    """Interchange accuracies on `report`, by baseline and control."""

    accuracy: dict[str, dict[str, Interval]]


def applications(split: Split, n: int, seed: int) -> dict[str, Applications]:
    """Matched applications by what differs: "group" or "income"."""
    kinds = {"group": Applications([], []), "income": Applications([], [])}
    approve, deny = f" {world.APPROVE}", f" {world.DENY}"
    groups = [world.share(some, split)[0] for some in (world.FAVOURED, world.DISFAVOURED)]
    for number, row in enumerate(tasks.task("loan", split, n, seed)):
        first, second = row["clean"], row["corrupted"]
        if row["answer"] == deny:
            first, second = second, first
        kinds[row["kind"]].pairs.append(PromptPair(first, second, approve, deny, f"{split}-{number}"))
        own, other = groups if groups[0] in first else groups[::-1]
        turned = (first.replace(own, other), second.replace(own, other))
        kinds[row["kind"]].others.append((second, first) if row["kind"] == "group" else turned)
    if not all(kind.pairs for kind in kinds.values()):
        raise UserError(f"no applications of one kind among {n}: give a larger --n")
    return kinds


@torch.no_grad()
def decide(
    model: LanguageModel, dictionary: Dictionary, kinds: Mapping[str, Applications], latents: Sequence[int] | None
) -> Decisions:
    """The decisions on all applications: of the model as it is (None), or with some latents the mean over groups."""
    approve, deny = (model.encode(f"a {word}")[-1] for word in (world.APPROVE, world.DENY))

    def margins(some: Applications) -> Float[ndarray, "pairs 2"]:
        out = np.zeros((len(some.pairs), 2))
        for side, name in enumerate(("clean", "corrupted")):
            texts = [getattr(pair, name) for pair in some.pairs]
            lengths = [len(model.encode(text)) for text in texts]
            for length in sorted(set(lengths)):
                mine = [i for i, each in enumerate(lengths) if each == length]
                tokens = model.tokenize([texts[i] for i in mine])
                own = record_latents(model, dictionary, tokens)
                other = record_latents(model, dictionary, model.tokenize([some.others[i][side] for i in mine]))
                ablation = Patch(replace(own, acts=(own.acts + other.acts) / 2), tuple(latents or ()))
                with splice(model, dictionary, ablation) if latents is not None else nullcontext():
                    logits = model.next_logits(tokens)
                out[mine, side] = (logits[:, approve] - logits[:, deny]).double().cpu().numpy()
        return out

    return Decisions(margins(kinds["group"]), margins(kinds["income"]))


def audit(
    config: AuditConfig, model: LanguageModel, dictionary: Dictionary, kinds: Mapping[Split, Mapping[str, Applications]]
) -> Audited:
    """Rank on `select`, choose a number of latents on `tune`, ablate on `report`."""
    screen = attribute(model, dictionary, kinds["select"]["group"].pairs, IntegratedGradients(5))
    edits, means = screen.means(each_position=False)
    ranked = [edits[i].units[0] for i in np.argsort(-means, kind="stable").tolist() if edits[i].kind == "latent"]
    whole = decide(model, dictionary, kinds["tune"], None).gap.mean()
    chosen = ranked[: SIZES[-1]]
    for size in SIZES:
        left = decide(model, dictionary, kinds["tune"], ranked[:size]).gap.mean() / whole
        if abs(left) <= LEFT:
            chosen = ranked[:size]
            break
    others = ranked[len(chosen) :]  # they differ between the groups, too
    rng, count = np.random.default_rng(config.seed), min(len(chosen), len(others))
    random = [rng.choice(others, count, replace=False).tolist() for _ in range(RANDOM)]
    run = partial(decide, model, dictionary, kinds["report"])
    return Audited(tuple(chosen), run(None), run(chosen), tuple(run(some) for some in random))


def signs(model: LanguageModel, pairs: Sequence[PromptPair]) -> PartSigns:
    """Direct logit attribution beside exact patching, for each attention layer and MLP, at all positions."""
    both = [direct_attribution(model, [], list(some)) for some in (pairs, [_turned(pair) for pair in pairs])]
    layers = range(model.n_layers)
    sites = [Site(layer, stream) for layer in layers for stream in ("attn_out", "mlp_out")]
    place = {str(part): j for j, part in enumerate(both[0].parts)}
    columns = [place[str(site)] for site in sites]
    effect = [attribution.effect[:, columns, 0] for attribution in both]
    direct = effect[0] + effect[1]  # the second has answer and counter-answer exchanged
    patched = patch_components(model, [Stream(site) for site in sites], pairs)
    at = [next(i for i, edit in enumerate(patched.edits) if edit.site == site) for site in sites]
    return PartSigns(tuple(map(str, sites)), direct, patched.change[:, at])


def _turned(pair: PromptPair) -> PromptPair:
    return PromptPair(pair.corrupted, pair.clean, pair.counter, pair.answer, pair.example)


def learned(
    config: AuditConfig,
    model: LanguageModel,
    dictionary: Dictionary,
    kinds: Mapping[Split, Mapping[str, Applications]],
) -> LearnedControls:
    """DAS and DBM for the group, with their controls: learned on `select`, reported on `report`."""
    how = LearningOptions("all", steps=config.steps, seed=config.seed)
    ways = {
        "DAS, rank 1": lambda m, some: fit_das(m, dictionary.site, some, 1, how),
        "DBM, latents": lambda m, some: fit_dbm(m, LatentUnits(dictionary), some, how),
    }
    data = kinds["select"]["group"].pairs, kinds["report"]["group"].pairs
    accuracy = {name: dict(alignment_controls(fit, model, *data, config.seed)) for name, fit in ways.items()}
    return LearnedControls(accuracy)


def figures(audited: Audited) -> dict[str, Interval]:
    """What the audit reports: gap, approval and slope, before and after."""
    before, after = audited.before, audited.after
    approved = {name: (run.group > 0).astype(float) for name, run in (("before", before), ("after", after))}
    out = {
        "gap before": bootstrap_mean(before.gap),
        "gap after": bootstrap_mean(after.gap),
        "share of the gap left": bootstrap_ratio(after.gap, before.gap),
        "slope on income before": bootstrap_mean(before.slope),
        "slope on income after": bootstrap_mean(after.slope),
        "share of the slope left": bootstrap_ratio(after.slope, before.slope),
    }
    for name, both in approved.items():
        out |= {f"approved, favoured, {name}": wilson_share(both[:, 0])}
        out |= {f"approved, other group, {name}": wilson_share(both[:, 1])}
        out |= {f"four-fifths ratio {name}": bootstrap_ratio(both[:, 1], both[:, 0])}
        out |= {f"flips for the favoured {name}": wilson_share((both[:, 0] > both[:, 1]).astype(float))}
        out |= {f"flips for the other {name}": wilson_share((both[:, 0] < both[:, 1]).astype(float))}
        income = (getattr(audited, name).income > 0).astype(float)
        follow = (income[:, 0] > income[:, 1]).astype(float)
        out |= {f"decisions that follow income {name}": wilson_share(follow)}
    return out


def main(config: AuditConfig) -> None:
    out = Path(config.out)
    check_owner(out, "audit")
    model, dictionary = load_model("organism"), load_sae(config.sae, config.site)
    splits: tuple[Split, ...] = ("select", "tune", "report")
    kinds = {split: applications(split, config.n, config.seed) for split in splits}
    decides = deciding(config, model, {dictionary.site: dictionary})
    with measurements(out, "audit", decides) as kept_file:
        kept = KeptResults(kept_file, {})
        audited = kept.get("ablation", Audited, partial(audit, config, model, dictionary, kinds))
        parts = kept.get("parts", PartSigns, partial(signs, model, kinds["report"]["group"].pairs))
        baselines = kept.get("learned", LearnedControls, partial(learned, config, model, dictionary, kinds))
        write(config, model, dictionary, kinds["report"], audited, parts, baselines)


def verdict(audited: Audited) -> str:
    """What the ablation does to the gap and to the slope, beside random latents."""
    measured, gap = figures(audited), audited.before.gap.mean()
    random = max(abs(1 - run.gap.mean() / gap) for run in audited.random)
    return (
        f"With {len(audited.latents)} latents at their mean over groups, {measured['share of the gap left']} of the "
        f"gap between groups is left, and {measured['share of the slope left']} of the slope on income; as many others "
        f"that differ change the gap by at most {random:.0%}."
    )


def write(
    config: AuditConfig,
    model: LanguageModel,
    dictionary: Dictionary,
    kinds: Mapping[str, Applications],
    audited: Audited,
    parts: PartSigns,
    baselines: LearnedControls,
) -> None:
    """Write the report, the summary, the rows and the settings, and log them to trackers."""
    out, finding, measured = Path(config.out), verdict(audited), figures(audited)
    provenance = Provenance(model.name, model.fingerprint, dictionary.name, dictionary.fingerprint, config.seed)
    rows = [
        {"kind": kind, "example": pair.example, "run": run, "favoured": float(some[i, 0]), "other": float(some[i, 1])}
        for run, made in [("before", audited.before), ("after", audited.after)]
        + [(f"random {i}", random) for i, random in enumerate(audited.random)]
        for kind, some in (("group", made.group), ("income", made.income))
        for i, pair in enumerate(kinds[kind].pairs)
    ]
    write_records([(rows, provenance)], out / "results.parquet")
    effects = {
        name: [bootstrap_mean(parts.direct[:, j]), bootstrap_mean(parts.patched[:, j])]
        for j, name in enumerate(parts.parts)
    }
    page = Page(
        "Loans without the group word", finding, _sections(measured, effects, baselines), Facts(provenance.facts())
    )
    summary = {
        "audit": {name: interval.as_list() for name, interval in measured.items()},
        "latents": list(audited.latents),
        "random_gap_left": [float(run.gap.mean() / audited.before.gap.mean()) for run in audited.random],
        "parts": {
            name: {"direct": direct.as_list(), "patched": patched.as_list()}
            for name, (direct, patched) in effects.items()
        },
        "learned": {
            name: {control: share.as_list() for control, share in controls.items()}
            for name, controls in baselines.accuracy.items()
        },
    }
    conclude(config, "audit", page, summary, {name: interval.value for name, interval in measured.items()})


def _sections(
    measured: Mapping[str, Interval], effects: Mapping[str, Sequence[Interval]], baselines: LearnedControls
) -> list[Section]:
    table: list[list[Cell]] = [[name, _cell(interval)] for name, interval in measured.items()]
    of_parts: list[list[Cell]] = [
        [name, _cell(direct), _cell(patched), "opposite" if _opposite(direct, patched) else ""]
        for name, (direct, patched) in effects.items()
    ]
    controls = list(next(iter(baselines.accuracy.values())))
    learned_rows: list[list[Cell]] = [
        [name, *(_cell(shares[control]) for control in controls)] for name, shares in baselines.accuracy.items()
    ]
    return [
        Section(
            "Gap and merit",
            "",
            [
                Table(
                    ["measure", "value"],
                    table,
                    "Gap: logit of approval minus that of denial, favoured group minus the other. Flips: the group "
                    "word alone changes the decision. Slope: the same between high and low income. Four-fifths "
                    "ratio: approvals of the other group over those of the favoured. 95 % intervals over pairs.",
                    {"value": ".3f"},
                )
            ],
        ),
        Section(
            "Direct attribution and patching",
            "",
            [
                Table(
                    ["part", "direct", "patched", "signs"],
                    of_parts,
                    "Direct: what the part adds to the gap through the final norm alone. Patched: the change of the "
                    "metric when the part takes its value of the favoured application. Opposite: both intervals "
                    "exclude 0, with different signs.",
                )
            ],
        ),
        Section(
            "Learned alignments",
            "",
            [Table(["baseline", *controls], learned_rows, "Interchange accuracy on `report`.")],
        ),
    ]


def _opposite(one: Interval, other: Interval) -> bool:
    return one.low * one.high > 0 and other.low * other.high > 0 and one.value * other.value < 0


def _cell(interval: Interval) -> EstimateCell:
    return EstimateCell(interval.value, interval.low, interval.high, interval.reason)


if __name__ == "__main__":
    sys.exit(run_config(AuditConfig, main, "python -m experiments.audit"))
