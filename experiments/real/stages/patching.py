"""Stage "patching": where the answer is carried, by layer, position, head and MLP; which heads do what."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial

import numpy as np

from saepatch.data.forms import largest_group, position_labels
from saepatch.data.pairs import PromptPair
from saepatch.engine.components import Component, Edit, EditPart, Heads, PatchDirection, Stream
from saepatch.measure.patching import patch_components, patch_heads, patch_streams
from saepatch.measure.results.effects import Effects
from saepatch.model.language_model import LanguageModel
from saepatch.model.sites import Site
from saepatch.records.statistics import Interval

from ...common.kept import KeptResults
from ...pairs.question import FramedPair
from ...pairs.stages import Both, both
from .heads import HeadAttention, HeadRole, head_attention, head_roles
from .tasks import TaskPairs

DRAWS = 5  # random sets of heads
HEADS_SHARE = 0.1  # share of the heads that are patched together
WHOLE = ("resid_post at the last position", "attn_out", "mlp_out")


@dataclass(frozen=True, eq=False)
class TaskMap:
    """Effects of every layer's output at every position, over `pairs` of one form, by direction."""

    columns: Sequence[str]
    pairs: int
    effects: Both


@dataclass(frozen=True, eq=False)
class PatchingStage:
    """Results of the stage: maps by task, and the sweeps of the worked example, the task `worked`.

    `layers` are effects of one stream at a time by its name, at all positions unless the name says otherwise. `heads`,
    `direct` and `together` are empty where the family's layout has no attention heads; `roles` also where the task is
    not `ioi`.
    """

    worked: str
    maps: Mapping[str, TaskMap]
    layers: Mapping[str, Both]
    heads: Both
    direct: Both
    together: Both
    roles: Sequence[HeadRole]


def patching(
    model: LanguageModel, tasks: Mapping[str, TaskPairs], group: int, seed: int, kept: KeptResults
) -> PatchingStage:
    """Measure the stage on tasks that are not left out; the first is the worked example."""
    worked, *others = tasks
    maps = {name: task_map(model, tasks[name], group, kept, ("denoise",)) for name in others}
    maps = {worked: task_map(model, tasks[worked], group, kept, ("denoise", "noise")), **maps}
    select, report = (tasks[worked].pairs(split) for split in ("select", "report"))

    def effects(name: str, measure: partial[Effects]) -> Both:
        return both(lambda d: kept.get(f"patching/{worked}/{name}/{d}", Effects, partial(measure, direction=d)))

    layers = {
        "resid_post at the last position": effects(
            "last", partial(patch_streams, model, report, each_position=False, positions="last")
        )
    }
    for stream in ("attn_out", "mlp_out"):
        if stream in model.layout.streams:
            layers[stream] = effects(stream, partial(patch_streams, model, report, stream, each_position=False))
    if "z" not in model.layout.streams:
        return PatchingStage(worked, maps, layers, {}, {}, {}, ())
    heads = effects("heads", partial(patch_heads, model, report))
    direct = effects("direct", partial(direct_effects, model, report))
    ranked = kept.get(f"patching/{worked}/ranking", Effects, partial(patch_heads, model, select[: max(8, group)]))
    together = effects("together", partial(patch_together, model, report, ranked, seed))
    roles: Sequence[HeadRole] = ()
    if worked == "ioi":
        attention = kept.get("patching/ioi/attention", HeadAttention, partial(head_attention, model, report))
        roles = head_roles(heads, direct, attention)
    return PatchingStage(worked, maps, layers, heads, direct, together, roles)


def one_form(model: LanguageModel, framed: Sequence[FramedPair], most: int) -> list[PromptPair]:
    """Pairs of one form, at most `most`: a position has the same meaning in all of them."""
    return largest_group(model, [each.pair for each in framed], [each.frame for each in framed])[:most]


def task_map(
    model: LanguageModel, task: TaskPairs, most: int, kept: KeptResults, directions: Sequence[PatchDirection]
) -> TaskMap:
    pairs = one_form(model, task.framed["report"], most)
    effects = {
        d: kept.get(f"patching/{task.name}/map/{d}", Effects, partial(patch_streams, model, pairs, direction=d,
                                                                     each_position=True))
        for d in directions
    }  # fmt: skip
    return TaskMap(position_labels(model, pairs), len(pairs), effects)


def direct_effects(model: LanguageModel, pairs: Sequence[PromptPair], direction: PatchDirection) -> Effects:
    """Effect of every head on the logits alone: the outputs of all later attentions and MLPs are frozen.

    Source: path patching of heads to the logits, Wang et al. 2022 (https://arxiv.org/abs/2211.00593), section 3.1, but
    with the MLPs frozen too. The final norm is not frozen.
    """
    layers = [site.layer for site in model.layout.of_stream("z")]
    later = [site for stream in ("attn_out", "mlp_out") for site in model.layout.of_stream(stream)]
    components: list[Component] = [*(Heads(layer, model.n_heads) for layer in layers), *map(Stream, later)]
    edits = []
    for layer in layers:
        own = Site(layer, "attn_out")
        after = [site for site in later if site.layer >= layer and site != own]
        frozen = [EditPart(site, (0,), kind="stream", frozen=True) for site in after]
        for head in range(model.n_heads):
            moved = EditPart(Site(layer, "z"), (head,), kind="head")
            edits.append(Edit.of([moved, *frozen]))
    # with everything later frozen, a head acts on the logits at its own position alone
    effects = patch_components(model, components, pairs, edits, direction=direction, positions="last")
    return replace(effects, edits=tuple(replace(edit, others=(), role="single") for edit in edits))


def patch_together(
    model: LanguageModel, pairs: Sequence[PromptPair], ranked: Effects, seed: int, direction: PatchDirection
) -> Effects:
    """Effect of the first heads of a ranking together, and of as many random other heads, `DRAWS` times."""
    count = max(1, round(HEADS_SHARE * len(ranked.edits)))
    top = [(edit.site.layer, edit.units[0]) for edit in ranked.top(count)]
    others = [place for edit in ranked.edits if (place := (edit.site.layer, edit.units[0])) not in top]
    rng = np.random.default_rng(seed)
    drawn = [[others[i] for i in rng.choice(len(others), min(count, len(others)), replace=False)] for _ in range(DRAWS)]
    components = [Heads(site.layer, model.n_heads) for site in model.layout.of_stream("z")]
    edits = [_of_heads(top, "top"), *(_of_heads(places, "random") for places in drawn)]
    return patch_components(model, components, pairs, edits, direction=direction)


def _of_heads(places: Sequence[tuple[int, int]], role: str) -> Edit:
    by_layer: dict[int, list[int]] = {}
    for layer, head in sorted(places):
        by_layer.setdefault(layer, []).append(head)
    parts = [EditPart(Site(layer, "z"), tuple(heads), kind="head") for layer, heads in by_layer.items()]
    return Edit.of(parts, role)


def beyond_random(effects: Effects, seed: int = 0) -> Interval:
    """Effect of the edit with role "top" minus the mean of the random ones, paired by prompt."""
    top, random = effects.where("top"), effects.where("random")
    return effects.ratio(effects.change[:, top].mean(1) - effects.change[:, random].mean(1), seed)
