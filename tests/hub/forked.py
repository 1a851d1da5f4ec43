"""Processes of their own, forked from one that has imported torch: its import is most of what a small merge takes.

A fork has the environment, arguments and streams of `python ...`, and imports everything else anew: huggingface_hub
reads where the Hub is when it is imported.
"""

from __future__ import annotations

import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile
import types
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch

_forks = multiprocessing.get_context("forkserver")
_forks.set_forkserver_preload(["torch"])


def run(words: Sequence[str], environment: Mapping[str, str], timeout: float) -> subprocess.CompletedProcess[str]:
    """Run `python -m MODULE ...` or `python -c CODE ...`; a UserWarning is an error.

    Args:
        words: what stands behind `python`.
        environment: the whole environment of the process.
        timeout: seconds until it is killed.

    Raises:
        subprocess.TimeoutExpired: it was killed.
    """
    with tempfile.TemporaryDirectory() as folder:
        process = _forks.Process(target=_main, args=(list(words), dict(environment), folder))
        process.start()
        process.join(timeout)
        if process.exitcode is None:
            process.kill()
            process.join()
            raise subprocess.TimeoutExpired(list(words), timeout)
        out, err = (Path(folder, name).read_text(encoding="utf-8") for name in ("out", "err"))
        return subprocess.CompletedProcess(list(words), process.exitcode, out, err)


def _main(words: list[str], environment: dict[str, str], folder: str) -> None:
    os.environ.clear()
    os.environ.update(environment)
    for stream, name in ((1, "out"), (2, "err")):
        os.dup2(os.open(Path(folder, name), os.O_WRONLY | os.O_CREAT | os.O_APPEND), stream)
    if threads := environment.get("OMP_NUM_THREADS"):  # too late for torch to read it
        torch.set_num_threads(int(threads))
    warnings.filterwarnings("error", category=UserWarning)
    kind, what, *arguments = words
    sys.argv = [kind, *arguments]
    if kind == "-m":
        runpy.run_module(what, run_name="__main__", alter_sys=True)
    else:
        sys.modules["__main__"] = main = types.ModuleType("__main__")
        exec(compile(what, "<string>", "exec"), main.__dict__)
