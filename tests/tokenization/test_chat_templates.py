"""The built-in chat templates, rendered by transformers as the model families document their formats."""

import jinja2
import pytest
from transformers import PreTrainedTokenizerFast

from hf_merge.tokenization.chat_templates import BUILT_IN, most_common, template_error
from tests.conftest import make_tokenizer

SYSTEM = {"role": "system", "content": "Be brief."}
TALK = [
    {"role": "user", "content": "Hi!"},
    {"role": "assistant", "content": "Hello."},
    {"role": "user", "content": "Who are you?"},
]

FORMATS = {
    "chatml": (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi!<|im_end|>\n<|im_start|>assistant\n"
        "Hello.<|im_end|>\n<|im_start|>user\nWho are you?<|im_end|>\n<|im_start|>assistant\n"
    ),
    "llama3": (
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|><|start_header_id|>user<|end_header_id|>"
        "\n\nHi!<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\nHello.<|eot_id|><|start_header_id|>user"
        "<|end_header_id|>\n\nWho are you?<|eot_id|><|start_header_id|>assistant<|end_header_id|>\n\n"
    ),
    "mistral": "<s>[INST] Be brief.\n\nHi! [/INST] Hello.</s>[INST] Who are you? [/INST]",
    "alpaca": (
        "Be brief.\n\n### Instruction:\nHi!\n\n### Response:\nHello.</s>\n\n"
        "### Instruction:\nWho are you?\n\n### Response:\n"
    ),
    "exaone": (
        "[|system|]Be brief.[|endofturn|]\n[|user|]Hi!\n[|assistant|]Hello.[|endofturn|]\n"
        "[|user|]Who are you?\n[|assistant|]"
    ),
}


def rendered(template: str, messages: list, **options: bool) -> str:
    tokenizer: PreTrainedTokenizerFast = make_tokenizer()
    return str(tokenizer.apply_chat_template(messages, chat_template=template, tokenize=False, **options))


@pytest.mark.parametrize("name", BUILT_IN)
def test_built_in_template_renders_the_format_of_its_family(name):
    assert rendered(BUILT_IN[name], [SYSTEM, *TALK], add_generation_prompt=True) == FORMATS[name]


@pytest.mark.parametrize("name", BUILT_IN)
def test_prompt_for_an_answer_is_added_only_when_asked_for(name):
    without = rendered(BUILT_IN[name], [SYSTEM, *TALK], add_generation_prompt=False)
    assert FORMATS[name].startswith(without) and "Who are you?" in without


def test_what_is_said_where_no_system_message_is():
    assert rendered(BUILT_IN["alpaca"], TALK).startswith("Below is an instruction that describes a task. Write a resp")
    assert rendered(BUILT_IN["exaone"], TALK).startswith("[|system|][|endofturn|]\n[|user|]Hi!\n")
    assert rendered(BUILT_IN["mistral"], TALK[:1]) == "<s>[INST] Hi! [/INST]"
    with pytest.raises(jinja2.TemplateError, match="found tool"):
        rendered(BUILT_IN["mistral"], [{"role": "tool", "content": "x"}])


def test_most_common_template_and_the_first_of_equals():
    assert most_common(["x", "y", "y"]) == "y"
    assert most_common(["x", "y", None, "y", "x"]) == "x"
    assert most_common([None, None]) is None and most_common([]) is None


@pytest.mark.parametrize("text", [*BUILT_IN.values(), "{% for m in messages %}{% break %}{% endfor %}"])
def test_templates_that_transformers_takes_have_no_error(text):
    assert template_error(text) is None


def test_error_in_a_template_has_its_line():
    error = template_error("fine\n{% for %}")
    assert error is not None and error.startswith("line 2: ")
