"""Line charts as pictures, uint8 [height, width, 3], drawn with Pillow alone."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np

from fastgen.images import BACKGROUND, font

COLOURS = ((31, 119, 180), (214, 39, 40), (44, 160, 44), (148, 103, 189), (255, 127, 14))
AXIS, RULE = (60, 60, 60), (225, 225, 225)
LEFT, RIGHT, TOP, BOTTOM = 64, 16, 30, 44  # margins in pixels: numbers, nothing, the legend, numbers and a label
TICKS = 5

Points = Sequence[tuple[float, float]]


def lines(curves: Mapping[str, Points], *, x_label: str = "", width: int = 560, height: int = 320) -> np.ndarray:
    """Curves over a common x axis, with axes, round numbers beside them, and a legend above.

    Args:
        curves: name -> points (x, y) in the order in which they are joined; points that are not finite are left out.
        x_label: text below the x axis.
        width: of the picture, in pixels.
        height: of the picture, in pixels.

    Returns:
        uint8 [height, width, 3].

    Raises:
        ValueError: no curve has a finite point.
    """
    from PIL import Image, ImageDraw

    finite = {name: [p for p in points if all(map(math.isfinite, p))] for name, points in curves.items()}
    every = [point for points in finite.values() for point in points]
    if not every:
        raise ValueError("curves: expected at least one finite point, got none")
    x_ticks, y_ticks = (ticks(min(values), max(values)) for values in zip(*every, strict=True))
    x_low, x_high = min(x for x, _ in every), max(x for x, _ in every)
    y_low, y_high = min(y_ticks[0], min(y for _, y in every)), max(y_ticks[-1], max(y for _, y in every))

    def place(x: float, y: float) -> tuple[float, float]:
        across = (x - x_low) / ((x_high - x_low) or 1.0)
        up = (y - y_low) / ((y_high - y_low) or 1.0)
        return LEFT + across * (width - LEFT - RIGHT), height - BOTTOM - up * (height - TOP - BOTTOM)

    picture = Image.new("RGB", (width, height), (BACKGROUND,) * 3)
    draw, letters = ImageDraw.Draw(picture), font()
    for y in y_ticks:
        draw.line([place(x_low, y), place(x_high, y)], fill=RULE)
        text = _number(y)
        draw.text(
            (LEFT - 6 - draw.textlength(text, font=letters), place(x_low, y)[1] - 9), text, fill=AXIS, font=letters
        )
    for x in (x for x in x_ticks if x_low <= x <= x_high):
        text = _number(x)
        draw.text((place(x, 0)[0] - draw.textlength(text, font=letters) / 2, height - BOTTOM + 4), text, AXIS, letters)
    draw.line([(LEFT, TOP), (LEFT, height - BOTTOM), (width - RIGHT, height - BOTTOM)], fill=AXIS)
    middle = LEFT + (width - LEFT - RIGHT - draw.textlength(x_label, font=letters)) / 2
    draw.text((middle, height - BOTTOM + 22), x_label, fill=AXIS, font=letters)
    across = float(LEFT)
    for (name, points), colour in zip(finite.items(), COLOURS * len(finite), strict=False):
        draw.line([place(*point) for point in points], fill=colour, width=2)
        draw.line([(across, TOP / 2), (across + 18, TOP / 2)], fill=colour, width=3)
        draw.text((across + 24, TOP / 2 - 9), name, fill=AXIS, font=letters)
        across += 24 + draw.textlength(name, font=letters) + 20
    return np.asarray(picture)


def ticks(low: float, high: float) -> list[float]:
    """About `TICKS` round numbers (1, 2 or 5 times a power of ten apart) that lie in low..high or just outside."""
    if low == high:
        low, high = low - 0.5, high + 0.5
    step = 10.0 ** math.floor(math.log10((high - low) / TICKS))
    step *= next(factor for factor in (1, 2, 5, 10) if (high - low) / (step * factor) <= TICKS)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def _number(value: float) -> str:
    return f"{value:.6g}" if value == 0 or 1e-4 <= abs(value) < 1e6 else f"{value:.2g}"
