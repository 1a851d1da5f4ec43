"""Several processes that merge together: which of them this is, what they tell each other, how they end together.

They speak through the key-value store of torch.distributed's default group and never in collectives, which wait for
minutes for a process that is dead. Each shows twice a second that it lives; what ends one of them ends all.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import socket
import threading
import time
from bisect import bisect_right
from collections.abc import Callable, Container, Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import replace
from datetime import timedelta
from functools import wraps
from itertools import accumulate, count
from typing import Any, NamedTuple, ParamSpec, TypeVar

import torch
from huggingface_hub import constants
from huggingface_hub.utils import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars, logging

from hf_merge import _compat, errors
from hf_merge.errors import MergeError
from hf_merge.launching import Environment, be_silent, environment, export, is_launched
from hf_merge.planning import Plan

logger = logging.get_logger(__name__)

BEAT = 0.5
"""Seconds between two signs of life."""

PATIENCE = 15.0
"""Seconds without a sign of life after which a process counts as dead; imports from a slow disk take some."""

GRACE = 10.0
"""Seconds that processes which end because of another's failure wait for each other."""

JOIN = 600.0
"""Seconds in which all processes have to come."""

_SILENCE = 4 * BEAT
_POLL = 0.02
_SLACK = 0.05
_calls = count()

Arguments = ParamSpec("Arguments")
Result = TypeVar("Result")


def split(plan: Plan, world: int, finished: Container[str] = ()) -> list[frozenset[str]]:
    """Say which process writes which tensors.

    The bytes that are to be written, laid end to end, are cut into one run for each process; a cut that lies near the
    end of a file is moved there. So each reads what lies together, and few files have more than one writer.

    Args:
        plan: what is written.
        world: how many processes there are.
        finished: files that are there already.

    Returns:
        Names of tensors for every process; none for some if there are more processes than tensors.
    """
    files = [held for file, held in plan.shards.items() if file not in finished]
    names = [name for held in files for name in held]
    ends = list(accumulate(plan.specs[name].nbytes for name in names))
    borders = {ends[end - 1] for end in accumulate(map(len, files)) if end}
    each = (ends[-1] if ends else 0) / world
    cuts = [_near(each * i, borders, each * _SLACK) for i in range(1, world)]
    owners = [bisect_right(cuts, end - plan.specs[name].nbytes / 2) for name, end in zip(names, ends, strict=True)]
    return [frozenset(name for name, owner in zip(names, owners, strict=True) if owner == rank)
            for rank in range(world)]  # fmt: skip


def _near(cut: float, borders: set[int], slack: float) -> float:
    """Move a cut to the nearest border, if one is near."""
    nearest = min(borders, key=lambda border: abs(border - cut), default=cut)
    return nearest if abs(nearest - cut) <= slack else cut


class Failure(NamedTuple):
    """What ended the merge for all.

    Attributes:
        rank: whose failure it is; -1 if that is not known.
        kind: name of the error's class.
        text: what went wrong, the rank included.
        is_dead: whether that process is no more.
    """

    rank: int
    kind: str
    text: str
    is_dead: bool = False


class Team:
    """A process that merges alone: what several would tell each other is not said.

    Attributes:
        rank: which of the processes this is.
        world: how many there are.
    """

    rank = 0
    world = 1

    def __init__(self) -> None:
        self._done = (0, 0)

    @property
    def leads(self) -> bool:
        """Whether this process does what is done once: claims the folder, writes all but weights, publishes."""
        return self.rank == 0

    def advance(self, size: int, tensors: int) -> None:
        """Count what this process has written."""
        self._done = (self._done[0] + size, self._done[1] + tensors)

    def progress(self) -> tuple[int, int]:
        """Return how many bytes and tensors all processes have written, as far as they have said."""
        return self._done

    def check(self) -> None:
        """Raise if another process has failed."""

    def on_failure(self, callback: Callable[[], None]) -> None:
        """Call this as soon as another process has failed, from another thread."""

    def barrier(self, name: str, meanwhile: Callable[[], None] = lambda: None) -> None:
        """Wait until all processes are here."""

    def share(self, name: str, value: Any = None) -> Any:
        """Return what the leader says here."""
        return value

    def agree(self, name: str, value: str, otherwise: str) -> None:
        """Raise if not all processes say the same."""

    def count(self, name: str) -> int:
        """Return how many processes have counted this, with this one."""
        return 1

    @contextmanager
    def node_first(self) -> Iterator[None]:
        """Let one process of every machine go first, so that the others find in the cache what it fetched."""
        yield

    def with_own_device(self, plan: Plan) -> Plan:
        """Let every process use an accelerator of its own where the plan would use all of this machine."""
        return plan

    def abandon(self, error: BaseException | None) -> None:
        """Tell the others that this process gives up; the leader waits until they do not write any more."""


ALONE = Team()
_current: ContextVar[Team] = ContextVar("hf_merge_team", default=ALONE)


def current() -> Team:
    """Return the processes of the merge that is going on."""
    return Team() if (team := _current.get()) is ALONE else team


def together(function: Callable[Arguments, Result]) -> Callable[Arguments, Result]:
    """Run a function on all processes of a launcher at once: what fails on one fails on all, and `current` tells."""

    @wraps(function)
    def call(*args: Arguments.args, **kwargs: Arguments.kwargs) -> Result:
        team = join()
        if team is None:
            return function(*args, **kwargs)
        before = _current.set(team)
        try:
            with team:
                return function(*args, **kwargs)
        finally:
            _current.reset(before)

    return call


def join() -> Ranks | None:
    """Join the other processes; None if there are none.

    Raises:
        MergeError: the environment names others, and they cannot be reached.
    """
    said, dist = environment(), torch.distributed
    is_grouped = dist.is_available() and dist.is_initialized()
    if said.world == 1 and not (is_grouped and dist.get_world_size() > 1):
        return None
    if not is_grouped:
        _meet(said)
    world = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
    if said.world not in (1, world):
        raise MergeError(
            f"{said.by} says that this is one of {said.world} processes, but torch.distributed knows of {world}: "
            "without a GPU make accelerate's state with PartialState(cpu=True) or Accelerator(cpu=True), "
            "or leave that to hf_merge."
        )
    store = _compat.default_store()
    if store is None:
        raise MergeError(f"The backend '{dist.get_backend()}' of torch.distributed has no store: use gloo or nccl.")
    return Ranks(dist.get_rank(), world, dist.PrefixStore(f"hf_merge/{next(_calls)}", store))


def _meet(said: Environment) -> None:
    """Let accelerate start torch.distributed."""
    from accelerate import PartialState

    if said.by != "torchrun":
        export(said)
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    try:
        with _told_after(10, f"Rank {said.rank} waits for the other processes, {said.world} in all: is each started?"):
            PartialState(cpu=kind is None or kind.type == "mps", timeout=timedelta(seconds=JOIN))
    except (RuntimeError, ValueError, OSError) as error:
        raise MergeError(
            f"Rank {said.rank} cannot join the {said.world} processes that {said.by} names "
            f"({os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}): {str(error).splitlines()[0]}. "
            "Start all of them with torchrun, accelerate launch or srun; for one process unset these variables."
        ) from error
    atexit.register(_part)


def _part() -> None:
    """End torch.distributed with the process, or it complains."""
    if torch.distributed.is_initialized():
        torch.distributed.destroy_process_group()


@contextmanager
def _told_after(seconds: float, text: str) -> Iterator[None]:
    """Say something if this takes long."""
    timer = threading.Timer(seconds, logger.warning, [text])
    timer.daemon = True
    timer.start()
    try:
        yield
    finally:
        timer.cancel()


class _Terminated(BaseException):
    """The launcher wants this process to end."""


class Ranks(Team):
    """A process that merges with others.

    Use as a context manager; all of them leave it together, with a result or with the error of the one that failed.

    Args:
        rank: which of the processes this is.
        world: how many there are.
        store: of torch.distributed, in which they leave word for each other; nothing else may be in it.

    Attributes:
        failure: what ended the merge, if something did.
    """

    def __init__(self, rank: int, world: int, store: Any):
        super().__init__()
        self.rank, self.world, self._store = rank, world, store
        self.failure: Failure | None = None
        self._told: list[Callable[[], None]] = []
        self._hosts: list[str] = []
        self._beats: dict[int, tuple[list[int], float]] = {}
        self._heard = time.monotonic()
        self._leaving = False
        self._ended = threading.Event()
        self._signals: dict[int, Any] = {}
        self._bars = False
        self._thread = threading.Thread(target=self._watch, name="hf_merge ranks", daemon=True)

    # --- what they tell each other

    def progress(self) -> tuple[int, int]:
        others = [beat for rank, (beat, _) in self._beats.items() if rank != self.rank]
        return self._done[0] + sum(beat[1] for beat in others), self._done[1] + sum(beat[2] for beat in others)

    def check(self) -> None:
        if self.failure is None and time.monotonic() - self._heard > PATIENCE:
            self._fall(self._lost())
        if self.failure is not None:
            raise self._error(self.failure)

    def on_failure(self, callback: Callable[[], None]) -> None:
        self._told.append(callback)
        if self.failure is not None:
            callback()

    def barrier(self, name: str, meanwhile: Callable[[], None] = lambda: None) -> None:
        self._all(f"barrier/{name}", "", meanwhile)

    def share(self, name: str, value: Any = None) -> Any:
        with self._reached():
            if self.leads:
                self._store.set(f"share/{name}", json.dumps(value))
            self._wait([f"share/{name}"])
            return json.loads(self._store.get(f"share/{name}"))

    def agree(self, name: str, value: str, otherwise: str) -> None:
        said = self._all(f"agree/{name}", value)
        if others := [rank for rank, each in enumerate(said) if each != said[0]]:
            raise MergeError(f"Rank {others[0]} on '{self._hosts[others[0]]}' {otherwise}")

    def count(self, name: str) -> int:
        with self._reached():
            return self._store.add(f"count/{name}", 1)

    @contextmanager
    def node_first(self) -> Iterator[None]:
        first = self._hosts.index(self._hosts[self.rank])
        with self._reached():
            if first != self.rank:
                self._wait([f"went/{first}"])
        yield
        with self._reached():
            self._store.set(f"went/{self.rank}", "")

    def with_own_device(self, plan: Plan) -> Plan:
        kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        if kind is None:
            return plan
        local = self._hosts[: self.rank].count(self._hosts[self.rank])
        own = f"{kind.type}:{local % torch.accelerator.device_count()}"
        return replace(plan, steps=tuple(
            replace(step, device=own) if step.device.startswith(kind.type) else step for step in plan.steps
        ))  # fmt: skip

    def _all(self, key: str, value: str, meanwhile: Callable[[], None] = lambda: None) -> list[str]:
        """Say something, wait until all have, and return what each said."""
        keys = [f"{key}/{rank}" for rank in range(self.world)]
        with self._reached():
            self._store.set(keys[self.rank], value)
            self._wait(keys, meanwhile)
            return [said.decode() for said in self._store.multi_get(keys)]

    def _wait(self, keys: Sequence[str], meanwhile: Callable[[], None] = lambda: None) -> None:
        while not self._store.check(list(keys)):
            self.check()
            meanwhile()
            time.sleep(_POLL)

    @contextmanager
    def _reached(self) -> Iterator[None]:
        """Turn an error of the store into the failure that it means."""
        try:
            yield
        except MergeError:
            raise
        except RuntimeError as error:
            self._fall(self._lost())
            assert self.failure is not None
            raise self._error(self.failure) from error

    # --- how they begin and end

    def __enter__(self) -> Ranks:
        self._beat(0)
        with _told_after(10, f"Rank {self.rank} waits for the others: all {self.world} processes have to call this."):
            self._hosts = self._meet_here()
        self._look()
        self._thread.start()
        self._take_signals()
        self._hide_bars()
        return self

    def _meet_here(self) -> list[str]:
        """Wait until all processes have come; return their hosts."""
        keys, begin = [f"host/{rank}" for rank in range(self.world)], time.monotonic()
        with self._reached():
            self._store.set(keys[self.rank], socket.gethostname())
            while not self._store.check(keys):
                self._heard = time.monotonic()
                if self._heard - begin > JOIN:
                    absent = [rank for rank, key in enumerate(keys) if not self._store.check([key])]
                    raise MergeError(
                        f"{len(absent)} of {self.world} processes did not come in {JOIN:.0f} s, "
                        f"rank {absent[0]} among them: all of them have to call this."
                    )
                time.sleep(_POLL)
            return [host.decode() for host in self._store.multi_get(keys)]

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: Any) -> None:
        try:
            if error is None:
                self._leave()
            else:
                self._end(error)
        finally:
            self._ended.set()
            self._give_signals_back()
            if self._bars:
                enable_progress_bars("hf_merge")

    def _leave(self) -> None:
        """Go, the leader last: the store may be in its process."""
        self._leaving = True
        with suppress(RuntimeError):
            self._store.set(f"stopped/{self.rank}", "")
            if self.leads:
                self._stopped(GRACE)

    def abandon(self, error: BaseException | None) -> None:
        self._leaving = True
        if self.failure is not None and self.failure.rank < 0:
            return
        with suppress(RuntimeError):
            if self.failure is None:
                self._tell(self._cause(error))
            if self.leads:
                self._stopped(GRACE, but=self.rank)
            else:
                self._store.set(f"stopped/{self.rank}", "")

    def _end(self, error: BaseException) -> None:
        """Wait for the others and raise what ended all, in the words that all use."""
        self.abandon(error)
        failure = self.failure or self._lost()
        with suppress(RuntimeError):
            if failure.rank >= 0:
                self._store.set(f"stopped/{self.rank}", "")
                self._stopped(2 * GRACE)
        if not self._is_first_alive(failure):
            be_silent()
        if isinstance(error, KeyboardInterrupt):
            return
        is_mine = failure.rank == self.rank or failure.text.endswith(f": {error}")  # or it failed here in the same way
        if not is_mine or isinstance(error, _Terminated):
            raise self._error(failure) from (None if isinstance(error, MergeError | _Terminated) else error)
        if isinstance(error, MergeError):
            error.args = (failure.text, *error.args[1:])
        else:
            error.add_note(f"This was rank {self.rank} of {self.world}.")

    def _is_first_alive(self, failure: Failure) -> bool:
        """Tell whether this process speaks for all; if they cannot reach each other, each may have to."""
        if failure.rank < 0:
            return self.leads or not is_launched()
        dead = {failure.rank} if failure.is_dead else set()
        now = time.monotonic()
        living = {rank for rank, (_, when) in self._beats.items() if now - when < _SILENCE}
        return self.rank == min({self.rank, *living} - dead)

    def _stopped(self, seconds: float, but: int = -1) -> None:
        """Wait until nobody writes any more; not for the dead, and not for ever."""
        begin = time.monotonic()
        dead = self.failure.rank if self.failure is not None and self.failure.is_dead else -1
        keys = [f"stopped/{rank}" for rank in range(self.world) if rank not in (but, dead)]
        while not self._store.check(keys) and time.monotonic() - begin < seconds:
            time.sleep(_POLL)

    def _cause(self, error: BaseException | None) -> Failure:
        """Put an error of this process into words for all; a launcher that ends it may have seen another die."""
        me = f"Rank {self.rank} of {self.world}"
        if isinstance(error, _Terminated):
            time.sleep(_SILENCE)
            silent = [rank for rank, (_, when) in self._beats.items() if time.monotonic() - when > _SILENCE - BEAT / 2]
            return self._dead(silent[0]) if silent else Failure(self.rank, "MergeError", f"{me} was told to stop.")
        if isinstance(error, KeyboardInterrupt):
            return Failure(self.rank, "MergeError", f"{me} was interrupted.")
        name, text = type(error).__name__, str(error)
        return Failure(self.rank, name, f"{me}: {text}" if isinstance(error, MergeError) else f"{me}: {name}: {text}")

    def _dead(self, rank: int) -> Failure:
        where = self._hosts[rank] if self._hosts else "its machine"
        return Failure(
            rank, "MergeError",
            f"Rank {rank} of {self.world}, on '{where}', has died: it gives no sign of life. Look into the log there "
            "(was it out of memory?), and repeat the call with resume=True (--resume), with any number of processes.",
            is_dead=True,
        )  # fmt: skip

    def _lost(self) -> Failure:
        return Failure(
            -1, "MergeError",
            f"Rank {self.rank} of {self.world} cannot reach the others any more: the launcher, or rank 0, has ended. "
            "Repeat the call with resume=True (--resume), with any number of processes.",
        )  # fmt: skip

    def _error(self, failure: Failure) -> MergeError:
        kind = getattr(errors, failure.kind, MergeError)
        return (kind if isinstance(kind, type) and issubclass(kind, MergeError) else MergeError)(failure.text)

    def _tell(self, failure: Failure) -> None:
        """Leave word of a failure; the first one counts."""
        said = self._store.compare_set("failure", "", json.dumps(failure))
        self._fall(Failure(*json.loads(said)))

    def _fall(self, failure: Failure) -> None:
        if self.failure is None:
            self.failure = failure
            for callback in self._told:
                callback()

    # --- signs of life

    def _watch(self) -> None:
        """Show that this process lives, and look whether the others do."""
        try:
            for number in count(1):
                if self._ended.wait(BEAT):
                    return
                self._beat(number)
                self._look()
                self._heard = time.monotonic()
        except RuntimeError:
            if not self._leaving:
                self._fall(self._lost())

    def _beat(self, number: int) -> None:
        self._store.set(f"beat/{self.rank}", json.dumps([number, *self._done]))

    def _look(self) -> None:
        now = time.monotonic()
        beats = self._store.multi_get([f"beat/{rank}" for rank in range(self.world)])
        for rank, text in enumerate(beats):
            beat = json.loads(text)
            if rank not in self._beats or self._beats[rank][0][0] != beat[0]:
                self._beats[rank] = (beat, now)
        if self.failure is not None or self._leaving:
            return
        if self._store.check(["failure"]):
            self._fall(Failure(*json.loads(self._store.get("failure"))))
        elif dead := [rank for rank, (_, when) in self._beats.items() if now - when > PATIENCE]:
            self._tell(self._dead(dead[0]))

    # --- signals and bars

    def _take_signals(self) -> None:
        """End in an orderly way when a launcher asks for it, and be deaf for its second call."""
        if threading.current_thread() is not threading.main_thread():
            return
        for number, default in ((signal.SIGTERM, signal.SIG_DFL), (signal.SIGINT, signal.default_int_handler)):
            if signal.getsignal(number) is default:
                self._signals[number] = signal.signal(number, self._on_signal)

    def _on_signal(self, number: int, frame: Any) -> None:
        if self._leaving:
            return
        self._leaving = True
        raise KeyboardInterrupt if number == signal.SIGINT else _Terminated

    def _give_signals_back(self) -> None:
        for number, handler in self._signals.items():
            signal.signal(number, handler)

    def _hide_bars(self) -> None:
        """Only the leader shows bars."""
        hidden = are_progress_bars_disabled("hf_merge.merge") or constants.HF_HUB_DISABLE_PROGRESS_BARS is not None
        if not self.leads and not hidden:
            self._bars = True
            disable_progress_bars("hf_merge")
