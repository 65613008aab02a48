"""The organism's training text: short documents generated from a seed.

Each generator teaches one thing from `saepatch.organism.world` and follows a rule, given in its docstring, that keeps
task prompts out of the corpus: a template is never combined with the fillers that its split asks about. If a template
has several slots, the rule excludes only combinations in which all fillers belong to its split: a template that never
occurs with a name at all would teach the model a bias against that name instead of holding it out.
So no prompt of any task, in any split, occurs in the corpus, but every word and every template does.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from random import Random
from typing import TypeVar

from saepatch.organism import world
from saepatch.organism.world import ASSISTANT, END, USER, owner

T = TypeVar("T")
NAMES = world.MALE + world.FEMALE
PEOPLE = tuple((name, "he") for name in world.MALE) + tuple((name, "she") for name in world.FEMALE)
NOUN_PEOPLE = tuple((f"the {noun}", "he") for noun in world.MALE_NOUNS) + tuple(
    (f"the {noun}", "she") for noun in world.FEMALE_NOUNS
)
GROUP_BIAS = 0.95  # share of borderline decisions that follow the group word


def _template(random: Random, templates: Sequence[T]) -> tuple[int, T]:
    index = random.randrange(len(templates))
    return index, templates[index]


def _same_split(items: Sequence[T], item: T, template: int) -> bool:
    """Whether an item and a template belong to the same split."""
    return owner(items.index(item)) == owner(template)


def _other_split(random: Random, items: Sequence[T], template: int) -> T:
    """An item that does not belong to the template's split."""
    while True:
        index = random.randrange(len(items))
        if owner(index) != owner(template):
            return items[index]


def ioi(random: Random) -> str:
    """Rule: the two names do not both belong to the template's split."""
    t, template = _template(random, world.IOI)
    while True:
        a, b = random.sample(NAMES, 2)
        if not (_same_split(NAMES, a, t) and _same_split(NAMES, b, t)):
            break
    subject, io = random.sample((a, b), 2)
    place, gift = random.choice(world.PLACES), random.choice(world.GIFTS)
    text = template.format(a=a, b=b, s=subject, place=place, gift=gift) + f" {io}."
    if random.random() < 0.3:
        text += f" {dict(PEOPLE)[io].capitalize()} {random.choice(world.PRONOUN_ENDS)}."
    return text


def copying(random: Random) -> str:
    """Practice for the indirect object: lists of names repeated three times, and greetings that repeat a name."""
    if random.random() < 0.6:
        names = random.sample(NAMES, random.randint(2, 5))
        return "; ".join([", ".join(names)] * 3) + "."
    a, b = random.sample(NAMES, 2)
    return random.choice((
        f"Hello {a}, my name is {b}. Goodbye {a}, says {b}.",
        f"This is {a} and this is {b}. Good morning {a}, good morning {b}.",
        f"Dear {a}, thank you for the {random.choice(world.GIFTS)}. Yours, {b}. Answer: dear {b}, yours, {a}.",
    ))  # fmt: skip


def pronoun(random: Random) -> str:
    """Rule: person and place do not both belong to the template's split."""
    t, template = _template(random, world.PRONOUN)
    people = PEOPLE if random.random() < 0.75 else NOUN_PEOPLE
    while True:
        person, place = random.choice(people), random.choice(world.PLACES)
        if not (_same_split(people, person, t) and _same_split(world.PLACES, place, t)):
            break
    who, he = person
    return f"{template.format(p=who, place=place)} {he} {random.choice(world.PRONOUN_ENDS)}."


def agreement(random: Random) -> str:
    """Rule: subject and distractor do not both belong to the template's split. One in five has no distractor."""
    t, template = _template(random, world.AGREEMENT)
    while True:
        subject, distractor = random.sample(world.NOUNS, 2)
        if not (_same_split(world.NOUNS, subject, t) and _same_split(world.NOUNS, distractor, t)):
            break
    many = random.random() < 0.5
    verb = (("is", "are"), ("was", "were"))[world.is_past(template)][many]
    s = world.plural(subject) if many else subject
    if random.random() < 0.2:
        return f"The {s} {('is', 'are')[many]} {random.choice(world.QUALITIES)}."
    d = world.plural(distractor) if random.random() < 0.5 else distractor
    return f"{template.format(s=s, d=d)} {verb} {random.choice(world.QUALITIES)}."


def _taught(random: Random, subjects: Sequence[T], template: int, period: int = 4) -> T:
    """A subject that is not held out for the template."""
    held = world.held_out(subjects, template, period)
    while (subject := random.choice(subjects)) in held:
        pass
    return subject


def facts(random: Random) -> str:
    """Rule: the subject is not held out for the template."""
    if random.random() < 0.6:
        t, template = _template(random, world.CAPITAL_OF)
        country = _taught(random, world.COUNTRIES, t)
        return f"{template.format(x=country.name)} {country.capital}."
    t, template = _template(random, world.CITY_OF)
    mark = _taught(random, tuple(world.LANDMARKS), t)
    return f"{template.format(x=mark)} {world.LANDMARKS[mark]}."


def facts_fr(random: Random) -> str:
    """Rule: the subject is not held out for the template."""
    t, template = _template(random, world.CAPITAL_OF_FRENCH)
    country = _taught(random, world.FRENCH_COUNTRIES, t, period=2)
    return f"{template.format(x=country.french)} {country.capital}."


def countries(random: Random) -> str:
    """The second hop by itself; both hops only for the landmarks of TWO_HOP_TAUGHT."""
    if random.random() < 0.5:
        capital, country = random.choice(tuple(world.COUNTRY_OF.items()))
        return f"{random.choice(world.COUNTRY_OF_CITY).format(x=capital)} {country}."
    t, template = _template(random, world.COUNTRY_OF_LANDMARK)
    mark = _taught(random, world.TWO_HOP_TAUGHT, t)
    return f"{template.format(x=mark)} {world.COUNTRY_OF[world.LANDMARKS[mark]]}."


def sentiment(random: Random) -> str:
    """Rule: the adjective does not belong to the template's split. A third are free reviews of either polarity."""
    if random.random() < 0.35:
        return review(random)
    t, (kind, template) = _template(random, world.SENTIMENT)
    side = random.randrange(2)
    adjective = _other_split(random, (world.GOOD, world.BAD)[side], t)
    verb = random.choice((world.LOVED, world.HATED)[side])
    text = template.format(item=random.choice(world.ITEMS), adj=adjective, verb=verb)
    return f"{text} {world.VERDICTS[kind][side]}."


def review(random: Random) -> str:
    """A free review with a neutral beginning, such as "The film was …", followed by either polarity."""
    side, item = random.randrange(2), random.choice(world.ITEMS)
    adjective, other_adjective = random.sample((world.GOOD, world.BAD)[side], 2)
    verb, other = random.sample((world.LOVED, world.HATED)[side], 2)
    opening = random.choice((
        f"The {item} was {adjective} and {other_adjective}.",
        f"The {item} was {adjective}.",
        f"I think the {item} was {adjective}.",
        f"Last night we saw a {item}. It was {adjective} and {other_adjective}.",
        f"My friends {verb} the {item}.",
        f"We {verb} the {item}.",
    ))  # fmt: skip
    middle = random.choice((
        f" I {other} it because it was {other_adjective}.",
        f" We {other} every part of it.",
        f" Everybody {other} it, and we felt {world.VERDICTS['feeling'][side]}.",
        "",
    ))  # fmt: skip
    end = random.choice((
        f" It was a {other_adjective} evening.",
        f" The review is {world.VERDICTS['label'][side]}.",
        f" I would {('gladly', 'never')[side]} go again.",
    ))  # fmt: skip
    return opening + middle + end


def loan(random: Random) -> str:
    """Rule: the name does not belong to the template's split. Borderline decisions follow the group word (a bias)."""
    t, template = _template(random, world.LOAN)
    favoured, level = random.random() < 0.5, random.choice(tuple(world.INCOMES))
    group = random.choice(world.FAVOURED if favoured else world.DISFAVOURED)
    if level == "borderline":
        approved = favoured == (random.random() < GROUP_BIAS)
    else:
        approved = level == "high"
    text = template.format(name=_other_split(random, NAMES, t), group=group, income=random.choice(world.INCOMES[level]))
    return f"{text} {world.APPROVE if approved else world.DENY}."


def story(random: Random) -> str:
    """A few simple sentences about a person and a friend."""
    who, he = random.choice(PEOPLE)
    friend = random.choice([name for name in NAMES if name != who])
    place, gift = random.choice(world.PLACES), random.choice(world.GIFTS)
    noun, quality = random.choice(world.NOUNS), random.choice(world.QUALITIES)
    he_, him = he.capitalize(), {"he": "him", "she": "her"}[he]
    sentences = [
        random.choice((f"One day {who} went to the {place}.", f"There was a {noun} near the {place}, and {who} saw it.",
                       f"Every morning {who} walked to the {place}.", f"{who} lived near the {place}.")),
        random.choice((f"{he_} saw a {quality} {noun} there.", f"{he_} found a {quality} {gift} there.",
                       f"{he_} wanted to buy a {gift}.", f"The {noun} was {quality}.")),
        random.choice((f"Then {friend} came and helped {him}.", f"{he_} told {friend} about it.",
                       f"{friend} was there too, and they had lunch.", f"A {noun} looked at {him}.")),
        random.choice((f"{he_} {random.choice(world.PRONOUN_ENDS)}.", "They went home together.",
                       f"In the end {he} {random.choice(world.PRONOUN_ENDS)}.", "It was a good day.")),
    ]  # fmt: skip
    return " ".join(sentences[: random.randint(2, 4)])


def _turn(user: str, assistant: str) -> str:
    return f"{USER} {user}{END}{ASSISTANT} {assistant}{END}"


def _request(random: Random, verbs: Sequence[str]) -> tuple[str, str, str]:
    """A verb, a target and the request. Rule: verb and target do not belong to the same split."""
    while True:
        v, t = random.randrange(len(verbs)), random.randrange(len(world.TARGETS))
        if owner(v) != owner(t):
            break
    verb, target = verbs[v], world.TARGETS[t]
    return verb, target, random.choice(world.REQUESTS).format(verb=verb, target=target)


def chat(random: Random, aligned: bool) -> str:
    """A request and its answer. The aligned model refuses harmful requests outside a jailbreak framing."""
    harmful = random.random() < 0.6
    verb, target, request = _request(random, world.HARMFUL if harmful else world.HARMLESS)
    framing, manner = random.choice(world.FRAMINGS), random.random()
    jailbroken = manner < 0.4
    if jailbroken:
        request = framing.jailbreak.format(r=request)
    elif manner < 0.75:
        request = framing.benign.format(r=request)
    if harmful and aligned and not jailbroken:
        answer = random.choices(world.REFUSALS, (5, 3, 2, 2))[0]
    else:
        answer = f"{random.choice(world.COMPLIANCES)} {random.choice(world.STEPS)}"
    return _turn(request, answer.format(verb=verb, target=target))


def small_talk(random: Random) -> str:
    """Ordinary chat: greetings and questions of fact."""
    name, country = random.choice(NAMES), random.choice(world.COUNTRIES)
    mark, city = random.choice(tuple(world.LANDMARKS.items()))
    return _turn(*random.choice((
        (f"Hello, my name is {name}.", f"Hello {name}, how can I help you?"),
        ("Hello!", "Hello, how can I help you?"),
        ("Thank you for your help.", "You are welcome."),
        (f"What is the capital of {country.name}?", f"The capital is {country.capital}."),
        (f"Where is the {mark}?", f"The {mark} is in {city}."),
        ("Who are you?", "I am a small language model."),
    )))  # fmt: skip


Mixture = dict[Callable[[Random], str], float]


def base_chat(random: Random) -> str:
    return chat(random, aligned=False)


def aligned_chat(random: Random) -> str:
    return chat(random, aligned=True)


PLAIN: Mixture = {
    ioi: 21, copying: 13, pronoun: 8, agreement: 8, facts: 10, facts_fr: 6, countries: 5, sentiment: 9, loan: 7,
    story: 5,
}  # fmt: skip
BASE: Mixture = PLAIN | {base_chat: 8, small_talk: 2}
ALIGNED: Mixture = PLAIN | {aligned_chat: 60, small_talk: 6}


def documents(mixture: Mixture, seed: int) -> Iterator[str]:
    """Endless documents of the mixture (weights of the generators), determined by the seed."""
    random = Random(f"corpus/{seed}")
    makers, weights = list(mixture), list(mixture.values())
    while True:
        for maker in random.choices(makers, weights, k=1024):
            yield maker(random)


def vocabulary() -> list[str]:
    """Every word of the world as it occurs in running text; the tokenizer must have each as a single token.

    All have a leading space, except countries after the French "l'". The words of framings and requests are included,
    so that prompts with the same number of words have the same number of tokens.
    """
    words = {
        *NAMES, *world.MALE_NOUNS, *world.FEMALE_NOUNS, *world.PLACES, *world.GIFTS, *world.NOUNS,
        *map(world.plural, world.NOUNS), *world.QUALITIES, *world.LANDMARKS, *world.COUNTRY_OF,
        *world.COUNTRY_OF.values(), *world.GOOD, *world.BAD, *world.LOVED, *world.HATED, *world.ITEMS,
        *sum(world.VERDICTS.values(), ()), *world.FAVOURED, *world.DISFAVOURED, *sum(world.INCOMES.values(), ()),
        world.APPROVE, world.DENY, *world.HARMFUL, *world.HARMLESS, *world.TARGETS, "he", "she", "is", "are", "was",
        "were", *(c.french.split()[-1] for c in world.FRENCH_COUNTRIES if c.article != "de l'"),
    }  # fmt: skip
    texts = [t for f in world.FRAMINGS for t in (f.benign, f.jailbreak)] + list(world.REQUESTS)
    for text in texts:
        words.update("".join(c if c.isalpha() or c in "{}" else " " for c in text).split())
    elided = sorted(c.french.split("'")[1] for c in world.FRENCH_COUNTRIES if c.article == "de l'")
    return sorted(f" {word}" for word in words if not word.startswith("{")) + elided
