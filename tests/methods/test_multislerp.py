"""Multi-SLERP against MergeKit's formula in numpy, tangents and all."""

import numpy as np
import pytest
import torch

from hf_merge.method import get_method

multislerp = get_method("multislerp")


def on_sphere(models, base, weight, normalize, eps):
    x = [np.float64(m) - (0 if base is None else np.float64(base)) for m in models]
    if len(models) == 1:
        return np.float64(models[0])
    w = np.float64(weight) / (sum(weight) if normalize else 1)
    norms = [np.linalg.norm(v) for v in x]
    units = [v / (n + eps) for v, n in zip(x, norms, strict=True)]
    mean = sum(a * u for a, u in zip(w, units, strict=True))
    mean = mean / np.linalg.norm(mean)
    tangent = sum(a * (u - np.sum(u * mean) * mean) for a, u in zip(w, units, strict=True))
    q = np.linalg.norm(tangent) + eps
    merged = (np.cos(q) * mean + np.sin(q) / q * tangent) * sum(w * norms)
    return merged if base is None else merged + np.float64(base)


@pytest.mark.parametrize("shape", [(9,), (1,), (5, 8), (4, 3, 6)])
@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize("normalize", [False, True])
@pytest.mark.parametrize("eps", [1e-8, 1e-4])
@pytest.mark.parametrize("weight", [(1.0,), (0.3, 0.7), (0.3, 0.5, 0.2), (2.0, -0.5, 1.0, 0.25)])
def test_result_is_that_of_the_formula(shape, with_base, normalize, eps, weight):
    generator = torch.Generator().manual_seed(len(weight))
    models = [torch.randn(shape, generator=generator).abs() for _ in weight]
    base = -torch.rand(shape, generator=generator) if with_base else None
    expected = on_sphere([m.numpy() for m in models], None if base is None else base.numpy(), weight, normalize, eps)
    found = multislerp(models, base, weight=list(weight), normalize_weights=normalize, eps=eps)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6, rtol=1e-6)


def test_by_hand():
    a, b = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 5.0])
    assert multislerp([a, b]).tolist() == pytest.approx([4 * 0.5**0.5] * 2), "45 degrees, at the mean length"
    base = torch.tensor([10.0, 10.0])
    assert multislerp([a + base, b + base], base).tolist() == pytest.approx([10 + 4 * 0.5**0.5] * 2)


def test_directions_that_cancel_are_averaged():
    a = torch.tensor([1.0, 2.0])
    assert multislerp([a, -3 * a]).tolist() == [-1, -2]
    assert multislerp([a, -3 * a], a).tolist() == pytest.approx([-1, -2]), "task vectors 0 and -4 a"
    b, c = torch.tensor([1.0, -1.0, 0.0]), torch.tensor([0.0, 1.0, -1.0])
    assert multislerp([b, c, -(b + c)]).tolist() == pytest.approx([0, 0, 0])
    assert multislerp([torch.zeros(2), torch.zeros(2), torch.zeros(2)]).tolist() == [0, 0]


def test_weights_that_sum_to_nothing_are_refused():
    with pytest.raises(ValueError, match="set normalize_weights: false"):
        multislerp([torch.ones(2), torch.ones(2)], weight=[1.0, -1.0])


@pytest.mark.parametrize("scale", [1e-25, 1e-12, 1e12, 1e30])
def test_lengths_of_any_size_survive(scale):
    a, b = torch.tensor([3.0, 0.0]), torch.tensor([0.0, 5.0])
    found = multislerp([a * scale, b * scale], eps=1e-40)
    assert (found / scale).tolist() == pytest.approx([4 * 0.5**0.5] * 2)
