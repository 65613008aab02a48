"""`saepatch push`."""

from saepatch.cli.parser import CommandResult
from saepatch.settings.finished.push import PushConfig


def push(config: PushConfig) -> CommandResult:
    from saepatch.dictionaries.publish import push as push_to_hub

    files = push_to_hub(
        config.folder,
        config.repo_id,
        private=config.private,
        branch=config.branch,
        message=config.message,
        dry_run=config.dry_run,
    )
    summary = f"{len(files)} files {'would be uploaded' if config.dry_run else 'uploaded'} to {config.repo_id}"
    return CommandResult(
        "\n".join([*files, summary]), {"files": list(files), "repo_id": config.repo_id, "dry_run": config.dry_run}
    )
