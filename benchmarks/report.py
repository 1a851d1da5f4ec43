"""What was measured, as Markdown and JSON, with the versions of what took part."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from platform import python_version
from typing import Any

from benchmarks.cases import Case
from benchmarks.goals import verdicts
from benchmarks.options import SIZE, Options, sizes_of
from benchmarks.peers import installed_mergekit
from benchmarks.processes import Run

BEGIN, END = "<!-- table -->", "<!-- /table -->"
"""Between them stands the report in a file that `insert` writes into."""


@dataclass(frozen=True)
class Section:
    """A part of the report: a title, tables in Markdown, and the cases that some of them are made of."""

    title: str
    tables: Sequence[str]
    cases: Sequence[Case] = field(default_factory=list)


def markdown(section: Section) -> str:
    """Write a section under its title."""
    return "\n\n".join([f"### {section.title}", *section.tables])


def caption(options: Options, versions: dict[str, str]) -> str:
    """Say on what, with what and how often it was measured."""
    hidden, layers = options.sizes.llama
    caches = "dropped from the page cache before each run (cold)" if options.cold else "in the page cache (warm)"
    times = "run" if options.runs == 1 else "runs"
    told = [
        f"{', '.join(' '.join(pair) for pair in versions.items())}; {os.cpu_count()} cores.",
        f"The large models are Llamas of width {hidden} with {layers} layers in bfloat16; inputs are {caches}.",
        f"Medians of {options.runs} {times} ({options.peer_runs} of peers that take long).",
    ]
    if options.cold or options.sizes.llama != sizes_of(SIZE).llama:
        told.append(f"The goals are for {SIZE} parameters and a warm page cache: here they only show what is compared.")
    return " ".join(told)


def versions(options: Options) -> dict[str, str]:
    """Return the versions of what takes part, as far as it is installed."""
    found = {"Python": python_version()}
    for name in ("hf-merge", "torch", "numba", "transformers", "peft"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    mergekit = options.mergekit and installed_mergekit(options.mergekit)
    return {**found, "MergeKit": mergekit} if mergekit else found


def data(sections: Sequence[Section], options: Options, versions: dict[str, str]) -> str:
    """Write every single run, and what became of the goals, as JSON."""
    content = {
        "versions": versions,
        "cores": os.cpu_count(),
        "cache": "cold" if options.cold else "warm",
        "runs": options.runs,
        "peer_runs": options.peer_runs,
        "sizes": asdict(options.sizes),
        "sections": [
            {"title": one.title, "tables": list(one.tables), "cases": list(map(_case, one.cases))} for one in sections
        ],
    }
    return json.dumps(content, indent=1) + "\n"


def _case(case: Case) -> dict[str, Any]:
    runs = {name: [_numbers(run) for run in done] for name, done in case.runs.items()}
    goals = [asdict(verdict) for verdict in verdicts(case)]
    return {"case": case.name, "runs": runs, "goals": goals, "failed": case.failed}


def _numbers(run: Run) -> dict[str, float | None]:
    """Return what a run took; JSON has no NaN."""
    parts = {"wall": run.wall, "cpu": run.cpu, "anonymous": run.anonymous}
    return {part: value if value == value else None for part, value in parts.items()}


def check_markers(file: Path) -> None:
    """Make sure that a file has the place of the report.

    Raises:
        ValueError: it has not.
    """
    text = file.read_text(encoding="utf-8") if file.is_file() else ""
    if (text.count(BEGIN), text.count(END)) != (1, 1) or text.index(BEGIN) > text.index(END):
        raise ValueError(f"'{file}' has no place for the report: put a line {BEGIN} there, and a line {END} after it.")


def insert(file: Path, report: str) -> None:
    """Put the report between the two markers of a file, in the place of an older one."""
    before, rest = file.read_text(encoding="utf-8").split(BEGIN)
    _, after = rest.split(END)
    file.write_text(f"{before}{BEGIN}\n\n{report}\n\n{END}{after}", encoding="utf-8")
