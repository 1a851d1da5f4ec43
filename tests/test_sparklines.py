"""Parameters over the layers as text: what varies is drawn, what does not is not."""

import torch

import hf_merge
from hf_merge.sparklines import MAX_LINES, MAX_WIDTH, pictures
from hf_merge.types import InMemory

NAMES = ["embed.weight", *(f"h.{i}.{part}.weight" for i in range(8) for part in ("attn.q", "attn.k", "mlp.up", "norm"))]


def planned(models, names=NAMES, **recipe):
    tensors = {name: torch.ones(2) for name in names}
    entries = [{"model": InMemory(dict(tensors), "x"), "parameters": parameters} for parameters in models]
    return hf_merge.plan({"models": entries, "merge_method": "linear", **recipe})


def drawn(plan):
    return pictures(plan, [f"org/{'abcdefghijklmnopqrstuvwxyz'[i]}" for i in range(len(plan.models))]).splitlines()


def test_what_does_not_vary_is_not_drawn():
    assert drawn(planned([{"weight": 0.5}, {"weight": 1.0}])) == []
    assert drawn(planned([{"weight": [0.5, 0.5]}, {}])) == []


def test_a_gradient_is_one_line_from_low_to_high():
    assert drawn(planned([{"weight": [0, 1]}, {"weight": 1.0}])) == ["h 0-7", "  weight  org/a  ▁▂▃▄▅▆▇█  0 to 1"]


def test_models_of_one_course_share_a_line_and_columns_line_up():
    lines = drawn(planned([{"weight": [0, 1]}, {"weight": [0, 1]}, {"weight": [1, 0.5]}]))
    assert lines[1] == "  weight  org/a, org/b  ▁▂▃▄▅▆▇█  0 to 1"
    assert lines[2].startswith("  weight  org/c         █") and lines[2].endswith("  0.5 to 1") and len(lines) == 3


def test_filters_are_named_by_as_little_as_tells_them_apart():
    weight = [{"filter": "attn", "value": 0.25}, {"filter": "mlp", "value": [0, 1]}, {"value": 0.5}]
    lines = drawn(planned([{"weight": weight}, {}]))
    assert [line.split()[2] for line in lines[1:]] == ["attn", "mlp", "norm"]
    assert lines[1].endswith("  ▃▃▃▃▃▃▃▃  0.25") and lines[2].endswith("  ▁▂▃▄▅▆▇█  0 to 1")
    half = drawn(planned([{"weight": [{"filter": "attn.q", "value": 0}, {"value": 1}]}, {}]))
    assert [line.split("  ")[3].strip() for line in half[1:]] == ["attn.q", "attn.k, mlp, norm"]


def test_a_parameter_of_the_merge_has_no_model():
    tensors = {name: torch.ones(2) for name in NAMES}
    recipe = {
        "models": [{"model": InMemory(dict(tensors), "x")}],
        "merge_method": "slerp",
        "base_model": InMemory(dict(tensors), "x"),
    }
    plan = hf_merge.plan({**recipe, "parameters": {"t": [0, 0.5, 1]}})
    assert drawn(plan)[1].split() == ["t", "▁▂▃▄▅▆▇█", "0", "to", "1"]


def test_seeds_and_words_are_no_numbers():
    tensors = {name: torch.ones(2) for name in NAMES}
    recipe = {
        "models": [{"model": InMemory(dict(tensors), "x"), "parameters": {"density": 0.5}}],
        "base_model": InMemory(dict(tensors), "x"),
    }
    assert drawn(hf_merge.plan({**recipe, "merge_method": "dare_ties"})) == []


def test_layers_that_a_model_has_no_part_in_are_dots():
    a, b = (InMemory({name: torch.ones(2) for name in NAMES}, label) for label in "ab")
    slices = [
        {"sources": [{"model": a, "layer_range": [0, 4], "parameters": {"weight": [0.5, 1]}}]},
        {"sources": [{"model": b, "layer_range": [4, 8]}]},
    ]
    lines = drawn(hf_merge.plan({"merge_method": "linear", "slices": slices}))
    assert len(lines) == 2 and "····" in lines[1] and lines[1].split()[1] == "org/a"


def test_many_layers_are_thinned_out_and_many_lines_cut():
    names = [f"h.{i}.w" for i in range(200)]
    lines = drawn(planned([{"weight": [0, 1]}, {}], names=names))
    assert lines[0] == "h 0-199" and len(lines[1].split()[2]) == MAX_WIDTH
    many = drawn(planned([{"weight": [i / 100, 1]} for i in range(20)], names=names[:4]))
    assert len(many) == MAX_LINES + 2 and many[-1].endswith("4 more, as the recipe says")


def test_every_stack_is_by_itself():
    names = [*NAMES, *(f"vision.{i}.w" for i in range(2))]
    lines = drawn(planned([{"weight": [0, 1]}, {}], names=names))
    assert [line for line in lines if not line.startswith(" ")] == ["h 0-7", "vision 0-1"]
