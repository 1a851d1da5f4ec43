"""Which device computes which tensor."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import torch

from hf_merge.errors import RecipeError
from hf_merge.planning import Plan

DeviceMap = str | Mapping[str, int | str]


def place(plan: Plan, device_map: DeviceMap = "auto") -> Plan:
    """Assign a device to every step.

    Args:
        plan: a plan.
        device_map: `auto`: all accelerators, the largest share of bytes to none (the CPU where there is none);
            a device such as `cpu` or `cuda:1`; or prefixes of tensor names with their devices, as accelerate
            writes them.

    Raises:
        RecipeError: a device that does not exist, or a tensor that the map does not cover.
    """
    if isinstance(device_map, Mapping):
        devices = {step.name: _longest_prefix(step.name, device_map) for step in plan.steps}
    else:
        devices = _balance(plan, _devices(device_map))
    return replace(plan, steps=tuple(replace(step, device=devices[step.name]) for step in plan.steps))


def _devices(device_map: str) -> list[str]:
    if device_map == "auto":
        kind = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        return [f"{kind.type}:{i}" for i in range(torch.accelerator.device_count())] if kind else ["cpu"]
    return [_known(device_map)]


def _known(device: int | str) -> str:
    """Check that a device exists."""
    name = f"cuda:{device}" if isinstance(device, int) else device
    try:
        torch.empty(0, device=name)
    except (RuntimeError, AssertionError) as error:
        raise RecipeError(f"device_map names '{name}', which is not here: {str(error).splitlines()[0]}") from None
    return name


def _balance(plan: Plan, devices: list[str]) -> dict[str, str]:
    """Give each tensor to the device that has the fewest bytes so far."""
    load, found = dict.fromkeys(devices, 0), {}
    for step in plan.steps:
        found[step.name] = min(load, key=lambda device: load[device])
        load[found[step.name]] += step.spec.nbytes
    return found


def _longest_prefix(name: str, device_map: Mapping[str, int | str]) -> str:
    parts = name.split(".")
    for end in range(len(parts), -1, -1):
        if (device := device_map.get(".".join(parts[:end]))) is not None:
            return _known("cpu" if device == "disk" else device)
    raise RecipeError(f"device_map says nothing of '{name}'; give '' a device to cover the rest.")
