"""The unit of strength: a quantile of a latent's activations that outliers do not move."""

import numpy as np
import pytest
import torch

from saepatch.dictionaries import active_values
from saepatch.dictionaries.active_values import ActiveValues, StrengthUnits
from saepatch.errors import UserError

SHARES = (0.01, 0.5, 0.9, 0.95, 0.99, 1.0)


def sparse(rows: int, latents: int = 6, seed: int = 0) -> torch.Tensor:
    """Log-normal activations over many octaves, a third of them active; the first latent is never active."""
    generator = torch.Generator().manual_seed(seed)
    values = (3 * torch.randn(rows, latents, generator=generator)).exp()
    values *= torch.rand(rows, latents, generator=generator) < 1 / 3
    values[:, 0] = 0
    return values


def counted(acts: torch.Tensor, sizes: int = 10**9) -> ActiveValues:
    values = ActiveValues(acts.shape[1])
    for part in acts.split(sizes):
        values.add(part)
    return values


@pytest.mark.parametrize("rows", [1, 7, 50, 2000])
@pytest.mark.parametrize("share", SHARES)
def test_it_is_the_quantile_of_the_positive_activations(rows, share):
    acts = sparse(rows)
    found = counted(acts).quantile(share)
    for latent in range(6):
        positive = acts[:, latent][acts[:, latent] > 0].numpy()
        expected = np.quantile(positive, share, method="inverted_cdf") if len(positive) else 0.0
        assert float(found[latent]) == pytest.approx(float(expected), rel=1 / 512)
    assert torch.equal(counted(acts).quantile(1.0), acts.amax(0))


def test_batches_and_order_do_not_matter(monkeypatch):
    acts = sparse(500)
    whole = [counted(acts).quantile(share) for share in SHARES]
    monkeypatch.setattr(active_values, "_PENDING", 10)
    values = counted(acts.flip(0), 13)
    assert len(values._counted) < 10  # earlier counts were merged
    assert all(torch.equal(values.quantile(share), one) for share, one in zip(SHARES, whole, strict=True))


def test_an_outlier_at_one_active_token_in_forty_does_not_move_it():
    generator = torch.Generator().manual_seed(1)
    acts = 40 + 20 * torch.rand(4000, 2, generator=generator)
    acts[::40, 1] = 9931.0
    values = counted(acts)
    units = StrengthUnits(values.quantile(), values.maximum)
    assert 58 < float(units.unit[0]) < 60
    assert 58 < float(units.unit[1]) < 61
    assert [float(one) for one in values.quantile(0.99)] == [pytest.approx(59.8, abs=0.3), 9931.0]
    (warning,) = units.warnings([3, 8])
    assert warning.startswith("latent 8: its largest activation, 9931, is 16")
    assert not StrengthUnits(units.unit, 10 * units.unit).warnings([3, 8])


def test_negative_activations_and_none_at_all():
    assert ActiveValues(2).quantile().tolist() == [0, 0]
    assert counted(torch.tensor([[-1.0, -5.0], [-2.0, 3.0]])).quantile().tolist() == [0, 3]
    assert counted(torch.zeros(0, 2)).quantile().tolist() == [0, 0]
    with pytest.raises(UserError, match="quantile = 1.5"):
        ActiveValues(2).quantile(1.5)
