"""AdaMerging++ by hand."""

import torch

import hf_merge

BASE = {"a": torch.zeros(4), "b": torch.zeros(2)}
ONE = {"a": torch.tensor([4.0, -1.0, 3.0, 0.0]), "b": torch.tensor([2.0, 0.5])}
TWO = {"a": torch.tensor([-5.0, 6.0, 1.0, 0.25]), "b": torch.tensor([3.0, 0.0])}


def merge(**parameters):
    return hf_merge.merge_state_dicts([ONE, TWO], method="adamerging_pp", base_model=BASE, **parameters)


def test_trimmed_over_the_whole_model_then_signs_have_equal_votes():
    # int(0.34 * 6) + 1 = 3 of 6 entries: one keeps 4, 3, 2; two keeps -5, 6, 3. Signs: -, +, +, ., +
    merged = merge(density=0.34, weight=[10.0, 0.5])
    assert merged["a"].tolist() == [-2.5, 3.0, 30.0, 0.0]
    assert merged["b"].tolist() == [21.5, 0.0]


def test_weights_have_no_vote_and_may_differ_from_tensor_to_tensor():
    models = hf_merge.Recipe.load([ONE, TWO], method="linear").merged
    weights = [[{"filter": "a", "value": 1.0}, {"value": other}] for other in (2.0, 0.0)]
    entries = [{"model": one, "parameters": {"weight": weight}} for one, weight in zip(models, weights, strict=True)]
    recipe = {"models": entries, "merge_method": "adamerging_pp", "parameters": {"density": 0.34}}
    merged = hf_merge.merge_state_dicts(recipe, method="adamerging_pp", base_model=BASE)
    assert merged["a"].tolist() == [-5.0, 6.0, 3.0, 0.0]  # trimmed as before: the cut is that of the whole model
    assert merged["b"].tolist() == [4.0, 0.0]
