"""A merge that goes to the Hub file by file: each is uploaded while the next is merged, and few lie on the disk."""

from __future__ import annotations

import json
from pathlib import Path
from queue import SimpleQueue
from threading import Condition, Event, Thread
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd

from hf_merge import _compat, progress
from hf_merge.errors import PublishError
from hf_merge.hub import CARD, Destination, folder_contents, noted
from hf_merge.progress import EVERY, Progress
from hf_merge.sending import Addition
from hf_merge.writer import CARRIED, RECIPE_FILE

AT_ONCE = 2
"""Files of weights that lie on the disk at a time: one that is written, and one that is uploaded."""


class Uploads:
    """The writer's carrier: sends every file as soon as it is whole, while the next is merged, and deletes it.

    Attributes:
        destination: where to.
        recipe: what others may see of it.
        taken: SHA-256 and size of the files that are on the Hub; a resumed run takes them over.
        info: the commit; there is none before `complete` is done.
    """

    info: CommitInfo

    def __init__(self, destination: Destination, *, recipe: str):
        self.destination, self.recipe = destination, recipe
        self.taken: dict[str, dict[str, Any]] = {}
        self._sent: dict[str, CommitOperationAdd] = {}
        self._earlier: set[str] = set()
        self._here: set[str] = set()
        self._sizes: dict[str, int] = {}
        self._current: Addition | None = None
        self._unwanted = Event()
        self._queue: SimpleQueue[str | None] = SimpleQueue()
        self._changed = Condition()
        self._failure: BaseException | None = None
        self._stopped = False
        self._thread = Thread(target=self._work, name="hf_merge uploads", daemon=True)

    def begin(self, folder: Path) -> set[str]:
        """Start; return the files that an earlier run has uploaded."""
        self._folder = folder
        self.taken = noted(folder, self.destination.repo_id)
        self._earlier = set(self.taken)
        self._sent = {file: self._uploaded(file, **about) for file, about in self.taken.items()}
        self._thread.start()
        return set(self.taken)

    def _uploaded(self, file: str, *, sha256: str, size: int) -> CommitOperationAdd:
        there = self.destination.files.get(file)
        is_committed = there is not None and there.lfs is not None and there.lfs.sha256 == sha256
        return _compat.uploaded_file(file, sha256=sha256, size=size, is_committed=is_committed)

    def admit(self, file: str) -> None:
        """Wait until fewer than two files lie on the disk, or raise what went wrong with an upload."""
        with self._changed:
            self._changed.wait_for(lambda: self._failure or self._stopped or len(self._here) < AT_ONCE)
            self._raise_failure()
            if self._stopped:
                raise PublishError("The merge was given up.")
            self._here.add(file)

    def take(self, file: str) -> None:
        """Upload a whole file, in the background."""
        with self._changed:
            self._sizes[file] = (self._folder / file).stat().st_size
        self._queue.put(file)

    def stop(self) -> None:
        """Give up; an upload that goes on does not count any more."""
        with self._changed:
            self._stopped = True
            self._changed.notify_all()
        self._unwanted.set()
        self._queue.put(None)

    def complete(self) -> None:
        """Wait for the uploads, and commit them with all that lies in the folder."""
        self._queue.put(None)
        self._wait(progress.current())
        self._raise_failure()
        with self.destination.in_words():
            additions = folder_contents(self._folder)
            additions.pop(CARD)
            card = (self._folder / CARD).read_text(encoding="utf-8")
        additions[RECIPE_FILE] = CommitOperationAdd(RECIPE_FILE, self.recipe.encode())
        additions = {path: each for path, each in additions.items() if path not in self._sent}
        try:
            self.info = self.destination.commit(additions, carried=self._sent, card=card, recipe=self.recipe)
        except PublishError as error:
            if self._earlier and "LFS pointer" in str(error.__cause__):
                self._forget_earlier()
                raise PublishError(
                    f"The Hub has lost what an earlier run uploaded for '{self.destination.repo_id}': "
                    "repeat the call with resume=True (--resume), and these files are merged again."
                ) from error
            raise

    def _wait(self, report: progress.Report) -> None:
        """Wait until all are on the Hub, and tell how far that is."""
        while self._thread.is_alive():
            self._thread.join(EVERY)
            report.tell(self._progress())

    def _progress(self) -> Progress:
        with self._changed:
            sizes = self._sizes | {file: int(about["size"]) for file, about in self.taken.items()}
            sent, current = list(self._sent), self._current
        out = sum(sizes[file] for file in sent) + (current.read if current else 0)
        name, size = (current.path_in_repo if current else ""), sum(sizes.values())
        return Progress("uploading", name, len(sent), len(sizes), min(out, size), size)

    def _raise_failure(self) -> None:
        if self._failure is not None:
            raise self._failure

    def _work(self) -> None:
        while (file := self._queue.get()) is not None:
            try:
                self._send(file)
            except BaseException as error:
                with self._changed:
                    self._failure = error
                    self._changed.notify_all()
                return

    def _send(self, file: str) -> None:
        path = self._folder / file
        with self.destination.in_words():
            self._current = addition = Addition(file, path)
            addition.unwanted = self._unwanted
            self.destination.send([addition], forget=True)
        with self._changed:
            if self._stopped:
                return
            self._sent[file], self._current = addition, None
            if addition.path_or_fileobj == b"":  # else the Hub keeps it in git, and it goes out with the commit
                about = addition.upload_info
                self.taken[file] = {"sha256": about.sha256.hex(), "size": about.size}
                self._note()
                path.unlink()
            self._here.discard(file)
            self._changed.notify_all()

    def _note(self) -> None:
        """Leave word of what is on the Hub."""
        text = json.dumps({"repo_id": self.destination.repo_id, "files": self.taken})
        new = self._folder / f"{CARRIED}.new"
        new.write_text(text, encoding="utf-8")
        new.replace(self._folder / CARRIED)

    def _forget_earlier(self) -> None:
        self.taken = {file: about for file, about in self.taken.items() if file not in self._earlier}
        self._note()
