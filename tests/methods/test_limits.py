"""Methods of papers on input with nothing in it: no task vector, no change, no data. The result is finite."""

import pytest
import torch

import hf_merge
from hf_merge.errors import ComputeError, MergeError, PlanError
from hf_merge.method import get_method

TASK_VECTORS = [
    "task_arithmetic", "ties", "fr", "magmax", "consensus_ta", "pcb", "tsv_m", "iso_c", "iso_cts", "wudi",
    "breadcrumbs", "star", "svc", "metagpt", "adamerging_pp",
]  # fmt: skip
WEIGHTS = ["cart", "fisher", "regmean", "regmean_plus_plus"]
VARIANTS = {
    "ties": [{"scope": "global", "density": 0.3}, {"scope": "global", "consensus": "max"}, {"density": 0.3},
             {"rescale": "l1", "density": 0.3}, {"lines": {"alpha": 0.5, "beta": 0.5}}],
    "fr": [{"variant": "reference"}, {"variant": "reference", "with_align": True}, {"split": 3}],
    "wudi": [{"solution": "closed_form"}, {"iterations": 3}],
    "tsv_m": [{"conv": "flatten"}], "iso_c": [{"conv": "flatten"}], "iso_cts": [{"conv": "flatten"}],
    "star": [{"eta": 0.0}], "cart": [{"conv": "flatten"}], "svc": [{"alpha": 1.0}],
    "fisher": [{"normalize": False}, {"floor": 0.0}, {"normalize": False, "floor": 0.0}],
    "regmean": [{"scaling": 0.0}, {"scaling": 1.0}], "metagpt": [{"lines": {"alpha": 1.0, "beta": 0.0}}],
    "breadcrumbs": [{"density": 0.3, "rescale": "l1"}],
}  # fmt: skip
CASES = [(name, words) for name in (*TASK_VECTORS, *WEIGHTS) for words in ({}, *VARIANTS.get(name, []))]
SHAPES = {
    "matrix": (6, 4), "wide": (4, 12), "conv": (3, 2, 2, 2), "token": (1, 1, 4), "bias": (5,), "one": (1, 1),
    "scalar": (), "empty": (0,), "rows": (0, 3), "columns": (3, 0),
}  # fmt: skip


def names(case):
    method, words = case
    return "-".join([method, *(f"{key}_{value}" for key, value in words.items() if not isinstance(value, dict)),
                     *(key for key, value in words.items() if isinstance(value, dict))])  # fmt: skip


def each(cases):
    return pytest.mark.parametrize("case", cases, ids=names)


each_case = each(CASES)
MEASURED = [case for case in CASES if get_method(case[0]).statistics]


def state(seed):
    numbers = torch.Generator().manual_seed(seed)
    return {name: torch.randn(shape, generator=numbers) for name, shape in SHAPES.items()}


def copy(tensors):
    return {name: tensor.clone() for name, tensor in tensors.items()}


def statistics(method, models, scale):
    """Return statistics of every model, of no data at all where scale is 0."""
    kinds = get_method(method).statistics
    if not kinds:
        return {}
    kind = next(iter(kinds.values()))
    if kind.of == "entries":
        return {"statistics": [{name: torch.full_like(one, scale) for name, one in m.items()} for m in models]}
    sizes = {name: one[0].numel() for name, one in models[0].items() if one.dim() > 1 and one.numel()}
    return {"statistics": [{name: scale * torch.eye(size) for name, size in sizes.items()} for _ in models]}


def merge(case, base, models, scale=1.0):
    method, words = case
    return hf_merge.merge_state_dicts(
        models, method=method, base_model=base, **statistics(method, models, scale), **words
    )


def assert_finite(merged, base):
    assert all(merged[name].shape == tensor.shape and merged[name].isfinite().all() for name, tensor in base.items())
    assert not merged["matrix"].equal(base["matrix"])


@each_case
@pytest.mark.parametrize("count", [1, 3])
def test_models_that_are_the_base_give_the_base_exactly(case, count):
    base = state(0)
    merged = merge(case, base, [copy(base) for _ in range(count)])
    assert all(merged[name].equal(tensor) for name, tensor in base.items())


@each_case
def test_one_model_that_is_the_base_leaves_a_finite_result_of_the_others(case):
    base = state(0)
    assert_finite(merge(case, base, [copy(base), state(1), state(2)]), base)


@each(MEASURED)
def test_no_data_gives_a_finite_result_and_the_base_where_all_are_the_base(case):
    base = state(0)
    assert_finite(merge(case, base, [copy(base), state(1), state(2)], scale=0.0), base)
    merged = merge(case, base, [copy(base) for _ in range(3)], scale=0.0)
    assert all(merged[name].equal(tensor) for name, tensor in base.items())


@each_case
@pytest.mark.parametrize("name", ["matrix", "bias", "conv", "scalar"])
def test_a_tensor_that_no_model_changed_stays_as_it_is(case, name):
    base, models = state(0), [state(1), state(2)]
    for model in models:
        model[name] = base[name].clone()
    merged = merge(case, base, models)
    assert merged[name].equal(base[name])
    assert all(tensor.isfinite().all() for tensor in merged.values())
    assert not merged["wide"].equal(base["wide"])


@pytest.mark.parametrize("method", ["regmean", "regmean_plus_plus"])
@pytest.mark.parametrize("scaling", [0.5, 1.0])
def test_singular_gram_matrices_of_every_kind_give_a_finite_result(method, scaling):
    models = [{"w": state(i)["wide"]} for i in range(2)]
    seen = torch.ones(1, 12)
    grams = {
        "none": torch.zeros(12, 12), "rank one": seen.T @ seen, "tiny": 1e-38 * torch.eye(12),
        "huge": 1e30 * seen.T @ seen,
    }  # fmt: skip
    mean = (models[0]["w"] + models[1]["w"]) / 2
    for first in grams.values():
        for second in grams.values():
            given = [{"w": first}, {"w": second}]
            merged = hf_merge.merge_state_dicts(models, method=method, scaling=scaling, statistics=given)["w"]
            assert merged.isfinite().all() and (merged - mean).abs().max() < 10


def test_fisher_information_without_a_floor_is_shared_where_nobody_knows_anything():
    models = [{"w": torch.tensor([1.0, 1.0])}, {"w": torch.tensor([3.0, 3.0])}]
    given = [{"w": torch.tensor([0.0, 1.0])}, {"w": torch.tensor([0.0, 0.0])}]
    for normalize in (True, False):
        words = {"floor": 0.0, "normalize": normalize, "statistics": given}
        assert hf_merge.merge_state_dicts(models, method="fisher", **words)["w"].tolist() == [2.0, 1.0]


@pytest.mark.parametrize("method", ["fisher", "regmean", "regmean_plus_plus"])
def test_statistics_of_another_model_are_refused_before_anything_is_merged(method):
    models = [{"w": state(i)["matrix"], "v": state(i)["wide"]} for i in range(2)]
    right = statistics(method, models, 1.0)["statistics"]
    other = [{"w": torch.ones(7, 7), "v": torch.ones(7, 7)}] * 2
    with pytest.raises(PlanError, match=r"shapes that do not fit its tensors.*Tensors: [wv], [wv]"):
        hf_merge.merge_state_dicts(models, method=method, statistics=other)
    lacking = [right[0], {"w": right[1]["w"]}]
    with pytest.raises(PlanError, match=r"for tensors for which other models have it.*Tensors: v"):
        hf_merge.merge_state_dicts(models, method=method, statistics=lacking)
    names_of_another = [{f"encoder.{name}": one for name, one in each.items()} for each in right]
    with pytest.raises(MergeError, match=r"encoder\.w"):
        hf_merge.merge_state_dicts(models, method=method, statistics=names_of_another)
    broken = [right[0], {**right[1], "w": torch.full_like(right[1]["w"], float("nan"))}]
    with pytest.raises(ComputeError, match=r"'w' by .* has NaN or Inf for this tensor: measure it again"):
        hf_merge.merge_state_dicts(models, method=method, statistics=broken)
