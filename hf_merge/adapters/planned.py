"""Plan -> the same plan for an adapter: computed in float32, with what becomes of each tensor; problems."""

from __future__ import annotations

import fnmatch
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any

import torch

from hf_merge.adapters.modules import Layout, largest_rank, layout_of, numbers
from hf_merge.adapters.parts import FACTORED, Part
from hf_merge.adapters.settings import VLLM_RANKS
from hf_merge.adapters.slots import Change
from hf_merge.errors import did_you_mean
from hf_merge.planning import Plan, Problem, default_workers, format_bytes
from hf_merge.recipe import Recipe
from hf_merge.schedule import tensor_seeds
from hf_merge.sources import Source
from hf_merge.types import ModelRef, TensorSpec

ALL_LINEAR = "all-linear"
"""PEFT's word for all linear layers."""

WORDS = {
    "linear": "linear layers", "conv": "convolutions", "embedding": "embeddings", "experts": "experts",
    "bias": "biases", "whole": "modules saved whole", "none": "tensors that no adapter can hold",
}  # fmt: skip


def planned(plan: Plan, sources: Sequence[Source]) -> Plan:
    """Plan an adapter: every tensor in float32, and what becomes of it.

    Args:
        plan: the merge, as a model.
        sources: its models, in its order.
    """
    wide = torch.float64 if "float64" in (plan.recipe.dtype, plan.recipe.out_dtype) else torch.float32
    steps = tuple(
        replace(step, spec=TensorSpec(step.spec.shape, wide)) if step.spec.dtype.is_floating_point else step
        for step in plan.steps
    )
    made = replace(plan, steps=steps)
    problems = [*_problems(made, sources)]
    found = any(problem.severity == "error" for problem in problems)
    slots = {} if found else slots_of(made, sources)
    rows = {} if found else _rows(made, slots)
    needed = max((_memory(made, slot) for own in slots.values() for slot in own), default=0)
    made = replace(made, peak_memory=made.peak_memory + default_workers() * needed)
    order = sorted((*plan.problems, *problems), key=lambda one: one.severity != "error")
    return replace(made, problems=tuple(order), adapter=rows)


def _memory(plan: Plan, slot: Change) -> int:
    """Estimate the bytes of working memory of a slot: merge, change, a copy of it, and squares of its lesser side."""
    size = sum(plan.specs[name].numel for name in slot.names)
    square = min(slot.part.sides) ** 2 if slot.part.kind in FACTORED else 0
    return 4 * 4 * size + 4 * 8 * square


def base_of(plan: Plan, sources: Sequence[Source]) -> Source:
    """Return the base as it is stored."""
    return sources[plan.donor].parts[0]


def slots_of(plan: Plan, sources: Sequence[Source]) -> dict[str, list[Change]]:
    """Say what becomes of each tensor of a plan that the base has: by name, the parts that it is of."""
    layout = layout_of(base_of(plan, sources).config)
    base, recipe = sources[plan.donor], plan.recipe
    found: dict[str, list[Change]] = {name: [] for name in plan.specs}
    for part, (names, live, converted) in _by_part(layout, plan, base).items() if layout else ():
        slot = Change(
            part=part, names=names, live=live, base=base, tables=layout.tables if layout and converted else None,
            rank=recipe.rank if not isinstance(recipe.rank, str) else None, exact=recipe.exact_svd,
            seed=tensor_seeds(recipe.seed, part.module, ["svd"])[0],
            dtype=getattr(torch, recipe.out_dtype or recipe.dtype or "", None),
            is_left_out=not _is_wanted(part, recipe),
        )  # fmt: skip
        for name in names:
            found[name].append(slot)
    return {name: slots for name, slots in found.items() if slots}


def _by_part(layout: Layout, plan: Plan, base: Source) -> dict[Part, tuple[tuple[str, ...], tuple[str, ...], bool]]:
    """Return for each part the tensors of the plan that it is of, their names in memory, and if these are others."""
    places = layout.tables.places(name for name in plan.specs if name in base.specs)
    taken = {one for place in places.values() for one in place.live}
    aliases = {layout.tied[one] for one in taken if one in layout.tied}  # tied in the class, and apart in the merge
    found: dict[Part, tuple[list[str], list[str]]] = {}
    for name in (name for name in plan.specs if name in places):
        for one in (one for one in places[name].live if one in layout.parts):
            part = replace(layout.parts[one], twins=()) if one in aliases else layout.parts[one]
            names, live = found.setdefault(part, ([], []))
            names += [name] if name not in names else []
            live += [one] if one not in live else []
    return {
        part: (tuple(names), tuple(live), any(places[name].pattern for name in names))
        for part, (names, live) in found.items()
        if any(plan.specs[name].dtype.is_floating_point for name in names)
    }


def _is_wanted(part: Part, recipe: Recipe) -> bool:
    """Tell whether the adapter is to carry the change of a part."""
    if part.kind in FACTORED:
        targets = recipe.targets or ((ALL_LINEAR,) if recipe.vllm else None)
        return targets is None or any(_matches(target, part) for target in targets)
    return not recipe.vllm if recipe.keep_rest is None else recipe.keep_rest


def _matches(target: str, part: Part) -> bool:
    """Tell whether a target means a module: its name, the end of it after a dot, or a pattern for all of it."""
    if target == ALL_LINEAR:
        return part.kind == "linear"
    if set("*?[") & set(target):
        return any(fnmatch.fnmatchcase(name, target) for name in part.modules)
    return any(name == target or name.endswith(f".{target}") for name in part.modules)


def _problems(plan: Plan, sources: Sequence[Source]) -> Iterator[Problem]:
    """Yield what stands against writing a merge as an adapter."""
    recipe, base = plan.recipe, base_of(plan, sources)
    if told := _no_base(recipe, sources[plan.donor]):
        yield Problem("error", told)
        return
    if plan.stacks:
        yield Problem("error", "An adapter keeps the layers of its base: write stacked or pruned layers as a model.")
    if recipe.rank == "sum":
        yield Problem(
            "error", "rank: sum is for adapters that are merged with one another: name a number, or an energy."
        )
    layout = layout_of(base.config)
    if layout is None:
        yield Problem("error", f"'{base.label}' has no config.json with a class of transformers' own, so that its "
                      "modules are not known, which an adapter names: write a model.")  # fmt: skip
        return
    yield from _of_shapes(plan, sources[plan.donor], base)
    parts = list(_by_part(layout, plan, sources[plan.donor]))
    yield from _of_targets(recipe, [part for part in parts if part.kind in FACTORED])
    known = layout.live(name for name in plan.specs if name in sources[plan.donor].specs)
    if strange := tuple(name for name in plan.specs if name not in known):
        told = f"{len(strange)} tensors are no parameters of the base's class: the adapter has nothing of them."
        yield Problem("warning", told, strange)
    if recipe.rank is None:
        yield Problem("warning", "Without rank=, factors hold all of the change, and may be larger than the model.")
    if recipe.vllm:
        yield from _of_vllm(recipe, [part for part in parts if _is_wanted(part, recipe)])


def _no_base(recipe: Recipe, base: Source) -> str:
    """Say why there is no base to write an adapter over."""
    if recipe.base_model is None:
        return "An adapter is written over its base: pass base_model=, the model that it changes."
    if base.parents or (isinstance(recipe.base_model, ModelRef) and recipe.base_model.lora):
        return (
            f"'{recipe.base_model}' is made by this recipe and lies nowhere, so that no adapter can be loaded over it: "
            "merge it into a folder first, and name that as base_model."
        )
    return ""


def _of_shapes(plan: Plan, shown: Source, base: Source) -> Iterator[Problem]:
    """Yield that the merge has tensors of another shape than the base as it is stored: other rows for tokens."""
    other = [name for name in plan.specs if name in base.specs and plan.specs[name].shape != base.specs[name].shape]
    if other:
        yield Problem("error", "The merge has another vocabulary than the base, and an adapter adds no tokens: "
                      "set tokenizer_source: base, or write a model.", tuple(other))  # fmt: skip


def _of_targets(recipe: Recipe, parts: Sequence[Part]) -> Iterator[Problem]:
    """Yield targets that are no module's name."""
    words = {word for part in parts for name in part.modules for word in (name, name.rpartition(".")[2])}
    for target in recipe.targets or ():
        if not any(_matches(target, part) for part in parts):
            yield Problem("error", f"No module is called '{target}'.{did_you_mean(target, words)} A target is the name "
                          "of a layer, its end, as 'q_proj', or a pattern, as '*.mlp.*'.")  # fmt: skip


def _of_vllm(recipe: Recipe, parts: Iterable[Part]) -> Iterator[Problem]:
    """Yield what vLLM does not load."""
    kinds = {part.kind: part for part in parts if part.kind not in ("linear", "none")}
    for kind, part in kinds.items():
        fix = "leave keep_rest out" if kind in ("bias", "whole") else "leave it out of targets"
        yield Problem("error", f"vLLM loads no adapter with {WORDS[kind]}, such as '{part.module}': {fix}.")
    if isinstance(recipe.rank, int) and recipe.rank > VLLM_RANKS[-1]:
        yield Problem("error", f"vLLM takes adapters up to rank {VLLM_RANKS[-1]}: ask for less than {recipe.rank}.")


def _rows(plan: Plan, slots: Mapping[str, Sequence[Change]]) -> dict[str, Any]:
    """Say what will be written, as far as headers tell."""
    changes = list(dict.fromkeys(slot for own in slots.values() for slot in own))
    wanted = [slot for slot in changes if not slot.is_left_out and slot.part.kind != "none"]
    limit = plan.recipe.rank if isinstance(plan.recipe.rank, int) else None
    size = 0
    for slot in wanted:
        spec = slot.base.specs[slot.names[0]] if isinstance(slot.base, Source) else plan.specs[slot.names[0]]
        width = (slot.dtype or spec.dtype).itemsize
        rank = min(largest_rank(slot.part), limit or largest_rank(slot.part)) if slot.part.kind in FACTORED else 0
        size += width * (numbers(slot.part, rank) if rank else sum(plan.specs[name].numel for name in slot.names))
    counts = Counter(WORDS[slot.part.kind] for slot in wanted)
    left = Counter(WORDS[slot.part.kind] for slot in changes if slot not in wanted)
    rank = plan.recipe.rank
    told = "all of the change" if rank is None else f"at most {rank}" if limit else f"keeps {rank:.6g} of the energy"
    return {
        "adapter": ", ".join(f"{count} {words}" for words, count in counts.items()) + ", as far as they change",
        "left out": ", ".join(f"{count} {words}" for words, count in left.items()) or "nothing",
        "rank": told,
        "at most": format_bytes(size),
        "bytes": size,
    }
