"""Repos without weights: what is in them, and that the Auto classes load them by merging."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest
import torch
import transformers
from PIL import Image
from transformers import (
    AutoConfig,
    AutoImageProcessor,
    AutoModel,
    AutoModelForCausalLM,
    AutoModelForImageClassification,
    AutoModelForSequenceClassification,
    AutoTokenizer,
    ViTImageProcessor,
    pipeline,
)
from transformers.models.auto import modeling_auto

import hf_merge
from hf_merge import Recipe, registration
from hf_merge.auto import MergeConfig
from tests.architectures import save_tiny
from tests.test_on_load import same

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def recipe(llamas) -> Recipe:
    models = [llamas["a"], llamas["b"]]
    return Recipe.load(models, method="ties", base_model=llamas["base"], density=0.5, chat_template="chatml")


@pytest.fixture(scope="module")
def repo(recipe, tmp_path_factory) -> Path:
    return recipe.save_pretrained(tmp_path_factory.mktemp("repo") / "mixed")


@pytest.fixture(scope="module")
def loaded(recipe, tmp_path_factory):
    return hf_merge.merge(recipe, tmp_path_factory.mktemp("disk") / "m").load()


def run(code: str, *, stdin: str = "") -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT)}
    call = [sys.executable, "-c", textwrap.dedent(code)]
    return subprocess.run(call, input=stdin, capture_output=True, text=True, env=environment, check=False, timeout=120)


class TestFiles:
    def test_a_few_kilobytes_and_no_weights(self, repo):
        sizes = {path.name: path.stat().st_size for path in repo.iterdir()}
        assert {"config.json", "README.md", "hf_merge_recipe.yaml", "modeling_hf_merge.py", "tokenizer.json"} <= {
            *sizes
        }
        assert not [name for name in sizes if name.endswith(".safetensors")] and sum(sizes.values()) < 20_000

    def test_config_says_what_it_is(self, repo, recipe):
        config = json.loads((repo / "config.json").read_text())
        assert config["model_type"] == "hf_merge" and config["architectures"] == ["LlamaForCausalLM"]
        assert config["auto_map"] == {"AutoConfig": "modeling_hf_merge.MergeConfig"}
        assert Recipe.load(config["recipe"]) == Recipe.load(repo / "hf_merge_recipe.yaml")

    def test_the_card_says_how_to_load_it_and_hides_whose_machine_it_was(self, repo):
        card = (repo / "README.md").read_text()
        assert "import hf_merge" in card and "AutoModelForCausalLM.from_pretrained" in card
        assert str(repo.parent.parent) not in card

    def test_it_is_written_again_but_over_nothing_else(self, repo, recipe, llamas, tmp_path):
        assert recipe.save_pretrained(repo) == repo
        (tmp_path / "mine").write_text("a file")
        with pytest.raises(hf_merge.OutputExistsError):
            recipe.save_pretrained(tmp_path)

    def test_local_models_are_told_and_not_pushed(self, recipe, llamas, tmp_path, monkeypatch):
        warned: list[str] = []
        monkeypatch.setattr("hf_merge.recipe_repo.logger.warning", lambda text, *told: warned.append(text % told))
        recipe.save_pretrained(tmp_path / "r")
        assert "this machine only" in warned[0] and str(llamas["a"]) in warned[0]
        with pytest.raises(hf_merge.RecipeError, match=f"this machine has: {llamas['a']}, "):
            recipe.push_to_hub("org/mixed")

    def test_relative_paths_become_whole(self, llamas, tmp_path, monkeypatch):
        monkeypatch.chdir(llamas["a"].parent)
        repo = Recipe.load(["a", "b"], method="linear").save_pretrained(tmp_path / "r")
        monkeypatch.chdir(tmp_path)
        assert AutoModelForCausalLM.from_pretrained(repo).name_or_path == str(repo)

    def test_objects_have_no_name_that_others_could_use(self, tmp_path):
        model = transformers.LlamaForCausalLM(transformers.LlamaConfig(
            vocab_size=8, hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1
        ))  # fmt: skip
        with pytest.raises(hf_merge.RecipeError, match="is an object: save it to a folder"):
            Recipe.load([model], method="linear").save_pretrained(tmp_path / "r")

    def test_what_cannot_be_merged_is_not_written(self, llamas, tmp_path):
        with pytest.raises(hf_merge.PlanError):
            Recipe.load([llamas["a"]], method="slerp").save_pretrained(tmp_path / "r")
        assert not (tmp_path / "r").exists()


class TestAutoClasses:
    def test_every_auto_class_of_models_knows_it(self):
        autos = [a for n, a in vars(modeling_auto).items() if n.startswith("Auto") and hasattr(a, "_model_mapping")]
        assert len(autos) >= 40 and all(MergeConfig in auto._model_mapping for auto in autos)

    def test_config_and_tokenizer(self, repo):
        config = AutoConfig.from_pretrained(repo)
        assert isinstance(config, MergeConfig) and config.recipe["merge_method"] == "ties"
        tokenizer = AutoTokenizer.from_pretrained(repo)
        assert "<|im_start|>" in tokenizer.chat_template and tokenizer("w1 w2").input_ids == [4, 5]

    def test_the_model_is_that_of_the_disk(self, repo, loaded):
        model, info = AutoModelForCausalLM.from_pretrained(repo, output_loading_info=True)
        assert type(model) is type(loaded) and same(model.state_dict(), loaded.state_dict())
        assert model.name_or_path == str(repo) and not any(info.values())
        assert model.generation_config.to_dict() == loaded.generation_config.to_dict()

    def test_words_for_auto_classes_reach_the_model(self, repo, tmp_path):
        words = {"dtype": torch.bfloat16, "attn_implementation": "eager", "use_cache": False, "token": None}
        parts = {f"model.{part}": "cpu" for part in ("embed_tokens", "layers.0", "layers.1", "norm", "rotary_emb")}
        device_map = {**parts, "model.layers.2": "disk", "lm_head": "cpu"}
        model = AutoModelForCausalLM.from_pretrained(
            repo, device_map=device_map, offload_folder=tmp_path, revision="main", **words
        )
        assert model.dtype == torch.bfloat16 and model.config._attn_implementation == "eager"
        assert model.config.use_cache is False and model.hf_device_map == device_map

    @pytest.mark.filterwarnings("ignore")
    def test_other_classes_of_the_same_config(self, repo, loaded):
        body = AutoModel.from_pretrained(repo)
        assert type(body).__name__ == "LlamaModel" and same(body.state_dict(), loaded.model.state_dict())
        judge, info = AutoModelForSequenceClassification.from_pretrained(repo, num_labels=3, output_loading_info=True)
        assert judge.score.weight.shape == (3, 32) and info["missing_keys"] == {"score.weight"}
        with pytest.raises(hf_merge.RecipeError, match="AutoModelForImageClassification has no class for LlamaConfig"):
            AutoModelForImageClassification.from_pretrained(repo)
        with pytest.raises(hf_merge.RecipeError, match=r"use AutoModel\.from_pretrained"):
            AutoModel.from_config(AutoConfig.from_pretrained(repo))

    def test_a_pipeline_runs(self, repo):
        made = pipeline("text-generation", model=str(repo), do_sample=False)("w1 w2", max_new_tokens=3)
        assert made[0]["generated_text"].startswith("w1 w2")

    @pytest.mark.filterwarnings("ignore")
    def test_a_model_that_sees(self, tmp_path):
        folders = save_tiny("ViTForImageClassification", tmp_path).folders
        for folder in folders.values():
            ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
        recipe = Recipe.load([folders["a"], folders["b"]], method="linear")
        repo, model = recipe.save_pretrained(tmp_path / "repo"), hf_merge.from_pretrained(recipe)
        assert AutoImageProcessor.from_pretrained(repo).size["height"] == 32
        assert same(AutoModelForImageClassification.from_pretrained(repo).state_dict(), model.state_dict())
        assert pipeline("image-classification", model=str(repo))(Image.new("RGB", (40, 40)))[0]["score"] > 0

    def test_stages_are_kept(self, llamas, tmp_path):
        a, b, base = (llamas[name] for name in ("a", "b", "base"))
        recipe = Recipe.from_yaml(
            f"merge_method: linear\nname: half\nmodels: [{a}, {b}]\n---\n"
            f"merge_method: slerp\nbase_model: {base}\nmodels: [half]\nparameters: {{t: 0.4}}\n"
        )
        repo = recipe.save_pretrained(tmp_path / "repo")
        model = AutoModelForCausalLM.from_pretrained(repo)
        assert same(model.state_dict(), hf_merge.from_pretrained(recipe).state_dict())


@pytest.mark.e2e
class TestFreshProcesses:
    def test_hf_merge_imported_first_or_last_or_by_the_repo(self, repo):
        load = "print(type(AutoModelForCausalLM.from_pretrained(r, **words)).__name__)"
        for imports, words in (
            ("import hf_merge, sys; assert 'transformers' not in sys.modules", {}),
            ("from transformers import AutoModelForCausalLM; AutoModelForCausalLM._model_mapping; import hf_merge", {}),
            ("", {"trust_remote_code": True}),
        ):
            done = run(
                f"{imports}\nfrom transformers import AutoModelForCausalLM\nr, words = {str(repo)!r}, {words}\n{load}"
            )
            assert done.stdout.split() == ["LlamaForCausalLM"], done.stderr[-2000:]

    def test_without_hf_merge_it_fails_and_the_code_of_the_repo_names_the_package(self, repo):
        done = run(f"""
        import sys
        sys.modules["hf_merge"] = None  # as if it were not installed
        from transformers import AutoConfig, AutoModelForCausalLM, pipeline
        repo = {str(repo)!r}
        for load in (AutoConfig.from_pretrained, AutoModelForCausalLM.from_pretrained,
                     lambda repo, **words: pipeline("text-generation", repo, **words)):
            for words in ({{}}, {{"trust_remote_code": True}}):
                try:
                    load(repo, **words)
                except Exception as error:
                    print(type(error).__name__, str(error).replace("\\n", " "), file=sys.stderr)
        """)
        told = [line for line in done.stderr.splitlines() if line.startswith(("ValueError", "ImportError"))]
        assert [line.split()[0] for line in told] == ["ValueError", "ImportError"] * 3, done.stderr[-2000:]
        assert all("trust_remote_code=True" in line for line in told[::2])
        assert all("package hf_merge" in line and "pip install hf-merge" in line for line in told[1::2])


def test_a_transformers_that_registers_otherwise_still_imports(monkeypatch, caplog):
    monkeypatch.setattr("hf_merge.auto.register_config", lambda: 1 / 0)
    with caplog.at_level("WARNING"):
        registration.register_when_imported()
    assert "will not know recipe repos" in caplog.text
