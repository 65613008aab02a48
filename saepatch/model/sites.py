"""Sites: the tensors of a causal language model that a dictionary reads and writes."""

import logging
import re
from dataclasses import dataclass

from saepatch.errors import UserError

log = logging.getLogger(__name__)

_HOOK_NAMES = {
    "resid_pre": "hook_resid_pre",
    "resid_post": "hook_resid_post",
    "attn_out": "hook_attn_out",
    "mlp_out": "hook_mlp_out",
    "z": "attn.hook_z",
    "neurons": "mlp.hook_post",
}
STREAMS = tuple(_HOOK_NAMES)
TRANSCODED = "mlp"  # what the MLP adds, followed by what it reads: the site of a transcoder
READ_AT_INPUT = ("resid_pre", "z", "neurons")  # inputs of a module; the other streams are outputs
# In the order of a forward pass; the first two name the tensor that enters a block (resid_post of the block before).
_WITHIN_BLOCK = ("resid_post", "resid_pre", "z", "attn_out", "neurons", "mlp_out")
_HOOK_NAMES[TRANSCODED] = "mlp.hook_in"
_STREAM_OF_HOOK = {hook: stream for stream, hook in _HOOK_NAMES.items()}


@dataclass(frozen=True, order=True)
class Site:
    """One tensor of shape [batch, pos, width] in the model: `resid_post.3` is the residual stream after block 3.

    `attn_out` and `mlp_out` are what attention (in a hybrid, also a convolution or recurrence in its place) and MLP add
    to the residual stream, after a post-norm where a family has one. `z` is the concatenation of the attention heads'
    outputs before the output projection, `neurons` the MLP's hidden units before its output projection. Layers count
    from 0.

    `mlp` is the site of transcoders only: one tensor of what the MLP adds (`mlp_out`) and, after it, what the MLP
    reads. Edits write the first part.
    """

    layer: int
    stream: str = "resid_post"

    def __post_init__(self) -> None:
        if self.stream not in _HOOK_NAMES:
            raise UserError(f"unknown stream {self.stream!r}: use one of {', '.join(STREAMS)}, as in 'resid_post.3'")
        if self.layer < 0:
            raise UserError(f"layer {self.layer} is negative: layers count from 0, as in 'resid_post.0'")

    @classmethod
    def parse(cls, text: "str | Site") -> "Site":
        """Parse `resid_post.3` or the hook name `blocks.3.hook_resid_post`; a `Site` is returned unchanged."""
        if isinstance(text, Site):
            return text
        if match := re.fullmatch(r"(\w+)\.(\d{1,9})", text):
            return cls(int(match[2]), match[1])
        if (match := re.fullmatch(r"blocks\.(\d{1,9})\.([\w.]+)", text)) and match[2] in _STREAM_OF_HOOK:
            return cls(int(match[1]), _STREAM_OF_HOOK[match[2]])
        raise UserError(
            f"cannot read site {text!r}: write STREAM.LAYER with STREAM one of {', '.join(STREAMS)} "
            "(as in 'resid_post.3') or a hook name such as 'blocks.3.hook_resid_post'"
        )

    def __str__(self) -> str:
        return f"{self.stream}.{self.layer}"

    @property
    def hook_name(self) -> str:
        """The site's name in TransformerLens and sae-lens."""
        return f"blocks.{self.layer}.{_HOOK_NAMES[self.stream]}"

    @property
    def blocks_before(self) -> int:
        """Number of blocks whose output no longer matters once the site is set; 0 for what a block adds."""
        return {"resid_post": self.layer + 1, "resid_pre": self.layer}.get(self.stream, 0)

    @property
    def enters(self) -> int:
        """The first block that has to run for a change of the site to reach the logits; may be one past the last."""
        return self.layer + (self.stream == "resid_post")

    @property
    def order(self) -> tuple[int, int]:
        """Sort key by order in the forward pass; equal for both names of one tensor."""
        written = "mlp_out" if self.stream == TRANSCODED else self.stream
        return self.enters, max(0, _WITHIN_BLOCK.index(written) - 1)

    def same_tensor(self, other: "Site") -> bool:
        """Whether an edit of both writes the same tensor: `resid_pre` of layer L+1 is `resid_post` of layer L."""
        return self.order == other.order
