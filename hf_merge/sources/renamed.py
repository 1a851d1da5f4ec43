"""A source under other names."""

from __future__ import annotations

import re
from collections.abc import Mapping
from functools import partial

from hf_merge.errors import SourceError
from hf_merge.sources.base import Source
from hf_merge.sources.view import Made, View


def renamed(source: Source, names: Mapping[str, str]) -> View:
    """Show some tensors of a source under other names, and nothing else.

    Args:
        source: where the tensors come from.
        names: for each name here the name there.
    """
    made = {
        new: Made(source.specs[old], partial(source.__getitem__, old), reads=(old,), mapped=True)
        for new, old in names.items()
    }
    return View(source, made, hidden=frozenset(source.specs))


def remapped(source: Source, patterns: Mapping[str, str]) -> Source:
    """Rename tensors by regular expressions, one after the other.

    Args:
        source: where the tensors come from.
        patterns: regular expressions, and what to put in the place of every match.

    Raises:
        SourceError: a replacement that does not fit its expression, or two tensors with one name.
    """
    names: dict[str, str] = {}
    for old in source.specs:
        new = old
        for pattern, replacement in patterns.items():
            try:
                new = re.sub(pattern, replacement, new)
            except re.error as error:
                raise SourceError(f"remap: '{replacement}' cannot replace '{pattern}': {error}.") from None
        if new in names:
            raise SourceError(f"remap: '{names[new]}' and '{old}' of '{source.label}' would both be called '{new}'.")
        names[new] = old
    return source if all(new == old for new, old in names.items()) else renamed(source, names)
