"""Merges of a large model by every common method, beside a plain copy, a loop in plain torch, and MergeKit."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import yaml

from benchmarks.cases import OURS, Case, Way, import_torch, measure_cases, python_imports
from benchmarks.goals import METHODS
from benchmarks.options import Options
from benchmarks.peers import copy_way, loop_way, mergekit_way, removing
from benchmarks.processes import run_command
from benchmarks.report import Section
from benchmarks.tables import case_table

DENSITY = 0.5


class Merge(NamedTuple):
    """A method, what it merges, and its settings: models by their places, of which 0 is the base."""

    method: str
    models: tuple[int, ...] = (1, 2)
    has_base: bool = True
    density: float | None = None

    @property
    def name(self) -> str:
        count = len(set(self.models) - {0}) if self.has_base else len(self.models)
        return f"{self.method}, {f'base + {count}' if self.has_base else f'{count} models'}"


MERGES = (
    Merge("linear", has_base=False),
    Merge("linear", (0, 1, 2), has_base=False),
    Merge("slerp", (0, 1)),
    Merge("task_arithmetic"),
    Merge("nuslerp", has_base=False),
    Merge("model_stock"),
    Merge("karcher", has_base=False),
    Merge("sce"),
    *(Merge(method, density=DENSITY) for method in ("ties", "breadcrumbs", "della", "dare_linear", "dare_ties")),
)
_WEIGHTLESS = ("slerp", "model_stock", "karcher", "sce")


def large(options: Options, scratch: Path) -> list[Section]:
    """Merges of one large checkpoint, by method."""
    folders = options.llamas()
    wanted = [merge for merge in MERGES if not options.methods or merge.method in options.methods]
    cases = [_case(merge, folders, options, scratch) for merge in wanted]
    measure_cases(cases, options)
    return [Section("Large models", [case_table(cases, cold=options.cold)], cases)]


def _case(merge: Merge, folders: Sequence[Path], options: Options, scratch: Path) -> Case:
    content = recipe_of(merge, folders)
    places = (0, *merge.models) if merge.has_base else merge.models
    read = [folders[i] for i in dict.fromkeys(places)]
    return merge_case(merge.name, content, read, options, scratch, METHODS[merge.method])


def recipe_of(merge: Merge, folders: Sequence[Path]) -> dict[str, Any]:
    """Return the recipe of a merge, which MergeKit reads as well."""
    words = {} if merge.method in _WEIGHTLESS else {"weight": 0.5}
    words |= {} if merge.density is None else {"density": merge.density}
    recipe: dict[str, Any] = {"merge_method": merge.method, "dtype": "bfloat16"}
    recipe["models"] = [{"model": str(folders[i]), "parameters": words} for i in merge.models]
    recipe |= {"base_model": str(folders[0])} if merge.has_base else {}
    return {**recipe, "parameters": {"t": 0.5}} if merge.method == "slerp" else recipe


def merge_case(
    name: str, recipe: dict[str, Any], inputs: Sequence[Path], options: Options, scratch: Path, goals: Sequence[Any]
) -> Case:
    """Return a merge by commands that get one recipe, beside what a copy and a loop over the same models take."""
    file, output = scratch / f"recipe-{len(list(scratch.iterdir()))}.yml", scratch / "merged"
    file.write_text(yaml.safe_dump(recipe))
    run = removing(output, lambda: run_command("merge", str(file), str(output)))
    ways = [import_torch(), copy_way(inputs, scratch), Way(OURS, run, python_imports("hf_merge.api"))]
    loop = loop_way(recipe["merge_method"], inputs, scratch)
    ways += [loop] if loop else []
    ways += [mergekit_way(file, options.mergekit, scratch)] if options.mergekit else []
    return Case(name, ways, goals, inputs)
