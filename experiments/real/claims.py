"""The claims that the study tests, each with its figure, interval and verdict."""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from saepatch.errors import UserError
from saepatch.records.statistics import Interval

from ..pairs.stages import DENSE
from ..steering.stages import PROMPTING, RANDOM
from .stages.dictionaries import LATENTS, TaskLatents, correlation
from .stages.heads import INHIBITION, MOVER, NEGATIVE, HeadRole, direction_gap
from .stages.patching import PatchingStage, beyond_random
from .stages.restoration import DIMENSIONS, RestoredBehaviour
from .stages.restoration import NEURONS as ALL_NEURONS
from .stages.restoration import RANDOM as RANDOM_LATENTS
from .stages.steering import ONE_LATENT, ONE_TOKEN, SEVERAL_LATENTS, SteeredConcept, success_gap
from .stages.tracing import NOISE, TOKENS, Tracing, noise_over_tokens, subject_over_last

AGREES = 0.9  # a correlation above this is called agreement
SHOWN, OPPOSITE, NOT_SHOWN = "shown", "the opposite is shown", "not shown"


@dataclass(frozen=True)
class Claim:
    """A claim of the literature, what was measured, and the figure."""

    claim: str
    measured: str
    figure: Interval
    verdict: str


@dataclass(frozen=True)
class OtherRun:
    """The verdicts of another run of the study: each claim, what was measured, and the figure with its verdict."""

    name: str
    claims: Sequence[tuple[str, str, str]]

    @classmethod
    def read(cls, path: str) -> "OtherRun":
        """Read a run's `summary.json`.

        Raises:
            UserError: it cannot be read, or is not of this study.
        """
        try:
            summary = json.loads(Path(path).read_text(encoding="utf-8"))
            claims = [(each["claim"], each["measured"].split(":")[0], _told(each)) for each in summary["claims"]]
            return cls(summary["config"]["model"], claims)
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise UserError(
                f"cannot read verdicts from {path!r}: give the summary.json of a run of this study"
            ) from error

    def verdict(self, claim: Claim) -> str:
        """Figures and verdicts on the same claim, of the same task where the claim has several."""
        mine = [each for each in self.claims if each[0] == claim.claim]
        of_task = [each for each in mine if each[1] == claim.measured.split(":")[0]]
        same = mine if len(mine) == 1 else of_task  # a claim on several tasks has a verdict for each
        return "; ".join(told for _, _, told in same) or "not measured"


def _told(claim: Mapping[str, Any]) -> str:
    value, low, high = claim["figure"]
    interval = "" if low is None else f" [{low:.3f}, {high:.3f}]"
    return f"{'–' if value is None else format(value, '.3f')}{interval}, {claim['verdict']}"


def verdict_of(figure: Interval, bound: float = 0.0) -> str:
    """Whether the interval lies above or below the bound; an interval that was withheld shows nothing."""
    if figure.low > bound:
        return SHOWN
    return OPPOSITE if figure.high < bound else NOT_SHOWN


def patching_claims(patched: PatchingStage) -> list[Claim]:
    claims = []
    if patched.together:
        gap = beyond_random(patched.together["denoise"])
        of = len(patched.together["denoise"].edits[0].parts)
        heads = sum(len(part.units) for part in patched.together["denoise"].edits[0].parts)
        measured = f"denoising with the first {heads} heads of select (in {of} layers), minus as many random heads"
        claims.append(Claim("A few heads carry the task", measured, gap, verdict_of(gap)))
    if patched.heads:
        gap = direction_gap(patched.heads)
        measured = "denoising minus noising, summed over the ten heads with the largest effects in the mean of both"
        claims.append(Claim("Denoising shows more than noising", measured, gap, verdict_of(gap)))
    for role, sign in ((MOVER, 1), (NEGATIVE, -1), (INHIBITION, 1)):
        if patched.roles:
            claims.append(_role_claim(role, sign, patched.roles))
    return claims


def _role_claim(role: str, sign: int, roles: Sequence[HeadRole]) -> Claim:
    """There are heads of a role, as in GPT-2 small; the figure is that of the head with the largest effect."""
    mine = [head for head in roles if head.role == role]
    figures = {id(head): head.total if role == INHIBITION else head.direct for head in roles}
    best = max(mine or roles, key=lambda head: sign * figures[id(head)].value)
    what = "total" if role == INHIBITION else "direct"
    names = ", ".join(f"{head.layer}.{head.head}" for head in mine) or "none"
    measured = f"heads that meet all criteria: {names}; {what} effect of {best.layer}.{best.head}"
    return Claim(f"There are {role} heads", measured, figures[id(best)], SHOWN if mine else NOT_SHOWN)


def latents_claims(latents: Mapping[str, TaskLatents]) -> list[Claim]:
    """At the site chosen on select, for each task: few latents against random ones, and attribution."""
    claims = []
    for task, best in latents.items():
        curve = best.curves["denoise"]
        k, top, random = curve.sizes[-1], curve.top[-1], curve.random[-1]
        apart = top.low > random.high
        measured = f"{task}: denoising with {k} latents of {best.site}, ranked on select; random ones {random}"
        claims.append(Claim("A few latents restore the answer", measured, top, SHOWN if apart else NOT_SHOWN))
        agreement = correlation(best.attribution)
        measured = f"{task}: Pearson correlation with exact effects at {best.site}, against {AGREES:g}"
        claims.append(
            Claim("Attribution agrees with exact patching", measured, agreement, verdict_of(agreement, AGREES))
        )
    return claims


def direction_claims(latents: Mapping[str, TaskLatents]) -> list[Claim]:
    """At the site chosen on select, for each task: latents against as many other directions, denoising."""
    claims = []
    for task, best in latents.items():
        mine = best.others[LATENTS]
        for kind, other in best.others.items():
            shared = [k for k in mine.sizes if k in other.sizes]
            if kind != LATENTS and shared:
                k = shared[-1]
                gap = mine.beyond(other, k)
                measured = f"{task}: {k} of the latents of {best.site} minus {k} of the {kind}, denoising"
                claims.append(Claim(f"Latents restore more than {kind}", measured, gap, verdict_of(gap)))
    return claims


def steering_claims(steered: Sequence[SteeredConcept]) -> list[Claim]:
    """Over the prompts of all concepts, each method at its own best strength."""
    if not steered:
        return []
    claims = []
    for claim, name, other in (
        ("Latents steer better than random ones", SEVERAL_LATENTS, RANDOM),
        ("Several latents steer better than one", SEVERAL_LATENTS, ONE_LATENT),
        ("Latents steer better than the difference of means", SEVERAL_LATENTS, DENSE),
        ("Latents steer better than a prompt", SEVERAL_LATENTS, PROMPTING),
        ("Latents steer better than one token in front", SEVERAL_LATENTS, ONE_TOKEN),
    ):
        if all(name in each.chosen and other in each.chosen for each in steered):
            gap = success_gap(steered, name, other)
            measured = f"share of continuations that show the concept, {name} minus {other}"
            claims.append(Claim(claim, measured, gap, verdict_of(gap)))
    return claims


def restoration_claims(restored: RestoredBehaviour | None) -> list[Claim]:
    if restored is None:
        return []
    claims, most = [], restored.most
    for claim, other in (
        ("A few latents restore a behaviour that a prompt suppresses", RANDOM_LATENTS),
        ("Restored latents do more than the difference of means", DENSE),
        ("Restored latents do more than residual dimensions", DIMENSIONS),
        ("Restored latents do more than neurons", ALL_NEURONS),
    ):
        if other in restored.answers:
            gap = restored.beyond(most, other)
            measured = f"share of answers in French, {most} of {restored.d_sae} at {restored.site} minus {other}"
            claims.append(Claim(claim, measured, gap, verdict_of(gap)))
    return claims


def tracing_claims(traced: Tracing) -> list[Claim]:
    if not traced.mlps:
        return []
    claims = []
    for name in (NOISE, TOKENS):
        gap = subject_over_last(traced, name)
        measured = f"{name}: MLPs of the first half at the subject's last token, minus at the prompt's last token"
        claims.append(Claim("Early MLPs at the subject's last token recall facts", measured, gap, verdict_of(gap)))
    gap = noise_over_tokens(traced)
    measured = f"MLPs of the first half at the subject's last token: {NOISE} minus {TOKENS}"
    claims.append(Claim("Gaussian noise shows more of the MLPs than token replacement", measured, gap, verdict_of(gap)))
    return claims
