"""One process with all threads beside several that share a merge and the threads."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from benchmarks.options import Options, llama_folders
from benchmarks.processes import run_command
from benchmarks.report import Section
from benchmarks.tables import table

COLUMNS = ("processes", "threads each", "wall s", "wall / 1 process", "without the start")

_Walls = list[tuple[float, float]]  # of the large merge and of a tiny one, run by run


def processes(options: Options, scratch: Path) -> list[Section]:
    """Several processes that share a merge, beside one."""
    large, tiny, many = options.llamas(), llama_folders(options.folder, 64, 1), options.sizes.processes
    ways = ((1, many), (1, 1), (many, 1))  # processes, threads of each
    walls: dict[tuple[int, int], _Walls] = {way: [] for way in ways}
    for _ in range(options.runs):
        for way, taken in walls.items():
            taken.append((_wall(large, *way, scratch), _wall(tiny, *way, scratch)))
    rows = [_row(way, taken, walls[ways[0]]) for way, taken in walls.items()]
    return [Section("Several processes", [table(COLUMNS, rows)])]


def _row(way: tuple[int, int], taken: _Walls, first: _Walls) -> list[str]:
    """Ratios are taken run by run; without the start is what is left beyond a tiny merge."""
    pairs = list(zip(taken, first, strict=True))
    ratios = (
        median(one[0] / base[0] for one, base in pairs),
        median((one[0] - one[1]) / max(base[0] - base[1], 1e-9) for one, base in pairs),
    )
    return [*map(str, way), f"{median(one[0] for one in taken):.2f}", *map("{:.2f}".format, ratios)]


def _wall(paths: Sequence[Path], processes: int, threads: int, scratch: Path) -> float:
    output, models = scratch / "shared", [str(path) for path in paths[1:]]
    words = ["--method", "ties", "--base", str(paths[0]), *models, str(output), "--processes", str(processes)]
    wall = run_command("merge", *words, "-p", "density=0.5", threads=threads * processes).wall
    shutil.rmtree(output)
    return wall
