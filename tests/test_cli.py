"""The command line in real processes: results on stdout, the rest on stderr, exit statuses."""

import json
import os
import shutil
import subprocess
import sys

import pytest
import yaml
from safetensors.torch import load_file

from tests.conftest import imported_by


def run(*words, **environment):
    call = [sys.executable, "-W", "error", "-m", "hf_merge.cli", *map(str, words)]
    return subprocess.run(
        call, capture_output=True, text=True, env={**os.environ, "HF_HUB_OFFLINE": "1", **environment}
    )


@pytest.fixture
def recipe(llamas, tmp_path):
    path = tmp_path / "recipe.yaml"
    path.write_text(
        yaml.safe_dump(
            {
                "merge_method": "ties",
                "base_model": str(llamas["base"]),
                "dtype": "bfloat16",
                "models": [{"model": str(llamas[name]), "parameters": {"density": 0.5}} for name in "ab"],
            }
        )
    )
    return path


def test_recipe_to_model(recipe, tmp_path):
    done = run("merge", recipe, tmp_path / "out", "--format", "human")
    assert done.returncode == 0, done.stderr
    assert str(tmp_path / "out") in done.stdout and "Merging" in done.stderr and "Merging" not in done.stdout
    assert len(load_file(tmp_path / "out" / "model.safetensors")) == 30


def test_flags_say_the_same_as_a_recipe(recipe, llamas, tmp_path):
    words = [
        "--method",
        "ties",
        "--base",
        llamas["base"],
        llamas["a"],
        llamas["b"],
        "-p",
        "density=0.5",
        "--dtype",
        "bfloat16",
    ]
    assert run("merge", *words, tmp_path / "flags").returncode == 0
    assert run("merge", recipe, tmp_path / "file").returncode == 0
    left, right = ((tmp_path / name / "model.safetensors").read_bytes() for name in ("flags", "file"))
    header = int.from_bytes(left[:8], "little")
    assert left[8 + header :] == right[8 + int.from_bytes(right[:8], "little") :]


def test_flags_of_tokenizer_and_template(llamas, tmp_path):
    words = ["--method", "linear", str(llamas["a"]), str(llamas["b"]), "--tokenizer-source", "union"]
    assert run("merge", *words, "--chat-template", "chatml", str(tmp_path / "m")).returncode == 0
    recipe = yaml.safe_load((tmp_path / "m" / "hf_merge_recipe.yaml").read_text())
    assert recipe["tokenizer_source"] == "union" and recipe["chat_template"] == "chatml"
    assert "<|im_start|>" in (tmp_path / "m" / "chat_template.jinja").read_text()


def test_each_model_has_its_own_value(llamas, tmp_path):
    done = run("plan", "--method", "linear", llamas["a"], llamas["b"], "-p", "weight=0.75,0.25", "--json")
    tensors = json.loads(done.stdout)["tensors"]
    assert tensors[0]["settings"] == {"weight": [0.75, 0.25], "normalize": True}


def test_plan_for_people_and_for_programs(recipe):
    shown = run("plan", recipe, "--format", "human")
    assert shown.returncode == 0 and "Merge of 2 models by ties" in shown.stdout and "problems:    none" in shown.stdout
    made = json.loads(run("plan", recipe, "--json").stdout)
    assert made["bytes_written"] * 6 == made["bytes_read"] and made["shards"].keys() == {"model.safetensors"}


def test_plan_with_errors_shows_them_and_fails(llamas):
    done = run("plan", "--method", "ties", llamas["a"], llamas["b"], "--format", "human")
    assert done.returncode == 1 and "pass base_model=" in done.stdout


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["merge", "--method", "tie", "a", "out"], "Did you mean 'ties'?"),
        (["merge", "absent.yaml", "out"], "Cannot read the recipe 'absent.yaml'"),
        (["merge", "a", "b", "out"], "say how with --method"),
        (["plan", "--method", "linear", "./absent"], "There is no model at './absent'"),
        (["methods", "nonsense"], "There is no merge method 'nonsense'"),
    ],
)
def test_refusal_is_one_line_on_stderr_and_status_1(words, said, tmp_path):
    done = run(*words)
    assert done.returncode == 1 and said in done.stderr
    assert done.stdout == "" and "Traceback" not in done.stderr


@pytest.mark.parametrize(
    "words",
    [["merge", "out"], ["merge", "--method"], ["nonsense"], ["merge", "-p", "density", "--method", "ties", "a", "out"]],
)
def test_wrong_usage_is_status_2(words):
    done = run(*words)
    assert done.returncode == 2 and "Traceback" not in done.stderr


def test_existing_output_is_refused_with_the_flag_to_use(recipe, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "config.json").write_text("{}")
    done = run("merge", recipe, tmp_path / "out")
    assert done.returncode == 1 and "--overwrite" in done.stderr
    assert run("merge", recipe, tmp_path / "out", "--overwrite").returncode == 0


def test_methods_are_listed_and_explained():
    assert "dare_ties" in run("methods").stdout
    matching = {row["name"] for row in json.loads(run("methods", "*ties*", "--json").stdout)}
    assert {"ties", "dare_ties"} <= matching and all("ties" in name for name in matching)
    explained = run("methods", "ties", "--format", "human").stdout
    assert "density (number in [0, 1], for each model; default 1.0)" in explained and "Notes:" in explained


def test_help_imports_neither_torch_nor_transformers():
    assert imported_by("import hf_merge, hf_merge.cli", {"torch", "transformers", "peft", "gradio"}) == "[]"


def test_planning_imports_no_model_code():
    code = "import torch, hf_merge; hf_merge.plan([{'x': torch.ones(1)}], method='linear')"
    heavy = {"transformers", "tokenizers", "accelerate", "peft", "gradio", "matplotlib", "optuna", "jinja2"}
    assert imported_by(code, heavy) == "[]"


@pytest.mark.parametrize("tokenizer", [False, True])
def test_merging_folders_imports_no_model_code(llamas, tmp_path, tokenizer):
    left_out = [] if tokenizer else ["tokenizer*", "chat_template*"]
    for name in "ab":
        shutil.copytree(llamas[name], tmp_path / name, ignore=shutil.ignore_patterns(*left_out))
    models = [str(tmp_path / name) for name in "ab"]
    code = f"import hf_merge; hf_merge.merge({models}, {str(tmp_path / 'out')!r}, method='linear')"
    heavy = {"transformers", "tokenizers", "accelerate", "peft", "gradio", "matplotlib", "optuna", "scipy"}
    assert imported_by(code, heavy) == "[]"
    assert (tmp_path / "out" / "tokenizer.json").exists() == tokenizer
    assert "pipeline_tag: text-generation" in (tmp_path / "out" / "README.md").read_text()
