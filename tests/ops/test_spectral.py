"""Singular values by hand: diagonal matrices, and matrices with known vectors."""

import math

import pytest
import torch

from hf_merge.ops import spectral


def diag(*values):
    return torch.tensor(values, dtype=torch.float64).diag()


def random(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)


def test_noise_has_no_part():
    parts = spectral.svd(diag(2.0, 1e-9))
    assert parts.s.tolist() == [2.0, 0.0]
    assert parts.u[:, 1].count_nonzero() == parts.vh[1].count_nonzero() == 0


def test_a_matrix_of_zeros_has_no_directions():
    parts = spectral.svd(torch.zeros(3, 2, dtype=torch.float64))
    assert not any(part.count_nonzero() for part in parts)


def test_the_polar_factor_of_a_scaled_rotation_is_the_rotation():
    turn = torch.tensor([[math.cos(0.3), -math.sin(0.3)], [math.sin(0.3), math.cos(0.3)]], dtype=torch.float64)
    close(spectral.polar(turn @ diag(3.0, 0.5)), turn)


def test_low_rank_keeps_the_largest():
    close(spectral.low_rank(diag(1.0, 3.0, 2.0), 2), diag(0.0, 3.0, 2.0))


@pytest.mark.parametrize(
    ("kept", "expected"),
    [(0.0, (8.0, 0, 0)), (0.5, (8.0, 0, 0)), (0.51, (8 * 4 / 7, 8 * 3 / 7, 0)), (1.0, (4.0, 3.0, 1.0))],
)
def test_truncation_keeps_the_nuclear_norm(kept, expected):
    close(spectral.truncated_and_rescaled(diag(4.0, 3.0, 1.0), kept), diag(*expected))


def test_calibration_divides_by_the_mean_amplification():
    merge, tasks = diag(3.0, 1.0), [diag(1.0, 0.0), diag(2.0, 1.0)]
    # first direction: 3/1 and 3/2; second: no response, which counts as alpha, and 1
    close(spectral.calibrated(merge, tasks, 0.5), diag(3 * 2 / 4.5, 1 * 2 / 1.5))
    close(spectral.calibrated(merge, tasks, 1.0), diag(3 * 2 / 4.5, 1.0))


def test_a_merge_of_one_task_needs_no_calibration():
    close(spectral.calibrated(random(5, 4), [random(5, 4)], 1.0), random(5, 4))


def test_the_closed_form_is_where_the_slope_is_zero_and_nearest_to_the_sum():
    tasks = [random(6, 4, seed=i) for i in range(3)]
    x = spectral.undisturbed(tasks).requires_grad_()
    loss = sum(((x - t) @ t.T).square().sum() / t.square().sum() for t in tasks)
    loss.backward()
    assert float(x.grad.abs().max()) < 1e-12
    lone = torch.zeros(3, 4, dtype=torch.float64)
    lone[0, 0] = 2.0  # only the first column of inputs matters: the others stay as they are in the sum
    close(spectral.undisturbed([lone, torch.zeros(3, 4, dtype=torch.float64)]), lone)


def test_many_steps_lead_to_the_closed_form():
    tasks = [random(6, 4, seed=i) for i in range(3)]
    found = spectral.least_interference(tasks, 4000, 1e-2)
    torch.testing.assert_close(found, spectral.undisturbed(tasks), rtol=0, atol=1e-5)


def test_steps_are_those_of_adam():
    tasks = [random(6, 4, seed=i) for i in range(3)]
    x = torch.nn.Parameter(sum(tasks))
    adam = torch.optim.Adam([x], lr=1e-3)
    for _ in range(20):
        adam.zero_grad()
        sum(((x - t) @ t.T).square().sum() / t.square().sum() for t in tasks).backward()
        adam.step()
    close(spectral.least_interference(tasks, 20, 1e-3), x.detach())


@pytest.mark.parametrize(
    ("shape", "conv", "seen"),
    [((3, 4), "average", [3, 4]), ((3,), "flatten", None), ((1, 5, 4), "flatten", None), ((), "flatten", None),
     ((6, 2, 3, 3), "average", None), ((6, 2, 3, 3), "flatten", [6, 18]), ((2, 2, 2, 2, 2), "flatten", [2, 16]),
     ((0, 3), "flatten", None)],
)  # fmt: skip
def test_what_is_a_matrix(shape, conv, seen):
    shapes = []
    tensors = [torch.ones(shape), torch.zeros(shape)]
    merged = spectral.per_matrix(tensors, lambda ms: shapes.append(list(ms[0].shape)) or ms[0], conv=conv)
    assert shapes == ([] if seen is None else [seen])
    assert merged.equal(torch.full(shape, 1.0 if seen else 0.5))
