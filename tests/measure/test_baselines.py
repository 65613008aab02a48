"""Directions that latents are compared with: each is what it says, and is patched as such."""

import pytest
import torch
from tiny import D_MODEL, random_dictionary, tiny_model

from saepatch.data.pairs import PromptPair
from saepatch.engine.components import Directions, Edit, Stream
from saepatch.errors import UserError
from saepatch.measure.baselines import difference_of_means, dimensions, principal_components
from saepatch.measure.patching import patch_components
from saepatch.model.hooks import capture
from saepatch.model.sites import Site

SITE = Site(1, "resid_post")
PAIRS = [
    PromptPair("the cat sat", "the dog sat", "a", "b", "one"),
    PromptPair("a red hat", "a big hat", "c", "d", "two"),
]


def values(n=200, width=6, seed=0):
    """Values with a variance of its own along every one of some skew axes, far from 0."""
    generator = torch.Generator().manual_seed(seed)
    axes = torch.linalg.qr(torch.randn(width, width, generator=generator)).Q
    scale = torch.tensor([5.0, 3.0, 2.0, 1.0, 0.5, 0.1])[:width]
    return 10 + (torch.randn(n, width, generator=generator) * scale) @ axes.T, axes.T


def test_all_dimensions_are_the_whole_site():
    model = tiny_model()
    every = Edit(SITE, tuple(range(D_MODEL)), kind="dimension", role="every")
    for direction in ("denoise", "noise"):
        parts = patch_components(model, dimensions(SITE, D_MODEL), PAIRS, [every], direction=direction)
        whole = patch_components(model, Stream(SITE), PAIRS, direction=direction)
        assert parts.patched[:, 0] == pytest.approx(whole.patched[:, 0], abs=1e-4)
        assert abs(whole.change).max() > 1e-2


def test_principal_components_are_the_singular_vectors_of_centred_values():
    x, axes = values()
    found = principal_components(x, 6, SITE)
    centred = x.double() - x.double().mean(0)
    expected = torch.linalg.svd(centred, full_matrices=False).Vh
    assert torch.allclose((found.rows.double() @ expected.T).abs(), torch.eye(6).double(), atol=1e-5)
    explained = (centred @ found.rows.double().T).var(0)
    assert torch.allclose(explained, torch.linalg.eigvalsh(torch.cov(centred.T)).flip(0), rtol=1e-4)
    assert (explained.diff() < 0).all()
    assert (found.rows @ axes.T).abs().diagonal()[:3].min() > 0.95  # the axes the values were made with
    assert torch.equal(principal_components(x, 2, SITE).rows, found.rows[:2])


def test_the_difference_of_means_points_from_one_to_the_other():
    a, _ = values(seed=1)
    step = torch.tensor([0.0, 3.0, 0.0, 4.0, 0.0, 0.0])
    found = difference_of_means(a + step, a, SITE)
    assert torch.allclose(found.rows, step[None] / 5, atol=1e-5)
    assert float(found.rows.norm()) == pytest.approx(1)
    one, other = a[:50].mean(0), a[50:].mean(0)  # as many values on either side are not needed
    assert torch.allclose(difference_of_means(a[:50], a[50:], SITE).rows[0], (one - other) / (one - other).norm())


def test_patching_a_direction_sets_the_coordinate_along_it_alone():
    model = tiny_model()
    clean, corrupted = (model.tokenize([text]) for text in (PAIRS[0].clean, PAIRS[0].corrupted))
    source, base = (capture(model.hf, model.layout, [SITE], model.inputs(t))[SITE] for t in (clean, corrupted))
    dense = difference_of_means(source[0], base[0], SITE)
    where = torch.ones(base.shape[:2], dtype=torch.bool)
    patched = dense.write(base, dense.read(source), where).applied(base)
    row = dense.rows[0]
    assert torch.allclose(patched @ row, source @ row, atol=1e-4)
    aside = torch.eye(D_MODEL) - torch.outer(row, row)
    assert torch.allclose(patched @ aside, base @ aside, atol=1e-4)


def test_kinds_are_told_apart_in_one_sweep_and_in_its_rows():
    model, dictionary = tiny_model(), random_dictionary()
    several = [dictionary, dimensions(SITE, D_MODEL), principal_components(torch.randn(40, D_MODEL), 3, SITE)]
    edits = [Edit(SITE, (0, 1), kind=kind) for kind in ("latent", "dimension", "principal component")]
    together = patch_components(model, several, PAIRS, edits)
    for number, component in enumerate(several):
        alone = patch_components(model, component, PAIRS, [edits[number]])
        assert together.patched[:, number] == pytest.approx(alone.patched[:, 0], abs=1e-4)
    assert {row.component for row in together.rows("t")} <= {edit.kind for edit in edits}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: dimensions(SITE, 0), "width = 0: use at least 1"),
        (lambda: principal_components(torch.randn(5, 8), 5, SITE), "use at most 4"),
        (lambda: principal_components(torch.randn(9, 3), 4, SITE), "use at most 3"),
        (lambda: principal_components(torch.randn(9, 3), 0, SITE), "use at most 3"),
        (lambda: principal_components(torch.full((9, 3), torch.nan), 2, SITE), "NaN or infinite"),
        (lambda: difference_of_means(torch.ones(2, 3), torch.ones(5, 3), SITE), "the same mean"),
        (lambda: difference_of_means(torch.ones(0, 3), torch.ones(5, 3), SITE), "0 and 5 values: give at least one"),
        (lambda: difference_of_means(torch.full((2, 3), torch.inf), torch.ones(5, 3), SITE), "NaN or infinite"),
    ],
)
def test_what_gives_no_direction(make, message):
    with pytest.raises(UserError, match=message):
        make()


def test_they_are_directions():
    assert isinstance(dimensions(SITE, 3), Directions)
    with pytest.raises(UserError, match="have width 3"):
        dimensions(SITE, 3).check(tiny_model())
