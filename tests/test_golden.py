"""Outputs of MergeKit 0.1.5 on small fixed inputs, read from beside the checkout where they are at hand."""

import pytest
import torch
from safetensors.torch import load_file

import hf_merge
from tests.conftest import GOLDEN

MERGEKIT = GOLDEN / "mergekit"
CASES = sorted(path.name for path in (MERGEKIT / "cases").glob("*")) if MERGEKIT.is_dir() else []


def test_golden_data_is_at_hand_or_said_to_be_absent():
    if not CASES:
        pytest.skip("no golden data beside the checkout")
    assert len(CASES) >= 17


@pytest.mark.parametrize("name", CASES)
def test_recipe_gives_mergekits_result(name, tmp_path, monkeypatch):
    monkeypatch.chdir(MERGEKIT / "models")
    recipe = MERGEKIT / "cases" / name / "config.yml"
    merged = load_file(hf_merge.merge(recipe, tmp_path / "out").path / "model.safetensors")
    expected = load_file(recipe.with_name("output.safetensors"))
    assert merged.keys() == expected.keys()
    for key, tensor in expected.items():
        assert merged[key].dtype == tensor.dtype
        distance = (merged[key].float() - tensor.float()).abs()
        assert bool((distance <= (one_bfloat16_step(key) if tensor.dtype == torch.bfloat16 else 1e-6)).all()), key


def one_bfloat16_step(key):
    """MergeKit rounds the inputs to bfloat16 first, so it is off by a step of the largest input."""
    inputs = [load_file(MERGEKIT / "models" / name / "model.safetensors")[key].abs() for name in ("a", "b")]
    return 2.0**-7 * torch.maximum(*inputs)
