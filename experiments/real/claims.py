"""The claims that the study tests, each with its figure, interval and verdict."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from saepatch.records.statistics import Interval

from .dictionaries import TaskLatents, pearson_over_pairs
from .heads import INHIBITION, MOVER, NEGATIVE, HeadRole, direction_gap
from .patching import PatchingStage, beyond_random
from .tracing import NOISE, TOKENS, Tracing, noise_over_tokens, subject_over_last

AGREES = 0.9  # a correlation above this is called agreement
SHOWN, OPPOSITE, NOT_SHOWN = "shown", "the opposite is shown", "not shown"


@dataclass(frozen=True)
class Claim:
    """A claim of the literature, what was measured, and the figure."""

    claim: str
    measured: str
    figure: Interval
    verdict: str


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


def latents_claims(latents: Mapping[str, Sequence[TaskLatents]]) -> list[Claim]:
    """At the site where most is restored, for each task: few latents against random ones, and attribution."""
    claims = []
    for task, sites in latents.items():
        best = max(sites, key=lambda site: site.curves["denoise"].top[-1].value)
        curve = best.curves["denoise"]
        k, top, random = curve.sizes[-1], curve.top[-1], curve.random[-1]
        apart = top.low > random.high
        measured = f"{task}: denoising with {k} latents of {best.site}, ranked on select; random ones {random}"
        claims.append(Claim("A few latents restore the answer", measured, top, SHOWN if apart else NOT_SHOWN))
        agreement = pearson_over_pairs(best.attribution)
        measured = f"{task}: Pearson correlation with exact effects at {best.site}, against {AGREES:g}"
        claims.append(
            Claim("Attribution agrees with exact patching", measured, agreement, verdict_of(agreement, AGREES))
        )
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
