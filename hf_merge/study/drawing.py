"""Pictures from masks: signed distances to an edge, then a style. All is decided by a generator; nothing is loaded.

A mask is a tensor (n, SIZE, SIZE) of distances to the nearest edge, positive inside, where the picture spans -1 to 1.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Generator, Tensor

SIZE = 32  # pixels
Range = tuple[float, float]


@dataclass(frozen=True)
class Style:
    """How masks become pictures: probabilities, and ranges that a value is drawn from for each picture."""

    outlined: float = 0.0
    inverted: float = 0.0  # dark on light
    contrast: Range = (0.5, 1.0)
    light: Range = (0.0, 0.2)  # how much lighter one side is than the other
    noise: Range = (0.08, 0.18)
    clutter: int = 0  # strokes that belong to nothing, behind the mask
    weave: Range = (0.0, 0.0)  # how strong a background of waves is
    blotches: Range = (0.0, 0.0)  # how strong a background of clouds is
    grey: float = 0.0  # without colour


def paint(inside: Tensor, style: Style, generator: Generator, colours: Tensor | None = None) -> Tensor:
    """Colour masks, with a light from one side and noise.

    Args:
        inside: (n, SIZE, SIZE) distances, positive inside.
        style: how.
        generator: of all that is drawn by chance.
        colours: (n, 3, 1, 1) of the insides, between -1 and 1; drawn by chance if not given.

    Returns:
        Images (n, 3, SIZE, SIZE) in [-1, 1].
    """
    n = len(inside)
    chance = torch.rand(n, 2, 1, 1, 1, generator=generator)
    back, fore = uniform(-1.0, 0.0, (n, 3, 1, 1), generator), uniform(0.1, 1.0, (n, 3, 1, 1), generator)
    fore = fore if colours is None else colours
    contrast, light, noise = (uniform(*each, (n, 1, 1, 1), generator)
                              for each in (style.contrast, style.light, style.noise))  # fmt: skip
    edges = inside[:, None] * 12
    mask = torch.where(chance[:, 0] < style.outlined, torch.exp(-edges.square()), torch.sigmoid(2 * edges))
    inverted = chance[:, 1] < style.inverted
    back, fore = torch.where(inverted, fore, back), torch.where(inverted, back, fore)
    slope, _ = turned(*axes(), uniform(0, 2 * math.pi, (n, 1, 1), generator))
    grain = torch.randn(n, 3, SIZE, SIZE, generator=generator)
    ground = back + _behind(n, style, generator)
    image = ground + contrast * (fore - ground) * mask + light * slope[:, None] + noise * grain
    if style.grey:
        grey = torch.rand(n, 1, 1, 1, generator=generator) < style.grey
        image = torch.where(grey, image.mean(1, keepdim=True), image)
    return image.clamp_(-1, 1)


def _behind(n: int, style: Style, generator: Generator) -> Tensor | float:
    """Draw what lies behind the mask, (n, 3, SIZE, SIZE), as far as the style has it."""
    drawn: Tensor | float = 0.0
    if style.clutter:
        ends = uniform(-1.3, 1.3, (n, style.clutter, 4), generator)
        lines = torch.sigmoid(24 * strokes(ends, *axes(), uniform(0.02, 0.06, (n, 1, 1), generator)))
        drawn = drawn + uniform(-0.5, 0.9, (n, 3, 1, 1), generator) * lines[:, None]
    if style.weave[1]:
        x, _ = turned(*axes(), uniform(0, math.pi, (n, 1, 1), generator))
        waves = (uniform(8, 22, (n, 1, 1), generator) * x + uniform(0, 6, (n, 1, 1), generator)).sin()
        drawn = drawn + uniform(*style.weave, (n, 1, 1, 1), generator) * waves[:, None]
    if style.blotches[1]:
        clouds = F.interpolate(torch.randn(n, 3, 5, 5, generator=generator), SIZE, mode="bicubic")
        drawn = drawn + uniform(*style.blotches, (n, 1, 1, 1), generator) * clouds
    return drawn


def strokes(ends: Tensor, x: Tensor, y: Tensor, thick: Tensor) -> Tensor:
    """Return the mask of strokes with round ends.

    Args:
        ends: (n, strokes, 4) as x, y, x, y; NaN where a picture has fewer.
        x: across, broadcasting with (n, SIZE, SIZE); y: down.
        thick: half the width, broadcasting with (n, SIZE, SIZE).
    """
    x0, y0, x1, y1 = ends[..., None, None].unbind(2)
    along, down, x, y = x1 - x0, y1 - y0, x[:, None] - x0, y[:, None] - y0
    share = ((x * along + y * down) / (along.square() + down.square() + 1e-9)).clamp(0, 1)
    squared = (x - share * along).square() + (y - share * down).square()
    return thick - squared.nan_to_num_(1e4).amin(1).sqrt()


def axes() -> tuple[Tensor, Tensor]:
    """Return x (1, 1, SIZE) and y (1, SIZE, 1), from -1 to 1."""
    line = torch.linspace(-1, 1, SIZE)
    return line.view(1, 1, SIZE), line.view(1, SIZE, 1)


def turned(x: Tensor, y: Tensor, angle: Tensor) -> tuple[Tensor, Tensor]:
    """Return coordinates in a frame that is turned by an angle, in radians."""
    return x * angle.cos() + y * angle.sin(), y * angle.cos() - x * angle.sin()


def placed(n: int, generator: Generator, *, scale: Range, shift: float = 0.15, turn: Range = (-0.2, 0.2)) -> Frame:
    """Draw a frame for each of n pictures: scaled, shifted and turned by chance."""
    size, across, down, angle = (uniform(*each, (n, 1, 1), generator)
                                 for each in (scale, (-shift, shift), (-shift, shift), turn))  # fmt: skip
    x, y = axes()
    return Frame(*turned((x - across) / size, (y - down) / size, angle), size)


@dataclass(frozen=True)
class Frame:
    """Coordinates (n, SIZE, SIZE) that shapes are drawn in, and how large their unit is in the picture (n, 1, 1)."""

    x: Tensor
    y: Tensor
    scale: Tensor

    @property
    def radius(self) -> Tensor:
        """Distance to the origin."""
        return torch.hypot(self.x, self.y)

    @property
    def angle(self) -> Tensor:
        """Clockwise from straight up, between -pi and pi."""
        return torch.atan2(self.x, -self.y)


def pick(drawings: list[Tensor], labels: Tensor) -> Tensor:
    """Take drawings[labels[i]][i] for each i."""
    return torch.stack(torch.broadcast_tensors(*drawings))[labels, torch.arange(len(labels))]


def uniform(low: float, high: float, shape: tuple[int, ...], generator: Generator) -> Tensor:
    """Draw numbers between two bounds."""
    return low + (high - low) * torch.rand(shape, generator=generator)
