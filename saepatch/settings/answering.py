"""Settings of the commands that have a model answer: `restore` and `steer`. Without torch, as `config` is."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from saepatch.dictionaries.latent_set import LatentSet
from saepatch.errors import UserError
from saepatch.settings.commands import Output, check_shard, latents_of_sites


@dataclass(frozen=True)
class RestoreConfig(Output):
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
    model: str = "organism"
    """Model that answers: the embedded one (organism, organism-base), a folder, or a Hugging Face id."""
    donor: str = "clean"
    """clean: the model itself on each line's clean prompt; means: latents' means over the clean prompts of --select;
    else another model that reads the same tokens, such as the aligned one of a base model."""
    sae: str = "organism"
    """Dictionaries: organism, a folder (of one, or with one sub-folder a site), or RELEASE/SAE_ID."""
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
        LatentSet.parse(self.latents)
        if not self.prompts:
            raise UserError("which prompts? Give --prompts FILE.jsonl, an object with a prompt a line")
        if self.n < 0 or self.controls < 0 or self.template < -1:
            raise UserError(f"n = {self.n}, controls = {self.controls}, template = {self.template}: use 0, 0 and -1 on")
        if min(self.tokens, self.part) < 1 or self.k < 0:
            raise UserError(f"k = {self.k}, tokens = {self.tokens}, part = {self.part}: use at least 1 of each")
        check_shard(self.shard)
        if self.device_map not in ("", "auto"):
            raise UserError(f"device_map {self.device_map!r}: use auto, or leave it empty")
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


@dataclass(frozen=True)
class SteerConfig(Output):
    """Answer a prompt without and with an intervention on latents, side by side, as the answers are written.

    With `json` a line for each prompt, and no columns.
    """

    examples: ClassVar[tuple[str, ...]] = (
        'saepatch steer --latent resid_post.3:966 --strength 1.5 --positions last --chat --prompt "How do I sing?"',
        "saepatch steer --latent resid_post.3:966 --act ablate --interactive",
        'saepatch steer --latent resid_post.3:966 --prompt "The film was" --html runs/steered.html',
    )

    latent: str = ""
    """Site and number, as in resid_post.3:281; several of a site with commas, of several sites with a bar between."""
    prompt: str = ""
    """What to continue, or to answer."""
    strength: float = 1.0
    """How strong, in units of the latent's largest activation in the reference texts."""
    act: Literal["add", "clamp", "at-least", "ablate"] = "add"
    """Add the strength to the latent, set it to that, raise it to that where it is lower, or set it to 0."""
    positions: str = "all"
    """Where: all, prompt, generated, last (the prompt's last token), or an index, a span (3:7), "at: TEXT"."""
    decay: float = 1.0
    """What the strength is multiplied by with each generated token; 1: it stays."""
    interactive: bool = False
    """A small chat: a prompt a line; /strength X, /reset and /quit are for the session."""
    chat: bool | None = None
    """Put prompts into the model's chat template; unset: in an interactive session, where there is one."""
    max_new_tokens: int = 60
    """Tokens of an answer, at most. One that comes to repeat itself is stopped before."""
    temperature: float = 0.0
    """0: the most likely token each time; else tokens are drawn."""
    reference: str = ""
    """Texts that largest activations are taken over: .txt (one a line), .jsonl or .json (column text); empty: the
    embedded model's own, for it."""
    unit: float = 0.0
    """Instead of largest activations: what one unit of strength is for every latent."""
    html: str = ""
    """File to write both answers to as a page, too, with the acting latents' activations and cards."""
    track: str = "none"
    """Show answers and page to wandb, wandb:offline, wandb:online, trackio, or several with commas between; the local
    log lies beside the page of --html, in FILE.log/."""
    seed: int = 0
    """Seed of the draws."""
    model: str = "organism"
    """The embedded model (organism, organism-base), a folder, or a Hugging Face id."""
    sae: str = "organism"
    """Dictionaries: organism, a folder (of one, or with one sub-folder a site), or RELEASE/SAE_ID."""
    device: str = "cpu"
    """Where to run: cpu, cuda or mps."""
    dtype: str = "float32"
    """Precision of the model: float32, bfloat16 or float16."""
    prepend_bos: bool = False
    """Put a BOS in front of prompts where the tokenizer does not."""
    trust_remote_code: bool = False
    """Run code that comes with the model. Leave off unless you trust its author."""

    def __post_init__(self) -> None:
        if not self.latent:
            raise UserError("which latent? Give --latent SITE:NUMBER, as in --latent resid_post.3:281")
        latents_of_sites(self.latent)
        if bool(self.prompt) == self.interactive:
            raise UserError("what is to be answered? Give --prompt TEXT or --interactive, one of the two")
        if self.track != "none" and not self.html:
            raise UserError(f"track = {self.track!r}: a tracker shows the page of answers; give it a place with --html")
        if not abs(self.strength) < float("inf"):
            raise UserError(f"strength = {self.strength}: use a number")
        if self.unit < 0:
            raise UserError(f"unit = {self.unit}: use a number above 0, or leave it out")
        if not 0 < self.decay <= 1:
            raise UserError(f"decay = {self.decay}: use a share above 0, and at most 1")
        if self.max_new_tokens < 1 or self.temperature < 0:
            raise UserError(
                f"max_new_tokens = {self.max_new_tokens}, temperature = {self.temperature}: use at least 1 and 0"
            )
        own = self.model in ("organism", "organism-base")
        if not (own or self.reference or self.unit or self.act == "ablate"):
            raise UserError(
                f"what is a strength of {self.strength:g} in {self.model}? Give --reference FILE, with texts that "
                "largest activations are taken over, or --unit 1 for strengths in plain activations"
            )
