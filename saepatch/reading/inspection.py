"""A model's sites, and the dictionaries that fit them: `saepatch inspect`."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from saepatch.dictionaries.dictionary import Dictionary
from saepatch.model.language_model import LanguageModel
from saepatch.model.sites import Site
from saepatch.report.blocks import Cell, Facts, Simple, Table
from saepatch.report.notebook import Shown


def inspect(
    model: LanguageModel, dictionaries: Dictionary | Sequence[Dictionary] | Mapping[Site, Dictionary] = ()
) -> "Inspection":
    """The size and sites of a model and, checked against their sites, dictionaries; it shows itself in a notebook.

    Raises:
        UserError: a dictionary does not fit the model.
    """
    several: Mapping[Site, Dictionary]
    if isinstance(dictionaries, Mapping):
        several = dictionaries
    else:
        listed = [dictionaries] if isinstance(dictionaries, Dictionary) else dictionaries
        several = {dictionary.site: dictionary for dictionary in listed}
    for dictionary in several.values():
        dictionary.check(model)
    return Inspection(model, several)


@dataclass(frozen=True, eq=False, repr=False)
class Inspection(Shown):
    """The result of `inspect`."""

    model: LanguageModel
    dictionaries: Mapping[Site, Dictionary]

    def __repr__(self) -> str:
        lines = model_lines(self.model)
        if self.dictionaries:
            lines.append(f"dictionaries {', '.join(map(str, self.dictionaries))}")
        return "\n".join(lines)

    @property
    def title(self) -> str:
        """Heading shown above the tables."""
        return f"Model {self.model.name}"

    def text(self) -> str:
        """Everything as text, with a line for every dictionary."""
        return "\n".join(model_lines(self.model) + (dictionary_lines(self.dictionaries) if self.dictionaries else []))

    def facts(self) -> dict[str, Any]:
        """Everything as JSON values."""
        return facts(self.model, self.dictionaries)

    def blocks(self) -> list[Simple]:
        """Size, streams and dictionaries."""
        model = self.model
        rows: list[list[Cell]] = []
        for stream in model.layout.streams:
            sites = model.layout.of_stream(stream)
            rows.append([stream, f"{sites[0]} … {sites[-1]}", len(sites), sites[0].hook_name, model.width(sites[0])])
        sizes = {
            "type": str(model.config.model_type),
            "parameters": f"{_parameters(model):,}",
            "layers": str(model.n_layers),
            "width": str(model.d_model),
            "vocabulary": f"{model.vocabulary:,}",
            "precision": str(model.dtype).removeprefix("torch."),
            "chat template": "yes" if model.tokenizer.chat_template else "no",
            "hash": model.fingerprint,
        }
        caption = "Every site was run and edited when the model was loaded."
        columns = ["stream", "sites", "layers", "first in TransformerLens", "width"]
        blocks: list[Simple] = [Facts(sizes), Table(columns, rows, caption)]
        if self.dictionaries:
            listed: list[list[Cell]] = [
                [str(site), d.name, d.architecture, d.d_sae, d.fingerprint] for site, d in self.dictionaries.items()
            ]
            blocks.append(Table(["site", "dictionary", "architecture", "latents", "hash"], listed))
        return blocks


def _parameters(model: LanguageModel) -> int:
    return sum(p.numel() for p in model.hf.parameters())


def model_lines(model: LanguageModel) -> list[str]:
    """Lines with the name, size and sites of a model. Every site was run and edited when the model was loaded."""
    lines = [
        f"model        {model.name} ({model.config.model_type}, {model.fingerprint})",
        f"size         {_parameters(model):,} parameters, {model.n_layers} layers, width {model.d_model}, "
        f"vocabulary {model.vocabulary:,}, {str(model.dtype).removeprefix('torch.')}",
        f"chat         {'template' if model.tokenizer.chat_template else 'no template'}",
        "sites        shape [batch, pos, d_model]; checked by a forward pass and an edit",
    ]
    for stream in model.layout.streams:
        first, *_, last = [*(sites := model.layout.of_stream(stream)), sites[-1]]
        some = "" if len(sites) == model.n_layers else f", {len(sites)} of {model.n_layers} layers"
        lines.append(f"  {stream:<11}{first} … {last}   ({first.hook_name} in TransformerLens{some})")
    return lines


def dictionary_lines(dictionaries: Mapping[Site, Dictionary]) -> list[str]:
    """One line per dictionary."""
    lines = ["dictionaries"]
    for site, dictionary in dictionaries.items():
        lines.append(
            f"  {site!s:<14}{dictionary.architecture}, {dictionary.d_sae:,} latents ({dictionary.fingerprint})"
        )
    return lines


def facts(model: LanguageModel, dictionaries: Mapping[Site, Dictionary]) -> dict[str, Any]:
    """The same as a JSON-serialisable dictionary."""
    return {
        "model": {"name": model.name, "hash": model.fingerprint, "type": model.config.model_type},
        "parameters": _parameters(model),
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
