"""Baselines beside latents and means: a probe's direction, a prefix of one token, a fading push; what is predicted."""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor

from saepatch.dictionaries.dictionary import Dictionary
from saepatch.engine.components import Directions
from saepatch.records.statistics import Interval, bootstrap_mean
from saepatch.splicing.splice import whole_prompt
from saepatch.steering.contrasts import output_scores
from saepatch.steering.fluency import continuation_nll
from saepatch.steering.generate import direction_dictionary, with_prefix

from .stages import NEUTRAL, Bench, KnownDictionary, Point, Way, top

PROBE, ONE_TOKEN, FADING = "probe direction", "one-token prefix", "fading top-1"
FADE = 0.1  # of the strength, a generated token
WORDS = 8  # one-token prefixes that are tried
LATENTS = 8  # whose side effects are predicted and measured
PENALTY = 1e-2  # of the probe's squared weights


@torch.no_grad()
def states(bench: Bench, dictionary: Dictionary, texts: Sequence[str]) -> Float[Tensor, "positions width"]:
    """The site's values at the concept's positions."""
    held = []
    for part in bench.model.tokenize(texts).batches(32):
        x = bench.model.capture(part, [dictionary.site])[dictionary.site]
        held.append(x[whole_prompt(bench.model, part).select(bench.concept.positions)])
    return torch.cat(held)


def probe(bench: Bench, dictionary: Dictionary) -> Way:
    """The direction of a logistic regression between states with and without the concept."""
    x = [states(bench, dictionary, texts).double() for texts in (bench.concept.present, bench.concept.absent)]
    direction = logistic_direction(x[0], x[1])
    rows = direction[None].float().to(dictionary.W_dec.device)
    vector = direction_dictionary(Directions(dictionary.site, rows, PROBE), dictionary.W_dec.device)
    ones = torch.ones(1, device=dictionary.W_dec.device)
    return Way(PROBE, vector, ((0,),), ones, bench.concept.positions)


def logistic_direction(
    present: Float[Tensor, "some width"], absent: Float[Tensor, "others width"]
) -> Float[Tensor, "width"]:
    """Unit normal of the plane by which a logistic regression on standardised states separates two sets.

    Both sets count equally, whatever their sizes.
    """
    x = torch.cat([present, absent])
    spread = x.std(0).clamp(min=1e-9)
    z = (x - x.mean(0)) / spread
    signs = torch.cat([torch.ones(len(present)), -torch.ones(len(absent))]).to(z)
    share = torch.cat([torch.full((len(some),), 0.5 / len(some)) for some in (present, absent)]).to(z)
    with torch.enable_grad():
        weights = torch.zeros(z.shape[1] + 1, dtype=z.dtype, device=z.device, requires_grad=True)
        search = torch.optim.LBFGS([weights], max_iter=200, line_search_fn="strong_wolfe")

        def loss() -> Tensor:
            search.zero_grad()
            margin = signs * (z @ weights[:-1] + weights[-1])
            value = (share * torch.nn.functional.softplus(-margin)).sum() + PENALTY * weights[:-1].square().sum()
            value.backward()
            return value

        search.step(loss)
    normal = weights.detach()[:-1] / spread
    return normal / normal.norm()


def fading(bench: Bench, site: KnownDictionary, order: Sequence[int]) -> Way:
    """The first latent, its strength fading over generated tokens, the site's norm kept."""
    return replace(top(bench, site, order, 1), name=FADING, fade=FADE)


def one_token_prefixes(bench: Bench) -> list[str]:
    """Tokens that occur in more texts with the concept than without it, as prefixes that add one token to a prompt."""
    model, prompt = bench.model, bench.prompts("tune")[0]
    counts = Counter[int]()
    for sign, texts in ((1, bench.concept.present), (-1, bench.concept.absent)):
        for text in texts:
            counts.update(dict.fromkeys(set(model.encode(text)), sign))
    prefixes: list[str] = []
    for token, more in counts.most_common():
        if more <= 0 or len(prefixes) == WORDS:
            break
        word = model.continuation([token])
        for prefix in (word, f"{word.strip()} "):
            if len(model.encode(with_prefix(model, prefix, prompt))) == len(model.encode(prompt)) + 1:
                prefixes.append(prefix)
                break
    return prefixes


def best_prefix(bench: Bench, prefixes: Sequence[str]) -> str:
    """The prefix with most success on `tune`; of equal ones, the lowest perplexity."""
    tried = {prefix: bench.prompting("tune", prefix) for prefix in prefixes}
    return max(tried, key=lambda prefix: (tried[prefix].success.value, -tried[prefix].perplexity.value))


@dataclass(frozen=True)
class Prediction:
    """What is known of a latent before it steers, and what it then does on `report` at one and the same norm.

    `output_score` and `kl` (nats per token, at one unit of strength) are of `tune`.
    """

    latent: int
    output_score: float
    kl: float
    success: float
    perplexity: float


def predictions(bench: Bench, site: KnownDictionary, order: Sequence[int], norm: float) -> tuple[Prediction, ...]:
    """The first latents of a ranking, each alone at the same norm."""
    some, unit = list(order[:LATENTS]), site.unit(order[0])
    scores = output_scores(
        bench.model, site.dictionary, some, site.units, bench.concept.tune[:NEUTRAL], 1.5,
        bench.concept.positions,
    )  # fmt: skip
    made = []
    for latent, score in zip(some, scores, strict=True):
        way = replace(top(bench, site, order, 1), name=f"latent {latent}").only((latent,))
        point = bench.at(way, norm, unit, "report", divergence=False)
        kl = bench.divergence(way, unit)
        made.append(Prediction(latent, float(score), kl, point.success.value, point.perplexity.value))
    return tuple(made)


def overall(bench: Bench, point: Point, split: str = "report") -> Interval:
    """Harmonic mean of three scores from 0 to 2 of each continuation, as in AxBench, by measures in place of a judge.

    Concept: 2 where it is shown. Instruction: 2 where the unsteered model finds the continuation likelier after its own
    prompt than after the next one, 0 where less likely. Fluency: twice the ratio of its probability per token to that
    of the unsteered continuation, at most 2.
    """
    prompts, own = bench.prompts(split), bench.unsteered(split).draws[0]
    others = (*prompts[1:], prompts[0])
    each = []
    for draw in point.draws:
        elsewhere = np.array(continuation_nll(bench.model, others, draw["ids"]))
        here, tokens = np.array(draw["nll"]), np.maximum(np.array(draw["tokens"]), 1)
        usual = np.array(own["nll"]) / np.maximum(np.array(own["tokens"]), 1)
        scores = np.stack(
            [
                2.0 * np.array(draw["shown"], float),
                1.0 + np.sign(elsewhere - here),
                2 * np.minimum(1, np.exp(usual - here / tokens)),
            ]
        )
        with np.errstate(divide="ignore"):
            each.append(np.where((scores > 0).all(0), 3 / (1 / scores).sum(0), 0.0))
    return bootstrap_mean(np.mean(each, 0))
