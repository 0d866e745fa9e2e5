"""Charts: round numbers, curves where they belong, and nothing for nothing."""

from __future__ import annotations

import math

import numpy as np
import pytest

from fastgen import charts


@pytest.mark.parametrize(
    ("low", "high", "expected"),
    [
        (0, 10, [0, 2, 4, 6, 8, 10]),
        (0.013, 0.049, [0.01, 0.02, 0.03, 0.04, 0.05]),
        (-3, 1, [-3, -2, -1, 0, 1]),
        (0, 100000, [0, 20000, 40000, 60000, 80000, 100000]),
        (2, 2, [1.4, 1.6, 1.8, 2.0, 2.2, 2.4, 2.6]),
    ],
    ids=str,
)
def test_ticks_are_round(low, high, expected):
    assert charts.ticks(low, high) == pytest.approx(expected)


def test_curves_are_drawn_in_their_colours():
    rising, falling = [(0, 0), (10, 1)], [(0, 1.0), (10, 0.0)]
    picture = charts.lines({"rising": rising, "falling": falling}, x_label="step", width=300, height=200)
    assert picture.shape == (200, 300, 3) and picture.dtype == np.uint8

    def rows(colour, columns):
        return np.argwhere((picture[charts.TOP :, columns] == colour).all(axis=2))[:, 0].mean()

    left, right = slice(charts.LEFT + 2, charts.LEFT + 40), slice(-60, -charts.RIGHT)
    assert rows(charts.COLOURS[0], left) > rows(charts.COLOURS[0], right)
    assert rows(charts.COLOURS[1], left) < rows(charts.COLOURS[1], right)


def test_odd_curves():
    for curve in ([(3, 5)], [(0, 2), (1, 2)], [(0, math.nan), (1, 1e-30), (2, 1e9), (3, math.inf)]):
        assert charts.lines({"a": curve, "empty": []}).shape == (320, 560, 3)
    with pytest.raises(ValueError, match="at least one finite point"):
        charts.lines({"a": [(0, math.nan)]})
