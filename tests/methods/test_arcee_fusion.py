"""Arcee Fusion against its formula, with full sorts."""

import numpy as np
import pytest
import torch

import hf_merge
from hf_merge.method import get_method

fusion = get_method("arcee_fusion")


def softmax(x):
    powers = np.exp(x - x.max(axis=-1, keepdims=True))
    return powers / powers.sum(axis=-1, keepdims=True)


def importance(model, base):
    p, q = softmax(np.float64(model)) + 1e-8, softmax(np.float64(base)) + 1e-8
    return np.abs(np.float64(model) - np.float64(base)) * (p * np.log(p / q)).sum(axis=-1, keepdims=True)


def by_sorting(model, base):
    values = importance(model, base)
    ordered = np.sort(values.ravel())
    first, median, third = (ordered[int(q * (len(ordered) - 1))] for q in (0.25, 0.5, 0.75))
    limit = median + 1.5 * (third - first)
    return np.where(values >= limit, model, base), np.abs(values / limit - 1)


@pytest.mark.parametrize("shape", [(9,), (500,), (5, 8), (40, 60), (4, 3, 6), (300, 400)])
def test_result_is_that_of_a_sort(shape):
    generator = torch.Generator().manual_seed(sum(shape))
    base = torch.randn(shape, generator=generator)
    model = base + torch.randn(shape, generator=generator)
    expected, distance = by_sorting(model.numpy(), base.numpy())
    clear = distance > 1e-4  # nearer to the limit, float32 decides
    found = fusion([model], base).numpy()
    np.testing.assert_array_equal(found[clear], expected[clear])
    assert clear.mean() > 0.99
    assert (found == model.numpy()).sum() < found.size / 2


def test_quartiles_of_a_large_tensor_are_exact_and_the_same_each_time():
    generator = torch.Generator().manual_seed(0)
    base, model = (torch.randn(1500, 1000, generator=generator) for _ in range(2))
    expected, distance = by_sorting(model.numpy(), base.numpy())
    found = fusion([model], base)
    clear = distance > 1e-4
    np.testing.assert_array_equal(found.numpy()[clear], expected[clear])
    assert fusion([model], base).equal(found)


def test_rows_of_one_and_equal_importance_are_taken_from_the_model():
    base, model = torch.zeros(3, 1), torch.tensor([[1.0], [2.0], [3.0]])
    assert fusion([model], base).equal(model), "a row of one has no divergence: nothing stands out, all is equal"
    assert fusion([torch.tensor(2.0)], torch.tensor(1.0)).tolist() == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_result_has_the_dtype_of_its_inputs(dtype):
    base, model = torch.randn(4, 5).to(dtype), torch.randn(4, 5).to(dtype)
    assert fusion([model], base).dtype == dtype
    assert hf_merge.merge_state_dicts([{"w": model}], method="arcee_fusion", base_model={"w": base})["w"].dtype == dtype


def test_engine_merges_empty_tensors():
    empty = {"w": torch.zeros(0, 3)}
    assert hf_merge.merge_state_dicts([empty], method="arcee_fusion", base_model=dict(empty))["w"].shape == (0, 3)
