"""One tokenizer for several models: the union of theirs, and the proof that each still cuts its texts as before.

Works on what tokenizer.json holds. Ids of the first tokenizer stay; what the others have more follows, in their order.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

State = dict[str, Any]

PROBES = 3000
"""Texts of each kind that are tried, spread evenly over the vocabulary."""

_PER_SENTENCE = 8
_BYTE = re.compile(r"<0x[0-9A-F]{2}>")
_WORD = re.compile(r"\s*\w+\s*")
_APART = 7919  # a prime: pairs up tokens from all over the vocabulary


@dataclass(frozen=True)
class Change:
    """A text that is cut otherwise than before."""

    text: str
    before: tuple[str, ...]
    after: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.text!r} becomes {list(self.after)} instead of {list(self.before)}"


def vocabulary_of(state: State) -> dict[str, int]:
    """Return every token with its id, added tokens among them."""
    return {**_pieces(state), **{token["content"]: token["id"] for token in state["added_tokens"]}}


def united_ids(vocabularies: Sequence[Mapping[str, int]], extra: Iterable[str] = ()) -> dict[str, int]:
    """Number the tokens of several vocabularies: the first keeps its ids, new tokens follow in the order of theirs."""
    ids = dict(vocabularies[0])
    others = [sorted(vocabulary, key=lambda token, of=vocabulary: of[token]) for vocabulary in vocabularies[1:]]
    for tokens in (*others, extra):
        new = [token for token in dict.fromkeys(tokens) if token not in ids]
        ids.update(zip(new, count(max(ids.values(), default=-1) + 1)))
    return ids


def unite(states: Sequence[State], extra: Sequence[Mapping[str, Any]] = ()) -> State:
    """Return the union of tokenizers of one kind.

    Args:
        states: contents of their tokenizer.json; everything but vocabulary, merges and added tokens is the first's.
        extra: further added tokens, as tokenizer.json has them but for the id.
    """
    first = states[0]
    ids = united_ids([vocabulary_of(state) for state in states], [token["content"] for token in extra])
    added: dict[str, Any] = {}
    for token in (*(token for state in states for token in state["added_tokens"]), *extra):
        added.setdefault(token["content"], {**token, "id": ids[token["content"]]})  # the first definition holds
    model = dict(first["model"])
    if not _numbered_by_library(first, ids, added):
        model["vocab"] = _listed(states, ids) if isinstance(model["vocab"], list) else _by_id(ids)
    if "merges" in model:
        model["merges"] = united_merges([_merges(state) for state in states])
    return {**first, "model": model, "added_tokens": sorted(added.values(), key=lambda token: token["id"])}


def _numbered_by_library(first: State, ids: Mapping[str, int], added: Mapping[str, Any]) -> bool:
    """Tell whether the library gives new added tokens the wanted ids: all that is new is added, and without gaps.

    Otherwise they are pieces of the model too, which fixes their ids; as they are matched first, nothing else changes.
    """
    pieces = _pieces(first)
    outside = sorted(i for token, i in ids.items() if token not in pieces)
    only_added = all(token in pieces or token in added for token in ids)
    return only_added and outside == list(range(len(pieces), len(pieces) + len(outside)))


def _by_id(ids: Mapping[str, int]) -> dict[str, int]:
    return dict(sorted(ids.items(), key=lambda item: item[1]))


def _listed(states: Sequence[State], ids: Mapping[str, int]) -> list[list[Any]]:
    """Return Unigram's pieces with their scores, in the order of their ids; a piece has the score of the first."""
    scores: dict[str, float] = {}
    for state in states:
        for piece, score in state["model"]["vocab"]:
            scores.setdefault(piece, score)
    lowest = min(scores.values(), default=0.0)
    by_id = {i: token for token, i in ids.items()}
    tokens = [by_id.get(i, f"<unused {i}>") for i in range(max(by_id) + 1)]
    return [[token, scores.get(token, lowest)] for token in tokens]


def united_merges(merges: Sequence[Sequence[tuple[str, str]]]) -> list[list[str]]:
    """Return the merges of all: the longest list if it begins with the others, else one after the other."""
    found: dict[tuple[str, str], None] = {}
    for rules in sorted(merges, key=len, reverse=True) if _is_chain(merges) else merges:
        found.update(dict.fromkeys(rules))
    return [list(pair) for pair in found]


def _is_chain(merges: Sequence[Sequence[tuple[str, str]]]) -> bool:
    longest = max(merges, key=len)
    return all(list(rules) == list(longest[: len(rules)]) for rules in merges)


def _merges(state: State) -> list[tuple[str, str]]:
    pairs = (merge.split(" ") if isinstance(merge, str) else merge for merge in state["model"].get("merges") or ())
    return [(left, right) for left, right in pairs]


def _pieces(state: State) -> dict[str, int]:
    vocab = state["model"]["vocab"]
    return {piece: i for i, (piece, _) in enumerate(vocab)} if isinstance(vocab, list) else dict(vocab)


def cannot_be_united(first: State, other: State) -> str | None:
    """Say why two tokenizers have no union: they are of different kinds."""
    kinds = [state["model"]["type"] for state in (first, other)]
    return f"one is of the kind {kinds[0]}, the other {kinds[1]}" if kinds[0] != kinds[1] else None


def conflicts(first: State, other: State) -> tuple[str, ...]:
    """Name the added tokens that two tokenizers define differently."""
    mine = {token["content"]: {**token, "id": None} for token in first["added_tokens"]}
    theirs = {token["content"]: {**token, "id": None} for token in other["added_tokens"]}
    return tuple(token for token in theirs if token in mine and mine[token] != theirs[token])


def is_begun_by(longer: State, shorter: State) -> bool:
    """Tell whether one tokenizer is another with more pieces and, after the other's, more merges."""
    rules, begin = _merges(longer), _merges(shorter)
    if isinstance(longer["model"]["vocab"], list):
        scores, theirs = dict(longer["model"]["vocab"]), dict(shorter["model"]["vocab"])
        return all(scores.get(piece) == score for piece, score in theirs.items())
    return rules[: len(begin)] == begin and _pieces(shorter).keys() <= vocabulary_of(longer).keys()


def changes(before: State, after: State, backends: tuple[Any, Any] | None = None) -> list[Change]:
    """Return texts of a tokenizer's own tokens that another one cuts otherwise, the shortest first.

    The texts are its tokens, pairs of them, sentences of them, and what the other has tokens for. A text counts if
    the tokenizer can write it with tokens that are whole characters: no bytes of characters that it does not know.

    Args:
        before, after: contents of their tokenizer.json.
        backends: the same as `tokenizers.Tokenizer`, if they are loaded already.
    """
    with _unlimited(*(backends or map(_tokenizer, (before, after)))) as (old, new):
        texts, broken = _decoded(old, before)
        foreign = new.decode_batch([[i] for i in _foreign_words(before, after)], skip_special_tokens=False)
        probes = dict.fromkeys([*_own_probes(old, texts), *_spread(foreign)])
        probes = [text for text in probes if text and "\ufffd" not in text]
        encoded = [tokenizer.encode_batch(probes, add_special_tokens=False) for tokenizer in (old, new)]
    found = [
        Change(text, tuple(left.tokens), tuple(right.tokens))
        for text, left, right in zip(probes, *encoded, strict=True)
        if left.tokens != right.tokens and broken.isdisjoint(left.ids)
    ]
    return sorted(found, key=lambda change: len(change.text))


def must_agree(before: State, after: State) -> bool:
    """Tell whether a tokenizer cuts its texts as another does without trying: nothing but markup was added."""
    parts = ("model", "normalizer", "pre_tokenizer")
    same = all(before[part] == after[part] for part in parts)
    mine = {token["content"]: token for token in before["added_tokens"]}
    kept = all(token == mine[token["content"]] for token in after["added_tokens"] if token["content"] in mine)
    return same and kept and not _foreign_words(before, after)


def _foreign_words(before: State, after: State) -> list[int]:
    """Return the ids of tokens that a tokenizer lacks, and that may occur in its texts: `<|im_start|>` does not."""
    known = vocabulary_of(before)
    added = {token["content"]: token["special"] for token in after["added_tokens"]}
    markup = {token for token, special in added.items() if special or not _WORD.fullmatch(token)}
    return [i for token, i in vocabulary_of(after).items() if token not in known and token not in markup]


def is_added(change: Change, before: State, after: State) -> bool:
    """Tell whether a change comes from added tokens alone, which are matched wherever they occur."""
    known, added = vocabulary_of(before), {token["content"] for token in after["added_tokens"]}
    new = {token for token in change.after if token not in known}
    return bool(new) and new <= added


def _tokenizer(state: State) -> Any:
    from tokenizers import Tokenizer

    return Tokenizer.from_str(json.dumps(state))


@contextmanager
def _unlimited(*tokenizers: Any) -> Iterator[tuple[Any, ...]]:
    """Let tokenizers neither truncate nor pad for a while."""
    limits = [(tokenizer.truncation, tokenizer.padding) for tokenizer in tokenizers]
    for tokenizer in tokenizers:
        tokenizer.no_truncation()
        tokenizer.no_padding()
    try:
        yield tokenizers
    finally:
        for tokenizer, (truncation, padding) in zip(tokenizers, limits, strict=True):
            _ = truncation and tokenizer.enable_truncation(**truncation)
            _ = padding and tokenizer.enable_padding(**padding)


def _decoded(tokenizer: Any, state: State) -> tuple[dict[int, str], set[int]]:
    """Return the text of every token that is one by itself, and the ids of all others and of the unknown token."""
    vocabulary = vocabulary_of(state)
    ids = sorted(vocabulary.values())
    texts = dict(zip(ids, tokenizer.decode_batch([[i] for i in ids], skip_special_tokens=False), strict=True))
    model = state["model"]
    unknown = model.get("unk_id", vocabulary.get(model.get("unk_token") or ""))
    blank = {i for token, i in vocabulary.items() if not token.strip("\u2581\u0120 ")}  # spaces decode to nothing
    broken = {i for i, text in texts.items() if ("\ufffd" in text or not text) and i not in blank}
    broken |= set() if unknown is None else {unknown}
    broken |= {i for token, i in vocabulary.items() if model.get("byte_fallback") and _BYTE.fullmatch(token)}
    return {i: text for i, text in texts.items() if i not in broken}, broken


def _own_probes(tokenizer: Any, texts: Mapping[int, str]) -> Iterator[str]:
    """Yield texts made of a tokenizer's own tokens: each alone, in pairs, in sentences."""
    ids = list(texts)
    yield from _spread(list(texts.values()))
    pairs = [[i, ids[(place * _APART + 1) % len(ids)]] for place, i in enumerate(ids)]
    yield from tokenizer.decode_batch(_spread(pairs), skip_special_tokens=False)
    words = _spread([text for text in texts.values() if text.strip()])
    yield from (" ".join(words[i : i + _PER_SENTENCE]) for i in range(0, len(words), _PER_SENTENCE))


def _spread(items: list[Any]) -> list[Any]:
    """Return at most PROBES of a list, evenly spread."""
    return items[:: -(-len(items) // PROBES)] if len(items) > PROBES else items


def is_like(one: State, other: State) -> bool:
    """Tell whether two tokenizers cut alike but for added tokens."""
    special = {token["content"] for state in (one, other) for token in state["added_tokens"]}
    pieces = [_pieces(state).keys() - special for state in (one, other)]
    return pieces[0] == pieces[1] and _merges(one) == _merges(other)
