"""What a reference to an adapter may be: alone, with its base in one folder, on a base, live, with others."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file

import hf_merge
from hf_merge.errors import PlanError, SourceError
from hf_merge.recipe import Recipe
from hf_merge.sources import is_adapter, locate, open_source, with_bases
from hf_merge.types import InMemory, ModelRef
from tests.test_lora import adapt, llama, logits, opened

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")


@pytest.fixture
def folder(tmp_path):
    """A base, and an adapter whose config names it."""
    adapt(llama(), tmp_path, target_modules=["q_proj", "lm_head"])
    say(tmp_path, base_model_name_or_path=str(tmp_path / "base"))
    return tmp_path


def say(folder, name="adapter", **words):
    path = folder / name / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **words}))


def cached(folder, name, commit):
    """Put a model into a Hub cache."""
    place = folder / "hub" / f"models--org--{name}"
    (place / "refs").mkdir(parents=True)
    (place / "snapshots").mkdir()
    for revision in ("main", "v1"):
        (place / "refs" / revision).write_text(commit)
    (place / "snapshots" / commit).symlink_to(folder / name)


def test_adapter_alone_is_added_to_the_base_that_it_names(folder):
    alone, whole = open_source(ModelRef(path=str(folder / "adapter"))), opened(folder)
    assert len(alone.parts) == 2 and all(torch.equal(alone[name], whole[name]) for name in whole)
    done = hf_merge.merge([str(folder / "adapter")], folder / "m", method="passthrough", output_format="model")
    assert torch.equal(done.load().lm_head.weight, whole["lm_head.weight"])
    assert f"{folder / 'base'}+{folder / 'adapter'}" in (folder / "m" / "hf_merge_recipe.yaml").read_text()
    assert "`base` + `adapter`" in done.card.text
    loaded = hf_merge.from_pretrained([str(folder / "adapter")], method="passthrough")
    assert torch.equal(loaded.lm_head.weight, whole["lm_head.weight"])


def test_recipe_s_base_is_opened_once(folder, monkeypatch):
    from hf_merge import sources

    opened_folders = []
    original = sources._located
    monkeypatch.setattr(
        sources, "_located", lambda model, **hub: opened_folders.append(model) or original(model, **hub)
    )
    monkeypatch.chdir(folder)
    plan = hf_merge.plan(["./adapter"], method="task_arithmetic", base_model="base")
    assert [str(model) for model in plan.models] == ["base+./adapter", "base"]
    assert len(opened_folders) == 2


def test_it_can_be_asked_whether_a_model_is_an_adapter(folder):
    refs = [ModelRef(path=str(folder / name)) for name in ("base", "adapter")]
    found = locate(refs)
    assert [is_adapter(found[ref]) for ref in refs] == [False, True]
    assert with_bases(refs, found) == {refs[1]: refs[0].with_lora(refs[1])}


def test_base_and_adapter_in_one_folder(folder):
    whole = opened(folder)
    both = folder / "both"
    shutil.copytree(folder / "base", both)
    for path in (folder / "adapter").iterdir():
        shutil.copy(path, both)
    say(folder, "both", base_model_name_or_path="org/elsewhere")
    source = open_source(ModelRef(path=str(both)))
    assert all(torch.equal(source[name], whole[name]) for name in whole)
    done = hf_merge.merge([str(both)], folder / "m", method="passthrough")
    assert torch.equal(done.load().lm_head.weight, whole["lm_head.weight"])
    again = hf_merge.merge(folder / "m" / "hf_merge_recipe.yaml", folder / "m2")
    assert torch.equal(again.load().lm_head.weight, whole["lm_head.weight"])
    (both / "model.safetensors").unlink()
    say(folder, "both", base_model_name_or_path=str(folder / "base"))
    source = open_source(ModelRef(path=str(both)))
    assert all(torch.equal(source[name], whole[name]) for name in whole)


def test_adapter_of_the_hub_brings_its_base_with_its_revision(folder):
    say(folder, base_model_name_or_path="org/base", revision="v1")
    cached(folder, "base", "a" * 40)
    cached(folder, "adapter", "b" * 40)
    hub = {"cache_dir": folder / "hub", "local_files_only": True}
    done = hf_merge.merge(["org/adapter"], folder / "m", method="passthrough", output_format="model", **hub)
    pinned = f"org/base@{'a' * 40}+org/adapter@{'b' * 40}"
    assert pinned in (folder / "m" / "hf_merge_recipe.yaml").read_text()
    assert done.card.data.to_dict()["base_model"] == ["org/base", "org/adapter"]
    say(folder, base_model_name_or_path="org/other")
    plan = hf_merge.plan([f"org/base+{folder / 'adapter'}"], method="passthrough", **hub)
    told = [problem.message for problem in plan.problems if problem.severity == "warning"]
    assert any("was trained on 'org/other', and is added to 'org/base" in message for message in told)
    with pytest.raises(
        SourceError, match=r"an adapter of 'org/other@v1', and that cannot be read: .* write 'base\+org"
    ):
        hf_merge.plan(["org/adapter"], method="passthrough", output_format="model", **hub)


@pytest.mark.parametrize("told", [None, "", 3])
def test_adapter_that_names_no_base_is_told_how_to_name_it(told, folder):
    say(folder, base_model_name_or_path=told)
    with pytest.raises(SourceError, match=r"does not name its base .*: write 'base\+.*adapter'"):
        open_source(ModelRef(path=str(folder / "adapter")))


def test_adapter_of_an_adapter_is_refused(folder):
    adapt(llama(), folder, name="second", target_modules=["k_proj"])
    say(folder, "second", base_model_name_or_path=str(folder / "adapter"))
    with pytest.raises(SourceError, match="which is an adapter itself: write 'base"):
        open_source(ModelRef(path=str(folder / "second")))


def test_adapter_of_another_base_than_the_recipe_s_is_an_error_that_names_both(folder):
    llama(hidden_size=32).save_pretrained(folder / "wide")
    words = {"method": "task_arithmetic", "base_model": str(folder / "wide")}
    with pytest.raises(PlanError, match=r"adapter.*wide|wide.*adapter"):
        hf_merge.merge([str(folder / "adapter")], folder / "m", **words)
    with pytest.raises(SourceError, match=r"do not fit .* of '.*wide': it was trained on '.*base'"):
        hf_merge.merge([f"{folder / 'wide'}+{folder / 'adapter'}"], folder / "m", **words)
    assert not (folder / "m").exists()


@pytest.mark.parametrize("kind", ["peft", "transformers"])
@pytest.mark.parametrize("tied", [False, True])
def test_live_model_with_an_adapter(kind, tied, folder):
    base = llama(tie_word_embeddings=tied)
    if kind == "peft":
        model = adapt(base, folder, name="live", target_modules=["q_proj", "embed_tokens"], modules_to_save=["norm"])
    else:
        from peft import LoraConfig

        base.add_adapter(LoraConfig(target_modules=["q_proj"], init_lora_weights=False), adapter_name="one")
        model = base
    expected = logits(model)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    loaded = hf_merge.from_pretrained([model], method="passthrough")
    assert (logits(loaded) - expected).abs().max() < 1e-5
    hf_merge.merge([model], folder / "m", method="linear", weight=1.0)
    assert (logits(type(loaded).from_pretrained(folder / "m")) - expected).abs().max() < 1e-5
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_live_model_with_several_active_adapters_and_of_another_type(folder):
    from peft import LoHaConfig, LoraConfig, get_peft_model

    model = get_peft_model(llama(), LoraConfig(target_modules=["q_proj"], init_lora_weights=False))
    model.add_adapter("other", LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    model.base_model.set_adapter(["default", "other"])
    made, merged = {**open_source(InMemory(model, "m"))}, model.merge_and_unload().state_dict()
    assert all((made[name] - merged[name]).abs().max() < 1e-6 for name in merged)
    model = get_peft_model(llama(), LoHaConfig(target_modules=["q_proj"], init_weights=False))
    source = open_source(InMemory(model, "m"))
    assert len(source.parts) == 1 and source.parts[0] is source
    made, merged = {**source}, model.merge_and_unload().state_dict()
    assert all((made[name] - merged[name]).abs().max() < 1e-6 for name in merged)


RECIPES = {
    "text": ("org/base+org/a@v1+org/b", "org/base+org/a@v1+org/b"),
    "list": ({"model": "org/base", "lora": ["org/a", {"path": "org/b", "revision": "v1"}]}, "org/base+org/a+org/b@v1"),
    "weights": (
        {"model": "org/base@v2", "lora": [{"path": "org/a", "weight": 0.5}, "org/b"]},
        {
            "model": {"path": "org/base", "revision": "v2"},
            "lora": [{"path": "org/a", "weight": 0.5}, {"path": "org/b"}],
        },
    ),
    "one weight": (
        {"model": "org/base", "lora": {"path": "org/a", "weight": -1}},
        {"model": {"path": "org/base"}, "lora": {"path": "org/a", "weight": -1.0}},
    ),
}


@pytest.mark.parametrize("case", RECIPES)
def test_recipes_of_adapters_come_back_as_they_were(case):
    said, written = RECIPES[case]
    recipe = Recipe.load({"merge_method": "linear", "models": [{"model": said}, {"model": "org/x"}]})
    (model, _) = recipe.references
    assert len(model.lora) in (1, 2) and hash(model) == hash(Recipe.from_yaml(recipe.to_yaml()).references[0])
    assert Recipe.from_yaml(recipe.to_yaml()) == recipe
    assert json.loads(json.dumps(recipe.to_dict(), default=list))["models"][0]["model"] == written
    other = ModelRef(path="y").with_lora(*model.lora)
    assert recipe.renamed({model: other}).references[0] == other


def test_recipe_repo_keeps_weights(folder):
    adapter = {"path": str(folder / "adapter"), "weight": 0.5}
    said = {"model": str(folder / "base"), "lora": [adapter]}
    recipe = Recipe.load({"merge_method": "passthrough", "models": [{"model": said}]})
    recipe.save_pretrained(folder / "repo")
    from transformers import AutoModelForCausalLM

    loaded = AutoModelForCausalLM.from_pretrained(folder / "repo")
    base, whole = load_file(folder / "base" / "model.safetensors")["lm_head.weight"], opened(folder)["lm_head.weight"]
    assert torch.allclose(loaded.lm_head.weight, base + 0.5 * (whole - base), atol=1e-6)
