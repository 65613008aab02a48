"""The closed forms of weight edits, as pure functions of keys and residuals in float64.

A weight W in column form maps a key to a value. An update is returned as two factors, Δ = left · rightᵀ. `solved` is
C⁻¹K for the covariance C = E[k kᵀ] of keys.
"""

import torch
from jaxtyping import Float
from torch import Tensor

from saepatch.errors import UserError

Left = Float[Tensor, "out facts"]
Right = Float[Tensor, "keys facts"]


def rome_update(
    gap: Float[Tensor, "out"],
    key: Float[Tensor, "keys"],
    solved: Float[Tensor, "keys"],
) -> tuple[Left, Right]:
    """Δ = gap (C⁻¹k)ᵀ / (kᵀC⁻¹k), where `gap` is v* - Wk: the least change, measured by C, with (W + Δ)k = v*.

    `solved` is C⁻¹ of the same `key` in r-ROME. The original code takes C⁻¹ of the mean over prefixes and the bare
    prompt's key elsewhere, which scales the update by kᵀC⁻¹k / k'ᵀC⁻¹k: where that is large, one edit ruins the model.

    Source: Meng et al. 2022, "Locating and Editing Factual Associations in GPT", equation 2; Gupta et al. 2024,
    "Rebuilding ROME".
    """
    return gap[:, None] / (key @ solved), solved[:, None]


def emmet_update(residuals: Left, keys: Right, solved: Right) -> tuple[Left, Right]:
    """Δ = R (KᵀC⁻¹K)⁻¹ KᵀC⁻¹: several facts at once, each exactly.

    Raises:
        UserError: keys of two facts are linearly dependent.

    Source: Gupta et al. 2024, "A Unified Framework for Model Editing".
    """
    gram = keys.T @ solved
    factor, failed = torch.linalg.cholesky_ex((gram + gram.T) / 2)
    if bool(failed) or float(factor.diagonal().min() / factor.diagonal().max()) < 1e-6:
        raise UserError(
            f"the keys of the {keys.shape[1]} facts are linearly dependent, so they cannot be edited exactly together: "
            "take out facts with the same subject, or use Memit"
        )
    return residuals, torch.cholesky_solve(solved.T, factor).T


def memit_update(residuals: Left, keys: Right, solved: Right, weight: float) -> tuple[Left, Right]:
    """Δ = R Kᵀ(λC + K Kᵀ)⁻¹ with λ = `weight`, by (λC + K Kᵀ)⁻¹K = C⁻¹K(λI + KᵀC⁻¹K)⁻¹.

    Source: Meng et al. 2023, "Mass-Editing Memory in a Transformer", equation 14.
    """
    small = weight * torch.eye(keys.shape[1], dtype=keys.dtype, device=keys.device) + keys.T @ solved
    return residuals, torch.linalg.solve(small, solved.T).T


def alphaedit_update(
    residuals: Left,
    keys: Right,
    null: Float[Tensor, "keys keys"],
    previous: Float[Tensor, "keys earlier"],
    weight: float,
) -> tuple[Left, Right]:
    """Δ = R KᵀP (K KᵀP + K_p K_pᵀP + λI)⁻¹ with λ = `weight`: nothing outside the null space P of C is moved.

    `previous` are the keys K_p of earlier edits. With U = [K K_p], the inverse is taken of λI + UᵀPU alone.

    Source: Fang et al. 2025, "AlphaEdit: Null-Space Constrained Knowledge Editing", equation 14.
    """
    both = torch.cat([keys, previous], 1)
    projected = null @ both
    own = projected[:, : keys.shape[1]]
    small = weight * torch.eye(both.shape[1], dtype=keys.dtype, device=keys.device) + both.T @ projected
    return residuals, (own - projected @ torch.linalg.solve(small, both.T @ own)) / weight
