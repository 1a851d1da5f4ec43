"""The plan: decided from headers, every problem at once, each with its fix."""

import json

import pytest
import torch

import hf_merge
from hf_merge.planning import format_bytes

BASE = {"layers.0.w": torch.zeros(4, 3), "layers.1.w": torch.zeros(4, 3), "head": torch.zeros(5)}


def like(state, **changes):
    return {**{name: tensor + 1 for name, tensor in state.items()}, **changes}


def plan(models, **changes):
    return hf_merge.plan(models, **{"method": "linear", **changes})


def errors(made):
    return [str(problem) for problem in made.errors]


def test_all_shape_mismatches_are_reported_at_once_with_both_shapes():
    made = plan([BASE, like(BASE, head=torch.zeros(6)), like(BASE, **{"layers.0.w": torch.zeros(3, 4)})])
    assert len(made.errors) == 2
    assert "<model 1>" not in errors(made)[0] and "head [6] instead of [5]" in errors(made)[0]
    assert "layers.0.w [3, 4] instead of [4, 3]" in errors(made)[1] and "rules:" in errors(made)[1]
    with pytest.raises(hf_merge.PlanError, match=r"head \[6\]") as raised:
        made.check()
    assert raised.value.problems == made.problems


def test_mismatch_with_the_base_is_found_too():
    assert "head" in errors(plan([like(BASE, head=torch.zeros(6))], method="ties", base_model=BASE))[0]


def test_rule_sets_mismatching_tensors_apart():
    recipe = {"merge_method": "linear", "models": [_ref("a", BASE), _ref("b", like(BASE, head=torch.zeros(6)))]}
    recipe["rules"] = [{"pattern": "head", "merge_method": "passthrough", "models": [recipe["models"][0]]}]
    assert not plan(recipe).errors


def _ref(label, state):
    from hf_merge.types import InMemory

    return InMemory(state, label)


def test_tensor_that_a_model_lacks_is_an_error_that_offers_the_policies():
    short = like(BASE)
    del short["head"]
    (error,) = errors(plan([BASE, short]))
    assert "'model 1' lacks tensors of 'model 0'" in error and "missing: base" in error and "head" in error


def test_policy_base_keeps_the_bases_and_skip_model_merges_the_others():
    short = like(BASE)
    del short["head"]
    models, third = [like(BASE), short], like(BASE, head=torch.full((5,), 7.0))
    keep = hf_merge.merge_state_dicts(models, method="task_arithmetic", base_model=BASE, missing="base")
    assert torch.equal(keep["head"], BASE["head"])
    skip = hf_merge.merge_state_dicts(
        [*models, third], method="linear", base_model=None, missing="skip-model", weight=[1, 5, 2]
    )
    assert torch.equal(skip["head"], torch.full((5,), (1 + 14) / 3))
    assert torch.equal(skip["layers.0.w"], torch.ones(4, 3))
    assert plan(models, missing="base").problems[0].severity == "warning"


def test_extra_tensors_are_left_out_with_a_warning():
    made = plan([BASE, like(BASE, extra=torch.zeros(2))])
    assert not made.errors and "extra" in str(made.problems[0]) and "extra" not in made.specs


def test_integers_that_some_models_lack_are_the_donors():
    ids = torch.arange(3)
    merged = hf_merge.merge_state_dicts([like(BASE)], method="task_arithmetic", base_model={**BASE, "ids": ids})
    assert torch.equal(merged["ids"], ids)


def test_rule_may_choose_one_models_integers():
    one, two = ({"x": torch.ones(2), "ids": torch.arange(3) + i} for i in range(2))
    recipe = {"merge_method": "linear", "models": [_ref("one", one), _ref("two", two)]}
    recipe["rules"] = [{"pattern": "ids", "merge_method": "passthrough", "models": [recipe["models"][1]]}]
    loaded = hf_merge.Recipe.load(recipe)
    (step,) = [step for step in plan(loaded, method=None).steps if step.name == "ids"]
    assert step.method is None and step.inputs == ((1, "ids"),)


def test_float_against_integer_is_an_error():
    assert "floats" in errors(plan([BASE, like(BASE, head=torch.zeros(5, dtype=torch.int64))]))[0]
    assert "floats" in errors(plan([like(BASE, head=torch.zeros(5, dtype=torch.int64)), BASE]))[0]


def test_method_without_its_base_or_with_the_wrong_number_of_models():
    assert "'ties' merges task vectors: pass base_model=" in errors(plan([BASE], method="ties"))[0]
    assert "'slerp' merges a model into a base" in errors(plan([BASE, like(BASE)], method="slerp"))[0]
    two = errors(plan([like(BASE), like(BASE)], method="slerp", base_model=BASE))
    assert "'slerp' takes 1 model beside the base; found 2" in two[0]
    assert "takes 1 model; found 2" in errors(plan([BASE, like(BASE)], method="passthrough"))[0]


def test_base_listed_among_the_models_is_not_merged_with_itself():
    recipe = {"merge_method": "ties", "models": [_ref("base", BASE), _ref("a", like(BASE))]}
    recipe["base_model"] = recipe["models"][0]
    made = plan(recipe, method="ties")
    assert all(step.inputs == ((1, step.name),) and step.base == (0, step.name) for step in made.steps)
    only = plan({**recipe, "models": recipe["models"][:1]}, method="ties")
    assert "all of them are the base" in errors(only)[0]


def test_base_that_is_one_of_the_objects_is_not_merged_with_itself():
    made = plan([BASE, like(BASE)], method="ties", base_model=BASE)
    assert all(step.inputs == ((1, step.name),) and step.base == (0, step.name) for step in made.steps)
    with pytest.raises(hf_merge.RecipeError, match="lists '<model 1>' twice"):
        plan([BASE, BASE])


def test_unlisted_base_of_a_method_without_base_needs_a_weight_as_in_mergekit():
    models = [like(BASE), like(BASE)]
    assert "it has no weight" in errors(plan(models, base_model=BASE, weight=[1, 1]))[0]
    made = plan(models, base_model=BASE, weight=1.0)
    assert not made.errors and [one.model for one in made.steps[0].inputs] == [0, 1, 2]


def test_foreign_models_are_told(llamas, tmp_path):
    import shutil

    shutil.copytree(llamas["a"], tmp_path / "foreign")
    config = json.loads((tmp_path / "foreign" / "config.json").read_text()) | {"model_type": "mistral"}
    (tmp_path / "foreign" / "config.json").write_text(json.dumps(config))
    assert "a 'mistral' model" in str(plan([llamas["b"], tmp_path / "foreign"]).problems[0])


def test_rule_that_matches_nothing_is_a_warning():
    assert "'nothing' matches no tensor" in str(
        plan({"merge_method": "linear", "models": [_ref("a", BASE)], "rules": [{"pattern": "nothing"}]}).problems[0]
    )


def test_settings_are_plain_numbers_for_each_tensor():
    recipe = """
merge_method: ties
models:
  - model: {path: a}
    parameters: {weight: [0, 1], density: [{filter: head, value: 0.9}, {value: 0.2}]}
parameters: {weight: 5, lambda: 0.5}
base_model: {path: base}
"""
    loaded = hf_merge.Recipe.from_yaml(recipe)
    from hf_merge.planner import make_plan
    from hf_merge.sources import MappingSource

    sources = dict(zip(loaded.references, [MappingSource(like(BASE), "a"), MappingSource(BASE, "base")], strict=True))
    settings = {step.name: step.settings for step in make_plan(loaded, sources).steps}
    assert settings["layers.0.w"]["weight"] == [0] and settings["layers.1.w"]["weight"] == [1]
    assert settings["head"]["weight"] == [0] and settings["head"]["density"] == [0.9]
    assert settings["layers.1.w"]["density"] == [0.2] and settings["head"]["lambda"] == 0.5


def test_sizes_and_text(llamas):
    made = plan([llamas["a"], llamas["b"]], method="ties", base_model=llamas["base"], dtype="bfloat16")
    parameters = sum(spec.numel for spec in made.specs.values())
    assert made.bytes_read == 3 * 4 * parameters and made.bytes_written == 2 * parameters
    assert "ties" in str(made) and format_bytes(made.bytes_written) in str(made) and "problems:    none" in str(made)
    assert 0 < made.peak_memory < 50_000_000
    again = json.loads(json.dumps(made.to_dict(), default=str))
    assert len(again["tensors"]) == len(made.steps) and again["bytes_read"] == made.bytes_read


def test_peak_memory_does_not_grow_with_the_model():
    small, large = ({f"layers.{i}.w": torch.empty(1 << 20, device="meta") for i in range(n)} for n in (1, 50))
    assert plan([small, small | {}]).peak_memory == plan([large, large | {}]).peak_memory


@pytest.mark.parametrize(
    ("device_map", "expected"),
    [("cpu", {"cpu"}), ({"": "cpu"}, {"cpu"}), ({"layers.0": "cpu", "layers": "meta", "": "cpu"}, {"cpu", "meta"})],
)
def test_device_map_gives_every_tensor_a_device(device_map, expected):
    assert {step.device for step in plan([BASE], device_map=device_map).steps} == expected


def test_auto_spreads_what_is_not_elementwise_over_the_accelerators(monkeypatch):
    from hf_merge import placement
    from hf_merge.method import _registry, merge_method
    from hf_merge.types import Merged, Models

    @merge_method(paper="https://example.org")
    def whole(models: Models) -> Merged:
        """Take the first."""
        return models[0]

    try:
        monkeypatch.setattr(placement, "_accelerators", lambda: ["cuda:0", "cuda:1"])
        steps = {step.name: step.device for step in plan([BASE], method="whole").steps}
        assert set(steps.values()) == {"cuda:0", "cuda:1"} and steps["layers.0.w"] != steps["layers.1.w"]
        assert {step.device for step in plan([BASE]).steps} == {"cpu"}
    finally:
        del _registry["whole"]


def test_device_that_is_not_here_and_map_with_holes_are_errors():
    with pytest.raises(hf_merge.RecipeError, match="'head'"):
        plan([BASE], device_map={"layers": "cpu"})
    with pytest.raises(hf_merge.RecipeError, match="'nowhere:7', which is not here"):
        plan([BASE], device_map="nowhere:7")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_elementwise_merge_on_a_gpu_gives_what_the_cpu_gives():
    generator = torch.Generator().manual_seed(0)
    models = [{"w": torch.randn(300_000, generator=generator)} for _ in range(3)]
    changes = {"method": "dare_ties", "density": 0.4, "base_model": models[0]}
    made = hf_merge.plan(models[1:], device_map="cuda:0", **changes)
    from hf_merge.execute import compute

    on_gpu = compute(made, made.steps[0], [models[1], models[2], models[0]])
    on_cpu = hf_merge.merge_state_dicts(models[1:], **changes)["w"]
    assert torch.allclose(on_gpu.cpu(), on_cpu, atol=1e-6)
