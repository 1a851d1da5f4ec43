"""Merge few and many models of ViT-B's size: what each further model costs, beside a loop that loads all of them.

The loop is what a short script does: every state dict in memory, one tensor after the other, in float32. It has no
base, task vectors and result in flight but those of one tensor; what is left is written as one file. Memory is
anonymous and peak, without that of the imports; files that are mapped do not count. Time is without imports, too.

Methods with task experts (emr, free) have no loop beside them: a second table says what an expert takes on the disk,
beside what the papers count: a bit for each entry, or 1 % of every row with its values in the models' dtype.
"""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Sequence
from pathlib import Path
from statistics import median

from benchmarks.caches import drop
from benchmarks.checkpoints import Shapes, checkpoints, vit_config, vit_shapes
from benchmarks.options import Options
from benchmarks.processes import Run, run_python
from benchmarks.report import Section
from benchmarks.tables import table

COLUMNS = ("many models", "models", "wall s", "anon MB", "MB / further model", "wall / loop", "anon / loop")
METHODS: dict[str, dict[str, object]] = {
    "ties": {"scope": "global", "density": 0.2, "consensus": "sum", "lambda_": 0.3},
    "fr": {},
    "tsv_m": {},
    "emr": {},
    "free": {"density": 0.01},
}
STORED = ("task experts", "models", "MB of one", "of the backbone", "of its fp32", "MB by the papers", "ours / papers")

_READY = """
import json, sys, time, torch, safetensors.torch, hf_merge.api
method, words, output, base, *models = json.loads(sys.argv[1])
begin = time.perf_counter()
"""
_DONE = "\nprint(json.dumps(time.perf_counter() - begin))"
_OURS = "hf_merge.merge(models, output, method=method, base_model=base, overwrite=True, **words)"
_LOOP = """
from pathlib import Path

def load(folder):  # into memory, as a model's parameters are
    files = sorted(Path(folder).glob("*.safetensors"))
    return {name: t.clone() for file in files for name, t in safetensors.torch.load_file(file).items()}

def trimmed(deltas, cuts):
    return [d * (d.abs() >= cut) for d, cut in zip(deltas, cuts)]

def ties(deltas, numbers):
    *cuts, majority = numbers
    kept = trimmed(deltas, cuts)
    sign = sum(kept).sign()
    sign[sign == 0] = majority
    return 0.3 * sum(one * (one.sign() == sign) for one in kept)

def fr(deltas, means):
    total = sum(d * (mean / sum(means)) for d, mean in zip(deltas, means))
    if total.dim() != 2:
        return total
    rows, columns = (2 * torch.fft.fftfreq(n) for n in total.shape)
    return torch.fft.ifft2(torch.fft.fft2(total) * ((rows[:, None] ** 2 + columns ** 2).sqrt() >= 0.05)).real

def tsv_m(deltas, _):
    if deltas[0].dim() != 2:
        return sum(deltas) / len(deltas)
    k = max(1, min(deltas[0].shape) // len(deltas))
    parts = [torch.linalg.svd(d, full_matrices=False) for d in deltas]
    (p, _, q), (r, _, t) = (
        torch.linalg.svd(side, full_matrices=False)
        for side in (torch.cat([u[:, :k] for u, _, _ in parts], 1), torch.cat([vh[:k] for _, _, vh in parts]))
    )
    return (p @ q * torch.cat([s[:k] for _, s, _ in parts])) @ (r @ t)

base, *states = map(load, (base, *models))
change = lambda state, name: state[name].float() - base[name].float()
numbers = []
for state in states:
    if method == "ties":
        flat = torch.cat([change(state, name).flatten() for name in base]).abs_()
        numbers.append(flat.kthvalue(len(flat) - int(0.2 * len(flat))).values)
    if method == "fr":
        numbers.append(sum(change(state, name).abs().sum() for name in base))
if method == "ties":
    signs = (sum(trimmed([change(s, name) for s in states], numbers)).sign().sum() for name in base)
    numbers.append(1.0 if sum(signs) > 0 else -1.0)
merge = {"ties": ties, "fr": fr, "tsv_m": tsv_m}[method]
merged = {name: (one.float() + merge([change(s, name) for s in states], numbers)).to(one.dtype).contiguous()
          for name, one in base.items()}
Path(output).mkdir(exist_ok=True)
safetensors.torch.save_file(merged, Path(output, "loop.safetensors"))
"""
WAYS = {"hf_merge": _OURS, "loop": _LOOP}


def many(options: Options, scratch: Path) -> list[Section]:
    """Few and many models of ViT-B's size, beside a loop that has all of them in memory."""
    sizes = options.sizes
    counts, shape = sizes.many, sizes.vit
    folder = options.folder / f"vit-{shape[0]}x{shape[1]}"
    paths = checkpoints(folder, vit_shapes(*shape), max(counts), vit_config(*shape))
    rows, stored = [], []
    for method in sizes.many_methods or METHODS:
        found, held = measure_many(method, paths, options, scratch)
        rows += many_rows(method, found, footprint())
        stored += [_stored(method, count, told, vit_shapes(*shape)) for count, told in held.items()]
    tables = [table(COLUMNS, rows), *([table(STORED, stored)] if stored else [])]
    return [Section("Many models", tables)]


Found = dict[tuple[str, int], list[Run]]
"""What each way took with each number of models, run by run."""


def footprint() -> float:
    """Return the bytes of anonymous memory that the imports take."""
    return run_python(_READY + _DONE, json.dumps(["", {}, "", ""])).anonymous


def measure_many(
    method: str, paths: Sequence[Path], options: Options, scratch: Path, *, loop: bool = True
) -> tuple[Found, dict[int, dict]]:
    """Merge a base and every number of models by every way, in turn.

    Returns what they took, and by number of models what was told of task experts, if the method makes such.

    Args:
        method: one of `METHODS`.
        paths: the base, then as many models as the largest number needs.
        options: numbers of models, and of runs; the loop runs as often as slow peers do.
        scratch: for the output.
        loop: run the loop as well, where it knows the method.
    """
    ways = {way: code for way, code in WAYS.items() if way == "hf_merge" or (loop and f"def {method}(" in _LOOP)}
    found: Found = {(way, count): [] for way in ways for count in options.sizes.many}
    output, held = scratch / "merged", {}
    for number in range(options.runs):
        for way, count in found:
            if way == "loop" and number >= options.peer_runs:
                continue
            print(f"run {number + 1}: {method} of {count}, {way}", file=sys.stderr)
            words = json.dumps([method, METHODS[method], str(output), *map(str, paths[: count + 1])])
            if options.cold:
                drop(paths[: count + 1])
            found[way, count].append(run_python(_READY + ways[way] + _DONE, words))
            if method in _COUNTED:
                held[count] = json.loads((output / "experts.json").read_text())
    return found, held


_COUNTED = {
    "emr": lambda shape, width: math.prod(shape) / 8,
    "free": lambda shape, width: math.prod(shape[:-1]) * int(0.01 * shape[-1]) * (width + 2),
}
"""Bytes by which papers count one tensor of an expert, of this shape and width of a number; indices take two."""


def _stored(method: str, count: int, told: dict, shapes: Shapes) -> list[str]:
    """One row on the size of the first expert: tensors without the headers of their files and without its head."""
    merged = {name: shape for name, shape in shapes.items() if not name.startswith("classifier")}
    numbers, width = sum(map(math.prod, merged.values())), 2
    own = told["tasks"][0]["bytes"] - width * sum(math.prod(s) for n, s in shapes.items() if n not in merged)
    paper = sum(_COUNTED[method](shape, width) for shape in merged.values())
    shares = [f"{100 * own / (width * numbers):.2f} %", f"{100 * own / (4 * numbers):.2f} %"]
    return [method, str(count), f"{own / 1e6:.2f}", *shares, f"{paper / 1e6:.2f}", f"{own / paper:.3f}"]


def many_rows(method: str, found: Found, start: float) -> list[list[str]]:
    """One row for each way and number of models; the slope of the memory is from the least number of models on."""
    wall = {key: [json.loads(run.output) for run in done] for key, done in found.items()}
    memory = {key: median(run.anonymous for run in done) - start for key, done in found.items()}
    least = min(count for _, count in found)
    rows = []
    for way, count in found:
        own, more = memory[way, count], count - least
        slope = f"{(own - memory[way, least]) / more / 1e6:.1f}" if more else "-"
        beside = ["-", "-"]
        if way != "loop" and ("loop", count) in found:
            times = zip(wall[way, count], wall["loop", count], strict=False)  # the loop may have fewer runs
            beside = [f"{median(one / loop for one, loop in times):.2f}", _share(own, memory["loop", count])]
        cells = [f"{median(wall[way, count]):.1f}", f"{own / 1e6:.0f}", slope]
        rows.append([f"{method}, {way}", str(count), *cells, *beside])
    return rows


def _share(own: float, other: float) -> str:
    """Divide bytes of memory; what is too small to be seen beside that of the imports has no share."""
    return f"{own / other:.3f}" if other > 0 else "-"


if __name__ == "__main__":
    from benchmarks.__main__ import main

    main(["--only", "many", *sys.argv[1:]])
