"""Checkpoints on disk and on the Hub as sources: safetensors or PyTorch files, one or many."""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import ModelCardData
from torch import Tensor

from hf_merge.errors import SourceError, shown
from hf_merge.sources.base import Source
from hf_merge.sources.cards import read_card
from hf_merge.sources.folder import Folder, module_folders, read_json, read_object
from hf_merge.sources.remote import RemoteSafetensors
from hf_merge.sources.weights import PICKLES, WeightFile
from hf_merge.types import TensorSpec

_AT_A_TIME = 8
_SHARD = re.compile(r"-(\d{5})-of-(\d{5})$")
_USUAL_STEMS = {"model", "pytorch_model", "adapter_model"}  # beside these, README.md is the card
SINGLES = ("model.safetensors", "model.safetensors.index.json", "pytorch_model.bin", "pytorch_model.bin.index.json")
_TRAINING_STATE = {
    "optimizer.bin", "optimizer.pt", "scheduler.pt", "scheduler.bin", "training_args.bin", "rng_state.pth"
}  # fmt: skip


class Checkpoint(Source):
    """A folder in the layout of `save_pretrained` or of sentence-transformers, or one file of weights in a folder.

    Args:
        folder: the model's folder.
        label: how messages call it.
        file: the one file of weights that is meant, without what lies beside it.
        public_id: its id on the Hub, if it comes from there.
        revision: the commit, if it comes from there.

    Attributes:
        assumed_equal: pairs of tensors on the Hub of which samples are equal.
    """

    def __init__(
        self, folder: Folder, label: str, *, file: str = "", public_id: str | None = None, revision: str | None = None
    ):
        self.label, self.public_id, self.revision = label, public_id, revision
        self.folder, self._file, self.gated = folder, file, folder.gated
        modules = {} if file else _module_weights(folder)
        self.folders = tuple(modules)
        own = [file] if file else _own_weights(folder, label, alone=not modules)
        names = [(name, "") for name in own] + [(name, f"{m}/") for m, found in modules.items() for name in found]
        self._names = [name for name, _ in names]
        self._place: dict[str, tuple[WeightFile, str]] = {}
        specs: dict[str, TensorSpec] = {}
        shared: dict[str, str] = {}
        for weights, (_, prefix) in zip(folder.open_weights(self._names), names, strict=True):
            found = {prefix + name: (name, spec) for name, spec in weights.specs().items()}
            specs.update({name: spec for name, (_, spec) in found.items()})
            self._place.update({name: (weights, inner) for name, (inner, _) in found.items()})
            shared.update({prefix + name: prefix + other for name, other in weights.shared.items()})
            self.metadata = {**self.metadata, **weights.metadata}
        self.specs, self.shared = specs, shared
        self.assumed_equal: list[tuple[str, str]] = []
        self._check_index(own)

    @property
    def path(self) -> Path:
        """The folder, or the file."""
        return self.folder.path / self._file

    def _check_index(self, own: Sequence[str]) -> None:
        """A shard that lacks what the index promises was written half, or belongs to another model."""
        if len(own) < 2:
            return
        stem, suffix = os.path.splitext(own[0])
        index = f"{_SHARD.sub('', stem)}{suffix}.index.json"
        promised = read_json(self.folder.paths([index])[0])["weight_map"] if index in self.folder else {}
        if lacking := [name for name in promised if name not in self.specs]:
            raise SourceError(f"'{self.label}' lacks {lacking[0]}, which its index names: download its shards again.")

    def __getitem__(self, name: str) -> Tensor:
        file, inner = self._place[name]
        return file.tensor(inner)

    def pieces(self, name: str, runs: Sequence[tuple[int, int]]) -> list[Tensor]:
        file, inner = self._place[name]
        whole = list(runs) == [(0, self.specs[name].numel)]
        if isinstance(file, RemoteSafetensors) and file.streamed and not whole:
            with ThreadPoolExecutor(_AT_A_TIME) as pool:
                return list(pool.map(lambda run: file.read_run(inner, *run), runs))
        return super().pieces(name, runs)

    def place(self, name: str) -> tuple[WeightFile, str]:
        """Return the file that a tensor lies in, and its name there."""
        return self._place[name]

    def same_values(self, first: str, second: str) -> bool:
        """Tell whether two tensors of a kind are equal; of files on the Hub, samples are compared, and noted down."""
        (one, name), (other, also) = self._place[first], self._place[second]
        if not isinstance(one, RemoteSafetensors) or not isinstance(other, RemoteSafetensors):
            return torch.equal(self[first], self[second])
        if one.samples(name) != other.samples(also):
            return False
        self.assumed_equal.append((first, second))
        return True

    @cached_property
    def config(self) -> Mapping[str, Any]:  # type: ignore[override]
        if self._file or "config.json" not in self.folder:
            return {}
        path = self.folder.paths(["config.json"])[0]
        return _checked_config(read_object(path), path)

    @cached_property
    def card_data(self) -> ModelCardData | None:  # type: ignore[override]
        alone = self._file and Path(self._file).stem not in _USUAL_STEMS
        return None if alone else read_card(self.folder.path, self.public_id)

    def fingerprint(self) -> str:
        """Sizes and times of the files, or the commit."""
        if self.revision:
            return f"{self.public_id}@{self.revision}"
        stats = [(path.name, path.stat()) for path in self.folder.paths(self._names)]
        return json.dumps([[name, stat.st_size, stat.st_mtime_ns] for name, stat in stats])

    def write_companions(self, folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> None:
        names = [] if self._file else [name for name in self.folder.companions() if wanted(name)]
        for name, path in zip(names, self.folder.paths(names), strict=True):
            target = folder / name
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(path, target)


def find_weights(folder: Folder, label: str, below: str = "") -> list[str]:
    """Name the files of weights of a folder in order: safetensors before pickles, a single file before shards.

    Args:
        folder: the model's folder.
        label: how messages call it.
        below: the folder in it that is looked into.

    Raises:
        SourceError: there are none, or one that the index names is missing.
    """
    for single in (os.path.join(below, name) for name in SINGLES):
        if single in folder:
            return _indexed(folder, single) if single.endswith(".json") else [single]
    if os.path.join(below, "adapter_config.json") in folder:
        raise SourceError(f"'{label}' is a PEFT adapter: name it after its base, as 'base+{label}'.")
    for suffixes in ((".safetensors",), PICKLES):
        names = [name for name in folder.names(below) if name.endswith(suffixes)]
        if found := [name for name in names if os.path.basename(name) not in _TRAINING_STATE]:
            return _alone_or_shards(found, label)
    raise SourceError(
        f"'{label}' holds no weights: there is no .safetensors, .bin or .pth file in '{folder.path / below}'."
    )


def _own_weights(folder: Folder, label: str, *, alone: bool) -> list[str]:
    """Name a folder's own files of weights; beside modules with weights there may be none."""
    return find_weights(folder, label) if alone or _has_weights(folder, "") else []


def _module_weights(folder: Folder) -> dict[str, list[str]]:
    """Name the files of weights of a sentence-transformers model's further modules by the names of their folders."""
    with_weights = [name for name in module_folders(folder) if _has_weights(folder, name)]
    return {name: find_weights(folder, str(folder.path / name), name) for name in with_weights}


def _has_weights(folder: Folder, below: str) -> bool:
    return any(name.endswith((".safetensors", *PICKLES)) for name in folder.names(below))


def _indexed(folder: Folder, name: str) -> list[str]:
    """Return the shards an index names, each once, in its order of names."""
    (index,) = folder.paths([name])
    weight_map = read_object(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise SourceError(f"'{index}' has no 'weight_map': it is not an index of shards.")
    if not all(isinstance(file, str) and len(file) < 256 for file in weight_map.values()):
        raise SourceError(f"'{index}' should name a file for every tensor in its 'weight_map'.")
    files = sorted(set(weight_map.values()))
    if any(os.path.basename(file) != file or file in ("", ".", "..") for file in files):
        raise SourceError(f"'{index}' names shards outside of its folder.")
    shards = [os.path.join(os.path.dirname(name), file) for file in files]
    if missing := [os.path.basename(shard) for shard in shards if shard not in folder]:
        raise SourceError(f"'{index.parent}' lacks {', '.join(missing)}, which its index names: download them again.")
    return shards


def _alone_or_shards(found: list[str], label: str) -> list[str]:
    """Accept a single file, or shards numbered 1 to N of N."""
    names = [os.path.basename(name) for name in found]
    numbers = [_SHARD.search(os.path.splitext(name)[0]) for name in names]
    if len(found) == 1 and numbers[0] is None:
        return found
    of = {int(number[2]) for number in numbers if number}
    if None not in numbers and len(of) == 1 and len(found) == next(iter(of)):
        return found
    raise SourceError(
        f"'{label}' holds {', '.join(names)} and no index that says which belong together: name one file, or add it."
    )


def _checked_config(config: dict[str, Any], path: Path) -> dict[str, Any]:
    """Check what others read from a config."""
    names, kind = config.get("architectures"), config.get("model_type")
    if not (names is None or (isinstance(names, list) and all(isinstance(name, str) for name in names))):
        raise SourceError(f"'architectures' in '{path}' should be a list of names of classes; found {shown(names)}.")
    if not isinstance(kind, (str, type(None))):
        raise SourceError(f"'model_type' in '{path}' should be a word; found {shown(kind)}.")
    return config
