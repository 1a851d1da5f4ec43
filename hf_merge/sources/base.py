"""What every source of weights is."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from torch import Tensor

from hf_merge.types import Ref, TensorSpec


class Source(Mapping[str, Tensor]):
    """A model's tensors by name; values are read when asked for, shapes and dtypes are known before.

    Attributes:
        label: how messages call it.
        specs: shape and dtype of every tensor, in the order of the files.
        config: the model's config.json, or nothing.
        public_id: `org/name` on the Hub, or None for what exists on this machine only.
        revision: the commit that was read, for a model on the Hub.
        parents: the models it is made of, if it is itself the result of a merge.
        folders: of further modules with weights of their own; their tensors are named `2_Dense/linear.weight`.
        card_data: what the card beside it says, as far as it is well formed; None if it has none. An adapter has one
            of its own, and so has each model of a merge: ask the `parts`.
        gated: whether the Hub asks for consent before it gives the model away.
        shared: names whose values are those of another, stored once: the other.
        is_reference: whether it is there to be compared with, and is never merged itself: the base of adapters.
        packed: whether it is an adapter that shows its factors, packed as `ops.factors` says.
        remarks: what whoever merges it should know, in sentences.
        metadata: what a file of weights says beside them, in words.
        statistics: what was measured of it on data, by what that is, each keyed like the tensors.
        statistics_specs: their shapes and dtypes.
        doubts: why they cannot be its own, in sentences.
    """

    label: str
    specs: Mapping[str, TensorSpec]
    config: Mapping[str, Any] = {}
    public_id: str | None = None
    revision: str | None = None
    parents: Mapping[Ref, Source] = {}
    folders: tuple[str, ...] = ()
    card_data: ModelCardData | None = None
    gated: bool = False
    shared: Mapping[str, str] = {}
    is_reference: bool = False
    packed: bool = False
    remarks: tuple[str, ...] = ()
    metadata: Mapping[str, str] = {}
    statistics: Mapping[str, Mapping[str, Tensor]] = {}
    statistics_specs: Mapping[str, Mapping[str, TensorSpec]] = {}
    doubts: tuple[str, ...] = ()

    @abstractmethod
    def __getitem__(self, name: str) -> Tensor:
        """Return a tensor; a mapped one where that is possible, so that nothing is read but what is used."""

    def pieces(self, name: str, runs: Sequence[tuple[int, int]]) -> list[Tensor]:
        """Return some runs of a tensor's elements, counted in row-major order; no more is read where that is possible.

        Args:
            name: of the tensor.
            runs: of each its first element, and the one after its last.
        """
        flat = self[name].reshape(-1)
        return [flat[begin:end] for begin, end in runs]

    def __iter__(self) -> Iterator[str]:
        return iter(self.specs)

    def __len__(self) -> int:
        return len(self.specs)

    def bytes_read(self, name: str) -> int:
        """Return how many bytes are read to get a tensor."""
        return self.specs[name].nbytes

    def bytes_held(self, name: str) -> int:
        """Return how many bytes of memory a tensor takes while it is used; none if it is mapped."""
        return 0

    @property
    def parts(self) -> tuple[Source, ...]:
        """What it is made of: itself, or for a model with an adapter the base and the adapter."""
        return (self,)

    def fingerprint(self) -> str | None:
        """Identify the contents across processes without reading them; None if that cannot be done."""
        return None

    def origins(self, name: str) -> Iterator[tuple[Source, str]]:
        """Yield the tensors of models as they are stored that a tensor is made of, as far as they are known."""
        yield self, name

    def write_companions(self, folder: Path, wanted: Callable[[str], bool] = lambda name: True) -> None:
        """Write what belongs to the model but weights, card and config.json: tokenizer, processor, code.

        Args:
            folder: where to write.
            wanted: tells by a file's name whether it is needed.
        """


def stored_once(tensors: Mapping[str, Tensor]) -> dict[str, str]:
    """Name the tensors that lie where an earlier one of the same shape lies: tied weights, saved by reference."""
    first: dict[object, str] = {}
    found: dict[str, str] = {}
    for name, tensor in tensors.items():
        if tensor.numel() and tensor.device.type != "meta":
            place = (tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype)
            if (other := first.setdefault(place, name)) != name:
                found[name] = other
    return found
