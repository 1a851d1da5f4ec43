"""Which device computes which tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from hf_merge.errors import RecipeError
from hf_merge.method import get_method
from hf_merge.planning import Plan

DeviceMap = str | Mapping[str, int | str]


def place(plan: Plan, device_map: DeviceMap = "auto") -> Plan:
    """Assign a device to every step.

    Args:
        plan: a plan.
        device_map: `auto`: elementwise methods on the CPU, as their bytes cost more on the bus than their
            arithmetic, and others spread over the accelerators; a device such as `cpu` or `cuda:1`; or prefixes
            of tensor names with their devices, as accelerate writes them.

    Raises:
        RecipeError: a device that does not exist, or a tensor that the map does not cover.
    """
    if isinstance(device_map, Mapping):
        devices = {step.name: _longest_prefix(step.name, device_map) for step in plan.steps}
    elif device_map == "auto":
        devices = _spread(plan, _accelerators())
    else:
        devices = dict.fromkeys(plan.specs, _known(device_map))
    return replace(plan, steps=tuple(replace(step, device=devices[step.name]) for step in plan.steps))


def _accelerators() -> list[str]:
    """Names of the accelerators here; Apple's is left out, as it has no float64."""
    kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if kind is None or kind.type == "mps":
        return []
    return [f"{kind.type}:{i}" for i in range(torch.accelerator.device_count())]


def _known(device: int | str) -> str:
    """Check that a device exists."""
    name = f"cuda:{device}" if isinstance(device, int) else device
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(f"device_map names '{name}', which is not here: {str(error).splitlines()[0]}") from None
    return name


def _spread(plan: Plan, accelerators: list[str]) -> dict[str, str]:
    """Give each tensor that is not merged elementwise to the accelerator with the fewest bytes so far."""
    load, found = dict.fromkeys(accelerators, 0), {}
    for step in plan.steps:
        tiled = step.method is None or get_method(step.method).tiled(step.settings)
        found[step.name] = "cpu" if tiled or not load else min(load, key=lambda device: load[device])
        if found[step.name] != "cpu":
            load[found[step.name]] += step.spec.nbytes
    return found


def _longest_prefix(name: str, device_map: Mapping[str, int | str]) -> str:
    parts = name.split(".")
    for end in range(len(parts), -1, -1):
        if (device := device_map.get(".".join(parts[:end]))) is not None:
            return _known("cpu" if device == "disk" else device)
    raise RecipeError(f"device_map says nothing of '{name}'; give '' a device to cover the rest.")
