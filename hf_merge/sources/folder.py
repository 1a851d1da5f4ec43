"""A model's folder: its files by name, relative to it, wherever they are."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from hf_merge.errors import SourceError, shown
from hf_merge.sources.weights import PICKLES, WeightFile, open_weights

_WEIGHTS = {".safetensors", *PICKLES, ".h5", ".msgpack", ".ot", ".onnx", ".onnx_data", ".gguf", ".tflite", ".npz"}
_NOT_COMPANIONS = {
    "README.md",
    "config.json",
    "adapter_config.json",
    "hf_merge_recipe.yaml",
    "mergekit_config.yml",
    "trainer_state.json",
}
_OTHER_FORMATS = {"onnx", "openvino", "coreml"}


class Folder:
    """The files of a model on this machine.

    Args:
        path: where they are.

    Attributes:
        gated: whether the Hub asks for consent before it gives them away.
    """

    gated = False

    def __init__(self, path: Path):
        self.path = path

    def __contains__(self, name: str) -> bool:
        return (self.path / name).is_file()

    def names(self, below: str = "") -> list[str]:
        """Name the files that lie directly in a folder, or in one below it."""
        folder = self.path / below
        names = sorted(entry.name for entry in os.scandir(folder) if entry.is_file()) if folder.is_dir() else []
        return [f"{below}/{name}" if below else name for name in names]

    def all_names(self) -> list[str]:
        """Name every file."""
        return [path.relative_to(self.path).as_posix() for path in sorted(self.path.rglob("*")) if path.is_file()]

    def paths(self, names: Sequence[str]) -> list[Path]:
        """Return where files are, once they are here.

        Raises:
            SourceError: one cannot be had.
        """
        return [self.path / name for name in names]

    def open_weights(self, names: Sequence[str]) -> list[WeightFile]:
        """Open files of weights; of their contents, headers are read.

        Raises:
            SourceError: one is not whole, or a pickle that would run code.
        """
        return [open_weights(path) for path in self.paths(names)]

    def identity(self, name: str) -> str | None:
        """Return what equal files have in common, if it is known without reading them."""
        return None

    def companions(self) -> list[str]:
        """Name the files of a model that are neither its weights, its card nor its config.json."""
        return [name for name in self.all_names() if _is_companion(name)]


def _is_companion(name: str) -> bool:
    *folders, last = name.split("/")
    hidden = any(part.startswith((".", "checkpoint-")) or part in _OTHER_FORMATS for part in (*folders, last))
    weights = os.path.splitext(last)[1] in _WEIGHTS or last.endswith(".index.json")
    return not hidden and not weights and not (not folders and last in _NOT_COMPANIONS)


def module_folders(folder: Folder) -> list[str]:
    """Name the folders of a sentence-transformers model's modules.

    They are those in modules.json, and those that a router among them chooses from.
    """
    found = _json_or_nothing(folder, "modules.json")
    parts = [part.get("path") for part in found if isinstance(part, dict)] if isinstance(found, list) else []
    listed = [part.strip("/") for part in parts if isinstance(part, str)]
    for name in tuple(listed):
        router = _json_or_nothing(folder, f"{name}/router_config.json".strip("/"))
        routes = router.get("types") if isinstance(router, dict) else None
        listed += [f"{name}/{route}".strip("/") for route in routes] if isinstance(routes, dict) else []
    return [name for name in dict.fromkeys(listed) if name and ".." not in Path(name).parts]


def _json_or_nothing(folder: Folder, name: str) -> Any:
    """Read a file that is copied whatever it says, so that nothing is demanded of it."""
    try:
        return read_json(folder.paths([name])[0]) if name in folder else None
    except SourceError:
        return None


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        SourceError: it is not JSON, or holds something else.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise SourceError(f"'{path}' should hold an object ({{..}}); found {shown(content)}.")
    return content


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        SourceError: it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"'{path}' is not JSON: {error}.") from None
