"""Private parts of the Hugging Face libraries that we use: an upgrade that changes one fails here, by name."""

import pytest
import torch
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from hf_merge import _compat
from tests.conftest import small_config


def test_revert_weight_conversion_still_gives_the_layout_on_disk():
    config = MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=2,
    )
    layout = _compat.on_disk_layout(MixtralForCausalLM(config))
    expert = "model.layers.0.block_sparse_moe.experts.1.w2.weight"
    assert expert in layout and layout[expert][0] is None
    assert layout["model.norm.weight"][0] == "model.norm.weight"


def test_tied_weights_are_still_listed():
    layout = _compat.on_disk_layout(LlamaForCausalLM(small_config(tie_word_embeddings=True)))
    assert "model.embed_tokens.weight" in layout and "lm_head.weight" not in layout


def test_plain_module_keeps_its_names():
    module = torch.nn.Linear(2, 2)
    assert {name: live for name, (live, _) in _compat.on_disk_layout(module).items()} == {
        "weight": "weight",
        "bias": "bias",
    }


def test_mxfp4_is_still_unpacked_by_transformers_low_half_first_and_transposed():
    blocks, scales = torch.zeros(1, 2, 1, 16, dtype=torch.uint8), torch.full((1, 2, 1), 128, dtype=torch.uint8)
    blocks[0, 1, 0, 0] = 0xA7  # 7 is 6.0, 10 is -1.0; the exponent is 1
    made = _compat.mxfp4_dequantizer()(blocks, scales, dtype=torch.float32)
    assert made.shape == (1, 32, 2) and made[0, :2, 1].tolist() == [12.0, -2.0] and made.abs().sum() == 14


@pytest.mark.parametrize(
    ("architecture", "tag"),
    [
        ("LlamaForCausalLM", "text-generation"),
        ("ViTForImageClassification", "image-classification"),
        ("Nonsense", None),
    ],
)
def test_task_mapping_is_still_there(architecture, tag):
    assert _compat.pipeline_tag(architecture) == tag


def test_cli_words_are_still_there():
    argument, option, out = _compat.cli_words()
    assert callable(argument) and callable(option)
    assert {"text", "table", "dict", "result", "warning", "error", "mode", "set_no_truncate"} <= set(dir(out))


def test_table_of_tasks_is_still_that_of_transformers():
    from transformers.modelcard import TASK_MAPPING

    for tag, mapping in TASK_MAPPING.items():
        for name in _compat._flat(mapping.values()):
            found = _compat.pipeline_tag(name)
            assert found is not None and name in _compat._flat(TASK_MAPPING[found].values()), (tag, name)
    assert list(TASK_MAPPING) == list(_compat._TASKS)
