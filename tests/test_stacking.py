"""Slices: layers stacked, pruned and reordered; the result loads, runs and has every layer where it belongs."""

import json
import re

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

import hf_merge

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
TEXT = {**SIZES, "num_hidden_layers": 4, "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64}
SLIDING, FULL = "sliding_attention", "full_attention"
LATENT = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}
CLASSES = {
    "llama": (tf.LlamaForCausalLM, lambda: tf.LlamaConfig(**TEXT)),
    "qwen2": (
        tf.Qwen2ForCausalLM,
        lambda: tf.Qwen2Config(**TEXT, use_sliding_window=True, max_window_layers=2, sliding_window=8),
    ),
    "qwen3": (tf.Qwen3ForCausalLM, lambda: tf.Qwen3Config(**TEXT, head_dim=8)),
    "gemma2": (tf.Gemma2ForCausalLM, lambda: tf.Gemma2Config(**TEXT, head_dim=8, sliding_window=8)),
    "gemma3": (
        tf.Gemma3ForCausalLM,
        lambda: tf.Gemma3TextConfig(
            **TEXT, head_dim=8, sliding_window=8, layer_types=[SLIDING, SLIDING, FULL, SLIDING]
        ),
    ),
    "gpt2": (tf.GPT2LMHeadModel, lambda: tf.GPT2Config(n_layer=4, n_embd=32, n_head=4, vocab_size=64, n_positions=64)),
    "gpt_neo": (
        tf.GPTNeoForCausalLM,
        lambda: tf.GPTNeoConfig(
            num_layers=4, hidden_size=32, num_heads=4, vocab_size=64, max_position_embeddings=64,
            attention_types=[[["global", "local"], 2]],
        ),
    ),
    "bert": (tf.BertForMaskedLM, lambda: tf.BertConfig(**SIZES, num_hidden_layers=4, vocab_size=64)),
    "vit": (
        tf.ViTForImageClassification,
        lambda: tf.ViTConfig(**SIZES, num_hidden_layers=4, image_size=32, patch_size=16),
    ),
    "mixtral": (tf.MixtralForCausalLM, lambda: tf.MixtralConfig(**TEXT, num_local_experts=2)),
    "deepseek_v3": (
        tf.DeepseekV3ForCausalLM,
        lambda: tf.DeepseekV3Config(
            **{**TEXT, "num_key_value_heads": 4}, **LATENT, **EXPERTS,
            n_routed_experts=4, n_group=2, topk_group=1, first_k_dense_replace=1,
        ),
    ),
    "qwen2_moe": (
        tf.Qwen2MoeForCausalLM,
        lambda: tf.Qwen2MoeConfig(
            **TEXT, **EXPERTS, num_experts=2, shared_expert_intermediate_size=16, mlp_only_layers=[1]
        ),
    ),
    "jamba": (
        tf.JambaForCausalLM,
        lambda: tf.JambaConfig(
            **TEXT, attn_layer_period=2, attn_layer_offset=1, expert_layer_period=2, expert_layer_offset=1,
            num_experts=2, mamba_d_state=4, mamba_dt_rank=4, use_mamba_kernels=False,
        ),
    ),
}  # fmt: skip
TWICE = [("0", 0, 3), ("1", 1, 4)]
"""Layers 0-2 of the one, then layers 1-3 of the other."""
LAYER = re.compile(r"(?<=\.)\d+(?=\.)|^\d+(?=\.)")


@pytest.fixture(scope="module")
def pairs(tmp_path_factory):
    """Two models `0` and `1` of a class, made once."""
    made = {}

    def pair(name):
        if name not in made:
            made[name] = tmp_path_factory.mktemp(name)
            model_class, config = CLASSES[name]
            for i in range(2):
                torch.manual_seed(i)
                model_class(config()).save_pretrained(made[name] / str(i))
        return made[name]

    return pair


def passthrough(root, slices):
    return {
        "merge_method": "passthrough",
        "slices": [{"sources": [{"model": str(root / m), "layer_range": [a, b]}]} for m, a, b in slices],
    }


def config_of(folder):
    return json.loads((folder / "config.json").read_text())


def stacked_by_hand(root, slices, after):
    """Rename the layers of the models' files; what `after` says comes after the layers is the last model's."""
    models = [load_file(root / m / "model.safetensors") for m, _, _ in slices]
    expected = {name: models[-1 if after(name) else 0][name] for name in models[0] if not LAYER.search(name)}
    place = 0
    for tensors, (_, first, end) in zip(models, slices, strict=True):
        for layer in range(first, end):
            for name, tensor in tensors.items():
                found = LAYER.search(name)
                if found and int(found[0]) == layer:
                    expected[f"{name[: found.start()]}{place}{name[found.end() :]}"] = tensor
            place += 1
    return expected


@pytest.mark.parametrize("name", CLASSES)
def test_stack_loads_runs_and_has_every_layer_in_its_place(name, pairs, tmp_path):
    root, (model_class, _) = pairs(name), CLASSES[name]
    out = hf_merge.merge(passthrough(root, TWICE), tmp_path / "out").path
    model, info = model_class.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    written = load_file(out / "model.safetensors")
    expected = stacked_by_hand(
        root, TWICE, lambda tensor: "emb" not in tensor and ".wte" not in tensor and ".wpe" not in tensor
    )
    assert written.keys() == expected.keys()
    assert all(written[key].equal(tensor) for key, tensor in expected.items())
    values = {"pixel_values": torch.randn(1, 3, 32, 32)} if name == "vit" else {"input_ids": torch.arange(12)[None]}
    with torch.no_grad():
        assert model(**values).logits.isfinite().all()


@pytest.mark.parametrize(
    ("name", "slices", "said"),
    [
        ("qwen2", TWICE, {"num_hidden_layers": 6, "layer_types": [FULL, FULL, SLIDING, FULL, SLIDING, SLIDING]}),
        ("gemma3", TWICE, {"layer_types": [SLIDING, SLIDING, FULL, SLIDING, FULL, SLIDING]}),
        (
            "gemma3",
            [("0", 2, 4), ("0", 0, 2)],
            {"num_hidden_layers": 4, "layer_types": [FULL, SLIDING, SLIDING, SLIDING]},
        ),
        ("gpt_neo", [("0", 1, 4)], {"num_layers": 3, "attention_types": [[["local", "global", "local"], 1]]}),
        ("gpt2", [("0", 0, 1), ("1", 3, 4)], {"n_layer": 2}),
        ("deepseek_v3", [("0", 1, 4)], {"num_hidden_layers": 3, "first_k_dense_replace": 0}),
        ("deepseek_v3", [("0", 0, 1), ("1", 0, 3)], {"num_hidden_layers": 4, "first_k_dense_replace": 2}),
        ("qwen2_moe", TWICE, {"mlp_only_layers": [1, 3]}),
    ],
)
def test_what_a_config_says_of_each_layer_follows_the_layers(name, slices, said, pairs, tmp_path):
    out = hf_merge.merge(passthrough(pairs(name), slices), tmp_path / "out").path
    found, before = config_of(out), config_of(pairs(name) / "0")
    assert {key: found[key] for key in said} == said
    assert found.keys() - {"dtype"} == before.keys() - {"dtype"}
    CLASSES[name][0].from_pretrained(out)


def test_stack_that_the_config_cannot_describe_is_refused_before_anything_is_written(pairs, tmp_path):
    made = hf_merge.plan(passthrough(pairs("jamba"), [("0", 0, 2), ("0", 3, 4)]))  # attention in every second layer
    assert "cannot describe these 3 layers" in made.errors[0].text
    made = hf_merge.plan(passthrough(pairs("deepseek_v3"), [("0", 1, 2), ("0", 0, 1)]))  # dense after experts
    assert "cannot describe these 2 layers" in made.errors[0].text


def test_class_that_transformers_does_not_know_is_stacked_by_its_config(pairs, tmp_path):
    import shutil

    root = tmp_path / "models"
    for i in "01":
        shutil.copytree(pairs("llama") / i, root / i)
        config = config_of(root / i) | {"architectures": ["FutureForCausalLM"], "model_type": "future"}
        (root / i / "config.json").write_text(json.dumps(config))
    out = hf_merge.merge(passthrough(root, TWICE), tmp_path / "out").path
    assert config_of(out)["num_hidden_layers"] == 6
    after = stacked_by_hand(root, TWICE, lambda tensor: "embed" not in tensor)
    written = load_file(out / "model.safetensors")
    assert written.keys() == after.keys() and all(written[key].equal(tensor) for key, tensor in after.items())


def test_slices_of_two_models_are_merged_layer_by_layer(pairs, tmp_path):
    root = pairs("llama")
    recipe = f"""
merge_method: linear
slices:
  - sources:
      - {{model: {root}/0, layer_range: [0, 2], parameters: {{weight: 1}}}}
      - {{model: {root}/1, layer_range: [2, 4], parameters: {{weight: 3}}}}
  - parameters: {{weight: [1, 0]}}
    sources:
      - {{model: {root}/1, layer_range: [1, 3]}}
      - {{model: {root}/0, layer_range: [2, 4], parameters: {{weight: 1}}}}
"""
    out = load_file(hf_merge.merge(hf_merge.Recipe.from_yaml(recipe), tmp_path / "out").path / "model.safetensors")
    zero, one = (load_file(root / i / "model.safetensors") for i in "01")
    key = "model.layers.{}.mlp.up_proj.weight"
    torch.testing.assert_close(out[key.format(1)], (zero[key.format(1)] + 3 * one[key.format(3)]) / 4)
    torch.testing.assert_close(out[key.format(2)], (one[key.format(1)] + zero[key.format(2)]) / 2)  # weight 1 here
    torch.testing.assert_close(out[key.format(3)], zero[key.format(3)])  # and 0 here
    embedding, norm = "model.embed_tokens.weight", "model.norm.weight"
    torch.testing.assert_close(out[embedding], (zero[embedding] + 3 * one[embedding]) / 4)
    torch.testing.assert_close(out[norm], (zero[norm] + one[norm]) / 2)


def test_filters_ask_for_the_name_that_each_model_has(pairs):
    """A parameter of one model is resolved by the model's own name, one of all models by the output's."""
    root = pairs("llama")
    recipe = f"""
merge_method: task_arithmetic
base_model: {root}/0
slices:
  - sources:
      - {{model: {root}/0, layer_range: [0, 2]}}
      - model: {root}/1
        layer_range: [2, 4]
        parameters: {{weight: [{{filter: layers.3., value: 9}}, {{value: 2}}]}}
parameters: {{lambda: [{{filter: layers.1., value: 0.25}}, {{value: 0.5}}]}}
"""
    steps = {step.name: step for step in hf_merge.plan(hf_merge.Recipe.from_yaml(recipe)).steps}
    last = steps["model.layers.1.mlp.up_proj.weight"]
    assert last.settings["weight"] == [9] and last.settings["lambda"] == 0.25
    first = steps["model.layers.0.mlp.up_proj.weight"]
    assert first.settings["weight"] == [2] and first.settings["lambda"] == 0.5
    assert first.base.name == first.name and first.inputs[0].name == "model.layers.2.mlp.up_proj.weight"


def test_base_that_is_no_source_gives_the_layers_of_the_sources(pairs):
    root = pairs("llama")
    sources = [{"model": str(root / "1"), "layer_range": [1, 3]}]
    recipe = {"merge_method": "ties", "base_model": str(root / "0"), "slices": [{"sources": sources}]}
    steps = {step.name: step for step in hf_merge.plan(recipe).steps}
    assert steps["model.layers.0.mlp.up_proj.weight"].base.name == "model.layers.1.mlp.up_proj.weight"
    sources.append({"model": str(root / "1"), "layer_range": [0, 2]})
    assert "list it among the slice's sources" in hf_merge.plan(recipe).errors[0].text


@pytest.mark.parametrize(
    ("slices", "message"),
    [
        ([("0", 0, 5)], "'{root}/0' has 4 layers; a slice asks for layers 0 to 5."),
        ([("0", 0, 2), ("1", 3, 9)], "'{root}/1' has 4 layers; a slice asks for layers 3 to 9."),
    ],
)
def test_layers_that_do_not_exist_are_found_by_the_plan(slices, message, pairs):
    root = pairs("llama")
    assert hf_merge.plan(passthrough(root, slices)).errors[0].text == message.format(root=root)


def test_models_of_other_depths_are_told_with_both_depths(pairs, tmp_path):
    root = pairs("llama")
    short = hf_merge.merge(passthrough(root, [("0", 0, 3)]), tmp_path / "short").path
    (problem,) = hf_merge.plan([root / "0", short], method="linear").errors
    assert problem.text.startswith(f"'{short}' has 3 model.layers.* and '{root}/0' 4: choose layers with slices:")
    (problem,) = hf_merge.plan([short, root / "0"], method="linear").errors
    assert problem.text.startswith(f"'{root}/0' has 4 model.layers.* and '{short}' 3: choose layers with slices:")
    (problem,) = hf_merge.plan([root / "0", short], method="linear", keys="intersection").errors
    assert "leaves out tensors that config.json needs" in problem.message and "layers.3." in problem.tensors[0]


def test_uneven_slices_are_refused(pairs):
    root = pairs("llama")
    sources = [{"model": str(root / "0"), "layer_range": [0, 2]}, {"model": str(root / "1"), "layer_range": [0, 3]}]
    made = hf_merge.plan({"merge_method": "linear", "slices": [{"sources": sources}]})
    assert "give 2 and 3 layers" in made.errors[0].text


def test_text_layers_of_a_vision_language_model_are_stacked_and_its_tower_is_kept(tmp_path):
    text = tf.LlamaConfig(**TEXT).to_dict()
    vision = tf.CLIPVisionConfig(**SIZES, num_hidden_layers=2, image_size=32, patch_size=16).to_dict()
    config = tf.LlavaConfig(text_config=text, vision_config=vision, image_token_index=3)
    for i in range(2):
        torch.manual_seed(i)
        tf.LlavaForConditionalGeneration(config).save_pretrained(tmp_path / str(i))
    out = hf_merge.merge(passthrough(tmp_path, TWICE), tmp_path / "out").path
    model, info = tf.LlavaForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert (model.config.text_config.num_hidden_layers, model.config.vision_config.num_hidden_layers) == (6, 2)
