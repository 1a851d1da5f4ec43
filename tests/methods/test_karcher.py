"""The Karcher mean against gradient descent in numpy, on the vectors themselves."""

import numpy as np
import pytest
import torch

from hf_merge.method import get_method

karcher = get_method("karcher")


def by_descent(models, max_iter, tol):
    x = [np.float64(m).ravel() for m in models]
    norms = [np.linalg.norm(v) for v in x]
    units = [v / n for v, n in zip(x, norms, strict=True) if n > tol]
    mean = sum(units) / len(units)
    mean = mean / np.linalg.norm(mean)
    for _ in range(max_iter):
        step = np.zeros_like(mean)
        for unit in units:
            cosine = np.clip(mean @ unit, -1, 1)
            angle = np.arccos(cosine)
            step += angle / np.sin(angle) * (unit - cosine * mean) / len(units) if angle >= tol else 0
        size = np.linalg.norm(step)
        if size < tol:
            break
        mean = np.cos(size) * mean + np.sin(size) * step / size
        mean = mean / np.linalg.norm(mean)
    return (mean * np.mean(norms)).reshape(np.shape(models[0]))


@pytest.mark.parametrize("shape", [(9,), (1,), (5, 8), (4, 3, 6)])
@pytest.mark.parametrize("count", [1, 2, 3, 5])
@pytest.mark.parametrize(("max_iter", "tol"), [(10, 1e-5), (1, 1e-5), (3, 1e-5), (100, 1e-9), (10, 0.05)])
def test_result_is_that_of_descent(shape, count, max_iter, tol):
    generator = torch.Generator().manual_seed(count)
    models = [torch.randn(shape, generator=generator) + 0.8 for _ in range(count)]
    models = [m.abs() for m in models] if shape == (1,) else models
    expected = by_descent([m.numpy() for m in models], max_iter, tol)
    np.testing.assert_allclose(karcher(models, max_iter=max_iter, tol=tol).numpy(), expected, atol=1e-6, rtol=1e-6)


def test_mean_has_the_same_pull_from_all_sides():
    generator = torch.Generator().manual_seed(0)
    models = [torch.randn(20, generator=generator, dtype=torch.float64) + 1 for _ in range(3)]
    units = [m / m.norm() for m in models]
    mean = karcher(units, max_iter=200, tol=1e-6)
    angles = [torch.acos(mean @ u) for u in units]
    pull = sum(a / torch.sin(a) * (u - (mean @ u) * mean) for a, u in zip(angles, units, strict=True))
    assert float(mean.norm()) == pytest.approx(1)
    assert float(pull.norm()) < 1e-5
    chord = sum(units) / sum(units).norm()
    assert float((mean - chord).norm()) > 1e-3, "it is not the mean of the vectors, put on the sphere"


def test_models_without_a_direction_count_in_the_length_only():
    a, nothing = torch.tensor([3.0, 4.0]), torch.zeros(2)
    assert karcher([a, nothing]).tolist() == pytest.approx([1.5, 2])
    assert karcher([nothing, a]).tolist() == pytest.approx([1.5, 2])
    assert karcher([nothing, nothing]).tolist() == [0, 0]
    assert karcher([a, a * 1e-7]).tolist() == pytest.approx([1.5, 2], rel=1e-6)


def test_small_models_are_averaged_not_wiped_out():
    small = torch.tensor([1e-6, 2e-6])
    assert karcher([small, 3 * small]).tolist() == pytest.approx([2e-6, 4e-6])


def test_directions_that_cancel_are_averaged_whatever_the_order():
    a = torch.tensor([1.0, 2.0])
    for models in ([a, -3 * a], [-3 * a, a]):
        assert karcher(models).tolist() == pytest.approx([-1, -2])


def test_opposite_direction_does_not_move_the_mean():
    a = torch.tensor([0.0, 2.0])
    assert karcher([a, a, -a]).tolist() == pytest.approx([0, 2])


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e12, 1e30])
def test_lengths_of_any_size_survive(scale):
    a, b = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 5.0])
    found = karcher([a * scale, b * scale], tol=1e-30)
    assert (found / scale).tolist() == pytest.approx([4 * 0.5**0.5] * 2)
