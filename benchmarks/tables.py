"""Tables in Markdown, and the one that all cases with peers share."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import median

from benchmarks.cases import TORCH, Case, Way, memory, ratio
from benchmarks.goals import verdicts

COLUMNS = ("case", "by", "wall s", "CPU s", "memory MB", "wall / ours", "CPU / ours", "memory / ours", "goal")


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    """Write rows of cells under a header; all columns but the first are aligned to the right."""
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def case_table(cases: Sequence[Case], *, cold: bool, torch: bool = False) -> str:
    """Write a row for each way of each case, with medians, ratios run by run, and the goals that it decides.

    Args:
        cases: they have been measured.
        cold: their inputs were not in the page cache, which their names then say.
        torch: show what an import of torch takes, too.
    """
    rows = []
    for case in cases:
        told = {verdict.goal.beside: str(verdict) for verdict in verdicts(case)}
        name = f"{case.name}, cold" if cold else case.name
        for way in sorted(case.ways, key=lambda way: way is not case.ours):
            if way.name in case.failed:
                rows.append([name, way.name, *["-"] * (len(COLUMNS) - 3), "failed"])
            elif torch or way.name != TORCH:
                rows.append([name, way.name, *_cells(case, way), told.get(way.name, "-")])
    return table(COLUMNS, rows)


def _cells(case: Case, way: Way) -> list[str]:
    wall, cpu = (median(getattr(run, part) for run in case.runs[way.name]) for part in ("wall", "cpu"))
    held, own = memory(case, way), memory(case, case.ours)
    cells = [f"{wall:.2f}", f"{cpu:.2f}", _number(held / 1e6, ".0f")]
    if way is case.ours:
        return [*cells, "-", "-", "-"]
    beside = held / own if own > 0 else float("nan")
    return [*cells, *(f"{ratio(case, way.name, part):.2f}" for part in ("wall", "cpu")), _number(beside, ".1f")]


def _number(value: float, form: str) -> str:
    return "-" if value != value else format(value, form)
