"""The output appears whole or not at all; nothing existing is lost; an interrupted run can go on."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import hf_merge
from hf_merge.writer import partial_folder


def weights(folder):
    return {name: tensor for file in folder.glob("*.safetensors") for name, tensor in load_file(file).items()}


def merge(llamas, output, **changes):
    return hf_merge.merge([llamas["a"], llamas["b"]], output, method="linear", **changes)


def files(folder):
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_shards_have_transformers_names_and_an_index(llamas, tmp_path):
    out = merge(llamas, tmp_path / "m", max_shard_size="20KB").path
    index = json.loads((out / "model.safetensors.index.json").read_text())
    shards = sorted(path.name for path in out.glob("*.safetensors"))
    assert len(shards) > 3 and shards[0] == f"model-00001-of-{len(shards):05d}.safetensors"
    assert index["weight_map"] == {name: file.name for file in out.glob("*.safetensors") for name in load_file(file)}
    assert index["metadata"]["total_size"] == sum(t.nbytes for t in weights(out).values())
    assert all(sum(t.nbytes for t in load_file(out / shard).values()) <= 20_000 for shard in shards)
    single = merge(llamas, tmp_path / "s").path
    assert {k: v.tolist() for k, v in weights(out).items()} == {k: v.tolist() for k, v in weights(single).items()}
    AutoModelForCausalLM.from_pretrained(out)


def test_mixed_dtypes_are_aligned_and_read_back_by_safetensors(tmp_path):
    state = {
        "half": torch.ones(3, dtype=torch.bfloat16),
        "full": torch.ones(5),
        "mask": torch.ones(7, dtype=torch.bool),
        "empty": torch.empty(0, 3),
        "scalar": torch.tensor(2.5),
        "ids": torch.arange(3),
    }
    save_file(state, tmp_path / "a.safetensors")
    out = hf_merge.merge([tmp_path / "a.safetensors"], tmp_path / "m", method="linear").path
    found = load_file(out / "model.safetensors")
    assert found.keys() == state.keys() and all(torch.equal(found[name], tensor) for name, tensor in state.items())


@pytest.mark.parametrize("content", ["model", "notes", "file"])
def test_existing_output_is_refused_and_untouched(llamas, tmp_path, content):
    output = tmp_path / "m"
    if content == "file":
        output.write_text("mine")
    else:
        output.mkdir()
        (output / ("config.json" if content == "model" else "notes.txt")).write_text("mine")
    with pytest.raises(hf_merge.OutputExistsError, match="choose another name"):
        merge(llamas, output)
    if content != "model":
        with pytest.raises(hf_merge.OutputExistsError, match="is no model, so it is not overwritten"):
            merge(llamas, output, overwrite=True)
    assert [p.read_text() for p in [output, *output.rglob("*")] if p.is_file()] == ["mine"]
    assert not partial_folder(output).exists()


def test_overwrite_replaces_a_model_when_the_new_one_is_whole(llamas, tmp_path):
    old = merge(llamas, tmp_path / "m", max_shard_size="20KB").path
    before = files(old)
    bad = {name: tensor.clone() for name, tensor in weights(llamas["b"]).items()}
    bad["lm_head.weight"][0, 0] = float("nan")
    with pytest.raises(hf_merge.ComputeError):
        hf_merge.merge([llamas["a"], bad], old, method="linear", overwrite=True)
    assert files(old) == before
    merge(llamas, old, overwrite=True)
    assert sorted(p.name for p in old.glob("*.safetensors*")) == ["model.safetensors"]
    assert [p.name for p in tmp_path.iterdir()] == ["m"]


def test_empty_folder_and_missing_parents_are_fine(llamas, tmp_path):
    (tmp_path / "empty").mkdir()
    assert merge(llamas, tmp_path / "empty").load() is not None
    assert merge(llamas, tmp_path / "new" / "deep" / "m").path.is_dir()


def test_output_over_an_input_is_refused(llamas, tmp_path):
    before = files(llamas["a"])
    with pytest.raises(hf_merge.OutputError, match="is or holds the input"):
        merge(llamas, llamas["a"], overwrite=True)
    assert files(llamas["a"]) == before


@pytest.mark.parametrize("size", ["huge", 0, -5])
def test_bad_shard_size_is_an_error_before_anything_is_written(llamas, tmp_path, size):
    with pytest.raises(hf_merge.OutputError, match="max_shard_size"):
        merge(llamas, tmp_path / "m", max_shard_size=size)
    assert not list(tmp_path.iterdir())


def test_error_while_merging_leaves_nothing(llamas, tmp_path):
    bad = {name: tensor.clone() for name, tensor in weights(llamas["b"]).items()}
    bad["lm_head.weight"][0, 0] = float("inf")
    with pytest.raises(hf_merge.ComputeError, match=r"lm_head\.weight"):
        hf_merge.merge([llamas["a"], bad], tmp_path / "m", method="linear")
    assert not list(tmp_path.iterdir())


def test_unwritable_place_is_a_clear_error(llamas, tmp_path):
    (tmp_path / "file").write_text("mine")
    with pytest.raises(hf_merge.OutputError, match="cannot be written"):
        merge(llamas, tmp_path / "file" / "m")
    assert (tmp_path / "file").read_text() == "mine"


SMALL_DISK = """
import resource, signal, sys, hf_merge
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (30_000, 30_000))
try:
    hf_merge.merge(sys.argv[1:3], sys.argv[3], method="linear")
except hf_merge.OutputError as error:
    print(error)
"""


def test_disk_that_is_too_small_is_a_clear_error_and_leaves_nothing(llamas, tmp_path):
    call = [sys.executable, "-c", SMALL_DISK, str(llamas["a"]), str(llamas["b"]), str(tmp_path / "m")]
    done = subprocess.run(call, check=True, capture_output=True, text=True)
    assert "cannot be written: File too large" in done.stdout
    assert not list(tmp_path.iterdir())


SLOW = """
import sys, time, hf_merge
from hf_merge.types import Merged, Models

@hf_merge.merge_method(paper="https://example.org", elementwise=True)
def slow(models: Models) -> Merged:
    "Take the mean, slowly."
    time.sleep(0.1)
    return (models[0] + models[1]) / 2

hf_merge.merge(sys.argv[1:3], sys.argv[3], method="slow", max_shard_size="20KB", resume="resume" in sys.argv)
"""


def start_slow_merge(llamas, output, *words):
    call = [sys.executable, "-c", SLOW, str(llamas["a"]), str(llamas["b"]), str(output), *words]
    environment = {**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1"}
    return subprocess.Popen(call, env=environment)


def wait_for_finished_shard(output, process):
    for _ in range(1200):
        if any(partial_folder(output).glob("*.safetensors")):
            return
        assert process.poll() is None
        time.sleep(0.05)
    raise AssertionError("no shard was finished in a minute")


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGINT])
def test_interrupted_merge_leaves_no_model_and_resumes_to_the_same_bytes(llamas, tmp_path, how):
    output = tmp_path / "m"
    process = start_slow_merge(llamas, output)
    wait_for_finished_shard(output, process)
    process.send_signal(how)
    process.wait(timeout=60)
    assert process.returncode != 0 and not output.exists()
    for folder in [p for p in tmp_path.rglob("*") if p.is_dir()]:
        with pytest.raises((OSError, ValueError)):
            AutoModelForCausalLM.from_pretrained(folder)
    kept = {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in partial_folder(output).glob("*.safetensors")}
    assert kept
    resumed = start_slow_merge(llamas, output, "resume")
    assert resumed.wait(timeout=120) == 0
    after = {p.name: (p.stat().st_ino, p.stat().st_mtime_ns) for p in output.glob("*.safetensors")}
    assert kept.items() <= after.items(), "a finished shard was written again"
    whole = start_slow_merge(llamas, tmp_path / "whole")
    assert whole.wait(timeout=120) == 0
    assert files(output).keys() == files(tmp_path / "whole").keys()
    for name, content in files(tmp_path / "whole").items():
        assert name == "README.md" or files(output)[name] == content, name
    assert not partial_folder(output).exists()


def test_resume_of_another_merge_is_refused_and_a_fresh_run_begins_again(llamas, tmp_path):
    output = tmp_path / "m"
    process = start_slow_merge(llamas, output)
    wait_for_finished_shard(output, process)
    process.kill()
    process.wait()
    with pytest.raises(hf_merge.OutputError, match="begun with another recipe"):
        merge(llamas, output, max_shard_size="20KB", resume=True)
    merge(llamas, output, max_shard_size="20KB")
    assert not partial_folder(output).exists() and output.is_dir()


def test_shards_of_unknown_origin_are_not_taken_over(llamas, tmp_path):
    partial = partial_folder(tmp_path / "m")
    partial.mkdir()
    (partial / "model.safetensors").write_bytes(b"from who knows where")
    out = merge(llamas, tmp_path / "m", resume=True).path
    assert weights(out).keys() == weights(llamas["a"]).keys()


def test_resume_without_anything_to_resume_is_a_plain_merge_and_in_memory_is_refused(llamas, tmp_path):
    assert merge(llamas, tmp_path / "m", resume=True).path.is_dir()
    with pytest.raises(hf_merge.OutputError, match="in memory cannot be resumed"):
        hf_merge.merge([weights(llamas["a"])], tmp_path / "n", method="linear", resume=True)


def test_second_process_on_the_same_output_is_refused(llamas, tmp_path):
    process = start_slow_merge(llamas, tmp_path / "m")
    wait_for_finished_shard(tmp_path / "m", process)
    with pytest.raises(hf_merge.OutputError, match="Another process is writing"):
        merge(llamas, tmp_path / "m")
    assert process.wait(timeout=120) == 0
    assert (tmp_path / "m" / "config.json").is_file()
