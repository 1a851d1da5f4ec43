"""A case is one job that several ways do: hf_merge and its peers. They take turns in fresh processes."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from statistics import median

from benchmarks.caches import drop, warm
from benchmarks.options import Options
from benchmarks.processes import Run, measure, run_python

OURS, TORCH, COPY, LOOP, MERGEKIT, PEFT = "hf_merge", "import torch", "plain copy", "naive loop", "MergeKit", "PEFT"


@dataclass(frozen=True)
class Way:
    """How somebody does the job of a case.

    Attributes:
        name: who.
        run: do it, in a fresh process.
        ready: the command that makes its imports and nothing else, whose memory does not count.
        slow: it takes long, and runs less often.
    """

    name: str
    run: Callable[[], Run]
    ready: tuple[str, ...] = ()
    slow: bool = False


@dataclass(frozen=True)
class Goal:
    """What hf_merge is to reach in a case.

    Attributes:
        beside: the way that it is compared with. `OURS`: its memory in MB is at most `bound`. `COPY`: it takes at most
            `bound` times as long, and an import of torch. Another: that takes at least `bound` times as long.
        bound: see there.
    """

    beside: str
    bound: float


@dataclass
class Case:
    """A job, the ways that do it, and what they took, run by run.

    Attributes:
        name: what is done.
        ways: the first to run first; one is `OURS`.
        goals: what is to be reached.
        inputs: folders of models that are read.
        runs: what each way took, in the order of time.
        failed: what a way said that could not do the job, and is left out from then on.
    """

    name: str
    ways: Sequence[Way]
    goals: Sequence[Goal] = ()
    inputs: Sequence[Path] = ()
    runs: dict[str, list[Run]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    @property
    def ours(self) -> Way:
        """The way that is hf_merge's."""
        return next(way for way in self.ways if way.name == OURS)


def import_torch() -> Way:
    """Return what every program that computes with torch begins with."""
    return Way(TORCH, lambda: run_python("import torch"))


def python_imports(what: str) -> tuple[str, ...]:
    """Return the command that imports modules, named with commas, and ends."""
    return sys.executable, "-c", f"import {what}"


def measure_cases(cases: Sequence[Case], options: Options) -> None:
    """Run all ways of all cases in turn, again and again; a cold run finds none of its inputs in the page cache."""
    if not options.cold:
        warm(folder for case in cases for folder in case.inputs)
    for number in range(max(options.runs, options.peer_runs)):
        for case in cases:
            for way in case.ways:
                if number < (options.peer_runs if way.slow else options.runs) and way.name not in case.failed:
                    print(f"run {number + 1}: {case.name}, {way.name}", file=sys.stderr)
                    _run(case, way, cold=options.cold)


def _run(case: Case, way: Way, *, cold: bool) -> None:
    """Run one way once. A peer's error is told and ends nothing; one of hf_merge, or of what it needs, ends all."""
    if cold:
        drop(case.inputs)
    try:
        case.runs.setdefault(way.name, []).append(way.run())
    except RuntimeError as error:
        if way.name in (OURS, TORCH, COPY):
            raise
        case.failed[way.name] = str(error)
        del case.runs[way.name]
        print(f"{way.name} is left out: {error}", file=sys.stderr)


def memory(case: Case, way: Way) -> float:
    """Return the median of the peak bytes of anonymous memory over what the imports take; NaN where none is known."""
    if not way.ready:
        return float("nan")
    return median(run.anonymous for run in case.runs[way.name]) - _footprint(way.ready)


@cache
def _footprint(command: tuple[str, ...]) -> float:
    return measure(command).anonymous


def ratio(case: Case, name: str, part: str) -> float:
    """Return how many times what hf_merge took another way took: the median over runs that followed each other.

    Args:
        case: it has been measured.
        name: of the other way.
        part: `wall` or `cpu`.
    """
    pairs = zip(case.runs[name], case.runs[OURS], strict=False)  # slow ways have fewer runs
    return median(getattr(other, part) / max(getattr(own, part), 1e-9) for other, own in pairs)
