"""hf_merge takes models from the Hub: commits are pinned, refusals are one sentence, and no token gets out."""

import hashlib
from pathlib import Path

import pytest
import yaml

from tests.hub.conftest import REFUSED, Account, error_line
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
    merged = """
        import hf_merge
        tensors = len(hf_merge.plan(pinned, method="linear").steps)
        hf_merge.merge(local, out, method="linear")
        result = tensors
    """
    local, offline = [str(llamas[name]) for name in "ab"], {"HF_HUB_OFFLINE": "1"}
    assert account.python(merged, pinned=pinned, local=local, out=tmp_path / "local", environment=offline) == 30
    assert weights(tmp_path / "local") == weights(tmp_path / "m")
    assert asked and asked == len(account.seen("GET") + account.seen("HEAD"))


def test_a_private_model_and_a_gated_one_merge_with_a_token_that_no_file_keeps(account: Account, llamas, tmp_path):
    account.put("private", llamas["a"], private=True)
    account.put("gated", llamas["b"], gated=True, granted={account.name})
    names = [f"{account.name}/private", f"{account.name}/gated"]
    said = account.cli("merge", "--method", "linear", *names, tmp_path / "flag", "--token", account.read)
    known = account.cli("merge", "--method", "linear", *names, tmp_path / "known", token=account.read)
    assert said.returncode == known.returncode == 0, said.stderr + known.stderr
    assert weights(tmp_path / "flag") == weights(tmp_path / "known")
    assert not holds(tmp_path, account.read)
    assert account.read not in said.stdout + said.stderr + known.stdout + known.stderr


def test_an_adapter_is_pinned_beside_its_base(account: Account, llamas, tmp_path):
    org, base = account.name, account.put("base", llamas["base"]).commit("main").sha
    made = """
        from peft import LoraConfig, get_peft_model
        from transformers import AutoModelForCausalLM
        model = AutoModelForCausalLM.from_pretrained(f"{org}/base")
        adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights=False))
        adapted.push_to_hub(f"{org}/lora")
        import hf_merge
        hf_merge.merge([f"{org}/base+{org}/lora", f"{org}/base"], out, method="linear")
        result = AutoModelForCausalLM.from_pretrained(out).config.num_hidden_layers
    """
    assert account.python(made, token=account.write, out=tmp_path / "m") == 3
    lora = account.hub.store.repos[f"{org}/lora"].commit("main").sha
    written = yaml.safe_load((tmp_path / "m" / "hf_merge_recipe.yaml").read_text())
    models = [each["model"] for each in written["models"]]
    assert models[1] == f"{org}/base@{base}" and base in str(models[0]) and lora in str(models[0])
    assert not holds(tmp_path / "m", account.write)


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
    planned = account.cli("plan", "--method", "linear", f"{account.name}/nothing", llamas["a"], token=account.read)
    assert planned.returncode == 1 and planned.stdout == ""
    assert error_line(planned.stderr).startswith(f"Error: There is no folder '{account.name}/nothing', and on the Hub")
    assert account.stranger not in done.stderr and account.read not in planned.stderr
    assert not (tmp_path / "m").exists() and not holds(tmp_path, account.stranger, account.read)


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
