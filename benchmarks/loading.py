"""What merging on load costs beside loading one model, and beside "load all, average, assign"."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from benchmarks.caches import drop
from benchmarks.options import Options
from benchmarks.processes import Run, run_python
from benchmarks.report import Section
from benchmarks.tables import table

COLUMNS = ("on load", "wall s", "anon MB", "anon / model")

_READY = "import json, sys, torch, hf_merge.api\nfrom transformers import AutoModelForCausalLM, LlamaForCausalLM\n"
_LOAD = "base, *models = json.loads(sys.argv[1])\nmodel = LlamaForCausalLM.from_pretrained(base)\n"
_NAIVE = """
base, *paths = json.loads(sys.argv[1])
models = [LlamaForCausalLM.from_pretrained(path) for path in paths]
states = [model.state_dict() for model in models]
average = {name: torch.stack([state[name].float() for state in states]).mean(0) for name in states[0]}
models[0].load_state_dict(average)
"""
_OURS = """
base, *models = json.loads(sys.argv[1])
words = {words}
model = hf_merge.from_pretrained(models, **words)
"""
_WAYS = {
    "one model, not merged": _LOAD,
    "load all, average, assign": _NAIVE,
    "from_pretrained, linear": _OURS.format(words="dict(method='linear')"),
    "from_pretrained, ties": _OURS.format(words="dict(method='ties', base_model=base, density=0.5)"),
}


def load(options: Options, scratch: Path) -> list[Section]:
    """Merges of the large models into one that transformers loads, without a folder for the result."""
    folders = options.llamas()
    paths = json.dumps([str(folder) for folder in folders])
    size = sum(file.stat().st_size for file in folders[0].glob("*.safetensors"))
    footprint = run_python(_READY, paths).anonymous
    found: dict[str, list[Run]] = {way: [] for way in _WAYS}
    for _ in range(options.runs):
        for way, code in _WAYS.items():
            if options.cold:
                drop(folders)
            found[way].append(run_python(_READY + code, paths))
    rows = [_cells(way, done, footprint, size) for way, done in found.items()]
    return [Section("Merging on load", [table(COLUMNS, rows)])]


def _cells(way: str, runs: Sequence[Run], footprint: float, size: int) -> list[str]:
    anonymous = median(run.anonymous for run in runs) - footprint
    wall = median(run.wall for run in runs)
    return [way, f"{wall:.2f}", f"{anonymous / 1e6:.0f}", f"{anonymous / size:.2f}"]
