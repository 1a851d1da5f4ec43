"""`hf merge ...` through the real hf command, in a home of its own."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from hf_merge import extension
from hf_merge.errors import MergeError

ROOT = Path(__file__).parent.parent
SCRIPTS = Path(sys.executable).parent


@pytest.fixture
def run(tmp_path):
    """Run a command of this environment as somebody whose home is empty."""
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("HF_", "XDG_"))}
    own = {"HOME": str(tmp_path), "USERPROFILE": str(tmp_path), "XDG_DATA_HOME": str(tmp_path / "data"),
           "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_UPDATE_CHECK": "1", "PYTHONPATH": str(ROOT)}  # fmt: skip

    def run(name, *words):
        if not (SCRIPTS / name).is_file():
            pytest.skip(f"{name} is not installed beside {sys.executable}")
        return subprocess.run([SCRIPTS / name, *words], capture_output=True, text=True, env={**kept, **own})

    return run


def theirs(home, text):
    folder = home / ".local" / "share" / "hf" / "extensions" / "hf-merge"
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(text)
    return folder


SOMEONE = json.dumps(
    {"owner": "someone", "repo": "hf-merge", "repo_id": "someone/hf-merge", "short_name": "merge", "type": "python",
     "executable_path": "x", "installed_at": "2026-01-01T00:00:00+00:00"}
)  # fmt: skip


def test_hf_runs_us_once_registered_and_no_longer_when_removed(run):
    assert run("hf-merge", "register").returncode == 0
    (row,) = json.loads(run("hf", "extensions", "list", "--json").stdout)
    assert row["command"] == "hf merge" and row["source"] == "hf_merge.register/hf-merge"
    assert "Merge models: plan from headers" in run("hf", "--help").stdout
    listed = run("hf", "merge", "methods", "--json")
    assert listed.returncode == 0 and listed.stdout == run("hf-merge", "methods", "--json").stdout
    refused = run("hf", "merge", "plan", "absent.yaml")
    assert refused.returncode == 1 and "Cannot read the recipe 'absent.yaml'" in refused.stderr
    assert run("hf-merge", "register").returncode == 0, "again is no error: the environment may be another"
    assert run("hf-merge", "register", "--remove").returncode == 0
    assert run("hf", "extensions", "list", "--json").stdout.strip() in ("", "[]")
    again = run("hf-merge", "register", "--remove")
    assert again.returncode == 1 and "hf has no extension 'merge'" in again.stderr


def test_hf_removes_what_we_registered(run):
    assert run("hf-merge", "register").returncode == 0
    assert run("hf", "extensions", "remove", "merge").returncode == 0
    assert run("hf-merge", "register", "--remove").returncode == 1


@pytest.mark.parametrize("words", [("register",), ("register", "--remove")])
@pytest.mark.parametrize(
    ("text", "said"), [(SOMEONE, "someone/hf-merge"), ("{", "somewhere unknown"), ("[]", "unknown")]
)
def test_an_extension_of_someone_else_stays(run, tmp_path, words, text, said):
    folder = theirs(tmp_path, text)
    done = run("hf-merge", *words)
    assert done.returncode == 1 and said in done.stderr and "hf extensions remove merge" in done.stderr
    assert (folder / "manifest.json").read_text() == text


def test_a_place_that_cannot_be_written_is_told(run, tmp_path):
    (tmp_path / ".local").write_text("no folder")
    done = run("hf-merge", "register")
    assert done.returncode == 1 and "cannot be written" in done.stderr and "Traceback" not in done.stderr


def test_without_a_script_nothing_is_registered(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.setattr("sysconfig.get_path", lambda *_: str(tmp_path))
    with pytest.raises(MergeError, match="There is no script 'hf-merge' in"):
        extension.register()
    assert not any(tmp_path.iterdir())
