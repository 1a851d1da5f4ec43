"""Run a command in a fresh process and measure it from outside."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from threading import Event, Thread

_EVERY = 0.02  # seconds between looks at the memory
_QUIET = {"HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_OFFLINE": "1"}
_COMMAND = "from hf_merge.cli import main; main()"


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
    """Run `python -c code arguments...`; see `measure`."""
    return measure([sys.executable, "-c", code, *arguments])


def run_command(*arguments: str, threads: int | None = None) -> Run:
    """Run `hf-merge`, which may use so many threads, or start others that share them; see `measure`."""
    if threads is None:
        return run_python(_COMMAND, *arguments)
    limited = f"import sys, torch; torch.set_num_threads(int(sys.argv.pop(1))); {_COMMAND}"
    return run_python(limited, str(threads), *arguments)


def measure(command: Sequence[str], environment: Mapping[str, str] | None = None) -> Run:
    """Run a command in a fresh process; what it says beside its output, progress bars too, goes to a file.

    Args:
        command: the words of it.
        environment: instead of that of this process.

    Raises:
        RuntimeError: it failed; the message ends with its last lines.
    """
    with tempfile.TemporaryFile("w+", errors="replace") as said:
        begin, before = time.perf_counter(), os.times()
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=said, text=True,
            env={**(os.environ if environment is None else environment), **_QUIET},
        )  # fmt: skip
        with _Watch(process.pid) as watch:
            output, _ = process.communicate()
            wall, after = time.perf_counter() - begin, os.times()
        if process.returncode:
            said.seek(0)
            raise RuntimeError(f"A measured process failed, {command[0]}:\n{said.read()[-2000:]}")
    cpu = after.children_user - before.children_user + after.children_system - before.children_system
    return Run(wall, cpu, watch.peak, output)


class _Watch:
    """Looks at a process's anonymous memory until it has ended; `peak` is the most that was seen."""

    def __init__(self, pid: int):
        self.peak = float("nan")
        self._status, self._ended = Path(f"/proc/{pid}/status"), Event()
        self._thread = Thread(target=self._look)

    def __enter__(self) -> _Watch:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._thread.join()

    def _look(self) -> None:
        while not self._ended.wait(_EVERY):
            try:
                lines = self._status.read_text().splitlines()
            except OSError:
                return
            seen = next((1024.0 * int(line.split()[1]) for line in lines if line.startswith("RssAnon:")), 0.0)
            self.peak = seen if seen > self.peak or self.peak != self.peak else self.peak
