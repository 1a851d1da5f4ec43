"""Files on their way to the Hub: how much of each is out, and a way to hold it.

Over LFS every read of a file counts, and ends the upload once nobody wants it any more. Xet says nothing before a file
is whole, so that files of weights go one by one where somebody listens.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from contextlib import contextmanager
from threading import Event, Thread
from typing import Any, BinaryIO

from huggingface_hub import CommitOperationAdd

from hf_merge.errors import Cancelled
from hf_merge.progress import EVERY, Progress, Report


class Addition(CommitOperationAdd):
    """A file to upload that counts what is read of it.

    Attributes:
        read: the furthest byte that was read for the upload.
        unwanted: once it is set, the upload breaks off at the next read.
    """

    read: int = 0
    unwanted: Event | None = None

    @contextmanager
    def as_file(self, with_tqdm: bool = False) -> Iterator[BinaryIO]:
        """Open the file; reads count if it is for the upload, which is when huggingface_hub wants a bar."""
        with super().as_file(with_tqdm) as file:
            if with_tqdm and not isinstance(self.path_or_fileobj, bytes):
                read = file.read

                def counted(size: int = -1) -> bytes:
                    if self.unwanted is not None and self.unwanted.is_set():
                        raise Cancelled("The upload was ended.")
                    data = read(size)
                    self.read = max(self.read, file.tell())
                    return data

                file.read = counted  # type: ignore[method-assign]
            yield file


def send_telling(
    additions: Sequence[CommitOperationAdd], send: Callable[[list[CommitOperationAdd]], Any], report: Report
) -> None:
    """Upload files in another thread, and tell how far that is; what the listener raises ends it.

    Args:
        additions: the files.
        send: uploads some of them.
        report: whom to tell.

    Raises:
        What `send` raises, or the listener.
    """
    done, stop, state = Future[None](), Event(), _State(additions)
    for one in additions:
        if isinstance(one, Addition):
            one.unwanted = stop

    def work() -> None:
        try:
            for batch in state.batches():
                send(batch)
            done.set_result(None)
        except BaseException as error:
            done.set_exception(error)

    Thread(target=work, name="hf_merge upload", daemon=True).start()  # nobody waits for it at the end: it may hang
    try:
        report.tell(state.progress())
        while not done.done():
            try:
                done.result(timeout=EVERY)
            except NotYet:
                if done.done():  # what is sent may end in a timeout of its own
                    break
            report.tell(state.progress())
        done.result()
        report.tell(state.progress())
    finally:
        stop.set()


class _State:
    """What is out of some files."""

    def __init__(self, additions: Sequence[CommitOperationAdd]):
        self._all = list(additions)
        self._out: set[int] = set()
        self._current = ""

    def batches(self) -> Iterator[list[CommitOperationAdd]]:
        """Yield the small files at once and those of weights one by one, and note what is out after each."""
        weights = [[one] for one in self._all if one.path_in_repo.endswith(".safetensors")]
        small = [one for one in self._all if not one.path_in_repo.endswith(".safetensors")]
        for batch in [small, *weights] if small else weights:
            self._current = batch[0].path_in_repo
            yield batch
            self._out |= {id(one) for one in batch}

    def progress(self) -> Progress:
        """Say how far they are."""
        sizes = {id(one): one.upload_info.size for one in self._all}
        out = sum(sizes[id(one)] if id(one) in self._out else min(_read(one), sizes[id(one)]) for one in self._all)
        return Progress("uploading", self._current, len(self._out), len(self._all), out, sum(sizes.values()))


def _read(one: CommitOperationAdd) -> int:
    return one.read if isinstance(one, Addition) else 0
