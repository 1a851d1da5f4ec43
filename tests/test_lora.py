"""LoRA in full: what its forward computes, in one weight for each tensor."""

import json

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import nn

import hf_merge
from hf_merge.errors import SourceError
from hf_merge.sources import open_source
from hf_merge.sources.adapter import open_adapter
from hf_merge.sources.folder import Folder
from hf_merge.sources.lora import read_lora
from hf_merge.types import ModelRef

pytestmark = pytest.mark.filterwarnings(
    "ignore::UserWarning", "ignore::FutureWarning", "ignore::DeprecationWarning", "ignore::RuntimeWarning"
)


def llama(**changes):
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    words = {"intermediate_size": 24, "num_key_value_heads": 1, "tie_word_embeddings": False}
    return transformers.LlamaForCausalLM(transformers.LlamaConfig(**{**sizes, **words, **changes}))


def mixtral(kind="Mixtral"):
    import transformers

    torch.manual_seed(0)
    sizes = {"vocab_size": 40, "hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2}
    sizes |= {"num_key_value_heads": 1, "intermediate_size": 24}
    if kind == "GptOss":
        config = transformers.GptOssConfig(**sizes, num_local_experts=4, num_experts_per_tok=2, head_dim=8)
        model = transformers.GptOssForCausalLM(config)
        with torch.no_grad():
            [parameter.normal_(std=0.05) for parameter in model.parameters()]
        return model
    if kind == "Qwen3Moe":
        words = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 12, "head_dim": 8}
        return transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**sizes, **words))
    return transformers.MixtralForCausalLM(transformers.MixtralConfig(**sizes, num_local_experts=4))


class Convolutions(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.a, self.b, self.c = nn.Conv1d(4, 6, 3), nn.Conv2d(6, 6, (2, 3)), nn.Conv3d(4, 6, 3)
        self.d, self.one = nn.Conv2d(4, 6, 3, groups=2), nn.Conv2d(4, 6, 1)
        self.m = nn.MultiheadAttention(8, 2)

    def forward(self, x):
        return x


def adapt(model, folder, *, name="adapter", seed=1, **settings):
    """Save a model and a random adapter of it; return the model with the adapter."""
    from peft import LoraConfig, get_peft_model

    if not (folder / "base").exists():
        if hasattr(model, "save_pretrained"):
            model.save_pretrained(folder / "base")
        else:
            (folder / "base").mkdir()
            save_file(model.state_dict(), folder / "base" / "model.safetensors")
    torch.manual_seed(seed)
    adapted = get_peft_model(model, LoraConfig(**{"r": 3, "lora_alpha": 5, "init_lora_weights": False, **settings}))
    with torch.no_grad():
        for key, parameter in adapted.named_parameters():
            if "magnitude" in key or "trainable_tokens" in key or "modules_to_save" in key:
                parameter.add_(torch.randn(parameter.shape), alpha=0.1)
    adapted.save_pretrained(folder / name, save_embedding_layers=False)
    return adapted


def opened(folder, *names):
    return open_source(
        ModelRef.parse("+".join([f"{folder / 'base'}", *(f"{folder / n}" for n in names or ["adapter"])]))
    )


def agrees(source, merged, folder):
    """Compare with PEFT's merge by the names on disk."""
    merged.save_pretrained(folder / "merged") if hasattr(merged, "save_pretrained") else (folder / "merged").mkdir()
    if not hasattr(merged, "save_pretrained"):
        save_file(merged.state_dict(), folder / "merged" / "model.safetensors")
    expected = load_file(folder / "merged" / "model.safetensors")
    base = load_file(folder / "base" / "model.safetensors")
    assert source.specs.keys() == expected.keys() == base.keys()
    for name in source:
        assert (source[name] - expected[name]).abs().max() <= 1e-6 * max(1, expected[name].abs().max()), name
    return sum(not torch.equal(source[name], base[name]) for name in source)


def logits(model, ids=None):
    with torch.no_grad():
        return model.eval()(input_ids=torch.arange(12)[None] if ids is None else ids).logits


def same_forward(folder, adapted, names=("adapter",)):
    """Compare the merged model's answers with those of the adapted one."""
    expected = logits(adapted)
    ref = "+".join([f"{folder / 'base'}", *(f"{folder / name}" for name in names)])
    done = hf_merge.merge([ref], folder / "out", method="passthrough")
    bound = 1e-5 * max(1, expected.abs().max())
    assert (logits(done.load()) - expected).abs().max() < bound
    loaded = hf_merge.from_pretrained([ref], method="passthrough")
    assert (logits(loaded) - expected).abs().max() < bound
    return done


CONVOLUTIONS = {
    "plain": {"target_modules": ["a", "b", "c", "one"]},
    "dora": {"target_modules": ["a", "b", "c", "one"], "use_dora": True},
    "attention": {"target_modules": ["m"]},
}


@pytest.mark.parametrize("case", CONVOLUTIONS)
def test_convolutions_and_attention_of_torch(case, tmp_path):
    """Of attention, PEFT adds the output's change twice, when it computes and when it merges; so does this."""
    merged = adapt(Convolutions(), tmp_path, **CONVOLUTIONS[case]).merge_and_unload()
    assert agrees(opened(tmp_path), merged, tmp_path) == (2 if case == "attention" else 4)


def test_grouped_convolution_is_refused(tmp_path):
    adapt(Convolutions(), tmp_path, target_modules=["d"], r=4)
    with pytest.raises(SourceError, match=r"d\.lora_A\.weight' .* do not fit: a grouped convolution"):
        opened(tmp_path)


def test_dora_of_linears_embeddings_and_conv1d(tmp_path):
    import transformers

    targets = ["c_attn", "c_proj", "wte"]
    config = transformers.GPT2Config(vocab_size=40, n_embd=16, n_layer=1, n_head=2, tie_word_embeddings=False)
    torch.manual_seed(0)
    adapted = adapt(
        transformers.GPT2LMHeadModel(config), tmp_path, target_modules=targets, use_dora=True, fan_in_fan_out=True
    )
    agrees(opened(tmp_path), adapted.merge_and_unload(), tmp_path)


EXPERTS = {
    "both": ("Mixtral", ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
    "both the other way": ("Qwen3Moe", ["mlp.experts.down_proj", "mlp.experts.gate_up_proj"]),
    "one, and the router": ("Mixtral", ["mlp.experts.down_proj", "mlp.gate.weight"]),
    "stored as [in, out]": ("GptOss", ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]),
    "without their module": ("Mixtral", ["gate_up_proj", "down_proj"]),
}


@pytest.mark.parametrize("case", EXPERTS)
def test_experts(case, tmp_path):
    kind, parameters = EXPERTS[case]
    adapted = adapt(mixtral(kind), tmp_path, target_modules=["q_proj"], target_parameters=parameters)
    lora = read_lora(*open_adapter(Folder(tmp_path / "adapter"), "a"))
    assert {one.kind for one in lora.factored.values()} == {"linear", "experts"}
    assert all(one.rank == 3 for one in lora.factored.values())
    assert f"model.layers.0.mlp.experts.{'down_proj'}" in lora.factored
    assert agrees(opened(tmp_path), adapted.merge_and_unload(), tmp_path) >= 6


@pytest.mark.parametrize("fused", [False, True])
def test_lora_of_every_expert_of_an_earlier_transformers(fused, tmp_path):
    """Names and factors as transformers 4 had them; the base has its experts one by one, or fused."""
    from peft import PeftModel

    model = mixtral()
    model.save_pretrained(tmp_path / "base", save_original_format=not fused)
    torch.manual_seed(1)
    tensors, sizes = {}, {"w1": (16, 24), "w3": (16, 24), "w2": (24, 16)}
    for layer in range(2):
        for expert in range(4):
            for name, (into, out) in sizes.items():
                stem = f"base_model.model.model.layers.{layer}.block_sparse_moe.experts.{expert}.{name}"
                tensors[f"{stem}.lora_A.weight"] = torch.randn(3, into)
                tensors[f"{stem}.lora_B.weight"] = torch.randn(out, 3)
    (tmp_path / "adapter").mkdir()
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 5, "target_modules": ["w1", "w2", "w3"]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    merged = PeftModel.from_pretrained(model, tmp_path / "adapter").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged", save_original_format=not fused)
    expected, source = load_file(tmp_path / "merged" / "model.safetensors"), opened(tmp_path)
    base, changed = load_file(tmp_path / "base" / "model.safetensors"), 0
    assert ("model.layers.0.mlp.experts.gate_up_proj" in source) == fused
    for name in source:
        assert (source[name] - expected[name]).abs().max() <= 1e-5, name
        changed += not torch.equal(source[name], base[name])
    assert changed == (4 if fused else 24)


def test_experts_one_by_one_on_disk_get_their_part_of_a_fused_change(tmp_path):
    adapted = adapt(mixtral(), tmp_path, target_modules=[], target_parameters=["mlp.experts.gate_up_proj"])
    source = opened(tmp_path)
    assert any(".w1." in name for name in source)
    assert agrees(source, adapted.merge_and_unload(), tmp_path) == 16


@pytest.mark.parametrize("names", ["language_model.model", "model.language_model"])
@pytest.mark.parametrize("original", [True, False])
def test_names_of_an_earlier_transformers(names, original, tmp_path):
    import transformers
    from peft import PeftModel

    sizes = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    text = transformers.LlamaConfig(**sizes, vocab_size=40, num_key_value_heads=1)
    vision = transformers.CLIPVisionConfig(**sizes, image_size=8, patch_size=4)
    torch.manual_seed(0)
    model = transformers.LlavaForConditionalGeneration(transformers.LlavaConfig(vision_config=vision, text_config=text))
    model.save_pretrained(tmp_path / "base", save_original_format=original)
    (tmp_path / "adapter").mkdir()
    stem = f"base_model.model.{names}.layers.0.self_attn.q_proj"
    tensors = {f"{stem}.lora_A.weight": torch.randn(3, 16), f"{stem}.lora_B.weight": torch.randn(16, 3)}
    save_file(tensors, tmp_path / "adapter" / "adapter_model.safetensors")
    config = {"peft_type": "LORA", "r": 3, "lora_alpha": 5, "target_modules": ["q_proj"], "layers_to_transform": [0]}
    (tmp_path / "adapter" / "adapter_config.json").write_text(json.dumps(config))
    source = opened(tmp_path)
    merged = PeftModel.from_pretrained(model, tmp_path / "adapter").merge_and_unload()
    merged.save_pretrained(tmp_path / "merged", save_original_format=original)
    expected = load_file(tmp_path / "merged" / "model.safetensors")
    base = load_file(tmp_path / "base" / "model.safetensors")
    assert all((source[name] - expected[name]).abs().max() <= 2e-6 for name in expected)
    assert sum(not torch.equal(source[name], base[name]) for name in source) == 1


def test_some_layers_only(tmp_path):
    adapted = adapt(llama(), tmp_path, target_modules=["q_proj", "k_proj"], layers_to_transform=[1])
    assert agrees(opened(tmp_path), adapted.merge_and_unload(), tmp_path) == 2


TOKENS = {
    "a list": ({"trainable_token_indices": [1, 3]}, False),
    "by module": ({"trainable_token_indices": {"embed_tokens": [1, 3], "lm_head": [2]}}, False),
    "tied": ({"trainable_token_indices": [1, 3]}, True),
}


@pytest.mark.parametrize("case", TOKENS)
def test_rows_of_tokens(case, tmp_path):
    settings, tied = TOKENS[case]
    adapted = adapt(llama(tie_word_embeddings=tied), tmp_path, target_modules=["q_proj"], **settings)
    done = same_forward(tmp_path, adapted)
    assert ("lm_head.weight" in open_source(ModelRef(path=str(done.path)))) == (not tied)
    agrees(opened(tmp_path), adapted.merge_and_unload(), tmp_path)


TIED = {
    "embeddings": ({"target_modules": ["embed_tokens"]}, True),
    "head": ({"target_modules": ["lm_head"]}, True),
    "both": ({"target_modules": ["embed_tokens", "lm_head"]}, True),
    "tied adapter": ({"target_modules": ["embed_tokens", "q_proj"], "ensure_weight_tying": True}, False),
    "saved": ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens"]}, True),
    "saved both": ({"target_modules": ["q_proj"], "modules_to_save": ["embed_tokens", "lm_head"]}, True),
    "linears": ({"target_modules": ["q_proj"]}, False),
}


@pytest.mark.parametrize("case", TIED)
def test_tied_embeddings_are_what_the_forward_computes(case, tmp_path):
    settings, apart = TIED[case]
    adapted = adapt(llama(tie_word_embeddings=True), tmp_path, **settings)
    done = same_forward(tmp_path, adapted)
    assert ("lm_head.weight" in load_file(done.path / "model.safetensors")) == apart
    assert done.plan.config["tie_word_embeddings"] is not apart
    said = [problem.message for problem in done.plan.problems]
    assert any("untied, as the adapter itself computes" in message for message in said) == apart


# several adapters


def test_adapters_with_weights_are_summed_on_the_base(tmp_path):
    adapt(llama(), tmp_path, name="a", target_modules=["q_proj", "embed_tokens"])
    adapt(llama(), tmp_path, name="b", seed=2, target_modules=["q_proj", "v_proj"], use_dora=True)
    adapt(llama(), tmp_path, name="c", seed=3, target_modules=["k_proj"], modules_to_save=["lm_head"])
    base, alone = load_file(tmp_path / "base" / "model.safetensors"), {n: opened(tmp_path, n) for n in "abc"}
    together = opened(tmp_path, "a", "b", "c")
    adapters = [{"path": str(tmp_path / name), "weight": w} for name, w in zip("abc", (0.5, -1.0, 2.0), strict=True)]
    recipe = hf_merge.Recipe.load(
        [{"model": {"model": str(tmp_path / "base"), "lora": adapters}}], method="passthrough"
    )
    assert recipe == hf_merge.Recipe.from_yaml(recipe.to_yaml())
    weighted = open_source(recipe.references[0])
    assert len(together.parts) == len(weighted.parts) == 4 and "0.5*" in weighted.label
    for name in base:
        changes = {n: alone[n][name] - base[name] for n in "abc"}
        assert torch.allclose(together[name], base[name] + sum(changes.values()), atol=2e-6)
        expected = base[name] + 0.5 * changes["a"] - changes["b"] + 2 * changes["c"]
        assert torch.allclose(weighted[name], expected, atol=4e-6)
    done = hf_merge.merge(recipe, tmp_path / "m")
    assert torch.allclose(done.load().lm_head.weight, weighted["lm_head.weight"])
    again = hf_merge.merge(tmp_path / "m" / "hf_merge_recipe.yaml", tmp_path / "m2")
    assert torch.equal(again.load().lm_head.weight, done.load().lm_head.weight)
    assert "`base` + `a` + `b` + `c`" in done.card.text and str(tmp_path) not in done.card.content


# bad input


def test_values_that_are_not_finite_are_found_by_name(tmp_path):
    adapt(llama(), tmp_path, target_modules=["q_proj"])
    path = tmp_path / "adapter" / "adapter_model.safetensors"
    tensors = load_file(path)
    key = next(key for key in tensors if "lora_A" in key)
    save_file({**tensors, key: tensors[key] * float("inf")}, path)
    source = opened(tmp_path)
    with pytest.raises(SourceError, match=f"'{key}' of the adapter '.*' holds NaN or Inf"):
        [source[name] for name in source]


def test_pissa_is_refused_and_its_plain_form_is_not(tmp_path):
    adapt(llama(), tmp_path, target_modules=["q_proj"])
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    for init in ("pissa", "pissa_niter_4", "olora", "corda", "loftq", "lora_ga"):
        path.write_text(json.dumps({**config, "init_lora_weights": init}))
        with pytest.raises(SourceError, match=f"made by '{init}', which changes the base too: save it as a plain"):
            opened(tmp_path)
    path.write_text(json.dumps({**config, "init_lora_weights": True}))
    assert opened(tmp_path)


def test_adapter_of_another_architecture_names_both(tmp_path):
    import transformers

    adapt(llama(), tmp_path, target_modules=["q_proj"])
    path = tmp_path / "adapter" / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "base_model_name_or_path": "org/llama"}))
    llama(hidden_size=32).save_pretrained(tmp_path / "wide")
    config = transformers.BertConfig(
        vocab_size=40, hidden_size=16, num_hidden_layers=2, num_attention_heads=2, intermediate_size=24
    )
    transformers.BertModel(config).save_pretrained(tmp_path / "bert")
    with pytest.raises(
        SourceError, match=r"do not fit '.*q_proj\.weight' .* of '.*wide': it was trained on 'org/llama"
    ):
        open_source(ModelRef.parse(f"{tmp_path / 'wide'}+{tmp_path / 'adapter'}"))
    with pytest.raises(SourceError, match=r"no place in '.*bert', which lacks .*: it was trained on 'org/llama'"):
        open_source(ModelRef.parse(f"{tmp_path / 'bert'}+{tmp_path / 'adapter'}"))


def test_experts_whose_parameters_are_not_named_are_refused(tmp_path):
    adapt(mixtral(), tmp_path, target_modules=[], target_parameters=["experts.gate_up_proj", "experts.down_proj"])
    path = tmp_path / "adapter" / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps({**config, "target_parameters": ["experts.gate_up_proj"]}))
    with pytest.raises(SourceError, match=r"2 pairs of factors for .*, and its config names gate_up_proj there"):
        opened(tmp_path)
    path.write_text(json.dumps({**config, "r": 5}))
    with pytest.raises(SourceError, match="have rank 12, and its config says 5"):
        opened(tmp_path)
