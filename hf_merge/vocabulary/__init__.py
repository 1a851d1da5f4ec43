"""Recipe + sources -> the same sources with one vocabulary, and the tokenizer that goes with it.

Decides which row of which model stands for which token; the rows themselves are read by sources/reindexed.py.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from hf_merge.architecture import skeleton, vocabulary_names
from hf_merge.errors import SourceError
from hf_merge.planning import Problem
from hf_merge.recipe import Recipe
from hf_merge.sources import Source
from hf_merge.sources.companions import WithCompanions
from hf_merge.sources.reindexed import Reindexed, Rows
from hf_merge.tokenization.chat_templates import BUILT_IN, most_common
from hf_merge.tokenization.ids import ends_of, lost, renumbered, with_vocab_size
from hf_merge.tokenization.loading import (
    GENERATION,
    Known,
    LoadedTokenizer,
    load_tokenizer,
    write_template,
    write_tokenizer,
)
from hf_merge.tokenization.options import TokenizerOptions
from hf_merge.types import Ref
from hf_merge.vocabulary.choice import Choice, choose
from hf_merge.vocabulary.differences import differences
from hf_merge.vocabulary.rows import Alignment, Layout, Table

__all__ = ["Aligned", "align_vocabularies"]


@dataclass(frozen=True)
class Aligned:
    """Sources with one vocabulary.

    Attributes:
        sources: as before, but for the rows of their embeddings and heads; the donor also has the config of the
            result and writes its tokenizer.
        problems: what was found.
    """

    sources: dict[Ref, Source]
    problems: tuple[Problem, ...] = ()


def align_vocabularies(recipe: Recipe, sources: Mapping[Ref, Source], **hub: Any) -> Aligned:
    """Give all models one vocabulary, as the recipe asks; without a word of it they stay as they are.

    Args:
        recipe: its `tokenizer`, `tokenizer_source` and `chat_template` are followed.
        sources: the recipe's models.
        **hub: token, cache_dir, local_files_only, for a tokenizer that is none of the models'.

    Raises:
        SourceError: a model has no tokenizer, and it is needed.
    """
    donor = recipe.donor
    aligned, changes = dict(sources), []
    config, problems = sources[donor].config, list(differences(sources, donor)) if recipe.vocabulary is None else []
    loaded: dict[Ref, LoadedTokenizer] = {}
    if recipe.vocabulary is not None:
        known: Known = {}
        loaded = {ref: load_tokenizer(source, known) for ref, source in sources.items()}
        choice = choose(recipe.vocabulary, loaded, donor, **hub)
        aligned, sizes, found = _reindexed(recipe, recipe.vocabulary, sources, loaded, choice, donor)
        renumber = _renumbering(loaded[donor], choice.tokenizer)
        config = with_vocab_size(renumber(config, choice.tokenizer.config), sizes)
        problems += [*choice.problems, *found, *_lost_ids(sources[donor], config)]
        changes.append(partial(_write_tokenizer, donor=loaded[donor], chosen=choice.tokenizer, renumber=renumber))
    if recipe.chat_template is not None:
        template, found = _template(recipe.chat_template, sources, donor, loaded)
        problems += found
        changes += [] if template is None else [partial(write_template, template=template)]
    if changes:
        aligned[donor] = WithCompanions(aligned[donor], config, partial(_each, changes))
    return Aligned(aligned, tuple(problems))


def _each(changes: list[Callable[[Path], None]], folder: Path) -> None:
    for change in changes:
        change(folder)


def _write_tokenizer(folder: Path, *, donor: LoadedTokenizer, chosen: LoadedTokenizer, renumber: Any) -> None:
    """Put the result's tokenizer in the place of the donor's, and its ids into generation_config.json."""
    if chosen is donor:
        return
    write_tokenizer(folder, chosen.files)
    path = folder / GENERATION
    if path.is_file():
        before = json.loads(path.read_text(encoding="utf-8"))
        after = renumber(before, chosen.generation or chosen.config)
        if after != before:
            path.write_text(json.dumps(after, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _renumbering(donor: LoadedTokenizer, chosen: LoadedTokenizer) -> Callable[[Mapping[str, Any], Any], dict[str, Any]]:
    """Return what puts the ids of the chosen tokenizer into a config of the donor, with the ends of its own model."""
    ids = {i: chosen.vocab[token] for token, i in donor.vocab.items() if token in chosen.vocab}
    if all(ids.get(i) == i for i in donor.vocab.values()):
        return lambda config, own: dict(config)
    return lambda config, own: renumbered(config, ids, ends_of(own))


def _lost_ids(source: Source, config: Mapping[str, Any]) -> Iterator[Problem]:
    if keys := lost(source.config, config):
        told = f"The tokenizer of the result lacks tokens that config.json of '{source.label}' names"
        yield Problem("warning", f"{told}: {', '.join(keys)} are null.")


def _reindexed(
    recipe: Recipe, options: TokenizerOptions, sources: Mapping[Ref, Source], loaded: Mapping[Ref, LoadedTokenizer],
    choice: Choice, donor: Ref,
) -> tuple[dict[Ref, Source], dict[int, int], list[Problem]]:  # fmt: skip
    """Return the sources in the vocabulary of the choice, the donor's numbers of rows with the new ones, problems."""
    refs = list(sources)
    alignment = Alignment(
        choice.tokenizer.vocab, [loaded[ref].vocab for ref in refs], refs,
        base=None if recipe.base_model is None else refs.index(recipe.base_model),
        reference=None if choice.model is None else refs.index(choice.model),
        donor=refs.index(donor), tokens=options.tokens, multiple=options.pad_to_multiple_of,
    )  # fmt: skip
    rows: dict[Ref, dict[str, Rows]] = {ref: {} for ref in refs}
    sizes: dict[int, int] = {}
    layouts: list[Layout] = []
    tables = {ref: vocabulary_names(source.config, source.specs) for ref, source in sources.items()}
    for name in dict.fromkeys(name for names in tables.values() for name in names):
        holders = [place for place, ref in enumerate(refs) if name in sources[ref].specs]
        layout = alignment.layout([_table(name, sources[ref]) for ref in refs], holders)
        layouts.append(layout)
        for place, found in layout.rows.items():
            rows[refs[place]][name] = found
        if name in sources[donor].specs:
            sizes.setdefault(sources[donor].specs[name].shape[0], layout.count)
    aligned: dict[Ref, Source] = {ref: Reindexed(source, rows[ref]) for ref, source in sources.items()}
    return aligned, sizes, list(_row_problems(layouts, [source.label for source in sources.values()]))


def _table(name: str, source: Source) -> Table | None:
    """Return a model's tensor of that name, or the one that a tensor of that name is tied to."""
    if name not in source.specs:
        known = skeleton(source.config) if source.config else None
        name = known.tied.get(name, name) if known else name
    return Table(source, name, source.specs[name].shape[0]) if name in source.specs else None


def _row_problems(layouts: list[Layout], labels: list[str]) -> Iterator[Problem]:
    for token, place in dict.fromkeys(pair for layout in layouts for pair in layout.absent):
        yield Problem("error", f"The row of '{token}' is to come from '{labels[place]}', which has no such row.")
    if zeros := tuple(dict.fromkeys(token for layout in layouts for token in layout.zeros)):
        shown = ", ".join(repr(token) for token in zeros[:4]) + (f" and {len(zeros) - 4} more" if zeros[4:] else "")
        told = f"No model has a row for {shown}: it is zero"
        yield Problem("warning", f"{told}. Say under tokenizer.tokens where it should come from.")


def _template(
    asked: str, sources: Mapping[Ref, Source], donor: Ref, loaded: Mapping[Ref, LoadedTokenizer]
) -> tuple[str | None, list[Problem]]:
    """Return the text of the chat template that is asked for."""
    tokenizers = dict(loaded)
    for ref, source in sources.items():
        if ref not in tokenizers and (ref == donor or asked == "auto"):
            try:
                tokenizers[ref] = load_tokenizer(source)
            except SourceError as error:
                if ref == donor:
                    return None, [Problem("error", f"chat_template needs a tokenizer to belong to: {error}")]
    if asked != "auto":
        return BUILT_IN.get(asked, asked), []
    template = most_common(tokenizers[ref].chat_template for ref in sources if ref in tokenizers)
    found = "None of the models has a chat template, so that chat_template: auto finds none: name one."
    return template, [] if template else [Problem("warning", found)]
