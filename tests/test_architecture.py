"""What transformers says of a model class from config.json alone."""

import json

import pytest
from transformers import BertConfig, GPT2Config, LlamaConfig, MixtralConfig, MixtralForCausalLM, Qwen2Config, ViTConfig

from hf_merge.architecture import skeleton

SMALL = {"num_hidden_layers": 2, "hidden_size": 32, "intermediate_size": 48, "num_attention_heads": 4}


def config_of(config, architecture: str) -> dict:
    return {**json.loads(config.to_json_string()), "architectures": [architecture]}


def test_names_are_those_that_save_pretrained_writes(tmp_path):
    config = MixtralConfig(**SMALL, num_key_value_heads=2, vocab_size=64, num_local_experts=2)
    MixtralForCausalLM(config).save_pretrained(tmp_path)
    from safetensors import safe_open

    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        saved = {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118
    found = skeleton(json.loads((tmp_path / "config.json").read_text()))
    assert {name: spec.shape for name, spec in found.specs.items()} == saved
    assert sorted(found.order) == sorted(saved)


@pytest.mark.parametrize(
    ("config", "architecture", "first", "last"),
    [
        (LlamaConfig(**SMALL), "LlamaForCausalLM", "model.embed_tokens.weight", "lm_head.weight"),
        (BertConfig(**SMALL), "BertModel", "embeddings.word_embeddings.weight", "pooler.dense.bias"),
        (ViTConfig(**SMALL), "ViTModel", "embeddings.cls_token", "pooler.dense.bias"),
        (GPT2Config(n_layer=2, n_embd=32, n_head=4), "GPT2Model", "wte.weight", "ln_f.bias"),
    ],
)
def test_the_order_is_that_of_the_modules(config, architecture, first, last):
    order = skeleton(config_of(config, architecture)).order
    assert (order[0], order[-1]) == (first, last)


def test_tied_weights_are_said_once_and_the_vocabulary_is_found():
    tied = skeleton(config_of(Qwen2Config(**SMALL, tie_word_embeddings=True), "Qwen2ForCausalLM"))
    assert tied.tied == {"lm_head.weight": "model.embed_tokens.weight"}
    assert tied.vocabulary == ("model.embed_tokens.weight",)
    masked = skeleton(config_of(BertConfig(**SMALL), "BertForMaskedLM"))
    assert masked.vocabulary == ("bert.embeddings.word_embeddings.weight", "cls.predictions.bias")
    assert masked.tied["cls.predictions.decoder.weight"] == "bert.embeddings.word_embeddings.weight"
    assert skeleton(config_of(ViTConfig(**SMALL), "ViTModel")).vocabulary == ()


@pytest.mark.parametrize(
    "config", [{}, {"architectures": ["NoSuch"]}, {"architectures": ["LlamaForCausalLM"], "hidden_size": "wide"}]
)
def test_what_transformers_cannot_build_is_none(config):
    assert skeleton(config) is None
