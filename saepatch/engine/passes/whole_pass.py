"""A kept pass over a batch of texts, and edited passes that resume from one of its sites, with logits at all positions.

`saepatch.engine.passes.kept_run` does the same for prompts where only the next token matters, and skips more. Both
run the model's own blocks. Gradients flow through an edited pass where they are enabled.
"""

from collections.abc import Collection, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from saepatch.engine.passes.kept_run import entry
from saepatch.model.hooks import Edit, edit_sites
from saepatch.model.language_model import LanguageModel, Tokens
from saepatch.model.replaced import skip_blocks
from saepatch.model.sites import Site

SLICE = 1 << 21  # logits that are compared, or put through a softmax, at a time


@dataclass(frozen=True, eq=False)
class WholePass:
    """A model's unedited pass over a batch.

    Attributes:
        tokens: The batch.
        logits: Logits at every position.
        values: Values of the requested sites, and of the residual streams that enter their blocks.
    """

    tokens: Tokens
    logits: Float[Tensor, "batch pos vocab"]
    values: dict[Site, Tensor]

    def rows(self, rows: slice) -> "WholePass":
        values = {site: value[rows] for site, value in self.values.items()}
        return WholePass(self.tokens.rows(rows), self.logits[rows], values)


@torch.no_grad()
def whole_pass(model: LanguageModel, sites: Collection[Site], tokens: Tokens) -> WholePass:
    """Run the model once, and keep the values of the sites."""
    values: dict[Site, Tensor] = {}

    def keep(site: Site) -> Edit:
        def see(x: Tensor) -> Tensor:
            values[site] = x.detach().to(model.device)  # a model may be spread over several
            return x

        return see

    wanted = {*sites, *map(entry, sites)}
    with edit_sites(model.layout, {site: keep(site) for site in wanted}):
        logits = model.logits(tokens)
    return WholePass(tokens, logits, values)


def edited_logits(
    model: LanguageModel, kept: WholePass, site: Site, value: Float[Tensor, "batch pos width"], skip: bool = True
) -> Float[Tensor, "batch pos vocab"]:
    """Logits of a pass with the site set to `value`; with `skip`, the blocks before the site do not run."""
    with ExitStack() as stack:
        if skip:
            stack.enter_context(_from(model, kept, site))
        stack.enter_context(edit_sites(model.layout, {site: lambda x: value.to(x)}))
        return model.call(kept.tokens)


@contextmanager
def _from(model: LanguageModel, kept: WholePass, site: Site) -> Iterator[None]:
    start = entry(site)
    entered = {} if start == site else {start: lambda x: kept.values[start].to(x)}
    with skip_blocks(model.layout, site.enters), edit_sites(model.layout, entered):
        yield


@torch.no_grad()
def can_skip(model: LanguageModel, kept: WholePass, site: Site) -> bool:
    """Whether an unedited pass that resumes from the site gives the logits of the whole pass.

    It does not in families whose blocks pass on more than the residual stream.
    """
    try:
        resumed = edited_logits(model, kept, site, kept.values[site])
    except (TypeError, ValueError, IndexError, AttributeError, KeyError, RuntimeError):
        return False
    gap = largest = 0.0
    for some in few_positions(kept.tokens.attention_mask.bool(), model.vocabulary):
        whole = kept.logits[some].float()
        difference = (resumed[some].float() - whole).abs().max()
        if not torch.isfinite(difference):
            return False
        gap, largest = max(gap, float(difference)), max(largest, float(whole.abs().max()))
    return gap <= (1e-4 if model.dtype == torch.float32 else 5e-2) * largest


def few_positions(chosen: Bool[Tensor, "batch pos"], vocabulary: int) -> list[tuple[Tensor, ...]]:
    """Rows and columns of the chosen positions, of so few at a time that their logits fit in the processor's cache."""
    return [some.unbind(-1) for some in chosen.nonzero().split(max(1, SLICE // vocabulary))]
