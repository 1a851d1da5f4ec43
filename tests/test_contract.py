"""Every registered method against every law of a merge method; nothing here knows a method by its name.

The laws of what methods with task experts give are in tests/experts/test_laws.py.
"""

import json
import re

import pytest
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter

import hf_merge
from hf_merge import execute
from hf_merge.errors import ParameterError
from hf_merge.method import SUMMARY_LENGTH, MergeMethod, Parameter, get_method, list_methods
from hf_merge.ops import loops
from hf_merge.ops.factors import packed, unpacked
from hf_merge.types import Stack
from tests.compiled import needs_loops

NEUTRAL = {"weight": 1.0, "density": 1.0, "scale": 1.0}
"""Values with which one model, merged alone, is left as it is."""
BY_ROWS = {"filter_wise": True, "nuslerp_flatten": False, "nuslerp_row_wise": False}
"""Values with which a method that takes whole tensors or columns as vectors takes rows."""
GIVES_BASE = {"t": 0.0}
GIVES_MODEL = {"t": 1.0}
"""Values of an interpolation at its two ends; they hold where the range of the parameter is [0, 1]."""

SHAPES = [(), (1,), (5, 1), (1, 1), (0,), (3, 0), (2, 3, 4), (7,), (4, 6)]
FACTOR_SHAPES = [(1, 2, 1), (1, 2, 4), (3, 2, 1), (4, 2, 6), (6, 2, 3)]
SPECIAL = [0.0, -0.0, 1.0, -1.0, 0.5, -0.5, 3.0, 1e-30, -1e-30, 1e-7, 1e15, -1e15, 1e30]
POWERS = [-8.0, 0.5, 1.0, 2.0]
"""Factors that float arithmetic multiplies by exactly, and of which no two or three sum to 0."""
NUMBERS = [-1.25, 0.5, 1.0, 2.0]
"""No two or three of them sum to 0, by which a method might divide."""

REGISTERED = [get_method(name) for name in list_methods()]
METHODS = [method for method in REGISTERED if method.experts is None]
"""Methods that give one tensor."""
DELTAS = [method for method in METHODS if method.space == "deltas"]
WEIGHTS = [method for method in METHODS if method.space == "models"]
FACTORS = [method for method in METHODS if method.space == "factors"]
ENTRIES = [method for method in METHODS if method not in FACTORS]
"""Methods on tensors of any shape; those on factors are about the products of these."""
SEEDED = [method for method in METHODS if method.seeded]
ELEMENTWISE = [method for method in METHODS if method.elementwise]
MANY = [method for method in ENTRIES if method.count is None and not method.ordered]
ALONE = [method for method in ENTRIES if method.takes(1)]
WITH_BASE = {"required": (True,), "optional": (True, False), "ignored": (False,)}
USES = [(m, with_base) for m in METHODS for with_base in (WITH_BASE[m.base] if m in WEIGHTS else (False,))]
"""Methods with and without a base in a call on tensors; task vectors are handed over without it."""
PARAMETERS = [(method, parameter) for method in REGISTERED for parameter in method.parameters.values()]

some = settings(
    max_examples=30, deadline=None, derandomize=True, database=None, suppress_health_check=[HealthCheck.too_slow]
)


def each_method(methods):
    return pytest.mark.parametrize("method", methods, ids=lambda method: method.name)


def each_use(methods):
    uses = [(method, with_base) for method, with_base in USES if method in methods]
    names = [f"{method.name}{'-with-base' * with_base}" for method, with_base in uses]
    return pytest.mark.parametrize(("method", "with_base"), uses, ids=names)


each_parameter = pytest.mark.parametrize(
    ("method", "parameter"), PARAMETERS, ids=[f"{method.name}-{parameter.name}" for method, parameter in PARAMETERS]
)


def schema_of(parameter: Parameter) -> dict:
    return TypeAdapter(parameter.annotation).json_schema()


def is_fraction(parameter: Parameter) -> bool:
    schema = schema_of(parameter)
    return (schema.get("minimum"), schema.get("maximum")) == (0, 1)


def is_plain_number(parameter: Parameter) -> bool:
    schema = schema_of(parameter)
    return schema.get("type") == "number" and not {"minimum", "maximum", "exclusiveMinimum"} & schema.keys()


def good_values(parameter: Parameter, numbers=NUMBERS):
    """A strategy for values that a parameter takes, from its type and range."""
    return _good_values(schema_of(parameter), numbers)


def _good_values(schema: dict, numbers):
    if "anyOf" in schema:
        return st.one_of([_good_values(part, numbers) for part in schema["anyOf"]])
    if "enum" in schema:
        return st.sampled_from(schema["enum"])
    if schema["type"] == "boolean":
        return st.booleans()
    if schema["type"] == "null":
        return st.none()
    if schema["type"] == "number" and "minimum" in schema and "maximum" not in schema:
        return st.sampled_from([0.0, 1e-4, 0.3, 1.0, 50.0]).map(lambda step: schema["minimum"] + step)
    if "exclusiveMinimum" in schema:
        return st.sampled_from([1e-4, 0.3, 1.0, 50.0]).map(lambda step: schema["exclusiveMinimum"] + step)
    if schema["type"] == "integer":
        return st.integers(schema.get("minimum", 1), schema.get("minimum", 1) + 5)
    if {"minimum", "maximum"} <= schema.keys():
        low, high = schema["minimum"], schema["maximum"]
        return st.integers(0, 64).map(lambda part: low + (high - low) * part / 64)
    return st.sampled_from(numbers)


def bad_values(parameter: Parameter) -> list:
    """Values just outside of a parameter's type and range."""
    return _bad_values(schema_of(parameter))


def _bad_values(schema: dict) -> list:
    if "anyOf" in schema:
        kinds = {part.get("type") for part in schema["anyOf"]}
        return ["no such word", [], *([float("nan"), float("inf")] if "number" in kinds else [])]
    if "enum" in schema:
        return ["no such word", 17, []]
    if schema["type"] == "boolean":
        return ["perhaps", 2, None]
    bad = ["no such word", None, [], float("nan")]
    bad += [schema["exclusiveMinimum"], schema["exclusiveMinimum"] - 1] if "exclusiveMinimum" in schema else []
    bad += [schema["minimum"] - 1, schema["minimum"] - 1e-9] if "minimum" in schema else []
    bad += [schema["maximum"] + 1, schema["maximum"] + 1e-9] if "maximum" in schema else []
    return bad if {"minimum", "maximum"} <= schema.keys() else [*bad, float("inf")]


def tensors(shape, elements, dtype=torch.float32):
    numel = torch.Size(shape).numel()
    return st.lists(elements, min_size=numel, max_size=numel).map(
        lambda values: torch.tensor(values, dtype=dtype).reshape(shape)
    )


small_number = st.one_of(st.sampled_from([x for x in SPECIAL if abs(x) < 1e15]), st.floats(-1000, 1000, width=32))
"""Factors are multiplied with each other."""
any_number = st.one_of(st.sampled_from(SPECIAL), st.floats(-1000, 1000, width=32))
few_numbers = st.sampled_from([0.0, 1.0, -1.0, 2.0, -2.0, 4.0])


def shapes_of(method: MergeMethod) -> list:
    """Shapes of the tensors that a method sees; those that have no inputs are averaged before it sees them."""
    if method in FACTORS:
        return FACTOR_SHAPES
    return [shape for shape in SHAPES if len(shape) > 1 or not on_matrices(method)]


def on_matrices(method: MergeMethod) -> bool:
    return any(kind.of != "entries" for kind in method.statistics.values())


def statistics_of(method: MergeMethod, models, seed=0, scale=1.0) -> dict:
    """Statistics as they are measured: squares for each entry, Gram matrices of inputs, some of them singular."""
    generator = torch.Generator().manual_seed(seed)
    shape, dtype = models[0].shape, models[0].dtype
    found: dict = {}
    for name, kind in method.statistics.items():
        if kind.of == "entries":
            found[name] = [scale * torch.randn(shape, generator=generator).to(dtype).square() for _ in models]
        elif len(shape) > 1:
            size = shape[1:].numel()
            rows = [torch.randn(1 + seed, size, generator=generator).to(dtype) for _ in models]
            found[name] = [scale * row.mT @ row for row in rows]
    return found


def call(method: MergeMethod, models, base=None, **parameters):
    """Call a method, with some statistics if none are given."""
    given = method.statistics.keys() & parameters.keys()
    measured = (
        {} if given else {k: [t.to(models[0].device) for t in v] for k, v in statistics_of(method, models).items()}
    )
    return method(models, base, **measured, **parameters)


def settings_of(method: MergeMethod, count: int, parameters: dict) -> dict:
    """Complete parameters, the statistics among them left out."""
    return method.settings(count, {k: v for k, v in parameters.items() if k not in method.statistics})


@st.composite
def merges(draw, method: MergeMethod, *, count=None, elements=any_number, numbers=NUMBERS, dtype=torch.float32):
    """Inputs of a method: models of one shape, a base, and parameters with the seeds."""
    shape = draw(st.sampled_from(shapes_of(method)))
    count = method.count or count or draw(st.integers(method.least, 3))
    elements = small_number if method in FACTORS else elements
    models = [draw(tensors(shape, elements, dtype)) for _ in range(count)]
    measured = statistics_of(method, models, draw(st.integers(0, 9)), draw(st.sampled_from([0.0, 1e-9, 1.0, 1e9])))
    return models, draw(tensors(shape, elements, dtype)), {**draw(parameters_of(method, count, numbers)), **measured}


@st.composite
def parameters_of(draw, method: MergeMethod, count: int, numbers=NUMBERS):
    values = {name: good_values(parameter, numbers) for name, parameter in method.parameters.items()}
    shared = {name: one for name, one in values.items() if not method.parameters[name].per_model}
    drawn = draw(st.fixed_dictionaries(shared))
    own = st.fixed_dictionaries({name: one for name, one in values.items() if name not in shared})
    each_own = [draw(own.filter(lambda one: go_together(method, {**drawn, **one}))) for _ in range(count)]
    drawn |= {name: [one[name] for one in each_own] for name in values if name not in shared}
    if method.seeded:
        drawn[method.seeded] = draw(st.lists(st.integers(0, 2**64 - 1), min_size=count, max_size=count))
    return drawn


def go_together(method: MergeMethod, parameters: dict) -> bool:
    """Whether the method's own check accepts these values for a model."""
    try:
        method.settings(1, parameters)
    except ParameterError:
        return False
    return True


def at_half(method: MergeMethod, count: int) -> dict:
    """Parameters with which a method has something to choose: every fraction at 1/2, all else as it is."""
    halves = {name: 0.5 for name, parameter in method.parameters.items() if is_fraction(parameter)}
    return method.settings(count, halves)


def example(method: MergeMethod, shape=(12, 5), seed=0):
    """Some inputs with gaussian entries."""
    generator = torch.Generator().manual_seed(seed)
    shape = (6, 2, 5) if method in FACTORS else shape
    models = [torch.randn(shape, generator=generator) for _ in range(method.count or 3)]
    return models, torch.randn(shape, generator=generator)


def merged_by_engine(method: MergeMethod, models, base, **parameters):
    """Merge state dicts of one tensor."""
    given = None if base is None else {"w": base}
    measured = statistics_of(method, models)
    parameters["statistics"] = [{"w": each[i]} if (each := next(iter(measured.values()), None)) else {}
                                for i in range(len(models))] if method.statistics else None  # fmt: skip
    return hf_merge.merge_state_dicts([{"w": m} for m in models], method=method.name, base_model=given, **parameters)[
        "w"
    ]


def assert_close(found, expected, models, method, message=""):
    """Compare up to a few roundings of the numbers that went in."""
    reach = torch.stack([model.abs() for model in models]).amax(0)
    reach = reach if method.elementwise or not reach.numel() else reach.max()
    allowed = 1e-6 * reach + 1e-5 * expected.abs()
    assert ((found - expected).abs() <= allowed).all(), f"{message}{found} instead of {expected}"


# values in, values out


@each_use(METHODS)
@given(data=st.data())
@some
def test_finite_inputs_give_a_finite_result_of_their_shape_and_dtype(method, with_base, data):
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    models, base, parameters = data.draw(merges(method, dtype=dtype))
    merged = call(method, models, base if with_base else None, **parameters)
    assert merged.shape == models[0].shape
    assert merged.dtype == dtype
    assert merged.isfinite().all(), merged


@each_use(METHODS)
@given(data=st.data())
@some
def test_inputs_and_parameters_are_left_untouched_and_a_second_call_gives_the_same(method, with_base, data):
    dtype = data.draw(st.sampled_from([torch.float32, torch.float64]))
    models, base, parameters = data.draw(merges(method, dtype=dtype))
    copies, base_copy, parameters_copy = [m.clone() for m in models], base.clone(), repr(parameters)
    first = call(method, models, base if with_base else None, **parameters).clone()
    second = call(method, models, base if with_base else None, **parameters)
    assert all(m.equal(copy) for m, copy in zip(models, copies, strict=True))
    assert base.equal(base_copy)
    assert repr(parameters) == parameters_copy
    assert first.equal(second)


@needs_loops
@each_use(METHODS)
@given(data=st.data())
@some
def test_compiled_loops_give_the_same_bits(method, with_base, data):
    models, base, parameters = data.draw(merges(method))
    base = base if with_base else None
    expected = call(method, models, base, **parameters)
    with loops.switched_on():
        found = call(method, models, base, **parameters)
    assert found.view(torch.int32).equal(expected.view(torch.int32))


@needs_loops
@each_use(ENTRIES)
def test_the_engine_writes_the_same_bits_with_compiled_loops(method, with_base, monkeypatch):
    models, base = example(method, shape=(331, 257))  # large enough to be selected by histograms
    models, base = [model.bfloat16() for model in models], base.bfloat16() if with_base or method in DELTAS else None
    halves = {name: 0.5 for name, parameter in method.parameters.items() if is_fraction(parameter)}
    expected = merged_by_engine(method, models, base, **halves)
    used, widen = [], loops.widen
    monkeypatch.setattr(execute, "WORTH_COMPILING", 0)
    monkeypatch.setattr(loops, "widen", lambda *given: used.append(widen(*given)) or used[-1])
    found = merged_by_engine(method, models, base, **halves)
    assert used
    assert found.dtype == torch.bfloat16
    assert found.view(torch.int16).equal(expected.view(torch.int16))


@each_method(DELTAS)
@given(data=st.data())
@some
def test_task_vectors_of_zeros_give_zeros(method, data):
    models, _, parameters = data.draw(merges(method, elements=st.just(0.0)))
    assert call(method, models, **parameters).count_nonzero() == 0


@each_use(WEIGHTS)
@given(data=st.data())
@some
def test_identical_models_give_that_model(method, with_base, data):
    shape, count = (
        data.draw(st.sampled_from(shapes_of(method))),
        method.count or data.draw(st.integers(method.least, 3)),
    )
    model = data.draw(tensors(shape, any_number))
    drawn = data.draw(parameters_of(method, count, numbers=[0.5, 1.0, 3.0]))
    free = [p for p in method.parameters.values() if p.per_model and is_plain_number(p)]
    free += [p for p in method.parameters.values() if {"minimum", "exclusiveMinimum", "enum"} & schema_of(p).keys()]
    merged = call(method, [model] * count, model if with_base else None, **{p.name: drawn[p.name] for p in free})
    torch.testing.assert_close(merged, model, rtol=1e-6, atol=1e-6)


@each_use(MANY)
@given(data=st.data())
@some
def test_the_order_of_two_models_does_not_matter(method, with_base, data):
    models, base, parameters = data.draw(merges(method, count=2, numbers=POWERS))
    mirrored = {k: v[::-1] if isinstance(v, list) else v for k, v in parameters.items()}
    one = call(method, models, base if with_base else None, **parameters)
    other = call(method, models[::-1], base if with_base else None, **mirrored)
    assert_close(other, one, models, method)


@each_use(MANY)
@given(data=st.data())
@some
def test_the_order_of_three_models_does_not_matter(method, with_base, data):
    models, base, drawn = data.draw(merges(method, count=3, elements=few_numbers, numbers=POWERS))
    weights = {p.name: drawn[p.name] for p in method.parameters.values() if p.per_model and is_plain_number(p)}
    given_base = base if with_base else None
    order = data.draw(st.permutations(range(3)))
    weights |= {name: drawn[name] for name in method.statistics}
    one = call(method, models, given_base, **weights)
    other = call(
        method, [models[i] for i in order], given_base, **{k: [v[i] for i in order] for k, v in weights.items()}
    )
    assert_close(other, one, models, method)


# randomness


@each_method(SEEDED)
def test_the_same_seed_gives_the_same_result_and_another_seed_another_mask(method):
    delta = torch.ones(64, 8)
    count = method.count or 1
    parameters = {k: v for k, v in at_half(method, count).items() if k != method.seeded}
    first, again, other = (call(method, [delta] * count, **parameters, **{method.seeded: seed}) for seed in (3, 3, 4))
    assert first.equal(again)
    assert 0 < first.count_nonzero() < first.numel()
    differing = int(((first != 0) != (other != 0)).sum())
    assert 150 < differing < 362, "two masks of 512 entries at density 1/2 should differ in about half of them"


@each_method(SEEDED)
@pytest.mark.parametrize("seed", [0, 1, 12345])
def test_one_seed_gives_every_model_a_mask_independent_of_the_others(method, seed):
    seeds = method.settings(3, {method.seeded: seed})[method.seeded]
    parameters = {k: v for k, v in at_half(method, 1).items() if k != method.seeded}
    masks = [call(method, [torch.ones(4096)], **parameters, **{method.seeded: [s]}) != 0 for s in seeds]
    for one, other in ((0, 1), (0, 2), (1, 2)):
        share = float((masks[one] & masks[other]).double().mean())
        assert share == pytest.approx(1 / 4, abs=5 * 0.433 / 64), f"models {one} and {other}"


@each_method(SEEDED)
def test_the_engine_gives_every_tensor_its_own_mask_and_follows_the_seed_of_the_recipe(method):
    ones, zeros = ({name: torch.full((4096,), value) for name in "ab"} for value in (1.0, 0.0))
    fractions = {name: 0.5 for name, p in method.parameters.items() if is_fraction(p)}
    first, again, other = (
        hf_merge.merge_state_dicts([ones], method=method.name, base_model=zeros, seed=seed, **fractions)
        for seed in (0, 0, 1)
    )
    assert first["a"].equal(again["a"])
    for one, another in ((first["a"], first["b"]), (first["a"], other["a"])):
        share = float(((one != 0) & (another != 0)).double().mean())
        assert share == pytest.approx(1 / 4, abs=5 * 0.433 / 64)


# neutral values


@each_use([method for method in ALONE if NEUTRAL.keys() & method.parameters.keys()])
def test_one_model_at_neutral_values_is_left_as_it_is(method, with_base):
    models, base = example(method)
    neutral = {name: value for name, value in NEUTRAL.items() if name in method.parameters}
    merged = call(method, models[:1], base if with_base else None, **neutral)
    torch.testing.assert_close(merged, models[0], rtol=1e-6, atol=0)


@each_use([method for method in ALONE if "density" in method.parameters])
def test_a_density_of_1_trims_nothing_whatever_the_rescaling_and_the_seed(method, with_base):
    models, base = example(method)
    given_base = base if with_base else None
    expected = call(method, models, given_base, density=1.0)
    others = [p for p in method.parameters.values() if p.name == "rescale"]
    variants = [{p.name: value} for p in others for value in schema_of(p)["enum"]]
    variants += [{method.seeded: seed} for seed in (1, 2) if method.seeded]
    for variant in variants:
        assert call(method, models, given_base, density=1.0, **variant).equal(expected), variant
    assert call(method, [models[0]], given_base, density=1.0).count_nonzero() == models[0].numel()


@each_method([m for m in WEIGHTS if m.count == 1 and any(n in m.parameters for n in GIVES_BASE)])
def test_the_ends_of_an_interpolation_are_the_base_and_the_model(method):
    (model,), base = example(method)
    for ends, expected in ((GIVES_BASE, base), (GIVES_MODEL, model)):
        given_ends = {k: v for k, v in ends.items() if k in method.parameters and is_fraction(method.parameters[k])}
        if given_ends:
            torch.testing.assert_close(call(method, [model], base, **given_ends), expected, rtol=1e-6, atol=1e-7)


@each_method(DELTAS)
def test_lambda_scales_what_is_added_to_the_base_and_0_gives_the_base(method):
    models, base = example(method)
    once, half, nothing = (merged_by_engine(method, models, base, lambda_=scale) for scale in (1.0, 0.5, 0.0))
    assert nothing.equal(base)
    assert not once.equal(base)
    torch.testing.assert_close(half - base, (once - base) / 2, rtol=1e-4, atol=1e-6)


@each_use(ENTRIES)
def test_the_engine_computes_what_a_call_on_tensors_does(method, with_base):
    models, base = example(method)
    parameters = {k: v for k, v in at_half(method, len(models)).items() if k != method.seeded and k != "lambda"}
    parameters = {k: 1.0 if is_fraction(method.parameters[k]) and method.seeded else v for k, v in parameters.items()}
    found = merged_by_engine(method, models, base if with_base or method in DELTAS else None, **parameters)
    if method.space == "deltas":
        expected = base + call(method, [model - base for model in models], **parameters)
    else:
        expected = call(method, models, base if with_base else None, **parameters)
    torch.testing.assert_close(found, expected, rtol=1e-6, atol=1e-6)


@each_use(ENTRIES)
@pytest.mark.parametrize("shape", [(0,), (3, 0), (0, 3)])
def test_the_engine_merges_empty_tensors(method, with_base, shape):
    models, base = example(method, shape)
    assert merged_by_engine(method, models, base if with_base or method in DELTAS else None).shape == shape


# factors


def pairs_of(ranks, seed=0, out=9, columns=7):
    generator = torch.Generator().manual_seed(seed)
    return [(torch.randn(out, r, generator=generator), torch.randn(r, columns, generator=generator)) for r in ranks]


def change(method, pairs, **parameters):
    """The change that merged factors stand for, as a matrix."""
    left, right = unpacked(method(packed(pairs), **parameters), len(pairs[0][0]), pairs[0][1].shape[1])
    return left @ right


@each_method(FACTORS)
@pytest.mark.parametrize(("out", "columns"), [(9, 7), (7, 9), (3, 2)])
def test_one_adapter_at_neutral_values_is_left_as_it_is(method, out, columns):
    ((left, right),) = pairs_of([4], out=out, columns=columns)
    torch.testing.assert_close(change(method, [(left, right)]), left @ right, rtol=1e-5, atol=1e-5)


@each_method(FACTORS)
def test_the_order_of_adapters_does_not_matter(method):
    pairs = pairs_of([2, 3, 1])
    weights = {"weight": [0.5, 2.0, -1.0]}
    one = change(method, pairs, **weights)
    other = change(method, pairs[::-1], weight=weights["weight"][::-1])
    torch.testing.assert_close(other, one, rtol=1e-4, atol=1e-5)


@each_method(FACTORS)
def test_adapters_that_change_nothing_give_nothing(method):
    nothing = [(torch.zeros(9, 2), right) for _, right in pairs_of([2, 2])]
    assert change(method, nothing).abs().max() == 0


@each_method(FACTORS)
def test_the_weight_of_an_adapter_scales_its_product(method):
    ((left, right),) = pairs_of([3])
    plain = {"normalize": False} if "normalize" in method.parameters else {}
    found = change(method, [(left, right)], weight=[-2.0], **plain)
    torch.testing.assert_close(found, -2.0 * left @ right, rtol=1e-4, atol=1e-4)


# where and how it runs


@each_use(METHODS)
@given(data=st.data())
@some
def test_a_method_runs_on_the_meta_device(method, with_base, data):
    models, base, parameters = data.draw(merges(method))
    on_meta = [model.to("meta") for model in models]
    parameters |= {name: [one.to("meta") for one in parameters[name]] for name in method.statistics}
    merged = call(method, on_meta, base.to("meta") if with_base else None, **parameters)
    assert merged.device.type == "meta"
    assert merged.shape == models[0].shape
    assert merged.dtype == models[0].dtype


def split(method, models, base, size):
    """Tiles of a flattened tensor, as the executor makes them."""
    flat = [model.flatten() for model in models]
    measured = {name: [one.flatten() for one in each] for name, each in statistics_of(method, models).items()}
    below = None if base is None else base.flatten()
    return [
        Stack(
            [f[i : i + size] for f in flat],
            start=i,
            base=None if below is None else below[i : i + size],
            measured={name: Stack(one[i : i + size] for one in each) for name, each in measured.items()},
        )
        for i in range(0, flat[0].numel(), size)
    ]


def run_on_tiles(method, models, base, size, checked):
    tiles = split(method, models, base, size)
    reduced = method.reduce(tiles, checked)
    return torch.cat([method.run(tile, reduced, checked) for tile in tiles]).reshape(models[0].shape)


@each_method(ELEMENTWISE)
@given(data=st.data())
@some
def test_a_method_that_says_it_is_elementwise_gives_the_same_on_tiles(method, data):
    models, base, parameters = data.draw(merges(method, numbers=POWERS).filter(lambda drawn: drawn[1].numel()))
    checked = settings_of(method, len(models), parameters)
    assume(method.tiled(checked))
    whole = run_on_tiles(method, models, base, models[0].numel(), checked)
    for size in (1, 2, 3, 7):
        assert_close(
            run_on_tiles(method, models, base, size, checked), whole, [*models, base], method, f"tiles of {size}: "
        )


@each_use([method for method in METHODS if method.rowwise])
@given(data=st.data())
@some
def test_a_method_that_says_it_is_rowwise_gives_the_same_on_some_rows_at_a_time(method, with_base, data):
    of_rows = merges(method, numbers=POWERS).filter(lambda drawn: drawn[1].numel() and drawn[1].dim() > 1)
    models, base, parameters = data.draw(of_rows)
    checked = settings_of(method, len(models), parameters | {k: v for k, v in BY_ROWS.items() if k in parameters})
    assert method.by_rows(checked)
    size = data.draw(st.integers(1, len(models[0])))
    base = base if with_base else None
    tiles = [
        Stack(
            [model[i : i + size] for model in models],
            start=i * models[0][0].numel(),
            base=None if base is None else base[i : i + size],
        )
        for i in range(0, len(models[0]), size)
    ]
    reduced = method.reduce(tiles, checked)
    found = torch.cat([method.run(tile, reduced, checked) for tile in tiles])
    whole = Stack(models, base=base)
    expected = method.run(whole, method.reduce([whole], checked), checked)
    assert_close(found, expected, [*models, *([] if base is None else [base])], method)


@each_method(ELEMENTWISE)
def test_tiles_of_a_large_tensor_give_what_a_call_on_the_whole_gives(method):
    generator = torch.Generator().manual_seed(5)
    shape = (35, 2001)
    models = [torch.randint(-9, 10, shape, generator=generator) / 4 for _ in range(method.count or 2)]
    base = torch.randint(-9, 10, shape, generator=generator) / 4
    checked = at_half(method, len(models))
    whole = call(method, models, base if method in WEIGHTS and method.base != "ignored" else None, **checked)
    for size in (16_411, 70_034):
        assert_close(
            run_on_tiles(method, models, base, size, checked), whole, [*models, base], method, f"tiles of {size}: "
        )


@each_method(ELEMENTWISE)
def test_the_order_in_which_tiles_run_does_not_matter(method):
    models, base = example(method, shape=(101,))
    checked = at_half(method, len(models))
    tiles = split(method, models, base, 13)
    reduced = method.reduce(tiles, checked)
    forwards = [method.run(tile, reduced, checked).clone() for tile in tiles]
    backwards = [method.run(tile, reduced, checked).clone() for tile in reversed(tiles)]
    assert all(one.equal(other) for one, other in zip(forwards, reversed(backwards), strict=True))


# parameters


@each_parameter
def test_a_value_out_of_range_is_refused_and_the_parameter_is_named(method, parameter):
    for value in bad_values(parameter):
        with pytest.raises(ParameterError) as caught:
            method.settings(1, {parameter.name: [value] if parameter.per_model else value})
        assert f"'{parameter.name}' of '{method.name}'" in str(caught.value)
        assert repr(value) in str(caught.value)


@each_parameter
def test_the_engine_refuses_a_value_out_of_range_before_it_merges(method, parameter):
    models, base = example(method, shape=(2, 2))
    value = next(bad for bad in bad_values(parameter) if bad is not None)
    with pytest.raises(ParameterError, match=f"'{parameter.name}'"):
        merged_by_engine(method, models, base, **{parameter.name: value})


@each_parameter
def test_a_misspelt_parameter_is_refused_and_the_nearest_is_suggested(method, parameter):
    misspelt = parameter.name + parameter.name[-1]
    with pytest.raises(ParameterError) as caught:
        method.settings(1, {misspelt: parameter.default})
    assert f"'{method.name}' has no parameter '{misspelt}'" in str(caught.value)
    assert f"Did you mean '{parameter.name}'?" in str(caught.value)


@each_parameter
def test_a_default_is_a_value_that_the_parameter_takes(method, parameter):
    assert parameter.check(parameter.default, method.name) == parameter.default


@each_parameter
def test_the_type_of_a_parameter_renders_as_json_schema_and_as_words(method, parameter):
    schema = schema_of(parameter)
    assert json.loads(json.dumps(schema)) == schema
    words = parameter.words
    assert words
    assert "any" not in words.split(" | ")
    if "enum" in schema:
        assert words.split(" | ") == schema["enum"]
    if {"minimum", "maximum"} <= schema.keys():
        assert words == f"number in [{schema['minimum']:g}, {schema['maximum']:g}]"
    if "exclusiveMinimum" in schema:
        assert words == f"number > {schema['exclusiveMinimum']:g}"
    if schema.get("type") == "boolean":
        assert words == "true | false"


@each_parameter
def test_no_parameter_is_called_as_a_field_of_recipes_is(method, parameter):
    assert parameter.name not in hf_merge.Recipe.model_fields


# words


@each_method(REGISTERED)
def test_the_summary_is_one_short_sentence(method):
    assert method.summary, "the docstring lacks a summary"
    assert len(method.summary) <= SUMMARY_LENGTH
    assert "\n" not in method.summary
    assert method.summary.endswith(".")
    assert method.summary[0].isupper()


@each_method(REGISTERED)
def test_the_docstring_has_the_formula_of_what_is_merged(method):
    assert ("merged = " if method.experts is None else "task i: ") in method.formula
    assert all(len(line) <= 120 for line in method.formula.splitlines())


@each_method(REGISTERED)
def test_the_paper_is_an_address(method):
    assert method.paper.startswith("https://")
    assert " " not in method.paper
    assert "." in method.paper.removeprefix("https://").split("/")[0]


@each_parameter
def test_every_parameter_has_a_line_of_help(method, parameter):
    assert parameter.help, f"the docstring of '{method.name}' does not explain '{parameter.name}'"
    assert "\n" not in parameter.help
    assert parameter.help.endswith(".")


@each_method(REGISTERED)
def test_the_docstring_explains_no_parameter_that_does_not_exist(method):
    after = (method.fn.__doc__ or "").partition("Args:")[2]
    lines = re.split(r"\n    (?:Notes|Good for|In words):", after)[0].splitlines()
    explained = [
        line.strip().partition(":")[0].rstrip("_") for line in lines if line.startswith(" " * 8) and line[8:9].strip()
    ]
    assert set(explained) <= set(method.parameters)


@each_method(REGISTERED)
def test_a_method_is_registered_under_its_own_name_and_says_what_it_needs(method):
    assert get_method(method.name) is method
    assert method.base in ("required", "optional", "ignored")
    assert method.least >= 1
    assert method.count in (None, method.least)
    assert method.seeded is None or method.seeded not in method.parameters
    assert not set(method.ignored) & set(method.parameters)
    assert method.space != "deltas" or method.experts is None
    assert method.experts or ("lambda" in method.parameters) == (method.space == "deltas")
