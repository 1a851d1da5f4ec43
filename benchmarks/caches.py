"""Warm and cold page caches: inputs that lie in memory before a run, or that do not."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from pathlib import Path

_BUFFER = 1 << 22  # bytes


def warm(folders: Iterable[Path]) -> None:
    """Read all files once, so that they lie in the page cache."""
    buffer = bytearray(_BUFFER)
    for path in _files(folders):
        with path.open("rb", buffering=0) as file:
            while file.readinto(buffer):
                pass


def can_drop() -> bool:
    """Tell whether this system has a call that lets the page cache forget a file."""
    return hasattr(os, "posix_fadvise")


def drop(folders: Iterable[Path]) -> None:
    """Let the page cache forget all files. What is not on the disk yet is written first, else it would stay."""
    for path in _files(folders):
        with path.open("rb") as file:
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def _files(folders: Iterable[Path]) -> Iterator[Path]:
    for folder in dict.fromkeys(folders):
        yield from sorted(path for path in folder.rglob("*") if path.is_file())
