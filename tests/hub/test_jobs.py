"""A merge on Hugging Face Jobs: what the real client sends, and that the command it sends does the merge."""

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

import hf_merge
from hf_merge.errors import MergeError, RecipeError
from hf_merge.jobs import MODELS, run_merge_job
from tests.hub.capture import Capture
from tests.hub.conftest import Account, error_line
from tests.hub.test_download import holds, weights

pytestmark = pytest.mark.e2e

HARDWARE = [
    {"name": "cpu-basic", "prettyName": "CPU Basic", "cpu": "2 vCPU", "ram": "16 GB", "accelerator": None,
     "unitCostMicroUSD": 167, "unitCostUSD": 0.000167, "unitLabel": "minute"},
    {"name": "cpu-upgrade", "prettyName": "CPU Upgrade", "cpu": "8 vCPU", "ram": "32 GB", "accelerator": None,
     "unitCostMicroUSD": 500, "unitCostUSD": 0.0005, "unitLabel": "minute"},
]  # fmt: skip


@pytest.fixture
def jobs(account: Account):
    """The account's Hub, with Jobs."""
    started = {
        "id": "j1",
        "owner": {"id": "o", "name": account.name, "type": "user"},
        "status": {"stage": "SCHEDULING"},
    }
    with Capture(behind=account.hub.url) as capture:
        capture.answers["GET", "/api/jobs/hardware"] = HARDWARE
        capture.answers["POST", f"/api/jobs/{account.name}"] = started
        yield capture


@pytest.fixture
def recipe(account: Account, llamas, tmp_path):
    """A recipe of two models on the Hub, one of them private."""
    account.put("a", llamas["a"], private=True)
    account.put("b", llamas["b"])
    path = tmp_path / "recipe.yaml"
    models = [{"model": f"{account.name}/a"}, {"model": f"{account.name}/b", "parameters": {"weight": [0.2, 1.0]}}]
    path.write_text(yaml.safe_dump({"merge_method": "linear", "models": models}))
    return path


def call(account, recipe, *more):
    return ("merge", recipe, "--push-to-hub", f"{account.name}/m", "--job", *more)


def test_a_dry_run_says_what_would_be_sent_and_sends_nothing(account: Account, jobs, recipe):
    words = call(account, recipe, "cpu-upgrade", "--dry-run", "--private", "--timeout", "90m")
    done = account.cli(*words, "--json", token=account.write, HF_ENDPOINT=jobs.url)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    commits = {name: account.hub.store.repos[f"{account.name}/{name}"].commit("main").sha for name in "ab"}
    assert told["url"] == f"{jobs.url}/api/jobs/{account.name}" and told["job"] is None
    assert told["usd_per_hour"] == pytest.approx(0.03)
    payload = told["payload"]
    assert payload["secrets"] == {"HF_TOKEN": "<token>"} and payload["timeoutSeconds"] == 5400
    assert payload["flavor"] == "cpu-upgrade" and payload["command"][:2] == ["sh", "-c"]
    assert (
        f"hf-merge merge recipe.yaml --push-to-hub {account.name}/m --local-files-only --private"
        in payload["command"][2]
    )
    assert f"--with hf-merge=={hf_merge.__version__}" in payload["command"][2]
    named = [each["model"] for each in yaml.safe_load(payload["environment"]["HF_MERGE_RECIPE"])["models"]]
    assert named == [f"{account.name}/{name}@{commits[name]}" for name in "ab"]
    assert payload["volumes"] == [
        {"type": "model", "source": f"{account.name}/{name}", "revision": commits[name], "readOnly": True,
         "mountPath": f"/models/models--{account.name}--{name}/snapshots/{commits[name]}"}
        for name in "ab"
    ]  # fmt: skip
    assert not jobs.posted() and not holds(account.home, account.write) and account.write not in done.stdout
    shown = account.cli(*words, "--format", "human", token=account.write, HF_ENDPOINT=jobs.url).stdout
    assert "0.03 USD an hour on cpu-upgrade; at most 0.04" in shown and "Nothing was started." in shown
    assert '"HF_TOKEN": "<token>"' in shown


def test_what_is_sent_is_what_the_dry_run_shows_and_the_token_is_a_secret(account: Account, jobs, recipe):
    words = call(account, recipe, "cpu-basic", "--json")
    shown = json.loads(account.cli(*words, "--dry-run", token=account.write, HF_ENDPOINT=jobs.url).stdout)
    done = account.cli(*words, "--token", account.write, HF_ENDPOINT=jobs.url)
    assert done.returncode == 0, done.stderr
    (sent,) = jobs.posted()
    assert sent.pop("secrets") == {"HF_TOKEN": account.write} and shown["payload"].pop("secrets")
    assert sent == shown["payload"] and account.write not in json.dumps(sent)
    assert [each.token for each in jobs.sent if each.method == "POST"] == [account.write]
    told = json.loads(done.stdout)
    assert told["job"] == "j1" and told["page"] == f"{jobs.url}/jobs/{account.name}/j1"
    assert account.write not in done.stdout + done.stderr


def test_the_command_merges_what_is_mounted_and_names_ids_and_commits(account: Account, jobs, recipe, llamas, tmp_path):
    """The job, here: the same command and environment, the volumes as folders that cannot be written."""
    words = call(account, recipe, "cpu-basic", "--dry-run", "--json")
    payload = json.loads(account.cli(*words, token=account.write, HF_ENDPOINT=jobs.url).stdout)["payload"]
    mounts = tmp_path / "mounts"
    for volume in payload["volumes"]:
        folder = Path(volume["mountPath"].replace(MODELS, str(mounts), 1))
        shutil.copytree(llamas[volume["source"].split("/")[1]], folder)
        for path in (*folder.iterdir(), folder):
            path.chmod(0o555 if path.is_dir() else 0o444)
    uv = tmp_path / "bin" / "uv"
    uv.parent.mkdir()
    lines = [f"#!{sys.executable}", "import os, sys", "words = sys.argv[sys.argv.index('hf-merge') + 1:]",
             "at = words.index('--push-to-hub')", "words[at:at + 2] = ['out']",
             "os.execv(sys.executable, [sys.executable, '-m', 'hf_merge.cli', *words])"]  # fmt: skip
    uv.write_text("\n".join(lines))
    uv.chmod(0o755)
    own = {name: value.replace(MODELS, str(mounts), 1) if name == "HF_HUB_CACHE" else value
           for name, value in payload["environment"].items()}  # fmt: skip
    environment = account.environment(account.write, **own, PATH=f"{uv.parent}{os.pathsep}{os.environ['PATH']}")
    asked = len(account.hub.log)
    done = subprocess.run(payload["command"], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert len(account.hub.log) == asked, "all is mounted, nothing is asked for"
    alone = hf_merge.merge(
        {"merge_method": "linear", "models": [{"model": str(llamas["a"])},
         {"model": str(llamas["b"]), "parameters": {"weight": [0.2, 1.0]}}]}, tmp_path / "here",
    )  # fmt: skip
    assert weights(tmp_path / "out") == weights(alone.path)
    card = (tmp_path / "out" / "README.md").read_text()
    commits = [account.hub.store.repos[f"{account.name}/{name}"].commit("main").sha for name in "ab"]
    assert all(f"{account.name}/{name}@{commit}" in card for name, commit in zip("ab", commits, strict=True))
    assert yaml.safe_load(card.split("---")[1])["base_model"] == [f"{account.name}/a", f"{account.name}/b"]
    assert str(mounts) not in card and MODELS not in card


def test_stages_adapters_and_tokenizers_are_mounted_too(account: Account, jobs, llamas, tmp_path):
    org = account.name
    for name in "abcd":
        account.put(name, llamas["a"])
    stage = {"name": "mean", "merge_method": "linear", "models": [f"{org}/a+{org}/b", f"{org}/c"]}
    last = {"merge_method": "linear", "models": ["mean", f"{org}/a"], "tokenizer": {"source": f"{org}/d"}}
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text(yaml.safe_dump_all([stage, last]))
    done = account.cli(
        *call(account, recipe, "cpu-basic", "--dry-run", "--json"), token=account.read, HF_ENDPOINT=jobs.url
    )
    assert done.returncode == 0, done.stderr
    payload = json.loads(done.stdout)["payload"]
    assert sorted(volume["source"] for volume in payload["volumes"]) == [f"{org}/{name}" for name in "abcd"]
    commits = {v["source"]: v["revision"] for v in payload["volumes"]}
    one, two = yaml.safe_load_all(payload["environment"]["HF_MERGE_RECIPE"])
    assert one["models"][0]["model"] == f"{org}/a@{commits[f'{org}/a']}+{org}/b@{commits[f'{org}/b']}"
    assert two["models"][0]["model"] == "mean" and two["tokenizer"]["source"] == f"{org}/d@{commits[f'{org}/d']}"


def test_refusals_name_what_is_wrong_and_start_nothing(account: Account, jobs, recipe, llamas):
    org = account.name
    known = {"token": account.write, "HF_ENDPOINT": jobs.url}
    cases = [
        (("merge", "-m", "linear", f"{org}/b", llamas["a"], "--push-to-hub", f"{org}/m", "--job", "cpu-basic"), known,
         f"A job sees models on the Hub only, and these are not there: {llamas['a']}. Push them first"),
        (call(account, recipe, "cpu-bsaic"), known, "have no hardware 'cpu-bsaic'. Did you mean 'cpu-basic'?"),
        (call(account, recipe, "cpu-basic", "--timeout", "soon"), known, "a number of seconds, or like 90m"),
        (call(account, recipe, "cpu-basic"), {"HF_ENDPOINT": jobs.url}, "A job needs a token to push with"),
        (("merge", "-m", "linear", f"{org}/nothing", "--push-to-hub", f"{org}/m", "--job", "cpu-basic"), known,
         f"There is no folder '{org}/nothing', and on the Hub no such model that you may see"),
    ]  # fmt: skip
    for words, environment, said in cases:
        done = account.cli(*words, **environment)
        assert done.returncode == 1 and said in error_line(done.stderr), done.stderr
    assert not jobs.posted()


@pytest.mark.parametrize(
    ("status", "said"),
    [(402, "(402: no credit): add credit to the account that pays"), (403, "(403: no credit): pass a token that may"),
     (500, "(500: no credit): run it again later")],
)  # fmt: skip
def test_what_the_hub_refuses_is_one_line(account: Account, jobs, recipe, status, said):
    jobs.answers["POST", f"/api/jobs/{account.name}"] = (status, {"error": "no credit"})
    done = account.cli(*call(account, recipe, "cpu-basic"), token=account.write, HF_ENDPOINT=jobs.url)
    assert done.returncode == 1 and said in error_line(done.stderr)


def test_a_price_that_cannot_be_asked_is_unknown(account: Account, jobs, recipe):
    jobs.answers["GET", "/api/jobs/hardware"] = (503, {})
    words = call(account, recipe, "any-name", "--dry-run", "--format", "human")
    done = account.cli(*words, token=account.write, HF_ENDPOINT=jobs.url)
    assert done.returncode == 0 and "Price: unknown on any-name\n" in done.stdout


@pytest.mark.parametrize(
    "words",
    [("merge", "recipe.yaml", "--job", "x"), ("merge", "recipe.yaml", "out", "--push-to-hub", "a/b", "--job", "x"),
     ("merge", "recipe.yaml", "out", "--dry-run")],
)  # fmt: skip
def test_wrong_usage_is_told(account: Account, words):
    assert account.cli(*words).returncode == 2


def test_models_in_memory_are_refused_by_their_labels():
    with pytest.raises(RecipeError, match="these are not there: <one>, <two>"):
        run_merge_job({"one": {}, "two": {}}, "me/m", method="linear", token="hf_x", dry_run=True)


def test_a_recipe_that_is_too_long_is_refused(monkeypatch):
    monkeypatch.setattr("hf_merge.jobs.MAX_RECIPE", 10)
    monkeypatch.setattr("hf_merge.jobs.download", lambda *_, **__: Path("0" * 40))
    with pytest.raises(MergeError, match="a recipe of at most 10 bytes"):
        run_merge_job(["org/a", "org/b"], "me/m", method="linear", token="hf_x", dry_run=True)
