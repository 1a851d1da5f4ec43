"""Breadcrumbs against a sort, as MergeKit describes it."""

import pytest
import torch

from hf_merge.method import get_method


def by_sorting(delta, density, gamma):
    keep, top = int(density * delta.numel()), int(gamma * delta.numel())
    first = max(0, delta.numel() - keep - top)
    mask = torch.zeros_like(delta)
    mask[delta.abs().argsort()[first : first + keep]] = 1
    return delta * mask


@pytest.mark.parametrize("size", [1, 5, 1000, 100_000])
@pytest.mark.parametrize(
    ("density", "gamma"), [(0.5, 0.01), (0.9, 0.3), (0.0, 0.1), (0.2, 0.0), (0.99, 0.01), (0.3, 0.9)]
)
def test_kept_band_is_that_of_a_sort(size, density, gamma):
    delta = torch.randn(size, generator=torch.Generator().manual_seed(size))
    merged = get_method("breadcrumbs")([delta], density=density, gamma=gamma)
    assert merged.equal(by_sorting(delta, density, gamma))
    assert int((merged != 0).sum()) == int(density * size)


def test_density_one_drops_nothing_whatever_gamma_says():
    delta = torch.randn(100)
    assert get_method("breadcrumbs")([delta], density=1.0, gamma=0.5).equal(delta)


def test_equal_magnitudes_are_counted_exactly():
    merged = get_method("breadcrumbs")([torch.tensor([2.0, -2.0, 2.0, -2.0, 1.0])], density=0.4, gamma=0.2)
    assert merged.tolist() == [0, -2, 2, 0, 0]


def test_both_forms_by_hand():
    a, b = torch.tensor([9.0, 3.0, -2.0, 1.0, 0.5]), torch.tensor([-1.0, -8.0, 4.0, 2.0, 0.1])
    kept = {"density": 0.4, "gamma": 0.2, "weight": [1.0, 0.5]}
    assert get_method("breadcrumbs")([a, b], **kept).tolist() == [0, 3, 0, 1, 0]
    assert get_method("breadcrumbs_ties")([a, b], **kept).tolist() == [0, 3, 2, 1, 0]
