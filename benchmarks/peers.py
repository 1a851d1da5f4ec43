"""The peers of a merge: a plain copy of the same bytes, a loop in plain torch, and MergeKit.

MergeKit lives in a virtual environment of its own and is run by its command line, with the recipe that hf_merge gets.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Sequence
from importlib.metadata import version
from pathlib import Path

from benchmarks.cases import COPY, LOOP, MERGEKIT, Way, python_imports
from benchmarks.loops import LOOPS
from benchmarks.processes import Run, measure, run_python

VERSION = "0.1.5"
"""Of MergeKit."""

_COPY = """
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


def run_copy(inputs: Sequence[Path], output: Path) -> Run:
    """Read the weights of all `inputs` once and write as many bytes as one of them has; `output` is removed again."""
    files = [sorted(folder.glob("*.safetensors")) for folder in inputs]
    size = sum(file.stat().st_size for file in files[0])
    done = run_python(_COPY, str(output), str(size), *(str(file) for held in files for file in held))
    output.unlink()
    return done


def copy_way(inputs: Sequence[Path], scratch: Path) -> Way:
    """Return the floor: no merge reads less and writes less."""
    return Way(COPY, lambda: run_copy(inputs, scratch / "copied"))


def loop_way(method: str, inputs: Sequence[Path], scratch: Path) -> Way | None:
    """Return what a short script does: load all, a formula over the state dicts, save; None where there is none."""
    if method not in LOOPS:
        return None
    words = [str(scratch / "looped"), *map(str, inputs)]
    imports = python_imports("transformers.models.llama.modeling_llama")
    return Way(LOOP, removing(scratch / "looped", lambda: run_python(LOOPS[method], *words)), imports)


def mergekit_way(recipe: Path, venv: Path, scratch: Path) -> Way:
    """Return MergeKit's own command, with the same recipe."""
    output = scratch / "merged-by-mergekit"
    run = removing(output, lambda: run_mergekit(venv, str(recipe), str(output), "--no-copy-tokenizer"))
    return Way(MERGEKIT, run, mergekit_imports(venv), slow=True)


def mergekit_imports(venv: Path) -> tuple[str, ...]:
    """Return the command that makes the imports of MergeKit's command, and ends."""
    return str(venv / "bin" / "python"), "-c", "import mergekit.scripts.run_yaml"


def run_mergekit(venv: Path, *arguments: str) -> Run:
    """Run `mergekit-yaml`; it sees nothing of this process's Python."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTHON")}
    return measure([str(venv / "bin" / "mergekit-yaml"), *arguments], environment)


def removing(output: Path, run: Callable[[], Run]) -> Callable[[], Run]:
    """Run, and remove what was made; its removal is not measured."""

    def run_and_remove() -> Run:
        try:
            return run()
        finally:
            shutil.rmtree(output, ignore_errors=True)

    return run_and_remove


def installed_mergekit(venv: Path) -> str | None:
    """Return the version of MergeKit in a virtual environment, None if it has none."""
    found = [path.name.split("-")[1] for path in venv.glob("lib/python*/site-packages/mergekit-*.dist-info")]
    return found[0].removesuffix(".dist") if found and (venv / "bin" / "mergekit-yaml").is_file() else None


def prepare_mergekit(venv: Path) -> None:
    """Install MergeKit into a virtual environment, which is made, unless it is there already.

    torch comes first, alone, in the version that hf_merge uses: where the machine offers a CPU build, it is taken.

    Raises:
        RuntimeError: it cannot be installed, or the folder is something else.
    """
    if installed_mergekit(venv):
        return
    if venv.exists() and any(venv.iterdir()) and not (venv / "pyvenv.cfg").is_file():
        raise RuntimeError(f"'{venv}' is no virtual environment: name an empty folder, or one that is not there.")
    print(f"installing MergeKit {VERSION} into {venv}", file=sys.stderr)
    _install([sys.executable, "-m", "venv", str(venv)])
    pip = [str(venv / "bin" / "python"), "-m", "pip", "--disable-pip-version-check", "install", "--quiet"]
    _install([*pip, f"torch=={version('torch').partition('+')[0]}"])
    _install([*pip, f"mergekit=={VERSION}"])


def _install(command: Sequence[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(
            f"MergeKit cannot be installed, `{' '.join(command)}` failed; leave --mergekit out, or name the folder of "
            f"a virtual environment that has it:\n{(done.stderr or done.stdout)[-1000:]}"
        )
