"""Recipes: MergeKit's YAML in and out, who wins, and every way in which a recipe can be wrong."""

import json

import pytest
import torch
import yaml
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

import hf_merge
from hf_merge.checking import idle_parameters
from hf_merge.errors import MergeError, ParameterError, RecipeError, UnknownMethodError
from hf_merge.recipe import Recipe
from hf_merge.schedule import UNSET, resolve_first
from hf_merge.types import InMemory, ModelRef

some = settings(
    max_examples=120, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)

MERGEKIT = """
# a recipe as they are found on the Hub
base_model: mistralai/Mistral-7B-v0.1
models:
  - model: mistralai/Mistral-7B-v0.1
    # no parameters necessary for base model
  - model: org/math@v2
    parameters:
      density: [1, 0.7, 0.1]
      weight: 1.0
  - model: {path: org/code, revision: abc123}
    parameters:
      density:
        - {filter: mlp, value: [0.5, 0.9]}
        - filter: self_attn
          value: 0.25
        - value: 0.33
      weight:
        - {filter: mlp, value: 0.5}
        - value: 0
merge_method: ties
parameters:
  normalize: true
  int8_mask: true
dtype: float16
"""

SMALL = """merge_method: ties
base_model: org/base
models:
  - model: org/a
    parameters: {weight: 0.5}
  - model: org/b
parameters:
  density: 0.5
"""
IN_MODEL = SMALL.replace("{weight: 0.5}", "%s")
IN_RECIPE = SMALL.replace("density: 0.5", "%s")


def refused(text, error=RecipeError, **changes):
    """What a recipe is refused with."""
    with pytest.raises(error) as caught:
        Recipe.from_yaml(text, **changes)
    return str(caught.value)


def of(recipe, parameter, name="w", depth=0.0, model=None):
    """What a recipe says of a parameter for one tensor."""
    own = next((entry.parameters for entry in recipe.models if entry.model == model), {})
    rule = recipe.rule_for(name)
    return resolve_first((rule.parameters if rule else {}, own, recipe.parameters), parameter, name, depth)


# in and out


def test_a_recipe_of_mergekit_is_read_unchanged():
    recipe = Recipe.from_yaml(MERGEKIT)
    base, math, code = recipe.references
    assert recipe.merge_method == "ties"
    assert recipe.base_model == base == ModelRef(path="mistralai/Mistral-7B-v0.1")
    assert math == ModelRef(path="org/math", revision="v2")
    assert code == ModelRef(path="org/code", revision="abc123")
    assert recipe.dtype == "float16"
    assert recipe.parameters == {"normalize": True, "int8_mask": True}
    assert of(recipe, "density", "model.layers.2.mlp.up", 0.5, math) == 0.7
    assert of(recipe, "density", "model.layers.2.mlp.up", 0.5, code) == 0.7
    assert of(recipe, "density", "model.layers.2.self_attn.q", 0.5, code) == 0.25
    assert of(recipe, "density", "lm_head", 0.0, code) == 0.33
    assert of(recipe, "weight", "lm_head", 0.0, code) == 0
    assert of(recipe, "weight", "lm_head", 0.0, base) is UNSET


@pytest.mark.parametrize(
    "text",
    [
        MERGEKIT,
        SMALL,
        "merge_method: linear\nmodels: [org/a, org/b@main]\n",
        "merge_method: slerp\nbase_model: org/a\nmodels: [org/b]\nparameters: {t: [0, 0.5, 1]}\nseed: 7\n"
        "out_dtype: bfloat16\nmissing: base\nallow_nonfinite: true\n",
        "merge_method: ties\nbase_model: org/ä\nmodels: [org/a]\nrules:\n"
        "  - {pattern: '*.norm.*', merge_method: linear, models: [org/a, org/ä], parameters: {weight: 0.25}}\n"
        "  - {pattern: lm_head, merge_method: passthrough}\n",
    ],
    ids=["mergekit", "small", "bare models", "all fields", "rules"],
)
def test_what_is_written_is_read_back_the_same(text):
    recipe = Recipe.from_yaml(text)
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert Recipe.from_yaml(recipe.to_yaml()).to_yaml() == recipe.to_yaml()
    assert Recipe.load(recipe.to_dict()) == recipe
    assert Recipe.from_yaml(json.dumps(yaml.safe_load(recipe.to_yaml()))) == recipe


def test_the_seed_is_always_written():
    assert "seed: 0\n" in Recipe.from_yaml(SMALL).to_yaml()
    assert Recipe.from_yaml(SMALL, seed=3).to_dict()["seed"] == 3


def test_a_written_recipe_is_plain_yaml():
    written = Recipe.from_yaml(MERGEKIT).to_yaml()
    data = yaml.safe_load(written)
    assert data["merge_method"] == "ties"
    assert data["models"][1] == {"model": "org/math@v2", "parameters": {"density": [1, 0.7, 0.1], "weight": 1.0}}
    assert "!!" not in written


def test_recipes_are_compared_by_value():
    assert Recipe.from_yaml(SMALL) == Recipe.from_yaml(SMALL)
    assert Recipe.from_yaml(SMALL) != Recipe.from_yaml(SMALL, density=0.6)


def test_a_recipe_is_frozen():
    recipe = Recipe.from_yaml(SMALL)
    with pytest.raises(ValidationError, match="frozen"):
        recipe.seed = 3
    with pytest.raises(ValidationError, match="frozen"):
        recipe.models[0].model = ModelRef(path="org/c")
    with pytest.raises(ValidationError, match="frozen"):
        recipe.base_model.path = "org/c"


def test_small_numbers_in_the_spelling_of_yaml_1_2_are_numbers():
    text = "merge_method: nearswap\nbase_model: org/a\nmodels: [org/b]\nparameters: {t: %s}\n"
    for spelt, value in {"1e-5": 1e-5, "1E5": 1e5, "2.5e-3": 2.5e-3, "+1e2": 100.0, ".5e1": 5.0, "1.e-1": 0.1}.items():
        found = Recipe.from_yaml(text % spelt).parameters["t"]
        assert isinstance(found, float), spelt
        assert found == value


@pytest.mark.parametrize("dtype", ["float16", "bfloat16", "float32", "float64"])
@pytest.mark.parametrize("field", ["dtype", "out_dtype"])
def test_a_dtype_may_be_spelt_as_torch_does(dtype, field):
    for spelt in (dtype, f"torch.{dtype}"):
        assert getattr(Recipe.from_yaml(f"{SMALL}{field}: {spelt}\n"), field) == dtype
    assert getattr(Recipe.from_yaml(SMALL, **{field: getattr(torch, dtype)}), field) == dtype


@pytest.mark.parametrize(
    ("spelt", "expected"),
    [
        ("org/name", ModelRef(path="org/name")),
        ("org/name@v1.0", ModelRef(path="org/name", revision="v1.0")),
        ("{path: org/name}", ModelRef(path="org/name")),
        ("{path: org/name, revision: v1}", ModelRef(path="org/name", revision="v1")),
        ("{model: {path: org/name, revision: v1}}", ModelRef(path="org/name", revision="v1")),
        ("{model: org/name@v1}", ModelRef(path="org/name", revision="v1")),
        ("./folder/model", ModelRef(path="./folder/model")),
    ],
)
def test_a_model_is_a_name_or_a_path_with_a_revision(spelt, expected):
    assert Recipe.from_yaml(f"merge_method: linear\nmodels: [{{model: {spelt}}}]").references == [expected]
    assert Recipe.from_yaml(f"merge_method: linear\nmodels: [org/x]\nbase_model: {spelt}").base_model == expected


@pytest.mark.parametrize("name", ["with@sign", "a+b"])
def test_a_folder_that_exists_is_a_path_whatever_its_name(tmp_path, name):
    folder = tmp_path / name
    folder.mkdir()
    (model,) = Recipe.load([folder], method="passthrough").references
    assert model == ModelRef(path=str(folder))


def test_references_are_the_models_in_order_and_then_the_base():
    listed = Recipe.from_yaml(MERGEKIT)
    assert [str(m) for m in listed.references] == ["mistralai/Mistral-7B-v0.1", "org/math@v2", "org/code@abc123"]
    unlisted = Recipe.from_yaml(SMALL)
    assert [str(m) for m in unlisted.references] == ["org/a", "org/b", "org/base"]


# who wins


LAYERED = """
merge_method: ties
base_model: org/base
models:
  - model: org/a
    parameters: {weight: 0.1, density: [{filter: mlp, value: 0.2}]}
  - model: org/b
parameters: {weight: 0.3, density: 0.4}
rules:
  - {pattern: lm_head, parameters: {weight: 0.5}}
  - {pattern: lm_head.weight, parameters: {weight: 0.6, density: 0.7}}
"""


def test_what_a_model_says_wins_over_the_recipe():
    recipe = Recipe.from_yaml(LAYERED)
    a, b = recipe.references[:2]
    assert of(recipe, "weight", "mlp.up", model=a) == 0.1
    assert of(recipe, "weight", "mlp.up", model=b) == 0.3


def test_where_no_filter_of_a_model_matches_the_recipe_is_asked():
    recipe = Recipe.from_yaml(LAYERED)
    a, b = recipe.references[:2]
    assert of(recipe, "density", "mlp.up", model=a) == 0.2
    assert of(recipe, "density", "self_attn.q", model=a) == 0.4
    assert of(recipe, "density", "mlp.up", model=b) == 0.4


def test_what_nobody_says_is_left_to_the_method():
    recipe = Recipe.from_yaml(LAYERED)
    assert of(recipe, "normalize", "mlp.up") is UNSET
    assert of(recipe, "normalize", "lm_head.weight", model=recipe.references[0]) is UNSET


def test_the_first_rule_that_matches_wins_over_models_and_recipe():
    recipe = Recipe.from_yaml(LAYERED)
    a, b = recipe.references[:2]
    assert recipe.rule_for("lm_head.weight") is recipe.rules[0]
    assert [of(recipe, "weight", "lm_head.weight", model=m) for m in (a, b)] == [0.5, 0.5]
    assert of(recipe, "density", "lm_head.weight", model=a) == 0.4, "the second rule is not asked"
    assert recipe.rule_for("mlp.up") is None


@pytest.mark.parametrize(
    ("pattern", "name", "matches"),
    [
        ("norm", "model.layers.0.input_layernorm.weight", True),
        ("norm", "model.layers.0.mlp.weight", False),
        ("*norm", "model.layers.0.input_layernorm.weight", False),
        ("*norm.*", "model.layers.0.input_layernorm.weight", True),
        ("*.layers.[01].*", "model.layers.1.mlp.weight", True),
        ("*.layers.[01].*", "model.layers.2.mlp.weight", False),
        ("*.layers.?.*", "model.layers.12.mlp.weight", False),
        ("Norm", "model.norm.weight", False),
    ],
)
def test_the_pattern_of_a_rule_is_a_part_of_the_name_or_a_shell_pattern_for_all_of_it(pattern, name, matches):
    recipe = Recipe.from_yaml(f"{SMALL}rules: [{{pattern: '{pattern}'}}]\n")
    assert (recipe.rule_for(name) is not None) == matches


# changes by keyword


def test_keywords_win_over_the_file():
    recipe = Recipe.from_yaml(SMALL, dtype="bfloat16", seed=9, density=0.25, normalize=False, base_model="org/other")
    assert (recipe.dtype, recipe.seed, str(recipe.base_model)) == ("bfloat16", 9, "org/other")
    assert recipe.parameters == {"density": 0.25, "normalize": False}


def test_a_keyword_holds_for_all_models_instead_of_what_was_said_of_one():
    recipe = Recipe.from_yaml(SMALL, weight=0.75)
    assert [of(recipe, "weight", model=m) for m in recipe.references[:2]] == [0.75, 0.75]


def test_a_list_by_keyword_has_one_value_for_each_model():
    recipe = Recipe.from_yaml(SMALL, density=[0.2, 0.3])
    assert [entry.parameters for entry in recipe.models] == [{"weight": 0.5, "density": 0.2}, {"density": 0.3}]
    assert "density" not in recipe.parameters


@pytest.mark.parametrize("values", [[0.2], [0.1, 0.2, 0.3], []])
def test_a_list_by_keyword_of_another_length_is_refused(values):
    message = refused(SMALL, ParameterError, density=values)
    assert message.startswith(f"'density' has {len(values)} values for 2 models; give one value for each model")


def test_a_list_by_keyword_for_a_parameter_of_all_models_is_a_gradient():
    text = "merge_method: slerp\nbase_model: org/a\nmodels: [org/b]\n"
    assert of(Recipe.from_yaml(text, t=[0.0, 1.0]), "t", depth=0.25) == 0.25


def test_filters_by_keyword_hold_for_all_models():
    setting = [{"filter": "mlp", "value": 0.2}, {"value": 0.9}]
    recipe = Recipe.from_yaml(SMALL, density=setting)
    assert [of(recipe, "density", name, model=recipe.references[0]) for name in ("mlp.up", "norm")] == [0.2, 0.9]


def test_python_spellings_of_reserved_words():
    recipe = Recipe.from_yaml(SMALL, lambda_=0.5)
    assert recipe.parameters["lambda"] == 0.5
    assert Recipe.from_yaml(SMALL, method="task_arithmetic").merge_method == "task_arithmetic"
    assert Recipe.load(["org/a", "org/b"], method="linear").merge_method == "linear"


def test_a_keyword_of_none_changes_nothing():
    assert Recipe.from_yaml(SMALL, dtype=None, density=None, base_model=None) == Recipe.from_yaml(SMALL)


def test_changes_leave_the_recipe_they_start_from_alone():
    recipe = Recipe.from_yaml(SMALL)
    changed = Recipe.load(recipe, weight=[1.0, 2.0], density=0.1, lambda_=2)
    assert recipe == Recipe.from_yaml(SMALL)
    assert changed.parameters == {"density": 0.1, "lambda": 2}
    assert [entry.parameters for entry in changed.models] == [{"weight": 1.0}, {"weight": 2.0}]
    data = yaml.safe_load(SMALL)
    Recipe.load(data, weight=[1.0, 2.0], density=0.1)
    assert data == yaml.safe_load(SMALL)


def test_keywords_are_checked_like_the_file():
    assert "'densty'" in refused(SMALL, ParameterError, densty=0.5)
    assert "Did you mean 'density'?" in refused(SMALL, ParameterError, densty=0.5)
    assert "'density' of 'ties' should be less than or equal to 1; found 1.5" in refused(
        SMALL, ParameterError, density=1.5
    )
    assert "found 7" in refused(SMALL, ParameterError, density=[0.5, 7])
    assert "Did you mean 'ties'?" in refused(SMALL, UnknownMethodError, method="tiess", density=0.5)
    assert "'dtype'" in refused(SMALL, dtype="float8")


@pytest.mark.parametrize(
    "text",
    [
        "merge_method: [linear]\nmodels: [org/a]\n",
        "merge_method: {a: b}\nmodels: [org/a]\n",
        "merge_method: linear\nmodels: 3\n",
        "merge_method: linear\nmodels: org/a\n",
        "merge_method: linear\nmodels: {org/a: 1}\n",
        "merge_method: linear\nmodels: [org/a]\nparameters: 3\n",
        "merge_method: linear\nmodels: [org/a]\nparameters: [a]\n",
        "merge_method: linear\nmodels: [{model: org/a, parameters: 3}]\n",
        "merge_method: linear\nmodels: [3]\n",
        "merge_method: linear\nmodels: [null]\n",
    ],
)
def test_a_recipe_of_the_wrong_kind_is_refused_with_and_without_keywords(text):
    refused(text)
    refused(text, weight=1.0)
    refused(text, dtype="float32")


# sources of recipes


def test_a_recipe_is_read_from_a_file_of_yaml_or_json(tmp_path):
    recipe = Recipe.from_yaml(SMALL)
    for name, text in (("r.yaml", SMALL), ("r.json", json.dumps(yaml.safe_load(SMALL))), ("r.txt", SMALL)):
        (tmp_path / name).write_text(text, encoding="utf-8")
        assert Recipe.load(tmp_path / name) == recipe
        assert Recipe.load(str(tmp_path / name)) == recipe


def test_a_recipe_is_read_from_a_mapping_or_a_recipe():
    recipe = Recipe.from_yaml(SMALL)
    assert Recipe.load(yaml.safe_load(SMALL)) == recipe
    assert Recipe.load(recipe) == recipe


def test_a_list_of_models_is_a_recipe_with_a_method():
    recipe = Recipe.load(["org/a", ModelRef(path="org/b"), {"model": "org/c"}], method="linear", weight=[1, 2, 3])
    assert [str(m) for m in recipe.references] == ["org/a", "org/b", "org/c"]
    assert [of(recipe, "weight", model=m) for m in recipe.references] == [1, 2, 3]


def test_models_in_memory_are_labelled_by_their_place_or_their_key():
    one, two, base = {"w": torch.zeros(1)}, {"w": torch.ones(1)}, {"w": torch.ones(1)}
    recipe = Recipe.load([one, two], method="ties", base_model=base)
    assert [str(m) for m in recipe.references] == ["<model 0>", "<model 1>", "<base model>"]
    assert recipe.references[0].value is one
    named = Recipe.load({"math": one, "hub": "org/c"}, method="linear")
    assert [str(m) for m in named.references] == ["<math>", "org/c"]
    assert isinstance(named.references[0], InMemory)


def test_a_list_without_a_method_is_refused():
    with pytest.raises(RecipeError, match=r"Which method\? Pass method=.*list_methods\(\)"):
        Recipe.load(["org/a"])


@pytest.mark.parametrize("source", [3, None, 0.5])
def test_something_that_is_no_recipe_is_refused(source):
    with pytest.raises(RecipeError, match=f"a mapping or a list of models; found {type(source).__name__}"):
        Recipe.load(source, method="linear")


def test_an_empty_list_of_models_is_refused():
    with pytest.raises(RecipeError, match="'models' should be a list of at least one model"):
        Recipe.load([], method="linear")


def test_a_file_that_is_not_there_is_refused_by_name(tmp_path):
    with pytest.raises(RecipeError, match=r"Cannot read the recipe '.*none\.yaml': No such file or directory\."):
        Recipe.load(tmp_path / "none.yaml")


def test_a_file_that_is_no_text_is_refused_by_name(tmp_path):
    (tmp_path / "binary.yaml").write_bytes(b"\xff\xfe\x00\x80merge")
    with pytest.raises(RecipeError, match=r"Cannot read the recipe '.*binary\.yaml'"):
        Recipe.load(tmp_path / "binary.yaml")


def test_a_folder_is_no_recipe(tmp_path):
    with pytest.raises(RecipeError, match="is a folder, not a recipe: to merge models, pass them as a list"):
        Recipe.load(tmp_path)


def test_errors_of_a_file_name_the_file(tmp_path):
    (tmp_path / "bad.yaml").write_text("merge_method: [ties\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"bad\.yaml' is not YAML: line 2"):
        Recipe.load(tmp_path / "bad.yaml")
    (tmp_path / "list.yaml").write_text("- org/a\n", encoding="utf-8")
    with pytest.raises(RecipeError, match=r"list\.yaml' is not a recipe: it should be a mapping"):
        Recipe.load(tmp_path / "list.yaml")


# misspelt


OF_TIES = "(it has: weight, density, normalize, rescale, scope, consensus, lambda)"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (f"{SMALL}dtpye: float16\n", "line 9: Unknown key 'dtpye'. Did you mean 'dtype'?"),
        (f"{SMALL}base_modle: org/x\n", "line 9: Unknown key 'base_modle'. Did you mean 'base_model'?"),
        (f"{SMALL}paramters: {{t: 1}}\n", "line 9: Unknown key 'paramters'. Did you mean 'parameters'?"),
        (f"{SMALL}rule: []\n", "line 9: Unknown key 'rule'. Did you mean 'rules'?"),
        (SMALL.replace("  param", "  parma"), "line 5: Unknown key 'parmaeters'. Did you mean 'parameters'?"),
        (
            SMALL.replace("- model: org/b", "- {model: org/b, modle: 1}"),
            "line 6: Unknown key 'modle'. Did you mean 'model'?",
        ),
        (
            f"{SMALL}rules:\n  - pattern: a\n  - pattern: b\n    merge_metod: linear\n",
            "line 12: Unknown key 'merge_metod'. Did you mean 'merge_method'?",
        ),
        (f"{SMALL}rules: [{{pattern: a, modles: [org/a]}}]\n", "line 9: Unknown key 'modles'. Did you mean 'models'?"),
        (IN_MODEL % "{wieght: 0.5}", f"line 5: 'ties' has no parameter 'wieght' {OF_TIES}. Did you mean 'weight'?"),
        (IN_RECIPE % "densty: 0.5", f"line 8: 'ties' has no parameter 'densty' {OF_TIES}. Did you mean 'density'?"),
        (
            f"{SMALL}rules: [{{pattern: a, merge_method: linear, parameters: {{wait: 1}}}}]\n",
            "line 9: 'linear' has no parameter 'wait' (it has: weight, normalize). Did you mean 'weight'?",
        ),
        (
            SMALL.replace("method: ties", "method: tiess"),
            "line 1: There is no merge method 'tiess'. Did you mean 'ties'?",
        ),
        (
            f"{SMALL}rules:\n  - pattern: a\n    merge_method: passtrough\n",
            "line 11: There is no merge method 'passtrough'. Did you mean 'passthrough'?",
        ),
    ],
)
def test_a_misspelt_word_is_refused_with_its_line_and_the_nearest(text, message):
    assert refused(text).startswith(message)


def test_a_misspelt_merge_method_key_is_refused_with_a_suggestion():
    assert "Did you mean 'merge_method'?" in refused("merge_metod: linear\nmodels: [org/a]\n")


def test_a_misspelt_word_of_a_filter_is_refused_and_not_taken_for_no_filter():
    message = refused(IN_RECIPE % "density: [{filtr: mlp, value: 0.5}, {value: 1}]")
    assert message.startswith("line 8: ")
    assert "filtr" in message


def test_a_misspelt_word_of_a_model_mapping_is_refused():
    message = refused("merge_method: linear\nmodels:\n  - model: {path: org/a, revison: v1}\n")
    assert message.startswith("line 3: ")
    assert "revision" in message


def test_all_findings_are_told_at_once():
    message = refused(f"{SMALL}dtpye: float16\nsede: 3\nmissing: nothing\n")
    assert sorted(line.split(":")[0] for line in message.splitlines()) == ["line 10", "line 11", "line 9"]


# out of range


DTYPES = "'float16', 'bfloat16', 'float32' or 'float64'"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (IN_RECIPE % "density: 1.5", "line 8: 'density' of 'ties' should be less than or equal to 1; found 1.5."),
        (
            IN_RECIPE % "density: [0.1, 0.2, -1]",
            "line 8: 'density' of 'ties' should be greater than or equal to 0; found -1.",
        ),
        (
            IN_RECIPE % "density: [{filter: mlp, value: 0.1}, {filter: q, value: [0.1, 7]}]",
            "line 8: 'density' of 'ties' should be less than or equal to 1; found 7.",
        ),
        (IN_MODEL % "{density: 2}", "line 5: 'density' of 'ties' should be less than or equal to 1; found 2."),
        (IN_MODEL % "{weight: heavy}", "line 5: 'weight' of 'ties' should be a valid number"),
        (IN_MODEL % "{weight: .nan}", "line 5: 'weight' of 'ties' should be a finite number; found nan."),
        (IN_MODEL % "{weight: -.inf}", "line 5: 'weight' of 'ties' should be a finite number; found -inf."),
        (IN_MODEL % "{weight: null}", "line 5: 'weight' of 'ties' should be a valid number; found None."),
        (f"{SMALL}  normalize: perhaps\n", "line 9: 'normalize' of 'ties' should be a valid boolean"),
        (f"{SMALL}  rescale: l3\n", "line 9: 'rescale' of 'ties' should be 'l1', 'density' or 'none'; found 'l3'."),
        (f"{SMALL}  lambda: .inf\n", "line 9: 'lambda' of 'ties' should be a finite number; found inf."),
        (
            f"{SMALL}rules:\n  - pattern: a\n    merge_method: slerp\n    parameters: {{t: 1.5}}\n",
            "line 12: 't' of 'slerp' should be less than or equal to 1; found 1.5.",
        ),
        (f"{SMALL}dtype: float8\n", f"line 9: 'dtype' should be {DTYPES}; found 'float8'."),
        (f"{SMALL}out_dtype: int64\n", f"line 9: 'out_dtype' should be {DTYPES}; found 'int64'."),
        (f"{SMALL}seed: many\n", "line 9: 'seed' should be a valid integer"),
        (f"{SMALL}seed: 0.5\n", "line 9: 'seed' should be a valid integer"),
        (f"{SMALL}missing: bse\n", "line 9: 'missing' should be 'error', 'base' or 'skip-model'; found 'bse'."),
        (f"{SMALL}allow_nonfinite: perhaps\n", "line 9: 'allow_nonfinite' should be a valid boolean"),
    ],
)
def test_a_value_out_of_range_is_refused_with_its_line(text, message):
    assert refused(text).startswith(message)


def test_mergekits_booleans_for_rescale_are_words():
    assert of(Recipe.from_yaml(f"{SMALL}  rescale: true\n"), "rescale") is True
    assert of(Recipe.from_yaml(f"{SMALL}  rescale: [true, false]\n"), "rescale", depth=1.0) is False


def test_a_parameter_of_all_models_under_a_model_is_refused():
    message = refused(IN_MODEL % "{normalize: true}", ParameterError)
    assert message.startswith(
        "line 5: 'normalize' of 'ties' is one value for all models: write it under `parameters:`."
    )


@pytest.mark.parametrize(
    "setting",
    [
        "{a: 1}",  # a mapping that is no filter
        "{filter: mlp}",
        "[{filter: mlp}]",
        "[0.5, {filter: mlp, value: 1}]",  # a gradient and filters mixed
        "[[0, 1], [1, 0]]",  # a gradient of gradients
        "{filter: 3, value: 1}",  # a filter that is no text
        "{filter: [mlp], value: 1}",
    ],
)
def test_a_setting_that_cannot_be_resolved_is_refused_with_its_line(setting):
    assert refused(IN_RECIPE % f"density: {setting}").startswith("line 8: ")


def test_a_seed_among_the_parameters_is_refused_as_it_would_have_no_effect():
    message = refused("merge_method: dare_linear\nbase_model: org/b\nmodels: [org/a]\nparameters: {seed: 5}\n")
    assert message.startswith("line 4: ")
    assert "seed" in message


def test_a_name_without_effect_in_mergekit_is_taken():
    assert Recipe.from_yaml(f"{SMALL}  int8_mask: true\n").parameters["int8_mask"] is True
    left_over = "merge_method: linear\nmodels: [org/a]\nparameters: {int8_mask: true, density: 0.5, rescale: false}\n"
    assert idle_parameters(Recipe.from_yaml(left_over)) == [
        (name, "linear") for name in ("int8_mask", "density", "rescale")
    ]
    assert idle_parameters(Recipe.from_yaml(f"{SMALL}  int8_mask: true\n")) == []
    with pytest.raises(ParameterError, match="'linear' has no parameter 'density'"):
        Recipe.from_yaml("merge_method: linear\nmodels: [org/a]", density=0.5)


# what cannot be meant


@pytest.mark.parametrize(
    ("text", "model"),
    [
        ("org/a+org/l", ModelRef(path="org/a", lora=ModelRef(path="org/l"))),
        ("org/a@v1+org/l@v2", ModelRef(path="org/a", revision="v1", lora=ModelRef(path="org/l", revision="v2"))),
        ("{model: {path: org/a}, lora: {path: org/l}}", ModelRef.parse("org/a+org/l")),
        (
            "{model: {path: org/a, revision: v1}, lora: {path: org/l, revision: v2}}",
            ModelRef.parse("org/a@v1+org/l@v2"),
        ),
        ("{model: org/a@v1, lora: org/l}", ModelRef.parse("org/a@v1+org/l")),
        ("{model: {path: org/a}, lora: null}", ModelRef.parse("org/a")),
        ("{path: my/a+b}", ModelRef(path="my/a+b")),
        ("{model: {path: my/a+b}, lora: {path: my/c+d}}", ModelRef(path="my/a+b", lora=ModelRef(path="my/c+d"))),
    ],
)
def test_adapter_after_its_base_as_in_mergekit(text, model):
    recipe = Recipe.from_yaml(f"merge_method: linear\nmodels:\n  - model: {text}\nbase_model: {text}\n")
    assert recipe.models[0].model == recipe.base_model == model
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert Recipe.load([{"model": yaml.safe_load(text)}], method="linear").models[0].model == model


def test_path_with_a_plus_that_exists_is_a_path(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a+b").mkdir()
    recipe = Recipe.from_yaml("merge_method: linear\nmodels: [a+b, a+c]\n")
    assert [m.model for m in recipe.models] == [ModelRef(path="a+b"), ModelRef(path="a", lora=ModelRef(path="c"))]


@pytest.mark.parametrize(
    ("model", "message"),
    [
        ("{model: org/a, lora: [org/b, {path: org/c, weight: x}]}", "whose weight is not a number"),
        ("{model: org/a, lora: [org/b+org/c]}", "takes adapters under lora:"),
        ("+org/lora", "is not a model"),
        ("org/a+", "is not a model"),
        ("{model: org/a+org/b, lora: org/c}", "takes adapters under lora:"),
        ("{model: org/a, lora: 3}", "should be a folder"),
        ("{model: org/a, lora: org/b, override_architecture: X}", "should be a folder"),
    ],
)
def test_what_is_no_adapter_is_refused(model, message):
    for text in (
        f"merge_method: linear\nmodels:\n  - model: {model}\n",
        f"merge_method: linear\nmodels: [org/x]\nbase_model: {model}\n",
    ):
        found = refused(text)
        assert found.startswith("line 3: ") and message in found


@pytest.mark.parametrize(
    "model", ["''", "'@v1'", "org/a@", "3", "[org/a]", "{}", "{revision: v1}", "null", "{path: 3}"]
)
def test_what_is_no_model_is_refused(model):
    message = refused(f"merge_method: linear\nmodels:\n  - model: {model}\n")
    assert message.startswith("line 3: ")
    assert "models.0.model" in message


@pytest.mark.parametrize(
    ("twice", "found"),
    [
        ("[org/a, org/b, org/a]", "org/a"),
        ("[org/a@v1, {model: {path: org/a, revision: v1}}]", "org/a@v1"),
        ("[{model: org/b}, {model: org/b, parameters: {weight: 2}}]", "org/b"),
    ],
)
def test_a_model_listed_twice_is_refused(twice, found):
    message = refused(f"merge_method: linear\nmodels: {twice}\n")
    assert message.startswith(f"line 2: 'models' lists '{found}' twice; give it a larger weight instead.")


def test_revisions_of_a_model_are_different_models():
    assert len(Recipe.from_yaml("merge_method: linear\nmodels: [org/a@v1, org/a@v2, org/a]").references) == 3


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models: [org/a]\n", "Which method?"),
        ("merge_method: linear\n", "The recipe names no models: it should have models or slices or modules."),
        ("merge_method: linear\nmodels:\n  - parameters: {weight: 1}\n", "line 3: The recipe lacks 'model'."),
        (f"{SMALL}rules:\n  - merge_method: linear\n", "line 10: The recipe lacks 'pattern'."),
        ("merge_method: linear\nmodels: []\n", "line 2: 'models' should be a list of at least one model"),
        ("merge_method: linear\nmodels:\n", "line 2: 'models' should be a list of at least one model"),
        ("merge_method: 3\nmodels: [org/a]\n", "line 1: 'merge_method' should be a valid string; found 3."),
        (f"{SMALL}rules: 3\n", "line 9: 'rules' should be"),
        (f"{SMALL}rules:\n  - 3\n", "line 10: 'rules.0' should be"),
    ],
)
def test_what_is_lacking_is_said(text, message):
    assert refused(text).startswith(message)


def test_a_rule_that_names_a_stranger_is_refused_with_its_line():
    message = refused(f"{SMALL}rules:\n  - pattern: a\n    models: [org/stranger]\n")
    assert "a rule names 'org/stranger', which is not among the models" in message
    assert message.startswith("line ")


def test_a_rule_may_name_models_and_the_base():
    recipe = Recipe.from_yaml(f"{SMALL}rules: [{{pattern: a, merge_method: linear, models: [org/b, org/base]}}]\n")
    assert [str(m) for m in recipe.rules[0].models] == ["org/b", "org/base"]


# what is not YAML


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (f"{SMALL}seed: 1\nseed: 2\n", "line 10: 'seed' is given twice."),
        (f"{SMALL}  weight: 1\n  density: 2\n", "line 10: 'density' is given twice."),
        (IN_MODEL % "{weight: 0.5, weight: 1}", "line 5: 'weight' is given twice."),
        (f"{SMALL}rules:\n  - pattern: a\n    pattern: b\n", "line 11: 'pattern' is given twice."),
        ('merge_method: linear\n"merge_method": slerp\n', "line 2: 'merge_method' is given twice."),
    ],
)
def test_a_key_given_twice_is_refused_with_its_line(text, line):
    assert refused(text) == line


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("merge_method: [linear\nmodels: x\n", "line 2: "),
        ("merge_method: linear\n\tmodels: x\n", "line 2: "),
        ("merge_method: *nothing\n", "line 1: "),
        ("merge_method: linear\nmodels: !!python/object/apply:os.getcwd []\n", "line 2: "),
        ("merge_method: 'linear\n", "line 2: "),
        ("a: b: c\n", "line 1: "),
        ("}", "line 1: "),
    ],
)
def test_what_is_not_yaml_is_refused_with_its_line(text, line):
    assert refused(text).startswith(f"'recipe' is not YAML: {line}")


@pytest.mark.parametrize("text", ["", "   \n", "# only words\n", "- org/a\n", "linear", "3", "null", "[]", "&a [*a]"])
def test_what_is_no_mapping_is_refused(text):
    assert refused(text) == "'recipe' is not a recipe: it should be a mapping that begins with `merge_method:`."


@pytest.mark.parametrize(
    "text",
    [
        SMALL + "rules: " + "[" * 60 + "]" * 60 + "\n",
        SMALL + "rules: " + "{a: " * 60 + "1" + "}" * 60 + "\n",
        SMALL + "rules: &a [*a]\n",
        SMALL + "rules: &a {b: *a}\n",
    ],
    ids=["lists", "mappings", "list in itself", "mapping in itself"],
)
def test_what_is_nested_too_deeply_is_refused(text):
    assert refused(text).startswith("The recipe is nested or repeated beyond reason")


@pytest.mark.parametrize(
    "text", ["a: " + "[" * 3000, "[" * 3000, "{a: " * 3000, "- " * 3000], ids=lambda text: text[:6]
)
def test_what_is_nested_beyond_the_stack_is_refused_in_words(text):
    assert refused(text).startswith("The recipe is nested or repeated beyond reason")


def test_an_alias_bomb_is_refused():
    bomb = "a0: &a0 [x, x, x, x, x, x, x, x, x, x]\n"
    bomb += "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 10)}]\n" for i in range(1, 12))
    assert refused(bomb).startswith("The recipe is nested or repeated beyond reason")


def test_a_document_too_large_for_a_recipe_is_refused():
    assert "more than 1048576 characters; a recipe has a few thousand" in refused("# " + "x" * 1_100_000)


def test_an_alias_is_as_good_as_what_it_stands_for():
    models = "- {model: org/a, parameters: &p {weight: 2}}\n- {model: org/b, parameters: *p}\n"
    text = f"merge_method: linear\nmodels:\n{models}"
    assert [entry.parameters for entry in Recipe.from_yaml(text).models] == [{"weight": 2}] * 2


HOSTILE = {
    "a list as key": "? [a, b]\n: c\n",
    "a mapping as key": "? {a: b}\n: c\n",
    "a list as inner key": SMALL + "rules: [{? [a] : b}]\n",
    "a control character": "merge_method: \x00\n",
    "half a surrogate pair": "merge_method: \ud800\n",
    "a tagged boolean": SMALL + "seed: !!bool perhaps\n",
    "a tagged date": SMALL + "seed: !!timestamp tomorrow\n",
    "a tagged integer of nothing": SMALL + "seed: !!int ''\n",
    "a tagged float of nothing": SMALL + "seed: !!float ''\n",
    "a set": "!!set {merge_method, models}\n",
    "a number to the base 60 beyond floats": SMALL + "seed: " + "1:" * 200 + "1.5\n",
    "a weight of 5000 hexadecimal digits": IN_MODEL % ("{weight: 0x" + "f" * 5000 + "}"),
    "a seed of 5000 hexadecimal digits": SMALL + "seed: 0x" + "f" * 5000 + "\n",
    "a key of 5000 hexadecimal digits": SMALL + "0x" + "f" * 5000 + ": 1\n",
}


@pytest.mark.parametrize("text", HOSTILE.values(), ids=HOSTILE.keys())
def test_hostile_yaml_is_refused_like_any_other(text):
    assert refused(text)


def test_a_key_that_is_no_word_is_refused_with_its_line():
    assert refused(f"{SMALL}? [a, b]\n: c\n") == "line 9: a key should be a word."
    assert refused(f"{SMALL}rules:\n  - pattern: a\n    {{x: y}}: 1\n") == "line 11: a key should be a word."


@given(st.text(max_size=200))
@some
def test_any_text_gives_a_recipe_or_an_error_of_ours(text):
    recipe_or_our_error(text)


WORDS = [
    "merge_method", "models", "model", "path", "revision", "base_model", "parameters", "weight", "density", "t",
    "lambda", "normalize", "filter", "value", "rules", "pattern", "dtype", "seed", "slices", "missing",
    "linear", "ties", "slerp", "dare_ties", "nope", "org/a", "org/b@main", "float16", "torch.bfloat16", "base",
    "*", "a+b", "1e-5", "0.5", "7", "-1", ".nan", "true", "null", "~", "2001-01-01", "0x1F", "'x'", "''", "=", "%",
    "!!str", "!!int", "!!float", "!!bool", "!!set", "!x", "{", "}", "[", "]",
    ": ", ":\n  ", ":\n    ", "\n", "\n  ", "\n    ", "\n- ", "\n  - ", ", ", "? ", "&a ", "*a", "# c\n",
    "---\n", "|\n", "<<",
]  # fmt: skip


@given(st.lists(st.sampled_from(WORDS), max_size=30).map("".join))
@settings(some, max_examples=400)
def test_any_text_made_of_the_words_of_recipes_gives_a_recipe_or_an_error_of_ours(text):
    recipe_or_our_error(text)


scalars = st.one_of(
    *(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8)),
    *(st.dates(), st.datetimes(), st.binary(max_size=4)),
    st.sampled_from(["org/a", "org/b@v", "linear", "ties", "float16", "*", "mlp", "a+b"]),
)
keys = st.sampled_from([*WORDS[:20], 1, None, True, 0.5])
anything = st.recursive(
    scalars,
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(keys, inner, max_size=3)),
    max_leaves=8,
)


@given(
    data=st.fixed_dictionaries(
        {"merge_method": st.sampled_from(["linear", "ties", "slerp", "passthrough"]), "models": anything},
        optional=dict.fromkeys(("parameters", "base_model", "dtype", "seed", "rules", "missing", "extra"), anything),
    )
)
@example({"merge_method": "linear", "models": ["org/a"], "parameters": {"weight": {"value": []}}})
@settings(some, max_examples=120)
def test_data_of_any_kind_gives_a_recipe_or_an_error_of_ours(data):
    recipe_or_our_error(yaml.safe_dump(data))
    recipe_or_our_error(yaml.safe_dump({**data, "models": ["org/a", "org/b"]}))
    recipe_or_our_error(yaml.safe_dump({**data, "models": [{"model": "org/a", "parameters": data.get("parameters")}]}))


def recipe_or_our_error(text):
    """Read a recipe; what is read has to be written and read back the same."""
    try:
        recipe = Recipe.from_yaml(text)
    except MergeError as error:
        assert str(error)
    else:
        assert recipe.models
        assert Recipe.from_yaml(recipe.to_yaml()).to_yaml() == recipe.to_yaml()


def test_a_state_dict_with_a_tensor_called_model_or_path_is_a_state_dict():
    states = [{"model": torch.ones(2), "path": torch.zeros(1)}, {"model": torch.zeros(2), "path": torch.ones(1)}]
    assert hf_merge.merge_state_dicts(states, method="linear")["model"].tolist() == [0.5, 0.5]


def test_references_in_all_their_forms_are_the_same_model():
    forms = ["org/a@v1", {"path": "org/a", "revision": "v1"}, {"model": "org/a@v1"}, {"model": {"path": "org/a@v1"}}]
    for form in forms:
        (model,) = Recipe.load([form], method="linear").models
        assert str(model.model) == "org/a@v1"
    assert str(Recipe.load({"models": ["org/a"]}, method="linear").models[0].model) == "org/a"
