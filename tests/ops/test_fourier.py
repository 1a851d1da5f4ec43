"""Filters against waves of known frequency, and against the sentence that describes the released one."""

import numpy as np
import pytest
import torch

from hf_merge.ops.fourier import in_blocks, radial_high_pass, released_filter


def wave(rows, columns, shape=(16, 16)):
    y, x = np.mgrid[: shape[0], : shape[1]]
    return torch.from_numpy(np.cos(2 * np.pi * (rows * y / shape[0] + columns * x / shape[1])))


@pytest.mark.parametrize(
    ("rows", "columns", "radius"),
    [(0, 0, 0), (1, 0, 1 / 8), (2, 0, 1 / 4), (0, 3, 3 / 8), (3, 4, 5 / 8), (8, 8, 2**0.5)],
)
@pytest.mark.parametrize("cut", [0.0, 0.3, 0.6])
def test_high_pass_keeps_a_wave_or_removes_it(rows, columns, radius, cut):
    found = radial_high_pass(wave(rows, columns), cut)
    torch.testing.assert_close(found, wave(rows, columns) * (radius >= cut), rtol=0, atol=1e-12)


def test_the_cut_does_not_depend_on_the_shape():
    for shape in ((16, 16), (64, 16), (15, 21)):
        assert float(radial_high_pass(wave(2, 0, shape), 4 / shape[0] + 1e-3).abs().max()) < 1e-12
        torch.testing.assert_close(radial_high_pass(wave(2, 0, shape), 4 / shape[0] - 1e-3), wave(2, 0, shape))


@pytest.mark.parametrize("shape", [(1, 7), (9, 9), (33, 47), (24, 10), (45, 101), (40, 40), (1, 1)])
@pytest.mark.parametrize("ratio", [0.0, 0.3, 0.7, 1.0])
def test_released_filter_is_what_its_words_say(shape, ratio):
    matrix = np.random.default_rng(0).standard_normal(shape)
    height, width = shape
    gain = np.zeros(shape)
    for y in range(height):
        for x in range(width):
            distance = np.float32(np.sqrt(np.float32((x - width // 2) ** 2 + (y - height // 2) ** 2)))
            inner = min(shape) // 10
            gain[y, x] = int(distance <= inner) + int(inner <= distance <= np.float32(min(shape) * ratio))
    expected = np.fft.ifft2(np.fft.fft2(matrix) * gain).real
    np.testing.assert_allclose(released_filter(torch.from_numpy(matrix), ratio).numpy(), expected, atol=1e-12)


def test_blocks_of_rows():
    for rows, expected in ((6, [2] * 6), (7, [7] * 7)):
        found = in_blocks(torch.zeros(rows, 2), 3, lambda block: torch.full_like(block, len(block)))
        assert found[:, 0].tolist() == expected
