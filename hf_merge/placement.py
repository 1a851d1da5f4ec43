"""Which device computes which tensor, in accelerate's words: `device_map` and `max_memory`."""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Mapping
from dataclasses import replace

import torch

from hf_merge.architecture import live_names, loaded_devices, skeleton
from hf_merge.errors import RecipeError, shown
from hf_merge.method import get_method
from hf_merge.planning import Plan, Problem, Step, format_bytes, memory_on_device

DeviceMap = str | int | torch.device | Mapping[str, int | str | torch.device]
MaxMemory = Mapping[int | str, int | str]

WORDS = ("auto", "balanced", "balanced_low_0", "sequential")
_SHARE = 0.9  # of the memory that is free on a device; the rest is for what cannot be foreseen


def place(plan: Plan, device_map: DeviceMap = "auto", max_memory: MaxMemory | None = None) -> Plan:
    """Assign a device to every step.

    A tensor is computed where `from_pretrained` would put its module. One whose inputs and temporaries exceed the
    budget of its device goes to another or to the CPU, and the plan says so.

    Args:
        plan: a plan.
        device_map: `balanced`, `balanced_low_0`, `sequential`, or `auto` with `max_memory`: the map that transformers
            would make for the merged model. `auto` alone: what is merged in one pass over its entries on the CPU,
            for which bytes cost as much on their way to an accelerator as the arithmetic there would save, and all
            else spread over the accelerators by bytes. Or a device; or prefixes of names of modules or of tensors
            with their devices. Numbers are accelerators; what lies on `disk` is computed on the CPU.
        max_memory: bytes, or sizes such as `"10GB"`, by device: accelerators by number, and `cpu`. The devices need
            not be here; see `check_devices`.

    Raises:
        RecipeError: a device that is none, that is not here and has no budget, or a tensor that the map leaves out.
    """
    given = None if max_memory is None else _sizes(max_memory)
    wanted = _wanted(plan, device_map, given)
    if given is None:
        check_devices([] if device_map in WORDS else wanted.values())
        budgets = _free_memory({*wanted.values()})
    else:
        budgets = {_device(device): size for device, size in given.items() if device != "disk"}
    fitting, problems = _fitting(plan, wanted, budgets)
    used = {*fitting.values()}
    return replace(
        plan,
        steps=tuple(_on(step, fitting[step.name]) for step in plan.steps),
        budgets={device: size for device, size in budgets.items() if device in used},
        problems=(*plan.problems, *problems),
    )


def _on(step: Step, device: str) -> Step:
    return step if step.device == device else replace(step, device=device)


def check_devices(devices: Iterable[str]) -> None:
    """Refuse devices that are not here.

    Raises:
        RecipeError: one is not.
    """
    for name in dict.fromkeys(devices):
        try:
            torch.empty(0, device=name)
        except (RuntimeError, AssertionError) as error:
            raise RecipeError(f"device_map names '{name}', which is not here: {str(error).splitlines()[0]}") from None


def _accelerators() -> list[str]:
    """Names of the accelerators here; Apple's is left out, as it has no float64."""
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if kind is None or kind.type == "mps":
        return []
    return [f"{kind.type}:{i}" for i in range(torch.accelerator.device_count())]


def _free_memory(devices: Iterable[str]) -> dict[str, int]:
    """Return what may be used of the accelerators among some devices, as far as it can be asked."""
    found: dict[str, int] = {}
    for device in sorted(devices):
        if device != "cpu":
            with contextlib.suppress(RuntimeError, AssertionError, ValueError):
                unused = torch.accelerator.memory_reserved(device) - torch.accelerator.memory_allocated(device)
                found[device] = int(_SHARE * (torch.accelerator.get_memory_info(device)[0] + unused))
    return found


def _device(name: int | str | torch.device) -> str:
    """Return torch's name of a device as accelerate calls it: 1 is `cuda:1`, and what is on disk is computed here."""
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if isinstance(name, int) or (isinstance(name, str) and name.isdigit()):
        return f"{kind.type if kind else 'cuda'}:{name}"
    if str(name) == "disk":
        return "cpu"
    try:
        device = torch.device(name)
    except RuntimeError as error:
        raise RecipeError(f"device_map names '{name}', which is not here: {str(error).splitlines()[0]}") from None
    if kind is not None and device.type == kind.type and device.index is None:
        return f"{device.type}:{torch.accelerator.current_device_index()}"
    return device.type if device.type == "cpu" else str(device)


def _sizes(max_memory: MaxMemory) -> dict[int | str, int]:
    """Read budgets: numbers of accelerators first, as accelerate orders them."""
    from accelerate.utils import convert_file_size_to_int

    found: dict[int | str, int] = {}
    for name, size in max_memory.items():
        device = int(name) if isinstance(name, str) and name.isdigit() else name
        if device not in ("cpu", "disk", "mps") and (type(device) is not int or device < 0):
            raise RecipeError(f"max_memory names {shown(name)}: write a number for an accelerator, cpu or disk.")
        try:
            found[device] = convert_file_size_to_int(size)
        except (ValueError, AttributeError, TypeError):
            raise RecipeError(
                f"max_memory of {name} should be bytes or a size such as '10GB'; found {shown(size)}."
            ) from None
    return {device: found[device] for device in sorted(found, key=lambda one: (isinstance(one, str), one))}


def _wanted(plan: Plan, device_map: DeviceMap, given: Mapping[int | str, int] | None) -> dict[str, str]:
    """Return the device of every tensor as the map says, whether it has room or not."""
    if isinstance(device_map, Mapping):
        live = live_names(plan.config, plan.model_specs)
        return {name: _longest_prefix([live.get(name, name), name], device_map) for name in plan.model_specs}
    if device_map not in WORDS:
        return dict.fromkeys(plan.model_specs, _device(device_map))
    if device_map == "auto" and given is None:
        return _by_cost(plan, _accelerators())
    found = loaded_devices(plan.config, plan.model_specs, str(device_map), given)
    return _by_bytes(plan, str(device_map), given) if found is None else _completed(plan, found)


def _longest_prefix(names: list[str], device_map: Mapping[str, int | str | torch.device]) -> str:
    """Look a tensor up, by its name in memory and then by that in its file."""
    for name in names:
        parts = name.split(".")
        for end in range(len(parts), 0, -1):
            if (device := device_map.get(".".join(parts[:end]))) is not None:
                return _device(device)
    if (rest := device_map.get("")) is not None:
        return _device(rest)
    raise RecipeError(f"device_map says nothing of '{names[0]}'; give '' a device to cover the rest.")


def _completed(plan: Plan, found: Mapping[str, int | str]) -> dict[str, str]:
    """Give tensors that the model has no place for to the device of the one before them."""
    last = next((found[name] for name in plan.model_specs if name in found), "cpu")
    wanted: dict[str, str] = {}
    for name in plan.model_specs:
        last = found.get(name, last)
        wanted[name] = _device(last)
    return wanted


def _groups(plan: Plan) -> list[list[Step]]:
    """List the steps; those of weights that the model ties are together."""
    model = skeleton(plan.config) if plan.config else None
    groups: dict[str, list[Step]] = {}
    for step in plan.steps:
        groups.setdefault(step.name if model is None else model.tied.get(step.name, step.name), []).append(step)
    return list(groups.values())


def _by_cost(plan: Plan, accelerators: list[str]) -> dict[str, str]:
    """Give what takes more than one pass over its entries to the accelerator with the fewest bytes so far."""
    if not accelerators:
        return dict.fromkeys(plan.model_specs, "cpu")
    load, found = dict.fromkeys(accelerators, 0), {}
    for group in _groups(plan):
        device = min(load, key=lambda one: load[one]) if any(map(_is_costly, group)) else "cpu"
        found |= {step.name: device for step in group}
        if device != "cpu":
            load[device] += sum(step.spec.nbytes for step in group)
    return found


def _is_costly(step: Step) -> bool:
    """Tell whether arithmetic takes longer than bringing the inputs to an accelerator: reductions, ranks, rows."""
    method = None if step.method is None else get_method(step.method)
    return method is not None and bool(method.reductions or not method.tiled(step.settings))


def _by_bytes(plan: Plan, word: str, given: Mapping[int | str, int] | None) -> dict[str, str]:
    """Place the tensors of a model that transformers does not know: accelerators first, then the CPU, then the disk."""
    budgets = _free_memory(_accelerators()) if given is None else {_device(key): size for key, size in given.items()}
    room = {device: size for device, size in budgets.items() if device != "cpu"}
    if word == "balanced_low_0":
        room = dict([*list(room.items())[1:], *list(room.items())[:1]])
    found: dict[str, str] = {}
    load = dict.fromkeys(room, 0)
    for group in _groups(plan):
        size = sum(step.spec.nbytes for step in group)
        free = [device for device in room if load[device] + size <= room[device]]
        in_turn = word in ("sequential", "balanced_low_0")
        device = "cpu" if not free else free[0] if in_turn else min(free, key=lambda one: load[one])
        found |= {step.name: device for step in group}
        if device != "cpu":
            load[device] += size
    return found


def _fitting(plan: Plan, wanted: Mapping[str, str], budgets: Mapping[str, int]) -> tuple[dict[str, str], list[Problem]]:
    """Move tensors that do not fit their devices with what is needed to compute them; say which."""
    found = dict(wanted)
    moved: dict[tuple[str, str], list[tuple[int, str]]] = {}
    tight = {device for device in {*wanted.values()} if device in budgets}
    for group in _groups(plan) if tight else ():
        for device in sorted({wanted[step.name] for step in group} & tight):
            steps = [step for step in group if wanted[step.name] == device]
            if (need := _need(steps, device)) > budgets[device]:
                other = _roomiest(steps, budgets)
                found |= {step.name: other for step in steps}
                moved.setdefault((device, other), []).extend((need, step.name) for step in steps)
    return found, [_moved(device, other, needs, budgets) for (device, other), needs in moved.items()]


def _need(steps: list[Step], device: str) -> int:
    return max(memory_on_device(replace(step, device=device)) for step in steps)


def _roomiest(steps: list[Step], budgets: Mapping[str, int]) -> str:
    """Return the accelerator with the largest budget if these fit there, else the CPU."""
    fit = [device for device in budgets if device != "cpu" and _need(steps, device) <= budgets[device]]
    return max(fit, key=lambda device: budgets[device], default="cpu")


def _moved(device: str, other: str, needs: list[tuple[int, str]], budgets: Mapping[str, int]) -> Problem:
    most, count = max(needs)[0], len(needs)
    noun = f"{count} tensor{'s' * (count != 1)}"
    takes = f"with inputs and temporaries up to {format_bytes(most)}, and {format_bytes(budgets[device])} may be used"
    if device == other:
        return Problem("warning", f"{noun} may take more memory than there is for {device}: {takes}.",
                       tuple(name for _, name in needs))  # fmt: skip
    return Problem("warning", f"{noun} moved from {device} to {other}: {takes} there. Raise max_memory to keep them.",
                   tuple(name for _, name in needs))  # fmt: skip
