"""Merges and pushes as jobs of the server: they go on without the tab that started them, and leave nothing behind.

Each job has a folder: `job.json` (what is known of it, never a token), `work` and `cache`. Both are removed unless the
job is done, and the whole of it some hours later; the caches of what is done go earlier where room is needed. After a
restart of the server what is done is still there, and what was not is `lost`.
"""

from __future__ import annotations

import json
import logging
import re
import secrets
import shutil
import threading
import time
import traceback
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any

import filelock
import security

import hf_merge

QUEUED, RUNNING, DONE, FAILED, CANCELLED, LOST = "queued", "running", "done", "failed", "cancelled", "lost"
CANCELLING = "cancelling"
"""What a running job says of itself from when it is cancelled until it has noticed."""
UNFINISHED = (QUEUED, RUNNING)
RECORD = "job.json"
_LAYER = re.compile(r"\.(\d+)\.")
SMOOTHING = 0.8
"""How much of an earlier rate counts for the one that is shown."""
LATE = 3.0
"""Seconds after which the folders of a job that was ended are looked at again."""
SWEEP = 600.0
"""Seconds between two looks for what is too old."""

logger = logging.getLogger("hf_merge.space")


class JobRefused(Exception):
    """A job that is not taken; the message is for who asked."""


@dataclass
class Job:
    """A merge or a push.

    Attributes:
        id: its name.
        owner: a hash of the secret of the browser that started it.
        recipe: what is merged.
        disk: bytes that it may take.
        folder: of the job.
        layers: how many layers the result has; 0 if that is not known.
        state: queued, running, done, failed, cancelled or lost.
        stage: what is going on: merging, analysing, uploading.
        progress: how far it is.
        downloads: how far the downloads are, which go on beside it.
        rate: bytes a second, smoothed.
        message: why it failed.
        result: plain data that the work returned.
        created, started, ended: seconds since 1970; 0 before.
    """

    id: str
    owner: str
    recipe: dict[str, Any]
    disk: int
    folder: Path
    layers: int = 0
    state: str = QUEUED
    stage: str = ""
    progress: hf_merge.Progress | None = None
    downloads: hf_merge.Progress | None = None
    rate: float = 0.0
    message: str = ""
    result: Any = None
    created: float = field(default_factory=time.time)
    started: float = 0.0
    ended: float = 0.0
    place: int = 0
    _stop: threading.Event = field(default_factory=threading.Event, repr=False)
    _last: tuple[str, int, float] = ("", 0, 0.0)
    _begun: dict[int, None] = field(default_factory=dict, repr=False)

    @property
    def work(self) -> Path:
        """Where results go."""
        return self.folder / "work"

    @property
    def cache(self) -> Path:
        """Where downloads go, so that what a token has opened is in nobody else's cache."""
        return self.folder / "cache"

    @property
    def seconds(self) -> float:
        """How long it has been running."""
        return (self.ended or time.time()) - self.started if self.started else 0.0

    @property
    def stopping(self) -> bool:
        """Whether it was cancelled, and goes on until it notices."""
        return self.state == RUNNING and self._stop.is_set()

    def enter(self, stage: str) -> None:
        """Say what begins now.

        Raises:
            hf_merge.Cancelled: it was cancelled.
        """
        self.stage, self.progress, self.downloads, self.rate = stage, None, None, 0.0
        self._begun = {}
        self._heed()

    def report(self, progress: hf_merge.Progress) -> None:
        """Take note of how far the work is.

        Raises:
            hf_merge.Cancelled: it was cancelled.
        """
        self._heed()
        if progress.stage == "downloading":
            self.downloads = progress
            return
        now = time.monotonic()
        stage, size, moment = self._last
        if stage != progress.stage or progress.bytes < size:
            self._last, self.rate = (progress.stage, progress.bytes, now), 0.0
        elif now - moment >= 0.25:
            rate = (progress.bytes - size) / (now - moment)
            self.rate = SMOOTHING * self.rate + (1 - SMOOTHING) * rate if self.rate else rate
            self._last = (progress.stage, progress.bytes, now)
        self.stage, self.progress = progress.stage, progress
        if layer := _LAYER.search(progress.tensor):
            self._begun[int(layer[1])] = self._begun.pop(int(layer[1]), None)

    def _heed(self) -> None:
        if self._stop.is_set():
            raise hf_merge.Cancelled("The job was cancelled.")

    def cells(self) -> list[dict[str, Any]]:
        """Return for each layer whether it is merged, as far as the tensors that were told of show it."""
        if not self.layers or self.stage != "merging":
            return []
        last = next(reversed(self._begun), None)
        return [
            {"label": str(layer), "done": 0 if layer not in self._begun else 0.5 if layer == last else 1}
            for layer in range(self.layers)
        ]

    def to_dict(self) -> dict[str, Any]:
        """Return how it stands, as plain data for who looks at it."""
        at = self.progress
        left = at.all_bytes - at.bytes if at else 0
        return {
            "id": self.id,
            "state": CANCELLING if self.stopping else self.state,
            "stage": self.stage,
            "place": self.place,
            "message": self.message,
            "tensor": at.tensor if at else "",
            "tensors": at.tensors if at else 0,
            "all_tensors": at.all_tensors if at else 0,
            "bytes": at.bytes if at else 0,
            "all_bytes": at.all_bytes if at else 0,
            "rate": round(self.rate),
            "downloaded": self.downloads.bytes if self.downloads else 0,
            "to_download": self.downloads.all_bytes if self.downloads else 0,
            "eta": round(left / self.rate) if self.rate and left else None,
            "seconds": round(self.seconds, 1),
        }


Work = Callable[[Job], Any]


class Jobs:
    """All jobs of a server.

    Args:
        folder: of their folders; no other server may use it.
        slots: how many run at a time.
        max_queued: how many wait, of all owners.
        per_owner: how many one owner has waiting and running.
        keep: seconds for which what is done is kept.
        max_disk: bytes that jobs may take together; what the disk has, if not given.

    Raises:
        JobRefused: another server uses the folder.
    """

    def __init__(
        self,
        folder: Path,
        *,
        slots: int = 1,
        max_queued: int = 32,
        per_owner: int = 2,
        keep: float = 6 * 3600.0,
        max_disk: int | None = None,
    ):
        self.folder, self.max_queued, self.per_owner, self.keep, self.max_disk = (
            folder,
            max_queued,
            per_owner,
            keep,
            max_disk,
        )
        folder.mkdir(parents=True, exist_ok=True)
        self._alone = filelock.FileLock(folder / ".lock")
        try:
            self._alone.acquire(timeout=0)
        except filelock.Timeout:
            raise JobRefused(f"Another server uses '{folder}': give this one a folder of its own.") from None
        self._lock = threading.RLock()
        self._pool = ThreadPoolExecutor(slots, thread_name_prefix="job")
        self._jobs: dict[str, Job] = dict(self._found())
        self._closing = threading.Event()
        self.sweep()
        threading.Thread(target=self._sweep_for_ever, daemon=True, name="sweep").start()

    def submit(self, owner: str, recipe: dict[str, Any], disk: int, work: Work, *, layers: int = 0) -> Job:
        """Queue a job.

        Args:
            owner: the secret of the browser.
            recipe: what is merged, as plain data without secrets.
            disk: bytes that it may take.
            work: gets the job and returns plain data; nothing of it outlives the job.
            layers: how many layers the result has.

        Raises:
            JobRefused: too many wait, or the disk is too small.
        """
        with self._lock:
            waiting = [job for job in self._jobs.values() if job.state in UNFINISHED]
            mine = [job for job in waiting if job.owner == _hash(owner)]
            if len(mine) >= self.per_owner:
                raise JobRefused(f"You have {len(mine)} merges here already: wait for one, or cancel it.")
            if len(waiting) >= self.max_queued:
                raise JobRefused(f"{len(waiting)} merges are waiting, and no more are taken: come back later.")
            if disk > self._room():
                raise JobRefused(_too_large(disk, self._room()))
            name = secrets.token_urlsafe(12)
            job = Job(name, _hash(owner), dict(recipe), disk, self.folder / name, layers)
            job.work.mkdir(parents=True)
            self._jobs[name] = job
            self._save(job)
            self._count()
        self._pool.submit(self._run, job, work)
        return job

    def get(self, owner: str, job_id: str) -> Job | None:
        """Return a job of this owner; None for those of others, and those that are gone."""
        job = self._jobs.get(job_id)
        return job if job is not None and secrets.compare_digest(job.owner, _hash(owner)) else None

    def of(self, owner: str) -> list[Job]:
        """Return the jobs of an owner, the latest first."""
        with self._lock:
            mine = [job for job in self._jobs.values() if job.owner == _hash(owner)]
        return sorted(mine, key=lambda job: -job.created)

    def cancel(self, owner: str, job_id: str) -> bool:
        """Stop a job of this owner; it ends at its next tensor. Returns whether there was something to stop."""
        job = self.get(owner, job_id)
        if job is None or job.state not in UNFINISHED:
            return False
        job._stop.set()
        with self._lock:
            if job.state == QUEUED:
                self._end(job, CANCELLED)
        return True

    def free(self) -> int:
        """Return the bytes of disk that a new job may take now."""
        with self._lock:
            return self._room() - sum(job.disk for job in self._jobs.values() if job.state == RUNNING)

    def sweep(self) -> None:
        """Remove what is too old, and folders that belong to no job."""
        with self._lock:
            for job in list(self._jobs.values()):
                if job.state not in UNFINISHED and time.time() - job.ended > self.keep:
                    del self._jobs[job.id]
                elif job.state not in (*UNFINISHED, DONE):
                    _clear(job)
            for folder in self.folder.iterdir():
                if folder.is_dir() and folder.name not in self._jobs:
                    shutil.rmtree(folder, ignore_errors=True)

    def close(self) -> None:
        """Cancel all jobs and wait for them."""
        self._closing.set()
        for job in list(self._jobs.values()):
            job._stop.set()
        self._pool.shutdown(wait=True, cancel_futures=True)
        self._alone.release()

    def _run(self, job: Job, work: Work) -> None:
        with self._lock:
            if job.state != QUEUED:
                return
            if job.disk > self.free():
                self._drop_caches()
            if job.disk > self.free():
                job.message = _too_large(job.disk, self.free())
                self._end(job, FAILED)
                return
            job.state, job.started = RUNNING, time.time()
            self._save(job)
            self._count()
        with self._ended(job):
            job.result = work(job)
            json.dumps(job.result)  # what cannot be kept is found out here

    @contextmanager
    def _ended(self, job: Job) -> Iterator[None]:
        """Say how a job ended, whatever happens in it."""
        state = DONE
        try:
            yield
        except hf_merge.Cancelled:
            state = CANCELLED
        except hf_merge.MergeError as error:
            state, job.message = FAILED, security.redact(str(error))
        except BaseException as error:  # whatever it is, the next job runs
            told = security.redact(traceback.format_exc())  # as text: a record with the error would keep the token
            logger.error("job %s failed:\n%s", job.id, told)
            state, job.message = (
                FAILED,
                f"Something unforeseen went wrong ({type(error).__name__}); its owner can see it in the log.",
            )
        with self._lock:
            self._end(job, state)

    def _end(self, job: Job, state: str) -> None:
        job.state, job.ended = state, time.time()
        if state != DONE:
            job.result = None
            _clear(job)
            later = threading.Timer(LATE, _clear, [job])  # a download that was under way may end after its merge
            later.daemon = True
            later.start()
        self._save(job)
        self._count()

    def _drop_caches(self) -> None:
        """Make room: what was downloaded for jobs that are done can be downloaded again."""
        for job in self._jobs.values():
            if job.state == DONE:
                shutil.rmtree(job.cache, ignore_errors=True)

    def _count(self) -> None:
        """Say which place in the queue each waiting job has."""
        waiting = sorted((job for job in self._jobs.values() if job.state == QUEUED), key=lambda job: job.created)
        for place, job in enumerate(waiting, start=1):
            job.place = place

    def _save(self, job: Job) -> None:
        kept = ("id", "owner", "recipe", "disk", "layers", "state", "message", "result", "created", "started", "ended")
        text = json.dumps({key: getattr(job, key) for key in kept})
        job.folder.mkdir(exist_ok=True)
        (job.folder / f"{RECORD}.new").write_text(text, encoding="utf-8")
        (job.folder / f"{RECORD}.new").replace(job.folder / RECORD)

    def _found(self) -> Iterator[tuple[str, Job]]:
        """Return the jobs of an earlier server; what it did not finish is lost."""
        for file in self.folder.glob(f"*/{RECORD}"):
            try:
                job = Job(folder=file.parent, **json.loads(file.read_text(encoding="utf-8")))
            except (ValueError, TypeError):
                continue  # its folder is swept
            if job.state in UNFINISHED:
                job.message = "The server was restarted while this merge was running: start it again."
                self._forget(job)
            yield job.id, job

    def _forget(self, job: Job) -> None:
        job.state, job.ended = LOST, time.time()
        _clear(job)
        self._save(job)

    def _room(self) -> int:
        free = shutil.disk_usage(self.folder).free
        return free if self.max_disk is None else min(free, self.max_disk)

    def _sweep_for_ever(self) -> None:
        while not self._closing.wait(SWEEP):
            self.sweep()


def _clear(job: Job) -> None:
    """Remove what a job that is not done has left."""
    for folder in (job.work, job.cache):
        shutil.rmtree(folder, ignore_errors=True)


def _too_large(disk: int, free: int) -> str:
    return (
        f"The merge takes {disk / 1e9:.1f} GB of disk, and {max(free, 0) / 1e9:.1f} GB are free here: merge straight "
        "to the Hub, or run the command elsewhere."
    )


def _hash(owner: str) -> str:
    return sha256(owner.encode()).hexdigest()
