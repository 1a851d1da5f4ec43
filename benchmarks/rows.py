"""What it costs to give an embedding the rows of another vocabulary, beside plain index_select of as many rows."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median

from benchmarks.options import Options
from benchmarks.processes import run_python
from benchmarks.report import Section
from benchmarks.tables import table

COLUMNS = ("rows", "decide s", "gather s", "index_select s", "gather / index_select")
WIDTH = 896

_ROWS = """
import json, sys, time, torch
from hf_merge.sources.mapping import MappingSource
from hf_merge.sources.reindexed import Reindexed
from hf_merge.types import InMemory
from hf_merge.vocabulary.rows import Alignment, Table

count, width, runs = map(int, sys.argv[1:])
first = {f"token {i}": i for i in range(count)}
second = {f"token {i + count // 100}": i for i in range(count)}  # 1 % of the tokens are of one model alone
union = {token: i for i, token in enumerate(dict.fromkeys([*first, *second]))}
tensors = [torch.randn(count, width, dtype=torch.bfloat16) for _ in range(2)]
sources = [MappingSource({"e": tensor}, str(i)) for i, tensor in enumerate(tensors)]
begin = time.perf_counter()
words = {"base": None, "reference": 0, "donor": 0, "tokens": {}, "multiple": None}
alignment = Alignment(union, [first, second], [InMemory({}, "0"), InMemory({}, "1")], **words)
layout = alignment.layout([Table(source, "e", count) for source in sources], [0, 1])
decide = time.perf_counter() - begin
view, plain = Reindexed(sources[1], {"e": layout.rows[1]}), torch.randperm(len(union)) % count
times = []
for _ in range(runs + 1):
    begin = time.perf_counter(); view["e"]
    middle = time.perf_counter(); tensors[1].index_select(0, plain)
    times.append((middle - begin, time.perf_counter() - middle))
print(json.dumps([decide, times[1:]]))  # the first one warms up
"""


def rows(options: Options, scratch: Path) -> list[Section]:
    """An embedding with the rows of another vocabulary, beside plain index_select of as many rows."""
    return [Section("Rows of another vocabulary", [table(COLUMNS, [_cells(options.sizes.rows, options.runs)])])]


def _cells(count: int, runs: int) -> list[str]:
    """Measure in one fresh process; the ratio is taken run by run."""
    decide, times = json.loads(run_python(_ROWS, str(count), str(WIDTH), str(runs)).output)
    gather, plain = (median(run[part] for run in times) for part in (0, 1))
    ratio = median(ours / floor for ours, floor in times)
    return [f"{count:,} x {WIDTH}", f"{decide:.3f}", f"{gather:.3f}", f"{plain:.3f}", f"{ratio:.2f}"]
