"""Train sparse autoencoders at several sites of a model in one pass over its activations."""

import logging
import math
import time
from collections.abc import Generator, Iterable, Sequence
from contextlib import ExitStack, closing, nullcontext
from copy import copy
from dataclasses import asdict, dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

import torch

from saepatch.dictionaries.dictionary import Dictionary
from saepatch.errors import UserError
from saepatch.model.language_model import LanguageModel, Tokens, refuse_training
from saepatch.model.sites import Site
from saepatch.runs.driver import locked
from saepatch.tracking.open import RunDescription, Tracker, open_tracker

from ..config import TrainingConfig
from ..data.activations import ActivationStream, Batch, Position, forward
from ..data.document import Document
from ..data.texts import Streamed, as_documents, split
from ..ranks import ALONE, Ranks
from ..steps.finetune import finetune
from ..steps.initial import Initial, fingerprints, initial_dictionaries, new_learners
from ..steps.learner import Learner, reconstruction, schedule
from . import checkpoints, saving
from .assembled import assemble, divided, on_whole_dictionaries
from .checkpoints import Checkpoint, identifying_settings
from .checks import check_also, check_model
from .evaluate import evaluate_all, held_out_tokens
from .progress import ProgressBar, StopRequest, deferred_signals
from .saving import Outcome

log = logging.getLogger(__name__)

FIRST_TOKENS = 16_384  # tokens whose activations determine the scale and the initial decoder bias


def train_saes(
    model: LanguageModel,
    texts: Iterable[Document] | Streamed,
    config: TrainingConfig,
    out: Path,
    ranks: Ranks = ALONE,
    also: Sequence[LanguageModel] = (),
) -> Outcome:
    """Train one SAE per site and save each as `out/SITE/` in sae_lens' format, with its metrics.

    All sites share one stream of activations. A share of the texts is held out for evaluation. `config.model`,
    `config.also`, `config.data` and `config.out` are only recorded. The log is written to `out` during training;
    dictionaries, `summary.json` and `config.yaml` appear once all are complete. SIGTERM and SIGINT end the run with a
    checkpoint after the current step; with `config.resume` the same call continues from it, on the CPU bit for bit.

    Args:
        model: The model whose activations to train on.
        texts: Documents (`Document`); an iterable that is not a sequence is read to its end first.
        config: The run.
        out: Output folder.
        ranks: The processes of the run; each calls this with the same arguments.
        also: Further models to train on. Evaluations during training use `model` only.

    Raises:
        UserError: the model lacks a site, there are too few texts, `out` cannot be written or holds dictionaries, the
            checkpoint belongs to another run, or a loss is not finite.
    """
    with locked(out) if ranks.first else nullcontext():
        return _train(model, texts, config, out, ranks, also)


def _train(
    model: LanguageModel,
    texts: Iterable[Document] | Streamed,
    config: TrainingConfig,
    out: Path,
    ranks: Ranks,
    also: Sequence[LanguageModel],
) -> Outcome:
    sites = config.sites_of(model.n_layers)
    check_model(model, sites, config, ranks)
    check_also(model, also, sites, config)
    saving.check_folder(out, sites, config)
    for trained_on in (model, *also):
        refuse_training(trained_on)
    train, held_out = split(as_documents(texts), config.held_out, config.seed)
    stream = ActivationStream(model, train, sites, config, ranks, also=also)
    run = Run(model, sites, config, out, ranks, stream, initial_dictionaries(model, sites, config))
    if config.resume and (done := saving.finished(out, sites)) is not None:
        saving.check_identity(done.identity, run.identity(), out)
        if ranks.first:
            checkpoints.clear_parts(out)
        log.info("the run in %s is already finished", out)
        return Outcome(done.figures, config.steps * config.batch_size, also=done.also)
    run.begin()
    run.held_out = held_out_tokens(model, held_out, config.context, config.eval_tokens)
    stream.check_evaluated(run.held_out)
    with ExitStack() as stack:
        if ranks.first:
            run.tracker = stack.enter_context(run.open_tracker())
        run.stop_request = stack.enter_context(deferred_signals())
        if not (run.fit() and assemble(run) and run.calibrate() and run.finetune()):
            return Outcome({}, run.tokens, stopped=True)
        return run.finish()


@dataclass(eq=False)
class Run:
    """A run in progress: the state stored in checkpoints, and the objects it works with.

    `finetuned` is the number of sites whose fine-tuning is done.
    """

    model: LanguageModel
    sites: Sequence[Site]
    config: TrainingConfig
    out: Path
    ranks: Ranks
    stream: ActivationStream
    initial: Initial = field(default_factory=dict)
    learners: dict[Site, Learner] = field(default_factory=dict)
    position: Position = field(default_factory=Position)
    step: int = 0
    seconds: float = 0.0
    finetuned: int = 0
    run_id: str | None = None
    tracker: Tracker = field(init=False)
    held_out: Tokens = field(init=False)
    stop_request: StopRequest = field(init=False)

    def begin(self) -> None:
        """Start from the newest checkpoint with `resume`, or else from the beginning.

        Raises:
            UserError: the checkpoint is from a run with other settings, another model or other text.
        """
        checkpoint = checkpoints.newest(self.out, str(self.model.device)) if self.config.resume else None
        if self.ranks.first:
            saving.begin(self.out, self.config.overwrite and checkpoint is None)
        if checkpoint is None:
            return
        state = checkpoint.state
        saving.check_identity(state, self.identity(), self.out)
        self.step, self.seconds, self.run_id = state["step"], state["seconds"], state["run_id"]
        self.position, self.finetuned = Position(**state["position"]), state["finetuned"]
        self.learners = {
            site: Learner.restored(checkpoint.tensors[site], state["learners"][str(site)], self.config)
            for site in self.sites
        }
        self.learners = divided(self.learners, self.config, self.ranks, self.model.device)
        log.info("resuming after %s tokens", f"{checkpoint.tokens:,}")

    def open_tracker(self) -> Tracker:
        about = RunDescription(
            self.out,
            run=self.out.name,
            config=self.config.to_dict(),
            run_id=self.run_id,
            job_type="train",
            axes={"*": "tokens"},
        )
        return open_tracker(self.config.track, about, resume_from=self.logged if self.learners else None)

    @property
    def tokens(self) -> int:
        return self.step * self.config.batch_size

    @property
    def logged(self) -> int:
        """Step of the log after the work done so far, in tokens; those of fine-tuning count after the others."""
        return self.tokens + self.finetuned * self.config.finetune_tokens

    def fit(self) -> bool:
        """The training loop: every site takes a step on each batch of the stream. False if the run was stopped.

        Raises:
            UserError: a loss is not finite.
        """
        config, start = self.config, time.monotonic() - self.seconds
        if self.step >= config.steps:
            return True
        total = config.steps * config.batch_size
        with closing(self._batches()) as batches, ProgressBar(total, self.tokens, self.ranks.first) as progress:
            for batch, after in batches:
                last = self.step == config.steps - 1
                logged = self.step % config.log_every == 0 or last
                rate = config.lr * schedule(self.step, config.steps, config.warmup, config.decay)
                figures = self._train(batch, rate, logged)
                self.step, self.position, self.seconds = self.step + 1, after, time.monotonic() - start
                progress.add(config.batch_size)
                if logged:
                    self._log(figures, rate, progress)
                if self._due(config.eval_every) and not last:
                    self._evaluate()
                stop = self._stop_requested()
                if stop or last or self._due(config.checkpoint_every):
                    self.save()
                if self._due(config.save_every) and not last:
                    self._snapshot()
                if last:
                    return True
                if stop:
                    return False
        raise UserError(
            f"the text ended after {self.tokens:,} of {config.tokens:,} tokens: lower tokens or give more text"
        )

    def _batches(self) -> Generator[tuple[Batch, Position]]:
        """The stream from the run's position on; a new run's dictionaries are initialised from its first batches."""
        with closing(self.stream.batches(self.position, self.config.steps - self.step)) as batches:
            if not self.learners:
                count = max(1, min(self.config.steps, FIRST_TOKENS // self.config.batch_size))
                first = list(islice(batches, count))
                samples = {site: torch.cat([batch[site] for batch, _ in first]) for site in self.sites}
                samples = {s: self.ranks.gathered(x.flatten()).view(-1, x.shape[-1]) for s, x in samples.items()}
                learners = new_learners(samples, self.initial, self.config)
                self.learners = divided(learners, self.config, self.ranks, self.model.device)
                yield from first
            yield from batches

    def _train(self, batch: Batch, rate: float, logged: bool) -> dict[Site, dict[str, float]]:
        figures = {}
        for site, learner in self.learners.items():
            step = learner.step(batch[site], rate, self.ranks)
            # On an accelerator, reading every loss would force a synchronisation.
            if logged or self.model.device.type == "cpu":
                loss = sum(float(term) for term in step.losses.values())
                if not math.isfinite(loss):
                    raise UserError(
                        f"the loss at {site} is {loss} at step {self.step}: start again with --overwrite true and a "
                        f"lower lr (it is {self.config.lr})"
                    )
            if logged:
                figures[site] = learner.figures(batch[site], step)
        return figures

    def _log(self, figures: dict[Site, dict[str, float]], rate: float, progress: ProgressBar) -> None:
        names = list(dict.fromkeys(name for row in figures.values() for name in row))
        # Sites without dead latents have no auxiliary loss.
        rows = [[row.get(name, 0.0) for name in names] for row in figures.values()]
        values = torch.tensor(rows, device=self.model.device)
        self.ranks.mean_([values])
        if not self.ranks.first:
            return
        flat = {
            f"{site}/{name}": float(value)
            for site, row in zip(figures, values)
            for name, value in zip(names, row, strict=True)
        }
        progress.show({name: float(values[:, names.index(name)].mean()) for name in ("loss", "fvu", "l0", "dead")})
        self.tracker.log({**flat, "lr": rate, "tokens_per_second": progress.rate}, step=self.tokens)

    def _due(self, every: int) -> bool:
        """Whether this step completed another `every` tokens; never for 0."""
        return every > 0 and self.tokens // every > (self.tokens - self.config.batch_size) // every

    def _stop_requested(self) -> bool:
        if self.ranks.size == 1:
            return self.stop_request.stop
        return bool(self.ranks.any(torch.tensor([self.stop_request.stop], device=self.model.device)))

    @on_whole_dictionaries
    def _evaluate(self) -> None:
        if not self.ranks.first:
            return
        with self.stream.paused():  # or else its thread would run the spliced model
            evaluations = evaluate_all(self.model, list(self._dictionaries().values()), self.held_out)
        for site, evaluation in zip(self.learners, evaluations, strict=True):
            self.tracker.histogram(f"{site}/density", evaluation.density.counts, evaluation.density.edges, self.tokens)
        figures = {
            f"{site}/eval/{name}": value
            for site, evaluation in zip(self.learners, evaluations, strict=True)
            for name, value in evaluation.figures.items()
        }
        self.tracker.log(figures, step=self.tokens)

    def _dictionaries(self) -> dict[Site, Dictionary]:
        excluded = None if self.config.special_tokens else self.stream.special
        return saving.finished_dictionaries(self.learners, self.out, excluded)

    def calibrate(self) -> bool:
        """Set the thresholds of dictionaries that have one so that `k` latents are active on held-out text."""
        learners = list(self.learners.items())[self.finetuned :]  # earlier ones were fine-tuned with theirs
        if not any(learner.estimates_threshold for _, learner in learners):
            return True
        rows = max(1, self.config.forward_tokens // self.held_out.width)
        with self.stream.paused():
            parts = [forward(self.model, self.sites, part, self.stream.special) for part in self.held_out.batches(rows)]
        for site, learner in learners:
            learner.calibrate(torch.cat([part[site] for part in parts])[:FIRST_TOKENS].float())
        return True

    def finetune(self) -> bool:
        """Fine-tune each dictionary through the splice, if requested. False if the run was stopped."""
        config = self.config
        if not config.finetune_tokens:
            return True
        start = time.monotonic() - self.seconds
        size = max(1, min(config.forward_tokens, config.batch_size) // self.ranks.size)
        each = list(self.learners.items())
        for site, learner in each[self.finetuned :]:
            if learner.average is not None:
                learner.weights, learner.average = learner.average, None
            parameters = [value.requires_grad_(True) for value in learner.weights.values()]
            steps = finetune(
                self.model,
                site,
                reconstruction(learner.weights, learner.scale, learner.threshold, config.sae),
                parameters,
                islice(self.stream.token_batches(config.seed + 1, size), self.ranks.rank, None, self.ranks.size),
                config,
                learner.constrain,
                self.ranks,
            )
            for step, figures in enumerate(steps):
                if step % config.log_every == 0 and self.ranks.first:
                    at = self.logged + min(round(figures["tokens"]), config.finetune_tokens)
                    self.tracker.log({f"{site}/finetune/{name}": x for name, x in figures.items()}, step=at)
                if self._stop_requested():
                    return False  # when resumed, this site's fine-tuning starts again
            for value in parameters:
                value.requires_grad_(False)
            self.finetuned, self.seconds = self.finetuned + 1, time.monotonic() - start
            self.save()
        return True

    @on_whole_dictionaries
    def _snapshot(self) -> None:
        """Save the dictionaries as they are; training is not affected."""
        learners = self.learners
        self.learners = {site: copy(learner) for site, learner in learners.items()}  # calibrating sets a threshold
        try:
            self.calibrate()
            if self.ranks.first:
                self._write(self.out / saving.SNAPSHOTS / f"{self.tokens:015d}")
        finally:
            self.learners = learners

    def _write(self, out: Path) -> tuple[dict[Site, dict[str, float]], list[saving.OtherModelQuality]]:
        """Evaluate the dictionaries and save them in a folder."""
        dictionaries = self._dictionaries()
        # All sites are trained in one loop, so each gets an equal share of its time.
        cost = {"tokens": self.tokens, "seconds": self.seconds / len(self.sites)}
        figures = {}
        with self.stream.paused():  # the stream's thread may still be running
            evaluations = evaluate_all(self.model, list(dictionaries.values()), self.held_out)
            also = [saving.quality_in(other, dictionaries, self.held_out) for other in self.stream.also]
        for site, evaluation in zip(dictionaries, evaluations, strict=True):
            figures[site] = {**evaluation.figures, **cost}
            self.tracker.histogram(f"{site}/density", evaluation.density.counts, evaluation.density.edges, self.logged)
        so_far = {"training_tokens": self.tokens, "finetuning_tokens": self.finetuned and self.config.finetune_tokens}
        about = saving.notes(self.model, self.config, self.stream.documents) | so_far
        saving.write(out, dictionaries, figures, about, self.config, self.identity(), also)
        return figures, also

    def finish(self) -> Outcome:
        """Evaluate and save the dictionaries."""
        if not self.ranks.first:
            return Outcome({}, self.tokens)
        figures, also = self._write(self.out)
        self.tracker.summarise(saving.headline(figures))
        for site in figures:
            self.tracker.artifact(str(site), self.out / str(site), self.config.upload)
        checkpoints.clear(self.out)
        return Outcome(figures, self.tokens, also={other.model_name: other.figures for other in also})

    @on_whole_dictionaries
    def save(self) -> None:
        """Write a checkpoint.

        Raises:
            UserError: it cannot be written.
        """
        if not self.ranks.first:
            return
        for learner in self.learners.values():
            if not all(bool(value.isfinite().all()) for value in learner.weights.values()):
                raise UserError(f"the weights are not finite at step {self.step}: lower lr (it is {self.config.lr})")
        state = {
            **self.identity(),
            "step": self.step,
            "finetuned": self.finetuned,
            "seconds": self.seconds,
            "run_id": self.tracker.run_id,
            "position": asdict(self.position),
            "learners": {str(site): learner.numbers() for site, learner in self.learners.items()},
        }
        tensors = {site: learner.tensors() for site, learner in self.learners.items()}
        checkpoints.save(self.out, Checkpoint(self.tokens, tensors, state), self.config.keep_checkpoints)

    def identity(self) -> dict[str, Any]:
        """Settings, model and text, which must be the same for a run to be resumed."""
        models = "+".join(model.fingerprint for model in (self.model, *self.stream.also))
        settings = {"config": identifying_settings(self.config), "model": models, "text": self.stream.fingerprint}
        return settings | ({"initial": fingerprints(self.initial)} if self.initial else {})
