"""Every type of adapter that PEFT has: merged as PEFT merges it, or refused by name."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from hf_merge.errors import SourceError
from hf_merge.sources import open_source
from hf_merge.sources.tuned import NOT_WEIGHTS
from hf_merge.types import ModelRef

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning")

T = {"target_modules": ["q_proj", "v_proj", "down_proj"]}
SETTINGS = {
    "ADALORA": {**T, "init_r": 4, "target_r": 2, "total_step": 10},
    "ADAMSS": T,
    "BEFT": {"target_modules": ["value"]},
    "BOFT": {**T, "boft_block_size": 4},
    "C3A": {**T, "block_size": 8},
    "DEFT": T,
    "DELORA": {**T, "r": 2},
    "FOURIERFT": {**T, "n_frequency": 10},
    "FROD": T,
    "GLORA": T,
    "GRALORA": {**T, "r": 4, "gralora_k": 2},
    "HIRA": T,
    "HRA": {**T, "r": 2},
    "IA3": {**T, "feedforward_modules": ["down_proj"]},
    "LN_TUNING": {"target_modules": ["input_layernorm"]},
    "LOHA": T,
    "LOKR": T,
    "LORA": {**T, "modules_to_save": ["norm"]},
    "MISS": {**T, "r": 4},
    "OFT": {**T, "oft_block_size": 4, "r": 0, "modules_to_save": ["lm_head"]},
    "OSF": T,
    "PEANUT": T,
    "PSOFT": {**T, "r": 4},
    "PVERA": T,
    "RANDLORA": {**T, "r": 4},
    "ROAD": {**T, "group_size": 8},
    "SHIRA": {**T, "r": 2},
    "SUPERTUNING": T,
    "TINYLORA": T,
    "TRAINABLE_TOKENS": {"token_indices": [1, 3]},
    "UNILORA": T,
    "VBLORA": {**T, "num_vectors": 8, "vector_length": 8, "r": 4},
    "VERA": {**T, "r": 4},
    "WAVEFT": {**T, "n_frequency": 10},
}
BD = {"target_modules_bd_a": ["q_proj"], "target_modules_bd_b": ["v_proj"], "nblocks": 2, "match_strict": False}
VARIANTS = {
    "KaSA": {"kasa_config": {}},
    "BD-LoRA": {"r": 4, "use_bdlora": BD},
    "VeLoRA": {"velora_config": {}},
    "MonteCLoRA": {"monteclora_config": {}},
    "MiCA": {"init_lora_weights": "mica"},
    "DoRA": {"use_dora": True, "target_modules": [*T["target_modules"], "embed_tokens"]},
    "rsLoRA": {"use_rslora": True},
}


def model(kind=""):
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"intermediate_size": 32}
    if kind == "BEFT":
        return transformers.BertForSequenceClassification(transformers.BertConfig(**sizes))
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(**sizes, num_key_value_heads=1, tie_word_embeddings=False)
    )


def saved(kind, settings, folder):
    """Save a base and a random adapter of it, and return what PEFT merges them to and how much it changes."""
    from peft import PeftModel, get_peft_model
    from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING

    base = model(kind)
    base.save_pretrained(folder / "base")
    before = {name: tensor.clone() for name, tensor in base.state_dict().items()}
    adapted = get_peft_model(base, PEFT_TYPE_TO_CONFIG_MAPPING[kind](**settings))
    torch.manual_seed(2)
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    adapted.save_pretrained(folder / "adapter", save_embedding_layers=False)
    merged = PeftModel.from_pretrained(model(kind), folder / "adapter").merge_and_unload().state_dict()
    return merged, sum(not torch.equal(merged[name], before[name]) for name in merged)


def check(kind, settings, tmp_path):
    merged, changed = saved(kind, settings, tmp_path)
    source = open_source(ModelRef.parse(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}"))
    base = open_source(ModelRef.parse(str(tmp_path / "base")))
    assert dict(source.specs) == dict(base.specs) and changed > 0
    for name in source:
        assert (source[name] - merged[name]).abs().max() <= 1e-6, name
    assert sum(not torch.equal(source[name], base[name]) for name in source) == changed


def test_every_type_of_peft_is_tried_or_refused():
    from peft import PeftType

    assert {kind.value for kind in PeftType} - {"HF_MERGE"} == SETTINGS.keys() | NOT_WEIGHTS.keys()


@pytest.mark.parametrize("kind", SETTINGS)
def test_type_is_merged_as_peft_merges_it(kind, tmp_path):
    if kind == "ADAMSS":
        pytest.importorskip("sklearn")
    check(kind, SETTINGS[kind], tmp_path)


@pytest.mark.parametrize("variant", VARIANTS)
def test_variant_of_lora_is_merged_as_peft_merges_it(variant, tmp_path):
    check("LORA", {**T, "r": 3, **VARIANTS[variant]}, tmp_path)


@pytest.mark.parametrize("kind", sorted(NOT_WEIGHTS))
def test_type_that_no_weight_can_hold_is_refused_by_name(kind, tmp_path):
    model().save_pretrained(tmp_path / "base")
    (tmp_path / "adapter").mkdir()
    save_file({"prompt_embeddings": torch.ones(2, 2)}, tmp_path / "adapter" / "adapter_model.safetensors")
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps({"peft_type": kind}))
    with pytest.raises(SourceError, match=f"of type {kind}, which cannot be merged: it .*load it with PEFT onto"):
        open_source(ModelRef.parse(f"{tmp_path / 'base'}+{tmp_path / 'adapter'}"))


def test_what_peft_applies_is_checked_by_headers_and_values(tmp_path):
    saved("LOHA", T, tmp_path)
    name, path = f"{tmp_path / 'base'}+{tmp_path / 'adapter'}", tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(iter(tensors))
    save_file({**tensors, key: torch.ones(3, 3)}, path)
    with pytest.raises(SourceError, match=r"has the shape \[3, 3\], and on .* it would have"):
        open_source(ModelRef.parse(name))
    save_file({**tensors, "base_model.model.absent.weight": torch.ones(3)}, path)
    with pytest.raises(SourceError, match=r"lacks 'absent\.weight'"):
        open_source(ModelRef.parse(name))
    save_file({**tensors, key: tensors[key] * float("nan")}, path)
    source = open_source(ModelRef.parse(name))
    with pytest.raises(SourceError, match=f"'{key}' of the adapter .* holds NaN or Inf"):
        [source[one] for one in source]
