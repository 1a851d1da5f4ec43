"""A model beside the one that it is compared with: what of it matches, and the first difference in words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from hf_merge.architecture import vocabulary_names
from hf_merge.compatibility.report import ModelRow
from hf_merge.lineage import licence_column
from hf_merge.schedule import Layers, layer_of
from hf_merge.sources import Source
from hf_merge.sources.lora import Lora
from hf_merge.survey import facts_of
from hf_merge.tokenization.peeking import folder_of, template_of
from hf_merge.types import TensorSpec
from hf_merge.vocabulary.differences import Difference, compare, has_vocabulary

Role = Literal["base", "model", "adapter"]


@dataclass(frozen=True)
class Comparison:
    """The tensors of a model beside those of another, under the other's names.

    Attributes:
        matching: names with the same shape.
        missing: names that only the other has.
        extra: names that only it has.
        differing: names with another shape, or with floats in only one of both.
        tables: those of them that differ in their rows alone, one for each token.
    """

    matching: tuple[str, ...]
    missing: tuple[str, ...]
    extra: tuple[str, ...]
    differing: tuple[str, ...]
    tables: tuple[str, ...]


def compared(source: Source, other: Source) -> Comparison:
    """Compare the tensors of two models that are shown under the names of the other."""
    mine, theirs = source.specs, other.specs
    both = [name for name in theirs if name in mine]
    differing = tuple(name for name in both if not _alike(mine[name], theirs[name]))
    rows = set(vocabulary_names(other.config, theirs)) if differing else set()
    apart = set(differing)
    return Comparison(
        matching=tuple(name for name in both if name not in apart),
        missing=tuple(name for name in theirs if name not in mine),
        extra=tuple(name for name in mine if name not in theirs),
        differing=differing,
        tables=tuple(name for name in differing if name in rows and mine[name].shape[1:] == theirs[name].shape[1:]),
    )


def unreadable(name: str, role: Role, error: str, *, gated: bool) -> ModelRow:
    """Return the row of a model that cannot be read."""
    return ModelRow(name, role, error, gated=gated)


def row_of(role: Role, source: Source, shown: Source, other: Source, opened: Source, *, is_base: bool) -> ModelRow:
    """Return the row of a model.

    Args:
        role: what it is in the merge.
        source: the model.
        shown: the same, under the names of the one that it is compared with.
        other: that one, as it is shown.
        opened: the same, as it was opened.
        is_base: whether the other is the base.
    """
    facts, parts = facts_of(source), {id(part): part for part in source.parts}.values()
    found, other_name = compared(shown, other), "the base" if is_base else f"'{other.label}'"
    itself = source is opened
    difference = None if itself else compare(source, opened)
    return ModelRow(
        name=source.label,
        role=role,
        architecture=facts.architecture,
        tensors=facts.tensors,
        matching=len(found.matching),
        missing=len(found.missing),
        extra=len(found.extra),
        differing=len(found.differing),
        example="" if itself else _example(found, shown, other, other_name, difference),
        dtype=facts.dtype,
        size=sum(facts_of(part).size for part in parts),
        vocabulary=facts.vocabulary,
        tokenizer=_tokenizer(source, opened, difference, other_name, itself=itself),
        chat_template=_template(source, opened, other_name, itself=itself),
        quantised=next((kind for part in parts if (kind := facts_of(part).quantised)), None),
        gated=any(part.gated for part in parts),
        custom_code=facts.custom_code,
        licence=", ".join(dict.fromkeys(licence_column(part).replace("`", "") for part in parts)),
        revision=facts.revision,
    )


def row_of_adapter(lora: Lora, other: Lora, licence: str) -> ModelRow:
    """Return the row of an adapter that is merged with others, beside another: modules instead of tensors."""
    source, facts = lora.source, facts_of(lora.source)
    ranks = sorted({one.rank for one in lora.factored.values()})
    rank = f"{ranks[0]}-{ranks[-1]}" if len(ranks) > 1 else str(*ranks)
    missing = [name for name in other.factored if name not in lora.factored]
    extra = [name for name in lora.factored if name not in other.factored]
    told = [f"it leaves {missing[0]} alone, which '{other.source.label}' changes"] if missing else []
    told += [f"it changes {extra[0]}, which '{other.source.label}' leaves alone"] if extra else []
    return ModelRow(
        name=source.label,
        role="adapter",
        architecture=f"{lora.config.get('peft_type', 'LORA')} of rank {rank}",
        tensors=len(lora.factored),
        matching=len(lora.factored) - len(extra),
        missing=len(missing),
        extra=len(extra),
        example=told[0] if told else "",
        dtype=facts.dtype,
        size=facts.size,
        tokenizer="of its base",
        chat_template="of its base",
        gated=source.gated,
        licence=licence,
        revision=source.revision,
    )


def in_words(name: str) -> str:
    """Name a tensor shortly: `embed_tokens`, `mlp.up_proj of layer 3`."""
    place = layer_of(name.removesuffix(".weight"))
    if place.layer is None:
        *_, owner, last = ["", *place.stack.split(".")]
        return f"{owner}.{last}" if last in ("bias",) and owner else last
    return f"{place.rest.lstrip('.') or place.stack} of layer {place.layer}"


def _alike(mine: TensorSpec, theirs: TensorSpec) -> bool:
    return mine.shape == theirs.shape and mine.dtype.is_floating_point == theirs.dtype.is_floating_point


def _example(
    found: Comparison, mine: Source, theirs: Source, other_name: str, difference: Difference | None
) -> str:  # fmt: skip
    """Say the first difference, the one first that explains the others."""
    if not found.matching and not found.differing:
        kinds = [source.config.get("model_type") for source in (mine, theirs)]
        told = f": it is a '{kinds[0]}' model, {other_name} a '{kinds[1]}' model" if None not in kinds else ""
        return f"it has no tensor in common with {other_name}{told}"
    if found.missing or found.extra:
        counts = [Layers(source.specs).count for source in (mine, theirs)]
        stack = next((stack for stack in counts[1] if counts[0].get(stack, 0) != counts[1][stack]), None)
        if stack and counts[0].get(stack):
            return f"it has {counts[0][stack]} layers, {other_name} {counts[1][stack]}"
    if found.tables:
        embeddings = next((name for name in found.tables if "emb" in name), found.tables[0])
        return _rows(embeddings, mine, theirs, other_name, difference)
    if found.differing:
        name = found.differing[0]
        one, two = mine.specs[name], theirs.specs[name]
        if one.shape == two.shape:
            return f"{in_words(name)} holds {_dtype(one)}, that of {other_name} {_dtype(two)}"
        return f"{in_words(name)} is {_shape(one.shape)}, that of {other_name} {_shape(two.shape)}"
    if found.missing:
        return f"it lacks {in_words(found.missing[0])}, which {other_name} has"
    if found.extra:
        return f"it has {in_words(found.extra[0])}, which {other_name} lacks"
    return ""


def _rows(name: str, mine: Source, theirs: Source, other_name: str, difference: Difference | None) -> str:
    """Say how many rows a table of tokens has in both, and whether the tokenizers are the reason."""
    told = f"{in_words(name)} has {mine.specs[name].shape[0]:,} rows, that of {other_name} "
    told += f"{theirs.specs[name].shape[0]:,}"
    if difference is not None:
        return f"{told}: the tokenizers differ"
    known = has_vocabulary(mine) and has_vocabulary(theirs)
    return f"{told}: the tokenizers have the same tokens, so that one of them is padded" if known else told


def _shape(shape: Sequence[int]) -> str:
    if len(shape) == 1:
        return f"{shape[0]:,} long"
    return " x ".join(f"{size:,}" for size in shape) or "a single number"


def _dtype(spec: TensorSpec) -> str:
    return str(spec.dtype).removeprefix("torch.")


def _tokenizer(
    source: Source, other: Source, difference: Difference | None, other_name: str, *, itself: bool
) -> str:  # fmt: skip
    if not has_vocabulary(source):
        return "not known" if folder_of(source) is None else "without tokenizer.json, not compared"
    if itself:
        return "its own"
    if not has_vocabulary(other):
        return "not compared"
    if difference is None:
        return f"with the tokens of {other_name}"
    if difference.first:
        i, token, own = difference.first
        return f"with other tokens at {difference.moved:,} ids, such as '{token}' instead of '{own}' at {i:,}"
    return f"with {len(difference.new):,} tokens that {other_name} lacks, such as '{difference.new[0]}'"


def _template(source: Source, other: Source, other_name: str, *, itself: bool) -> str:
    if folder_of(source) is None:
        return "not known"
    own = template_of(source)
    if own is None or itself:
        return "none" if own is None else "its own"
    return f"that of {other_name}" if own == template_of(other) else f"another than that of {other_name}"


def layers_of(names: Mapping[str, object]) -> int:
    """Return the number of layers of the longest stack; 0 if names have no numbers."""
    return max(Layers(names).count.values(), default=0)
