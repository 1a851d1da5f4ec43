"""Plan -> tensors: the only module that computes on weights.

Every step is computed in tiles where its method allows it, in float32 (float64 if a float64 takes part), and is
rounded once, to the dtype that is written. The bytes do not depend on the number of workers; docs/devices.md says how
far they depend on the device.
"""

from __future__ import annotations

import logging
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import AbstractContextManager, ExitStack, contextmanager, suppress
from dataclasses import dataclass, replace
from threading import Event
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from hf_merge.errors import ComputeError, MergeError
from hf_merge.forms import Experts
from hf_merge.method import LAMBDA, get_method
from hf_merge.ops import loops
from hf_merge.ops.casts import is_finite, narrowed, widen
from hf_merge.packing import pack_mask
from hf_merge.planning import FirstPass, Plan, Step, compute_dtype, default_workers, memory_on_device, tile_of
from hf_merge.progress import EVERY
from hf_merge.staging import Lane, Lanes, open_lane
from hf_merge.types import Ref, Stack, TensorSpec

logger = logging.getLogger(__name__)

Tensors = Mapping[str, Tensor]

WORTH_COMPILING = 3e9
"""Entries read and worked on; below, the import of the compiled loops costs more than they save."""

WORTH_A_THREAD = 1 << 19
"""Entries worked on for a tensor, on average; with less, several threads mostly wait for Python's lock."""

_PASSES = 8  # how much more than once each entry is worked on where a method looks at a whole tensor
_KEPT = 1 << 24  # bytes; fresh memory costs more than the arithmetic on it
_LEAST_WORKERS = 2  # of a device among others: one that copies while another computes


class Piece(NamedTuple):
    """A run of a tensor's elements, beginning with the one of index `start`."""

    name: str
    start: int
    values: Tensor


class Write(Protocol):
    """Takes a run of a tensor's elements, in the dtype that is written; called from several threads."""

    def __call__(self, name: str, start: int, values: Tensor) -> None: ...


def execute(
    plan: Plan,
    sources: Sequence[Tensors],
    write: Write,
    *,
    workers: int | None = None,
    skip: Callable[[str], bool] = lambda name: False,
    stopped: Callable[[], None] = lambda: None,
    meanwhile: Callable[[], None] = lambda: None,
    in_order: bool = False,
) -> None:
    """Compute every tensor of a plan, file by file, and hand it to `write`, tile by tile.

    Every device has threads of its own, so that none waits for another; what `write` gets lies on the CPU, and is
    valid until it returns.

    Args:
        plan: what to compute.
        sources: the plan's models, in its order.
        write: where the tiles go.
        workers: threads; as `planning.default_workers` says if not given, or one where tensors are small and all on
            the CPU. Several devices share them, two at least for each.
        skip: names of tensors that are not needed; a step is left out if nothing that it gives is.
        stopped: called when the rest is given up, so that no thread waits in `write`, or for a source, any longer.
        meanwhile: called again and again while this waits.
        in_order: begin no tensor before those that stand before it in the files are begun, whatever their devices:
            for files that come or go one by one.

    Raises:
        ComputeError: a tensor cannot be merged; it names tensor and method. Other threads stop first.
        What `write` or `meanwhile` raises, in the same way.
    """
    torch.empty(_KEPT, dtype=torch.uint8)  # never touched; once it is freed, glibc keeps freed blocks up to this size
    lanes, stop = Lanes(plan.budgets), Event()

    def work(todo: deque[Step]) -> None:
        """Merge what no thread has begun yet, one tensor after the other, until nothing is left."""
        while (step := _taken(todo)) and not stop.is_set():
            merge(step)

    def merge(step: Step) -> None:
        for piece in _delivered(plan, step, sources, lanes, stop):
            if stop.is_set():
                return
            write(*piece)

    with compiled(plan), kept_threads(), ExitStack() as stack:
        plan = with_first_pass(plan, sources, lambda name: not skip(name), meanwhile)
        steps = [step for step in plan.by_file if not all(map(skip, step.outputs))]
        queues = [deque(steps)] if in_order else _by_device(steps)
        count = workers or (default_workers() if _gain_by_threads(steps) else 1)
        each = count if len(queues) < 2 else max(_LEAST_WORKERS, count // len(queues))
        pools = [stack.enter_context(ThreadPoolExecutor(each, initializer=_one_thread)) for _ in queues]
        try:
            todo = [pool.submit(work, queue) for pool, queue in zip(pools, queues, strict=True) for _ in range(each)]
            _join(todo, meanwhile)
        except BaseException:  # an error or Ctrl-C: what is queued ends at once
            stop.set()
            stopped()
            raise


def compiled(plan: Plan) -> AbstractContextManager[bool]:
    """Use compiled loops inside, where they are quicker for a plan than torch is, their import included.

    They take finite numbers for granted.
    """
    entries = sum(_worked_on(step) for step in plan.steps if step.device == "cpu")
    return loops.switched_on(entries >= WORTH_COMPILING and not plan.recipe.allow_nonfinite)


def _gain_by_threads(steps: Sequence[Step]) -> bool:
    """Tell whether tensors are large enough, on average, for several threads to be quicker than one on the CPU."""
    on_cpu = all(step.device == "cpu" for step in steps)  # on a device one copies while another computes
    return not on_cpu or sum(map(_worked_on, steps)) >= WORTH_A_THREAD * len(steps)


def _worked_on(step: Step) -> int:
    """Say how many entries of its inputs a step works on, each as often as it does."""
    method = None if step.method is None else get_method(step.method)
    in_one_pass = method is None or (method.tiled(step.settings) and not method.reductions)
    return step.spec.numel * len(step.reads) * (1 if in_one_pass else _PASSES)


def with_first_pass(
    plan: Plan,
    sources: Sequence[Tensors],
    wanted: Callable[[str], bool] = lambda name: True,
    meanwhile: Callable[[], None] = lambda: None,
) -> Plan:
    """Compute the numbers over a whole model that the methods of a plan need, and return the plan with them.

    Always on the CPU, in one thread and in one order: the numbers do not depend on where and by how many processes
    the rest is merged. Memory is bounded by that of a tile.

    Args:
        plan: what will be merged.
        sources: the plan's models, in its order.
        wanted: tells which tensors will be merged at all.
        meanwhile: called again and again while this waits.
    """
    known: dict[str, Mapping[str, Any]] = {}
    for one in plan.passes:
        if any(map(wanted, one.tensors)):
            known |= dict.fromkeys(one.tensors, _first_pass(plan, one, sources, meanwhile))
    steps = (replace(step, known=known[step.name]) if step.name in known else step for step in plan.steps)
    return replace(plan, steps=tuple(steps)) if known else plan


def _first_pass(
    plan: Plan, one: FirstPass, sources: Sequence[Tensors], meanwhile: Callable[[], None]
) -> Mapping[str, Any]:
    logger.info("First pass: %s.", one)
    stop = Event()
    tiles = _WholeModel(plan, one.steps, sources, stop)
    with kept_threads(), ThreadPoolExecutor(1, initializer=_one_thread) as pool:
        try:
            passing = pool.submit(get_method(one.method).before, tiles, one.steps[0].settings)
            _join([passing], meanwhile)
            return passing.result()
        finally:
            stop.set()  # an error or Ctrl-C: the thread ends at the next tile


@dataclass
class _WholeModel:
    """The tiles of many tensors, one after the other, as if they were one; as often as they are asked for.

    They are whole tensors for a method that sees these.
    """

    plan: Plan
    steps: Sequence[Step]
    sources: Sequence[Tensors]
    stop: Event

    @property
    def numel(self) -> int:
        return sum(step.spec.numel for step in self.steps)

    def __iter__(self) -> Iterator[Stack]:
        lane, first = Lane(), 0
        for step in self.steps:
            try:
                for tile in _inputs(self.plan, step, self.sources, lane):
                    if self.stop.is_set():
                        raise RuntimeError("the merge has ended")
                    told = {"whole": tile.whole, "base": tile.base, "measured": tile.measured}
                    yield Stack(tile, start=first + tile.start, **told)
            except (ArithmeticError, ValueError, RuntimeError, ComputeError) as error:
                raise ComputeError(f"'{step.name}' by '{step.method}': {error}.") from error
            first += step.spec.numel


def compute(
    plan: Plan, step: Step, sources: Sequence[Tensors], *, index: Any = ..., lane: Lane | None = None
) -> Tensor:
    """Compute one tensor of a plan, or a part of it, and leave it on the step's device.

    Args:
        plan: what the step is of.
        step: the tensor.
        sources: the plan's models, in its order.
        index: the part, as in `tensor[index]`. Where an entry depends on the same entry of the inputs alone, only
            that part of them is read; else the whole is computed first.
        lane: the calling thread's way to the step's device, which keeps buffers from call to call.
    """
    if index is not ...:
        return _part(plan, step, sources, index, lane)
    merged = torch.empty(step.spec.shape, dtype=step.spec.dtype, device=step.device)
    lane, error = lane or open_lane(step.device, own_stream=False), ""
    try:
        return _filled(merged, step.name, _pieces(plan, step, sources, lane))
    except torch.OutOfMemoryError as found:
        error = str(found)
    return _filled(merged, step.name, _pieces(plan, _on_cpu(step, lane, error), sources, Lane()))


def _part(plan: Plan, step: Step, sources: Sequence[Tensors], index: Any, lane: Lane | None) -> Tensor:
    """Compute a part of a tensor, from the same part of its inputs where that is all it depends on."""
    method = get_method(step.method) if step.method else None
    alone = method and method.tiled(step.settings) and not (method.reductions or method.seeded or method.statistics)
    if not alone:
        return compute(plan, step, sources, lane=lane)[index]
    shape = torch.empty(step.spec.shape, device="meta")[index].shape
    part = replace(step, spec=TensorSpec(tuple(shape), step.spec.dtype))
    names = {(one.model, one.name) for one in step.reads}
    cut = [{name: source[name][index] for place, name in names if place == i} for i, source in enumerate(sources)]
    return compute(plan, part, cut, lane=lane)


def _filled(merged: Tensor, name: str, pieces: Iterator[Piece]) -> Tensor:
    """Put the pieces of one tensor into their places; what else a step gives is not asked for."""
    for piece in pieces:
        if piece.name == name:
            merged.view(-1)[piece.start : piece.start + piece.values.numel()] = piece.values.view(-1)
    return merged


def _on_cpu(step: Step, lane: Lane, error: str) -> Step:
    """Plan a step for the CPU for which a device has no memory left."""
    reason = error.partition(". ")[0].rstrip(".")
    logger.warning("%s has no room for '%s', which is computed on the CPU instead: %s.", step.device, step.name, reason)
    lane.release()
    return replace(step, device="cpu")


def _by_device(steps: Sequence[Step]) -> list[deque[Step]]:
    queues: dict[str, deque[Step]] = {}
    for step in steps:
        queues.setdefault(step.device, deque()).append(step)
    return list(queues.values())


def _taken(todo: deque[Step]) -> Step | None:
    """Take the next step; None if nothing is left."""
    with suppress(IndexError):
        return todo.popleft()
    return None


def _one_thread() -> None:
    torch.set_num_threads(1)


def _delivered(plan: Plan, step: Step, sources: Sequence[Tensors], lanes: Lanes, stop: Event) -> Iterator[Piece]:
    """Compute a step on its device and bring what comes out to the host."""
    lane = lanes.lane(step.device)
    if lane.is_host and not lanes.is_bounded(step.device):
        return _pieces(plan, step, sources, lane)
    return _staged(plan, step, sources, lanes, stop)


def _staged(plan: Plan, step: Step, sources: Sequence[Tensors], lanes: Lanes, stop: Event) -> Iterator[Piece]:
    """Compute a step when its device has room for it; what finds no memory there is done on the CPU instead."""
    done: Counter[str] = Counter()
    error = ""
    try:
        with lanes.working(step.device, memory_on_device(step), stop.is_set) as lane:
            for name, start, values in _pieces(plan, step, sources, lane):
                for first, part in lane.unload(values):
                    yield Piece(name, start + first, part)
                    done[name] = start + first + part.numel()
            return
    except torch.OutOfMemoryError as found:
        error = str(found)
    step = _on_cpu(step, lanes.lane(step.device), error)
    with lanes.working("cpu", memory_on_device(step), stop.is_set) as lane:
        for name, start, values in _pieces(plan, step, sources, lane):
            if start + values.numel() > done[name]:  # the rest was written before
                first = max(start, done[name])
                yield Piece(name, first, values.view(-1)[first - start :])


@dataclass
class _Inputs:
    """The flattened inputs of a step, as tiles: as often as they are asked for."""

    models: Sequence[Tensor]
    base: Tensor | None
    refs: Sequence[Ref]
    deltas: bool
    flattened: bool
    step: Step
    lane: Lane
    check: bool
    measured: Mapping[str, Sequence[Tensor]]

    def __iter__(self) -> Iterator[Stack]:
        numel = self.step.spec.numel
        size = tile_of(self.step, self.lane.tile)
        for start in range(0, numel, size):
            yield self._load(start, min(size, numel - start))
        self.check = False  # all of it has been seen: later passes need not look again

    def _load(self, start: int, size: int) -> Stack:
        """Copy a tile of every input into buffers on the device, in the dtype of the arithmetic."""
        *models, last = self._buffers(size)
        base, models = (None, [*models, last]) if self.base is None else (last, models)
        if self.base is not None:
            self._bring(-1, self.base, last, start)
        for place, (tensor, buffer) in enumerate(zip(self.models, models, strict=True)):
            self._bring(place, tensor, buffer, start, minus=base if self.deltas else None)
        shape = (size,) if self.flattened else self._shape(size)
        views = [model.view(shape) for model in models]
        measured = {name: self._measured(name, start, size, shape) for name in self.measured}
        whole, base = self.step.spec.numel, None if base is None else base.view(shape)
        return Stack(views, start=start, whole=whole, base=base, measured=measured)

    def _shape(self, size: int) -> tuple[int, ...]:
        """Return the shape of so many entries: that of the tensor, or of some of its rows."""
        whole = self.step.spec
        return whole.shape if size == whole.numel else (size * whole.shape[0] // whole.numel, *whole.shape[1:])

    def _label(self, place: int) -> str:
        """Name the model of one of the inputs."""
        return str(self.refs[self.step.reads[place].model])

    def _bring(self, place: int, tensor: Tensor, buffer: Tensor, start: int, minus: Tensor | None = None) -> None:
        """Copy a part of an input into a buffer, less the same part of another."""
        part = tensor[start : start + buffer.numel()]
        finite = widen(part, buffer, minus, load=self.lane.load, check=self.check)
        if self.check and not finite:
            raise ComputeError(
                f"{self._label(place)} has NaN or Inf in this tensor; set allow_nonfinite: true to let it pass"
            )

    def _measured(self, name: str, start: int, size: int, shape: tuple[int, ...]) -> Stack:
        """Bring a statistic of every model to the device: of the tile's entries, or all of it."""
        entries = get_method(str(self.step.method)).statistics[name].of == "entries"
        parts = [t.reshape(-1)[start : start + size].view(shape) if entries else t for t in self.measured[name]]
        dtype = compute_dtype([self.step.spec.dtype, *(t.dtype for t in self.models)])
        parts = [part.to(self.lane.device, dtype) for part in parts]
        for place, part in enumerate(parts):
            if not is_finite(part):
                raise ComputeError(
                    f"the {name} of {self._label(place)} has NaN or Inf for this tensor: measure it again"
                )
        return Stack(parts)

    def _base_list(self) -> list[Tensor]:
        return [] if self.base is None else [self.base]

    def _buffers(self, size: int) -> list[Tensor]:
        tensors = [*self.models, *self._base_list()]
        dtype = compute_dtype([t.dtype for t in tensors] + [self.step.spec.dtype])
        return self.lane.buffers(len(tensors), size, dtype)


def _pieces(plan: Plan, step: Step, sources: Sequence[Tensors], lane: Lane) -> Iterator[Piece]:
    """Yield all of a step's tensor, and of what is kept beside it for task experts, where it was computed.

    Errors name tensor and method.
    """
    try:
        yield from _agreed(plan, step, sources) if step.method is None else _merged(plan, step, sources, lane)
    except (ArithmeticError, ValueError, RuntimeError, ComputeError) as error:
        if isinstance(error, MergeError) and not isinstance(error, ComputeError):
            raise
        if not lane.is_host and _ran_out(error):  # the CPU has room
            raise torch.OutOfMemoryError(str(error)) from error
        raise ComputeError(f"'{step.name}' by '{step.method or 'copy'}': {error}.") from error


def _ran_out(error: Exception) -> bool:
    """Tell whether a device has no memory left; its libraries say so in words of their own."""
    return isinstance(error, torch.OutOfMemoryError) or "ALLOC_FAILED" in str(error)


def _merged(plan: Plan, step: Step, sources: Sequence[Tensors], lane: Lane) -> Iterator[Piece]:
    """Merge one tensor of floats: reductions first, then tile by tile."""
    method = get_method(str(step.method))
    if step.known is None and method.over_model(step.settings):
        raise RuntimeError("its first pass was not made")
    several = step.spec.numel > tile_of(step, lane.tile)
    inputs = _inputs(plan, step, sources, lane, held=bool(several and method.reductions))
    tiles = inputs if several else list(inputs)
    reduced = method.reduce(tiles, step.settings, step.known)
    for tile in tiles:
        merged = method.run(tile, reduced, step.settings)
        if isinstance(merged, Experts):
            made = _parts(step, tile, merged)
        elif method.space == "deltas" and tile.base is not None:
            made = [(step.name, tile.start, torch.add(tile.base, merged, alpha=step.settings[LAMBDA.name]))]
        else:
            made = [(step.name, tile.start, merged)]
        for name, start, values in made:
            rounded, finite = narrowed(values, step.outputs[name].dtype, check=not plan.recipe.allow_nonfinite)
            if not finite:
                raise ComputeError("the result has NaN or Inf; set allow_nonfinite: true to let it pass")
            yield Piece(name, start, rounded)


def _parts(step: Step, tile: Stack, made: Experts) -> Iterator[tuple[str, int, Tensor]]:
    """Yield the backbone's weight and what is kept beside it; a tile begins at a whole byte of a mask."""
    backbone = tile.base if made.backbone is None else made.backbone
    assert backbone is not None
    yield step.name, tile.start, backbone
    if step.shared and made.shared is not None:
        yield step.shared, tile.start, made.shared
    for fields, names in zip(made.parts, step.experts, strict=True):
        for field, name in names.items():
            values = pack_mask(fields[field]) if field == "mask" else fields[field]
            if field != "scale" or tile.start == 0:
                yield name, tile.start // 8 if field == "mask" else tile.start, values


def _inputs(plan: Plan, step: Step, sources: Sequence[Tensors], lane: Lane, *, held: bool = False) -> _Inputs:
    """Open the inputs of a step: as whole tensors or as tiles, held on the device if they are read several times."""
    flat: Sequence[Tensor] = [sources[one.model][one.name].reshape(-1) for one in step.reads]
    flat = lane.hold(flat) if held else flat
    models, base = (flat, None) if step.base is None else (flat[:-1], flat[-1])
    method = get_method(str(step.method))
    deltas, flat_tiles = method.space == "deltas", method.tiled(step.settings)
    measured = {
        name: [_statistics(sources[one.model], name)[one.name] for one in each] for name, each in step.measured.items()
    }
    return _Inputs(models, base, plan.models, deltas, flat_tiles, step, lane, not plan.recipe.allow_nonfinite, measured)


def _statistics(source: Any, name: str) -> Tensors:
    """Return what was measured of a model, also where that does not say what it is."""
    return source.statistics[name if name in source.statistics else ""]


def _agreed(plan: Plan, step: Step, sources: Sequence[Tensors]) -> Iterator[Piece]:
    """Copy a tensor that is not a float, if all models have the same."""
    first, *others = [sources[one.model][one.name] for one in step.inputs]
    for source, other in zip(step.inputs[1:], others, strict=True):
        if first.dtype != other.dtype or not torch.equal(first, other.to(first.device)):
            models = f"{plan.models[source.model]} and {plan.models[step.inputs[0].model]}"
            raise ComputeError(
                f"{models} differ, and integers cannot be averaged; "
                "choose one model's by a rule (merge_method: passthrough, models: [..])"
            )
    yield Piece(step.name, 0, first.to("cpu").reshape(-1).contiguous())


def _join(futures: Sequence[Future[Any]], meanwhile: Callable[[], None]) -> None:
    """Wait for all, and raise the first error at once."""
    left = set(futures)
    while left:
        done, left = wait(left, timeout=EVERY, return_when=FIRST_EXCEPTION)
        for future in done:
            future.result()
        meanwhile()


@contextmanager
def kept_threads() -> Iterator[None]:
    """Leave torch's threads as they were. The workers use one each: they, not torch, use the cores, and a sum
    does not depend on their number."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
