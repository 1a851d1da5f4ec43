"""Outcomes of a study as tables and a picture."""

from __future__ import annotations

import csv
import importlib.util
import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from hf_merge.errors import MergeError
from hf_merge.study.protocol import Outcome

COLOURS = {"individual": "#4c4c4c", "experts": "#1f6fb4", "static": "#e0872b", "zero-shot": "#9a9a9a"}


@dataclass(frozen=True)
class Line:
    """A row of the table.

    Attributes:
        rank: from 1; lines share one if they do not differ by more than a standard error from the first that has it.
        outcome: what was measured.
        normalised: mean over the tasks of accuracy / accuracy of the task's own model.
        error: its standard error, from the number of test images alone.
    """

    rank: int
    outcome: Outcome
    normalised: float
    error: float


def lines_of(outcomes: Sequence[Outcome]) -> list[Line]:
    """Sort outcomes by their normalised average; those that cannot be told apart share a rank.

    Two methods saw the same images, so that the error of their difference is that of paired differences.
    """
    individual = next(one for one in outcomes if one.kind == "individual")
    scored = sorted(outcomes, key=lambda one: -normalised(one, individual))
    lines: list[Line] = []
    first = scored[0]
    for place, one in enumerate(scored, start=1):
        gap = normalised(first, individual) - normalised(one, individual)
        tied = bool(lines) and gap <= difference_error(first, one, individual)
        rank = lines[-1].rank if tied else place
        first = first if tied else one
        lines.append(Line(rank, one, normalised(one, individual), standard_error(one, individual)))
    return lines


def normalised(one: Outcome, individual: Outcome) -> float:
    """Return the mean over tasks of accuracy / accuracy of the task's own model, which should be above 0."""
    return sum(one.accuracy(task) / _above_zero(individual, task) for task in one.right) / len(one.right)


def standard_error(one: Outcome, individual: Outcome) -> float:
    """Return the standard error of a normalised average; the individual models are taken as they are."""
    shares = {task: right.double() for task, right in one.right.items()}
    return _error(shares, individual)


def difference_error(one: Outcome, other: Outcome, individual: Outcome) -> float:
    """Return the standard error of the difference of two normalised averages over the same images."""
    shares = {task: right.double() - other.right[task].double() for task, right in one.right.items()}
    return _error(shares, individual)


def _error(shares: dict[str, Tensor], individual: Outcome) -> float:
    squares = [values.var(correction=0).item() / len(values) / _above_zero(individual, task) ** 2
               for task, values in shares.items()]  # fmt: skip
    return math.sqrt(sum(squares)) / len(shares)


def _above_zero(individual: Outcome, task: str) -> float:
    return max(individual.accuracy(task), 1e-9)


def _header(lines: Sequence[Line]) -> list[str]:
    tasks = [*lines[0].outcome.right]
    return ["rank", "method", "kind", *tasks, "average", "normalised", "MB per task", "seconds", "chosen"]


def _cells(line: Line) -> list[str]:
    one = line.outcome
    numbers = [f"{100 * each:.1f}" for each in (*one.accuracies, one.average)]
    chosen = ", ".join(f"{name} {value:g}" if isinstance(value, float) else f"{name} {value}"
                       for name, value in one.chosen.items())  # fmt: skip
    return [f"{line.rank}", one.name, one.kind, *numbers, f"{100 * line.normalised:.1f} ± {100 * line.error:.1f}",
            f"{one.bytes_per_task / 1e6:.2f}", f"{one.seconds:.1f}", chosen]  # fmt: skip


def markdown(lines: Sequence[Line]) -> str:
    """Render a table in Markdown, accuracies in percent; equal ranks are ties."""
    ranks = [line.rank for line in lines]
    rows = [[f"{cells[0]}=" if ranks.count(line.rank) > 1 else cells[0], *cells[1:]]
            for line, cells in ((line, _cells(line)) for line in lines)]  # fmt: skip
    table = [_header(lines), ["---"] * len(_header(lines)), *rows]
    text = "\n".join(f"| {' | '.join(row)} |" for row in table)
    counts = sorted({len(right) for right in lines[0].outcome.right.values()})
    shown = f"{counts[0]}" if len(counts) == 1 else f"{counts[0]} to {counts[-1]}"
    return (
        f"{text}\n\nAccuracies in percent on {shown} test images of each task; normalised: mean over the tasks of "
        "accuracy / accuracy of the task's own model, with its standard error. Lines whose rank has = differ by no "
        "more than the standard error of their difference from the first of that rank. MB per task: all weights "
        "that are kept but heads, divided by the number of tasks.\n"
    )


def comma_separated(lines: Sequence[Line]) -> str:
    """Render all numbers as CSV, accuracies between 0 and 1."""
    text = io.StringIO()
    table = csv.writer(text, lineterminator="\n")
    header = _header(lines)
    table.writerow([*header[:-4], "normalised", "standard_error", "bytes_per_task", "seconds", "chosen"])
    for line in lines:
        one = line.outcome
        numbers = [f"{each:.6f}" for each in (*one.accuracies, one.average, line.normalised, line.error)]
        table.writerow([line.rank, one.name, one.kind, *numbers, round(one.bytes_per_task), f"{one.seconds:.2f}",
                        _cells(line)[-1]])  # fmt: skip
    return text.getvalue()


def can_draw() -> bool:
    """Tell whether there is what draws the picture."""
    return importlib.util.find_spec("matplotlib") is not None


def picture(lines: Sequence[Line], path: Path, title: str) -> None:
    """Draw normalised averages as bars with their standard errors, as PNG or whatever the path ends in.

    Raises:
        MergeError: matplotlib is not installed.
    """
    if not can_draw():
        raise MergeError("The picture needs another package: pip install 'hf-merge[picture]'.")
    from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]

    figure = Figure(figsize=(8, 1.2 + 0.34 * len(lines)), layout="constrained")
    axis = figure.subplots()
    for height, line in enumerate(reversed(lines)):
        value, error = 100 * line.normalised, 100 * line.error
        axis.barh(height, value, 0.7, xerr=error, color=COLOURS[line.outcome.kind], ecolor="black", capsize=2)
        axis.text(value + error + 0.8, height, f"{value:.1f}", va="center", fontsize=9)
    axis.set_yticks(range(len(lines)), [line.outcome.name for line in reversed(lines)])
    axis.set_xlim(0, 112)
    axis.set_ylim(-0.6, len(lines) - 0.4)
    axis.set_xlabel("normalised average, % of the individual models (bars: standard error)")
    axis.set_title(title)
    axis.spines[["top", "right"]].set_visible(False)
    kinds = {line.outcome.kind: None for line in lines}
    swatches = [axis.barh(-9, 0, color=COLOURS[kind], label=kind) for kind in kinds]
    figure.legend(handles=swatches, loc="outside lower center", ncols=len(swatches), frameon=False)
    figure.savefig(path, dpi=150)
