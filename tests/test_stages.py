"""Files of several documents: named merges that later ones merge, without a folder in between."""

import time

import pytest
import yaml
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

import hf_merge
from hf_merge import lazy
from hf_merge.card import pinned_recipe


def documents(llamas, **last):
    """Two stages and the document that merges them."""
    a, b, base = (str(llamas[name]) for name in ("a", "b", "base"))
    return [
        {"name": "mean", "merge_method": "linear", "models": [a, b], "parameters": {"weight": 1}},
        {"name": "moved", "merge_method": "slerp", "base_model": a, "models": ["mean"], "parameters": {"t": 0.25}},
        {"merge_method": "task_arithmetic", "base_model": base, "models": ["mean", {"model": "moved"}], **last},
    ]


def text(parts):
    return yaml.safe_dump_all(parts)


def weights(folder):
    return load_file(folder / "model.safetensors")


def in_steps(parts, folder):
    """Merge each document into a folder of its own, as if there were no stages."""
    made = {}
    for i, part in enumerate(parts):
        words = yaml.safe_load(yaml.safe_dump(part))
        name = words.pop("name", None)
        words["models"] = [made.get(m if isinstance(m, str) else m["model"], m) for m in words["models"]]
        made[name] = str(hf_merge.merge(words, folder / str(i), dtype=part.get("dtype")).path)
    return weights(folder / str(len(parts) - 1))


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
def test_stages_give_what_merges_one_after_the_other_give(llamas, tmp_path, dtype):
    parts = documents(llamas)
    for part in parts:
        part.update({"dtype": dtype} if dtype else {})
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(text(parts))
    merged = hf_merge.merge(recipe, tmp_path / "out")
    written, expected = weights(merged.path), in_steps(parts, tmp_path)
    assert written.keys() == expected.keys()
    assert all(written[name].equal(tensor) and written[name].dtype == tensor.dtype for name, tensor in expected.items())
    AutoModelForCausalLM.from_pretrained(merged.path)
    assert not (tmp_path / "mean").exists()


def test_order_of_documents_does_not_matter(llamas, tmp_path):
    parts = documents(llamas)
    forward, backward = (hf_merge.Recipe.from_yaml(text(some)) for some in (parts, parts[::-1]))
    assert forward == backward and [stage.name for stage in forward.stages] == ["mean", "moved"]
    named = [*parts[:2], {**parts[2], "name": "all of it"}]
    assert hf_merge.Recipe.from_yaml(text(named)).name == "all of it"


def test_recipe_and_card_name_the_original_models_and_every_stage(llamas, tmp_path):
    merged = hf_merge.merge(hf_merge.Recipe.from_yaml(text(documents(llamas))), tmp_path / "out")
    card = (merged.path / "README.md").read_text()
    for words in (
        "stage `mean` | merged; itself a merge by linear",
        "stage `moved`",
        "`a` | in `mean`",
        "`base` | base",
    ):
        assert words in card
    assert str(llamas["a"].parent) not in card
    again = hf_merge.Recipe.load(merged.path / "hf_merge_recipe.yaml")
    assert again == merged.plan.recipe
    assert pinned_recipe(again, {}) == again


def test_plan_counts_what_stages_read_and_reports_their_problems(llamas):
    made = hf_merge.plan(hf_merge.Recipe.from_yaml(text(documents(llamas))))
    size = made.bytes_written
    assert made.bytes_read == (1 + 2 + 3) * size  # base; a and b for mean; a, a and b for moved
    assert "stages:      mean (linear), moved (slerp)" in str(made)
    alone = hf_merge.plan(documents(llamas)[0])
    assert made.peak_memory > alone.peak_memory
    parts = documents(llamas)
    parts[1]["models"] = ["mean", str(llamas["b"])]
    made = hf_merge.plan(hf_merge.Recipe.from_yaml(text(parts)))
    assert "In 'moved': 'slerp' takes 1 model beside the base; found 2." in made.errors[0].text


def test_random_stages_have_masks_of_their_own_and_one_seed_sets_them_all(llamas, tmp_path):
    def recipe(**words):
        parts = [
            {
                "name": name,
                "merge_method": "dare_linear",
                "base_model": str(llamas["base"]),
                "models": [str(llamas["a"])],
            }
            for name in ("one", "two")
        ]
        for part in parts:
            part["parameters"] = {"density": 0.5, "rescale": False}
        last = {"merge_method": "linear", "models": ["one", "two"]}
        return hf_merge.Recipe.from_yaml(text([*parts, last]), **words)

    first, again, other = (
        weights(hf_merge.merge(recipe(**words), tmp_path / str(i)).path)
        for i, words in enumerate([{}, {}, {"seed": 1}])
    )
    base, key = weights(llamas["base"]), "model.layers.0.mlp.up_proj.weight"
    assert first[key].equal(again[key]) and not first[key].equal(other[key])
    moved = first[key] != base[key]
    assert 0.7 < moved.double().mean() < 0.8  # 1 - 1/4: the two masks are independent


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([{"models": ["org/a"]}, {"models": ["org/b"]}], "Of 2 documents 2 give the output"),
        ([{"name": "x", "models": ["org/a"]}, {"models": ["org/b"]}], "No document merges 'x'"),
        ([{"name": "x", "models": ["org/a"]}, {"name": "x", "models": ["org/b"]}, {"models": ["x"]}], "same `name:`"),
        ([{"name": "x", "models": ["y"]}, {"name": "y", "models": ["x"]}, {"models": ["x"]}], "in a circle: "),
        ([{"name": "x", "models": ["org/a"]}, {"models": ["x"], "dtpye": "float32"}], "Did you mean 'dtype'"),
    ],
)
def test_documents_that_do_not_hang_together_are_refused(parts, message):
    with pytest.raises(hf_merge.RecipeError, match=message):
        hf_merge.Recipe.from_yaml(text([{"merge_method": "linear", **part} for part in parts]))


def test_errors_give_the_line_in_the_whole_file():
    recipe = "merge_method: linear\nname: x\nmodels: [org/a]\n---\nmerge_method: linear\nmodels: [x]\nsead: 3\n"
    with pytest.raises(hf_merge.RecipeError, match="line 7: Unknown key 'sead'"):
        hf_merge.Recipe.from_yaml(recipe)


def test_merge_of_stages_is_resumed_to_the_same_bytes(llamas, tmp_path, monkeypatch):
    recipe = hf_merge.Recipe.from_yaml(text(documents(llamas)))
    whole = hf_merge.merge(recipe, tmp_path / "whole", max_shard_size=40_000).path
    last, compute = [*hf_merge.plan(recipe, max_shard_size=40_000).specs][-1], lazy.compute
    partial, deadline = tmp_path / ".out.hf_merge", time.monotonic() + 60

    def break_off(plan, step, sources):
        if step.name == last:  # its shard is never finished; another worker finishes the first one
            while not [*partial.glob("*.safetensors")] and time.monotonic() < deadline:
                time.sleep(0.01)
            raise RuntimeError("the power is gone")
        return compute(plan, step, sources)

    monkeypatch.setattr(lazy, "compute", break_off)
    with pytest.raises(hf_merge.ComputeError, match="the power is gone"):
        hf_merge.merge(recipe, tmp_path / "out", max_shard_size=40_000)
    kept = sorted(path.name for path in partial.glob("*.safetensors"))
    assert kept and not (tmp_path / "out").exists()
    monkeypatch.undo()
    with pytest.raises(hf_merge.OutputError, match="begun with another recipe"):
        hf_merge.merge(recipe, tmp_path / "out", max_shard_size=40_000, resume=True, seed=9)
    out = hf_merge.merge(recipe, tmp_path / "out", max_shard_size=40_000, resume=True).path
    files = sorted(path.name for path in whole.glob("*.safetensors"))
    assert len(files) > len(kept) and all((out / file).read_bytes() == (whole / file).read_bytes() for file in files)


def test_seed_given_with_a_recipe_sets_its_stages_too(llamas):
    recipe = hf_merge.Recipe.from_yaml(text(documents(llamas)))
    assert [stage.seed for stage in hf_merge.Recipe.load(recipe, seed=5).stages] == [5, 5]


def test_stage_that_does_not_fit_is_told_whatever_is_made_of_it(llamas):
    wrong = {"name": "mean", "merge_method": "passthrough"}
    wrong["slices"] = [{"sources": [{"model": str(llamas["a"]), "layer_range": [0, 9]}]}]
    for last in ({"models": ["mean"], "merge_method": "linear"}, documents(llamas)[2] | {"models": ["mean"]}):
        made = hf_merge.plan(hf_merge.Recipe.from_yaml(text([wrong, last])))
        assert "In 'mean': " in made.errors[0].text and "asks for layers 0 to 9" in made.errors[0].text
        assert str(made) and made.to_dict()
