"""`saepatch latent`: one latent's card in the terminal."""

from collections.abc import Iterator
from pathlib import Path

from saepatch import organism
from saepatch.config import LatentConfig
from saepatch.dictionaries import load_sae
from saepatch.errors import UserError
from saepatch.models import load_model
from saepatch.reading import Card, read_latents
from saepatch.report import token_text
from saepatch.report.text import number

BLOCKS = " ▁▂▃▄▅▆▇█"


def read_latent(config: LatentConfig) -> Card:
    """Load the model and the dictionary, and read the latent on the texts.

    Raises:
        UserError: one of them cannot be read, or they do not fit.
    """
    site, _, name = config.latent.partition(":")
    texts = _texts(config.data) if config.data else organism.texts()
    model = load_model(
        config.model, config.device, config.dtype, config.prepend_bos, trust_remote_code=config.trust_remote_code
    )
    dictionary = load_sae(config.sae, site, config.device)
    return read_latents(model, dictionary, [int(name)], model.tokenize(texts))[0]


def _texts(data: str) -> list[str]:
    try:
        found = [line for line in Path(data).read_text(encoding="utf-8").splitlines() if line.strip()]
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"cannot read texts from {data!r} ({error}): give a text file, a text a line") from error
    if not found:
        raise UserError(f"{data!r} holds no text: give a text file, a text a line")
    return found


def latent_lines(card: Card) -> Iterator[str]:
    """A card as lines of text."""
    yield f"latent {card.latent} at {card.site} of {card.dictionary} ({card.dictionary_hash})"
    yield (
        f"fires at {number(card.frequency, '.2%')} of {card.tokens:,} tokens in {card.texts:,} texts, mean "
        f"{number(card.mean_active)} where it does, at most {number(card.maximum)}; length {number(card.norm)}"
    )
    if card.counts:
        top = max(card.counts)
        bars = "".join(BLOCKS[-(-8 * count // top)] for count in card.counts)
        yield f"histogram  {number(card.edges[0])} {bars} {number(card.edges[-1])}"
    for name, tokens in (("raises", card.raises), ("lowers", card.lowers)):
        if tokens:
            yield f"{name:<10} " + "  ".join(f"{token_text(token)} {number(value, '.2f')}" for token, value in tokens)
    yield "neighbours " + "  ".join(f"{latent} {number(cosine, '.2f')}" for latent, cosine in card.neighbours)
    if card.neuronpedia:
        yield f"see        https://www.neuronpedia.org/{card.neuronpedia}/{card.latent}"
    yield "examples   [where it fires, the largest in double brackets]" if card.examples else "examples   none"
    for example in card.examples:
        peak = example.acts.index(max(example.acts))
        shown = (_marked(token, act, at == peak) for at, (token, act) in enumerate(zip(example.tokens, example.acts)))
        yield f"  {number(max(example.acts)):>8}  " + "".join(shown)


def _marked(token: str, act: float, peak: bool) -> str:
    text = token_text(token).replace("␣", " ")
    return f"[[{text}]]" if peak else f"[{text}]" if act else text
