"""The pictures of a benchmark's report, as SVG: the same figure is the same file.

scores {agent: {task: (runs,)}}, result rows  ->  Picture
"""

from __future__ import annotations

import base64
import io
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from matplotlib import rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from agents.benchmark.config import short_name
from agents.benchmark.results import ResultRow
from agents.benchmark.statistics import (
    Scores,
    interquartile_mean,
    performance_profile,
    profile_band,
    stratified_interval,
)


@dataclass(frozen=True)
class Picture:
    """A drawn figure, with its file name and its text alternative."""

    id: str
    alt: str
    svg: bytes

    @property
    def base64(self) -> str:
        return base64.b64encode(self.svg).decode()


COLORS = (
    "#4363d8", "#e6194b", "#3cb44b", "#f58231", "#911eb4", "#00a0c6", "#9a6324", "#000000",
    "#f032e6", "#808000", "#000075", "#800000", "#999999", "#ff9db5", "#46f0c0", "#b8c400",
)  # fmt: skip
"""One an agent; no two resemble each other. Agents beyond them get other lines."""

LINES = ("-", "--", "-.", ":")

WIDTH = 5.0
"""Inches of a figure: its letters can be read where it is shown 420 pixels wide."""


def draw_means(scores: Mapping[str, Scores], agents: Sequence[str]) -> Picture:
    """Draw the interquartile mean of each agent with its interval, in the order of ``agents`` from the top."""
    means = {agent: float(interquartile_mean(np.concatenate(list(scores[agent].values())))) for agent in agents}
    order = list(reversed(agents))
    figure, axes = _axes(0.8 + 0.28 * len(agents))
    for height, agent in enumerate(order):
        low, high = stratified_interval(scores[agent])
        axes.plot([low, high], [height, height], color=_color(agents, agent), linewidth=6, alpha=0.4)
        axes.plot(means[agent], height, "o", color=_color(agents, agent))
    axes.set_yticks(range(len(order)), order)
    for known in (0, 1):
        axes.axvline(known, color="black", linestyle=":", linewidth=1)
    axes.set_xlabel("interquartile mean (0: language model, 1: best)")
    return _picture(figure, "means", "Interquartile mean of each agent, with its interval")


def draw_profiles(scores: Mapping[str, Scores], agents: Sequence[str]) -> Picture:
    """Draw the share of runs that reach each score."""
    figure, axes = _axes(3.4 + _legend_height(agents))
    thresholds = np.linspace(-0.25, 1.05, 131)
    for agent in agents:
        profile = performance_profile(scores[agent], thresholds)
        axes.plot(thresholds, profile, **_look(agents, agent), label=agent)
        axes.fill_between(thresholds, *profile_band(scores[agent], thresholds), color=_color(agents, agent), alpha=0.1)
    axes.set_xlabel("normalised score")
    axes.set_ylabel("share of runs at least as good")
    _legend(figure)
    return _picture(figure, "profiles", "Performance profiles of the agents")


def draw_curves(
    rows: Sequence[ResultRow], agents: Sequence[str], against: str, label: str, all_agents: Sequence[str] = ()
) -> Picture:
    """Draw the interquartile mean over tasks and seeds against ``step`` or ``seconds``.

    ``all_agents`` are those of the whole report, whose places fix the colours.
    """
    figure, axes = _axes(3.4 + _legend_height(agents))
    for agent in agents:
        curve = learning_curve([row for row in rows if row["agent"] == agent and row["status"] == "ok"], against)
        _plot_curve(axes, curve, agent, _look(all_agents or agents, agent))
    axes.set_xlabel(label)
    axes.set_ylabel("normalised score")
    _legend(figure)
    return _picture(figure, f"curves-{against}", f"Normalised score against {label}")


def draw_task_curves(rows: Sequence[ResultRow], agents: Sequence[str], tasks: Sequence[str]) -> Picture:
    """Draw small curves against steps, one for each task."""
    columns = min(2, len(tasks))
    lines = -(-len(tasks) // columns)
    figure = Figure(figsize=(WIDTH, 1.9 * lines + _legend_height(agents)), layout="constrained")
    for place, task in enumerate(tasks, start=1):
        axes = figure.add_subplot(lines, columns, place)
        for agent in agents:
            mine = [r for r in rows if r["agent"] == agent and r["task"] == task and r["status"] == "ok"]
            _plot_curve(axes, learning_curve(mine, "step"), agent if place == 1 else None, _look(agents, agent))
        axes.set_title(short_name(task), fontsize=9)
        axes.grid(alpha=0.3)
    _legend(figure)
    return _picture(figure, "task-curves", "Normalised score against environment steps, task by task")


def learning_curve(rows: Sequence[ResultRow], against: str) -> list[tuple[float, float, float, float]]:
    """Return (mean of ``against``, interquartile mean, low, high) of each evaluation, first to last."""
    runs: dict[tuple[str, float], list[ResultRow]] = defaultdict(list)
    for row in rows:
        runs[row["task"], row["seed"]].append(row)
    points = []
    for evaluation in range(min(map(len, runs.values()), default=0)):
        scores: dict[str, list[float]] = defaultdict(list)
        for (task, _), course in runs.items():
            scores[task].append(course[evaluation]["normalised"])
        by_task = {task: np.array(values) for task, values in scores.items()}
        where = float(np.mean([course[evaluation][against] for course in runs.values()]))
        mean = float(interquartile_mean(np.concatenate(list(by_task.values()))))
        points.append((where, mean, *stratified_interval(by_task, resamples=300)))
    return points


def _plot_curve(axes: Axes, curve: Sequence[tuple[float, ...]], label: str | None, look: Mapping[str, Any]) -> None:
    if len(curve) == 1:
        axes.axhline(curve[0][1], color=look["color"], linestyle=(0, (1, 2)), linewidth=1.2, label=label)
    elif curve:
        where, mean, low, high = zip(*curve, strict=True)
        axes.plot(where, mean, **look, label=label)
        axes.fill_between(where, low, high, color=look["color"], alpha=0.12)


LEGEND_COLUMNS = 3


def _legend(figure: Figure) -> None:
    """Put the legend below the axes, on no curve."""
    figure.legend(loc="outside lower center", ncols=LEGEND_COLUMNS, frameon=False, fontsize=9)


def _legend_height(agents: Sequence[str]) -> float:
    return 0.22 * -(-len(agents) // LEGEND_COLUMNS)


def _axes(height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(WIDTH, height), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    return figure, axes


def _picture(figure: Figure, id: str, alt: str) -> Picture:
    svg = io.BytesIO()
    with rc_context({"svg.hashsalt": id}):  # the same figure is the same file
        figure.savefig(svg, format="svg", metadata={"Date": None})
    return Picture(id, alt, svg.getvalue())


def _look(agents: Sequence[str], agent: str) -> dict[str, Any]:
    """Return the colour and the line of an agent: the same in all figures of a report."""
    round_, place = divmod(list(agents).index(agent), len(COLORS))
    return {"color": COLORS[place], "linestyle": LINES[round_ % len(LINES)]}


def _color(agents: Sequence[str], agent: str) -> Any:
    return _look(agents, agent)["color"]
