"""Settings of the sweeps: `patch` and `attribute`."""

import re
from dataclasses import dataclass
from typing import ClassVar, Literal

from saepatch.dictionaries.latent_set import LatentSet
from saepatch.errors import UserError
from saepatch.settings.mixins import DictionarySettings, ModelSettings, Output, Progress, Tracked, check_shard


@dataclass(frozen=True)
class SweepConfig(Output, Progress, Tracked, DictionarySettings, ModelSettings):
    """Settings that sweeps share: model, dictionaries, pairs, positions, output folder, division of the work."""

    command: ClassVar[str]  # the command with these settings
    site: str = ""
    """One site or several, as in resid_post.3,resid_post.4; empty: every site that has a dictionary."""
    pairs: str = ""
    """Prompt pairs: a task of the embedded model, such as ioi; a .jsonl, .json, .csv or .parquet file with columns
    clean, corrupted, answer, counter (for pictures also image, or clean_image and corrupted_image); a folder saved by
    `datasets`; or a dataset, OWNER/NAME[:CONFIGURATION]."""
    split: str = "report"
    """Split of a task (select, tune, report) or dataset; files have none."""
    n: int = 200
    """Maximum number of pairs; 0: all of a file or dataset."""
    clean: str = ""
    """Instead of `pairs`: the clean prompt of one pair."""
    corrupted: str = ""
    """… its corrupted prompt."""
    answers: str = ""
    """… the answer to each, separated by a bar, with leading spaces: --answers " Mary| John". Answers of several tokens
    need the metric logit_difference, log_probability or cross_entropy."""
    corruption: str = ""
    """How the corrupted run is made. Empty: from the corrupted prompt. Otherwise from the clean prompt, with noise on
    the embeddings of a text's tokens ("noise: Mary"), or with everything at the one --site set to 0 (zero) or to its
    mean over the clean prompts (mean)."""
    positions: str = "all"
    """Where to patch: all, last, an index (5, or -1 for the last), a span (3:7, or --positions=-3: with an equals
    sign), several (1,4), the tokens of a text ("at: Mary"), a turn of a chat ("turn: user"), or the tokens of a picture
    (image), of a box of it in pixels ("image: LEFT,TOP,RIGHT,BOTTOM")."""
    direction: Literal["denoise", "noise", "both"] = "denoise"
    """denoise: clean values into the corrupted run; noise: corrupted values into the clean run."""
    metric: str = "logit_difference"
    """logit_difference, probability, log_probability, cross_entropy, answer_rank, kl_divergence (of the run from the
    clean run), or your own function, MODULE:FUNCTION, imported from the working directory."""
    min_gap: float = 1e-2
    """Pairs whose clean and corrupted metric differ by less than this get no normalised effect."""
    align: Literal["equal", "right"] = "equal"
    """equal: both prompts of a pair have the same number of tokens; right: aligned at the last token."""
    batch_size: int = 0
    """Edits per forward pass; 0: chosen by speed and memory."""
    seed: int = 0
    """Seed of a task's pairs, of noise, of controls and of bootstrap draws."""
    shard: str = "0/1"
    """Share of the pairs to run: I/N counting from 0, or auto to take it from a Slurm job array or torchrun (as in
    torchrun --nproc-per-node 8 -m -- saepatch patch …: without the lone --, torchrun reads --n as its own option)."""
    part: int = 16
    """Number of pairs per write: at most so many are lost when the run is killed. `attribute` verifies the top of each
    part."""
    out: str = "runs/patch"
    """Folder for the results."""

    def __post_init__(self) -> None:
        super().__post_init__()
        inline = (self.clean, self.corrupted, self.answers)
        if bool(self.pairs) == any(inline):
            raise UserError(
                "give either --pairs (a task such as ioi, or a file) or --clean, --corrupted and "
                '--answers " Mary| John"' + (", not both" if self.pairs else "")
            )
        if any(inline) and not (self.clean and self.answers and (self.corrupted or self.corruption)):
            raise UserError("an inline pair needs all of --clean, --corrupted (or --corruption) and --answers")
        if self.answers and not re.fullmatch(r"[^|]+\|[^|]+", self.answers):
            raise UserError(
                f"answers {self.answers!r}: write two, the clean prompt's answer first, separated by a bar, each with "
                'its leading space, as in --answers " Mary| John"'
            )
        if self.n < 0 or self.batch_size < 0:
            raise UserError(f"n = {self.n}, batch_size = {self.batch_size}: neither can be below 0")
        if not re.fullmatch(r"(noise:.*\S.*|zero|mean)?", self.corruption):
            raise UserError(f"corruption {self.corruption!r}: write 'noise: TEXT', zero or mean, or leave it empty")
        if self.part < 1:
            raise UserError(f"part = {self.part}: use at least 1")
        check_shard(self.shard)
        if not self.min_gap > 0:
            raise UserError(f"min_gap = {self.min_gap}: use a number above 0, such as 0.01")
        if not self.out:
            raise UserError("out is empty: give a folder for the results")


@dataclass(frozen=True)
class PatchConfig(SweepConfig):
    """Patch latents (or error terms, streams, heads) between paired prompts, exactly; can be stopped and resumed."""

    command: ClassVar[str] = "patch"
    examples: ClassVar[tuple[str, ...]] = (
        "saepatch patch --pairs ioi --site resid_post.3 --each_position --direction both --out runs/sweep",
        'saepatch patch --pairs ioi --site resid_post.3 --latents "281; 3,17" --track wandb --out runs/groups',
        "saepatch patch --model gpt2 --sae gpt2-small-res-jb/blocks.8.hook_resid_pre --pairs pairs.csv --out runs/gpt2",
        "saepatch patch --config runs/sweep/config.yaml --out runs/again",
    )
    latents: str = ""
    """Latents patched one by one (417;281) or in groups (3,17;5); for several sites, each under its name
    ("resid_post.3: 281; 3,17 | resid_post.4: 5"); empty: every latent, one by one."""
    component: Literal["latent", "error", "stream", "head"] = "latent"
    """What to patch at a site; streams and heads need no dictionary."""
    each_position: bool = False
    """Patch at each position separately, instead of at all of them together."""
    controls: int = 5
    """Number of random control sets, and of sets matched in frequency and size, for each given latent or group."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.controls < 0:
            raise UserError(f"controls = {self.controls}: use at least 0")
        LatentSet.parse(self.latents).spelt()
        if self.latents.strip() and self.component != "latent":
            raise UserError(f"latents are given, but component is {self.component}: leave one of them out")


@dataclass(frozen=True)
class AttributeConfig(SweepConfig):
    """Estimate every latent's effect from gradients, and verify the top exactly; can be stopped and resumed."""

    command: ClassVar[str] = "attribute"
    examples: ClassVar[tuple[str, ...]] = (
        "saepatch attribute --pairs ioi --verify 50 --sample 50 --out runs/screen",
        'saepatch attribute --clean "Tom was late when" --corrupted "Mary was late when" --answers " he| she" '
        "--out runs/one",
    )
    out: str = "runs/attribute"
    """Folder for the results."""
    method: Literal["first-order", "integrated-gradients", "graddrop"] = "first-order"
    """Gradient method."""
    steps: int = 10
    """Interpolation steps from base to source, for integrated-gradients."""
    verify: int = 50
    """Number of edits with the largest estimates in each part of pairs (--part) to run exactly; 0: none."""
    sample: int = 50
    """Number of edits drawn at random from all others in each part of pairs to run exactly as well: they measure how
    good the estimates are, and bound how many large effects were missed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1 or self.verify < 0 or self.sample < 0:
            raise UserError(
                f"steps = {self.steps}, verify = {self.verify}, sample = {self.sample}: use at least 1, 0 and 0"
            )
