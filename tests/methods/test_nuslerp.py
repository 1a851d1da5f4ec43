"""NuSLERP against its formula in numpy, vector by vector."""

import math

import numpy as np
import pytest
import torch

import hf_merge
from hf_merge.errors import ParameterError
from hf_merge.method import get_method
from hf_merge.planning import TILE, Step, tile_of, working_memory
from hf_merge.types import TensorSpec

nuslerp = get_method("nuslerp")
SHAPES = [(7,), (1,), (5, 8), (3, 1), (4, 3, 6)]
WEIGHTS = [(1.0, 1.0), (0.3, 0.7), (2.0, -0.5), (1.0, -1.0)]


def on_circle(t, a, b):
    cosine = np.clip(sum(a / max(np.linalg.norm(a), 1e-7) * (b / max(np.linalg.norm(b), 1e-7))), -1, 1)
    if 1 - cosine**2 <= 1e-12:
        return (1 - t) * a + t * b
    theta = np.arccos(cosine)
    return (np.sin((1 - t) * theta) * a + np.sin(t * theta) * b) / np.sin(theta)


def by_vectors(models, base, weight, flatten, columns):
    a, b = (np.float64(m) - (0 if base is None else np.float64(base)) for m in models)
    total = weight[0] + weight[1]
    t = 0.5 if abs(total) < 1e-6 else weight[1] / total
    if flatten:
        merged = on_circle(t, a.ravel(), b.ravel()).reshape(a.shape)
    else:
        a, b = (np.swapaxes(x, 0, -1) if columns else x for x in (a, b))
        pairs = zip(a.reshape(-1, a.shape[-1]), b.reshape(-1, b.shape[-1]), strict=True)
        merged = np.stack([on_circle(t, *pair) for pair in pairs]).reshape(a.shape)
        merged = np.swapaxes(merged, 0, -1) if columns else merged
    return merged if base is None else merged + np.float64(base)


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("weight", WEIGHTS)
@pytest.mark.parametrize("with_base", [False, True])
@pytest.mark.parametrize(("flatten", "columns"), [(True, False), (True, True), (False, False), (False, True)])
def test_result_is_that_of_the_formula(shape, weight, with_base, flatten, columns):
    generator = torch.Generator().manual_seed(sum(shape))
    models = [torch.randn(shape, generator=generator) for _ in range(2)]
    base = torch.randn(shape, generator=generator) if with_base else None
    expected = by_vectors([m.numpy() for m in models], None if base is None else base.numpy(), weight, flatten, columns)
    found = nuslerp(models, base, weight=list(weight), nuslerp_flatten=flatten, nuslerp_row_wise=columns)
    np.testing.assert_allclose(found.numpy(), expected, atol=1e-6, rtol=1e-6)


def test_rows_that_are_zero_or_on_one_line_are_interpolated_linearly():
    a, b = torch.tensor([[0.0, 0.0], [1.0, 2.0], [1.0, 2.0]]), torch.tensor([[3.0, 4.0], [2.0, 4.0], [-3.0, -6.0]])
    found = nuslerp([a, b], nuslerp_flatten=False, weight=[0.75, 0.25])
    quarter = math.sin(math.pi / 8)  # a vector of nothing is at a right angle to all
    assert found[0].tolist() == pytest.approx([3 * quarter, 4 * quarter])
    torch.testing.assert_close(found[1:], 0.75 * a[1:] + 0.25 * b[1:])


def test_row_wise_turns_columns_and_its_absence_rows():
    a, b = torch.tensor([[1.0, 0.0], [1.0, 0.0]]), torch.tensor([[0.0, 1.0], [0.0, 1.0]])
    rows = nuslerp([a, b], nuslerp_flatten=False)
    assert rows.flatten().tolist() == pytest.approx([math.sqrt(0.5)] * 4), "every row is turned by 45 degrees"
    columns = nuslerp([a, b], nuslerp_flatten=False, nuslerp_row_wise=True)
    assert columns.flatten().tolist() == pytest.approx([math.sqrt(0.5)] * 4)
    a, b = torch.tensor([[1.0, 1.0], [0.0, 0.0]]), torch.tensor([[2.0, 0.0], [0.0, 2.0]])
    columns = nuslerp([a, b], nuslerp_flatten=False, nuslerp_row_wise=True)
    assert columns[:, 0].tolist() == pytest.approx([1.5, 0]), "one line"
    assert columns[:, 1].tolist() == pytest.approx([math.sqrt(0.5), 2 * math.sqrt(0.5)]), "a right angle"


@pytest.mark.parametrize("count", [1, 3])
def test_only_two_models_are_taken(count):
    with pytest.raises(ParameterError, match=f"'nuslerp' takes 2 models; found {count}"):
        nuslerp([torch.ones(2)] * count)


@pytest.mark.parametrize("base", [None, "base"])
@pytest.mark.parametrize("columns", [False, True])
def test_engine_gives_what_a_call_on_tensors_does_for_rows_of_a_large_tensor(base, columns):
    generator = torch.Generator().manual_seed(0)
    a, b, c = ({"w": torch.randn(700, 500, generator=generator)} for _ in range(3))
    settings = {"nuslerp_flatten": False, "nuslerp_row_wise": columns, "weight": [0.4, 0.6]}
    merged = hf_merge.merge_state_dicts([a, b], method="nuslerp", base_model=c if base else None, **settings)
    expected = nuslerp([a["w"], b["w"]], c["w"] if base else None, **settings)
    torch.testing.assert_close(merged["w"], expected, rtol=0, atol=1e-6)


def test_columns_take_the_memory_of_whole_tensors_and_the_rest_that_of_a_tile():
    spec = TensorSpec((4 * 64, TILE // 64), torch.float32)
    columns, rows, flattened = (
        Step("w", "nuslerp", (0, 1), None, nuslerp.settings(2, words), spec)
        for words in (
            {"nuslerp_flatten": False, "nuslerp_row_wise": True},
            {"nuslerp_flatten": False},
            {"nuslerp_flatten": True},
        )
    )
    assert working_memory(rows) == working_memory(flattened)
    assert working_memory(columns) == 4 * working_memory(flattened)


def test_a_row_that_is_longer_than_a_tile_is_one():
    spec = TensorSpec((4, 3 * TILE), torch.float32)
    step = Step("w", "nuslerp", (0, 1), None, nuslerp.settings(2, {"nuslerp_flatten": False}), spec)
    assert tile_of(step) == 3 * TILE


def test_a_tensor_that_one_of_the_two_lacks_is_the_donors():
    one, two = {"a": torch.ones(2), "b": torch.full((2,), 3.0)}, {"a": torch.ones(2)}
    merged = hf_merge.merge_state_dicts([one, two], method="nuslerp", missing="skip-model")
    assert merged["b"].tolist() == [3, 3]
