"""Statistics beside a model: what was measured on data, keyed like the model's tensors."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from pathlib import Path

from torch import Tensor

from hf_merge.errors import SourceError
from hf_merge.sources.base import Source
from hf_merge.sources.checkpoint import Checkpoint
from hf_merge.sources.folder import Folder
from hf_merge.sources.mapping import MappingSource
from hf_merge.sources.remote import RemoteSafetensors
from hf_merge.sources.view import View
from hf_merge.types import InMemory, Ref, TensorSpec

METADATA = "hf_merge.statistics"
"""The key of a file's metadata that says what was measured, of which model."""
WHOLE = ""
"""The name of statistics that do not say what they are: what the method asks for."""

_SAMPLE = 16  # values at each end of a tensor


class Statistics(Mapping[str, Tensor]):
    """What was measured of one model. Tensors that share a statistic have it once in the file.

    Args:
        source: the file, or a mapping.

    Attributes:
        label: how messages call it.
        specs: shapes and dtypes, those that are shared included.
        told: what the file says of itself.
    """

    def __init__(self, source: Source):
        self._source, self.label = source, source.label
        self.told = _told(source)
        self._same: Mapping[str, str] = self.told.get("same_as", {})
        again = {name: source.specs[other] for name, other in self._same.items() if other in source.specs}
        self.specs: dict[str, TensorSpec] = {**source.specs, **again}

    @property
    def what(self) -> str:
        return self.told.get("what", WHOLE)

    def __getitem__(self, name: str) -> Tensor:
        return self._source[self._same.get(name, name)]

    def __iter__(self):
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def fingerprint(self) -> str | None:
        """Identify the contents without reading them; None if that cannot be done."""
        return self._source.fingerprint()


class MeasuredModel(View):
    """A model with what was measured of it.

    Args:
        source: the model, as it is merged.
        statistics: of it, keyed like its own checkpoint.

    Attributes:
        statistics: by what they are, keyed like the merge.
        statistics_specs: their shapes and dtypes.
        doubts: why they cannot be those of this model, in sentences.
    """

    def __init__(self, source: Source, statistics: Sequence[Statistics]):
        super().__init__(source, {})
        self.is_reference, self.packed, self.gated = source.is_reference, source.packed, source.gated
        self._measured = tuple(statistics)
        self.doubts = tuple(doubt for one in statistics for doubt in _doubts(one, source))
        self.statistics = {one.what: _Renamed(one, _names(source, one)) for one in statistics}
        self.statistics_specs = {what: one.specs for what, one in self.statistics.items()}

    def fingerprint(self) -> str | None:
        found = [super().fingerprint(), *(one.fingerprint() for one in self._measured)]
        return None if None in found else hashlib.sha256(json.dumps(found).encode()).hexdigest()


class _Renamed(Mapping[str, Tensor]):
    """Statistics under the names of the merge."""

    def __init__(self, statistics: Statistics, names: Mapping[str, str]):
        self._statistics, self._names = statistics, names
        self.specs = {name: statistics.specs[own] for name, own in names.items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._statistics[self._names[name]]

    def __iter__(self):
        return iter(self._names)

    def __len__(self) -> int:
        return len(self._names)


def open_statistics(refs: Sequence[Ref]) -> list[Statistics]:
    """Open the statistics of one model: files or mappings of names to tensors.

    Raises:
        SourceError: there is no such file, or two say the same.
    """
    opened = [Statistics(_open(ref)) for ref in refs]
    if len({one.what for one in opened}) < len(opened):
        raise SourceError(f"'{opened[0].label}' and others of one model hold the same statistics: name one of them.")
    return opened


def sample(source: Source) -> str | None:
    """Identify a model by the first and last values of its tensors; None for one whose values are not at hand."""
    digest = hashlib.sha256()
    for name in sorted(source.specs):
        found = [*source.origins(name)]
        if len(found) != 1 or not isinstance(found[0][0], Checkpoint) or found[0][0] is not _leaf(source):
            return None
        if isinstance(found[0][0].place(found[0][1])[0], RemoteSafetensors):
            return None
    leaf = _leaf(source)
    for name in sorted(leaf.specs):
        flat = leaf[name].reshape(-1)
        ends = [*flat[:_SAMPLE].double().tolist(), *flat[-_SAMPLE:].double().tolist()]
        digest.update(json.dumps([name, list(leaf.specs[name].shape), ends]).encode())
    return digest.hexdigest()


def _leaf(source: Source) -> Source:
    return source.parts[0]


def _open(ref: Ref) -> Source:
    if isinstance(ref, InMemory):
        if not isinstance(ref.value, Mapping):
            raise SourceError(f"{ref.label} should be a file, or a mapping of names to tensors.")
        return MappingSource(ref.value, ref.label)
    path = Path(ref.path).expanduser()
    if not path.is_file():
        raise SourceError(f"There are no statistics at '{ref.path}': name the file that `hf-merge measure` wrote.")
    return Checkpoint(Folder(path.parent), str(path), file=path.name)


def _told(source: Source) -> Mapping:
    try:
        told = json.loads(source.metadata.get(METADATA, "{}"))
    except ValueError:
        told = None
    if not isinstance(told, dict) or not isinstance(told.get("same_as", {}), dict):
        raise SourceError(f"'{source.label}' has metadata that hf_merge did not write: measure it again.")
    if not told and isinstance(source, Checkpoint):
        raise SourceError(f"'{source.label}' does not say what it holds: statistics are what `hf-merge measure` wrote.")
    return told


def _names(source: Source, statistics: Statistics) -> dict[str, str]:
    """Find the statistic of every tensor of a merge: that of the tensor which it is made of."""
    found: dict[str, str] = {}
    for name in source.specs:
        own = [inner for _, inner in source.origins(name)]
        if own and own[0] in statistics.specs:
            found[name] = own[0]
        elif name in statistics.specs:
            found[name] = name
    return found


def _doubts(statistics: Statistics, source: Source) -> list[str]:
    """Say why statistics cannot be those of a model: other tensors, another name on the Hub, other values."""
    theirs = {inner for name in source.specs for _, inner in source.origins(name)} | set(source.specs)
    label, told = f"'{statistics.label}'", statistics.told.get("model", {})
    if strangers := [name for name in statistics.specs if name not in theirs]:
        return [
            f"The statistics {label} are about '{strangers[0]}', which '{source.label}' has not: they are of another "
            f"model{_of(told)}. Measure them on this one."
        ]
    if told.get("public_id") and source.public_id and told["public_id"] != source.public_id:
        return [f"The statistics {label} were measured on '{told['public_id']}', not on '{source.label}'."]
    mine = sample(source) if told.get("sample") else None
    if mine and mine != told["sample"]:
        return [
            f"The statistics {label} were measured on another model{_of(told)} than '{source.label}', or its weights "
            "have changed since: measure them on this one."
        ]
    return []


def _of(told: Mapping) -> str:
    return f" ('{told['label']}')" if told.get("label") else ""
