"""Plan -> tensors: the only module that computes on weights.

Every step is computed in tiles where its method allows it, in float32 (float64 if a float64 takes part), and is
rounded once, to the dtype that is written. The bytes do not depend on the number of workers.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import FIRST_EXCEPTION, Future, ThreadPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import dataclass, replace
from threading import Event, local
from typing import Any, Protocol

import torch
from torch import Tensor

from hf_merge.errors import ComputeError, MergeError
from hf_merge.method import LAMBDA, get_method
from hf_merge.planning import TILE, Plan, Step, compute_dtype, default_workers
from hf_merge.types import Stack, TensorSpec

Tensors = Mapping[str, Tensor]

_KEPT = 1 << 24  # bytes; fresh memory costs more than the arithmetic on it


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
) -> None:
    """Compute every tensor of a plan, file by file, and hand it to `write`, tile by tile.

    Args:
        plan: what to compute.
        sources: the plan's models, in its order.
        write: where the tiles go.
        workers: threads; see `planning.default_workers`.
        skip: names of tensors that are not needed.
        stopped: called when the rest is given up, so that no thread waits in `write`, or for a source, any longer.

    Raises:
        ComputeError: a tensor cannot be merged; it names tensor and method. Other threads stop first.
    """
    steps = [step for step in plan.by_file if not skip(step.name)]
    torch.empty(_KEPT, dtype=torch.uint8)  # never touched; once it is freed, glibc keeps freed blocks up to this size
    scratch = local()
    stop = Event()

    def work(step: Step) -> None:
        if stop.is_set():
            return
        for start, values in _pieces(plan, step, sources, scratch, onto="cpu"):
            if stop.is_set():
                return
            write(step.name, start, values)

    count = workers or default_workers()
    with kept_threads(), ThreadPoolExecutor(count, initializer=lambda: torch.set_num_threads(1)) as pool:
        try:
            _join([pool.submit(work, step) for step in steps])
        except BaseException:  # an error or Ctrl-C: what is queued ends at once
            stop.set()
            stopped()
            raise


def compute(
    plan: Plan, step: Step, sources: Sequence[Tensors], *, index: Any = ..., scratch: local | None = None
) -> Tensor:
    """Compute one tensor of a plan, or a part of it, and leave it on the step's device.

    Args:
        plan: what the step is of.
        step: the tensor.
        sources: the plan's models, in its order.
        index: the part, as in `tensor[index]`. Where an entry depends on the same entry of the inputs alone, only
            that part of them is read; else the whole is computed first.
        scratch: keeps buffers of the calling thread from call to call.
    """
    if index is not ...:
        return _part(plan, step, sources, index, scratch)
    merged = torch.empty(step.spec.shape, dtype=step.spec.dtype, device=step.device)
    for start, values in _pieces(plan, step, sources, scratch or local(), onto=step.device):
        merged.view(-1)[start : start + values.numel()] = values.view(-1)
    return merged


def _part(plan: Plan, step: Step, sources: Sequence[Tensors], index: Any, scratch: local | None) -> Tensor:
    """Compute a part of a tensor, from the same part of its inputs where that is all it depends on."""
    method = get_method(step.method) if step.method else None
    alone = method and method.tiled(step.settings) and not method.reductions and not method.seeded
    if not alone:
        return compute(plan, step, sources, scratch=scratch)[index]
    shape = torch.empty(step.spec.shape, device="meta")[index].shape
    part = replace(step, spec=TensorSpec(tuple(shape), step.spec.dtype))
    names = {(one.model, one.name) for one in step.reads}
    cut = [{name: source[name][index] for place, name in names if place == i} for i, source in enumerate(sources)]
    return compute(plan, part, cut, scratch=scratch)


@dataclass
class _Inputs:
    """The flattened inputs of a step, as tiles: as often as they are asked for."""

    models: Sequence[Tensor]
    base: Tensor | None
    labels: Sequence[str]
    deltas: bool
    whole: bool
    step: Step
    scratch: local
    check: bool

    def __iter__(self) -> Iterator[Stack]:
        numel = self.step.spec.numel
        size = max(numel, 1) if self.whole else TILE
        for start in range(0, numel, size):
            yield self._load(start, min(size, numel - start))
        self.check = False  # all of it has been seen: later passes need not look again

    def _load(self, start: int, size: int) -> Stack:
        """Copy a tile of every input into kept buffers, in the dtype of the arithmetic."""
        buffers = self._buffers(size)
        for buffer, tensor, label in zip(buffers, [*self.models, *self._base_list()], self.labels, strict=True):
            buffer.copy_(tensor[start : start + size])
            if self.check and not _finite(buffer):
                raise ComputeError(f"{label} has NaN or Inf in this tensor; set allow_nonfinite: true to let it pass")
        base = None if self.base is None else buffers[-1]
        models = buffers if base is None else buffers[:-1]
        for model in models if self.deltas else ():
            model.sub_(buffers[-1])
        shape = self.step.spec.shape if self.whole else (size,)
        views = [model.view(shape) for model in models]
        return Stack(views, start=start, base=None if base is None else base.view(shape))

    def _base_list(self) -> list[Tensor]:
        return [] if self.base is None else [self.base]

    def _buffers(self, size: int) -> list[Tensor]:
        """Return this thread's buffers: fresh memory costs more than the arithmetic."""
        count = len(self.models) + (self.base is not None)
        dtype = compute_dtype([t.dtype for t in [*self.models, *self._base_list()]] + [self.step.spec.dtype])
        key = (dtype, self.step.device)
        kept: dict[object, list[Tensor]] = self.scratch.__dict__.setdefault("buffers", {})
        if self.whole:
            return [torch.empty(size, dtype=dtype, device=self.step.device) for _ in range(count)]
        mine = kept.setdefault(key, [])
        while len(mine) < count:
            mine.append(torch.empty(TILE, dtype=dtype, device=self.step.device))
        return [buffer[:size] for buffer in mine[:count]]


def _pieces(
    plan: Plan, step: Step, sources: Sequence[Tensors], scratch: local, *, onto: str
) -> Iterator[tuple[int, Tensor]]:
    """Yield (index of the first element, values) for all of a step's tensor, on the device `onto`.

    Errors name tensor and method.
    """
    try:
        if step.method is None:
            yield 0, _agreed(plan, step, sources).to(onto).reshape(-1).contiguous()
        else:
            yield from _merged(plan, step, sources, scratch, onto)
    except (ArithmeticError, ValueError, RuntimeError, ComputeError) as error:
        if isinstance(error, MergeError) and not isinstance(error, ComputeError):
            raise
        raise ComputeError(f"'{step.name}' by '{step.method or 'copy'}': {error}.") from error


def _merged(
    plan: Plan, step: Step, sources: Sequence[Tensors], scratch: local, onto: str
) -> Iterator[tuple[int, Tensor]]:
    """Merge one tensor of floats: reductions first, then tile by tile."""
    method = get_method(str(step.method))
    tiled = method.tiled(step.settings)
    flat = [sources[one.model][one.name].reshape(-1) for one in step.reads]
    models, base = (flat, None) if step.base is None else (flat[:-1], flat[-1])
    labels = [str(plan.models[one.model]) for one in step.reads]
    inputs = _Inputs(
        models, base, labels, method.space == "deltas", not tiled, step, scratch,
        not plan.recipe.allow_nonfinite,
    )  # fmt: skip
    tiles = inputs if tiled and step.spec.numel > TILE else list(inputs)
    reduced = method.reduce(tiles, step.settings)
    for tile in tiles:
        merged = method.run(tile, reduced, step.settings)
        if method.space == "deltas" and tile.base is not None:
            merged = torch.add(tile.base, merged, alpha=step.settings[LAMBDA.name])
        rounded = _rounded(merged, step.spec.dtype, onto)
        if not plan.recipe.allow_nonfinite and not _finite(rounded):
            raise ComputeError("the result has NaN or Inf; set allow_nonfinite: true to let it pass")
        yield tile.start, rounded


def _rounded(merged: Tensor, dtype: torch.dtype, device: str) -> Tensor:
    """Round to the written dtype, in memory that no later tile reuses before it is written."""
    return merged.detach().to(device, dtype).contiguous()


def _agreed(plan: Plan, step: Step, sources: Sequence[Tensors]) -> Tensor:
    """Return a tensor that is not a float, if all models have the same."""
    first, *others = [sources[one.model][one.name] for one in step.inputs]
    for source, other in zip(step.inputs[1:], others, strict=True):
        if first.dtype != other.dtype or not torch.equal(first, other.to(first.device)):
            models = f"{plan.models[source.model]} and {plan.models[step.inputs[0].model]}"
            raise ComputeError(
                f"{models} differ, and integers cannot be averaged; "
                "choose one model's by a rule (merge_method: passthrough, models: [..])"
            )
    return first


def _finite(values: Tensor) -> bool:
    """Tell whether all values are finite; a finite sum proves it at the price of one read."""
    return math.isfinite(values.sum(dtype=torch.promote_types(values.dtype, torch.float32)).item()) or bool(
        values.isfinite().all()
    )


def _join(futures: Sequence[Future[None]]) -> None:
    """Wait for all, and raise the first error at once."""
    done, _ = wait(futures, return_when=FIRST_EXCEPTION)
    for future in done:
        future.result()


@contextmanager
def kept_threads() -> Iterator[None]:
    """Leave torch's threads as they were. The workers use one each: they, not torch, use the cores, and a sum
    does not depend on their number."""
    threads = torch.get_num_threads()
    try:
        yield
    finally:
        torch.set_num_threads(threads)
