"""Folders that runs left: what ran there and what came of it, read from their JSON. Light: no model, no torch."""

import json
from collections.abc import Collection, Iterator, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

from saepatch.errors import UserError
from saepatch.records.tables import text_table


def read_json(path: Path) -> Any:
    """What a JSON file of a run holds.

    Raises:
        UserError: it is missing or damaged.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UserError(f"cannot read {path} ({error.strerror}): {_remedy(path.parent)}") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}): it was damaged; run again or merge again") from error


def _remedy(folder: Path) -> str:
    """What to do where a folder holds no summary: of a run that was begun there, how it goes on."""
    for record in sorted([*folder.glob("parts/*/run.json"), *folder.glob("answers/run.json")]):
        with suppress(OSError, ValueError, KeyError):
            work = json.loads(record.read_text(encoding="utf-8"))["work"]
            return f"the run is not finished; go on with saepatch {work} --config {record.with_name('config.yaml')}"
    return "give the folder of a finished run"


# What a summary of a command holds and no other does.
WORKS = (("screens", "attribute"), ("top", "patch"), ("restoration", "demo"), ("conditions", "restore"))


@dataclass(frozen=True)
class RunFolder:
    """A finished run: its folder and its summary."""

    path: Path
    summary: dict[str, Any]

    @property
    def work(self) -> str:
        """The command that ran: patch, attribute, restore, demo; empty where the summary is of something else."""
        for key, work in WORKS:
            if key in self.summary:
                return work
        return ""

    @property
    def settings(self) -> dict[str, Any]:
        return dict(self.summary.get("settings") or {})

    @property
    def finished(self) -> str:
        """When the summary was written, by this machine's clock."""
        return datetime.fromtimestamp((self.path / "summary.json").stat().st_mtime).strftime("%Y-%m-%d %H:%M")

    @property
    def model(self) -> str:
        model = self.summary.get("model", "")
        return str(model["name"] if isinstance(model, dict) else model)

    @property
    def task(self) -> str:
        settings = self.settings
        if prompts := settings.get("prompts"):
            return Path(str(prompts)).name
        return str(settings.get("pairs") or ("inline" if settings.get("clean") else ""))

    @property
    def count(self) -> int | None:
        """Pairs or prompts; None where the summary does not say."""
        if self.work == "restore":
            return max((one["prompts"] for one in self.summary["conditions"]), default=None)
        found = self.summary.get("pairs")
        return found if isinstance(found, int) else None

    @property
    def sites(self) -> str:
        named = ", ".join(self.summary.get("dictionaries") or {}) or str(self.settings.get("site", ""))
        return named or "all"


def read_run(path: Path) -> RunFolder:
    """The run in a folder.

    Raises:
        UserError: it holds no summary.json that can be read.
    """
    summary = read_json(path / "summary.json")
    if not isinstance(summary, dict):
        raise UserError(f"{path / 'summary.json'} holds no summary of a run: give the folder of a finished run")
    return RunFolder(path, summary)


def find_runs(root: Path) -> list[RunFolder]:
    """All finished runs at and below a folder, by path; what cannot be read is left out.

    Raises:
        UserError: there is no such folder.
    """
    if not root.is_dir():
        raise UserError(f"there is no folder {str(root)!r}: give the one that runs are in")
    found = []
    for path in sorted(root.rglob("summary.json")):
        try:
            found.append(read_run(path.parent))
        except UserError:
            continue
    return found


def unfinished(root: Path, runs: Sequence[RunFolder]) -> list[Path]:
    """Folders of runs that have parts and no summary yet."""
    there = {run.path for run in runs}
    begun = {path.parents[2] for path in root.rglob("parts/shard-*-of-*/run.json")}
    return sorted((begun | {path.parents[1] for path in root.rglob("answers/run.json")}) - there)


def headline(run: RunFolder) -> str:
    """What came of a run, in a few words."""
    facts = run.summary
    if run.work == "attribute":
        return "; ".join(f"{direction}: {_screen(one)}" for direction, one in facts["screens"].items())
    if run.work == "patch":
        return "; ".join(f"{direction}: {_line(top[0])}" for direction, top in facts["top"].items() if top)
    if run.work == "demo":
        kept = dict(facts["patching"]["denoise_top"]).get(16)
        refused = facts["restoration"]["refused_restored"]
        return f"16 latents restore {show(kept)}; {show(refused)} refused once restored"
    if run.work == "restore":
        return "; ".join(_restored(facts["conditions"], harmful) for harmful in _asked(facts["conditions"]))
    return " ".join(" ".join(_said(facts)).split())


def _said(facts: dict[str, Any]) -> Iterator[str]:
    """What an experiment's summary says of itself: its verdict, or the first of each of several."""
    if isinstance(told := facts.get("headline", facts.get("verdict")), str):
        yield told
        return
    several = facts.get("verdicts")
    kept = list(several.values()) if isinstance(several, dict) else []
    kept += [one["verdict"] for one in facts.values() if isinstance(one, dict) and "verdict" in one]
    for one in kept:
        first = one[0] if isinstance(one, list) and one else one
        if isinstance(first, str):
            yield first


def _asked(conditions: Sequence[dict[str, Any]]) -> list[bool | None]:
    """Kinds of prompts, harmful ones first; None: nobody said."""
    kinds = {one["harmful"] for one in conditions}
    return [kind for kind in (True, False) if kind in kinds] or [None]


def _restored(conditions: Sequence[dict[str, Any]], harmful: bool | None) -> str:
    """Refusals of one kind of prompts: `harmful: 0 % refused, 85 % [77, 91] restored, 0 % random`."""
    by_name = {one["condition"]: one["refuse"] for one in conditions if one["harmful"] == harmful}
    kind = {True: "harmful: ", False: "harmless: ", None: ""}[harmful]
    random = f", {by_name['random'][0]:.0%} random" if "random" in by_name else ""
    return f"{kind}{by_name['bare'][0]:.0%} refused, {show_share(by_name['restored'])} restored{random}"


def _line(line: dict[str, Any]) -> str:
    return f"{show_interval(line['effect'])} {name_of(line)}"


def _screen(screen: dict[str, Any]) -> str:
    top = f"{show(screen['top'][0]['effect'])} {name_of(screen['top'][0])}" if screen["top"] else "nothing"
    pearson = screen.get("pearson")
    agreement = ", unverified" if pearson is None else f", Pearson {show(pearson)} with exact"
    return f"{top} (estimate{agreement})"


def name_of(line: dict[str, Any]) -> str:
    """An edit of a summary in words: `resid_post.3 281 at 14`."""
    component = "" if line["component"] == "latent" else line["component"]
    what = " ".join(filter(None, (line["site"], component, line["latent"])))
    return f"{what} at {line['position']}"


def show(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def show_interval(effect: dict[str, Any]) -> str:
    if effect.get("low") is None:
        return show(effect["value"])
    return f"{show(effect['value'])} [{show(effect['low'])}, {show(effect['high'])}]"


def show_share(share: Sequence[float]) -> str:
    value, low, high = share
    return f"{value:.0%} [{low:.0%}, {high:.0%}]"


def runs_table(root: Path) -> str:
    """Runs below a folder as text: a line each."""
    runs = find_runs(root)
    head = ["run", "command", "model", "pairs", "sites", "finished", "headline"]
    rows = []
    for run in runs:
        pairs = run.task if run.count is None else f"{run.task} × {run.count}"
        said = _short(headline(run), 200)
        cells = [str(run.path), run.work or "?", run.model, pairs, _short(run.sites), run.finished, said]
        rows.append(cells)
    rows += [[str(path), "", "", "", "", "not finished", ""] for path in unfinished(root, runs)]
    return text_table(head, rows, left=len(head)) if rows else f"no runs in {root}"


def runs_facts(root: Path) -> dict[str, Any]:
    """The same, for programs."""
    runs = find_runs(root)
    return {
        "runs": [
            {
                "path": str(run.path),
                "command": run.work,
                "model": run.model,
                "task": run.task,
                "sites": run.sites,
                "finished": run.finished,
                "headline": headline(run),
                "settings": run.settings,
            }
            for run in runs
        ],
        "unfinished": [str(path) for path in unfinished(root, runs)],
    }


def _short(text: str, room: int = 28) -> str:
    return text if len(text) <= room else text[: room - 1] + "…"


@dataclass(frozen=True)
class Comparison:
    """Two runs side by side: what was set and what came out, a row of texts (name, in A, in B) each."""

    one: RunFolder
    other: RunFolder
    settings: tuple[tuple[str, str, str], ...]
    """Those that differ, and the hashes of models and dictionaries that do."""
    figures: tuple[tuple[str, str, str], ...]
    edits: tuple[tuple[str, dict[str, Any] | None, dict[str, Any] | None], ...]
    """Of edits on top of either run, by name: their entries in the summaries; None: not on top there."""

    def table(self) -> str:
        """As text."""
        names = ["", str(self.one.path), str(self.other.path)]
        edits = [(name, _effect(line, self.one, name), _effect(b, self.other, name)) for name, line, b in self.edits]
        blocks: list[tuple[str, Sequence[tuple[str, str, str]]]]
        blocks = [("set otherwise", self.settings), ("figures", self.figures)]
        if self.one.work != "restore":
            blocks.append(("largest effects", edits))
        lines: list[str] = []
        for title, rows in blocks:
            lines.append(text_table([title, *names[1:]], rows, left=3) if rows else f"{title}: none")
            lines.append("")
        return "\n".join(lines).rstrip()

    def facts(self) -> dict[str, Any]:
        """For programs."""
        return {
            "runs": [str(self.one.path), str(self.other.path)],
            "settings": [list(row) for row in self.settings],
            "figures": [list(row) for row in self.figures],
            "edits": [
                {"edit": name, "effects": [line and line["effect"] for line in lines]} for name, *lines in self.edits
            ],
        }


def _effect(line: dict[str, Any] | None, run: RunFolder, name: str) -> str:
    if line is None:
        if name.partition(":")[0] not in _directions(run):
            return "not run"
        return "another dictionary" if " of dictionary " in name else "not on top"
    effect = line["effect"]
    return show_interval(effect) if isinstance(effect, dict) else show(effect)


def compare_runs(one: RunFolder, other: RunFolder) -> Comparison:
    """Set two runs beside each other.

    Raises:
        UserError: they are not both of `patch`, `attribute` or `restore`, or not of one kind.
    """
    for run in (one, other):
        if run.work not in ("patch", "attribute", "restore"):
            raise UserError(f"{run.path} holds no run of patch, attribute or restore: give two folders of such runs")
    if one.work != other.work:
        raise UserError(
            f"{one.path} is of {one.work} and {other.path} of {other.work}: give two runs of the same command"
        )
    a, b = _described(one), _described(other)
    settings = [(name, a.get(name, "–"), b.get(name, "–")) for name in dict.fromkeys([*a, *b])]
    others = {site for site, each in _hashes(one).items() if _hashes(other).get(site, each) != each}
    tops = [_tops(run, others) for run in (one, other)]
    edits = [(name, tops[0].get(name), tops[1].get(name)) for name in dict.fromkeys([*tops[0], *tops[1]])]
    figures = _figures(one, other)
    different = tuple(row for row in settings if row[1] != row[2])
    return Comparison(one, other, different, tuple(figures), tuple(edits))


FIGURES = ("pairs", "clean", "corrupted", "rows", "pairs_with_too_small_a_gap")


def _figures(one: RunFolder, other: RunFolder) -> list[tuple[str, str, str]]:
    if one.work == "restore":
        a, b = ({**_latents(run, than), **_outcomes(run)} for run, than in ((one, other), (other, one)))
        return [(name, a.get(name, "–"), b.get(name, "–")) for name in dict.fromkeys([*a, *b])]
    return [(name, _figure(one, name), _figure(other, name)) for name in FIGURES]


def _latents(run: RunFolder, other: RunFolder) -> dict[str, str]:
    """How many latents of each site were restored, and how many of these in the other run, too; by name."""
    found: dict[str, str] = {}
    for site, ids in run.summary["latents"].items():
        if _hashes(run).get(site) != _hashes(other).get(site):  # latent 3 is another latent there
            found[f"latents restored at {site}"] = "all" if ids is None else str(len(ids))
            continue
        theirs = other.summary["latents"].get(site, [])
        both = len(ids or ()) if theirs is None else len(set(ids or ()) & set(theirs))
        found[f"latents restored at {site}"] = "all" if ids is None else f"{len(ids)}, {both} of them in both"
    return found


def _outcomes(run: RunFolder) -> dict[str, str]:
    """Shares of prompts by condition and kind of prompts, by name; the rest is compliance."""
    found: dict[str, str] = {}
    conditions = run.summary["conditions"]
    for one in [one for kind in _asked(conditions) for one in conditions if one["harmful"] == kind]:
        kind = {True: ", harmful", False: ", harmless", None: ""}[one["harmful"]]
        found[f"prompts{kind}"] = str(one["prompts"])
        for outcome, words in (("refuse", "refused"), ("degenerate", "degenerate")):
            found[f"{one['condition']}{kind}: {words}"] = show_share(one[outcome])
    return found


def _figure(run: RunFolder, name: str) -> str:
    value = run.summary.get(name)
    return show(value) if isinstance(value, float) else str(value)


def _described(run: RunFolder) -> dict[str, str]:
    """What decided a run's numbers, by name."""
    model = run.summary["model"]
    hashes = {f"dictionary {site}": each["hash"] for site, each in run.summary["dictionaries"].items()}
    if "pairs_hash" in run.summary:  # a path says nothing of what lies there
        hashes["pairs' texts"] = run.summary["pairs_hash"]
    said = {name: str(value) for name, value in run.settings.items()}
    return said | {"model's weights": model["hash"]} | hashes


def _hashes(run: RunFolder) -> dict[str, str]:
    """Of its dictionaries, by site."""
    return {site: each["hash"] for site, each in run.summary["dictionaries"].items()}


def _tops(run: RunFolder, others: Collection[str]) -> dict[str, dict[str, Any]]:
    """Edits on top by name; at sites whose dictionary is another in the other run, latent 3 is another latent there."""
    if run.work == "restore":
        return {}
    tops = run.summary["top"] if run.work == "patch" else {d: one["top"] for d, one in run.summary["screens"].items()}
    hashes = _hashes(run)
    return {
        f"{direction}: {name_of(line)}"
        + (f" of dictionary {hashes[line['site']]}" if line["site"] in others and line["site"] in hashes else ""): line
        for direction, top in tops.items()
        for line in top
    }


def _directions(run: RunFolder) -> list[str]:
    return list(run.summary.get("top") or run.summary.get("screens") or ())
