"""What every method says to people who choose one: when to take it, and what it does with its numbers."""

from string import Formatter

import pytest

from hf_merge.controls import in_words
from hf_merge.method import get_method, list_methods

METHODS = list_methods()


def fields(text):
    """Return the names that a template asks for."""
    return {name for _, name, _, _ in Formatter().parse(text) if name}


def of_each(method):
    """Return the parameters of which every model has its own value."""
    return {one.name for one in method.parameters.values() if one.per_model}


@pytest.mark.parametrize("name", METHODS)
def test_says_in_one_sentence_when_to_choose_it(name):
    said = get_method(name).good_for
    assert said[:1].isupper() and said.endswith(".") and ". " not in said
    assert 40 < len(said) <= 200


@pytest.mark.parametrize("name", METHODS)
def test_sentence_about_the_defaults_holds_their_names_and_no_braces(name):
    method = get_method(name)
    said = in_words(name, {}, ["maths", "code"][: method.count], "start")
    assert said[:1].isupper() and said.endswith(".") and not set("{}|") & set(said)
    assert not said.startswith(method.summary), "its template did not take the defaults"
    assert ("start" in said) == ("base" in fields(method.in_words))
    assert {"model", "models"} & fields(method.in_words)


@pytest.mark.parametrize("name", METHODS)
def test_sentence_with_numbers_of_one_model_names_the_model(name):
    """Sentences of a template can be repeated for each model one by one."""
    method = get_method(name)
    for sentence in method.in_words.split(". "):
        assert "model" in fields(sentence) or not fields(sentence) & of_each(method)


@pytest.mark.parametrize("name", METHODS)
def test_names_a_base_only_where_there_is_one(name):
    method = get_method(name)
    assert method.base == "required" or "base" not in fields(method.in_words)
    assert method.base == "required" or "needs a base" not in method.good_for


@pytest.mark.parametrize("name", METHODS)
def test_tells_switches_and_choices_apart(name):
    """Wherever a sentence names a switch or a choice, its words change with the value."""
    method = get_method(name)
    names = ["maths", "code"][: method.count]
    for one in fields(method.in_words) & method.parameters.keys():
        values = method.parameters[one].schema.get("enum") or [True, False] * (
            method.parameters[one].words == "true | false"
        )
        said = {in_words(name, {one: value}, names, "start") for value in values}
        assert len(said) == len(values)


def test_ties_in_words():
    said = in_words("ties", {"density": 0.3, "lambda": 0.8, "consensus": "sum"}, ["maths", "code"], "start")
    assert said == (
        "Keeps the 30% largest changes of each model, and counts them once. Lets the heavier side decide each sign, "
        "adds up what agrees, and adds 0.8 times the result to start."
    )


def test_models_with_numbers_of_their_own_have_sentences_of_their_own():
    said = in_words("ties", {"density": [0.3, 0.5], "lambda": 0.8}, ["maths", "code"], "start")
    assert said == (
        "Keeps the 30% largest changes of maths, and counts them once. "
        "Keeps the 50% largest changes of code, and counts them once. "
        "Lets the heavier side decide each sign, averages what agrees, and adds 0.8 times the result to start."
    )


def test_what_is_counted_1_times_is_counted_once_and_1_times_a_thing_is_the_thing():
    said = in_words("task_arithmetic", {"weight": [1, 2.1], "lambda": 1.0}, ["maths", "code"], "start")
    assert said == (
        "Counts the change of maths once. Counts the change of code 2.1 times. "
        "Adds up these changes, and adds the result to start."
    )
