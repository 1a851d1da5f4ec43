"""Weighted sums with and without a vote: tables by hand, and a vote counted entry by entry."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_merge.ops.combine import agreeing, disjoint_sum, linear_sum, weighted_sum

some = settings(max_examples=60, deadline=None, derandomize=True, database=None)


def tensor(*values):
    return torch.tensor(values, dtype=torch.float32)


def test_a_weighted_sum_by_hand():
    assert weighted_sum([tensor(1, 2), tensor(10, -20), tensor(100, 0)], [1, 0.5, -2]).tolist() == [-194.0, -8.0]


def test_a_weighted_sum_of_one_is_a_new_tensor():
    one = tensor(1, 2)
    total = weighted_sum([one], [1.0])
    total.add_(5)
    assert one.tolist() == [1.0, 2.0]


@pytest.mark.parametrize(
    "combine",
    [
        lambda tensors: weighted_sum(tensors, [2.0, 3.0]),
        lambda tensors: linear_sum(tensors, [2.0, 3.0], normalize=True),
        lambda tensors: disjoint_sum(tensors, [2.0, 3.0], normalize=True),
        lambda tensors: disjoint_sum(tensors, [2.0, 3.0], normalize=False),
    ],
    ids=["weighted", "linear", "disjoint mean", "disjoint sum"],
)
def test_sums_leave_their_inputs_alone_and_keep_their_shape(combine):
    inputs = [torch.arange(6.0).reshape(3, 2) - 2, torch.ones(3, 2)]
    copies = [t.clone() for t in inputs]
    assert combine(inputs).shape == (3, 2)
    assert all(t.equal(copy) for t, copy in zip(inputs, copies, strict=True))


@pytest.mark.parametrize(
    "combine", [weighted_sum, lambda t, w: linear_sum(t, w, normalize=True)], ids=["weighted", "linear"]
)
def test_a_weight_too_few_or_too_many_is_an_error(combine):
    for weights in ([1.0], [1.0, 1.0, 1.0]):
        with pytest.raises(ValueError, match="zip"):
            combine([tensor(1), tensor(2)], weights)


@pytest.mark.parametrize(
    ("weights", "normalize", "expected"),
    [
        ([1, 1], False, [11.0, -18.0]),
        ([1, 1], True, [5.5, -9.0]),
        ([3, 1], True, [3.25, -3.5]),
        ([0.5, 0.25], True, [4.0, pytest.approx(-16 / 3)]),
        ([-1, -3], True, [7.75, -14.5]),
        ([1, -1], True, [-9.0, 22.0]),  # the weights sum to 0: no division
        ([1, -1 + 5e-9], True, [pytest.approx(-9.0, rel=1e-6), pytest.approx(22.0, rel=1e-6)]),  # below 1e-8: neither
        ([1, -1], False, [-9.0, 22.0]),
    ],
)
def test_a_linear_sum_by_hand(weights, normalize, expected):
    assert linear_sum([tensor(1, 2), tensor(10, -20)], weights, normalize=normalize).tolist() == expected


def test_a_linear_sum_is_divided_from_1e8th_on():
    divided = linear_sum([torch.ones(1, dtype=torch.float64)] * 2, [1.0, -1.0 + 2e-8], normalize=True)
    assert divided.item() == pytest.approx(1.0, rel=1e-6)


@pytest.mark.parametrize(
    ("entries", "weights", "total", "mean"),
    [
        # signs agree: all take part
        ([1, 2, 3], [1, 1, 1], 6, 2),
        ([-1, -2, -3], [1, 1, 1], -6, -2),
        # the larger mass wins, not the larger number
        ([5, -1, -1], [1, 1, 1], 5, 5),
        ([5, -3, -3], [1, 1, 1], -6, -3),
        # a tie counts as positive
        ([2, -2], [1, 1], 2, 2),
        ([-2, 2], [1, 1], 2, 2),
        ([3, -1, -2], [1, 1, 1], 3, 3),
        # a zero takes no part, not even in the divisor
        ([0, 4], [1, 1], 4, 4),
        ([0, -4], [1, 1], -4, -4),
        ([0, 0], [1, 1], 0, 0),
        # weights count in the vote and in the mean
        ([4, -3], [1, 2], -6, -3),
        ([2, 8], [3, 1], 14, 3.5),
        ([1, -100], [1, 0], 1, 1),
        # a negative weight turns the vote around; the divisor may be negative
        ([3, 2], [1, -1], 3, 3),
        ([1, 2], [1, -1], -2, 2),
        ([-3, -2], [1, -1], -3, -3),
        ([1, -2], [-1, 1], -3, float("inf")),  # replaced below: weights -1 and 1 cancel, divisor 1
    ],
)
def test_a_vote_by_hand(entries, weights, total, mean):
    if mean == float("inf"):
        mean = total  # where the weights that agree sum to 0, the sum is left undivided
    stacked = [tensor(entry) for entry in entries]
    assert disjoint_sum(stacked, weights, normalize=False).item() == total
    assert disjoint_sum(stacked, weights, normalize=True).item() == mean


def test_each_entry_has_its_own_vote_and_divisor():
    found = disjoint_sum([tensor(1, -1, 0, 2), tensor(3, -3, 5, -2)], [1.0, 3.0], normalize=True)
    assert found.tolist() == [2.5, -2.5, 5.0, -2.0]


def test_zeros_of_either_sign_vote_for_nothing():
    assert disjoint_sum([tensor(0.0, -0.0), tensor(-0.0, -0.0)], [1.0, -1.0], normalize=True).tolist() == [0.0, 0.0]


def counted(entries, weights, normalize):
    """The vote on one entry, in Python."""
    weighted = [entry * weight for entry, weight in zip(entries, weights, strict=True)]
    sign = 1 if sum(weighted) >= 0 else -1
    agreeing = [i for i, value in enumerate(weighted) if value * sign > 0]
    total = sum(weighted[i] for i in agreeing)
    divisor = sum(weights[i] for i in agreeing) or 1
    return total / divisor if normalize else total


@given(data=st.data(), models=st.integers(1, 5), size=st.integers(1, 20), normalize=st.booleans())
@some
def test_the_vote_is_the_one_counted_entry_by_entry(data, models, size, normalize):
    entry = st.lists(st.integers(-4, 4), min_size=size, max_size=size)
    rows = data.draw(st.lists(entry, min_size=models, max_size=models))
    weights = data.draw(st.lists(st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0, 4.0]), min_size=models, max_size=models))
    expected = [counted(column, weights, normalize) for column in zip(*rows, strict=True)]
    found = disjoint_sum([tensor(*row) for row in rows], weights, normalize=normalize)
    assert found.tolist() == pytest.approx(expected, rel=1e-6)


@given(data=st.data(), models=st.integers(1, 5), normalize=st.booleans())
@some
def test_the_linear_sum_is_the_one_counted_entry_by_entry(data, models, normalize):
    values = data.draw(st.lists(st.integers(-50, 50), min_size=models, max_size=models))
    weights = data.draw(st.lists(st.sampled_from([-2.0, -1.0, 0.0, 0.5, 1.0, 4.0]), min_size=models, max_size=models))
    expected = sum(v * w for v, w in zip(values, weights, strict=True)) / ((sum(weights) or 1) if normalize else 1)
    found = linear_sum([tensor(v) for v in values], weights, normalize=normalize)
    assert found.item() == pytest.approx(expected, rel=1e-6, abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_dtype_stays(dtype):
    inputs = [torch.ones(3, dtype=dtype)] * 2
    for normalize in (True, False):
        assert linear_sum(inputs, [0.5, 0.25], normalize=normalize).dtype == dtype
        assert disjoint_sum(inputs, [0.5, 0.25], normalize=normalize).dtype == dtype


def test_what_agrees_with_the_plain_sum_is_kept_by_hand():
    one, two = tensor(4, -1, 2, 0), tensor(-5, 3, -2, 1)
    assert [t.tolist() for t in agreeing([one, two])] == [[0, 0, 2, 0], [-5, 3, 0, 1]]
    assert [t.tolist() for t in agreeing([one, two], undecided=-1.0)] == [[0, 0, 0, 0], [-5, 3, -2, 1]]
