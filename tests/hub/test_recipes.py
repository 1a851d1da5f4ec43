"""Recipe repos on the Hub: a few kilobytes that name their models by commit, and are models to who loads them."""

import pytest
import torch
import yaml
from safetensors.torch import load_file

import hf_merge
from tests.hub.conftest import Account

pytestmark = pytest.mark.e2e


def test_a_recipe_is_pushed_and_loaded_as_a_model(account: Account, llamas, tmp_path):
    org = account.name
    commits = [account.put(name, llamas[name]).commit("main").sha for name in ("a", "b")]
    pushed = account.python(
        "import hf_merge\n"
        "recipe = hf_merge.Recipe.load([f'{org}/a', f'{org}/b'], method='linear', weight=[0.3, 0.7])\n"
        "result = recipe.push_to_hub(f'{org}/recipe', private=True).oid",
        token=account.write,
    )
    repo = account.hub.store.repos[f"{org}/recipe"]
    files = repo.commit("main").files
    assert repo.private and repo.commit("main").sha == pushed
    assert not [path for path in files if path.endswith(".safetensors")]
    assert sum(blob.size for blob in files.values()) < 50_000 and account.write.encode() not in b"".join(
        blob.content for blob in files.values()
    )
    models = yaml.safe_load(files["hf_merge_recipe.yaml"].content)["models"]
    assert [each["model"] for each in models] == [f"{org}/a@{commits[0]}", f"{org}/b@{commits[1]}"]
    out = tmp_path / "saved"
    names = account.python(
        "import hf_merge\nfrom transformers import AutoModelForCausalLM, AutoTokenizer\n"
        "model = AutoModelForCausalLM.from_pretrained(f'{org}/recipe')\n"
        "model.save_pretrained(out)\n"
        "result = [type(model).__name__, model.name_or_path, len(AutoTokenizer.from_pretrained(f'{org}/recipe'))]",
        token=account.read,
        out=str(out),
    )
    assert names == ["LlamaForCausalLM", f"{org}/recipe", 64]
    hf_merge.merge([llamas["a"], llamas["b"]], tmp_path / "disk", method="linear", weight=[0.3, 0.7])
    saved, disk = (load_file(folder / "model.safetensors") for folder in (out, tmp_path / "disk"))
    assert saved.keys() == disk.keys() and all(torch.equal(saved[name], disk[name]) for name in disk)
