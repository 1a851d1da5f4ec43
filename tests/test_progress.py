"""What `on_progress` hears, and how what it raises ends a merge: at once, cleanly, and as it was raised."""

import itertools
import subprocess
import sys
import threading
import time

import pytest
import torch
from safetensors.torch import load_file

import hf_merge
from hf_merge import running
from hf_merge.method import _registry
from hf_merge.writer import partial_folder
from tests.test_writer import weights

pytestmark = pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning")

LINEAR = {"method": "linear"}
KINDS = {
    "model": {**LINEAR, "max_shard_size": "20KB"},
    "file": LINEAR,
    "adapter": {"method": "ties", "output_format": "adapter", "rank": 2},
    "experts": {"method": "emr"},
}


class Stop(Exception):
    """None of our own errors."""


def merge(llamas, output, kind, **more):
    base = {} if KINDS[kind]["method"] == "linear" else {"base_model": llamas["base"]}
    name = output.with_suffix(".safetensors") if kind == "file" else output
    return hf_merge.merge([llamas["a"], llamas["b"]], name, **KINDS[kind], **base, **more)


@pytest.mark.parametrize("kind", KINDS)
def test_it_hears_every_tensor_and_the_numbers_only_rise(llamas, tmp_path, kind):
    heard, inside = [], threading.Lock()

    def hear(progress):
        assert inside.acquire(blocking=False), "it was called from two threads at a time"
        heard.append(progress)
        inside.release()

    made = merge(llamas, tmp_path / "m", kind, on_progress=hear)
    first, last = heard[0], heard[-1]
    assert {each.stage for each in heard} == {"merging"}
    assert (first.tensor, first.tensors, first.bytes) == ("", 0, 0)
    assert last.tensors == last.all_tensors and last.bytes == last.all_bytes == made.plan.bytes_written > 0
    assert all(a.bytes <= b.bytes and a.tensors <= b.tensors for a, b in itertools.pairwise(heard))
    assert {each.tensor for each in heard} - {""} == made.plan.specs.keys()


def test_where_nobody_listens_the_bar_is_drawn_now_and_then_and_at_the_end(llamas, tmp_path, monkeypatch):
    told = []
    monkeypatch.setattr(running, "_SHOWN_EVERY", 1e9)
    monkeypatch.setattr(running.tqdm, "set_postfix_str", lambda bar, text, **_: told.append((text, bar.n)))
    made = merge(llamas, tmp_path / "m", "model")
    count = len(made.plan.specs)
    assert len(told) < count / 2 and (told[0][0], told[-1][0]) == (f"0/{count} tensors", f"{count}/{count} tensors")


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("error", [Stop("enough"), hf_merge.Cancelled("enough"), OSError(5, "x"), ValueError("x")], ids=lambda e: type(e).__name__)  # fmt: skip  # noqa: E501
def test_what_it_raises_comes_out_as_it_is_and_nothing_is_left(llamas, tmp_path, kind, error):
    calls = []

    def end(progress):
        calls.append(progress)
        if progress.tensors >= 5:
            raise error

    with pytest.raises(type(error)) as caught:
        merge(llamas, tmp_path / "m", kind, on_progress=end)
    assert caught.value is error and calls[-1].tensors == 5 and not list(tmp_path.iterdir())


def test_the_model_that_was_to_be_replaced_is_untouched(llamas, tmp_path):
    before = weights(merge(llamas, tmp_path / "m", "model").path)

    def end(progress):
        if progress.bytes == progress.all_bytes:
            raise hf_merge.Cancelled

    with pytest.raises(hf_merge.Cancelled):
        merge(llamas, tmp_path / "m", "model", on_progress=end, overwrite=True, weight=[1, 0])
    after = weights(tmp_path / "m")
    assert after.keys() == before.keys() and all(torch.equal(after[name], before[name]) for name in before)
    assert [path.name for path in tmp_path.iterdir()] == ["m"]


def test_with_resume_finished_shards_stay_and_are_taken_over(llamas, tmp_path):
    def end(progress):
        if progress.tensors >= 20:
            raise hf_merge.Cancelled

    with pytest.raises(hf_merge.Cancelled):
        merge(llamas, tmp_path / "m", "model", on_progress=end, resume=True)
    assert list(partial_folder(tmp_path / "m").glob("*.safetensors")) and not (tmp_path / "m").exists()
    heard = []
    merge(llamas, tmp_path / "m", "model", on_progress=heard.append, resume=True)
    assert heard[0].tensors > 0 and heard[0].bytes > 0 and heard[-1].bytes == heard[-1].all_bytes
    whole, resumed = weights(merge(llamas, tmp_path / "whole", "model").path), weights(tmp_path / "m")
    assert whole.keys() == resumed.keys() and all(torch.equal(whole[name], resumed[name]) for name in whole)


def test_a_merge_that_waits_for_one_tensor_hears_of_its_end_soon(llamas, tmp_path):
    """No piece is written for a while, and it is asked nevertheless, in the thread of the caller."""
    asked = threading.Event()

    @hf_merge.merge_method(name="patient", paper="https://example.org", elementwise=True)
    def patient(models: "hf_merge.types.Models") -> "hf_merge.types.Merged":
        "Take the mean, once somebody was asked."
        assert asked.wait(30), "nobody asked"
        return (models[0] + models[1]) / 2

    def hear(progress):
        if threading.current_thread() is threading.main_thread() and heard:
            asked.set()
            raise hf_merge.Cancelled
        heard.append(progress)

    heard = []
    try:
        with pytest.raises(hf_merge.Cancelled):
            hf_merge.merge([llamas["a"], llamas["b"]], tmp_path / "m", method="patient", on_progress=hear)
    finally:
        del _registry["patient"]
    assert len(heard) == 1 and not list(tmp_path.iterdir())


SCRIPT = """
import sys, time, hf_merge
def hear(progress):
    print(progress.stage, progress.tensors, flush=True)
try:
    hf_merge.merge(sys.argv[1:3], sys.argv[3], method="linear", max_shard_size="20KB", on_progress=hear)
except hf_merge.MergeError as error:
    sys.exit(f"{type(error).__name__}: {error}")
"""


@pytest.mark.e2e
def test_of_two_processes_the_first_tells_for_both(llamas, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("print(", "import os; print(os.environ['RANK'], "))
    words = [str(llamas["a"]), str(llamas["b"]), str(tmp_path / "m")]
    call = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(script), *words]
    done = subprocess.run(call, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    lines = [line.split() for line in done.stdout.splitlines() if "merging" in line]
    assert {rank for rank, _, _ in lines} == {"0"}
    names = {name for file in (tmp_path / "m").glob("*.safetensors") for name in load_file(file)}
    assert int(lines[-1][2]) == len(names)


@pytest.mark.e2e
def test_what_ends_the_first_of_two_processes_ends_both(llamas, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.replace("print(", "raise hf_merge.Cancelled('enough')  # "))
    words = [str(llamas["a"]), str(llamas["b"]), str(tmp_path / "m")]
    call = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2", "--standalone", str(script), *words]
    begin = time.monotonic()
    done = subprocess.run(call, capture_output=True, text=True, timeout=120, check=False)
    assert done.returncode != 0 and "Cancelled: Rank 0 of 2: enough" in done.stderr
    assert [path.name for path in tmp_path.iterdir()] == ["script.py"] and time.monotonic() - begin < 90
