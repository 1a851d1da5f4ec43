"""Compare merges with the floor: reading every input byte once, and writing as many bytes as the merge does.

    python -m benchmarks --size 1.1B --models 2 --methods linear,slerp,ties --runs 5

Every figure is that of a whole fresh process, runs of all rows alternate, and medians are shown. Page caches are
warm. Compare ratios, and only those of one call: seconds depend on the machine and on what else it does.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.checkpoints import SIZES, Shapes, checkpoints, llama_config, llama_shapes, moe_shapes, tiny_shapes
from benchmarks.extraction import COLUMNS as EXTRACTION_COLUMNS
from benchmarks.extraction import extraction_rows
from benchmarks.loading import COLUMNS as LOADING_COLUMNS
from benchmarks.loading import loading_rows
from benchmarks.processes import Run, run_command, run_floor, run_python
from benchmarks.rows import COLUMNS as ROW_COLUMNS
from benchmarks.rows import row_cells

COLUMNS = ("case", "wall s", "cpu s", "anon MB", "floor s", "wall / floor", "(wall - torch) / floor")
SLOPE_COLUMNS = ("time per tensor", "tensors", "plan s", "merge s", "plan us / tensor", "merge us / tensor")
PROCESS_COLUMNS = ("processes", "threads each", "wall s", "wall / 1 process", "without the start")
METHODS = "linear,slerp,task_arithmetic,ties,dare_ties,passthrough"
DENSITY = 0.5

_MERGE = "import hf_merge, json, sys; hf_merge.merge(json.loads(sys.argv[1]), sys.argv[2])"
_SLOPE = """
import hf_merge, json, sys, time
times = []
for recipe in json.loads(sys.argv[1]):  # the first one also pays for imports that are made where they are used
    begin = time.perf_counter(); hf_merge.plan(recipe)
    middle = time.perf_counter(); hf_merge.merge(recipe, sys.argv[2], overwrite=True)
    times.append((middle - begin, time.perf_counter() - middle))
print(json.dumps(times[1:]))
"""


@dataclass
class Case:
    """A row of the table: what is measured, its floor if it has one, and the runs of both in the same order."""

    name: str
    run: Callable[[], Run]
    floor: Callable[[], Run] | None = None
    runs: list[Run] = field(default_factory=list)
    floors: list[Run] = field(default_factory=list)


def main(arguments: Sequence[str] | None = None) -> str:
    """Run the benchmark; return the Markdown that was printed."""
    options = _options(arguments)
    options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        cases = _cases(options, Path(scratch))
        for case in cases:
            _ = case.floor and case.floor()  # warms the page cache
        for number in range(options.runs):
            for case in cases:
                print(f"run {number + 1}/{options.runs}: {case.name}", file=sys.stderr)
                case.floors += [case.floor()] if case.floor else []
                case.runs.append(case.run())
        slopes = _slopes(options, Path(scratch))
        shared = _process_rows(options, Path(scratch)) if options.processes else []
    tables = [table(COLUMNS, _rows(cases)), *([table(SLOPE_COLUMNS, _slope_rows(slopes))] if slopes else [])]
    tables += [table(PROCESS_COLUMNS, shared)] if shared else []
    tables += [table(ROW_COLUMNS, [row_cells(options.rows, options.runs)])] if options.rows else []
    tables += [table(LOADING_COLUMNS, loading_rows(options.large, options.runs))] if options.on_load else []
    if options.rank:
        tables.append(table(EXTRACTION_COLUMNS, extraction_rows(options.large, options.rank, options.runs)))
    text = "\n\n".join(tables)
    print(text)
    if options.json:
        done = [{"case": c.name, "runs": [*map(asdict, c.runs)], "floors": [*map(asdict, c.floors)]} for c in cases]
        content = {"options": vars(options), "cases": done, "slopes": slopes}
        options.json.write_text(json.dumps(content, default=str, indent=1))
    return text


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--size", choices=SIZES, default="300M", help="of a Llama-shaped checkpoint in bfloat16")
    parser.add_argument("--hidden", type=int, help="its width instead, a multiple of 8")
    parser.add_argument("--layers", type=int, help="its number of layers instead")
    parser.add_argument("--models", type=int, default=2, help="how many fine-tunes are merged")
    parser.add_argument("--methods", type=_words, default=_words(METHODS), metavar="A,B")
    parser.add_argument("--runs", type=int, default=5, help="of every row")
    parser.add_argument("--tiny-tensors", type=int, default=5000, help="of the checkpoint of tiny tensors; 0: none")
    parser.add_argument("--moe-layers", type=int, default=48, help="of the mixture of tiny experts; 0: none")
    parser.add_argument("--experts", type=int, default=128, help="in each of these layers")
    parser.add_argument("--rows", type=int, default=151_000, help="of an embedding in another vocabulary; 0: none")
    parser.add_argument("--on-load", action=argparse.BooleanOptionalAction, default=True, help="merges into a model")
    parser.add_argument("--rank", type=int, default=32, help="of an adapter that is extracted; 0: none")
    parser.add_argument("--processes", type=int, default=2, help="that share a merge by ties; 0: none")
    parser.add_argument("--json", type=Path, metavar="FILE", help="every single run")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir(), "hf_merge_benchmarks"),
                        help="for checkpoints, which later calls use again, and for outputs")  # fmt: skip
    options = parser.parse_args(arguments)
    hidden, layers = SIZES[options.size]
    options.hidden, options.layers = options.hidden or hidden, options.layers or layers
    return options


def _words(text: str) -> list[str]:
    return [word for word in text.split(",") if word]


def _cases(options: argparse.Namespace, scratch: Path) -> list[Case]:
    """Make the checkpoints and say what is measured on them."""
    name = f"llama-{options.hidden}x{options.layers}"
    shape = options.hidden, options.layers
    large = options.large = checkpoints(
        options.folder / name, llama_shapes(*shape), options.models, llama_config(*shape)
    )
    imports = [f"import {module}" for module in ("torch", "hf_merge.api")]
    cases = [Case(code, partial(run_python, code)) for code in imports]
    cases += [_merge_case(method, _recipe(method, large), scratch) for method in options.methods]
    if options.tiny_tensors:
        recipe = _recipe("linear", _tiny(options, options.tiny_tensors))
        cases.append(_merge_case(f"{options.tiny_tensors:,} tiny tensors", recipe, scratch))
    return cases


def _tiny(options: argparse.Namespace, count: int) -> list[Path]:
    return checkpoints(options.folder / f"tiny-{count}", tiny_shapes(count), 2)


def _recipe(name: str, paths: Sequence[Path]) -> dict[str, Any]:
    """Merge as many models as the method takes, into a base if it has one."""
    import hf_merge

    method = hf_merge.get_method(name)
    used = [str(path) for path in paths[1 : 1 + (method.count or len(paths))]]
    return {
        "merge_method": name,
        "models": used,
        "base_model": None if method.base == "ignored" else str(paths[0]),
        "parameters": {"density": DENSITY} if "density" in method.parameters else {},
    }


def _merge_case(name: str, recipe: dict[str, Any], scratch: Path) -> Case:
    inputs = [Path(path) for path in (*recipe["models"], recipe["base_model"]) if path]
    output = scratch / "merged"

    def run() -> Run:
        done = run_python(_MERGE, json.dumps(recipe), str(output))
        shutil.rmtree(output)
        return done

    what = f"{'base + ' if recipe['base_model'] else ''}{len(recipe['models'])}"
    return Case(f"{name}, {what}", run, lambda: run_floor(inputs, scratch / "floor"))


def _slopes(options: argparse.Namespace, scratch: Path) -> dict[str, list[list[float]]]:
    """Time plans and merges of a quarter, a half and all of each kind of checkpoint of tiny tensors."""
    tiny, layers, experts = options.tiny_tensors, options.moe_layers, options.experts
    kinds = {
        "tiny": {n: tiny_shapes(n) for n in (tiny // 4, tiny // 2, tiny) if n},
        f"experts{experts}": {n: moe_shapes(n, experts) for n in (layers // 4, layers // 2, layers) if n},
    }
    named = {"tiny": "tiny tensors", f"experts{experts}": f"layers of {experts} experts"}
    return {named[kind]: _slope(options, scratch, kind, sizes) for kind, sizes in kinds.items() if sizes}


def _slope(options: argparse.Namespace, scratch: Path, kind: str, sizes: dict[int, Shapes]) -> list[list[float]]:
    """Return (tensors, seconds of a plan, seconds of a merge) for each size, medians, all within one process."""
    folders = [checkpoints(options.folder / f"{kind}-{n}", shapes, 2) for n, shapes in sizes.items()]
    recipes = [_recipe("linear", paths) for paths in (folders[0], *folders)]
    runs = [run_python(_SLOPE, json.dumps(recipes), str(scratch / "slope")) for _ in range(options.runs)]
    times = [json.loads(run.output) for run in runs]
    return [
        [len(shapes), *(median(run[i][part] for run in times) for part in (0, 1))]
        for i, shapes in enumerate(sizes.values())
    ]


def _process_rows(options: argparse.Namespace, scratch: Path) -> list[list[str]]:
    """Let one process and several share the same threads in a merge; without the start is against a tiny merge."""
    large = options.large
    small = checkpoints(options.folder / "llama-64x1", llama_shapes(64, 1), options.models, llama_config(64, 1))
    many = options.processes
    ways = ((1, many), (1, 1), (many, 1))  # processes, threads of each
    walls: dict[tuple[int, int], list[tuple[float, float]]] = {way: [] for way in ways}
    for _ in range(options.runs):
        for way in ways:
            walls[way].append(tuple(_process_wall(paths, *way, scratch) for paths in (large, small)))  # type: ignore
    first = walls[ways[0]]
    return [
        [str(way[0]), str(way[1]), f"{median(one[0] for one in taken):.2f}",
         *(f"{median(ratio):.2f}" for ratio in (
             [one[0] / base[0] for one, base in zip(taken, first, strict=True)],
             [(one[0] - one[1]) / max(base[0] - base[1], 1e-9) for one, base in zip(taken, first, strict=True)],
         ))]
        for way, taken in walls.items()
    ]  # fmt: skip


def _process_wall(paths: Sequence[Path], processes: int, threads: int, scratch: Path) -> float:
    output, models = scratch / "shared", [str(path) for path in paths[1:]]
    words = ["--method", "ties", "--base", str(paths[0]), *models, str(output), "--processes", str(processes)]
    wall = run_command("merge", *words, "-p", f"density={DENSITY}", threads=threads * processes).wall
    shutil.rmtree(output)
    return wall


def _rows(cases: Sequence[Case]) -> list[list[str]]:
    """Medians of every case; ratios are taken run by run, between neighbours in time."""
    torch, api, *merges = cases
    footprint = median(run.anonymous for run in api.runs)
    rows = [[*_cells(case, 0), "-", "-", "-"] for case in (torch, api)]
    for case in merges:
        pairs = list(zip(case.runs, case.floors, torch.runs, strict=True))
        floor = median(run.wall for run in case.floors)
        ratios = [median(run.wall / floor.wall for run, floor, _ in pairs)]
        ratios += [median((run.wall - imported.wall) / floor.wall for run, floor, imported in pairs)]
        rows.append([*_cells(case, footprint), f"{floor:.2f}", *(f"{ratio:.2f}" for ratio in ratios)])
    return rows


def _cells(case: Case, footprint: float) -> list[str]:
    wall, cpu = median(run.wall for run in case.runs), median(run.cpu for run in case.runs)
    anonymous = median(run.anonymous for run in case.runs) - footprint
    return [case.name, f"{wall:.2f}", f"{cpu:.2f}", f"{anonymous / 1e6:.0f}"]


def _slope_rows(slopes: dict[str, list[list[float]]]) -> list[list[str]]:
    """One row for each size, and one with the ratios of the last to the first: 1 where the time is linear."""
    rows = []
    for kind, points in slopes.items():
        each = [[1e6 * seconds / n for seconds in (plan, merge)] for n, plan, merge in points]
        rows += [[kind, f"{n:,.0f}", f"{plan:.3f}", f"{merge:.3f}", *(f"{one:.0f}" for one in ones)]
                 for (n, plan, merge), ones in zip(points, each, strict=True)]  # fmt: skip
        ratios = [last / first for first, last in zip(each[0], each[-1], strict=True)]
        rows.append(
            [f"{kind}: last / first", f"{points[-1][0] / points[0][0]:.2f}", "-", "-", *map("{:.2f}".format, ratios)]
        )
    return rows


def table(columns: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = [columns, ["---", *["---:"] * (len(columns) - 1)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


if __name__ == "__main__":
    main()
