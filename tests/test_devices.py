"""The same recipe on the CPU and on a GPU: the same bytes, or the stated tolerance. Skipped where there is no GPU."""

import logging
import threading

import pytest
import torch
from safetensors.torch import load_file

import hf_merge
from hf_merge.execute import compute
from hf_merge.ops.random import bernoulli, random_bits
from hf_merge.planning import DEVICE_TILE
from tests.test_staging import planned, run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")]

SAME_BYTES = {
    "linear": {"weight": [0.3, 0.9, 1.8]},
    "task_arithmetic": {"weight": [0.3, 0.9, -0.5], "lambda_": 0.7},
    "nearswap": {},
    "passthrough": {"scale": 0.3},
    "ram": {},
    "ramplus_tl": {},
    "ties": {"density": 0.3, "weight": [0.7, 0.6, 1.1]},
    "breadcrumbs": {"density": 0.6, "gamma": 0.02},
    "breadcrumbs_ties": {"density": 0.6, "gamma": 0.02},
    "dare_linear": {"density": 0.4, "rescale": "density"},
    "dare_ties": {"density": 0.4, "rescale": "none"},
    "della": {"density": 0.5, "rescale": "density"},
    "della_linear": {"density": 0.5, "rescale": "none"},
}
"""Elementwise, selected by magnitude or at random: nothing is added up over a tensor."""

SUMS = {
    "slerp": {"t": 0.3},
    "nuslerp": {"weight": [0.4, 0.6]},
    "multislerp": {"weight": [0.4, 0.6, 0.3]},
    "karcher": {},
    "model_stock": {},
    "ties": {"density": 0.3, "rescale": "l1"},
    "dare_ties": {"density": 0.4},
    "della": {"density": 0.5},
    "sce": {"select_topk": 0.5},
}
"""A norm, an angle or a share in float64, added up in another order: one unit in the last place of float32."""

SOFTMAX = {"arcee_fusion": {}}
"""Importances in float32 by exp and log: entries as near to the threshold as their error may be taken or left."""


def states(dtype, count=3):
    generator = torch.Generator().manual_seed(0)
    shapes = {"layers.0.w": (4111, 5003), "layers.1.w": (700, 300), "layers.2.w": (7, 11), "one": (), "none": (0, 4)}
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tuned = [{n: t + 0.05 * torch.randn(t.shape, generator=generator) for n, t in base.items()} for _ in range(count)]
    assert base["layers.0.w"].numel() > DEVICE_TILE
    return [{n: t.to(dtype) for n, t in state.items()} | {"ids": torch.arange(5)} for state in (base, *tuned)]


@pytest.fixture(scope="module")
def models():
    return {dtype: states(dtype) for dtype in (torch.float32, torch.bfloat16)}


def both(models, method, changes):
    """Merge on the CPU and on the GPU."""
    base, *tuned = models
    takes = hf_merge.get_method(method)
    words = {"method": method, "base_model": None if takes.base == "ignored" else base, **changes}
    if method == "nuslerp":
        tuned = tuned[:2]
    tuned = tuned[: takes.count or 3]
    return [run(*planned(tuned, lambda name, d=device: d, **words)) for device in ("cpu", "cuda:0")]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", SAME_BYTES)
def test_bytes_are_those_of_the_cpu(method, dtype, models):
    here, there = both(models[dtype], method, SAME_BYTES[method])
    for name, tensor in here.items():
        assert torch.equal(tensor, there[name]), f"{name}: {(tensor != there[name]).sum()} of {tensor.numel()}"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("method", SUMS)
def test_sums_over_a_tensor_move_the_last_place_at_most(method, dtype, models):
    here, there = both(models[dtype], method, SUMS[method])
    step = torch.finfo(dtype).eps
    for name, tensor in here.items():
        if tensor.is_floating_point() and tensor.numel():
            off = (tensor.double() - there[name].double()).abs()
            assert float((off / tensor.double().abs().clamp(min=1e-2)).max()) <= 2 * step, name
            assert float((off > 0).double().mean()) <= 1e-3, name


def test_arcee_fusion_differs_in_few_entries(models):
    here, there = both(models[torch.float32], "arcee_fusion", {})
    for name, tensor in here.items():
        assert not tensor.numel() or float((tensor != there[name]).double().mean()) <= 1e-4, name


@pytest.mark.parametrize("method", [*SAME_BYTES, *SUMS, *SOFTMAX])
def test_second_run_on_the_gpu_is_the_same(method, models):
    words = {**SUMS, **SOFTMAX, **SAME_BYTES}[method]
    _, first = both(models[torch.bfloat16], method, words)
    _, second = both(models[torch.bfloat16], method, words)
    assert all(torch.equal(first[name], second[name]) for name in first)


@pytest.mark.parametrize("start", [0, 5, (1 << 32) - 1000, 1 << 40])
def test_random_bits_and_masks_are_the_same(start):
    here, there = (random_bits(12345678901234567, start, 100_003, device) for device in ("cpu", "cuda"))
    assert torch.equal(here, there.cpu())
    values = torch.rand(100_003)
    for probability in (0.3, values):
        moved = probability.cuda() if isinstance(probability, torch.Tensor) else probability
        mask = bernoulli(7, probability, values, start)
        assert torch.equal(mask, bernoulli(7, moved, values.cuda(), start).cpu())


def test_merge_to_disk_with_a_map_equals_that_on_the_cpu(llamas, tmp_path):
    done = []
    for name, where in {"cpu": "cpu", "gpu": "cuda", "map": {"": "cpu", "model.layers.1": 0}, "auto": "auto"}.items():
        merged = hf_merge.merge([llamas["a"], llamas["b"]], tmp_path / name, method="ties", base_model=llamas["base"],
                                density=0.3, device_map=where, dtype="bfloat16")  # fmt: skip
        done.append(load_file(merged.path / "model.safetensors"))
    assert all(torch.equal(done[0][name], other[name]) for other in done[1:] for name in other)
    assert all(s.device.startswith("cuda:") for s in merged.plan.steps if s.method), "auto sends ties to the card"


def test_result_of_compute_is_on_the_device(models):
    base, *tuned = models[torch.bfloat16]
    plan, sources = planned(tuned, lambda name: "cuda:0", method="ties", base_model=base, density=0.3)
    here, _ = both(models[torch.bfloat16], "ties", {"density": 0.3})
    for step in plan.steps:
        found = compute(plan, step, sources)
        assert found.device == torch.device("cuda:0") and torch.equal(found.cpu(), here[step.name])


def test_model_on_the_gpu_is_read_there(models):
    _, *tuned = models[torch.bfloat16]
    moved = [{name: tensor.cuda() for name, tensor in state.items()} for state in tuned]
    here, _ = both(models[torch.bfloat16], "linear", {})
    for device in ("cpu", "cuda:0"):
        found = run(*planned(moved, lambda name, d=device: d, method="linear"))
        assert all(torch.equal(here[name], found[name]) for name in here)


def test_full_card_sends_tensors_to_the_cpu_and_goes_on(models, caplog):
    here, _ = both(models[torch.bfloat16], "ties", {"density": 0.3})
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((torch.cuda.memory_reserved(0) + (100 << 20)) / total)
    try:
        with caplog.at_level(logging.WARNING):
            _, there = both(models[torch.bfloat16], "ties", {"density": 0.3})
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert "has no room for 'layers.0.w'" in caplog.text
    assert all(torch.equal(here[name], there[name]) for name in here)


def test_memory_stays_within_the_budget(models):
    _, *tuned = models[torch.bfloat16]
    tuned = [{f"{i}.w": state["layers.0.w"] for i in range(8)} for state in tuned]
    one = hf_merge.plan(tuned, method="linear", device_map="cuda:0", max_memory={0: "100GB"})
    from hf_merge.planning import memory_on_device

    need = max(map(memory_on_device, one.steps))
    made = hf_merge.plan(tuned, method="linear", device_map="cuda:0", max_memory={0: 2 * need})
    assert {step.device for step in made.steps} == {"cuda:0"}
    from hf_merge.execute import execute

    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    execute(made, tuned, lambda name, start, values: None, workers=6)
    assert torch.cuda.max_memory_allocated() - before <= 2 * need


@pytest.mark.multi_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_several_gpus_work_at_once_and_give_the_same_bytes(llamas, tmp_path):
    threads = {}
    base, *tuned = states(torch.bfloat16)
    plan, sources = planned(tuned, lambda name: f"cuda:{len(name) % 2}", method="ties", base_model=base, density=0.3)
    assert {step.device for step in plan.steps} == {"cuda:0", "cuda:1"}
    here = run(*planned(tuned, method="ties", base_model=base, density=0.3))
    from hf_merge.execute import execute

    merged = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in plan.specs.items()}

    def write(name, start, values):
        threads.setdefault(name, threading.get_ident())
        merged[name].view(-1)[start : start + values.numel()] = values

    execute(plan, sources, write)
    assert len(set(threads.values())) > 1
    assert all(torch.equal(here[name], merged[name]) for name in here)


@pytest.mark.multi_gpu
@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two CUDA devices")
def test_result_of_compute_on_another_than_the_current_device_is_right(models):
    base, *tuned = models[torch.bfloat16]
    plan, sources = planned(tuned, lambda name: "cuda:1", method="ties", base_model=base, density=0.3)
    here, _ = both(models[torch.bfloat16], "ties", {"density": 0.3})
    assert torch.cuda.current_device() == 0
    for step in plan.steps:
        found = compute(plan, step, sources)
        assert found.device == torch.device("cuda:1") and torch.equal(found.cpu(), here[step.name])
