"""Settings of `saepatch circuit`."""

from dataclasses import dataclass
from typing import ClassVar, Literal

from saepatch.errors import UserError
from saepatch.settings.mixins import DictionarySettings, ModelSettings, Output, Progress, Tracked, check_shard


@dataclass(frozen=True)
class CircuitConfig(Output, Progress, Tracked, DictionarySettings, ModelSettings):
    """Find a circuit of latents and error terms, or of heads and MLPs, on some pairs, and measure it on others; can be
    stopped and resumed."""

    command: ClassVar[str] = "circuit"
    examples: ClassVar[tuple[str, ...]] = (
        "saepatch circuit --pairs ioi --site resid_post.2,resid_post.4 --out runs/circuit",
        "saepatch circuit --pairs report.jsonl --select select.jsonl --nodes 40 --edges 100 --out runs/forty",
        "saepatch circuit --pairs ioi --site resid_post.4 --positions last --each_position --out runs/last",
        "saepatch circuit --pairs ioi --component head --out runs/heads",
    )
    seldom: ClassVar[frozenset[str]] = frozenset(["steps", "minimal", "sample", "edge_method", "prune"])
    component: Literal["latent", "head"] = "latent"
    """Nodes: latent, for the latents and error terms of the dictionaries; or head, for every attention head, every MLP
    and the token embeddings, without dictionaries."""
    site: str = ""
    """One site or several, as in resid_post.2,resid_post.4; empty: every site that has a dictionary."""
    pairs: str = ""
    """Prompt pairs on which the circuit is measured: a task of the embedded model, such as ioi; a .jsonl, .json, .csv
    or .parquet file with columns clean, corrupted, answer, counter; a folder saved by `datasets`; or a dataset,
    OWNER/NAME[:CONFIGURATION]. Both prompts of a pair have the same number of tokens."""
    split: str = "report"
    """Split of a task (select, tune, report) or dataset; files have none."""
    select: str = ""
    """Prompt pairs on which nodes and edges are ranked: another source; empty: the split `select` of the same task or
    dataset."""
    tune: str = ""
    """Prompt pairs on which the number of nodes is chosen: another source; empty: the split `tune` of a task of the
    embedded model, otherwise those of `select`."""
    n: int = 100
    """Maximum number of pairs to measure on, and to choose the number of nodes on; 0: all of a file or dataset."""
    n_select: int = 200
    """Maximum number of pairs to rank nodes and edges on; 0: all of a file or dataset."""
    positions: str = "all"
    """Where there are nodes: all, last, an index (5, or -1 for the last), a span (3:7), several (1,4), or the tokens of
    a text ("at: Mary")."""
    metric: str = "logit_difference"
    """logit_difference, probability, log_probability, cross_entropy, kl_divergence (of the run from the clean run), or
    your own function, MODULE:FUNCTION, imported from the working directory."""
    each_position: bool = False
    """A node is a latent at one position, counted from the start (for prompts of one form); otherwise a latent at all
    positions together."""
    method: Literal["first-order", "integrated-gradients"] = "integrated-gradients"
    """Gradient method that ranks latents and error terms; heads and MLPs are patched exactly."""
    edge_method: Literal["first-order", "integrated-gradients", "gim", "relp"] = "integrated-gradients"
    """Gradient method that ranks edges between the circuit's nodes; all but integrated-gradients give a latent that is
    inactive in the corrupted run no edges into it."""
    steps: int = 10
    """Interpolation steps of integrated-gradients."""
    least: float = 0.9
    """Faithfulness on the pairs of `tune` that the number of nodes is chosen for."""
    nodes: int = 0
    """Number of nodes; 0: the fewest, in the order of the ranking, with a faithfulness of `least`."""
    prune: float = 0.0
    """Then remove nodes one by one, from the output back, where that changes the metric on the pairs of `tune` by
    less than this, on average; 0: none."""
    edges: int = 300
    """Number of edges between the circuit's nodes to keep, those with the largest estimates; 0: find none."""
    verify: int = 50
    """Number of edges with the largest estimates to path-patch exactly."""
    sample: int = 50
    """Number of edges drawn at random from all others to path-patch as well."""
    controls: int = 5
    """Number of random circuits with as many nodes at each site, none of them the circuit's own."""
    minimal: int = 100
    """Number of nodes, those with the largest effects, that are removed one by one."""
    batch_size: int = 0
    """Prompts per forward pass; 0: chosen by memory."""
    seed: int = 0
    """Seed of a task's pairs, of random circuits and of knock-outs."""
    shard: str = "0/1"
    """Share of the pairs to measure on: I/N counting from 0, or auto to take it from a Slurm job array or torchrun;
    `saepatch merge` merges the shards. The shard that starts first finds the circuit."""
    part: int = 16
    """Number of pairs per write: at most so many are lost when the run is killed."""
    out: str = "runs/circuit"
    """Folder for report.html, summary.json, the circuit and results.parquet."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.pairs:
            raise UserError("no pairs: give --pairs, a task such as ioi or a file, and for a file --select as well")
        at_least = {"n": 0, "n_select": 0, "steps": 1, "nodes": 0, "edges": 0, "verify": 0, "sample": 0, "minimal": 0}
        at_least |= {"batch_size": 0, "part": 1, "controls": 5}
        for name, least in at_least.items():
            if getattr(self, name) < least:
                raise UserError(f"{name} = {getattr(self, name)}: use at least {least}")
        if not 0 < self.least < 1 or self.prune < 0:
            raise UserError(f"least = {self.least}, prune = {self.prune}: use a share between 0 and 1, and at least 0")
        if self.component == "head" and self.site:
            raise UserError(f"site = {self.site!r}: heads and MLPs are nodes of all layers, so leave site out")
        check_shard(self.shard)
        if not self.out:
            raise UserError("out is empty: give a folder for the results")
