"""What it costs to extract an adapter: whole matrices decomposed, or sketches of them, beside copying the model."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median

from benchmarks.caches import drop
from benchmarks.options import Options
from benchmarks.processes import Run, run_python
from benchmarks.report import Section
from benchmarks.tables import table

COLUMNS = ("extraction", "wall s", "anon MB", "wall / copy", "exact / sketch")

_READY = """
import json, sys, time, torch, transformers, peft, hf_merge.api
base, fine, output, rank = json.loads(sys.argv[1])
begin = time.perf_counter()
"""
_DONE = "print(json.dumps(time.perf_counter() - begin))"
_COPY = "hf_merge.merge([fine], output, method='passthrough', overwrite=True)\n"
_EXTRACT = "hf_merge.extract_adapter(fine, base, output, rank=rank, exact={exact}, keep_rest=False, overwrite=True)\n"
_WAYS = {
    "the model, copied": _COPY,
    "rank {rank}, sketches": _EXTRACT.format(exact=False),
    "rank {rank}, exact": _EXTRACT.format(exact=True),
}


def extract(options: Options, scratch: Path) -> list[Section]:
    """An adapter extracted from a large model, exactly or by sketches, beside a copy of the model."""
    base, fine, _ = options.llamas()
    words = json.dumps([str(base), str(fine), str(scratch / "made"), options.sizes.rank])
    empty = run_python(_READY + _DONE, words).anonymous
    found: dict[str, list[Run]] = {way: [] for way in _WAYS}
    for _ in range(options.runs):
        for way, code in _WAYS.items():
            if options.cold:
                drop([base, fine])
            found[way].append(run_python(_READY + code + _DONE, words))
    return [Section("Extracting an adapter", [table(COLUMNS, _rows(found, empty, options.sizes.rank))])]


def _rows(found: dict[str, list[Run]], footprint: float, rank: int) -> list[list[str]]:
    """One row for each way; seconds are without the imports, and ratios are taken run by run."""
    times = {way: [json.loads(run.output) for run in done] for way, done in found.items()}
    copied, sketched, _ = times.values()
    rows = []
    for way, own in times.items():
        beside = median(time / copy for time, copy in zip(own, copied, strict=True))
        ratio = median(time / sketch for time, sketch in zip(own, sketched, strict=True))
        anonymous = median(run.anonymous for run in found[way]) - footprint
        told = f"{ratio:.2f}" if way.endswith("exact") else "-"
        rows.append([way.format(rank=rank), f"{median(own):.2f}", f"{anonymous / 1e6:.0f}", f"{beside:.2f}", told])
    return rows
