"""The output of `saepatch inspect`: a model's sites, and the dictionaries that fit them."""

from typing import Any

from saepatch.dictionaries.dictionary import Dictionary
from saepatch.model.language_model import LanguageModel
from saepatch.model.sites import Site


def model_lines(model: LanguageModel) -> list[str]:
    """Lines with the name, size and sites of a model. Every site was run and edited when the model was loaded."""
    config = model.config.get_text_config()
    parameters = sum(p.numel() for p in model.hf.parameters())
    lines = [
        f"model        {model.name} ({model.config.model_type}, {model.fingerprint})",
        f"size         {parameters:,} parameters, {model.n_layers} layers, width {model.d_model}, "
        f"vocabulary {config.vocab_size:,}, {str(model.dtype).removeprefix('torch.')}",
        f"chat         {'template' if model.tokenizer.chat_template else 'no template'}",
        "sites        shape [batch, pos, d_model]; checked by a forward pass and an edit",
    ]
    for stream in model.layout.streams:
        first, *_, last = [*(sites := model.layout.of_stream(stream)), sites[-1]]
        some = "" if len(sites) == model.n_layers else f", {len(sites)} of {model.n_layers} layers"
        lines.append(f"  {stream:<11}{first} … {last}   ({first.hook_name} in TransformerLens{some})")
    return lines


def dictionary_lines(model: LanguageModel, dictionaries: dict[Site, Dictionary]) -> list[str]:
    """One line per dictionary, each checked against its site.

    Raises:
        UserError: a dictionary does not fit the model.
    """
    lines = ["dictionaries"]
    for site, dictionary in dictionaries.items():
        dictionary.check(model)
        lines.append(
            f"  {site!s:<14}{dictionary.architecture}, {dictionary.d_sae:,} latents ({dictionary.fingerprint})"
        )
    return lines


def facts(model: LanguageModel, dictionaries: dict[Site, Dictionary]) -> dict[str, Any]:
    """The same as a JSON-serialisable dictionary."""
    return {
        "model": {"name": model.name, "hash": model.fingerprint, "type": model.config.model_type},
        "parameters": sum(p.numel() for p in model.hf.parameters()),
        "layers": model.n_layers,
        "width": model.d_model,
        "streams": list(model.layout.streams),
        "dictionaries": {
            str(site): {
                "architecture": dictionary.architecture,
                "latents": dictionary.d_sae,
                "name": dictionary.name,
                "hash": dictionary.fingerprint,
            }
            for site, dictionary in dictionaries.items()
        },
    }
