"""What it costs to extract an adapter: whole matrices decomposed, or sketches of them, beside copying the model."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory

from benchmarks.processes import Run, run_python

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


def extraction_rows(folders: Sequence[Path], rank: int, runs: int) -> list[list[str]]:
    """Measure every way in fresh processes, without the imports; ratios are taken run by run."""
    base, fine = folders[:2]
    found: dict[str, list[Run]] = {way: [] for way in _WAYS}
    with TemporaryDirectory() as scratch:
        words = json.dumps([str(base), str(fine), str(Path(scratch, "made")), rank])
        empty = [run_python(_READY + _DONE, words) for _ in range(runs)]
        for _ in range(runs):
            for way, code in _WAYS.items():
                found[way].append(run_python(_READY + code + _DONE, words))
    footprint = median(run.anonymous for run in empty)
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
