"""The page of `saepatch restore`: answers before and after, the restored latents, and warnings."""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

from saepatch.dictionaries.dictionary import Dictionary
from saepatch.errors import UserError
from saepatch.model.language_model import LanguageModel
from saepatch.model.sites import Site
from saepatch.pages.cards import FEW_PROMPTS, cards_section, coloured, dead_latents
from saepatch.pages.charts import bars, cell, estimate_text
from saepatch.pages.gather import TEXTS, read_dictionaries
from saepatch.pages.overview import (
    FEW,
    dictionary_facts,
    headline_section,
    needs_reading,
    splice_notices,
    splice_section,
    too_few,
)
from saepatch.reading.cards import Card, ReadText, read_texts
from saepatch.records.provenance import Provenance
from saepatch.records.rows import AnswerRow, grouped, read_row, read_rows
from saepatch.report import BarChart, Comparison, Facts, Page, Section, Table, token_text
from saepatch.report.text import number
from saepatch.restoration.judges import OUTCOME_WORDS, OUTCOMES
from saepatch.restoration.restore import Outcome
from saepatch.runs.catalogue import RunFolder
from saepatch.runs.commands.answers import ORDER, WILSON, Answers, Share
from saepatch.runs.parts import Record
from saepatch.settings.checks import current_names
from saepatch.settings.restore import RestoreConfig

SHOWN = 8  # prompts whose answers are shown side by side
COLOURED = 2  # prompts shown token by token
CARDS = 12  # latents with a card
CHANCE = 0.05  # shares above this cause a warning
KIND = {"": "", "yes": "harmful ", "no": "harmless "}

Chosen = Mapping[Site, tuple[int, ...] | None]


@dataclass(frozen=True, eq=False)
class Illustrations:
    """Contents of a page that need the model: splice quality, cards of restored latents, coloured texts."""

    latents: Chosen
    splice: Sequence[dict[str, Any]] = ()
    cards: Sequence[Card] = ()
    texts: Sequence[ReadText] = ()


def illustrate(
    model: LanguageModel,
    other: LanguageModel | None,
    dictionaries: Sequence[Dictionary],
    latents: Chosen,
    answers: Answers,
    prompts: Sequence[str],
    donors: Sequence[str] | None,
) -> Illustrations:
    """Describe the restored latents while the model is loaded.

    Args:
        other: The donor, where it is another model.
        prompts: The prompts of the answers.
        donors: The donor's prompt for each answer; None where there is no donor run.
    """
    acting = [(dictionary, ids) for dictionary in dictionaries if (ids := latents.get(dictionary.site))]
    room, described = CARDS, dict[str, Sequence[int]]()
    for dictionary, ids in acting:
        if room > 0:
            described[str(dictionary.site)] = ids[:room]
        room -= len(ids[:room])
    spliced = {str(dictionary.site): dictionary for dictionary in dictionaries if dictionary.site in latents}
    splice, cards = read_dictionaries(model, spliced, described, list(dict.fromkeys(prompts))[:TEXTS])
    texts: list[ReadText] = []
    if acting:
        dictionary, ids = max(acting, key=lambda pair: len(pair[1]))
        by_place = {(row.condition, row.example): row for row in answers.rows if row.draw == 0}
        examples = list(dict.fromkeys(row.example for row in answers.rows))
        both = [(by_place["bare", example], by_place["restored", example]) for example in examples]
        for place in [n for n, (bare, restored) in enumerate(both) if bare.outcome != restored.outcome][:COLOURED]:
            bare, restored = both[place]
            texts += read_texts(model, dictionary, ids, [(f"{bare.example}, bare", prompts[place] + bare.answer)])
            if donors is not None:
                name = f"{bare.example}, restored values: the donor on its own prompt and the answer"
                texts += read_texts(other or model, dictionary, ids, [(name, donors[place] + restored.answer)])
    return Illustrations(latents, splice, cards, texts)


def page_of_folder(run: RunFolder) -> Page:
    """The report of a run without a stored page, from its rows and summary alone: without tokens and cards.

    Raises:
        UserError: the files are of another version, damaged or missing.
    """
    facts = run.summary
    known = {field.name for field in fields(RestoreConfig)}
    try:
        given = current_names(RestoreConfig, run.settings)
        rows = read_rows(run.path / "results.parquet")
        known_settings = {name: value for name, value in given.items() if name in known}
        config = RestoreConfig(**known_settings | {"out": str(run.path)})
        edits = [{"condition": "restored", "draw": 0, "latents": facts["latents"]}]
        record = Record("restore", run.settings, facts["model"], facts["dictionaries"], {}, 0, 1, 1, edits)
        judged = [read_row(row, AnswerRow) for row in rows]
        provenance = next(source for row, source in judged if row.condition == "bare")
        latents = {Site.parse(site): ids and tuple(ids) for site, ids in facts["latents"].items()}
        answers = Answers.of(config, record, grouped(judged), facts.get("fvu_of_model_and_donor"))
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise UserError(
            f"cannot read the answers in {str(run.path)!r} ({type(error).__name__}: {error}): start the run again; "
            "finished parts are kept"
        ) from error
    return restored_page(answers, provenance, Illustrations(latents))


def restored_page(answers: Answers, provenance: Provenance, illustrations: Illustrations) -> Page:
    """The report of a run."""
    groups, cards = _groups(answers), illustrations.cards
    lead = " ".join(_lead(answers, group) for group in groups)
    sections = [headline_section(_headline(answers), notices(answers, illustrations))]
    if illustrations.splice:
        sections.append(splice_section(illustrations.splice))
    sections += [_outcomes(answers), _comparisons(answers, illustrations)]
    if cards:
        which = f"{len(cards)} of the restored latents, in the order of their ranking"
        sections.append(cards_section(cards, which, "this run's own prompts", FEW_PROMPTS))
    title = "Latents restored while the model answers"
    return Page(title, lead, sections, _facts(answers, provenance, illustrations))


def _groups(answers: Answers) -> list[str]:
    return [group for group in ("yes", "no") if any(share.group == group for share in answers.shares)] or [""]


def _lead(answers: Answers, group: str) -> str:
    """Sentence on the effect of restoration on one group of prompts."""
    bare, restored = answers.share("bare", group), answers.share("restored", group)

    def change(outcome: Outcome) -> str:
        after = restored.outcomes[outcome]
        return f"{bare.outcomes[outcome].value:.0%} to {after.value:.0%} [{after.low:.0%}, {after.high:.0%}]"

    return (
        f"Restoring {restored.latents:,} latents of {', '.join(answers.record.dictionaries)} in "
        f"{answers.record.model['name']} changes refusals of {bare.prompts} {KIND[group]}prompts from "
        f"{change('refuse')}, and degenerate answers from {change('degenerate')}."
    )


def _headline(answers: Answers) -> dict[str, str]:
    return {
        f"{KIND[group]}prompts refused, {share.condition}" if group else f"refused, {share.condition}": estimate_text(
            share.outcomes["refuse"], ".0%"
        )
        for group in _groups(answers)
        for share in answers.shares
        if share.group == group and share.condition != "matched"
    }


def notices(answers: Answers, illustrations: Illustrations) -> list[str]:
    """Warnings, a sentence each."""
    conditions = {(share.condition, share.group): share for share in answers.shares}
    warnings = [warning for group in _groups(answers) for warning in _of_group(conditions, group)]
    if ("random", "") not in conditions:
        warnings.append(
            "There are no random controls: this run does not show whether other latents would have the same effect."
        )
    warnings += splice_notices(illustrations.splice) if illustrations.splice else [needs_reading(answers.config.out)]
    return warnings + dead_latents(
        illustrations.cards, "Restoring them has an effect only where they are active in the donor."
    )


def _of_group(conditions: Mapping[tuple[str, str], Share], group: str) -> Iterator[str]:
    bare, restored = conditions["bare", group], conditions["restored", group]
    prompts = f"{KIND[group]}prompt"
    if bare.prompts < FEW:
        yield too_few(bare.prompts, prompts)
    refused, before = restored.outcomes["refuse"], bare.outcomes["refuse"]
    if group == "no" and refused.value - before.value > CHANCE:
        yield f"With restoration, the model also refuses {number(refused.value, '.0%')} of harmless prompts."
    if group != "no" and refused.low <= before.high:
        yield f"Restoration does not raise refusals of {prompts}s beyond chance."
    for control in ("random", "matched"):
        other = conditions.get((control, group))
        if other and (share := other.outcomes["refuse"].value) - before.value > CHANCE:
            yield (
                f"Restoring {control} latents makes the model refuse {number(share, '.0%')} of {prompts}s: the effect "
                "is not specific to the chosen latents."
            )
    donor = conditions.get(("donor", group))
    if group != "no" and donor and donor.outcomes["refuse"].value < 0.9:
        yield (
            f"The donor itself refuses only {number(donor.outcomes['refuse'].value, '.0%')} of {prompts}s: restoring "
            "its latents cannot be expected to achieve more."
        )
    if (broken := restored.outcomes["degenerate"].value) > CHANCE:
        yield f"{number(broken, '.0%')} of the restored answers to {prompts}s are degenerate text."


def _outcomes(answers: Answers) -> Section:
    mine = [share for group in _groups(answers) for share in answers.shares if share.group == group]
    names = [(share.condition, f"{KIND[share.group]}{share.prompts}") for share in mine]
    outcomes = Table(
        ["condition", "prompts", *(OUTCOME_WORDS[name] for name in OUTCOMES)],
        [(*named, *(cell(share.outcomes[name]) for name in OUTCOMES)) for named, share in zip(names, mine)],
        f"Restored, and in every random set: {answers.share('restored').latents:,} latents. {WILSON}",
        dict.fromkeys((OUTCOME_WORDS[name] for name in OUTCOMES), ".0%"),
    )
    scores = Table(
        ["condition", "prompts", "refusal score"],
        [(*named, cell(share.score)) for named, share in zip(names, mine)],
        "Refusal score: log odds of a refusal's first token after the prompt, in nats, mean over prompts with a 95 % "
        "interval.",
        {"refusal score": ".2f"},
    )
    charts = [_chart(answers, group) for group in _groups(answers)]
    text = f"Judge: `{answers.config.judge}`. Donor: `{answers.config.donor}`."
    return Section("Outcomes", text, [*charts, outcomes, scores])


def _chart(answers: Answers, group: str) -> BarChart:
    """Outcomes of one group of prompts by condition."""
    mine = [share for share in answers.shares if share.group == group]
    return BarChart(
        f"Outcomes of {KIND[group]}prompts" if group else "Outcomes",
        [share.condition for share in mine],
        [bars(OUTCOME_WORDS[name], [share.outcomes[name] for share in mine]) for name in OUTCOMES],
        "share of prompts",
        f"n = {mine[0].prompts} prompts. Intervals are in the table below.",
        value_range=(0.0, 1.0),
        value_format=".0%",
        shares=True,
    )


def _comparisons(answers: Answers, illustrations: Illustrations) -> Section:
    rows = {(row.condition, row.draw, row.example): row for row in answers.rows}
    examples = list(dict.fromkeys(row.example for row in answers.rows))
    examples = sorted(examples, key=lambda name: _same_outcome(rows, name))[:SHOWN]
    outcomes: dict[str, str] = {str(name): text for name, text in OUTCOME_WORDS.items()}
    comparisons = [
        Comparison(
            rows["bare", 0, example].prompt,
            [
                (f"{name}: {outcomes[row.outcome]}", row.answer)
                for name in ORDER
                if (row := rows.get((name, 0, example))) is not None
            ],
            changes=True,
            label=f"Prompt, {kind}" if (kind := KIND[rows["bare", 0, example].harmful].strip()) else "Prompt",
            outcomes=tuple(outcomes.values()),
        )
        for example in examples
    ]
    text = (
        f"{len(examples)} prompts, those whose outcome restoration changes first, with the first of the random sets. "
        "Conditions with the same answer share a column. Marked: words that differ from the bare answer."
    )
    if illustrations.texts:
        text += (
            f"\n\nBelow them, token by token, the first {COLOURED} prompts whose outcome restoration changes. Colours: "
            "activation of the restored latents of one site in the unedited model."
        )
    return Section("Answers", text, [*comparisons, *coloured(illustrations.texts)])


def _same_outcome(rows: Mapping[tuple[str, int, str], AnswerRow], example: str) -> bool:
    restored = rows.get(("restored", 0, example))
    return restored is None or restored.outcome == rows["bare", 0, example].outcome


def _facts(answers: Answers, provenance: Provenance, illustrations: Illustrations) -> Facts:
    config = answers.config
    given = {name: text for name, text in provenance.facts().items() if name != "dictionary"}
    donors = {"clean": "itself, on clean prompts", "means": "means over clean prompts"}
    chosen = f"{config.ranking} score, on {token_text(config.select)}" if config.select else "no one: all latents"
    return Facts(
        {"model": given.pop("model")}
        | dictionary_facts(answers.record.dictionaries)
        | {
            "donor": donors.get(config.donor, config.donor),
            "prompts": f"{token_text(config.prompts)}: {answers.share('bare').prompts:,}",
            **{
                f"unexplained at {site}": f"{number(mine, '.1%')} of the model, {number(theirs, '.1%')} of the donor"
                for site, (mine, theirs) in answers.fvu.items()
            },
            "chosen by": "--latents" if config.latents.strip() else chosen,
            "restored latents": "; ".join(
                f"{site}: {'all' if ids is None else ', '.join(map(str, ids))}"
                for site, ids in illustrations.latents.items()
            ),
        }
        | given
    )
