"""A source under other names."""

from __future__ import annotations

import re
from collections.abc import Mapping

from torch import Tensor

from hf_merge.errors import SourceError
from hf_merge.sources.base import Source, View


class Renamed(View):
    """A source whose tensors have other names; those that are not named are hidden.

    Args:
        source: where the tensors come from.
        names: for each name here the name there.
    """

    def __init__(self, source: Source, names: Mapping[str, str]):
        super().__init__(source)
        self._names = names
        self.specs = {name: source.specs[old] for name, old in names.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self.source[self._names[name]]

    def bytes_read(self, name: str) -> int:
        return self.source.bytes_read(self._names[name])

    def bytes_held(self, name: str) -> int:
        return self.source.bytes_held(self._names[name])


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
    return source if all(new == old for new, old in names.items()) else Renamed(source, names)
