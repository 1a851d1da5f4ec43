"""Merges of thousands of tiny tensors, where what counts is the work for each tensor, not for each byte."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.cases import Case, measure_cases
from benchmarks.checkpoints import checkpoints, moe_config, moe_shapes, tiny_llama
from benchmarks.goals import SMALL
from benchmarks.large import Merge, merge_case, recipe_of
from benchmarks.options import Options, llama_folders
from benchmarks.processes import run_python
from benchmarks.report import Section
from benchmarks.tables import case_table, table

SLOPE_COLUMNS = ("time per tensor", "tensors", "plan s", "merge s", "plan us / tensor", "merge us / tensor")
_LINEAR = Merge("linear", has_base=False)
_SLOPE = """
import hf_merge, json, sys, time
times = []
for recipe in json.loads(sys.argv[1]):  # the first one also pays for imports that are made where they are used
    begin = time.perf_counter(); plan = hf_merge.plan(recipe)
    middle = time.perf_counter(); hf_merge.merge(recipe, sys.argv[2], overwrite=True)
    times.append((len(plan.steps), middle - begin, time.perf_counter() - middle))
print(json.dumps(times[1:]))
"""


def small(options: Options, scratch: Path) -> list[Section]:
    """Merges of thousands of tiny tensors, and the time for each of them."""
    kinds = {"tiny tensors": _tiny(options), "tiny experts": _experts(options)}
    named = zip(_names(options), kinds.values(), strict=True)
    cases = [_case(name, folders[-1], options, scratch) for name, folders in named]
    measure_cases(cases, options)
    slopes = {kind: _slope(folders, options.runs, scratch) for kind, folders in kinds.items()}
    rows = [row for kind, points in slopes.items() for row in _slope_rows(kind, points)]
    tables = [case_table(cases, cold=options.cold), table(SLOPE_COLUMNS, rows)]
    return [Section("Tiny tensors", tables, cases)]


def _names(options: Options) -> tuple[str, str]:
    layers, experts = options.sizes.experts
    return f"{options.sizes.tiny:,} tiny tensors", f"{layers} layers of {experts} experts"


def _tiny(options: Options) -> list[list[Path]]:
    """Return the models of checkpoints with a quarter, a half and all of the tensors, each beginning with its base."""
    sizes = (tiny_llama(options.sizes.tiny // part) for part in (4, 2, 1))
    return [llama_folders(options.folder, *size) for size in sizes]


def _experts(options: Options) -> list[list[Path]]:
    """Return the same with a quarter, a half and all of the layers."""
    layers, experts = options.sizes.experts
    return [
        checkpoints(options.folder / f"experts{experts}-qwen-{n}", moe_shapes(n, experts), 2, moe_config(n, experts))
        for n in (layers // 4, layers // 2, layers)
    ]


def _case(name: str, folders: list[Path], options: Options, scratch: Path) -> Case:
    return merge_case(name, recipe_of(_LINEAR, folders), folders[1:], options, scratch, SMALL)


def _slope(checkpoints: list[list[Path]], runs: int, scratch: Path) -> list[list[float]]:
    """Return (tensors, seconds of a plan, seconds of a merge) for each size, medians, all within one process."""
    recipes: list[Mapping[str, Any]] = [recipe_of(_LINEAR, paths) for paths in (checkpoints[0], *checkpoints)]
    words = json.dumps(recipes), str(scratch / "slope")
    times = [json.loads(run_python(_SLOPE, *words).output) for _ in range(runs)]
    return [[median(run[i][part] for run in times) for part in range(3)] for i in range(len(checkpoints))]


def _slope_rows(kind: str, points: list[list[float]]) -> list[list[str]]:
    """One row for each size, and one with the ratios of the last to the first: 1 where the time is linear."""
    each = [[1e6 * seconds / n for seconds in (plan, merge)] for n, plan, merge in points]
    rows = [[kind, f"{n:,.0f}", f"{plan:.3f}", f"{merge:.3f}", *(f"{one:.0f}" for one in ones)]
            for (n, plan, merge), ones in zip(points, each, strict=True)]  # fmt: skip
    ratios = [last / first for first, last in zip(each[0], each[-1], strict=True)]
    more = f"{points[-1][0] / points[0][0]:.2f}"
    return [*rows, [f"{kind}: last / first", more, "-", "-", *map("{:.2f}".format, ratios)]]
