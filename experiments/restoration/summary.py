"""The safety experiment's conclusions, and the contents of summary.json."""

from collections.abc import Sequence
from typing import Any

from saepatch.records.provenance import versions
from saepatch.records.statistics import Interval

from .curves import ENOUGH, SHARE_LIMIT, RefusalCurve, RefusalPoint, share_of, within
from .guards import Guards
from .probes import Utility
from .results import Result, SafetyResults
from .settings import spliced_sites

RISE = 0.02  # largest accepted increase in the share of harmless prompts refused


def percent(share: float) -> str:
    """A share in per cent, with decimals for small shares."""
    size = abs(100 * share)
    return f"{100 * share:.{2 if 0 < size < 0.995 else 1 if 0 < size < 9.95 else 0}f} %"


def spoken(interval: Interval) -> str:
    if interval.reason:
        return f"{percent(interval.value)} ({interval.reason})"
    return f"{percent(interval.value)} [{percent(interval.low)}, {percent(interval.high)}]"


def few(result: Result) -> RefusalPoint:
    """The point at the number of latents chosen on `tune`."""
    return next(point for point in result.curve.points if point.latents == result.latents)


def beats_controls(result: Result) -> bool:
    """Whether the chosen latents' interval of refusals lies above that of every control with as many latents."""
    point = few(result)
    controls = [control for control in (point.random, point.matched) if control is not None]
    return bool(controls) and all(point.refused.low > control.high for control in controls)


def verdict(result: Result) -> str:
    """The conclusion of one setting."""
    curve, point = result.curve, few(result)
    bare, donor = (share_of([answered]) for answered in (curve.bare, curve.donor))
    share = curve.share_for()
    if not donor.value > bare.value:
        return "The donor refuses no more than the bare model, so there is nothing to restore."
    head = (
        f"{point.latents} latents ({percent(point.latents / curve.total)} of the {curve.total:,} of "
        f"{len(result.setting.sites)} layers, {percent(point.latents / curve.alive)} of the live ones, "
        f"{point.latents / curve.active:.2f} times the number active per token) raise refusals from "
        f"{spoken(bare)} to {spoken(point.refused)}; the donor refuses {spoken(donor)}"
    )
    controls = [
        f"{name} latents reach {spoken(control)}"
        for name, control in (("random", point.random), ("matched", point.matched))
        if control is not None
    ]
    text = "; as many ".join([head, *controls]) + ". " + _why_these_layers(result)
    enough = f"{percent(ENOUGH)} of the gap"
    if share.value < float("inf"):
        high = percent(share.high) if share.high < float("inf") else "none tried"
        interval = f"[{percent(share.low)}, {high}]"
        return text + f"The smallest share of the dictionary that recovers {enough}: {percent(share.value)} {interval}."
    everything = result.everything
    return text + (
        f"No number of latents tried recovers {enough}. With all latents restored, refusals reach "
        f"{spoken(share_of([everything]))}, and a refusal's first token is the most likely one after "
        f"{percent(float(everything.opened.mean()))} of prompts."
    )


def _why_these_layers(result: Result) -> str:
    """A sentence on why layers were added; empty where none were."""
    setting = result.setting
    planned = max(spliced_sites(setting.model, setting.every))
    before = next(depth for depth in result.depths if depth.last == planned)
    if planned == max(setting.sites):
        return ""
    return (
        f"The last fifth of the layers is included, since restoring even the whole residual up to {planned} gives only "
        f"{spoken(share_of([before.residual]))} refusals. "
    )


def acceptance(result: Result) -> dict[str, bool | None]:
    point = few(result)
    return {
        "restored_above_random": beats_controls(result) and point.latents <= SHARE_LIMIT * result.curve.total,
        "harmless_refusals_rise_at_most_2_points": result.utility.rise <= RISE,
        "donor_reproduced_exactly": result.exact,
    }


def triple(interval: Interval | None) -> list[float] | None:
    return None if interval is None else interval.as_list()


def finite(value: float) -> float | None:
    return value if value < float("inf") else None


def curve_points(curve: RefusalCurve) -> list[dict[str, Any]]:
    return [
        {
            "latents": point.latents,
            "share_of_dictionary": point.latents / curve.total,
            "share_of_alive": point.latents / curve.alive,
            "share_of_active": point.latents / curve.active,
            "refused": triple(point.refused),
            "refusal_opened": triple(point.opened),
            "refusal_score": triple(point.score),
            "degenerate": point.degenerate.value,
            "random": triple(point.random),
            "frequency_matched": triple(point.matched),
            "later_ranks": triple(point.later),
            "harmless_refused": None if point.harmless is None else point.harmless.value,
        }
        for point in curve.points
    ]


def neuron_points(curve: RefusalCurve | None) -> list[dict[str, Any]]:
    return (
        []
        if curve is None
        else [
            {
                "neurons": point.latents,
                "share_of_neurons": point.latents / curve.total,
                "refused": triple(point.refused),
                "refusal_score": triple(point.score),
                "random": triple(point.random),
                "harmless_refused": None if point.harmless is None else point.harmless.value,
            }
            for point in curve.points
        ]
    )


def setting_summary(result: Result, sizes: Sequence[int]) -> dict[str, Any]:
    curve, choice = result.curve, result.choice
    share = curve.share_for()
    neuron_share = None if result.neurons is None else result.neurons.share_for()
    return {
        "curve": curve_points(curve),
        "share_for_90": finite(share.value),
        "share_for_90_interval": [finite(share.low), finite(share.high)],
        "dense_direction": float(result.dense.refused.mean()),
        "full_residual": float(result.residual.refused.mean()),
        "neurons": neuron_points(result.neurons),
        "neurons_share_for_90": None if neuron_share is None else finite(neuron_share.value),
        "sites": [str(site) for site in result.setting.sites],
        "template": result.setting.template,
        "prompts": len(result.setting.harmful["report"]),
        "harmless_prompts": len(result.setting.harmless["report"]),
        "bare": triple(share_of([curve.bare])),
        "donor": triple(share_of([curve.donor])),
        "all_latents": triple(share_of([result.everything])),
        "all_latents_refusal_opened": float(result.everything.opened.mean()),
        "reconstruction_only": triple(share_of([result.reconstruction])),
        "dense_direction_interval": triple(share_of([result.dense])),
        "full_residual_interval": triple(share_of([result.residual])),
        "chosen_on_tune": {
            "ranking": choice.ranking,
            "latents": result.latents,
            "refused_there": triple(choice.refused),
            "tried_within_5_percent": within(sizes, curve.total),
        },
        **_probes(result),
        **_guards(result.guards),
        "utility": _utility(result.utility),
        "shared_quality": {
            str(site): {name: [getattr(quality, name) for quality in both] for name in ("fvu", "ce_recovered")}
            for site, both in result.quality.items()
        },
        "acceptance": acceptance(result),
        "verdict": verdict(result),
    }


def _probes(result: Result) -> dict[str, Any]:
    """Results by layer, depth and kind of framing."""
    return {
        "layers": [
            {
                "site": str(layer.site),
                "latents": layer.latents,
                "refused_alone": triple(share_of([layer.alone])),
                "refused_without": triple(share_of([layer.without])),
            }
            for layer in result.layers
        ],
        "by_depth": [
            {
                "last_site": str(depth.last),
                "full_residual": triple(share_of([depth.residual])),
                "all_latents": triple(share_of([depth.latents])),
                "all_latents_refusal_opened": float(depth.latents.opened.mean()),
            }
            for depth in result.depths
        ],
        "by_kind": result.kinds,
        "held_out": [
            {
                "framings": held_out.name,
                "prompts": held_out.prompts,
                "bare": triple(held_out.bare),
                "donor": triple(held_out.donor),
                "restored": triple(held_out.restored),
                "latents": list(held_out.latents),
            }
            for held_out in result.held_out
        ],
    }


def _guards(guards: Guards) -> dict[str, Any]:
    detector = guards.detector
    return {
        "guards": {
            guard.name: {
                "refused": triple(guard.refused),
                "harmless_refused": triple(guard.harmless_refused),
                "times_the_bare_model": guard.times,
            }
            for guard in guards.guards
        },
        "guard_utility": _utility(guards.utility),
        "detector": {
            "latents": list(detector.latents),
            "reading": detector.reading,
            "threshold": detector.threshold,
            "auroc": detector.auroc,
            "true_positive_rate": float(detector.caught.mean()),
            "false_positive_rate": float(detector.alarmed.mean()),
            "roc": [list(point) for point in detector.roc],
        },
    }


def _utility(utility: Utility) -> dict[str, Any]:
    return {name: triple(interval) for name, interval in vars(utility).items()} | {"rise": utility.rise}


def summary(experiment: SafetyResults) -> dict[str, Any]:
    sizes = experiment.config.sizes
    results = {result.setting.name: setting_summary(result, sizes) for result in experiment.results}
    return {
        **results,
        "model": experiment.config.model,
        "base": experiment.config.base,
        "seed": experiment.config.seed,
        "seconds": experiment.seconds,
        "versions": versions(),
    }
