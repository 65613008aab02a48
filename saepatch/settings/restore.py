"""Settings of `saepatch restore`."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from saepatch.dictionaries.latent_set import LatentSet
from saepatch.errors import UserError
from saepatch.settings.mixins import DictionarySettings, ModelSettings, Output, Progress, Tracked, check_shard


@dataclass(frozen=True)
class RestoreConfig(Output, Progress, Tracked, DictionarySettings, ModelSettings):
    """Restore latents from a donor while the model answers, with random controls; can be stopped and resumed."""

    examples: ClassVar[tuple[str, ...]] = (
        "saepatch restore --prompts jailbreak:report --select jailbreak:select --site resid_post.3 --k 16",
        "saepatch restore --prompts refusal:report --select refusal:select --model organism-base --donor organism "
        "--sae organism-shared",
        "saepatch restore --prompts requests.jsonl --site resid_post.3 --latents 966,281 --out runs/restore",
    )
    command: ClassVar[str] = "restore"
    prompts: str = ""
    """A .jsonl file, one object per line: prompt; clean (what the donor reads instead, where the donor is the model
    itself); optionally example (a name) and harmful (true or false). For the embedded model: refusal:report (plain
    requests) or jailbreak:report (in a jailbreak framing, clean in a benign one); the splits are select, tune and
    report."""
    donor: str = "clean"
    """clean: the model itself on each line's clean prompt; means: the latents' means over the clean prompts of
    --select; otherwise another model with the same tokenizer, such as the aligned version of a base model."""
    site: str = ""
    """One site or several, as in resid_post.3,resid_post.4; empty: every site that has a dictionary."""
    latents: str = ""
    """What to restore: 417,281 at one site, "resid_post.3: 281,17 | resid_post.4: 5" at several; empty: the first --k
    of a ranking over the prompts of --select or, without --select, all latents."""
    select: str = ""
    """Prompts to rank latents on, in the format of --prompts; use other prompts than those."""
    k: int = 0
    """Number of latents taken from the ranking, over all sites together; 0: 64."""
    ranking: Literal["change", "signed", "attribution"] = "change"
    """change: S·‖d‖ of Chen et al. 2024; signed: mean difference; attribution: of the refusal score."""
    error: bool = False
    """Restore error terms as well."""
    template: int = -1
    """Number of tokens at the end of the prompt to restore, in addition to all generated tokens; -1: from where the
    chat template opens the assistant's turn (1 without a chat template)."""
    chat: bool = False
    """Prompts are requests: put each into the model's chat template."""
    judge: str = "keywords"
    """keywords (in an answer's first 80 characters); your own list, searched in the whole answer ("keywords: I
    cannot | I will not"); score (of --refusals, above 0); or MODULE:FUNCTION, which is called with a prompt and an
    answer and returns refuse, comply or degenerate."""
    refusals: str = "I cannot|I can't|I'm sorry|Sorry|I will not"
    """Beginnings of refusals, separated by bars: their first tokens define the refusal score."""
    controls: int = 5
    """Number of random control sets, and of control sets matched in frequency and size, of the same number of latents
    per site."""
    max_new_tokens: int = 40
    """Maximum number of tokens of an answer."""
    max_fvu: float = 0.5
    """Largest fraction of variance a dictionary may leave unexplained in either of two models, on the first prompts and
    the donor's answers to them."""
    n: int = 0
    """Maximum number of prompts; 0: all."""
    shard: str = "0/1"
    """Share of the prompts to run: I/N counting from 0, or auto to take it from a Slurm job array or torchrun;
    `saepatch merge` merges the shards."""
    part: int = 32
    """Number of prompts per write: at most so many are lost when the run is killed."""
    seed: int = 0
    """Seed of controls and bootstrap draws."""
    out: str = "runs/restore"
    """Folder for report.html, summary.json and results.parquet."""

    def __post_init__(self) -> None:
        super().__post_init__()
        LatentSet.parse(self.latents)
        if not self.prompts:
            raise UserError("no prompts: give --prompts FILE.jsonl, one object with a prompt per line")
        if self.n < 0 or self.controls < 0 or self.template < -1:
            raise UserError(
                f"n = {self.n}, controls = {self.controls}, template = {self.template}: use at least 0, 0 and -1"
            )
        if min(self.max_new_tokens, self.part) < 1 or self.k < 0:
            raise UserError(
                f"k = {self.k}, max_new_tokens = {self.max_new_tokens}, part = {self.part}: use at least 0, 1 and 1"
            )
        check_shard(self.shard)
        if self.k and (self.latents or not self.select):
            raise UserError(f"k = {self.k} takes the top of a ranking: give --select to rank on, and no --latents")
        if not self.out:
            raise UserError("out is empty: give a folder for the results")
        if self.latents.strip() and self.select and self.donor != "means":
            raise UserError("latents are given, and --select ranks others: leave one of them out")
        if self.donor == "means" and not self.select:
            raise UserError("donor means needs --select: a file whose clean prompts the means are taken over")
        if self.donor == "means" and self.error:
            raise UserError("error terms have no means over clean prompts: leave --error out")
        if not [text for text in self.refusals.split("|") if text.strip()]:
            raise UserError("refusals is empty: list how refusals begin, as in --refusals 'I cannot|Sorry'")
