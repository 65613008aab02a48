"""Tiny random vision-language models of several families, with their processors."""

from functools import cache
from pathlib import Path
from typing import Any

import torch
import transformers as hf
from PIL import Image, ImageDraw
from tiny import byte_tokenizer

from saepatch.model.inputs.images import ImagePrompt
from saepatch.model.language_model import LanguageModel
from saepatch.model.loading.load import wrap_model

TEXT = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 4, "num_attention_heads": 4}
TEXT |= {"num_key_value_heads": 2, "max_position_embeddings": 512, "head_dim": 4, "vocab_size": 300}
TOKENS = {"bos_token_id": 0, "eos_token_id": 1, "pad_token_id": 2}
SIGLIP = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
SIGLIP |= {"image_size": 16, "patch_size": 4}
MROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 0]}}
SIZE = {"height": 16, "width": 16}
ROWS = [f"<row_{row}_col_{column}>" for row in range(1, 7) for column in range(1, 7)]


def tokenizer(*further: str, **named: str) -> Any:
    """The byte tokenizer with further special tokens, some of which the processor finds by name."""
    made = byte_tokenizer()
    words = hf.PreTrainedTokenizerFast(
        tokenizer_object=made.backend_tokenizer, bos_token="<bos>", eos_token="<eos>", pad_token="<pad>",
        padding_side="left", extra_special_tokens=named,
    )  # fmt: skip
    words.add_tokens([*further], special_tokens=True)
    return words


def gemma3() -> tuple[Any, Any]:
    words = tokenizer(image_token="<image_soft_token>", boi_token="<start_of_image>", eoi_token="<end_of_image>")
    text = TEXT | TOKENS | {"sliding_window": 8, "query_pre_attn_scalar": 4}
    text |= {"layer_types": ["sliding_attention", "full_attention"] * 2}
    config = hf.Gemma3Config(
        text_config=text, vision_config=SIGLIP, mm_tokens_per_image=4, image_token_index=words.image_token_id,
        boi_token_index=words.boi_token_id, eoi_token_index=words.eoi_token_id, **TOKENS,
    )  # fmt: skip
    return config, hf.Gemma3Processor(hf.Gemma3ImageProcessorPil(size=SIZE), words, image_seq_length=4)


def paligemma() -> tuple[Any, Any]:
    words = tokenizer(image_token="<image>")
    config = hf.PaliGemmaConfig(
        text_config=TEXT | TOKENS | {"model_type": "gemma"}, vision_config=SIGLIP | {"projection_dim": 16},
        image_token_index=words.image_token_id, projection_dim=16, hidden_size=16, **TOKENS,
    )  # fmt: skip
    images = hf.SiglipImageProcessorPil(size=SIZE)
    images.image_seq_length = 16
    return config, hf.PaliGemmaProcessor(images, words)


def llava() -> tuple[Any, Any]:
    words = tokenizer(image_token="<image>")
    config = hf.LlavaConfig(
        text_config=TEXT | TOKENS | {"model_type": "llama"}, vision_config=SIGLIP | {"model_type": "clip_vision_model"},
        image_token_index=words.image_token_id, vision_feature_layer=-1, **TOKENS,
    )  # fmt: skip
    images = hf.CLIPImageProcessorPil(size={"shortest_edge": 16}, crop_size=SIZE)
    options = {"patch_size": 4, "vision_feature_select_strategy": "default", "num_additional_image_tokens": 1}
    return config, hf.LlavaProcessor(images, words, **options)


class _WithoutVideos:
    """A processor of Qwen's without that for videos, which needs torchvision."""

    def __init__(self, image_processor: Any = None, tokenizer: Any = None, chat_template: Any = None) -> None:
        self.image_token, self.video_token = "<|image_pad|>", "<|video_pad|>"
        self.image_token_id, self.video_token_id = map(
            tokenizer.convert_tokens_to_ids, (self.image_token, self.video_token)
        )
        hf.ProcessorMixin.__init__(self, image_processor, tokenizer, chat_template=chat_template)


class Qwen2Pictures(_WithoutVideos, hf.Qwen2VLProcessor):
    pass


class Qwen3Pictures(_WithoutVideos, hf.Qwen3VLProcessor):
    pass


def _qwen(config: Any, processor: Any, vision: dict[str, Any], **text: Any) -> tuple[Any, Any]:
    words = tokenizer(
        image_token="<|image_pad|>", video_token="<|video_pad|>",
        vision_start_token="<|vision_start|>", vision_end_token="<|vision_end|>",
    )  # fmt: skip
    named = {f"{name}_id": getattr(words, f"{name}_id") for name in
             ("image_token", "video_token", "vision_start_token", "vision_end_token")}  # fmt: skip
    made = config(text_config=TEXT | TOKENS | MROPE | text, vision_config=vision, **named, **TOKENS)
    options = {"patch_size": 4, "merge_size": 2, "min_pixels": 8 * 8, "max_pixels": 32 * 32}
    return made, processor(hf.Qwen2VLImageProcessorPil(**options), words)


def qwen2_vl() -> tuple[Any, Any]:
    vision = {"depth": 2, "embed_dim": 16, "hidden_size": 16, "num_heads": 2, "mlp_ratio": 2, "patch_size": 4}
    return _qwen(hf.Qwen2VLConfig, Qwen2Pictures, vision)


def qwen3_vl() -> tuple[Any, Any]:
    vision = {"depth": 3, "hidden_size": 16, "out_hidden_size": 16, "num_heads": 2, "intermediate_size": 32}
    vision |= {"patch_size": 4, "num_position_embeddings": 16, "deepstack_visual_indexes": [0, 1]}
    return _qwen(hf.Qwen3VLConfig, Qwen3Pictures, vision)


def idefics3() -> tuple[Any, Any]:
    words = tokenizer("<fake_token_around_image>", "<global-img>", *ROWS, image_token="<image>")
    config = hf.Idefics3Config(
        text_config=TEXT | TOKENS | {"model_type": "llama", "vocab_size": 340}, vision_config=SIGLIP, scale_factor=2,
        image_token_id=words.image_token_id, **TOKENS,
    )  # fmt: skip
    images = hf.Idefics3ImageProcessorPil(size={"longest_edge": 32}, max_image_size={"longest_edge": 16})
    return config, hf.Idefics3Processor(images, words, image_seq_len=4)


FAMILIES = {make.__name__: make for make in (gemma3, paligemma, llava, qwen2_vl, qwen3_vl, idefics3)}


def random_weights(config: Any) -> Any:
    """A random model; weights are large enough that every part of it matters to the logits."""
    torch.manual_seed(0)
    made = hf.AutoModelForImageTextToText.from_config(config)
    with torch.no_grad():
        for name, weight in made.named_parameters():
            if weight.ndim > 1:
                weight.normal_(0, 0.5 if "embed_tokens" in name else weight.shape[-1] ** -0.5)
    return made


@cache
def vision_model(family: str) -> LanguageModel:
    """A model of the family, made once a process: change nothing of it."""
    config, processor = FAMILIES[family]()
    return wrap_model(random_weights(config), processor, family)


def picture(folder: Path, name: str, colour: str = "red", size: tuple[int, int] = (24, 16), box: Any = None) -> str:
    """A picture file with a rectangle, by default in its upper left quarter."""
    image = Image.new("RGB", size, "white")
    ImageDraw.Draw(image).rectangle(box or (0, 0, size[0] // 2 - 1, size[1] // 2 - 1), fill=colour)
    image.save(folder / f"{name}.png")
    return str(folder / f"{name}.png")


def pixels_of(model: LanguageModel, prompt: ImagePrompt) -> dict[str, Any]:
    """What a plain call of the model takes: the processor's own results for the prompt."""
    text = prompt.replace("<image>", model.pictures.mark)
    images = [[Image.open(file).convert("RGB") for file in prompt.images]]
    out = dict(model.processor(text=[text], images=images, return_tensors="pt"))
    return {name: value for name, value in out.items() if name not in ("labels", "rows", "cols", "num_crops")}
