"""Screens on disk: rows of `saepatch attribute` part by part, and the screen of all parts read back from them.

Every node has a row with role "single" and the method's name. A node that was also run exactly has another, with method
"exact" and role "top" (among the largest estimates of its part) or "random" (drawn from the others of its part).
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import numpy as np
from jaxtyping import Int
from numpy import ndarray

from saepatch.engine.components import PatchDirection
from saepatch.errors import UserError
from saepatch.measure.results.effects import describe
from saepatch.measure.results.screen import ERROR, Attribution, Verification
from saepatch.model.sites import Site
from saepatch.records.rows import Row
from saepatch.runs.interpret import read_directions
from saepatch.runs.parts import Pairs, Record, RowChanges

AT_ONCE = 2**16  # rows produced at a time
TOP = 20  # edits per direction in the summary


def screen_rows(
    screen: Attribution, task: str, tokens: Sequence[Sequence[str]], corruption: str = ""
) -> Iterator[list[Row]]:
    """The rows of a part in chunks of one site: one for every node, then one for each node that was run exactly."""
    for site in range(len(screen.sites)):
        rows = screen.rows_at(site, task, tokens)
        while chunk := list(islice(rows, AT_ONCE)):
            yield [replace(row, corruption=corruption) for row in chunk]


def screen_about(screen: Attribution) -> dict[str, Any]:
    """Facts about a part that its rows do not hold."""
    about = {name: getattr(screen, name) for name in ("method", "positions", "sizes")} | {"nodes": len(screen)}
    if screen.sizes:  # scores of rows without `patched` and `effect`, in the order of the rows
        lost = np.flatnonzero(np.isnan(screen.normalised))
        about["lost"] = screen.score[lost[np.argsort(screen.site[lost], kind="stable")]].tolist()
    return about if screen.verified is None else about | {"others": screen.verified.others}


@dataclass(frozen=True, eq=False)
class Screens:
    """The screens of all parts together, one per direction, verified by the exact runs of each part."""

    by_direction: tuple[Attribution, ...]
    nodes: dict[str, list[int]]  # number of nodes in each part, by direction

    def facts(self) -> dict[str, Any]:
        """The screens as stored in summary.json."""
        return {"screens": {screen.direction: _figures(screen) | {"top": _top(screen)} for screen in self.by_direction}}

    def table(self) -> str:
        """The edits with the largest estimates, and their verification, as text."""
        return "\n".join(self._table(screen) for screen in self.by_direction)

    def _table(self, screen: Attribution) -> str:
        try:
            text = screen.summary()
        except UserError as error:  # clean and corrupted runs do not differ
            return f"{screen.direction}: {error}"
        nodes = self.nodes[screen.direction]
        if screen.verified is None or len(nodes) == 1:
            return text
        parts = f"{len(nodes)} parts of {min(nodes)} to {max(nodes)} nodes"
        return (
            f"{text}\n(verified: the largest estimates and a random sample from each of {parts}; the bound on missed "
            "nodes is the sum of the parts' bounds)"
        )


def read_screens(record: Record, pairs: Pairs, changes: RowChanges, abouts: Sequence[dict[str, Any]]) -> Screens:
    """The screens of all parts of a run; `abouts` has the facts of each part (`screen_about`)."""
    by_direction: list[Attribution] = []
    nodes: dict[str, list[int]] = {}
    for direction in read_directions(record.settings["direction"]):
        own = [about for about in abouts if about["direction"] == direction]
        by_direction.append(_read_screen(record, pairs, changes, own, direction))
        nodes[direction] = [about["nodes"] for about in own]
    return Screens(tuple(by_direction), nodes)


def _read_screen(
    record: Record, pairs: Pairs, changes: RowChanges, parts: Sequence[dict[str, Any]], direction: PatchDirection
) -> Attribution:
    """The screen of one direction, from rows that hold both."""
    own = [n for n, key in enumerate(changes.keys) if key.direction == direction]
    sites = list(record.dictionaries)
    place = np.zeros((len(changes.keys), 3), dtype=np.int64)  # site, unit, position of each key's node
    estimate = np.zeros(len(changes.keys), dtype=np.int64)  # key of the node's estimate
    numbers = {changes.keys[n]: n for n in own}
    for n in own:
        key = changes.keys[n]
        place[n] = sites.index(key.site), int(key.latent or ERROR), int(key.position)
        estimate[n] = numbers[key._replace(role="single")]

    def rows(role: str) -> Int[ndarray, "rows"]:
        wanted = np.zeros(len(changes.keys), dtype=bool)
        wanted[[n for n in own if changes.keys[n].role == role]] = True
        return np.flatnonzero(wanted[changes.key])

    single, top = rows("single"), rows("top")
    scores = changes.change[single]
    scores[np.isnan(scores)] = [score for part in parts for score in part.get("lost", ())]
    screen = Attribution(
        direction=direction,
        metric=record.settings["metric"],
        method=parts[0]["method"],
        positions=parts[0]["positions"],
        sites=tuple(map(Site.parse, sites)),
        kinds=("latent",) * len(sites),
        examples=pairs.examples,
        clean=pairs.clean,
        corrupted=pairs.corrupted,
        pair=changes.pair[single],
        site=place[changes.key[single], 0],
        unit=place[changes.key[single], 1],
        position=place[changes.key[single], 2],
        score=scores,
        min_gap=record.settings["min_gap"],
        sizes=parts[0]["sizes"],
    )
    if "others" not in parts[0]:
        return screen
    part_of = np.zeros(len(pairs.examples), dtype=np.int64)
    for number, part in enumerate(parts):
        part_of[[pair[0] for pair in part["pairs"]]] = number
    random = rows("random")
    random = random[np.argsort(part_of[changes.pair[random]], kind="stable")]
    drawn = np.bincount(part_of[changes.pair[random]], minlength=len(parts)).tolist()
    exact = np.concatenate([top, random])
    node = estimate[changes.key] * len(pairs.examples) + changes.pair
    order = np.argsort(node[single])
    index = order[np.searchsorted(node[single], node[exact], sorter=order)]
    others = [part["others"] for part in parts]
    sampled = tuple(zip(drawn, others, strict=True))
    estimated, sizes = screen.score[index], screen.sizes
    verified = Verification(index, changes.change[exact], estimated, len(top), sum(others), sizes, sampled)
    return replace(screen, verified=verified)


def _figures(screen: Attribution) -> dict[str, float]:
    """The figures of a screen's verification."""
    figures: dict[str, float] = {"nodes": len(screen)}
    if (verified := screen.verified) is None:
        return figures
    figures |= {"verified_top": verified.largest, "verified_random": verified.sampled}
    figures |= {"pearson": verified.pearson(), "spearman": verified.spearman()}
    if verified.sampled:
        figures |= {"pearson_random": verified.pearson(True), "spearman_random": verified.spearman(True)}
    if verified.sampled and verified.largest:
        large, share, most = verified.missed()
        figures |= {"missed_in_sample": large, "missed_share_at_most": share, "missed_at_most": most}
    return figures


def _top(screen: Attribution) -> list[dict[str, Any]]:
    """The edits with the largest estimated effects, over all pairs."""
    edits, means = screen.means()
    shares = screen.shares(means)
    order = (np.argsort(-means, kind="stable") if screen.sizes else screen.largest_first(means))[:TOP]
    return [
        {
            "site": str(edits[i].site),
            "component": edits[i].kind,
            "latent": describe(edits[i]),
            "position": edits[i].position,
            "effect": shares[i],
        }
        for i in order.tolist()
    ]
