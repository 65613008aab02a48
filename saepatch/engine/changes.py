"""What patching the units of a component from one run into another changes; long prompts are read in stretches."""

from collections.abc import Sequence
from dataclasses import replace

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from saepatch.dictionaries.latents import NUMBERS
from saepatch.engine.components import Changes, Component, LatentUnits
from saepatch.engine.passes.kept_run import KeptRun


def between(component: Component, base: KeptRun, source: KeptRun, where: Bool[Tensor, "batch pos"]) -> Changes:
    """The changes when each unit is patched from the source into the base run, at the positions in `where`.

    Where one of the runs is an ablation of the other, its units have the values that the ablation wrote: encoding the
    site again could give others, since edited latents do not pass through the encoder's nonlinearity.
    """
    site, (rows, columns) = component.site, where.shape
    step = max(1, NUMBERS // max(component.units, base.values[site].shape[-1]))
    if columns <= step:
        return _between(component, base, source, where, slice(None), slice(None))
    parts = []
    for row in range(rows):
        for start in range(0, columns, step):
            here = slice(row, row + 1), slice(start, start + step)
            if bool(where[here].any()):
                some = _between(component, base, source, where, *here)
                parts.append(replace(some, row=some.row + row, pos=some.pos + start))
    return _joined(parts) if parts else _between(component, base, source, where, slice(0, 1), slice(0, 1))


def in_stretches(component: Component, x: Float[Tensor, "batch pos width"]) -> Float[Tensor, "batch pos values"]:
    """Values of a component's units, read a stretch of positions at a time: a dictionary may encode all its latents."""
    whole = component.dictionary.d_sae if isinstance(component, LatentUnits) else 1
    step = max(1, NUMBERS // (len(x) * max(whole, x.shape[-1])))
    if x.shape[1] <= step:
        return component.read(x)
    return torch.cat([component.read(x[:, start : start + step]) for start in range(0, x.shape[1], step)], 1)


def _between(
    component: Component, base: KeptRun, source: KeptRun, where: Bool[Tensor, "batch pos"], rows: slice, columns: slice
) -> Changes:
    site, here = component.site, (rows, columns)
    if base.written is not None:
        return component.write(source.values[site][here], base.written[here], where[here]).reversed()
    values = component.read(source.values[site][here]) if source.written is None else source.written[here]
    return component.write(base.values[site][here], values, where[here])


def _joined(parts: Sequence[Changes]) -> Changes:
    """Changes at different positions as one value."""
    if len(parts) == 1:
        return parts[0]
    ends = torch.tensor([len(part) for part in parts], device=parts[0].row.device).cumsum(0)

    def vectors(some: Int[Tensor, "some"]) -> Float[Tensor, "some width"]:
        of = torch.bucketize(some, ends, right=True)
        made = [(of == number, part) for number, part in enumerate(parts)]
        vectors = [
            part.vectors(some[mine] - (ends[number - 1] if number else 0)) for number, (mine, part) in enumerate(made)
        ]
        out = vectors[0].new_empty(len(some), vectors[0].shape[-1])
        for (mine, _), those in zip(made, vectors, strict=True):
            out[mine] = those
        return out

    row, pos, unit = (torch.cat([getattr(part, name) for part in parts]) for name in ("row", "pos", "unit"))
    return Changes(row, pos, unit, vectors)
