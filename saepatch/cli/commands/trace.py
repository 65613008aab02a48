"""`saepatch trace`."""

from pathlib import Path

from saepatch.cli.page_tracker import page_tracker
from saepatch.cli.parser import CommandResult
from saepatch.errors import UserError
from saepatch.settings.trace import TraceConfig


def trace(config: TraceConfig) -> CommandResult:
    from saepatch.data.files import read_text
    from saepatch.measure.long.trace import TraceOptions, trace_attention
    from saepatch.measure.long.traced import READ
    from saepatch.records.tables import text_table
    from saepatch.report.text import number, token_text
    from saepatch.runs.interpret import read_model

    text = read_text(Path(config.document), "a document", "give a text file").rstrip("\r\n")
    if not text:
        raise UserError(f"{config.document!r} is empty: give a document")
    options = TraceOptions(
        block=config.block,
        measured=None if config.measured < 0 else config.measured,
        compare={"auto": None, "yes": True, "no": False}[config.compare],
        answer=config.answer or None,
        counter=config.counter or None,
    )
    model = read_model(config)
    traced = trace_attention(model, text, config.k or None, options)
    rows = [
        [each.layer, each.head, each.positions, token_text(each.begins), number(each.attention, ".1%"), each.trace]
        for each in traced.most_read()
    ]
    shown = f"{traced.summary()}\n\nThe last position reads most, by head:\n{text_table(READ, rows)}"
    if config.html:
        from saepatch.pages.tracked import track_page
        from saepatch.records.provenance import command_line, versions
        from saepatch.report import Facts, Page, Section, write_page

        facts = {"model": f"{config.model} ({model.fingerprint})", "document": config.document}
        facts |= {"command": command_line()}
        facts |= {"versions": ", ".join(f"{name} {version}" for name, version in versions().items())}
        page = Page(traced.title, "", [Section("Results", "", traced.blocks())], Facts(facts))
        shown += f"\n\nPage: {write_page(page, Path(config.html))}"
        if config.track != "none":
            with page_tracker(config, "trace") as tracker:
                track_page(page, Path(config.html), tracker)
    return CommandResult(shown, traced.facts())
