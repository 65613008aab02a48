"""Questions of two hops whose hops a model knows, and prompts of each hop alone."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch

from saepatch.data.batches import answer_token
from saepatch.errors import UserError
from saepatch.model.language_model import LanguageModel
from saepatch.model.positions import At
from saepatch.organism import world
from saepatch.reading.cosine_lens import Mention
from saepatch.reading.cross_patch import TwoHop
from saepatch.splicing.splice import whole_prompt

from .facts import COUNTRY_OF, FIRST_HOP, RELATIONS, SUBJECTS

SPLITS = ("select", "report")
FEWEST = 6  # questions of a split
BATCH = 32


@dataclass(frozen=True)
class TwoHopQuestion:
    """A question of two hops and whether its answer was learnt as one fact ("recalled") or has to be composed."""

    hops: TwoHop
    recalled: bool = False


@dataclass(frozen=True)
class QuestionSet:
    """Questions by split, of which a model knows both hops, and what was left out.

    `first` has prompts of the first hop by subject, `second` prompts of the second hop, in which the bridge is
    mentioned; `known` the answers by relation and bridge. `answered` has, by bridge, prompts of which it is the answer,
    about other subjects than those of `report`.
    """

    questions: Mapping[str, tuple[TwoHopQuestion, ...]]
    first: Mapping[str, tuple[str, ...]]
    second: tuple[TwoHop, ...]
    known: Mapping[tuple[str, str], str]
    left_out: Mapping[str, int]
    answered: Mapping[str, tuple[str, ...]]

    def hops(self, split: str, recalled: bool = False) -> list[TwoHop]:
        return [question.hops for question in self.questions[split] if question.recalled == recalled]

    @property
    def answers(self) -> tuple[str, ...]:
        return tuple(dict.fromkeys(self.known.values()))

    def mentions(self) -> dict[str, list[Mention]]:
        """Prompts that mention a bridge, read at its last token: at least two for each."""
        by_bridge: dict[str, list[Mention]] = {}
        for hops in self.second:
            by_bridge.setdefault(hops.bridge, []).append(Mention(hops.prompt, hops.at))
        return {bridge: some for bridge, some in by_bridge.items() if len(some) > 1}

    def as_answers(self) -> dict[str, list[Mention]]:
        """Prompts that a bridge answers, read at the last token: at least two for each."""
        return {name: [Mention(prompt) for prompt in some] for name, some in self.answered.items() if len(some) > 1}


def last_of(model: LanguageModel, prompt: str, text: str) -> int:
    """The index of a text's last token in a prompt."""
    chosen = whole_prompt(model, model.tokenize([prompt])).select(At(text))[0].nonzero().flatten()
    return int(chosen[-1])


@torch.no_grad()
def likeliest(model: LanguageModel, prompts: Sequence[str]) -> list[int]:
    """The likeliest next token of each prompt."""
    out: list[int] = []
    for start in range(0, len(prompts), BATCH):
        out += model.next_logits(model.tokenize(prompts[start : start + BATCH], "left")).argmax(-1).tolist()
    return out


def right(model: LanguageModel, asked: Sequence[tuple[str, str]]) -> list[bool]:
    """Whether the likeliest token after each prompt is its answer (with its leading space), of one token."""

    def token(prompt: str, answer: str) -> int:
        try:
            return answer_token(model, prompt, model.encode(prompt), answer)
        except UserError:
            return -1

    given = likeliest(model, [prompt for prompt, _ in asked])
    return [token(*each) == own for each, own in zip(asked, given, strict=True)]


def organism_questions(model: LanguageModel) -> QuestionSet:
    """Landmark → city → country; splits share no template, and the questions to be composed have no other country."""
    countries = {country.capital: f" {country.name}" for country in world.COUNTRIES}
    made: dict[str, list[TwoHopQuestion]] = {split: [] for split in SPLITS}
    for number, template in enumerate(world.COUNTRY_OF_LANDMARK):
        for landmark, city in world.LANDMARKS.items():
            prompt, recalled = template.format(x=landmark), landmark in world.TWO_HOP_TAUGHT
            at = last_of(model, prompt, landmark)
            hops = TwoHop(prompt, landmark, city, "country", countries[city], at)
            if not recalled or landmark in world.held_out(world.TWO_HOP_TAUGHT, number):
                split = "report" if world.owner(number) == "report" else "select"
                made[split].append(TwoHopQuestion(hops, recalled))
    first = {mark: tuple(template.format(x=mark) for template in world.CITY_OF[::3]) for mark in world.LANDMARKS}
    second = [
        TwoHop(prompt, city, city, "country", countries[city], last_of(model, prompt, city))
        for city in countries
        for prompt in (template.format(x=city) for template in world.COUNTRY_OF_CITY)
    ]
    capitals = {
        city: tuple(template.format(x=name.strip()) for template in world.CAPITAL_OF[::3])
        for city, name in countries.items()
    }
    return _known(model, made, first, second, capitals)


def written_questions(model: LanguageModel) -> QuestionSet:
    """Subject → country → something of it, from `facts`; splits share no subject."""
    made: dict[str, list[TwoHopQuestion]] = {split: [] for split in SPLITS}
    first: dict[str, tuple[str, ...]] = {}
    for kind, by_country in SUBJECTS.items():
        for country, subjects in by_country.items():
            for number, subject in enumerate(subjects):
                first[subject] = tuple(template.format(x=subject) for template in FIRST_HOP[kind])
                for relation, (template, answers) in RELATIONS.items():
                    if country in answers:
                        prompt = template.format(x=COUNTRY_OF[kind].format(x=subject))
                        at = last_of(model, prompt, subject)
                        hops = TwoHop(prompt, subject, country, relation, f" {answers[country]}", at)
                        made[SPLITS[number % 2]].append(TwoHopQuestion(hops))
    second = [
        TwoHop(prompt, country, country, relation, f" {answer}", last_of(model, prompt, country))
        for relation, (template, answers) in RELATIONS.items()
        for country, answer in answers.items()
        for prompt in (template.format(x=country),)
    ]
    return _known(model, made, first, second, {})


def _known(
    model: LanguageModel,
    made: Mapping[str, Sequence[TwoHopQuestion]],
    first: Mapping[str, tuple[str, ...]],
    second: Sequence[TwoHop],
    answered: dict[str, tuple[str, ...]],
) -> QuestionSet:
    """Keep what the model knows: each hop alone, asked without the other.

    Where no prompts that a bridge answers are given, they are those of the first hop for the subjects of `select`.

    Raises:
        UserError: fewer than `FEWEST` questions of a split are left.
    """
    bridges = {question.hops.subject: question.hops.bridge for some in made.values() for question in some}
    asked = [(prompt, f" {bridges[name]}") for name, some in first.items() if name in bridges for prompt in some]
    knows = {prompt for (prompt, _), yes in zip(asked, right(model, asked), strict=True) if yes}
    first_hops = {subject: tuple(prompt for prompt in some if prompt in knows) for subject, some in first.items()}
    yes_second = right(model, [(hops.prompt, hops.answer) for hops in second])
    second_hops = tuple(hops for hops, yes in zip(second, yes_second, strict=True) if yes)
    known = {(hops.relation, hops.bridge): hops.answer for hops in second_hops}
    left_out = {"first hop not known": 0, "second hop not known": 0}
    kept: dict[str, tuple[TwoHopQuestion, ...]] = {}
    for split, questions in made.items():
        mine = []
        for question in questions:
            if not first_hops[question.hops.subject]:
                left_out["first hop not known"] += 1
            elif (question.hops.relation, question.hops.bridge) not in known:
                left_out["second hop not known"] += 1
            else:
                mine.append(question)
        kept[split] = tuple(mine)
        if len(mine) < FEWEST:
            raise UserError(
                f"{model.name} knows both hops of {len(mine)} {split} questions, fewer than {FEWEST}: use a model that "
                "knows more"
            )
    if not answered:
        of_select = {question.hops.subject: question.hops.bridge for question in kept["select"]}
        for subject, bridge in of_select.items():
            answered[bridge] = (*answered.get(bridge, ()), *first_hops[subject])
    return QuestionSet(kept, first_hops, second_hops, known, left_out, answered)
