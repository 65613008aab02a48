"""What latents are compared with at equal numbers of directions: dimensions, principal components, a mean difference.

Each is a basis of a site that is patched like latents are (`saepatch.measure.patching.patch_components`): the
coordinate of the base run along a direction is set to that of the source run, all else stays. The benchmark of Mueller
et al. 2025 (MIB) found the latents of dictionaries no better than single dimensions at localising causal variables.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from saepatch.engine.components import Directions
from saepatch.errors import UserError
from saepatch.model.sites import Site


def dimensions(site: Site, width: int) -> Directions:
    """The dimensions of a site of that width, each a direction of its own. All together they are the whole site.

    Raises:
        UserError: a width below 1.
    """
    if width < 1:
        raise UserError(f"width {width}: a site has at least one dimension")
    return Directions(site, torch.eye(width), "dimensions", kind="dimension")


def principal_components(values: Float[Tensor, "n width"], k: int, site: Site) -> Directions:
    """The `k` directions along which values of a site vary most, the largest variance first.

    Right singular vectors of the centred values, computed in float64. Signs are arbitrary; patching does not see them.

    Args:
        values: What the site holds at `n` positions.
        k: At most `n − 1`, beyond which nothing varies, and at most the width.

    Raises:
        UserError: values that are not finite, too few of them, or `k` out of range.
    """
    n, width = values.shape
    if not 1 <= k <= min(n - 1, width):
        raise UserError(
            f"{k} principal components of {n} values of width {width}: there are at most {max(min(n - 1, width), 0)}"
        )
    centred = _double(values)
    centred = centred - centred.mean(0)
    rows = torch.linalg.svd(centred, full_matrices=False).Vh[:k]
    return Directions(site, rows.float(), "principal components", kind="principal component")


def difference_of_means(a: Float[Tensor, "n width"], b: Float[Tensor, "m width"], site: Site) -> Directions:
    """The one direction from the mean of some values of a site to that of others, of length 1.

    Raises:
        UserError: no values, values that are not finite, or means that are the same.
    """
    if not len(a) or not len(b):
        raise UserError(f"a difference of means needs values on both sides, and there are {len(a)} and {len(b)}")
    difference = _double(a).mean(0) - _double(b).mean(0)
    length = float(difference.norm())
    # a mean of nothing but rounding has no direction
    if length <= 1e-6 * float(_double(a).norm(dim=-1).mean()):
        raise UserError(f"both sides have the same mean at {site}, so there is no direction between them")
    return Directions(site, (difference / length).float()[None], "difference of means", kind="mean difference")


def _double(values: Float[Tensor, "n width"]) -> Float[Tensor, "n width"]:
    """In float64 on the CPU: not every device has it, and directions are moved to where they are used."""
    if not bool(torch.isfinite(values).all()):
        raise UserError("values of the site are NaN or infinite, so no direction can be taken from them")
    return values.detach().cpu().double()
