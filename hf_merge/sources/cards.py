"""What the card beside a model says of it: untrusted text, of which only what is well formed is kept."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils import validate_repo_id

from hf_merge.errors import RecipeError
from hf_merge.yaml_lines import MAX_BYTES, load_documents

CARD = "README.md"
MAX_ITEMS = 200
"""Of a list; the longest list of languages on real cards has about 180."""

_WANTED = {
    "license", "license_name", "license_link", "language", "datasets", "base_model", "base_model_relation", "tags"
}  # fmt: skip
_FRONT_MATTER = re.compile(r"\s*---[ \t]*\r?\n(.*?)\r?\n---[ \t]*(?:\r?\n|$)", re.DOTALL)
_BLOCK = re.compile(r"^(?=[A-Za-z_][\w -]*:)", re.MULTILINE)
_ODD_LINE = re.compile(r"^(?![A-Za-z_][\w -]*:|[#\]}-])(?=\S)", re.MULTILINE)
_LANGUAGE = re.compile(r"[a-zA-Z]{2,3}(-[a-zA-Z0-9]{1,8}){0,3}|code|multilingual")
_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]{0,95}")
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9 .+_()-]{0,95}")
_FILE = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,95}")
_URL = re.compile(r"https?://[A-Za-z0-9.-]+(/[A-Za-z0-9./_~%?=#&+-]*)?")
_UNREADABLE = "unreadable"


def read_card(folder: Path, public_id: str | None = None) -> ModelCardData | None:
    """Read the front matter of a model's card.

    Args:
        folder: where README.md lies.
        public_id: of the model, to find a licence's text that lies beside it.

    Returns:
        `license` (a list), `license_name`, `license_link`, `language`, `datasets`, `base_model`,
        `base_model_relation` and `tags`, as far as they are there and well formed; a licence that is not is
        `unreadable`. None if there is no card, or no front matter in it.
    """
    text = _front_matter(folder / CARD)
    if text is None:
        return None
    try:
        said = load_documents(text, CARD)[0][0] if text else {}
    except (RecipeError, RecursionError):
        return ModelCardData(license=[_UNREADABLE])  # type: ignore[arg-type]
    languages = ["no" if one is False else one for one in _several(said.get("language"))]  # YAML's no is Norwegian
    return ModelCardData(
        license=_licences(said.get("license")),  # type: ignore[arg-type]
        license_name=next(_matching(_NAME, said.get("license_name")), None),
        license_link=_link(said.get("license_link"), public_id),
        language=_listed(_matching(_LANGUAGE, languages)),
        datasets=_listed(filter(is_repo, _words(said.get("datasets")))),
        base_model=_listed(filter(is_repo, _words(said.get("base_model")))),
        base_model_relation=next(_matching(_ID, said.get("base_model_relation")), None),
        tags=_listed(_matching(_NAME, said.get("tags"))),
    )


def _front_matter(path: Path) -> str | None:
    """Return the lines of the front matter that are wanted: what a card says of results may be very long."""
    try:
        with path.open(encoding="utf-8-sig", errors="replace") as file:
            found = _FRONT_MATTER.match(file.read(4 * MAX_BYTES))
    except OSError:
        return None
    if found is None:
        return None
    if _ODD_LINE.search(found[1]):
        return found[1]
    blocks = _BLOCK.split(found[1])
    return "\n".join(block.rstrip("\n") for block in blocks if block.partition(":")[0].rstrip() in _WANTED)


def _words(value: Any) -> Iterator[str]:
    """Yield what is text, of one value or a list."""
    return (one.strip() for one in _several(value)[:MAX_ITEMS] if isinstance(one, str))


def _several(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]


def _matching(pattern: re.Pattern[str], value: Any) -> Iterator[str]:
    return (word for word in _words(value) if pattern.fullmatch(word))


def _listed(words: Iterator[str]) -> list[str] | None:
    return list(dict.fromkeys(words)) or None


def _licences(value: Any) -> list[str] | None:
    """Return what stands for licences, each as an id or as `unreadable`; nothing if nothing is said."""
    if value is None or value == []:
        return None
    said = _several(value)
    words = [one.strip().lower() if isinstance(one, str) else "" for one in said[:MAX_ITEMS]]
    read = [word if _ID.fullmatch(word) else _UNREADABLE for word in words]
    return list(dict.fromkeys([*read, *([_UNREADABLE] if len(said) > MAX_ITEMS else [])]))


def _link(value: Any, public_id: str | None) -> str | None:
    """Return the address of a licence's text; a file beside the model has one if the model is on the Hub."""
    word = next(_words(value), "")
    if _URL.fullmatch(word) and len(word) <= 300:
        return word
    return f"https://huggingface.co/{public_id}/blob/main/{word}" if public_id and _FILE.fullmatch(word) else None


def is_repo(word: str) -> bool:
    """Tell whether a word can be an id on the Hub and is no path on this machine."""
    try:
        validate_repo_id(word)
    except HFValidationError:
        return False
    return word.isascii() and not os.path.exists(word)
