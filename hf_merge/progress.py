"""How far a merge or an upload is, told to whoever called it; what that listener raises ends the work.

The listener stands in a context variable, as the processes of a merge do (`ranks.current`): what runs deep below the
call finds it there, and threads that were started on the way do not.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import wraps
from threading import RLock
from typing import Any, Literal, ParamSpec, TypeVar, cast

EVERY = 0.2
"""Seconds after which a listener hears the same again while nothing comes forward, so that it can end the work."""

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


@dataclass(frozen=True)
class Progress:
    """How far it is.

    Attributes:
        stage: `downloading` files of models, which goes on beside `merging`; `analyzing`; or `uploading` to the Hub.
        tensor: the tensor that was written last, or the file that is uploaded; empty if there is none yet.
        tensors: how many are whole: tensors, or files while uploading.
        all_tensors: how many there will be.
        bytes: how many are written, or uploaded.
        all_bytes: how many there will be.
    """

    stage: Literal["downloading", "merging", "analyzing", "uploading"]
    tensor: str
    tensors: int
    all_tensors: int
    bytes: int
    all_bytes: int


OnProgress = Callable[[Progress], object]
"""A listener: called from several threads, but never from two at a time. What it raises ends the work."""


class Report:
    """Tells a listener, one call at a time.

    Args:
        listener: None if nobody listens.

    Attributes:
        ended: what the listener raised; it is not called again after that.
    """

    def __init__(self, listener: OnProgress | None = None):
        self.listener, self.ended = listener, cast("BaseException | None", None)
        self._last = Progress("merging", "", 0, 0, 0, 0)
        self._one_at_a_time = RLock()

    def tell(self, progress: Progress) -> None:
        """Tell it, and raise what it raises, now or before."""
        with self._one_at_a_time:
            if self.ended is not None:
                raise self.ended
            self._last = progress
            if self.listener is None:
                return
            try:
                self.listener(progress)
            except BaseException as error:
                self.ended = error
                raise

    def again(self) -> None:
        """Repeat what was told last, so that the listener can end the work."""
        self.tell(self._last)


SILENT = Report()
_current: ContextVar[Report] = ContextVar("hf_merge_report", default=SILENT)


def current() -> Report:
    """Return the report of the call that is going on in this thread."""
    return _current.get()


@contextmanager
def reporting(listener: OnProgress | None) -> Iterator[Report]:
    """Let a listener hear what goes on inside; what it raised comes out as it was, whatever became of it on the way."""
    report = Report(listener)
    before = _current.set(report)
    try:
        yield report
    except BaseException as error:
        if report.ended is None or report.ended is error:
            raise
        raise report.ended from None
    finally:
        _current.reset(before)


def reported(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Give a function whose last keyword is `on_progress` a listener; it need not pass it on."""

    @wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        with reporting(cast("Any", kwargs.get("on_progress"))):
            return function(*args, **kwargs)

    return call
