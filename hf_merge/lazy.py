"""A merge as a source: its tensors are computed when they are read."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

from torch import Tensor

from hf_merge.execute import compute
from hf_merge.planning import Plan, working_memory
from hf_merge.sources.base import Source


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

    @property
    def parts(self) -> tuple[Source, ...]:
        return tuple(part for source in self._sources for part in source.parts)

    def __getitem__(self, name: str) -> Tensor:
        return compute(self.plan, self._steps[name], self._sources)

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
