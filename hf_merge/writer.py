"""Tensors -> safetensors files that are laid out before the first byte, in a folder that appears when it is whole.

Everything is written into a hidden sibling of the output. A shard gets its name when its last byte is there, the
folder gets its own when its last file is there; config.json is the last of them, so that no half model loads.
Of several processes the leader makes the folder and lets it appear; a file that two of them write is laid out first.
Or a carrier takes every file away as soon as it is whole, and the folder is only where files lie until then.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import shutil
import time
import uuid
from collections.abc import Callable, Container, Iterable, Mapping
from functools import partial
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Protocol

from filelock import FileLock, Timeout
from huggingface_hub.utils import logging
from torch import Tensor, uint8

from hf_merge import progress
from hf_merge.errors import OutputError, OutputExistsError
from hf_merge.planning import Plan
from hf_merge.ranks import Team, split
from hf_merge.types import DTYPE_NAMES, TensorSpec

logger = logging.get_logger(__name__)

WEIGHTS = ".safetensors"
RECIPE_FILE = "hf_merge_recipe.yaml"
RECIPE_KEY = "hf_merge_recipe"
"""In the metadata of the weights: the recipe as others may see it. The file beside them has local paths as they are."""
INDEX = "model.safetensors.index.json"
_UNFINISHED = ".unfinished"
_SENT_OFF = 1 << 23  # bytes that go to the disk at a time
_STATE = ".fingerprint"
_LOCK = ".lock"
_TOKEN = ".shared"
"""Says the same to all processes, if they see the same folder."""
CARRIED = ".carried"
"""What a carrier notes beside the files, so that a resumed run knows which are taken away already."""
_MODEL_FILES = ("config.json", "adapter_config.json", "modules.json", "model.safetensors", INDEX)
_PATIENCE = 20.0  # seconds until a network file system shows what another machine has made


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
    output not appear, and keeps finished shards for `resume`; not if the caller's `on_progress` ended a merge that was
    not to be resumed.

    Args:
        output: the folder to make, or with the suffix `.safetensors` the one file.
        plan: what will be written.
        fingerprint: identifies plan and inputs; resuming needs the same.
        metadata: of every safetensors file.
        overwrite: replace what is there, once the new folder is whole.
        resume: take over the finished shards of an interrupted run.
        carrier: takes the files away; then nothing appears at the output.
        team: the processes that write together, each its part; a carrier serves one alone.

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
        team: Team | None = None,
    ):
        self.output, self.plan, self.overwrite, self.carrier = output, plan, overwrite, carrier
        self.team = team = team or Team()
        self.folder, self._resume = partial_folder(output), resume
        self._lock = FileLock(self.folder / _LOCK, blocking=False)
        if carrier is None and team.leads:
            refuse_existing(output, overwrite=overwrite)
        self.shards: dict[str, _Shard] = {}
        try:
            if team.leads:
                self._lead(fingerprint, metadata, resume=resume)
            else:
                self._follow(metadata)
        except OSError as error:
            raise OutputError(f"'{output}' cannot be written: {error.strerror or error}.") from error
        self._shard_of = {name: shard for shard in self.shards.values() for name in shard.mine}

    def _lead(self, fingerprint: str, metadata: Mapping[str, str], *, resume: bool) -> None:
        """Claim the folder, lay out the files that several processes write, and let the others begin."""
        self._claim(fingerprint, resume=resume)
        try:
            token = uuid.uuid4().hex if self.team.world > 1 else ""
            if token:
                (self.folder / _TOKEN).write_text(token, encoding="utf-8")
            self.shards = self._my_shards(metadata)
            self.team.share("writer", [token, sorted(self.finished)])
        except BaseException:
            self._give_up()
            raise

    def _follow(self, metadata: Mapping[str, str]) -> None:
        """Begin when the leader has claimed the folder, if it is the same one here."""
        token, finished = self.team.share("writer")
        self._left, self.finished, begin = [], set(finished), time.monotonic()
        while not (self.folder / _TOKEN).is_file() or (self.folder / _TOKEN).read_text(encoding="utf-8") != token:
            self.team.check()
            if time.monotonic() - begin > _PATIENCE:
                raise OutputError(
                    f"'{self.output.parent}' is not the folder there that it is for rank 0: choose an output on a "
                    "file system that all machines share."
                )
            time.sleep(0.1)
            os.scandir(self.folder.parent).close()  # a network file system looks again
        self.shards = self._my_shards(metadata)

    def _my_shards(self, metadata: Mapping[str, str]) -> dict[str, _Shard]:
        """Make the files of which this process writes a part; the leader lays out those with several writers."""
        parts, made = split(self.plan, self.team.world, self.finished), {}
        for file, names in self.plan.shards.items():
            held = [name for name in names if self.plan.specs[name].nbytes]
            writers = [rank for rank, part in enumerate(parts) if not part.isdisjoint(held)] or [0]
            if file in self.finished or not (self.team.rank in writers or (self.team.leads and len(writers) > 1)):
                continue
            mine = parts[self.team.rank] if len(writers) > 1 else names
            made[file] = _Shard(self.folder, file, names, self.plan.specs, metadata, self.carrier, {*mine})
            if len(writers) > 1:
                made[file].is_last = partial(self._is_last, file, len(writers))
            if len(writers) > 1 and self.team.leads:
                made[file].lay_out()
                made[file].close(synced=True)
        return made

    def _is_last(self, file: str, writers: int) -> bool:
        """Tell whether all other processes have written their part of a file."""
        return self.team.count(file) == writers

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
        emptied(self.folder, keep={_LOCK, *((CARRIED, *_tops(self.plan.shards)) if resume and found else ())})
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
        """Tell whether a tensor stands in a shard that an earlier run finished, or is another process's to write."""
        return tensor not in self._shard_of

    def sizes_before(self) -> list[int]:
        """Return the bytes of every tensor that an earlier run finished."""
        return [self.plan.specs[name].nbytes for file in self.plan.shards if file in self.finished
                for name in self.plan.shards[file]]  # fmt: skip

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
            self.team.abandon(error)
            self._give_up() if self.team.leads else self.stop()
            return
        if not self.team.leads:
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
        (self.folder / _TOKEN).unlink(missing_ok=True)
        self._lock.release()
        (self.folder / _LOCK).unlink(missing_ok=True)
        if self.output.suffix == WEIGHTS:
            if self.output.is_dir() and not any(self.output.iterdir()):
                self.output.rmdir()
            (file,) = self.plan.shards
            refuse_existing(self.output, overwrite=self.overwrite)
            (self.folder / file).replace(self.output)
            shutil.rmtree(self.folder)
        else:
            appear(self.folder, self.output, overwrite=self.overwrite)

    def _give_up(self) -> None:
        self.stop()
        is_wanted = self._resume or progress.current().ended is None
        finished = [name for name in self.plan.shards if is_wanted and self._is_kept(name)]
        self._lock.release()
        if not finished:
            shutil.rmtree(self.folder, ignore_errors=True)
            return
        emptied(self.folder, keep={*_tops(finished), _STATE, CARRIED})
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
        carrier: Carrier | None,
        mine: Container[str],
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
        self._size = end
        self.mine = [name for name in names if name in mine]
        self._missing = sum(specs[name].nbytes for name in self.mine)
        self.is_last: Callable[[], bool] | None = None
        self._file: int | None = None
        self._guard = Lock()
        self._waiting: dict[int, int] = {}  # end -> start of runs that the system may still hold back
        if not end:
            self._open()
            self._finish()

    def write(self, name: str, start: int, values: Tensor) -> None:
        if not values.numel():
            return
        data = memoryview(values.view(-1).view(uint8).numpy())  # type: ignore[arg-type]
        with self._guard:
            file = self._open() if self._file is None else self._file
        offset = len(self._header) + self.places[name] + start * values.element_size()
        write_at(file, data, offset)
        self._send_off(file, offset, offset + len(data))
        with self._guard:
            self._missing -= len(data)
            if not self._missing:
                self._finish()

    def _send_off(self, file: int, start: int, end: int) -> None:
        """Let what was written go to the disk while the rest is computed, a few megabytes at a time."""
        with self._guard:
            start = self._waiting.pop(start, start)
            if end - start < _SENT_OFF:
                self._waiting[end] = start
                return
        _start_writing(file, start, end - start)

    def _open(self) -> int:
        """Make the file at its full size, so that a full disk is found now."""
        if self._carrier is not None:
            self._carrier.admit(self._name)
        if self.is_last is not None:  # it has several writers and was laid out for them
            self._file = os.open(self._unfinished, os.O_WRONLY)
            return self._file
        self.lay_out()
        assert self._file is not None
        return self._file

    def lay_out(self) -> None:
        """Write all but the tensors, and leave the file open."""
        self.path.parent.mkdir(parents=True, exist_ok=True)
        self._file = os.open(self._unfinished, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        _reserve(self._file, len(self._header) + self._size)
        write_at(self._file, memoryview(self._header), 0)

    def _finish(self) -> None:
        self.close(synced=True)
        if self.is_last is None or self.is_last():
            self._unfinished.rename(self.path)
        if self._carrier is not None:
            self._carrier.take(self._name)

    def close(self, *, synced: bool = False) -> None:
        """Close the file, finished or not."""
        if self._file is not None:
            if synced:
                os.fsync(self._file)
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


def appear(folder: Path, output: Path, *, overwrite: bool) -> None:
    """Let a whole folder appear as the output, all at once; an old one goes when the new one is in its place.

    Raises:
        OutputExistsError: something would be lost.
    """
    if output.is_dir() and not any(output.iterdir()):
        output.rmdir()
    if not output.exists():
        folder.rename(output)
        return
    refuse_existing(output, overwrite=overwrite)
    aside = output.with_name(f".{output.name}.replaced")
    output.rename(aside)
    try:
        folder.rename(output)
    except OSError:
        aside.rename(output)
        raise
    shutil.rmtree(aside)


def _start_writing(file: int, start: int, size: int) -> None:
    """Ask the system to write a part of a file to the disk now, and do not wait for it.

    On Linux this advice begins to write what is not on the disk yet, and forgets only what is.
    """
    advise: Callable[[int, int, int, int], None] | None = getattr(os, "posix_fadvise", None)
    if advise is not None:  # macOS has none
        with contextlib.suppress(OSError):
            advise(file, start, size, os.POSIX_FADV_DONTNEED)


def _reserve(file: int, size: int) -> None:
    reserve: Callable[[int, int, int], None] | None = getattr(os, "posix_fallocate", None)
    try:
        if reserve is not None:  # macOS has none
            return reserve(file, 0, size)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):  # some network file systems
            raise
    return os.ftruncate(file, size)


def write_at(file: int, data: memoryview, offset: int) -> None:
    """Write all of the data."""
    while data:
        written = os.pwrite(file, data, offset)
        data, offset = data[written:], offset + written


def _tops(files: Iterable[str]) -> set[str]:
    """Name what a folder must keep to keep some files: themselves, or the folder they lie in."""
    return {file.partition("/")[0] for file in files}


def emptied(folder: Path, keep: set[str]) -> None:
    """Delete everything in a folder but some files."""
    for path in folder.iterdir():
        if path.name not in keep:
            shutil.rmtree(path) if path.is_dir() else path.unlink()
