"""`saepatch latent`."""

from pathlib import Path

from saepatch.cli.page_tracker import page_tracker
from saepatch.cli.parser import CommandResult
from saepatch.settings.latent import LatentConfig


def latent(config: LatentConfig) -> CommandResult:
    from saepatch.pages.commands.latent import latent_lines, latent_page, read_named

    latents = read_named(config)
    text = "\n\n".join("\n".join(latent_lines(each)) for each in latents)
    if config.html:
        from saepatch.pages.tracked import track_dictionaries, track_page
        from saepatch.records.provenance import command_line, versions
        from saepatch.report import write_page

        libraries = ", ".join(f"{name} {version}" for name, version in versions().items())
        facts = {
            "model": f"{config.model} ({latents[0].model_hash})",
            "texts": config.reference or "the embedded model's own",
        }
        facts |= {"command": command_line(), "versions": libraries}
        page = latent_page(latents, facts)
        text += f"\n\nPage: {write_page(page, Path(config.html))}"
        if config.track != "none":
            with page_tracker(config, "latent") as tracker:
                track_page(page, Path(config.html), tracker)
                track_dictionaries(config.sae, tracker)
    return CommandResult(
        text, latents[0].facts() if len(latents) == 1 else {"latents": [each.facts() for each in latents]}
    )
