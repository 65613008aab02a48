"""Where a model's weights come from: a folder, the hub, a GGUF file, or an adapter over another model."""

import json
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from saepatch import organism
from saepatch.errors import UserError, reason_of
from saepatch.records.documents import parse_json

ADAPTER = "adapter_config.json"


@dataclass(frozen=True)
class Source:
    """What transformers is told to load.

    Attributes:
        name: What the user named.
        path: A folder or a Hugging Face id.
        local: Whether the name is a file or folder of this machine.
        gguf: A file in the folder, with quantised weights.
        adapter: Folder of the adapter; its `path` is the model below it.
        note: What results say of the weights besides the name.
    """

    name: str
    path: str
    local: bool = True
    gguf: str = ""
    adapter: str = ""
    note: str = ""

    @property
    def title(self) -> str:
        """The model's name in results."""
        return f"{self.name} ({self.note})" if self.note else self.name

    @property
    def files(self) -> dict[str, str]:
        """Options of transformers that name a file in the folder."""
        return {"gguf_file": self.gguf} if self.gguf else {}


def source_of(name: str) -> Source:
    """The source that a name stands for.

    Raises:
        UserError: there is no such file, a folder holds no model, or the name is neither a path nor a Hugging Face id.
    """
    path = organism.path(name) if organism.is_checkpoint(name) else Path(name)
    if name.endswith(".gguf"):
        if not path.is_file():
            raise UserError(f"there is no file {name!r}: give the path of a .gguf file, a folder, or a Hugging Face id")
        return Source(name, str(path.parent), gguf=path.name, note=f"GGUF, {_quantisation(path)}, expanded")
    if path.is_dir():
        if (path / "config.json").is_file():
            return Source(name, str(path))
        if (path / ADAPTER).is_file():
            return _adapted(name, path)
        raise UserError(f"folder {name!r} has no config.json: give the folder of a Hugging Face model")
    if not re.fullmatch(r"[\w-][\w.-]*(/[\w.-]+)?", name):
        raise UserError(f"{name!r} is neither a folder nor a Hugging Face id: use 'organism', a folder, or OWNER/NAME")
    return Source(name, name, local=False)


def _adapted(name: str, folder: Path) -> Source:
    config = parse_json((folder / ADAPTER).read_text(encoding="utf-8"), str(folder / ADAPTER))
    base = config.get("base_model_name_or_path") if isinstance(config, dict) else None
    if not isinstance(base, str) or not base:
        raise UserError(
            f"adapter {name!r} does not name the model below it: write base_model_name_or_path in its {ADAPTER}"
        )
    if not (folder / "adapter_model.safetensors").is_file():
        raise UserError(f"adapter {name!r} has no adapter_model.safetensors: save it with safe_serialization=True")
    below = folder / base if (folder / base).is_dir() and not Path(base).is_dir() else Path(base)
    if not below.is_dir() and (Path(base).is_absolute() or base.startswith(".")):
        raise UserError(f"adapter {name!r} names a model at {base!r}, which is no folder here: correct its {ADAPTER}")
    return Source(name, str(below) if below.is_dir() else base, adapter=str(folder))


def _quantisation(file: Path) -> str:
    """How most weights of a GGUF file are stored, as the file states it (such as Q4_K_M)."""
    try:
        from gguf import GGUFReader, LlamaFileType
    except ImportError as error:
        raise UserError(f"reading {file.name} needs the package gguf: pip install 'saepatch[gguf]'") from error
    try:
        field = GGUFReader(file).fields.get("general.file_type")
        return "unknown precision" if field is None else LlamaFileType(int(field.contents())).name.split("_", 1)[1]
    except Exception as error:  # of damaged files, in many ways
        raise UserError(f"cannot read {str(file)!r} as a GGUF file: {reason_of(error)}") from error


def from_pretrained(
    source: Source, dtype: torch.dtype, options: Mapping[str, Any], placement: Mapping[str, Any]
) -> tuple[Any, Any, list[str], Any]:
    """The model (without its adapter), its tokenizer, the names of weights missing from its files, and its processor.

    Raises:
        UserError: they cannot be loaded, or are quantised in a way that transformers does not know.
    """
    from transformers import AutoConfig, GgufConfig

    name, placed = source.name, dict(placement)
    if source.gguf:
        placed["quantization_config"] = GgufConfig(dequantize=True)
    try:
        folder = source.adapter if (Path(source.adapter or ".") / "tokenizer_config.json").is_file() else ""
        tokenizer = load_tokenizer(folder or source.path, {**options, **source.files})
        config = AutoConfig.from_pretrained(source.path, **options, **source.files)
        refuse_unknown_quantisation(config, name)
        with _quiet_progress():
            both: Any = class_for(config).from_pretrained(
                source.path,
                dtype=dtype,
                use_safetensors=True,
                output_loading_info=True,
                **options,
                **source.files,
                **placed,
            )
    except UserError:
        raise
    except ImportError as error:
        raise UserError(
            f"model {name!r} needs a package that is missing here, or of another version ({reason_of(error)}): install "
            "it, or load a checkpoint that is not quantised"
        ) from error
    except Exception as error:  # of damaged configs, tokenizers and weights, and of the hub's client
        raise UserError(
            f"cannot load model {name!r} (use 'organism', 'organism-base', a folder with config.json and safetensors "
            f"weights, or a Hugging Face id): {reason_of(error)}"
        ) from error
    hf, loaded = both
    return hf, tokenizer, sorted(loaded["missing_keys"]), load_processor(source.path, config, options)


def refuse_unknown_quantisation(config: Any, name: str) -> None:
    """Raises UserError for a quantisation that transformers passes over, so that raw numbers would become weights."""
    from transformers.quantizers.auto import AutoHfQuantizer

    stated = getattr(config, "quantization_config", None) or getattr(
        config.get_text_config(), "quantization_config", None
    )
    if not isinstance(stated, dict):
        return
    try:
        known = AutoHfQuantizer.supports_quant_method(stated)
    except ValueError:  # it names none
        known = False
    if not known:
        method = json.dumps(stated.get("quant_method"))
        raise UserError(
            f"model {name!r} is quantised by {method}, which the installed transformers does not know and would pass "
            "over: load a checkpoint that is not quantised"
        )


def with_adapter(hf: Any, source: Source, merge: bool) -> Any:
    """The model with an adapter computed beside its weights or, if `merge`, added to them.

    Raises:
        UserError: the package peft is missing, or the adapter does not fit the model.
    """
    try:
        from peft import PeftModel
    except ImportError as error:
        raise UserError(f"adapter {source.name!r} needs the package peft: pip install 'saepatch[peft]'") from error
    try:
        adapted = PeftModel.from_pretrained(hf, source.adapter)
        return adapted.merge_and_unload(safe_merge=True) if merge else adapted
    except Exception as error:  # of adapters for other models, and of kinds that cannot be merged
        raise UserError(f"cannot put adapter {source.name!r} on {source.path!r}: {reason_of(error)}") from error


def load_tokenizer(source: str, options: Mapping[str, Any]) -> Any:
    """A model's tokenizer. For some model types without tokenizer files, transformers makes an empty one.

    Raises:
        ValueError: there are no such files; transformers raises other errors where they cannot be read.
    """
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(source, **options)
    if set(tokenizer.get_vocab().values()) <= set(tokenizer.all_special_ids):
        raise ValueError("the files of its tokenizer are missing")
    return tokenizer


def load_processor(source: str, config: Any, options: Mapping[str, Any]) -> Any:
    """The processor of a model that reads pictures; None: it reads none; a string: why it cannot be loaded."""
    from transformers import AutoProcessor
    from transformers.models.auto import modeling_auto

    if config.model_type not in modeling_auto.MODEL_FOR_IMAGE_TEXT_TO_TEXT_MAPPING_NAMES:
        return None
    try:
        made = AutoProcessor.from_pretrained(source, **options)
        return made if hasattr(made, "image_processor") else "its files are missing"
    except Exception as error:  # of missing files and packages, in many ways; prompts of text do without
        return f"it cannot be loaded: {reason_of(error)}"


def class_for(config: Any) -> Any:
    """The class that loads a model: the causal one, or that for images and text where its type has no causal one.

    For a type with neither (such as the text part of some models), the class that its config names.
    """
    import transformers
    from transformers import AutoModelForCausalLM, AutoModelForImageTextToText
    from transformers.models.auto import modeling_auto

    causal, both = (
        config.model_type in getattr(modeling_auto, f"MODEL_FOR_{task}_MAPPING_NAMES")
        for task in ("CAUSAL_LM", "IMAGE_TEXT_TO_TEXT")
    )
    own = getattr(transformers, next(iter(config.architectures or ()), ""), None)
    if not (causal or both) and isinstance(own, type) and own.__name__.endswith("ForCausalLM"):
        return own
    return AutoModelForImageTextToText if both and not causal else AutoModelForCausalLM


@contextmanager
def _quiet_progress() -> Iterator[None]:
    # Hide transformers' progress bar, which takes one line per model.
    from transformers.utils import logging as hf_logging

    was_on = hf_logging.is_progress_bar_enabled()
    hf_logging.disable_progress_bar()
    try:
        yield
    finally:
        if was_on:
            hf_logging.enable_progress_bar()
