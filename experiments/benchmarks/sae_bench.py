"""SAEBench's core evaluation of dictionaries, beside our own figures over the same tokens.

    pip install --no-deps sae-bench
    python -m experiments.benchmarks.sae_bench --model organism --sae organism --out runs/sae-bench

SAEBench's own functions run on a transformer_lens copy of the weights. Rows hold BOS and then running text, without
padding; both sides leave BOS out, SAEBench as it leaves out special tokens.
"""

import sys
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib.util import find_spec
from types import SimpleNamespace

from torch import Tensor, nn

from saepatch.cli.parser import run_config
from saepatch.data.texts import load_texts
from saepatch.dictionaries.dictionary import Dictionary
from saepatch.dictionaries.loading import load_saes
from saepatch.errors import UserError
from saepatch.measure.quality import SpliceQuality, splice_quality
from saepatch.model.language_model import LanguageModel, Tokens
from saepatch.model.loading.load import load_model
from saepatch.records.files import output_folder, write_json
from saepatch.records.tables import text_table

from .common.measuring import check_counts
from .common.peers import hooked_transformer

STREAMS = {"resid_post": "hook_resid_post", "resid_pre": "hook_resid_pre"}


@dataclass(frozen=True)
class SaeBenchConfig:
    """Run SAEBench's core evaluation on dictionaries of the residual stream, beside our figures."""

    model: str = "organism"
    """The embedded model, a folder, or a Hugging Face id; of an architecture that transformer_lens converts."""
    sae: str = "organism"
    """Dictionaries: organism, a folder, or RELEASE/SAE_ID."""
    data: str = "organism"
    """Texts: a .txt, .jsonl or .json file; organism: the embedded model's own."""
    rows: int = 64
    """Number of rows."""
    context: int = 64
    """Tokens of a row, the BOS among them."""
    batch_size: int = 16
    """Rows per pass of SAEBench."""
    out: str = ""
    """Folder for summary.json; empty: the table is printed, and no file is written."""

    def __post_init__(self) -> None:
        check_counts(rows=self.rows, batch_size=self.batch_size)
        if self.context < 3:
            raise UserError(f"context = {self.context}: use at least 3")


def rows_of(config: SaeBenchConfig, model: LanguageModel) -> Tokens:
    """Running text in full rows, each after a BOS."""
    if model.bos_id is None:
        raise UserError(f"{model.name} has no BOS: rows are compared with BOS left out on both sides")
    ids = [token for text in load_texts(config.data) for token in model.encode(text) if token != model.bos_id]
    width = config.context - 1
    rows = [[model.bos_id, *ids[start : start + width]] for start in range(0, len(ids) - width + 1, width)]
    if len(rows) < config.rows:
        raise UserError(f"the texts fill {len(rows)} rows of {config.context} tokens: lower --rows or give more texts")
    return model.pad(rows[: config.rows])


class Store:
    """What the evaluation asks of an activation store: batches of tokens, from the first again after a reset."""

    def __init__(self, tokens: Tensor, batch_size: int) -> None:
        self._tokens, self._next = tokens, 0
        self.store_batch_size_prompts, self.context_size = batch_size, tokens.shape[1]

    def get_batch_tokens(self, count: int) -> Tensor:
        batch = self._tokens[self._next : self._next + count]
        self._next += count
        return batch

    def reset_input_dataset(self) -> None:
        self._next = 0


class SaeBenchSubject(nn.Module):
    """A sae_lens SAE under the settings that the evaluation reads, which sae_lens keeps in the metadata by now."""

    def __init__(self, dictionary: Dictionary) -> None:
        super().__init__()
        site = dictionary.site
        if site.stream not in STREAMS:
            raise UserError(f"dictionary at {site}: only those of resid_pre and resid_post are compared")
        name = f"blocks.{site.layer}.{STREAMS[site.stream]}"
        self.cfg = SimpleNamespace(hook_name=name, hook_layer=site.layer, hook_head_index=None, d_sae=dictionary.d_sae)
        self.encode, self.decode = dictionary.sae.encode, dictionary.sae.decode
        self.device = dictionary.W_dec.device


def theirs(model: LanguageModel, dictionary: Dictionary, tokens: Tokens, batch_size: int) -> dict[str, float]:
    """SAEBench's figures, by its names."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of pydantic, at its classes
        from sae_bench.evals.core.eval_config import CoreEvalConfig
        from sae_bench.evals.core.main import run_evals
    from transformer_lens import HookedTransformer

    batches = -(-len(tokens) // batch_size)
    config = CoreEvalConfig(
        model_name=model.name,
        batch_size_prompts=batch_size,
        n_eval_reconstruction_batches=batches,
        n_eval_sparsity_variance_batches=batches,
        compute_kl=True,
        compute_ce_loss=True,
        compute_sparsity_metrics=True,
        compute_variance_metrics=True,
        exclude_special_tokens_from_reconstruction=True,
    )
    copy = hooked_transformer(HookedTransformer, model)
    metrics, _ = run_evals(
        SaeBenchSubject(dictionary), Store(tokens.input_ids, batch_size), copy, config, ignore_tokens={model.bos_id}
    )
    return {name: float(value) for group in metrics.values() for name, value in group.items()}


def compared(ours: SpliceQuality, their: dict[str, float]) -> Iterator[tuple[str, float, float]]:
    """Figures that mean the same: name, ours, SAEBench's."""
    yield "cross-entropy of the model", ours.ce_model, their["ce_loss_without_sae"]
    yield "cross-entropy spliced", ours.ce_spliced, their["ce_loss_with_sae"]
    yield "cross-entropy with the site at 0", ours.ce_zero, their["ce_loss_with_ablation"]
    yield "loss recovered (ce_loss_score)", ours.ce_recovered, their["ce_loss_score"]
    yield "L0", ours.l0, their["l0"]
    yield "KL(model ‖ spliced)", ours.kl, their["kl_div_with_sae"]
    yield "1 − FVU (explained_variance)", 1 - ours.fvu, their["explained_variance"]
    yield "1 − FVU (explained_variance_legacy)", 1 - ours.fvu, their["explained_variance_legacy"]


def main(config: SaeBenchConfig) -> None:
    for library in ("sae_bench", "transformer_lens"):
        if find_spec(library) is None:
            raise UserError(f"{library} is not installed: pip install --no-deps {library.replace('_', '-')}")
    model = load_model(config.model)
    tokens = rows_of(config, model)
    by_site, rows = {}, []
    for site, dictionary in load_saes(config.sae).items():
        ours, their = splice_quality(model, dictionary, tokens), theirs(model, dictionary, tokens, config.batch_size)
        by_site[str(site)] = {"ours": asdict(ours) | {"site": str(site)}, "sae_bench": their}
        rows += [[str(site), name, f"{mine:.5f}", f"{other:.5f}"] for name, mine, other in compared(ours, their)]
    sys.stdout.write(text_table(["site", "figure", "saepatch", "SAEBench"], rows) + "\n")
    if config.out:
        write_json({"config": asdict(config), "sites": by_site}, output_folder(config.out) / "summary.json")


if __name__ == "__main__":
    sys.exit(run_config(SaeBenchConfig, main, "python -m experiments.benchmarks.sae_bench"))
