"""Module paths of the sites in each model family."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace

from torch import nn

from saepatch.errors import UserError
from saepatch.model.sites import TRANSCODED, Site

Paths = str | tuple[str, ...]


@dataclass(frozen=True)
class Family:
    """Module paths of one model family: `blocks` relative to the model, the others to a block (None: not offered).

    Where blocks differ, a tuple lists alternatives, of which a block's first existing one is used. A block without any
    of them does not offer the stream.
    """

    blocks: str
    attn: Paths | None = None
    mlp: Paths | None = None
    z: Paths | None = None
    neurons: Paths | None = None

    def paths(self, block: nn.Module) -> dict[str, str]:
        """The streams that one block offers, and the module path of each ("": the block itself)."""
        offered = {"resid_pre": "", "resid_post": ""}
        listed = {"attn_out": self.attn, "mlp_out": self.mlp, "z": self.z, "neurons": self.neurons}
        for stream, paths in listed.items():
            alternatives = (paths,) if isinstance(paths, str) else paths or ()
            if (path := next((path for path in alternatives if _has(block, path)), None)) is not None:
                offered[stream] = path
        return offered


def _has(block: nn.Module, path: str) -> bool:
    try:
        block.get_submodule(path)
    except AttributeError:
        return False
    return True


_LLAMA = Family("model.layers", "self_attn", "mlp", "self_attn.o_proj", "mlp.down_proj")
_POST_NORM = replace(_LLAMA, attn="post_attention_layernorm", mlp="post_feedforward_layernorm")

# Keyed by `config.model_type`. `attn` and `mlp` are the modules whose output is added to the residual stream, `z` the
# output projection of attention, `neurons` the output projection of the MLP (a mixture of experts has no single one).
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
    # a hybrid: some blocks have a short convolution instead of attention
    "lfm2": Family("model.layers", ("self_attn", "conv"), "feed_forward", "self_attn.out_proj", "feed_forward.w2"),
}


@dataclass(frozen=True, eq=False)
class Layout:
    """The sites of a loaded model: for each layer, its streams and their module paths inside the block."""

    blocks: tuple[nn.Module, ...]
    paths: tuple[Mapping[str, str], ...]
    tuple_blocks: bool = False  # whether a block returns a tuple that starts with the stream; probed on load
    widths: Mapping[Site, int] = field(default_factory=dict)  # size of each site's last dimension; probed on load
    overwritten: frozenset[Site] = frozenset()  # sites whose tensor the model then adds to in place; probed on load

    def module(self, site: Site) -> nn.Module:
        """The module that emits the site (for `resid_pre`: that receives it).

        Raises:
            UserError: the model has no such layer, or the block does not offer the stream.
        """
        if site.layer >= len(self.blocks):
            raise UserError(f"site {site}: the model has {len(self.blocks)} layers, 0 to {len(self.blocks) - 1}")
        paths = self.paths[site.layer]
        if site.stream not in paths:
            elsewhere = ", ".join(str(other) for other in self.all_sites if other.stream == site.stream)
            raise UserError(
                f"site {site}: this layer offers {', '.join(paths)}"
                + (f"; the model has {site.stream} at {elsewhere}" if elsewhere else "")
            )
        return self.blocks[site.layer].get_submodule(paths[site.stream])

    def around_mlp(self, layer: int) -> tuple[nn.Module, nn.Module]:
        """The module whose input an MLP's transcoder reads, and the one whose output it writes.

        Raises:
            UserError: the model has no such layer, or its block does not offer `mlp_out`.
        """
        written = self.module(Site(layer, "mlp_out"))
        # A post-norm emits what the MLP adds, so that the module that reads is found by its neurons.
        inside = self.paths[layer].get("neurons", "").rpartition(".")[0] or self.paths[layer]["mlp_out"]
        return self.blocks[layer].get_submodule(inside), written

    def width(self, site: Site) -> int:
        """Size of the last dimension of a site's tensor.

        Raises:
            UserError: the model does not offer the site.
        """
        if site.stream == TRANSCODED:
            self.around_mlp(site.layer)
            return self.widths[Site(site.layer, "mlp_out")] + self.widths[Site(site.layer, "resid_pre")]
        self.module(site)
        return self.widths[site]

    @property
    def all_sites(self) -> list[Site]:
        """Every site, by layer."""
        return [Site(layer, stream) for layer, paths in enumerate(self.paths) for stream in paths]

    @property
    def sites(self) -> list[Site]:
        """The sites of a sweep over all sites: all but `neurons`, which are much wider than the residual stream."""
        return [site for site in self.all_sites if site.stream != "neurons"]

    @property
    def streams(self) -> list[str]:
        """The streams among `sites`."""
        return list(dict.fromkeys(site.stream for site in self.sites))

    def of_stream(self, stream: str) -> list[Site]:
        """The sites of one stream, in all layers that offer it.

        Raises:
            UserError: no layer offers the stream.
        """
        sites = [site for site in self.all_sites if site.stream == stream]
        if not sites:
            self.module(Site(0, stream))  # raises
        return sites

    def without(self, sites: Collection[Site]) -> "Layout":
        paths = tuple(
            {stream: path for stream, path in offered.items() if Site(layer, stream) not in sites}
            for layer, offered in enumerate(self.paths)
        )
        return replace(self, paths=paths)
