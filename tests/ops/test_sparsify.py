"""Trimming and dropping: the selection against a sort, tiles against the whole, and tables computed by hand."""

import pytest
import torch

from hf_merge.ops.random import bernoulli
from hf_merge.ops.selection import magnitude_bits
from hf_merge.ops.sparsify import (
    KEEP_ALL,
    KEEP_NONE,
    Threshold,
    drop,
    keep_largest,
    keep_random,
    magnitude_factors,
    magnitude_thresholds,
    random_factors,
    rescale_factors,
    trim,
)
from hf_merge.types import Stack

DENSITIES = [1e-6, 0.01, 0.1, 0.25, 1 / 3, 0.5, 0.7, 0.9, 0.99, 0.999999]
FLOATS = [torch.float32, torch.float64]

each_dtype = pytest.mark.parametrize("dtype", FLOATS, ids=["float32", "float64"])


def split(tensors, size):
    """Tiles of flat tensors."""
    whole = tensors[0].numel()
    return [Stack([t[i : i + size] for t in tensors], start=i) for i in range(0, whole, size)]


def trimmed(tensor, density, size):
    tiles = split([tensor], size)
    (threshold,) = magnitude_thresholds(tiles, density=[density])
    return torch.cat([keep_largest(tile[0], threshold, tile.start) for tile in tiles])


def kept_by_sorting(tensor, density):
    """The max(1, int(density * N)) largest magnitudes by a stable sort: of equal ones the first indices."""
    order = tensor.abs().to(torch.float64).sort(descending=True, stable=True).indices
    mask = torch.zeros(tensor.shape, dtype=torch.bool)
    mask[order[: max(1, int(density * tensor.numel()))]] = True
    return mask


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def gaussian(size, dtype):
    return torch.randn(size, generator=generator(), dtype=dtype)


def few_levels(size, dtype):
    return torch.randint(-3, 4, (size,), generator=generator(1)).to(dtype)


def all_equal(size, dtype):
    return torch.full((size,), -0.25, dtype=dtype)


def mostly_zeros(size, dtype):
    return few_levels(size, dtype) * (torch.rand(size, generator=generator(2)) < 0.1).to(dtype)


def near_one(size, dtype):
    """Neighbouring floats, which differ in the lowest bits of the mantissa only; each occurs many times."""
    step = torch.finfo(dtype).eps
    return (1 + step * torch.randint(0, 300, (size,), generator=generator(3)).to(dtype)) * few_levels(
        size, dtype
    ).sign()


def every_magnitude(size, dtype):
    """From subnormal numbers to nearly the largest."""
    low, high = (-44, 38) if dtype == torch.float32 else (-320, 307)
    exponents = torch.empty(size, dtype=torch.float64).uniform_(low, high, generator=generator(4))
    return (10**exponents).to(dtype) * (1 - 2 * (torch.arange(size) % 2)).to(dtype)


DATA = [gaussian, few_levels, all_equal, mostly_zeros, near_one, every_magnitude]
each_data = pytest.mark.parametrize("data", DATA, ids=[data.__name__ for data in DATA])


# which entries are kept


@each_dtype
@each_data
@pytest.mark.parametrize("numel", [1, 2, 3, 10, 257, 1000])
def test_exactly_the_largest_are_kept_and_of_equal_ones_the_first(data, dtype, numel):
    tensor = data(numel, dtype)
    for density in DENSITIES:
        expected = torch.where(kept_by_sorting(tensor, density), tensor, 0)
        for size in {1, 7, 64, numel} if numel <= 257 else {333, numel}:
            found = trimmed(tensor, density, size)
            assert found.equal(expected), (density, size)
            assert found.dtype == dtype


@each_dtype
@each_data
@pytest.mark.parametrize("numel", [65_536, 65_537])
def test_large_tensors_are_selected_by_histograms_as_exactly(data, dtype, numel):
    tensor = data(numel, dtype)
    for density in (1e-6, 0.2, 0.93):
        expected = kept_by_sorting(tensor, density)
        assert int(expected.sum()) == max(1, int(density * numel))
        for size in (numel, 24_691):
            assert trimmed(tensor, density, size).equal(torch.where(expected, tensor, 0)), (density, size)


@each_dtype
@pytest.mark.parametrize(("numel", "size"), [(1000, 333), (70_000, 9_973)])
@pytest.mark.parametrize(("density", "share"), [(0.123, 0.123), (0.5, 0.5), (0.77, 0.77), (1e-9, 0.0)])
def test_where_all_are_equal_exactly_the_first_ones_are_kept(dtype, numel, size, density, share):
    found = trimmed(all_equal(numel, dtype), density, size)
    kept = max(1, round(share * numel))
    assert found[:kept].eq(-0.25).all()
    assert found[kept:].eq(0).all()


@each_dtype
def test_thresholds_do_not_depend_on_the_tiles(dtype):
    for numel in (1000, 70_000):
        tensor = few_levels(numel, dtype)
        sizes = (numel, numel // 2, numel // 9)
        found = {magnitude_thresholds(split([tensor], size), density=[0.5])[0] for size in sizes}
        assert len(found) == 1
        assert found.pop().bits == int(magnitude_bits(torch.tensor(2.0, dtype=dtype)))


@each_dtype
@pytest.mark.parametrize("numel", [500, 65_600])
def test_every_model_has_its_own_threshold(dtype, numel):
    models = [gaussian(numel, dtype), few_levels(numel, dtype), near_one(numel, dtype), all_equal(numel, dtype)]
    density = [0.1, 0.6, 0.35, 0.5]
    together = magnitude_thresholds(split(models, numel // 4), density=density)
    alone = [magnitude_thresholds(split([m], numel), density=[d])[0] for m, d in zip(models, density, strict=True)]
    assert together == alone
    assert len(set(together)) == 4


def test_models_that_keep_everything_or_nothing_do_not_disturb_the_others():
    models = [gaussian(50, torch.float32)] * 5
    found = magnitude_thresholds(split(models, 8), density=[1.0, 0.4, 0.0, 1.5, -1.0])
    assert [found[i] for i in (0, 2, 3, 4)] == [KEEP_ALL, KEEP_NONE, KEEP_ALL, KEEP_NONE]
    assert found[1] == magnitude_thresholds(split(models[:1], 50), density=[0.4])[0]


def test_an_empty_tensor_keeps_its_no_entries():
    assert magnitude_thresholds([Stack([torch.empty(0)])], density=[0.5]) == [KEEP_ALL]
    assert magnitude_thresholds([], density=[0.5, 0.0]) == [KEEP_ALL, KEEP_NONE]
    assert keep_largest(torch.empty(0), KEEP_ALL).shape == (0,)


@pytest.mark.parametrize(
    ("density", "expected"),
    [
        (1.0, [3.0, -1.0, 0.0, 2.0, -2.0, 1.0]),
        (0.9, [3.0, -1.0, 0.0, 2.0, -2.0, 1.0]),  # 5 of 6: the one that goes is the zero
        (0.67, [3.0, -1.0, 0.0, 2.0, -2.0, 0.0]),  # 4 of 6: -1 comes before 1
        (0.5, [3.0, 0.0, 0.0, 2.0, -2.0, 0.0]),
        (0.34, [3.0, 0.0, 0.0, 2.0, 0.0, 0.0]),  # 2 of 6: 2 comes before -2
        (0.17, [3.0, 0.0, 0.0, 0.0, 0.0, 0.0]),
        (0.001, [3.0, 0.0, 0.0, 0.0, 0.0, 0.0]),  # at least one
        (0.0, [0.0] * 6),
    ],
)
def test_a_trim_by_hand(density, expected):
    delta = torch.tensor([3.0, -1.0, 0.0, 2.0, -2.0, 1.0])
    for size in (1, 2, 4, 6):
        assert trimmed(delta, density, size).tolist() == expected


def test_the_sign_of_a_zero_is_no_magnitude():
    delta = torch.tensor([-0.0, 0.0, -0.0, 5.0])
    (threshold,) = magnitude_thresholds(split([delta], 4), density=[0.5])
    assert threshold == Threshold(bits=0, last=0)


@each_dtype
def test_magnitude_bits_have_the_order_of_the_magnitudes(dtype):
    values = torch.tensor([0.0, -0.0, 1e-40, -1e-38, 0.5, -1.0, 1.5, -2.0, 3e38], dtype=dtype)
    bits = magnitude_bits(values)
    assert bits[0] == bits[1] == 0
    assert (bits[1:].diff() > 0).all()
    assert bits.dtype == (torch.int32 if dtype == torch.float32 else torch.int64)


def test_keep_largest_compares_with_the_threshold_and_with_the_index_in_the_whole_tensor():
    tile = torch.tensor([1.0, -2.0, 2.0, 3.0, 2.0])
    bits = int(magnitude_bits(torch.tensor([2.0])))
    for last, expected in [
        (9, [0.0, 0.0, 0.0, 3.0, 0.0]),  # all equal entries kept lie in earlier tiles
        (10, [0.0, 0.0, 0.0, 3.0, 0.0]),
        (11, [0.0, -2.0, 0.0, 3.0, 0.0]),
        (12, [0.0, -2.0, 2.0, 3.0, 0.0]),
        (14, [0.0, -2.0, 2.0, 3.0, 2.0]),
        (99, [0.0, -2.0, 2.0, 3.0, 2.0]),  # the cut lies in a later tile
    ]:
        assert keep_largest(tile, Threshold(bits, last), start=10).tolist() == expected, last


def test_keep_largest_keeps_the_shape_and_leaves_its_input_alone():
    delta = torch.tensor([[1.0, -2.0], [2.0, 0.5]])
    copy = delta.clone()
    (threshold,) = magnitude_thresholds([Stack([delta])], density=[0.25])
    assert keep_largest(delta, threshold).tolist() == [[0.0, -2.0], [0.0, 0.0]]
    assert keep_largest(delta, KEEP_NONE).tolist() == [[0.0, 0.0], [0.0, 0.0]]
    assert keep_largest(delta, KEEP_ALL).equal(copy)
    assert delta.equal(copy)


# what is dropped at random


def test_keep_random_keeps_where_the_mask_of_its_seed_says_so():
    delta = gaussian(1000, torch.float32)
    expected = torch.where(bernoulli(77, 0.3, delta) != 0, delta, 0)
    assert keep_random(delta, 0.3, 77).equal(expected)
    assert 200 < expected.count_nonzero() < 400


def test_keep_random_draws_by_the_index_in_the_whole_tensor():
    delta = gaussian(1000, torch.float32)
    whole = keep_random(delta, 0.5, 5)
    for size in (1000, 999, 128, 7):
        assert torch.cat([keep_random(t[0], 0.5, 5, t.start) for t in split([delta], size)]).equal(whole)


def test_a_density_of_1_drops_nothing_and_of_0_everything():
    delta = gaussian(300, torch.float32)
    assert keep_random(delta, 1.0, 1).equal(delta)
    assert keep_random(delta, 0.0, 1).equal(torch.zeros(300))


# rescaling


def test_rescale_factors_by_hand():
    delta = torch.tensor([4.0, -3.0, 2.0, -1.0])
    tiles = split([delta, delta, delta], 3)
    cut = magnitude_thresholds(tiles, density=[0.5, 1.0, 0.25])
    assert magnitude_factors(tiles, cut=cut, rescale="l1", density=[0.5, 1.0, 0.25]) == [10 / 7, 1.0, 10 / 4]
    assert magnitude_factors(tiles, cut=cut, rescale="density", density=[0.5, 1.0, 0.25]) == [2.0, 1.0, 4.0]
    assert magnitude_factors(tiles, cut=cut, rescale="none", density=[0.5, 1.0, 0.25]) == [1.0, 1.0, 1.0]


@pytest.mark.parametrize("rescale", ["l1", "density", "none"])
def test_nothing_is_rescaled_where_everything_or_nothing_is_kept(rescale):
    tiles = split([torch.tensor([4.0, -3.0])] * 2, 2)
    assert random_factors(tiles, rescale=rescale, density=[1.0, 0.0], seed=[1, 2]) == [1.0, 1.0]
    assert magnitude_factors(tiles, cut=[KEEP_ALL, KEEP_NONE], rescale=rescale, density=[1.0, 0.0]) == [1.0, 1.0]


@pytest.mark.parametrize(
    ("before", "after", "factor"),
    [
        (8.0, 2.0, 4.0),
        (2e-7, 1.25e-7, 1.6),
        (8.0, 0.99e-7, 1.0),  # what is left is below 1e-7
        (8.0, 0.0, 1.0),
        (0.0, 0.0, 1.0),
        (0.99e-7, 0.5e-7, 1.0),  # what there was is below 1e-7
    ],
)
def test_the_l1_rule_leaves_alone_what_is_nearly_zero(before, after, factor):
    left = torch.tensor([after, 0.0], dtype=torch.float64)
    whole = torch.tensor([after, before - after], dtype=torch.float64)
    found = rescale_factors([Stack([whole])], lambda tile, i: left, rescale="l1", density=[0.5])
    assert found == pytest.approx([factor], rel=1e-12)


def test_the_l1_sums_are_taken_over_all_tiles_in_float64():
    delta = torch.full((100_000,), 0.1)
    (factor,) = random_factors(split([delta], 1000), rescale="l1", density=[0.5], seed=[3])
    kept = int((bernoulli(3, 0.5, delta) != 0).sum())
    assert factor == pytest.approx(100_000 / kept, rel=1e-12)


@pytest.mark.parametrize("size", [1, 100, 4000])
@pytest.mark.parametrize("data", [gaussian, few_levels], ids=["gaussian", "few levels"])
def test_factors_do_not_depend_on_the_tiles(data, size):
    delta = data(4000, torch.float32)
    tiles, whole = split([delta], size), split([delta], 4000)
    cut = magnitude_thresholds(whole, density=[0.4])
    kept = torch.where(kept_by_sorting(delta, 0.4), delta, 0)
    by_hand = float(delta.double().abs().sum() / kept.double().abs().sum())
    assert magnitude_factors(tiles, cut=cut, rescale="l1", density=[0.4]) == pytest.approx([by_hand], rel=1e-12)
    assert random_factors(tiles, rescale="l1", density=[0.4], seed=[8]) == pytest.approx(
        random_factors(whole, rescale="l1", density=[0.4], seed=[8]), rel=1e-12
    )


def test_the_l1_rule_restores_the_l1_norm():
    delta = gaussian(5000, torch.float64)
    stack = Stack([delta, delta])
    density, seed = [0.2, 0.7], [5, 6]
    cut = magnitude_thresholds([stack], density=density)
    by_size = trim(stack, cut, magnitude_factors([stack], cut=cut, rescale="l1", density=density))
    at_random = drop(stack, density, seed, random_factors([stack], rescale="l1", density=density, seed=seed))
    for kept in [*by_size, *at_random]:
        assert kept.count_nonzero() < 4000
        assert float(kept.abs().sum()) == pytest.approx(float(delta.abs().sum()), rel=1e-12)


def test_a_density_rescaling_keeps_the_expected_value():
    delta = torch.ones(40_000, dtype=torch.float64)
    stack = Stack([delta])
    factors = random_factors([stack], rescale="density", density=[0.1], seed=[11])
    (kept,) = drop(stack, [0.1], [11], factors)
    assert set(kept.tolist()) == {0.0, 10.0}
    assert float(kept.mean()) == pytest.approx(1.0, abs=5 * 3 / 200)  # five standard errors: 3 / sqrt(40000)


def test_trim_multiplies_each_model_by_its_own_factor():
    stack = Stack([torch.tensor([4.0, -1.0]), torch.tensor([1.0, 8.0])])
    bits = int(magnitude_bits(torch.tensor([4.0])))
    found = trim(stack, [Threshold(bits, 99), KEEP_ALL], [1.5, 0.25])
    assert [t.tolist() for t in found] == [[6.0, 0.0], [0.25, 2.0]]
    assert [t.tolist() for t in stack] == [[4.0, -1.0], [1.0, 8.0]]


def test_drop_uses_the_start_of_its_tile():
    delta = gaussian(100, torch.float32)
    (whole,) = drop(Stack([delta]), [0.5], [4], [2.0])
    (tail,) = drop(Stack([delta[60:]], start=60), [0.5], [4], [2.0])
    assert tail.equal(whole[60:])
    assert set((whole / delta).unique().tolist()) == {0.0, 2.0}
