"""Adapters that were extracted: whole ones are the fine-tune, however loaded; smaller ones the best there are."""

import json
import logging

import pytest
import torch
from peft import AutoPeftModelForCausalLM, PeftModel
from safetensors.torch import load_file, save_file

import hf_merge
from tests.architectures import save_tiny, tiny_inputs

pytestmark = [
    pytest.mark.filterwarnings("ignore:`is_gradient_checkpointing`:FutureWarning"),
    pytest.mark.filterwarnings("ignore:Model.*tie:UserWarning"),
    pytest.mark.filterwarnings("ignore:fan_in_fan_out:UserWarning"),
]

CLASSES = (
    "LlamaForCausalLM", "Qwen2ForCausalLM", "MixtralForCausalLM", "Qwen2MoeForCausalLM", "DeepseekV3ForCausalLM",
    "GptOssForCausalLM", "GPT2LMHeadModel", "ViTForImageClassification", "ResNetForImageClassification", "BertModel",
    "BertForMaskedLM", "T5ForConditionalGeneration", "WhisperForConditionalGeneration", "MambaForCausalLM",
)  # fmt: skip


def outputs(model):
    torch.manual_seed(0)
    base = model.get_base_model() if isinstance(model, PeftModel) else model
    inputs = tiny_inputs(base)
    with torch.no_grad():
        made = model.eval()(**inputs)
    return [value for value in made.values() if isinstance(value, torch.Tensor) and value.is_floating_point()]


def distance(model, wanted):
    pairs = zip(outputs(model), wanted, strict=True)
    return max(((found - given).norm() / given.norm().clamp(min=1e-9)).item() for found, given in pairs)


def without(fine, base, left_out):
    """Take back what an adapter does not carry."""
    state, before = fine.state_dict(), base.state_dict()
    for name in left_out:
        state[name].copy_(before[name])
    return outputs(fine)


@pytest.mark.parametrize("name", CLASSES)
def test_a_whole_adapter_is_the_fine_tune_however_it_is_loaded(name, tmp_path):
    saved = save_tiny(name, tmp_path)
    made = hf_merge.extract_adapter(saved.folders["a"], saved.folders["base"], tmp_path / "adapter", energy=1.0)
    wanted = without(saved.models["a"], saved.models["base"], made.left_out)
    model_class, base = type(saved.models["base"]), saved.folders["base"]
    assert distance(made.load(), wanted) < 1e-5
    lazily = PeftModel.from_pretrained(model_class.from_pretrained(base), made.path, low_cpu_mem_usage=True)
    assert distance(lazily, wanted) < 1e-5
    assert distance(model_class.from_pretrained(made.path), wanted) < 1e-5
    assert distance(hf_merge.from_pretrained([f"{base}+{made.path}"], method="passthrough"), wanted) < 1e-5
    if name.endswith("CausalLM") or name.startswith("GPT2"):
        assert distance(AutoPeftModelForCausalLM.from_pretrained(made.path), wanted) < 1e-5
    is_tied = bool(saved.models["base"].all_tied_weights_keys)
    assert ("untie it first" in made.card.text) == is_tied
    if not is_tied:
        assert distance(made.load().merge_and_unload(), wanted) < 1e-5


@pytest.fixture(scope="module")
def pair(llamas):
    return llamas["a"], llamas["base"]


def changes(pair):
    fine, base = (load_file(folder / "model.safetensors") for folder in pair)
    return {name.removesuffix(".weight"): fine[name].double() - base[name].double() for name in fine}


def factors(folder):
    """Return the products of an adapter's factors by module."""
    found = {}
    for key, tensor in load_file(folder / "adapter_model.safetensors").items():
        module = key.removeprefix("base_model.model.").partition(".lora_")[0]
        found.setdefault(module, {})[key.rpartition(".lora_")[2].removesuffix(".weight")] = tensor.double()
    products = {module: f["B"] @ f["A"] for module, f in found.items() if "A" in f}
    return products | {m: (f["embedding_B"] @ f["embedding_A"]).T for m, f in found.items() if "embedding_A" in f}


@pytest.mark.parametrize("exact", [True, False])
def test_a_rank_keeps_the_largest_singular_values(pair, tmp_path, exact):
    made = hf_merge.extract_adapter(*pair, tmp_path / "adapter", rank=5, exact=exact)
    products = factors(made.path)
    assert len(products) == len(made.kept) == 3 * 7 + 2
    for module, change in changes(pair).items():
        if module not in products:
            assert "norm" in module
            continue
        values, found = torch.linalg.svdvals(change), torch.linalg.svdvals(products[module])
        torch.testing.assert_close(found[:5], values[:5], rtol=1e-4, atol=0)
        tail = values[5:].norm().item()
        assert torch.linalg.matrix_norm(change - products[module]).item() == pytest.approx(tail, rel=1e-4)
        assert made.kept[module] == pytest.approx(1 - tail**2 / values.square().sum().item(), abs=1e-5)


@pytest.mark.parametrize("energy", [0.5, 0.95])
def test_an_energy_picks_the_smallest_rank_of_each_module(pair, tmp_path, energy):
    made = hf_merge.extract_adapter(*pair, tmp_path / "adapter", energy=energy)
    config = json.loads((made.path / "adapter_config.json").read_text())
    products = factors(made.path)
    for module, product in products.items():
        squares = torch.linalg.svdvals(changes(pair)[module]).square()
        wanted = int((squares.cumsum(0) / squares.sum() < energy).sum()) + 1
        found = config["rank_pattern"].get("^" + module.replace(".", r"\."), config["r"])
        assert found == wanted == int((torch.linalg.svdvals(product) > 1e-6).sum())
        assert made.kept[module] >= energy - 1e-6
    assert config["rank_pattern"] == config["alpha_pattern"] and config["r"] == config["lora_alpha"]


def test_experts_of_an_energy_have_one_rank(tmp_path):
    saved = save_tiny("MixtralForCausalLM", tmp_path)
    made = hf_merge.extract_adapter(saved.folders["a"], saved.folders["base"], tmp_path / "adapter", energy=0.8)
    config = json.loads((made.path / "adapter_config.json").read_text())
    assert len(config["target_parameters"]) == 4 and not any("experts" in name for name in config["rank_pattern"])
    ours = {m: k for m, k in made.kept.items() if "experts" in m}
    assert len(ours) == 4 and all(kept >= 0.8 for kept in ours.values())
    made.load()


def test_the_bytes_do_not_depend_on_threads(pair, tmp_path):
    found = []
    for threads in (1, 2, 3):
        before = torch.get_num_threads()
        torch.set_num_threads(threads)
        try:
            made = hf_merge.extract_adapter(*pair, tmp_path / str(threads), rank=6)
        finally:
            torch.set_num_threads(before)
        found.append((made.path / "adapter_model.safetensors").read_bytes())
    assert found[0] == found[1] == found[2]


def test_targets_by_name_end_and_pattern(pair, tmp_path):
    targets = ["q_proj", "model.layers.0.mlp.up_proj", "*.1.mlp.*"]
    made = hf_merge.extract_adapter(*pair, tmp_path / "adapter", rank=4, targets=targets)
    config = json.loads((made.path / "adapter_config.json").read_text())
    wanted = [f"model.layers.{i}.self_attn.q_proj" for i in range(3)] + ["model.layers.0.mlp.up_proj"]
    wanted += [f"model.layers.1.mlp.{name}_proj" for name in ("gate", "up", "down")]
    assert config["target_modules"] == sorted(wanted)
    assert "lm_head" in made.left_out and "model.layers.0.mlp.up_proj" not in made.left_out
    change = changes(pair)["lm_head"].abs().max().item()
    assert made.left_out["lm_head"] == pytest.approx(change, rel=1e-6)


def test_the_rest_can_be_left_out_and_is_told(pair, tmp_path, caplog):
    root = logging.getLogger("hf_merge")
    root.addHandler(caplog.handler)
    try:
        made = hf_merge.extract_adapter(*pair, tmp_path / "adapter", rank=4, keep_rest=False)
    finally:
        root.removeHandler(caplog.handler)
    assert not [key for key in load_file(made.path / "adapter_model.safetensors") if "norm" in key]
    assert "model.norm" in made.left_out and len(made.left_out) == 7
    assert "7 tensors change in the merge and not in the adapter" in caplog.text
    assert "Left out, with the largest change that is missing" in made.card.text


def test_what_does_not_change_is_not_written(pair, tmp_path):
    fine, base = (load_file(folder / "model.safetensors") for folder in pair)
    mixed = {name: fine[name] if "q_proj" in name else base[name] for name in fine}
    save_file(mixed, tmp_path / "mixed.safetensors", {"format": "pt"})
    made = hf_merge.extract_adapter(tmp_path / "mixed.safetensors", pair[1], tmp_path / "adapter", rank=4)
    config = json.loads((made.path / "adapter_config.json").read_text())
    assert config["target_modules"] == [f"model.layers.{i}.self_attn.q_proj" for i in range(3)]
    assert config["modules_to_save"] is None and made.left_out == {}


def test_an_adapter_extracted_again_is_the_adapter(pair, tmp_path):
    first = hf_merge.extract_adapter(*pair, tmp_path / "first", rank=4, targets=["q_proj", "up_proj"],
                                     keep_rest=False)  # fmt: skip
    again = hf_merge.extract_adapter(f"{pair[1]}+{first.path}", pair[1], tmp_path / "again", rank=8)
    for module, product in factors(first.path).items():
        torch.testing.assert_close(factors(again.path)[module], product, rtol=1e-4, atol=1e-6)
    assert min(again.kept.values()) > 0.9999 and again.left_out == {}


def test_the_real_model(minilm, tmp_path):
    made = hf_merge.extract_adapter(minilm["a"], minilm["base"], tmp_path / "adapter", rank=8)
    ids = torch.arange(1000, 1020).view(2, 10)
    from transformers import AutoModel

    base, fine = (AutoModel.from_pretrained(minilm[name]).eval() for name in ("base", "a"))
    with torch.no_grad():
        before, wanted, found = (m(ids).last_hidden_state for m in (base, fine, made.load().eval()))
    assert (found - wanted).norm() < 0.2 * (before - wanted).norm()
    assert made.path.stat().st_size and (made.path / "adapter_model.safetensors").stat().st_size < 5e6
