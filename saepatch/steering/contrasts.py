"""Choosing latents for steering: contrasts of two sets of prompts, the output score, and units of strength.

Every contrast gives one score per latent, larger for latents associated with the concept: `contrast` (difference of
means), `auroc_contrast` and `attribution_contrast`. `first_alive` ranks by a score; `refine` keeps latents that also
promote their own tokens.
"""

from collections.abc import Iterable, Sequence

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saepatch.data.texts import CONTEXT, prompt_batches, token_batches
from saepatch.dictionaries.active_values import QUANTILE, ActiveValues, StrengthUnits, check_quantile
from saepatch.dictionaries.dictionary import Dictionary
from saepatch.errors import UserError
from saepatch.measure.quality import LatentStatistics
from saepatch.model.hooks import edit_sites, graph_through
from saepatch.model.inputs.padding import spread
from saepatch.model.language_model import LanguageModel, Tokens
from saepatch.model.lens import stream_directions
from saepatch.model.positions import Positions
from saepatch.model.sites import Site
from saepatch.splicing.splice import record_latents, whole_prompt

AT_ONCE = 64  # latents per pass
SCORED = 1.5  # units of output scores: about the largest activation of latents without outliers
NEUTRAL = ("In my opinion,",)  # the prompt used in the paper that introduced the output score


@torch.no_grad()
def latent_means(
    model: LanguageModel,
    dictionary: Dictionary,
    tokens: Tokens | Sequence[str],
    positions: Positions = "all",
    batch_size: int = 64,
    written: bool = False,
) -> Float[Tensor, "sequences d_sae"]:
    """Mean of each latent over each sequence's chosen positions ("all" excludes BOS and padding).

    With `written`, activations of a dictionary that normalises its input are multiplied by their decoding scale. With
    positions "all", texts that are longer than the model's context, or than 1,024 tokens, are read in several rows.
    Tokens that the dictionary was not trained on (`Dictionary.excluded_tokens`) are left out.

    Raises:
        UserError: positions select such a token explicitly, or, in some row, no other token.
    """
    total = torch.zeros(len(tokens), dictionary.d_sae, dtype=torch.float64)
    count = torch.zeros(len(tokens), dtype=torch.float64)
    for part, numbers in prompt_batches(model, tokens, positions != "all", batch_size, dictionary.d_sae):
        latents = record_latents(model, dictionary, part)
        acts = latents.acts * latents.scale if written and latents.scale is not None else latents.acts
        where = _known(model, dictionary, part, positions)
        total.index_add_(0, numbers, (acts * where[..., None]).sum(1).cpu().double())
        count.index_add_(0, numbers, where.sum(1).cpu().double())
    return (total / count.clamp(min=1)[:, None]).to(dictionary.rows)


def contrast(
    model: LanguageModel,
    dictionary: Dictionary,
    with_concept: Sequence[str],
    without: Sequence[str],
    positions: Positions = "all",
) -> Float[Tensor, "d_sae"]:
    """Difference between the sets of the mean per-sequence latent mean, times the norm of each latent's row.

    The norm makes latents comparable by how much they write, whatever the units of their activations. For the same
    reason, latents of a dictionary that normalises its input are multiplied by their decoding scale.
    """
    _check_sets(with_concept, without)
    means = [
        latent_means(model, dictionary, texts, positions, written=True).mean(0) for texts in (with_concept, without)
    ]
    return (means[0] - means[1]) * dictionary.rows.norm(dim=-1)


@torch.no_grad()
def auroc_contrast(
    model: LanguageModel,
    dictionary: Dictionary,
    with_concept: Sequence[str],
    without: Sequence[str],
    positions: Positions = "all",
    batch_size: int = 32,
) -> Float[Tensor, "d_sae"]:
    """Area under the ROC curve of each latent's maximum over a prompt, as a classifier for the concept.

    The probability that a prompt with the concept has a larger maximum than one without, ties counted as a half: 1 is
    perfect, 0.5 is chance (or a latent that is never active), 0 is perfectly reversed.

    Raises:
        UserError: a set is empty.
    """
    _check_sets(with_concept, without)
    ours, theirs = (_largest(model, dictionary, texts, positions, batch_size) for texts in (with_concept, without))
    ours, theirs = ours.T.contiguous(), theirs.T.sort(-1).values.contiguous()
    below, up_to = (torch.searchsorted(theirs, ours, right=right) for right in (False, True))
    return (below + up_to).float().mean(-1) / (2 * theirs.shape[-1])


def attribution_contrast(
    model: LanguageModel,
    dictionary: Dictionary,
    with_concept: Sequence[str],
    without: Sequence[str],
    positions: Positions = "all",
    batch_size: int = 32,
) -> Float[Tensor, "d_sae"]:
    """Estimated effect of each latent's difference between the sets on moving predictions towards the concept, in nats.

    First order: (mean with the concept − mean without) times the gradient of m along the latent's row, summed over the
    chosen positions and averaged over the prompts without the concept. Means are multiplied by the scale where the
    dictionary normalises its input. `m = Σ_v (P_with(v) − P_without(v)) · logit(v)`, with P the mean next-token
    distribution after each set. A latent associated with the concept but not read downstream scores 0.

    Raises:
        UserError: a set is empty, or the model predicts the same after both.
    """
    _check_sets(with_concept, without)
    ours, theirs = (model.tokenize(texts, side="left") for texts in (with_concept, without))
    means = [latent_means(model, dictionary, tokens, positions, written=True).mean(0) for tokens in (ours, theirs)]
    after = [_next_distribution(model, tokens, batch_size) for tokens in (ours, theirs)]
    toward = after[0] - after[1]
    if not float(toward.abs().sum()) > 1e-6:
        raise UserError("the model predicts the same after prompts with and without the concept: give other prompts")
    total = torch.zeros(dictionary.d_in, dtype=torch.float64)
    for part, _ in prompt_batches(model, theirs, True, batch_size, max(model.vocabulary, model.d_model)):
        where = _known(model, dictionary, part, positions)
        gradient = _gradients(model, dictionary.site, part, toward)
        total += (gradient.float() * where[..., None]).sum((0, 1)).cpu().double()
    along = dictionary.rows.float() @ (total / len(theirs)).float().to(dictionary.rows.device)
    return (means[0] - means[1]).float() * along


def _gradients(
    model: LanguageModel, site: Site, tokens: Tokens, toward: Float[Tensor, "vocab"]
) -> Float[Tensor, "batch pos width"]:
    """`_gradient`, on rows grouped by length where padding changes the model's results."""
    if model.padding.allows(tokens.attention_mask):
        return _gradient(model, site, tokens, toward)
    return spread(tokens, lambda part: {site: _gradient(model, site, part, toward)})[site]


def _gradient(
    model: LanguageModel, site: Site, tokens: Tokens, toward: Float[Tensor, "vocab"]
) -> Float[Tensor, "batch pos width"]:
    """Gradient of the next-token logits along `toward` at the site; tokens are padded on the left."""
    with torch.enable_grad(), graph_through(model.layout, [site]) as emitted:
        logits = model.call(tokens, last=True)[:, -1].float()
        return torch.autograd.grad((logits @ toward.to(logits.device)).sum(), emitted[site])[0]


@torch.no_grad()
def _next_distribution(model: LanguageModel, tokens: Tokens, batch_size: int) -> Float[Tensor, "vocab"]:
    """Mean next-token distribution over prompts."""
    parts = [model.next_logits(part).float().softmax(-1).sum(0) for part in tokens.batches(batch_size)]
    return torch.stack(parts).sum(0) / len(tokens)


def first_alive(scores: Float[Tensor, "d_sae"], statistics: LatentStatistics, k: int) -> list[int]:
    """The `k` latents with the largest scores among those that fire in a corpus; ties by number.

    Raises:
        UserError: fewer than `k` latents fire.
    """
    alive = statistics.alive.to(scores.device)
    if int(alive.sum()) < k:
        raise UserError(f"{k} latents wanted, but only {int(alive.sum())} ever fire in the corpus: ask for fewer")
    scores = torch.where(alive, scores.float(), torch.full_like(scores, -torch.inf, dtype=torch.float32))
    return scores.argsort(descending=True, stable=True)[:k].tolist()


# What a latent writes


@torch.no_grad()
def output_scores(
    model: LanguageModel,
    dictionary: Dictionary,
    latents: Sequence[int],
    units: Float[Tensor, "d_sae"],
    prompts: Sequence[str] = NEUTRAL,
    strength: float = SCORED,
    positions: Positions = "all",
    top: int = 20,
) -> Float[Tensor, "latents"]:
    """Output score of latents: whether adding a latent promotes its own tokens, `(1 − best rank / V) · largest p`.

    A latent's tokens are the `top` of the logit lens of what it adds to the residual stream; their ranks (from 0) and
    probabilities are those of the next token after a neutral prompt with `strength` times the latent's unit added.
    Mean over prompts, between 0 and 1. Latents that only detect their input score low, and steer badly.

    Args:
        units: Activation that one unit of strength means for every latent, as from `latent_statistics(…).unit` (the
            paper: `.maximum`, which massive activations can make meaningless).
        strength: In units; the default is near the largest activation of latents without outliers.
        positions: Positions of the prompt at which the latent is added.

    Raises:
        UserError: a latent is unknown.

    Source: Arad et al. 2025 ("SAEs Are Good for Steering -- If You Select the Right Features").
    """
    dictionary.check(model)
    dictionary.check_ids(tuple(latents))
    ids = torch.tensor(list(latents), dtype=torch.long, device=dictionary.rows.device)
    words = lens_tokens(model, stream_directions(model, dictionary.site, dictionary.rows[ids]), top)
    steps = (strength * units.to(ids.device)[ids])[:, None] * dictionary.rows[ids]
    total = torch.zeros(len(ids), dtype=torch.float64)
    for prompt in prompts:
        tokens = model.tokenize([prompt])
        where = _known(model, dictionary, tokens, positions)[..., None]
        for start in range(0, len(ids), AT_ONCE):
            some = slice(start, start + AT_ONCE)
            rows = tokens.rows([0] * len(ids[some]))

            def add(x: Tensor, step: Tensor = steps[some], where: Tensor = where) -> Tensor:
                moved = step[:, None, :] * where
                if dictionary.normalises:
                    scale = dictionary.activations(x)[1]
                    moved = moved if scale is None else moved * scale
                return x + moved.to(x.dtype)

            with edit_sites(model.layout, {dictionary.site: add}, model.device):
                logits = model.next_logits(rows).float()
            total[some] += _raised(logits, words[some].to(logits.device)).cpu().double()
    return (total / len(prompts)).float()


def _raised(logits: Float[Tensor, "n vocab"], words: Int[Tensor, "n top"]) -> Float[Tensor, "n"]:
    chosen = logits.gather(-1, words)
    best = chosen.amax(-1, keepdim=True)
    rank = (logits > best).sum(-1).float()  # of the best token: number of tokens above it
    return (1 - rank / logits.shape[-1]) * logits.softmax(-1).gather(-1, words).amax(-1)


@torch.no_grad()
def lens_tokens(model: LanguageModel, directions: Float[Tensor, "n width"], top: int = 20) -> Int[Tensor, "n top"]:
    """The tokens whose logits each direction raises most on its direct path: the logit lens of a direction.

    The model itself unembeds the directions: the last block's output is set to the direction, scaled to norm d_model,
    and to 0 for comparison, so that norm, unembedding and soft caps are the model's own.

    Raises:
        UserError: the directions do not have the width of the residual stream.
    """
    if directions.shape[-1] != model.d_model:
        raise UserError(
            f"directions have width {directions.shape[-1]}, but the residual stream has {model.d_model}: convert those "
            "of z or neurons with saepatch.model.lens.stream_directions"
        )
    last = Site(model.n_layers - 1, "resid_post")
    sized = directions.float() / directions.float().norm(dim=-1, keepdim=True).clamp(min=1e-12) * model.d_model
    logits = []
    token = model.bos_id if model.bos_id is not None else 0
    for values in torch.cat([torch.zeros_like(sized[:1]), sized]).split(AT_ONCE):
        rows = model.pad([[token]] * len(values))
        with edit_sites(model.layout, {last: lambda x, values=values: values[:, None].to(x)}):  # type: ignore[misc]
            logits.append(model.call(rows, last=True)[:, -1].float())
    moved = torch.cat(logits)
    return (moved[1:] - moved[:1]).topk(top).indices


def refine(candidates: Sequence[int], scores: Float[Tensor, "candidates"], keep: int) -> list[int]:
    """The `keep` candidates with the largest output scores, in their original order.

    Raises:
        UserError: there are fewer candidates.
    """
    if not 0 < keep <= len(candidates):
        raise UserError(f"{keep} of {len(candidates)} candidates cannot be kept: keep fewer, or give more candidates")
    best = set(scores.argsort(descending=True, stable=True)[:keep].tolist())
    return [latent for place, latent in enumerate(candidates) if place in best]


# Units of steering strength


@torch.no_grad()
def corpus_units(
    model: LanguageModel,
    dictionary: Dictionary,
    texts: Iterable[str],
    latents: Sequence[int] | None = None,
    quantile: float = QUANTILE,
    batch_size: int = 32,
    max_tokens: int = CONTEXT,
) -> StrengthUnits:
    """Units of strength of some or all latents over a corpus, in one pass that streams batches.

    Long texts are read in rows of at most `max_tokens` tokens; BOS and padding do not count. 0 for a latent that never
    fires.

    Args:
        quantile: Share of a latent's positive activations that its unit is not below; 1: the unit is the maximum.

    Raises:
        UserError: there is no text, a latent is unknown, or the quantile is no share.
    """
    dictionary.check(model)
    dictionary.check_ids(tuple(latents or ()))
    check_quantile(quantile)
    few = None if latents is None else dictionary.alone(latents)
    width = dictionary.d_sae if few is None else len(latents or ())
    values, rows = ActiveValues(dictionary.d_sae if latents is None else len(latents)), 0
    for tokens in token_batches(model, texts, batch_size, max(width, model.d_model), max_tokens):
        x = model.capture(tokens, [dictionary.site])[dictionary.site]
        acts = (few or dictionary).activations(x)[0]
        if latents is not None and few is None:
            acts = acts[..., list(latents)]
        values.add(acts[dictionary.known(model, tokens).ordinary])
        rows += len(tokens)
    if not rows:
        raise UserError("the corpus contains no text: give at least one document")
    device = dictionary.W_dec.device
    return StrengthUnits(values.quantile(quantile).to(device), values.maximum.to(device), quantile)


def corpus_maxima(
    model: LanguageModel,
    dictionary: Dictionary,
    texts: Iterable[str],
    latents: Sequence[int] | None = None,
    batch_size: int = 32,
    max_tokens: int = CONTEXT,
) -> Float[Tensor, "latents"]:
    """Largest activation (a_max) of some or all latents over a corpus: `corpus_units(…).maximum`."""
    return corpus_units(model, dictionary, texts, latents, 1.0, batch_size, max_tokens).maximum


def _known(
    model: LanguageModel, dictionary: Dictionary, tokens: Tokens, positions: Positions
) -> Bool[Tensor, "batch pos"]:
    """The chosen positions, without tokens that the dictionary was not trained on."""
    chosen = whole_prompt(model, tokens).select(positions)
    known = dictionary.editable(model, tokens.input_ids, chosen, positions)
    if bool((chosen.any(-1) & ~known.any(-1)).any()):
        raise UserError(
            f"positions {positions!r} select only tokens that dictionary {dictionary.name} was not trained on in some "
            "prompts: leave these out, or load it with every_position=True (--every_position)"
        )
    return known


def _check_sets(with_concept: Sequence[str], without: Sequence[str]) -> None:
    if not with_concept or not without:
        raise UserError("a set of prompts is empty: a contrast needs prompts with and without the concept")


def _largest(
    model: LanguageModel, dictionary: Dictionary, texts: Sequence[str], positions: Positions, batch_size: int
) -> Float[Tensor, "texts d_sae"]:
    """The largest activation of each latent over each text's chosen positions."""
    dictionary.check(model)
    largest = torch.full((len(texts), dictionary.d_sae), -torch.inf, device=dictionary.W_dec.device)
    for part, numbers in prompt_batches(model, texts, positions != "all", batch_size, dictionary.d_sae):
        x = model.capture(part, [dictionary.site])[dictionary.site]
        where = _known(model, dictionary, part, positions)
        acts = dictionary.activations(x)[0].float().masked_fill(~where[..., None], -torch.inf).amax(1)
        for number, row in zip(numbers.tolist(), acts.to(largest.device), strict=True):
            largest[number] = torch.maximum(largest[number], row)
    return largest
