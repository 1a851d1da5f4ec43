"""SCE against its formula in numpy, with a full sort."""

import numpy as np
import pytest
import torch

from hf_merge.method import get_method

sce = get_method("sce")


def by_sorting(deltas, select_topk):
    d = np.float64(deltas).reshape(len(deltas), -1)
    if select_topk < 1:
        spread = d.var(axis=0)
        k = int(np.count_nonzero(spread) * select_topk)
        mask = np.zeros(d.shape[1])
        mask[np.argsort(-spread, kind="stable")[:k]] = 1
        d = d * mask
    energy = (d**2).mean(axis=1)
    share = energy / energy.sum() if energy.sum() >= 1e-6 else np.full(len(d), 1 / len(d))
    elected = np.where(d.sum(axis=0) >= 0, 1, -1)
    agree = np.sign(d) == elected
    top, bottom = (share[:, None] * agree * d).sum(axis=0), (share[:, None] * agree).sum(axis=0)
    return (top / np.maximum(bottom, 1e-6)).reshape(np.shape(deltas)[1:])


@pytest.mark.parametrize("shape", [(9,), (1,), (5, 8), (4, 3, 6), (300, 300)])
@pytest.mark.parametrize("count", [1, 2, 3])
@pytest.mark.parametrize("select_topk", [0.0, 0.01, 0.3, 0.999, 1.0])
@pytest.mark.parametrize("scale", [1.0, 3e-4])
def test_result_is_that_of_a_sort(shape, count, select_topk, scale):
    generator = torch.Generator().manual_seed(count)
    deltas = [scale * (i + 1) * torch.randn(shape, generator=generator) for i in range(count)]
    if select_topk < 1:
        for delta in deltas:  # entries without variance, which do not count
            delta.view(-1)[::5] = 0.5 * scale
    expected = by_sorting([d.numpy() for d in deltas], select_topk)
    np.testing.assert_allclose(sce(deltas, select_topk=select_topk).numpy(), expected, atol=1e-6, rtol=1e-6)


def test_by_hand():
    a, b = torch.tensor([3.0, 1.0, 2.0]), torch.tensor([-1.0, 1.0, 1.0])
    shares = [14 / 17, 3 / 17]
    assert sce([a, b]).tolist() == pytest.approx([3, 1, 2 * shares[0] + shares[1]])
    # of the two entries that vary, the half of largest variance is the first
    assert sce([a, b], select_topk=0.5).tolist() == pytest.approx([3, 0, 0])
    assert sce([a, b], select_topk=0.0).tolist() == [0, 0, 0]


def test_models_weigh_the_same_where_changes_are_small():
    a, b = torch.tensor([3e-4, 1e-4]), torch.tensor([1e-4, 1e-4])
    assert sce([a, b]).tolist() == pytest.approx([2e-4, 1e-4])
    assert sce([a * 100, b * 100]).tolist() == pytest.approx([(10 * 3 + 2 * 1) / 12 * 1e-2, 1e-2])


def test_a_tie_of_signs_counts_as_positive_and_equal_variances_are_kept_in_order():
    assert sce([torch.tensor([2.0]), torch.tensor([-2.0])]).tolist() == [2]
    assert sce([torch.tensor([2.0, 2.0, 2.0, 2.0]), torch.zeros(4)], select_topk=0.5).tolist() == [2, 2, 0, 0]


def test_one_model_does_not_vary():
    delta = torch.tensor([1.0, -2.0])
    assert sce([delta]).equal(delta)
    assert sce([delta], select_topk=0.9).tolist() == [0, 0]
