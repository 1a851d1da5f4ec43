"""Several processes merge what one would, byte for byte, and end together: real processes that speak over gloo."""

import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

import hf_merge
from hf_merge import launching, ranks
from hf_merge.errors import MergeError, OutputError
from hf_merge.writer import partial_folder
from tests import rank_script
from tests.conftest import save_llamas

SCRIPT = Path(rank_script.__file__)
ROOT = SCRIPT.parents[1]
EQUAL = "several,single,file,modules,in_memory,empty,first_pass"
NAMES = [name for group in launching._VARIABLES.values() for name in group if name]


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    """A folder with the models that the ranks merge."""
    root = tmp_path_factory.mktemp("models")
    save_llamas(root, ("a", "b", "broken"))
    state = load_file(root / "broken" / "model.safetensors")
    state["model.norm.weight"][-1] = float("nan")
    save_file(state, root / "broken" / "model.safetensors", {"format": "pt"})
    save_file({"w": torch.arange(6.0), "none": torch.empty(0, 3)}, root / "few.safetensors")
    for number, name in enumerate(("dense_a", "dense_b")):
        shutil.copytree(root / "ab"[number], root / name)
        (root / name / "2_Dense").mkdir()
        save_file({"linear.weight": torch.full((4, 32), float(number))}, root / name / "2_Dense" / "model.safetensors")
        (root / name / "2_Dense" / "config.json").write_text("{}")
        kinds = ((0, "", "Transformer"), (1, "2_Dense", "Dense"))
        listed = [{"idx": i, "name": str(i), "path": path, "type": f"sentence_transformers.models.{kind}"}
                  for i, path, kind in kinds]  # fmt: skip
        (root / name / "modules.json").write_text(json.dumps(listed))
    return root


@pytest.fixture(scope="module")
def alone(models, tmp_path_factory):
    """What one process makes of it."""
    folder = tmp_path_factory.mktemp("alone")
    before = Path.cwd()
    os.chdir(models)
    try:
        for name in EQUAL.split(","):
            getattr(rank_script, name)(folder)
        hf_merge.merge(["a", "b"], folder / "killed", method="linear", max_shard_size="20KB")
    finally:
        os.chdir(before)
    return folder


def surroundings(**more):
    kept = {name: value for name, value in os.environ.items() if name not in NAMES}
    return {**kept, "PYTHONPATH": str(ROOT), "GLOO_SOCKET_IFNAME": "lo", "OMP_NUM_THREADS": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1", "TORCH_CPP_LOG_LEVEL": "ERROR", **more}  # fmt: skip


def torchrun(world, cases, models, folder):
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node", str(world)]
    call = [*launcher, str(SCRIPT), cases, str(folder)]
    return subprocess.run(call, cwd=models, env=surroundings(), capture_output=True, text=True, timeout=120)


def by_hand(world, cases, models, folder, **more):
    """Start ranks as srun does."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    slurm = {"SLURM_NTASKS": str(world), "SLURM_JOB_NODELIST": "here", "MASTER_PORT": port, **more}
    return [
        subprocess.Popen(
            [sys.executable, str(SCRIPT), cases, str(folder)], cwd=models, stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT, text=True,
            env=surroundings(**slurm, SLURM_PROCID=str(rank), SLURM_LOCALID=str(rank)),
        )
        for rank in range(world)
    ]  # fmt: skip


def noted(folder, name, world):
    return [json.loads((folder / f"{name}-{rank}.json").read_text()) for rank in range(world)]


def files(path):
    found = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    return {str(file.relative_to(path)): file.read_bytes() for file in found}


def left(folder):
    """What lies there but the notes of the ranks."""
    return sorted(path.name for path in folder.iterdir() if path.suffix != ".json")


def assert_equal(folder, alone):
    for name in ("several", "single", "modules", "in_memory", "empty", "first_pass", "merged.safetensors"):
        assert files(folder / name) == files(alone / name), name


def test_four_ranks_write_what_one_writes_and_fail_together(models, alone, tmp_path):
    """Files with one writer and with four, modules in folders, fewer tensors than ranks; then two errors."""
    done = torchrun(4, f"{EQUAL},differing,broken", models, tmp_path)
    assert done.returncode == 1, done.stderr
    assert_equal(tmp_path, alone)
    assert {came["path"] for came in noted(tmp_path, "several", 4)} == {str(tmp_path / "several")}
    for came in noted(tmp_path, "differing", 4):
        assert came["error"] == "MergeError" and "would merge something else than rank 0" in came["text"]
    texts = {(came["error"], came["text"]) for came in noted(tmp_path, "broken", 4)}
    ((kind, text),) = texts
    assert kind == "ComputeError" and text.startswith("Rank 3 of 4: 'model.norm.weight' by 'linear': broken has NaN")
    assert all(came["seconds"] < 30 for came in noted(tmp_path, "broken", 4))
    assert set(left(tmp_path)) - {".broken.hf_merge"} == set(left(alone)) - {"killed"}


def test_two_ranks_write_what_one_writes_and_stop_when_one_is_killed(models, alone, tmp_path, monkeypatch):
    done = torchrun(2, f"{EQUAL},killed", models, tmp_path)
    assert done.returncode == 1
    assert_equal(tmp_path, alone)
    came = json.loads((tmp_path / "killed-0.json").read_text())
    assert came["seconds"] < 30 and came["text"].startswith("Rank 1 of 2, on '") and "has died" in came["text"]
    kept = left(partial_folder(tmp_path / "killed"))
    assert 0 < sum(name.endswith(".safetensors") for name in kept) < 6 and not (tmp_path / "killed").exists()
    assert not any("unfinished" in name or name == "config.json" for name in kept)
    monkeypatch.chdir(models)
    rank_script.resumed(tmp_path)
    assert files(tmp_path / "killed") == files(alone / "killed")


def test_ranks_of_slurm_hear_of_an_error_and_go_on_with_another_number(models, alone, tmp_path):
    started = by_hand(2, "full,killed", models, tmp_path, SLURM_JOB_ID="7")
    codes = [(process.communicate(timeout=120), process.returncode)[1] for process in started]
    assert codes == [1, -signal.SIGKILL]
    first, second = noted(tmp_path, "full", 2)
    assert first["error"] == "MergeError" and first["text"].startswith("Rank 1 of 2: FileNotFoundError")
    assert second["error"] == "FileNotFoundError"
    came = json.loads((tmp_path / "killed-0.json").read_text())
    assert came["seconds"] < 40 and "Rank 1 of 2" in came["text"] and "has died" in came["text"]
    outputs = [process.communicate(timeout=120)[0] for process in by_hand(3, "resumed", models, tmp_path)]
    assert files(tmp_path / "killed") == files(alone / "killed"), outputs


SLOW = """
import os, time
if "HF_MERGE_PARENT" in os.environ:
    from hf_merge.writer import Writer
    write = Writer.write
    Writer.write = lambda self, *words: (time.sleep(float(os.environ["SLOW"])), write(self, *words))
"""


def command(tmp_path, models, *words, slow):
    (tmp_path / "sitecustomize.py").write_text(SLOW)
    call = [sys.executable, "-m", "hf_merge.cli", "merge", "--method", "linear", "a", *words, "--processes", "2"]
    words = {"SLOW": str(slow), "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"}
    environment = surroundings(**words, PYTHONDONTWRITEBYTECODE="1")  # else there is a __pycache__ beside that file
    return subprocess.Popen(
        call, cwd=models, env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


def test_command_starts_processes_and_says_everything_once(models, alone, tmp_path):
    small = ["--max-shard-size", "20KB"]
    merged = command(tmp_path, models, "b", str(tmp_path / "killed"), *small, slow=0)
    broken = command(tmp_path, models, "broken", str(tmp_path / "nan"), slow=0.1)
    said, errors = merged.communicate(timeout=120)
    assert merged.returncode == 0 and said.count("Merged") == 1 and errors == ""
    assert files(tmp_path / "killed") == files(alone / "killed")
    said, errors = broken.communicate(timeout=120)
    assert broken.returncode == 1 and errors.count("Error") == 1 and "Rank 1 of 2: 'model.norm.weight'" in errors
    assert left(tmp_path) == ["killed", "sitecustomize.py"]


def test_processes_end_with_the_command_however_it_ends(models, tmp_path):
    outputs = {signal.SIGINT: tmp_path / "interrupted", signal.SIGKILL: tmp_path / "killed"}
    started = {number: command(tmp_path, models, "b", str(output), "--max-shard-size", "20KB", slow=0.3)
               for number, output in outputs.items()}  # fmt: skip
    for number, process in started.items():
        folder = partial_folder(outputs[number])
        wait_until(lambda folder=folder: any(folder.glob("*.safetensors")))
        children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
        process.send_signal(number)
        _, errors = process.communicate(timeout=120)
        assert process.returncode == (130 if number == signal.SIGINT else -signal.SIGKILL) and len(children) == 2
        wait_until(lambda children=children: not any(Path(f"/proc/{child}").exists() for child in children))
        assert errors.count("Error") == 1 and "Traceback" not in errors and not outputs[number].exists(), errors


def wait_until(condition):
    for _ in range(1200):
        if condition():
            return
        time.sleep(0.05)
    raise AssertionError("it did not come within a minute")


@pytest.fixture
def clean(monkeypatch):
    for name in [*NAMES, "MASTER_ADDR", "MASTER_PORT", "SLURM_JOB_NODELIST", "SLURM_TASKS_PER_NODE", "SLURM_NODEID"]:
        monkeypatch.delenv(name, raising=False)
    return monkeypatch


def test_world_size_without_a_launcher_is_an_error(clean, llamas, tmp_path):
    clean.setenv("WORLD_SIZE", "2")
    with pytest.raises(MergeError, match=r"WORLD_SIZE=2 .* RANK, MASTER_ADDR, MASTER_PORT is not set.*torchrun"):
        hf_merge.merge([llamas["a"], llamas["b"]], tmp_path / "m", method="linear")
    clean.setenv("WORLD_SIZE", "two")
    with pytest.raises(MergeError, match="WORLD_SIZE is 'two', and should be a number"):
        hf_merge.merge([llamas["a"], llamas["b"]], tmp_path / "m", method="linear")
    assert not list(tmp_path.iterdir())


def test_rank_whose_state_knows_of_no_others_is_an_error(clean, llamas, tmp_path):
    from accelerate import PartialState

    PartialState()
    for name, value in {"WORLD_SIZE": "2", "RANK": "0", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}.items():
        clean.setenv(name, value)
    try:
        with pytest.raises(MergeError, match=r"one of 2 processes, but torch.distributed knows of 1: .*cpu=True"):
            hf_merge.merge([llamas["a"], llamas["b"]], tmp_path / "m", method="linear")
    finally:
        PartialState._reset_state()


def test_a_push_without_an_output_is_for_one_process(clean, llamas):
    team = ranks.Team()
    team.world = 2
    token = ranks._current.set(team)
    try:
        with pytest.raises(OutputError, match="2 processes merge into a folder that all of them see"):
            hf_merge.merge([llamas["a"]], push_to_hub="me/m", method="linear")
    finally:
        ranks._current.reset(token)


@pytest.mark.parametrize(
    ("said", "found"),
    [
        ({}, launching.Environment()),
        ({"WORLD_SIZE": "1", "SLURM_NTASKS": "4", "SLURM_PROCID": "3"}, launching.Environment("torchrun", 1, 0, 0, 1)),
        ({"SLURM_NTASKS": "4"}, launching.Environment()),
        ({"SLURM_NTASKS": "4", "SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "1"}, launching.Environment("srun", 1)),
        (
            {"SLURM_NTASKS": "7", "SLURM_PROCID": "6", "SLURM_LOCALID": "2", "SLURM_TASKS_PER_NODE": "2(x2),3",
             "SLURM_NODEID": "2"},
            launching.Environment("SLURM", 7, 6, 2, 3),
        ),
        (
            {"OMPI_COMM_WORLD_SIZE": "3", "OMPI_COMM_WORLD_RANK": "2", "OMPI_COMM_WORLD_LOCAL_RANK": "1"},
            launching.Environment("Open MPI", 3, 2, 1, 3),
        ),
    ],
)  # fmt: skip
def test_environments_are_read(clean, said, found):
    for name, value in said.items():
        clean.setenv(name, value)
    assert launching.environment() == found


@pytest.mark.parametrize(
    ("nodes", "first"), [("gpu[03-07,12],cpu1", "gpu03"), ("a,b", "a"), ("n-1", "n-1"), ("r[1,3]n[2-4]", "r1n2")]
)
def test_the_first_host_of_slurm_is_found(clean, nodes, first):
    clean.setenv("SLURM_JOB_NODELIST", nodes)
    assert launching._slurm_host() == first


@pytest.mark.parametrize("size", ["20KB", "60KB", "5GB"])
@pytest.mark.parametrize("world", [1, 2, 3, 5, 50])
def test_every_tensor_has_one_rank_and_bytes_are_even(clean, llamas, world, size):
    plan = hf_merge.plan([llamas["a"], llamas["b"]], method="linear", max_shard_size=size)
    parts = ranks.split(plan, world)
    assert len(parts) == world and sorted(name for part in parts for name in part) == sorted(plan.specs)
    sizes = [sum(plan.specs[name].nbytes for name in part) for part in parts]
    largest = max(spec.nbytes for spec in plan.specs.values())
    assert max(sizes) <= plan.bytes_written / world * (1 + 2 * ranks._SLACK) + largest
    left_out = ranks.split(plan, world, finished=[*plan.shards][:1])
    assert not set().union(*left_out) & {*next(iter(plan.shards.values()))}


def test_files_of_nearly_the_same_size_are_not_cut(clean, tmp_path):
    save_file({f"w{i}": torch.zeros(50 + i) for i in range(4)}, tmp_path / "m.safetensors")
    plan = hf_merge.plan([tmp_path / "m.safetensors"], method="linear", max_shard_size=420)
    assert [*map(set, ranks.split(plan, 2))] == [{"w0", "w1"}, {"w2", "w3"}]
    assert len(plan.shards) == 2


def test_fingerprints_name_kinds_of_devices(clean, llamas):
    from dataclasses import replace

    plan = hf_merge.plan([llamas["a"]], method="linear")
    on = [replace(plan, steps=tuple(replace(step, device=device) for step in plan.steps)).fingerprint()
          for device in ("cpu", "cuda:0", "cuda:3")]  # fmt: skip
    assert on[0] != on[1] == on[2]
