"""Compare what is done with LoRA adapters with PEFT and with dense matrices.

Three tables: an adapter merged into its base beside PEFT's load, merge_and_unload, save; merging in core space beside
an SVD of the dense sum; and how far weighted sums of adapters are from the exact sum, beside PEFT's
`add_weighted_adapter`.
"""

from __future__ import annotations

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

from benchmarks.cases import OURS, PEFT, Case, Way, import_torch, measure_cases, python_imports
from benchmarks.checkpoints import llama_shapes
from benchmarks.goals import ADAPTER, CORE, told
from benchmarks.options import Options
from benchmarks.peers import copy_way, removing
from benchmarks.processes import run_command, run_python
from benchmarks.report import Section
from benchmarks.tables import case_table, table

SUM_COLUMNS = ("relative error of", "alpha = r", "alpha = 4 r", "rsLoRA")
CORE_COLUMNS = ("4 adapters of rank 16 to rank 16", "core s", "dense SVD s", "dense / core", "difference", "goal")
RANK, COUNT = 16, 4
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")

_PEFT = """
import sys
from peft import PeftModel
from transformers import AutoModelForCausalLM
model = AutoModelForCausalLM.from_pretrained(sys.argv[1])
PeftModel.from_pretrained(model, sys.argv[2]).merge_and_unload().save_pretrained(sys.argv[3])
"""


def adapter(options: Options, scratch: Path) -> list[Section]:
    """LoRA adapters into a large base beside PEFT, with each other, and their sums beside PEFT's."""
    case = _base_case(options, scratch)
    measure_cases([case], options)
    tables = [
        case_table([case], cold=options.cold),
        table(CORE_COLUMNS, [core_cells(width, options) for width in options.sizes.widths]),
        table(SUM_COLUMNS, sum_rows(scratch)),
    ]
    return [Section("Adapters", tables, [case])]


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


def core_cells(width: int, options: Options) -> list[str]:
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

    small()  # warms up
    fast, slow = [], []
    for number in range(max(options.runs, options.peer_runs)):
        fast += [_timed(small)] if number < options.runs else []
        slow += [_timed(dense)] if number < options.peer_runs else []
    (left, right), (u, vh) = fast[0][1], slow[0][1]
    difference = (left @ right - (u @ vh).double()).norm() / (u @ vh).norm()
    ratio = median(other / own for (own, _), (other, _) in zip(fast, slow, strict=False))
    goal = CORE.get(width)
    verdict = told(ratio >= goal, f"{ratio:.0f} x, at least {goal:g}") if goal else "-"
    seconds = [f"{median(taken for taken, _ in times):.4f}" for times in (fast, slow)]
    return [f"{width} x {width}", *seconds, f"{ratio:.3g}", f"{difference:.0e}", verdict]


def _timed(work: Callable[[], Any]) -> tuple[float, Any]:
    """Return the seconds of some work, and what it gives."""
    begin = time.perf_counter()
    done = work()
    return time.perf_counter() - begin, done


def _base_case(options: Options, scratch: Path) -> Case:
    """An adapter of all linear modules, merged into its base."""
    base, output = options.llamas()[0], scratch / "out"
    lora = _adapter(scratch / "adapter", base, options.sizes.llama)
    ours = partial(run_command, "merge", "--method", "passthrough", f"{base}+{lora}", str(output))
    peft = partial(run_python, _PEFT, str(base), str(lora), str(output))
    ways = [
        import_torch(),
        copy_way([base], scratch),
        Way(OURS, removing(output, ours), python_imports("hf_merge.api")),
        Way(PEFT, removing(output, peft), python_imports("peft, transformers.models.llama.modeling_llama")),
    ]
    return Case(f"LoRA of rank {RANK} into its base", ways, ADAPTER, [base, lora])


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
    from benchmarks.__main__ import main

    main(["--only", "adapter", *sys.argv[1:]])
