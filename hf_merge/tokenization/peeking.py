"""What the files beside a model's weights say of its tokenizer, read without loading it."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import suppress
from typing import Any

from hf_merge.errors import SourceError
from hf_merge.sources import Source
from hf_merge.sources.checkpoint import Checkpoint
from hf_merge.sources.folder import Folder, read_object

_ALONE, _IN_JSON = "chat_template.jinja", ("chat_template.json", "tokenizer_config.json")


def folder_of(source: Source) -> Folder | None:
    """Return the folder of a model, or of the base of one with adapters; None for a file alone or an object."""
    own = source.parts[0]
    return own.folder if isinstance(own, Checkpoint) and not own.path.is_file() else None


def template_of(source: Source) -> str | None:
    """Return a model's chat template, of several the one called default; None if it has none that can be read."""
    folder = folder_of(source)
    if folder is None:
        return None
    with suppress(SourceError, OSError, UnicodeDecodeError):
        if _ALONE in folder:
            return folder.paths([_ALONE])[0].read_text(encoding="utf-8")
        files = folder.paths([name for name in _IN_JSON if name in folder])
        said = (_text(read_object(path).get("chat_template")) for path in files)
        return next((text for text in said if text), None)
    return None


def _text(said: Any) -> str | None:
    """Read a template: text, or a list of named ones."""
    if isinstance(said, list):
        named = {one.get("name"): one.get("template") for one in said if isinstance(one, Mapping)}
        said = named.get("default") or next(iter(named.values()), None)
    return said if isinstance(said, str) and said else None
