"""Upload dictionaries to a Hugging Face hub repository, in the layout that sae_lens and saepatch load."""

import json
import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml
from safetensors import SafetensorError, safe_open

from saepatch.errors import UserError, reason_of
from saepatch.model.sites import Site
from saepatch.records.figures import renamed_figures

log = logging.getLogger(__name__)

CFG, WEIGHTS, METRICS, CARD = "cfg.json", "sae_weights.safetensors", "metrics.json", "README.md"
COLUMNS = (
    "architecture",
    "d_in",
    "d_sae",
    "l0",
    "fvu",
    "ce_recovered",
    "ce_recovered_ordinary",
    "kl",
    "alive_share",
    "dense_share",
    "tokens",
)
_ABOUT = {  # labels on the model card, by key of the metadata
    "model_name": "Model",
    "dataset_path": "Data",
    "training_tokens": "Tokens trained on",
    "context_size": "Context",
    "sae_lens_version": "sae_lens",
    "saepatch_version": "saepatch",
}
_REMEDIES = {
    401: "the hub rejects this token: log in again with `hf auth login`, or set HF_TOKEN",
    403: "the token has no write access: use one that has, and a namespace that is yours",
    404: "there is no such repository, or the token has no access: check the name",
}


@dataclass(frozen=True, eq=False)
class Saved:
    """A saved dictionary: its site, folder, configuration and metrics."""

    site: Site
    folder: Path
    cfg: Mapping[str, Any]
    metrics: Mapping[str, Any]

    @property
    def metadata(self) -> Mapping[str, Any]:
        return self.cfg.get("metadata") or {}

    @property
    def files(self) -> list[Path]:
        return [path for name in (CFG, WEIGHTS, METRICS) if (path := self.folder / name).is_file()]


def push(
    folder: str | Path,
    repo_id: str,
    *,
    private: bool = False,
    branch: str = "",
    message: str = "",
    dry_run: bool = False,
) -> list[str]:
    """Upload the dictionary in a folder, or those in its `SITE/` sub-folders, in one commit.

    Each dictionary goes to `SITE/`, where `sae_lens.SAE.from_pretrained(repo_id, SITE)` and
    `load_sae(f"{repo_id}/{SITE}")` find it, and a model card is added. Only dictionaries are uploaded: no logs, no
    checkpoints.

    Args:
        folder: Folder of one dictionary, or the output of training.
        repo_id: OWNER/NAME; created if it does not exist.
        private: Make the repository private; an existing repository must be private already.
        branch: Branch to commit to, created if needed; empty: the repository's main branch.
        message: Commit message.
        dry_run: Upload nothing.

    Returns:
        The paths of the files in the repository.

    Raises:
        UserError: there is no dictionary, a dictionary is damaged, `repo_id` is malformed, there is no token, or the
            hub refuses or cannot be reached.
    """
    _check_repo_id(repo_id)
    dictionaries = saved_in(Path(folder))
    files: dict[str, Path | bytes] = {f"{d.site}/{path.name}": path for d in dictionaries for path in d.files}
    files[CARD] = card(dictionaries, repo_id).encode()
    for name, value in sorted(
        {(key, str(d.metadata.get(key))) for d in dictionaries for key in ("model_name", "dataset_path")}
    ):
        if Path(value).is_absolute():
            log.warning("%s in cfg.json is a local path (%s): it is uploaded unchanged", name, value)
    if not dry_run:
        _upload(files, repo_id, private, branch, message or f"Dictionaries at {_span(dictionaries)}")
    return list(files)


def saved_in(folder: Path) -> list[Saved]:
    """The dictionary in a folder, or those in its sub-folders, by layer; weights are checked but not loaded.

    Raises:
        UserError: there is no dictionary, a dictionary is incomplete, or two are for the same site.
    """
    if not folder.is_dir():
        raise UserError(f"no folder {str(folder)!r}: give the folder of a dictionary, or the output of training")
    places = [folder] if (folder / CFG).is_file() else [path.parent for path in sorted(folder.glob(f"*/{CFG}"))]
    # Names of incomplete folders (.part-…) begin with a dot.
    places = [place for place in places if place is folder or not place.name.startswith(".")]
    if not places:
        raise UserError(
            f"folder {str(folder)!r} has no dictionary: expected {CFG} in it, or in sub-folders such as resid_post.3/"
        )
    by_site: dict[Site, Saved] = {}
    for place in places:
        dictionary = _read(place)
        if (other := by_site.get(dictionary.site)) is not None:
            raise UserError(
                f"{str(other.folder)!r} and {str(place)!r} are both for {dictionary.site}: remove one of them"
            )
        by_site[dictionary.site] = dictionary
    return [by_site[site] for site in sorted(by_site)]


def _read(place: Path) -> Saved:
    try:
        cfg = json.loads((place / CFG).read_text(encoding="utf-8"))
        figures = json.loads((place / METRICS).read_text(encoding="utf-8")) if (place / METRICS).is_file() else None
        if not isinstance(cfg, dict) or not isinstance(figures, dict | None):
            raise ValueError("not a JSON object")
        if not isinstance(cfg.get("metadata") or {}, dict):
            raise ValueError("its metadata is not a JSON object")
        with safe_open(place / WEIGHTS, "pt") as weights:
            if "W_dec" not in weights.keys():  # noqa: SIM118 (not a dict)
                raise ValueError(f"{WEIGHTS} has no W_dec")
    except (OSError, ValueError, SafetensorError) as error:
        raise UserError(
            f"cannot read the dictionary in {str(place)!r} ({' '.join(str(error).split())}): save it again"
        ) from error
    metadata = cfg.get("metadata") or {}
    stated = metadata.get("hook_name") or cfg.get("hook_name")
    metrics = figures if figures is not None else metadata.get("metrics")
    return Saved(_site(place, stated), place, cfg, renamed_figures(metrics) if isinstance(metrics, dict) else {})


def _site(place: Path, stated: object) -> Site:
    for text in (stated, place.resolve().name):
        try:
            return Site.parse(str(text))
        except UserError:
            continue
    raise UserError(
        f"the metadata of {str(place)!r} names no site: rename the folder after the site, as in resid_post.3"
    )


def card(dictionaries: list[Saved], repo_id: str) -> str:
    """The model card: front matter, loading code, metadata, and the metrics of each site."""
    first = dictionaries[0]
    model, data = str(first.metadata.get("model_name", "")), str(first.metadata.get("dataset_path", ""))
    about: dict[str, Any] = {"library_name": "saelens", "tags": ["sparse-autoencoder", "sae", "saepatch"]}
    about |= {"base_model": model} if _on_hub(model) else {}
    about |= {"datasets": [data]} if _on_hub(data) else {}
    shown = [(d, {**d.cfg, **d.metrics}) for d in dictionaries]
    columns = [name for name in COLUMNS if any(name in values for _, values in shown)]
    lines = ["---", yaml.safe_dump(about, sort_keys=False).strip(), "---", "", f"# {_plain(repo_id)}", ""]
    lines += [
        f"Sparse autoencoders of {_plain(_short(model)) or 'a language model'} at {len(dictionaries)} site(s).",
        "",
    ]
    lines += ["```python", "from sae_lens import SAE", f'sae = SAE.from_pretrained("{repo_id}", "{first.site}")', ""]
    lines += ["import saepatch", f'sae = saepatch.load_sae("{repo_id}/{first.site}")', "```", ""]
    lines += [
        f"- {label}: {_plain(_short(first.metadata[key]))}" for key, label in _ABOUT.items() if first.metadata.get(key)
    ]
    lines += ["", "## Metrics", "", _row(["site", *columns]), _row(["---"] * (len(columns) + 1))]
    lines += [_row([_plain(d.site), *(_cell(values.get(name)) for name in columns)]) for d, values in shown]
    return "\n".join(
        [*lines, "", f"All figures of a site are in its `{METRICS}`, and in the metadata of its `{CFG}`.", ""]
    )


def _row(cells: list[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _cell(value: object) -> str:
    if value is None:
        return ""
    return f"{value:.4g}" if isinstance(value, float) else _plain(value)


def _plain(value: object) -> str:
    """A value as text that Markdown displays literally: one line, at most 200 characters, no markup, no links."""
    text = " ".join(str(value).split())
    text = "".join(char for char in text if char.isprintable())[:200]
    return re.sub(r"([!-+./:-@\[-`{-~])", r"\\\1", text)


def _short(value: object) -> str:
    """A value for the card; of a local path only the last component, so that no local folders are published."""
    return Path(str(value)).name if Path(str(value)).is_absolute() else str(value)


def _on_hub(name: str) -> bool:
    """Whether a name looks like OWNER/NAME on the hub and not like a local path."""
    return bool(re.fullmatch(r"\w[\w.-]*/\w[\w.-]*", name, re.ASCII)) and not Path(name).exists()


def _span(dictionaries: list[Saved]) -> str:
    names = [str(d.site) for d in dictionaries]
    return names[0] if len(names) == 1 else f"{len(names)} sites, {names[0]} to {names[-1]}"


def _check_repo_id(repo_id: str) -> None:
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    try:
        validate_repo_id(repo_id)
    except HFValidationError as error:
        raise UserError(f"{repo_id!r} is not a repository name: {' '.join(str(error).split())}") from error
    if "/" not in repo_id:  # sae_lens would look for a release of that name
        raise UserError(f"repository {repo_id!r} names no owner: write OWNER/NAME, as in your-name/{repo_id}")


def _upload(files: Mapping[str, Path | bytes], repo_id: str, private: bool, branch: str, message: str) -> None:
    import huggingface_hub
    from huggingface_hub import CommitOperationAdd, HfApi
    from huggingface_hub.errors import HfHubHTTPError

    if huggingface_hub.get_token() is None:
        raise UserError(
            "no Hugging Face token: log in with `hf auth login`, or set HF_TOKEN to a token with write access"
        )
    api = HfApi(library_name="saepatch")
    try:
        api.create_repo(repo_id, private=private or None, exist_ok=True)
        if private and not api.model_info(repo_id).private:
            raise UserError(
                f"{repo_id!r} exists and is public: choose another name, make it private, or leave --private out"
            )
        if branch:
            api.create_branch(repo_id, branch=branch, exist_ok=True)
        operations = [
            CommitOperationAdd(path, content if isinstance(content, bytes) else str(content))
            for path, content in files.items()
        ]
        api.create_commit(repo_id, operations, commit_message=message, revision=branch or None)
    except UserError:
        raise
    except HfHubHTTPError as error:
        status = error.response.status_code
        answer = " ".join((error.server_message or "").split())
        reason = _REMEDIES.get(status) or "try again, and see https://status.huggingface.co if it persists"
        raise UserError(f"the hub refuses {repo_id!r} ({status}{': ' + answer if answer else ''}): {reason}") from error
    except Exception as error:  # connections fail in many ways inside the hub's client
        raise UserError(
            f"cannot upload to {repo_id!r} ({reason_of(error)}): check the network and HF_ENDPOINT, then push again"
        ) from error
