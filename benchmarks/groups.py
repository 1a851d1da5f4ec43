"""The groups of the benchmark, by name, in the order of the report."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from benchmarks.adapters import adapter
from benchmarks.extraction import extract
from benchmarks.large import large
from benchmarks.loading import load
from benchmarks.many import many
from benchmarks.options import Options
from benchmarks.report import Section
from benchmarks.rows import rows
from benchmarks.sharing import processes
from benchmarks.small import small
from benchmarks.start import start

Group = Callable[[Options, Path], list[Section]]
"""Takes the options and a folder for outputs; measures, and tells. Its docstring says what it measures."""

GROUPS: dict[str, Group] = {
    group.__name__: group for group in (start, large, small, adapter, many, load, extract, rows, processes)
}
