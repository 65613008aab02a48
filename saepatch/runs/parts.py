"""Files of a run: records and parts, and their rows as arrays. Reading them needs no model.

A run's folder holds a folder `parts/shard-I-of-N/` per process, and no two processes write to the same one. A shard
has every N-th pair. A part is a few of these pairs in one direction (and, in sweeps that go site by site, at one site),
in one file that is written atomically. `run.json` beside the parts records everything that determines the numbers;
later processes must agree with it.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from saepatch.engine.components import Edit, EditPart, PatchDirection
from saepatch.errors import UserError
from saepatch.measure.results.gaps import PairGaps, towards_source
from saepatch.model.sites import Site
from saepatch.records.documents import parse_json
from saepatch.records.files import write_json
from saepatch.records.provenance import Provenance, command_line, json_hash, versions
from saepatch.records.rows import read_about
from saepatch.runs.catalogue import MEASUREMENTS


class EditKey(NamedTuple):
    """The columns of a row that identify its edit, apart from the pair."""

    direction: str
    site: str
    component: str
    role: str
    latent: str
    position: str

    @property
    def unit(self) -> str:
        """The edited units; the kind of component is named unless they are latents."""
        return self.latent if self.component == "latent" else f"{self.component} {self.latent}".strip()


KEYS = EditKey._fields


def deciding(work: str, settings: dict[str, Any], shards: int) -> dict[str, Any]:
    """The settings, by name, that must agree for rows to belong to one run."""
    return {"command": work, **settings, "shards": shards}


@dataclass(frozen=True)
class Record:
    """Content of a shard's `run.json`: everything that determines the run's numbers, and how it is divided."""

    work: str  # the command: patch, attribute, restore, circuit or edit
    settings: dict[str, Any]
    model: dict[str, str]
    dictionaries: dict[str, dict[str, str]]  # by site
    pairs: dict[str, Any]
    shard: int
    shards: int
    parts: int
    edits: list[dict[str, Any]] | None = None  # requested edits and controls (circuit: one circuit); None: every unit
    metric_source: str = ""  # hash of the file of a custom metric
    versions: dict[str, str] = field(default_factory=versions)
    command: str = field(default_factory=command_line)

    @property
    def decides(self) -> dict[str, Any]:
        """Settings and hashes, by name, that must agree for rows to belong to one run."""
        hashes = {f"dictionary {site}": each["hash"] for site, each in self.dictionaries.items()}
        hashes |= {"model's weights": self.model["hash"], "pairs' texts": self.pairs["hash"]}
        hashes |= {"metric's source": self.metric_source} if self.metric_source else {}
        return deciding(self.work, self.settings, self.shards) | hashes

    @property
    def key(self) -> str:
        """Hash of `decides`, stored in every part."""
        return json_hash(self.decides)

    @property
    def requested(self) -> list[Edit] | None:
        """The requested edits and their controls; a control set shared by several groups is repeated for each."""
        return None if self.edits is None else [read_edit(edit) for edit in self.edits]

    def folder(self, out: Path) -> Path:
        return shard_folder(out, self.shard, self.shards, self.work)

    def provenance(self, site: Site | str) -> Provenance:
        dictionary = self.dictionaries.get(str(site), {"name": "", "hash": ""})
        return Provenance(
            self.model["name"], self.model["hash"], dictionary["name"], dictionary["hash"], self.settings["seed"]
        )


def edit_facts(edit: Edit) -> dict[str, Any]:
    """An edit as JSON values; kind, position and further parts only where they are not the default."""
    facts: dict[str, Any] = {"site": str(edit.site), "units": list(edit.units)}
    facts |= {"role": edit.role, "beside": list(edit.beside)}
    optional: dict[str, Any] = {"kind": edit.kind} if edit.kind != "latent" else {}
    optional |= {} if edit.position is None else {"position": edit.position}
    optional |= {"others": [asdict(part) | {"site": str(part.site)} for part in edit.others]} if edit.others else {}
    return facts | optional


def read_edit(facts: Mapping[str, Any]) -> Edit:
    """The edit written by `edit_facts`."""

    def typed(part: Mapping[str, Any]) -> dict[str, Any]:
        as_tuples = {name: tuple(part[name]) for name in ("units", "beside")}
        return {**part, **as_tuples, "site": Site.parse(part["site"])}

    return Edit(**{**typed(facts), "others": tuple(EditPart(**typed(part)) for part in facts.get("others", ()))})


PARTS, ANSWERS = "parts", "answers"  # folders of parts; ANSWERS: of restore


def shard_folder(out: Path, shard: int, shards: int, work: str = "patch") -> Path:
    """Folder of a shard's parts; an unsharded `restore` has them in `answers/` itself."""
    name = f"shard-{shard}-of-{shards}"
    if work == "restore":
        return out / ANSWERS if shards == 1 else out / ANSWERS / name
    return out / PARTS / name


def part_file(folder: Path, number: int) -> Path:
    return folder / f"part-{number:05d}.parquet"


RUN_ID = "tracked.json"  # the trackers' id of a run, which a resumed run continues


def known_run(folder: Path) -> str | None:
    """The trackers' run id stored in this folder; None if there is none."""
    try:
        return str(json.loads((folder / RUN_ID).read_text(encoding="utf-8"))["run_id"])
    except (OSError, ValueError, KeyError, TypeError):
        return None


def keep_run(folder: Path, run_id: str | None) -> None:
    """Store the trackers' run id for the next start."""
    if run_id is not None:
        write_json({"run_id": run_id}, folder / RUN_ID)


def record_files(out: Path) -> list[Path]:
    """`run.json` of every shard started so far."""
    return sorted([*out.glob(f"{PARTS}/shard-*/run.json"), *out.glob(f"{ANSWERS}/**/run.json")])


def read_records(out: Path) -> list[Record]:
    """Records of every shard started so far, in order.

    Raises:
        UserError: a record cannot be read.
    """
    records = []
    for path in record_files(out):
        try:
            records.append(_checked(Record(**parse_json(path.read_text(encoding="utf-8"), str(path)))))
        except (OSError, ValueError, TypeError, KeyError) as error:
            raise UserError(f"cannot read {path} ({error}): remove {path.parent} to run its shard again") from error
    return sorted(records, key=lambda record: (record.shards, record.shard))


def _checked(record: Record) -> Record:
    """The record, once its values are checked; raises ValueError, TypeError or KeyError where they are invalid."""
    shard, shards, parts = (int(number) for number in (record.shard, record.shards, record.parts))
    if record.work not in ("patch", "attribute", "restore", "circuit", "edit") or not (
        0 <= shard < shards and 0 <= parts < 10**9
    ):
        raise ValueError(f"work is {record.work!r}, shard {shard} of {shards}, {parts} parts")
    if not all(isinstance(each, dict) for each in (record.settings, record.model, record.dictionaries, record.pairs)):
        raise TypeError("settings, model, dictionaries or pairs is not a mapping")
    _ = (record.key, record.requested if record.work == "patch" else None, record.settings["seed"])
    return record


RUN_FILES = ("results.parquet", "summary.json", "config.yaml", "metrics.jsonl", "checkpoints", MEASUREMENTS)


def refuse_other_command(out: Path, own: str) -> None:
    """Check that a folder holds no run of another command, finished or not.

    `own` is the folder of this command's parts; where it is missing, none of `RUN_FILES` may be there.

    Raises:
        UserError: it holds one.
    """
    others = any((out / name).is_dir() for name in (PARTS, ANSWERS) if name != own)
    if others or (not (out / own).exists() and any((out / name).exists() for name in RUN_FILES)):
        raise UserError(f"{str(out)!r} holds results of another command: give another --out, or remove that folder")


def parts_name(work: str) -> str:
    """Name of the folder of a command's parts."""
    return ANSWERS if work == "restore" else PARTS


def refuse_if_other(out: Path, there: dict[str, Any], here: dict[str, Any]) -> None:
    """Check that the run in a folder agrees with the requested one in every name that both have.

    Raises:
        UserError: they differ; the message names the differences.
    """
    differing = [name for name, value in here.items() if name in there and there[name] != value]
    if differing:
        differences = ", ".join(f"{name} ({there[name]!r} there, {here[name]!r} now)" for name in differing)
        raise UserError(
            f"{str(out)!r} holds a run that differs in {differences}: check that, give another --out, or remove that "
            "folder"
        )


@dataclass(frozen=True)
class Part:
    """The work whose results go into one file."""

    number: int
    pairs: tuple[int, ...]  # indices into all pairs
    components: int  # index of the group to sweep
    direction: PatchDirection


def cut_parts(
    pairs: int, shard: int, shards: int, size: int, groups: int, directions: Sequence[PatchDirection]
) -> list[Part]:
    """The parts of one shard; all parts of some pairs come before those of the next pairs."""
    own = list(range(pairs))[shard::shards]
    chunks = [tuple(own[start : start + size]) for start in range(0, len(own), size)]
    cells = [(chunk, group, direction) for chunk in chunks for group in range(groups) for direction in directions]
    return [Part(number, *cell) for number, cell in enumerate(cells)]


def complete(out: Path) -> list[Record]:
    """The records of all shards of a run whose parts are all written.

    Raises:
        UserError: there is no run, it is not finished, or its shards belong to different runs.
    """
    records = read_records(out)
    if not records:
        raise UserError(f"there is no run in {str(out)!r}: give the --out of one")
    first = records[0]
    for record in records[1:]:
        refuse_if_other(out, first.decides, record.decides)
        if record.edits != first.edits:
            raise UserError(
                f"shards {first.shard} and {record.shard} drew different controls, though all else agrees: remove "
                f"{record.folder(out)} and run that shard again"
            )
    started = {record.shard: record for record in records}
    missing, commands = [], []
    for shard in range(first.shards):
        if shard not in started:
            missing.append(f"shard {shard} was never started")
            config = first.folder(out) / "config.yaml"
            commands.append(f"saepatch {first.work} --config {config} --shard {shard}/{first.shards}")
        elif numbers := _missing(out, started[shard]):
            missing.append(f"shard {shard} lacks part{_ranges(numbers)} of {started[shard].parts}")
            commands.append(f"saepatch {first.work} --config {started[shard].folder(out) / 'config.yaml'}")
    if missing:
        more = f"; and so on for the other {len(commands) - 3}" if len(commands) > 3 else ""
        raise UserError(
            f"{str(out)!r} is not finished: {'; '.join(missing[:10])}{'; …' if len(missing) > 10 else ''} "
            f"({first.shards} shards). To finish: {'; '.join(commands[:3])}{more}"
        )
    return records


def _missing(out: Path, record: Record) -> list[int]:
    folder = record.folder(out)
    return [n for n in range(record.parts) if (read_about(part_file(folder, n)) or {}).get("run") != record.key]


def _ranges(numbers: Sequence[int]) -> str:
    """Numbers as ranges after the word "part": `s 3, 7-9` for 3, 7, 8, 9; ` 3` for 3."""
    runs: list[list[int]] = []
    for number in numbers:
        if runs and runs[-1][-1] == number - 1:
            runs[-1] = [runs[-1][0], number]
        else:
            runs.append([number])
    text = ", ".join("-".join(map(str, run)) for run in runs[:8]) + (", …" if len(runs) > 8 else "")
    return f"{'s' if len(numbers) > 1 else ''} {text}"


def part_files(out: Path, records: Sequence[Record]) -> list[Path]:
    return [part_file(record.folder(out), number) for record in records for number in range(record.parts)]


@dataclass(frozen=True, eq=False)
class Pairs(PairGaps):
    """The pairs of a run, in order, with the metric of their clean and corrupted runs."""

    examples: tuple[str, ...]
    clean: Float[ndarray, "pairs"]
    corrupted: Float[ndarray, "pairs"]
    min_gap: float


@dataclass(frozen=True, eq=False)
class RowChanges:
    """Change of the metric towards the source run by each edit, in the metric's units: one entry per result row."""

    keys: tuple[EditKey, ...]
    key: Int[ndarray, "rows"]
    pair: Int[ndarray, "rows"]
    change: Float[ndarray, "rows"]
    pairs: int

    def of(self, key: EditKey) -> Float[ndarray, "pairs"]:
        """Changes by one edit over all pairs; 0 where there is no row, since the edit changed nothing there."""
        out = np.zeros(self.pairs)
        if key in self._numbers:
            own = self.key == self._numbers[key]
            out[self.pair[own]] = self.change[own]
        return out

    @cached_property
    def _numbers(self) -> dict[EditKey, int]:
        return {key: number for number, key in enumerate(self.keys)}

    @property
    def totals(self) -> Float[ndarray, "edits"]:
        return np.bincount(self.key, self.change, minlength=len(self.keys)).astype(
            np.float64
        )  # integers if there are no rows

    @property
    def counts(self) -> Int[ndarray, "edits"]:
        """Number of pairs in which each edit changes something; requested edits also have rows without a change."""
        return np.bincount(self.key, self.change != 0, minlength=len(self.keys)).astype(np.int64)


def read_changes(rows: Any, pairs: Pairs, requested: Sequence[EditKey]) -> RowChanges:
    """Changes of the metric by edit; requested edits without any row are included.

    Raises:
        UserError: an edit of a pair has several rows.
    """
    place = {example: number for number, example in enumerate(pairs.examples)}
    codes, texts = zip(*(_codes(rows[column]) for column in (*KEYS, "example")), strict=True)
    pair = np.array([place[example] for example in texts[-1]], dtype=np.int64)[codes[-1]]
    sizes = [max(1, len(known)) for known in texts[:-1]]
    codes_of_keys, key = np.unique(np.ravel_multi_index(codes[:-1], sizes), return_inverse=True)
    if len(np.unique(key * len(pairs.examples) + pair)) < len(key):
        raise UserError(
            "an edit of a pair has several rows, so these parts are not of one run: remove them and run again"
        )
    columns = [
        [known[code] for code in column.tolist()]
        for known, column in zip(texts[:-1], np.unravel_index(codes_of_keys, sizes), strict=True)
    ]
    keys = list(dict.fromkeys([*map(EditKey._make, zip(*columns, strict=True)), *requested]))
    denoise = np.array([edit.direction == "denoise" for edit in keys], dtype=bool)[key]
    clean, corrupted, patched, effect = (
        rows[column].to_numpy() for column in ("clean", "corrupted", "patched", "effect")
    )
    change = towards_source(patched, clean, corrupted, denoise)
    change = np.where(
        np.isnan(patched), effect * np.abs(clean - corrupted), change
    )  # size estimates have no patched metric
    return RowChanges(tuple(keys), key, pair, change, len(pairs.examples))


def _codes(column: Any) -> tuple[Int[ndarray, "rows"], list[str]]:
    """A column of texts as codes, and the text of each code."""
    whole = column.unify_dictionaries().combine_chunks()
    if not len(whole):
        return np.zeros(0, dtype=np.int64), []
    return whole.indices.to_numpy().astype(np.int64), whole.dictionary.to_pylist()
