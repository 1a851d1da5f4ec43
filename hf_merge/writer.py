"""Tensors -> safetensors files that are laid out before the first byte, in a folder that appears when it is whole.

Everything is written into a hidden sibling of the output. A shard gets its name when its last byte is there, the
folder gets its own when its last file is there; config.json is the last of them, so that no half model loads.
Or a carrier takes every file away as soon as it is whole, and the folder is only where files lie until then.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
from collections.abc import Callable, Container, Iterable, Mapping
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Protocol

from filelock import FileLock, Timeout
from huggingface_hub.utils import logging
from torch import Tensor, uint8

from hf_merge.errors import OutputError, OutputExistsError
from hf_merge.planning import Plan
from hf_merge.types import DTYPE_NAMES, TensorSpec

logger = logging.get_logger(__name__)

WEIGHTS = ".safetensors"
RECIPE_FILE = "hf_merge_recipe.yaml"
RECIPE_KEY = "hf_merge_recipe"
"""In the metadata of the weights: the recipe as others may see it. The file beside them has local paths as they are."""
INDEX = "model.safetensors.index.json"
_UNFINISHED = ".unfinished"
_STATE = ".fingerprint"
_LOCK = ".lock"
CARRIED = ".carried"
"""What a carrier notes beside the files, so that a resumed run knows which are taken away already."""
_MODEL_FILES = ("config.json", "modules.json", "model.safetensors", INDEX)


def partial_folder(output: Path) -> Path:
    """The hidden sibling where an output is written until it is whole."""
    return output.with_name(f".{output.name}.hf_merge")


class Carrier(Protocol):
    """Takes finished files away, and lets only so many be begun. Called from several threads.

    Attributes:
        taken: the files that are away for good.
    """

    @property
    def taken(self) -> Container[str]: ...

    def begin(self, folder: Path) -> set[str]:
        """Start; return the files of an earlier run that are taken away already, as noted in `CARRIED`."""
        ...

    def admit(self, file: str) -> None:
        """Wait until one more file may lie in the folder. Files come in the order of the plan, or nearly so."""
        ...

    def take(self, file: str) -> None:
        """Take a whole file; it is deleted later."""
        ...

    def stop(self) -> None:
        """Give up: nobody may wait in `admit` any longer."""
        ...

    def complete(self) -> None:
        """Take all that lies in the folder now, and bring it home."""
        ...


class Writer:
    """Writes the tensors of a plan to the places their files have for them.

    Use as a context manager; leaving it without an error makes the output appear, leaving it with one makes the
    output not appear, and keeps finished shards for `resume`.

    Args:
        output: the folder to make, or with the suffix `.safetensors` the one file.
        plan: what will be written.
        fingerprint: identifies plan and inputs; resuming needs the same.
        metadata: of every safetensors file.
        overwrite: replace what is there, once the new folder is whole.
        resume: take over the finished shards of an interrupted run.
        carrier: takes the files away; then nothing appears at the output.

    Raises:
        OutputExistsError: the output exists and is not empty.
        OutputError: it cannot be written, or there is nothing of the same merge to resume.
    """

    def __init__(
        self,
        output: Path,
        plan: Plan,
        *,
        fingerprint: str,
        metadata: Mapping[str, str],
        overwrite: bool = False,
        resume: bool = False,
        carrier: Carrier | None = None,
    ):
        self.output, self.plan, self.overwrite, self.carrier = output, plan, overwrite, carrier
        self.folder = partial_folder(output)
        if carrier is None:
            refuse_existing(output, overwrite=overwrite)
        self._lock = FileLock(self.folder / _LOCK, blocking=False)
        try:
            self._claim(fingerprint, resume=resume)
        except OSError as error:
            raise OutputError(f"'{output}' cannot be written: {error.strerror or error}.") from error
        self.shards = {name: _Shard(self.folder, name, tensors, plan.specs, metadata, carrier)
                       for name, tensors in plan.shards.items() if name not in self.finished}  # fmt: skip
        self._shard_of = {name: shard for shard in self.shards.values() for name in shard.places}

    def _claim(self, fingerprint: str, *, resume: bool) -> None:
        """Make the partial folder ours: take over a finished part, or begin afresh."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except Timeout:
            raise OutputError(
                f"Another process is writing '{self.output}': wait for it, or choose another folder."
            ) from None
        state = self.folder / _STATE
        found = state.read_text(encoding="utf-8") if state.is_file() else ""
        if resume and found not in ("", fingerprint):
            self._lock.release()
            raise OutputError(
                f"'{self.output}' was begun with another recipe, other inputs or another shard size: "
                "repeat that call to resume it, or leave resume out to begin again."
            )
        _empty(self.folder, keep={_LOCK, *((CARRIED, *_tops(self.plan.shards)) if resume and found else ())})
        state.write_text(fingerprint, encoding="utf-8")
        self._left = [name for name in self.plan.shards if (self.folder / name).is_file()]
        self.finished = {*self._left}
        if self.carrier is not None:
            self.finished |= self.carrier.begin(self.folder) & self.plan.shards.keys()

    def stop(self) -> None:
        """Give up: no thread may wait in `write` any longer."""
        if self.carrier is not None:
            self.carrier.stop()

    def __enter__(self) -> Writer:
        try:
            self._hand_over()
        except BaseException:
            self._give_up()
            raise
        return self

    def _hand_over(self) -> None:
        """Let the carrier take what an earlier run finished and left."""
        if self.carrier is not None:
            for file in self._left:
                self.carrier.admit(file)
                self.carrier.take(file)

    def is_finished(self, tensor: str) -> bool:
        """Tell whether a tensor stands in a shard that an earlier run finished."""
        return tensor not in self._shard_of

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Write elements of a tensor, beginning with the one of index `start`. Safe to call from many threads."""
        try:
            self._shard_of[name].write(name, start, values)
        except OSError as error:
            raise OutputError(f"'{self.output}' cannot be written: {error.strerror or error}.") from error

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for shard in self.shards.values():
            shard.close()
        if kind is not None:
            self._give_up()
            return
        self._write_index()
        if self.carrier is None:
            self._publish()
        else:
            self._bring_home(self.carrier)

    def _bring_home(self, carrier: Carrier) -> None:
        """Let the carrier take the rest; nothing stays here."""
        try:
            carrier.complete()
        except BaseException:
            self._give_up()
            raise
        self._lock.release()
        shutil.rmtree(self.folder)

    def _publish(self) -> None:
        """Let the output appear, all at once."""
        (self.folder / _STATE).unlink()
        self._lock.release()
        (self.folder / _LOCK).unlink(missing_ok=True)
        if self.output.is_dir() and not any(self.output.iterdir()):
            self.output.rmdir()
        if self.output.suffix == WEIGHTS:
            (file,) = self.plan.shards
            refuse_existing(self.output, overwrite=self.overwrite)
            (self.folder / file).replace(self.output)
            shutil.rmtree(self.folder)
        elif not self.output.exists():
            self.folder.rename(self.output)
        else:
            refuse_existing(self.output, overwrite=self.overwrite)
            self._replace_old()

    def _replace_old(self) -> None:
        """Put the old output aside, and back if the new one cannot take its place."""
        aside = self.output.with_name(f".{self.output.name}.replaced")
        self.output.rename(aside)
        try:
            self.folder.rename(self.output)
        except OSError:
            aside.rename(self.output)
            raise
        shutil.rmtree(aside)

    def _give_up(self) -> None:
        self.stop()
        finished = [name for name in self.plan.shards if self._is_kept(name)]
        self._lock.release()
        if not finished:
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        _empty(self.folder, keep={*_tops(finished), _STATE, CARRIED})
        logger.warning(
            "%d of %d shards are finished and kept in '%s': repeat the call with resume=True (--resume), "
            "or delete that folder.",
            len(finished), len(self.plan.shards), self.folder,
        )  # fmt: skip

    def _is_kept(self, file: str) -> bool:
        """Tell whether a resumed run need not make a file again: it lies here, or a carrier has it."""
        return (self.folder / file).is_file() or (self.carrier is not None and file in self.carrier.taken)

    def _write_index(self) -> None:
        """Say which shard holds which tensor; a single file, or one in a module's folder, needs no index."""
        shards = {file: names for file, names in self.plan.shards.items() if "/" not in file}
        if len(shards) < 2:
            return
        weight_map = {name: file for file, names in shards.items() for name in names}
        specs = [self.plan.specs[name] for name in weight_map]
        metadata = {
            "total_parameters": sum(spec.numel for spec in specs),
            "total_size": sum(spec.nbytes for spec in specs),
        }
        index = {"metadata": metadata, "weight_map": dict(sorted(weight_map.items()))}
        (self.folder / INDEX).write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


class _Shard:
    """One safetensors file: header first, then every tensor at its place. In a module's folder, names do without it."""

    def __init__(
        self,
        folder: Path,
        file: str,
        names: tuple[str, ...],
        specs: Mapping[str, TensorSpec],
        metadata: Mapping[str, str],
        carrier: Carrier | None = None,
    ):
        self.path = path = folder / file
        self._name, self._carrier = file, carrier
        self._unfinished = path.with_name(path.name + _UNFINISHED)
        module = file.removesuffix(path.name)
        self.places: dict[str, int] = {}
        header: dict[str, object] = {"__metadata__": {"format": "pt", **metadata}}
        end = 0
        for name in names:
            self.places[name], begin, end = end, end, end + specs[name].nbytes
            dtype = DTYPE_NAMES[specs[name].dtype]
            header[name.removeprefix(module)] = {
                "dtype": dtype,
                "shape": list(specs[name].shape),
                "data_offsets": [begin, end],
            }
        text = json.dumps(header, ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._header = len(text).to_bytes(8, "little") + text
        self._missing, self._size = end, end
        self._file: int | None = None
        self._guard = Lock()
        if not end:
            self._open()
            self._finish()

    def write(self, name: str, start: int, values: Tensor) -> None:
        if not values.numel():
            return
        data = memoryview(values.view(-1).view(uint8).numpy())  # type: ignore[arg-type]
        with self._guard:
            file = self._open() if self._file is None else self._file
        _write_at(file, data, len(self._header) + self.places[name] + start * values.element_size())
        with self._guard:
            self._missing -= len(data)
            if not self._missing:
                self._finish()

    def _open(self) -> int:
        """Make the file at its full size, so that a full disk is found now."""
        if self._carrier is not None:
            self._carrier.admit(self._name)
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self._unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        _reserve(self._file, len(self._header) + self._size)
        _write_at(self._file, memoryview(self._header), 0)
        return self._file

    def _finish(self) -> None:
        if self._file is not None:
            os.fsync(self._file)
        self.close()
        self._unfinished.rename(self.path)
        if self._carrier is not None:
            self._carrier.take(self._name)

    def close(self) -> None:
        """Close the file, finished or not."""
        if self._file is not None:
            os.close(self._file)
            self._file = None


def refuse_existing(output: Path, *, overwrite: bool = False) -> None:
    """Raise if something would be lost.

    Raises:
        OutputExistsError: the folder has files in it, or is none; or it is to be overwritten, but holds no model.
    """
    if not output.exists() or (output.is_dir() and not any(output.iterdir())):
        return
    if not overwrite:
        raise OutputExistsError(
            f"'{output}' exists and is not empty: choose another name, or replace it with overwrite=True (--overwrite)."
        )
    if output.is_file() and output.suffix == WEIGHTS:
        return
    if not output.is_dir() or not any((output / name).is_file() for name in _MODEL_FILES):
        raise OutputExistsError(f"'{output}' exists and is no model, so it is not overwritten: choose another folder.")


def _reserve(file: int, size: int) -> None:
    reserve: Callable[[int, int, int], None] | None = getattr(os, "posix_fallocate", None)
    try:
        if reserve is not None:  # macOS has none
            return reserve(file, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):  # some network file systems
            raise
    return os.ftruncate(file, size)


def _write_at(file: int, data: memoryview, offset: int) -> None:
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written


def _tops(files: Iterable[str]) -> set[str]:
    """Name what a folder must keep to keep some files: themselves, or the folder they lie in."""
    return {file.partition("/")[0] for file in files}


def _empty(folder: Path, keep: set[str]) -> None:
    """Delete everything in a folder but some files."""
    for path in folder.iterdir():
        if path.name not in keep:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
