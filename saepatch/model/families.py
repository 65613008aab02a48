"""How each model family lays out its sites."""

import logging
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from saepatch.errors import UserError
from saepatch.model.sites import Site

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Family:
    """Module paths of one model family: the blocks from the model, the others from a block (None: not offered)."""

    blocks: str
    attn: str | None = None
    mlp: str | None = None
    z: str | None = None
    neurons: str | None = None


_LLAMA = Family("model.layers", "self_attn", "mlp", "self_attn.o_proj", "mlp.down_proj")


_POST_NORM = replace(_LLAMA, attn="post_attention_layernorm", mlp="post_feedforward_layernorm")


# Keyed by `config.model_type`. `attn` and `mlp` name the module whose output enters the residual stream, `z` the one
# that projects the heads' outputs, `neurons` the one that projects the MLP's units (a mixture of experts has none).
FAMILIES: dict[str, Family] = {
    **dict.fromkeys(
        ["llama", "mistral", "mixtral", "qwen2", "qwen3", "qwen3_moe", "gemma", "phi3", "stablelm"],
        _LLAMA,
    ),
    **dict.fromkeys(["gemma2", "gemma3_text", "olmo2", "olmo3"], _POST_NORM),
    "starcoder2": replace(_LLAMA, neurons="mlp.c_proj"),
    "phi": Family("model.layers", "self_attn", "mlp", "self_attn.dense", "mlp.fc2"),
    "gpt2": Family("transformer.h", "attn", "mlp", "attn.c_proj", "mlp.c_proj"),
    "gpt_neo": Family("transformer.h", "attn", "mlp", "attn.attention.out_proj", "mlp.c_proj"),
    "gptj": Family("transformer.h", "attn", "mlp", "attn.out_proj", "mlp.fc_out"),
    "gpt_neox": Family("gpt_neox.layers", "attention", "mlp", "attention.dense", "mlp.dense_4h_to_h"),
    "opt": Family("model.decoder.layers", "self_attn", None, "self_attn.out_proj"),
}


@dataclass(frozen=True, eq=False)
class Layout:
    """Where the sites of one loaded model are.

    `streams` maps a stream to the module path inside a block ("" is the block itself). `neurons` is that of the MLP's
    units, which sweeps over all streams leave out.
    """

    blocks: tuple[nn.Module, ...]
    streams: Mapping[str, str]
    tuple_blocks: bool = False  # whether a block returns a tuple that starts with the stream; seen on load
    widths: Mapping[str, int] = field(default_factory=dict)  # of each stream; seen on load
    neurons: str | None = None

    def module(self, site: Site) -> nn.Module:
        """The module that emits the site (for `resid_pre`: that receives it).

        Raises:
            UserError: the model has no such layer, or its family does not offer the stream.
        """
        if site.layer >= len(self.blocks):
            raise UserError(f"site {site}: the model has {len(self.blocks)} layers, 0 to {len(self.blocks) - 1}")
        paths = {**self.streams} if self.neurons is None else {**self.streams, "neurons": self.neurons}
        if site.stream not in paths:
            raise UserError(f"site {site}: this model family offers {', '.join(paths)}")
        return self.blocks[site.layer].get_submodule(paths[site.stream])

    @property
    def sites(self) -> list[Site]:
        return [Site(layer, stream) for layer in range(len(self.blocks)) for stream in self.streams]

    def without(self, stream: str) -> "Layout":
        return replace(self, streams={name: path for name, path in self.streams.items() if name != stream})


def layout_of(hf: nn.Module, model_type: str, n_layers: int) -> Layout:
    """Find the blocks of a Hugging Face causal LM.

    A family that is not in `FAMILIES` is read off the model's structure: the one `ModuleList` with `n_layers` members.

    Raises:
        UserError: the blocks cannot be told apart from other modules.
    """
    family = FAMILIES.get(model_type) or _guess_family(hf, model_type, n_layers)
    try:
        blocks = tuple(hf.get_submodule(family.blocks).children())
    except AttributeError as error:
        raise UserError(f"model type {model_type!r} has no blocks at {family.blocks!r}: {error}") from error
    streams = {"resid_pre": "", "resid_post": ""}
    if family.attn is not None:
        streams["attn_out"] = family.attn
    if family.mlp is not None:
        streams["mlp_out"] = family.mlp
    if family.z is not None:
        streams["z"] = family.z
    return Layout(blocks, streams, neurons=family.neurons)


def _guess_family(hf: nn.Module, model_type: str, n_layers: int) -> Family:
    lists = [name for name, m in hf.named_modules() if isinstance(m, nn.ModuleList) and len(m) == n_layers]
    outermost = [name for name in lists if not any(name.startswith(other + ".") for other in lists)]
    if len(outermost) != 1:
        raise UserError(
            f"model type {model_type!r} is unknown and its blocks cannot be found ({len(outermost)} module lists of "
            f"length {n_layers}): add a line to saepatch.model.families.FAMILIES"
        )
    log.info("model type %r is not in FAMILIES; using the blocks at %r", model_type, outermost[0])
    return Family(outermost[0])
