"""A recipe and the form that shows it: what goes in comes out, and what the form cannot show is kept."""

import shlex

import form
import pytest
import yaml
from hypothesis import given, settings
from hypothesis import strategies as st

import hf_merge

TIES = {"merge_method": "ties", "base_model": "org/base", "models": ["org/a", "org/b"]}
CURVE = {"curve": [0.2, 0.6, 1.0]}
PARTS = {"parts": {"attention": 0.3, "mlp": CURVE, "rest": 0.5}}


def read(recipe) -> hf_merge.Recipe:
    return hf_merge.Recipe.from_yaml(form.to_yaml(recipe))


numbers = st.integers(0, 10).map(lambda n: n / 10)
curves = st.lists(numbers, min_size=2, max_size=9).map(lambda each: {"curve": each})
plain = numbers | curves
parts = st.fixed_dictionaries({"attention": plain, "mlp": plain, "rest": plain}).map(lambda each: {"parts": each})
per_model = st.lists(plain | parts, min_size=2, max_size=2)


@settings(max_examples=60, deadline=None)
@given(density=per_model, weight=per_model, scale=plain | parts, normalize=st.booleans())
def test_what_is_set_in_the_form_is_what_it_shows_and_hf_merge_reads(density, weight, scale, normalize):
    chosen = {**form.values(TIES), "density": density, "weight": weight, "lambda": scale, "normalize": normalize}
    recipe = form.with_values(TIES, chosen)
    assert form.values(recipe) == chosen
    assert form.values(yaml.safe_load(form.to_yaml(recipe))) == chosen
    assert read(recipe).merge_method == "ties"


def test_defaults_are_not_written_and_equal_values_once():
    assert form.with_values(TIES, form.values(TIES)) == TIES
    made = form.with_values(TIES, {"density": [0.5, 0.5], "weight": [1.0, 2.0]})
    assert made["parameters"] == {"density": 0.5}
    assert made["models"] == [{"model": "org/a", "parameters": {"weight": 1.0}}, {"model": "org/b", "parameters": {"weight": 2.0}}]  # fmt: skip  # noqa: E501
    assert form.with_values(made, form.values(TIES)) == TIES


def test_parts_are_filters_by_the_words_of_the_model():
    bert = form.words(["encoder.layer.0.attention.self.query.weight", "encoder.layer.0.intermediate.dense.weight"])
    made = form.with_values(TIES, {"lambda": PARTS}, bert)
    assert made["parameters"]["lambda"] == [
        {"filter": "attention", "value": 0.3}, {"filter": "intermediate", "value": [0.2, 0.6, 1.0]}, {"value": 0.5}
    ]  # fmt: skip
    assert form.values(made)["lambda"] == PARTS
    assert form.words([]) == ("self_attn", "mlp")


@pytest.mark.parametrize(
    ("more", "told"),
    [
        ({"rules": [{"pattern": "*.norm.*", "merge_method": "linear"}]}, "rules"),
        ({"lines": {"alpha": 0.3, "beta": 0.5}}, "lines"),
        ({"parameters": {"density": [{"filter": "q_proj", "value": 0.3}, {"value": 0.5}]}}, "filters for density"),
    ],
    ids=["rules", "lines", "filters"],
)
def test_what_the_form_cannot_show_is_told_and_kept(more, told):
    recipe = {**TIES, **more}
    assert any(told in each for each in form.unshown(recipe))
    made = form.with_values(recipe, {**form.values(recipe), "lambda": 0.7})
    for key, value in more.items():
        assert made[key] == value if key != "parameters" else made[key]["density"] == value["density"]
    assert not form.unshown(TIES) and read(made)


def test_models_come_and_go_and_keep_what_is_theirs():
    recipe = form.with_values(TIES, {"density": [0.3, 0.7]})
    turned = form.with_models(recipe, ["org/b", "org/c", "org/a"], "org/base")
    assert form.names(turned) == ["org/b", "org/c", "org/a"]
    assert form.values(turned)["density"] == [0.7, 1.0, 0.3]
    assert "base_model" not in form.with_models(recipe, ["org/a"], None)


def test_another_method_keeps_the_parameters_that_it_has_too():
    recipe = form.with_values(TIES, {"density": [0.3, 0.7], "lambda": 0.5, "scope": "global"})
    dare = form.with_method(recipe, "dare_ties")
    assert form.values(dare)["density"] == [0.3, 0.7] and dare["parameters"] == {"lambda": 0.5}
    linear = form.with_method(recipe, "linear")
    assert linear["models"] == ["org/a", "org/b"] and "parameters" not in linear


def test_a_base_steps_aside_where_it_would_be_one_more_model_and_comes_back():
    linear, aside = form.with_base(form.with_method(TIES, "linear"), None)
    assert "base_model" not in linear and aside == TIES["base_model"]
    assert form.with_base({**linear, "merge_method": "karcher"}, aside) == (
        {**linear, "merge_method": "karcher"},
        aside,
    )
    assert form.with_base({**linear, "merge_method": "ties"}, aside) == (
        {**linear, **TIES, "models": TIES["models"]},
        None,
    )
    listed = {**TIES, "merge_method": "linear", "base_model": TIES["models"][0]}
    assert form.with_base(listed, None) == (listed, None)  # it is one of the models anyway
    without = {key: value for key, value in TIES.items() if key != "base_model"}
    assert form.with_base(without, without["models"][0]) == (without, without["models"][0])


def test_short_names_tell_models_apart():
    listed = ["org/a", "other/a", "org/b@main", "org/base+org/lora", "/srv/models/c/"]
    assert form.labels(listed) == ["org/a", "other/a", "b", "base+lora", "c"]


RECIPES = {
    "plain": TIES,
    "values": form.with_values(TIES, {"density": [0.3, 0.7], "lambda": 0.5, "normalize": False}),
    "curve": form.with_values(TIES, {"lambda": CURVE}),
    "rules": {**TIES, "rules": [{"pattern": "*.norm.*", "merge_method": "linear"}]},
    "fields": {**TIES, "dtype": "bfloat16", "seed": 7, "tokenizer_source": "base", "keys": "intersection"},
}


@pytest.mark.parametrize("name", RECIPES)
def test_the_call_in_python_says_the_same(name, monkeypatch):
    called = []
    monkeypatch.setattr(hf_merge, "merge", lambda recipe, output, **words: called.append((recipe, words)))
    exec(compile(form.as_python(RECIPES[name]), "as_python", "exec"), {})
    (recipe, words), *none = called
    assert hf_merge.Recipe.load(recipe, **words).to_dict() == read(RECIPES[name]).to_dict() and not none


@pytest.mark.parametrize("name", RECIPES)
def test_the_command_says_the_same(name, monkeypatch):
    from hf_merge import cli

    words = shlex.split(form.as_command(RECIPES[name]))
    if words[2] == "recipe.yaml":
        assert name in ("curve", "rules") and words == ["hf-merge", "merge", "recipe.yaml", "merged"]
        return
    called = []

    def merge(recipe, output, **words):
        called.append(hf_merge.Recipe.load(recipe, **{key: words[key] for key in words if key in known}))
        raise hf_merge.Cancelled("enough")

    known = {*hf_merge.Recipe.model_fields, "method", *hf_merge.get_method("ties").parameters}
    monkeypatch.setattr(hf_merge, "merge", merge)
    with pytest.raises(hf_merge.Cancelled):
        cli.app(words[1:], standalone_mode=False)
    assert called[0].to_dict() == read(RECIPES[name]).to_dict()


def test_a_job_is_the_command_that_pushes():
    assert form.as_command(TIES, job="cpu-upgrade", repo_id="me/m").endswith("--push-to-hub me/m --job cpu-upgrade")


def test_a_link_brings_the_recipe_back_and_nothing_else():
    packed = form.packed(RECIPES["values"])
    assert packed and yaml.safe_load(form.unpacked(packed)) == RECIPES["values"]
    assert form.packed({**TIES, "name": "".join(map(chr, range(200, 20000)))}) is None
    for damaged in (packed[:-4], "%%%", "AAAA"):
        with pytest.raises(ValueError, match="damaged"):
            form.unpacked(damaged)


def test_a_link_that_unpacks_to_more_than_a_recipe_is_refused():
    import base64
    import zlib

    bomb = base64.urlsafe_b64encode(zlib.compress(b"a" * 10_000_000, 9)).decode().rstrip("=")[: form.LINK_LIMIT]
    with pytest.raises(ValueError):
        form.unpacked(bomb)
