"""The page of `saepatch restore`: answers before and after, what the restored latents are, and what to beware of."""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import Any

from saepatch.dictionaries.dictionary import Dictionary
from saepatch.errors import UserError
from saepatch.measure.quality import splice_quality
from saepatch.model.language_model import LanguageModel
from saepatch.model.sites import Site
from saepatch.pages.cards import coloured, latent_card
from saepatch.pages.left import anchor
from saepatch.pages.overview import FEW, RECOVERED, splice_section
from saepatch.reading.cards import Card, ReadText, read_latents, read_texts
from saepatch.records.provenance import Provenance
from saepatch.records.rows import read_rows
from saepatch.records.statistics import Interval as Estimate
from saepatch.report import (
    BarChart,
    Bars,
    Comparison,
    Facts,
    Headline,
    Interval,
    Notices,
    Page,
    Section,
    Simple,
    Table,
    token_text,
)
from saepatch.report.text import number
from saepatch.restoration.judges import OUTCOMES, SAID
from saepatch.restoration.restore import Outcome
from saepatch.runs.answers import ORDER, WILSON, Answers, Share, grouped, read_row
from saepatch.runs.catalogue import RunFolder
from saepatch.runs.parts import Record
from saepatch.settings.restore import RestoreConfig

log = logging.getLogger(__name__)

SHOWN = 8  # prompts whose answers stand side by side
COLOURED = 2  # of them, that are shown token by token
CARDS = 12  # latents that have one
TEXTS = 512  # of the run's own prompts, that examples are looked for in
SPLICED = 32  # of them, that splice quality is measured on
CHANCE = 0.05  # more than this is worth a warning
KIND = {"": "", "yes": "harmful", "no": "harmless"}

Chosen = Mapping[Site, tuple[int, ...] | None]


@dataclass(frozen=True, eq=False)
class Seen:
    """What a page needs of the model: splice quality, cards of restored latents, texts by their activations."""

    latents: Chosen
    splice: tuple[dict[str, Any], ...] = ()
    cards: tuple[Card, ...] = ()
    texts: tuple[ReadText, ...] = ()


def see(
    model: LanguageModel,
    other: LanguageModel | None,
    dictionaries: Sequence[Dictionary],
    latents: Chosen,
    found: Answers,
    prompts: Sequence[str],
    donors: Sequence[str] | None,
) -> Seen:
    """Look at the restored latents while the model is there; what goes wrong is said, and the run stands.

    Args:
        other: The donor, where it is another model.
        prompts: What the answers are to.
        donors: What the donor reads before each answer; None where it reads nothing.
    """
    try:
        donor = None if donors is None else (other or model, donors)
        return _look(model, donor, dictionaries, latents, found, prompts)
    except (UserError, RuntimeError) as error:  # a device that is full, say
        log.warning("tokens and cards are left out of the report: %s", str(error).partition("\n")[0])
        return Seen(latents)


def _look(
    model: LanguageModel,
    donor: tuple[LanguageModel, Sequence[str]] | None,
    dictionaries: Sequence[Dictionary],
    latents: Chosen,
    found: Answers,
    prompts: Sequence[str],
) -> Seen:
    tokens = model.tokenize(list(dict.fromkeys(prompts))[:TEXTS])
    few = tokens.rows(slice(0, SPLICED))
    acting = [(one, ids) for one in dictionaries if (ids := latents.get(one.site))]
    splice = tuple(
        asdict(splice_quality(model, one, few)) | {"site": str(one.site)} for one in dictionaries if one.site in latents
    )
    room, cards = CARDS, list[Card]()
    for one, ids in acting:
        cards += read_latents(model, one, ids[:room], tokens) if room else []
        room -= len(ids[:room])
    texts: list[ReadText] = []
    if acting:
        one, ids = max(acting, key=lambda pair: len(pair[1]))
        answers = {(row.condition, row.example): row for row in found.rows if row.draw == 0}
        examples = list(dict.fromkeys(row.example for row in found.rows))
        for place in [n for n, e in enumerate(examples) if _turned(answers, e)][:COLOURED]:
            bare, restored = answers["bare", examples[place]], answers["restored", examples[place]]
            texts += read_texts(model, one, ids, [(f"{bare.example}, bare", prompts[place] + bare.answer)])
            if donor is not None:
                name = f"{bare.example}, what is restored: the donor reads its own prompt and the answer"
                texts += read_texts(donor[0], one, ids, [(name, donor[1][place] + restored.answer)])
    return Seen(latents, splice, tuple(cards), tuple(texts))


def _turned(answers: Mapping[tuple[str, str], Any], example: str) -> bool:
    """Whether restoration changes the outcome of an example."""
    return bool(answers["bare", example].outcome != answers["restored", example].outcome)


def left_page(run: RunFolder) -> Page:
    """The report of a run whose folder keeps no page, from its rows and summary alone: without tokens and cards.

    Raises:
        UserError: they are of another version, damaged or missing.
    """
    facts = run.summary
    known = {one.name for one in fields(RestoreConfig)}
    try:
        rows = read_rows(run.path / "results.parquet")
        config = RestoreConfig(**{name: value for name, value in run.settings.items() if name in known})
        edits = [{"condition": "restored", "draw": 0, "latents": facts["latents"]}]
        record = Record("restore", run.settings, facts["model"], facts["dictionaries"], {}, 0, 1, 1, edits)
        answers = [read_row(row) for row in rows]
        provenance = next(whose for row, whose in answers if row.condition == "bare")
        latents = {Site.parse(site): ids and tuple(ids) for site, ids in facts["latents"].items()}
        found = Answers.of(config, record, grouped(answers), facts.get("fvu_of_model_and_donor"))
    except (OSError, ValueError, KeyError, TypeError, StopIteration) as error:
        raise UserError(
            f"cannot read the answers in {str(run.path)!r} ({type(error).__name__}: {error}): start the run again, "
            "what is there is kept"
        ) from error
    return restored_page(found, provenance, Seen(latents))


def restored_page(found: Answers, provenance: Provenance, seen: Seen) -> Page:
    """The report of a run."""
    lead = " ".join(_said(found, group) for group in _groups(found))
    warnings = notices(found, seen)
    blocks: list[Simple] = [Headline(_headline(found)), *([Notices(warnings)] if warnings else [])]
    sections = [Section("What came out", "95 % intervals in brackets.", blocks)]
    if seen.splice:
        sections.append(splice_section(seen.splice))
    sections += [_outcomes(found), _answers(found, seen)]
    if seen.cards:
        sections.append(_cards(seen))
    return Page("Latents restored while the model answers", lead, sections, _facts(found, provenance, seen))


def _groups(found: Answers) -> list[str]:
    return [group for group in ("yes", "no") if any(one.group == group for one in found.shares)] or [""]


def _said(found: Answers, group: str) -> str:
    """What restoration does to one group of prompts."""
    bare, restored = found.share("bare", group), found.share("restored", group)

    def change(outcome: Outcome) -> str:
        after = restored.outcomes[outcome]
        return f"{bare.outcomes[outcome].value:.0%} to {after.value:.0%} [{after.low:.0%}, {after.high:.0%}]"

    kind = f"{KIND[group]} " if group else ""
    return (
        f"Restoring {restored.latents:,} latents of {', '.join(found.record.dictionaries)} in "
        f"{found.record.model['name']} changes refusals of {bare.prompts} {kind}prompts from {change('refuse')}, and "
        f"degenerate answers from {change('degenerate')}."
    )


def _headline(found: Answers) -> dict[str, str]:
    items: dict[str, str] = {}
    for group in _groups(found):
        for one in found.shares:
            if one.group == group and one.condition != "matched":
                items[_name(f"refused, {one.condition}", group)] = _value(one.outcomes["refuse"])
    return items


def _name(text: str, group: str) -> str:
    return f"{KIND[group]} prompts {text}" if group else text


def _value(estimate: Estimate) -> str:
    return f"{number(estimate.value, '.0%')} [{number(estimate.low, '.0%')}, {number(estimate.high, '.0%')}]"


def notices(found: Answers, seen: Seen) -> list[str]:
    """What a reader has to know, in words."""
    told: list[str] = []
    conditions = {(one.condition, one.group): one for one in found.shares}
    for group in _groups(found):
        told += _of_group(conditions, group)
    if ("random", "") not in conditions:
        told.append(
            "Nothing random was restored beside: whether other latents would do the same, this run does not say."
        )
    for one in seen.splice:
        if one["ce_recovered"] is not None and one["ce_recovered"] < RECOVERED:
            told.append(
                f"The dictionary at {one['site']} keeps only {number(one['ce_recovered'], '.1%')} of the cross-entropy "
                "on these prompts: much of what the model does there is in its error term."
            )
    if dead := [f"{card.site} {card.latent}" for card in seen.cards if card.dead]:
        told.append(
            f"Never active in this run's prompts: {', '.join(dead)}. Restoring them acts only where the donor has them."
        )
    return told


def _of_group(conditions: Mapping[tuple[str, str], Share], group: str) -> list[str]:
    bare, restored = conditions["bare", group], conditions["restored", group]
    kind = f"{KIND[group]} " if group else ""
    told: list[str] = []
    if bare.prompts < FEW:
        told.append(f"{bare.prompts} {kind}prompt{'s' * (bare.prompts > 1)}: too few for an interval that means much.")
    refused = restored.outcomes["refuse"].value
    gained = refused - bare.outcomes["refuse"].value
    if group == "no" and gained > CHANCE:
        told.append(f"Restored, the model refuses {number(refused, '.0%')} of harmless prompts, too.")
    if group != "no" and restored.outcomes["refuse"].low <= bare.outcomes["refuse"].high:
        told.append(f"Restoration does not raise refusals of {kind}prompts beyond what chance explains.")
    for control in ("random", "matched"):
        other = conditions.get((control, group))
        if other and other.outcomes["refuse"].value - bare.outcomes["refuse"].value > CHANCE:
            told.append(
                f"Restoring {control} latents makes the model refuse {number(other.outcomes['refuse'].value, '.0%')} "
                f"of {kind}prompts: the effect is not the chosen latents' alone."
            )
    donor = conditions.get(("donor", group))
    if group != "no" and donor and donor.outcomes["refuse"].value < 0.9:
        told.append(
            f"The donor itself refuses only {number(donor.outcomes['refuse'].value, '.0%')} of {kind}prompts: more "
            "than that cannot be expected of what it gives."
        )
    if (broken := restored.outcomes["degenerate"].value) > CHANCE:
        told.append(f"{number(broken, '.0%')} of the restored answers to {kind}prompts are degenerate text.")
    return told


def _outcomes(found: Answers) -> Section:
    mine = [one for group in _groups(found) for one in found.shares if one.group == group]
    names = [(one.condition, f"{KIND[one.group]} {one.prompts}".strip()) for one in mine]
    size = found.share("restored").latents
    outcomes = Table(
        ["condition", "prompts", *(SAID[name] for name in OUTCOMES)],
        [(*named, *(_cell(one.outcomes[name]) for name in OUTCOMES)) for named, one in zip(names, mine)],
        f"Restored, and in every random set: {size:,} latents. {WILSON}",
        dict.fromkeys((SAID[name] for name in OUTCOMES), ".0%"),
    )
    scores = Table(
        ["condition", "prompts", "refusal score"],
        [(*named, _cell(one.score)) for named, one in zip(names, mine)],
        "Refusal score: log odds of a refusal's first token after the prompt, in nats, mean over prompts with a 95 % "
        "bootstrap interval.",
        {"refusal score": ".2f"},
    )
    charts = [_chart(found, group) for group in _groups(found)]
    text = f"Judge: `{found.config.judge}`. Donor: `{found.config.donor}`."
    return Section("Outcomes", text, [*charts, outcomes, scores])


def _chart(found: Answers, group: str) -> BarChart:
    """Outcomes of one group of prompts by condition."""
    mine = [one for one in found.shares if one.group == group]
    bars = [
        Bars(
            SAID[name],
            [one.outcomes[name].value for one in mine],
            [one.outcomes[name].low for one in mine],
            [one.outcomes[name].high for one in mine],
        )
        for name in OUTCOMES
    ]
    title = f"Outcomes of {KIND[group]} prompts" if group else "Outcomes"
    caption = f"n = {mine[0].prompts} prompts. {WILSON}"
    return BarChart(
        title,
        [one.condition for one in mine],
        bars,
        "share of prompts",
        caption,
        value_range=(0.0, 1.0),
        value_format=".0%",
    )


def _answers(found: Answers, seen: Seen) -> Section:
    answers = {(row.condition, row.draw, row.example): row for row in found.rows}
    examples = list(dict.fromkeys(row.example for row in found.rows))[:SHOWN]
    said: dict[str, str] = {str(name): text for name, text in SAID.items()}
    comparisons = [
        Comparison(
            answers["bare", 0, example].prompt,
            [
                (f"{name}: {said[row.outcome]}", row.answer)
                for name in ORDER
                if (row := answers.get((name, 0, example))) is not None
            ],
            changes=True,
        )
        for example in examples
    ]
    text = (
        f"The first {len(examples)} prompts; of random sets the first. Marked: words that the bare answer lacks there."
    )
    if seen.texts:
        text += (
            f"\n\nBelow them, token by token, the first {COLOURED} prompts whose outcome restoration changes: the "
            "deeper a colour, the stronger the restored latents of one site are there, nothing being edited."
        )
    return Section("Answers", text, [*comparisons, *coloured(seen.texts)])


def _cards(seen: Seen) -> Section:
    known = {anchor(card) for card in seen.cards}
    first = seen.cards[0]
    text = (
        f"{len(seen.cards)} of the restored latents, in the order they were chosen in: where they fire in this run's "
        f"own prompts ({first.texts:,} texts, {first.tokens:,} tokens), what their direction writes, which others are "
        "like them. These prompts are few and of one kind: what a latent is about in other text, they cannot say."
    )
    return Section("Latents", text, [latent_card(card, known) for card in seen.cards])


def _facts(found: Answers, provenance: Provenance, seen: Seen) -> Facts:
    config = found.config
    dictionaries = {
        f"dictionary {site}": f"{one['name']} ({one['hash']})" for site, one in found.record.dictionaries.items()
    }
    given = provenance.facts()
    ids = "; ".join(
        f"{site}: {'all' if ids is None else ', '.join(map(str, ids))}" for site, ids in seen.latents.items()
    )
    return Facts(
        {"model": given.pop("model")}
        | dictionaries
        | {
            "donor": {"clean": "itself, on clean prompts", "means": "means over clean prompts"}.get(
                config.donor, config.donor
            ),
            "prompts": f"{token_text(config.prompts)}: {found.share('bare').prompts:,}",
            **{
                f"unexplained at {site}": f"{number(mine, '.1%')} of the model, {number(theirs, '.1%')} of the donor"
                for site, (mine, theirs) in found.fvu.items()
            },
            "chosen by": _chosen_by(found),
            "restored latents": ids,
        }
        | {name: text for name, text in given.items() if name != "dictionary"}
    )


def _chosen_by(found: Answers) -> str:
    config = found.config
    if config.latents.strip():
        return "--latents"
    return f"{config.ranking} score, on {token_text(config.select)}" if config.select else "no one: all latents"


def _cell(estimate: Estimate) -> Interval:
    return Interval(estimate.value, estimate.low, estimate.high)
