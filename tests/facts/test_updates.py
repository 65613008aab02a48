"""Closed forms of weight edits, on random matrices in float64."""

import pytest
import torch

from saepatch import UserError
from saepatch.facts.updates import alphaedit_update, emmet_update, memit_update, rome_update

D_OUT, D_KEY = 7, 7  # square, so that no shape shows a transposed weight


def matrices(facts=3, seed=0):
    generator = torch.Generator().manual_seed(seed)

    def draw(*shape):
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    root = draw(D_KEY, 40)
    return draw(D_OUT, D_KEY), root @ root.T / 40, draw(D_KEY, facts), draw(D_OUT, facts)


def test_rome_writes_the_value_exactly_with_the_least_change():
    weight, covariance, keys, values = matrices(1)
    key, value = keys[:, 0], values[:, 0]
    left, right = rome_update(value - weight @ key, key, torch.linalg.solve(covariance, key))
    delta = left @ right.T
    assert ((weight + delta) @ key - value).abs().max() < 1e-12
    other = delta + (torch.eye(D_OUT).double() - torch.outer(key, key) / (key @ key))  # also writes the value
    assert ((weight + other) @ key - value).abs().max() < 1e-12
    assert (delta @ covariance @ delta.T).trace() < (other @ covariance @ other.T).trace()


def test_a_mismatch_of_keys_scales_the_update():
    """The disabling edit: kᵀC⁻¹k / k'ᵀC⁻¹k is large where the bare prompt's key is nearly orthogonal to the mean."""
    _, covariance, keys, values = matrices(2)
    mean = keys[:, 0]
    solved = torch.linalg.solve(covariance, mean)
    orthogonal = keys[:, 1] - solved * (keys[:, 1] @ solved) / (solved @ solved)
    bare = orthogonal + 0.01 * solved
    gap = values[:, 0]
    own, mixed = (left @ right.T for left, right in (rome_update(gap, mean, solved), rome_update(gap, bare, solved)))
    scale = (mean @ solved) / (bare @ solved)
    assert torch.allclose(mixed, scale * own, rtol=1e-10)
    assert mixed.norm() > 10 * own.norm()


def test_emmet_writes_several_values_exactly_and_one_as_rome_does():
    weight, covariance, keys, values = matrices(3)
    left, right = emmet_update(values - weight @ keys, keys, torch.linalg.solve(covariance, keys))
    assert ((weight + left @ right.T) @ keys - values).abs().max() < 1e-12
    key, gap = keys[:, 0], (values - weight @ keys)[:, 0]
    solved = torch.linalg.solve(covariance, key)
    one = emmet_update(gap[:, None], key[:, None], solved[:, None])
    rome = rome_update(gap, key, solved)
    assert torch.allclose(one[0] @ one[1].T, rome[0] @ rome[1].T, atol=1e-12)


def test_emmet_refuses_dependent_keys():
    weight, covariance, keys, values = matrices(3)
    keys[:, 2] = keys[:, 0]
    with pytest.raises(UserError, match="linearly dependent"):
        emmet_update(values - weight @ keys, keys, torch.linalg.solve(covariance, keys))


def test_memit_is_its_definition_and_for_one_fact_a_share_of_rome():
    weight, covariance, keys, values = matrices(3)
    residuals, lam = values - weight @ keys, 2.5
    left, right = memit_update(residuals, keys, torch.linalg.solve(covariance, keys), lam)
    direct = residuals @ keys.T @ torch.linalg.inv(lam * covariance + keys @ keys.T)
    assert torch.allclose(left @ right.T, direct, atol=1e-12)
    key, gap = keys[:, 0], residuals[:, 0]
    solved = torch.linalg.solve(covariance, key)
    kappa = key @ solved
    one = memit_update(gap[:, None], key[:, None], solved[:, None], lam)
    rome = rome_update(gap, key, solved)
    assert torch.allclose(one[0] @ one[1].T, rome[0] @ rome[1].T * kappa / (lam + kappa), atol=1e-12)


def test_alphaedit_is_its_definition_and_leaves_kept_directions():
    weight, _, keys, values = matrices(3)
    _, _, previous, _ = matrices(2, seed=1)
    basis = torch.linalg.qr(torch.randn(D_KEY, D_KEY, dtype=torch.float64))[0]
    kept, free = basis[:, :3], basis[:, 3:]
    null, residuals = free @ free.T, values - weight @ keys
    left, right = alphaedit_update(residuals, keys, null, previous, 10.0)
    inner = keys @ keys.T @ null + previous @ previous.T @ null + 10 * torch.eye(D_KEY, dtype=torch.float64)
    direct = residuals @ keys.T @ null @ torch.linalg.inv(inner)
    assert torch.allclose(left @ right.T, direct, atol=1e-10)
    assert (left @ right.T @ kept).abs().max() < 1e-6
    assert (left @ right.T @ free).norm() > 1e-2


def test_a_planted_linear_memory_is_edited_exactly_and_nothing_else_in_it_moves():
    """Orthogonal keys stored in W; one is given another value."""
    keys = torch.linalg.qr(torch.randn(D_KEY, D_KEY, dtype=torch.float64))[0]
    values = torch.randn(D_OUT, D_KEY, dtype=torch.float64)
    weight = values @ keys.T
    covariance = keys @ keys.T / D_KEY
    new = torch.randn(D_OUT, dtype=torch.float64)
    left, right = rome_update(new - weight @ keys[:, 2], keys[:, 2], torch.linalg.solve(covariance, keys[:, 2]))
    recalled = (weight + left @ right.T) @ keys
    assert (recalled[:, 2] - new).abs().max() < 1e-12
    others = [0, 1, 3, 4, 5, 6]
    assert (recalled[:, others] - values[:, others]).abs().max() < 1e-12
