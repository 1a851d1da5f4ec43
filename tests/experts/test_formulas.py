"""EMR, Twin and FREE against the same formulas written once more, in numpy and float64, on the golden inputs."""

import numpy as np
import pytest

import hf_merge
from tests.test_golden import inputs, needs_papers

BLOCKS = ("attn", "mlp")
SETS = ["inputs_clip3", "inputs_hfvit5", "inputs_roberta3"]
pytestmark = needs_papers


def arrays(name):
    """Return the base and the task vectors of a file of inputs, of floats, in float64."""
    base, models = inputs(name)
    floats = [key for key, one in base.items() if one.is_floating_point()]
    below = {key: base[key].double().numpy() for key in floats}
    # the library subtracts in float32: what cancels there cancels here
    vectors = [{key: (model[key] - base[key]).double().numpy() for key in floats} for model in models]
    return below, vectors


def merged(name, method, **parameters):
    base, models = inputs(name)
    return hf_merge.merge_state_dicts(models, method=method, base_model=base, **parameters)


def assert_same(state, expected, tolerance):
    for key, array in expected.items():
        found = state[key].double().numpy()
        assert found.shape == array.shape, key
        assert float(np.abs(found - array).max()) <= tolerance, key


# EMR


def emr(vectors, variant):
    """Return what all tasks share, the masks, and by what these are multiplied."""
    shared, masks = {}, [{} for _ in vectors]
    for key in vectors[0]:
        stacked = np.stack([vector[key] for vector in vectors])
        sign = np.where(stacked.astype(np.float32).sum(0) > 0, 1.0, -1.0)
        agree = stacked * sign > 0
        shared[key] = sign * (np.abs(stacked) * agree).max(0)
        for mask, one in zip(masks, agree, strict=True):
            mask[key] = one
    size = np.mean if variant == "reference" else np.sum
    scales = [
        sum(size(np.abs(vector[key])) for key in shared) / sum(size(np.abs(shared[key] * mask[key])) for key in shared)
        for vector, mask in zip(vectors, masks, strict=True)
    ]
    return shared, masks, scales


@pytest.mark.parametrize("variant", ["paper", "reference"])
@pytest.mark.parametrize("name", SETS)
def test_emr(name, variant):
    base, vectors = arrays(name)
    shared, masks, scales = emr(vectors, variant)
    found = merged(name, "emr", variant=variant)
    assert_same(found.shared, shared, 5e-7)
    assert_same(found.backbone, base, 0)
    for i, (mask, scale) in enumerate(zip(masks, scales, strict=True)):
        weights = {key: base[key] + scale * mask[key] * shared[key] for key in base}
        assert_same(found.reconstruct(i), weights, 5e-7)


def test_emr_rescales_as_is_told_of_the_reference():
    told = {"reference": [1.002, 0.591, 0.867], "paper": [0.979, 0.550, 0.850]}
    for variant, expected in told.items():
        found = merged("inputs_clip3", "emr", variant=variant)
        scales = [next(iter(expert.fields.values()))["scale"].item() for expert in found.experts]
        assert scales == pytest.approx(expected, abs=6e-4)


# Twin


def truncated(matrix, rate):
    rank = int((1 - rate) * min(matrix.shape))
    u, s, vh = np.linalg.svd(matrix, full_matrices=False)
    return (u[:, :rank] * s[:rank]) @ vh[:rank]


@pytest.mark.parametrize("rate", [0.9, 0.8, 0.3])
@pytest.mark.parametrize("name", SETS)
def test_twin(name, rate):
    base, vectors = arrays(name)
    found = merged(name, "twin", mask_rate=rate, lambda_=0.29)
    shared = {key: weight + 0.29 * sum(vector[key] for vector in vectors) for key, weight in base.items()}
    assert_same(found.backbone, shared, 5e-7)
    for i, vector in enumerate(vectors):
        weights = {}
        for key, weight in shared.items():
            miss = base[key] + vector[key] - weight
            weights[key] = weight + (truncated(miss, rate) if miss.ndim == 2 else miss)
        assert_same(found.reconstruct(i), {k: w for k, w in weights.items() if w.ndim <= 2}, 5e-6)


# FREE


def released_filter(matrix, ratio):
    rows, columns = matrix.shape
    y, x = np.mgrid[:rows, :columns]
    distance = np.sqrt((x - columns // 2) ** 2.0 + (y - rows // 2) ** 2.0).astype(np.float32)
    inner, outer = min(matrix.shape) // 10, np.float32(min(matrix.shape) * ratio)
    gain = (distance <= inner).astype(float) + ((distance >= inner) & (distance <= outer))
    return np.fft.ifft2(np.fft.fft2(matrix) * gain).real


def largest_of_rows(array, density):
    """Return the entries of the largest magnitudes of each row, zeros elsewhere; a scalar is kept."""
    if array.ndim == 0:
        return array
    kept = np.zeros_like(array)
    count = int(array.shape[-1] * density)
    places = np.argsort(-np.abs(array), axis=-1, kind="stable")[..., :count]
    np.put_along_axis(kept, places, np.take_along_axis(array, places, -1), -1)
    return kept


def mean_of_means(vectors):
    return sum(np.abs(vector).mean() for vector in vectors) / len(vectors)


def is_filtered(key):
    return key.endswith("weight") and any(block in key for block in BLOCKS)


def rules(keys, **said):
    return [{"pattern": key, **said} for key in keys]


def free_of_eight(base, vectors, density, over, filters):
    """Return the weights of each task in the setting of eight vision models, for the blocks' matrices.

    Args:
        over: names of the tensors over which magnitudes are averaged.
        filters: tells which of them are filtered.
    """
    through = [{k: released_filter(v[k], 0.7) if filters(k) else v[k] for k in over} for v in vectors]
    experts = [{k: largest_of_rows(v[k], density) for k in over} for v in vectors]
    tasks = []
    for own, passed in zip(experts, through, strict=True):
        mu = -np.log10(density) * (mean_of_means(own.values()) / density) / mean_of_means(passed.values())
        weights = {}
        for key in filter(is_filtered, over):
            shared = 0.5 * sum(each[key] for each in through)
            weights[key] = base[key] + 0.5 * np.where(own[key] != 0, mu * own[key], shared)
        tasks.append(weights)
    return tasks


EIGHT = {"variant": "reference", "lambda_": 0.5, "shared_weight": 0.5}
KEPT = {"merge_method": "task_arithmetic", "parameters": {"weight": 0.0}}


@pytest.mark.parametrize("density", [0.01, 0.02, 0.1])
def test_free_balances_over_the_tensors_that_it_merges(density):
    base, vectors = arrays("inputs_clip3")
    over = [key for key in base if is_filtered(key)]
    found = merged("inputs_clip3", "free", density=density, rules=rules(base.keys() - over, **KEPT), **EIGHT)
    for i, weights in enumerate(free_of_eight(base, vectors, density, over, is_filtered)):
        state = found.reconstruct(i)
        assert_same(state, weights, 5e-7)
        assert_same(state, {key: base[key] for key in base.keys() - over}, 0)


@pytest.mark.parametrize("density", [0.02, 0.1])
def test_free_balances_over_all_tensors_where_a_rule_only_keeps_the_rest_at_the_base(density):
    base, vectors = arrays("inputs_clip3")
    rest = [key for key in base if not is_filtered(key)]
    still = rules(rest, parameters={"lambda": 0.0})
    found = merged("inputs_clip3", "free", density=density, rules=still, **EIGHT)
    for i, weights in enumerate(free_of_eight(base, vectors, density, list(base), lambda key: base[key].ndim == 2)):
        state = found.reconstruct(i)
        assert_same(state, weights, 5e-7)
        assert_same(state, {key: base[key] for key in rest}, 0)
