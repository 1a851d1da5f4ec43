"""What the Hub reads of the Space's repository: the front matter of its README.md, and requirements.txt."""

import re
import tomllib
from importlib.metadata import version
from pathlib import Path

import pytest
import yaml
from packaging.requirements import Requirement
from packaging.specifiers import SpecifierSet

import hf_merge

ROOT = Path(__file__).resolve().parents[2]
SPACE = ROOT / "space"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
COLOURS = {"red", "yellow", "green", "blue", "indigo", "purple", "pink", "gray"}


@pytest.fixture(scope="module")
def front() -> dict:
    return yaml.safe_load((SPACE / "README.md").read_text().split("---\n")[1])


def lines() -> list[Requirement]:
    text = (SPACE / "requirements.txt").read_text()
    return [Requirement(line) for line in text.splitlines() if line.strip() and not line.startswith("#")]


def test_the_gradio_that_the_hub_installs_is_the_one_that_was_tested(front):
    assert front["sdk"] == "gradio" and front["sdk_version"] == version("gradio")
    pinned = re.search(r"^gradio==(.+)$", (ROOT / "constraints.txt").read_text(), re.MULTILINE)
    assert pinned and front["sdk_version"] == pinned[1]
    (wanted,) = (Requirement(line) for line in PROJECT["optional-dependencies"]["space"] if line.startswith("gradio"))
    assert wanted.specifier.contains(front["sdk_version"]) and {"oauth", "mcp"} <= wanted.extras


def test_python_is_a_version_that_hf_merge_runs_on(front):
    assert isinstance(front["python_version"], str), "3.10 without quotes is 3.1"
    assert SpecifierSet(PROJECT["requires-python"]).contains(front["python_version"])


def test_requirements_are_this_hf_merge_with_its_page():
    (only,) = lines()
    assert only.name == "hf-merge" and only.extras == {"fast", "space"} <= set(PROJECT["optional-dependencies"])
    assert only.specifier == SpecifierSet(f"=={hf_merge.__version__}")


def test_visitors_are_asked_for_no_more_than_publishing_needs(front):
    assert front["hf_oauth"] is True and front["hf_oauth_scopes"] == ["contribute-repos", "gated-repos"]
    assert 0 < front["hf_oauth_expiration_minutes"] <= 43200


def test_the_card_can_be_shown(front):
    assert {front["colorFrom"], front["colorTo"]} <= COLOURS and len(front["short_description"]) <= 60
    assert front["app_file"] == "app.py" and front["license"] == PROJECT["license"].lower()
    assert re.fullmatch(r"\d+[mh]", front["startup_duration_timeout"])


def test_the_word_about_zerogpu_follows_from_the_bound_on_torch():
    (torch,) = (Requirement(line) for line in PROJECT["dependencies"] if Requirement(line).name == "torch")
    (bound,) = torch.specifier
    assert f"needs torch {bound.version} or\nnewer" in (SPACE / "README.md").read_text()
