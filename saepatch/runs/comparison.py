"""Two runs of one kind side by side, read from their summaries alone."""

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from saepatch.errors import UserError
from saepatch.records.files import plain
from saepatch.records.tables import text_table
from saepatch.runs.catalogue import RunFolder
from saepatch.runs.kinds import name_of, prompt_kinds, show, show_figure, show_interval, show_share
from saepatch.runs.lookup import DIFFERENCES, EditInBoth, look_up


@dataclass(frozen=True)
class RunComparison:
    """Settings and results of two runs side by side, in rows of (name, value in A, value in B)."""

    first: RunFolder
    second: RunFolder
    settings: tuple[tuple[str, str, str], ...]
    """Settings that differ, hashes of models and dictionaries among them."""
    figures: tuple[tuple[str, str, str], ...]
    edits: tuple[tuple[str, dict[str, Any] | None, dict[str, Any] | None], ...]
    """Top edits of either run by name, with their entries in both summaries; None: not among that run's top edits."""

    looked_up: Mapping[str, EditInBoth] = field(default_factory=dict)
    """By name, these edits' effects in the rows of both runs, whether top edits or not."""

    def table(self) -> str:
        """The comparison as text."""
        names = ["", str(self.first.path), str(self.second.path)]
        blocks: list[tuple[str, Sequence[tuple[str, ...]]]]
        blocks = [("settings that differ", self.settings), ("figures", self.figures)]
        if self.first.work in ("patch", "attribute"):
            blocks.append(("largest effects", [self._edit(*edit) for edit in self.edits]))
        lines: list[str] = []
        for title, rows in blocks:
            more = ["B − A"] if rows and len(rows[0]) > 3 else []
            lines.append(text_table([title, *names[1:], *more], rows, left=4) if rows else f"{title}: none")
            lines += [*([DIFFERENCES] if more else []), ""]
        return "\n".join(lines).rstrip()

    def _edit(self, name: str, line: dict[str, Any] | None, other: dict[str, Any] | None) -> tuple[str, ...]:
        """One edit's row: its effects in both runs and, where rows were looked up, their difference."""
        cells = [_effect(line, self.first, name), _effect(other, self.second, name)]
        if not self.looked_up:
            return (name, *cells)
        both = self.looked_up.get(name, EditInBoth(None, None, None))
        sides = ((line, both.first, self.first), (other, both.second, self.second))
        for place, (entry, interval, run) in enumerate(sides):
            if entry is None and name in self.looked_up and name.partition(":")[0] in _directions(run):
                cells[place] = "no rows" if interval is None else show_interval(plain(interval.facts()))
        return (name, *cells, "" if both.difference is None else show_interval(plain(both.difference.facts())))

    def facts(self) -> dict[str, Any]:
        """The comparison as JSON values."""
        return {
            "runs": [str(self.first.path), str(self.second.path)],
            "settings": [list(row) for row in self.settings],
            "figures": [list(row) for row in self.figures],
            "edits": [
                {"edit": name, "effects": [line and line["effect"] for line in lines]}
                | (self.looked_up[name].facts() if name in self.looked_up else {})
                for name, *lines in self.edits
            ],
        }


def _effect(line: dict[str, Any] | None, run: RunFolder, name: str) -> str:
    if line is None:
        if name.partition(":")[0] not in _directions(run):
            return "not run"
        return "another dictionary" if " of dictionary " in name else "not on top"
    effect = line["effect"]
    return show_interval(effect) if isinstance(effect, dict) else show(effect)


def compare_runs(first: RunFolder, second: RunFolder) -> RunComparison:
    """Compare two runs of one kind.

    Raises:
        UserError: a run is of no known kind, or their kinds differ.
    """
    for run in (first, second):
        if not run.work:
            raise UserError(f"{run.path} holds no run of a known command or experiment: give two folders of such runs")
    if first.work != second.work:
        raise UserError(
            f"{first.path} is a run of {first.work}, {second.path} of {second.work}: give two runs of the same command"
        )
    settings = _rows(_described(first), _described(second))
    differing_sites = {site for site, each in first.hashes.items() if second.hashes.get(site, each) != each}
    tops = [_tops(run, differing_sites) for run in (first, second)]
    edits = [(name, tops[0].get(name), tops[1].get(name)) for name in dict.fromkeys([*tops[0], *tops[1]])]
    if first.work == "restore":  # also compares the restored latents
        described = [{**_latents(run, other), **_outcomes(run)} for run, other in ((first, second), (second, first))]
        figures = _rows(*described)
    else:
        figures = _rows(*({n: show_figure(f) for n, f in r.kind.figures(r.summary).items()} for r in (first, second)))
    differing = tuple(row for row in settings if row[1] != row[2])
    looked_up: dict[str, EditInBoth] = {}
    if edits:
        entries = {name: lines for name, *lines in edits if " of dictionary " not in name}
        looked_up = look_up(first, second, entries)
    return RunComparison(first, second, differing, tuple(figures), tuple(edits), looked_up)


def _rows(a: dict[str, str], b: dict[str, str]) -> list[tuple[str, str, str]]:
    return [(name, a.get(name, "–"), b.get(name, "–")) for name in dict.fromkeys([*a, *b])]


def _latents(run: RunFolder, other: RunFolder) -> dict[str, str]:
    """Number of latents restored at each site, and how many of them the other run restored too; by name."""
    rows: dict[str, str] = {}
    for site, ids in run.summary["latents"].items():
        if run.hashes.get(site) != other.hashes.get(site):  # other dictionaries: ids mean other latents
            rows[f"latents restored at {site}"] = "all" if ids is None else str(len(ids))
            continue
        other_ids = other.summary["latents"].get(site, [])
        both = len(ids or ()) if other_ids is None else len(set(ids or ()) & set(other_ids))
        rows[f"latents restored at {site}"] = "all" if ids is None else f"{len(ids)}, {both} of them in both"
    return rows


def _outcomes(run: RunFolder) -> dict[str, str]:
    """Shares of refused and degenerate answers by condition and kind of prompts (the remainder complied), by name."""
    rows: dict[str, str] = {}
    conditions = run.summary["conditions"]
    for row in [row for kind in prompt_kinds(conditions) for row in conditions if row["harmful"] == kind]:
        kind = {True: ", harmful", False: ", harmless", None: ""}[row["harmful"]]
        rows[f"prompts{kind}"] = str(row["prompts"])
        for outcome, words in (("refuse", "refused"), ("degenerate", "degenerate")):
            rows[f"{row['condition']}{kind}: {words}"] = show_share(row[outcome])
    return rows


def _described(run: RunFolder) -> dict[str, str]:
    """Settings and hashes that determine a run's numbers, by name."""
    described = {name: str(value) for name, value in run.settings.items() if name != "out"}
    if isinstance(model := run.summary.get("model"), dict):
        described["model's weights"] = model.get("hash", "")
    described |= {f"dictionary {site}": each for site, each in run.hashes.items()}
    if "pairs_hash" in run.summary:  # a path does not identify its contents
        described["pairs' texts"] = run.summary["pairs_hash"]
    return described


def _tops(run: RunFolder, differing_sites: Collection[str]) -> dict[str, dict[str, Any]]:
    """Top edits by name. At sites where the two runs use different dictionaries, the name includes the hash."""
    if run.work not in ("patch", "attribute"):
        return {}
    tops = run.summary["top"] if run.work == "patch" else {d: each["top"] for d, each in run.summary["screens"].items()}
    hashes = {site: f" of dictionary {each}" for site, each in run.hashes.items() if site in differing_sites}
    return {
        f"{direction}: {name_of(line)}{hashes.get(line['site'], '')}": line
        for direction, top in tops.items()
        for line in top
    }


def _directions(run: RunFolder) -> list[str]:
    return list(run.summary.get("top") or run.summary.get("screens") or ())
