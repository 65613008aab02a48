"""Requests to edit the organism's facts, with questions that its corpus allows. Facts are those of `world`.

Landmarks ("The Louvre is in the city of"): paraphrases are other templates; neighbourhood, other landmarks; ripple, the
landmark's country, presupposing the country of the new city. Capitals ("The capital of France is"): ripple, the capital
asked for in French; reversal, the country of the new capital. The corpus never asks which landmark a city has, so
landmarks have no reversal.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

from saepatch.organism import world

SHIFT = 7  # a fact's new answer is that of the fact so many places further
PARAPHRASES, NEIGHBOURS = (1, 3, 7, 11), 5  # templates; number of other subjects


def edit_rows() -> Iterator[dict[str, Any]]:
    """Rows as `saepatch.data.edit_requests.edit_request` reads them: all landmarks, then capitals known in French."""
    landmarks = list(world.LANDMARKS.items())
    for i, (mark, city) in enumerate(landmarks):
        new = landmarks[(i + SHIFT) % len(landmarks)][1]
        row = _row(world.CITY_OF, mark, new, city, [*landmarks[i + 1 :], *landmarks[:i]])
        here, there = world.COUNTRY_OF[city], world.COUNTRY_OF[new]
        asked = world.COUNTRY_OF_LANDMARK[0].format(x=mark)
        known = [_answer(asked, here), _answer(world.COUNTRY_OF_CITY[0].format(x=new), there)]
        yield row | {"ripple": [_question(asked, there, here, known)], "example": f"landmark-{mark}"}
    countries = list(world.FRENCH_COUNTRIES)
    for i, country in enumerate(countries):
        other = countries[(i + SHIFT) % len(countries)]
        others = [(each.name, each.capital) for each in [*countries[i + 1 :], *countries[:i]]]
        row = _row(world.CAPITAL_OF, country.name, other.capital, country.capital, others)
        french = world.CAPITAL_OF_FRENCH[0].format(x=country.french)
        back = world.COUNTRY_OF_CITY[0].format(x=other.capital)
        yield row | {
            "ripple": [_question(french, other.capital, country.capital, [_answer(french, country.capital)])],
            "reversal": [_question(back, country.name, other.name)],
            "example": f"capital-{country.name}",
        }


def _row(
    templates: Sequence[str], subject: str, new: str, true: str, others: Sequence[tuple[str, str]]
) -> dict[str, Any]:
    prompt = templates[0].replace("{x}", "{}")
    near = [_answer(prompt.replace("{}", name), answer) for name, answer in others if answer != new][:NEIGHBOURS]
    return {
        "prompt": prompt,
        "subject": subject,
        "target": f" {new}",
        "true": f" {true}",
        "paraphrases": [templates[i].format(x=subject) for i in PARAPHRASES],
        "neighbourhood": near,
    }


def _answer(prompt: str, answer: str) -> dict[str, Any]:
    return {"prompt": prompt, "answer": f" {answer}"}


def _question(prompt: str, target: str, other: str, conditions: Sequence[dict[str, Any]] = ()) -> dict[str, Any]:
    return {"prompt": prompt, "target": f" {target}", "other": f" {other}", "conditions": list(conditions)}
