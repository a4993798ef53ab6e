"""The pictures of a run, as PNG: reward against KL, and the course of the training."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from agents.runs.report import BEST, BEST_OF_N, BOUND, LOOKAHEAD, Report
from agents.text_dqn.validation import LANGUAGE_MODEL
from textgen_env.files import whole_file

if TYPE_CHECKING:
    from matplotlib.figure import Figure


def draw_plane(report: Report, path: Path) -> None:
    """Draw reward against KL, every policy of the report under the curve of the best possible ones, as a PNG."""
    figure = _figure(7.5, 4.8)
    axes = figure.add_subplot()
    looks = {
        BEST: {"color": "black", "linewidth": 1.5},
        BOUND: {"color": "black", "linewidth": 1.5, "linestyle": ":"},
        BEST_OF_N: {"color": "tab:gray", "linestyle": "--", "marker": ".", "linewidth": 1},
        LOOKAHEAD: {"color": "tab:orange", "marker": "s", "markersize": 5},
    }
    for name, curve in report.curves.items():
        look: dict[str, Any] = looks.get(name, {"color": "tab:blue", "marker": "o", "markersize": 7})
        sees = report.sees.get(name)
        axes.plot(*zip(*curve, strict=True), label=f"{name} ({sees})" if sees else name, **look)
        for point, beta in zip(curve, report.betas.get(name, ()), strict=False):
            place: dict[str, Any] = {"xytext": (4, -9), "textcoords": "offset points", "fontsize": 7}
            said = "as the language model" if beta == LANGUAGE_MODEL else f"β {beta:.2g}"
            axes.annotate(said, point, color=look["color"], **place)
    language_model = report.rows[0]
    axes.plot(0, language_model.reward, "k*", markersize=11, label="language model")
    axes.set_xlabel("KL to the language model, nats a text")
    axes.set_ylabel("reward of a text")
    axes.margins(x=0.09)  # room for the last point's beta
    axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", frameon=False, ncols=2, fontsize=8)  # on no curve
    _write_png(figure, path)


def draw_learning(metrics: Sequence[Mapping[str, float]], language_model: float, path: Path) -> None:
    """Draw the reward of recent texts against steps and seconds, and the language model's as a line, as a PNG."""
    figure = _figure(9, 3.6)
    for place, (key, label) in enumerate([("steps", "steps (tokens)"), ("seconds", "seconds of training")]):
        axes = figure.add_subplot(1, 2, place + 1)
        axes.plot([row[key] for row in metrics], [row.get("reward", math.nan) for row in metrics], color="tab:blue")
        axes.axhline(language_model, color="black", linestyle=":", label="language model, new prompts")
        axes.legend(frameon=False)
        axes.set_xlabel(label)
        axes.set_ylabel("reward of recent texts")
        axes.grid(alpha=0.3)
    _write_png(figure, path)


def _figure(width: float, height: float) -> Figure:
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), dpi=130, layout="constrained")


def _write_png(figure: Figure, path: Path) -> None:
    with whole_file(path) as half_made:
        figure.savefig(half_made, format="png")
