"""Bits from a counter: what they are, that tiles do not matter, and that they look like chance."""

import math

import pytest
import torch

from hf_merge.ops import random as counter
from hf_merge.ops.random import random_bits

WORD = 1 << 32
SEEDS = [0, 1, 2, 12345, WORD - 1, WORD, (7 << 32) + 5, (1 << 63) + 99, (1 << 64) - 1]


def uniform(seed, numel, start=0):
    """The bits as numbers in [0, 1)."""
    return (random_bits(seed, start, numel).to(torch.float64) + WORD / 2) / WORD


def bernoulli(*arguments, **keywords):
    """The mask as booleans; every bit of an integer must be like the others."""
    mask = counter.bernoulli(*arguments, **keywords)
    assert mask.dtype == torch.int32 and bool(((mask == 0) | (mask == -1)).all())
    return mask != 0


def correlation(x, y):
    return float(torch.corrcoef(torch.stack([x, y]))[0, 1])


def reference(seed, index):
    """The definition in Python's integers: SplitMix64 of the key, then lowbias32 of the counter."""

    def mixed(key):
        key = (key + 0x9E3779B97F4A7C15) % 2**64
        key = (key ^ (key >> 30)) * 0xBF58476D1CE4E5B9 % 2**64
        key = (key ^ (key >> 27)) * 0x94D049BB133111EB % 2**64
        return key ^ (key >> 31)

    key = mixed(mixed(seed) + index // 2**32)
    x = (index + key) % 2**32
    x = (x ^ (x >> 16)) * 0x7FEB352D % 2**32 ^ (key >> 32)
    x = (x ^ (x >> 15)) * 0x846CA68B % 2**32
    x ^= x >> 16
    return x - 2**32 if x >= 2**31 else x


def test_bits_do_not_change_between_releases():
    """Another number here is another result for every recipe with a seed."""
    assert random_bits(0, 0, 4).tolist() == [-1813566111, 1058343937, 808321499, 582726204]
    for seed, start in ((0, 0), (1, 0), ((5 << 32) + 1, 10), ((1 << 64) - 1, (3 << 32) - 1), (7, (1 << 31) - 2)):
        assert random_bits(seed, start, 4).tolist() == [reference(seed, start + i) for i in range(4)]


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("start", [0, 500, WORD // 2 - 300, WORD + 17])
@pytest.mark.parametrize("size", [17, 999, 1024, 2500])
def test_bits_do_not_depend_on_the_tiles(seed, start, size):
    whole = random_bits(seed, start, 5000)
    tiles = [random_bits(seed, start + i, min(size, 5000 - i)) for i in range(0, 5000, size)]
    assert torch.cat(tiles).equal(whole)


@pytest.mark.parametrize("seed", [0, (9 << 32) + 4])
def test_a_tile_across_the_32nd_bit_of_the_index_is_that_of_its_parts(seed):
    whole = random_bits(seed, WORD - 8, 16)
    assert whole.equal(torch.cat([random_bits(seed, WORD - 8, 8), random_bits(seed, WORD, 8)]))


def test_no_elements_have_no_bits():
    assert random_bits(3, 0, 0).shape == (0,)


def test_bits_on_the_meta_device_have_a_shape_only():
    found = random_bits(3, 0, 5, "meta")
    assert (found.device.type, found.shape, found.dtype) == ("meta", (5,), torch.int32)


@pytest.mark.parametrize("seed", SEEDS)
def test_mean_and_variance_are_those_of_uniform_numbers(seed):
    n = 200_000
    values = uniform(seed, n)
    assert float(values.mean()) == pytest.approx(1 / 2, abs=5 * math.sqrt(1 / 12 / n))
    assert float(values.var()) == pytest.approx(1 / 12, abs=5 * math.sqrt(1 / 180 / n))


@pytest.mark.parametrize("seed", [1, (3 << 32) + 8])
def test_every_bit_is_set_half_of_the_time(seed):
    n = 100_000
    bits = random_bits(seed, 0, n)
    for place in range(32):
        share = float((bits.bitwise_right_shift(place) & 1).to(torch.float64).mean())
        assert share == pytest.approx(0.5, abs=5 * 0.5 / math.sqrt(n)), place


@pytest.mark.parametrize("seed", [0, 5, 1 << 40])
def test_numbers_fill_all_bins_evenly(seed):
    n, bins = 256_000, 256
    counts = torch.histc(uniform(seed, n), bins=bins, min=0, max=1)
    chi_square = float(((counts - n / bins) ** 2 / (n / bins)).sum())
    assert abs(chi_square - (bins - 1)) < 5 * math.sqrt(2 * (bins - 1))


@pytest.mark.parametrize("seed", [0, 1, (2 << 32) + 1])
@pytest.mark.parametrize("lag", [1, 2, 3, 64, 4096])
def test_neighbours_are_not_correlated(seed, lag):
    values = uniform(seed, 100_000)
    assert abs(correlation(values[lag:], values[:-lag])) < 5 / math.sqrt(100_000 - lag)


@pytest.mark.parametrize("step", [1, 2, 1 << 16, 1 << 32, 1 << 33, (1 << 32) + 1, 1 << 63])
def test_streams_of_neighbouring_seeds_are_not_correlated(step):
    n = 100_000
    first = uniform(10, n)
    for seed in (10 + step, 10 + 3 * step):
        assert abs(correlation(first, uniform(seed % (1 << 64), n))) < 5 / math.sqrt(n)


@pytest.mark.parametrize("step", [1, 3, 1 << 32, (1 << 32) + 1])
def test_the_stream_of_another_seed_is_no_shifted_copy(step):
    first, second = random_bits(10, 0, 1000), random_bits(10 + step, 0, 1000)
    for lag in range(-5, 6):
        one, other = first[max(0, lag) : 1000 + min(0, lag)], second[max(0, -lag) : 1000 - max(0, lag)]
        assert int((one == other).sum()) <= 1, f"shifted by {lag}"


def test_streams_of_many_seeds_are_distinct():
    seeds = [*range(50), *(i << 32 for i in range(1, 50)), *((i << 32) + i for i in range(1, 50))]
    streams = {tuple(random_bits(seed, 0, 8).tolist()) for seed in seeds}
    assert len(streams) == len(seeds)


def test_elements_whose_index_differs_by_two_to_the_32_are_drawn_apart():
    n = 50_000
    assert abs(correlation(uniform(4, n), uniform(4, n, start=WORD))) < 5 / math.sqrt(n)


@pytest.mark.parametrize("probability", [0.001, 0.1, 0.25, 0.5, 0.9, 0.999])
@pytest.mark.parametrize("seed", [0, 1, (1 << 64) - 1])
def test_a_mask_is_true_with_its_probability(probability, seed):
    n = 200_000
    share = float(bernoulli(seed, probability, torch.empty(n)).to(torch.float64).mean())
    assert share == pytest.approx(probability, abs=5 * math.sqrt(probability * (1 - probability) / n))


@pytest.mark.parametrize(("probability", "expected"), [(1.0, True), (1.5, True), (0.0, False), (-0.5, False)])
def test_a_mask_of_certainty_is_constant(probability, expected):
    mask = bernoulli(3, probability, torch.empty(4, 5))
    assert mask.dtype == torch.bool
    assert mask.tolist() == [[expected] * 5] * 4


@pytest.mark.parametrize("nearly", [1e-7, 1e-9, 1e-10, 1e-12, 1e-16])
def test_a_mask_is_continuous_up_to_0_and_1(nearly):
    assert bernoulli(3, 1 - nearly, torch.empty(1000)).all()
    assert not bernoulli(3, nearly, torch.empty(1000)).any()


def test_a_mask_is_true_where_the_bits_lie_below_the_probability():
    for probability in (0.2, 0.5, 0.75):
        assert bernoulli(6, probability, torch.empty(3000)).equal(uniform(6, 3000) < probability)


def test_a_mask_has_the_shape_of_its_tensor_and_starts_at_its_index():
    whole = bernoulli(8, 0.5, torch.empty(60))
    assert bernoulli(8, 0.5, torch.empty(3, 4, 5)).equal(whole.reshape(3, 4, 5))
    assert bernoulli(8, 0.5, torch.empty(())).shape == ()
    assert bernoulli(8, 0.5, torch.empty(20), start=40).equal(whole[40:])


@pytest.mark.parametrize("step", [1, 1 << 32])
def test_masks_of_two_seeds_are_independent(step):
    n = 100_000
    one, other = (bernoulli(seed, 0.5, torch.empty(n)).to(torch.float64) for seed in (20, 20 + step))
    assert float((one * other).mean()) == pytest.approx(0.25, abs=5 * math.sqrt(0.25 * 0.75 / n))


def kept(probability, seed, start=0):
    """Which of as many ones are kept."""
    return counter.keep_below(torch.ones(probability.shape), counter.levels(probability), seed, start) == 1


def test_every_element_may_have_its_own_probability():
    n = 200_000
    probability = torch.linspace(0.1, 0.9, 5).repeat(n // 5)
    shares = kept(probability, 4).to(torch.float64).view(-1, 5).mean(0)
    assert shares.tolist() == pytest.approx([0.1, 0.3, 0.5, 0.7, 0.9], abs=5 * 0.5 / math.sqrt(n / 5))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_a_tensor_of_one_probability_draws_what_the_number_does(dtype):
    for probability in (0.25, 0.5, 0.75):
        own = torch.full((3, 1000), probability, dtype=dtype)
        assert kept(own, 6, start=11).equal(bernoulli(6, probability, torch.empty(3, 1000), start=11))
