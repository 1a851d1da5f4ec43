"""Files of weights: safetensors, mapped, and PyTorch's own, from which no code is run."""

from __future__ import annotations

import json
import math
import mmap
import pickle
import tempfile
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from hf_merge.errors import SourceError
from hf_merge.sources.base import stored_once
from hf_merge.types import SAFETENSORS_DTYPES, TensorSpec

PICKLES = (".bin", ".pth", ".pt", ".ckpt")
MAX_HEADER = 25_000_000
"""Bytes; the header of 100,000 tensors has 15 MB."""

_WRAPPERS = ("state_dict", "model", "module", "model_state_dict")


class WeightFile(Protocol):
    """One file of weights.

    Attributes:
        shared: names whose values are those of another, stored once: the other.
        metadata: what it says beside them, in words.
    """

    shared: Mapping[str, str]
    metadata: Mapping[str, str]

    def specs(self) -> dict[str, TensorSpec]: ...

    def tensor(self, name: str) -> Tensor: ...


class Place(NamedTuple):
    """Where a tensor lies in a file: from the byte `begin` to before the byte `end`."""

    begin: int
    end: int
    spec: TensorSpec

    def view(self, values: Tensor) -> Tensor:
        """Show these bytes as the tensor."""
        aligned = values.storage_offset() % self.spec.dtype.itemsize == 0
        return (values if aligned else values.clone()).view(self.spec.dtype).view(self.spec.shape)


class Safetensors:
    """A safetensors file, mapped; its header was checked by safetensors when it was opened."""

    shared: Mapping[str, str] = {}

    def __init__(self, path: Path):
        try:
            with path.open("rb") as file:
                check_header_size(int.from_bytes(file.read(8), "little"), path.stat().st_size)
            with safe_open(path, framework="np"):
                pass
            header, self._bytes = _map(path)
        except (SafetensorError, OSError, ValueError, RecursionError) as error:
            raise not_whole(path, error) from None
        self.places = places_in(header, str(path))
        self.metadata: Mapping[str, str] = header.get("__metadata__") or {}

    def specs(self) -> dict[str, TensorSpec]:
        return {name: place.spec for name, place in self.places.items()}

    def tensor(self, name: str) -> Tensor:
        place = self.places[name]
        return place.view(self._bytes[place.begin : place.end])


class Pickle:
    """A PyTorch file, mapped where its format allows; only tensors are read from it, never code."""

    metadata: Mapping[str, str] = {}

    def __init__(self, path: Path):
        self._tensors = {name: t for name, t in _unwrapped(_load_pickle(path)).items() if isinstance(t, Tensor)}
        if not self._tensors:
            raise SourceError(f"'{path}' holds no tensors by name: save a model's state_dict().")
        self.shared: Mapping[str, str] = stored_once(self._tensors)

    def specs(self) -> dict[str, TensorSpec]:
        return {name: TensorSpec(tuple(t.shape), t.dtype) for name, t in self._tensors.items()}

    def tensor(self, name: str) -> Tensor:
        return self._tensors[name].detach()


def open_weights(path: Path) -> WeightFile:
    """Open one file of weights by its kind.

    Raises:
        SourceError: not whole, not readable, or a pickle that would run code.
    """
    if path.suffix in PICKLES:
        return Pickle(path)
    if path.suffix == ".safetensors":
        return Safetensors(path)
    raise SourceError(f"'{path}' is no file of weights: hf_merge reads .safetensors, {', '.join(PICKLES)}.")


def not_whole(file: object, why: object) -> SourceError:
    """Return what is told of a broken safetensors file."""
    return SourceError(f"'{file}' is not a whole safetensors file ({why}): download or write it again.")


def check_header_size(size: int, whole: int) -> None:
    """Look at the length of a header before anybody reads it.

    Raises:
        ValueError: it cannot be that of a file of `whole` bytes.
    """
    if size > MAX_HEADER or size + 8 > whole:
        raise ValueError(f"it says that its header has {size} bytes, of {min(whole, MAX_HEADER)} that it may have")


def checked_places(header: bytes, whole: int, label: str) -> dict[str, Place]:
    """Find the tensors of a file of which only the header is there.

    safetensors itself checks the header, on a file of the same length that takes no room.

    Args:
        header: the file's beginning, up to its first tensor.
        whole: the file's length.
        label: how messages call it.

    Raises:
        SourceError: it is not the header of such a file.
    """
    try:
        with tempfile.NamedTemporaryFile(suffix=".safetensors") as file:
            file.write(header)
            file.truncate(whole)
            with safe_open(file.name, framework="np"):
                return places_in(json.loads(header[8:]), label)
    except (SafetensorError, OSError, ValueError, RecursionError) as error:
        raise not_whole(label, error) from None


def places_in(header: Mapping[str, Any], label: str) -> dict[str, Place]:
    """Return where a header says that the tensors lie, counted from its end, in the order of the file.

    Raises:
        SourceError: torch cannot hold one of them.
    """
    told = [(name, place) for name, place in header.items() if name != "__metadata__"]
    told.sort(key=lambda item: item[1]["data_offsets"])
    kinds: dict[tuple[str, tuple[int, ...]], TensorSpec] = {}  # a model has many tensors of few kinds
    found: dict[str, Place] = {}
    for name, place in told:
        kind = place["dtype"], tuple(place["shape"])
        if kind not in kinds:
            kinds[kind] = _spec(name, place, label)
        begin, end = place["data_offsets"]
        found[name] = Place(begin, end, kinds[kind])
    return found


def _spec(name: str, place: Mapping[str, Any], label: str) -> TensorSpec:
    shape, word = place["shape"], place["dtype"]
    if math.prod(max(size, 1) for size in shape) >= 1 << 63:
        raise SourceError(f"'{name}' in '{label}' has the shape {shape}, which torch cannot hold.")
    if word not in SAFETENSORS_DTYPES:
        raise SourceError(f"'{name}' in '{label}' has the dtype {word}, which torch lacks: convert it first.")
    return TensorSpec(tuple(shape), SAFETENSORS_DTYPES[word])


def _map(path: Path) -> tuple[dict[str, Any], Tensor]:
    """Return a safetensors file's header and its bytes, mapped for reading.

    safetensors' own mapping is private and writable, so that the kernel refuses files larger than the memory.
    """
    with path.open("rb") as file:
        mapped = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
    size = int.from_bytes(mapped[:8], "little")
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The given buffer is not writable")  # nobody writes to it
        return json.loads(mapped[8 : 8 + size]), torch.frombuffer(mapped, dtype=torch.uint8)[8 + size :]


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
