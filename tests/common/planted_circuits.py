"""Models with hand-set weights whose circuits are known: blocks are ReLU networks of the sum of all earlier tokens.

A letter writes a direction of its own. A block adds to a position what all positions so far hold, mapped by
`gather`, and then a ReLU network of the sum. Dictionaries of the directions themselves (identity) have
no error term.
"""

from collections.abc import Sequence

import torch
from and_or import AndOrConfig, AndOrModel
from tiny import byte_tokenizer
from torch import Tensor, nn

from saepatch.data.pairs import PromptPair
from saepatch.dictionaries.dictionary import Dictionary
from saepatch.dictionaries.loading import adopt
from saepatch.model.language_model import LanguageModel
from saepatch.model.loading.load import wrap_model
from saepatch.model.sites import Site

WIDTH = 24
ANSWER = WIDTH - 1
OFF = WIDTH - 2  # what every token holds, so that no token is all zeros


def planted(letters: str, blocks: Sequence[Tensor | tuple[Tensor, ...]]) -> LanguageModel:
    """A model whose block i gathers (a matrix), runs a ReLU network (inner, bias, outer), or does both in turn."""
    hf, tokenizer = AndOrModel(AndOrConfig(num_hidden_layers=len(blocks))), byte_tokenizer()
    with torch.no_grad():
        hf.embed.weight.zero_()
        hf.embed.weight[:, OFF] = 1.0
        for place, letter in enumerate(letters):
            hf.embed.weight[tokenizer.convert_tokens_to_ids(letter), place] = 1.0
        for block, made in zip(hf.blocks, blocks, strict=True):
            if isinstance(made, Tensor):
                block.gather.copy_(made)
                continue
            *gather, inner, bias, outer = made
            if gather:
                block.gather.copy_(gather[0])
            block.inner = nn.Linear(WIDTH, len(bias))
            block.outer = nn.Linear(len(bias), WIDTH, bias=False)
            block.inner.weight.copy_(inner)
            block.inner.bias.copy_(bias)
            block.outer.weight.copy_(outer.T)
        hf.head.weight.zero_()
        hf.head.weight[tokenizer.convert_tokens_to_ids("x"), ANSWER] = 1.0
    return wrap_model(hf.eval(), tokenizer, "planted")


def wires(*routes: tuple[int, int, float]) -> Tensor:
    """A matrix that carries dimension `a` to dimension `b`, times a factor."""
    matrix = torch.zeros(WIDTH, WIDTH)
    for a, b, factor in routes:
        matrix[a, b] = factor
    return matrix


def relus(*units: tuple[dict[int, float], float, dict[int, float]]) -> tuple[Tensor, Tensor, Tensor]:
    """A ReLU network: each unit reads some dimensions with a bias, and writes some."""
    inner, bias, outer = torch.zeros(len(units), WIDTH), torch.zeros(len(units)), torch.zeros(len(units), WIDTH)
    for number, (reads, offset, writes) in enumerate(units):
        bias[number] = offset
        for dimension, factor in reads.items():
            inner[number, dimension] = factor
        for dimension, factor in writes.items():
            outer[number, dimension] = factor
    return inner, bias, outer


def identity(layer: int, signed: bool = False) -> Dictionary:
    """A ReLU dictionary of the dimensions, and with `signed` of their negatives: its error term is 0."""
    from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig

    rows = torch.cat([torch.eye(WIDTH), -torch.eye(WIDTH)]) if signed else torch.eye(WIDTH)
    sae = StandardSAE(StandardSAEConfig(d_in=WIDTH, d_sae=len(rows)))
    zeros = {"b_enc": torch.zeros(len(rows)), "b_dec": torch.zeros(WIDTH)}
    sae.load_state_dict({"W_enc": rows.T.clone(), "W_dec": rows} | zeros)
    return adopt(sae, Site(layer), f"dimensions after block {layer}")


def pair(clean: str, corrupted: str, example: str = "") -> PromptPair:
    return PromptPair(clean, corrupted, "x", "y", example)
