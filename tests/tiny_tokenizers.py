"""Tokenizers of every kind, trained on a few lines in a moment."""

import json
from collections.abc import Callable, Iterable

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

ENGLISH = [
    "the cat sat on the mat and the dog barked at the cat",
    "a house in the woods was warm and the fox was quick",
] * 4
RUSSIAN = ["кошка сидела на ковре и собака лаяла на кошку", "дом в лесу был тёплым и лиса была быстрой"] * 4
CODE = ["def merge(models): return sum(models) / len(models)", "for name in names: print(name, end='')"] * 4


def byte_level_bpe(texts: Iterable[str], size: int) -> Tokenizer:
    """As GPT-2, Qwen and Llama 3."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    special = ["<unk>", "<s>", "</s>"]
    tokenizer.train_from_iterator(
        texts,
        trainers.BpeTrainer(vocab_size=size, special_tokens=special, initial_alphabet=alphabet, show_progress=False),
    )
    return tokenizer


def sentencepiece_bpe(texts: Iterable[str], size: int) -> Tokenizer:
    """As Llama 2 and Mistral: characters, and bytes for those that are unknown."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True, unk_token="<unk>", fuse_unk=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    special = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256))]
    tokenizer.train_from_iterator(
        texts, trainers.BpeTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    )
    return _with_markup_only(tokenizer)


def word_piece(texts: Iterable[str], size: int) -> Tokenizer:
    """As BERT."""
    tokenizer = Tokenizer(models.WordPiece(unk_token="[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.BertNormalizer(), pre_tokenizers.BertPreTokenizer()
    tokenizer.decoder = decoders.WordPiece()
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    trainer = trainers.WordPieceTrainer(vocab_size=size, special_tokens=special, show_progress=False)
    tokenizer.train_from_iterator(texts, trainer)
    tokenizer.post_processor = processors.BertProcessing(("[SEP]", 3), ("[CLS]", 2))
    return tokenizer


def unigram(pieces: Iterable[tuple[str, float]]) -> Tokenizer:
    """As T5 and XLM-R."""
    special = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0)]
    tokenizer = Tokenizer(models.Unigram([*special, *pieces], unk_id=2))
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    tokenizer.add_special_tokens([token for token, _ in special])
    return tokenizer


def word_level(words: Iterable[str]) -> Tokenizer:
    """A number for each word."""
    tokenizer = Tokenizer(models.WordLevel({w: i for i, w in enumerate(["<unk>", *words])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return tokenizer


def also(tokenizer: Tokenizer, special: Iterable[str] = (), words: Iterable[str] = ()) -> Tokenizer:
    """Return a copy with further added tokens."""
    copy = Tokenizer.from_str(tokenizer.to_str())
    copy.add_special_tokens(list(special))
    copy.add_tokens(list(words))
    return copy


def edited(tokenizer: Tokenizer, edit: Callable[[dict], object]) -> Tokenizer:
    """Return a copy whose tokenizer.json was edited."""
    state = json.loads(tokenizer.to_str())
    edit(state)
    return Tokenizer.from_str(json.dumps(state))


def _with_markup_only(tokenizer: Tokenizer) -> Tokenizer:
    """Bytes are pieces, not added tokens."""

    def edit(state: dict) -> None:
        state["added_tokens"] = [t for t in state["added_tokens"] if not t["content"].startswith("<0x")]

    return edited(tokenizer, edit)
