"""The worked example: its files load, its parents know one skill each, and the merge by its recipe knows both."""

import re
import runpy
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_merge

EXAMPLE = Path(__file__).resolve().parents[2] / "space" / "example"
MODELS = ("base", "sort", "flip")
SKILLS = ("sort", "flip")
LARGEST = 4_000_000


@pytest.fixture(scope="module")
def making():
    """Return what the script that made the files defines; it trains nothing when it is not the main one."""
    return runpy.run_path(str(EXAMPLE / "make.py"))


@pytest.fixture(scope="module")
def merged(tmp_path_factory):
    """Merge by the example's recipe, as it stands, beside its models."""
    folder = tmp_path_factory.mktemp("example") / "merged"
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(EXAMPLE)
        hf_merge.merge("recipe.yaml", folder)
    return folder


def answer(folder, prompt):
    """Return what a model in files goes on with, as a user gets it."""
    tokens = AutoTokenizer.from_pretrained(folder, local_files_only=True)
    model = AutoModelForCausalLM.from_pretrained(folder, local_files_only=True, dtype=torch.float32)
    given = tokens(prompt, return_tensors="pt")
    made = model.generate(**given, max_new_tokens=10, do_sample=False)
    return tokens.decode(made[0, given["input_ids"].shape[1] :], skip_special_tokens=True)


def told(name):
    """Return the accuracies in a model's card, in per cent, by model."""
    text = (EXAMPLE / name / "README.md").read_text(encoding="utf-8")
    rows = re.findall(r"^\| (.+) \| ([\d.]+)% \| ([\d.]+)% \|$", text, re.MULTILINE)
    return {model: (float(first), float(second)) for model, first, second in rows}


def test_is_small():
    assert sum(file.stat().st_size for file in EXAMPLE.rglob("*") if file.is_file()) < LARGEST


@pytest.mark.parametrize("name", MODELS)
def test_card_says_licence_task_and_base(name):
    data = ModelCard.load(EXAMPLE / name / "README.md").data
    assert (data.license, data.pipeline_tag) == ("apache-2.0", "text-generation")
    assert data.base_model == (None if name == "base" else "base")


@pytest.mark.parametrize("name", MODELS)
def test_cards_tell_what_is_measured(name, making):
    found = making["accuracies"](EXAMPLE / name)
    assert told(name) == told("base")
    assert told("base")[name] == pytest.approx([100 * found[skill] for skill in SKILLS], abs=0.3)


def test_merge_does_both_and_parents_one_each(merged, making):
    found = {one: making["accuracies"](EXAMPLE / one) for one in MODELS} | {"merged": making["accuracies"](merged)}
    method = hf_merge.Recipe.load(EXAMPLE / "recipe.yaml").merge_method
    card = told("base")[f"merged by `{method}`"]
    assert card == pytest.approx([100 * found["merged"][skill] for skill in SKILLS], abs=0.3)
    for skill, other in zip(SKILLS, reversed(SKILLS), strict=True):
        assert found["base"][skill] < 0.55
        assert found[other][skill] < 0.55
        assert found[skill][skill] > 0.9
        assert found["merged"][skill] > 0.8


def test_try_out_in_words(merged):
    assert [answer(merged, f"{skill} tulip=") for skill in SKILLS] == ["ilptu", "pilut"]
    assert answer(EXAMPLE / "sort", "sort Tulip=") == "ilptu"
    assert answer(EXAMPLE / "flip", "flip tulip=") == "pilut"
    assert answer(EXAMPLE / "sort", "flip tulip=") != "pilut"
    assert answer(EXAMPLE / "flip", "sort tulip=") != "ilptu"
