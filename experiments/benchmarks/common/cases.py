"""Benchmark subjects: random models of known shapes or a model from a folder, a random TopK dictionary, a prompt pair
and its largest edits.
"""

import re
from dataclasses import dataclass, replace
from functools import cached_property
from typing import Any

import torch
from jaxtyping import Float, Int
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, GPT2Config, LlamaConfig, PreTrainedTokenizerFast

from saepatch.data.batches import answer_token
from saepatch.data.pairs import PromptPair
from saepatch.dictionaries.dictionary import Dictionary
from saepatch.dictionaries.loading import adopt
from saepatch.engine.components import Edit
from saepatch.errors import UserError
from saepatch.model.hooks import capture
from saepatch.model.language_model import LanguageModel
from saepatch.model.loading.load import load_model, wrap_model
from saepatch.model.sites import Site

VOCABULARIES = {"gpt2": 50257, "llama": 32000}
CONTEXT = 1024
# With the usual 0.02 the later blocks change little, and comparing values would hardly test them.
SPREAD = 0.05  # standard deviation of the initial weights
# The pair of prompts for a model from a folder, of about 17 tokens in most tokenizers.
NAMES = "When {first} and {second} went to the store in the city, {giver} gave a drink to"
PAIR = PromptPair(
    NAMES.format(first="Mary", second="John", giver="John"),
    NAMES.format(first="Mary", second="John", giver="Mary"),
    " Mary",
    " John",
)


@dataclass(frozen=True)
class Size:
    """Sizes of the model and the dictionary."""

    layers: int = 12
    width: int = 768
    heads: int = 12
    vocabulary: int = 0  # 0: the shape's own
    latents: int = 24576
    k: int = 64

    @property
    def layer(self) -> int:
        """The layer whose input is patched: `blocks.L.hook_resid_pre`, which is our `resid_post.L-1`."""
        return self.layers // 2


@dataclass(frozen=True, eq=False)
class Subject:
    """A model, and a dictionary for the input of one of its layers."""

    shape: str
    size: Size
    model: LanguageModel
    sae: Any
    seed: int

    @property
    def hf(self) -> Any:
        return self.model.hf

    def dictionary(self, layer: int) -> Dictionary:
        """The dictionary's weights, as a dictionary for the input of any layer."""
        return adopt(self.sae, Site(layer - 1, "resid_post"), f"random topk at {layer}")

    @cached_property
    def block_weights(self) -> int:
        """Number of weights in one block's matrices: 12 · width² for GPT-2."""
        return sum(p.numel() for p in self.model.layout.blocks[0].parameters() if p.ndim > 1)


def make_subject(shape: str, size: Size, device: str, seed: int) -> Subject:
    """A random model of a shape, and its dictionary.

    Raises:
        UserError: the shape is unknown.
    """
    if shape not in VOCABULARIES:
        raise UserError(f"unknown shape {shape!r}: use {' or '.join(VOCABULARIES)}")
    vocabulary = size.vocabulary or VOCABULARIES[shape]
    torch.manual_seed(seed)
    hf = AutoModelForCausalLM.from_config(_config(shape, size, vocabulary)).to(device)
    model = wrap_model(hf, word_tokenizer(vocabulary), shape)
    return Subject(shape, size, model, make_sae(size, device, seed), seed)


def load_subject(folder: str, size: Size, device: str, seed: int) -> Subject:
    """A model from a folder or the hub, with a random dictionary; its shape is the family's name, as in `gemma`.

    Raises:
        UserError: the model cannot be loaded.
    """
    model = load_model(folder, device)
    size = replace(size, layers=model.n_layers, width=model.d_model, heads=model.n_heads)
    config: Any = model.hf.config
    return Subject(re.sub("[^a-z].*", "", config.model_type), size, model, make_sae(size, device, seed), seed)


def _config(shape: str, size: Size, vocabulary: int) -> Any:
    ends: dict[str, Any] = {"bos_token_id": 0, "eos_token_id": 0, "initializer_range": SPREAD, "vocab_size": vocabulary}
    if shape == "gpt2":
        ends |= {"architectures": ["GPT2LMHeadModel"], "n_ctx": CONTEXT}  # as published; transformer_lens reads n_ctx
        return GPT2Config(n_embd=size.width, n_layer=size.layers, n_head=size.heads, n_positions=CONTEXT, **ends)
    return LlamaConfig(
        hidden_size=size.width,
        num_hidden_layers=size.layers,
        num_attention_heads=size.heads,
        num_key_value_heads=max(1, size.heads // 3),
        intermediate_size=8 * size.width // 3,
        max_position_embeddings=CONTEXT,
        architectures=["LlamaForCausalLM"],
        **ends,
    )


def word_tokenizer(vocabulary: int) -> PreTrainedTokenizerFast:
    """A tokenizer whose token n is the word "wn", so that any row of ids can be written as text."""
    tokenizer = Tokenizer(models.WordLevel({f"w{n}": n for n in range(vocabulary)}, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


def make_sae(size: Size, device: str, seed: int) -> Any:
    """A random sae_lens TopK SAE with unit decoder rows, and their transpose as encoder."""
    from sae_lens.saes.sae import SAEMetadata
    from sae_lens.saes.topk_sae import TopKSAE, TopKSAEConfig

    metadata = SAEMetadata(hook_name=f"blocks.{size.layer}.hook_resid_pre")
    sae = TopKSAE(TopKSAEConfig(d_in=size.width, d_sae=size.latents, k=size.k, metadata=metadata, device=device))
    generator = torch.Generator().manual_seed(seed)
    rows = nn.functional.normalize(torch.randn(size.latents, size.width, generator=generator), dim=-1)
    with torch.no_grad():
        sae.W_dec.copy_(rows)
        sae.W_enc.copy_(rows.T)
    return sae.eval().requires_grad_(False)


@dataclass(frozen=True, eq=False)
class Case:
    """One prompt pair, and the edits (latent, position) in which its two runs differ most, the largest first.

    `new` has the latents' values in the clean run; `deltas` has what setting each to it adds to the residual stream.
    """

    subject: Subject
    layer: int
    dictionary: Dictionary
    pair: PromptPair
    clean: Int[Tensor, "1 pos"]
    corrupted: Int[Tensor, "1 pos"]
    answer: int
    counter: int
    latents: Int[Tensor, "edits"]
    positions: Int[Tensor, "edits"]
    new: Float[Tensor, "edits"]
    deltas: Float[Tensor, "edits width"]

    def __len__(self) -> int:
        return len(self.latents)

    @property
    def tokens(self) -> int:
        return self.corrupted.shape[1]

    @property
    def edits(self) -> list[tuple[int, Edit]]:
        """The edits as `saepatch.measure.patching.patch_edits` takes them."""
        site = self.dictionary.site
        return [(0, Edit(site, (j,), p)) for j, p in zip(self.latents.tolist(), self.positions.tolist(), strict=True)]

    @property
    def flops(self) -> float:
        """Mean FLOPs of one edit: the later blocks' matrices, at the positions from the edit on."""
        positions = float((self.tokens - self.positions).double().mean())
        return 2 * self.subject.block_weights * (self.subject.size.layers - self.layer) * positions

    def metric(self, logits: Float[Tensor, "batch vocab"]) -> list[float]:
        """Logit difference, as `saepatch.engine.metrics.logit_difference` defines it."""
        return (logits[:, self.answer].double() - logits[:, self.counter].double()).tolist()

    @torch.no_grad()
    def base_value(self) -> float:
        """The metric of the corrupted run."""
        return self.metric(self.subject.hf(self.corrupted, use_cache=False, logits_to_keep=1).logits[:, -1])[0]

    def first(self, edits: int) -> "Case":
        """The case with only the first edits."""
        part = slice(0, edits)
        return replace(
            self, latents=self.latents[part], positions=self.positions[part], new=self.new[part],
            deltas=self.deltas[part],
        )  # fmt: skip


def make_case(subject: Subject, tokens: int, edits: int, differ: float, layer: int | None = None) -> Case:
    """A pair of random prompts that differ in one token, after a share `differ` of them, and its largest edits."""
    generator = torch.Generator().manual_seed(subject.seed + tokens)
    vocabulary = subject.hf.config.vocab_size
    clean = torch.randint(1, vocabulary, (1, tokens), generator=generator)
    other = torch.randint(1, vocabulary, (1, tokens), generator=generator)
    corrupted = clean.clone()
    place = max(1, min(int(differ * tokens), tokens - 1))
    corrupted[:, place] = other[:, place]
    answer, counter = torch.randint(1, vocabulary, (2,), generator=generator).tolist()
    pair = PromptPair(_text(clean), _text(corrupted), f" w{answer}", f" w{counter}")
    return _case(subject, pair, clean, corrupted, answer, counter, edits, layer)


def real_case(subject: Subject, edits: int) -> Case:
    """The pair of indirect objects, and its largest edits.

    Raises:
        UserError: the tokenizer gives its two prompts different numbers of tokens.
    """
    model = subject.model
    clean, corrupted = (torch.tensor([model.encode(text)]) for text in (PAIR.clean, PAIR.corrupted))
    if clean.shape != corrupted.shape:
        raise UserError(f"{model.name}: the prompts {PAIR.clean!r} and {PAIR.corrupted!r} differ in length")
    answer, counter = (
        answer_token(model, PAIR.corrupted, corrupted[0].tolist(), text) for text in (PAIR.answer, PAIR.counter)
    )
    return _case(subject, PAIR, clean, corrupted, answer, counter, edits)


@torch.no_grad()
def _case(
    subject: Subject,
    pair: PromptPair,
    clean: Int[Tensor, "1 pos"],
    corrupted: Int[Tensor, "1 pos"],
    answer: int,
    counter: int,
    edits: int,
    layer: int | None = None,
) -> Case:
    layer = subject.size.layer if layer is None else layer
    dictionary, device = subject.dictionary(layer), subject.model.device
    acts = []
    for ids in (corrupted, clean):
        inputs = {"input_ids": ids.to(device), "use_cache": False}
        captured = capture(subject.hf, subject.model.layout, [dictionary.site], inputs)[dictionary.site]
        acts.append(dictionary.encode(captured).acts[0])
    old, new = acts
    size = (new - old).abs().flatten()
    count = min(edits, int(size.count_nonzero()))
    chosen = size.topk(count).indices
    positions, latents = chosen // subject.size.latents, chosen % subject.size.latents
    change = (new - old)[positions, latents]
    return Case(
        subject,
        layer,
        dictionary,
        pair,
        clean.to(device),
        corrupted.to(device),
        answer,
        counter,
        latents,
        positions,
        new[positions, latents],
        change[:, None] * dictionary.rows[latents],
    )


def _text(ids: Int[Tensor, "1 pos"]) -> str:
    return " ".join(f"w{n}" for n in ids[0].tolist())
