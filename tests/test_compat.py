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


def test_chat_templates_are_still_compiled_with_transformers_own_tags():
    import jinja2

    made = _compat.compile_chat_template(
        "{% for m in messages %}{% generation %}{{ m }}{% endgeneration %}{% endfor %}"
    )
    assert made.render(messages=["a", "b"]) == "ab"
    with pytest.raises(jinja2.TemplateSyntaxError):
        _compat.compile_chat_template("{{")


def test_quiet_lets_only_errors_through_and_puts_the_level_back():
    from transformers.utils import logging

    before = logging.get_verbosity()
    with _compat.quiet():
        assert logging.get_verbosity() == logging.ERROR
    assert logging.get_verbosity() == before
