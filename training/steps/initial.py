"""Dictionaries to begin with in place of random ones: those of a finished run, or anybody's."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float
from torch import Tensor

from saepatch.dictionaries.dictionary import Dictionary
from saepatch.dictionaries.loading import load_saes
from saepatch.errors import UserError
from saepatch.model.language_model import LanguageModel
from saepatch.model.sites import Site

from ..config import TrainingConfig
from .learner import DESIGNS, Learner, scale_for

Initial = Mapping[Site, Dictionary]


def initial_dictionaries(model: LanguageModel, sites: Sequence[Site], config: TrainingConfig) -> dict[Site, Dictionary]:
    """The dictionary of `config.initial` for each site; empty where it is not set.

    Raises:
        UserError: one is missing, or has another architecture, width or number of latents than the run asks for, or a
            form that training does not have.
    """
    if not config.initial:
        return {}
    known = load_saes(config.initial)
    if missing := [str(site) for site in sites if site not in known]:
        raise UserError(f"initial {config.initial!r} has no dictionary of {', '.join(missing)}: leave the site out")
    for site in sites:
        _check(known[site], model.width(site), config)
    return {site: known[site] for site in sites}


def _check(dictionary: Dictionary, d_in: int, config: TrainingConfig) -> None:
    name, design = f"initial dictionary {dictionary.name}", DESIGNS[config.sae.architecture]
    trained_as = dictionary.cfg.metadata.to_dict().get("training_architecture") or dictionary.architecture
    if dictionary.architecture != design.saved_as:
        raise UserError(f"{name} is {trained_as}, not {config.sae.architecture}: set sae.architecture to that")
    if dictionary.d_in != d_in:
        raise UserError(f"{name} has width {dictionary.d_in}, its site {d_in}: give dictionaries of this model")
    if dictionary.d_sae != config.sae.width(d_in):
        raise UserError(
            f"{name} has {dictionary.d_sae} latents, not {config.sae.width(d_in)}: set sae.d_sae to {dictionary.d_sae}"
        )
    if dictionary.normalises:
        raise UserError(f"{name} normalises its inputs, which training does not: give another")
    rows = dictionary.W_dec.norm(dim=-1)
    scaled = getattr(dictionary.cfg, "rescale_acts_by_decoder_norm", False)
    if design.saved_as == "topk" and not scaled and float((rows - 1).abs().max()) > 1e-3:
        raise UserError(f"{name} selects latents before their decoder rows' norms, which differ from 1: give another")


def begun(dictionary: Dictionary, sample: Float[Tensor, "n d_in"], run: TrainingConfig) -> Learner:
    """A learner that computes what a dictionary does, with a fresh optimiser and its scale from sample activations."""
    design, scale = DESIGNS[run.sae.architecture], scale_for(sample)
    state = {name: value.detach().to(sample) for name, value in dictionary.sae.state_dict().items()}
    weights = {"W_enc": state["W_enc"].T.contiguous(), "W_dec": state["W_dec"].clone(), "b_dec": state["b_dec"] * scale}
    inward = 0 if dictionary.cfg.apply_b_dec_to_input else state["b_dec"] @ state["W_enc"]
    for name in design.biases:
        weights[name] = (state[name] + (inward if name.startswith("b_") else 0)) * scale
    weights |= {name: state[name].clone() for name in design.gains}
    if "b_mag" in weights and not dictionary.cfg.apply_b_dec_to_input:
        weights["b_mag"] += inward * scale * (weights["r_mag"].exp() - 1)  # its pre-activations have a gain
    learner = Learner.of(weights, scale, run)
    learner.constrain()
    if learner.average is not None:
        learner.average = {name: value.clone() for name, value in learner.weights.items()}
    if learner.estimates_threshold:
        learner.threshold = float(state["threshold"].mean()) * scale
    return learner


def fingerprints(initial: Initial) -> dict[str, str]:
    return {str(site): dictionary.fingerprint for site, dictionary in initial.items()}


@torch.no_grad()
def new_learners(
    samples: Mapping[Site, Float[Tensor, "n d_in"]], initial: Initial, run: TrainingConfig
) -> dict[Site, Learner]:
    """A learner for each site: of its initial dictionary, or random."""
    return {
        site: begun(initial[site], sample, run) if site in initial else Learner.new(sample, run, run.seed)
        for site, sample in samples.items()
    }
