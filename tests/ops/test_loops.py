"""Compiled loops: the bits of the verbs in torch, on values of all kinds and sizes, and when they are used at all."""

import importlib.util
import threading

import pytest
import torch

from hf_merge.ops import agreement, loops
from hf_merge.ops.casts import narrowed, widen
from hf_merge.ops.combine import disjoint_sum, weighted_sum
from hf_merge.ops.dropping import keep_by_rank
from hf_merge.ops.random import keep_random
from hf_merge.ops.selection import Rank, kth_largest
from hf_merge.ops.sums import magnitude_sums
from hf_merge.types import Stack
from tests.compiled import needs_loops

SIZES = [1, 2, 63, 64, 65, 1023, 1025, 16_384, 16_385, 70_001]

VERBS = {
    "weighted sum of one": lambda a, b, c: weighted_sum([a], [0.7]),
    "weighted sum": lambda a, b, c: weighted_sum([a, b, c], [0.3, -1.1, 1e-3]),
    "disjoint mean": lambda a, b, c: disjoint_sum([a, b, c], [0.3, -1.1, 1.0], normalize=True),
    "disjoint sum": lambda a, b, c: disjoint_sum([a, b], [1.0, 1.0], normalize=False),
    "disjoint sum, undecided below": lambda a, b, c: disjoint_sum([a, c], [1.0, 2.0], normalize=False, undecided=-1.0),
    "weights that cancel": lambda a, b, c: disjoint_sum([a, a.abs(), c], [1.0, -1.0, 0.0], normalize=True),
    "keep at random": lambda a, b, c: keep_random(a, 0.37, seed=11, start=5),
    "keep at random, far on": lambda a, b, c: keep_random(b, 0.5, seed=11, start=(7 << 32) + 12345),
    "keep at random, across a word": lambda a, b, c: keep_random(b, 0.5, seed=11, start=(1 << 32) - 3),
    "keep by rank": lambda a, b, c: keep_by_rank(a, 0.4, 0.2, seed=11, start=5),
    "keep by rank in rows": lambda a, b, c: keep_by_rank(_rows(c), 0.5, 0.3, seed=11, start=1 << 40),
    "keep by rank in columns": lambda a, b, c: keep_by_rank(_rows(c).t().contiguous(), 0.5, 0.3, seed=2),
    "magnitude sums": lambda a, b, c: torch.tensor(magnitude_sums(a) + magnitude_sums(c), dtype=torch.float64),
    "widen": lambda a, b, c: _widened(a.bfloat16()),
    "widen minus": lambda a, b, c: _widened(a.bfloat16(), b),
    "narrow": lambda a, b, c: narrowed(a, torch.bfloat16)[0],
    "select": lambda a, b, c: _selected([a, b, c], pieces=1),
    "select from tiles": lambda a, b, c: _selected([a, b, c], pieces=3),
}


def _rows(tensor):
    return tensor[: tensor.numel() // 7 * 7].view(7, -1) if tensor.numel() > 6 else tensor.view(1, -1)


def _widened(values, minus=None):
    out = torch.empty(values.shape)
    assert widen(values, out, minus)
    return out


def _selected(tensors, pieces):
    size = -(-tensors[0].numel() // pieces)
    tiles = [Stack([t[i : i + size] for t in tensors], start=i) for i in range(0, tensors[0].numel(), size)]
    ranks = {
        (i, share): Rank(i, lambda n, share=share: max(1, int(share * n))) for i in range(3) for share in (0.1, 0.6)
    }
    return torch.tensor([[cut.bits, cut.last] for cut in kth_largest(tiles, ranks).values()])


def bits(tensor):
    return tensor.contiguous().view(torch.uint8).numpy().tobytes()


@needs_loops
@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("verb", VERBS.values(), ids=VERBS)
def test_a_loop_gives_the_bits_of_torch(verb, size):
    first, second, ordinary, few = (tensor[:size] for tensor in agreement.samples(seed=size))
    for tensors in ((first, second, few), (ordinary, few, first), (few, ordinary, second)):
        expected = verb(*tensors)
        with loops.switched_on() as on:
            assert on
            assert bits(verb(*tensors)) == bits(expected)


@needs_loops
@pytest.mark.parametrize("strange", [float("inf"), float("-inf"), float("nan")])
def test_what_is_not_finite_is_seen_wherever_it_stands(strange):
    for place in (0, 1000, 4096):
        values = torch.randn(4097)
        values[place] = strange
        with loops.switched_on():
            assert not widen(values.bfloat16(), torch.empty(4097))
            assert not widen(values.bfloat16(), torch.empty(4097), torch.ones(4097))
            assert not narrowed(values, torch.bfloat16)[1]


@needs_loops
def test_what_rounds_to_infinity_is_seen():
    largest = torch.finfo(torch.float32).max
    with loops.switched_on():
        rounded, finite = narrowed(torch.tensor([1.0, largest]), torch.bfloat16)
    assert not finite
    assert rounded[1] == float("inf")


@needs_loops
def test_loops_are_used_inside_of_switched_on_only_and_for_what_they_are_made_for():
    values = torch.ones(4, 4)
    assert not loops.take(values)
    with loops.switched_on():
        assert loops.take(values, torch.ones(3))
        assert not loops.take(values.t()[1:, 1:])
        assert not loops.take(values.double())
        assert not loops.take(values, values.half())
        assert not loops.take(values.to("meta"))
        assert loops.takes_bfloat16(values.bfloat16())
        with loops.switched_on(wanted=False) as inner:
            assert not inner
            assert loops.take(values)
    assert not loops.take(values)


@needs_loops
def test_loops_stay_on_until_the_last_of_several_threads_is_done():
    values, entered, leave = torch.ones(4), threading.Event(), threading.Event()

    def other():
        with loops.switched_on():
            entered.set()
            leave.wait(30)

    thread = threading.Thread(target=other)
    with loops.switched_on():
        thread.start()
        assert entered.wait(30)
    assert loops.take(values)
    leave.set()
    thread.join()
    assert not loops.take(values)


@pytest.fixture
def forgetful():
    """Let the comparison with torch be made anew, before and after."""
    loops._agree.cache_clear()
    yield
    loops._agree.cache_clear()


@needs_loops
def test_a_loop_that_differs_in_one_bit_switches_all_of_them_off(monkeypatch, forgetful):
    right = loops.weighted_sum
    monkeypatch.setattr(loops, "weighted_sum", lambda *given: right(*given).nextafter(torch.tensor(9.0)))
    with pytest.warns(UserWarning, match="differ from torch"), loops.switched_on() as on:
        assert not on
        assert not loops.take(torch.ones(3))


def test_without_numba_there_are_no_loops(monkeypatch):
    found = importlib.util.find_spec
    monkeypatch.setattr(loops, "find_spec", lambda name: None if name == "numba" else found(name))
    with loops.switched_on() as on:
        assert not on
        assert weighted_sum([torch.ones(2)], [2.0]).tolist() == [2.0, 2.0]


@needs_loops
def test_a_place_that_takes_no_compiled_code_is_told_and_does_not_end_the_merge(monkeypatch, forgetful):
    def fails():
        raise RuntimeError("no place for what is compiled")

    monkeypatch.setattr(loops, "_compiled", fails)
    with pytest.warns(UserWarning, match="no place for what is compiled"), loops.switched_on() as on:
        assert not on
