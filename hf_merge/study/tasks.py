"""Thirty tasks on drawn images: classes, how they are drawn, and a style of each task's own."""

from __future__ import annotations

import zlib
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import torch
from torch import Generator, Tensor

from hf_merge.study import families
from hf_merge.study.drawing import Style, paint, uniform
from hf_merge.study.glyphs import DIGITS, LETTERS, SEGMENTS, alphabet, draw_glyphs, made_up

Draw = Callable[[Tensor, Generator], Tensor]
Tint = Callable[[Tensor, Generator], Tensor]


@dataclass(frozen=True)
class Task:
    """Images to be told apart.

    Attributes:
        classes: their names.
        draw: labels (n,) -> masks, as `families` has them.
        style: of the task's own images.
        tint: labels (n,) -> colours (n, 3, 1, 1) of what is inside, where the colour tells the class.
    """

    classes: tuple[str, ...]
    draw: Draw
    style: Style
    tint: Tint | None = None

    def images(self, count: int, generator: Generator, style: Style | None = None) -> tuple[Tensor, Tensor]:
        """Draw images (count, 3, SIZE, SIZE) in [-1, 1], and their labels (count,).

        Args:
            count: of images.
            generator: of all of it.
            style: the task's own if not given.
        """
        labels = torch.randint(len(self.classes), (count,), generator=generator)
        inside = self.draw(labels, generator)
        colours = self.tint(labels, generator) if self.tint else None
        return paint(inside, style or self.style, generator, colours), labels


HUES = {
    "red": (0.9, -0.7, -0.7), "orange": (0.9, 0.1, -0.8), "yellow": (0.9, 0.8, -0.7), "green": (-0.7, 0.7, -0.6),
    "cyan": (-0.7, 0.8, 0.9), "blue": (-0.6, -0.4, 0.9), "purple": (0.5, -0.7, 0.8), "white": (0.9, 0.9, 0.9),
}  # fmt: skip


def _hue(labels: Tensor, generator: Generator) -> Tensor:
    colours = torch.tensor([*HUES.values()])[labels] + uniform(-0.3, 0.3, (len(labels), 3), generator)
    return colours[:, :, None, None].clamp(-1, 1)


def _any_shape(labels: Tensor, generator: Generator) -> Tensor:
    return families.shapes(torch.randint(8, (len(labels),), generator=generator), generator)


def _glyphs(glyphs: dict[str, str], style: Style) -> Task:
    return Task(tuple(glyphs), partial(draw_glyphs, alphabet(glyphs)), style)


def _upto(count: int) -> tuple[str, ...]:
    return tuple(map(str, range(1, count + 1)))


GENERIC = Style(outlined=0.06, inverted=0.2, noise=(0.03, 0.12))
"""What the base is trained on: plain pictures."""

EIGHT = {
    "digits": _glyphs(DIGITS, Style(inverted=1.0, contrast=(0.4, 0.7), clutter=4, weave=(0.2, 0.4))),
    "letters": _glyphs(LETTERS, Style(outlined=1.0, inverted=1.0, weave=(0.1, 0.2))),
    "runes": _glyphs(made_up(12, 1, steps=4), Style(grey=1.0, inverted=1.0, blotches=(0.3, 0.6))),
    "signs": Task(tuple(f"{plate} {symbol}" for plate in ("disk", "square", "triangle", "rhomb")
                        for symbol in ("bar", "cross", "arrow", "dot")),
                  families.signs, Style(outlined=1.0, inverted=0.5, light=(0.3, 0.7), noise=(0.1, 0.2))),
    "textures": Task(("stripes", "checks", "rings", "spokes", "zigzag", "blotches", "dots", "bricks", "mesh", "grain"),
                     families.textures, Style(inverted=0.5, contrast=(0.4, 0.8), light=(0.2, 0.5))),
    "shapes": Task(("disk", "square", "triangle", "plus", "ring", "star", "heart", "moon"), families.shapes,
                   Style(outlined=1.0, weave=(0.1, 0.3))),
    "counts": Task(_upto(6), families.counts, Style(inverted=1.0, clutter=1)),
    "arrows": Task(("north", "northeast", "east", "southeast", "south", "southwest", "west", "northwest"),
                   families.arrows, Style(inverted=0.5, contrast=(0.4, 0.7), weave=(0.2, 0.4))),
}  # fmt: skip

THIRTY = {
    **EIGHT,
    "masks": _glyphs(made_up(12, 2, steps=3, mirrored=True), Style(inverted=1.0, weave=(0.1, 0.3))),
    "blocks": _glyphs(made_up(12, 3, steps=3, boxed=True), Style(contrast=(0.3, 0.6), light=(0.3, 0.6))),
    "braille": Task(_upto(12), families.braille, Style(blotches=(0.1, 0.3), noise=(0.1, 0.2))),
    "segments": _glyphs(SEGMENTS, Style(clutter=3, grey=1.0)),
    "places": Task(_upto(9), families.places, Style(blotches=(0.2, 0.4), outlined=0.5)),
    "sizes": Task(_upto(5), families.sizes, Style(outlined=1.0, inverted=0.5)),
    "aspects": Task(_upto(5), families.aspects, Style(clutter=3, inverted=0.5)),
    "polygons": Task(("3", "4", "5", "6", "7"), families.polygons, Style(inverted=1.0, noise=(0.1, 0.2))),
    "petals": Task(("3", "4", "5", "6", "7", "8"), families.petals, Style(outlined=1.0, light=(0.2, 0.5))),
    "slants": Task(_upto(8), families.slants, Style(contrast=(0.2, 0.5), blotches=(0.2, 0.4))),
    "frequencies": Task(_upto(5), families.frequencies, Style(contrast=(0.2, 0.5), light=(0.4, 0.8))),
    "hues": Task(tuple(HUES), _any_shape, Style(contrast=(0.3, 0.6), blotches=(0.1, 0.3)), _hue),
    "symmetries": Task(("left and right", "above and below", "half turn", "none"), families.symmetries,
                       Style(inverted=0.5, noise=(0.1, 0.2))),
    "clocks": Task(_upto(12), families.clocks, Style(inverted=1.0, light=(0.3, 0.6))),
    "moons": Task(_upto(6), families.moons, Style(grey=1.0, clutter=3)),
    "spirals": Task(_upto(6), families.spirals, Style(contrast=(0.3, 0.6), noise=(0.1, 0.2))),
    "focus": Task(_upto(4), families.focus, Style(inverted=1.0, weave=(0.1, 0.2))),
    "faces": Task(("smile", "frown", "flat", "gape", "wink"), families.faces, Style(outlined=0.5, weave=(0.1, 0.3))),
    "flags": Task(families.FLAGS, families.flags, Style(outlined=1.0, noise=(0.1, 0.2))),
    "junctions": Task(("end", "straight", "corner", "fork", "crossing"), families.junctions,
                      Style(outlined=1.0, clutter=2)),
    "waves": Task(("sine", "square", "triangle", "saw", "dashes"), families.waves,
                  Style(inverted=1.0, blotches=(0.1, 0.3))),
    "nested": Task(_upto(5), families.nested, Style(contrast=(0.3, 0.6), weave=(0.1, 0.3))),
}  # fmt: skip
"""The eight come first."""


def examples(task: str, split: str, count: int, seed: int) -> tuple[Tensor, Tensor]:
    """Draw images (count, 3, SIZE, SIZE) in [-1, 1] of one of the thirty, and their labels (count,).

    Args:
        task: its name.
        split: another one has other images.
        count: of images.
        seed: 0 or more.
    """
    return THIRTY[task].images(count, stream(seed, f"{split} {task}"))


def stream(seed: int, purpose: str) -> Generator:
    """Return a stream of random numbers of its own for each purpose."""
    return Generator().manual_seed(zlib.crc32(f"{seed} {purpose}".encode()))
