"""Any merge as an adapter: equal to the merge as a model, refused where it cannot be, whole or not there."""

import json
import subprocess
import sys
import threading

import pytest
import torch
import yaml
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_merge
from hf_merge.adapters.modules import layout_of
from hf_merge.adapters.parts import Finished, Part, matrices, stored, widened
from hf_merge.adapters.settings import vllm_rank
from tests.conftest import save_llamas, small_config
from tests.test_cli import run

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")
TIES = {"method": "ties", "density": 0.5, "weight": [0.6, 0.4]}


@pytest.fixture(scope="module")
def words(llamas):
    return {"recipe": [llamas["a"], llamas["b"]], "base_model": llamas["base"], **TIES}


def test_a_merge_as_an_adapter_is_the_merge(words, tmp_path):
    whole = hf_merge.merge(output=tmp_path / "model", **words)
    made = hf_merge.merge(output=tmp_path / "adapter", output_format="adapter", rank=1.0, **words)
    assert isinstance(made, hf_merge.MergedAdapter) and min(made.kept.values()) > 1 - 1e-6
    found, wanted = made.load().merge_and_unload().state_dict(), whole.load().state_dict()
    for name, tensor in wanted.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=2e-7)
    names = {path.name for path in made.path.iterdir()}
    assert names == {"README.md", "adapter_config.json", "adapter_model.safetensors", "hf_merge_recipe.yaml"}


def test_its_recipe_repeats_it_and_is_in_the_metadata_without_paths(words, tmp_path):
    made = hf_merge.merge(output=tmp_path / "one", output_format="adapter", rank=4, seed=3, **words)
    again = hf_merge.merge(made.path / "hf_merge_recipe.yaml", tmp_path / "two")
    first, second = (load_file(one.path / "adapter_model.safetensors") for one in (made, again))
    assert first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)
    with safe_open(made.path / "adapter_model.safetensors", "pt") as file:
        shared = yaml.safe_load(file.metadata()["hf_merge_recipe"])
    assert shared["output_format"] == "adapter" and shared["base_model"] == "base"


def test_its_dtype_is_the_recipes_or_the_bases(words, tmp_path):
    half = hf_merge.merge(output=tmp_path / "half", output_format="adapter", rank=4, dtype="bfloat16", **words)
    assert {t.dtype for t in load_file(half.path / "adapter_model.safetensors").values()} == {torch.bfloat16}
    own = hf_merge.merge(output=tmp_path / "own", output_format="adapter", rank=4, **words)
    assert {t.dtype for t in load_file(own.path / "adapter_model.safetensors").values()} == {torch.float32}
    assert half.kept == own.kept


def test_the_plan_says_what_will_be_written(words):
    plan = hf_merge.plan(output_format="adapter", rank=4, **words)
    text = str(plan)
    assert "22 linear layers, 1 embeddings, 7 modules saved whole" in text and "at most 4" in text
    assert plan.to_dict()["adapter"]["bytes"] > 0 and not plan.problems
    assert "warning: Without rank=" in str(hf_merge.plan(output_format="adapter", **words))
    assert "adapter" not in hf_merge.plan(**words).to_dict()


def test_the_bound_of_the_plan_holds(words, tmp_path):
    made = hf_merge.merge(output=tmp_path / "adapter", output_format="adapter", rank=4, **words)
    size = sum(t.nbytes for t in load_file(made.path / "adapter_model.safetensors").values())
    assert size <= made.plan.adapter["bytes"] <= 1.1 * size


def test_the_card_renders(words, tmp_path):
    made = hf_merge.merge(output=tmp_path / "adapter", output_format="adapter", rank=4, **words)
    text = made.card.text
    for told in ("A LoRA adapter of `base`", "merge of 2 models by **ties**", "23 modules have factors of rank 4",
                 "| `model.layers.*.self_attn.q_proj` | 3 | 4 |", "Saved as they are after the merge: ",
                 "PeftModel.from_pretrained(base, ", "rank: 4"):  # fmt: skip
        assert told in text
    data = made.card.data.to_dict()
    assert data["base_model_relation"] == "adapter" and data["library_name"] == "peft" and "lora" in data["tags"]
    assert data["pipeline_tag"] == "text-generation" and str(tmp_path) not in text


def test_a_template_of_ones_own_and_one_that_fails(words, tmp_path):
    own = tmp_path / "own.md"
    own.write_text('{% extends "adapter.md" %}{% block summary %}Mine: {{ adapter.modules }}.{% endblock %}')
    adapter = {"output_format": "adapter", "rank": 4, **words}
    assert "Mine: 23." in hf_merge.merge(output=tmp_path / "m", card_template=own, **adapter).card.text
    own.write_text("{{ nothing.at.all }}")
    with pytest.raises(hf_merge.OutputError, match="card cannot be written"):
        hf_merge.merge(output=tmp_path / "n", card_template=own, **adapter)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["m", "own.md"]


REFUSED = {
    "no base": ({"base_model": None, "method": "linear", "weight": 0.5, "density": None}, "pass base_model="),
    "rank 0": ({"rank": 0}, "positive integer"),
    "energy 2": ({"rank": 2.0}, r"\(0, 1\]"),
    "NaN": ({"rank": float("nan")}, r"\(0, 1\]"),
    "true": ({"rank": True}, "positive integer"),
    "a word": ({"rank": "many"}, "'sum'"),
    "sum": ({"rank": "sum"}, "adapters that are merged with one another"),
    "target": ({"targets": ["q_porj"]}, "Did you mean 'q_proj'"),
    "no targets": ({"targets": []}, "list of names"),
    "vocabulary of its own": ({"tokenizer_source": "union"}, "an adapter adds no tokens"),
    "no such format": ({"output_format": "lora"}, "'model' or 'adapter'"),
}


@pytest.mark.parametrize("case", REFUSED)
def test_what_is_refused_and_why(words, tmp_path, case):
    changes, told = REFUSED[case]
    given = {"output_format": "adapter", "rank": 4, **words, **changes}
    if case == "vocabulary of its own":
        root = save_llamas(tmp_path / "wide", ("a",), vocab_size=80)
        tokenizer = AutoTokenizer.from_pretrained(root["a"])
        tokenizer.add_tokens(["new", "words"])
        tokenizer.save_pretrained(root["a"])
        given["recipe"] = [words["recipe"][0], root["a"]]
    with pytest.raises(hf_merge.MergeError, match=told):
        hf_merge.merge(output=tmp_path / "adapter", **given)
    assert not (tmp_path / "adapter").exists()


@pytest.mark.parametrize("field", [{"rank": 4}, {"targets": ["q_proj"]}, {"exact_svd": True}, {"keep_rest": False},
                                   {"vllm": True}])  # fmt: skip
def test_words_of_adapters_are_refused_of_models(words, tmp_path, field):
    with pytest.raises(hf_merge.RecipeError, match="write output_format: adapter too"):
        hf_merge.merge(output=tmp_path / "m", **words, **field)


def test_doors_that_give_models_refuse_it(words, tmp_path):
    adapter = {"output_format": "adapter", "rank": 4, **words}
    recipe = hf_merge.Recipe.load(adapter.pop("recipe"), **adapter)
    for call in (
        lambda: hf_merge.from_pretrained(recipe),
        lambda: recipe.save_pretrained(tmp_path / "repo"),
        lambda: hf_merge.merge_state_dicts([{"x": torch.ones(2)}], method="linear", output_format="adapter"),
    ):
        with pytest.raises(hf_merge.RecipeError, match="makes an adapter"):
            call()


@pytest.mark.parametrize(("changes", "told"), [({"output": "m.safetensors"}, "a PEFT adapter is a folder"),
                                               ({"resume": True}, "leave resume out"),
                                               ({"private": True}, "push_to_hub")])  # fmt: skip
def test_options_that_an_adapter_has_not(words, tmp_path, changes, told):
    given = {**words, "output_format": "adapter", "rank": 4, **changes}
    given["output"] = tmp_path / changes.get("output", "m")
    with pytest.raises(hf_merge.OutputError, match=told):
        hf_merge.merge(**given)


def test_a_base_that_lies_nowhere_is_refused(llamas, tmp_path):
    adapter = hf_merge.extract_adapter(llamas["a"], llamas["base"], tmp_path / "first", rank=2)
    with pytest.raises(hf_merge.PlanError, match="lies nowhere"):
        hf_merge.extract_adapter(llamas["b"], f"{llamas['base']}+{adapter.path}", tmp_path / "second", rank=2)


@pytest.mark.parametrize("said", [{}, {"rank": 4, "energy": 0.5}, {"rank": 0}, {"rank": 2.5}, {"energy": 2},
                                  {"energy": 0}, {"energy": float("nan")}])  # fmt: skip
def test_extraction_wants_exactly_one_size(llamas, tmp_path, said):
    with pytest.raises(hf_merge.ParameterError):
        hf_merge.extract_adapter(llamas["a"], llamas["base"], tmp_path / "m", **said)


def test_models_of_another_vocabulary_are_told_apart_or_cut(llamas, tmp_path):
    wide = save_llamas(tmp_path, ("a",), vocab_size=72)
    with pytest.raises(hf_merge.PlanError, match="tokenizer_source"):
        hf_merge.extract_adapter(wide["a"], llamas["base"], tmp_path / "m", rank=4)
    made = hf_merge.extract_adapter(wide["a"], llamas["base"], tmp_path / "m", rank=4, tokenizer_source="base")
    assert "model.embed_tokens" in made.kept


def test_models_in_memory(llamas, tmp_path):
    fine, base = (AutoModelForCausalLM.from_pretrained(llamas[name]) for name in ("a", "base"))
    made = hf_merge.extract_adapter(fine, base, tmp_path / "m", rank=4)
    assert json.loads((made.path / "adapter_config.json").read_text())["base_model_name_or_path"] is None
    with pytest.raises(hf_merge.MergeError, match=r"PeftModel\.from_pretrained"):
        made.load()
    on_disk = hf_merge.extract_adapter(llamas["a"], llamas["base"], tmp_path / "n", rank=4)
    assert made.kept == on_disk.kept


def test_nothing_that_changes_is_an_error(llamas, tmp_path):
    with pytest.raises(hf_merge.OutputError, match="no matrix of the merge differs"):
        hf_merge.extract_adapter(AutoModelForCausalLM.from_pretrained(llamas["base"]), llamas["base"], tmp_path / "m",
                                 rank=4)  # fmt: skip


def test_an_existing_adapter_stays_or_is_replaced(llamas, tmp_path):
    pair = (llamas["a"], llamas["base"], tmp_path / "m")
    hf_merge.extract_adapter(*pair, rank=4)
    with pytest.raises(hf_merge.OutputExistsError):
        hf_merge.extract_adapter(*pair, rank=2)
    made = hf_merge.extract_adapter(*pair, rank=2, overwrite=True)
    assert json.loads((made.path / "adapter_config.json").read_text())["r"] == 2
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_an_interrupted_one_leaves_nothing(llamas, tmp_path, monkeypatch, error):
    from hf_merge.adapters.slots import Change

    calls, finish, guard = [], Change.finish, threading.Lock()

    def breaking(self, *merged):
        with guard:
            calls.append(self.part)
        if len(calls) > 5:
            raise error
        return finish(self, *merged)

    monkeypatch.setattr(Change, "finish", breaking)
    with pytest.raises((KeyboardInterrupt, OSError)):
        hf_merge.extract_adapter(llamas["a"], llamas["base"], tmp_path / "m", rank=4)
    assert list(tmp_path.iterdir()) == []


def test_nan_is_refused_by_its_name(llamas, tmp_path):
    weights = load_file(llamas["a"] / "model.safetensors")
    weights["lm_head.weight"][3, 4] = torch.nan
    save_file(weights, tmp_path / "bad.safetensors", {"format": "pt"})
    for options in ({}, {"allow_nonfinite": True}):
        with pytest.raises(hf_merge.ComputeError, match="lm_head"):
            hf_merge.extract_adapter(tmp_path / "bad.safetensors", llamas["base"], tmp_path / "m", rank=4, **options)
    assert not (tmp_path / "m").exists()


class TestVllm:
    def test_only_linear_layers_of_one_allowed_rank(self, llamas, tmp_path):
        made = hf_merge.extract_adapter(llamas["a"], llamas["base"], tmp_path / "m", rank=5, vllm=True)
        config = json.loads((made.path / "adapter_config.json").read_text())
        assert config["r"] == config["lora_alpha"] == 8 and config["rank_pattern"] == {}
        assert config["modules_to_save"] is None and not config["lora_bias"] and config["bias"] == "none"
        assert len(config["target_modules"]) == 22 and "model.embed_tokens" in made.left_out
        assert "--max-lora-rank 8" in made.card.text
        plain = hf_merge.extract_adapter(llamas["a"], llamas["base"], tmp_path / "n", rank=5, keep_rest=False)
        for key, tensor in load_file(made.path / "adapter_model.safetensors").items():
            narrow = load_file(plain.path / "adapter_model.safetensors")[key]
            rows, columns = narrow.shape
            assert torch.equal(tensor[:rows, :columns], narrow) and tensor.norm() == pytest.approx(narrow.norm())

    @pytest.mark.parametrize(("said", "told"), [({"keep_rest": True}, "modules saved whole"),
                                                ({"targets": ["embed_tokens"]}, "embeddings"),
                                                ({"rank": 513}, "up to rank 512")])  # fmt: skip
    def test_what_it_does_not_load_is_an_error(self, llamas, tmp_path, said, told):
        with pytest.raises(hf_merge.PlanError, match=told):
            hf_merge.extract_adapter(llamas["a"], llamas["base"], tmp_path / "m", vllm=True, **{"rank": 4, **said})

    def test_ranks(self):
        assert [vllm_rank(rank) for rank in (1, 2, 8, 9, 300, 512)] == [1, 8, 8, 16, 320, 512]
        with pytest.raises(hf_merge.OutputError, match="512"):
            vllm_rank(513)


class TestParts:
    @pytest.mark.parametrize("part", [
        Part("m", "linear", (6, 5)), Part("m", "linear", (6, 5), turned=True), Part("m", "conv", (6, 5, 3, 2)),
        Part("m", "embedding", (9, 4)), Part("m.w", "experts", (3, 6, 5)), Part("m.w", "experts", (6, 5)),
        Part("m.w", "experts", (3, 6, 5), turned=True),
    ])  # fmt: skip
    def test_a_change_as_matrices_fits_its_sides_and_widening_adds_zeros(self, part):
        found = matrices(part, torch.randn(part.shape))
        assert tuple(found.shape[-2:]) == part.sides
        stack = found if part.kind == "experts" else found[None]
        left, right = (torch.randn(len(stack), *shape) for shape in ((part.sides[0], 2), (2, part.sides[1])))
        if part.kind != "experts":
            left, right = left[0], right[0]
        for key, tensor in stored(part, left, right).items():
            wide = widened(part, key, tensor, 5)
            assert wide.numel() * 2 == tensor.numel() * 5 and wide.norm() == pytest.approx(tensor.norm().item())

    def test_the_modules_of_a_llama(self):
        layout = layout_of(small_config(architectures=["LlamaForCausalLM"], tie_word_embeddings=True).to_dict())
        kinds = {name: part.kind for name, part in layout.parts.items()}
        assert kinds["model.embed_tokens.weight"] == "embedding" and kinds["model.norm.weight"] == "whole"
        assert layout.parts["model.embed_tokens.weight"].twins == (("lm_head", "linear"),)
        assert layout_of({"architectures": ["Unheard"]}) is None

    def test_nothing_is_said_of_what_is_not_kept(self):
        assert Finished().rank == 0 and Finished().kept is None


class TestCommandLine:
    def test_extract(self, llamas, tmp_path):
        done = run(
            "extract", llamas["a"], llamas["base"], tmp_path / "m", "--rank", 4, "--targets", "q_proj,v_proj", "--json"
        )
        assert done.returncode == 0, done.stderr
        told = json.loads(done.stdout)
        assert told["path"] == str(tmp_path / "m") and told["modules"] == 6 and 0 < float(told["least_kept"]) < 1
        assert (tmp_path / "m" / "adapter_model.safetensors").is_file()

    def test_merge_and_plan(self, llamas, tmp_path):
        words = ("--method", "linear", "--base", llamas["base"], "-p", "weight=0.5", "--output-format", "adapter")
        words = ("--method", "task_arithmetic", *words[2:], "--rank", "0.9")
        done = run("merge", *words, llamas["a"], llamas["b"], tmp_path / "m", "--json")
        assert done.returncode == 0, done.stderr
        assert json.loads(done.stdout)["modules"] == 23
        planned = run("plan", *words, llamas["a"], llamas["b"])
        assert planned.returncode == 0 and "keeps 0.9 of the energy" in planned.stdout, planned.stderr

    @pytest.mark.parametrize(
        "said", [(), ("--rank", 4, "--energy", 0.5), ("--energy", 2), ("--rank", 4, "--targets", "w")]
    )
    def test_one_line_says_what_is_wrong(self, llamas, tmp_path, said):
        done = run("extract", llamas["a"], llamas["base"], tmp_path / "m", *said)
        assert done.returncode == 1 and "Traceback" not in done.stderr and not (tmp_path / "m").exists()


def test_several_processes_are_told_to_be_one(llamas, tmp_path):
    code = (
        "import hf_merge, sys\n"
        "try:\n    hf_merge.extract_adapter(*sys.argv[1:4], rank=4)\n"
        "except hf_merge.OutputError as error:\n    print(error)"
    )
    words = [str(llamas["a"]), str(llamas["base"]), str(tmp_path / "m")]
    call = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--no-python", sys.executable, "-c"]
    done = subprocess.run([*call, code, *words], capture_output=True, text=True, timeout=120)
    assert "one process, and 2 were started" in done.stdout, done.stderr
