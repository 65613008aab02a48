"""A model whose every weight is known: it answers by an AND and an OR of directions at a site, and no more.

The letters P and Q each write a direction, and the answer needs both; R and S each write one, and the answer needs
either. Small letters write three quarters of theirs. Eight more letters write directions of their own, each of which
moves the answer a little, up or down. Nothing is normalised, and no direction is along a dimension.
"""

import random
from typing import Any

import torch
from tiny import byte_tokenizer
from torch import Tensor, nn
from transformers import PretrainedConfig, PreTrainedModel
from transformers.modeling_outputs import CausalLMOutput

from saepatch.data.pairs import PromptPair
from saepatch.dictionaries.dictionary import Dictionary
from saepatch.dictionaries.loading import adopt
from saepatch.model.language_model import LanguageModel
from saepatch.model.loading.load import wrap_model
from saepatch.model.sites import Site

WIDTH = 24
AND, OR, OTHERS = "PQ", "RS", "bcdfghjk"
NOTHING = "."
GATHERED, ANSWER, DOT = 12, 16, 17  # dimensions before the rotation: letters first, then what is gathered of PQRS
SCALE = 4.0  # what each of AND and OR adds to the answer's logit
SITE = Site(0)
# Latents of the dictionary; the last are never active, and there is one for the full stop.
LATENTS = {"h": 0, "R": 1, "c": 2, "Q": 3, "f": 4, "d": 5, "P": 6, "k": 7, "j": 8, "S": 9, "b": 10, "g": 11, ".": 12}
D_SAE = 16


def rotation() -> Tensor:
    """Row i is the direction of dimension i."""
    return torch.linalg.qr(torch.randn(WIDTH, WIDTH, generator=torch.Generator().manual_seed(0)))[0]


def dimension(letter: str) -> int:
    return DOT if letter == NOTHING else (AND + OR + OTHERS).index(letter)


class AndOrConfig(PretrainedConfig):
    model_type = "and_or"
    vocab_size = 259
    hidden_size = WIDTH
    intermediate_size = 3
    num_hidden_layers = 3
    num_attention_heads = 1
    max_position_embeddings = 64


class Block(nn.Module):
    """Adds what all positions so far hold, mapped, and a small ReLU network of the sum."""

    def __init__(self) -> None:
        super().__init__()
        self.gather = nn.Parameter(torch.zeros(WIDTH, WIDTH))
        self.inner = nn.Linear(WIDTH, 3)
        self.outer = nn.Linear(3, WIDTH, bias=False)
        for linear in (self.inner, self.outer):
            for weight in linear.parameters():
                nn.init.zeros_(weight)

    def forward(self, hidden_states: Tensor, mask: Tensor) -> Tensor:
        x = hidden_states + (hidden_states * mask).cumsum(1) @ self.gather
        return x + self.outer(torch.relu(self.inner(x)))


class AndOrModel(PreTrainedModel):
    config_class = AndOrConfig

    def __init__(self, config: AndOrConfig) -> None:
        super().__init__(config)
        self.embed = nn.Embedding(config.vocab_size, WIDTH)
        self.blocks = nn.ModuleList(Block() for _ in range(config.num_hidden_layers))
        self.head = nn.Linear(WIDTH, config.vocab_size, bias=False)

    def get_input_embeddings(self) -> nn.Module:
        return self.embed

    def get_output_embeddings(self) -> nn.Module:
        return self.head

    def forward(self, input_ids: Tensor, attention_mask: Tensor | None = None, use_cache: Any = None) -> CausalLMOutput:
        mask = torch.ones_like(input_ids) if attention_mask is None else attention_mask
        x = self.embed(input_ids)
        for block in self.blocks:
            x = block(x, mask[..., None])
        return CausalLMOutput(logits=self.head(x))


def and_or_model() -> LanguageModel:
    tokenizer = byte_tokenizer()

    def token(letter: str) -> int:
        return tokenizer.convert_tokens_to_ids(letter)

    turn, hf = rotation(), AndOrModel(AndOrConfig())
    with torch.no_grad():
        embed = torch.zeros(hf.config.vocab_size, WIDTH)
        for letter in AND + OR + OTHERS + NOTHING:
            embed[token(letter), dimension(letter)] = 1.0
        for letter in AND + OR:
            embed[token(letter.lower()), dimension(letter)] = 0.75
        hf.embed.weight.copy_(embed @ turn)
        gather = torch.zeros(WIDTH, WIDTH)
        for place in range(4):
            gather[place, GATHERED + place] = 1.0
        for place, letter in enumerate(OTHERS):
            gather[dimension(letter), ANSWER] = (0.2 + 0.05 * place) * (-1) ** place
        hf.blocks[1].gather.copy_(turn.T @ gather @ turn)
        inner, outer = torch.zeros(3, WIDTH), torch.zeros(WIDTH, 3)
        inner[0, GATHERED : GATHERED + 2] = 1.0  # AND: max(0, P + Q − 1)
        inner[1:, GATHERED + 2 : GATHERED + 4] = 1.0  # OR: min(1, 2 (R + S)), as a difference of two
        outer[ANSWER] = SCALE * torch.tensor([1.0, 2.0, -2.0])
        hf.blocks[2].inner.weight.copy_(inner @ turn)
        hf.blocks[2].inner.bias.copy_(torch.tensor([-1.0, 0.0, -0.5]))
        hf.blocks[2].outer.weight.copy_(turn.T @ outer)
        head = torch.zeros(hf.config.vocab_size, WIDTH)
        head[token("x"), ANSWER] = 1.0
        hf.head.weight.copy_(head @ turn)
    return wrap_model(hf, tokenizer, "and-or")


def and_or_dictionary() -> Dictionary:
    """A ReLU dictionary of the letters' own directions, before anything is gathered."""
    from sae_lens.saes.standard_sae import StandardSAE, StandardSAEConfig

    sae = StandardSAE(StandardSAEConfig(d_in=WIDTH, d_sae=D_SAE))
    rows = torch.zeros(D_SAE, WIDTH)
    bias = torch.full((D_SAE,), -5.0)
    for letter, latent in LATENTS.items():
        rows[latent, dimension(letter)] = 1.0
        bias[latent] = 0.0
    for latent in range(len(LATENTS), D_SAE):
        rows[latent, latent + 5] = 1.0
    directions = rows @ rotation()
    # an encoder bias a hair below 0 keeps rounding from lighting up letters that are not there
    weights = {"W_enc": directions.T.clone(), "W_dec": directions, "b_enc": bias - 1e-3, "b_dec": torch.zeros(WIDTH)}
    sae.load_state_dict(weights)
    return adopt(sae, SITE, "letters")


def and_or_pairs(n: int, seed: int = 0) -> list[PromptPair]:
    """Clean prompts hold P, Q, R and S, some of them small, among other letters; corrupted ones full stops instead.

    The other letters are drawn for each prompt by itself, so they differ within a pair.
    """
    rng = random.Random(seed)
    pairs = []
    for number in range(n):
        letters = [rng.choice((letter, letter.lower())) for letter in AND + OR]
        places = rng.sample(range(10), 4)
        clean, corrupted = (rng.choices(OTHERS + NOTHING, k=10) for _ in range(2))
        for place, letter in zip(places, letters, strict=True):
            clean[place], corrupted[place] = letter, NOTHING
        pairs.append(PromptPair("".join(clean), "".join(corrupted), "x", "y", f"p{number}"))
    return pairs
