"""`saepatch track`."""

import json

from saepatch.cli.parser import CommandResult
from saepatch.settings.finished.track import TrackConfig


def track(config: TrackConfig) -> CommandResult:
    from saepatch.tracking.workspace import save, specification, workspace

    if config.dry_run:
        spec = specification(workspace(config.project, config.entity, config.name))
        return CommandResult(json.dumps(spec, indent=2, ensure_ascii=False), spec)
    address = save(config.project, config.entity, config.name)
    return CommandResult(f"made the workspace {config.name!r}: {address}", {"workspace": address})
