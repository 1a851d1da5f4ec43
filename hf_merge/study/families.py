"""Kinds of pictures: each function takes labels (n,) and a generator, and draws masks (n, SIZE, SIZE)."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

from hf_merge.study.drawing import SIZE, Frame, axes, pick, placed, strokes, turned, uniform

TURN = 2 * math.pi


# ---- shapes


def shapes(labels: Tensor, generator: Generator) -> Tensor:
    """Draw a disk, square, triangle, plus, ring, star, heart or moon."""
    frame = placed(len(labels), generator, scale=(0.55, 0.8))
    return frame.scale * pick([*_figures(frame), _heart(frame), _moon(frame)], labels)


def _figures(frame: Frame) -> list[Tensor]:
    x, y, radius, angle = frame.x, frame.y, frame.radius, frame.angle
    sides = [x * math.sin(turn) + y * math.cos(turn) for turn in (0, TURN / 3, 2 * TURN / 3)]
    beam, pole = torch.minimum(1 - x.abs(), 0.3 - y.abs()), torch.minimum(1 - y.abs(), 0.3 - x.abs())
    disk, square, triangle = 1 - radius, 0.85 - torch.maximum(x.abs(), y.abs()), 0.5 - torch.stack(sides).amax(0)
    plus, ring, star = torch.maximum(beam, pole), 0.25 - (radius - 0.75).abs(), 0.65 + 0.35 * (5 * angle).cos() - radius
    return [disk, square, triangle, plus, ring, star]


def _heart(frame: Frame) -> Tensor:
    x, y = frame.x.abs(), frame.y
    return torch.maximum(0.52 - torch.hypot(x - 0.45, y + 0.35), 0.62 - 0.72 * (x + (y + 0.05).abs()) - 0.1 * (y < 0))


def _moon(frame: Frame) -> Tensor:
    return torch.minimum(1 - frame.radius, torch.hypot(frame.x - 0.5, frame.y) - 0.8)


def signs(labels: Tensor, generator: Generator) -> Tensor:
    """Draw one of four plates with one of four symbols cut out: label = 4 * plate + symbol."""
    frame = placed(len(labels), generator, scale=(0.7, 0.9), shift=0.08, turn=(-0.12, 0.12))
    disk, square, triangle, *_ = _figures(frame)
    rhomb = 0.75 - 0.7 * (frame.x.abs() + frame.y.abs())
    x, y = frame.x / 0.42, (frame.y - 0.08) / 0.42
    bar, cross = 0.3 - y.abs(), torch.maximum(0.25 - (x - y).abs() / 1.4, 0.25 - (x + y).abs() / 1.4)
    arrow, dot = torch.minimum(0.6 - x.abs() - 0.6 * y, y + 0.8), 0.7 - torch.hypot(x, y)
    box = 1 - torch.maximum(x.abs(), y.abs())
    symbol = torch.minimum(0.42 * pick([bar, cross, arrow, dot], labels % 4), 0.42 * box)
    return frame.scale * torch.minimum(pick([disk, square, 1.25 * triangle + 0.1, rhomb], labels // 4), -symbol)


def polygons(labels: Tensor, generator: Generator) -> Tensor:
    """Draw polygons of 3, 4, .. sides, at any angle."""
    frame = placed(len(labels), generator, scale=(0.65, 0.9), shift=0.1, turn=(0, TURN))
    sector = TURN / (labels[:, None, None] + 3)
    within = torch.remainder(frame.angle, sector) - sector / 2
    return frame.scale * (0.8 * (sector / 2).cos() + 0.1 - frame.radius * within.cos())


def petals(labels: Tensor, generator: Generator) -> Tensor:
    """Draw flowers of 3, 4, .. petals, at any angle."""
    frame = placed(len(labels), generator, scale=(0.75, 0.95), shift=0.08, turn=(0, TURN))
    wave = ((labels[:, None, None] + 3) * frame.angle).cos()
    return frame.scale * (0.62 + 0.33 * wave - frame.radius).clamp(max=0.4)


def sizes(labels: Tensor, generator: Generator) -> Tensor:
    """Draw a disk, square or rhomb of growing size."""
    n = len(labels)
    frame = placed(n, generator, scale=(1, 1), shift=0.25, turn=(0, TURN))
    size = 0.12 + 0.14 * labels[:, None, None] + uniform(-0.035, 0.035, (n, 1, 1), generator)
    kind = torch.randint(3, (n,), generator=generator)
    extent = torch.maximum(frame.x.abs(), frame.y.abs()) * 1.13
    return size - pick([frame.radius, extent, 0.85 * (frame.x.abs() + frame.y.abs())], kind)


def aspects(labels: Tensor, generator: Generator) -> Tensor:
    """Draw ellipses and rectangles from tall and thin to low and wide."""
    n = len(labels)
    frame = placed(n, generator, scale=(0.5, 0.7), turn=(-0.1, 0.1))
    stretch = (0.42 * (labels[:, None, None] - 2) + uniform(-0.08, 0.08, (n, 1, 1), generator)).exp()
    x, y = frame.x / stretch, frame.y * stretch
    kind = torch.randint(2, (n,), generator=generator)
    return frame.scale * 0.7 * (0.9 - pick([torch.hypot(x, y), torch.maximum(x.abs(), y.abs()) * 1.12], kind))


def moons(labels: Tensor, generator: Generator) -> Tensor:
    """Draw a moon in phases from thin to full, and back."""
    frame = placed(len(labels), generator, scale=(0.7, 0.95), shift=0.08)
    phase = torch.tensor([-0.75, -0.2, 0.35, 0.75, 0.2, -0.35])[labels][:, None, None]
    side = torch.where(labels < 3, 1.0, -1.0)[:, None, None]
    rim = 1 - frame.radius
    limit = (1 - frame.y.square()).clamp(min=0).sqrt()
    return frame.scale * torch.minimum(rim, side * (frame.x + phase * limit))


def spirals(labels: Tensor, generator: Generator) -> Tensor:
    """Draw spirals that turn left or right, with one arm or two or three."""
    frame = placed(len(labels), generator, scale=(0.8, 1.0), shift=0.1, turn=(0, TURN))
    hand = torch.where(labels % 2 == 0, 1.0, -1.0)[:, None, None]
    arms = (labels // 2 + 1)[:, None, None]
    wave = (arms * frame.angle * hand + 10 * frame.radius).sin()
    return frame.scale * torch.minimum(0.16 * wave, 1 - frame.radius)


def faces(labels: Tensor, generator: Generator) -> Tensor:
    """Draw a face that smiles, frowns, is flat, is astonished, or winks."""
    frame = placed(len(labels), generator, scale=(0.75, 0.95), shift=0.08)
    x, y = frame.x, frame.y
    eye = 0.16 - torch.hypot(x.abs() - 0.38, y + 0.3)
    lid = torch.minimum(0.06 - (y + 0.3).abs(), 0.2 - (x - 0.38).abs())
    wink = torch.maximum(0.16 - torch.hypot(x + 0.38, y + 0.3), lid)
    smile = torch.minimum(0.09 - (torch.hypot(x, y) - 0.55).abs(), y - 0.1)
    frown = torch.minimum(0.09 - (torch.hypot(x, y - 0.85) - 0.55).abs(), 0.6 - y)
    flat = torch.minimum(0.08 - (y - 0.42).abs(), 0.42 - x.abs())
    gape = 0.2 - torch.hypot(x, y - 0.42)
    parts = [torch.maximum(eye, mouth) for mouth in (smile, frown, flat, gape)]
    return frame.scale * torch.minimum(1 - frame.radius, -pick([*parts, torch.maximum(wink, smile)], labels))


# ---- patterns over the whole picture


def textures(labels: Tensor, generator: Generator) -> Tensor:
    """Draw stripes, checks, rings, spokes, zigzag, blotches, dots, bricks, mesh or grain."""
    n = len(labels)
    frequency, across, down, turn = (uniform(*each, (n, 1, 1), generator)
                                     for each in ((9, 16), (-0.15, 0.15), (-0.15, 0.15), (0, math.pi)))  # fmt: skip
    x, y = axes()
    x, y = turned(x - across, y - down, turn)
    wave, radius, angle = (frequency * x).sin(), torch.hypot(x, y), torch.atan2(x, y)
    checker, rings, spokes = 2 * wave * (frequency * y).sin(), (frequency * radius).sin(), (6 * angle).sin()
    zigzag = (frequency * x + 2.2 * torch.asin(0.99 * (0.8 * frequency * y).sin())).sin()
    blotches = 2 * F.interpolate(torch.randn(n, 1, 9, 9, generator=generator), SIZE, mode="bicubic")[:, 0]
    drawn = [wave, checker, rings, spokes, zigzag, blotches]
    if len(labels) and int(labels.max()) >= len(drawn):
        other = (frequency * y).sin()
        shifted = (frequency * x / 2 + math.pi / 2 * (other > 0)).sin()
        dots, bricks = wave + other - 0.8, torch.minimum(other.abs() - 0.35, shifted.abs() - 0.25) * 2
        mesh = torch.maximum(wave, other) - 0.6
        grain = 1.5 * torch.randn(n, SIZE, SIZE, generator=generator)
        drawn += [dots, bricks, mesh, grain]
    return 0.12 * pick(drawn, labels)


def slants(labels: Tensor, generator: Generator) -> Tensor:
    """Draw stripes in one of eight directions."""
    n = len(labels)
    angle = (labels[:, None, None] + uniform(-0.3, 0.3, (n, 1, 1), generator)) * math.pi / 8
    x, _ = turned(*axes(), angle)
    frequency = uniform(7, 15, (n, 1, 1), generator)
    return (frequency * x + uniform(0, TURN, (n, 1, 1), generator)).sin() / frequency


def frequencies(labels: Tensor, generator: Generator) -> Tensor:
    """Draw stripes or checks from wide to narrow."""
    n = len(labels)
    frequency = 4.5 * 1.45 ** (labels[:, None, None] + uniform(-0.25, 0.25, (n, 1, 1), generator))
    x, y = turned(*axes(), uniform(0, math.pi, (n, 1, 1), generator))
    phase = uniform(0, TURN, (2, n, 1, 1), generator)
    wave, other = (frequency * x + phase[0]).sin(), (frequency * y + phase[1]).sin()
    return pick([wave, 2 * wave * other], torch.randint(2, (n,), generator=generator)) / frequency


def waves(labels: Tensor, generator: Generator) -> Tensor:
    """Draw a line that is a sine, square, triangle or saw, or is dashed."""
    n = len(labels)
    frame = placed(n, generator, scale=(1, 1), turn=(-0.3, 0.3))
    turns = uniform(1.1, 1.8, (n, 1, 1), generator) * frame.x + uniform(0, 1, (n, 1, 1), generator)
    phase = turns - turns.floor()
    sine, square = (TURN * phase).sin(), torch.where(phase < 0.5, 1.0, -1.0)
    triangle, saw = 4 * (phase - 0.5).abs() - 1, 2 * phase - 1
    height = pick([sine, square, triangle, saw, torch.zeros_like(phase)], labels) * 0.5
    line = (
        uniform(0.1, 0.16, (n, 1, 1), generator)
        - (frame.y - height).abs() * torch.where(labels == 1, 1.0, 0.6)[:, None, None]
    )
    return torch.where((labels == 4)[:, None, None], torch.minimum(line, (0.25 - (phase - 0.5).abs()) * 0.6), line)


def nested(labels: Tensor, generator: Generator) -> Tensor:
    """Draw one to five rings in each other."""
    n = len(labels)
    frame = placed(n, generator, scale=(0.8, 1.0), shift=0.1)
    rings = (labels + 1)[:, None, None]
    steps = frame.radius * 5.0
    line = 0.3 - (steps - steps.round().clamp(min=1).minimum(rings.float())).abs()
    return frame.scale * line / 5.0


# ---- how many, where, which way


def counts(labels: Tensor, generator: Generator) -> Tensor:
    """Draw one to six dots."""
    n, dots = len(labels), 6
    x, y = (axis[:, None] for axis in axes())
    cells = torch.rand(n, 9, generator=generator).argsort(1)[:, :dots, None, None]  # of a grid of 3 x 3
    jitter = uniform(-0.08, 0.08, (2, n, dots, 1, 1), generator)
    across, down = 0.62 * (cells % 3 - 1) + jitter[0], 0.62 * (cells // 3 - 1) + jitter[1]
    inside = uniform(0.18, 0.28, (n, dots, 1, 1), generator) - torch.hypot(x - across, y - down)
    shown = torch.arange(dots) <= labels[:, None]
    return torch.where(shown[:, :, None, None], inside, -1.0).amax(1)


def arrows(labels: Tensor, generator: Generator) -> Tensor:
    """Draw an arrow that points in one of eight directions."""
    n = len(labels)
    angle = (labels[:, None, None] + uniform(-0.3, 0.3, (n, 1, 1), generator)) * TURN / 8
    frame = placed(n, generator, scale=(0.65, 0.9), turn=(0, 0))
    x, y = turned(frame.x, frame.y, angle)
    head = torch.minimum(0.5 * (y + 1) - x.abs(), -y - 0.05)
    shaft = torch.minimum(uniform(0.14, 0.24, (n, 1, 1), generator) - x.abs(), 0.9 - y.abs())
    return frame.scale * torch.maximum(head, torch.minimum(shaft, y + 0.5))


def clocks(labels: Tensor, generator: Generator) -> Tensor:
    """Draw a dial with a hand that points to one of twelve hours."""
    n = len(labels)
    angle = (labels[:, None, None] + uniform(-0.25, 0.25, (n, 1, 1), generator)) * TURN / 12
    frame = placed(n, generator, scale=(0.75, 0.95), shift=0.1, turn=(0, 0))
    x, y = turned(frame.x, frame.y, angle)
    hand = torch.minimum(uniform(0.1, 0.15, (n, 1, 1), generator) - x.abs(), torch.minimum(-y + 0.12, y + 0.75))
    return frame.scale * torch.maximum(hand, 0.1 - (frame.radius - 0.9).abs())


def places(labels: Tensor, generator: Generator) -> Tensor:
    """Draw a disk or square in one of nine places."""
    n = len(labels)
    x, y = axes()
    jitter = uniform(-0.12, 0.12, (2, n, 1, 1), generator)
    across, down = (0.62 * (each[:, None, None] - 1) + shift
                    for each, shift in ((labels % 3, jitter[0]), (labels // 3, jitter[1])))  # fmt: skip
    x, y = x - across, y - down
    kind = torch.randint(2, (n,), generator=generator)
    size = uniform(0.16, 0.3, (n, 1, 1), generator)
    return size - pick([torch.hypot(x, y), torch.maximum(x.abs(), y.abs()) * 1.12], kind)


BRAILLE = ("100000", "101000", "110000", "110100", "100100", "111000",
           "111100", "101100", "011000", "011100", "100010", "101010")  # fmt: skip


def braille(labels: Tensor, generator: Generator) -> Tensor:
    """Draw one of twelve letters of Braille: dots on a grid of 2 x 3, the others faint."""
    n = len(labels)
    frame = placed(n, generator, scale=(0.75, 0.95), shift=0.12, turn=(-0.1, 0.1))
    raised = torch.tensor([[int(dot) for dot in letter] for letter in BRAILLE])[labels, :, None, None]
    cells = torch.arange(6)[:, None, None]
    across, down = 0.7 * (cells % 2) - 0.35, 0.7 * (cells // 2) - 0.7
    gaps = torch.hypot(frame.x[:, None] - across, frame.y[:, None] - down)
    size = torch.where(raised == 1, uniform(0.2, 0.27, (n, 1, 1, 1), generator), 0.06)
    return frame.scale * (size - gaps).amax(1)


def symmetries(labels: Tensor, generator: Generator) -> Tensor:
    """Draw a blot that is the same left and right, above and below, turned by a half, or in no way."""
    n = len(labels)
    cloud = F.interpolate(torch.randn(n, 1, 6, 6, generator=generator), SIZE, mode="bicubic")[:, 0]
    across, down = cloud.flip(2), cloud.flip(1)
    blot = pick([cloud + across, cloud + down, cloud + cloud.flip(1, 2), 1.41 * cloud], labels)
    x, y = axes()
    return 0.16 * torch.minimum(blot, 8 * (0.95 - torch.hypot(x, y)))


def focus(labels: Tensor, generator: Generator) -> Tensor:
    """Draw strokes and a disk, from sharp to blurred: distances shrink where an edge is soft."""
    n = len(labels)
    ends = uniform(-0.8, 0.8, (n, 3, 4), generator)
    lines = strokes(ends, *axes(), uniform(0.1, 0.2, (n, 1, 1), generator))
    frame = placed(n, generator, scale=(0.3, 0.5), shift=0.5)
    softness = 0.42 ** (labels[:, None, None] + uniform(-0.2, 0.2, (n, 1, 1), generator))
    return 2 * softness * torch.maximum(lines, frame.scale * (1 - frame.radius))


FLAGS = ("bands", "pales", "cross", "saltire", "canton", "chevron", "disc", "quarters", "border", "bend")


def flags(labels: Tensor, generator: Generator) -> Tensor:
    """Draw a flag: see FLAGS."""
    frame = placed(len(labels), generator, scale=(0.8, 0.95), shift=0.08, turn=(-0.12, 0.12))
    x, y = frame.x, frame.y * 1.3
    bands, pales = 0.33 - y.abs(), 0.33 - x.abs()
    cross = torch.maximum(0.2 - (x + 0.25).abs(), 0.2 - y.abs())
    saltire = torch.maximum(0.22 - (x - y).abs(), 0.22 - (x + y).abs())
    canton, chevron = torch.minimum(-x, -y), -x - y.abs() + 0.1
    disc, quarters = 0.55 - torch.hypot(x, y), -4 * x * y
    border, bend = torch.maximum(x.abs(), y.abs()) - 0.68, 0.28 - (x - y).abs()
    charge = pick([bands, pales, cross, saltire, canton, chevron, disc, quarters, border, bend], labels)
    edge = 1 - torch.maximum(x.abs(), y.abs())
    frame_line = 0.05 - edge.abs()
    return frame.scale * torch.maximum(torch.minimum(charge, edge), frame_line)


JUNCTIONS = ((0,), (0, 2), (0, 1), (0, 1, 2), (0, 1, 2, 3))


def junctions(labels: Tensor, generator: Generator) -> Tensor:
    """Draw roads that meet: a dead end, straight on, a corner, a fork or a crossing, turned by quarters."""
    n = len(labels)
    frame = placed(n, generator, scale=(0.8, 1.0), shift=0.1)
    quarter = torch.randint(4, (n,), generator=generator)
    arms = torch.full((len(JUNCTIONS), 4, 4), torch.nan)
    for table, roads in zip(arms, JUNCTIONS, strict=True):
        for row, road in zip(table, roads, strict=False):
            row.copy_(torch.tensor([0, 0, *((0, -1), (1, 0), (0, 1), (-1, 0))[road]]))
    x, y = turned(frame.x, frame.y, quarter[:, None, None] * math.pi / 2)
    return frame.scale * strokes(arms[labels], x, y, uniform(0.14, 0.24, (n, 1, 1), generator))
