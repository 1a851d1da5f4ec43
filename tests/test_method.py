"""The grammar of a method, its registry, and methods that others register."""

import importlib.metadata
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Annotated, Literal

import pytest
import torch
from torch import Tensor

import hf_merge
from hf_merge import method as method_module
from hf_merge.errors import MergeError, ParameterError, PlanError, RecipeError, UnknownMethodError
from hf_merge.method import LAMBDA, MergeMethod, get_method, list_methods, merge_method
from hf_merge.types import Deltas, Fraction, Merged, Models, Number, PerModel, Positive, Reduced, Seed, Stack, each

PAPER = "https://example.org/paper"


@pytest.fixture(autouse=True)
def registry():
    """Whatever a test registers is gone after it."""
    list_methods()
    before = dict(method_module._registry)
    yield method_module._registry
    method_module._registry.clear()
    method_module._registry.update(before)


@pytest.fixture
def shrink() -> MergeMethod:
    """A method of somebody else: the mean task vector, cut off at a share of its largest entry."""

    def largest(tiles, *, weight: Sequence[float]) -> float:
        return max(float(abs(sum(w * m for w, m in zip(weight, tile, strict=True))).max()) for tile in tiles)

    @merge_method(paper=PAPER, elementwise=True, ignored=("int8_mask",))
    def shrink(
        deltas: Deltas,
        peak: Annotated[float, Reduced(largest)],
        *,
        weight: PerModel[Number] = each(1.0),
        share: Fraction = 1.0,
        mode: Literal["clip", "drop"] = "clip",
    ) -> Merged:
        """Sum task vectors and cut what exceeds a share of the largest entry.

            merged = base + lambda * clip(sum_i weight_i * d_i)

        Args:
            weight: scale of each
                task vector.
            share: of the largest entry.
            mode: clip what is larger, or drop it.

        Notes:
            Made for a test,
            in two lines.
        """
        total = sum(w * d for w, d in zip(weight, deltas, strict=True))
        limit = share * peak
        return total.clamp(-limit, limit) if mode == "clip" else torch.where(total.abs() > limit, 0, total)

    return shrink


# the grammar


def test_everything_is_read_from_signature_and_docstring(shrink):
    assert (shrink.name, shrink.space, shrink.base, shrink.count) == ("shrink", "deltas", "required", None)
    assert shrink.elementwise
    assert shrink.paper == PAPER
    assert list(shrink.parameters) == ["weight", "share", "mode", "lambda"]
    assert list(shrink.reductions) == ["peak"]
    assert shrink.seeded is None
    assert shrink.ignored == ("int8_mask",)
    assert shrink.summary == "Sum task vectors and cut what exceeds a share of the largest entry."
    assert shrink.formula == "merged = base + lambda * clip(sum_i weight_i * d_i)"
    assert shrink.notes == "Made for a test, in two lines."
    assert shrink.parameters["weight"].help == "scale of each task vector."
    assert shrink.parameters["share"].help == "of the largest entry."
    assert [p.per_model for p in shrink.parameters.values()] == [True, False, False, False]
    assert [p.default for p in shrink.parameters.values()] == [1.0, 1.0, "clip", 1.0]
    assert [p.words for p in shrink.parameters.values()] == ["number", "number in [0, 1]", "clip | drop", "number"]


def test_the_first_argument_says_the_space_and_base_says_whether_one_is_needed():
    @merge_method(paper=PAPER)
    def with_none(models: Models) -> Merged:
        """Do it."""
        return models[0]

    @merge_method(paper=PAPER)
    def with_base(models: Models, base: Tensor) -> Merged:
        """Do it."""
        return base

    @merge_method(paper=PAPER)
    def perhaps(models: Models, base: Tensor | None) -> Merged:
        """Do it."""
        return models[0] if base is None else base

    @merge_method(paper=PAPER)
    def on_deltas(deltas: Deltas) -> Merged:
        """Do it."""
        return deltas[0]

    found = [(m.space, m.base) for m in (with_none, with_base, perhaps, on_deltas)]
    assert found == [("models", "ignored"), ("models", "required"), ("models", "optional"), ("deltas", "required")]
    assert [LAMBDA.name in m.parameters for m in (with_none, with_base, perhaps, on_deltas)] == [
        False,
        False,
        False,
        True,
    ]
    assert perhaps([torch.ones(2)]).tolist() == [1.0, 1.0]
    assert perhaps([torch.ones(2)], torch.zeros(2)).tolist() == [0.0, 0.0]
    assert not with_none.elementwise


def test_a_method_may_have_another_name_than_its_function_and_a_count_of_models():
    @merge_method(paper=PAPER, name="other-name", models=2)
    def some_function(models: Models) -> Merged:
        """Do it."""
        return models[0]

    assert get_method("other-name") is some_function
    assert some_function.count == 2
    assert "some_function" not in list_methods()


def test_a_first_argument_of_another_name_is_refused():
    with pytest.raises(TypeError, match=r"'wrong'.*models, deltas or factors.*'weights'"):

        @merge_method(paper=PAPER)
        def wrong(weights: Models) -> Merged:
            """Do it."""
            return weights[0]

    assert "wrong" not in list_methods()


def test_a_function_without_tensors_is_refused():
    with pytest.raises(TypeError, match=r"'wrong'.*models, deltas or factors"):

        @merge_method(paper=PAPER)
        def wrong(*, weight: PerModel[Number] = each(1.0)) -> Merged:
            """Do it."""
            return torch.zeros(())


def test_a_tensor_that_nobody_computes_is_refused():
    with pytest.raises(TypeError, match=r"'wrong'.*does not explain: moon, mars"):

        @merge_method(paper=PAPER)
        def wrong(models: Models, moon: Tensor, mars: Tensor) -> Merged:
            """Do it."""
            return models[0]


def test_a_parameter_without_default_is_refused():
    with pytest.raises(TypeError, match=r"'weight' needs a default"):

        @merge_method(paper=PAPER)
        def wrong(models: Models, *, weight: PerModel[Number]) -> Merged:
            """Do it."""
            return models[0]


def test_a_parameter_without_annotation_is_refused_by_name():
    with pytest.raises(TypeError, match="'weight'"):

        @merge_method(paper=PAPER)
        def wrong(models: Models, *, weight=1.0) -> Merged:
            """Do it."""
            return models[0]


def test_a_tensor_without_annotation_is_refused_by_name():
    with pytest.raises(TypeError, match="'moon'"):

        @merge_method(paper=PAPER)
        def wrong(models: Models, moon) -> Merged:
            """Do it."""
            return models[0]


@pytest.mark.parametrize("star", ["*args", "**kwargs"])
def test_arguments_without_a_name_are_refused(star):
    space = {"Models": Models, "Tensor": Tensor, "Merged": Merged}
    exec(f'def wrong(models: Models, {star}: Tensor) -> Merged:\n    """Do it."""', space)
    with pytest.raises(TypeError, match=rf"'wrong'.*{star.strip('*')}"):
        merge_method(paper=PAPER)(space["wrong"])


def test_what_is_refused_is_not_registered():
    before = list_methods()
    with pytest.raises(TypeError):

        @merge_method(paper=PAPER)
        def halfway(models: Models, *, weight: PerModel[Number]) -> Merged:
            """Do it."""
            return models[0]

    assert list_methods() == before


# parameters


def test_one_value_holds_for_every_model(shrink):
    assert shrink.settings(3, {"weight": 2}) == {"weight": [2.0] * 3, "share": 1.0, "mode": "clip", "lambda": 1.0}


def test_a_list_has_one_value_for_each_model(shrink):
    assert shrink.settings(2, {"weight": [2, 0.5]})["weight"] == [2.0, 0.5]
    assert shrink.settings(2, {"weight": (2, 0.5)})["weight"] == [2.0, 0.5]


def test_defaults_complete_what_is_not_given(shrink):
    assert shrink.settings(2, {}) == {"weight": [1.0, 1.0], "share": 1.0, "mode": "clip", "lambda": 1.0}


@pytest.mark.parametrize("values", [[1.0], [1.0, 2.0, 3.0], []])
def test_a_wrong_number_of_values_is_refused(shrink, values):
    with pytest.raises(ParameterError, match=rf"'weight' of 'shrink' has {len(values)} values for 2 models"):
        shrink.settings(2, {"weight": values})


def test_a_list_for_a_parameter_with_one_value_is_refused(shrink):
    with pytest.raises(ParameterError, match="'share' of 'shrink'"):
        shrink.settings(2, {"share": [0.5, 0.5]})


@pytest.mark.parametrize(
    ("name", "value", "words"),
    [
        ("share", 1.5, "less than or equal to 1; found 1.5"),
        ("share", -0.5, "greater than or equal to 0; found -0.5"),
        ("mode", "slip", "'clip' or 'drop'; found 'slip'"),
        ("weight", "heavy", "valid number.*; found 'heavy'"),
        ("weight", float("inf"), "finite number; found inf"),
        ("lambda", float("nan"), "finite number; found nan"),
    ],
)
def test_a_refusal_says_what_was_wanted_and_what_was_found(shrink, name, value, words):
    with pytest.raises(ParameterError, match=rf"'{name}' of 'shrink' should .*{words}"):
        shrink.settings(1, {name: value})


def test_numbers_may_be_written_as_text(shrink):
    assert shrink.settings(1, {"share": "1e-5"})["share"] == 1e-5


def test_a_name_that_mergekit_knows_and_that_has_no_effect_is_taken_and_dropped(shrink):
    assert shrink.settings(1, {"int8_mask": True}) == shrink.settings(1, {})
    with pytest.raises(ParameterError, match="no parameter 'int8_mark'"):
        shrink.settings(1, {"int8_mark": True})


def test_an_unknown_parameter_lists_the_known_ones_and_suggests_the_nearest(shrink):
    with pytest.raises(ParameterError, match=r"\(it has: weight, share, mode, lambda\)\. Did you mean 'share'\?"):
        shrink.settings(1, {"shre": 0.5})
    with pytest.raises(ParameterError) as caught:
        shrink.settings(1, {"zzz": 0.5})
    assert "Did you mean" not in str(caught.value)


def test_parameters_have_words_for_every_kind_of_range():
    @merge_method(paper=PAPER)
    def words(
        models: Models,
        *,
        scale: PerModel[Number | None] = each(None),
        step: Positive = 1.0,
        flag: bool = False,
        times: int = 3,
    ) -> Merged:
        """Do it."""
        return models[0]

    found = {name: parameter.words for name, parameter in words.parameters.items()}
    assert found == {"scale": "number | none", "step": "number > 0", "flag": "true | false", "times": "integer"}


# calls on tensors


def test_a_call_merges_whole_tensors_of_any_shape(shrink):
    deltas = [torch.tensor([[1.0, -4.0], [0.0, 2.0]]), torch.tensor([[1.0, -4.0], [0.5, -2.0]])]
    assert shrink(deltas).tolist() == [[2.0, -8.0], [0.5, 0.0]]
    assert shrink(deltas, share=0.25).tolist() == [[2.0, -2.0], [0.5, 0.0]]
    assert shrink(deltas, share=0.25, mode="drop").tolist() == [[2.0, 0.0], [0.5, 0.0]]
    assert shrink(deltas, weight=[1, 0]).tolist() == [[1.0, -4.0], [0.0, 2.0]]


def test_a_method_that_is_not_elementwise_sees_the_shape():
    @merge_method(paper=PAPER)
    def rows(models: Models) -> Merged:
        """Average rows."""
        return models[0].mean(-1, keepdim=True).expand_as(models[0])

    assert rows([torch.tensor([[1.0, 3.0], [5.0, 7.0]])]).tolist() == [[2.0, 2.0], [6.0, 6.0]]


def test_reductions_see_parameters_and_earlier_reductions_by_name():
    def total(tiles) -> float:
        return sum(float(tile[0].sum()) for tile in tiles)

    def shifted(tiles, *, total: float, by: float) -> float:
        return total + by

    @merge_method(paper=PAPER, elementwise=True)
    def chain(
        models: Models,
        total: Annotated[float, Reduced(total)],
        moved: Annotated[float, Reduced(shifted)],
        *,
        by: Number = 10.0,
    ) -> Merged:
        """Put numbers there."""
        return torch.full_like(models[0], 100 * total + moved + by)

    tiles = [Stack([torch.tensor([1.0, 2.0])]), Stack([torch.tensor([3.0])], start=2)]
    settings = chain.settings(1, {})
    assert chain.reduce(tiles, settings) == {"total": 6.0, "moved": 16.0}
    assert chain.run(tiles[1], {"total": 6.0, "moved": 16.0}, settings).tolist() == [626.0]


def test_seeds_come_one_for_each_model_and_all_differ():
    @merge_method(paper=PAPER)
    def rolls(models: Models, *, seed: Seed = each(0)) -> Merged:
        """Roll dice."""
        return torch.tensor([float(len(set(seed))), float(seed[0])])

    assert rolls.seeded == "seed"
    assert "seed" not in rolls.parameters
    assert rolls([torch.zeros(2)] * 3).tolist() == [3.0, 0.0]
    assert rolls([torch.zeros(2)] * 3, seed=7).tolist() == [3.0, 7.0]
    assert rolls([torch.zeros(2)] * 2, seed=[8, 9]).tolist() == [2.0, 8.0]
    seeds = rolls.settings(50, {"seed": 1})["seed"]
    assert len(set(seeds)) == 50
    assert all(isinstance(seed, int) for seed in seeds)


@pytest.mark.parametrize("seeds", [[1], [1, 2, 3]])
def test_a_wrong_number_of_seeds_is_refused(seeds):
    with pytest.raises(ParameterError, match=rf"'seed' of 'dare_linear' has {len(seeds)} values for 2 models"):
        get_method("dare_linear").settings(2, {"seed": seeds})


@pytest.mark.parametrize("seed", ["dice", 0.5, None, [0.5, 1]])
def test_a_seed_that_is_no_integer_is_refused(seed):
    with pytest.raises(ParameterError, match="'seed' of 'dare_linear'"):
        get_method("dare_linear").settings(2, {"seed": seed})


def test_a_misspelt_seed_is_refused_with_a_suggestion():
    with pytest.raises(ParameterError, match=r"'sed'.*Did you mean 'seed'\?"):
        get_method("dare_linear").settings(2, {"sed": 1})


# the registry


def test_names_are_sorted_and_filtered_by_a_shell_pattern(shrink):
    names = list_methods()
    assert names == sorted(names)
    assert {"linear", "slerp", "ties", "shrink"} <= set(names)
    assert list_methods("shr*k") == ["shrink"]
    assert list_methods("no such*") == []
    assert set(list_methods("*ties*")) == {name for name in names if "ties" in name}


def test_every_name_gives_its_method(shrink):
    for name in list_methods():
        assert get_method(name).name == name
    assert get_method("shrink") is shrink


@pytest.mark.parametrize(
    ("name", "nearest"), [("tie", "ties"), ("linaer", "linear"), ("task_arithmetics", "task_arithmetic")]
)
def test_an_unknown_method_suggests_the_nearest(name, nearest):
    with pytest.raises(UnknownMethodError) as caught:
        get_method(name)
    assert str(caught.value).startswith(f"There is no merge method '{name}'. Did you mean '{nearest}'? Known: ")
    assert isinstance(caught.value, KeyError)
    assert isinstance(caught.value, RecipeError)


def test_an_unknown_method_that_resembles_none_lists_all(shrink):
    with pytest.raises(UnknownMethodError) as caught:
        get_method("zzzz")
    assert "Did you mean" not in str(caught.value)
    assert str(caught.value).endswith(f"Known: {', '.join(list_methods())}.")


def test_public_names_are_those_of_the_registry():
    assert hf_merge.get_method is get_method
    assert hf_merge.list_methods is list_methods
    assert hf_merge.merge_method is merge_method


# methods of others


def test_a_registered_method_merges_state_dicts_with_no_other_edit(shrink):
    base = {"w": torch.tensor([1.0, 1.0, 1.0]), "b": torch.tensor([[2.0]])}
    models = [
        {"w": torch.tensor([2.0, 0.0, 1.0]), "b": torch.tensor([[4.0]])},
        {"w": torch.tensor([2.0, -2.0, 1.5]), "b": torch.tensor([[3.0]])},
    ]
    merged = hf_merge.merge_state_dicts(models, method="shrink", base_model=base, weight=[1, 2], share=0.5, lambda_=2)
    # w: 1*[1, -1, 0] + 2*[1, -3, 0.5] = [3, -7, 1], cut at 3.5, twice; b: 2 + 2*1 = 4, cut at 2, twice
    assert merged["w"].tolist() == [7.0, -6.0, 3.0]
    assert merged["b"].tolist() == [[6.0]]


def test_a_registered_method_has_a_recipe_of_its_own(shrink):
    recipe = hf_merge.Recipe.from_yaml(
        "merge_method: shrink\nbase_model: org/base\nmodels:\n"
        "  - {model: org/a, parameters: {weight: 0.5}}\nparameters: {share: 0.25, int8_mask: true}\n"
    )
    assert recipe.parameters["share"] == 0.25
    with pytest.raises(ParameterError, match=r"line 4: 'shrink' has no parameter 'shar' .*Did you mean 'share'\?"):
        hf_merge.Recipe.from_yaml(
            "merge_method: shrink\nbase_model: org/base\nmodels: [org/a]\nparameters: {shar: 0.25}\n"
        )


def test_the_plan_knows_what_a_registered_method_needs(shrink):
    with pytest.raises(PlanError, match="'shrink' merges task vectors: pass base_model="):
        hf_merge.merge_state_dicts([{"w": torch.ones(2)}], method="shrink")


def test_the_plan_counts_the_models_of_a_registered_method():
    @merge_method(paper=PAPER, models=2)
    def pair(models: Models) -> Merged:
        """Average two."""
        return (models[0] + models[1]) / 2

    one, two = {"w": torch.zeros(2)}, {"w": torch.ones(2)}
    assert hf_merge.merge_state_dicts([one, two], method="pair")["w"].tolist() == [0.5, 0.5]
    with pytest.raises(PlanError, match=r"'pair' takes 2 models?; found 1"):
        hf_merge.merge_state_dicts([one], method="pair")


def test_a_least_number_of_models_is_declared_and_kept():
    @merge_method(paper=PAPER, min_models=2)
    def crowd(models: Models) -> Merged:
        """Take the last."""
        return models[-1]

    one, two = {"w": torch.zeros(2)}, {"w": torch.ones(2)}
    assert [crowd.takes(count) for count in range(4)] == [False, False, True, True]
    assert crowd.number_of_models == "at least 2 models"
    assert hf_merge.merge_state_dicts([one, two], method="crowd")["w"].tolist() == [1, 1]
    with pytest.raises(PlanError, match="'crowd' takes at least 2 models; found 1"):
        hf_merge.merge_state_dicts([one], method="crowd")
    with pytest.raises(ParameterError, match="'crowd' takes at least 2 models; found 1"):
        crowd([torch.ones(2)])


def test_whether_a_method_runs_on_tiles_may_depend_on_its_parameters():
    seen = []

    @merge_method(paper=PAPER, elementwise=lambda *, by_row: not by_row)
    def centred(models: Models, *, by_row: bool = False) -> Merged:
        """Note the shapes.

        Args:
            by_row: whether rows matter.
        """
        seen.append(tuple(models[0].shape))
        return models[0]

    model = {"w": torch.ones(600, 1000)}
    hf_merge.merge_state_dicts([model], method="centred")
    assert len(seen) == 3 and all(len(shape) == 1 for shape in seen), "tiles"
    hf_merge.merge_state_dicts([model], method="centred", by_row=True)
    assert seen[3:] == [(600, 1000)]
    centred([torch.ones(2, 3)], by_row=True)
    centred([torch.ones(2, 3)])
    assert seen[4:] == [(2, 3), (6,)]


def test_values_that_do_not_go_together_are_refused_by_the_methods_own_check():
    def in_order(*, low, high):
        if low > high:
            raise ValueError(f"low {low:g} exceeds high {high:g}: swap them")

    @merge_method(paper=PAPER, elementwise=True, check=in_order)
    def band(models: Models, *, low: Number = 0.0, high: Number = 1.0) -> Merged:
        """Stay within.

        Args:
            low: the least.
            high: the most.
        """
        return models[0].clamp(low, high)

    assert band([torch.tensor([-1.0, 5.0])], low=-0.5).tolist() == [-0.5, 1]
    with pytest.raises(ParameterError, match="'band': low 2 exceeds high 1: swap them"):
        band([torch.ones(2)], low=2.0)
    with pytest.raises(ParameterError, match="'band': low 2 exceeds high 1: swap them"):
        hf_merge.merge_state_dicts([{"w": torch.ones(2)}], method="band", low=2.0)


@pytest.mark.parametrize("word", ["elementwise", "check"])
def test_a_condition_on_what_is_no_parameter_is_refused(word):
    def stranger(*, colour):
        return colour

    with pytest.raises(TypeError, match=f"The {word} of 'plain' asks for what is no parameter: colour"):

        @merge_method(paper=PAPER, **{word: stranger})
        def plain(models: Models) -> Merged:
            """Take the first."""
            return models[0]


def test_a_registered_method_that_is_not_elementwise_gets_whole_tensors_from_the_engine():
    @merge_method(paper=PAPER)
    def transpose(models: Models, base: Tensor) -> Merged:
        """Turn it."""
        return (models[0].T.reshape(models[0].shape) + base).contiguous()

    large = torch.arange(600_000.0).reshape(600, 1000)
    merged = hf_merge.merge_state_dicts([{"w": large}], method="transpose", base_model={"w": torch.ones(600, 1000)})
    assert merged["w"].equal(large.T.reshape(600, 1000) + 1)


def test_an_error_in_a_registered_method_names_tensor_and_method():
    @merge_method(paper=PAPER)
    def fails(models: Models) -> Merged:
        """Fail."""
        raise ValueError("the moon is full")

    with pytest.raises(MergeError, match=r"'layer\.w' by 'fails': the moon is full"):
        hf_merge.merge_state_dicts([{"layer.w": torch.ones(2)}], method="fails")


def test_installed_plug_ins_are_loaded_from_their_entry_points(monkeypatch, registry):
    loaded = []

    def load():
        @merge_method(paper=PAPER)
        def plugged(models: Models) -> Merged:
            """Come from elsewhere."""
            return models[0]

        loaded.append(plugged)

    def entry_points(*, group):
        return [SimpleNamespace(load=load)] if group == "hf_merge.methods" else []

    monkeypatch.setattr(importlib.metadata, "entry_points", entry_points)
    method_module._load_methods.cache_clear()
    assert "plugged" in list_methods()
    assert get_method("plugged") is loaded[0]
    assert len(loaded) == 1, "entry points are loaded once"


def test_the_group_of_entry_points_is_the_documented_one():
    assert method_module.ENTRY_POINTS == "hf_merge.methods"


@pytest.mark.parametrize(
    ("name", "models", "base", "said"),
    [
        ("slerp", 2, True, "'slerp' takes 1 model"),
        ("passthrough", 2, False, "'passthrough' takes 1 model"),
        ("linear", 0, False, "'linear' takes at least 1 model"),
        ("nearswap", 1, False, "'nearswap' merges into a base"),
    ],
)
def test_a_call_with_the_wrong_tensors_is_refused(name, models, base, said):
    with pytest.raises(ParameterError, match=said):
        get_method(name)([torch.ones(2)] * models, torch.ones(2) if base else None)


def test_a_call_with_tensors_of_several_shapes_is_refused():
    with pytest.raises(ParameterError, match="tensors of one shape"):
        get_method("linear")([torch.ones(4), torch.ones(1)])


@pytest.mark.parametrize("name", ["ties", "dare_ties", "linear"])
def test_a_call_on_16_bit_floats_computes_in_float32(name):
    wide = [torch.randn(50), torch.randn(50)]
    half = [t.bfloat16() for t in wide]
    parameters = {} if name == "linear" else {"density": 0.5}
    expected = get_method(name)([t.float() for t in half], **parameters).bfloat16()
    assert get_method(name)(half, **parameters).equal(expected)


def test_a_name_that_is_taken_is_refused():
    with pytest.raises(TypeError, match="a merge method 'linear' already"):

        @merge_method(paper=PAPER, name="linear")
        def another(models: Models) -> Merged:
            """Take the first."""
            return models[0]

    assert get_method("linear").fn.__module__ == "hf_merge.methods.linear"
