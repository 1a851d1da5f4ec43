"""LoRA adapters as sources of tensors that any method merges, without the weights of their base.

A change scale * B A is shown in one of four ways, all adapters of a merge in the same:

    core     Q_B^T (scale * B A) Q_A, where Q_B and Q_A span the columns of all B and the rows of all A (by QR):
             as small as the sum of the ranks, and nothing is lost (Core Space Merging, arXiv 2509.17786)
    full     the change itself, as large as the weight
    factors  sqrt(scale) * A and sqrt(scale) * B, one by one, as PEFT merges them
    units    both, packed as `ops.factors` says, for methods on factors

An adapter that leaves a module alone changes it by zero. What adapters carry as it is (modules_to_save, biases) is
shown under the names of the base.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from threading import Lock

import torch
from torch import Tensor

from hf_merge.errors import SourceError
from hf_merge.ops.factors import packed
from hf_merge.sources.base import Source
from hf_merge.sources.cards import read_card
from hf_merge.sources.folder import Folder, read_object
from hf_merge.sources.lora import PREFIX, Factored, Lora
from hf_merge.types import TensorSpec

Pair = tuple[Tensor, Tensor]
CONFIG = "config.json"
_TOKENIZER = ("tokenizer", "special_tokens", "added_tokens", "vocab", "merges", "chat_template")


@dataclass(frozen=True)
class Change:
    """What adapters do to one module, or to one parameter of it.

    Attributes:
        module: PEFT's path.
        kind: linear, conv, embedding or experts.
        own: every adapter's factors, or None for one that leaves it alone.
        out: rows of the change as a matrix.
        columns: its columns; of a convolution [in, *kernel].
        experts: how many such matrices it is; 0 for a single one that is no stack.
    """

    module: str
    kind: str
    own: tuple[Factored | None, ...]
    out: int
    columns: tuple[int, ...]
    experts: int

    @property
    def name(self) -> str:
        """The base's tensor."""
        return self.module if self.kind == "experts" else f"{self.module}.weight"

    @property
    def ranks(self) -> list[int]:
        """The rank of every adapter's change."""
        return [factored.rank if factored else 0 for factored in self.own]

    @property
    def into(self) -> int:
        return math.prod(self.columns)

    @property
    def stack(self) -> tuple[int, ...]:
        """The dimensions before those of the matrix."""
        return (self.experts,) if self.experts else ()


class Space:
    """How changes are shown: which tensors there are for each, and their values. Thread-safe.

    Args:
        loras: the adapters.

    Attributes:
        changes: by module, in the order of the adapters.

    Raises:
        SourceError: two adapters do not belong to one base.
    """

    def __init__(self, loras: Sequence[Lora]):
        self.loras = loras
        modules = dict.fromkeys(module for lora in loras for module in lora.factored)
        self.changes = {module: _change(module, loras) for module in modules}

    def specs(self, change: Change) -> dict[str, TensorSpec]:
        """Say which tensors show a change."""
        raise NotImplementedError

    def read(self, change: Change, name: str, adapter: int) -> Tensor:
        """Return one of them, of one adapter."""
        raise NotImplementedError

    def release(self, change: Change) -> None:
        """Forget what was kept for a change."""

    def pair(self, change: Change, adapter: int) -> Pair | None:
        """Return the factors of an adapter in float64, the scale in the left one; None if it changes nothing.

        Raises:
            SourceError: they have NaN or Inf.
        """
        own, lora = change.own[adapter], self.loras[adapter]
        if own is None:
            return None
        left, right = (finite(lora.source, key).double() for key in (own.left, own.right))
        if change.kind == "experts":  # PEFT reads A as [experts, r, in] and B as [out, r, experts]
            left = left.reshape(change.out, own.rank, change.experts).permute(2, 0, 1)
            return left * own.scale, right.reshape(change.experts, own.rank, change.into)
        return left.flatten(1) * own.scale, right.flatten(1)

    def pairs(self, change: Change) -> list[Pair]:
        """Return the factors of every adapter, of rank 0 for those that change nothing."""
        empty = torch.zeros(*change.stack, change.out, 0).double(), torch.zeros(*change.stack, 0, change.into).double()
        return [self.pair(change, i) or empty for i in range(len(self.loras))]


class Core(Space):
    """Shows changes in the coordinates of their joint row and column spaces."""

    def __init__(self, loras: Sequence[Lora]):
        super().__init__(loras)
        self._known: dict[str, tuple[Tensor, Tensor, list[Tensor]]] = {}
        self._locks = {module: Lock() for module in self.changes}

    def specs(self, change: Change) -> dict[str, TensorSpec]:
        rank = sum(change.ranks)
        shape = (*change.stack, min(rank, change.out), min(rank, change.into))
        return {change.name: TensorSpec(shape, torch.float64)}

    def read(self, change: Change, name: str, adapter: int) -> Tensor:
        return self._decomposed(change)[2][adapter]

    def bases(self, change: Change) -> Pair:
        """Return Q_B [out, k] and Q_A [in, l]: what a core stands for is Q_B core Q_A^T."""
        left, right, _ = self._decomposed(change)
        return left, right

    def release(self, change: Change) -> None:
        self._known.pop(change.module, None)

    def _decomposed(self, change: Change) -> tuple[Tensor, Tensor, list[Tensor]]:
        with self._locks[change.module]:
            if change.module not in self._known:
                self._known[change.module] = cores(self.pairs(change))
            return self._known[change.module]


def cores(pairs: Sequence[Pair]) -> tuple[Tensor, Tensor, list[Tensor]]:
    """Return Q_B, Q_A and every adapter's core, by QR of the factors side by side."""
    left, left_parts = torch.linalg.qr(torch.cat([left for left, _ in pairs], dim=-1))
    right, right_parts = torch.linalg.qr(torch.cat([right for _, right in pairs], dim=-2).mT)
    ranks = [pair[1].shape[-2] for pair in pairs]
    each = zip(left_parts.split(ranks, dim=-1), right_parts.split(ranks, dim=-1), strict=True)
    return left, right, [mine @ other.mT for mine, other in each]


class Full(Space):
    """Shows changes as they are; a convolution's in the shape of its weight."""

    def specs(self, change: Change) -> dict[str, TensorSpec]:
        return {change.name: TensorSpec((*change.stack, change.out, *change.columns), torch.float32)}

    def read(self, change: Change, name: str, adapter: int) -> Tensor:
        shape, pair = self.specs(change)[name].shape, self.pair(change, adapter)
        return torch.zeros(shape) if pair is None else (pair[0].float() @ pair[1].float()).view(shape)


class Apart(Space):
    """Shows the two factors one by one."""

    def __init__(self, loras: Sequence[Lora]):
        super().__init__(loras)
        for change in self.changes.values():
            if len(found := {rank for rank in change.ranks if rank}) > 1:
                raise SourceError(
                    f"space: factors averages factors of one rank; those of '{change.module}' have "
                    f"{', '.join(map(str, sorted(found)))}. Leave space: core, which takes any ranks."
                )

    def specs(self, change: Change) -> dict[str, TensorSpec]:
        rank, name = max(change.ranks), change.module
        return {
            f"{name}.lora_A": TensorSpec((*change.stack, rank, change.into), torch.float64),
            f"{name}.lora_B": TensorSpec((*change.stack, change.out, rank), torch.float64),
        }

    def read(self, change: Change, name: str, adapter: int) -> Tensor:
        pair, own = self.pair(change, adapter), change.own[adapter]
        if pair is None or own is None:
            return torch.zeros(self.specs(change)[name].shape).double()
        root = math.sqrt(abs(own.scale))
        left, right = pair
        return right * root if name.endswith("lora_A") else left / root if root else left


class Units(Space):
    """Shows the factors packed, every adapter's in rows of its own."""

    def __init__(self, loras: Sequence[Lora]):
        super().__init__(loras)
        for change in self.changes.values():
            if change.experts:
                raise SourceError(
                    f"Methods on factors take no experts in one parameter, such as '{change.module}' of "
                    f"'{loras[0].source.label}': merge by linear with normalize: false, which is the same exact sum."
                )

    def specs(self, change: Change) -> dict[str, TensorSpec]:
        return {change.name: TensorSpec((sum(change.ranks), 2, max(change.out, change.into)), torch.float64)}

    def read(self, change: Change, name: str, adapter: int) -> Tensor:
        return packed(self.pairs(change))[adapter]


SPACES: Mapping[str, type[Space]] = {"core": Core, "full": Full, "factors": Apart}
"""By the recipe's word."""


def finite(source: Source, key: str) -> Tensor:
    """Read a tensor of an adapter.

    Raises:
        SourceError: it has NaN or Inf.
    """
    tensor = source[key]
    if not tensor.isfinite().all():
        raise SourceError(f"'{key}' of '{source.label}' has NaN or Inf: the adapter is broken, train or save it again.")
    return tensor


class AdapterSource(Source):
    """One adapter of a merge: what it changes, in a space, and what it carries as it is.

    Args:
        space: how changes are shown.
        adapter: which of the space's adapters.
        label: how messages call it.
    """

    def __init__(self, space: Space, adapter: int, label: str):
        self.lora, self.label = space.loras[adapter], label
        source = self.lora.source
        self.public_id, self.revision, self.gated = source.public_id, source.revision, source.gated
        self.packed = isinstance(space, Units)
        self._reads = dict(_shown(space, adapter))
        self._keys = carried(self.lora)
        as_they_are = {name: source.specs[key] for name, key in self._keys.items()}
        self.specs = {**{name: spec for name, (spec, _, _) in self._reads.items()}, **as_they_are}

    def __getitem__(self, name: str) -> Tensor:
        return self._reads[name][1]() if name in self._reads else self.lora.source[self._keys[name]]

    def bytes_held(self, name: str) -> int:
        return self.specs[name].nbytes if name in self._reads else 0

    @property
    def parts(self) -> tuple[Source, ...]:
        return (self.lora.source,)

    def fingerprint(self) -> str | None:
        found = self.lora.source.fingerprint()
        return None if found is None else json.dumps([found, dict(self.lora.config)], default=str, sort_keys=True)

    def origins(self, name: str) -> Iterator[tuple[Source, str]]:
        if name in self._reads:
            yield from self._reads[name][2]
        else:
            yield self.lora.source, self._keys[name]

    def write_companions(self, folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> None:
        """Write the tokenizer, if the adapter was saved with one."""
        self.lora.source.write_companions(folder, lambda name: name.startswith(_TOKENIZER) and wanted(name))


class Unchanged(Source):
    """The base as a change of itself: zeros, wherever adapters change something.

    Args:
        space: how changes are shown.
        label: how messages call it.
        folder: where its config.json and its card are, if they can be had.
        **origin: `public_id` and `revision`, if it is on the Hub.
    """

    is_reference = True

    def __init__(self, space: Space, label: str, folder: Folder | None = None, **origin: str):
        self.label = label
        self.specs = {name: spec for i in range(len(space.loras)) for name, (spec, _, _) in _shown(space, i)}
        self.public_id, self.revision = origin.get("public_id"), origin.get("revision")
        if folder is not None:
            self.gated, self.card_data = folder.gated, read_card(folder.path, self.public_id)
            self.config = read_object(folder.paths([CONFIG])[0]) if CONFIG in folder else {}

    def __getitem__(self, name: str) -> Tensor:
        return torch.zeros(self.specs[name].shape, dtype=self.specs[name].dtype)

    def bytes_read(self, name: str) -> int:
        return 0

    def bytes_held(self, name: str) -> int:
        return self.specs[name].nbytes

    @property
    def parts(self) -> tuple[Source, ...]:
        return (self,)

    def fingerprint(self) -> str | None:
        return self.label

    def origins(self, name: str) -> Iterator[tuple[Source, str]]:
        yield from ()


_Shown = tuple[TensorSpec, Callable[[], Tensor], list[tuple[Source, str]]]


def _shown(space: Space, adapter: int) -> Iterator[tuple[str, _Shown]]:
    """Yield the tensors of one adapter that are made: what they look like, how to make them, and of what."""
    for change in space.changes.values():
        keys = [(lora.source, key) for lora, own in zip(space.loras, change.own, strict=True) if own
                for key in (own.left, own.right)]  # fmt: skip
        for name, spec in space.specs(change).items():
            yield name, (spec, partial(space.read, change, name, adapter), keys)
        if any(own and own.bias for own in change.own):
            own, spec = change.own[adapter], TensorSpec((change.out,), torch.float64)
            keys = [(space.loras[adapter].source, own.bias)] if own and own.bias else []
            yield f"{change.module}.bias", (spec, partial(_bias, space, change, adapter), keys)


def _bias(space: Space, change: Change, adapter: int) -> Tensor:
    own = change.own[adapter]
    if own is None or own.bias is None:
        return torch.zeros(change.out).double()
    return finite(space.loras[adapter].source, own.bias).double() * own.scale


def carried(lora: Lora) -> dict[str, str]:
    """Return the keys of an adapter's tensors that are merged as they are, by name.

    Of an embedding that is changed and held whole as well, as PEFT saves it, the whole has a name of its own.
    """
    changed = {f"{module}.weight" for module in lora.factored}
    found = {key.removeprefix(PREFIX) if name in changed else name: key for name, key in lora.whole.items()}
    found |= {f"{module}.trainable_tokens_delta": key for module, key in lora.tokens.items()}
    norms = {f"{module}.lora_magnitude_vector": own.magnitude for module, own in lora.factored.items()}
    return found | {name: key for name, key in norms.items() if key}


def _change(module: str, loras: Sequence[Lora]) -> Change:
    """Bring together what adapters do to one module."""
    own = tuple(lora.factored.get(module) for lora in loras)
    shapes = {}
    for lora, factored in zip(loras, own, strict=True):
        if factored is not None:
            shapes.setdefault(_shape(factored, lora), lora.source.label)
    if len(shapes) > 1:
        (one, first), (other, second) = list(shapes.items())[:2]
        raise SourceError(
            f"'{first}' changes '{module}' as {_words(one)}, '{second}' as {_words(other)}: they are adapters of "
            "different models. Merge adapters of one base."
        )
    kind, out, columns, experts = next(iter(shapes))
    return Change(module, kind, own, out, columns, experts)


def _shape(factored: Factored, lora: Lora) -> tuple[str, int, tuple[int, ...], int]:
    left, right = (lora.source.specs[key].shape for key in (factored.left, factored.right))
    experts = right[0] // factored.rank if factored.kind == "experts" else 0
    return factored.kind, left[0], right[1:], experts


def _words(shape: tuple[str, int, tuple[int, ...], int]) -> str:
    kind, out, columns, experts = shape
    return f"{kind} {[*([experts] if experts else []), out, *columns]}"
