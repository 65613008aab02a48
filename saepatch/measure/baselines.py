"""Baselines for latents at equal numbers of directions: dimensions, principal components, a difference of means.

Directions of a site are patched like latents (`saepatch.measure.patching.patch_components`): the base run's coordinate
along a direction is set to the source run's, everything else is kept. The benchmark of Mueller et al. 2025 (MIB) found
SAE latents no better than single dimensions at localising causal variables.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from saepatch.engine.components import Directions
from saepatch.errors import UserError
from saepatch.model.sites import Site


def dimensions(site: Site, width: int) -> Directions:
    """The dimensions of a site of the given width as directions; together they span the whole site.

    Raises:
        UserError: a width below 1.
    """
    if width < 1:
        raise UserError(f"width = {width}: use at least 1, as a site has")
    return Directions(site, torch.eye(width), "dimensions", kind="dimension")


def principal_components(values: Float[Tensor, "n width"], k: int, site: Site) -> Directions:
    """The first `k` principal components of a site's values, largest variance first.

    Right singular vectors of the centred values, computed in float64. Signs are arbitrary and do not affect patching.

    Args:
        values: Values of the site at `n` positions.
        k: Number of components, at most `n − 1` and the width.
        site: The site.

    Raises:
        UserError: values are not finite, or `k` is out of range.
    """
    n, width = values.shape
    if not 1 <= k <= min(n - 1, width):
        raise UserError(
            f"{k} principal components of {n} values of width {width}: use at most {max(min(n - 1, width), 0)}"
        )
    centred = _double(values)
    centred = centred - centred.mean(0)
    rows = torch.linalg.svd(centred, full_matrices=False).Vh[:k]
    return Directions(site, rows.float(), "principal components", kind="principal component")


def difference_of_means(a: Float[Tensor, "n width"], b: Float[Tensor, "m width"], site: Site) -> Directions:
    """The unit direction from the mean of `b` to the mean of `a`, values of a site.

    Raises:
        UserError: there are no values, values are not finite, or the means are equal.
    """
    if not len(a) or not len(b):
        raise UserError(f"{len(a)} and {len(b)} values: give at least one on each side for a difference of means")
    difference = _double(a).mean(0) - _double(b).mean(0)
    length = float(difference.norm())
    # a difference within rounding has no direction
    if length <= 1e-6 * float(_double(a).norm(dim=-1).mean()):
        raise UserError(f"both sides have the same mean at {site}, so their difference has no direction: give others")
    return Directions(site, (difference / length).float()[None], "difference of means", kind="mean difference")


def _double(values: Float[Tensor, "n width"]) -> Float[Tensor, "n width"]:
    """Values in float64 on the CPU, since not every device supports it."""
    if not bool(torch.isfinite(values).all()):
        raise UserError("values of the site are NaN or infinite: directions need finite values")
    return values.detach().cpu().double()
