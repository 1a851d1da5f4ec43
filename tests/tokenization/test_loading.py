"""Tokenizers as they are loaded, rebuilt and written."""

import json

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from hf_merge.errors import SourceError
from hf_merge.tokenization.loading import load_folder, load_reference, rebuilt, write_template, write_tokenizer
from hf_merge.tokenization.union import unite, vocabulary_of
from hf_merge.types import InMemory, ModelRef
from tests.tiny_tokenizers import ENGLISH, also, byte_level_bpe, word_piece

CHAT = {"content": "<|im_end|>", "special": True, "single_word": False, "lstrip": False, "rstrip": False}


@pytest.fixture
def folder(tmp_path):
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=byte_level_bpe(ENGLISH, 300), eos_token="</s>")
    tokenizer.save_pretrained(tmp_path / "t")
    (tmp_path / "t" / "generation_config.json").write_text('{"eos_token_id": 2}')
    return tmp_path / "t"


def test_of_a_model_on_the_hub_only_the_tokenizer_is_fetched(folder, monkeypatch):
    asked = {}
    monkeypatch.setattr(
        "hf_merge.sources.hub.snapshot_download", lambda path, **words: asked.update(words) or str(folder)
    )
    loaded = load_reference(ModelRef(path="org/a", revision="v1"), token="secret")
    assert loaded.label == "org/a@v1" and loaded.generation == {"eos_token_id": 2} and loaded.config == {}
    assert asked["revision"] == "v1" and asked["token"] == "secret"
    assert "tokenizer.json" in asked["allow_patterns"] and not any("safetensors" in p for p in asked["allow_patterns"])


def test_object_in_memory_has_no_tokenizer():
    with pytest.raises(SourceError, match="name the folder or the Hub id"):
        load_reference(InMemory({}, "model 0"))


def test_default_of_several_templates(folder):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    tokenizer.chat_template = {"default": "D", "tool_use": "T"}
    tokenizer.save_pretrained(folder)
    assert load_folder(folder, "x").chat_template == "D"


@pytest.mark.parametrize("with_class", [None, "BertTokenizer"])
def test_rebuilt_tokenizer_loads_with_its_new_tokens(tmp_path, with_class):
    first = also(word_piece(ENGLISH, 60), ["[MASK]"])
    PreTrainedTokenizerFast(
        tokenizer_object=first, unk_token="[UNK]", pad_token="[PAD]", cls_token="[CLS]", sep_token="[SEP]"
    ).save_pretrained(tmp_path)
    if with_class:
        config = json.loads((tmp_path / "tokenizer_config.json").read_text())
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**config, "tokenizer_class": with_class}))
    base = load_folder(tmp_path, "x")
    state = unite([base.state], [{**CHAT, "normalized": False}])
    made = rebuilt(base, state)
    assert made.vocab == vocabulary_of(state) and made.vocab["<|im_end|>"] == len(base.vocab)
    text = "the cat sat on the mat"
    assert made.tokenizer.tokenize(text) == base.tokenizer.tokenize(text)
    assert made.tokenizer(text).input_ids == base.tokenizer(text).input_ids
    assert "vocab.txt" not in made.files


def test_writing_replaces_all_that_was_there(folder, tmp_path):
    old = tmp_path / "old"
    old.mkdir()
    for name in ("vocab.json", "merges.txt", "chat_template.json", "weights.safetensors", "processor_config.json"):
        (old / name).write_text("{}")
    write_tokenizer(old, load_folder(folder, "x").files)
    write_template(old, "{{ messages }}")
    assert sorted(path.name for path in old.iterdir()) == [
        "chat_template.jinja",
        "processor_config.json",
        "tokenizer.json",
        "tokenizer_config.json",
        "weights.safetensors",
    ]
    assert AutoTokenizer.from_pretrained(old).chat_template == "{{ messages }}"


def test_equal_files_are_loaded_once(folder, monkeypatch, tmp_path):
    other = tmp_path / "other"
    PreTrainedTokenizerFast(tokenizer_object=byte_level_bpe(ENGLISH, 320)).save_pretrained(other)
    calls, load = [], AutoTokenizer.from_pretrained
    monkeypatch.setattr(
        AutoTokenizer, "from_pretrained", lambda path, **words: calls.append(path) or load(path, **words)
    )
    known = {}
    a, b, c = (load_folder(path, str(i), known) for i, path in enumerate((folder, folder, other)))
    assert len(calls) == 2 and a.tokenizer is b.tokenizer and c.tokenizer is not a.tokenizer
    assert (a.label, b.label) == ("0", "1") and b.generation == {"eos_token_id": 2} and c.generation == {}
