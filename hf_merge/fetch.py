"""Brings what a plan reads from the Hub while it is executed, in the order in which it is read.

Either whole files come into huggingface_hub's cache, several at a time, and a tensor waits for its file; or tensors
come by range, a little ahead of their use, and nothing is kept.
"""

from __future__ import annotations

import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future
from concurrent.futures import TimeoutError as NotYet
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from queue import Empty, Queue
from threading import Condition, Event, Thread
from typing import Any

import torch
from huggingface_hub import constants
from huggingface_hub.utils import tqdm
from torch import Tensor

from hf_merge.errors import SourceError
from hf_merge.planning import Plan, format_bytes
from hf_merge.progress import Progress, Report, current
from hf_merge.sources import Source
from hf_merge.sources.checkpoint import Checkpoint
from hf_merge.sources.hub import Silent
from hf_merge.sources.remote import RemoteSafetensors

AHEAD = 1 << 28
"""Bytes that are read ahead of their use when a merge is streamed."""

_RUN = 1 << 24  # bytes; small tensors that lie side by side come together
_GAP = 1 << 12  # bytes between them that are read in vain
_AT_A_TIME = 8
_PATIENCE = 0.5  # seconds after which a thread that waits looks whether it is still wanted

Read = tuple[RemoteSafetensors, str]


class Stopped(Exception):
    """The merge ended before this was fetched."""


def remote_reads(
    plan: Plan, sources: Sequence[Source], skip: Callable[[str], bool] = lambda name: False, *, assumed: bool = True
) -> list[Read]:
    """List the tensors in files on the Hub that a plan reads, in order, each as often as it is read.

    Args:
        plan: what reads them.
        sources: the plan's models, in its order.
        skip: names of tensors that are not needed.
        assumed: whether `check_assumed` reads too.
    """
    steps = (step for step in plan.steps if not skip(step.name))
    reads = (read for step in steps for one in step.reads for read in sources[one.model].origins(one.name))
    pairs = [(source, name) for source, *names in assumed_equal(sources) for name in names] if assumed else []
    return [(file, inner) for source, name in [*reads, *pairs] for file, inner in remote_place(source, name)]


def remote_place(source: Source, name: str) -> Iterator[Read]:
    """Yield where on the Hub a tensor of a model lies, as it is stored; nothing if it is here."""
    if isinstance(source, Checkpoint):
        file, inner = source.place(name)
        if isinstance(file, RemoteSafetensors):
            yield file, inner


def assumed_equal(sources: Sequence[Source]) -> list[tuple[Checkpoint, str, str]]:
    """List the pairs of tensors on the Hub that were taken for equal because samples of them are."""
    parts = {id(part): part for source in sources for part in source.parts}
    checkpoints = [part for part in parts.values() if isinstance(part, Checkpoint)]
    return [(part, *pair) for part in checkpoints for pair in dict.fromkeys(part.assumed_equal)]


def check_assumed(sources: Sequence[Source]) -> None:
    """Compare tensors that were taken for equal, now that they are here.

    Raises:
        SourceError: they are not.
    """
    for source, first, second in assumed_equal(sources):
        if not torch.equal(source[first], source[second]):
            raise SourceError(
                f"'{first}' of '{source.label}' has other values than '{second}', to which its config ties it: "
                "download the model and name its folder, where this is seen before the merge."
            )


def download_sizes(reads: Iterable[Read]) -> dict[str, int]:
    """Return how many bytes come from the Hub, by the id of the model: whole files, or tensors if they are streamed."""
    sizes: dict[str, int] = {}
    whole = _whole(reads)
    parts = [(file, file.specs()[name].nbytes) for file, name in reads if file.streamed]
    for file, size in [*((file, file.remote.size) for file in whole), *parts]:
        sizes[file.remote.repo] = sizes.get(file.remote.repo, 0) + size
    return sizes


class Ending:
    """Tells the threads that fetch when to end: nothing is wanted any more, or one of them failed.

    Attributes:
        stop: is set as soon as nothing is wanted any more.
        failure: of the first file that could not be had.
    """

    def __init__(self, stop: Event):
        self.stop = stop
        self.failure: BaseException | None = None

    def is_near(self) -> bool:
        return self.stop.is_set() or self.failure is not None

    def result(self, coming: Future[Any]) -> Any:
        """Wait for something that is fetched.

        Raises:
            Stopped: it will not come any more.
        """
        while True:
            try:
                return coming.result(timeout=_PATIENCE)
            except NotYet:
                if coming.done():  # what is fetched may end in a timeout of its own
                    return coming.result()
                if self.is_near():
                    raise Stopped from None


@contextmanager
def fetching(reads: Sequence[Read], stop: Event) -> Iterator[None]:
    """Fetch what will be read for as long as the context lasts.

    Args:
        reads: what will be read, in order; see `remote_reads`.
        stop: is set as soon as nothing is wanted any more.

    Raises:
        SourceError: some of it cannot be had.
    """
    whole = _whole(reads)
    streamed = [(file, name) for file, name in reads if file.streamed]
    ending = Ending(stop)
    try:
        with _bar(whole) as bar:
            _start(len(whole), partial(_download, _expected(whole, ending), bar, ending, current()))
            _start(len(streamed), _Ahead(streamed, ending).work)
            yield
    except Stopped:
        raise ending.failure or Stopped from None
    finally:
        stop.set()


def _start(count: int, work: Callable[[], None]) -> None:
    """Work in some threads, for which nobody waits at the end: a connection may hang."""
    for _ in range(min(count, _AT_A_TIME)):
        Thread(target=work, name="hf_merge fetch", daemon=True).start()


def _expected(files: Sequence[RemoteSafetensors], ending: Ending) -> Queue[tuple[RemoteSafetensors, Future[Any]]]:
    """Queue files; whoever reads one waits for it."""
    queue: Queue[tuple[RemoteSafetensors, Future[Any]]] = Queue()
    for file in files:
        coming: Future[Any] = Future()
        file.read = partial(_when_there, coming, ending)
        queue.put((file, coming))
    return queue


def _download(queue: Queue[tuple[RemoteSafetensors, Future[Any]]], bar: Any, ending: Ending, report: Report) -> None:
    """Bring one file after the other into the cache; one that fails ends all."""
    while not ending.is_near():
        try:
            file, coming = queue.get_nowait()
        except Empty:
            return
        try:
            coming.set_result(file.fetch(tqdm_class=_shared(bar, ending, report)).tensor)
        except BaseException as error:
            ending.failure = ending.failure or (None if isinstance(error, Stopped) else error)
            coming.set_exception(error)


def _bar(files: Sequence[RemoteSafetensors]) -> Any:
    """Return the bar that shows how much of all files is there."""
    total = sum(file.remote.size for file in files)
    hidden = None if files else True
    return tqdm(total=total, unit="B", unit_scale=True, desc="Downloading", name="hf_merge.download", disable=hidden)


def _when_there(coming: Future[Callable[[str], Tensor]], ending: Ending, name: str) -> Tensor:
    """Read a tensor once its file is there."""
    return ending.result(coming)(name)


def _shared(bar: Any, ending: Ending, report: Report) -> type[tqdm]:
    """Return a progress bar for one file that is shown as a part of another, and ends the download when told to."""

    class Part(Silent):
        def __init__(self, *args: Any, **options: Any):
            super().__init__(*args, **options)
            bar.update(options.get("initial") or 0)

        def update(self, n: float | None = 1) -> None:
            if ending.is_near():
                raise Stopped
            bar.update(n or 0)
            report.tell(Progress("downloading", "", 0, 0, int(bar.n), int(bar.total or 0)))

    return Part


def _whole(reads: Iterable[Read]) -> list[RemoteSafetensors]:
    """List the files that come as a whole, in the order of their first use."""
    return list(dict.fromkeys(file for file, _ in reads if not file.streamed))


def check_downloads(reads: Sequence[Read]) -> None:
    """Look whether what will be read can be had, before anything is fetched or written.

    Raises:
        SourceError: the Hub may not be asked for it, or the cache has no room for it.
    """
    for file in dict.fromkeys(file for file, _ in reads):
        file.remote.check_allowed()
    files = _whole(reads)
    if not files:
        return
    needed = sum(file.remote.size for file in files)
    cache = Path(files[0].remote.hub.get("cache_dir") or constants.HF_HUB_CACHE).expanduser()
    folder = next((folder for folder in (cache, *cache.parents) if folder.is_dir()), Path(os.sep))
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise SourceError(
            f"The models take {format_bytes(needed)} in the cache at '{cache}', where {format_bytes(free)} are free: "
            "read them without keeping them with stream=True (--stream), or name another folder with cache_dir "
            "(--cache-dir)."
        )


@dataclass
class _Run:
    """Bytes of a file that come together.

    Attributes:
        begin, end: where they lie, counted from the end of the header.
        left: how many reads of tensors in it are to come.
        coming: the bytes, once they are there.
        begun: whether somebody fetches them.
    """

    file: RemoteSafetensors
    begin: int
    end: int
    left: int = 0
    coming: Future[Tensor] | None = None
    begun: bool = False

    @property
    def size(self) -> int:
        return self.end - self.begin


class _Ahead:
    """Reads runs of bytes in the order of their use, as far ahead as `AHEAD` allows.

    A tensor that is asked for before its run was begun is read at once by who asks, so that nobody waits for room.
    """

    def __init__(self, reads: Sequence[Read], ending: Ending):
        self._ending, self._changed, self._held = ending, Condition(), 0
        self._runs: dict[Read, deque[_Run]] = {}
        self._queue: deque[_Run] = deque()
        last: dict[RemoteSafetensors, _Run] = {}
        for file, name in reads:
            place = file.places[name]
            run = last.get(file)
            if run is None or not _reaches(run, place.begin, place.end):
                run = last[file] = _Run(file, place.begin, place.end)
                self._queue.append(run)
            run.end, run.left = max(run.end, place.end), run.left + 1
            self._runs.setdefault((file, name), deque()).append(run)
            file.read = partial(self.read, file)

    def work(self) -> None:
        """Fetch one run after the other."""
        while (run := self._next()) is not None:
            self._fetch(run)

    def _next(self) -> _Run | None:
        """Take the next run that nobody fetches yet, once there is room for it."""
        with self._changed:
            while not self._ending.is_near():
                while self._queue and self._queue[0].begun:
                    self._queue.popleft()
                if not self._queue:
                    return None
                if not self._held or self._held + self._queue[0].size <= AHEAD:
                    return self._begun(self._queue.popleft())
                self._changed.wait(_PATIENCE)
        return None

    def _begun(self, run: _Run) -> _Run:
        run.coming, run.begun = Future(), True
        self._held += run.size
        return run

    def _fetch(self, run: _Run) -> None:
        assert run.coming is not None
        try:
            run.coming.set_result(run.file.read_bytes(run.begin, run.end))
        except BaseException as error:
            run.coming.set_exception(error)

    def read(self, file: RemoteSafetensors, name: str) -> Tensor:
        """Return a tensor; its bytes are forgotten when it was read as often as planned."""
        with self._changed:
            planned = self._runs.get((file, name))
            run = planned.popleft() if planned else None
            mine = run is not None and not run.begun
            coming = self._begun(run).coming if run is not None and mine else run and run.coming
        if run is None or coming is None:
            return file.read_range(name)
        if mine:
            self._fetch(run)
        place = file.places[name]
        values = self._ending.result(coming)[place.begin - run.begin : place.end - run.begin]
        self._was_read(run)
        return place.view(values)

    def _was_read(self, run: _Run) -> None:
        with self._changed:
            run.left -= 1
            if not run.left:
                self._held -= run.size
                run.coming = None
                self._changed.notify_all()


def _reaches(run: _Run, begin: int, end: int) -> bool:
    """Tell whether a tensor lies in a run, or so close behind it that they come together."""
    within = run.begin <= begin and end <= run.end
    return within or (0 <= begin - run.end <= _GAP and end - run.begin <= _RUN)
