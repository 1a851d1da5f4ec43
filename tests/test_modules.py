"""Modules: towers of a model, each merged in its own way; nothing is lost between them."""

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

import hf_merge
from tests.conftest import make_tokenizer

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}
TEXT = {**SIZES, "num_hidden_layers": 3, "num_key_value_heads": 2, "vocab_size": 64, "max_position_embeddings": 64}


@pytest.fixture(scope="module")
def llavas(tmp_path_factory):
    """Two vision-language models `0` and `1`."""
    root = tmp_path_factory.mktemp("llavas")
    vision = tf.CLIPVisionConfig(**SIZES, num_hidden_layers=3, image_size=32, patch_size=16).to_dict()
    config = tf.LlavaConfig(text_config=tf.LlamaConfig(**TEXT).to_dict(), vision_config=vision, image_token_index=3)
    for i in range(2):
        torch.manual_seed(i)
        tf.LlavaForConditionalGeneration(config).save_pretrained(root / str(i))
    return root


@pytest.fixture(scope="module")
def t5s(tmp_path_factory):
    """Two encoder-decoders `0` and `1`."""
    root = tmp_path_factory.mktemp("t5s")
    for i in range(2):
        torch.manual_seed(i)
        config = tf.T5Config(
            d_model=32, d_ff=48, d_kv=8, num_heads=4, num_layers=2, vocab_size=64, decoder_start_token_id=0
        )
        tf.T5ForConditionalGeneration(config).save_pretrained(root / str(i))
    return root


def weights(folder):
    return load_file(folder / "model.safetensors")


def whose(tensor, zero, one):
    """Say of which model a tensor is, or that it is their mean."""
    means = {"0": zero, "1": one, "mean": (zero + one) / 2}
    return "/".join(name for name, value in means.items() if tensor.equal(value))


def test_towers_are_merged_apart(llavas, tmp_path):
    recipe = f"""
merge_method: linear
modules:
  text_decoder: {{models: [{llavas}/0, {llavas}/1]}}
  vision_tower: {{merge_method: passthrough, models: [{llavas}/1]}}
  multi_modal_projector: {{models: [{{model: {llavas}/0, parameters: {{weight: 1}}}}], parameters: {{weight: 7}}}}
"""
    out = hf_merge.merge(hf_merge.Recipe.from_yaml(recipe), tmp_path / "out").path
    _, info = tf.LlavaForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    written, zero, one = weights(out), weights(llavas / "0"), weights(llavas / "1")
    assert written.keys() == zero.keys()
    expected = {"language_model": "mean", "vision_tower": "1", "multi_modal_projector": "0"}
    for name, tensor in written.items():
        if not zero[name].equal(one[name]):  # norms begin as ones
            assert whose(tensor, zero[name], one[name]) == expected[name.split(".")[0]], name


def test_what_no_module_takes_is_the_bases_and_is_told(llavas, tmp_path):
    recipe = {"merge_method": "linear", "modules": {"multi_modal_projector": {"models": [str(llavas / "1")]}}}
    recipe["base_model"] = str(llavas / "0")
    recipe["parameters"] = {"weight": 1.0}
    made = hf_merge.plan(recipe)
    assert not made.errors
    told = next(problem.text for problem in made.problems if "No module takes" in problem.text)
    assert "language_model" in told and "vision_tower" in told
    written = weights(hf_merge.merge(recipe, tmp_path / "out").path)
    zero = weights(llavas / "0")
    assert all(written[name].equal(zero[name]) for name in zero if not name.startswith("multi_modal"))
    assert written.keys() == zero.keys()


def test_module_that_is_no_part_of_the_model_is_refused_with_the_parts_there_are(llavas):
    recipe = {"merge_method": "linear", "modules": {"audio_towel": {"models": [str(llavas / "0")]}}}
    text = hf_merge.plan(recipe).errors[0].text
    assert "'audio_towel' is no part" in text and "language_model, multi_modal_projector, vision_tower" in text
    recipe["modules"] = {"eyes": {"models": [str(llavas / "0")], "prefix": "vision_tower"}}
    assert not hf_merge.plan(recipe).errors


def test_default_is_all_the_rest_and_a_single_module_is_the_whole(llavas, tmp_path):
    models = [str(llavas / "0"), str(llavas / "1")]
    recipe = {"merge_method": "linear", "modules": {"default": {"models": models}}}
    made = hf_merge.plan(recipe)
    assert not made.problems and {len(step.inputs) for step in made.steps} == {2}


def test_layers_of_encoder_and_decoder_are_stacked_apart(t5s, tmp_path):
    recipe = f"""
merge_method: passthrough
modules:
  encoder: {{models: [{t5s}/0]}}
  decoder:
    slices:
      - sources: [{{model: {t5s}/0, layer_range: [0, 2]}}]
      - sources: [{{model: {t5s}/1, layer_range: [1, 2]}}]
  default: {{models: [{t5s}/0]}}
"""
    out = hf_merge.merge(hf_merge.Recipe.from_yaml(recipe), tmp_path / "out").path
    model, info = tf.T5ForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"]
    assert (model.config.num_layers, model.config.num_decoder_layers) == (2, 3)
    key = "decoder.block.{}.layer.0.SelfAttention.q.weight"
    assert weights(out)[key.format(2)].equal(weights(t5s / "1")[key.format(1)])
    assert model.generate(torch.arange(4)[None], max_new_tokens=3, use_cache=False).shape[0] == 1


def test_slices_of_a_model_with_two_stacks_should_say_which(t5s):
    sources = [{"model": str(t5s / "0"), "layer_range": [0, 1]}]
    made = hf_merge.plan({"merge_method": "passthrough", "slices": [{"sources": sources}]})
    assert (
        "encoder.block.* (2), decoder.block.* (2)" in made.errors[0].text
        or "decoder.block.* (2)" in made.errors[0].text
    )
    assert "under modules:" in made.errors[0].text


def test_parameters_of_a_model_win_over_its_slice_its_module_and_the_recipe(llavas):
    recipe = f"""
merge_method: task_arithmetic
base_model: {llavas}/0
modules:
  vision_tower:
    parameters: {{weight: 3, lambda: 0.3}}
    slices:
      - parameters: {{weight: [{{filter: mlp, value: 2}}]}}
        sources:
          - model: {llavas}/0
          - model: {llavas}/1
            parameters: {{weight: [{{filter: fc1, value: 1}}]}}
  default: {{models: [{llavas}/1]}}
parameters: {{weight: 4, lambda: 0.4}}
"""
    steps = {step.name: step.settings for step in hf_merge.plan(hf_merge.Recipe.from_yaml(recipe)).steps}
    layer = "vision_tower.encoder.layers.0"
    found = {name: (value["weight"], value["lambda"]) for name, value in steps.items()}
    assert found[f"{layer}.mlp.fc1.weight"] == ([1], 0.3)
    assert found[f"{layer}.mlp.fc2.weight"] == ([2], 0.3)
    assert found[f"{layer}.layer_norm1.weight"] == ([3], 0.3)
    assert found["multi_modal_projector.linear_1.weight"] == ([4], 0.4)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("modules: {a: {}}", "line 2: 'modules.a' names no models: it should have models or slices."),
        ("models: [org/a]\nslices: [{sources: [org/a]}]", "The recipe has models and slices: write one of them."),
        ("modules: {a: {modls: [org/a]}}", "line 2: Unknown key 'modls'. Did you mean 'models'?"),
        ("slices: [{sources: [{model: org/a, layer_range: [2, 1]}]}]", "first < end"),
        ("slices: [{sources: [{model: org/a, layer_range: 3}]}]", "line 2: 'slices.0.sources.0.layer_range' should be"),
        ("models: [{model: org/a, layer_range: [0, 1]}]", "line 2: 'models' takes whole models: write layer_range"),
        ("slices: [{sources: [org/a, org/a]}]", "lists the same layers of 'org/a' twice"),
        ("slices: [{sources: [org/a], parameters: {wieght: 1}}]", "line 2: 'linear' has no parameter 'wieght'"),
        ("modules: {a: {models: [org/a], merge_method: tiess}}", "There is no merge method 'tiess'. Did you mean"),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said_with_its_line(text, message):
    with pytest.raises(hf_merge.RecipeError) as caught:
        hf_merge.Recipe.from_yaml(f"merge_method: linear\n{text}")
    assert message in str(caught.value)


def test_the_longest_word_claims_a_tensor(tmp_path):
    """In Qwen's checkpoints the projector lies inside of the tower, and the text model has no prefix."""
    text = {**TEXT, "rope_parameters": {"rope_type": "default", "mrope_section": [1, 1, 2], "rope_theta": 10000.0}}
    vision = {"depth": 2, "embed_dim": 16, "num_heads": 2, "hidden_size": 32, "mlp_ratio": 2}
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
    for i in range(2):
        torch.manual_seed(i)
        config = tf.Qwen2VLConfig(text_config={**text, **ids}, vision_config=vision, **ids)
        tf.Qwen2VLForConditionalGeneration(config).save_pretrained(tmp_path / str(i))
    torch.manual_seed(2)
    tf.Qwen2ForCausalLM(tf.Qwen2Config(**TEXT, tie_word_embeddings=False)).save_pretrained(tmp_path / "text")
    models = {name: [str(tmp_path / place) for place in places]
              for name, places in {"tower": ["1"], "projector": ["0"], "decoder": ["0", "text"]}.items()}  # fmt: skip
    modules = {
        "vision_tower": {"models": models["tower"], "merge_method": "passthrough"},
        "multi_modal_projector": {"models": models["projector"]},
        "text_decoder": {"models": models["decoder"]},
    }
    out = hf_merge.merge({"merge_method": "linear", "modules": modules}, tmp_path / "out").path
    zero, one, text = weights(tmp_path / "0"), weights(tmp_path / "1"), weights(tmp_path / "text")
    for name, tensor in weights(out).items():
        if name.startswith("visual."):
            assert tensor.equal(zero[name] if "merger" in name else one[name]), name
        else:
            assert tensor.equal((zero[name] + text[name]) / 2), name


def test_language_model_with_more_tokens_joins_a_model_that_sees(tmp_path):
    vision = tf.CLIPVisionConfig(**SIZES, num_hidden_layers=2, image_size=32, patch_size=16).to_dict()
    config = tf.LlavaConfig(text_config=tf.LlamaConfig(**TEXT).to_dict(), vision_config=vision, image_token_index=3)
    tokenizer = make_tokenizer()
    tf.LlavaForConditionalGeneration(config).save_pretrained(tmp_path / "vlm")
    tokenizer.save_pretrained(tmp_path / "vlm")
    tokenizer.add_tokens(["<think>", "</think>"])
    tf.LlamaForCausalLM(tf.LlamaConfig(**{**TEXT, "vocab_size": 66})).save_pretrained(tmp_path / "llm")
    tokenizer.save_pretrained(tmp_path / "llm")
    models = [str(tmp_path / name) for name in ("vlm", "llm")]
    recipe = {"merge_method": "linear", "models": models, "missing": "base"}
    assert "has another vocabulary" in hf_merge.plan(recipe).errors[0].text
    out = hf_merge.merge({**recipe, "tokenizer_source": "union"}, tmp_path / "out").path
    model, info = tf.LlavaForConditionalGeneration.from_pretrained(out, output_loading_info=True)
    assert not info["missing_keys"] and not info["unexpected_keys"] and not info["mismatched_keys"]
    assert model.config.text_config.vocab_size == len(tf.AutoTokenizer.from_pretrained(out)) == 66
    written, seeing, text = weights(out), weights(tmp_path / "vlm"), weights(tmp_path / "llm")
    rows, name = written["language_model.model.embed_tokens.weight"], "model.embed_tokens.weight"
    assert rows[64:].equal(text[name][64:])
    assert rows[:64].equal((seeing[f"language_model.{name}"] + text[name][:64]) / 2)
