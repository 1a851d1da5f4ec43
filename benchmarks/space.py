"""What a large merge takes of the Space's server: `python -m benchmarks.space [--hidden 2048 --layers 22 --models 3]`.

The Hub of the tests holds synthetic models in shards; the Space's server merges them straight into it, asked as a
program asks. Sampled are the server's memory beyond its start (anonymous, and with pages of files) and the disk that
its folders take.
"""

from __future__ import annotations

import argparse
import math
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import yaml
from gradio_client import Client

from benchmarks.checkpoints import checkpoints, llama_config, llama_shapes
from benchmarks.tables import table
from tests.hub.server import Hub
from tests.hub.store import Token
from tests.space.serving import app_of
from tests.space.steps import put

OWNER = "alice"
EVERY = 0.2


class Watched:
    """The largest memory and disk of a server while it works."""

    def __init__(self, pid: int, folders: Sequence[Path]):
        self._process, self._folders, self._over = psutil.Process(pid), folders, threading.Event()
        self.start, self.anonymous, self.resident, self.disk = self._memory(), 0, 0, 0
        self._thread = threading.Thread(target=self._watch, daemon=True)

    def __enter__(self) -> Watched:
        self._thread.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._over.set()
        self._thread.join()

    def _memory(self) -> tuple[int, int]:
        told = self._process.memory_info()
        return told.rss - told.shared, told.rss

    def _watch(self) -> None:
        while not self._over.wait(EVERY):
            anonymous, resident = self._memory()
            self.anonymous = max(self.anonymous, anonymous - self.start[0])
            self.resident = max(self.resident, resident - self.start[1])
            self.disk = max(self.disk, sum(_size(folder) for folder in self._folders))


def _size(folder: Path) -> int:
    """Return the bytes under a folder; files come and go meanwhile."""
    total = 0
    for path in folder.rglob("*"):
        try:
            total += path.stat().st_size if path.is_file() and not path.is_symlink() else 0
        except OSError:
            continue
    return total


def main(arguments: Sequence[str] | None = None) -> str:
    """Merge, and return what it took as a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    for name, default in (("hidden", 2048), ("layers", 22), ("models", 3)):
        parser.add_argument(f"--{name}", type=int, default=default)
    options = parser.parse_args(arguments)
    shapes = llama_shapes(options.hidden, options.layers)
    with tempfile.TemporaryDirectory() as scratch, Hub() as hub:
        hub.store.tokens[f"hf_{OWNER}"] = Token(OWNER, write=True)
        config = llama_config(options.hidden, options.layers)
        folders = checkpoints(Path(scratch), shapes, options.models - 1, config)
        names = [put(hub, f"{OWNER}/{folder.name}", folder) for folder in folders]
        work = Path(scratch) / "space"
        app = app_of(hub, work).start()
        try:
            recipe = yaml.safe_dump({"merge_method": "linear", "models": names})
            client = Client(app.url, verbose=False)
            client.predict(recipe, api_name="/check")  # so that what is imported once counts as the start
            with Watched(app.pid, [work / "jobs", work / "home"]) as seen:
                begin = time.monotonic()
                words = {"repo_id": f"{OWNER}/merged", "private": True}
                headers = {"authorization": f"Bearer hf_{OWNER}"}
                answer = Client(app.url, verbose=False, headers=headers).predict(
                    recipe, api_name="/merge_and_push", **words
                )
                seconds = time.monotonic() - begin
        finally:
            app.stop()
    size = 2 * sum(math.prod(shape) for shape in shapes.values())
    taken = [f"{each / 1e6:.0f} MB" for each in (seen.anonymous, seen.resident, seen.disk)]
    said = str(answer.get("error", "merged"))
    row = [str(options.models), f"{size / 1e9:.2f} GB", f"{seconds:.0f} s", *taken, said]
    return table(["models", "each", "wall", "anonymous memory", "resident memory", "disk", "answer"], [row])


if __name__ == "__main__":
    print(main())
