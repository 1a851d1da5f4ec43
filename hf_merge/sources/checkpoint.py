"""Checkpoints on disk and on the Hub as sources: safetensors or PyTorch files, one or many."""

from __future__ import annotations

import json
import math
import mmap
import pickle
import re
import shutil
import warnings
from collections.abc import Iterator, Mapping
from functools import cached_property
from pathlib import Path
from typing import Any, Protocol

import torch
from huggingface_hub import ModelCardData
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hf_merge.errors import SourceError, shown
from hf_merge.sources.base import Source, stored_once
from hf_merge.sources.cards import read_card
from hf_merge.types import SAFETENSORS_DTYPES, TensorSpec

PICKLES = (".bin", ".pth", ".pt", ".ckpt")
MAX_HEADER = 25_000_000
"""Bytes; the header of 100,000 tensors has 15 MB."""

_WEIGHTS = {".safetensors", *PICKLES, ".h5", ".msgpack", ".ot", ".onnx", ".onnx_data", ".gguf", ".tflite", ".npz"}
_NOT_COMPANIONS = {"README.md", "config.json", "hf_merge_recipe.yaml", "mergekit_config.yml", "trainer_state.json"}
_OTHER_FORMATS = {"onnx", "openvino", "coreml"}
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})$")
_USUAL_STEMS = {"model", "pytorch_model", "adapter_model"}  # beside these, README.md is the card
_WRAPPERS = ("state_dict", "model", "module", "model_state_dict")


class _File(Protocol):
    """One file of weights."""

    shared: Mapping[str, str]

    def specs(self) -> dict[str, TensorSpec]: ...

    def tensor(self, name: str) -> Tensor: ...


class _Safetensors:
    """A safetensors file, mapped; its header was checked by safetensors when it was opened."""

    shared: Mapping[str, str] = {}

    def __init__(self, path: Path):
        self._path = path
        try:
            _refuse_large_header(path)
            with safe_open(path, framework="np"):
                pass
            header, self._bytes = _map(path)
        except (SafetensorError, OSError, ValueError, RecursionError) as error:
            raise SourceError(
                f"'{path}' is not a whole safetensors file ({error}): download or write it again."
            ) from None
        self._places = {name: (place["data_offsets"], place) for name, place in header.items()}

    def specs(self) -> dict[str, TensorSpec]:
        ordered = sorted(self._places.items(), key=lambda item: item[1][0])
        return {
            name: TensorSpec(self._shape(name, p["shape"]), self._dtype(name, p["dtype"])) for name, (_, p) in ordered
        }

    def _shape(self, name: str, shape: list[int]) -> tuple[int, ...]:
        if math.prod(max(size, 1) for size in shape) >= 1 << 63:
            raise SourceError(f"'{name}' in '{self._path}' has the shape {shape}, which torch cannot hold.")
        return tuple(shape)

    def _dtype(self, name: str, word: str) -> torch.dtype:
        if word not in SAFETENSORS_DTYPES:
            raise SourceError(f"'{name}' in '{self._path}' has the dtype {word}, which torch lacks: convert it first.")
        return SAFETENSORS_DTYPES[word]

    def tensor(self, name: str) -> Tensor:
        (begin, end), place = self._places[name]
        dtype, values = SAFETENSORS_DTYPES[place["dtype"]], self._bytes[begin:end]
        aligned = values.storage_offset() % dtype.itemsize == 0
        return (values if aligned else values.clone()).view(dtype).view(place["shape"])


class _Pickle:
    """A PyTorch file, mapped where its format allows; only tensors are read from it, never code."""

    def __init__(self, path: Path):
        self._tensors = {name: t for name, t in _unwrapped(_load_pickle(path)).items() if isinstance(t, Tensor)}
        if not self._tensors:
            raise SourceError(f"'{path}' holds no tensors by name: save a model's state_dict().")
        self.shared: Mapping[str, str] = stored_once(self._tensors)

    def specs(self) -> dict[str, TensorSpec]:
        return {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in self._tensors.items()}

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name].detach()


class _InFolder:
    """A file of weights of a further module; its tensors carry the name of its folder."""

    def __init__(self, file: _File, folder: str):
        self._file, self._prefix = file, f"{folder}/"
        self.shared: Mapping[str, str] = {
            self._prefix + name: self._prefix + other for name, other in file.shared.items()
        }

    def specs(self) -> dict[str, TensorSpec]:
        return {self._prefix + name: spec for name, spec in self._file.specs().items()}

    def tensor(self, name: str) -> Tensor:
        return self._file.tensor(name.removeprefix(self._prefix))


class Checkpoint(Source):
    """A folder in the layout of `save_pretrained` or of sentence-transformers, or one file of weights.

    Args:
        path: the folder or file.
        label: how messages call it.
        public_id: its id on the Hub, if it comes from there.
        revision: the commit, if it comes from there.
    """

    def __init__(self, path: Path, label: str, *, public_id: str | None = None, revision: str | None = None):
        self.label, self.public_id, self.revision = label, public_id, revision
        self.path = path
        further = module_weights(path) if path.is_dir() else {}
        self.folders = tuple(further)
        self._paths = [path] if path.is_file() else _own_weights(path, label, alone=not further)
        self._files = [open_weights(file) for file in self._paths]
        modules: list[_File] = [
            _InFolder(open_weights(file), name) for name, files in further.items() for file in files
        ]
        self._files = [*self._files, *modules]
        self._all_paths = [*self._paths, *(file for files in further.values() for file in files)]
        self._file_of: dict[str, _File] = {}
        specs: dict[str, TensorSpec] = {}
        for file in self._files:
            found = file.specs()
            specs.update(found)
            self._file_of.update(dict.fromkeys(found, file))
        self.specs = specs
        self.shared = {name: other for file in self._files for name, other in file.shared.items()}
        self._check_index()

    def _check_index(self) -> None:
        """A shard that lacks what the index promises was written half, or belongs to another model."""
        if not self._paths:
            return
        index = self._paths[0].with_name(f"{_SHARD.sub('', self._paths[0].stem)}{self._paths[0].suffix}.index.json")
        promised = read_json(index)["weight_map"] if len(self._paths) > 1 and index.is_file() else {}
        if lacking := [name for name in promised if name not in self.specs]:
            raise SourceError(f"'{self.label}' lacks {lacking[0]}, which its index names: download its shards again.")

    def __getitem__(self, name: str) -> Tensor:
        return self._file_of[name].tensor(name)

    @cached_property
    def config(self) -> Mapping[str, Any]:  # type: ignore[override]
        path = self.path / "config.json"
        return _checked_config(read_object(path), path) if path.is_file() else {}

    @cached_property
    def card_data(self) -> ModelCardData | None:  # type: ignore[override]
        alone = self.path.is_file() and self.path.stem not in _USUAL_STEMS
        return None if alone else read_card(self.path.parent if self.path.is_file() else self.path, self.public_id)

    def fingerprint(self) -> str:
        """Sizes and times of the files, or the commit."""
        if self.revision:
            return f"{self.public_id}@{self.revision}"
        stats = [(path.name, path.stat()) for path in self._all_paths]
        return json.dumps([[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats])

    def write_companions(self, folder: Path) -> None:
        for file in companions(self.path) if self.path.is_dir() else ():
            target = folder / file.relative_to(self.path)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target)


def _refuse_large_header(path: Path) -> None:
    """Look at the length of a header before anybody reads it."""
    with path.open("rb") as file:
        size, whole = int.from_bytes(file.read(8), "little"), path.stat().st_size
    if size > MAX_HEADER or size + 8 > whole:
        raise ValueError(f"it says that its header has {size} bytes, of {min(whole, MAX_HEADER)} that it may have")


def _map(path: Path) -> tuple[dict[str, Any], Tensor]:
    """Return a safetensors file's header and its bytes, mapped for reading.

    safetensors' own mapping is private and writable, so that the kernel refuses files larger than the memory.
    """
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    size = int.from_bytes(mapped[:8], "little")
    header = json.loads(mapped[8 : 8 + size])
    header.pop("__metadata__", None)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")  # nobody writes to it
        return header, torch.frombuffer(mapped, dtype=torch.uint8)[8 + size :]


def open_weights(path: Path) -> _File:
    """Open one file of weights by its kind.

    Raises:
        SourceError: not whole, not readable, or a pickle that would run code.
    """
    if path.suffix in PICKLES:
        return _Pickle(path)
    if path.suffix == ".safetensors":
        return _Safetensors(path)
    raise SourceError(f"'{path}' is no file of weights: hf_merge reads .safetensors, {', '.join(PICKLES)}.")


def find_weights(folder: Path, label: str) -> list[Path]:
    """List the files of weights of a folder in order: safetensors before pickles, a single file before shards.

    Raises:
        SourceError: there are none, or one that the index names is missing.
    """
    for single in (
        "model.safetensors",
        "model.safetensors.index.json",
        "pytorch_model.bin",
        "pytorch_model.bin.index.json",
    ):
        path = folder / single
        if path.is_file():
            return _indexed(path) if path.suffix == ".json" else [path]
    if (folder / "adapter_config.json").is_file():
        raise SourceError(f"'{label}' is a PEFT adapter: name it after its base, as 'base+{label}'.")
    for suffixes in ((".safetensors",), PICKLES):
        found = sorted(
            path for path in folder.iterdir() if path.suffix in suffixes and path.name not in _TRAINING_STATE
        )
        if found:
            return _alone_or_shards(found, label)
    raise SourceError(f"'{label}' holds no weights: there is no .safetensors, .bin or .pth file in '{folder}'.")


_TRAINING_STATE = {
    "optimizer.bin",
    "optimizer.pt",
    "scheduler.pt",
    "scheduler.bin",
    "training_args.bin",
    "rng_state.pth",
}


def _own_weights(folder: Path, label: str, *, alone: bool) -> list[Path]:
    """List a folder's own files of weights; beside modules with weights there may be none."""
    if not alone and not any(path.suffix in (".safetensors", *PICKLES) for path in folder.iterdir()):
        return []
    return find_weights(folder, label)


def module_weights(folder: Path) -> dict[str, list[Path]]:
    """List the files of weights of a sentence-transformers model's further modules by the names of their folders."""
    found: dict[str, list[Path]] = {}
    for name in module_folders(folder):
        path = folder / name
        if path.is_dir() and any(file.suffix in (".safetensors", *PICKLES) for file in path.iterdir()):
            found[name] = find_weights(path, str(path))
    return found


def module_folders(folder: Path) -> list[str]:
    """Name the folders of modules: those in modules.json, and those that a router among them chooses from."""
    found = _json_or_nothing(folder / "modules.json")
    parts = [part.get("path") for part in found if isinstance(part, dict)] if isinstance(found, list) else []
    listed = [part.strip("/") for part in parts if isinstance(part, str)]
    for name in tuple(listed):
        router = _json_or_nothing(folder / name / "router_config.json")
        routes = router.get("types") if isinstance(router, dict) else None
        listed += [f"{name}/{route}".strip("/") for route in routes] if isinstance(routes, dict) else []
    return [name for name in dict.fromkeys(listed) if name and ".." not in Path(name).parts]


def _json_or_nothing(path: Path) -> Any:
    """Read a file that is copied whatever it says, so that nothing is demanded of it."""
    try:
        return read_json(path) if path.is_file() else None
    except SourceError:
        return None


def _indexed(index: Path) -> list[Path]:
    """Return the shards an index names, each once, in its order of names."""
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"'{index}' has no 'weight_map': it is not an index of shards.")
    if not all(isinstance(name, str) and len(name) < 256 for name in weight_map.values()):
        raise SourceError(f"'{index}' should name a file for every tensor in its 'weight_map'.")
    paths = [index.parent / name for name in sorted(set(weight_map.values()))]
    if any(path.parent != index.parent for path in paths):
        raise SourceError(f"'{index}' names shards outside of its folder.")
    missing = [path.name for path in paths if not path.is_file()]
    if missing:
        raise SourceError(f"'{index.parent}' lacks {', '.join(missing)}, which its index names: download them again.")
    return paths


def _alone_or_shards(found: list[Path], label: str) -> list[Path]:
    """Accept a single file, or shards numbered 1 to N of N."""
    numbers = [_SHARD.search(path.stem) for path in found]
    if len(found) == 1 and numbers[0] is None:
        return found
    of = {int(number[2]) for number in numbers if number}
    if None not in numbers and len(of) == 1 and len(found) == next(iter(of)):
        return found
    names = ", ".join(path.name for path in found)
    raise SourceError(
        f"'{label}' holds {names} and no index that says which belong together: name one file, or add it."
    )


def companions(folder: Path) -> Iterator[Path]:
    """Yield the files of a model that are neither its weights, its card nor its config.json."""
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        hidden = any(part.startswith((".", "checkpoint-")) or part in _OTHER_FORMATS for part in parts)
        weights = path.suffix in _WEIGHTS or path.name.endswith(".index.json")
        known = len(parts) == 1 and path.name in _NOT_COMPANIONS
        if path.is_file() and not hidden and not known and not weights:
            yield path


def read_object(path: Path) -> dict[str, Any]:
    """Read a JSON file that holds an object.

    Raises:
        SourceError: it is not JSON, or holds something else.
    """
    content = read_json(path)
    if not isinstance(content, dict):
        raise SourceError(f"'{path}' should hold an object ({{..}}); found {shown(content)}.")
    return content


def _checked_config(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """Check what others read from a config."""
    names, kind = config.get("architectures"), config.get("model_type")
    if not (names is None or (isinstance(names, list) and all(isinstance(name, str) for name in names))):
        raise SourceError(f"'architectures' in '{path}' should be a list of names of classes; found {shown(names)}.")
    if not isinstance(kind, (str, type(None))):
        raise SourceError(f"'model_type' in '{path}' should be a word; found {shown(kind)}.")
    return config


def read_json(path: Path) -> Any:
    """Read a JSON file.

    Raises:
        SourceError: it is not JSON.
    """
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise SourceError(f"'{path}' is not JSON: {error}.") from None


def _load_pickle(path: Path) -> Any:
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except pickle.UnpicklingError:
        raise SourceError(
            f"'{path}' is a pickle that would run code, so it was not loaded: ask its author for safetensors."
        ) from None
    except (RuntimeError, ValueError) as error:
        if "mmap" in str(error):
            return _load_legacy(path)
        raise SourceError(f"'{path}' is not a whole PyTorch file ({error}).") from None
    except (OSError, EOFError) as error:
        raise SourceError(f"'{path}' cannot be read ({error}).") from None


def _load_legacy(path: Path) -> Any:
    """Load a file of PyTorch before 1.6, which cannot be mapped."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise SourceError(
            f"'{path}' is not a PyTorch file that can be loaded without running code ({error})."
        ) from None


def _unwrapped(content: Any) -> Mapping[str, Any]:
    """Find the state dict in what was saved: itself, or under one of the usual keys."""
    while isinstance(content, Mapping) and not any(isinstance(v, Tensor) for v in content.values()):
        inner = next((content[key] for key in _WRAPPERS if isinstance(content.get(key), Mapping)), None)
        if inner is None:
            return {}
        content = inner
    return content if isinstance(content, Mapping) else {}
