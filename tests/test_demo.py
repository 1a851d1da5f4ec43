"""The demo, as `make demo` runs it."""

import os
import shutil
import signal
import subprocess
import sys
import time

import pytest
from transformers import AutoImageProcessor, AutoModelForImageClassification

from tests.conftest import run_demo


@pytest.fixture(scope="module")
def shown(demo_run):
    return demo_run, demo_run.with_suffix(".txt").read_text()


def accuracies(table):
    """The rows of the printed table: name -> numbers."""
    rows = [
        line.split()
        for line in table.splitlines()
        if line.startswith("base ") or " fine-tune " in line or " merge " in line
    ]
    return {row[0]: [float(cell) for cell in row[-4:]] for row in rows}


@pytest.mark.slow
@pytest.mark.e2e
def test_fine_tunes_know_their_task_and_merges_know_more_than_the_base(shown):
    rows = accuracies(shown[1])
    tasks = ["shapes", "textures", "counts"]
    for i, task in enumerate(tasks):
        assert rows[task][i] > 80, f"{task} was not learnt"
        assert rows[task][i] > rows["base"][i] + 5
    for method in ("linear", "task_arithmetic", "ties", "dare_linear"):
        assert rows[method][3] > rows["base"][3] + 3, f"{method} is no better than the base"


@pytest.mark.slow
@pytest.mark.e2e
def test_it_leaves_a_model_with_its_card_in_the_folder_it_names(shown):
    output, text = shown
    (named,) = [line.split("path: ")[1] for line in text.splitlines() if "path: " in line]
    assert named.startswith(str(output))
    model, info = AutoModelForImageClassification.from_pretrained(named, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert model.config.id2label[0] == "shapes/disk"
    AutoImageProcessor.from_pretrained(named)
    assert "hf_merge" in (output / named / "README.md").read_text()


@pytest.mark.slow
@pytest.mark.e2e
def test_second_run_takes_the_trained_models_and_gives_the_same_table(shown, tmp_path):
    output, text = shutil.copytree(shown[0], tmp_path / "again"), shown[1]  # others read the first
    before = (output / "models" / "base" / "model.safetensors").stat().st_mtime_ns
    again = run_demo(output)
    assert again.returncode == 0, again.stderr
    assert accuracies(again.stdout) == accuracies(text)
    assert (output / "models" / "base" / "model.safetensors").stat().st_mtime_ns == before


def test_folder_that_is_not_the_demos_is_refused(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    done = run_demo(tmp_path)
    assert done.returncode == 1 and str(tmp_path) in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["notes.txt"]


def test_ctrl_c_is_status_130_and_leaves_no_half_model(tmp_path):
    call = [sys.executable, "-m", "hf_merge.cli", "demo", str(tmp_path / "out")]
    with open(tmp_path / "said", "w+") as said:
        process = subprocess.Popen(call, env={**os.environ, "HF_HUB_OFFLINE": "1"}, stderr=said)
        for _ in range(600):  # while modules are loaded a signal may be lost in one of them
            if "Training" in (tmp_path / "said").read_text():
                break
            time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        assert process.wait(timeout=60) == 130
    assert not list(tmp_path.rglob("config.json"))
