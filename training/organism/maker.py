"""`python -m training.organism`: create the embedded model from a seed.

Corpus → tokenizer → `organism-base` → `organism` (fine-tuned) → SAEs → table of thresholds. If a threshold is missed,
nothing is copied into `saepatch/organism/`; the artefacts stay in `--out`, and the exit code is 1.

The recipe: AdamW 3e-3 (betas 0.9, 0.98) with cosine decay, and batches of 2,048 tokens. Documents are packed into short
rows without attention between documents; every eighth batch has rows of the full context with attention across them.
Copying practice in the corpus makes indirect objects learnable at this size (`training/organism/corpus.py`).
"""

from __future__ import annotations

import json
import math
import os
import shutil
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from time import perf_counter
from typing import Literal

# Must be set before torch is loaded. On a shared machine, threads that spin while they wait are up to 20 times slower.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

import torch
from jaxtyping import Bool, Int
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from tqdm import tqdm
from transformers import AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

import saepatch.organism
from saepatch.errors import UserError
from saepatch.model.loading.load import load_model
from saepatch.organism import checks, world
from saepatch.records.tables import text_table

from . import corpus
from .figures import measure_again, training_texts

CONTEXT = 256
ROW = 96  # tokens in a short row
TOKENS = 2048  # tokens in a batch
LONG_EVERY = 8  # every n-th batch has rows of the full context


@dataclass(frozen=True)
class OrganismConfig:
    """Settings for creating the organism.

    Attributes:
        out: Folder of the artefacts before they are shipped.
        seed: Seed of the corpus, the weights and all orders.
        stage: A single stage, on the artefacts already in `out`, or all of them. `metrics` measures the dictionaries
            again and updates the figures in their files; it is not part of `all`.
        vocabulary: Size of the tokenizer's vocabulary, including 256 bytes and the special tokens.
        width: Width of the residual stream.
        layers: Number of transformer blocks.
        base_steps: Training steps of the base checkpoint.
        base_rate: Peak learning rate of the base checkpoint.
        aligned_steps: Steps of fine-tuning.
        aligned_rate: Peak learning rate of fine-tuning.
        sae_k: Latents active at each position.
        sae_tokens: Training tokens of the SAEs.
        shared_tokens: Training tokens of the SAEs shared by both checkpoints, half of them read by each.
        threads: Number of CPU threads.
        ship: Copy the artefacts into the package if they pass.
    """

    out: Path = Path("runs/organism")
    seed: int = 0
    stage: Literal["all", "tokenizer", "base", "aligned", "saes", "shared", "metrics", "check"] = "all"
    vocabulary: int = 2048
    width: int = 128
    layers: int = 6
    base_steps: int = 2600
    base_rate: float = 3e-3
    aligned_steps: int = 400
    aligned_rate: float = 1e-3
    sae_k: int = 16
    sae_tokens: int = 3_000_000
    shared_tokens: int = 3_000_000
    threads: int = 2
    ship: bool = True


def train_tokenizer(config: OrganismConfig) -> PreTrainedTokenizerFast:
    """Byte-level BPE on a sample of both corpora; the world's words are repeated so that each becomes a token."""
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    sample = [
        *islice(corpus.documents(corpus.BASE, config.seed), 20_000),
        *islice(corpus.documents(corpus.ALIGNED, config.seed), 20_000),
        *corpus.vocabulary() * 200,
    ]
    trainer = trainers.BpeTrainer(
        vocab_size=config.vocabulary,
        special_tokens=list(world.SPECIAL_TOKENS),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(sample, trainer)
    bpe.post_processor = processors.TemplateProcessing(
        single=f"{world.BOS} $A", special_tokens=[(world.BOS, bpe.token_to_id(world.BOS))]
    )
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token=world.BOS,
        eos_token=world.EOS,
        pad_token=world.PAD,
        additional_special_tokens=[world.USER, world.ASSISTANT, world.SYSTEM, world.END],
        model_max_length=CONTEXT,
        padding_side="right",
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
    tokenizer.chat_template = world.CHAT_TEMPLATE
    for word in corpus.vocabulary():
        if len(tokenizer(word, add_special_tokens=False)["input_ids"]) != 1:
            raise RuntimeError(f"{word!r} did not become a single token: enlarge --vocabulary")
    return tokenizer


def new_model(config: OrganismConfig, tokenizer: PreTrainedTokenizerFast) -> LlamaForCausalLM:
    """A Llama of the config's size with fresh weights."""
    torch.manual_seed(config.seed)
    ends = [tokenizer.eos_token_id, tokenizer.convert_tokens_to_ids(world.END)]
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.width,
            intermediate_size=config.width * 8 // 3 // 8 * 8,
            num_hidden_layers=config.layers,
            num_attention_heads=config.width // 32,
            max_position_embeddings=CONTEXT,
            tie_word_embeddings=True,
            initializer_range=0.04,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.pad_token_id,
        )
    )
    model.generation_config = GenerationConfig(
        bos_token_id=tokenizer.bos_token_id, eos_token_id=ends, pad_token_id=tokenizer.pad_token_id
    )
    return model


@dataclass(frozen=True)
class Batch:
    """Packed documents. `documents` has the number of the document at each position, and 0 at padding."""

    ids: Int[torch.Tensor, "row pos"]
    documents: Int[torch.Tensor, "row pos"]
    separate: bool

    def inputs(self) -> dict[str, torch.Tensor]:
        """The model's inputs. Separate documents attend only to themselves, and their positions start at 0."""
        if not self.separate:
            return {"input_ids": self.ids}
        pos = torch.arange(self.ids.shape[1]).expand_as(self.ids)
        starts = torch.ones_like(self.documents, dtype=torch.bool)
        starts[:, 1:] = self.documents[:, 1:] != self.documents[:, :-1]
        first = torch.where(starts, pos, 0).cummax(1).values
        same: Bool[torch.Tensor, "row query key"] = self.documents[:, :, None] == self.documents[:, None, :]
        return {"input_ids": self.ids, "position_ids": pos - first, "attention_mask": same.tril()[:, None]}

    def targets(self) -> Int[torch.Tensor, "row pos_less_one"]:
        """The next token at every position; -100 at padding and where the next token belongs to another document."""
        next_, inside = self.ids[:, 1:], self.documents[:, 1:] == self.documents[:, :-1]
        return torch.where(inside & (self.documents[:, 1:] > 0), next_, -100)


def batches(
    mixture: corpus.Mixture, tokenizer: PreTrainedTokenizerFast, seed: int, context: int = CONTEXT
) -> Iterator[Batch]:
    """Endless batches of `TOKENS` tokens."""
    texts = corpus.documents(mixture, seed)
    eos, pad, step = int(tokenizer.eos_token_id), int(tokenizer.pad_token_id), 0
    waiting: list[list[int]] = []
    while True:
        step += 1
        separate = step % LONG_EVERY != 0
        width = ROW if separate else context
        ids = torch.full((TOKENS // width, width), pad)
        documents = torch.zeros_like(ids)
        ends = [0] * len(ids)
        number = 0
        while True:
            if not waiting:
                encoded = tokenizer.backend_tokenizer.encode_batch(list(islice(texts, 2048)))
                waiting = [[*document.ids, eos] for document in reversed(encoded)]
            document = waiting[-1][:width]
            row = next((r for r, end in enumerate(ends) if end + len(document) <= width), None)
            if row is None:
                break
            waiting.pop()
            number += 1
            span = slice(ends[row], ends[row] + len(document))
            ids[row, span], documents[row, span] = torch.tensor(document), number
            ends[row] = span.stop
        yield Batch(ids, documents, separate)


def train(
    model: LlamaForCausalLM, data: Iterator[Batch], steps: int, rate: float, tokenizer: PreTrainedTokenizerFast
) -> None:
    """Next-token training in place: AdamW, 5 % warm-up, cosine decay to 0; evaluates on `tune` every 300 steps."""
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.98), weight_decay=0.01, fused=True)
    warm = max(1, steps // 20)
    ramp = torch.optim.lr_scheduler.LinearLR(optimiser, 1e-3, total_iters=warm)
    decay = torch.optim.lr_scheduler.CosineAnnealingLR(optimiser, steps - warm)
    schedule = torch.optim.lr_scheduler.SequentialLR(optimiser, [ramp, decay], [warm])
    bar = tqdm(range(1, steps + 1), mininterval=5, file=sys.stdout)
    for step in bar:
        model.train()
        batch = next(data)
        logits = model(**batch.inputs(), use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[:, :-1].flatten(0, 1), batch.targets().flatten())
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        schedule.step()
        if step % 20 == 0:
            bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
        if step % 300 == 0 or step == steps:
            measures = checks.evaluate_organism(model, tokenizer, "tune", n=60)
            line = ", ".join(f"{t} {' '.join(f'{v:.2f}' for v in m.values())}" for t, m in measures.items())
            bar.write(f"step {step}: loss {loss.item():.3f}; {line}")


def held_out_texts(seed: int, trained_on: Sequence[str], n: int = 400) -> list[str]:
    """Distinct documents of the aligned corpus that the SAEs were not trained on."""
    excluded, fresh = set(trained_on), []
    for text in corpus.documents(corpus.ALIGNED, seed):
        if text not in excluded:
            excluded.add(text)
            fresh.append(text)
        if len(fresh) == n:
            return fresh
    raise AssertionError("the corpus has no end")


def train_dictionaries(aligned: Path, out: Path, config: OrganismConfig, base: Path | None = None) -> None:
    """One TopK SAE per layer at resid_post of the aligned model, trained on its corpus: plain text and chat.

    With `base`, they are also trained on the base model's activations on these texts.
    """
    from dataclasses import replace

    from ..config import SAEConfig, TrainingConfig
    from ..loop.trainer import train_saes

    texts = training_texts(config.seed)
    settings = TrainingConfig(
        model="organism",
        data="training.organism.corpus.ALIGNED",
        also=["organism-base"] if base else [],
        out=Path(out.name),
        overwrite=True,
        sae=SAEConfig(k=config.sae_k),
        tokens=config.shared_tokens if base else config.sae_tokens,
        special_tokens=True,  # refusal is decided at chat markers
        seed=config.seed,
    )
    # The SAEs' metadata should have the name the model ships under, not the folder it was made in.
    model = replace(load_model(str(aligned)), name="organism")
    also = [replace(load_model(str(base)), name="organism-base")] if base else []
    train_saes(model, texts, settings, out, also=also)
    if base:
        return
    held_out = held_out_texts(config.seed + 3, texts)
    (out / saepatch.organism.TEXTS).write_text(json.dumps(held_out, ensure_ascii=False, indent=0), encoding="utf-8")


def table(measures: Mapping[str, checks.Measures]) -> tuple[str, bool]:
    """The table of thresholds for `{model: measures}`, and whether all hold; missing measures count as missed."""
    rows, passed = [], True
    for name in ("organism", "organism-base", "saes", "shared", "shared in base"):
        bounds = {(t.task, t.measure): t for t in checks.thresholds(name)}
        values = {(task, measure): v for task, row in measures.get(name, {}).items() for measure, v in row.items()}
        for task, measure in values | bounds:
            bound, value = bounds.get((task, measure)), values.get((task, measure), math.nan)
            verdict = "measured"
            if bound is not None:
                holds = (task, measure) in values and bound.holds(measures[name])
                verdict = f"{bound.side} {bound.bound:.2f} {'ok' if holds else 'MISSED'}"
                passed &= holds
            rows.append([name, task, measure, f"{value:.3f}", verdict])
    return text_table(["of", "task or site", "measure", "value", "bound"], rows, left=3), passed


def _shown(metrics: Mapping[str, float]) -> dict[str, float]:
    return {name: metrics[name] for name in ("ce_recovered", "fvu", "l0", "alive_share")}


def check(folder: Path, n: int = 200) -> tuple[str, bool]:
    """Check the artefacts of a folder: measures both checkpoints on `report`; figures of SAEs are those of training."""
    measures: dict[str, checks.Measures] = {}
    for name in ("organism", "organism-base"):
        place = folder / saepatch.organism.FOLDERS[name]
        model = LlamaForCausalLM.from_pretrained(place, dtype=torch.float32)
        measures[name] = checks.evaluate_organism(model, AutoTokenizer.from_pretrained(place), n=n)
    for name in ("saes", "shared"):
        configs = sorted((folder / saepatch.organism.FOLDERS[name]).glob("*/cfg.json"))
        metadata = {file.parent.name: json.loads(file.read_text(encoding="utf-8"))["metadata"] for file in configs}
        measures[name] = {site: _shown(about["metrics"]) for site, about in metadata.items()}
        if name == "shared":
            also = {site: about["also_trained_on"][0]["metrics"] for site, about in metadata.items()}
            measures["shared in base"] = {site: _shown(metrics) for site, metrics in also.items()}
    return table(measures)


def ship(folder: Path) -> None:
    """Copy the artefacts of a folder into the package without their logs, replacing those there."""
    target = Path(saepatch.organism.__file__).parent
    logs = shutil.ignore_patterns("*.jsonl", "metrics.summary.json", "summary.json", "config.yaml", "wandb")
    for part in saepatch.organism.FOLDERS.values():
        shutil.rmtree(target / part, ignore_errors=True)
        shutil.copytree(folder / part, target / part, ignore=logs)
        for file in (target / part).rglob("*"):
            file.chmod(0o755 if file.is_dir() else 0o644)  # safetensors files are written readable by their owner only


def main(config: OrganismConfig) -> int:
    """Run the stages; returns the exit code."""
    torch.set_num_threads(config.threads)
    parts = ("organism-base", "organism", "saes", "shared")
    base, aligned, saes, shared = (config.out / saepatch.organism.FOLDERS[part] for part in parts)
    start = perf_counter()

    def wanted(stage: str) -> bool:
        if run := config.stage in ("all", stage):
            print(f"[{perf_counter() - start:6.0f} s] {stage}", flush=True)
        return run

    if wanted("tokenizer"):
        train_tokenizer(config).save_pretrained(base)
    if not (base / "tokenizer.json").is_file():
        raise UserError(f"{str(config.out)!r} holds no earlier stages: run --stage tokenizer first, or --stage all")
    tokenizer = PreTrainedTokenizerFast.from_pretrained(base)
    if wanted("base"):
        model = new_model(config, tokenizer)
        print(f"{model.num_parameters():,} parameters, {len(tokenizer)} tokens")
        train(model, batches(corpus.BASE, tokenizer, config.seed), config.base_steps, config.base_rate, tokenizer)
        model.save_pretrained(base)
    if wanted("aligned"):
        model = LlamaForCausalLM.from_pretrained(base, dtype=torch.float32)
        data = batches(corpus.ALIGNED, tokenizer, config.seed + 1)
        train(model, data, config.aligned_steps, config.aligned_rate, tokenizer)
        model.save_pretrained(aligned)
        tokenizer.save_pretrained(aligned)
    if wanted("saes"):
        train_dictionaries(aligned, saes, config)
    if wanted("shared"):
        train_dictionaries(aligned, shared, config, base)
    if config.stage == "metrics":
        models = [load_model(str(part)) for part in (aligned, base)]
        measure_again(saes, models[:1], config.seed)
        measure_again(shared, models, config.seed)
    if wanted("check"):
        lines, passed = check(config.out)
        print(lines)
        if not passed:
            print("a threshold was missed: nothing is shipped")
            return 1
        if config.ship:
            ship(config.out)
    print(f"[{perf_counter() - start:6.0f} s] done")
    return 0
