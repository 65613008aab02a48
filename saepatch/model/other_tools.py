"""Models of other libraries: the Hugging Face model inside them, and this library's names for their methods."""

from typing import Any

from torch import nn

from saepatch.errors import UserError

# Attributes of other libraries' models, and their equivalents here.
ELSEWHERE = {
    "run_with_cache": "splice(model, sae, record=True) records latents, model.capture(tokens, [site]) a site's values",
    "run_with_hooks": "splice(model, sae, intervention) edits latents; your own is a value with a method `edit`",
    "run_with_saes": "splice(model, sae) puts dictionaries in",
    "run_with_cache_with_saes": "splice(model, sae, record=True) records latents",
    "add_sae": "`with splice(model, sae):` puts a dictionary in, and takes it out afterwards",
    "add_hook": "splice(model, sae, intervention) edits latents; plain hooks go on modules of model.hf",
    "reset_hooks": "no hook remains after a context ends, so there is nothing to reset",
    "hooks": "splice(model, sae, intervention) is the context manager",
    "to_tokens": "model.tokenize([text]) gives Tokens, model.encode(text) a list of ids",
    "to_str_tokens": "model.token_texts(model.encode(text))",
    "to_string": "model.tokenizer.decode(ids)",
    "to_single_token": "model.encode(text)[-1]",
    "trace": "model.logits(texts) runs the model, splice(model, sae, …) edits it; nothing is traced",
    "cfg": "model.config, model.n_layers, model.d_model",
    "W_U": "model.hf.get_output_embeddings().weight (transposed)",
    "W_E": "model.hf.get_input_embeddings().weight",
    "blocks": "model.layout.blocks",
    "forward": "model.logits(tokens), or model.hf(**inputs)",
}


def no_such_attribute(name: str) -> AttributeError:
    """The error for an attribute that a `LanguageModel` lacks; with the equivalent of another library's name."""
    if name in ELSEWHERE:
        return AttributeError(f"saepatch has no `model.{name}`: {ELSEWHERE[name]} (docs/coming-from.md)")
    return AttributeError(f"'LanguageModel' object has no attribute {name!r}")


def inner_model(given: Any, tokenizer: Any, name: str) -> tuple[nn.Module, Any, str]:
    """The Hugging Face model inside a model of PEFT, TransformerLens or nnsight, with its tokenizer and name.

    Others are returned as they are. A tokenizer or name that is given takes precedence.

    Raises:
        UserError: there is none inside, or it computes something else than the outer model.
    """
    library = type(given).__module__.partition(".")[0]
    if library == "transformer_lens":
        hf = _inside_transformer_lens(given)
    elif library == "nnsight":
        if not getattr(given, "dispatched", True):
            raise UserError("the nnsight model has no weights yet: load it with LanguageModel(…, dispatch=True)")
        hf = given._module
    elif hasattr(given, "peft_config") and hasattr(given, "get_base_model"):
        hf = _inside_peft(given, name)
    else:
        hf = given
    if tokenizer is None:
        tokenizer = None if given is hf else getattr(given, "tokenizer", None)
    if tokenizer is None:
        raise UserError(f"no tokenizer: give it, as in wrap_model(model, tokenizer) ({type(given).__name__} has none)")
    path = str(getattr(getattr(hf, "config", None), "_name_or_path", "") or "")
    return hf, tokenizer, name or path or type(hf).__name__


def _inside_transformer_lens(given: Any) -> nn.Module:
    if not hasattr(given, "original_model"):
        raise UserError(
            f"a {type(given).__name__} holds rearranged weights and no Hugging Face model: load the same checkpoint "
            "with load_model(NAME), or boot a TransformerBridge"
        )
    if getattr(given, "compatibility_mode", False):
        raise UserError(
            "the TransformerBridge is in compatibility mode, which rewrites the weights that dictionaries were trained "
            "on: boot it again without enable_compatibility_mode()"
        )
    return given.original_model


def _inside_peft(given: Any, name: str) -> nn.Module:
    """The base model, in which the adapter's layers act."""
    if any(getattr(config, "is_prompt_learning", False) for config in given.peft_config.values()):
        raise UserError(
            f"model {name!r} has learned prompts ({type(given).__name__}), which act outside its base model: use an "
            "adapter such as LoRA, or write the prompt as text"
        )
    return given.get_base_model()
