"""Settings of the command line's commands. Light to import: `saepatch --help` reads nothing else."""

import re
from dataclasses import dataclass
from typing import ClassVar, Literal

from saepatch.dictionaries.latent_set import LatentSet
from saepatch.errors import UserError
from saepatch.model.sites import Site


@dataclass(frozen=True, kw_only=True)
class Output:
    """How a command speaks."""

    json: bool = False
    """Say what is found as one JSON object on the standard output, for programs; implies quiet."""
    quiet: bool = False
    """No progress and no notes: warnings, errors and results alone."""


@dataclass(frozen=True)
class DemoConfig(Output):
    """Patch, steer and restore single latents in the embedded model, and write a report."""

    examples: ClassVar[tuple[str, ...]] = (
        "saepatch demo --out runs/demo",
        "saepatch demo --pairs 40 --track wandb:offline,trackio --out runs/small",
    )

    out: str = "runs/demo"
    """Folder for report.html, summary.json and results.parquet."""
    model: str = "organism"
    """Model to run on: the embedded one, or a fine-tuned copy of it in a folder."""
    sae: str = "organism"
    """Dictionaries: the embedded ones, or a folder with one sub-folder a site."""
    pairs: int = 100
    """Prompt pairs of each task and split."""
    ioi_site: str = "resid_post.3"
    """Site whose latents are patched on indirect object identification."""
    safety_site: str = ""
    """Site whose latents are restored under jailbreaks; empty: the earliest where few are enough on `tune`."""
    steering_site: str = "resid_post.3"
    """Site whose latents steer."""
    seed: int = 0
    """Seed of pairs, controls and bootstrap draws."""
    track: str = "none"
    """Beside the local log: none, wandb, wandb:offline, wandb:online, trackio, or several with commas between."""
    device: str = "cpu"
    """Where to run: cpu, cuda or mps."""

    def __post_init__(self) -> None:
        if self.pairs < 10:
            raise UserError(f"pairs = {self.pairs} is too few for intervals and controls: use at least 10")


@dataclass(frozen=True)
class InspectConfig(Output):
    """Print a model's sites and, where dictionaries are given, what each of them keeps."""

    examples: ClassVar[tuple[str, ...]] = (
        "saepatch inspect organism --sae organism",
        "saepatch inspect gpt2 --sae gpt2-small-res-jb/blocks.8.hook_resid_pre --json",
    )

    model: str
    """The embedded model (organism, organism-base), a folder, or a Hugging Face id."""
    sae: str = ""
    """Dictionaries to check against the model: organism, a folder, or RELEASE/SAE_ID."""
    device: str = "cpu"
    """Where to run: cpu, cuda or mps."""
    dtype: str = "float32"
    """Precision of the model: float32, bfloat16 or float16."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Leave off unless you trust its author."""


@dataclass(frozen=True)
class SweepConfig(Output):
    """What sweeps share: model, dictionaries, pairs, positions, where results go, how the work is cut."""

    command: ClassVar[str]  # that has these settings
    model: str = "organism"
    """The embedded model (organism, organism-base), a folder, or a Hugging Face id."""
    sae: str = "organism"
    """Dictionaries: organism, a folder (of one, or with one sub-folder a site), or RELEASE/SAE_ID."""
    site: str = ""
    """One site or several, as in resid_post.3,resid_post.4; empty: every one there is a dictionary for."""
    pairs: str = ""
    """Prompt pairs: a task of the embedded model (ioi, say); a .jsonl, .json, .csv or .parquet file with columns clean,
    corrupted, answer, counter; a folder saved by `datasets`; OWNER/NAME[:CONFIGURATION] of a dataset."""
    split: str = "report"
    """Split of a task (select, tune, report) or dataset; files have none."""
    n: int = 200
    """Pairs, at most; 0: all of a file or dataset."""
    clean: str = ""
    """Instead of `pairs`: the clean prompt of one pair."""
    corrupted: str = ""
    """… its corrupted prompt."""
    answers: str = ""
    """… the answer after each, with a bar between and their leading spaces: --answers " Mary| John"."""
    corruption: str = ""
    """What makes the corrupted run. Empty: the corrupted prompt. Else the clean prompt, with noise on the embeddings of
    a text's tokens ("noise: Mary"), or with everything at the one --site set to 0 (zero) or to its mean over the clean
    prompts (mean)."""
    positions: str = "all"
    """Where to patch: all, last, an index (5, or -1 for the last), a span (3:7, or --positions=-3: with an equals
    sign), several (1,4), or the tokens of a text ("at: Mary")."""
    direction: Literal["denoise", "noise", "both"] = "denoise"
    """denoise: clean values into the corrupted run; noise: corrupted values into the clean run."""
    metric: str = "logit_difference"
    """logit_difference, probability, log_probability, cross_entropy, answer_rank, kl_divergence (of the run from the
    clean run), or a function of your own, MODULE:FUNCTION, imported from the working directory."""
    min_gap: float = 1e-2
    """Pairs whose clean and corrupted metric differ by less have no effect of their own."""
    align: Literal["equal", "right"] = "equal"
    """equal: both prompts of a pair have as many tokens; right: they are lined up from the last token."""
    batch_size: int = 0
    """Edits at a time; 0: as many as pay and fit."""
    seed: int = 0
    """Seed of a task's pairs, of noise, of controls and of bootstrap draws."""
    shard: str = "0/1"
    """Which share of the pairs: I/N counting from 0, or auto for the one that a Slurm job array or torchrun says (as in
    torchrun --nproc-per-node 8 -m -- saepatch patch …: without the lone -- it takes --n for its own)."""
    part: int = 16
    """Pairs between two writes: what a kill can lose. `attribute` verifies so many of each part."""
    out: str = "runs/patch"
    """Folder for the results."""
    track: str = "none"
    """Beside the local log: none, wandb, wandb:offline, wandb:online, trackio, or several with commas between."""
    device: str = "cpu"
    """Where to run: cpu, cuda, cuda:1 or mps."""
    dtype: str = "float32"
    """Precision of the model: float32, bfloat16 or float16."""
    device_map: str = ""
    """auto: spread a model that is too large for one device over all there are."""
    prepend_bos: bool = False
    """Put a BOS in front of prompts where the tokenizer does not."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Leave off unless you trust its author."""
    progress: Literal["auto", "bar", "log"] = "auto"
    """A bar, or a line in the log every half minute; auto: a bar on a terminal."""

    def __post_init__(self) -> None:
        inline = (self.clean, self.corrupted, self.answers)
        if bool(self.pairs) == any(inline):
            raise UserError(
                "which prompts? Give --pairs (a task such as ioi, or a file), or else --clean, --corrupted and "
                '--answers " Mary| John"' + (", not both" if self.pairs else "")
            )
        if any(inline) and not (self.clean and self.answers and (self.corrupted or self.corruption)):
            raise UserError("an inline pair needs all of --clean, --corrupted (or --corruption) and --answers")
        if self.answers and not re.fullmatch(r"[^|]+\|[^|]+", self.answers):
            raise UserError(
                f"answers {self.answers!r} are not two: write the one after the clean prompt, a bar and the other, "
                'each with its leading space, as in --answers " Mary| John"'
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
        if self.device_map not in ("", "auto"):
            raise UserError(f"device_map {self.device_map!r}: use auto, or leave it empty")
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
    """Latents, each alone (417;281), or groups patched together (3,17;5); of several sites each under its name
    ("resid_post.3: 281; 3,17 | resid_post.4: 5"); empty: every latent, each alone."""
    component: Literal["latent", "error", "stream", "head"] = "latent"
    """What to patch at a site; streams and heads need no dictionary."""
    each_position: bool = False
    """Patch at each of the positions alone, instead of at all of them together."""
    controls: int = 5
    """Random sets, and as many matched in frequency and size, beside each of the given latents."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.controls < 0:
            raise UserError(f"controls = {self.controls}: use at least 0")
        LatentSet.parse(self.latents).spelt()
        if self.latents.strip() and self.component != "latent":
            raise UserError(f"latents are given, but component is {self.component}: leave one of them out")


@dataclass(frozen=True)
class AttributeConfig(SweepConfig):
    """Estimate what every latent contributes from gradients, and run the top exactly; can be stopped and resumed."""

    command: ClassVar[str] = "attribute"
    examples: ClassVar[tuple[str, ...]] = (
        "saepatch attribute --pairs ioi --verify 50 --sample 50 --out runs/screen",
        'saepatch attribute --clean "Tom was late when" --corrupted "Mary was late when" --answers " he| she" '
        "--out runs/one",
    )
    out: str = "runs/attribute"
    """Folder for the results."""
    method: Literal["first-order", "integrated-gradients", "graddrop"] = "first-order"
    """How gradients are taken."""
    steps: int = 10
    """Points on the way from base to source, for integrated-gradients."""
    verify: int = 50
    """Edits with the largest estimates in each part of pairs (--part) that are run exactly; 0: none."""
    sample: int = 50
    """Edits drawn at random from all others in each part of pairs that are run exactly, too: they say how good the
    estimates are, and how many large effects they can have missed."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.steps < 1 or self.verify < 0 or self.sample < 0:
            raise UserError(
                f"steps = {self.steps}, verify = {self.verify}, sample = {self.sample}: use at least 1, 0 and 0"
            )


@dataclass(frozen=True)
class MergeConfig(Output):
    """Put the parts of a run that was cut into shards together: results.parquet and summary.json."""

    examples: ClassVar[tuple[str, ...]] = (
        "saepatch merge runs/sweep",
        "saepatch merge runs/sweep --track wandb:online",
    )

    out: str
    """Folder of the run."""
    track: str = "none"
    """Beside the local log: none, wandb, wandb:offline, wandb:online, trackio, or several with commas between."""


@dataclass(frozen=True)
class ReportConfig(Output):
    """Write report.html of a finished run, from the files in its folder alone."""

    examples: ClassVar[tuple[str, ...]] = (
        "saepatch report runs/sweep",
        "saepatch report runs/sweep --read",
    )

    run: str
    """Folder of the run."""
    read: bool = False
    """First read the run's prompts and top latents with the model again, as a run in shards has not done."""


@dataclass(frozen=True)
class RunsConfig(Output):
    """List the runs in a folder, at any depth, with their headline figures."""

    examples: ClassVar[tuple[str, ...]] = (
        "saepatch runs",
        "saepatch runs runs/study --json",
    )

    positional: ClassVar[str] = "root"
    root: str = "runs"
    """Folder that the runs' folders are in."""


@dataclass(frozen=True)
class CompareConfig(Output):
    """Show two runs of one command side by side: settings, figures and largest effects."""

    examples: ClassVar[tuple[str, ...]] = (
        "saepatch compare runs/a runs/b",
        "saepatch compare runs/a runs/b --html both.html",
    )

    one: str
    """Folder of a run of patch, attribute or restore."""
    other: str
    """Folder of another run."""
    html: str = ""
    """File to write the comparison to as a page, too."""


@dataclass(frozen=True)
class LatentConfig(Output):
    """Print what latents are about: their top examples, how often they fire, what they write, their neighbours."""

    examples: ClassVar[tuple[str, ...]] = (
        "saepatch latent resid_post.3:281",
        "saepatch latent resid_post.3:281,966,417 --html latents.html",
        'saepatch latent resid_post.3:281 --explain "The meaning of X is"',
        "saepatch latent resid_pre.8:417 --model gpt2 --sae gpt2-small-res-jb/blocks.8.hook_resid_pre --data texts.txt",
    )

    latent: str
    """Site and number, as in resid_post.3:281; several with commas between, which share one pass over the texts."""
    model: str = "organism"
    """The embedded model (organism, organism-base), a folder, or a Hugging Face id."""
    sae: str = "organism"
    """Dictionaries: organism, a folder (of one, or with one sub-folder a site), or RELEASE/SAE_ID."""
    data: str = ""
    """Texts to look for examples in, a line each; empty: the embedded model's own."""
    explain: str = ""
    """An explanation prompt for the model itself, with an X where the latent is written in (Patchscope), as in
    "The meaning of X is"."""
    html: str = ""
    """File to write the card to as a page, too; of several latents, one page with a card each."""
    track: str = "none"
    """Show the page to wandb, wandb:offline, wandb:online, trackio, or several with commas between; the local log lies
    beside the page of --html, in FILE.log/."""
    device: str = "cpu"
    """Where to run: cpu, cuda or mps."""
    dtype: str = "float32"
    """Precision of the model: float32, bfloat16 or float16."""
    prepend_bos: bool = False
    """Put a BOS in front of texts where the tokenizer does not."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Leave off unless you trust its author."""

    def __post_init__(self) -> None:
        if self.track != "none" and not self.html:
            raise UserError(f"track = {self.track!r}: a tracker shows the page; give it a place with --html")
        if len(latents_of_sites(self.latent)) != 1:
            raise UserError(f"latent {self.latent!r}: give latents of one site, as in resid_post.3:281,966")
        if not self.data and not self.model.startswith("organism"):
            raise UserError(f"which texts? Give --data FILE, a text a line, to look for examples of {self.model} in")
        if self.explain and not re.search(r"\bX\b", self.explain):
            raise UserError(f"explain {self.explain!r}: put an X where the latent is to be written in")


@dataclass(frozen=True)
class PushConfig(Output):
    """Upload dictionaries to a repository of the Hugging Face hub, for sae_lens and saepatch to load."""

    examples: ClassVar[tuple[str, ...]] = (
        "saepatch push runs/saes OWNER/NAME --dry_run",
        "saepatch push runs/saes/resid_post.3 OWNER/NAME --private",
    )

    folder: str
    """Folder of one dictionary, or what training leaves: one with a sub-folder a site."""
    repo_id: str
    """Repository on the hub, OWNER/NAME; made if there is none."""
    private: bool = False
    """Make the repository private; one that is there already has to be."""
    branch: str = ""
    """Branch to commit to; empty: the main one."""
    message: str = ""
    """Message of the commit."""
    dry_run: bool = False
    """List what would go up, and upload nothing."""


def latents_of_sites(text: str) -> dict[Site, tuple[int, ...]]:
    """Latents that are spelt out, each under its site.

    Raises:
        UserError: the text cannot be read, or names no site.
    """
    if not (latents := LatentSet.parse(text).spelt()):
        raise UserError(
            f"latent {text!r}: write its site, a colon and its number, as in resid_post.3:281; several as in "
            "'resid_post.3: 281, 17 | resid_post.4: 5'"
        )
    return latents


def check_shard(text: str) -> None:
    """Raises UserError where a shard is neither I/N nor auto."""
    match = re.fullmatch(r"(\d+)/(\d+)", text)
    if text != "auto" and not (match and int(match[1]) < int(match[2])):
        raise UserError(f"shard {text!r}: write I/N with I from 0 to N-1, as in 0/4, or auto")
