"""hf_merge takes models from the Hub: commits are pinned, refusals are one sentence, and no token gets out."""

import hashlib
import json
from pathlib import Path

import pytest
import torch
import yaml
from safetensors.torch import save_file

import hf_merge
from tests.hub.conftest import REFUSED, Account, both_ways, error_line
from tests.hub.store import Blob

pytestmark = pytest.mark.e2e

HOW_TO_PASS = "(--token, token=, HF_TOKEN or `hf auth login`)."


def weights(folder: Path) -> str:
    """Return a digest of the tensors of a merged model, without the header's metadata."""
    content = (folder / "model.safetensors").read_bytes()
    return hashlib.sha256(content[8 + int.from_bytes(content[:8], "little") :]).hexdigest()


def holds(folder: Path, *secrets: str) -> list[Path]:
    """Return the files that hold one of these texts."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [path for path in files if any(secret.encode() in path.read_bytes() for secret in secrets)]


def test_models_by_id_and_by_revision_are_pinned_and_merge_again_to_the_same(account: Account, llamas, tmp_path):
    org, first = account.name, account.put("a", llamas["a"]).commit("main").sha
    other = account.put("b", llamas["b"])
    other.refs["refs/heads/next/one"] = second = other.commit("main")
    other.add("main", {**second.files, "model.safetensors": Blob(b"another", large=True)}, "moved on", org)
    recipe = tmp_path / "recipe.yaml"
    models = [{"model": f"{org}/a"}, {"model": f"{org}/b@next/one"}]
    recipe.write_text(yaml.safe_dump({"merge_method": "linear", "models": models}))
    done = account.cli("merge", recipe, tmp_path / "m")
    assert done.returncode == 0, done.stderr
    written = yaml.safe_load((tmp_path / "m" / "hf_merge_recipe.yaml").read_text())
    pinned = [f"{org}/a@{first}", f"{org}/b@{second.sha}"]
    assert [each["model"] for each in written["models"]] == pinned
    card = (tmp_path / "m" / "README.md").read_text()
    assert first in card and second.sha in card and all(name in card for name in pinned)
    assert yaml.safe_load(card.split("---")[1])["base_model"] == [f"{org}/a", f"{org}/b"]
    other.refs["refs/heads/next/one"] = other.commit("main")
    asked = len(account.seen("GET") + account.seen("HEAD"))
    again = account.cli("merge", tmp_path / "m" / "hf_merge_recipe.yaml", tmp_path / "again", "--local-files-only")
    assert again.returncode == 0 and weights(tmp_path / "again") == weights(tmp_path / "m"), again.stderr
    hf_merge.merge([llamas["a"], llamas["b"]], tmp_path / "local", method="linear")
    assert weights(tmp_path / "local") == weights(tmp_path / "m")
    assert asked and asked == len(account.seen("GET") + account.seen("HEAD"))


def test_a_private_model_and_a_gated_one_merge_with_a_token_that_no_file_keeps(account: Account, llamas, tmp_path):
    account.put("private", llamas["a"], private=True)
    account.put("gated", llamas["b"], gated=True, granted={account.name})
    names = [f"{account.name}/private", f"{account.name}/gated"]
    said = account.cli("merge", "--method", "linear", *names, tmp_path / "flag", "--token", account.read)
    assert said.returncode == 0, said.stderr
    assert not holds(tmp_path, account.read) and account.read not in said.stdout + said.stderr


@pytest.fixture
def adapter(tmp_path) -> Path:
    """A LoRA adapter of the tiny Llamas, as peft saves it."""
    folder = tmp_path / "adapter"
    folder.mkdir()
    config = {"peft_type": "LORA", "task_type": "CAUSAL_LM", "r": 2, "lora_alpha": 2, "target_modules": ["q_proj"]}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    names = [
        f"base_model.model.model.layers.{n}.self_attn.q_proj.lora_{side}.weight" for n in range(3) for side in "AB"
    ]
    shapes = [(2, 32), (32, 2)] * 3
    tensors = {name: torch.full(shape, 0.1) for name, shape in zip(names, shapes, strict=True)}
    save_file(tensors, folder / "adapter_model.safetensors")
    return folder


@both_ways
def test_an_adapter_is_pinned_beside_its_base_and_the_token_of_the_environment_opens_both(
    account: Account, llamas, adapter, tmp_path
):
    org = account.name
    base = account.put("base", llamas["base"], private=True).commit("main").sha
    lora = account.put("lora", adapter, private=True).commit("main").sha
    names = [f"{org}/base+{org}/lora", f"{org}/base"]
    done = account.cli("merge", "--method", "linear", *names, tmp_path / "m", token=account.read)
    assert done.returncode == 0, done.stderr
    written = yaml.safe_load((tmp_path / "m" / "hf_merge_recipe.yaml").read_text())
    models = [each["model"] for each in written["models"]]
    assert models[1] == f"{org}/base@{base}" and base in str(models[0]) and lora in str(models[0])
    assert not holds(tmp_path, account.read) and account.read not in done.stdout + done.stderr


def test_the_command_line_refuses_in_one_line(account: Account, llamas, tmp_path):
    account.put("gated", llamas["b"], gated=True)
    call = ("merge", "--method", "linear", llamas["a"], f"{account.name}/gated", tmp_path / "m")
    done = account.cli(*call, "--token", account.stranger)
    assert done.returncode == 1 and done.stdout == ""
    page = f"{account.hub.url}/{account.name}/gated"
    assert error_line(done.stderr) == (
        f"Error: '{account.name}/gated' is gated: accept its conditions at {page}, "
        f"and pass a token of the account that did {HOW_TO_PASS}"
    )
    assert account.stranger not in done.stderr
    assert not (tmp_path / "m").exists() and not holds(tmp_path, account.stranger)


def test_every_refusal_says_what_to_do_and_nothing_is_written(account: Account, llamas, tmp_path):
    org, url = account.name, account.hub.url
    account.put("a", llamas["a"])
    account.put("private", llamas["a"], private=True)
    account.put("gated", llamas["a"], gated=True)
    hidden = "and on the Hub no such model that you may see: check the name, or if it is private pass a token"
    uncached = "and no whole model of that name in the cache, and local_files_only forbids to ask the Hub"
    cases = {
        "private": ({}, f"There is no folder '{org}/private', {hidden} that may read it {HOW_TO_PASS}"),
        "private ": ({"token": account.stranger}, f"There is no folder '{org}/private', {hidden}"),
        "gated": ({}, f"'{org}/gated' is gated: accept its conditions at {url}/{org}/gated, and pass a token of"),
        "gated ": ({"token": account.stranger}, f"'{org}/gated' is gated: accept its conditions at {url}/{org}/gated"),
        "nothing": ({"token": account.read}, f"There is no folder '{org}/nothing', {hidden}"),
        "a@nowhere": ({}, f"'{org}/a' has no revision 'nowhere' on the Hub: name a branch, a tag or a commit that "),
        "a": ({"token": "hf_unknown"}, f"The Hub does not accept the token that was sent for '{org}/a': pass a valid"),
        "a@v1": ({"local_files_only": True}, f"There is no folder '{org}/a', {uncached}: run `hf download {org}/a"),
        "private  ": (
            {"token": account.read, "cache_dir": str(tmp_path / "file" / "cache")},
            f"'{org}/private' cannot be kept in the cache (Not a directory): make room there, or name another folder",
        ),
        "a b": ({}, f"There is no folder '{org}/a b', and it cannot be the id of a model on the Hub: check the path."),
    }
    (tmp_path / "file").write_text("no folder")
    got = account.python(
        REFUSED + "result = [told(base, f'{org}/{name}', **more) for name, more in cases]",
        cases=[(name if name == "a b" else name.strip(), more) for name, (more, _) in cases.items()],
        base=str(llamas["b"]),
        out=str(tmp_path / "deep" / "m"),
    )
    for (kind, said), (_, expected) in zip(got, cases.values(), strict=True):
        assert kind == "SourceError" and said.startswith(expected)
        assert said.endswith(".") and "\n" not in said and account.stranger not in said and account.read not in said
    assert not (tmp_path / "deep").exists()
