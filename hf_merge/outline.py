"""Recipe + names -> which tensors the output has, and which tensor of which model each comes from.

Slices stack layers, modules set parts of a model apart; a recipe with neither is one slice of all layers. A layer
is a number in a tensor's name (`model.layers.3.mlp...`), a stack what comes before it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from hf_merge.architecture import depths, skeleton
from hf_merge.recipe import Recipe
from hf_merge.schedule import Layers, layer_of
from hf_merge.schema import Module, Setting, Slice
from hf_merge.types import Ref, SourceLike, TensorSpec

TOWERS = {
    "text_decoder": ("language_model", "text_model", "lm_head"),
    "language_model": ("language_model", "lm_head"),
    "vision_tower": ("vision_tower", "visual", "vision_model", "vision_encoder"),
    "vision_encoder": ("vision_tower", "visual", "vision_model", "vision_encoder"),
    "audio_tower": ("audio_tower", "audio_model", "audio_encoder"),
    "multi_modal_projector": ("multi_modal_projector", "mm_projector", "connector", "embed_vision", "visual.merger"),
}
"""What checkpoints call the parts for which recipes have one word."""
REST = ("default", "text_decoder", "language_model")
"""Modules that take what no other module claims: in many checkpoints the text model has no prefix of its own."""


@dataclass(frozen=True)
class Participant:
    """A model in a slice.

    Attributes:
        place: which of the recipe's models.
        parameters: what is said of it alone.
        first_layer: where its layers of the slice begin.
    """

    place: int
    parameters: Mapping[str, Setting] = field(default_factory=dict)
    first_layer: int = 0


@dataclass(frozen=True)
class Cut:
    """A slice with its models looked up.

    Attributes:
        piece: as the recipe says it.
        part: its module.
        method: name of the method for it.
        sources: its models in order.
        base: the base model, if there is one.
    """

    piece: Slice
    part: Module
    method: str
    sources: tuple[Participant, ...]
    base: Participant | None


@dataclass(frozen=True)
class Target:
    """A tensor of the output.

    Attributes:
        name: in the output.
        spec: shape and dtype that its inputs should have.
        cut: the slice it lies in.
        depth: its place in the slice's layers, 0 to 1.
        layer: number of its layer in the slice; None if its name is the same everywhere.
    """

    name: str
    spec: TensorSpec
    cut: Cut
    depth: float
    layer: int | None = None

    def name_in(self, model: Participant) -> str:
        """What the tensor is called in one of the slice's models."""
        if self.layer is None:
            return self.name
        found = layer_of(self.name)
        return f"{found.stack}{model.first_layer + self.layer}{found.rest}"


class Outline:
    """All targets of a recipe, and what does not fit.

    Attributes:
        stacks: for each stack whose layers are rearranged: of which model, and of which of its layers, each layer
            of the output is.
        errors: what makes the recipe impossible.
        warnings: what the user should know.
    """

    def __init__(self, recipe: Recipe, models: Mapping[Ref, SourceLike], donor: int):
        self.recipe, self.donor = recipe, donor
        self.refs, self.sources = list(models), list(models.values())
        self.stacks: dict[str, tuple[tuple[int, int], ...]] = {}
        self.errors: list[str] = []
        self.warnings: list[str] = []
        self.parts = recipe.parts
        self.cuts = {name: tuple(self._cut(part, piece) for piece in part.outline)
                     for name, part in self.parts.items()}  # fmt: skip

    @cached_property
    def layers(self) -> list[Layers]:
        """The stacks of layers of every model."""
        return [Layers(source.specs) for source in self.sources]

    def _cut(self, part: Module, piece: Slice) -> Cut:
        method = part.merge_method or self.recipe.merge_method
        sources = tuple(
            Participant(self.refs.index(e.model), e.parameters, e.layer_range[0] if e.layer_range else 0)
            for e in piece.sources
        )
        base = piece.base_model or self.recipe.base_model
        if base is None:
            return Cut(piece, part, method, sources, None)
        place = self.refs.index(base)
        listed = next((source for source in sources if source.place == place), None)
        starts = {source.first_layer for source in sources}
        if listed is None and len(starts) > 1:
            self.errors.append(
                f"A slice takes different layers of its models, so those of the base '{base}' are not known: "
                "list it among the slice's sources with its layer_range."
            )
        return Cut(piece, part, method, sources, listed or Participant(place, first_layer=min(starts)))

    def targets(self) -> Iterator[Target]:
        """Yield every tensor of the output, in the order of the donor's checkpoint and of the layers."""
        specs = self._specs()
        claims = self._claims(specs)
        for name, cuts in self.cuts.items():
            mine = {tensor: spec for tensor, spec in specs.items() if claims[tensor] == name}
            yield from self._of_part(cuts, mine)
        yield from self._unclaimed({tensor: spec for tensor, spec in specs.items() if claims[tensor] is None})

    def _specs(self) -> Mapping[str, TensorSpec]:
        """Which tensors the output has, but for layers that slices rearrange."""
        specs = self.sources[self.donor].specs
        if self.recipe.keys == "union":
            union = dict(specs)
            for source in self.sources:
                union |= {name: spec for name, spec in source.specs.items() if name not in union}
            return union
        if self.recipe.keys == "intersection":
            return {name: spec for name, spec in specs.items() if all(name in source.specs for source in self.sources)}
        return specs

    def _unclaimed(self, specs: Mapping[str, TensorSpec]) -> Iterator[Target]:
        """Yield the tensors that no module takes: the donor's, as they are."""
        if not specs:
            return
        shown, label = ", ".join(sorted({name.split(".")[0] for name in specs})), self.sources[self.donor].label
        self.warnings.append(f"No module takes {len(specs)} tensors ({shown}); they are those of '{label}'.")
        part = Module(models=(self.refs[self.donor],), merge_method="passthrough")  # type: ignore[arg-type]
        kept = Cut(part.outline[0], part, "passthrough", (Participant(self.donor),), None)
        for name, spec in specs.items():
            yield Target(name, spec, kept, 0.0)

    def _claims(self, names: Mapping[str, TensorSpec]) -> dict[str, str | None]:
        """Say for every tensor to which module it belongs."""
        if not self.recipe.modules:
            return dict.fromkeys(names, "")
        words = {name: _words(name, part) for name, part in self.recipe.modules.items()}
        claims = {tensor: _claim(tensor, words) for tensor in names}
        rest = next((name for name in REST if name in words), None)
        claims = {tensor: rest if name is None else name for tensor, name in claims.items()}
        for name in words.keys() - set(claims.values()):
            parts = sorted({tensor.split(".")[0] for tensor in names})
            self.errors.append(
                f"The module '{name}' is no part of '{self.sources[self.donor].label}', whose tensors begin with "
                f"{', '.join(parts[:8])}: name one of these, or say prefix: under the module."
            )
        return claims

    def _of_part(self, cuts: Sequence[Cut], specs: Mapping[str, TensorSpec]) -> Iterator[Target]:
        layers = Layers(specs)
        if len(cuts) == 1 and not any(entry.layer_range for entry in cuts[0].piece.sources):
            for name, spec in specs.items():
                yield Target(name, spec, cuts[0], layers.depth(name))
            return
        stack = self._stack(layers)
        if stack is None or not self._fits(stack, cuts):
            return
        last = self._after(stack, specs)
        for name, spec in specs.items():
            if layer_of(name).stack != stack:
                yield Target(name, spec, cuts[-1] if name in last else cuts[0], 0.0)
        yield from self._of_stack(stack, cuts)

    def _stack(self, layers: Layers) -> str | None:
        """Find the stack of which a recipe's layer ranges speak."""
        config = self.sources[self.donor].config
        found = layers.count
        told = [
            stack for stack, count in found.items() if count in depths(config.get("text_config") or config).values()
        ]
        choice = [*found] if len(found) == 1 else told
        if len(choice) == 1:
            return choice[0]
        known = ", ".join(f"{stack}* ({count})" for stack, count in found.items()) or "none"
        self.errors.append(
            f"Which layers a layer_range counts is not clear in '{self.sources[self.donor].label}'; its stacks of "
            f"layers: {known}. Write the slices under modules: for each of them."
        )
        return None

    def _fits(self, stack: str, cuts: Sequence[Cut]) -> bool:
        """Check that every model has the layers it is asked for, and that slices are even."""
        before = len(self.errors)
        for cut in cuts:
            lengths: set[int] = set()
            for source, entry in zip(cut.sources, cut.piece.sources, strict=True):
                depth, label = self.layers[source.place].count.get(stack, 0), self.sources[source.place].label
                first, end = entry.layer_range or (0, depth)
                lengths.add(end - first)
                if end > depth:
                    self.errors.append(f"'{label}' has {depth} layers; a slice asks for layers {first} to {end}.")
            if len(lengths) > 1:
                found = " and ".join(map(str, sorted(lengths)))
                self.errors.append(f"The sources of a slice give {found} layers: they should all give as many.")
        return len(self.errors) == before

    def _length(self, stack: str, cut: Cut) -> int:
        first, end = cut.piece.sources[0].layer_range or (0, self.layers[cut.sources[0].place].count[stack])
        return end - first

    def _of_stack(self, stack: str, cuts: Sequence[Cut]) -> Iterator[Target]:
        """Yield the tensors of every layer: those that its base, or else its first model, has there."""
        origins: list[tuple[int, int]] = []
        tables: dict[int, dict[int, list[tuple[str, TensorSpec]]]] = {}
        for cut in cuts:
            length = self._length(stack, cut)
            lead = cut.base or cut.sources[0]
            if lead.place not in tables:
                tables[lead.place] = _by_layer(stack, self.sources[lead.place].specs)
            for layer in range(length):
                place = len(origins)
                origins.append((lead.place, lead.first_layer + layer))
                depth = layer / (length - 1) if length > 1 else 1.0
                for rest, spec in tables[lead.place].get(lead.first_layer + layer, ()):
                    yield Target(f"{stack}{place}{rest}", spec, cut, depth, layer)
        own = range(self.layers[self.donor].count.get(stack, 0))
        if origins != [(self.donor, layer) for layer in own]:
            self.stacks[stack] = tuple(origins)

    def _after(self, stack: str, specs: Mapping[str, TensorSpec]) -> set[str]:
        """Name the tensors that come after a stack: final norm, head. Those before it are its embeddings."""
        built = skeleton(self.sources[self.donor].config)
        if built is None or not set(specs) <= set(built.order):
            return {name for name in specs if not any(word in name for word in ("emb", "wte", "wpe"))}
        order = {name: i for i, name in enumerate(built.order)}
        end = min(i for name, i in order.items() if layer_of(name).stack == stack)
        return {name for name in specs if order[name] > end}


def _by_layer(stack: str, specs: Mapping[str, TensorSpec]) -> dict[int, list[tuple[str, TensorSpec]]]:
    found: dict[int, list[tuple[str, TensorSpec]]] = {}
    for name, spec in specs.items():
        place = layer_of(name)
        if place.stack == stack and place.layer is not None:
            found.setdefault(place.layer, []).append((place.rest, spec))
    return found


def _words(name: str, part: Module) -> tuple[str, ...]:
    return (part.prefix,) if part.prefix else TOWERS.get(name, (name,))


def _claim(tensor: str, words: Mapping[str, Sequence[str]]) -> str | None:
    """Return the module with the longest of its words in a tensor's name; the first of equals."""
    found = {
        name: max((len(w) for w in some if f".{w.strip('.')}." in f".{tensor}"), default=0)
        for name, some in words.items()
    }
    best = max(found, key=lambda name: found[name])
    return best if found[best] else None
