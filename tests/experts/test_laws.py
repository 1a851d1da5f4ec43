"""Every method with task experts against the laws of these; but for the last cases, none is known by its name."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import hf_merge
from hf_merge import staging
from hf_merge.forms import Experts
from hf_merge.packing import pack_mask
from hf_merge.types import TensorSpec
from tests.test_contract import REGISTERED, SHAPES, any_number, parameters_of, schema_of, some, tensors

METHODS = [method for method in REGISTERED if method.experts]
ELEMENTWISE = [method for method in METHODS if method.elementwise]
FULL = {"density": 1.0, "expert_weight": 1.0, "mask_rate": 0.0, "rank_fraction": 1.0}
"""Values at which an expert has room for all of its model."""
FLOATS = (torch.float32, torch.float64)
few = settings(some, max_examples=12)


def each_method(methods):
    return pytest.mark.parametrize("method", methods, ids=lambda method: method.name)


@st.composite
def merges(draw, method, elements=any_number):
    """Models of one shape and dtype, a base, and parameters."""
    shape, dtype = draw(st.sampled_from(SHAPES)), draw(st.sampled_from(FLOATS))
    count = draw(st.integers(method.least, 3))
    models = [draw(tensors(shape, elements, dtype)) for _ in range(count)]
    return models, draw(tensors(shape, elements, dtype)), draw(parameters_of(method, count))


def gaussian(shape, count=3, seed=0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for _ in range(count)]


def kept(method, made: Experts, like, parameters, *, packed=True):
    """Return the form of a call's experts and all that they keep, as it is written; check that it is as announced."""
    count = len(made.parts)
    form = method.form(like.shape, count, method.settings(count, parameters))
    announced = form.fields(TensorSpec(tuple(like.shape), like.dtype))
    assert all(part.keys() == announced.keys() for part in made.parts)
    return form, [{key: as_written(key, part[key], spec, packed) for key, spec in announced.items()}
                  for part in made.parts]  # fmt: skip


def as_written(key, values, spec, packed):
    values = pack_mask(values) if key == "mask" and packed else values
    assert key == "mask" or values.is_floating_point() == spec.dtype.is_floating_point
    assert tuple(values.shape) == spec.shape or (key == "mask" and not packed)
    written = values.to(spec.dtype)
    assert written.is_floating_point() or written.is_meta or written.long().equal(values.long()), "an index too large"
    return written


def rebuilt(method, models, base, parameters):
    """Return the backbone of a call, and the weight of every task."""
    made = method(models, base, **parameters)
    form, parts = kept(method, made, base, parameters)
    backbone = base if made.backbone is None else made.backbone.to(base.dtype)
    shared = None if made.shared is None else made.shared.to(base.dtype)
    assert (shared is not None) == form.needs_shared
    return backbone, [form.rebuild(part, backbone, shared) for part in parts], parts


def merged(method, models, base, **parameters):
    return hf_merge.merge_state_dicts(models, method=method.name, base_model=base, **parameters)


# what a call gives


@each_method(METHODS)
@given(data=st.data())
@few
def test_a_call_gives_the_announced_fields_and_every_task_a_finite_weight(method, data):
    models, base, parameters = data.draw(merges(method))
    backbone, tasks, parts = rebuilt(method, models, base, parameters)
    assert len(tasks) == len(models)
    for weight in (backbone, *tasks):
        assert weight.shape == base.shape
        assert weight.dtype == base.dtype
        assert weight.isfinite().all(), weight
    assert all(values.isfinite().all() for part in parts for values in part.values())


@each_method(METHODS)
@given(data=st.data())
@few
def test_inputs_are_left_untouched_and_a_second_call_gives_the_same_bits(method, data):
    models, base, parameters = data.draw(merges(method))
    copies, said = [one.clone() for one in (*models, base)], repr(parameters)
    first, second = (method(models, base, **parameters) for _ in range(2))
    assert all(one.equal(copy) for one, copy in zip((*models, base), copies, strict=True))
    assert repr(parameters) == said
    for one, other in zip(everything(first), everything(second), strict=True):
        assert one.equal(other)


def everything(made: Experts):
    own = [one for one in (made.backbone, made.shared) if one is not None]
    return [*own, *(values for part in made.parts for values in part.values())]


@each_method(METHODS)
@given(data=st.data())
@few
def test_models_that_are_the_base_give_the_base_and_nothing_else(method, data):
    _, base, parameters = data.draw(merges(method))
    count = next((len(value) for value in parameters.values() if isinstance(value, list)), 2)
    backbone, tasks, _ = rebuilt(method, [base.clone() for _ in range(count)], base, parameters)
    assert backbone.equal(base)
    assert all(weight.equal(base) for weight in tasks)


@each_method(METHODS)
@given(data=st.data())
@few
def test_models_in_another_order_give_their_experts_in_that_order(method, data):
    shape, seed = data.draw(st.sampled_from(SHAPES)), data.draw(st.integers(0, 99))
    *models, base = gaussian(shape, 4, seed, torch.float64)
    parameters, order = data.draw(parameters_of(method, 3)), data.draw(st.permutations(range(3)))
    backbone, tasks, _ = rebuilt(method, models, base, parameters)
    moved = {k: [v[i] for i in order] if isinstance(v, list) else v for k, v in parameters.items()}
    other, found, _ = rebuilt(method, [models[i] for i in order], base, moved)
    torch.testing.assert_close(other, backbone, rtol=1e-6, atol=1e-6)
    for i, weight in zip(order, found, strict=True):
        torch.testing.assert_close(weight, tasks[i], rtol=1e-6, atol=1e-6)


@each_method(METHODS)
@pytest.mark.parametrize("shape", [*SHAPES, (0, 3), (12, 5), (4, 3, 2, 2), (3, 40_000)], ids=str)
def test_a_call_runs_on_the_meta_device(method, shape):
    *models, base = (torch.empty(shape, device="meta") for _ in range(4))
    made = method(models, base)
    kept(method, made, base, {}, packed=False)
    for one in (made.backbone, made.shared, *(part.get("mask") for part in made.parts)):
        assert one is None or (one.is_meta and one.shape == base.shape)


@each_method(METHODS)
@pytest.mark.parametrize("shape", [(), (7,), (1, 6), (12, 5), (5, 12), (4, 3, 2, 2), (2, 3, 4)], ids=str)
def test_an_expert_with_room_for_all_of_its_model_gives_it_back(method, shape):
    *models, base = gaussian(shape, 4)
    full = {name: value for name, value in FULL.items() if name in method.parameters}
    models = models if full else models[:1]  # what has no budget has room for one
    _, tasks, _ = rebuilt(method, models, base, full)
    for weight, model in zip(tasks, models, strict=True):
        torch.testing.assert_close(weight, model, rtol=1e-5, atol=1e-5)


@each_method(METHODS)
@pytest.mark.parametrize("shape", [(2, 40_000), (40_000,)], ids=str)
def test_long_rows_are_kept_as_announced(method, shape):
    *models, base = gaussian(shape, 3)
    backbone, tasks, _ = rebuilt(method, models, base, {})
    for weight in (backbone, *tasks):
        assert weight.isfinite().all()


# through the engine

SIZES = {"vector": (7,), "matrix": (35, 13), "stack": (2, 3, 5), "scalar": (), "kernel": (6, 3, 2, 2)}


def states(count=3, dtype=torch.float32):
    """Return so many state dicts, and a base."""
    each = {name: gaussian(shape, count + 1, i, dtype) for i, (name, shape) in enumerate(SIZES.items())}
    *models, base = ({name: values[i] for name, values in each.items()} for i in range(count + 1))
    return models, base


WORDS = [(method, {}) for method in ELEMENTWISE] + [
    (method, {parameter.name: word})
    for method in ELEMENTWISE
    for parameter in method.parameters.values()
    for word in schema_of(parameter).get("enum", [])
]
"""Elementwise methods with each word that one of their parameters takes."""


@pytest.mark.parametrize(
    ("method", "said"), WORDS, ids=[f"{m.name}{''.join(f'-{word}' for word in said.values())}" for m, said in WORDS]
)
@pytest.mark.parametrize("size", [8, 16, 440])
def test_tiles_give_what_the_whole_gives(method, said, size, monkeypatch):
    models, base = states()
    whole = merged(method, models, base, **said)
    monkeypatch.setattr(staging, "TILE", size)
    tiled = merged(method, models, base, **said)
    torch.testing.assert_close(tiled.backbone, whole.backbone)
    torch.testing.assert_close(tiled.shared, whole.shared)
    for one, other in zip(tiled.experts, whole.experts, strict=True):
        torch.testing.assert_close(one.fields, other.fields)


@each_method(METHODS)
def test_the_engine_gives_what_a_call_does(method):
    models, base = states()
    for name in SIZES:
        backbone, tasks, _ = rebuilt(method, [model[name] for model in models], base[name], {})
        found = merged(method, [{name: model[name]} for model in models], {name: base[name]})
        assert found.backbone[name].equal(backbone)
        assert all(found.reconstruct(i)[name].equal(task) for i, task in enumerate(tasks))


@each_method(METHODS)
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64], ids=str)
def test_what_is_kept_has_the_dtype_of_the_models_or_the_one_that_is_asked_for(method, dtype):
    models, base = states(dtype=dtype)
    for model in models:
        model["head"] = torch.ones(2, dtype=dtype)
    for asked, written in ((None, dtype), ("float32", torch.float32)):
        found = merged(method, models, base, dtype=asked)
        assert {tensor.dtype for tensor in found.backbone.values()} == {written}
        for i, expert in enumerate(found.experts):
            assert {tensor.dtype for tensor in found.reconstruct(i).values()} == {written}
            for name, fields in expert.fields.items():
                announced = expert.forms[name].fields(TensorSpec(SIZES[name], written))
                assert {key: (tuple(t.shape), t.dtype) for key, t in fields.items()} == {
                    key: (spec.shape, spec.dtype) for key, spec in announced.items()
                }


@each_method(METHODS)
def test_integers_scalars_and_empty_tensors_pass(method):
    models, base = states()
    for state in (*models, base):
        state |= {"steps": torch.tensor(3), "ids": torch.arange(5), "none": torch.empty(0)}
        state |= {"no rows": torch.empty(0, 3), "no columns": torch.empty(3, 0)}
    found, again = merged(method, models, base), merged(method, models, base)
    for i, model in enumerate(models):
        task = found.reconstruct(i)
        assert {k: (v.shape, v.dtype) for k, v in task.items()} == {k: (v.shape, v.dtype) for k, v in model.items()}
        assert task["steps"].equal(model["steps"])
        assert task["ids"].equal(model["ids"])
        torch.testing.assert_close(found.experts[i].fields, again.experts[i].fields, rtol=0, atol=0)


@each_method(METHODS)
def test_bytes_are_those_of_what_is_kept(method):
    models, base = states()
    for expert in merged(method, models, base).experts:
        announced = [expert.forms[name].fields(TensorSpec(shape, torch.float32)) for name, shape in SIZES.items()]
        assert expert.nbytes == sum(spec.nbytes for fields in announced for spec in fields.values())


# computed by hand

CHANGES = ([1.0, -2.0, 3.0, 0.0], [2.0, 2.0, -1.0, -1.0])
DIAGONALS = ([[4.0, 0.0], [0.0, 1.0]], [[0.0, 0.0], [0.0, 0.0]])
W = 5 / 3 * 0.30102999566398
"""-log10(1/2) * (2 + 3) / (1/2 * 6), of the first of these changes."""
V = 4 / 3 * 0.30102999566398

BY_HAND = {
    # signs + - + -, shared 2 -2 3 -1: the first keeps 6 of 7, the second 6 of 3
    "emr": (CHANGES, {}, [0] * 4, [[12 / 7, -12 / 7, 18 / 7, 0], [4, 0, 0, -2]]),
    # the sum is 3 0 2 -1
    "tall": (CHANGES, {}, [0] * 4, [[3, 0, 2, 0], [3, 0, 0, -1]]),
    # both have half of the magnitude; nothing is filtered of a vector
    "free": (CHANGES, {"density": 0.5}, [1.5, 0, 1, -0.5], [[1.5, -2 * W, 3 * W, -0.5], [2 * V, 2 * V, 1, -0.5]]),
    "tsv_c": (DIAGONALS, {}, [[0, 0], [0, 0]], [[[4, 0], [0, 0]], [[0, 0], [0, 0]]]),
    "twin": (
        DIAGONALS, {"mask_rate": 0.5, "lambda": 0.5},
        [[2, 0], [0, 0.5]], [[[4, 0], [0, 0.5]], [[0, 0], [0, 0.5]]],
    ),
}  # fmt: skip
"""Changes of a base, parameters, and what they make of the backbone and of the tasks."""


@pytest.mark.parametrize("name", BY_HAND)
def test_two_tasks_are_as_the_formula_says(name):
    changes, parameters, backbone, tasks = BY_HAND[name]
    base = torch.full_like(torch.tensor(backbone, dtype=torch.float64), 10.0)
    models = [base + torch.tensor(change, dtype=torch.float64) for change in changes]
    found, weights, _ = rebuilt(hf_merge.get_method(name), models, base, parameters)
    for one, expected in zip((found, *weights), (backbone, *tasks), strict=True):
        torch.testing.assert_close(one - 10, torch.tensor(expected, dtype=torch.float64), rtol=1e-9, atol=1e-9)
