"""Tensors on their way to a device and back: pinned buffers, copies beside arithmetic, a bound on what is in flight.

A lane belongs to one thread and one device. On the CPU it does nothing but name the buffers that the thread keeps. On
an accelerator it has a stream of its own, so that one thread's copies run while another's tensors are computed or
written, and a few pinned buffers, each of which is used again only when its copy is done.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from threading import Condition, local
from typing import Any

import torch
from torch import Tensor

from hf_merge.planning import DEVICE_TILE, TILE

PIECE = 1 << 24
"""Bytes of a pinned buffer: large enough for the full speed of the bus."""

_TURNS = 2  # buffers in each direction: one is filled or emptied while the other is copied


class Lane:
    """The way of one thread's tensors to the CPU: they are there.

    Attributes:
        device: where the arithmetic is.
        is_host: whether it is that of the CPU.
        tile: how many elements an elementwise method sees at a time.
        kept: buffers of the thread, by dtype: fresh memory costs more than the arithmetic on it.
    """

    is_host = True

    def __init__(self, device: str = "cpu"):
        self.device = torch.device(device)
        self.tile = TILE
        self.kept: dict[torch.dtype, list[Tensor]] = {}

    def buffers(self, count: int, size: int, dtype: torch.dtype) -> list[Tensor]:
        """Return uninitialised memory for the inputs of a tile; the next call takes it back."""
        if size > self.tile:
            return self._fresh(count, size, dtype)
        mine = self.kept.setdefault(dtype, [])
        mine += self._fresh(count - len(mine), self.tile, dtype)
        return [buffer[:size] for buffer in mine[:count]]

    def _fresh(self, count: int, size: int, dtype: torch.dtype) -> list[Tensor]:
        return [torch.empty(size, dtype=dtype, device=self.device) for _ in range(count)]

    def working(self) -> AbstractContextManager[Any]:
        """Return the context in which the thread computes."""
        return nullcontext()

    def load(self, target: Tensor, values: Tensor) -> None:
        """Copy the values of a flat tensor, wherever it lies, into one on the device, in the dtype of that."""
        target.copy_(values)

    def hold(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        """Return flat tensors as such that may be read again and again without crossing the bus."""
        return tensors

    def unload(self, values: Tensor) -> Iterator[tuple[int, Tensor]]:
        """Yield (index of the first, values) of a flat tensor in memory of the host; each is valid until the next."""
        yield 0, values

    def release(self) -> None:
        """Give memory of the device back that is kept for later."""


class Accelerator:
    """What torch offers to move tensors to one accelerator and back. Tests put another in its place.

    Args:
        name: of the device, as `cuda:0`.
    """

    def __init__(self, name: str):
        self.device = torch.empty(0, device=name).device  # `cuda` is the current one, by its number
        torch.accelerator.synchronize(self.device)  # what others have put there is there

    def stream(self) -> AbstractContextManager[Any]:
        """Make a stream; as a context it is the thread's current one."""
        return torch.Stream(self.device)

    def event(self) -> Any:
        """Make an event; who awaits it leaves the core to others."""
        return torch.Event(self.device, blocking=True)

    def record(self, event: Any) -> None:
        """Let an event follow what was enqueued on this device, which need not be the thread's current one."""
        event.record(torch.accelerator.current_stream(self.device))

    def host_memory(self, size: int) -> Tensor:
        """Allocate bytes that the device copies from and to by itself; plain ones where there are no such."""
        with contextlib.suppress(RuntimeError):
            return torch.empty(size, dtype=torch.uint8, pin_memory=True)
        return torch.empty(size, dtype=torch.uint8)

    def reaches(self, values: Tensor) -> bool:
        """Tell whether a tensor lies on a device, this one or another, from which it comes without the host."""
        return values.device.type != "cpu"

    def copy(self, target: Tensor, source: Tensor) -> None:
        """Enqueue a copy on the current stream."""
        target.copy_(source, non_blocking=True)

    def release(self) -> None:
        """Give memory back that torch keeps for later."""
        torch.accelerator.empty_cache()


class _Slot:
    """A pinned buffer, and the event after its last copy."""

    def __init__(self, accelerator: Accelerator):
        self.bytes, self.event = accelerator.host_memory(PIECE), accelerator.event()

    def view(self, like: Tensor) -> Tensor:
        """Show the beginning as a tensor of the dtype and size of `like`."""
        return self.bytes[: like.numel() * like.element_size()].view(like.dtype)


class _Ring:
    """Pinned buffers that take turns; made when they are first needed."""

    def __init__(self, accelerator: Accelerator):
        self._accelerator, self._slots, self._turn = accelerator, [], 0

    def take(self) -> _Slot:
        """Return the next buffer when its last copy is done."""
        self._turn += 1
        if len(self._slots) < _TURNS:
            self._slots.append(_Slot(self._accelerator))
            return self._slots[-1]
        slot = self._slots[(self._turn - 1) % _TURNS]
        slot.event.synchronize()
        return slot


class DeviceLane(Lane):
    """The way of one thread's tensors to an accelerator and back.

    Args:
        accelerator: the device.
        own_stream: compute beside other threads; if not, on the stream that is current.
    """

    is_host = False

    def __init__(self, accelerator: Accelerator, *, own_stream: bool):
        self.device, self.tile = accelerator.device, DEVICE_TILE
        self._accelerator = accelerator
        self._stream = accelerator.stream() if own_stream else nullcontext()
        self._up, self._down = _Ring(accelerator), _Ring(accelerator)

    def buffers(self, count: int, size: int, dtype: torch.dtype) -> list[Tensor]:
        """Return fresh memory: torch keeps that of the device, and a thread that rests should hold none."""
        return self._fresh(count, size, dtype)

    def working(self) -> AbstractContextManager[Any]:
        return self._stream

    def load(self, target: Tensor, values: Tensor) -> None:
        if self._accelerator.reaches(values):
            target.copy_(values)
            return
        for start, part in _pieces(values):
            slot = self._up.take()
            staged = slot.view(part)
            staged.copy_(part)  # reads the file, if it is mapped
            place = target[start : start + part.numel()]
            landed = place if place.dtype == part.dtype else torch.empty_like(staged, device=self.device)
            self._accelerator.copy(landed, staged)
            self._accelerator.record(slot.event)
            if landed is not place:  # few bytes cross the bus, and the device widens them
                place.copy_(landed)

    def hold(self, tensors: Sequence[Tensor]) -> Sequence[Tensor]:
        return [self._held(tensor) for tensor in tensors]

    def _held(self, values: Tensor) -> Tensor:
        if values.device == self.device and self._accelerator.reaches(values):
            return values
        held = torch.empty(values.numel(), dtype=values.dtype, device=self.device)
        self.load(held, values)
        return held

    def unload(self, values: Tensor) -> Iterator[tuple[int, Tensor]]:
        if values.device != self.device:
            yield 0, values
            return
        waiting: tuple[int, Tensor, _Slot] | None = None
        for start, part in _pieces(values):
            slot = self._down.take()
            staged = slot.view(part)
            self._accelerator.copy(staged, part)
            self._accelerator.record(slot.event)
            yield from _arrived(waiting)
            waiting = start, staged, slot
        yield from _arrived(waiting)

    def release(self) -> None:
        self._accelerator.release()


def _arrived(waiting: tuple[int, Tensor, _Slot] | None) -> Iterator[tuple[int, Tensor]]:
    """Yield what was copied to the host, once it is there."""
    if waiting is not None:
        start, staged, slot = waiting
        slot.event.synchronize()
        yield start, staged


def _pieces(values: Tensor) -> Iterator[tuple[int, Tensor]]:
    """Cut a flat tensor into parts that a pinned buffer holds."""
    size = PIECE // values.element_size()
    for start in range(0, values.numel(), size):
        yield start, values[start : start + size]


class Lanes:
    """The lanes of all threads, and how much all of them may take on each device at a time.

    Args:
        budgets: bytes by device; no bound where one is not named.
    """

    def __init__(self, budgets: Mapping[str, int]):
        self._budgets = {device: Budget(size) for device, size in budgets.items()}
        self._mine = local()

    def lane(self, device: str) -> Lane:
        """Return the calling thread's lane to a device."""
        lanes: dict[str, Lane] = self._mine.__dict__.setdefault("lanes", {})
        if device not in lanes:
            lanes[device] = open_lane(device, own_stream=True)
        return lanes[device]

    def is_bounded(self, device: str) -> bool:
        """Tell whether a device has a budget."""
        return device in self._budgets

    @contextmanager
    def working(self, device: str, size: int, given_up: Callable[[], bool]) -> Iterator[Lane]:
        """Compute on a device, once so many bytes are free there."""
        lane, budget = self.lane(device), self._budgets.get(device)
        with budget.taking(size, given_up) if budget else nullcontext(), lane.working():
            yield lane


class Budget:
    """Bytes of which several threads take their share and give it back."""

    def __init__(self, size: int):
        self.size, self.taken, self.most = size, 0, 0
        self._changed = Condition()

    @contextmanager
    def taking(self, size: int, given_up: Callable[[], bool]) -> Iterator[None]:
        """Wait until there is room. What is larger than all of it waits until it is alone."""
        with self._changed:
            while self.taken and self.taken + size > self.size and not given_up():
                self._changed.wait(timeout=0.5)
            self.taken += size
            self.most = max(self.most, self.taken)
        try:
            yield
        finally:
            with self._changed:
                self.taken -= size
                self._changed.notify_all()


def open_lane(device: str, *, own_stream: bool) -> Lane:
    """Open a way to a device for the calling thread."""
    return Lane() if torch.device(device).type == "cpu" else DeviceLane(Accelerator(device), own_stream=own_stream)
