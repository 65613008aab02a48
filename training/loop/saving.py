"""The folder of a finished run: dictionaries in sae_lens' format, metrics, the run's summary and config."""

import json
import os
import shutil
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError

from saepatch.dictionaries.dictionary import Dictionary
from saepatch.errors import UserError
from saepatch.model.language_model import LanguageModel, Tokens
from saepatch.model.sites import Site
from saepatch.records.figures import renamed_figures
from saepatch.records.files import check_writable
from saepatch.records.provenance import versions
from saepatch.records.secrets import redacted, redacted_values
from saepatch.runs.catalogue import MEASUREMENTS
from saepatch.runs.kinds import kind_of

from ..config import TrainingConfig
from ..data.document import Document
from ..data.texts import Streamed
from ..steps.learner import Learner
from . import checkpoints
from .evaluate import evaluate_all

SUMMARY = "summary.json"
SNAPSHOTS = "snapshots"
REMEDY = "use its original settings, another --out, or --overwrite true without --resume"


@dataclass(frozen=True)
class OtherModelQuality:
    """Quality of the dictionaries on a further model that they were trained on."""

    model_name: str
    model_fingerprint: str
    figures: dict[Site, dict[str, float]]


@dataclass(frozen=True)
class Outcome:
    """Result of a run.

    Attributes:
        figures: Content of each site's `metrics.json`; empty if the run was stopped.
        tokens: Number of tokens trained on.
        stopped: Whether the run was stopped before its end, after writing a checkpoint.
        also: The same figures on each further model, by its name.
    """

    figures: dict[Site, dict[str, float]]
    tokens: int
    stopped: bool = False
    also: dict[str, dict[Site, dict[str, float]]] = field(default_factory=dict)


def quality_in(other: LanguageModel, dictionaries: Mapping[Site, Dictionary], held_out: Tokens) -> OtherModelQuality:
    """Quality of the dictionaries on another model that they were trained on."""
    evaluations = evaluate_all(other, list(dictionaries.values()), held_out)
    figures = {site: evaluation.figures for site, evaluation in zip(dictionaries, evaluations, strict=True)}
    return OtherModelQuality(other.name, other.fingerprint, figures)


def headline(figures: Mapping[Site, Mapping[str, float]]) -> dict[str, float]:
    """Figures for a tracker: those of each site as SITE/NAME, and their means over sites, which a sweep compares."""
    each = {f"{site}/{name}": value for site, row in figures.items() for name, value in row.items()}
    shared = [name for name in next(iter(figures.values())) if all(name in row for row in figures.values())]
    return each | {name: sum(row[name] for row in figures.values()) / len(figures) for name in shared}


def check_folder(out: Path, sites: Sequence[Site], config: TrainingConfig) -> None:
    """Check, before any work, that the dictionaries can be written.

    Raises:
        UserError: the folder cannot be written, belongs to another command, or holds dictionaries or checkpoints while
            neither `resume` nor `overwrite` is set.
    """
    if any(
        (out / name).exists() for name in ("parts", "answers", "results.parquet", "page.json", MEASUREMENTS)
    ) or _foreign(out):
        raise UserError(f"{str(out)!r} holds a run of another command: choose another --out, or remove that folder")
    taken = [str(site) for site in sites if (out / str(site)).exists()]
    if taken and not (config.overwrite or config.resume):
        raise UserError(f"{str(out)!r} holds {', '.join(taken)} already: choose another --out, or add --overwrite true")
    if checkpoints.any_in(out) and not (config.overwrite or config.resume):
        raise UserError(
            f"{str(out)!r} holds checkpoints of a stopped run: continue with --resume true, "
            "or start again with --overwrite true"
        )
    check_writable(out)


def _foreign(out: Path) -> bool:
    """Whether a folder has a summary that is not from training."""
    try:
        summary = json.loads((out / SUMMARY).read_text(encoding="utf-8"))
    except FileNotFoundError:
        return False
    except (OSError, ValueError):
        return True
    return not isinstance(summary, dict) or kind_of(summary).name != "training"


@dataclass(frozen=True)
class FinishedRun:
    """A complete run: the metrics of its sites, and the settings, model and text they depend on (`Run.identity`)."""

    figures: dict[Site, dict[str, float]]
    identity: dict[str, Any]
    also: dict[str, dict[Site, dict[str, float]]]


def finished(out: Path, sites: Sequence[Site]) -> FinishedRun | None:
    """The complete run in `out`, or None; also None if a new run was started there and is not finished."""
    if checkpoints.any_in(out):
        return None
    try:
        summary = json.loads((out / SUMMARY).read_text(encoding="utf-8"))
        also = {
            name: {site: renamed_figures(rows[str(site)]) for site in sites}
            for name, rows in summary.get("also", {}).items()
        }
        figures = {site: renamed_figures(summary["sites"][str(site)]) for site in sites}
        return FinishedRun(figures, summary["identity"], also)
    except (OSError, ValueError, KeyError):
        return None


def begin(out: Path, overwrite: bool) -> None:
    """With `overwrite`, remove an earlier run's checkpoints, snapshots and summary; dictionaries stay until replaced.

    Without its summary, the earlier run no longer counts as complete, so that it is not taken for the result of a new
    run that is interrupted.
    """
    checkpoints.clear_parts(out)
    if overwrite:
        checkpoints.clear(out)
        (out / SUMMARY).unlink(missing_ok=True)
        shutil.rmtree(out / SNAPSHOTS, ignore_errors=True)


def check_identity(before: Mapping[str, Any], now: Mapping[str, Any], out: Path) -> None:
    """Raises UserError if the run in `out` differs in settings, text or model from the one that would continue it."""
    for name, what in (("model", "model"), ("text", "text"), ("initial", "initial dictionary")):
        if before.get(name) != now.get(name):
            raise UserError(f"{str(out)!r} holds a run of another {what}: {REMEDY}")
    check_settings(before["config"], now["config"], out)


def check_settings(before: Mapping[str, Any], now: Mapping[str, Any], out: Path) -> None:
    """Raises UserError if the run in `out` has other settings than the one that would continue it."""
    now = json.loads(json.dumps(now))
    default = TrainingConfig().to_dict()
    added = {name: default[name] for name in now.keys() - before.keys() if name in default}
    before = {**json.loads(json.dumps(added)), **before}  # a setting that did not exist yet counts as its default
    for name in sorted(before.keys() | now.keys()):
        if before.get(name) != now.get(name):
            raise UserError(
                f"{str(out)!r} holds a run with {name} {before.get(name)!r}, not {now.get(name)!r}: {REMEDY}"
            )


def notes(model: LanguageModel, config: TrainingConfig, documents: Sequence[Document] | Streamed) -> dict[str, Any]:
    """Metadata shared by all dictionaries of a run."""
    import sae_lens

    sample = model.encode("a")
    return {
        # Without this, sae_lens takes the file for an old one and drops the rest of the metadata.
        "sae_lens_version": sae_lens.__version__,
        "sae_lens_training_version": sae_lens.__version__,
        "saepatch_version": versions()["saepatch"],
        "model_name": redacted(model.name),
        "model_fingerprint": model.fingerprint,
        "dataset_path": redacted(config.data),
        "dataset_documents": len(documents) if isinstance(documents, Sequence) else None,
        "context_size": config.context,
        "prepend_bos": bool(sample) and sample[0] == model.bos_id,
        "normalization": "activations were scaled to a mean norm of sqrt(d_in); the scale is folded into the biases",
        "training_architecture": config.sae.architecture,
        "seed": config.seed,
    }


def finished_dictionaries(
    learners: Mapping[Site, Learner], out: Path, excluded: Collection[int] | None
) -> dict[Site, Dictionary]:
    """The learners' dictionaries; `excluded` are the tokens they were not trained on, None: there are no such."""
    dictionaries = {site: Dictionary(learner.finish(), site, f"{out}/{site}") for site, learner in learners.items()}
    for dictionary in dictionaries.values():
        # In sae_lens' format: False, or the ids of the excluded tokens.
        dictionary.cfg.metadata.exclude_special_tokens = False if excluded is None else sorted(excluded)
    return dictionaries


def write(
    out: Path,
    dictionaries: Mapping[Site, Dictionary],
    figures: Mapping[Site, Mapping[str, float]],
    about: Mapping[str, Any],
    config: TrainingConfig,
    identity: Mapping[str, Any],
    also: Sequence[OtherModelQuality] = (),
) -> None:
    """Save dictionaries, metrics, summary and config. They are written to a temporary folder first, then moved.

    Raises:
        UserError: the folder cannot be written.
    """
    from sae_lens.saes.sae import SAEMetadata

    part = out / f"{checkpoints.PART}{os.getpid()}"
    try:
        for site, dictionary in dictionaries.items():
            sae: Any = dictionary.sae
            metadata = {**sae.cfg.metadata.to_dict(), **about, "hook_name": site.hook_name}
            if also:
                metadata["also_trained_on"] = [
                    {
                        "model_name": other.model_name,
                        "model_fingerprint": other.model_fingerprint,
                        "metrics": dict(other.figures[site]),
                    }
                    for other in also
                ]
            sae.cfg.metadata = SAEMetadata(**metadata, metrics=dict(figures[site]))
            sae.save_model(part / str(site))
            _json(part / str(site) / "metrics.json", figures[site])
        (part / "config.yaml").write_text(
            yaml.safe_dump(redacted_values(config.to_dict()), sort_keys=False), encoding="utf-8"
        )
        sites = {str(site): dict(row) for site, row in figures.items()}
        seconds = sum(row["seconds"] for row in figures.values())
        others = {other.model_name: {str(site): dict(row) for site, row in other.figures.items()} for other in also}
        _json(part / SUMMARY, {**about, "identity": identity, "seconds": seconds, "sites": sites, "also": others})
        # The summary is moved last: where it exists, the run is complete.
        for made in sorted(part.iterdir(), key=lambda path: path.name == SUMMARY):
            place = out / made.name
            if place.is_dir():
                shutil.rmtree(place)
            made.replace(place)
    except (OSError, SafetensorError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise UserError(
            f"cannot write the dictionaries to {str(out)!r} ({reason}): free some space and continue with --resume true"
        ) from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
