"""Models of one architecture under one set of names, however each of them was saved.

A model can be saved with its experts fused or one by one, with or without a prefix, with the head tied to the
embeddings or apart, alone or as the decoder of a model that also sees. The donor's names are those of the merge.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache, partial
from typing import Any

import torch
from torch import Tensor

from hf_merge import _compat
from hf_merge.sources.base import Source
from hf_merge.sources.checkpoint import Checkpoint
from hf_merge.sources.stacks import same_stacks
from hf_merge.sources.view import Made, View
from hf_merge.types import Ref, TensorSpec


def align_layouts(sources: Mapping[Ref, Source], donor: Ref) -> dict[Ref, Source]:
    """Show every model under the donor's names; a model that has them already is returned as it is.

    Names are brought together by transformers' conversion tables for the donor's class, then by stacks of layers
    with the same names and shapes. What remains stays under its own name, for the plan to report. Where some models
    tie their head to their embeddings and others do not, all show both, and the donor's config says untied.

    Args:
        sources: the models.
        donor: the one that gives names and config.
    """
    names = sources[donor].specs.keys()
    alike = all(source.specs.keys() == names and source.shared == sources[donor].shared for source in sources.values())
    if alike and not any(_may_hold_a_copy(source) for source in sources.values()):
        return dict(sources)
    offers = {ref: _Offer(source) for ref, source in sources.items()}
    target = offers[donor]
    wanted = {**target.source.specs, **dict.fromkeys(target.ties)}
    ways = {ref: _ways(offer, target, wanted) for ref, offer in offers.items()}
    apart = [a for a in target.ties if any(_is_apart(offers[ref], way.get(a)) for ref, way in ways.items())]
    config = _untied(target.source.config) if apart else None
    shown = {*names, *(target.ties.keys() - _class_ties(target.source, config).keys() if config else ())}
    shared = {a: t for a, t in target.copies.items() if all(_share(offers[r], ways[r], a, t) for r in sources)}
    shared = {a: t for a, t in shared.items() if a in shown and t in shown}
    return {
        ref: _view(offer, ways[ref], shown, config if ref == donor else None, shared if ref == donor else {})
        for ref, offer in offers.items()
    }


class _Offer:
    """What a model can show: the tensors of its file, and tied ones that the file leaves out.

    Attributes:
        ties: every name that the model's class ties to another, and that other.
        copies: those of them that share their values in this model, whether the file has them once or twice.
    """

    def __init__(self, source: Source):
        self.source = source
        ties = _class_ties(source)
        self.ties = {**{a: t for a, t in source.shared.items() if ties.get(t) != a}, **ties}
        self.copies = {a: t for a, t in self.ties.items() if _is_copy(source, a, t)}
        left_out = {a: source.specs[t] for a, t in self.copies.items() if a not in source.specs}
        self.specs = {**source.specs, **left_out}

    def read(self, name: str) -> Tensor:
        return self.source[name if name in self.source.specs else self.copies[name]]


@dataclass
class _Way:
    """How one tensor of the donor's layout is had: a part as it is, or what a conversion makes of parts."""

    parts: tuple[str, ...]
    spec: TensorSpec
    conversion: _Conversion | None = None
    name: str = ""

    def read(self, offer: _Offer) -> Tensor:
        return offer.read(self.parts[0]) if self.conversion is None else self.conversion.run(offer)[self.name]

    def made(self, offer: _Offer) -> Made:
        """Describe the tensor for a view."""
        reads = tuple(part if part in offer.source.specs else offer.copies[part] for part in self.parts)
        return Made(self.spec, partial(self.read, offer), reads, mapped=self.conversion is None)


@dataclass
class _Conversion:
    """Parameters of one model that transformers converts together."""

    tables: _compat.Conversion
    parts: tuple[str, ...]
    live: tuple[str, ...]
    to_disk: bool
    kept: dict[str, Tensor] = field(default_factory=dict)

    def run(self, offer: _Offer) -> dict[str, Tensor]:
        """Convert; views on a file that is mapped take no memory, so that later calls get the same."""
        if self.kept:
            return self.kept
        parts = {name: offer.read(name) for name in self.parts}
        made = self._convert(parts)
        held = {_storage(tensor) for name, tensor in parts.items() if _storage(offer.read(name)) == _storage(tensor)}
        if all(_storage(tensor) in held for tensor in made.values()):
            self.kept = made
        return made

    def specs(self, offer: _Offer) -> dict[str, TensorSpec]:
        """Find the shapes it makes; nothing if transformers refuses these parts."""
        specs = {name: offer.specs[name] for name in self.parts}
        try:
            made = self._convert({n: torch.empty(s.shape, dtype=s.dtype, device="meta") for n, s in specs.items()})
        except Exception:  # transformers may raise anything for parts that do not fit
            return {}
        return {name: TensorSpec(tuple(tensor.shape), tensor.dtype) for name, tensor in made.items()}

    def _convert(self, parts: Mapping[str, Tensor]) -> dict[str, Tensor]:
        memory = self.tables.to_memory(parts)
        memory = {name: memory[name] for name in self.live}
        return self.tables.to_disk(memory) if self.to_disk else memory


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def _ways(offer: _Offer, target: _Offer, wanted: Iterable[str]) -> dict[str, _Way]:
    """Find how a model gives each of the donor's tensors: under the same name, by transformers' tables, by stacks."""
    same = {name: name for name in wanted if name in offer.specs}
    found = {name: _Way((name,), offer.specs[name]) for name in same}
    if offer is target:
        return found
    lacking = [name for name in wanted if name not in found]
    spare = [name for name in offer.specs if name not in found]
    tables = _tables_of(target.source) or _tables_of(offer.source)
    if tables is not None and lacking and spare:
        found |= _by_tables(tables, offer, spare, lacking)
    used = {part for way in found.values() for part in way.parts}
    if any(name not in used for name in spare):
        fitting = _by_stacks(offer, target).items()
        found |= {name: way for name, way in fitting if name not in found and used.isdisjoint(way.parts)}
    return found


def _by_stacks(offer: _Offer, target: _Offer) -> dict[str, _Way]:
    """Bring names together by stacks of layers, in the first of a model's own layouts that has the donor's stack."""
    for layout in _layouts(offer):
        if pairs := same_stacks({name: way.spec for name, way in layout.items()}, target.specs):
            return {name: layout[mine] for name, mine in pairs.items()}
    return {}


def _layouts(offer: _Offer) -> Iterator[dict[str, _Way]]:
    """Yield a model as it was saved, as it is in memory, and as `save_pretrained` writes it."""
    yield {name: _Way((name,), spec) for name, spec in offer.specs.items()}
    tables = _tables_of(offer.source)
    if tables is not None:
        for names in (tables.shapes, tables.to_disk(tables.shapes)):
            yield _by_tables(tables, offer, list(offer.specs), list(names))


def _by_tables(tables: _compat.Conversion, offer: _Offer, spare: list[str], lacking: list[str]) -> dict[str, _Way]:
    """Bring names together that transformers loads into the same parameters of the donor's class."""
    given, asked = tables.places(spare), tables.places(lacking)
    parts_of, names_of = _by_live(given), _by_live(asked)
    found: dict[str, _Way] = {}
    groups: dict[tuple[str, ...], tuple[_Conversion, dict[str, TensorSpec]]] = {}
    for name, place in asked.items():
        if any(live not in parts_of for live in place.live):
            continue
        parts = tuple(dict.fromkeys(part for live in place.live for part in parts_of[live]))
        names = tuple(dict.fromkeys(other for live in place.live for other in names_of[live]))
        if [given[part].pattern for part in parts] == [asked[other].pattern for other in names]:
            part = parts[names.index(name)]
            found[name] = _Way((part,), offer.specs[part])
            continue
        if parts not in groups:
            conversion = _Conversion(tables, parts, place.live, to_disk=place.pattern is not None)
            groups[parts] = (conversion, conversion.specs(offer))
        conversion, specs = groups[parts]
        made = _called(name, specs) if conversion.to_disk else place.live[0]
        if made in specs:
            found[name] = _Way(parts, specs[made], conversion, made)
    return found


def _by_live(places: Mapping[str, _compat.Place]) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for name, place in places.items():
        for live in place.live:
            found.setdefault(live, []).append(name)
    return found


def _called(name: str, made: Iterable[str]) -> str:
    """Find a name among those that transformers would write, which may have a prefix more or less."""
    return next((other for other in made if name.endswith(other) or other.endswith(name)), "")


def _view(offer: _Offer, ways: Mapping[str, _Way], shown: set[str], config: Any, shared: Mapping[str, str]) -> Source:
    """Show a model under the donor's names; what has no place there keeps its name, second copies are left out."""
    source = offer.source
    ways = {name: way for name, way in ways.items() if name in shown}
    used = {part for way in ways.values() for part in way.parts}
    rest = [name for name in source.specs if name not in used and name not in offer.copies and name not in ways]
    rest = {name: _Way((name,), source.specs[name]) for name in rest}
    ordered = {**{name: ways[name] for name in source.specs if name in ways}, **ways, **rest}
    as_it_is = ordered.keys() == source.specs.keys() and all(way.parts == (name,) for name, way in ordered.items())
    if as_it_is and not config and shared == source.shared:
        return source
    view = View(source, {name: way.made(offer) for name, way in ordered.items()}, hidden=frozenset(source.specs))
    view.config, view.shared = config or source.config, shared
    return view


def _tables_of(source: Source) -> _compat.Conversion | None:
    """Return transformers' tables for a model's class, or None if it has none."""
    return _tables(json.dumps(dict(source.config), sort_keys=True, default=str))


@lru_cache(maxsize=16)
def _tables(config: str) -> _compat.Conversion | None:
    module = _compat.empty_model(json.loads(config))
    return None if module is None or not hasattr(module, "config") else _compat.Conversion(module)


def _class_ties(source: Source, config: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Name the tensors that a model's class ties, as its file would name them."""
    tables = _tables(json.dumps(dict(config or source.config), sort_keys=True, default=str))
    if tables is None or not tables.tied:
        return {}
    own = {place.live[0]: name for name, place in tables.places(source.specs).items() if place.pattern is None}
    found: dict[str, str] = {}
    for alias, live in tables.tied.items():
        if alias in own or live in own:
            found[own.get(alias) or _as_in(own, alias, tables)] = own.get(live) or _as_in(own, live, tables)
    return found


def _as_in(own: Mapping[str, str], live: str, tables: _compat.Conversion) -> str:
    """Name a parameter that a file lacks as the file would: as in memory if all of it is, or as it is saved."""
    if all(name == other for name, other in own.items()):
        return live
    return tables.saved_name(live)


def _may_hold_a_copy(source: Source) -> bool:
    """Tell from header and config whether a file has tied weights twice: two tensors of the vocabulary's shape."""
    parts = [source.config, *(part for part in source.config.values() if isinstance(part, Mapping))]
    sizes = {part["vocab_size"] for part in parts if "vocab_size" in part}
    tables = [spec.shape for spec in source.specs.values() if len(spec.shape) == 2 and spec.shape[0] in sizes]
    return any(part.get("tie_word_embeddings") for part in parts) and len(tables) > len(set(tables))


def _is_copy(source: Source, alias: str, target: str) -> bool:
    """Tell whether a tied tensor has the other's values: transformers ties what is not stored with other values."""
    if alias not in source.specs or target not in source.specs:
        return target in source.specs
    if source.shared.get(alias) == target:
        return True
    return source.specs[alias] == source.specs[target] and _same_values(source, alias, target)


def _same_values(source: Source, first: str, second: str) -> bool:
    """Compare two tensors; those on the Hub by samples, which are looked at again when the tensors are here."""
    origins = [[*source.origins(name)] for name in (first, second)]
    leaves = [found[0] for found in origins if len(found) == 1]
    if len(leaves) == 2 and isinstance(leaf := leaves[0][0], Checkpoint) and leaf is leaves[1][0]:
        return leaf.same_values(leaves[0][1], leaves[1][1])
    return torch.equal(source[first], source[second])


def _is_apart(offer: _Offer, way: _Way | None) -> bool:
    """Tell whether a model has values of its own for a tensor that the donor's class ties."""
    return way is not None and way.parts[0] in offer.source.specs and way.parts[0] not in offer.copies


def _share(offer: _Offer, ways: Mapping[str, _Way], alias: str, target: str) -> bool:
    """Tell whether two of the donor's tensors are one in a model."""
    if alias not in ways or target not in ways:
        return True
    first, second = ways[alias].parts[0], ways[target].parts[0]
    return first == second or offer.copies.get(first) == second


def _untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return a config that says that embeddings and head are apart."""
    nested = {key: _untied(part) for key, part in config.items() if isinstance(part, Mapping) and "model_type" in part}
    inner = {key: part for key, part in nested.items() if "tie_word_embeddings" in config[key]}
    return {**config, **inner, "tie_word_embeddings": False}
