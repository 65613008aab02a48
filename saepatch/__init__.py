"""saepatch: patch, steer and restore single SAE latents in Hugging Face causal language models."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from saepatch.dictionaries import Dictionary as Dictionary
    from saepatch.dictionaries import load_sae as load_sae
    from saepatch.dictionaries import load_saes as load_saes
    from saepatch.errors import UserError as UserError
    from saepatch.hooks import SpliceError as SpliceError
    from saepatch.interventions import Ablate as Ablate
    from saepatch.interventions import Clamp as Clamp
    from saepatch.interventions import Patch as Patch
    from saepatch.interventions import Restore as Restore
    from saepatch.interventions import Steer as Steer
    from saepatch.models import LanguageModel as LanguageModel
    from saepatch.models import load_model as load_model
    from saepatch.models import wrap_model as wrap_model
    from saepatch.patching import patch_latents as patch_latents
    from saepatch.positions import At as At
    from saepatch.prompts import PromptPair as PromptPair
    from saepatch.prompts import batch_pairs as batch_pairs
    from saepatch.prompts import load_pairs as load_pairs
    from saepatch.quality import latent_statistics as latent_statistics
    from saepatch.quality import splice_quality as splice_quality
    from saepatch.safety import restore as restore
    from saepatch.sites import Site as Site
    from saepatch.splicing import record_latents as record_latents
    from saepatch.splicing import splice as splice

# Names are imported on first use, so that `import saepatch` and `saepatch --help` stay quick.
_HOME = {
    "Dictionary": "dictionaries",
    "load_sae": "dictionaries",
    "load_saes": "dictionaries",
    "UserError": "errors",
    "SpliceError": "hooks",
    "Ablate": "interventions",
    "Clamp": "interventions",
    "Patch": "interventions",
    "Restore": "interventions",
    "Steer": "interventions",
    "LanguageModel": "models",
    "load_model": "models",
    "wrap_model": "models",
    "patch_latents": "patching",
    "At": "positions",
    "PromptPair": "prompts",
    "batch_pairs": "prompts",
    "load_pairs": "prompts",
    "latent_statistics": "quality",
    "splice_quality": "quality",
    "restore": "safety",
    "Site": "sites",
    "record_latents": "splicing",
    "splice": "splicing",
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
