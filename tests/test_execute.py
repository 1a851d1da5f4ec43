"""The engine: the same bytes whatever the order, threads and shards; bounded memory; nothing non-finite passes."""

import subprocess
import sys
import threading

import pytest
import torch
from safetensors.torch import load_file, save_file

import hf_merge
import hf_merge.execute as engine
from hf_merge import staging
from hf_merge.execute import compute, execute
from hf_merge.planner import make_plan
from hf_merge.planning import TILE
from hf_merge.recipe import Recipe
from hf_merge.sources import open_sources
from tests.compiled import needs_loops

RANDOM = {"method": "dare_ties", "density": 0.4, "weight": [0.7, 0.6]}


def states(count=3, size=TILE + 1000, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "layers.0.w": torch.randn(size, generator=generator),
            "layers.1.w": torch.randn(7, 11, generator=generator),
            "one": torch.randn((), generator=generator),
            "none": torch.empty(0, 4),
        }
        for _ in range(count)
    ]


def run(models, workers=None, **changes):
    recipe = Recipe.load(models, **changes)
    sources = open_sources(recipe.references)
    plan = make_plan(recipe, sources)
    merged = {name: torch.empty(spec.shape, dtype=spec.dtype) for name, spec in plan.specs.items()}

    def write(name, start, values):
        merged[name].view(-1)[start : start + values.numel()] = values.view(-1)

    execute(plan, list(sources.values()), write, workers=workers)
    return plan, list(sources.values()), merged


@pytest.mark.parametrize("changes", [RANDOM, {"method": "ties", "density": 0.3}, {"method": "task_arithmetic"}])
def test_same_bytes_with_any_number_of_workers_and_one_tensor_at_a_time(changes):
    base, a, b = states()
    plan, sources, alone = run([a, b], workers=1, base_model=base, **changes)
    _, _, many = run([a, b], workers=7, base_model=base, **changes)
    for name, tensor in alone.items():
        assert torch.equal(tensor, many[name])
    for step in plan.steps:
        assert torch.equal(compute(plan, step, sources), alone[step.name])


@pytest.mark.parametrize(("size", "threads"), [(1 << 10, 1), (1 << 18, 2)])
def test_tensors_are_merged_side_by_side_where_they_are_large(size, threads, monkeypatch):
    monkeypatch.setattr(engine, "default_workers", lambda: 2)
    models = [{f"{i}": torch.ones(size) for i in range(6)} for _ in range(2)]
    sources = open_sources((recipe := Recipe.load(models, method="linear", weight=0.5)).references)
    together, seen = threading.Barrier(threads), set()

    def write(name, start, values):
        seen.add(threading.get_ident())
        together.wait(60)  # for as many threads as there should be

    execute(make_plan(recipe, sources), list(sources.values()), write)
    assert len(seen) == threads


@pytest.mark.parametrize("compiled", [False, pytest.param(True, marks=needs_loops)], ids=["torch", "compiled"])
@pytest.mark.parametrize(
    ("method", "words"),
    [
        ("task_arithmetic", {}),
        ("ties", {"density": 0.4}),
        ("dare_ties", {"density": 0.4}),
        ("breadcrumbs", {"density": 0.4, "rescale": "l1"}),
        ("della", {"density": 0.4}),
        ("della_linear", {"density": 0.4, "rescale": "density"}),
        ("model_stock", {"filter_wise": True}),
    ],
    ids=["task_arithmetic", "ties", "dare_ties", "breadcrumbs", "della", "della_linear", "model_stock by rows"],
)
def test_same_bytes_whatever_the_tiles(method, words, compiled, monkeypatch):
    generator = torch.Generator().manual_seed(3)
    shape = (257, 301)  # more than is selected from at once, and no row ends where a tile does
    base, *models = ({"w": torch.randn(shape, generator=generator).bfloat16()} for _ in range(3))
    monkeypatch.setattr(engine, "WORTH_COMPILING", 0 if compiled else float("inf"))
    merged = []
    for tile in (1 << 18, 4096, 999):
        monkeypatch.setattr(staging, "TILE", tile)
        merged.append(hf_merge.merge_state_dicts(models, method=method, base_model=base, **words)["w"])
    assert all(one.view(torch.int16).equal(merged[0].view(torch.int16)) for one in merged)


def test_tiled_tensor_equals_the_method_on_the_whole():
    base, a, b = states()
    _, _, merged = run([a, b], base_model=base, method="ties", density=0.3, weight=[0.7, 0.6])
    for name in ("layers.0.w", "layers.1.w", "one"):
        deltas = [a[name] - base[name], b[name] - base[name]]
        whole = base[name] + hf_merge.get_method("ties")(deltas, density=0.3, weight=[0.7, 0.6])
        assert torch.equal(merged[name], whole)


def test_method_that_is_not_elementwise_sees_whole_tensors_in_their_shape():
    from hf_merge.method import _registry, merge_method
    from hf_merge.types import Deltas, Merged

    @merge_method(paper="https://example.org")
    def upside_down(deltas: Deltas) -> Merged:
        """Turn the rows of the first task vector round."""
        return deltas[0].flip(0)

    base = {"w": torch.randn(600, 700)}
    model = {"w": torch.randn(600, 700)}
    try:
        merged = hf_merge.merge_state_dicts([model], method="upside_down", base_model=base, lambda_=0.5)
        assert torch.equal(merged["w"], base["w"] + 0.5 * (model["w"] - base["w"]).flip(0))
    finally:
        del _registry["upside_down"]


def test_random_masks_depend_on_seed_tensor_and_model_only():
    base, a, b = states()
    b = {name: tensor.clone() for name, tensor in a.items()}
    _, _, first = run([a, b], base_model=base, **RANDOM)
    _, _, again = run([a, b], base_model=base, **RANDOM)
    _, _, other = run([a, b], base_model=base, seed=1, **RANDOM)
    reordered = [{name: s[name] for name in reversed(s)} for s in (base, a, b)]
    _, _, turned = run(reordered[1:], base_model=reordered[0], **RANDOM)
    for name, tensor in first.items():
        assert torch.equal(tensor, again[name]) and torch.equal(tensor, turned[name])
    assert not torch.equal(first["layers.0.w"], other["layers.0.w"])
    _, _, single = run([a], base_model=base, method="dare_linear", density=0.4, rescale="none")
    kept = (single["layers.0.w"] - base["layers.0.w"]) != 0
    assert abs(float(kept.float().mean()) - 0.4) < 0.005


def test_same_bytes_in_other_processes_with_other_hash_seeds_and_shard_sizes(llamas, tmp_path):
    code = (
        "import sys, hf_merge; base, a, b, out, size = sys.argv[1:];"
        "hf_merge.merge([a, b], out, method='dare_ties', base_model=base, density=0.4, max_shard_size=int(size))"
    )
    found = []
    for hash_seed, size in (("0", "1000000"), ("1", "20000"), ("2", "5000")):
        out = tmp_path / hash_seed
        call = [sys.executable, "-c", code, *(str(llamas[name]) for name in ("base", "a", "b")), str(out), size]
        subprocess.run(call, check=True, env={"PYTHONHASHSEED": hash_seed, "HF_HUB_OFFLINE": "1", "PATH": ""})
        found.append({name: t for file in out.glob("*.safetensors") for name, t in load_file(file).items()})
        assert len(list(out.glob("*.safetensors"))) == 1 or size != "1000000"
    for name, tensor in found[0].items():
        assert torch.equal(tensor, found[1][name]) and torch.equal(tensor, found[2][name])


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize("where", ["model", "base"])
def test_nonfinite_input_is_an_error_that_names_tensor_and_model(bad, where):
    base, a, b = states()
    (a if where == "model" else base)["layers.1.w"][3, 3] = bad
    models = {"first": a, "second": b}
    with pytest.raises(
        hf_merge.ComputeError, match=r"layers\.1\.w.*" + ("<first>" if where == "model" else "base model")
    ):
        hf_merge.merge_state_dicts(models, method="ties", base_model=base, density=0.1)
    passed = hf_merge.merge_state_dicts(models, method="linear", allow_nonfinite=True)
    assert bool(passed["layers.1.w"][3, 3].isfinite()) == (where == "base")


def test_huge_but_finite_values_pass_and_overflow_is_an_error():
    huge = {"x": torch.full((1000,), 3e38)}
    assert torch.equal(hf_merge.merge_state_dicts([huge], method="linear")["x"], huge["x"])
    with pytest.raises(hf_merge.ComputeError, match="'x' by 'linear': the result has NaN or Inf"):
        hf_merge.merge_state_dicts([huge, dict(huge)], method="linear", normalize=False)
    with pytest.raises(hf_merge.ComputeError, match="'x' by 'linear': the result has NaN or Inf"):
        hf_merge.merge_state_dicts([huge], method="linear", dtype="float16")


def test_weights_that_sum_to_zero_are_an_error_that_says_so():
    with pytest.raises(hf_merge.ComputeError, match="the weights sum to 0"):
        hf_merge.merge_state_dicts(states(2), method="linear", weight=[1, -1])


def test_integers_must_agree():
    one, two = {"x": torch.ones(2), "ids": torch.arange(4)}, {"x": torch.ones(2), "ids": torch.arange(4)}
    assert hf_merge.merge_state_dicts([one, two], method="linear")["ids"].tolist() == [0, 1, 2, 3]
    two["ids"] = two["ids"] + 1
    with pytest.raises(hf_merge.ComputeError, match=r"'ids'.*<second> and <first> differ"):
        hf_merge.merge_state_dicts({"first": one, "second": two}, method="linear")


def test_inputs_are_never_changed():
    models = states()
    before = [{name: tensor.clone() for name, tensor in model.items()} for model in models]
    for method in hf_merge.list_methods():
        described = hf_merge.get_method(method)
        if described.space == "factors":
            continue
        count = described.count or 2
        hf_merge.merge_state_dicts(
            models[1 : 1 + count],
            method=method,
            base_model=models[0] if method != "passthrough" else None,
            **({"weight": 0.5} if method in ("linear", "cat") else {}),
            **({"statistics": [{}] * count} if described.statistics else {}),
        )
    for model, kept in zip(models, before, strict=True):
        assert all(torch.equal(model[name], kept[name]) for name in kept)


PEAK = """
import sys, threading, time, torch, hf_merge, hf_merge.api
from pathlib import Path
def anonymous():
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith("RssAnon"))
hf_merge.merge_state_dicts([{"x": torch.ones(9)}] * 1, method="linear")
before, peak, stop = anonymous(), [0], []
def watch():
    while not stop:
        peak[0] = max(peak[0], anonymous()); time.sleep(0.002)
thread = threading.Thread(target=watch); thread.start()
folder, out, method, threads = sys.argv[1:]
torch.set_num_threads(int(threads))
words = {"slerp": {}, "globally": {"scope": "global", "density": 0.3}, "pcb": {}}.get(method, {"density": 0.3})
hf_merge.merge([folder + "/a.safetensors"], out, method={"globally": "ties"}.get(method, method),
               base_model=folder + "/base.safetensors", **words)
stop.append(1); thread.join()
print((peak[0] - before) // 1024)
"""


@pytest.fixture(scope="module")
def large(tmp_path_factory):
    """Folders with a base and one model each, of 2 and of 6 tensors of 16 MB."""
    folders = {count: tmp_path_factory.mktemp(f"large{count}") for count in (2, 6)}
    for seed, name in enumerate(("base", "a")):
        values = torch.randn(1 << 23, generator=torch.Generator().manual_seed(seed)).bfloat16()
        for count, folder in folders.items():
            save_file({f"layers.{i}.w": values + i for i in range(count)}, folder / f"{name}.safetensors")
    return folders


@pytest.mark.parametrize("method", ["ties", "dare_ties", "slerp", "globally", "pcb"])
def test_peak_memory_depends_neither_on_the_tensor_nor_on_the_model(method, large, freed_at_once, tmp_path):
    def peak(tensors: int, threads: int) -> int:
        words = [str(large[tensors]), str(tmp_path / f"{tensors}-{threads}"), method, str(threads)]
        return int(subprocess.run([sys.executable, "-c", PEAK, *words], check=True, capture_output=True).stdout)

    few, many, by_two = peak(2, 1), peak(6, 1), peak(6, 2)
    assert many < 24, f"{many} MB for tensors of 16 MB"
    assert many < few + 12, f"{few} and {many} MB: memory grows with the model"
    assert by_two < 36, f"{by_two} MB: more than two threads take alone"
