"""Outputs of MergeKit 0.1.5 on small fixed inputs, read from beside the checkout where they are at hand."""

import pytest
import torch
import yaml
from safetensors.torch import load_file

import hf_merge
from tests.conftest import GOLDEN

MERGEKIT = GOLDEN / "mergekit"
CASES = sorted(path.name for path in (MERGEKIT / "cases").glob("*")) if MERGEKIT.is_dir() else []
LATER = {
    "passthrough",
    "slerp",  # recipes with slices
}


def test_golden_data_is_at_hand_or_said_to_be_absent():
    if not CASES:
        pytest.skip("no golden data beside the checkout")
    assert set(CASES) > LATER


@pytest.mark.parametrize("name", [name for name in CASES if name not in LATER])
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


@pytest.mark.parametrize("name", [name for name in CASES if name in LATER])
def test_what_is_not_supported_yet_is_refused_by_name(name):
    recipe = MERGEKIT / "cases" / name / "config.yml"
    missing = "slices" if "slices" in yaml.safe_load(recipe.read_text()) else f"'{name}'"
    with pytest.raises(hf_merge.RecipeError, match=missing):
        hf_merge.Recipe.load(recipe)
