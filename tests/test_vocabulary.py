"""Models with different vocabularies, from a recipe to a model that loads, encodes and generates."""

import json
import shutil

import pytest
import torch
from safetensors.torch import load_file
from tokenizers import Tokenizer
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

import hf_merge
from hf_merge.tokenization.chat_templates import BUILT_IN
from tests.conftest import small_config
from tests.tiny_tokenizers import (
    CODE,
    ENGLISH,
    RUSSIAN,
    also,
    byte_level_bpe,
    sentencepiece_bpe,
    unigram,
    word_level,
    word_piece,
)

BPE = byte_level_bpe(ENGLISH, 300)
SIZE = BPE.get_vocab_size()
CHATML = ("<|im_start|>", "<|im_end|>")
EMBED, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.fixture
def make(tmp_path):
    """Save a tiny Llama with a tokenizer."""

    def make_model(
        name, tokenizer: Tokenizer, *, rows=None, seed=0, tie=False, dtype=torch.float32, config=(), **words
    ):
        torch.manual_seed(seed)
        rows = rows or tokenizer.get_vocab_size()
        sizes = {"vocab_size": rows, "hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
        model = LlamaForCausalLM(small_config(**{**sizes, "tie_word_embeddings": tie, **dict(config)})).to(dtype)
        model.save_pretrained(tmp_path / name)
        special = {"unk_token": "<unk>", "bos_token": "<s>", "eos_token": "</s>"}
        known = {key: token for key, token in special.items() if token in tokenizer.get_vocab()}
        PreTrainedTokenizerFast(tokenizer_object=tokenizer, **{**known, **words}).save_pretrained(tmp_path / name)
        return tmp_path / name

    return make_model


def weights(folder):
    return load_file(folder / "model.safetensors")


def vocabulary(folder):
    return AutoTokenizer.from_pretrained(folder).get_vocab()


def pieces(folder, text):
    return AutoTokenizer.from_pretrained(folder).tokenize(text)


def works(folder, text="the cat sat"):
    """Load model and tokenizer as users do, look that they fit together, and generate."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model, info = AutoModelForCausalLM.from_pretrained(folder, output_loading_info=True)
    assert not any(info.values())
    assert model.config.vocab_size == model.get_input_embeddings().weight.shape[0] == model.lm_head.weight.shape[0]
    assert max(tokenizer.get_vocab().values()) < model.config.vocab_size
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert model.generate(ids, do_sample=False, max_new_tokens=3, pad_token_id=0).shape[1] > ids.shape[1]
    return model, tokenizer


def messages(plan, severity):
    return [str(problem) for problem in plan.problems if problem.severity == severity]


# the common case: one base, each fine-tune with tokens of its own


@pytest.mark.parametrize("tie", [True, False])
def test_union_of_added_tokens_row_by_row(make, tmp_path, tie):
    base = make("base", BPE, tie=tie)
    chat = make("chat", also(BPE, CHATML), seed=1, tie=tie)
    think = make("think", also(BPE, ["<think>", "<|im_end|>"]), seed=2, tie=tie)
    out = hf_merge.merge([chat, think], tmp_path / "m", method="linear", tokenizer_source="union").path
    model, tokenizer = works(out)
    assert vocabulary(out) == {**vocabulary(base), "<|im_start|>": SIZE, "<|im_end|>": SIZE + 1, "<think>": SIZE + 2}
    a, b, merged = weights(chat), weights(think), weights(out)
    assert (HEAD in merged) != tie
    for name in (EMBED,) if tie else (EMBED, HEAD):
        assert torch.equal(merged[name][:SIZE], (a[name][:SIZE] + b[name][:SIZE]) / 2)
        assert torch.equal(merged[name][SIZE], a[name][SIZE])  # only chat has <|im_start|>
        assert torch.equal(merged[name][SIZE + 1], (a[name][SIZE + 1] + b[name][SIZE + 1]) / 2)
        assert torch.equal(merged[name][SIZE + 2], b[name][SIZE])  # only think has <think>, at another id
    assert tokenizer.tokenize("<|im_start|>the cat<think>") == ["<|im_start|>", *pieces(base, "the cat"), "<think>"]
    assert tokenizer.decode(tokenizer("the<think>").input_ids, skip_special_tokens=True) == "the"
    assert model.generation_config.eos_token_id == 2 and tokenizer.eos_token == "</s>"


def test_base_of_a_task_vector_has_the_rows_that_it_lacks_from_the_models(make, tmp_path):
    base, chat = make("base", BPE), make("chat", also(BPE, CHATML), seed=1)
    out = hf_merge.merge(
        [chat], tmp_path / "m", method="task_arithmetic", base_model=base, weight=0.5, tokenizer_source="union"
    ).path
    merged, a, b = weights(out)[EMBED], weights(base)[EMBED], weights(chat)[EMBED]
    torch.testing.assert_close(merged[:SIZE], (a + b[:SIZE]) / 2)
    assert torch.equal(merged[SIZE:], b[SIZE:])  # the task vector of a row that only one has is zero
    works(out)


def test_union_does_not_depend_on_anything_but_the_order_of_models(make, tmp_path):
    chat, think = make("chat", also(BPE, CHATML)), make("think", also(BPE, ["<think>"]), seed=1)
    done = [
        hf_merge.merge([chat, think], tmp_path / name, method="linear", tokenizer_source="union").path for name in "xy"
    ]
    for name in ("tokenizer.json", "tokenizer_config.json", "config.json", "model.safetensors"):
        assert (done[0] / name).read_bytes() == (done[1] / name).read_bytes()
    turned = hf_merge.merge([think, chat], tmp_path / "z", method="linear", tokenizer_source="union").path
    assert vocabulary(turned)["<think>"] == SIZE and vocabulary(turned)["<|im_start|>"] == SIZE + 1
    again = hf_merge.merge(done[0] / "hf_merge_recipe.yaml", tmp_path / "again").path
    assert (again / "model.safetensors").read_bytes() == (done[0] / "model.safetensors").read_bytes()


def test_files_of_a_tokenizer_that_stays_are_the_donors_byte_for_byte(make, tmp_path):
    base, chat = make("base", BPE), make("chat", also(BPE, CHATML), seed=1)
    for models, source in (([base, chat], "base"), ([base], "union")):
        out = hf_merge.merge(models, tmp_path / f"m {source}", method="linear", tokenizer_source=source).path
        for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
            assert (out / name).read_bytes() == (base / name).read_bytes()
        assert weights(out)[EMBED].shape[0] == SIZE
        works(out)


def test_older_files_of_the_donors_tokenizer_do_not_stay_beside_a_new_one(make, tmp_path):
    base, chat = make("base", BPE), make("chat", also(BPE, CHATML), seed=1)
    stale = ("vocab.json", "merges.txt", "added_tokens.json", "special_tokens_map.json", "spiece.model", "vocab.txt")
    for name in stale:
        (base / name).write_text("{}")
    (base / "preprocessor_config.json").write_text("{}")
    for source in ("union", str(chat)):
        out = hf_merge.merge([base, chat], tmp_path / "m", method="linear", tokenizer_source=source, overwrite=True)
        assert not [name for name in stale if (out.path / name).exists()]
        assert (out.path / "preprocessor_config.json").is_file() and len(vocabulary(out.path)) == SIZE + 2


# the tokenizer of one model


def test_tokenizer_of_a_model_moves_rows_and_ids(make, tmp_path):
    words = ["<s>", "</s>", "w0", "w1", "w2"]
    base = make("base", word_level(words), config={"pad_token_id": 3})
    other = make(
        "other",
        word_level(["w1", "<end>", "w0", "<s>", "</s>"]),
        seed=1,
        eos_token="<end>",
        config={"eos_token_id": 2, "bos_token_id": 4},
    )
    recipe = {"merge_method": "linear", "models": [str(base), str(other)], "tokenizer_source": str(other)}
    out = hf_merge.merge(recipe, tmp_path / "m").path
    model, tokenizer = works(out, "w0 w1")
    assert vocabulary(out) == vocabulary(other) and tokenizer.eos_token == "<end>"
    a, b, merged = weights(base)[EMBED], weights(other)[EMBED], weights(out)[EMBED]
    own = [0, 4, None, 3, 1, 2]  # ids in base of <unk>, w1, <end>, w0, <s>, </s>
    for i, j in enumerate(own):
        assert torch.equal(merged[i], b[i] if j is None else (a[j] + b[i]) / 2)
    assert (model.config.eos_token_id, model.config.bos_token_id) == (2, 4)  # as their own model says
    assert model.config.pad_token_id == 3  # w0 was at 3 and is at 3
    assert model.generation_config.eos_token_id == 2 and model.generation_config.bos_token_id == 4


def test_ids_that_have_no_token_any_more_are_reported(make):
    base = make("base", word_level(["<s>", "</s>", "<pad>"]), config={"pad_token_id": 3})
    other = make("other", word_level(["</s>", "<s>"]), seed=1, config={"bos_token_id": 2, "eos_token_id": 1})
    plan = hf_merge.plan([base, other], method="linear", tokenizer_source=str(other))
    assert any("pad_token_id are null" in message for message in messages(plan, "warning"))


def test_tokenizer_of_a_model_that_is_not_merged(make, tmp_path):
    base, chat = make("base", BPE), make("chat", also(BPE, CHATML), seed=1)
    outside = tmp_path / "outside"
    PreTrainedTokenizerFast(tokenizer_object=also(BPE, ["<|im_end|>"]), eos_token="</s>").save_pretrained(outside)
    out = hf_merge.merge([base, chat], tmp_path / "m", method="linear", tokenizer_source=str(outside)).path
    assert vocabulary(out)["<|im_end|>"] == SIZE and torch.equal(weights(out)[EMBED][SIZE], weights(chat)[EMBED][-1])
    card = (out / "README.md").read_text()
    assert "the tokenizer from `outside`" in card and str(tmp_path) not in card
    works(out)


# rows


def test_padded_vocabularies_stay_padded_unless_asked(make, tmp_path):
    base, chat = make("base", BPE, rows=SIZE + 20), make("chat", also(BPE, CHATML), rows=SIZE + 10, seed=1)
    out = hf_merge.merge([base, chat], tmp_path / "m", method="linear", tokenizer_source="union").path
    a, b, merged = weights(base)[EMBED], weights(chat)[EMBED], weights(out)[EMBED]
    assert merged.shape[0] == SIZE + 20
    assert torch.equal(merged[SIZE : SIZE + 2], b[SIZE : SIZE + 2])  # base has padding there, chat has tokens
    assert torch.equal(merged[SIZE + 2 : SIZE + 10], (a[SIZE + 2 : SIZE + 10] + b[SIZE + 2 :]) / 2)
    mean = b[: SIZE + 2].double().mean(0).float()
    torch.testing.assert_close(merged[SIZE + 10 :], (a[SIZE + 10 :] + mean) / 2)
    works(out)
    for source in (str(chat), "base"):  # the donor's padding stays whoever gives the tokenizer
        plan = hf_merge.plan([base, chat], method="linear", tokenizer_source=source)
        assert plan.specs[EMBED].shape[0] == plan.specs[HEAD].shape[0] == SIZE + 20
    asked = {"source": "union", "pad_to_multiple_of": 8}
    rows = hf_merge.plan([base, chat], method="linear", tokenizer=asked).specs[EMBED].shape[0]
    assert rows == -(-(SIZE + 2) // 8) * 8


def test_padding_gives_way_to_more_tokens(make, tmp_path):
    base, chat = make("base", BPE, rows=SIZE + 1), make("chat", also(BPE, CHATML), seed=1)
    out = hf_merge.merge([base, chat], tmp_path / "m", method="linear", tokenizer_source="union").path
    assert works(out)[0].config.vocab_size == SIZE + 2


def test_rows_that_the_recipe_names(make, tmp_path):
    base = make("base", BPE, seed=1)
    chat, think = make("chat", also(BPE, CHATML), seed=2), make("think", also(BPE, ["<|im_start|>"]), seed=3)
    the = BPE.token_to_id("the")
    tokens = {
        "<|im_start|>": {"source": str(think)},
        "<|im_end|>": {"source": {"kind": "zero"}},
        "<new>": {"source": {"kind": "model_token", "model": str(chat), "token": "the"}},
        "<newer>": {"source": {"kind": "model_token", "model": str(chat), "token_id": 7}},
        "the": {"source": str(think), "force": True},
        "</s>": {"source": "zero", "force": True},
    }
    recipe = {
        "merge_method": "linear",
        "models": [{"model": str(m), "parameters": {"weight": w}} for m, w in ((chat, 1), (think, 3), (base, 4))],
        "tokenizer": {"tokens": tokens},
    }
    out = hf_merge.merge(recipe, tmp_path / "m").path
    ids, merged = vocabulary(out), weights(out)[EMBED]
    a, b = (weights(folder)[EMBED] for folder in (chat, think))
    torch.testing.assert_close(merged[ids["<|im_start|>"]], (a[SIZE] + 3 * b[SIZE] + 4 * b[SIZE]) / 8)
    torch.testing.assert_close(merged[ids["<|im_end|>"]], a[SIZE + 1] / 8)  # chat has its own, the others zeros
    torch.testing.assert_close(merged[ids["<new>"]], a[the])
    torch.testing.assert_close(merged[ids["<newer>"]], a[7])
    torch.testing.assert_close(merged[the], b[the])
    assert not merged[ids["</s>"]].any()
    assert AutoTokenizer.from_pretrained(out).tokenize("the<new>")[-1] == "<new>"
    works(out)
    assert "the recipe says where the rows of `<|im_start|>`" in (out / "README.md").read_text()


def test_added_token_keeps_the_definition_of_the_model_that_has_it(make, tmp_path):
    base, chat = make("base", BPE), make("chat", also(BPE, CHATML), seed=1)
    tokenizer = {"source": "base", "tokens": {"<|im_end|>": {"source": str(chat)}}}
    recipe = {"merge_method": "linear", "models": [str(base), str(chat)], "tokenizer": tokenizer}
    out = hf_merge.merge(recipe, tmp_path / "m").path
    assert torch.equal(weights(out)[EMBED][SIZE], weights(chat)[EMBED][SIZE + 1])
    assert AutoTokenizer.from_pretrained(out).decode([SIZE], skip_special_tokens=True) == ""


def test_row_that_the_named_model_lacks_is_an_error(make):
    base, chat = make("base", BPE), make("chat", also(BPE, CHATML), seed=1)
    for source in (str(base), {"kind": "model_token", "model": str(chat), "token_id": 99999}):
        tokens = {"<|im_end|>": {"source": source}}
        recipe = {"merge_method": "linear", "models": [str(base), str(chat)], "tokenizer": {"tokens": tokens}}
        assert any("The row of '<|im_end|>' is to come from" in m for m in messages(hf_merge.plan(recipe), "error"))


def test_token_that_no_model_has_a_row_for_is_zero_and_reported(make, tmp_path):
    base, chat = make("base", BPE), make("chat", also(BPE, CHATML), seed=1)
    tokenizer = {"tokens": {"<new>": {}}}
    recipe = {"merge_method": "linear", "models": [str(base), str(chat)], "tokenizer": tokenizer}
    done = hf_merge.merge(recipe, tmp_path / "m")
    assert not weights(done.path)[EMBED][SIZE + 2].any()
    assert any("No model has a row for '<new>': it is zero" in message for message in messages(done.plan, "warning"))


def test_dtypes_of_the_models_stay(make, tmp_path):
    base = make("base", BPE, dtype=torch.bfloat16)
    chat = make("chat", also(BPE, CHATML), seed=1, dtype=torch.bfloat16)
    plan = hf_merge.plan([base, chat], method="linear", tokenizer_source="union")
    assert {spec.dtype for spec in plan.specs.values()} == {torch.bfloat16} and plan.peak_memory > 2 * SIZE * 16 * 2
    out = hf_merge.merge([base, chat], tmp_path / "m", method="linear", tokenizer_source="union").path
    assert torch.equal(weights(out)[EMBED][SIZE:], weights(chat)[EMBED][SIZE:])


def test_tied_head_of_one_model_stands_in_for_the_rows_of_another(make, tmp_path):
    base, chat = make("base", BPE, seed=1), make("chat", also(BPE, CHATML), seed=2, tie=True)
    recipe = {"merge_method": "linear", "models": [str(base), str(chat)]}
    out = hf_merge.merge({**recipe, "tokenizer_source": "union"}, tmp_path / "m").path
    head = weights(out)[HEAD]
    assert torch.equal(head[:SIZE], (weights(base)[HEAD] + weights(chat)[EMBED][:SIZE]) / 2)
    assert torch.equal(head[SIZE:], weights(chat)[EMBED][SIZE:])


# kinds of tokenizers


KINDS = {
    "byte-level BPE": (byte_level_bpe(ENGLISH, 280), byte_level_bpe(ENGLISH, 300)),
    "sentencepiece BPE": (sentencepiece_bpe(ENGLISH, 320), sentencepiece_bpe(RUSSIAN, 320)),
    "WordPiece": (word_piece(ENGLISH, 60), word_piece(RUSSIAN, 60)),
    "Unigram": (
        unigram([("▁", -2.0), ("t", -5.0), ("he", -4.0), ("▁the", -3.0), ("▁cat", -4.0)]),
        unigram([("▁", -2.0), ("к", -5.0), ("от", -4.0), ("▁кот", -3.0)]),
    ),
    "WordLevel": (word_level(["<s>", "</s>", "the", "cat", "sat"]), word_level(["<s>", "</s>", "кот", "the"])),
}


@pytest.mark.parametrize("kind", KINDS)
def test_union_of_every_kind_encodes_as_before_and_loads(make, tmp_path, kind):
    first, second = KINDS[kind]
    a, b = make("a", first), make("b", second, seed=1)
    done = hf_merge.merge([a, b], tmp_path / "m", method="linear", tokenizer_source="union")
    works(done.path)
    assert not done.plan.errors and vocabulary(done.path).keys() == vocabulary(a).keys() | vocabulary(b).keys()
    for folder, text in ((b, "the cat" if kind == "byte-level BPE" else "кот"), (b, RUSSIAN[0])):
        assert pieces(done.path, text) == pieces(folder, text)
    if kind == "byte-level BPE":  # b's merges go on where a's end, so that a's texts are cut as b does
        assert any("occur in texts of" in message for message in messages(done.plan, "warning"))
    else:
        assert pieces(done.path, "the cat sat") == pieces(a, "the cat sat")
    merged, mine, theirs = (weights(folder)[EMBED] for folder in (done.path, a, b))
    for token, i in vocabulary(done.path).items():
        rows = [w[v[token]] for w, v in ((mine, vocabulary(a)), (theirs, vocabulary(b))) if token in v]
        torch.testing.assert_close(merged[i], sum(rows) / len(rows))


def test_class_that_builds_itself_from_the_vocabulary_loads_the_union(make, tmp_path):
    from transformers import LlamaTokenizer

    a, b = make("a", sentencepiece_bpe(ENGLISH, 320)), make("b", also(sentencepiece_bpe(ENGLISH, 320), CHATML), seed=1)
    for folder in (a, b):
        state = json.loads((folder / "tokenizer.json").read_text())
        merges = [tuple(pair) for pair in state["model"]["merges"]]
        tokenizer = LlamaTokenizer(vocab=state["model"]["vocab"], merges=merges)
        tokenizer.add_special_tokens({"additional_special_tokens": list(CHATML)} if folder is b else {})
        tokenizer.save_pretrained(folder)
    out = hf_merge.merge([a, b], tmp_path / "m", method="linear", tokenizer_source="union").path
    _, tokenizer = works(out)
    assert tokenizer.tokenize("the cat<|im_end|>") == [*pieces(a, "the cat"), "<|im_end|>"]


def test_union_that_breaks_a_tokenizer_is_refused_with_a_text_and_the_fix(make, tmp_path):
    a, b = make("english", BPE), make("code", byte_level_bpe(CODE, 300), seed=1)
    plan = hf_merge.plan([a, b], method="linear", tokenizer_source="union")
    broken = messages(plan, "error")
    assert len(broken) == 2 and "The union breaks the tokenizer of" in broken[0] and str(a) in broken[0]
    assert " becomes " in broken[0] and "set tokenizer_source: base, or name the model" in broken[0]
    with pytest.raises(hf_merge.PlanError, match="breaks the tokenizer"):
        hf_merge.merge([a, b], tmp_path / "m", method="linear", tokenizer_source="union")
    assert not (tmp_path / "m").exists()
    works(hf_merge.merge([a, b], tmp_path / "m", method="linear", tokenizer_source="base").path)


def test_union_of_different_kinds_is_refused(make):
    a, b = make("a", BPE), make("b", word_piece(ENGLISH, 60), seed=1)
    plan = hf_merge.plan([a, b], method="linear", tokenizer_source="union")
    assert any("have no union (one is of the kind BPE, the other WordPiece)" in m for m in messages(plan, "error"))


def test_what_a_model_does_otherwise_is_a_warning(make):
    base = make("base", BPE)
    chat = make("chat", also(BPE, CHATML, words=["covid"]), seed=1, eos_token="<|im_end|>")
    plan = hf_merge.plan([base, chat], method="linear", tokenizer_source="union")
    said = "\n".join(messages(plan, "warning"))
    assert not plan.errors and "'covid' becomes ['covid']" in said
    assert "ends its texts with '<|im_end|>', the result with '</s>'" in said


# models without what is needed


def test_model_without_a_tokenizer_is_refused(make, tmp_path):
    a, b = make("a", BPE), make("b", also(BPE, CHATML), seed=1)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (b / name).unlink()
    with pytest.raises(hf_merge.SourceError, match="b' has no tokenizer: save one into its folder"):
        hf_merge.plan([a, b], method="linear", tokenizer_source="union")
    live = LlamaForCausalLM.from_pretrained(a)
    with pytest.raises(hf_merge.SourceError, match="has no tokenizer"):
        hf_merge.plan([a, live], method="linear", tokenizer_source="union")
    (b / "tokenizer.json").write_text("{}")
    with pytest.raises(hf_merge.SourceError, match=r"The tokenizer of '.*b' cannot be loaded"):
        hf_merge.plan([a, b], method="linear", tokenizer_source="union")
    with pytest.raises(hf_merge.SourceError, match="nowhere"):
        hf_merge.plan([a], method="linear", tokenizer_source=str(tmp_path / "nowhere"))


# nothing said of the tokenizer


def test_different_numbers_of_rows_are_an_error_that_names_the_fix(make):
    a, b = make("a", BPE), make("b", also(BPE, CHATML), seed=1)
    found = messages(hf_merge.plan([a, b], method="linear"), "error")
    assert len(found) == 1 and "has another vocabulary than" in found[0] and "tokenizer_source: union" in found[0]
    assert f"{EMBED} [{SIZE + 2}, 16] instead of [{SIZE}, 16]" in found[0] and HEAD in found[0]


def test_other_shapes_are_told_apart_from_vocabularies(make):
    a, b = make("a", BPE), make("b", BPE, seed=1, config={"hidden_size": 32})
    found = messages(hf_merge.plan([a, b], method="linear"), "error")
    assert len(found) == 1 and "has other shapes than" in found[0]


def test_same_number_of_rows_with_other_tokens_is_a_warning(make, tmp_path):
    a = make("a", also(BPE, ["<x>", "<y>"]))
    b = make("b", also(BPE, CHATML), seed=1)
    found = messages(hf_merge.plan([a, b], method="linear"), "warning")
    assert len(found) == 1 and f"'<|im_start|>' instead of '<x>' at {SIZE}: set tokenizer_source" in found[0]
    assert " 2 ids" in found[0]
    c = make("c", BPE, rows=SIZE + 2)
    found = messages(hf_merge.plan([c, b], method="linear"), "warning")
    assert len(found) == 1 and "has 2 tokens that" in found[0] and "'<|im_start|>'" in found[0]
    d = tmp_path / "d"
    shutil.copytree(a, d)
    (d / "tokenizer.json").write_text(json.dumps(json.loads((a / "tokenizer.json").read_text())))  # written otherwise
    (a / "special.txt").write_text("")
    assert hf_merge.plan([a, d], method="linear").problems == ()
    (d / "tokenizer.json").write_text("not JSON")
    assert hf_merge.plan([a, d], method="linear").problems == ()


# chat templates


def chat_template(folder):
    return AutoTokenizer.from_pretrained(folder).chat_template


def test_chat_template_takes_the_place_of_the_donors(make, tmp_path):
    a, b = make("a", BPE, chat_template={"default": "A", "tool_use": "T"}), make("b", BPE, seed=1, chat_template="B")
    for said, template in (("chatml", BUILT_IN["chatml"]), ("{{ messages }}", "{{ messages }}")):
        out = hf_merge.merge([a, b], tmp_path / "m", method="linear", chat_template=said, overwrite=True).path
        assert chat_template(out) == template == (out / "chat_template.jinja").read_text()
        assert not (out / "additional_chat_templates").exists() and (out / "generation_config.json").is_file()
        assert (out / "tokenizer.json").read_bytes() == (a / "tokenizer.json").read_bytes()
    assert "the chat template is the recipe's" in (out / "README.md").read_text()
    config = json.loads((a / "tokenizer_config.json").read_text())
    (a / "tokenizer_config.json").write_text(json.dumps({**config, "chat_template": "older place"}))
    shutil.rmtree(a / "additional_chat_templates")
    (a / "chat_template.jinja").unlink()
    assert chat_template(a) == "older place"
    out = hf_merge.merge([a, b], tmp_path / "m", method="linear", chat_template="llama3", overwrite=True).path
    assert chat_template(out) == BUILT_IN["llama3"]


def test_auto_is_the_most_common_template_the_first_of_equals(make, tmp_path):
    a, b = make("a", BPE, chat_template="A"), make("b", BPE, seed=1, chat_template={"default": "B", "rag": "R"})
    c, d = make("c", BPE, seed=2, chat_template="B"), make("d", BPE, seed=3)
    for models, template in (([a, b, c], "B"), ([a, b], "A"), ([d, a], "A")):
        out = hf_merge.merge(models, tmp_path / "m", method="linear", chat_template="auto", overwrite=True).path
        assert chat_template(out) == template
    united = hf_merge.merge(
        [a, b, c], tmp_path / "m", method="linear", chat_template="auto", tokenizer_source="union", overwrite=True
    ).path
    assert chat_template(united) == "B" and "the chat template is that of most models" in str(
        (united / "README.md").read_text()
    )
    found = messages(hf_merge.plan([d], method="linear", chat_template="auto"), "warning")
    assert found == [
        "warning: None of the models has a chat template, so that chat_template: auto finds none: name one."
    ]


def test_chat_template_of_a_model_without_tokenizer_is_an_error(make):
    a = make("a", BPE)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (a / name).unlink()
    found = messages(hf_merge.plan([a], method="linear", chat_template="chatml"), "error")
    assert len(found) == 1 and "chat_template needs a tokenizer to belong to" in found[0]


# what goes with it


def test_card_says_where_the_tokenizer_comes_from(make, tmp_path):
    a, b = make("a", BPE), make("b", also(BPE, CHATML), seed=1)
    for said, told in (
        ("base", "Config, tokenizer and the set of tensors come from `a`."),
        ("union", "come from `a`; the tokenizer is the union of all models', with the ids of that model first."),
        (str(b), "Config and the set of tensors come from `a`; the tokenizer from `b`."),
    ):
        out = hf_merge.merge([a, b], tmp_path / "m", method="linear", tokenizer_source=said, overwrite=True).path
        card = (out / "README.md").read_text()
        assert told in card and str(tmp_path) not in card
        assert AutoConfig.from_pretrained(out).vocab_size == weights(out)[EMBED].shape[0]


def test_an_input_is_not_overwritten_and_another_tokenizer_is_not_resumed(make, tmp_path):
    from hf_merge.api import _prepare

    a, b = make("a", BPE), make("b", also(BPE, CHATML), seed=1)
    with pytest.raises(hf_merge.OutputError, match="holds the input"):
        hf_merge.merge([a, b], a, method="linear", tokenizer_source="union", overwrite=True)
    prints = [
        [
            source.fingerprint()
            for source in _prepare([a, b], {"method": "linear", **words}, ("cpu", None), "5GB", {})[1]
        ]
        for words in ({"tokenizer_source": "union"}, {"tokenizer_source": "base"}, {})
    ]
    assert len({json.dumps(each) for each in prints}) == 3
