"""Widgets and words that follow from a method's signature and docstring."""

import json

import pytest

from hf_merge import method as method_module
from hf_merge.cli import _explain
from hf_merge.controls import controls, in_words, needs
from hf_merge.errors import UnknownMethodError
from hf_merge.method import get_method, list_methods, merge_method
from hf_merge.types import Count, Deltas, Fraction, Merged, Number, PerModel, Positive, each

PAPER = "https://example.org/paper"
METHODS = list_methods()


@pytest.fixture
def trimmed():
    """A method of somebody else with words of its own; it is gone after the test."""
    before = dict(method_module._registry)

    @merge_method(paper=PAPER, elementwise=True)
    def trimmed(
        deltas: Deltas,
        *,
        weight: PerModel[Number] = each(1.0),
        density: PerModel[Fraction] = each(0.5),
        normalize: bool = True,
        steps: Count = 3,
        eps: Positive = 1e-6,
        gain: Number = 1.2,
    ) -> Merged:
        """Trim task vectors and add them.

            merged = base + lambda * sum_i weight_i * d_i

        Args:
            weight: scale of each.
            density: share that is kept.
            normalize: divide by the sum.

        Notes:
            Made for a test.

        Good for:
            two fine-tunes
            that differ much.

        In words:
            keeps {density:.0%} of {model} and adds {weight:g} of it to {base}, {normalize:as shares|as it is};
            the sum counts {lambda:.1f} times.
        """
        return sum(w * d for w, d in zip(weight, deltas, strict=True))

    yield trimmed
    method_module._registry.clear()
    method_module._registry.update(before)


def by_name(method):
    return {one.name: one for one in controls(method)}


# what is parsed


def test_both_sections_are_read_and_leave_the_others_alone(trimmed):
    assert trimmed.good_for == "two fine-tunes that differ much."
    assert trimmed.in_words.startswith("keeps {density:.0%} of {model}")
    assert trimmed.notes == "Made for a test."
    assert trimmed.parameters["normalize"].help == "divide by the sum."


def test_a_sentence_that_names_no_parameter_is_refused():
    with pytest.raises(TypeError, match="'In words' of 'odd' names what is no parameter: densty"):

        @merge_method(paper=PAPER)
        def odd(deltas: Deltas, *, density: Fraction = 1.0) -> Merged:
            """Do something.

            In words:
                Keeps {densty}.
            """
            return deltas[0]


def test_a_sentence_that_is_no_template_is_refused():
    with pytest.raises(TypeError, match="'In words' of 'odd' is no template"):

        @merge_method(paper=PAPER)
        def odd(deltas: Deltas) -> Merged:
            """Do something.

            In words:
                Keeps {model of it.
            """
            return deltas[0]


def test_the_command_line_says_both(trimmed):
    told = _explain(trimmed)
    assert "Good for: two fine-tunes that differ much." in told
    assert "Keeps 50% of each model and adds 1 of it to the base, as shares" in told


# controls


def test_kinds_and_ranges_follow_from_annotations(trimmed):
    found = by_name(trimmed)
    assert {name: one.kind for name, one in found.items()} == {
        "weight": "slider", "density": "slider", "normalize": "switch", "steps": "number", "eps": "number",
        "gain": "slider", "lambda": "slider",
    }  # fmt: skip
    density = found["density"]
    assert (density.low, density.high, density.least, density.most, density.step) == (0, 1, 0, 1, 0.01)
    assert (found["weight"].least, found["weight"].most, found["weight"].high) == (None, None, 2)
    assert (found["steps"].low, found["steps"].step, found["steps"].curve) == (1, 1, False)
    assert found["gain"].high == 3
    assert found["density"].per_model and not found["lambda"].per_model
    assert found["density"].curve and found["eps"].curve and not found["normalize"].curve
    assert found["weight"].shares == "normalize"


def test_ends_name_the_models_not_numbers():
    assert by_name("slerp")["t"].ends == ("all {base}", "all {model}")
    assert by_name("ties")["weight"].ends == ("nothing of {model}", "2 times the change of {model}")
    assert by_name("ties")["consensus"].choices == ("mean", "sum", "max")
    assert by_name("linear")["weight"].shares == "normalize"
    assert by_name("nuslerp")["weight"].shares == "always"


@pytest.mark.parametrize("name", METHODS)
def test_every_method_has_controls_that_hold_its_defaults(name):
    for one in controls(name):
        assert json.loads(json.dumps(one.to_dict()))["name"] == one.name
        if one.kind == "slider":
            assert one.low <= one.default <= one.high
            assert all(one.ends)
        if one.kind == "choice":
            assert one.default in one.choices
        if one.default is None:
            assert one.optional


@pytest.mark.parametrize("name", METHODS)
def test_every_slider_reaches_only_what_its_method_takes(name):
    method = get_method(name)
    for one in controls(method):
        if one.kind == "slider":
            for value in (one.low, one.high, one.default):
                method.parameters[one.name].check(value, name)


def test_an_unknown_method_is_told():
    with pytest.raises(UnknownMethodError, match="Did you mean 'ties'"):
        controls("tise")


# what a method asks for


@pytest.mark.parametrize(
    ("name", "asked"),
    [
        ("linear", []),
        ("ties", ["a base model"]),
        ("slerp", ["a base model", "exactly 1 model besides the base"]),
        ("nuslerp", ["exactly 2 models"]),
        ("model_stock", ["a base model", "at least 2 models besides the base"]),
        ("svd", ["LoRA adapters of one base"]),
        ("fisher", ["fisher statistics, measured on data"]),
        ("magmax", ["a base model", "models in a chosen order"]),
    ],
)
def test_needs(name, asked):
    assert needs(name) == asked


# words


def test_models_with_equal_numbers_share_a_sentence(trimmed):
    told = in_words(trimmed, {"density": 0.3, "normalize": False}, ["code", "math"], "tiny")
    assert told == "Keeps 30% of each model and adds 1 of it to tiny, as it is; the sum counts 1.0 times."


def test_models_with_numbers_of_their_own_have_a_sentence_each(trimmed):
    told = in_words(trimmed, {"density": [0.3, 0.6]}, ["code", "math"], "tiny")
    assert told.startswith("Keeps 30% of code and adds 1 of it to tiny")
    assert " Keeps 60% of math and adds 1 of it to tiny" in told


def test_a_curve_and_parts_are_told(trimmed):
    told = in_words(trimmed, {"density": {"curve": [0.2, 0.8]}}, ["code"], "tiny")
    assert "Keeps from 20% in the first layer to 80% in the last of code" in told
    parts = {"attention": 0.5, "mlp": {"curve": [1, 1]}, "rest": 0.1}
    told = in_words(trimmed, {"density": {"parts": parts}}, ["code"], "tiny")
    assert "50% in attention, 100% in MLPs and 10% elsewhere" in told


def test_names_are_no_templates(trimmed):
    assert "Keeps 50% of {0.__class__} and" in in_words(trimmed, {}, ["{0.__class__}"], "{base}")


def test_a_method_without_words_tells_its_summary_and_numbers():
    before = get_method("karcher")
    plain = type(before)(**{**vars(before), "in_words": ""})
    assert in_words(plain, {"max_iter": 4}) == f"{before.summary} Set: max_iter 4; tol 1e-05."


def test_a_value_that_the_sentence_cannot_show_is_told_plainly(trimmed):
    assert in_words(trimmed, {"density": "much"}, ["code"]).startswith("Trim task vectors and add them. Set:")


@pytest.mark.parametrize("name", METHODS)
def test_every_method_says_something_of_every_kind_of_setting(name):
    curves = {one.name: {"curve": [one.default, one.default]} for one in controls(name) if one.kind == "slider"}
    for values in ({}, curves):
        told = in_words(name, values, ["code", "math"], "tiny")
        assert told and "{" not in told
