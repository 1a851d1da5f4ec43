"""The union of tokenizers: ids, merges, scores, and the proof that texts are cut as before."""

import json

import pytest
from tokenizers import Tokenizer

from hf_merge.tokenization import union
from tests.tiny_tokenizers import (
    CODE,
    ENGLISH,
    RUSSIAN,
    also,
    byte_level_bpe,
    edited,
    sentencepiece_bpe,
    unigram,
    word_level,
    word_piece,
)


def state(tokenizer: Tokenizer) -> dict:
    return json.loads(tokenizer.to_str())


def unite(*tokenizers: Tokenizer) -> Tokenizer:
    """The union as the library reads it, which must number the tokens as we do."""
    states = [state(tokenizer) for tokenizer in tokenizers]
    made = union.unite(states)
    read = Tokenizer.from_str(json.dumps(made))
    assert read.get_vocab() == union.vocabulary_of(made)
    assert set(read.get_vocab()) == set().union(*(t.get_vocab() for t in tokenizers))
    first = tokenizers[0].get_vocab()
    assert {token: read.get_vocab()[token] for token in first} == first
    return read


def changes(before: Tokenizer, after: Tokenizer) -> list[union.Change]:
    return union.changes(state(before), state(after))


def cut(tokenizer: Tokenizer, text: str) -> list[str]:
    return tokenizer.encode(text, add_special_tokens=False).tokens


KINDS = {
    "byte-level BPE": byte_level_bpe(ENGLISH, 300),
    "sentencepiece BPE": sentencepiece_bpe(ENGLISH, 310),
    "WordPiece": word_piece(ENGLISH, 60),
    "Unigram": unigram([("▁", -2.0), ("a", -3.0), ("b", -3.5), ("▁ab", -2.5)]),
    "WordLevel": word_level(["a", "b", "c"]),
}


@pytest.mark.parametrize("kind", KINDS)
def test_added_tokens_of_several_models_stand_side_by_side(kind):
    base = KINDS[kind]
    chat, think = also(base, ["<|im_start|>", "<|im_end|>"]), also(base, ["<think>", "<|im_start|>"])
    made = unite(base, chat, think)
    size = base.get_vocab_size()
    assert [made.token_to_id(t) for t in ("<|im_start|>", "<|im_end|>", "<think>")] == [size, size + 1, size + 2]
    for part in (base, chat, think):
        assert changes(part, made) == []
        assert cut(part, "a cat b") == cut(made, "a cat b")
    assert cut(made, "<|im_start|>a<think>")[0] == "<|im_start|>" and cut(made, "a<think>")[-1] == "<think>"
    assert made.decode(made.encode("<think>").ids, skip_special_tokens=True) == ""  # still special


@pytest.mark.parametrize("kind", KINDS)
def test_union_with_itself_changes_nothing(kind):
    one = state(KINDS[kind])
    assert union.unite([one, one]) == one


@pytest.mark.parametrize("make", [byte_level_bpe, sentencepiece_bpe, word_piece])
def test_tokenizer_that_another_extends_gives_way_to_it(make):
    sizes = (40, 60) if make is word_piece else (285, 305)
    short, long = make(ENGLISH, sizes[0]), make(ENGLISH, sizes[1])
    for parts in ((short, long), (long, short)):
        made = unite(*parts)
        assert union.is_like(state(made), state(long)) and union.is_begun_by(state(long), state(short))
        assert changes(long, made) == [] and changes(short, made) != []
        for text in ENGLISH:
            assert cut(made, text) == cut(long, text)
    assert not union.is_begun_by(state(short), state(long))


def test_merges_of_different_texts_follow_each_other_and_break_each_other():
    english, code = byte_level_bpe(ENGLISH, 300), byte_level_bpe(CODE, 300)
    made = unite(english, code)
    merges = [tuple(pair) for pair in state(made)["model"]["merges"]]
    first = [tuple(pair) for pair in state(english)["model"]["merges"]]
    assert merges[: len(first)] == first and len(merges) == len(set(merges)) > len(first)
    for part in (english, code):
        found = changes(part, made)[0]
        assert cut(part, found.text) == list(found.before) != list(found.after) == cut(made, found.text)
        assert not union.is_added(found, state(part), state(made)) and not union.is_like(state(made), state(part))
        assert found.text in str(found)


@pytest.mark.parametrize(("make", "size"), [(sentencepiece_bpe, 320), (word_piece, 60)])
def test_scripts_that_share_no_letters_do_not_disturb_each_other(make, size):
    english, russian = make(ENGLISH, size), make(RUSSIAN, size)
    made = unite(english, russian)
    assert changes(english, made) == [] and changes(russian, made) == []
    for part, text in ((english, ENGLISH[0]), (russian, RUSSIAN[0])):
        assert cut(part, text) == cut(made, text)


def test_unigram_pieces_keep_their_scores_and_shared_ones_those_of_the_first():
    base = also(unigram([("▁", -2.0), ("a", -3.0), ("▁a", -2.5)]), ["<extra>"])
    other = unigram([("▁", -1.0), ("ж", -3.0), ("▁ж", -1.5)])
    scores = dict(state(unite(base, other))["model"]["vocab"])
    assert (scores["▁"], scores["a"], scores["ж"], scores["▁ж"]) == (-2.0, -3.0, -3.0, -1.5)
    assert changes(base, unite(base, other)) == [] == changes(other, unite(base, other))
    worse = unigram([("▁", -1.0), ("ж", -0.1), ("▁ж", -2.5)])  # alone it cuts ▁ ж, at -1.1
    dear = unigram([("▁", -9.0), ("a", -3.0)])  # where ▁ is dear, ▁ж is cheaper
    found = changes(worse, unite(dear, worse))
    assert found and (found[0].before, found[0].after) == (("▁", "ж"), ("▁ж",))


def test_words_of_word_level_are_exact():
    english, other = word_level(["a", "b"]), word_level(["c", "a"])
    made = unite(english, other)
    assert made.get_vocab() == {"<unk>": 0, "a": 1, "b": 2, "c": 3}
    assert changes(english, made) == [] == changes(other, made)


def test_added_word_is_found_in_the_texts_of_others_and_told_apart_from_merges():
    base = KINDS["byte-level BPE"]
    medical = also(base, words=["covid", "<tool_call>"])
    made = unite(base, medical)
    found = changes(base, made)
    assert found[0].text == "covid" and union.is_added(found[0], state(base), state(made))
    assert changes(medical, made) == [] and all("tool" not in change.text for change in found)


def test_ids_with_gaps_and_added_tokens_below_pieces_keep_their_places():
    base = also(KINDS["byte-level BPE"], ["<a>"])
    gaps = edited(base, lambda s: s["model"]["vocab"].update({"<a>": 400}) or s["added_tokens"][-1].update(id=400))
    assert gaps.token_to_id("<a>") == 400
    made = unite(gaps, also(byte_level_bpe(ENGLISH, 310), ["<b>"]))
    new = [token for token in made.get_vocab() if token not in gaps.get_vocab()]
    assert {made.token_to_id(token) for token in new} == set(range(401, 401 + len(new))) and "<b>" in new


def test_further_tokens_are_added_after_all_others():
    plain = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False, "special": False}
    made = union.unite([state(KINDS["WordLevel"])], [{"content": "<new>", **plain}])
    assert union.vocabulary_of(made)["<new>"] == 4
    assert cut(Tokenizer.from_str(json.dumps(made)), "a<new>b") == ["a", "<new>", "b"]


def test_what_has_no_union_says_so():
    bpe, pieces = state(KINDS["byte-level BPE"]), state(KINDS["WordPiece"])
    assert union.cannot_be_united(bpe, pieces) == "one is of the kind BPE, the other WordPiece"
    assert union.cannot_be_united(bpe, bpe) is None


def test_added_tokens_defined_twice_are_conflicts_and_the_first_holds():
    base = also(KINDS["byte-level BPE"], ["<x>", "<y>"])
    other = edited(base, lambda s: s["added_tokens"][-1].update(lstrip=True))
    assert union.conflicts(state(base), state(other)) == ("<y>",)
    assert not state(unite(base, other))["added_tokens"][-1]["lstrip"]
    assert state(unite(other, base))["added_tokens"][-1]["lstrip"]


def test_truncation_and_padding_of_a_tokenizer_do_not_count():
    base = KINDS["WordPiece"]
    short = Tokenizer.from_str(base.to_str())
    short.enable_truncation(2)
    short.enable_padding(length=9)
    assert changes(short, base) == [] == changes(base, short)


def test_another_pre_tokenizer_is_found_out():
    base = KINDS["byte-level BPE"]
    glued = edited(base, lambda s: s["pre_tokenizer"].update(use_regex=False))
    merged = edited(glued, lambda s: s["model"]["merges"].append(["t", "Ġ"]) or s["model"]["vocab"].update({"tĠ": 500}))
    assert changes(merged, unite(base, merged))
