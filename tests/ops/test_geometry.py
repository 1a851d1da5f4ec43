"""Lengths, angles and the great circle, computed by hand."""

import math

import pytest
import torch

from hf_merge.ops.geometry import Angle, angle_to_base, slerp_coefficients
from hf_merge.types import Stack


def angle(base, model, size=None):
    base, model = (torch.as_tensor(v, dtype=torch.float32) for v in (base, model))
    size = size or max(1, base.numel())
    return angle_to_base(
        [Stack([model[i : i + size]], start=i, base=base[i : i + size]) for i in range(0, max(1, base.numel()), size)]
    )


@pytest.mark.parametrize(
    ("base", "model", "norms", "cosine"),
    [
        ([1, 0], [0, 1], (1, 1), 0.0),
        ([3, 4], [3, 4], (5, 5), 1.0),
        ([3, 4], [-6, -8], (5, 10), -1.0),
        ([1, 0], [1, 1], (1, math.sqrt(2)), math.sqrt(0.5)),
        ([1, 2, 2], [2, 1, -2], (3, 3), 0.0),
        ([2, 0, 0], [1, 2, 2], (2, 3), 1 / 3),
    ],
)
def test_angles_by_hand(base, model, norms, cosine):
    found = angle(base, model)
    assert (found.norm_a, found.norm_b) == pytest.approx(norms, rel=1e-12)
    assert found.cosine == pytest.approx(cosine, abs=1e-12)


def test_a_norm_of_nothing_counts_as_1():
    assert angle([0, 0], [3, 4]) == Angle(1.0, 5.0, 0.0)
    assert angle([3, 4], [0, 0]) == Angle(5.0, 1.0, 0.0)
    assert angle([0, 0], [0, 0]) == Angle(1.0, 1.0, 0.0)
    assert angle([], []) == Angle(1.0, 1.0, 0.0)


def test_the_floor_of_a_norm_is_1e_8():
    below, above = angle([0.9e-8], [1.0]), angle([1.1e-8], [1.0])
    assert below.norm_a == 1.0
    assert below.cosine == pytest.approx(0.9e-8, rel=1e-6)
    assert above.norm_a == pytest.approx(1.1e-8, rel=1e-6)
    assert above.cosine == pytest.approx(1.0, rel=1e-12)


def test_a_cosine_never_leaves_its_range():
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        vector = torch.randn(100, generator=generator)
        assert -1.0 <= angle(vector, -2 * vector).cosine < -1 + 1e-12
        assert 1 - 1e-12 < angle(vector, 2 * vector).cosine <= 1.0


def test_the_angle_of_a_tensor_is_that_of_its_tiles_together():
    generator = torch.Generator().manual_seed(1)
    base, model = torch.randn(1000, generator=generator), torch.randn(1000, generator=generator)
    whole = angle(base, model)
    assert whole.cosine == pytest.approx(
        float(torch.cosine_similarity(base.double(), model.double(), dim=0)), rel=1e-12
    )
    for size in (1, 7, 333, 999):
        tiled = angle(base, model, size)
        assert (tiled.norm_a, tiled.norm_b, tiled.cosine) == pytest.approx(
            (whole.norm_a, whole.norm_b, whole.cosine), rel=1e-12
        )


def test_sums_are_taken_in_float64():
    large = angle([1e30, 0.0], [1e30, 1e30])
    assert large.cosine == pytest.approx(math.sqrt(0.5), rel=1e-12)
    assert large.norm_a == pytest.approx(1e30, rel=1e-6)
    many = angle(torch.full((1 << 20,), 0.1), torch.full((1 << 20,), 0.1), 1 << 16)
    assert many.norm_a == pytest.approx(1024 * float(torch.tensor(0.1)), rel=1e-12)


def test_a_tensor_of_any_shape_is_one_vector():
    base, model = torch.tensor([[1.0, 2.0], [3.0, 4.0]]), torch.tensor([[4.0, 3.0], [2.0, 1.0]])
    found = angle_to_base([Stack([model], base=base)])
    assert found == angle(base.flatten(), model.flatten())
    assert angle_to_base([Stack([torch.tensor(2.0)], base=torch.tensor(-3.0))]) == Angle(3.0, 2.0, -1.0)


def test_an_angle_without_a_base_says_what_it_lacks():
    with pytest.raises(TypeError, match="needs a base"):
        angle_to_base([Stack([torch.ones(2)])])


@pytest.mark.parametrize(
    ("cosine", "t", "expected"),
    [
        (0.0, 0.0, (1.0, 0.0)),
        (0.0, 1.0, (0.0, 1.0)),
        (0.0, 0.5, (math.sqrt(0.5), math.sqrt(0.5))),
        (0.0, 1 / 3, (math.sqrt(3) / 2, 0.5)),  # 60 and 30 degrees
        (0.5, 0.5, (1 / math.sqrt(3), 1 / math.sqrt(3))),  # sin 30 / sin 60
        (-0.5, 0.5, (1.0, 1.0)),  # sin 60 / sin 120
        (math.sqrt(0.5), 1 / 3, (math.sin(math.pi / 6) * math.sqrt(2), math.sin(math.pi / 12) * math.sqrt(2))),
    ],
)
def test_coefficients_on_the_great_circle_by_hand(cosine, t, expected):
    assert slerp_coefficients(cosine, t, colinear=0.9995) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("cosine", [1.0, 0.99951, -0.99951, -1.0])
def test_beyond_the_limit_the_way_is_straight(cosine):
    assert slerp_coefficients(cosine, 0.25, colinear=0.9995) == (0.75, 0.25)


@pytest.mark.parametrize("cosine", [0.9995, -0.9995, 0.9])
def test_up_to_the_limit_the_way_is_bent(cosine):
    theta = math.acos(cosine)
    expected = (math.sin(0.75 * theta) / math.sin(theta), math.sin(0.25 * theta) / math.sin(theta))
    found = slerp_coefficients(cosine, 0.25, colinear=0.9995)
    assert found == pytest.approx(expected, rel=1e-12)
    assert sum(found) > 1 + 1e-5


def test_a_point_on_the_great_circle_keeps_the_length_and_divides_the_angle():
    theta = 1.2
    a, b = (1.0, 0.0), (math.cos(theta), math.sin(theta))
    for t in (0.1, 0.5, 0.8):
        p, q = slerp_coefficients(math.cos(theta), t, colinear=0.9995)
        x, y = p * a[0] + q * b[0], p * a[1] + q * b[1]
        assert math.hypot(x, y) == pytest.approx(1.0, rel=1e-12)
        assert math.atan2(y, x) == pytest.approx(t * theta, rel=1e-12)
