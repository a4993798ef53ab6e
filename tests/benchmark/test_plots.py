"""The figures of a report."""

from __future__ import annotations

import itertools

import numpy as np
from matplotlib.colors import to_rgb

from agents.benchmark.plots import COLORS


def lab(color):
    """CIELAB of an sRGB colour, D65 (the formulae of CIE 15)."""
    rgb = np.array(to_rgb(color))
    linear = np.where(rgb <= 0.04045, rgb / 12.92, ((rgb + 0.055) / 1.055) ** 2.4)
    xyz = np.array([[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]) @ linear
    x, y, z = (np.cbrt(v) if v > (6 / 29) ** 3 else v / (3 * (6 / 29) ** 2) + 4 / 29 for v in xyz / [0.9505, 1, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


def test_no_two_colours_of_agents_resemble_each_other_or_the_page():
    assert len(COLORS) >= 12  # all agents in the box
    for first, second in itertools.combinations((*COLORS, "#ffffff"), 2):
        assert np.linalg.norm(lab(first) - lab(second)) > 20, (first, second)
