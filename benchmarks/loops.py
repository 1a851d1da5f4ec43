"""Merges as a short script does them: all models loaded by transformers, a formula over state dicts, one saved."""

from __future__ import annotations

_LOAD = """
import sys, torch
from transformers import AutoModelForCausalLM
output, *paths = sys.argv[1:]
models = [AutoModelForCausalLM.from_pretrained(path) for path in paths]
first, *others = [model.state_dict() for model in models]
"""
_SAVE = """
models[0].load_state_dict(merged)
models[0].save_pretrained(output)
"""
_LINEAR = """
merged = {}
for name in first:
    merged[name] = torch.stack([state[name].float() for state in (first, *others)]).mean(0)
"""
_TASK_ARITHMETIC = """
merged = {}
for name, base in first.items():
    merged[name] = base.float() + sum(0.5 * (state[name].float() - base.float()) for state in others)
"""
_SLERP = """
merged = {}
for name in first:
    a, b = first[name].float(), others[0][name].float()
    angle = torch.acos((a.flatten() @ b.flatten() / (a.norm() * b.norm())).clamp(-1, 1))
    near = torch.sin(angle) < 0.03  # almost the same direction: a straight line
    merged[name] = (a + b) / 2 if near else torch.sin(angle / 2) / torch.sin(angle) * (a + b)
"""

LOOPS = {
    name: _LOAD + formula + _SAVE
    for name, formula in {"linear": _LINEAR, "task_arithmetic": _TASK_ARITHMETIC, "slerp": _SLERP}.items()
}
"""By method; weights are 0.5 each, and slerp meets in the middle. Arguments: output, then models, a base first."""
