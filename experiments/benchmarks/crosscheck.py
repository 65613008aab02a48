"""Do saepatch's numbers agree with those of other libraries, and with formulas written out in plain torch?

    python -m experiments.benchmarks.crosscheck

Models of GPT-2's and Llama's shape with random weights and random TopK dictionaries. Each row of the table compares one
figure with one reference: the largest difference, relative to the largest value. Libraries that are not installed are
skipped, with the reason. A difference above the tolerance is an error (exit code 2).
"""

import logging
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import cross_entropy

from saepatch.cli.parser import run_config
from saepatch.errors import UserError
from saepatch.measure.attribution import attribute
from saepatch.measure.quality import splice_quality
from saepatch.model.language_model import Tokens
from saepatch.records.tables import text_table
from saepatch.splicing.splice import splice

from .common.cases import VOCABULARIES, Case, make_case, make_subject
from .common.measuring import BenchmarkConfig, all_versions, write_results
from .common.peers import PEERS, bare_passes, hooked_transformer, missing
from .common.peers import saepatch as our_sweep
from .generation import EDIT_OF, GenerationConfig, make_task, nnsight, ours, references, sae_lens_bridge

log = logging.getLogger("experiments.benchmarks")  # by name: run as a module, this file is `__main__`


@dataclass(frozen=True)
class CrosscheckConfig(BenchmarkConfig):
    """Compare splices, patches, attribution, generation and quality with other libraries and plain formulas."""

    layers: int = 4
    """Blocks of the models; the dictionary is in the middle."""
    width: int = 48
    """Width of the residual stream."""
    heads: int = 6
    """Attention heads; the Llama shape has a third as many key-value heads."""
    vocabulary: int = 300
    """Size of the vocabulary."""
    latents: int = 256
    """Number of latents of the dictionaries."""
    k: int = 12
    """Number of latents of the TopK dictionary that are active per position."""
    edits: int = 40
    """Number of edits compared, the largest first."""
    tolerance: float = 2e-5
    """Largest difference that counts as agreement, relative to the largest value."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.tolerance > 0:
            raise UserError(f"tolerance = {self.tolerance}: use a number above 0")


@dataclass
class Crosscheck:
    """The table: each figure, its reference, and the largest difference."""

    config: CrosscheckConfig
    rows: list[tuple[str, str, str, float]] = field(default_factory=list)
    left_out: dict[str, str] = field(default_factory=dict)

    def add(self, shape: str, figure: str, beside: str, mine: Any, other: Any) -> None:
        a, b = (torch.as_tensor(value, dtype=torch.float64) for value in (mine, other))
        self.rows.append((shape, figure, beside, float((a - b).abs().max() / b.abs().max().clamp(min=1e-9))))

    @property
    def disagreeing(self) -> list[str]:
        return [" ".join(names) for *names, gap in self.rows if not gap <= self.config.tolerance]

    def table(self) -> str:
        cells = [[*names, f"{gap:.1e}", "" if gap <= self.config.tolerance else "DIFFERS"] for *names, gap in self.rows]
        text = text_table(["shape", "figure", "beside", "largest difference", ""], cells)
        return "\n".join([text, *(f"{name}: skipped, {why}" for name, why in self.left_out.items())])

    def summary(self) -> dict[str, Any]:
        rows = [dict(zip(("shape", "figure", "beside", "difference"), row, strict=True)) for row in self.rows]
        return {"rows": rows, "left_out": self.left_out, "settings": asdict(self.config), "versions": all_versions()}


@contextmanager
def _replaced(case: Case, change: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """A plain hook that changes the output of the block before the dictionary's site."""

    def hook(_module: Any, _args: Any, output: Any) -> Any:
        return (change(output[0]), *output[1:]) if isinstance(output, tuple) else change(output)

    handle = case.subject.model.layout.blocks[case.layer - 1].register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


@torch.no_grad()
def compare_splice(case: Case, add: Callable[..., None]) -> None:
    """Logits of a forward pass with the dictionary's reconstruction at its site."""
    hf, sae = case.subject.hf, case.subject.sae
    with splice(case.subject.model, case.dictionary, error="drop"):
        mine = hf(case.clean).logits
    with _replaced(case, lambda x: sae.decode(sae.encode(x))):
        add("splice", "plain hook", mine, hf(case.clean).logits)
    if missing("transformer_lens") is None:
        from sae_lens import HookedSAETransformer

        model = hooked_transformer(HookedSAETransformer, case.subject.model)
        model.add_sae(sae, use_error_term=False)
        add("splice", "sae_lens", mine, model(case.clean))


def compare_patching(case: Case, add: Callable[..., None]) -> None:
    """The metric under each edit of one latent at one position."""
    every = range(len(case))
    mine = our_sweep(case, len(case))(every)
    for name, peer in PEERS.items():
        if missing(name) is None:
            add("patching", name, mine, peer(case, len(case))(every))


def compare_attribution(case: Case, add: Callable[..., None]) -> None:
    """Attribution of the same edits: the latent's change times the gradient along its decoder row."""
    scores = attribute(case.subject.model, case.dictionary, [case.pair])
    by_edit = {(int(u), int(p)): float(s) for u, p, s in zip(scores.unit, scores.position, scores.score, strict=True)}
    gradient: Any = bare_passes(case)()
    mine = [by_edit[edit] for edit in zip(case.latents.tolist(), case.positions.tolist(), strict=True)]
    add("attribution", "autograd", mine, (case.deltas * gradient[0, case.positions]).sum(-1))


def compare_generation(shape: str, config: CrosscheckConfig, add: Callable[..., None]) -> None:
    """Greedy tokens under the same edits."""
    shared = {name: getattr(config, name) for name in BenchmarkConfig.__dataclass_fields__ if name != "out"}
    task = make_task(GenerationConfig(**shared, shape=shape, tokens=12, new_tokens=12))
    by_hand = {name: run() for name, run in references(task).items()}
    for name, run in ours(task).items():
        add("tokens", f"plain hook ({name})", run(), by_hand[EDIT_OF[name]])
    for library, make in (("sae_lens_bridge", sae_lens_bridge), ("nnsight", nnsight)):
        if missing("transformer_lens" if library != "nnsight" else library) is None:
            add("tokens", library, ours(task)["full_splice" if library != "nnsight" else "add_one"](), make(task)())


@torch.no_grad()
def compare_quality(case: Case, add: Callable[..., None]) -> None:
    """Cross-entropies, their share recovered, and the divergence, with the dictionary as a bottleneck."""
    hf, sae, ids = case.subject.hf, case.subject.sae, case.clean
    ones = torch.ones_like(ids)
    quality = splice_quality(case.subject.model, case.dictionary, Tokens(ids, ones, ones.bool()))
    names = ("ce_model", "ce_spliced", "ce_zero", "ce_recovered", "kl")
    mine = [getattr(quality, name) for name in names]

    def figures(runs: list[Tensor]) -> list[float]:
        whole, spliced, _ = (logits[0, :-1].double().log_softmax(-1) for logits in runs)
        ce = [float(cross_entropy(logits[0, :-1].double(), ids[0, 1:])) for logits in runs]
        kl = float((whole.exp() * (whole - spliced)).sum(-1).mean())
        return [*ce, (ce[2] - ce[1]) / (ce[2] - ce[0]), kl]

    runs = [hf(ids).logits]
    for change in (lambda x: sae.decode(sae.encode(x)), torch.zeros_like):
        with _replaced(case, change):
            runs.append(hf(ids).logits)
    add("quality", "formulas", mine, figures(runs))
    if missing("transformer_lens") is None:
        from sae_lens import HookedSAETransformer
        from sae_lens.evals import get_recons_loss
        from sae_lens.training.activation_scaler import ActivationScaler

        model = hooked_transformer(HookedSAETransformer, case.subject.model)
        losses = get_recons_loss(sae, model, ActivationScaler(), ids, compute_kl=True, compute_ce_loss=True)
        endings = ("without_sae", "with_sae", "with_ablation")
        ce = [float(losses[f"ce_loss_{ending}"].double().mean()) for ending in endings]
        theirs = [*ce, (ce[2] - ce[1]) / (ce[2] - ce[0]), float(losses["kl_div_with_sae"][:, :-1].double().mean())]
        add("quality", "sae_lens evals", mine, theirs)


def run(config: CrosscheckConfig) -> None:
    """Compare and print the table.

    Raises:
        UserError: a figure differs by more than the tolerance.
    """
    config.prepare()
    warnings.simplefilter("ignore")  # those of other libraries
    comparison = Crosscheck(config)
    libraries = ("sae_lens", "transformer_lens", "nnsight")
    comparison.left_out |= {name: why for name in libraries if (why := missing(name)) is not None}
    for shape in VOCABULARIES:
        subject = make_subject(shape, config.size, config.device, config.seed)
        case, add = make_case(subject, 14, config.edits, 0.3), partial(comparison.add, shape)
        compare_splice(case, add)
        compare_patching(case, add)
        compare_attribution(case, add)
        compare_generation(shape, config, add)
        compare_quality(case, add)
    write_results(comparison, config.out)
    if comparison.disagreeing:
        raise UserError(f"{len(comparison.disagreeing)} figures differ: {', '.join(comparison.disagreeing)}")


if __name__ == "__main__":
    sys.exit(run_config(CrosscheckConfig, run, "python -m experiments.benchmarks.crosscheck"))
