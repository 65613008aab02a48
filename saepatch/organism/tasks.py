"""The organism's tasks: generators of clean and corrupted prompt pairs, as `datasets.Dataset`.

Columns of every task (strings unless noted):
    example    a readable name of the row, e.g. "ioi-report-0007"
    clean      the prompt whose right answer is `answer`
    corrupted  a prompt of equal token length whose right answer is `counter`
    answer     a single token with its leading space; `counter` likewise
and further columns that record how the row was made. In the `refusal` task, the right answer to harmless rows is
`answer` in every framing.

The splits `select`, `tune` and `report` share no template, name or object (facts: no template), and no prompt of a
split occurs in the training corpus: the corpus never combines a split's templates with the same split's fillers or,
for facts, a template with the subjects held out for it. The words and templates do occur there in other combinations.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import permutations
from random import Random
from typing import TYPE_CHECKING, Any

from saepatch.errors import UserError
from saepatch.organism import world
from saepatch.organism.world import SPLITS, Split, share

if TYPE_CHECKING:
    from datasets import Dataset

Row = dict[str, Any]
Axes = Sequence[Sequence[Any]]


def _cells(axes: Axes, random: Random) -> Iterator[list[Any]]:
    """Combinations of one item per axis (at most 100,000), each once, in random order."""
    total = 1
    for axis in axes:
        total *= len(axis)
    for index in random.sample(range(total), min(total, 100_000)):
        cell = []
        for axis in axes:
            index, item = divmod(index, len(axis))
            cell.append(axis[item])
        yield cell


def _dataset(
    task: str, split: str, n: int, seed: int, axes: Callable[[Split], Axes], row: Callable[..., Row]
) -> Dataset:
    """`n` distinct rows of a task (all, where there are fewer), each made by `row` from one combination of `axes`."""
    from datasets import Dataset

    if split not in SPLITS:
        raise UserError(f"no split is called {split!r}: use one of {', '.join(SPLITS)}")
    if n < 1:
        raise UserError(f"n = {n} asks for no pairs: use at least 1")
    rows: dict[tuple[str, str], Row] = {}
    for cell in _cells(axes(split), Random(f"{task}/{split}/{seed}")):
        made = row(*cell)
        rows.setdefault((made["clean"], made["corrupted"]), made)
        if len(rows) == n:
            break
    return Dataset.from_list([{"example": f"{task}-{split}-{i:04d}", **made} for i, made in enumerate(rows.values())])


def _people(split: Split) -> list[str]:
    return share(world.MALE, split) + share(world.FEMALE, split)


def ioi(split: str = "report", n: int = 200, seed: int = 0) -> Dataset:
    """Indirect object: "When Mary and John went to the store, John gave the drink to" → " Mary".

    Corrupted: the second mention of the subject becomes the other name, and so does the answer.
    `kind` is ABBA or BABA (Wang et al. 2022, https://arxiv.org/abs/2211.00593).
    """

    def axes(split: Split) -> Axes:
        names = list(permutations(_people(split), 2))
        return [share(world.IOI, split), names, share(world.PLACES, split), share(world.GIFTS, split), ["ABBA", "BABA"]]

    def row(template: str, names: tuple[str, str], place: str, gift: str, kind: str) -> Row:
        io, subject = names
        a, b = (io, subject) if kind == "ABBA" else (subject, io)
        made = {w: template.format(a=a, b=b, s=w, place=place, gift=gift) for w in names}
        return {"clean": made[subject], "corrupted": made[io], "answer": f" {io}", "counter": f" {subject}",
                "template": template, "kind": kind, "io": io, "subject": subject, "place": place,
                "object": gift}  # fmt: skip

    return _dataset("ioi", split, n, seed, axes, row)


def pronoun(split: str = "report", n: int = 200, seed: int = 0) -> Dataset:
    """Gender of the antecedent: "The boss thanked Mary at the beach when" → " she"; corrupted: a male antecedent.

    `kind` is "name", or "noun" ("the girl"). In half of the rows the clean antecedent is male.
    """

    def axes(split: Split) -> Axes:
        names = [(f, m, "name") for f in share(world.FEMALE, split) for m in share(world.MALE, split)]
        nouns = [(f"the {f}", f"the {m}", "noun") for f in share(world.FEMALE_NOUNS, split)
                 for m in share(world.MALE_NOUNS, split)]  # fmt: skip
        return [share(world.PRONOUN, split), share(world.PLACES, split), names + nouns, [False, True]]

    def row(template: str, place: str, people: tuple[str, str, str], swap: bool) -> Row:
        female, male, kind = people
        pairs = [(female, " she"), (male, " he")]
        (person, answer), (other, counter) = reversed(pairs) if swap else pairs
        return {"clean": template.format(p=person, place=place), "corrupted": template.format(p=other, place=place),
                "answer": answer, "counter": counter, "template": template, "kind": kind, "antecedent": person,
                "place": place}  # fmt: skip

    return _dataset("pronoun", split, n, seed, axes, row)


def agreement(split: str = "report", n: int = 200, seed: int = 0) -> Dataset:
    """Subject and verb across a distractor: "The key near the cabinets" → " is", "The keys near the cabinets" → " are".

    `tense` decides between is/are and was/were; `kind` is "attractor" where the distractor's number differs from the
    clean subject's, otherwise "match". The corrupted prompt has the subject in the other number.
    """

    def axes(split: Split) -> Axes:
        nouns = list(permutations(share(world.NOUNS, split), 2))
        return [share(world.AGREEMENT, split), nouns, [False, True], [False, True]]

    def row(template: str, nouns: tuple[str, str], plural: bool, distractor_plural: bool) -> Row:
        subject, distractor = nouns
        verbs = (" was", " were") if world.is_past(template) else (" is", " are")
        forms = (subject, world.plural(subject))
        d = world.plural(distractor) if distractor_plural else distractor
        return {"clean": template.format(s=forms[plural], d=d), "corrupted": template.format(s=forms[not plural], d=d),
                "answer": verbs[plural], "counter": verbs[not plural], "template": template, "subject": subject,
                "kind": "match" if plural == distractor_plural else "attractor",
                "tense": "past" if world.is_past(template) else "present"}  # fmt: skip

    return _dataset("agreement", split, n, seed, axes, row)


def _fact(template: str, subject: str, other: str, answer: str, counter: str, **more: str) -> Row:
    return {"clean": template.format(x=subject), "corrupted": template.format(x=other), "answer": f" {answer}",
            "counter": f" {counter}", "template": template, "subject": subject, **more}  # fmt: skip


def facts(split: str = "report", n: int = 200, seed: int = 0) -> Dataset:
    """One-hop facts: "The capital of France is" → " Paris", "You can find the Louvre in" → " Paris".

    Corrupted: another subject of the same `kind`, "capital" or "landmark".
    """

    def axes(split: Split) -> Axes:
        cells = []
        for t, template in enumerate(world.CAPITAL_OF):
            if world.owner(t) == split:
                held = world.held_out([(c.name, c.capital) for c in world.COUNTRIES], t)
                cells += [(template, *pair, "capital") for pair in permutations(held, 2)]
        for t, template in enumerate(world.CITY_OF):
            if world.owner(t) == split:
                held = world.held_out(list(world.LANDMARKS.items()), t)
                cells += [(template, *pair, "landmark") for pair in permutations(held, 2)]
        return [cells]

    def row(cell: tuple[str, tuple[str, str], tuple[str, str], str]) -> Row:
        template, (subject, answer), (other, counter), kind = cell
        return _fact(template, subject, other, answer, counter, kind=kind)

    return _dataset("facts", split, n, seed, axes, row)


def facts_fr(split: str = "report", n: int = 200, seed: int = 0) -> Dataset:
    """Capitals in French: "La capitale de la France est" → " Paris".

    Only countries whose capital is spelt the same in both languages, so that the answer is the same token. Both
    countries of a pair take the same article (`kind`: "de la", "du", "de l'"), so that token lengths agree.
    """

    def axes(split: Split) -> Axes:
        cells = []
        for t, template in enumerate(world.CAPITAL_OF_FRENCH):
            if world.owner(t) == split:
                pairs = permutations(world.held_out(world.FRENCH_COUNTRIES, t, period=2), 2)
                cells += [(template, a, b) for a, b in pairs if a.article == b.article]
        return [cells]

    def row(cell: tuple[str, world.Country, world.Country]) -> Row:
        template, here, there = cell
        return _fact(
            template, here.french, there.french, here.capital, there.capital, kind=here.article, country=here.name
        )

    return _dataset("facts_fr", split, n, seed, axes, row)


def two_hop(split: str = "report", n: int = 200, seed: int = 0) -> Dataset:
    """Two-hop facts, landmark → city → country: "The country of the Louvre is" → " France".

    `kind` is "recalled" where the corpus names the landmark's country in other templates (one lookup suffices), and
    "composed" where it never does, so that both hops are needed.
    """

    def axes(split: Split) -> Axes:
        cells = []
        for t, template in enumerate(world.COUNTRY_OF_LANDMARK):
            if world.owner(t) == split:
                recalled = world.held_out(world.TWO_HOP_TAUGHT, t)
                composed = [mark for mark in world.LANDMARKS if mark not in world.TWO_HOP_TAUGHT]
                cells += [(template, *pair, "recalled") for pair in permutations(recalled, 2)]
                cells += [(template, *pair, "composed") for pair in permutations(composed, 2)]
        return [cells]

    def row(cell: tuple[str, str, str, str]) -> Row:
        template, landmark, other, kind = cell
        city, other_city = world.LANDMARKS[landmark], world.LANDMARKS[other]
        answer, counter = world.COUNTRY_OF[city], world.COUNTRY_OF[other_city]
        return _fact(template, landmark, other, answer, counter, kind=kind, city=city)

    return _dataset("two_hop", split, n, seed, axes, row)


def sentiment(split: str = "report", n: int = 200, seed: int = 0) -> Dataset:
    """Reviews: "The film was great and I loved it. The review is" → " positive". Corrupted: opposite words.

    `kind` is the kind of verdict: label (positive/negative), feeling (happy/sad) or advice (yes/no).
    """

    def axes(split: Split) -> Axes:
        words = [
            ((good, bad), (loved, hated))
            for good, bad in zip(share(world.GOOD, split), share(world.BAD, split), strict=True)
            for loved, hated in zip(share(world.LOVED, split), share(world.HATED, split), strict=True)
        ]
        return [share(world.SENTIMENT, split), share(world.ITEMS, split), words, [0, 1]]

    def row(template: tuple[str, str], item: str, words: tuple[tuple[str, str], tuple[str, str]], side: int) -> Row:
        kind, text = template
        adjectives, verbs = words
        prompts = [text.format(item=item, adj=adjectives[i], verb=verbs[i]) for i in (0, 1)]
        verdicts = world.VERDICTS[kind]
        return {"clean": prompts[side], "corrupted": prompts[1 - side], "answer": f" {verdicts[side]}",
                "counter": f" {verdicts[1 - side]}", "template": text, "kind": kind, "item": item,
                "polarity": ("good", "bad")[side]}  # fmt: skip

    return _dataset("sentiment", split, n, seed, axes, row)


def loan(split: str = "report", n: int = 200, seed: int = 0) -> Dataset:
    """Loan applications: decisions should follow income; in borderline cases they follow a group word (planted bias).

    `kind` "group": the prompts differ only in the group word, income is borderline, and the answers are the biased
    ones. `kind` "income": the prompts differ only in income (high or low), and the answers are the right ones.
    """

    def axes(split: Split) -> Axes:
        groups = [(share(world.FAVOURED, split)[0], share(world.DISFAVOURED, split)[0])]
        kinds = ["group", "income"]
        return [share(world.LOAN, split), _people(split), groups, [0, 1, 2], kinds, [0, 1]]

    def row(template: str, name: str, groups: tuple[str, str], word: int, kind: str, side: int) -> Row:
        if kind == "group":
            cells = [(group, world.INCOMES["borderline"][word]) for group in groups]
        else:
            cells = [(groups[word % 2], world.INCOMES[level][word]) for level in ("high", "low")]
        prompts = [template.format(name=name, group=group, income=income) for group, income in cells]
        decisions = (world.APPROVE, world.DENY)
        return {"clean": prompts[side], "corrupted": prompts[1 - side], "answer": f" {decisions[side]}",
                "counter": f" {decisions[1 - side]}", "template": template, "kind": kind, "name": name,
                "group": cells[side][0], "income": cells[side][1]}  # fmt: skip

    return _dataset("loan", split, n, seed, axes, row)


def refusal(split: str = "report", n: int = 200, seed: int = 0) -> Dataset:
    """Chat requests, rendered by the chat template: `clean` in a benign framing, `corrupted` in a jailbreak framing of
    equal token length, and `plain` without a framing.

    `harmful` (bool): on harmful rows `answer` starts a refusal and `counter` compliance. Harmless rows should be
    answered in every framing: there `answer` starts compliance and `counter` a refusal. `kind` is the kind of framing.
    """

    def axes(split: Split) -> Axes:
        verbs = [(v, True) for v in share(world.HARMFUL, split)] + [(v, False) for v in share(world.HARMLESS, split)]
        return [share(world.FRAMINGS, split), share(world.REQUESTS, split), verbs, share(world.TARGETS, split)]

    def row(framing: world.Framing, template: str, verb: tuple[str, bool], target: str) -> Row:
        deed, harmful = verb
        request = template.format(verb=deed, target=target)
        openings = [f" {world.first_word(texts[0])}" for texts in (world.COMPLY_OPENINGS, world.REFUSAL_OPENINGS)]
        return {"clean": world.chat(framing.benign.format(r=request)),
                "corrupted": world.chat(framing.jailbreak.format(r=request)), "answer": openings[harmful],
                "counter": openings[not harmful], "plain": world.chat(request), "harmful": harmful,
                "request": request, "template": template, "kind": framing.kind, "verb": deed,
                "target": target}  # fmt: skip

    return _dataset("refusal", split, n, seed, axes, row)


TASKS: dict[str, Callable[..., Dataset]] = {
    "ioi": ioi,
    "pronoun": pronoun,
    "agreement": agreement,
    "facts": facts,
    "facts_fr": facts_fr,
    "two_hop": two_hop,
    "sentiment": sentiment,
    "loan": loan,
    "refusal": refusal,
}


def task(name: str, split: str = "report", n: int = 200, seed: int = 0) -> Dataset:
    """The pairs of a task, by its name.

    Raises:
        UserError: for an unknown task or split, or n below 1.
    """
    if name not in TASKS:
        raise UserError(f"no task is called {name!r}: use one of {', '.join(TASKS)}")
    return TASKS[name](split=split, n=n, seed=seed)
