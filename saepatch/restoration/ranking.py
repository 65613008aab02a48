"""Ranking of latents by how much they carry safety behaviour, from contrasts between a run and its donor.

Both runs read the same completion, teacher-forced: the jailbroken prompt and its clean framing in one model, or base
and aligned model on the same prompt. The change score is that of Chen et al. 2024 ("Finding Safety Neurons in Large
Language Models") applied to latents; attribution is by integrated gradients of the refusal score (Arditi et al. 2024)
from the run to the donor's.
"""

from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal

import torch
from jaxtyping import Bool, Float
from torch import Tensor
from typing_extensions import Unpack

from saepatch.data.batches import PairBatch
from saepatch.data.pairs import PromptPair
from saepatch.dictionaries.dictionary import Dictionary
from saepatch.engine.gradients import Base, IntegratedGradients, Readout
from saepatch.engine.metrics import refusal_score
from saepatch.engine.options import with_keywords
from saepatch.errors import UserError
from saepatch.measure.quality import SpliceQuality
from saepatch.model.hooks import is_spliced
from saepatch.model.language_model import LanguageModel, Tokens
from saepatch.model.sites import Site
from saepatch.restoration.restore import AnswerKeywords, AnswerOptions, shared_quality
from saepatch.splicing.donors import CleanMeans, CleanPrompts, OtherModel
from saepatch.splicing.splice import Dictionaries, by_site

Ranking = Literal["change", "signed", "attribution"]
Scores = Mapping[Site, Float[Tensor, "_"]]


@dataclass(frozen=True, eq=False)
class SafetyLatents:
    """Scores of every latent, by site; `top` shares one budget over all sites.

    Attributes:
        change: `S_j · ‖d_j‖`, with S the root mean square difference between donor and run over positions. Latents of a
            dictionary that normalises its input are multiplied by the scale of their run.
        signed: Mean difference, donor minus run, times `‖d_j‖`.
        attribution: Contribution (nats) to the change of the refusal score after the prompt when the donor's site is
            written; mean over prompts. Empty where no refusal tokens were given.
        positions: Number of positions for `change` and `signed`, at the site with the most; tokens a dictionary was
            not trained on do not count.
        quality: Splice quality of each dictionary in the model and in the donor; empty where they are the same model.
    """

    change: Scores
    signed: Scores
    attribution: Scores
    positions: int
    quality: Mapping[Site, tuple[SpliceQuality, SpliceQuality]] = field(default_factory=dict)

    def top(self, k: int, by: Ranking = "change") -> dict[Site, tuple[int, ...]]:
        """The `k` latents with the highest scores over all sites, in the form for `restore`; only scores above 0.

        Raises:
            UserError: the ranking is unknown or was not computed, or `k` is below 1.
        """
        if by not in ("change", "signed", "attribution"):
            raise UserError(f"unknown ranking {by!r}: use change, signed or attribution")
        scores: Scores = {"change": self.change, "signed": self.signed, "attribution": self.attribution}[by]
        if not scores:
            raise UserError(
                "no attribution was computed: give refusal_ids (see saepatch.restoration.restore.first_tokens)"
            )
        if k < 1:
            raise UserError(f"k = {k}: use at least 1")
        every, start, top = torch.cat(list(scores.values())), 0, {}
        order = every.argsort(descending=True, stable=True)[:k]
        order = order[every[order] > 0]
        for site, own in scores.items():
            end = start + len(own)
            if ids := (order[(order >= start) & (order < end)] - start).tolist():
                top[site] = tuple(ids)
            start = end
        return top


@torch.no_grad()
def find_safety_latents(
    model: LanguageModel,
    dictionaries: Dictionaries,
    prompts: Sequence[str],
    donor: CleanPrompts | OtherModel,
    completions: Sequence[Sequence[int]] | None = None,
    refusal_ids: Collection[int] = (),
    steps: int = 10,
    options: AnswerOptions | None = None,
    **keywords: Unpack[AnswerKeywords],
) -> SafetyLatents:
    """Rank latents by their change between a run and the donor that would restore it.

    Args:
        model: The model to restore: jailbroken, or the base model.
        dictionaries: One, or several at different sites.
        prompts: The model's prompts.
        donor: The clean framing of each prompt, or the aligned model. Its `template` is the number of tokens at the end
            of prompts that count in addition to the completion (`OtherModel` with None: all but BOS).
        completions: Token ids that both runs read after their prompts; None: the donor's own greedy answers.
        refusal_ids: First tokens of refusals, for the attribution; empty: no attribution.
        steps: Interpolation steps of the attribution.
        options: Length of the donor's answers, batch size, and the required fit of dictionaries to two models.
        keywords: Single options, which replace those of `options`.

    Raises:
        UserError: there are no prompts, or not one clean prompt or completion for each, a template is longer than a
            prompt, a model is inside a splice, a dictionary does not fit both models or was trained on none of the
            tokens, or an option is unknown.
    """
    chosen = with_keywords(options or AnswerOptions(), keywords)
    batch_size = chosen.batch_size or 32
    sites = by_site(model, dictionaries)
    other, asked = (donor.model, tuple(prompts)) if isinstance(donor, OtherModel) else (model, donor.prompts)
    _check(model, other, prompts, asked, completions)
    own = completions is None
    texts = other.continue_ids(asked, chosen.max_new_tokens, batch_size) if completions is None else completions
    mine = [[*model.encode(prompt), *text] for prompt, text in zip(prompts, texts, strict=True)]
    theirs = [[*other.encode(prompt), *text] for prompt, text in zip(asked, texts, strict=True)]
    counts = [_count(model, row, len(text), donor.template) for row, text in zip(mine, texts, strict=True)]
    for row, text in zip(theirs, texts, strict=True):
        _count(other, row, len(text), donor.template)
    if not sum(counts):
        empty = "every answer of the donor is" if own else "all completions are"
        raise UserError(f"no position to compare: template is 0 and {empty} empty: use a template of at least 1")
    quality = _quality(model, other, sites, model.pad(mine), chosen.max_fvu) if isinstance(donor, OtherModel) else {}
    squares, sums, n = _differences(model, other, sites, mine, theirs, counts, batch_size)
    norms = {site: dictionary.rows.double().norm(dim=-1).cpu() for site, dictionary in sites.items()}
    return SafetyLatents(
        change={site: ((squares[site] / n[site]).sqrt() * norms[site]).float() for site in sites},
        signed={site: (sums[site] / n[site] * norms[site]).float() for site in sites},
        attribution=(
            _attribution(model, other, sites, prompts, asked, donor.template, refusal_ids, steps, batch_size)
            if refusal_ids
            else {}
        ),
        positions=max(n.values()),
        quality=quality,
    )


@torch.no_grad()
def clean_means(
    model: LanguageModel,
    dictionaries: Dictionaries,
    prompts: Sequence[str],
    template: int | None = 1,
    completions: Sequence[Sequence[int]] | None = None,
    max_new_tokens: int = 24,
    batch_size: int = 32,
) -> CleanMeans:
    """Mean of every latent over the last `template` tokens of clean prompts (None: all but BOS) and their completions.

    Without `completions`, these are the model's own greedy answers.

    Raises:
        UserError: as for `find_safety_latents`.
    """
    sites = by_site(model, dictionaries)
    _check(model, model, prompts, prompts, completions)
    texts = model.continue_ids(prompts, max_new_tokens, batch_size) if completions is None else completions
    rows = [[*model.encode(prompt), *text] for prompt, text in zip(prompts, texts, strict=True)]
    counts = [_count(model, row, len(text), template) for row, text in zip(rows, texts, strict=True)]
    if not sum(counts):
        raise UserError("no position to average: template is 0 and every answer is empty: use a template of at least 1")
    sums = {site: torch.zeros(dictionary.d_sae, dtype=torch.float64) for site, dictionary in sites.items()}
    seen: Counter[Site] = Counter()
    for values, row, n in zip(_rows(model, sites, rows, batch_size), rows, counts, strict=True):
        for site, dictionary in sites.items():
            known = _known(dictionary, model, row, n)
            sums[site] += _tail(dictionary.activations(values[site][None])[0][0], n)[known].sum(0).cpu()
            seen[site] += len(known)
    _check_seen(sites, seen)
    means = {site: (total / seen[site]).to(sites[site].W_dec) for site, total in sums.items()}
    return CleanMeans(means, template)


def _check(
    model: LanguageModel,
    other: LanguageModel,
    prompts: Sequence[str],
    asked: Sequence[str],
    completions: Sequence[Sequence[int]] | None,
) -> None:
    if not prompts:
        raise UserError("there are no prompts: give at least one")
    for what, several in (("clean prompts", asked), ("completions", completions)):
        if several is not None and len(several) != len(prompts):
            raise UserError(f"{len(several)} {what} for {len(prompts)} prompts: give one for each")
    if is_spliced(model.layout) or is_spliced(other.layout):
        raise UserError("contrasts run unedited models, but one is inside a splice: leave the splice first")


def _quality(
    model: LanguageModel, other: LanguageModel, sites: Mapping[Site, Dictionary], tokens: Tokens, max_fvu: float | None
) -> dict[Site, tuple[SpliceQuality, SpliceQuality]]:
    """Check that each dictionary fits both models; empty where no limit is given."""
    for site, dictionary in sites.items():
        dictionary.check(other, site)
    if max_fvu is None:
        return {}
    return {site: shared_quality(model, other, dictionary, tokens, max_fvu) for site, dictionary in sites.items()}


def _count(model: LanguageModel, row: Sequence[int], completion: int, template: int | None) -> int:
    """Number of a row's last positions that count."""
    ordinary = sum(token != model.bos_id for token in row[: len(row) - completion])
    if template is not None and template > ordinary:
        raise UserError(f"template of {template} positions, but a prompt has {ordinary} tokens besides BOS")
    return completion + (ordinary if template is None else template)


def _rows(
    model: LanguageModel, sites: Collection[Site], rows: Sequence[Sequence[int]], batch_size: int
) -> Iterator[dict[Site, Float[Tensor, "pos _"]]]:
    """Values of the sites at each row's tokens, without padding."""
    for start in range(0, len(rows), batch_size):
        part = rows[start : start + batch_size]
        values = model.capture(model.pad(part, "left"), sites)
        for number, row in enumerate(part):
            yield {site: x[number, x.shape[1] - len(row) :] for site, x in values.items()}


def _tail(acts: Float[Tensor, "pos d_sae"], n: int) -> Float[Tensor, "n d_sae"]:
    """Latents of the last `n` positions of a row, in float64 where the device supports it."""
    return _wide(acts[len(acts) - n :])


def _known(dictionary: Dictionary, model: LanguageModel, row: Sequence[int], n: int) -> list[int]:
    """Which of the last `n` tokens of a row the dictionary was trained on."""
    excluded = set(dictionary.excluded_tokens(model))
    return [place for place, token in enumerate(row[len(row) - n :]) if token not in excluded]


def _check_seen(sites: Mapping[Site, Dictionary], seen: Mapping[Site, int]) -> None:
    for site, dictionary in sites.items():
        if not seen[site]:
            raise UserError(
                f"the compared positions hold only tokens that dictionary {dictionary.name} was not trained on: use a "
                "longer template, or load it with every_position=True (--every_position)"
            )


def _wide(x: Tensor) -> Tensor:
    return x.float() if x.device.type == "mps" else x.double()  # mps has no float64


def _differences(
    model: LanguageModel,
    other: LanguageModel,
    sites: Mapping[Site, Dictionary],
    mine: Sequence[Sequence[int]],
    theirs: Sequence[Sequence[int]],
    counts: Sequence[int],
    batch_size: int,
) -> tuple[dict[Site, Tensor], dict[Site, Tensor], Counter[Site]]:
    """Sums over positions of each latent's squared difference, and of its difference, the other's minus the model's.

    Last, the number of these positions, without tokens that the dictionary was not trained on, in either run.
    """
    squares = {site: torch.zeros(dictionary.d_sae, dtype=torch.float64) for site, dictionary in sites.items()}
    sums = {site: torch.zeros_like(total) for site, total in squares.items()}
    seen: Counter[Site] = Counter()
    runs = zip(_rows(model, sites, mine, batch_size), _rows(other, sites, theirs, batch_size), strict=True)
    for (here, there), row, its, n in zip(runs, mine, theirs, counts, strict=True):
        for site, dictionary in sites.items():
            known = sorted({*_known(dictionary, model, row, n)} & {*_known(dictionary, other, its, n)})
            difference = _tail(dictionary.written(there[site][None])[0], n)[known]
            difference = difference - _tail(dictionary.written(here[site][None])[0], n)[known]
            seen[site] += len(known)
            squares[site] += difference.pow(2).sum(0).cpu()
            sums[site] += difference.sum(0).cpu()
    _check_seen(sites, seen)
    return squares, sums, seen


def _attribution(
    model: LanguageModel,
    other: LanguageModel,
    sites: Mapping[Site, Dictionary],
    prompts: Sequence[str],
    asked: Sequence[str],
    template: int | None,
    refusal_ids: Collection[int],
    steps: int,
    batch_size: int,
) -> dict[Site, Float[Tensor, "_"]]:
    """Integrated gradients of the refusal score, from the model's sites to the other run's, over the prompts' ends."""
    totals = {site: torch.zeros(dictionary.d_sae, dtype=torch.float64) for site, dictionary in sites.items()}
    for start in range(0, len(prompts), batch_size):
        part = slice(start, start + batch_size)
        tokens, clean = model.tokenize(prompts[part], "left"), other.tokenize(asked[part], "left")
        values = other.capture(clean, sites)
        first = 0 if template is None else tokens.width - template
        inside = torch.arange(tokens.width, device=model.device) >= first
        where = {site: dictionary.known(model, tokens).ordinary & inside for site, dictionary in sites.items()}
        source = {site: _right_aligned(x, tokens.width) for site, x in values.items()}
        base = Base(model, tokens, list(sites), Readout(refusal_score(refusal_ids), _as_pairs(prompts[part], tokens)))
        gradients = IntegratedGradients(steps).take(base, source, where)
        for site, dictionary in sites.items():
            gradient = gradients.of[site][0]
            totals[site] += _shares(dictionary, gradients.values[site], source[site], gradient, where[site])
    return {site: (total / len(prompts)).float() for site, total in totals.items()}


def _shares(
    dictionary: Dictionary,
    run: Float[Tensor, "batch pos width"],
    source: Float[Tensor, "batch pos width"],
    gradient: Float[Tensor, "batch pos width"],
    where: Bool[Tensor, "batch pos"],
) -> Float[Tensor, "d_sae"]:
    """Each latent's change times the gradient along its row, summed over the chosen positions, example by example."""
    total = torch.zeros(dictionary.d_sae, dtype=torch.float64)
    for row, chosen in enumerate(where):
        change = (dictionary.written(source[row : row + 1]) - dictionary.written(run[row : row + 1]))[0, chosen]
        along = gradient[row, chosen].to(dictionary.dtype) @ dictionary.rows.T
        total += _wide(change * along).sum(0).cpu()
    return total


def _right_aligned(x: Float[Tensor, "batch from width"], columns: int) -> Float[Tensor, "batch to width"]:
    """The last `columns` columns, with zeros in front where there are fewer."""
    missing = columns - x.shape[1]
    return x[:, -missing:] if missing < 0 else torch.cat([x.new_zeros(len(x), missing, x.shape[2]), x], 1)


def _as_pairs(prompts: Sequence[str], tokens: Tokens) -> PairBatch:
    """The prompts as a batch without answers, which the refusal score does not need."""
    none = torch.zeros(len(prompts), dtype=torch.long, device=tokens.input_ids.device)
    pairs = tuple(PromptPair(prompt, prompt, "", "", prompt[:40]) for prompt in prompts)
    return PairBatch(pairs, tokens, tokens, none, none, torch.arange(len(prompts), device=none.device))
