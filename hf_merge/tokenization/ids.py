"""Token ids in config.json and generation_config.json, and the size of the vocabulary there."""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

_IDS = re.compile(r"(^|_)token_(ids?|index)$|^(begin_)?suppress_tokens$|^bad_words_ids$|^sequence_bias$")
_ENDS = ("bos_token_id", "eos_token_id", "pad_token_id")
"""Ids that a tokenizer's own model knows best."""


def renumbered(config: Mapping[str, Any], ids: Mapping[int, int], own: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config with the ids of another vocabulary, in nested configs too.

    Args:
        config: its keys that end in `token_id`, `token_ids` or `token_index` hold ids.
        ids: old id to new id. An id that is not in it is dropped from lists, and becomes None alone.
        own: bos, eos and pad as the model says that the tokenizer comes from; they win.
    """
    done: dict[str, Any] = {}
    for key, value in config.items():
        if key in _ENDS and own.get(key) is not None:
            done[key] = own[key]
        elif _IDS.search(key):
            done[key] = _moved(value, ids)
        else:
            done[key] = renumbered(value, ids, own) if isinstance(value, Mapping) else value
    return done


def _moved(value: Any, ids: Mapping[int, int]) -> Any:
    if isinstance(value, (list, tuple)):
        return [moved for part in value if (moved := _moved(part, ids)) is not None]
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:  # -1 stands for no token
        return value
    return ids.get(value)


def lost(before: Mapping[str, Any], after: Mapping[str, Any]) -> tuple[str, ...]:
    """Name the keys that had an id and have none after `renumbered`."""
    keys = [key for key, value in before.items() if _IDS.search(key) and value is not None and after.get(key) is None]
    nested = [(value, after[key]) for key, value in before.items() if isinstance(value, Mapping)]
    return (*keys, *(key for pair in nested for key in lost(*pair)))


def with_vocab_size(config: Mapping[str, Any], sizes: Mapping[int, int]) -> dict[str, Any]:
    """Return a config with the true size of the vocabulary, in nested configs too.

    Args:
        config: the content of config.json.
        sizes: rows of the vocabulary's tensors before, with those after.
    """
    done: dict[str, Any] = {}
    for key, value in config.items():
        if isinstance(value, Mapping):
            done[key] = with_vocab_size(value, sizes)
        else:
            done[key] = sizes.get(value, value) if key == "vocab_size" and isinstance(value, int) else value
    return done


def ends_of(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return bos, eos and pad of a config, or of the text model in it."""
    inner = config.get("text_config")
    nested = inner if isinstance(inner, Mapping) else {}
    return {key: value for key in _ENDS if (value := config.get(key, nested.get(key))) is not None}
