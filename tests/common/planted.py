"""Models whose weights are set by hand, so that what each node does to the metric is known without running it.

None has a norm, and every block but the one that is meant to be is linear. A model is made of an embedding of chosen
letters (all others embed to nothing but a constant), blocks, and directions that raise the logits of chosen letters.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from tiny import byte_tokenizer
from torch import Tensor, nn
from transformers import PreTrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS
from transformers.models.gpt2.modeling_gpt2 import eager_attention_forward

from saepatch.dictionaries.dictionary import Dictionary
from saepatch.dictionaries.loading import adopt
from saepatch.model.language_model import LanguageModel
from saepatch.model.loading.load import wrap_model
from saepatch.model.sites import Site

CONSTANT = 0  # the dimension that is 1 at every token


class PlantedConfig(PreTrainedConfig):
    model_type = "planted"

    def __init__(self, vocab_size: int = 259, hidden_size: int = 8, num_hidden_layers: int = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.vocab_size, self.hidden_size, self.num_hidden_layers = vocab_size, hidden_size, num_hidden_layers
        self.num_attention_heads = 1


class Planted(PreTrainedModel):
    config_class = PlantedConfig
    _supports_sdpa = True
    _no_split_modules = ()

    def __init__(self, config: PlantedConfig, blocks: Sequence[nn.Module]) -> None:
        super().__init__(config)
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(blocks)
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, input_ids: Tensor, use_cache: bool = False, logits_to_keep: int = 0) -> CausalLMOutput:
        x = self.embed_tokens(input_ids)
        for block in self.layers:
            x = block(x)
        return CausalLMOutput(logits=self.lm_head(x[:, -logits_to_keep:]))


class Mixing(nn.Module):
    """A linear block: adds a map of the token and another of the mean over all tokens up to it."""

    def __init__(self, width: int, scale: float = 0.0, seed: int = 0) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.own, self.mean = (nn.Parameter(scale * torch.randn(width, width, generator=generator)) for _ in range(2))

    def forward(self, hidden_states: Tensor) -> Tensor:
        x = hidden_states
        count = torch.arange(1, x.shape[1] + 1, dtype=x.dtype)[:, None]
        return x + x @ self.own + x.cumsum(1) / count @ self.mean


class Rectified(nn.Module):
    """`x + relu(x · into) · out`."""

    def __init__(self, into: Sequence[Sequence[float]], out: Sequence[Sequence[float]]) -> None:
        super().__init__()
        self.into, self.out = nn.Parameter(torch.tensor(into)), nn.Parameter(torch.tensor(out))

    def forward(self, hidden_states: Tensor) -> Tensor:
        return hidden_states + (hidden_states @ self.into.T).relu() @ self.out


class Attending(nn.Module):
    """One head of attention through transformers' interface; each map takes some dimensions as they are."""

    def __init__(self, query: Sequence[int], key: Sequence[int], value: Sequence[int], out: Sequence[int]) -> None:
        super().__init__()
        self.dims, self.out, self.is_causal = (list(query), list(key), list(value)), list(out), True
        self.config: PlantedConfig | None = None

    def forward(self, hidden_states: Tensor) -> Tensor:
        assert self.config is not None
        attend = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation, eager_attention_forward)
        heads = (hidden_states[..., dims].unsqueeze(1) for dims in self.dims)
        z, _ = attend(self, *heads, None, scaling=1.0, dropout=0.0)
        out = torch.zeros_like(hidden_states)
        out[..., self.out] = z[:, :, 0]
        return hidden_states + out


def planted_model(
    width: int,
    blocks: Sequence[nn.Module],
    letters: Mapping[str, Mapping[int, float]],
    reads: Mapping[str, Mapping[int, float]],
    others: float = 0.0,
) -> LanguageModel:
    """`letters` says what a letter's embedding holds, `reads` what raises its logit; `others`: all other logits."""
    config = PlantedConfig(hidden_size=width, num_hidden_layers=len(blocks))
    for block in blocks:
        if isinstance(block, Attending):
            block.config = config
    hf, tokenizer = Planted(config, blocks), byte_tokenizer()
    with torch.no_grad():
        hf.embed_tokens.weight.zero_()[:, CONSTANT] = 1
        hf.lm_head.weight.zero_()[:, CONSTANT] = others
        for table, chosen in ((hf.embed_tokens.weight, letters), (hf.lm_head.weight, reads)):
            for letter, values in chosen.items():
                row = table[tokenizer.convert_tokens_to_ids(letter)]
                if table is hf.lm_head.weight:
                    row.zero_()
                for dimension, value in values.items():
                    row[dimension] = value
    return wrap_model(hf, tokenizer, "planted")


def linear_model(width: int = 12, layers: int = 3) -> LanguageModel:
    """Every letter embeds to random numbers, every block is linear and mixes positions."""
    model = planted_model(width, [Mixing(width, 0.2, seed) for seed in range(layers)], {}, {}, others=1.0)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for table in (model.hf.get_input_embeddings().weight, model.hf.get_output_embeddings().weight):
            table.copy_(torch.randn(table.shape, generator=generator))
    return model


def saturated_model() -> LanguageModel:
    """One head that is sure of what it attends to. The metric is twice what it reads there, `x` against `y`.

    Dimensions: 1, 2 the query, 3, 4 the key, 5 the value, 7 what was read. `q` looks for `A` (+1), `r` for `B` (-1);
    `a` has `A`'s value and no key, and `D` (-1) is `q`'s second choice.
    """
    letters = {
        "q": {1: 40.0},
        "r": {2: 40.0},
        "A": {3: 1.0, 5: 1.0},
        "B": {4: 1.0, 5: -1.0},
        "a": {5: 1.0},
        "D": {3: 0.5, 5: -1.0},
    }
    reads = {"x": {7: 1.0}, "y": {7: -1.0}}
    return planted_model(9, [Attending((1, 2), (3, 4), (5, 6), (7, 8))], letters, reads)


def confident_model() -> LanguageModel:
    """`log P(x) - log P(y)` is 20 times dimension 1 less 10: from sure of `y` at `n` (0) to sure of `x` at `p` (1)."""
    reads = {"x": {1: 10.0, CONSTANT: -5.0}, "y": {1: -10.0, CONSTANT: 5.0}}
    return planted_model(3, [Mixing(3), Mixing(3)], {"p": {1: 1.0}, "n": {}}, reads, others=-30.0)


def cancelling_model() -> LanguageModel:
    """Dimension 1, f, acts on the metric directly, `+2 f`, and against itself through block 1, `-2 min(f, 2)`.

    f is 1 at `s` and 4 at `b`. Block 2 does nothing.
    """
    against = Rectified([[0.0, 1.0, 0.0], [-2.0, 1.0, 0.0]], [[0.0, 0.0, -1.0], [0.0, 0.0, 1.0]])
    reads = {"x": {1: 1.0, 2: 1.0}, "y": {1: -1.0, 2: -1.0}}
    return planted_model(3, [Mixing(3), against, Mixing(3)], {"s": {1: 1.0}, "b": {1: 4.0}}, reads)


def split_dictionary(site: str, width: int) -> Dictionary:
    """Two latents a dimension: 2 i is what dimension i holds where that is positive, 2 i + 1 where it is negative."""
    from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig

    sae = StandardSAE(StandardSAEConfig(d_in=width, d_sae=2 * width, apply_b_dec_to_input=False))
    both = torch.stack([torch.eye(width), -torch.eye(width)], 1).flatten(0, 1)
    with torch.no_grad():
        sae.W_enc.copy_(both.T)
        sae.W_dec.copy_(both)
        sae.b_enc.zero_()
        sae.b_dec.zero_()
    return adopt(sae, Site.parse(site), "split")
