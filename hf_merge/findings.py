"""How models do not fit together: noted tensor by tensor, told model by model, each with its fix."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

from hf_merge.architecture import skeleton, vocabulary_names
from hf_merge.planning import Problem
from hf_merge.recipe import Recipe
from hf_merge.schedule import Layers, layer_of
from hf_merge.types import SourceLike, TensorSpec


class Findings:
    """What does not fit.

    Args:
        recipe: it says what to do about tensors that some model lacks.
        sources: the models.
        donor: the one that gives the set of tensors.
    """

    def __init__(self, recipe: Recipe, sources: Sequence[SourceLike], donor: SourceLike):
        self._recipe, self._sources, self._donor = recipe, sources, donor
        self._lacking: dict[int, list[str]] = {}
        self._shapes: dict[int, list[str]] = {}
        self._dtypes: dict[int, list[str]] = {}
        self._without_base: list[str] = []

    def lacks(self, place: int, name: str) -> None:
        """Note a tensor that a model lacks."""
        self._lacking.setdefault(place, []).append(name)

    def lacks_base(self, name: str) -> None:
        """Note a tensor that the base lacks."""
        self._without_base.append(name)

    def dropped(self, names: Sequence[str]) -> Iterator[Problem]:
        """Tell which of the donor's tensors the output lacks because other models lack them (keys: intersection)."""
        if not names:
            return
        built = skeleton(self._donor.config) if self._donor.config else None
        if needed := tuple(name for name in names if built and name in built.specs):
            fix = "the result would not load. Set missing: base, or choose layers with slices:."
            yield Problem("error", f"keys: intersection leaves out tensors that config.json needs; {fix}", needed)
        else:
            yield Problem("warning", "keys: intersection leaves out tensors.", tuple(names))

    def compare(self, place: int, name: str, found: TensorSpec, wanted: TensorSpec) -> None:
        """Note where a model's tensor is not what the output needs."""
        if found.shape != wanted.shape:
            text = f"{name} {list(found.shape)} instead of {list(wanted.shape)}"
            self._shapes.setdefault(place, []).append(text)
        if found.dtype.is_floating_point != wanted.dtype.is_floating_point:
            self._dtypes.setdefault(place, []).append(f"{name} {found.dtype} instead of {wanted.dtype}")

    def problems(self, *, rearranged: bool) -> Iterator[Problem]:
        """Yield what was found.

        Args:
            rearranged: layers were stacked, so that tensors left out say nothing.
        """
        for i, source in enumerate(self._sources):
            yield from self._of_model(i, source, rearranged=rearranged)
        if names := tuple(self._without_base):
            told = "The base lacks tensors; they are the average of the models that have them."
            yield Problem("warning", told, names)

    def _of_model(self, i: int, source: SourceLike, *, rearranged: bool) -> Iterator[Problem]:
        donor = self._donor.label
        if names := self._shapes.get(i):
            yield from self._of_shapes(source, names)
        if names := self._dtypes.get(i):
            yield Problem(
                "error", f"'{source.label}' has floats where '{donor}' has none, or the reverse:", tuple(names)
            )
        if names := self._lacking.get(i):
            yield self._of_depth(source, names) or self._of_lacking(source, tuple(names))
        extra = tuple(name for name in source.specs if name not in self._donor.specs)
        if extra and self._recipe.keys == "strict":
            yield Problem("error", f"'{source.label}' has tensors that '{donor}' lacks, and keys: strict", extra)
        elif extra and self._recipe.keys != "union" and not rearranged:
            yield self._of_depth(source, extra) or Problem(
                "warning", f"'{source.label}' has tensors that '{donor}' lacks; they are left out.", extra
            )
        kinds = [model.config.get("model_type") for model in (source, self._donor)]
        if None not in kinds and kinds[0] != kinds[1]:
            yield Problem("warning", f"'{source.label}' is a '{kinds[0]}' model, '{donor}' a '{kinds[1]}' model.")

    def _of_shapes(self, source: SourceLike, names: Sequence[str]) -> Iterator[Problem]:
        """Yield other numbers of rows in embeddings and heads, which a tokenizer mends, apart from other shapes."""
        tables = set(vocabulary_names(self._donor.config, self._donor.specs))
        wide = {name for name in tables & source.specs.keys()
                if source.specs[name].shape[1:] == self._donor.specs[name].shape[1:]}  # fmt: skip
        vocabulary = tuple(text for text in names if text.split(" ")[0] in wide)
        others = tuple(text for text in names if text not in vocabulary)
        if vocabulary:
            fix = "set tokenizer_source: union, base or the model whose tokenizer the result should have."
            told = f"'{source.label}' has another vocabulary than '{self._donor.label}': {fix}"
            yield Problem("error", told, vocabulary)
        if others:
            fix = "merge models of one architecture and vocabulary, or set them apart by rules:"
            yield Problem("error", f"'{source.label}' has other shapes than '{self._donor.label}': {fix}", others)

    def _of_depth(self, source: SourceLike, names: Sequence[str]) -> Problem | None:
        """Tell of a model that differs in its number of layers and in nothing else."""
        mine, theirs = Layers(self._donor.specs).count, Layers(source.specs).count
        places = [layer_of(name) for name in names]
        depths = [(theirs.get(place.stack, 0), mine.get(place.stack, 0)) for place in places]
        beyond = [p.layer is not None and p.layer >= min(d) > 0 for p, d in zip(places, depths, strict=True)]
        if self._recipe.missing != "error" or self._recipe.keys != "base" or not all(beyond):
            return None
        told = dict.fromkeys(zip((place.stack for place in places), depths, strict=True))
        counts = [f"{count} {stack}* and '{self._donor.label}' {own}" for stack, (count, own) in told]
        fix = "choose layers with slices:, or merge models of one depth."
        return Problem("error", f"'{source.label}' has {', '.join(counts)}: {fix}")

    def _of_lacking(self, source: SourceLike, names: tuple[str, ...]) -> Problem:
        found = f"'{source.label}' lacks tensors of '{self._donor.label}'"
        if self._recipe.missing == "error":
            fix = (
                f"set missing: base to keep those of '{self._donor.label}', or missing: skip-model to merge without it."
            )
            return Problem("error", f"{found}: {fix}", names)
        done = "kept as they are" if self._recipe.missing == "base" else "merged without it"
        return Problem("warning", f"{found}; they are {done}.", names)
