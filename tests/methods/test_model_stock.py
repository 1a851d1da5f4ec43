"""Model Stock against its formula in numpy."""

import itertools

import numpy as np
import pytest
import torch

import hf_merge
from hf_merge.errors import ParameterError, PlanError
from hf_merge.method import get_method

stock = get_method("model_stock")


def ratio(offsets):
    k, cosines = len(offsets), []
    for a, b in itertools.combinations(offsets, 2):
        cosines.append(np.clip(a @ b / max(np.linalg.norm(a) * np.linalg.norm(b), 1e-6), -1, 1))
    c = np.mean(cosines)
    divisor = 1 + (k - 1) * c
    return 0.0 if abs(divisor) < 1e-6 else k * c / divisor


def by_formula(models, base, filter_wise):
    shape, base = base.shape, np.float64(base)
    width = base.shape[-1] if filter_wise else base.size
    rows = [np.float64(m).reshape(-1, width) for m in models]
    base = base.reshape(-1, width)
    t = np.array([ratio([m[i] - base[i] for m in rows]) for i in range(len(base))])[:, None]
    return (t * np.mean(rows, axis=0) + (1 - t) * base).reshape(shape)


@pytest.mark.parametrize("shape", [(9,), (1,), (5, 8), (3, 1), (4, 3, 6)])
@pytest.mark.parametrize("count", [2, 3, 5])
@pytest.mark.parametrize("filter_wise", [False, True])
@pytest.mark.parametrize("scale", [1.0, 1e-2, 1e-4])
def test_result_is_that_of_the_formula(shape, count, filter_wise, scale):
    generator = torch.Generator().manual_seed(count)
    base = torch.randn(shape, generator=generator)
    models = [base + scale * (torch.randn(shape, generator=generator).abs() + 0.1) for _ in range(count)]
    expected = by_formula([m.numpy() for m in models], base.numpy(), filter_wise)
    found = hf_merge.merge_state_dicts(
        [{"w": m} for m in models], method="model_stock", base_model={"w": base}, filter_wise=filter_wise
    )["w"]
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6, rtol=1e-6)


def test_by_hand():
    right, up = torch.tensor([2.0, 0.0]), torch.tensor([0.0, 3.0])
    assert stock([right, up]).tolist() == [0, 0], "at right angles the base is as good"
    assert stock([right, 2 * right]).tolist() == pytest.approx([3, 0]), "on one line the average is"
    slope = torch.tensor([1.0, 3.0**0.5])  # 60 degrees: t = 2 * 0.5 / 1.5
    assert stock([right, slope]).tolist() == pytest.approx([1.0, 3.0**0.5 / 3])
    assert stock([right, -right]).tolist() == [0, 0]


def test_rows_have_their_own_ratio():
    a, b = torch.tensor([[2.0, 0.0], [2.0, 0.0]]), torch.tensor([[4.0, 0.0], [0.0, 2.0]])
    assert stock([a, b], filter_wise=True).flatten().tolist() == pytest.approx([3, 0, 0, 0])


def test_tiny_task_vectors_are_taken_for_unrelated():
    tiny = torch.tensor([1e-4, 0.0])
    assert stock([tiny, tiny])[0] == pytest.approx(1e-4 * 0.02 / 1.01, rel=1e-4), "c = 1e-8 / 1e-6"


def test_fewer_than_two_models_are_refused():
    with pytest.raises(ParameterError, match="'model_stock' takes at least 2 models; found 1"):
        stock([torch.ones(2)])
    with pytest.raises(PlanError, match="'model_stock' takes at least 2 models beside the base; found 1"):
        hf_merge.merge_state_dicts([{"w": torch.ones(2)}], method="model_stock", base_model={"w": torch.zeros(2)})


def test_a_tensor_that_only_one_model_has_is_the_bases():
    base, a, b = ({name: torch.full((2,), value) for name in "xy"} for value in (0.0, 1.0, 2.0))
    del b["y"]
    merged = hf_merge.merge_state_dicts([a, b], method="model_stock", base_model=base, missing="skip-model")
    assert merged["y"].tolist() == [0, 0]
