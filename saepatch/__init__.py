"""saepatch: patch, steer and restore single SAE latents in Hugging Face causal language models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saepatch.attention import attribute_attention as attribute_attention
    from saepatch.attention import patch_attention as patch_attention
    from saepatch.attribution import FirstOrder as FirstOrder
    from saepatch.attribution import GradDrop as GradDrop
    from saepatch.attribution import IntegratedGradients as IntegratedGradients
    from saepatch.attribution import attribute as attribute
    from saepatch.bases import directions_of as directions_of
    from saepatch.bases import units_of as units_of
    from saepatch.choosing import attribution_contrast as attribution_contrast
    from saepatch.choosing import auroc_contrast as auroc_contrast
    from saepatch.choosing import corpus_maxima as corpus_maxima
    from saepatch.choosing import output_scores as output_scores
    from saepatch.components import Directions as Directions
    from saepatch.components import Edit as Edit
    from saepatch.components import ErrorTerm as ErrorTerm
    from saepatch.corruptions import GaussianNoise as GaussianNoise
    from saepatch.corruptions import Mean as Mean
    from saepatch.corruptions import Zero as Zero
    from saepatch.dictionaries import Dictionary as Dictionary
    from saepatch.dictionaries import load_sae as load_sae
    from saepatch.dictionaries import load_saes as load_saes
    from saepatch.errors import UserError as UserError
    from saepatch.hooks import SpliceError as SpliceError
    from saepatch.interventions import Ablate as Ablate
    from saepatch.interventions import AtLeast as AtLeast
    from saepatch.interventions import Clamp as Clamp
    from saepatch.interventions import Patch as Patch
    from saepatch.interventions import Steer as Steer
    from saepatch.models import LanguageModel as LanguageModel
    from saepatch.models import load_model as load_model
    from saepatch.models import wrap_model as wrap_model
    from saepatch.patching import patch_components as patch_components
    from saepatch.patching import patch_heads as patch_heads
    from saepatch.patching import patch_latents as patch_latents
    from saepatch.patching import patch_streams as patch_streams
    from saepatch.positions import At as At
    from saepatch.prompts import PromptPair as PromptPair
    from saepatch.prompts import batch_pairs as batch_pairs
    from saepatch.prompts import load_pairs as load_pairs
    from saepatch.prompts import resampled as resampled
    from saepatch.quality import latent_statistics as latent_statistics
    from saepatch.quality import splice_quality as splice_quality
    from saepatch.restoring import CleanMeans as CleanMeans
    from saepatch.restoring import CleanPrompts as CleanPrompts
    from saepatch.restoring import OtherModel as OtherModel
    from saepatch.restoring import Restore as Restore
    from saepatch.safety import restore as restore
    from saepatch.safety_latents import clean_means as clean_means
    from saepatch.safety_latents import find_safety_latents as find_safety_latents
    from saepatch.sites import Site as Site
    from saepatch.splicing import record_latents as record_latents
    from saepatch.splicing import splice as splice
    from saepatch.steering import contrast as contrast
    from saepatch.steering import equal_norm_steer as equal_norm_steer
    from saepatch.texts import load_texts as load_texts

# Names are imported on first use, so that `import saepatch` and `saepatch --help` stay quick.
_HOME = {
    "attribute_attention": "attention",
    "patch_attention": "attention",
    "FirstOrder": "attribution",
    "GradDrop": "attribution",
    "IntegratedGradients": "attribution",
    "attribute": "attribution",
    "directions_of": "bases",
    "units_of": "bases",
    "attribution_contrast": "choosing",
    "auroc_contrast": "choosing",
    "corpus_maxima": "choosing",
    "output_scores": "choosing",
    "Directions": "components",
    "Edit": "components",
    "ErrorTerm": "components",
    "GaussianNoise": "corruptions",
    "Mean": "corruptions",
    "Zero": "corruptions",
    "Dictionary": "dictionaries",
    "load_sae": "dictionaries",
    "load_saes": "dictionaries",
    "UserError": "errors",
    "SpliceError": "hooks",
    "Ablate": "interventions",
    "AtLeast": "interventions",
    "Clamp": "interventions",
    "Patch": "interventions",
    "Steer": "interventions",
    "LanguageModel": "models",
    "load_model": "models",
    "wrap_model": "models",
    "patch_components": "patching",
    "patch_heads": "patching",
    "patch_latents": "patching",
    "patch_streams": "patching",
    "At": "positions",
    "PromptPair": "prompts",
    "batch_pairs": "prompts",
    "load_pairs": "prompts",
    "resampled": "prompts",
    "latent_statistics": "quality",
    "splice_quality": "quality",
    "CleanMeans": "restoring",
    "CleanPrompts": "restoring",
    "OtherModel": "restoring",
    "Restore": "restoring",
    "restore": "safety",
    "clean_means": "safety_latents",
    "find_safety_latents": "safety_latents",
    "Site": "sites",
    "record_latents": "splicing",
    "splice": "splicing",
    "contrast": "steering",
    "equal_norm_steer": "steering",
    "load_texts": "texts",
}
__all__ = list(_HOME)


def __getattr__(name: str) -> Any:
    if name in _HOME:
        value = getattr(import_module(f"saepatch.{_HOME[name]}"), name)
        globals()[name] = value
        return value
    if name == "tasks":
        return import_module("saepatch.organism.tasks")
    raise AttributeError(f"module 'saepatch' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*__all__, "tasks"]
