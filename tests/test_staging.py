"""The way to a device and back, on a device that is not there: its copies, events and streams are watched."""

import logging
import threading
from dataclasses import replace
from itertools import pairwise

import pytest
import torch

import hf_merge
from hf_merge import execute as executor
from hf_merge import staging
from hf_merge.execute import compute, execute
from hf_merge.planner import make_plan
from hf_merge.planning import TILE, memory_on_device
from hf_merge.recipe import Recipe
from hf_merge.sources import open_sources

BASED = {
    "ties": {"density": 0.3},
    "dare_ties": {"density": 0.4},
    "della": {"density": 0.5},
    "breadcrumbs": {"density": 0.6},
    "task_arithmetic": {},
    "sce": {"select_topk": 0.5},
    "model_stock": {"filter_wise": True},
    "nearswap": {},
    "slerp": {},
    "arcee_fusion": {},
    "karcher": {},
    "linear": {"weight": [0.3, 0.9, 1.8]},
}


class Watched(staging.Accelerator):
    """A device in the memory of the host, whose copies are held to the rules of a real one.

    A copy to it reads its source up to the moment when an event after it is awaited: it must not change until
    then. A copy from it arrives no sooner.
    """

    log: list[str]
    room = 1 << 60

    def __init__(self, name):
        self.name, self.device = name, torch.device("cpu")
        self.pending, self.there, self.mine = [], [], set()
        self.log.append(f"open {name} {threading.get_ident()}")

    def stream(self):
        return Reentrant()

    def event(self):
        return Moment(self)

    def record(self, event):
        event.record()

    def host_memory(self, size):
        memory = torch.empty(size, dtype=torch.uint8)
        self.mine.add(memory.untyped_storage().data_ptr())
        return memory

    def reaches(self, values):
        return any(values.untyped_storage().data_ptr() == one.untyped_storage().data_ptr() for one in self.there)

    def copy(self, target, source):
        assert target.dtype == source.dtype and target.numel() == source.numel()
        if target.numel() > self.room:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate more.")
        if source.untyped_storage().data_ptr() in self.mine:
            target.copy_(source)
            self.there.append(target)
            self.pending.append(("up", source, source.clone()))
        else:
            target.fill_(77)  # not there yet
            self.pending.append(("down", target, source.clone()))
        self.log.append(self.pending[-1][0])

    def release(self):
        self.log.append("release")


class Reentrant:
    """A stream: a context that may be entered again."""

    def __enter__(self):
        return self

    def __exit__(self, *_):
        return None


class Moment:
    def __init__(self, accelerator):
        self.accelerator, self.before = accelerator, []

    def record(self):
        self.before, self.accelerator.pending = self.accelerator.pending, []

    def synchronize(self):
        for way, buffer, values in self.before:
            if way == "up":
                same = torch.equal(buffer.view(torch.uint8), values.view(torch.uint8))  # NaN is equal to itself
                assert same, "a buffer was filled again while it was copied"
            else:
                buffer.copy_(values)
        self.before = []


@pytest.fixture
def device(monkeypatch):
    """Stand in for every accelerator, with small buffers and tiles."""
    Watched.log, Watched.room = [], 1 << 60
    monkeypatch.setattr(staging, "Accelerator", Watched)
    monkeypatch.setattr(staging, "PIECE", 1 << 12)
    monkeypatch.setattr(staging, "DEVICE_TILE", 3000)
    return Watched


def states(count=3, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    shapes = {"layers.0.w": (70, 101), "layers.1.w": (7, 11), "one": (), "none": (0, 4), "layers.2.w": (2999,)}
    base = {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}
    tuned = [{n: t + 0.1 * torch.randn(t.shape, generator=generator) for n, t in base.items()} for _ in range(count)]
    return [{n: t.to(dtype) for n, t in state.items()} | {"ids": torch.arange(5)} for state in (base, *tuned)]


def planned(models, device_of=lambda name: "cpu", budgets=None, **changes):
    recipe = Recipe.load(models, **changes)
    sources = open_sources(recipe.references)
    plan = make_plan(recipe, sources)
    steps = tuple(replace(step, device=device_of(step.name)) for step in plan.steps)
    return replace(plan, steps=steps, budgets=budgets or {}), list(sources.values())


def run(plan, sources, **options):
    merged = {name: torch.full(spec.shape, 55, dtype=spec.dtype) for name, spec in plan.specs.items()}

    def write(name, start, values):
        assert values.device.type == "cpu" and values.dtype == merged[name].dtype
        merged[name].view(-1)[start : start + values.numel()] = values.view(-1)

    execute(plan, sources, write, **options)
    return merged


def recipe_of(method, dtype=torch.float32):
    base, *tuned = states(dtype=dtype)
    takes = hf_merge.get_method(method)
    models = tuned[: takes.count or 3]
    return models, {"method": method, "base_model": None if takes.base == "ignored" else base, **BASED[method]}


def same(one, other):
    return all(torch.equal(one[name], other[name]) for name in one) and one.keys() == other.keys()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("method", BASED)
def test_every_method_gives_the_same_bytes_through_staging(method, dtype, device):
    models, changes = recipe_of(method, dtype)
    plain = run(*planned(models, **changes))
    assert not device.log
    plan, sources = planned(models, lambda name: "cuda:0", **changes)
    staged = run(plan, sources)
    exact = not plan.steps[0].method or not hf_merge.get_method(method).reductions or method in EXACT
    for name in plain if exact else ():
        assert torch.equal(plain[name], staged[name]), name
    for name, tensor in plain.items():
        assert torch.allclose(staged[name].double(), tensor.double(), rtol=0, atol=1e-6), name
    assert "up" in device.log and "down" in device.log
    assert same(staged, run(plan, sources)), "the second run is the same"


EXACT = {"ties", "breadcrumbs"}
"""Methods whose reductions select and add nothing up."""


def test_inputs_of_a_method_that_reads_them_twice_cross_the_bus_once(device):
    models, changes = recipe_of("ties")
    plan, sources = planned(models, lambda name: "cuda:0", **changes)
    run(plan, sources, skip=lambda name: name != "layers.0.w")
    pieces = -(-70 * 101 * 4 // (1 << 12))
    assert device.log.count("up") == 4 * pieces


def test_each_device_has_threads_of_its_own_and_all_are_used(device):
    models, changes = recipe_of("linear")
    where = {"layers.0.w": "cuda:0", "layers.1.w": "cuda:1"}
    plan, sources = planned(models, lambda name: where.get(name, "cpu"), **changes)
    plain = run(*planned(models, **changes))
    assert same(plain, run(plan, sources))
    opened = {tuple(line.split()[1:]) for line in device.log if line.startswith("open")}
    assert {name for name, _ in opened} == {"cuda:0", "cuda:1"} and len({thread for _, thread in opened}) == 2
    device.log.clear()
    assert same(plain, run(plan, sources, in_order=True, workers=1))
    assert len({line.split()[2] for line in device.log if line.startswith("open")}) == 1


def test_in_order_begins_tensors_in_the_order_of_the_files(device):
    models, changes = recipe_of("linear")
    plan, sources = planned(models, lambda name: f"cuda:{len(name) % 3}", **changes)
    begun = []

    def write(name, start, values):
        begun.append(name) if start == 0 else None

    execute(plan, sources, write, in_order=True, workers=1)
    assert begun == [step.name for step in plan.by_file if step.spec.numel]


@pytest.mark.parametrize("method", ["linear", "ties", "della"])
@pytest.mark.parametrize("room", [0, 200, 1000])
def test_what_runs_out_of_memory_is_repeated_on_the_cpu_and_logged(method, room, device, caplog):
    models, changes = recipe_of(method, torch.bfloat16)
    plain = run(*planned(models, **changes))
    device.room = room
    plan, sources = planned(models, lambda name: "cuda:0", budgets={"cuda:0": 10**9}, **changes)
    with caplog.at_level(logging.WARNING):
        found = run(plan, sources)
    assert same(plain, found)
    assert "cuda:0 has no room for 'layers.0.w', which is computed on the CPU instead: CUDA out of" in caplog.text
    assert "release" in device.log


def test_what_was_written_before_memory_ran_out_is_not_written_again(device, monkeypatch):
    models, changes = recipe_of("linear")
    plan, sources = planned(models, lambda name: "cuda:0", **changes)
    real, calls = executor._merged, []

    def failing(plan, step, sources, lane):
        for number, tile in enumerate(real(plan, step, sources, lane)):
            if number == 2 and not lane.is_host:
                raise RuntimeError("CUBLAS_STATUS_ALLOC_FAILED")
            yield tile

    monkeypatch.setattr(executor, "_merged", failing)
    written = []
    execute(plan, sources, lambda name, start, values: written.append((start, values.numel())),
            skip=lambda name: name != "layers.0.w")  # fmt: skip
    calls = sorted(written)
    assert calls[0][0] == 0 and sum(count for _, count in calls) == 7070
    assert all(start + count == following for (start, count), (following, _) in pairwise(calls))
    assert calls[-1] == (6000, 1070)


def test_other_errors_on_a_device_name_tensor_and_method(device):
    models, changes = recipe_of("linear")
    models[1]["layers.1.w"][3, 3] = float("nan")
    plan, sources = planned(models, lambda name: "cuda:0", **changes)
    with pytest.raises(hf_merge.ComputeError, match=r"'layers\.1\.w' by 'linear': .*model 1.* has NaN or Inf"):
        run(plan, sources)


def test_compute_takes_the_same_way_and_leaves_its_result_on_the_device(device, monkeypatch, caplog):
    models, changes = recipe_of("ties")
    plain = run(*planned(models, **changes))
    plan, sources = planned(models, **changes)
    real = staging.open_lane
    monkeypatch.setattr(executor, "open_lane", lambda name, own_stream: real("cuda:0", own_stream=own_stream))
    for step in plan.steps:
        assert torch.equal(compute(plan, step, sources), plain[step.name])
    assert "up" in device.log and "down" not in device.log
    device.room = 0
    step = next(step for step in plan.steps if step.name == "layers.1.w")
    assert torch.equal(compute(plan, replace(step, device="cpu:0"), sources), plain[step.name])
    assert "no room for 'layers.1.w'" in caplog.text and device.log[-1] == "release"


def test_budget_bounds_what_is_in_flight(device, monkeypatch):
    models, changes = recipe_of("linear")
    models = [{f"{i}.{n}": t for i in range(12) for n, t in m.items() if n == "layers.2.w"} for m in models]
    need = None
    budgets = {}
    real = staging.Budget

    class Seen(real):
        def __init__(self, size):
            super().__init__(size)
            budgets[size] = self

    monkeypatch.setattr(staging, "Budget", Seen)
    plan, sources = planned(models, lambda name: "cuda:0", **changes)
    need = memory_on_device(plan.steps[0])
    plan = replace(plan, budgets={"cuda:0": 2 * need + 1})
    run(plan, sources, workers=6)
    assert need <= budgets[2 * need + 1].most <= 2 * need + 1 and not budgets[2 * need + 1].taken
    run(replace(plan, budgets={"cuda:0": need - 1}), sources, workers=6)
    assert budgets[need - 1].most == need, "what is larger than all of it is alone"


def test_budget_lets_go_of_those_who_wait_when_all_is_given_up():
    budget, given_up = staging.Budget(10), threading.Event()
    with budget.taking(10, given_up.is_set):
        waiting = threading.Thread(target=lambda: budget.taking(5, given_up.is_set).__enter__())
        waiting.start()
        waiting.join(0.05)
        assert waiting.is_alive()
        given_up.set()
        waiting.join(5)
        assert not waiting.is_alive()


def test_lane_of_the_cpu_keeps_its_buffers():
    lane = staging.Lane()
    one = lane.buffers(2, 10, torch.float32)
    two = lane.buffers(3, TILE, torch.float32)
    assert one[0].data_ptr() == two[0].data_ptr() and [len(b) for b in two] == [TILE] * 3
    assert lane.buffers(1, TILE + 1, torch.float32)[0].data_ptr() != two[0].data_ptr()
    assert next(iter(lane.unload(one[0])))[0] == 0 and lane.release() is None


def test_a_real_accelerator_is_opened_by_its_number(monkeypatch):
    """All but the pinned memory and the events of `Accelerator` runs on the CPU too."""
    monkeypatch.setattr(torch.accelerator, "synchronize", lambda device: None)
    monkeypatch.setattr(torch.accelerator, "empty_cache", lambda: None)
    opened = staging.Accelerator("cpu")
    with opened.stream():
        target = torch.empty(3)
        opened.copy(target, torch.arange(3.0))
    opened.event().synchronize()
    recorded = []
    monkeypatch.setattr(torch.accelerator, "current_stream", lambda device: f"stream of {device}")
    opened.record(type("Event", (), {"record": lambda self, stream: recorded.append(stream)})())
    assert recorded == ["stream of cpu"]
    opened.release()
    assert opened.host_memory(5).numel() == 5 and target.tolist() == [0, 1, 2]
    lane = staging.open_lane("meta", own_stream=False)
    assert isinstance(lane, staging.DeviceLane) and lane.device.type == "meta"
    values = torch.ones(4)
    assert next(iter(lane.unload(values)))[1] is values, "what is on the host already stays"
    lane.load(torch.empty(4, device="meta"), torch.empty(4, device="meta"))
