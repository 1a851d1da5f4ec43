"""Truncated decompositions against torch.linalg.svd: the best of a rank, the smallest rank, exact and sketched."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_merge.ops.lowrank import truncate

some = settings(max_examples=40, deadline=None, derandomize=True, database=None)


def decaying(rows, columns, *, power=1.0, seed=0, dtype=torch.float32):
    """Make a matrix whose singular values fall as 1, 2^-power, 3^-power, ..."""
    numbers = torch.Generator().manual_seed(seed)
    count = min(rows, columns)
    left = torch.linalg.qr(torch.randn(rows, count, generator=numbers, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(columns, count, generator=numbers, dtype=torch.float64))[0]
    return (left * torch.arange(1, count + 1, dtype=torch.float64) ** -power @ right.T).to(dtype)


def product(found):
    return found.left.double() @ found.right.double()


@pytest.mark.parametrize("shape", [(300, 300), (400, 130), (130, 400), (256, 1)])
@pytest.mark.parametrize("exact", [True, False])
def test_a_rank_gives_the_best_approximation(shape, exact):
    matrix = decaying(*shape)
    values = torch.linalg.svdvals(matrix.double())
    found = truncate(matrix, 12, exact=exact)
    rank = min(12, *shape)
    assert found.left.shape == (shape[0], rank) and found.right.shape == (rank, shape[1])
    torch.testing.assert_close(torch.linalg.svdvals(product(found))[:rank], values[:rank], rtol=1e-4, atol=1e-7)
    lost, tail = torch.linalg.matrix_norm(matrix.double() - product(found)).item(), values[rank:].norm().item()
    assert lost == pytest.approx(tail, rel=1e-4, abs=1e-6)
    assert found.kept == pytest.approx(1 - tail**2 / values.square().sum().item(), abs=1e-6)
    assert found.error == pytest.approx((matrix.double() - product(found)).abs().max().item(), abs=1e-6)


def test_a_sketch_of_a_flat_spectrum_is_nearly_the_best():
    matrix = torch.randn(600, 500, generator=torch.Generator().manual_seed(3))
    best, found = truncate(matrix, 20), truncate(matrix, 20, exact=False)
    assert best.kept * 0.999 <= found.kept <= best.kept * (1 + 1e-6)
    assert not torch.equal(found.left, best.left), "the rank is small enough for a sketch"


def test_both_factors_have_the_same_norms_and_settled_signs():
    found = truncate(decaying(60, 40), 5)
    torch.testing.assert_close(found.left.norm(dim=0), found.right.norm(dim=1), rtol=1e-4, atol=0)
    assert bool((found.right.gather(1, found.right.abs().argmax(1, keepdim=True)) > 0).all())


@pytest.mark.parametrize("energy", [0.3, 0.9, 0.999, 1.0])
def test_an_energy_picks_the_smallest_rank(energy):
    matrix = decaying(50, 80, power=0.7, dtype=torch.float64)
    squares = torch.linalg.svdvals(matrix).square()
    shares = squares.cumsum(0) / squares.sum()
    found = truncate(matrix, energy)
    assert found.kept >= energy - 1e-9
    assert found.rank == int((shares < energy - 1e-12).sum()) + 1


def test_an_integer_is_a_rank_and_a_float_an_energy():
    matrix = decaying(20, 20)
    assert truncate(matrix, 1).rank == 1 and truncate(matrix, 1.0).rank == 20


def test_all_that_is_not_zero():
    matrix = decaying(30, 7) @ decaying(7, 40)
    found = truncate(matrix, None)
    assert found.rank == 7
    torch.testing.assert_close(product(found).float(), matrix, rtol=0, atol=1e-6)


@pytest.mark.parametrize("rank", [None, 4, 0.5])
@pytest.mark.parametrize("exact", [True, False])
def test_zeros_have_no_factors(rank, exact):
    found = truncate(torch.zeros(5, 300), rank, exact=exact)
    assert found.left.shape == (5, 0) and found.right.shape == (0, 300)
    assert (found.kept, found.error) == (1.0, 0.0)


@pytest.mark.parametrize("rank", [0, -1, 0.0, 1.5, math.nan, True, "4"])
def test_what_is_no_rank_is_refused(rank):
    with pytest.raises(ValueError, match="rank"):
        truncate(torch.ones(3, 3), rank)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_a_matrix_with_a_hole_is_refused(bad):
    with pytest.raises(ValueError, match="NaN or Inf"):
        truncate(torch.tensor([[1.0, bad], [0.0, 1.0]]), 1)


def test_a_sketch_is_repeated_by_its_seed():
    matrix = torch.randn(200, 300, generator=torch.Generator().manual_seed(1))
    one, two, other = (truncate(matrix, 6, exact=False, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(one.left, two.left) and torch.equal(one.right, two.right)
    assert not torch.equal(one.left, other.left)


def test_the_input_stays_as_it_is():
    matrix = torch.randn(90, 90)
    copy = matrix.clone()
    for exact in (True, False):
        truncate(matrix, 3, exact=exact)
    assert torch.equal(matrix, copy)


@some
@given(st.integers(1, 30), st.integers(1, 30), st.one_of(st.integers(1, 40), st.floats(0.01, 1.0)), st.booleans())
def test_no_product_is_worse_than_it_says(rows, columns, rank, exact):
    matrix = torch.randn(rows, columns, generator=torch.Generator().manual_seed(rows * 31 + columns))
    found = truncate(matrix, rank, exact=exact)
    assert 1 <= found.rank <= min(rows, columns)
    rest = matrix.double() - product(found)
    assert found.error == pytest.approx(rest.abs().max().item(), abs=1e-5)
    assert found.kept == pytest.approx(1 - (rest.norm() / matrix.double().norm()).item() ** 2, abs=1e-5)
    if isinstance(rank, float):
        assert found.kept >= rank - 1e-5
