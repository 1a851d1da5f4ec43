"""Models of the Hub merged on load, and recipe repos that name them."""

import json
import shutil

import pytest

import hf_merge
from tests.hub.conftest import Account
from tests.hub.test_reading import cached_weights

pytestmark = pytest.mark.e2e

# Code that loads a model in several ways, and says what its weights are.
LOADED = """
import hashlib
import hf_merge
from transformers import AutoModelForCausalLM, AutoTokenizer
def weights(model):
    parts = [tensor.detach().numpy().tobytes() for _, tensor in sorted(model.state_dict().items())]
    return [hashlib.sha256(b"".join(parts)).hexdigest(), model.name_or_path, model.generation_config.max_new_tokens]
"""


def test_models_of_the_hub_merge_on_load_and_a_recipe_repo_pins_them(account: Account, llamas, tmp_path):
    org, repo = account.name, tmp_path / "repo"
    first = [account.put(name, llamas[name]).commit("main").sha for name in ("a", "b")]
    code = LOADED + (
        "models = [f'{org}/a', f'{org}/b']\n"
        "streamed = weights(hf_merge.from_pretrained(models, method='linear', stream=True))\n"
        "kept = [path.name for path in __import__('pathlib').Path(home).rglob('*.safetensors')]\n"
        "whole = weights(hf_merge.from_pretrained(models, method='linear'))\n"
        "hf_merge.Recipe.load(models, method='linear').save_pretrained(repo)\n"
        "result = [streamed, whole, kept]"
    )
    streamed, whole, kept = account.python(code, repo=repo, home=account.home)
    merged = hf_merge.merge([llamas["a"], llamas["b"]], tmp_path / "m", method="linear").load()
    assert streamed == whole and not kept and cached_weights(account) == {"model.safetensors"}
    assert whole[1:] == [f"linear of {org}/a, {org}/b", 5]
    recipe = json.loads((repo / "config.json").read_text())["recipe"]
    pinned = [f"{org}/{name}@{sha}" for name, sha in zip("ab", first, strict=True)]
    assert [entry["model"] for entry in recipe["models"]] == pinned
    account.put("recipe", repo)
    account.put("a", llamas["base"])  # moves on; the recipe does not
    shutil.rmtree(account.home)
    code = LOADED + (
        "model = AutoModelForCausalLM.from_pretrained(f'{org}/recipe')\n"
        "result = [weights(model), len(AutoTokenizer.from_pretrained(f'{org}/recipe'))]"
    )
    (digest, name, tokens), length = account.python(code)
    assert [digest, name, tokens, length] == [whole[0], f"{org}/recipe", 5, 64]
    assert len(merged.state_dict())
