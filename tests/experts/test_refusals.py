"""Recipes of task experts that cannot be meant: one clear error, which says what to do, before anything is merged."""

import re

import pytest
import torch
import transformers
import yaml
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file

import hf_merge
from hf_merge.errors import ComputeError, ParameterError, PlanError, RecipeError


def state(seed, **more):
    generator = torch.Generator().manual_seed(seed)
    return {"w": torch.randn(4, 6, generator=generator), "v": torch.randn(6, generator=generator), **more}


BASE, A, B = state(0), state(1), state(2)
METHODS = [name for name in hf_merge.list_methods() if hf_merge.get_method(name).experts]


def merged(models=(A, B), method="emr", base_model=BASE, **said):
    models = models if isinstance(models, dict) else list(models)
    return hf_merge.merge_state_dicts(models, method=method, base_model=base_model, **said)


def spoilt(seed, value):
    model = state(seed)
    model["w"][1, 2] = value
    return model


REFUSED = {
    "too few tasks": ({"tasks": ["a"]}, "'tasks' has 1 names for 2 models: give one for each."),
    "too many tasks": ({"tasks": list("abc")}, "'tasks' has 3 names for 2 models: give one for each."),
    "a task twice": ({"tasks": ["a", "a"]}, "'tasks' has 'a' twice"),
    "one folder": ({"tasks": ["Cars", "cars"]}, "'tasks' has 'Cars' twice, upper and lower case being the same"),
    "shared": ({"tasks": ["shared", "b"]}, "'tasks' has 'shared', which stands for what all tasks share: take another"),
    "separator": ({"tasks": ["a/b", "c"]}, "'tasks' has 'a/b', which no folder is called: take letters"),
    "other separator": ({"tasks": ["a\\b", "c"]}, "'tasks' has 'a\\b', which no folder is called: take letters"),
    "folder above": ({"tasks": ["..", "c"]}, "'tasks' has '..', which no folder is called: take letters"),
    "no name": ({"tasks": ["", "c"]}, "'tasks' has '', which no folder is called: take letters"),
    "heads match nothing": ({"heads": ["w", "head*"]}, "'heads' has 'head*', and no tensor is called so"),
    "heads match all": ({"heads": "*"}, "'heads' matches every tensor, so that there is nothing to merge"),
    "strangers": (
        {"models": [{"x": torch.ones(2)}, {"x": torch.ones(2)}]},
        "The models and their base have 0 of 3 tensors in common, in name and shape: name fine-tunes of one model",
    ),
    "a name of ours": ({"models": [A, {**B, "experts/x": torch.ones(1)}]}, "The tensor 'experts/x' is called as"),
    "an adapter": ({"output_format": "adapter"}, "'emr' makes a backbone with task experts: leave output_format out."),
    "a rule": (
        {"method": "linear", "rules": [{"pattern": "w", "merge_method": "emr"}]},
        "'emr' makes task experts of whole models, not of parts: write merge_method: emr above all.",
    ),
    "heads of none": ({"method": "linear", "heads": ["w"]}, "The recipe says 'heads', which is of task experts; 'lin"),
    "tasks of none": ({"method": "ties", "tasks": ["a", "b"]}, "'ties' has none: leave it out."),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_recipe_is_refused_in_words_that_say_what_to_do(case):
    said, words = REFUSED[case]
    with pytest.raises(RecipeError) as caught:
        merged(**said)
    assert words in str(caught.value)


@pytest.mark.parametrize(
    ("said", "words"), [({"base_model": None}, "pass base_model="), ({"models": [BASE]}, "no models")]
)
def test_models_and_a_base_are_needed(said, words):
    with pytest.raises(PlanError, match=words):
        merged(**said)


@pytest.mark.parametrize("task", ["carz", "", 2, -3, True, None])
def test_an_unknown_task_is_named_with_those_that_there_are(task):
    found = merged({"cars": A, "svhn": B})
    with pytest.raises(ParameterError) as caught:
        found.reconstruct(task)
    assert f"There is no task {task!r}." in str(caught.value)
    assert str(caught.value).endswith("Tasks: cars, svhn.")
    assert ("Did you mean 'cars'?" in str(caught.value)) == (task == "carz")


def test_tasks_are_found_by_name_and_by_place():
    found = merged({"cars": A, "svhn": B})
    assert found.reconstruct("svhn").keys() == found.reconstruct(-1).keys()
    assert all(found.reconstruct("svhn")[name].equal(found.reconstruct(1)[name]) for name in BASE)


def test_names_of_tasks_are_made_unlike(tmp_path):
    names = ["x/a", "y/A", "z/a_0", "shared", "w/odd name!"]
    files = [tmp_path / name for name in names]
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 8}
    config = transformers.ViTConfig(**sizes, image_size=4, patch_size=2)
    for folder in files:
        transformers.ViTModel(config).save_pretrained(folder)
    base = tmp_path / "base"
    transformers.ViTModel(config).save_pretrained(base)
    found = hf_merge.merge_state_dicts([str(folder) for folder in files], method="emr", base_model=str(base))
    assert found.tasks == ["a_0_0", "A_1", "a_0_2", "shared_3", "odd_name"]


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_a_model_that_is_not_finite_is_named(method, value):
    with pytest.raises(ComputeError, match=r"'w' by '.*': <model 1> has NaN or Inf in this tensor"):
        merged([A, spoilt(2, value)], method=method)


def test_a_head_that_is_not_finite_is_named_and_may_pass():
    models = [A, {**B, "head": torch.tensor([1.0, float("nan")])}]
    with pytest.raises(ComputeError, match=r"head.*<model 1> has NaN or Inf"):
        merged(models)
    found = merged(models, allow_nonfinite=True).reconstruct(1)["head"]
    torch.testing.assert_close(found, models[1]["head"], equal_nan=True, rtol=0, atol=0)


def test_integers_that_differ_are_refused():
    models = [{**model, "steps": torch.tensor(i)} for i, model in enumerate((A, B))]
    with pytest.raises(ComputeError, match="integers cannot be averaged; choose one model's by a rule"):
        merged(models, base_model={**BASE, "steps": torch.tensor(0)})


# models in folders


@pytest.fixture(scope="module")
def vits(tmp_path_factory):
    """Tiny image classifiers of different heads, and models without one, by name."""
    root = tmp_path_factory.mktemp("vits")
    sizes = {"hidden_size": 8, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 16}

    def saved(name, kind, **said):
        kind(transformers.ViTConfig(**sizes, image_size=8, patch_size=4, **said)).save_pretrained(root / name)
        return str(root / name)

    headed, plain = transformers.ViTForImageClassification, transformers.ViTModel
    torch.manual_seed(0)
    made = {name: saved(name, headed, num_labels=labels) for name, labels in (("cars", 3), ("svhn", 5), ("dtd", 3))}
    return {**made, "base": saved("base", plain), "plain": saved("plain", plain), "other": saved("other", plain)}


@pytest.mark.parametrize("names", [("cars", "svhn", "dtd"), ("cars", "dtd")], ids=len)
def test_heads_of_transformers_classes_are_each_tasks_own(vits, names):
    found = hf_merge.merge_state_dicts([vits[name] for name in names], method="emr", base_model=vits["base"])
    assert found.tasks == [*names]
    for name in names:
        saved, task = load_file(f"{vits[name]}/model.safetensors"), found.reconstruct(name)
        assert {*found.experts[names.index(name)].own} == {"classifier.weight", "classifier.bias"}
        assert task["classifier.weight"].equal(saved["classifier.weight"])
        assert {key.removeprefix("vit.") for key in saved} == task.keys()


@pytest.mark.parametrize("base", ["base", "dtd"])
def test_a_model_without_a_head_among_headed_ones_is_named(vits, base):
    with pytest.raises(PlanError) as caught:
        hf_merge.merge_state_dicts(
            [vits[name] for name in ("cars", "plain", "svhn")], method="emr", base_model=vits[base]
        )
    told = f"'{vits['plain']}' has no head, which '{vits['cars']}' has ('classifier.bias'): every task needs its own"
    assert told in str(caught.value)


def test_models_that_all_have_no_head_are_merged(vits):
    models = [vits["plain"], vits["other"]]
    assert hf_merge.merge_state_dicts(models, method="emr", base_model=vits["base"]).tasks == ["plain", "other"]


def in_slices(vits):
    sources = [{"model": vits[name], "layer_range": [0, 2]} for name in ("cars", "dtd")]
    return {"merge_method": "emr", "base_model": vits["base"], "slices": [{"sources": sources}]}


def in_a_module(vits, above="linear", within="emr"):
    part = {"models": [vits["cars"], vits["dtd"]], "merge_method": within}
    return {"merge_method": above, "base_model": vits["base"], "modules": {"vit": part}}


STRUCTURED = {
    "slices": (in_slices, "'emr' makes task experts of whole models: list them under models:."),
    "module": (in_a_module, "write merge_method: emr above all."),
    "modules": (lambda vits: in_a_module(vits, "emr", None), "whole models: list them under models:."),
}


@pytest.mark.parametrize("case", STRUCTURED)
def test_task_experts_are_of_whole_models(vits, case):
    recipe, words = STRUCTURED[case]
    with pytest.raises(RecipeError) as caught:
        hf_merge.plan(recipe(vits))
    assert words in str(caught.value)


def test_a_stage_makes_no_task_experts(vits, tmp_path):
    first = {"name": "first", "merge_method": "emr", "base_model": vits["base"], "models": [vits["cars"], vits["dtd"]]}
    last = {"merge_method": "linear", "models": ["first", vits["cars"]]}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump_all([first, last]))
    with pytest.raises(RecipeError, match="no stage of another merge: write it with merge"):
        hf_merge.plan(recipe)


def test_no_adapter_is_written_of_task_experts(vits, tmp_path):
    models = [vits["cars"], vits["dtd"]]
    with pytest.raises(RecipeError, match="leave output_format out"):
        hf_merge.merge(models, tmp_path / "out", method="emr", base_model=vits["base"], output_format="adapter")
    assert not (tmp_path / "out").exists()


@pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")  # PEFT asks for it
@pytest.mark.parametrize("method", METHODS)
def test_adapters_alone_are_refused(vits, method, tmp_path):
    for name in ("x", "y"):
        model = transformers.ViTModel.from_pretrained(vits["base"])
        get_peft_model(model, LoraConfig(r=2, target_modules="all-linear")).save_pretrained(tmp_path / name)
    with pytest.raises(RecipeError, match="adapters alone are none: pass base_model="):
        hf_merge.merge([tmp_path / "x", tmp_path / "y"], tmp_path / "out", method=method)
    assert not (tmp_path / "out").exists()
    base = {"base_model": vits["base"], "tasks": ["x", "y"]}
    assert hf_merge.merge_state_dicts([str(tmp_path / "x"), str(tmp_path / "y")], method=method, **base).tasks == [
        "x",
        "y",
    ]


def test_a_plan_tells_that_experts_name_parameters_which_a_checkpoint_holds_in_parts(tmp_path):
    config = transformers.MixtralConfig(
        vocab_size=16, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, num_local_experts=2,
    )  # fmt: skip
    for name in ("base", "x", "y"):
        transformers.MixtralForCausalLM(config).save_pretrained(tmp_path / name)
    models, words = [tmp_path / "x", tmp_path / "y"], {"method": "emr", "base_model": tmp_path / "base"}
    told = r"experts\.0\.w\d\.weight' is not one parameter of the backbone's class in memory"
    (problem,) = hf_merge.plan(models, **words).errors
    assert re.search(told, problem.message)
    with pytest.raises(PlanError, match=told):
        hf_merge.merge(models, tmp_path / "out", **words)
    assert not (tmp_path / "out").exists()
