"""What it takes to start: the command's help, and a plan of models on the disk."""

from __future__ import annotations

from pathlib import Path

import yaml

from benchmarks.cases import MERGEKIT, OURS, Case, Way, import_torch, measure_cases
from benchmarks.goals import START
from benchmarks.large import Merge, recipe_of
from benchmarks.options import Options
from benchmarks.peers import run_mergekit
from benchmarks.processes import run_command
from benchmarks.report import Section
from benchmarks.tables import case_table


def start(options: Options, scratch: Path) -> list[Section]:
    """`--help`, and a plan of the large models, beside an import of torch and MergeKit's `--help`."""
    folders, recipe = options.llamas(), scratch / "planned.yml"
    recipe.write_text(yaml.safe_dump(recipe_of(Merge("linear", has_base=False), folders)))
    cases = [
        _case("hf-merge --help", options, [], "--help"),
        _case("hf-merge plan of local shards", options, folders[1:], "plan", str(recipe)),
    ]
    measure_cases(cases, options)
    return [Section("Starting", [case_table(cases, cold=options.cold, torch=True)], cases)]


def _case(name: str, options: Options, inputs: list[Path], *words: str) -> Case:
    ways = [import_torch(), Way(OURS, lambda: run_command(*words))]
    if venv := options.mergekit:
        ways.append(Way(MERGEKIT, lambda: run_mergekit(venv, "--help"), slow=True))
    return Case(name, ways, START, inputs)
