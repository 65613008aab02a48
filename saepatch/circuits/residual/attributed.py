"""Logits as sums of rows: the result of direct logit attribution."""

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from jaxtyping import Float, Int
from numpy import ndarray

from saepatch.circuits.residual.stream_parts import StreamPart
from saepatch.model.sites import Site
from saepatch.records.tables import text_table


@dataclass(frozen=True, eq=False)
class DirectAttribution:
    """Logits as sums of rows, one sum per token position and target; all values are logits before any soft cap.

    Position i belongs to prompt `prompt[i]`, at index `position[i]` of its own tokens. `effect[i, j, t]` is what
    `parts[j]` adds to target t, with the final norm's scale at its value in the run; the active latents of the
    dictionaries are entries of their own: `latents` holds the position i, the index into `sites` and the latent,
    `activation` the latent's value and `latent_effect` what it adds to each target. `counter`: the logit of this token
    is subtracted throughout; None: nothing is. `emitted` are the model's own logits, after its soft cap `cap`, and
    `slope` d cap(z)/dz at the targets (and `counter_slope` at the counters): 1 where there is no cap.
    """

    prompt: Int[ndarray, "positions"]
    position: Int[ndarray, "positions"]
    target: Int[ndarray, "positions targets"]
    counter: Int[ndarray, "positions targets"] | None
    logit: Float[ndarray, "positions targets"]
    emitted: Float[ndarray, "positions targets"]
    cap: float | None
    slope: Float[ndarray, "positions targets"]
    counter_slope: Float[ndarray, "positions targets"] | None
    parts: tuple[StreamPart, ...]
    effect: Float[ndarray, "positions parts targets"]
    sites: tuple[Site, ...]
    latents: Int[ndarray, "3 entries"]
    activation: Float[ndarray, "entries"]
    latent_effect: Float[ndarray, "entries targets"]

    def __repr__(self) -> str:
        means = self._means()
        largest = sorted(means.items(), key=lambda item: -abs(item[1]))[:4]
        cells = f"{len(self.prompt)} positions × {self.target.shape[1]} targets, {self.logit.mean():.3g} on average"
        named = "; ".join(f"{name} ({mean:.3g})" for name, mean in largest)
        return f"DirectAttribution: logits of {cells}, as a sum of {len(means):,} rows\nlargest means: {named}"

    def _means(self) -> dict[str, float]:
        """The mean effect of each part and latent over all positions and targets."""
        cells = self.target.size
        means = {str(part): float(self.effect[:, j].sum()) / cells for j, part in enumerate(self.parts)}
        for (_, place, latent), effect in zip(self.latents.T.tolist(), self.latent_effect.sum(1).tolist(), strict=True):
            name = f"{self.sites[place]} latent {latent}"
            means[name] = means.get(name, 0.0) + effect / cells
        return means

    @property
    def total(self) -> Float[ndarray, "positions targets"]:
        """The sum of all rows, which is `logit` up to rounding."""
        total = self.effect.sum(1)
        np.add.at(total, self.latents[0], self.latent_effect)
        return total

    def rows(self, task: str = "") -> Iterator[dict[str, Any]]:
        """Flat records, one for each position, target and part or active latent."""
        for number in range(len(self.prompt)):
            mine = np.flatnonzero(self.latents[0] == number)
            for t in range(self.target.shape[1]):
                shared = {
                    "task": task,
                    "prompt": int(self.prompt[number]),
                    "position": int(self.position[number]),
                    "target": int(self.target[number, t]),
                    "counter": -1 if self.counter is None else int(self.counter[number, t]),
                    "logit": float(self.logit[number, t]),
                    "slope": float(self.slope[number, t]),
                }
                for part, effect in zip(self.parts, self.effect[number, :, t].tolist(), strict=True):
                    yield shared | {"part": str(part), "latent": -1, "activation": 0.0, "effect": effect}
                for entry in mine.tolist():
                    yield shared | {
                        "part": f"{self.sites[self.latents[1, entry]]} latent",
                        "latent": int(self.latents[2, entry]),
                        "activation": float(self.activation[entry]),
                        "effect": float(self.latent_effect[entry, t]),
                    }

    def summary(self, k: int = 12) -> str:
        """The parts and latents with the largest mean effects over all positions and targets, as a table."""
        means, what = self._means(), "logit" if self.counter is None else "logit difference"
        largest = sorted(means.items(), key=lambda item: -abs(item[1]))[:k]
        lines = [text_table(["part", f"mean part of the {what}"], [[name, f"{mean:.4f}"] for name, mean in largest])]
        lines.append(f"{len(means)} rows sum to the {what}, {self.logit.mean():.4f} on average")
        if self.cap is not None:
            lines.append(
                f"before the soft cap of {self.cap:g}; d cap(z)/dz is {self.slope.min():.3f} to {self.slope.max():.3f}"
            )
        return "\n".join(lines)
