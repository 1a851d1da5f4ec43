"""Scalars, gradients, filters and seeds: one number for one tensor, computed by hand."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hf_merge.schedule import UNSET, Layers, is_filter, leaves, resolve, tensor_seeds

LLAMA = [
    "model.embed_tokens.weight",
    *(
        f"model.layers.{i}.{part}.weight"
        for i in range(5)
        for part in ("self_attn.q_proj", "mlp.up_proj", "input_layernorm")
    ),
    "model.norm.weight",
    "lm_head.weight",
]

some = settings(max_examples=100, deadline=None, derandomize=True, database=None)


# where a tensor lies


@pytest.mark.parametrize(("layer", "depth"), [(0, 0.0), (1, 0.25), (2, 0.5), (3, 0.75), (4, 1.0)])
def test_layers_are_spread_from_0_to_1(layer, depth):
    layers = Layers(LLAMA)
    for part in ("self_attn.q_proj", "mlp.up_proj", "input_layernorm"):
        assert layers.depth(f"model.layers.{layer}.{part}.weight") == depth


@pytest.mark.parametrize("name", ["model.embed_tokens.weight", "model.norm.weight", "lm_head.weight", "weight", ""])
def test_tensors_outside_of_layers_lie_at_0(name):
    assert Layers(LLAMA).depth(name) == 0.0


def test_a_single_layer_lies_at_1():
    assert Layers(["model.layers.0.w", "lm_head.weight"]).depth("model.layers.0.w") == 1.0
    assert Layers(["model.layers.0.w", "lm_head.weight"]).depth("lm_head.weight") == 0.0


def test_encoder_and_decoder_have_depths_of_their_own():
    names = [f"encoder.block.{i}.layer.0.w" for i in range(3)] + [f"decoder.block.{i}.layer.1.w" for i in range(5)]
    layers = Layers([*names, "shared.weight"])
    assert [layers.depth(f"encoder.block.{i}.layer.0.w") for i in range(3)] == [0.0, 0.5, 1.0]
    assert [layers.depth(f"decoder.block.{i}.layer.1.w") for i in range(5)] == [0.0, 0.25, 0.5, 0.75, 1.0]
    assert layers.depth("shared.weight") == 0.0


def test_a_tower_beside_a_language_model_has_its_own_depth():
    names = [f"visual.blocks.{i}.w" for i in range(2)] + [f"model.layers.{i}.w" for i in range(4)]
    layers = Layers(names)
    assert layers.depth("visual.blocks.1.w") == 1.0
    assert layers.depth("model.layers.1.w") == pytest.approx(1 / 3)


def test_the_first_number_is_the_layer_not_that_of_an_expert():
    layers = Layers([f"model.layers.{i}.experts.{e}.w" for i in range(3) for e in range(8)])
    assert layers.depth("model.layers.1.experts.7.w") == 0.5


def test_names_may_begin_with_a_number_and_numbers_inside_words_do_not_count():
    assert Layers(["0.weight", "1.weight", "2.weight"]).depth("1.weight") == 0.5
    assert Layers(["conv1.weight", "conv2.weight", "fc3.bias"]).depth("conv2.weight") == 0.0
    assert Layers(["h.0.w", "h.1.w"]).depth("layer2.1.w") == 1.0  # a stack that nobody has: as if it ended here


def test_the_depth_counts_layers_by_their_number_not_by_their_place():
    assert Layers(["h.10.w", "h.0.w", "h.4.w"]).depth("h.4.w") == 0.4


# values and gradients


@pytest.mark.parametrize("value", [0.3, 7, True, "l1", None])
def test_a_plain_value_holds_everywhere(value):
    assert resolve(value, "model.layers.3.w", 0.7) is value


@pytest.mark.parametrize(
    ("depth", "expected"),
    [(0.0, 0.0), (0.25, 0.5), (0.5, 1.0), (0.625, 0.75), (0.75, 0.5), (1.0, 0.0)],
)
def test_a_gradient_is_linear_between_its_values(depth, expected):
    assert resolve([0, 1, 0], "w", depth) == pytest.approx(expected, abs=1e-12)


def test_a_gradient_over_the_layers_of_a_model_by_hand():
    layers = Layers(LLAMA)
    found = [resolve([1.0, 0.5, 0.1, 0.0], name, layers.depth(name)) for name in LLAMA if "q_proj" in name]
    # places 0, 0.75, 1.5, 2.25, 3 on the list
    assert found == pytest.approx([1.0, 0.625, 0.3, 0.075, 0.0])
    assert resolve([1.0, 0.5], "lm_head.weight", layers.depth("lm_head.weight")) == 1.0


def test_a_model_of_one_layer_gets_the_last_value():
    assert resolve([0.1, 0.9], "model.layers.0.w", Layers(["model.layers.0.w"]).depth("model.layers.0.w")) == 0.9


def test_a_gradient_of_one_value_is_constant():
    assert [resolve([0.4], "w", depth) for depth in (0.0, 0.3, 1.0)] == [0.4] * 3


def test_a_gradient_may_be_a_tuple():
    assert resolve((2, 4), "w", 0.5) == 3


@pytest.mark.parametrize(
    ("values", "found"),
    [
        ([True, False], [True, True, True, False]),
        ([True, False, True], [True, True, False, True]),
        (["l1", "none"], ["l1", "l1", "l1", "none"]),
        (["a", "b", "c"], ["a", "a", "b", "c"]),
        ([None, 1.0], [None, None, None, 1.0]),
    ],
)
def test_lists_of_booleans_and_words_take_the_one_below(values, found):
    assert [resolve(values, "w", depth) for depth in (0.0, 0.4, 0.7, 1.0)] == found


def test_an_empty_list_says_nothing():
    assert resolve([], "w", 0.5) is UNSET


@given(values=st.lists(st.floats(-100, 100), min_size=1, max_size=8), depth=st.floats(0, 1))
@some
def test_a_gradient_stays_between_its_neighbours_and_meets_its_values(values, depth):
    place = depth * (len(values) - 1)
    low, high = values[int(place)], values[min(int(place) + 1, len(values) - 1)]
    assert min(low, high) - 1e-9 <= resolve(values, "w", depth) <= max(low, high) + 1e-9
    assert resolve(values, "w", 0.0) == values[0]
    assert resolve(values, "w", 1.0) == values[-1]


# filters


def test_a_filter_is_a_part_of_the_name():
    setting = {"filter": "mlp", "value": 0.3}
    assert resolve(setting, "model.layers.0.mlp.up_proj.weight", 0.0) == 0.3
    assert resolve(setting, "model.layers.0.self_attn.q_proj.weight", 0.0) is UNSET
    assert resolve({"filter": "m.*p", "value": 0.3}, "model.layers.0.mlp.up_proj.weight", 0.0) is UNSET


@pytest.mark.parametrize("everything", [None, "*"])
def test_no_filter_and_a_star_match_everything(everything):
    assert resolve({"filter": everything, "value": 5}, "lm_head.weight", 0.0) == 5
    assert resolve({"value": 5}, "lm_head.weight", 0.0) == 5


def test_the_first_filter_that_matches_wins():
    setting = [
        {"filter": "self_attn", "value": 0.1},
        {"filter": "q_proj", "value": 0.2},
        {"filter": "mlp", "value": 0.3},
        {"value": 0.4},
        {"filter": "lm_head", "value": 0.5},
    ]
    assert resolve(setting, "model.layers.0.self_attn.q_proj.weight", 0.0) == 0.1
    assert resolve(setting, "vision.q_proj.weight", 0.0) == 0.2
    assert resolve(setting, "model.layers.0.mlp.up_proj.weight", 0.0) == 0.3
    assert resolve(setting, "lm_head.weight", 0.0) == 0.4


def test_where_no_filter_matches_nothing_is_said():
    assert resolve([{"filter": "a", "value": 1}, {"filter": "b", "value": 2}], "c", 0.0) is UNSET


def test_a_filter_may_hold_a_gradient():
    setting = [{"filter": "mlp", "value": [0, 1]}, {"filter": "self_attn", "value": [1, 0]}, {"value": 0.5}]
    assert resolve(setting, "layers.1.mlp", 0.25) == 0.25
    assert resolve(setting, "layers.1.self_attn", 0.25) == 0.75
    assert resolve(setting, "layers.1.norm", 0.25) == 0.5


def test_a_filter_may_hold_filters_and_falls_through_to_the_next():
    setting = [
        {"filter": "mlp", "value": [{"filter": "up", "value": 1}, {"filter": "down", "value": 2}]},
        {"filter": "gate", "value": 3},
        {"value": 4},
    ]
    assert resolve(setting, "mlp.up", 0.0) == 1
    assert resolve(setting, "mlp.down", 0.0) == 2
    assert resolve(setting, "mlp.gate", 0.0) == 3
    assert resolve(setting, "norm", 0.0) == 4


def test_a_filter_with_an_empty_list_falls_through():
    assert resolve([{"filter": "mlp", "value": []}, {"value": 4}], "mlp.up", 0.0) == 4


def test_false_zero_and_none_are_values_and_not_silence():
    for value in (False, 0, None):
        assert resolve([{"filter": "a", "value": value}, {"value": 1}], "a", 0.0) is value


def test_what_is_a_filter():
    assert is_filter({"filter": "a", "value": 1})
    assert is_filter({"value": 1})
    assert not is_filter({"filter": "a"})
    assert not is_filter([1, 2])
    assert not is_filter("value")


def test_leaves_are_all_plain_values():
    setting = [{"filter": "a", "value": [0.1, 0.2]}, {"value": [{"filter": "b", "value": True}, {"value": "x"}]}]
    assert list(leaves(setting)) == [0.1, 0.2, True, "x"]
    assert list(leaves(0.5)) == [0.5]
    assert list(leaves([])) == []
    assert list(leaves((1, None))) == [1, None]


# seeds


def test_seeds_are_the_same_in_every_release():
    assert tensor_seeds(0, "model.layers.0.mlp.up_proj.weight", [0, 1]) == [8585380405802286720, 10351355515090197808]
    assert tensor_seeds(42, "w", [3]) == [11693927606199073672]


def test_seeds_differ_between_tensors_models_and_recipes():
    names = [f"model.layers.{i}.w" for i in range(40)]
    seeds = [s for seed in (0, 1, 2) for name in names for s in tensor_seeds(seed, name, range(5))]
    assert len(set(seeds)) == len(seeds) == 600


def test_words_that_run_together_do_not_share_a_seed():
    assert tensor_seeds(1, "2.w", [3]) != tensor_seeds(12, ".w", [3])
    assert tensor_seeds(1, "w", [11]) != tensor_seeds(1, "w1", [1])


def test_a_seed_belongs_to_the_place_of_a_model_not_to_how_many_there_are():
    assert tensor_seeds(5, "w", [0, 2]) == [tensor_seeds(5, "w", [0, 1, 2])[i] for i in (0, 2)]


def test_seeds_have_64_bits():
    seeds = tensor_seeds(7, "w", range(200))
    assert all(0 <= seed < 1 << 64 for seed in seeds)
    assert max(seeds) > 1 << 62
    for bit in range(64):
        assert 50 < sum(seed >> bit & 1 for seed in seeds) < 150


def test_a_negative_and_a_large_seed_are_seeds_too():
    assert len({*tensor_seeds(-1, "w", [0]), *tensor_seeds(1, "w", [0]), *tensor_seeds(1 << 80, "w", [0])}) == 3
