"""LiNeS: task vectors that grow with depth, whatever the method."""

import pytest
import torch

import hf_merge
from hf_merge.errors import RecipeError

LINES = {"alpha": 0.2, "beta": 0.6}


def states(layers=5):
    torch.manual_seed(0)
    names = ["embed", *(f"layers.{i}.w" for i in range(layers)), "head"]
    base = {name: torch.randn(4, 3) for name in names}
    return base, [{name: base[name] + torch.randn(4, 3) for name in names} for _ in range(2)]


@pytest.mark.parametrize("method", ["task_arithmetic", "ties", "tsv_m", "magmax"])
def test_each_layer_is_scaled_by_its_depth(method):
    base, models = states()
    plain = hf_merge.merge_state_dicts(models, method=method, base_model=base)
    scaled = hf_merge.merge_state_dicts(models, method=method, base_model=base, lines=LINES)
    for name, tensor in base.items():
        depth = int(name.split(".")[1]) / 4 if "layers" in name else 0
        expected = tensor + (0.2 + 0.6 * depth) * (plain[name] - tensor)
        torch.testing.assert_close(scaled[name], expected, rtol=1e-5, atol=1e-6)


def test_it_is_lambda_as_a_gradient_and_multiplies_it():
    base, models = states()
    words = {"method": "task_arithmetic", "base_model": base}
    one = hf_merge.merge_state_dicts(models, **words, lines=LINES, lambda_=0.5)
    other = hf_merge.plan(models, **words, parameters={"lambda": [0.1, 0.4]})
    by_name = {step.name: step.settings["lambda"] for step in other.steps}
    scaled = hf_merge.plan(models, **words, lines=LINES, lambda_=0.5)
    assert {s.name: s.settings["lambda"] for s in scaled.steps} == pytest.approx(by_name)
    assert one["embed"].isfinite().all()


def test_it_is_written_and_read_back():
    recipe = hf_merge.Recipe.from_yaml(
        "merge_method: ties\nbase_model: b\nmodels: [x, y]\nlines: {alpha: 0.2, beta: 0.6}\n"
    )
    assert hf_merge.Recipe.from_yaml(recipe.to_yaml()) == recipe and recipe.lines.at(0.5) == pytest.approx(0.5)


def test_methods_without_task_vectors_are_told():
    _, models = states()
    plan = hf_merge.plan(models, method="linear", lines=LINES)
    assert "lines: scales task vectors, and 'linear' has none" in str(plan.errors[0])


def test_misspelt_words_are_told():
    with pytest.raises(RecipeError, match=r"Unknown key 'alhpa'\. Did you mean 'alpha'"):
        hf_merge.Recipe.from_yaml("merge_method: ties\nbase_model: b\nmodels: [x]\nlines: {alhpa: 1, beta: 0}\n")
