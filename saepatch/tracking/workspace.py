"""A W&B workspace for saepatch's runs (the extra `workspace`). The only module that imports wandb-workspaces."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from saepatch.errors import UserError, reason_of
from saepatch.tracking.wandb import has_key

if TYPE_CHECKING:
    from wandb_workspaces.workspaces import Section, Workspace

NOTE = """Runs of `saepatch`. Each run's page is its `report`; settings, model and dictionary hashes are in its config.

Runs are grouped by study (the folder that holds them) and command; a bar is a run's headline figure, with its interval
in the columns `…_low` and `…_high`. Latents' tables name the place of each latent's card in `report`."""

# Headline figures by section, as the runs log them.
EFFECTS = ("denoise/largest_effect", "noise/largest_effect", "denoise/largest_estimate", "denoise/pearson")
OUTCOMES = tuple(
    f"{kind}/{condition}/{outcome}"
    for kind, outcome in (("harmful", "refuse"), ("harmless", "refuse"), ("harmful", "degenerate"))
    for condition in ("bare", "donor", "restored", "random", "matched")
)
CIRCUITS = ("faithfulness/nodes", "faithfulness/kept", "faithfulness/edges", "completeness", "random_at_most", "nodes")
FACTS = (
    "score",
    "efficacy/success",
    "paraphrase/success",
    "neighbourhood/success",
    "reversal/success",
    "ripple/success",
)
TABLES = ("Edits", "Outcomes", "Judged answers", "Answers")
CURVE_AXIS = "latents patched together"
TRAINING = ("loss", "fvu", "l0", "dead", "eval/ce_recovered", "eval/kl")
HYPERPARAMETERS = ("lr", "tokens", "batch_size", "sae.architecture", "sae.k", "sae.d_sae", "sae.sparsity")
QUALITY = ("ce_recovered", "ce_recovered_mean", "kl", "fvu", "l0", "alive_share", "dense_share")


def workspace(project: str, entity: str, name: str) -> Workspace:
    """The workspace: results by command, training curves, sweeps over training settings, and reports.

    Raises:
        UserError: wandb-workspaces is not installed.
    """
    try:
        import wandb_workspaces.workspaces as ws
        from wandb_workspaces import expr
    except ImportError as error:
        raise UserError("a W&B workspace needs wandb-workspaces: pip install 'saepatch[workspace]'") from error

    return ws.Workspace(
        entity=entity,
        project=project,
        name=name,
        sections=_sections(),
        settings=ws.WorkspaceSettings(max_runs=50, group_by_prefix="first"),
        runset_settings=ws.RunsetSettings(
            groupby=[expr.Metric("Group"), expr.Metric("JobType")],
            pinned_columns=["run:displayName", "run:jobType", "summary:denoise/largest_effect", "summary:ce_recovered"],
        ),
    )


def _sections() -> list[Section]:
    import wandb_workspaces.reports.v2 as wr
    import wandb_workspaces.workspaces as ws

    def bars(metrics: tuple[str, ...]) -> list[Any]:
        return [wr.BarPlot(title=metric, metrics=[metric], max_runs_to_show=50) for metric in metrics]

    curves = wr.LinePlot(title="Effect over the number of latents", x=CURVE_AXIS, metric_regex=".*number of latents.*")
    training = [wr.LinePlot(title=name, x="tokens", metric_regex=rf"[^/]+/{name}$") for name in TRAINING]
    columns = [wr.ParallelCoordinatesPlotColumn(metric=f"c::{name}") for name in HYPERPARAMETERS]
    columns += [wr.ParallelCoordinatesPlotColumn(metric=name) for name in QUALITY[:3]]
    sweep: list[Any] = [
        wr.ParallelCoordinatesPlot(title="Settings and quality", columns=columns),
        wr.ParameterImportancePlot(with_respect_to="ce_recovered"),
        wr.ScatterPlot(title="Loss recovered by active latents", x="l0", y="ce_recovered"),
    ]
    return [
        ws.Section(
            name="Reports",
            is_open=True,
            panels=[wr.MarkdownPanel(markdown=NOTE), wr.MediaBrowser(media_keys=["report"])],
        ),
        ws.Section(name="Effects: patch, attribute", is_open=True, panels=[*bars(EFFECTS), curves]),
        ws.Section(name="Answers: restore", panels=bars(OUTCOMES)),
        ws.Section(name="Circuits", panels=bars(CIRCUITS)),
        ws.Section(name="Facts: edit", panels=bars(FACTS)),
        ws.Section(name="Dictionaries: training", panels=[*training, *bars(QUALITY)]),
        ws.Section(name="Sweeps over training settings", panels=sweep),
        ws.Section(name="Tables", panels=[wr.WeavePanelSummaryTable(table_name=name) for name in TABLES]),
    ]


def specification(made: Workspace) -> Mapping[str, Any]:
    """The view as it would be uploaded, as JSON values."""
    return json.loads(made._to_model().model_dump_json(by_alias=True, exclude_none=True))


def save(project: str, entity: str, name: str) -> str:
    """Make the workspace at W&B; returns its address.

    Raises:
        UserError: wandb-workspaces is not installed, there is no key, or W&B does not take it.
    """
    if not has_key():
        raise UserError("W&B has no key: run `wandb login`, or print what would be uploaded with --dry_run")
    try:
        import wandb

        owner = entity or wandb.Api().default_entity or ""
        return str(workspace(project, owner, name).save().url)
    except UserError:
        raise
    except Exception as error:  # W&B's libraries raise of every kind: no network, no such project, no access
        raise UserError(
            f"W&B did not take the workspace of project {project!r} ({reason_of(error)}): does the project exist, with "
            "a run in it? --dry_run prints what would be uploaded"
        ) from error
