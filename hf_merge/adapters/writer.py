"""Finished parts -> adapter_model.safetensors and adapter_config.json, in a folder that appears when it is whole.

Which modules change, and at which rank, is known when all is merged. Until then the factors lie in one file beside,
each where there was room; then the header is written, and behind it the factors in the order of their names.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from threading import Lock
from types import TracebackType
from typing import Any

import torch
from filelock import FileLock, Timeout
from torch import Tensor

from hf_merge.adapters.parts import FACTORED, PREFIX, Finished, Part, Slot, stored_bias, widened
from hf_merge.adapters.settings import Biases, adapter_config, ranks_to_write, refuse_for_vllm
from hf_merge.errors import ComputeError, OutputError
from hf_merge.planning import Plan
from hf_merge.types import DTYPE_NAMES, TensorSpec
from hf_merge.writer import appear, emptied, partial_folder, refuse_existing, write_at

WEIGHTS_FILE = "adapter_model.safetensors"
CONFIG_FILE = "adapter_config.json"
_SCRATCH = ".factors"
_LOCK = ".lock"


@dataclass(frozen=True)
class Kept:
    """What was written of a part, and where its tensors lie meanwhile.

    Attributes:
        part: of the base.
        finished: the numbers; its tensors are on the disk.
        places: by key, the offset in the file of factors, and what lies there.
    """

    part: Part
    finished: Finished
    places: Mapping[str, tuple[int, TensorSpec]]


class AdapterWriter:
    """Collects merged tensors, lets their slots turn them into an adapter's, and writes that.

    Use as a context manager; leaving it without an error makes the output appear, leaving it with one leaves nothing.

    Args:
        output: the folder to make.
        plan: what is merged.
        slots: what becomes of each tensor of the plan; those without one are left out. Names with the same slot are
            handed to it together; a name with several slots is handed to each.
        base_model: what adapter_config.json names as the base: a Hub id or a path.
        revision: the base's commit on the Hub.
        task_type: PEFT's word for what the model does (`CAUSAL_LM`, ...).
        dtype: of the written tensors; the slots' own if not given.
        metadata: of the safetensors file.
        overwrite: replace what is there, once the new folder is whole.
        extra_config: more fields of adapter_config.json.
        vllm: write it as vLLM loads it, or refuse to.

    Attributes:
        folder: where files are put that belong to the adapter.
        carrier: of files; none takes an adapter away piece by piece.

    Raises:
        OutputExistsError: the output exists and is not empty.
        OutputError: it cannot be written.
    """

    def __init__(
        self,
        output: Path,
        plan: Plan,
        slots: Mapping[str, Slot | Sequence[Slot]],
        *,
        base_model: str | None,
        revision: str | None = None,
        task_type: str | None = None,
        dtype: torch.dtype | None = None,
        metadata: Mapping[str, str],
        overwrite: bool = False,
        extra_config: Mapping[str, Any] | None = None,
        vllm: bool = False,
    ):
        self.output, self.plan, self.overwrite, self.vllm = output, plan, overwrite, vllm
        self.dtype, self.metadata = dtype, metadata
        self._words = {"base_model": base_model, "revision": revision, "task_type": task_type, "extra": extra_config}
        self._slots = {name: [*slot] if isinstance(slot, Sequence) else [slot] for name, slot in slots.items()}
        self._names = _grouped(self._slots)
        self._waiting: dict[str, Tensor] = {}
        self._missing = {name: plan.specs[name].numel for name in slots}
        self._done: set[str] = {name for name, missing in self._missing.items() if not missing}
        self._asked = {name: len(own) for name, own in self._slots.items()}
        self._guard, self._end = Lock(), 0
        self._kept: dict[Part, Kept] = {}
        self._config: dict[str, Any] | None = None
        self.carrier, self.folder = None, partial_folder(output)
        self._lock = FileLock(self.folder / _LOCK, blocking=False)
        refuse_existing(output, overwrite=overwrite)
        try:
            self._claim()
        except OSError as error:
            raise self._unwritable(error) from error

    def _claim(self) -> None:
        """Make the hidden folder ours, and open the file for factors."""
        self.folder.mkdir(parents=True, exist_ok=True)
        try:
            self._lock.acquire()
        except Timeout:
            raise OutputError(
                f"Another process is writing '{self.output}': wait for it, or choose another folder."
            ) from None
        emptied(self.folder, keep={_LOCK})
        self._file = os.open(self.folder / _SCRATCH, os.O_RDWR | os.O_CREAT | os.O_TRUNC, 0o644)

    def __enter__(self) -> AdapterWriter:
        return self

    def is_finished(self, tensor: str) -> bool:
        """Tell whether a tensor need not be computed."""
        return tensor not in self._slots

    def sizes_before(self) -> list[int]:
        """Return the bytes of tensors of an earlier run: an adapter begins afresh."""
        return []

    def stop(self) -> None:
        """Give up: nobody waits in `write`."""

    def write(self, name: str, start: int, values: Tensor) -> None:
        """Take elements of a merged tensor, beginning with the one of index `start`. Safe to call from many threads.

        Raises:
            ComputeError: the tensor cannot become a part of an adapter; it names the part.
            OutputError: the disk does not take it.
        """
        if name not in self._slots or not values.numel():
            return
        for slot, merged in self._ready(name, start, values):
            try:
                finished = slot.finish(*merged)
            except (ValueError, ArithmeticError, RuntimeError) as error:
                raise ComputeError(f"'{slot.part.module}' as a part of an adapter: {error}.") from error
            self.keep(slot.part, finished)

    def _ready(self, name: str, start: int, values: Tensor) -> list[tuple[Slot, list[Tensor]]]:
        """Return the slots that have all their tensors now."""
        spec, slots = self.plan.specs[name], self._slots[name]
        if values.numel() == spec.numel and len(slots) == 1 and len(self._names[id(slots[0])]) == 1:
            return [(slots[0], [values.view(spec.shape)])]
        with self._guard:
            if name not in self._waiting:
                self._waiting[name] = torch.empty(spec.shape, dtype=spec.dtype)
            buffer = self._waiting[name]
        buffer.view(-1)[start : start + values.numel()] = values.view(-1)
        with self._guard:
            self._missing[name] -= values.numel()
            if self._missing[name]:
                return []
            self._done.add(name)
            ready = [slot for slot in slots if self._done.issuperset(self._names[id(slot)])]
            return [(slot, [self._taken(each) for each in self._names[id(slot)]]) for slot in ready]

    def _taken(self, name: str) -> Tensor:
        """Return a whole tensor; the last slot that asks for it is the last to hold it."""
        self._asked[name] -= 1
        tensor = self._waiting.get(name)
        if not self._asked[name]:
            self._waiting.pop(name, None)
        return torch.empty(self.plan.specs[name].shape) if tensor is None else tensor

    def keep(self, part: Part, finished: Finished) -> None:
        """Write what is known of a part. Safe to call from many threads.

        Raises:
            OutputError: the disk does not take it.
        """
        places: dict[str, tuple[int, TensorSpec]] = {}
        try:
            for key, tensor in finished.tensors.items():
                tensor = tensor.to(self.dtype) if self.dtype and tensor.is_floating_point() else tensor
                places[key] = (self._put(tensor), TensorSpec(tuple(tensor.shape), tensor.dtype))
        except OSError as error:
            raise self._unwritable(error) from error
        with self._guard:
            self._kept[part] = Kept(part, replace(finished, tensors={}), places)

    def _put(self, tensor: Tensor) -> int:
        """Append a tensor to the file of factors; return where it begins."""
        data = _bytes(tensor)
        with self._guard:
            offset, self._end = self._end, self._end + len(data)
        write_at(self._file, data, offset)
        return offset

    def assemble(self) -> Sequence[Kept]:
        """Write the weights; return what is in them and what is left out, by name. Call it when all is merged.

        Raises:
            OutputError: nothing changes, vLLM would not load it, or it cannot be written.
        """
        parts = sorted(self._kept, key=lambda part: (part.module, part.kind))
        if self._config is None:
            try:
                self._write_weights([self._kept[part] for part in parts])
            except OSError as error:
                raise self._unwritable(error) from error
        return [self._kept[part] for part in parts]

    @property
    def config(self) -> Mapping[str, Any]:
        """The content of adapter_config.json, once the weights are written."""
        self.assemble()
        return self._config or {}

    def _write_weights(self, kept: Sequence[Kept]) -> None:
        """Decide ranks and names, then write header and tensors."""
        present, bias = _with_biases(_to_write(kept))
        if self.vllm:
            refuse_for_vllm(one.part for one in present)
        ranks = {one.part: one.finished.rank for one in present if one.part.kind in FACTORED}
        ranks = ranks_to_write(ranks, vllm=self.vllm)
        if not ranks:
            raise OutputError(
                "There is nothing to write: no matrix of the merge differs from the base's"
                + (", only tensors that PEFT saves beside one." if present else ".")
            )
        self._config = adapter_config(
            ranks, [one.part.module for one in present if one.part.kind == "whole"], bias=bias, **self._words
        )
        whole = dict(sorted(_named(present)))
        self._write_file({key: (one, own, ranks.get(one.part, 0)) for key, (one, own) in whole.items()})

    def _write_file(self, tensors: Mapping[str, tuple[Kept, str, int]]) -> None:
        """Write a safetensors file; what is widened comes with more zeros than it had."""
        specs = {key: self._written(one, own, rank) for key, (one, own, rank) in tensors.items()}
        order = sorted(specs, key=lambda key: (-specs[key].dtype.itemsize, key))
        header: dict[str, Any] = {"__metadata__": {"format": "pt", **self.metadata}}
        end = 0
        for key in order:
            begin, end = end, end + specs[key].nbytes
            dtype = DTYPE_NAMES[specs[key].dtype]
            header[key] = {"dtype": dtype, "shape": list(specs[key].shape), "data_offsets": [begin, end]}
        text = json.dumps(header, ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        with (self.folder / WEIGHTS_FILE).open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            for key in order:
                one, own, rank = tensors[key]
                file.write(_bytes(self._read(one, own, rank)))
            file.flush()
            os.fsync(file.fileno())
        self._close()
        (self.folder / _SCRATCH).unlink()

    def _written(self, one: Kept, key: str, rank: int) -> TensorSpec:
        spec = one.places[key][1]
        if one.part.kind not in FACTORED or rank == one.finished.rank:
            return spec
        empty = torch.empty(spec.shape, dtype=spec.dtype, device="meta")
        return TensorSpec(tuple(widened(one.part, key, empty, rank).shape), spec.dtype)

    def _read(self, one: Kept, key: str, rank: int) -> Tensor:
        """Read a tensor back from the file of factors; one that was never there is zeros."""
        offset, spec = one.places[key]
        if offset < 0:
            tensor = torch.zeros(spec.shape, dtype=spec.dtype)
        else:
            data = _read_at(self._file, spec.nbytes, offset)
            tensor = (
                torch.frombuffer(data, dtype=spec.dtype).view(spec.shape)
                if data
                else torch.empty(spec.shape, dtype=spec.dtype)
            )
        widens = one.part.kind in FACTORED and rank != one.finished.rank
        return widened(one.part, key, tensor, rank) if widens else tensor

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if kind is not None:
            self._give_up()
            return
        try:
            text = json.dumps(dict(self.config), indent=2, ensure_ascii=False, sort_keys=True)
            (self.folder / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
            self._lock.release()
            (self.folder / _LOCK).unlink(missing_ok=True)
            appear(self.folder, self.output, overwrite=self.overwrite)
        except OSError as found:
            self._give_up()
            raise found if isinstance(found, OutputError) else self._unwritable(found) from found
        except BaseException:
            self._give_up()
            raise

    def _give_up(self) -> None:
        """Leave nothing."""
        self._close()
        self._lock.release()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _close(self) -> None:
        if self._file >= 0:
            os.close(self._file)
            self._file = -1

    def _unwritable(self, error: OSError) -> OutputError:
        return OutputError(f"'{self.output}' cannot be written: {error.strerror or error}.")


def _grouped(slots: Mapping[str, Sequence[Slot]]) -> dict[int, list[str]]:
    """Return the names of each slot."""
    names: dict[int, list[str]] = {}
    for name, own in slots.items():
        for slot in own:
            names.setdefault(id(slot), []).append(name)
    return names


def _to_write(kept: Sequence[Kept]) -> list[Kept]:
    """Return what has tensors. Of modules that are saved whole those that changed, and those that PEFT takes for them.

    PEFT looks for modules_to_save by the end of their names: `norm` is `layers.0.norm` too.
    """
    whole = [one for one in kept if one.part.kind == "whole" and one.places]
    changed = tuple(one.part.module for one in whole if one.finished.energy != 0)
    taken = {one.part for one in whole if changed and one.part.module.endswith(changed)}
    return [one for one in kept if one.places and (one.part.kind != "whole" or one.part in taken)]


def _with_biases(present: Sequence[Kept]) -> tuple[list[Kept], Biases]:
    """Choose how biases are kept: beside the factors of their modules, or in the base's place where PEFT forbids that.

    It forbids that where an embedding or experts have factors, or a module without a bias.
    """
    factored = {name: one for one in present if one.part.kind in FACTORED for name in one.part.modules}
    biased = {one.part.module: one for one in present if one.part.kind == "bias"}
    if not biased:
        return [*present], "none"
    kinds = ("linear", "conv")
    beside = all(one.part.kind in kinds and one.part.biased and not one.part.twins for one in factored.values())
    if beside and biased.keys() <= factored.keys():
        zeros = [_zero_bias(one) for module, one in factored.items() if module not in biased]
        return [*(_only(one, ".lora_B.bias") for one in present), *zeros], "lora"
    return [_only(one, ".bias", module=".base_layer" if one.part.module in factored else "") for one in present], "all"


def _only(one: Kept, end: str, module: str = "") -> Kept:
    """Keep of a bias its change or its value, under the name of the module that holds it then."""
    if one.part.kind != "bias":
        return one
    stem = PREFIX + one.part.module
    if stem + end not in one.places:
        raise OutputError(
            f"PEFT has no place for the change of the bias of '{one.part.module}' beside embeddings, experts and "
            "modules without a bias: leave the rest out by keep_rest: false."
        )
    return replace(one, places={stem + module + end: one.places[stem + end]})


def _zero_bias(one: Kept) -> Kept:
    """Stand for the bias of a module that has not changed, which PEFT asks for beside others."""
    spec = next(iter(one.places.values()))[1]
    bias = torch.empty(one.part.sides[0], dtype=spec.dtype, device="meta")
    return Kept(replace(one.part, kind="bias"), Finished(), _nowhere(stored_bias(one.part, bias)))


def _nowhere(tensors: Mapping[str, Tensor]) -> dict[str, tuple[int, TensorSpec]]:
    return {key: (-1, TensorSpec(tuple(tensor.shape), tensor.dtype)) for key, tensor in tensors.items()}


def _named(present: Sequence[Kept]) -> Iterator[tuple[str, tuple[Kept, str]]]:
    """Yield (key in the file, (part, its own key)): parameters of one module lie in one another, the last outermost."""
    places: dict[str, list[int]] = {}
    for one in present:
        if one.part.kind == "experts":
            places.setdefault(one.part.owner, []).append(one.part.place)
    for one in present:
        for key in one.places:
            if one.part.kind == "experts":
                above = sum(place > one.part.place for place in places[one.part.owner])
                stem = PREFIX + one.part.owner
                yield stem + ".base_layer" * above + key.removeprefix(stem), (one, key)
            else:
                yield key, (one, key)


def _bytes(tensor: Tensor) -> memoryview:
    return memoryview(tensor.contiguous().view(-1).view(torch.uint8).numpy())  # type: ignore[arg-type]


def _read_at(file: int, size: int, offset: int) -> bytearray:
    data, done = bytearray(size), 0
    while done < size:
        done += os.preadv(file, [memoryview(data)[done:]], offset + done)
    return data
