"""A model's tokenizer, loaded from what lies beside its weights."""

from __future__ import annotations

import json
import re
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from hf_merge import _compat
from hf_merge.errors import SourceError
from hf_merge.sources import Source, download
from hf_merge.sources.folder import read_json
from hf_merge.tokenization.union import vocabulary_of
from hf_merge.types import InMemory, Ref

GENERATION = "generation_config.json"
_TEMPLATES = ("chat_template.jinja", "chat_template.json", "additional_chat_templates")
_FILES = {
    "tokenizer.json", "tokenizer_config.json", "special_tokens_map.json", "added_tokens.json", "vocab.json",
    "merges.txt", "vocab.txt", "tokenizer.model", "spiece.model", "sentencepiece.bpe.model", "sentencepiece.model",
    "spm.model", "spm_char.model", "source.spm", "target.spm", "target_vocab.json", "bpe.codes", "vocab.bpe",
    "tekken.json", "encoder.json", "normalizer.json", "entity_vocab.json", "emoji.json", *_TEMPLATES,
}  # fmt: skip
_KEPT = {"tokenizer.json", "tokenizer_config.json", *_TEMPLATES}
_DOCUMENTS = (
    ".png", ".jpg", ".jpeg", ".gif", ".webp", ".svg", ".mp4", ".wav", ".pdf", ".md", ".ipynb", ".csv", ".log", ".html"
)  # fmt: skip
_PATTERNS = re.compile(r"\.tiktoken$|^tokenizer\.model\.v\d|^tokenization_.*\.py$|^qwen\.tiktoken$")


@dataclass(frozen=True)
class LoadedTokenizer:
    """A tokenizer with the files it came from.

    Attributes:
        label: of its model.
        tokenizer: as AutoTokenizer loads it.
        files: names, relative to the model's folder, and contents.
        config: the content of the model's config.json, or nothing.
        generation: that of its generation_config.json.
    """

    label: str
    tokenizer: Any
    files: Mapping[str, bytes]
    config: Mapping[str, Any]
    generation: Mapping[str, Any]

    @cached_property
    def vocab(self) -> dict[str, int]:
        """Every token with its id, added tokens among them."""
        return dict(self.tokenizer.get_vocab())

    @property
    def backend(self) -> Any:
        """The `tokenizers.Tokenizer`, or None for a tokenizer in Python."""
        return getattr(self.tokenizer, "backend_tokenizer", None)

    @cached_property
    def state(self) -> dict[str, Any]:
        """What tokenizer.json would hold, as it is used after loading."""
        return json.loads(self.backend.to_str())

    @property
    def chat_template(self) -> str | None:
        """Its chat template; of several the one called default."""
        template = getattr(self.tokenizer, "chat_template", None)
        return template.get("default") if isinstance(template, Mapping) else template


Known = dict[object, LoadedTokenizer]
"""Tokenizers by the files they were loaded from: most models that are merged have the same."""


def load_tokenizer(source: Source, known: Known | None = None) -> LoadedTokenizer:
    """Load the tokenizer of a model.

    Args:
        source: the model.
        known: tokenizers that are loaded already; this one is added.

    Raises:
        SourceError: it has none, or one that cannot be loaded.
    """
    with scratch_model(source.config) as folder:
        source.write_companions(folder, _may_matter)
        return load_folder(folder, source.label, known)


def _may_matter(name: str) -> bool:
    """Tell whether a tokenizer may need a file: some have vocabularies of unusual names, none has pictures."""
    return not name.lower().endswith(_DOCUMENTS)


def load_folder(folder: Path, label: str, known: Known | None = None) -> LoadedTokenizer:
    """Load the tokenizer of a folder that has a config.json too; see `load_tokenizer`."""
    known = {} if known is None else known
    files = {str(path.relative_to(folder)): path.read_bytes() for path in tokenizer_files(folder)}
    config, generation = (_content(folder / name) for name in ("config.json", GENERATION))
    if not any(name in _FILES - set(_TEMPLATES) or _PATTERNS.search(name) for name in files):
        raise SourceError(
            f"'{label}' has no tokenizer: save one into its folder, or leave out what is said of tokenizers."
        )
    key = (config.get("model_type"), tuple(sorted(files.items())))
    if key not in known:
        known[key] = LoadedTokenizer(label, _load(folder, label), files, config, generation)
    return replace(known[key], label=label, config=config, generation=generation)


def _load(folder: Path, label: str) -> Any:
    from transformers import AutoTokenizer

    try:
        with _compat.quiet():
            return AutoTokenizer.from_pretrained(folder, trust_remote_code=False, local_files_only=True)
    except Exception as error:  # tokenizers and transformers raise anything here, a bare Exception too
        raise SourceError(
            f"The tokenizer of '{label}' cannot be loaded ({_reason(error)}): save it again with this transformers."
        ) from error


def _content(path: Path) -> dict[str, Any]:
    return read_json(path) if path.is_file() else {}


def rebuilt(base: LoadedTokenizer, state: Mapping[str, Any]) -> LoadedTokenizer:
    """Return a tokenizer with another tokenizer.json, and all else of the one that it is made from.

    Some classes build themselves anew from vocabulary and merges when they are loaded; where that does not give
    what was asked for, the result has the class that takes tokenizer.json as it is.
    """
    with scratch_model(base.config) as folder, _compat.quiet():
        base.tokenizer.save_pretrained(folder)
        for path in tokenizer_files(folder):
            if path.name in _FILES - _KEPT:
                path.unlink()
        (folder / "tokenizer.json").write_text(json.dumps(state, ensure_ascii=False), encoding="utf-8")
        made = load_folder(folder, base.label)
        if _essence(made.state) != _essence(state):
            _set(folder / "tokenizer_config.json", tokenizer_class="PreTrainedTokenizerFast")
            made = load_folder(folder, base.label)
        if made.vocab != vocabulary_of(dict(state)):
            raise SourceError(f"The tokenizer of '{base.label}' does not take further tokens: keep it as it is.")
        return made


def _essence(state: Mapping[str, Any]) -> Any:
    """What a tokenizer does, whatever its length is limited to."""
    return {key: value for key, value in state.items() if key not in ("truncation", "padding")}


def _set(path: Path, **values: Any) -> None:
    content = {**_content(path), **values}
    path.write_text(json.dumps(content, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def load_reference(model: Ref, **hub: Any) -> LoadedTokenizer:
    """Load the tokenizer of a model that is not merged; its weights are not fetched.

    Args:
        model: a folder or an id on the Hub.
        **hub: token, cache_dir, local_files_only.

    Raises:
        SourceError: there is no such model, or it has no tokenizer.
    """
    if isinstance(model, InMemory):
        raise SourceError(f"{model.label} has no tokenizer: name the folder or the Hub id of one.")
    path = Path(model.path).expanduser()
    wanted = (*_FILES, "config.json", GENERATION, "*.tiktoken", "tokenizer.model.*", "additional_chat_templates/*")
    return load_folder(path if path.is_dir() else download(model, only=wanted, **hub), str(model))


def _reason(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def tokenizer_files(folder: Path) -> Iterator[Path]:
    """Yield the files of a model's folder that belong to its tokenizer, templates among them."""
    for path in sorted(folder.rglob("*")):
        parts = path.relative_to(folder).parts
        if path.is_file() and (parts[0] in _FILES or (len(parts) == 1 and _PATTERNS.search(parts[0]))):
            yield path


def write_tokenizer(folder: Path, files: Mapping[str, bytes]) -> None:
    """Put a tokenizer in the place of the one that a folder has: nothing of the old one stays."""
    for path in tokenizer_files(folder):
        path.unlink()
    for name, content in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def write_template(folder: Path, template: str) -> None:
    """Put a chat template in the place of those that a folder has."""
    for name in _TEMPLATES:
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink(missing_ok=True)
    (folder / _TEMPLATES[0]).write_text(template, encoding="utf-8")
    config = folder / "tokenizer_config.json"
    if "chat_template" in (said := _content(config)):
        said.pop("chat_template")
        config.write_text(json.dumps(said, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


@contextmanager
def scratch_model(config: Mapping[str, Any]) -> Iterator[Path]:
    """Give a folder for a while, with a config.json in it."""
    with tempfile.TemporaryDirectory() as scratch:
        (Path(scratch) / "config.json").write_text(json.dumps(dict(config)), encoding="utf-8")
        yield Path(scratch)
