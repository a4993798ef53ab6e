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
from matplotlib import colormaps, rc_context
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


def draw_means(scores: Mapping[str, Scores], agents: Sequence[str]) -> Picture:
    """Draw the interquartile mean of each agent with its interval, the best on top."""
    means = {agent: float(interquartile_mean(np.concatenate(list(scores[agent].values())))) for agent in agents}
    order = sorted(agents, key=lambda agent: means[agent])
    figure, axes = _axes(7.5, 0.8 + 0.32 * len(agents))
    for height, agent in enumerate(order):
        low, high = stratified_interval(scores[agent])
        axes.plot([low, high], [height, height], color=_color(agents, agent), linewidth=6, alpha=0.4)
        axes.plot(means[agent], height, "o", color=_color(agents, agent))
    axes.set_yticks(range(len(order)), order)
    for known in (0, 1):
        axes.axvline(known, color="black", linestyle=":", linewidth=1)
    axes.set_xlabel("interquartile mean of normalised scores (0: language model, 1: best)")
    return _picture(figure, "means", "Interquartile mean of each agent, with its interval")


def draw_profiles(scores: Mapping[str, Scores], agents: Sequence[str]) -> Picture:
    """Draw the share of runs that reach each score."""
    figure, axes = _axes(7.5, 4.2)
    thresholds = np.linspace(-0.25, 1.05, 131)
    for agent in agents:
        axes.plot(thresholds, performance_profile(scores[agent], thresholds), color=_color(agents, agent), label=agent)
        axes.fill_between(thresholds, *profile_band(scores[agent], thresholds), color=_color(agents, agent), alpha=0.1)
    axes.set_xlabel("normalised score")
    axes.set_ylabel("share of runs at least as good")
    axes.legend(frameon=False, fontsize=8, ncols=2)
    return _picture(figure, "profiles", "Performance profiles of the agents")


def draw_curves(rows: Sequence[ResultRow], agents: Sequence[str], against: str, label: str) -> Picture:
    """Draw the interquartile mean over tasks and seeds against ``step`` or ``seconds``."""
    figure, axes = _axes(7.5, 4.2)
    for agent in agents:
        curve = learning_curve([row for row in rows if row["agent"] == agent and row["status"] == "ok"], against)
        _plot_curve(axes, curve, agent, _color(agents, agent))
    axes.set_xlabel(label)
    axes.set_ylabel("normalised score")
    axes.legend(frameon=False, fontsize=8, ncols=2)
    return _picture(figure, f"curves-{against}", f"Normalised score against {label}")


def draw_task_curves(rows: Sequence[ResultRow], agents: Sequence[str], tasks: Sequence[str]) -> Picture:
    """Draw small curves against steps, one for each task."""
    columns = min(3, len(tasks))
    lines = -(-len(tasks) // columns)
    figure = Figure(figsize=(3.6 * columns, 2.6 * lines), layout="constrained")
    for place, task in enumerate(tasks, start=1):
        axes = figure.add_subplot(lines, columns, place)
        for agent in agents:
            mine = [r for r in rows if r["agent"] == agent and r["task"] == task and r["status"] == "ok"]
            _plot_curve(axes, learning_curve(mine, "step"), agent if place == 1 else None, _color(agents, agent))
        axes.set_title(short_name(task), fontsize=9)
        axes.grid(alpha=0.3)
    figure.legend(loc="outside lower center", ncols=6, frameon=False, fontsize=8)
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


def _plot_curve(axes: Axes, curve: Sequence[tuple[float, ...]], label: str | None, color: Any) -> None:
    if len(curve) == 1:
        axes.axhline(curve[0][1], color=color, linestyle="--", linewidth=1, label=label)
    elif curve:
        where, mean, low, high = zip(*curve, strict=True)
        axes.plot(where, mean, color=color, label=label)
        axes.fill_between(where, low, high, color=color, alpha=0.12)


def _axes(width: float, height: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.add_subplot()
    axes.grid(alpha=0.3)
    return figure, axes


def _picture(figure: Figure, id: str, alt: str) -> Picture:
    svg = io.BytesIO()
    with rc_context({"svg.hashsalt": id}):  # the same figure is the same file
        figure.savefig(svg, format="svg", metadata={"Date": None})
    return Picture(id, alt, svg.getvalue())


def _color(agents: Sequence[str], agent: str) -> Any:
    return colormaps["tab20"](agents.index(agent) % 20)
