"""Train a sparse autoencoder at several sites of a model in one pass over its activations."""

import json
import logging
import math
import os
import shutil
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import chain, islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
import yaml
from jaxtyping import Float, Int
from torch import Tensor
from tqdm import tqdm

from saepatch.dictionaries import Dictionary
from saepatch.errors import UserError
from saepatch.models import LanguageModel
from saepatch.results import check_writable, versions
from saepatch.sites import Site
from saepatch.tracking import Tracker, open_tracker
from training.activations import ActivationStream, Batch, split
from training.config import SAEConfig, TrainingConfig
from training.evaluate import evaluate, held_out_tokens

if TYPE_CHECKING:
    from sae_lens.saes.topk_sae import TopKTrainingSAE

log = logging.getLogger(__name__)

_CALIBRATION_TOKENS = 16_384  # activations that scale and decoder bias are set from


def train_saes(
    model: LanguageModel,
    texts: Sequence[str] | Iterable[str],
    config: TrainingConfig,
    out: Path,
) -> dict[Site, dict[str, float]]:
    """Train one TopK SAE a site and save each as `out/SITE/` in sae_lens' format, with its metrics.

    All sites learn from one stream of activations. A share of the texts is held out and evaluated on. `config.model`,
    `config.data` and `config.out` are not used, only noted down. `out` gets its log as training goes; dictionaries,
    `summary.json` and `config.yaml` appear in it once all of them are complete.

    Args:
        model: Whose activations are learnt.
        texts: Documents; an iterable that is no sequence is read to its end first.
        config: The run.
        out: Folder for all of it.

    Returns:
        The content of each site's `metrics.json`.

    Raises:
        UserError: the model has no such site, the texts are too few, `out` cannot be written or holds dictionaries
            already, or a loss is not finite.
    """
    sites = config.sites_of(model.n_layers)
    check_model(model, sites, config)
    check_folder(out, sites, config.overwrite)
    documents = texts if isinstance(texts, Sequence) else list(texts)
    train, held_out = split(documents, config.held_out, config.seed)
    tokens = held_out_tokens(model, held_out, config.context, config.eval_tokens)
    log.info("%d documents to train on, %d held out", len(train), len(held_out))

    with open_tracker(config.track, out, run=out.name, config=config.to_dict()) as tracker:
        start = time.perf_counter()
        learners = fit(model, train, sites, config, tracker)
        seconds = time.perf_counter() - start
        finished, found = {}, {}
        for site, learner in learners.items():
            finished[site] = Dictionary(learner.finish(), site, f"{out}/{site}")
            found[site] = {
                **evaluate(model, finished[site], tokens),
                "tokens": config.steps * config.batch_size,
                # All sites are trained in one loop, so each is charged an equal part of its time.
                "seconds": seconds / len(sites),
            }
        write(out, finished, found, _notes(model, config, len(train)), config)
        tracker.summarise({f"{site}/{name}": value for site, row in found.items() for name, value in row.items()})
    return found


def fit(
    model: LanguageModel, documents: Sequence[str], sites: Sequence[Site], config: TrainingConfig, tracker: Tracker
) -> dict[Site, "Learner"]:
    """The training loop: every site takes a step on each batch of the stream.

    Raises:
        UserError: a loss is not finite.
    """
    stream: Iterator[Batch] = iter(
        ActivationStream(
            model=model,
            documents=documents,
            sites=sites,
            batch_size=config.batch_size,
            context=config.context,
            pack=config.pack,
            forward_tokens=config.forward_tokens,
            buffer=config.buffer,
            seed=config.seed,
        )
    )
    first = list(islice(stream, max(1, min(config.steps, _CALIBRATION_TOKENS // config.batch_size))))
    d_sae = config.sae.width(model.d_model)
    learners = {
        site: Learner.new(torch.cat([batch[site] for batch in first]), d_sae, config.sae, config.seed) for site in sites
    }
    total = config.steps * config.batch_size
    with tqdm(total=total, unit="tok", unit_scale=True, desc="training", mininterval=0.5) as bar:
        for step, batch in enumerate(islice(chain(first, stream), config.steps)):
            rate = config.lr * schedule(step, config.steps, config.warmup, config.decay)
            logged = step % config.log_every == 0 or step == config.steps - 1
            rows = {}
            for site, learner in learners.items():
                acts, loss = learner.step(batch[site], rate, step)
                if not math.isfinite(loss):
                    raise UserError(f"the loss at {site} is {loss} at step {step}: lower lr (it is {config.lr})")
                if logged:
                    rows[site] = {"loss": loss, **learner.measure(batch[site], acts)}
            bar.update(config.batch_size)
            if logged:
                _report(rows, rate, (step + 1) * config.batch_size, bar, tracker)
    return learners


def schedule(step: int, steps: int, warmup: float, decay: float) -> float:
    """Factor of the learning rate: a linear rise over the first share of the steps, a fall to 0 over the last."""
    rise = (step + 1) / max(1.0, warmup * steps)
    fall = (steps - step) / max(1.0, decay * steps)
    return min(1.0, rise, fall)


@dataclass(eq=False)
class Learner:
    """One SAE in training, with its optimiser and what it knows of its latents.

    The SAE sees activations times `scale`, so that their mean norm is √d_in at every site of every model, and one
    learning rate serves them all. `idle` counts tokens since each latent was last active.
    """

    sae: "TopKTrainingSAE"
    optimiser: torch.optim.Optimizer
    scale: float
    idle: Int[Tensor, "d_sae"]
    dead_after: int

    @classmethod
    def new(cls, sample: Float[Tensor, "n d_in"], d_sae: int, config: SAEConfig, seed: int) -> "Learner":
        """An untrained SAE for activations such as the sample: scaled by their norm, decoder bias at their mean."""
        from sae_lens.saes.topk_sae import TopKTrainingSAE, TopKTrainingSAEConfig

        d_in = sample.shape[-1]
        norm = float(sample.norm(dim=-1).mean())
        if not (math.isfinite(norm) and norm > 0):
            raise UserError(f"the activations have mean norm {norm}: nothing can be learnt from them, check the model")
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            sae = TopKTrainingSAE(
                TopKTrainingSAEConfig(
                    d_in=d_in,
                    d_sae=d_sae,
                    k=config.k,
                    aux_loss_coefficient=config.aux_coefficient,
                    decoder_init_norm=1.0,
                    # Rows are kept at norm 1 instead: rescaling all latents by norms takes 40 % of a step on a CPU.
                    rescale_acts_by_decoder_norm=False,
                )
            ).to(sample.device)
        scale = d_in**0.5 / norm
        with torch.no_grad():
            sae.b_dec.copy_(sample.mean(0) * scale)
        optimiser = torch.optim.Adam(sae.parameters(), lr=0.0, betas=(0.9, 0.999), fused=True)
        idle = torch.zeros(d_sae, dtype=torch.long, device=sample.device)
        return cls(sae, optimiser, scale, idle, config.dead_after)

    @property
    def dead(self) -> Tensor:
        return self.idle >= self.dead_after

    def step(
        self, x: Float[Tensor, "batch d_in"], rate: float, step: int
    ) -> tuple[Float[Tensor, "batch d_sae"], float]:
        """One step of Adam; returns the latents and the loss."""
        from sae_lens.saes.sae import TrainStepInput

        for group in self.optimiser.param_groups:
            group["lr"] = rate
        output = self.sae.training_forward_pass(
            TrainStepInput(
                sae_in=x * self.scale,
                coefficients={},
                dead_neuron_mask=self.dead,
                n_training_steps=step,
                is_logging_step=False,
            )
        )
        self.optimiser.zero_grad()
        output.loss.backward()
        torch.nn.utils.clip_grad_norm_(self.sae.parameters(), 1.0)
        self.optimiser.step()
        with torch.no_grad():
            self.sae.W_dec.div_(self.sae.W_dec.norm(dim=-1, keepdim=True).clamp(min=1e-8))
        acts = output.feature_acts.detach()
        self.idle += len(x)
        self.idle[acts.ne(0).any(0)] = 0
        return acts, float(output.loss.detach())

    @torch.no_grad()
    def measure(self, x: Float[Tensor, "batch d_in"], acts: Float[Tensor, "batch d_sae"]) -> dict[str, float]:
        """Figures for the log, on the batch just trained on (its latents from before the step)."""
        scaled = x * self.scale
        residual = (scaled - self.sae.decode(acts)).pow(2).sum()
        return {
            "fvu": float(residual / (scaled - scaled.mean(0)).pow(2).sum()),
            "l0": float(acts.ne(0).sum(-1).float().mean()),
            "dead": float(self.dead.float().mean()),
        }

    @torch.no_grad()
    def finish(self) -> Any:
        """The trained SAE as sae_lens' inference class, for activations as the model emits them.

        The scale is folded into the biases. Rows of the decoder have norm 1, so a latent's value is the length of what
        it adds to the site.
        """
        from sae_lens import SAE

        state = {name: value.detach().clone() for name, value in self.sae.state_dict().items()}
        # TopK selects by (x·scale - b_dec)·W_enc + b_enc; all of it divided by the scale has the same order.
        state["b_enc"] /= self.scale
        state["b_dec"] /= self.scale
        device = str(state["W_dec"].device)
        sae = SAE.from_dict(self.sae.cfg.get_inference_sae_cfg_dict()).to(device)
        sae.load_state_dict(state)
        return sae.eval().requires_grad_(False)


def _report(
    rows: Mapping[Site, dict[str, float]], rate: float, tokens: int, bar: "tqdm[Any]", tracker: Tracker
) -> None:
    mean = {name: sum(row[name] for row in rows.values()) / len(rows) for name in next(iter(rows.values()))}
    bar.set_postfix({name: f"{value:.3g}" for name, value in mean.items()}, refresh=False)
    values = {f"{site}/{name}": value for site, row in rows.items() for name, value in row.items()}
    tracker.log({**values, "lr": rate}, step=tokens)


def check_model(model: LanguageModel, sites: Sequence[Site], config: TrainingConfig) -> None:
    """Raises UserError when the model has no such site, too few positions, or too small a width for `k`."""
    config.sae.width(model.d_model)
    for site in sites:
        model.layout.module(site)
    limit = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if limit is not None and config.context > limit:
        raise UserError(f"context {config.context} is longer than the {limit} positions of {model.name!r}: lower it")


def check_folder(out: Path, sites: Sequence[Site], overwrite: bool) -> None:
    """See, before any work, that the dictionaries can be put where they are wanted.

    Raises:
        UserError: the folder cannot be written, or holds dictionaries that `overwrite` does not give up.
    """
    taken = [str(site) for site in sites if (out / str(site)).exists()]
    if taken and not overwrite:
        raise UserError(f"{str(out)!r} holds {', '.join(taken)} already: choose another --out, or add --overwrite true")
    check_writable(out)


def _notes(model: LanguageModel, config: TrainingConfig, documents: int) -> dict[str, Any]:
    """What every dictionary's metadata says, site and metrics aside."""
    import sae_lens

    sample = model.encode("a")
    return {
        # Without its version, sae_lens takes a file for an old one and drops the rest of the metadata.
        "sae_lens_version": sae_lens.__version__,
        "sae_lens_training_version": sae_lens.__version__,
        "saepatch_version": versions()["saepatch"],
        "model_name": model.name,
        "model_fingerprint": model.fingerprint,
        "dataset_path": config.data,
        "dataset_documents": documents,
        "training_tokens": config.steps * config.batch_size,
        "context_size": config.context,
        "prepend_bos": bool(sample) and sample[0] == model.bos_id,
        "seed": config.seed,
    }


def write(
    out: Path,
    finished: Mapping[Site, Dictionary],
    found: Mapping[Site, Mapping[str, float]],
    notes: Mapping[str, Any],
    config: TrainingConfig,
) -> None:
    """Save dictionaries, metrics, summary and config: into a folder beside their place first, then moved there.

    Raises:
        UserError: the folder cannot be written.
    """
    from sae_lens.saes.sae import SAEMetadata

    part = out / f".part-{os.getpid()}"
    try:
        for site, dictionary in finished.items():
            sae: Any = dictionary.sae
            old = sae.cfg.metadata.to_dict()
            metadata = {**old, **notes, "hook_name": site.hook_name, "metrics": dict(found[site])}
            sae.cfg.metadata = SAEMetadata(**metadata)
            sae.save_model(part / str(site))
            _json(part / str(site) / "metrics.json", found[site])
        (part / "config.yaml").write_text(yaml.safe_dump(config.to_dict(), sort_keys=False), encoding="utf-8")
        sites = {str(site): dict(row) for site, row in found.items()}
        seconds = sum(row["seconds"] for row in found.values())
        _json(part / "summary.json", {**notes, "seconds": seconds, "sites": sites})
        for made in sorted(part.iterdir()):
            place = out / made.name
            if place.is_dir():
                shutil.rmtree(place)
            made.replace(place)
    except OSError as error:
        raise UserError(f"cannot write to {str(out)!r} ({error.strerror}): choose another --out") from error
    finally:
        shutil.rmtree(part, ignore_errors=True)


def _json(path: Path, content: Mapping[str, Any]) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
