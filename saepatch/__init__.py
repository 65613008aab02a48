"""saepatch: patch, steer and restore single SAE latents in Hugging Face causal language models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saepatch.data.batches import batch_pairs as batch_pairs
    from saepatch.data.batches import resampled as resampled
    from saepatch.data.pairs import PromptPair as PromptPair
    from saepatch.data.pairs import load_pairs as load_pairs
    from saepatch.data.texts import load_texts as load_texts
    from saepatch.dictionaries.bases import directions_of as directions_of
    from saepatch.dictionaries.bases import units_of as units_of
    from saepatch.dictionaries.dictionary import Dictionary as Dictionary
    from saepatch.dictionaries.loading import load_sae as load_sae
    from saepatch.dictionaries.loading import load_saes as load_saes
    from saepatch.engine.components import Directions as Directions
    from saepatch.engine.components import Edit as Edit
    from saepatch.engine.components import ErrorTerm as ErrorTerm
    from saepatch.engine.corruptions import GaussianNoise as GaussianNoise
    from saepatch.engine.corruptions import Mean as Mean
    from saepatch.engine.corruptions import Zero as Zero
    from saepatch.errors import UserError as UserError
    from saepatch.measure.attention import attribute_attention as attribute_attention
    from saepatch.measure.attention import patch_attention as patch_attention
    from saepatch.measure.attribution import FirstOrder as FirstOrder
    from saepatch.measure.attribution import GradDrop as GradDrop
    from saepatch.measure.attribution import IntegratedGradients as IntegratedGradients
    from saepatch.measure.attribution import attribute as attribute
    from saepatch.measure.patching import patch_components as patch_components
    from saepatch.measure.patching import patch_heads as patch_heads
    from saepatch.measure.patching import patch_latents as patch_latents
    from saepatch.measure.patching import patch_streams as patch_streams
    from saepatch.measure.quality import latent_statistics as latent_statistics
    from saepatch.measure.quality import splice_quality as splice_quality
    from saepatch.model.hooks import SpliceError as SpliceError
    from saepatch.model.language_model import LanguageModel as LanguageModel
    from saepatch.model.loading import load_model as load_model
    from saepatch.model.loading import wrap_model as wrap_model
    from saepatch.model.positions import At as At
    from saepatch.model.sites import Site as Site
    from saepatch.restoration.ranking import clean_means as clean_means
    from saepatch.restoration.ranking import find_safety_latents as find_safety_latents
    from saepatch.restoration.restore import restore as restore
    from saepatch.splicing.donors import CleanMeans as CleanMeans
    from saepatch.splicing.donors import CleanPrompts as CleanPrompts
    from saepatch.splicing.donors import OtherModel as OtherModel
    from saepatch.splicing.donors import Restore as Restore
    from saepatch.splicing.interventions import Ablate as Ablate
    from saepatch.splicing.interventions import AtLeast as AtLeast
    from saepatch.splicing.interventions import Clamp as Clamp
    from saepatch.splicing.interventions import Patch as Patch
    from saepatch.splicing.interventions import Steer as Steer
    from saepatch.splicing.splice import record_latents as record_latents
    from saepatch.splicing.splice import splice as splice
    from saepatch.steering.choosing import attribution_contrast as attribution_contrast
    from saepatch.steering.choosing import auroc_contrast as auroc_contrast
    from saepatch.steering.choosing import corpus_maxima as corpus_maxima
    from saepatch.steering.choosing import output_scores as output_scores
    from saepatch.steering.contrasts import contrast as contrast
    from saepatch.steering.contrasts import equal_norm_steer as equal_norm_steer

# Names are imported on first use, so that `import saepatch` and `saepatch --help` stay quick.
_HOME = {
    "attribute_attention": "measure.attention",
    "patch_attention": "measure.attention",
    "FirstOrder": "measure.attribution",
    "GradDrop": "measure.attribution",
    "IntegratedGradients": "measure.attribution",
    "attribute": "measure.attribution",
    "directions_of": "dictionaries.bases",
    "units_of": "dictionaries.bases",
    "attribution_contrast": "steering.choosing",
    "auroc_contrast": "steering.choosing",
    "corpus_maxima": "steering.choosing",
    "output_scores": "steering.choosing",
    "Directions": "engine.components",
    "Edit": "engine.components",
    "ErrorTerm": "engine.components",
    "GaussianNoise": "engine.corruptions",
    "Mean": "engine.corruptions",
    "Zero": "engine.corruptions",
    "Dictionary": "dictionaries.dictionary",
    "load_sae": "dictionaries.loading",
    "load_saes": "dictionaries.loading",
    "UserError": "errors",
    "SpliceError": "model.hooks",
    "Ablate": "splicing.interventions",
    "AtLeast": "splicing.interventions",
    "Clamp": "splicing.interventions",
    "Patch": "splicing.interventions",
    "Steer": "splicing.interventions",
    "LanguageModel": "model.language_model",
    "load_model": "model.loading",
    "wrap_model": "model.loading",
    "patch_components": "measure.patching",
    "patch_heads": "measure.patching",
    "patch_latents": "measure.patching",
    "patch_streams": "measure.patching",
    "At": "model.positions",
    "PromptPair": "data.pairs",
    "batch_pairs": "data.batches",
    "load_pairs": "data.pairs",
    "resampled": "data.batches",
    "latent_statistics": "measure.quality",
    "splice_quality": "measure.quality",
    "CleanMeans": "splicing.donors",
    "CleanPrompts": "splicing.donors",
    "OtherModel": "splicing.donors",
    "Restore": "splicing.donors",
    "restore": "restoration.restore",
    "clean_means": "restoration.ranking",
    "find_safety_latents": "restoration.ranking",
    "Site": "model.sites",
    "record_latents": "splicing.splice",
    "splice": "splicing.splice",
    "contrast": "steering.contrasts",
    "equal_norm_steer": "steering.contrasts",
    "load_texts": "data.texts",
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
