"""Concepts to steer the embedded model towards: refusal, sentiment, French. Splits are kept apart as in its tasks."""

import re
from collections.abc import Mapping, Sequence

from saepatch.model.language_model import LanguageModel
from saepatch.organism import tasks, world
from saepatch.organism.world import END, SPLITS, Split, owner, share
from saepatch.restoration.restore import judge
from saepatch.steering.degenerate import is_degenerate
from saepatch.steering.generate import Concept

NEW_TOKENS = 24
OPENINGS = ("The {item} was", "The {item} seemed", "I think the {item} was", "We saw the {item}. It was",
            "People say the {item} was", "Today the {item} was")  # fmt: skip


def refusal(n: int, seed: int = 0, tune: int = 12, report: int = 36) -> Concept:
    """Refusal of harmless requests. Latents act at the last token of the prompt, where the model decides.

    Args:
        n: Maximal number of requests of either kind on which latents are chosen.
        tune: Maximal number of requests on which strengths are chosen.
        report: Maximal number of requests that figures are computed on.
    """
    requests = {split: tasks.refusal(split, 3 * n, seed) for split in SPLITS}
    plain = {
        (split, harmful): tuple(dict.fromkeys(r["plain"] for r in rows if r["harmful"] == harmful))[:n]
        for split, rows in requests.items()
        for harmful in (True, False)
    }
    refused = [text.removeprefix(_bos(text)) for text in plain["select", True][:3]]
    return Concept(
        "refusal",
        present=plain["select", True],
        absent=plain["select", False],
        tune=plain["tune", False][:tune],
        report=plain["report", False][:report],
        shown=lambda text: judge(text) == "refuse",
        positions="last",
        prefixes=tuple(f"{text} {world.REFUSALS[0]}{END}" for text in refused),
    )


def _bos(text: str) -> str:
    return text[: text.index("|>") + 2]


def sentiment(
    model: LanguageModel, n: int, seed: int = 0, frames: Sequence[str] = ("The {item} was", "The {item} seemed")
) -> Concept:
    """The polarity that is rarer in the model's own reviews on `tune`: towards the other, there is little to steer.

    Args:
        n: Maximal number of reviews on which latents are chosen.
        frames: Beginnings of the reviews to continue; filled with each of the split's items, they are its prompts.
    """
    reviews: dict[str, list[str]] = {"good": [], "bad": []}
    for row in tasks.sentiment("select", n, seed):
        other = "bad" if row["polarity"] == "good" else "good"
        reviews[row["polarity"]].append(row["clean"])
        reviews[other].append(row["corrupted"])
    openings = {
        split: tuple(frame.format(item=item) for item in share(world.ITEMS, split) for frame in frames)
        for split in SPLITS
    }
    written = model.generate(openings["tune"], NEW_TOKENS)
    target = min(("good", "bad"), key=lambda polarity: sum(shows_polarity(polarity, text) for text in written))
    good, bad = (share(words, "select")[0] for words in (world.GOOD, world.BAD))
    prefix = {"good": f"It was {good} and we loved it. ", "bad": f"It was {bad} and we hated it. "}[target]
    return Concept(
        {"good": "positive sentiment", "bad": "negative sentiment"}[target],
        present=tuple(reviews[target]),
        absent=tuple(reviews["bad" if target == "good" else "good"]),
        tune=openings["tune"],
        report=openings["report"],
        shown=lambda text: shows_polarity(target, text),
        prefixes=tuple(f"The {item} is over. {prefix}" for item in share(world.ITEMS, "select")[:3]),
    )


WORDS: Mapping[str, frozenset[str]] = {
    "good": frozenset({*world.GOOD, *world.LOVED}),
    "bad": frozenset({*world.BAD, *world.HATED}),
}


def shows_polarity(polarity: str, text: str) -> bool:
    """Whether a text has words of the polarity, none of the opposite one, and is not degenerate."""
    words = set(re.findall(r"\w+", text.lower()))
    opposite = "bad" if polarity == "good" else "good"
    return bool(words & WORDS[polarity]) and not words & WORDS[opposite] and not is_degenerate(text)


def french(n: int, seed: int = 0) -> Concept:
    """Continuing in French after an English opening."""
    openings = {split: _openings(split) for split in SPLITS}
    rows = tasks.facts_fr("select", n, seed)
    sentences = [f"{row['clean']}{row['answer']}. " for row in rows]
    return Concept(
        "French",
        present=tuple(dict.fromkeys(row["clean"] for row in rows)),
        absent=tuple(dict.fromkeys(row["clean"] for row in tasks.facts("select", n, seed))),
        tune=openings["tune"],
        report=openings["report"],
        shown=is_french,
        prefixes=tuple(dict.fromkeys(sentences))[:3],
    )


def _openings(split: Split) -> tuple[str, ...]:
    """The first two words of the split's English templates."""
    families: list[tuple[str, ...]] = [world.IOI, world.PRONOUN, world.AGREEMENT, world.CAPITAL_OF, world.CITY_OF]
    families += [world.COUNTRY_OF_LANDMARK, tuple(text for _, text in world.SENTIMENT), world.LOAN]
    openings = {
        " ".join(words[:2]): None
        for family in families
        for place, template in enumerate(family)
        if owner(place) == split and len(words := template.split("{")[0].split()) >= 2
    }
    return tuple(openings)


NAMES = frozenset(name.lower() for country in world.COUNTRIES for name in (country.name, country.capital))
FRENCH_WORDS = frozenset(
    word
    for text in (*world.CAPITAL_OF_FRENCH, *(country.french for country in world.FRENCH_COUNTRIES))
    for word in re.findall(r"[^\W\d_]+", text.replace("{x}", " ").lower())
)


def is_french(text: str) -> bool:
    """Whether at least three words, and more than half, are French; names shared by both languages do not count."""
    words = [word for word in re.findall(r"[^\W\d_]+", text.lower()) if word not in NAMES]
    n_french = sum(word in FRENCH_WORDS for word in words)
    return n_french >= 3 and 2 * n_french > len(words) and not is_degenerate(text)


def organism_concepts(model: LanguageModel, n: int, seed: int = 0) -> list[Concept]:
    """All three concepts, latents chosen on at most `n` prompts with and `n` without the concept."""
    return [refusal(n, seed, tune=24, report=48), sentiment(model, n, seed, OPENINGS), french(n, seed)]
