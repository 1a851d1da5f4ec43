"""Run a Python snippet in a fresh process and measure it from outside; the floor that merges are compared with."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread

_EVERY = 0.02  # seconds between looks at the memory


@dataclass(frozen=True)
class Run:
    """What one process took.

    Attributes:
        wall: seconds from its start to its end.
        cpu: seconds of its user and system time.
        anonymous: peak bytes of memory that no file backs; NaN where there is no /proc.
        output: what it printed.
    """

    wall: float
    cpu: float
    anonymous: float
    output: str


def run_python(code: str, *arguments: str) -> Run:
    """Run `python -c code arguments...` in a fresh process.

    Raises:
        RuntimeError: it failed; the message ends with its last lines.
    """
    begin = time.perf_counter()
    process = subprocess.Popen(
        [sys.executable, "-c", code, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        env={**os.environ, "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "1"},
    )  # fmt: skip
    ended, peak = Event(), [float("nan")]
    watcher = Thread(target=_watch, args=(process.pid, ended, peak))
    watcher.start()
    before = os.times()
    output, errors = process.communicate()
    wall, after = time.perf_counter() - begin, os.times()
    ended.set()
    watcher.join()
    if process.returncode:
        raise RuntimeError(f"A measured process failed:\n{errors[-2000:]}")
    cpu = after.children_user - before.children_user + after.children_system - before.children_system
    return Run(wall, cpu, peak[0], output)


def _watch(pid: int, ended: Event, peak: list[float]) -> None:
    """Look at a process's anonymous memory until it has ended, and keep the most that was seen."""
    status = Path(f"/proc/{pid}/status")
    while not ended.wait(_EVERY):
        try:
            lines = status.read_text().splitlines()
        except OSError:
            return
        seen = next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), 0.0)
        peak[0] = seen if seen > peak[0] or peak[0] != peak[0] else peak[0]


_FLOOR = """
import os, sys
output, size, *inputs = sys.argv[1:]
buffer = memoryview(bytearray(1 << 22))
target, left = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644), int(size)
for file in [os.open(path, os.O_RDONLY) for path in inputs]:
    while os.readv(file, [buffer]):
        if left:
            left -= os.write(target, buffer[:left])
while left:
    left -= os.write(target, buffer[:left])
os.fsync(target)
"""


def run_floor(inputs: Sequence[Path], output: Path) -> Run:
    """Read the weights of all `inputs` once and write as many bytes as one of them has; `output` is removed again."""
    files = [sorted(folder.glob("*.safetensors")) for folder in inputs]
    size = sum(file.stat().st_size for file in files[0])
    done = run_python(_FLOOR, str(output), str(size), *(str(file) for held in files for file in held))
    output.unlink()
    return done


def run_command(*arguments: str, threads: int) -> Run:
    """Run `hf-merge` in a fresh process that may use so many threads, or start others that share them."""
    code = "import sys, torch; torch.set_num_threads(int(sys.argv.pop(1))); from hf_merge.cli import main; main()"
    return run_python(code, str(threads), *arguments)
