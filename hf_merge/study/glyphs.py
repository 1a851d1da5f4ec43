"""Alphabets as strokes: digits, letters, and scripts that nobody reads, made up by a generator."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import pairwise

import torch
from torch import Generator, Tensor

from hf_merge.study.drawing import placed, strokes, uniform

DIGITS = {
    "0": "10 30 41 45 36 16 05 01 10", "1": "11 20 26/16 36", "2": "01 10 30 41 42 06 46",
    "3": "01 10 30 41 42 33 13/33 44 45 36 16 05", "4": "36 30 04 44", "5": "40 00 02 32 43 45 36 06",
    "6": "40 20 02 05 16 36 45 44 33 03", "7": "00 40 16",
    "8": "10 30 41 42 33 13 02 01 10/13 04 05 16 36 45 44 33", "9": "42 33 13 02 01 10 30 41 44 26 16",
}  # fmt: skip
"""Points as column (0-4) and row (0-6), the pen lifted at a slash."""

LETTERS = {
    "A": "06 20 46/14 34", "B": "06 00 30 41 42 33 03/33 44 45 36 06", "C": "41 30 10 01 05 16 36 45",
    "E": "40 00 06 46/03 33", "F": "40 00 06/03 33", "H": "00 06/40 46/03 43", "J": "40 45 36 16 05",
    "K": "00 06/40 03 46", "L": "00 06 46", "M": "06 00 23 40 46", "N": "06 00 46 40",
    "P": "06 00 30 41 42 33 03", "R": "06 00 30 41 42 33 03/23 46", "T": "00 40/20 26", "U": "00 05 16 36 45 40",
    "X": "00 46/40 06", "Y": "00 23 40/23 26", "Z": "00 40 06 46",
}  # fmt: skip

SEGMENTS = {
    name: "/".join(("00 40", "40 43", "43 46", "06 46", "03 06", "00 03", "03 43")[int(bar)] for bar in bars)
    for name, bars in {
        "0": "012345", "1": "12", "2": "01346", "3": "01236", "4": "1256", "5": "02356", "6": "023456", "7": "012",
        "8": "0123456", "9": "012356",
    }.items()
}  # fmt: skip
"""Digits of seven bars."""


def alphabet(glyphs: dict[str, str]) -> Tensor:
    """Return the strokes of glyphs, (glyphs, strokes, 4) between -1 and 1, with NaN after a glyph's last."""
    lines = [[(first, second) for part in text.split("/") for first, second in _steps(part.split())]
             for text in glyphs.values()]  # fmt: skip
    table = torch.full((len(lines), max(map(len, lines)), 4), torch.nan)
    for row, steps in zip(table, lines, strict=True):
        for stroke, (first, second) in zip(row, steps, strict=False):
            stroke.copy_(torch.tensor([*_point(first), *_point(second)]))
    return table


def _steps(points: list[str]) -> Iterator[tuple[str, str]]:
    return pairwise(points)


def _point(text: str) -> tuple[float, float]:
    return int(text[0]) / 3 - 2 / 3, int(text[1]) / 3 - 1


def made_up(count: int, number: int, *, steps: int, mirrored: bool = False, boxed: bool = False) -> dict[str, str]:
    """Make up a script: glyphs that are walks over a grid of 3 x 3 points.

    Args:
        count: of glyphs.
        number: of the script; the same number gives the same script, always.
        steps: of a walk.
        mirrored: each glyph is the same left and right.
        boxed: each has a frame.
    """
    generator, found = Generator().manual_seed(number), {}
    while len(found) < count:
        points = torch.randint(3, (steps + 1, 2), generator=generator).tolist()
        walk = [f"{2 * x}{3 * y}" for x, y in points]
        lines = {tuple(sorted(step)) for step in _steps(walk)}
        if len(lines) < steps or any(first == second for first, second in lines):
            continue
        parts = [" ".join(walk)]
        if mirrored:
            parts.append(" ".join(f"{4 - int(point[0])}{point[1]}" for point in walk))
        if boxed:
            parts.append("00 40 46 06 00")
        every = frozenset(_drawn(parts))
        found.setdefault(every, "/".join(parts))
    return {f"{i}": text for i, text in enumerate(found.values())}


def _drawn(parts: list[str]) -> set[tuple[str, ...]]:
    return {tuple(sorted(step)) for part in parts for step in _steps(part.split())}


def draw_glyphs(table: Tensor, labels: Tensor, generator: Generator) -> Tensor:
    """Draw the glyphs of an alphabet: each turned, sheared and as thick as chance has it."""
    n = len(labels)
    frame = placed(n, generator, scale=(0.6, 0.85), shift=0.12)
    shear = uniform(-0.25, 0.25, (n, 1, 1), generator)
    thick = uniform(0.09, 0.17, (n, 1, 1), generator)
    return frame.scale * strokes(table[labels], frame.x + shear * frame.y, frame.y, thick)
