"""Tensors that are merged when they are read: a merge as a source of another, and what from_pretrained is given."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from threading import Event, Lock, local
from types import TracebackType
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from hf_merge.execute import compute, kept_threads, with_first_pass
from hf_merge.planning import Plan, Step, default_workers, working_memory
from hf_merge.sources.base import Source
from hf_merge.staging import open_lane
from hf_merge.types import DTYPE_NAMES, TensorSpec


class Ready:
    """The steps of a plan with the numbers of its first pass, which is made when the first of them is asked for.

    Args:
        plan: what the steps are of.
        sources: the plan's models, in its order.
    """

    def __init__(self, plan: Plan, sources: Sequence[Source]):
        self._plan, self._sources, self._guard = plan, sources, Lock()
        self._steps: dict[str, Step] = {}

    def step(self, name: str) -> Step:
        """Return the step of a tensor."""
        with self._guard:
            self._steps = self._steps or {s.name: s for s in with_first_pass(self._plan, self._sources).steps}
        return self._steps[name]


class LazyMerge(Source):
    """The result of a plan that is never written: a stage of a recipe with several documents.

    Args:
        plan: what it is.
        sources: the plan's models, in its order.
        label: how messages call it.
    """

    def __init__(self, plan: Plan, sources: Sequence[Source], label: str):
        self.plan, self.label = plan, label
        self.specs, self.config = plan.specs, plan.config
        self.folders = sources[plan.donor].folders
        self.parents = dict(zip(plan.models, sources, strict=True))
        self._sources = list(sources)
        self._steps = {step.name: step for step in plan.steps}
        self._ready = Ready(plan, sources)

    @property
    def parts(self) -> tuple[Source, ...]:
        return tuple(part for source in self._sources for part in source.parts)

    def __getitem__(self, name: str) -> Tensor:
        return compute(self.plan, self._ready.step(name), self._sources)

    def bytes_read(self, name: str) -> int:
        return sum(self._sources[one.model].bytes_read(one.name) for one in set(self._steps[name].reads))

    def bytes_held(self, name: str) -> int:
        step = self._steps[name]
        below = sum(self._sources[one.model].bytes_held(one.name) for one in step.reads)
        return step.spec.nbytes + working_memory(step) + below

    def fingerprint(self) -> str | None:
        contents = [source.fingerprint() for source in self._sources]
        if None in contents:
            return None
        return hashlib.sha256(json.dumps([self.plan.fingerprint(), contents]).encode()).hexdigest()

    def origins(self, name: str) -> Iterator[tuple[Source, str]]:
        for one in self._steps[name].reads:
            yield from self._sources[one.model].origins(one.name)

    def write_companions(self, folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> None:
        self._sources[self.plan.donor].write_companions(folder, wanted)


class MergedSlice:
    """A tensor of a plan that does not exist yet, with the manners of a slice of a safetensors file.

    transformers' loader asks for its shape, takes all of it or a part (`slice[...]`, `slice[0:8, :]`), and says by
    `.to(device, dtype)` where it wants that: only then it is merged, there. A function of torch that gets one merges
    it on the CPU first.

    Args:
        name: of the tensor.
        spec: its shape and dtype.
        merge: `merge(name, index, device)` returns it.
        index: the part that this is.
    """

    def __init__(self, name: str, spec: TensorSpec, merge: Callable[[str, Any, Any], Tensor], index: Any = ...):
        self._name, self._spec, self._merge, self._index = name, spec, merge, index

    def get_shape(self) -> list[int]:
        return list(self.shape)

    def get_dtype(self) -> str:
        """Return the dtype as safetensors writes it: `BF16`."""
        return DTYPE_NAMES[self._spec.dtype]

    @property
    def shape(self) -> torch.Size:
        return torch.empty(self._spec.shape, device="meta")[self._index].shape

    @property
    def dtype(self) -> torch.dtype:
        return self._spec.dtype

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def numel(self) -> int:
        return self.shape.numel()

    def is_floating_point(self) -> bool:
        return self._spec.dtype.is_floating_point

    def __getitem__(self, index: Any) -> Any:
        """Return the part; it is not merged yet."""
        if self._index is not ...:
            return self.to("cpu")[index]
        return MergedSlice(self._name, self._spec, self._merge, index)

    def to(self, device: Any = "cpu", dtype: torch.dtype | None = None, **_: Any) -> Tensor:
        """Merge it on a device, and return it in another dtype if one is given."""
        return self._merge(self._name, self._index, "cpu" if device is None else device).to(dtype or self.dtype)

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        args, kwargs = tree_map(lambda one: one.to() if isinstance(one, cls) else one, (args, kwargs or {}))
        return func(*args, **kwargs)


class Mergers:
    """Merges tensors of a plan on the devices where they are wanted, a few at a time on each.

    How many is decided here, whoever asks: on the CPU as many as workers would, on an accelerator one. Use as a
    context manager.

    Args:
        plan: what is merged.
        sources: the plan's models, in its order.
        stop: is set when it ends.
    """

    def __init__(self, plan: Plan, sources: Sequence[Source], stop: Event):
        self._plan, self._sources, self._stop = plan, sources, stop
        self._specs, self._ready = plan.specs, Ready(plan, sources)
        self._pools: dict[torch.device, ThreadPoolExecutor] = {}
        self._mine, self._guard, self._ending = local(), Lock(), ExitStack()

    def slices(self, names: Iterable[str]) -> dict[str, MergedSlice]:
        """Return tensors that are merged when they are read."""
        return {name: MergedSlice(name, self._specs[name], self.merge) for name in names}

    def merge(self, name: str, index: Any, device: Any) -> Tensor:
        """Return a tensor, or a part of it, on a device."""
        where = torch.device(device)
        step = replace(self._ready.step(name), device=str(where))
        return self._pool(where).submit(self._compute, step, index).result()

    def _compute(self, step: Step, index: Any) -> Tensor:
        """Compute in a thread that keeps its way to its device, buffers and all."""
        if not hasattr(self._mine, "lane"):
            self._mine.lane = open_lane(step.device, own_stream=False)
        return compute(self._plan, step, self._sources, index=index, lane=self._mine.lane)

    def _pool(self, device: torch.device) -> ThreadPoolExecutor:
        """Return the threads that work for a device; torch has one thread in each, as in `execute`."""
        with self._guard:
            if device not in self._pools:
                count = default_workers() if device.type == "cpu" else 1
                self._pools[device] = ThreadPoolExecutor(count, initializer=lambda: torch.set_num_threads(1))
            return self._pools[device]

    def __enter__(self) -> Mergers:
        self._ending.enter_context(kept_threads())
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._stop.set()
        for pool in self._pools.values():
            pool.shutdown(cancel_futures=True)
        self._ending.close()
