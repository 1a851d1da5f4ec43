"""Xet storage: folders that hf_xet takes for storage servers (`local://`), and what was sent to them."""

from __future__ import annotations

import importlib
import itertools
import os
import shutil
import struct
import tempfile
import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from tests.hub.store import Blob


def expiry() -> int:
    """Return when a token ends that is given now, in seconds since 1970."""
    return int(time.time()) + 3600


@dataclass(frozen=True)
class Sent:
    """A file in a storage: where, its Xet hash and its size in bytes."""

    storage: Path
    hash: str
    size: int


@dataclass
class Xet:
    """All storages.

    hf_xet locks the storage that it has open, so every token opens one of its own, and what was sent is read from a
    copy. No content is shared between the storages of two tokens.
    """

    _folder: tempfile.TemporaryDirectory[str] = field(default_factory=lambda: tempfile.TemporaryDirectory("-xet"))
    _number: Iterator[int] = field(default_factory=itertools.count)
    _hashes: dict[str, str] = field(default_factory=dict)
    _sent: dict[str, Sent] = field(default_factory=dict)
    _shards: set[Path] = field(default_factory=set)

    def __post_init__(self) -> None:
        # hf_xet reads this when it is imported; else it keeps a log in the home of the user.
        os.environ.setdefault("HF_XET_LOG_DEST", str(self._path / "log"))
        self._xet = importlib.import_module("hf_xet")
        self._session = self._xet.XetSession()

    def hash(self, blob: Blob) -> str:
        """Return the hash that Xet gives a file."""
        if blob.sha256 not in self._hashes:
            file = self._new("hashed")
            file.write_bytes(blob.content)
            self._hashes[blob.sha256] = self._xet.hash_files([str(file)])[0].hash
            file.unlink()
        return self._hashes[blob.sha256]

    def writable(self) -> str:
        """Return the address of an empty storage."""
        storage = self._new("written")
        storage.mkdir()
        return f"local://{storage}"

    def readable(self, blobs: Iterable[Blob]) -> str:
        """Return the address of a storage that holds these files."""
        made, copied = self._new("made"), self._new("read")
        made.mkdir()
        with self._session.new_upload_commit(**_access(made)) as commit:
            for blob in blobs:
                commit.start_upload_bytes(blob.content, sha256=blob.sha256)
        shutil.copytree(made, copied)
        shutil.rmtree(made)
        return f"local://{copied}"

    def sent(self, names: Iterable[str]) -> dict[str, bytes]:
        """Return the content of the files of these names (sha256, or Xet hash) that were sent and are whole."""
        self._look()
        found = {name: self._sent[name] for name in names if name in self._sent}
        contents = {}
        for storage in {each.storage for each in found.values()}:
            contents |= self._rebuilt(storage, {name: each for name, each in found.items() if each.storage == storage})
        return contents

    def _look(self) -> None:
        """Read the shards that have come since."""
        for shard in set(self._path.glob("written-*/xet/xorbs/shards/*.mdb")) - self._shards:
            self._shards.add(shard)
            for xet_hash, sha256, size in _files(shard.read_bytes()):
                sent = Sent(self._path / shard.relative_to(self._path).parts[0], xet_hash, size)
                self._sent |= {name: sent for name in (xet_hash, sha256) if name}

    def _rebuilt(self, storage: Path, files: dict[str, Sent]) -> dict[str, bytes]:
        copied = self._new("copy")
        shutil.copytree(storage, copied)
        with self._session.new_file_download_group(**_access(copied)) as group:
            for name, sent in files.items():
                group.start_download_file(self._xet.XetFileInfo(sent.hash, sent.size), str(copied / name))
        contents = {name: (copied / name).read_bytes() for name in files}
        shutil.rmtree(copied)
        return contents

    def close(self) -> None:
        self._folder.cleanup()

    @property
    def _path(self) -> Path:
        return Path(self._folder.name)

    def _new(self, kind: str) -> Path:
        """Return a path that was not there before."""
        return self._path / f"{kind}-{next(self._number)}"


def _access(storage: Path) -> dict[str, str | int]:
    return {"endpoint": f"local://{storage}", "token": "xet", "token_expiry_unix_secs": expiry()}


def _files(shard: bytes) -> Iterator[tuple[str, str, int]]:
    """Yield the Xet hash, the sha256 ("" where it was not sent) and the size of every file of a shard.

    A shard is made of records of 48 bytes: a header; per file its hash, flags and number n of segments, the n segments,
    n sums if the first flag is set, and its sha256 if the second is; an end whose hash is all ones.
    https://huggingface.co/docs/xet/shard
    """
    at = 48
    while True:
        name, flags, segments = struct.unpack_from("<32sII", shard, at)
        if name == b"\xff" * 32:
            return
        size = sum(struct.unpack_from("<32sII", shard, at + 48 * n)[2] for n in range(1, segments + 1))
        at += 48 * (1 + segments + (segments if flags & 1 << 31 else 0))
        sha256 = ""
        if flags & 1 << 30:
            sha256 = _hex(shard[at : at + 32])
            at += 48
        yield _hex(name), sha256, size


def _hex(raw: bytes) -> str:
    """Write a hash as Xet does: four numbers of 64 bits."""
    return "".join(f"{number:016x}" for number in struct.unpack("<4Q", raw))
