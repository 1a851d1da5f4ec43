"""YAML into plain data, with the line of every key."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any

import yaml

from hf_merge.errors import RecipeError

MAX_BYTES = 1 << 20
MAX_NODES = 100_000
MAX_DEPTH = 50
MAX_WORD = 10_000


_BEYOND_REASON = "The recipe is nested or repeated beyond reason (aliases count as often as they occur)."


class _Loader(yaml.SafeLoader):
    """SafeLoader that reads `1e-5` as a number, as YAML 1.2 and MergeKit's users do.

    It gives up on what is no recipe before it has read all of it.
    """

    def __init__(self, text: str):
        super().__init__(text)
        self._nodes = self._depth = 0

    def compose_node(self, parent: Any, index: Any) -> Any:
        self._nodes += 1
        if self._nodes > MAX_NODES or self._depth > MAX_DEPTH:
            raise RecipeError(_BEYOND_REASON)
        self._depth += 1
        node = super().compose_node(parent, index)
        self._depth -= 1
        if isinstance(node, yaml.ScalarNode) and len(node.value) > MAX_WORD:
            line = node.start_mark.line + 1
            raise RecipeError(f"line {line}: a value has {len(node.value)} characters, beyond reason.")
        return node


_Loader.add_implicit_resolver(
    "tag:yaml.org,2002:float",
    re.compile(r"^[-+]?(\d+(\.\d*)?|\.\d+)[eE][-+]?\d+$"),
    list("-+.0123456789"),
)


Lines = Mapping[tuple[Any, ...], int]
"""For every key's path, such as ("models", 0, "model"), its line, counted from 1."""
Document = tuple[dict[str, Any], Lines]


def load_documents(text: str, name: str = "recipe") -> list[Document]:
    """Read the mappings of a YAML (or JSON) text: one, or several separated by `---`.

    Args:
        text: the documents.
        name: how errors call them.

    Returns:
        The data of each, and the line of every key.

    Raises:
        RecipeError: not YAML mappings, a key twice, or too large to be a recipe.
    """
    if len(text) > MAX_BYTES:
        raise RecipeError(f"'{name}' has more than {MAX_BYTES} characters; a recipe has a few thousand.")
    try:
        return _read(text, name)
    except RecipeError:
        raise
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        place = f"line {mark.line + 1}: " if mark else ""
        raise RecipeError(f"'{name}' is not YAML: {place}{getattr(error, 'problem', None) or error}.") from None
    except (LookupError, ValueError, TypeError, AttributeError, ArithmeticError) as error:
        # what PyYAML raises where a tag (!!bool, !!timestamp, ...) does not fit its value
        raise RecipeError(f"'{name}' cannot be read: a value does not fit its tag ({error}).") from None


def _read(text: str, name: str) -> list[Document]:
    loader = _Loader(text)
    found: list[Document] = []
    seen = [0]
    try:
        while loader.check_node():
            root = loader.get_node()
            lines = dict(_lines(root, (), seen)) if isinstance(root, yaml.MappingNode) else {}
            data = loader.construct_document(root) if lines else None
            if isinstance(data, dict):
                found.append((data, lines))
            elif not isinstance(root, yaml.ScalarNode) or root.value.strip() not in ("", "null", "~"):
                found.clear()
                break
    finally:
        loader.dispose()
    if not found:
        raise RecipeError(f"'{name}' is not a recipe: it should be a mapping that begins with `merge_method:`.")
    return found


def _lines(node: yaml.Node, path: tuple[Any, ...], seen: list[int]) -> Iterator[tuple[tuple[Any, ...], int]]:
    """Walk the nodes (an alias as often as it occurs, so that its expansion is bounded too)."""
    seen[0] += 1
    if seen[0] > MAX_NODES or len(path) > MAX_DEPTH:
        raise RecipeError(_BEYOND_REASON)
    if isinstance(node, yaml.SequenceNode):
        for i, child in enumerate(node.value):
            yield (*path, i), child.start_mark.line + 1
            yield from _lines(child, (*path, i), seen)
    elif isinstance(node, yaml.MappingNode):
        keys: set[str] = set()
        for key, child in node.value:
            if not isinstance(key, yaml.ScalarNode):
                raise RecipeError(f"line {key.start_mark.line + 1}: a key should be a word.")
            if key.value in keys:
                raise RecipeError(f"line {key.start_mark.line + 1}: '{key.value}' is given twice.")
            keys.add(str(key.value))
            yield (*path, key.value), key.start_mark.line + 1
            yield from _lines(child, (*path, key.value), seen)
