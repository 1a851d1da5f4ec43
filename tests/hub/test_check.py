"""What can be said of models on the Hub before they are downloaded."""

import json
import shutil

import pytest

from tests.hub.conftest import IMPATIENT, Account

pytestmark = pytest.mark.e2e

CHECK = (
    IMPATIENT
    + """
import hf_merge
def checked(*models, **more):
    report = hf_merge.check([f"{org}/{name}" for name in models], **more)
    again = [hf_merge.check(fix.apply(report.recipe)).verdict for fix in report.fixes]
    return {**report.to_dict(), "verdicts_of_fixes": again}
"""
)


def put(account: Account, name: str, folder, tmp_path, card: str = "", **state) -> None:
    """Put a model with a card on the Hub; ORG in the card stands for the account."""
    own = tmp_path / "hub" / name
    shutil.copytree(folder, own)
    (own / "README.md").write_text(f"---\n{card.replace('ORG', account.name)}\n---\n")
    account.put(name, own, **state)


def test_the_base_is_found_by_lineage_from_headers_alone(account: Account, llamas, tmp_path):
    put(account, "base", llamas["base"], tmp_path, "license: apache-2.0")
    put(account, "mid", llamas["a"], tmp_path, "license: apache-2.0\nbase_model: ORG/base")
    put(account, "a", llamas["a"], tmp_path, "license: apache-2.0\nbase_model: ORG/mid")
    put(account, "b", llamas["b"], tmp_path, "license: apache-2.0\nbase_model: [ORG/base]")
    report = account.python(CHECK + 'result = checked("a", "b", method="ties")')
    org = account.name
    assert report["proposed_base"]["name"] == f"{org}/base" and "come" in report["proposed_base"]["why"]
    assert [fix["changes"] for fix in report["fixes"]] == [{"base_model": f"{org}/base"}, {"merge_method": "nuslerp"}]
    assert report["verdicts_of_fixes"] == ["fits", "fits"]
    assert report["licence"] == "The result carries apache-2.0, as all of its models do."
    assert len(report["rows"][0]["revision"]) == 40 and report["rows"][1]["matching"] == 30
    asked = account.seen("GET", ".safetensors")
    assert asked and all(each.range for each in asked)
    assert not list(account.home.rglob("*.safetensors"))
    assert not [each for each in account.seen("GET", "tokenizer.json") if "/mid/" in each.path]


def test_what_may_not_be_read_is_a_row_and_the_rest_is_checked(account: Account, llamas, tmp_path):
    put(account, "a", llamas["a"], tmp_path, "license: mit")
    put(account, "b", llamas["b"], tmp_path, "license: mit\nbase_model: ORG/a")
    put(account, "gated", llamas["b"], tmp_path, "license: llama3.1", gated=True)
    put(account, "private", llamas["b"], tmp_path, private=True)
    names = '"a", "gated", "private", "none", "b"'
    report = account.python(CHECK + f'result = checked({names}, method="linear")')
    a, gated, private, none, b = report["rows"]
    assert report["verdict"] == "does not fit" and report["plan"] is None
    assert gated["gated"] and "is gated: accept its conditions" in gated["error"]
    assert all("no such model that you may see" in one["error"] for one in (private, none))
    assert a["matching"] == b["matching"] == 30 and not a["error"]
    assert report["fixes"][0]["changes"] == {"models": [f"{account.name}/a", f"{account.name}/b"]}
    assert report["verdicts_of_fixes"] == ["fits"] * len(report["fixes"])


def test_a_gated_model_that_may_be_read_says_so(account: Account, llamas, tmp_path):
    put(account, "a", llamas["a"], tmp_path, "license: mit", gated=True, granted={account.name})
    put(account, "b", llamas["b"], tmp_path, "license: mit")
    done = account.cli("check", f"{account.name}/a", f"{account.name}/b", token=account.read)
    assert done.returncode == 0, done.stderr
    assert "gated: the Hub asks for consent" in done.stdout and "same 30 tensors" in done.stdout
    assert account.read not in done.stdout + done.stderr


def test_without_a_network_every_row_says_so(account: Account, llamas, tmp_path):
    put(account, "a", llamas["a"], tmp_path, "license: mit")
    names = [f"{account.name}/a", f"{account.name}/b"]
    done = account.cli("check", *names, "--json", HF_HUB_OFFLINE="1")
    assert done.returncode == 1 and "Traceback" not in done.stderr
    rows = json.loads(done.stdout)["rows"]
    assert all("HF_HUB_OFFLINE forbids to ask the Hub" in one["error"] for one in rows) and len(rows) == 2


def test_another_base_than_the_cards_name_is_proposed(account: Account, llamas, tmp_path):
    put(account, "base", llamas["base"], tmp_path, "license: mit")
    put(account, "other", llamas["b"], tmp_path, "license: mit")
    for name in "ab":
        put(account, name, llamas[name], tmp_path, "license: mit\nbase_model: ORG/base")
    report = account.python(CHECK + 'result = checked("a", "b", base_model=f"{org}/other", method="ties")')
    assert report["verdict"] == "fits" and report["proposed_base"]["name"] == f"{account.name}/base"
    right = account.python(CHECK + 'result = checked("a", "b", base_model=f"{org}/base", method="ties")')
    assert right["proposed_base"] is None
