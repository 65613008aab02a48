"""Settings of `saepatch restore`."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from saepatch.dictionaries.latent_set import LatentSet
from saepatch.errors import UserError
from saepatch.settings.mixins import DictionarySettings, ModelSettings, Output, Progress, Tracked, check_shard


@dataclass(frozen=True)
class RestoreConfig(Output, Progress, Tracked, DictionarySettings, ModelSettings):
    """Restore latents from a donor while the model answers, beside random latents; can be stopped and resumed."""

    examples: ClassVar[tuple[str, ...]] = (
        "saepatch restore --prompts jailbreak:report --select jailbreak:select --site resid_post.3 --k 16",
        "saepatch restore --prompts refusal:report --select refusal:select --model organism-base --donor organism "
        "--sae organism-shared",
        "saepatch restore --prompts requests.jsonl --site resid_post.3 --latents 966,281 --out runs/restore",
    )
    command: ClassVar[str] = "restore"
    prompts: str = ""
    """A .jsonl file, an object a line: prompt; clean (what the donor reads instead, where it is the model itself);
    example (a name) and harmful (true or false) if you like. Of the embedded model: refusal:report (plain requests) or
    jailbreak:report (in a jailbreak framing, clean in a benign one), of the splits select, tune and report."""
    donor: str = "clean"
    """clean: the model itself on each line's clean prompt; means: latents' means over the clean prompts of --select;
    else another model that reads the same tokens, such as the aligned one of a base model."""
    site: str = ""
    """One site or several, as in resid_post.3,resid_post.4; empty: every one there is a dictionary for."""
    latents: str = ""
    """What to restore: of one site 417,281, of several "resid_post.3: 281,17 | resid_post.4: 5"; empty: the first --k
    of a ranking over the prompts of --select or, without one, all latents."""
    select: str = ""
    """Like --prompts, of other prompts, to rank latents on."""
    k: int = 0
    """How many latents of the ranking, over all sites together; 0: 64."""
    ranking: Literal["change", "signed", "attribution"] = "change"
    """change: S·‖d‖ of Chen et al. 2024; signed: mean difference; attribution: of the refusal score."""
    error: bool = False
    """Restore error terms, too."""
    template: int = -1
    """Tokens at the end of prompts that are restored, beside those that are generated; -1: from the assistant's turn on
    as the chat template opens it (1 without a chat template)."""
    chat: bool = False
    """Prompts are requests: put each into the model's chat template."""
    judge: str = "keywords"
    """keywords (in an answer's first 80 characters); a list of your own, looked for in the whole answer ("keywords: I
    cannot | I will not"); score (of --refusals, above 0); or MODULE:FUNCTION, which gets a prompt and an answer and
    returns refuse, comply or degenerate."""
    refusals: str = "I cannot|I can't|I'm sorry|Sorry|I will not"
    """How refusals begin, with bars between: their first tokens make the refusal score."""
    controls: int = 5
    """Random sets of as many latents a site, and as many matched in frequency and size, beside the given ones."""
    tokens: int = 40
    """Tokens of an answer, at most."""
    max_fvu: float = 0.5
    """What a dictionary may leave unexplained of either of two models (fraction of variance), on the first prompts and
    the donor's answers to them."""
    n: int = 0
    """Prompts, at most; 0: all."""
    shard: str = "0/1"
    """Which share of the prompts: I/N counting from 0, or auto for the one that a Slurm job array or torchrun says;
    `saepatch merge` puts them together."""
    part: int = 32
    """Prompts between two writes: what a kill can lose."""
    seed: int = 0
    """Seed of controls and bootstrap draws."""
    out: str = "runs/restore"
    """Folder for report.html, summary.json and results.parquet."""

    def __post_init__(self) -> None:
        super().__post_init__()
        LatentSet.parse(self.latents)
        if not self.prompts:
            raise UserError("which prompts? Give --prompts FILE.jsonl, an object with a prompt a line")
        if self.n < 0 or self.controls < 0 or self.template < -1:
            raise UserError(f"n = {self.n}, controls = {self.controls}, template = {self.template}: use 0, 0 and -1 on")
        if min(self.tokens, self.part) < 1 or self.k < 0:
            raise UserError(f"k = {self.k}, tokens = {self.tokens}, part = {self.part}: use at least 1 of each")
        check_shard(self.shard)
        if self.k and (self.latents or not self.select):
            raise UserError(f"k = {self.k} takes the first of a ranking: give --select to rank on, and no --latents")
        if not self.out:
            raise UserError("out is empty: give a folder for the results")
        if self.latents.strip() and self.select and self.donor != "means":
            raise UserError("latents are given, and --select ranks others: leave one of them out")
        if self.donor == "means" and not self.select:
            raise UserError("donor means needs --select: a file whose clean prompts the means are taken over")
        if self.donor == "means" and self.error:
            raise UserError("error terms have no means over clean prompts: leave --error out")
        if not [text for text in self.refusals.split("|") if text.strip()]:
            raise UserError("refusals is empty: give how they begin, as in --refusals 'I cannot|Sorry'")
