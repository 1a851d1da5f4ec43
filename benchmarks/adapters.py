"""Compare what is done with LoRA adapters with PEFT and with dense matrices.

    python -m benchmarks.adapters --size 1.1B --runs 3

Three tables: how far weighted sums of adapters are from the exact sum, beside PEFT's `add_weighted_adapter`; merging in
core space beside an SVD of the dense sum; and an adapter merged into its base beside PEFT's load, merge_and_unload,
save. Runs alternate, ratios are taken run by run, medians are shown.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.__main__ import table
from benchmarks.checkpoints import SIZES, checkpoints, llama_config, llama_shapes
from benchmarks.processes import Run, run_floor, run_python

SUM_COLUMNS = ("relative error of", "alpha = r", "alpha = 4 r", "rsLoRA")
CORE_COLUMNS = ("4 adapters of rank 16 to rank 16", "core s", "dense SVD s", "dense / core", "difference")
BASE_COLUMNS = ("adapter into its base", "wall s", "anon MB", "anon / model", "wall / ours", "wall / floor")
RANK, COUNT = 16, 4
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

_OURS = "import hf_merge, sys; hf_merge.merge([sys.argv[1] + '+' + sys.argv[2]], sys.argv[3], method='passthrough')"
_PEFT = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3])
"""
_READY = {"hf_merge": "import hf_merge.api", "PEFT": "import peft, transformers.models.llama.modeling_llama"}


def main(arguments: Sequence[str] | None = None) -> str:
    """Run the benchmark; return the Markdown that was printed."""
    parser = argparse.ArgumentParser("python -m benchmarks.adapters", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--size", choices=SIZES, default="1.1B", help="of the base, in bfloat16")
    parser.add_argument("--hidden", type=int, help="its width instead, a multiple of 8")
    parser.add_argument("--layers", type=int, help="its number of layers instead")
    parser.add_argument("--widths", type=int, nargs="*", default=[1024, 2048], help="of the modules that are merged")
    parser.add_argument("--runs", type=int, default=3, help="of every row")
    parser.add_argument("--folder", type=Path, default=Path(tempfile.gettempdir(), "hf_merge_benchmarks"),
                        help="for the base, which later calls use again, and for outputs")  # fmt: skip
    options = parser.parse_args(arguments)
    hidden, layers = SIZES[options.size]
    shape = options.hidden or hidden, options.layers or layers
    options.folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        tables = [
            table(SUM_COLUMNS, sum_rows(Path(scratch))),
            table(CORE_COLUMNS, [core_cells(width, options.runs) for width in options.widths]),
            table(BASE_COLUMNS, base_rows(options.folder, Path(scratch), shape, options.runs)),
        ]
    text = "\n\n".join(tables)
    print(text)
    return text


def sum_rows(scratch: Path) -> list[list[str]]:
    """Merge two adapters of rank 8 at weights 0.6 and 0.4, and compare with the sum of their changes."""
    import torch
    from peft import PeftModel
    from safetensors.torch import load_file
    from torch import nn

    import hf_merge

    weights, size = [0.6, 0.4], 64
    cases: list[dict[str, Any]] = [{"lora_alpha": 8}, {"lora_alpha": 32}, {"lora_alpha": 8, "use_rslora": True}]
    found: dict[str, list[str]] = {}
    for number, case in enumerate(cases):
        folders = [_small_adapter(scratch / f"{number}-{seed}", seed, size, case) for seed in (0, 1)]
        changes = [_change(load_file(f"{folder}/adapter_model.safetensors"), case) for folder in folders]
        exact = sum(weight * change for weight, change in zip(weights, changes, strict=True))
        for name, words in {"core": {"method": "task_arithmetic"}, "cat": {"method": "cat"}}.items():
            output = scratch / f"{number}-{name}"
            hf_merge.merge(folders, output, weight=weights, **words)
            merged = _change(load_file(output / "adapter_model.safetensors"), {"lora_alpha": None})
            found.setdefault(f"hf_merge, {name}", []).append(_error(merged, exact))
        for kind in ("svd", "cat", "linear", "ties_svd"):
            model = PeftModel.from_pretrained(nn.Sequential(nn.Linear(size, size, bias=False)), folders[0], "a")
            model.load_adapter(folders[1], "b")
            words = {"svd_rank": 16} if "svd" in kind else {}
            words |= {"density": 0.999} if "ties" in kind else {}
            model.add_weighted_adapter(["a", "b"], weights, "both", combination_type=kind, **words)
            layer: Any = model.base_model.model[0]
            with torch.no_grad():
                found.setdefault(f"PEFT, {kind}", []).append(_error(layer.get_delta_weight("both"), exact))
    return [[name, *cells] for name, cells in found.items()]


def _small_adapter(folder: Path, seed: int, size: int, words: dict[str, Any]) -> str:
    import torch
    from peft import LoraConfig, get_peft_model
    from torch import nn

    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(size, size, bias=False))
    config = LoraConfig(r=8, target_modules=["0"], init_lora_weights=False, **words)
    get_peft_model(model, config).save_pretrained(str(folder))  # type: ignore[arg-type]
    return str(folder)


def _change(tensors: dict[str, Any], words: dict[str, Any]) -> Any:
    """Multiply the factors of a file; an alpha of None is the rank."""
    left, right = (tensors[f"base_model.model.0.lora_{letter}.weight"].double() for letter in "BA")
    rank = right.shape[0]
    alpha = words["lora_alpha"] or rank
    return left @ right * alpha / (rank**0.5 if words.get("use_rslora") else rank)


def _error(found: Any, exact: Any) -> str:
    return f"{float((found.double() - exact).norm() / exact.norm()):.1e}"


def core_cells(width: int, runs: int) -> list[str]:
    """Merge the factors of one square module, and beside that decompose the dense sum of the changes."""
    import torch

    from hf_merge.ops.lowrank import truncate
    from hf_merge.sources.core import cores

    torch.manual_seed(0)
    pairs = [(torch.randn(width, RANK), torch.randn(RANK, width)) for _ in range(COUNT)]

    def small() -> Any:
        left, right, parts = cores([(b.double(), a.double()) for b, a in pairs])
        found = truncate(torch.stack(parts).mean(0), RANK)
        return left @ found.left, found.right @ right.mT

    def dense() -> Any:
        u, s, vh = torch.linalg.svd(torch.stack([b @ a for b, a in pairs]).mean(0), full_matrices=False)
        return u[:, :RANK] * s[:RANK], vh[:RANK]

    times = _alternate(runs, small, dense)
    (left, right), (u, vh) = small(), dense()
    difference = (left @ right - (u @ vh).double()).norm() / (u @ vh).norm()
    return [f"{width} x {width}", *_seconds(times), f"{difference:.0e}"]


def _alternate(runs: int, one: Callable[[], Any], other: Callable[[], Any]) -> list[tuple[float, float]]:
    one()  # warms up
    return [(_timed(one), _timed(other)) for _ in range(runs)]


def _timed(work: Callable[[], Any]) -> float:
    begin = time.perf_counter()
    work()
    return time.perf_counter() - begin


def _seconds(times: Sequence[tuple[float, float]]) -> list[str]:
    each = [median(pair[i] for pair in times) for i in (0, 1)]
    return [*(f"{seconds:.4f}" for seconds in each), f"{median(b / a for a, b in times):.0f}"]


def base_rows(folder: Path, scratch: Path, shape: tuple[int, int], runs: int) -> list[list[str]]:
    """Merge an adapter of all linear modules into a base, in fresh processes; memory counts from the imports'."""
    base = checkpoints(folder / f"llama-{shape[0]}x{shape[1]}", llama_shapes(*shape), 1, llama_config(*shape))[0]
    adapter = _adapter(scratch / "adapter", base, shape)
    size = sum(file.stat().st_size for file in base.glob("*.safetensors"))
    codes = {"hf_merge": _OURS, "PEFT": _PEFT}
    footprint = {name: median(run_python(code).anonymous for _ in range(runs)) for name, code in _READY.items()}
    found: dict[str, list[Run]] = {name: [] for name in codes}
    floors = [run_floor([base], scratch / "floor")]
    for number in range(runs):
        for name, code in codes.items():
            print(f"run {number + 1}/{runs}: {name}", file=sys.stderr)
            found[name].append(run_python(code, str(base), str(adapter), str(scratch / "out")))
            shutil.rmtree(scratch / "out")
        floors.append(run_floor([base], scratch / "floor"))
    ours = found["hf_merge"]
    return [
        [
            name,
            f"{median(run.wall for run in done):.2f}",
            f"{(memory := median(run.anonymous for run in done) - footprint[name]) / 1e6:.0f}",
            f"{memory / size:.2f}",
            f"{median(run.wall / own.wall for run, own in zip(done, ours, strict=True)):.2f}",
            f"{median(run.wall / floor.wall for run, floor in zip(done, floors[1:], strict=True)):.2f}",
        ]
        for name, done in found.items()
    ]


def _adapter(folder: Path, base: Path, shape: tuple[int, int]) -> Path:
    """Write an adapter of rank 16 for every linear module."""
    import torch
    from safetensors.torch import save_file

    torch.manual_seed(1)
    tensors = {}
    for name, (*out, columns) in llama_shapes(*shape).items():
        module = name.removesuffix(".weight")
        if module.endswith(TARGETS):
            tensors[f"base_model.model.{module}.lora_A.weight"] = torch.randn(RANK, columns) * 0.01
            tensors[f"base_model.model.{module}.lora_B.weight"] = torch.randn(*out, RANK) * 0.01
    folder.mkdir()
    save_file(tensors, folder / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": RANK, "lora_alpha": RANK, "target_modules": TARGETS, "task_type": "CAUSAL_LM"}
    (folder / "adapter_config.json").write_text(json.dumps({**config, "base_model_name_or_path": str(base)}))
    return folder


if __name__ == "__main__":
    main()
