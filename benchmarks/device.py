"""Merge a model of 8B parameters on an accelerator, beside the time that its bytes need over the bus.

    python -m benchmarks.device

Weights are drawn, in bfloat16, and lie in the memory of the host; results are copied there and dropped, so that no disk
takes part. The bus is measured with pinned memory, each way by itself; `bus s` is the time of the way with more to
carry, as the ways are free of one another. Where there is no GPU, it says so.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from statistics import median
from threading import local
from typing import Any

import torch
from torch import Tensor

from benchmarks.checkpoints import llama_shapes
from benchmarks.tables import table

COLUMNS = ("case", "GB in", "GB out", "wall s", "bus s", "wall / bus", "peak GB", "CPU s", "CPU / wall")
_BUFFER = 1 << 28  # bytes
_POOL = 1 << 28  # elements that the tensors of a model are views of
_SPREAD, _DELTA = 0.02, 0.001  # standard deviations of the base's weights and of what fine-tuning changed


def main(arguments: Sequence[str] | None = None) -> str:
    """Run the benchmark; return the Markdown that was printed."""
    options = _options(arguments)
    device = options.device or _first_accelerator()
    text = "There is no GPU." if device is None else table(COLUMNS, _rows(options, device))
    print(text)
    return text


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m benchmarks.device", description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--device", help="default: the first accelerator")
    parser.add_argument("--hidden", type=int, default=4096, help="width of a Llama, a multiple of 8")
    parser.add_argument("--layers", type=int, default=44, help="its number of layers")
    parser.add_argument("--methods", type=lambda text: text.split(","), default=["linear", "ties", "slerp"])
    parser.add_argument("--workers", type=int, help="threads; default: as in a merge")
    parser.add_argument("--runs", type=int, default=3, help="of every method; medians are shown")
    parser.add_argument("--no-cpu", action="store_true", help="do not merge on the CPU for comparison")
    return parser.parse_args(arguments)


def _first_accelerator() -> str | None:
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return None if found is None else f"{found.type}:0"


def _rows(options: argparse.Namespace, device: str) -> list[list[str]]:
    from hf_merge.execute import execute

    up, down = bus(device)
    name = torch.cuda.get_device_name(device) if device.startswith("cuda") else device
    print(f"{name}: {up / 1e9:.1f} GB/s up, {down / 1e9:.1f} GB/s down, torch {torch.__version__}", file=sys.stderr)
    base, *models = drawn(llama_shapes(options.hidden, options.layers), 3)
    rows = []
    for method in options.methods:
        plan, sources = _planned(method, base, models, device)
        first = {step.name for step in plan.steps[:12]}  # kernels and pinned memory are made now
        execute(plan, sources, sink(), workers=options.workers, skip=lambda name, kept=first: name not in kept)
        walls, peaks = zip(
            *(_measured(plan, sources, device, options.workers) for _ in range(options.runs)), strict=True
        )
        print(f"{method}: {', '.join(f'{wall:.2f}' for wall in walls)} s", file=sys.stderr)
        there = 0.0 if options.no_cpu else _seconds(_on_cpu(plan), sources, options.workers)
        carried = plan.bytes_read / up, plan.bytes_written / down
        wall, least = median(walls), max(carried)
        rows.append([
            f"{method}, {len(plan.models)} models, {sum(s.spec.numel for s in plan.steps) / 1e9:.2f}B",
            f"{plan.bytes_read / 1e9:.1f}", f"{plan.bytes_written / 1e9:.1f}", f"{wall:.3g}", f"{least:.3g}",
            f"{wall / least:.2f}", f"{max(peaks) / 1e9:.2f}", f"{there:.3g}", f"{there / wall:.2f}",
        ])  # fmt: skip
    return rows


def _planned(method: str, base: dict[str, Tensor], models: list[dict[str, Tensor]], device: str) -> Any:
    import hf_merge
    from hf_merge.placement import place
    from hf_merge.planner import make_plan
    from hf_merge.recipe import Recipe
    from hf_merge.sources import open_sources

    about = hf_merge.get_method(method)
    changes = {"density": 0.5} if "density" in about.parameters else {}
    words = {"method": method, "base_model": None if about.base == "ignored" else base, **changes}
    recipe = Recipe.load(models[: about.count or 2], **words)
    sources = open_sources(recipe.references)
    return place(make_plan(recipe, sources), device), list(sources.values())


def _on_cpu(plan: Any) -> Any:
    return replace(plan, steps=tuple(replace(step, device="cpu") for step in plan.steps), budgets={})


def _seconds(plan: Any, sources: Sequence[Any], workers: int | None) -> float:
    from hf_merge.execute import execute

    begin = time.perf_counter()
    execute(plan, sources, sink(), workers=workers)
    return time.perf_counter() - begin


def _measured(plan: Any, sources: Sequence[Any], device: str, workers: int | None) -> tuple[float, int]:
    """Return the seconds of a merge, and the most bytes that torch had from the device meanwhile."""
    if device == "cpu":
        return _seconds(plan, sources, workers), 0
    torch.accelerator.empty_cache()
    torch.accelerator.reset_peak_memory_stats(device)
    return _seconds(plan, sources, workers), torch.accelerator.max_memory_reserved(device)


def sink() -> Callable[[str, int, Tensor], None]:
    """Return what takes results as the page cache does: it copies them, and every thread has a place for that."""
    mine = local()

    def write(name: str, start: int, values: Tensor) -> None:
        kept = mine.__dict__.setdefault("kept", torch.empty(_BUFFER, dtype=torch.uint8))
        data = values.view(-1).view(torch.uint8)
        for begin in range(0, len(data), _BUFFER):
            part = data[begin : begin + _BUFFER]
            kept[: len(part)].copy_(part)

    return write


def drawn(shapes: dict[str, tuple[int, ...]], models: int) -> list[dict[str, Tensor]]:
    """Return a base and fine-tunes of it, whose tensors are views of a pool of random numbers, each elsewhere in it."""
    largest = max(map(math.prod, shapes.values()))
    size = min(_POOL, sum(map(math.prod, shapes.values()))) + largest
    numbers = torch.Generator().manual_seed(0)
    pools = [torch.empty(size, dtype=torch.bfloat16).normal_(0, _SPREAD, generator=numbers)]
    pools += [pools[0] + torch.empty_like(pools[0]).normal_(0, _DELTA, generator=numbers) for _ in range(models - 1)]
    places, place = {}, 0
    for name, shape in shapes.items():
        place = (place + math.prod(shape) + 64) % (size - largest)
        places[name] = place
    return [
        {name: pool[places[name] : places[name] + math.prod(shape)].view(shape) for name, shape in shapes.items()}
        for pool in pools
    ]


def bus(device: str) -> tuple[float, float]:
    """Measure bytes a second to a device and from it, with pinned memory where there is a device."""
    real = device != "cpu"
    host = torch.empty(_BUFFER if real else 1 << 20, dtype=torch.uint8, pin_memory=real)
    there = torch.empty_like(host, device=device)
    return _rate(there, host, device), _rate(host, there, device)


def _rate(target: Tensor, source: Tensor, device: str, turns: int = 20) -> float:
    wait = torch.accelerator.synchronize if device != "cpu" else lambda _: None
    target.copy_(source)
    wait(device)
    begin = time.perf_counter()
    for _ in range(turns):
        target.copy_(source, non_blocking=True)
    wait(device)
    return turns * source.numel() / (time.perf_counter() - begin)


if __name__ == "__main__":
    main()
