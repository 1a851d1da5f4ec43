"""Numbers over a whole model: the same wherever and however it is merged, in bounded memory, and told by the plan."""

import json
from threading import Barrier, Thread

import pytest
import torch
from safetensors.torch import load_file, save_file

import hf_merge
from hf_merge import execute as engine
from hf_merge import staging
from hf_merge.api import open_recipe
from hf_merge.errors import ComputeError
from hf_merge.lazy import LazyMerge
from hf_merge.method import get_method

TIES = {"method": "ties", "scope": "global", "density": 0.3}
METHODS = {
    "ties": TIES,
    "ties_rescaled": {**TIES, "rescale": "l1", "consensus": "max"},
    "metagpt": {"method": "metagpt"},
    "pcb": {"method": "pcb"},
    "fr": {"method": "fr", "variant": "paper"},
}


def states(count=3, seed=0, scale=1.0):
    """A base and some models of tensors that differ in shape and in the size of what changed."""
    numbers = torch.Generator().manual_seed(seed)
    shapes = {"a.weight": (40, 30), "b.weight": (7, 3, 5), "bias": (11,), "none": (0, 4), "scalar": (), "z": (70_000,)}
    made = [{name: torch.randn(shape, generator=numbers) for name, shape in shapes.items()} for _ in range(count + 1)]
    for model in made[1:]:
        for size, name in enumerate(shapes, 1):
            model[name] = made[0][name] + scale * size * (model[name] - made[0][name])
    return made[0], made[1:]


def flat(state):
    return torch.cat([state[name].flatten() for name in sorted(state)])


def merged_words(words):
    return {key: value for key, value in words.items() if key != "method"}


@pytest.mark.parametrize("words", [METHODS[name] for name in ("ties", "ties_rescaled", "metagpt", "pcb")])
def test_a_model_of_many_tensors_is_merged_as_one_long_tensor(words):
    base, models = states()
    merged = hf_merge.merge_state_dicts(models, base_model=base, **words)
    deltas = [flat(model) - flat(base) for model in models]
    expected = flat(base) + get_method(words["method"])(deltas, **merged_words(words))
    torch.testing.assert_close(flat(merged), expected, rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("words", METHODS.values(), ids=METHODS)
def test_threads_and_tiles_do_not_matter(words, monkeypatch):
    base, models = states()
    expected = hf_merge.merge_state_dicts(models, base_model=base, **words)
    monkeypatch.setattr(staging, "TILE", 1000)
    monkeypatch.setattr(engine, "default_workers", lambda: 7)
    monkeypatch.setattr(engine, "WORTH_A_THREAD", 0)
    found = hf_merge.merge_state_dicts(models, base_model=base, **words)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("words", METHODS.values(), ids=METHODS)
def test_disk_and_memory_and_stages_give_the_same(words, tmp_path):
    base, models = states()
    paths = [tmp_path / f"{i}.safetensors" for i in range(4)]
    for path, state in zip(paths, (base, *models), strict=True):
        save_file(state, path)
    expected = hf_merge.merge_state_dicts(models, base_model=base, **words)
    out = hf_merge.merge(paths[1:], tmp_path / "out.safetensors", base_model=paths[0], **words)
    written = load_file(out.path)
    plan, sources = open_recipe(paths[1:], {}, base_model=paths[0], **words)
    lazy, read = LazyMerge(plan, sources, "lazy"), {}
    together = Barrier(4)

    def reader(name):
        together.wait()
        read[name] = lazy[name]

    threads = [Thread(target=reader, args=[name]) for name in ("z", "a.weight", "bias", "scalar")]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for name, tensor in expected.items():
        assert written[name].equal(tensor), name
        assert lazy[name].equal(tensor), name
    assert all(tensor.equal(expected[name]) for name, tensor in read.items()) and len(read) == 4


@pytest.mark.parametrize("words", METHODS.values(), ids=METHODS)
def test_loading_gives_what_the_disk_gives(words, llamas, tmp_path):
    words = {**words, "base_model": llamas["base"]}
    written = hf_merge.merge([llamas["a"], llamas["b"]], tmp_path / "out", **words).load()
    loaded = hf_merge.from_pretrained([llamas["a"], llamas["b"]], **words)
    for (name, one), other in zip(written.state_dict().items(), loaded.state_dict().values(), strict=True):
        assert one.equal(other), name


def test_it_is_made_once_and_only_where_it_is_needed(monkeypatch):
    made, before = [], engine._first_pass
    monkeypatch.setattr(engine, "_first_pass", lambda *words: made.append(words) or before(*words))
    base, models = states()
    hf_merge.merge_state_dicts(models, method="ties", base_model=base, density=0.3)
    assert not made
    hf_merge.merge_state_dicts(models, base_model=base, **TIES)
    assert len(made) == 1
    plan, sources = open_recipe(models, {}, base_model=base, **TIES)
    lazy = LazyMerge(plan, sources, "lazy")
    assert len(made) == 1
    [lazy[name] for name in lazy]
    assert len(made) == 2
    engine.execute(plan, sources, lambda *words: None, skip=lambda name: True)
    assert len(made) == 2


def test_the_plan_tells_what_is_read_beforehand():
    base, models = states()
    plan = hf_merge.plan(models, base_model=base, **TIES)
    (one,) = plan.passes
    size = sum(tensor.nbytes for tensor in base.values()) * 4
    assert one.method == "ties" and one.tensors == tuple(sorted(base)) and one.bytes_read == size
    assert plan.bytes_read == 2 * size
    assert "first pass:  cut and factors and undecided of ties over 6 tensors" in str(plan)
    assert json.loads(json.dumps(plan.to_dict()["first_passes"]))[0]["bytes_read"] == size
    without = hf_merge.plan(models, base_model=base, method="ties", density=0.3)
    assert not without.passes and without.bytes_read == size and "first pass" not in str(without)


def test_what_a_rule_says_otherwise_has_no_part_in_the_numbers():
    base, models = states()
    rules = [{"pattern": "z", "merge_method": "task_arithmetic"}]
    merged = hf_merge.merge_state_dicts(models, base_model=base, rules=rules, **TIES)
    short = [{name: tensor for name, tensor in state.items() if name != "z"} for state in (base, *models)]
    expected = hf_merge.merge_state_dicts(short[1:], base_model=short[0], **TIES)
    assert all(merged[name].equal(tensor) for name, tensor in expected.items())


def test_tensors_of_another_density_have_numbers_of_their_own():
    base, models = states()
    density = [{"filter": "z", "value": 0.1}, {"value": 0.6}]
    merged = hf_merge.merge_state_dicts(models, base_model=base, method="ties", scope="global", density=density)
    kept = {name: {"z": 0.1}.get(name, 0.6) for name in base}
    for value in (0.1, 0.6):
        part = [{n: t for n, t in state.items() if kept[n] == value} for state in (base, *models)]
        expected = hf_merge.merge_state_dicts(
            part[1:], base_model=part[0], method="ties", scope="global", density=value
        )
        assert all(merged[name].equal(tensor) for name, tensor in expected.items())


def test_weights_that_are_stored_twice_count_once(llamas):
    shared = torch.randn(6, 4)
    base = {"embed": shared, "head": shared, "w": torch.randn(9)}
    model = {name: tensor + torch.randn(tensor.shape) for name, tensor in base.items()}
    model["head"] = model["embed"]
    merged = hf_merge.merge_state_dicts([model], base_model=base, **TIES)
    assert merged["head"].equal(merged["embed"])
    once = hf_merge.merge_state_dicts(
        [{"embed": model["embed"], "w": model["w"]}], base_model={"embed": shared, "w": base["w"]}, **TIES
    )
    assert merged["embed"].equal(once["embed"]) and merged["w"].equal(once["w"])


def test_an_error_names_the_tensor():
    base, models = states()
    models[1]["bias"][3] = float("nan")
    with pytest.raises(ComputeError, match="'bias' by 'ties': <model 1> has NaN"):
        hf_merge.merge_state_dicts(models, base_model=base, **TIES)


def test_a_step_is_not_computed_without_its_numbers():
    base, models = states()
    plan, sources = open_recipe(models, {}, base_model=base, **TIES)
    with pytest.raises(ComputeError, match="first pass was not made"):
        engine.compute(plan, plan.steps[0], sources)
