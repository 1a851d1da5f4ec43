"""Which device computes which tensor: what transformers would choose, within budgets, with tied weights together."""

import json
from collections import Counter
from dataclasses import replace

import pytest
import torch
from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

import hf_merge
from hf_merge import placement
from hf_merge.placement import place
from hf_merge.planning import TILE, memory_on_device
from tests.conftest import small_config
from tests.test_cli import run
from tests.test_compat import small_mixtral

WORDS = ["auto", "balanced", "balanced_low_0", "sequential"]


def large_config(**changes) -> LlamaConfig:
    sizes = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32}
    return LlamaConfig(**{**sizes, "num_key_value_heads": 8, "vocab_size": 128256, "dtype": "bfloat16", **changes})


@pytest.fixture(scope="module")
def large():
    """Return a plan over models of 8B parameters of which there is nothing but shapes."""
    made = {}

    def of(method="ties", **changes):
        key = (method, *changes.items())
        if key not in made:
            made[key] = hf_merge.plan(models_of(large_config(**changes)), method=method, base_model=base_of(method))
        return made[key]

    return of


def base_of(method):
    return None if method == "linear" else models_of(large_config())[0]


def models_of(config, model_class=LlamaForCausalLM):
    with torch.device("meta"):
        return [model_class._from_config(config) for _ in range(2)]


def chosen_by_transformers(folder, device_map, max_memory, monkeypatch):
    """Let `from_pretrained` decide, and stop it before it moves anything to devices that are not here."""
    from transformers import modeling_utils

    real = modeling_utils._get_device_map

    class Decided(Exception):
        pass

    def stop(*arguments, **named):
        raise Decided(real(*arguments, **named))

    monkeypatch.setattr(modeling_utils, "_get_device_map", stop)
    with pytest.raises(Decided) as found:
        AutoModelForCausalLM.from_pretrained(folder, device_map=device_map, max_memory=dict(max_memory))
    return found.value.args[0]


def device_of(name, device_map):
    from transformers.integrations.accelerate import get_device

    device = get_device(device_map, name)
    return f"cuda:{device}" if isinstance(device, int) else {"disk": "cpu"}.get(device, device)


@pytest.mark.parametrize("device_map", WORDS)
@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("memory", [{0: "40KB", 1: "60KB", "cpu": "1GB"}, {0: 0, 1: "90KB", "cpu": "50KB"}])
def test_map_is_what_transformers_would_choose(device_map, tied, memory, tmp_path, monkeypatch):
    LlamaForCausalLM(small_config(tie_word_embeddings=tied)).save_pretrained(tmp_path / "m")
    models = [tmp_path / "m", LlamaForCausalLM(small_config(tie_word_embeddings=tied))]
    made = hf_merge.plan(models, method="linear", device_map=device_map, max_memory=memory)
    theirs = chosen_by_transformers(tmp_path / "m", device_map, memory, monkeypatch)
    expected = {name: device_of(name, theirs) for name in made.specs}
    assert placement._wanted(made, device_map, placement._sizes(memory)) == expected
    moved = {name for problem in made.problems for name in problem.tensors}
    assert all(step.device == expected[step.name] for step in made.steps if step.name not in moved)
    assert len(set(expected.values())) > 1 and len(moved) < len(expected)


@pytest.mark.parametrize("gpus", [2, 8])
@pytest.mark.parametrize("device_map", WORDS)
@pytest.mark.parametrize("method", ["linear", "ties", "della"])
def test_absent_gpus_each_tensor_has_one_device_and_budgets_hold(gpus, device_map, method, large):
    memory = dict.fromkeys(range(gpus), "7GB" if gpus == 2 else "2.5GB") | {"cpu": "100GB"}
    plan = large(method)
    made = place(plan, device_map, memory)
    assert [step.name for step in made.steps] == [step.name for step in plan.steps]
    assert all(isinstance(step.device, str) for step in made.steps)
    held = Counter()
    for step in made.steps:
        held[step.device] += step.spec.nbytes
        assert memory_on_device(step) <= made.budgets[step.device]
    assert all(size <= made.budgets[device] for device, size in held.items())
    assert set(held) <= {f"cuda:{i}" for i in range(gpus)} | {"cpu"} and len(held) > 2
    assert not made.errors


@pytest.mark.parametrize("gpus", [2, 8])
@pytest.mark.parametrize("device_map", WORDS)
def test_tied_weights_that_are_stored_twice_stay_together(gpus, device_map):
    models = [LlamaForCausalLM(small_config(tie_word_embeddings=True)) for _ in range(2)]
    states = [{name: t.clone() for name, t in model.state_dict().items()} for model in models]
    plan = hf_merge.plan(states, method="linear")
    assert {"lm_head.weight", "model.embed_tokens.weight"} <= set(plan.specs)
    config = {**json.loads(models[0].config.to_json_string()), "architectures": ["LlamaForCausalLM"]}
    for known in (config, {}):
        made = place(replace(plan, config=known), device_map, dict.fromkeys(range(gpus), 60000) | {"cpu": "1GB"})
        devices = {step.name: step.device for step in made.steps}
        assert not known or devices["lm_head.weight"] == devices["model.embed_tokens.weight"]
        assert len(set(devices.values())) > 1


def test_parts_of_a_fused_parameter_are_on_its_device():
    config = MixtralConfig(**{**small_mixtral().to_dict(), "num_hidden_layers": 4})
    plan = hf_merge.plan(models_of(config, MixtralForCausalLM), method="linear")
    made = place(plan, "sequential", {0: "20KB", 1: "20KB", "cpu": "1GB"})
    by_layer = {}
    for name, device in placement._wanted(plan, "sequential", {0: 20_000, 1: 20_000, "cpu": 10**9}).items():
        if ".experts." in name:
            by_layer.setdefault(name.split(".")[2], set()).add(device)
    assert all(len(devices) == 1 for devices in by_layer.values()) and len(by_layer) == 4
    assert {step.device for step in made.steps} == {"cuda:0", "cuda:1", "cpu"} or made.problems


def test_what_does_not_fit_moves_and_the_plan_says_so(large):
    made = place(large("fr"), "sequential", {0: "8GB", 1: "30GB", "cpu": "100GB"})
    (moved,) = made.problems
    assert moved.severity == "warning" and "moved from cuda:0 to cuda:1" in moved.message
    assert "2.1 GB" not in moved.message and "8 GB may be used" in moved.message
    assert "model.embed_tokens.weight" in moved.tensors
    devices = {step.name: step.device for step in made.steps}
    assert all(devices[name] == "cuda:1" for name in moved.tensors)
    small = place(large("fr"), "sequential", {0: "8GB", "cpu": "100GB"})
    assert "moved from cuda:0 to cpu" in small.problems[0].message
    tight = place(large("fr"), "cpu", {"cpu": "1GB"})
    assert "more memory than there is for cpu" in tight.problems[0].message and len(tight.problems) == 1


def test_text_and_dict_show_devices_bytes_and_budgets(large):
    made = place(large("linear"), "balanced", {0: "12GB", 1: "12GB", "cpu": "30GB"})
    (line,) = [line for line in str(made).splitlines() if line.strip().startswith("devices:")]
    assert "cuda:0: " in line and "tensors, " in line and " GB within 12 GB, cuda:1: " in line
    assert made.to_dict()["budgets"] == {"cuda:0": 12_000_000_000, "cuda:1": 12_000_000_000}
    moved = [replace(step, device=step.device.replace("cuda:0", "cuda:7")) for step in made.steps]
    assert replace(made, steps=tuple(moved)).fingerprint() == made.fingerprint(), "a merge goes on on another card"
    assert made.fingerprint() != large("linear").fingerprint(), "and not on a CPU, where a sum may differ"


def test_map_may_name_modules_as_they_are_in_memory_and_on_disk():
    plan = hf_merge.plan(models_of(small_mixtral(), MixtralForCausalLM), method="linear")
    for experts in ("model.layers.0.mlp", "model.layers.0.block_sparse_moe"):
        made = place(plan, {"": "cpu", "model.embed_tokens": 1, experts: 0}, {0: "1GB", 1: "1GB"})
        devices = {step.name: step.device for step in made.steps}
        assert devices["model.layers.0.block_sparse_moe.experts.1.w1.weight"] == "cuda:0"
        assert devices["model.embed_tokens.weight"] == "cuda:1" and devices["model.norm.weight"] == "cpu"


def test_models_that_transformers_does_not_know_are_spread_by_bytes():
    state = {f"blocks.{i}.w": torch.zeros(1000) for i in range(12)}
    plan = hf_merge.plan([state, dict(state)], method="linear")
    count = lambda word, memory: Counter(s.device for s in place(plan, word, memory).steps)  # noqa: E731
    room = {0: 1 << 30, 1: 1 << 30, "cpu": 1 << 30}
    assert count("balanced", room) == {"cuda:0": 6, "cuda:1": 6} == count("auto", room)
    assert count("sequential", room) == {"cuda:0": 12} and count("balanced_low_0", room) == {"cuda:1": 12}
    assert count("balanced", None) == {"cpu": 12}, "there is no accelerator"


def test_auto_alone_keeps_on_the_cpu_what_takes_one_pass(monkeypatch, large):
    monkeypatch.setattr(placement, "_accelerators", lambda: ["cuda:0", "cuda:1"])
    for method, devices in {"linear": {"cpu"}, "ties": {"cuda:0", "cuda:1"}, "della": {"cuda:0", "cuda:1"}}.items():
        made = place(large(method), "auto")
        assert {step.device for step in made.steps} == devices
        assert [s.device for s in place(large(method), "auto").steps] == [s.device for s in made.steps]
        held = Counter()
        for step in made.steps:
            held[step.device] += step.spec.nbytes
        assert max(held.values()) - min(held.values()) <= max(step.spec.nbytes for step in made.steps)


def test_memory_of_a_device_counts_inputs_and_temporaries(large):
    step = next(step for step in large("ties").steps if step.name == "lm_head.weight")
    here, there = step, replace(step, device="cuda:0")
    assert memory_on_device(here) == TILE * (len(step.reads) + 2 * len(step.inputs) + 4) * 4
    assert memory_on_device(there) > len(step.reads) * step.spec.numel * 4, "inputs are held, as they are read again"
    assert memory_on_device(replace(there, method="nearswap")) < memory_on_device(there)
    assert memory_on_device(replace(there, method=None)) == 0


def test_absent_device_is_planned_with_a_budget_and_refused_by_a_merge(llamas, tmp_path):
    changes = {"method": "linear", "device_map": "sequential", "max_memory": {7: "10GB", "cpu": "10GB"}}
    made = hf_merge.plan([llamas["a"], llamas["b"]], **changes)
    assert {step.device for step in made.steps} == {"cuda:7"}
    with pytest.raises(hf_merge.RecipeError, match="'cuda:7', which is not here"):
        hf_merge.merge([llamas["a"], llamas["b"]], tmp_path / "m", **changes)
    with pytest.raises(hf_merge.RecipeError, match="'cuda:7', which is not here"):
        hf_merge.plan([llamas["a"], llamas["b"]], method="linear", device_map=7)
    assert not (tmp_path / "m").exists()


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        ({"gpu": "1GB"}, "max_memory names 'gpu': write a number"),
        ({-1: "1GB"}, "max_memory names -1"),
        ({0: "much"}, "max_memory of 0 should be bytes or a size such as '10GB'; found 'much'"),
        ({0: None}, "found None"),
    ],
)
def test_budgets_that_are_none_are_refused(memory, message):
    with pytest.raises(hf_merge.RecipeError, match=message):
        hf_merge.plan([{"w": torch.ones(2)}], method="linear", max_memory=memory)


def test_cpu_and_disk_maps_give_the_same_bytes(llamas, tmp_path):
    from safetensors.torch import load_file

    models = [llamas["a"], llamas["b"]]
    plain = hf_merge.merge(models, tmp_path / "plain", method="ties", base_model=llamas["base"], density=0.3)
    budgets = {"cpu": "1GB"}
    for i, where in enumerate([{"model": "cpu", "lm_head": "disk"}, "disk", "sequential", "balanced", "auto"]):
        made = hf_merge.merge(models, tmp_path / str(i), method="ties", base_model=llamas["base"], density=0.3,
                              device_map=where, max_memory=budgets)  # fmt: skip
        one, other = (load_file(done.path / "model.safetensors") for done in (plain, made))
        assert all(torch.equal(one[name], other[name]) for name in one)


def test_command_line_reads_budgets(llamas):
    call = ["plan", "--method", "linear", llamas["a"], llamas["b"], "--device-map", "sequential"]
    done = run(*call, "--max-memory", "0=10GB", "--max-memory", "cpu=30GB", "--json")
    assert json.loads(done.stdout)["budgets"] == {"cuda:0": 10_000_000_000}, done.stderr
    assert run(*call, "--max-memory", "0").returncode == 2
