"""The goals of the project's speed, and whether they are met."""

from __future__ import annotations

from dataclasses import dataclass
from statistics import median

from benchmarks.cases import COPY, MERGEKIT, OURS, PEFT, TORCH, Case, Goal, memory, ratio


def _goals(mergekit: float | None = None, copy: float | None = None, megabytes: float | None = None) -> list[Goal]:
    bounds = {MERGEKIT: mergekit, COPY: copy, OURS: megabytes}
    return [Goal(beside, bound) for beside, bound in bounds.items() if bound is not None]


_SUMS, _GEOMETRY, _TRIMMED, _DROPPED = (
    _goals(10, 1.5, 100),
    _goals(10, 2, 150),
    _goals(20, 3, 200),
    _goals(15, 2.5, 200),
)

METHODS = {
    **dict.fromkeys(("linear", "task_arithmetic"), _SUMS),
    **dict.fromkeys(("slerp", "nuslerp", "model_stock", "karcher", "sce"), _GEOMETRY),
    **dict.fromkeys(("ties", "breadcrumbs"), _TRIMMED),
    "della": _goals(10, None, 300),
    **dict.fromkeys(("dare_linear", "dare_ties"), _DROPPED),
}
"""By method, on a checkpoint of 1.1B parameters whose files are in the page cache, on two cores."""
SMALL = _goals(50)
START = _goals(15)
ADAPTER = [Goal(PEFT, 5), *_goals(None, 1.5, 150)]
CORE = {2048: 30.0, 4096: 100.0}
"""By the width of a module: how many times as long an SVD of the dense sum takes."""


def told(met: bool, figure: str) -> str:
    """Say whether a goal is met, by what."""
    return f"{'met' if met else 'missed'}: {figure}"


@dataclass(frozen=True)
class Verdict:
    """Whether a goal is met, and the figure that says so."""

    goal: Goal
    found: float
    met: bool

    def __str__(self) -> str:
        text = {OURS: "{:.0f} MB, at most {:g}", COPY: "{:.2f} x + torch, at most {:g}"}
        return told(self.met, text.get(self.goal.beside, "{:.1f} x, at least {:g}").format(self.found, self.goal.bound))


def verdicts(case: Case) -> list[Verdict]:
    """Judge a measured case by those of its goals whose way was run."""
    found = [(goal, _figure(case, goal)) for goal in case.goals if goal.beside in case.runs]
    return [
        Verdict(goal, figure, figure <= goal.bound if goal.beside in (OURS, COPY) else figure >= goal.bound)
        for goal, figure in found
        if figure == figure  # not NaN: it could be measured here
    ]


def _figure(case: Case, goal: Goal) -> float:
    if goal.beside == OURS:
        return memory(case, case.ours) / 1e6
    if goal.beside == COPY:
        runs = zip(case.runs[OURS], case.runs[TORCH], case.runs[COPY], strict=True)
        return median((own.wall - torch.wall) / copy.wall for own, torch, copy in runs)
    return ratio(case, goal.beside, "wall")
