"""The pages of a benchmark: what the runs say, with how surely they say it.

    results.csv, cells/  ->  Section (tables, figures)  ->  report.html (self-contained), report.md, figures/*.svg

Everything on a page is text and pictures: what agents wrote is escaped, pictures are inline, and the
HTML allows no scripts at all.
"""

from __future__ import annotations

import base64
import csv
import io
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader
from matplotlib import colormaps, rc_context
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from agents.benchmark.grid import BenchmarkConfig, CellResult, known_bounds, open_task
from agents.benchmark.statistics import (
    CONFIDENCE,
    Comparison,
    Difference,
    Scores,
    compare,
    interquartile_mean,
    performance_profile,
    probability_of_improvement,
    profile_band,
    stratified_interval,
)
from agents.runs.report import markdown_cell
from textgen_env.errors import ConfigError, RunFolderError, TextGenError

ResultRow = Mapping[str, Any]
"""A row of ``results.csv``; figures are floats, NaN where the cell is empty."""

NUMBERS = ("seed", "step", "seconds", "reward", "normalised", "kl", "tokens", "length", "texts")


@dataclass(frozen=True)
class PageTable:
    """Headings and rows of text, for both forms of the report."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    texts: bool = False  # holds prose rather than figures


@dataclass(frozen=True)
class Picture:
    """A figure and what it is called."""

    id: str
    alt: str
    svg: bytes

    @property
    def base64(self) -> str:
        return base64.b64encode(self.svg).decode()


@dataclass(frozen=True)
class Section:
    """A heading with its tables, pictures and words."""

    id: str
    title: str
    note: str = ""
    figures: Sequence[Picture] = ()
    tables: Sequence[PageTable] = ()


# --- results as scores


def read_results(path: Path) -> list[ResultRow]:
    """Return the rows of a ``results.csv``, or of the folder that holds one.

    Raises:
        RunFolderError: there is none, or it is not one.
    """
    file = path / "results.csv" if path.is_dir() else path
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            rows = list(csv.DictReader(lines))
        return [{**row, **{name: float(row[name] or "nan") for name in NUMBERS}} for row in rows]
    except OSError as error:
        raise RunFolderError(f"cannot read the results of a benchmark at {str(path)!r}: {error}") from error
    except (KeyError, ValueError) as error:
        why = f"it has no column {error}" if isinstance(error, KeyError) else type(error).__name__
        raise RunFolderError(f"{str(file)!r} does not hold the results of a benchmark: {why}") from error


def final_rows(rows: Iterable[ResultRow]) -> list[ResultRow]:
    """Return the last evaluation of each run that went well."""
    last = {(row["task"], row["agent"], row["seed"]): row for row in rows if row["status"] == "ok"}
    return list(last.values())


def scores_by_agent(rows: Iterable[ResultRow]) -> dict[str, Scores]:
    """Return the final normalised scores of each agent, by task."""
    found: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in final_rows(rows):
        found[row["agent"]][row["task"]].append(row["normalised"])
    return {agent: {task: np.array(runs) for task, runs in tasks.items()} for agent, tasks in found.items()}


def compare_results(first: str, second: str, folder: Path | None) -> list[tuple[str, Comparison]]:
    """Return what differs: between two results (each agent in both), or two agents of ``folder``.

    Args:
        first, second: Folders or CSV files of results; or names of agents in ``folder``.

    Raises:
        ConfigError: agents that have no runs there, or nothing in common.
    """
    if Path(first).exists() and Path(second).exists():
        a, b = (scores_by_agent(read_results(Path(path))) for path in (first, second))
        both = [agent for agent in a if agent in b]
        if not both:
            raise ConfigError(f"{first!r} and {second!r} have no agent in common, so there is nothing to compare")
        return [(agent, compare(a[agent], b[agent])) for agent in both]
    if folder is None:
        missing = " and ".join(repr(path) for path in (first, second) if not Path(path).exists())
        raise ConfigError(
            f"no results at {missing}: give two folders or CSV files of results, or two agents and the "
            "folder of their results with --out"
        )
    scores = scores_by_agent(read_results(folder))
    for agent in (first, second):
        if agent not in scores:
            raise ConfigError(f"agent {agent!r} has no finished runs in {str(folder)!r}; it holds {', '.join(scores)}")
    return [(f"{first} against {second}", compare(scores[first], scores[second]))]


def comparison_table(name: str, found: Comparison) -> PageTable:
    """Return a comparison as a table."""

    def row(d: Difference) -> list[str]:
        p = f"{d.p:.4f}" if d.p >= 1e-4 else f"{d.p:.0e}"
        verdict = (
            "no" if not d.significant else "yes, first is better" if d.first > d.second else "yes, second is better"
        )
        return [d.task, f"{d.first:.2f}", f"{d.second:.2f}", _interval(d.low, d.high, "+.2f"), p, verdict]

    headings = ["task", "first", "second", f"difference ({CONFIDENCE:.0%})", "p", "significant"]
    return PageTable(headings, [row(d) for d in (*found.by_task, found.overall)], name)


COMPARISON_NOTE = (
    "Normalised interquartile means. One task: two-sided Mann-Whitney U test, p corrected by Holm over the tasks. "
    "All tasks: permutation test of the mean difference, runs changing sides within their task. Intervals: stratified "
    f"bootstrap. Significant: p below {1 - CONFIDENCE:.2f}."
)


# --- the page


def write_report(folder: Path, config: BenchmarkConfig, results: Sequence[CellResult]) -> None:
    """Write ``report.html``, ``report.md`` and ``figures/`` into the folder of a benchmark.

    Raises:
        RunFolderError: they cannot be written.
    """
    title = "Benchmark of agents that write"
    sections = sections_of(config, read_results(folder), results)
    learners = f"{config.steps:,} environment steps where they learn, {config.envs} texts at a time"
    about = [
        f"{len(config.tasks)} tasks, {len(config.agents)} agents, {len(config.seeds)} seeds; {learners}. "
        f"textgen-env {config.version}.",
        "Scores are normalised: 0 is the language model, 1 the best known within its candidates. Intervals are 95%, "
        "stratified bootstrap over runs.",
    ]
    loader = PackageLoader("agents.benchmark", ".")
    jinja = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    html = jinja.get_template("benchmark.html").render(title=title, about=about, sections=sections)
    try:
        (folder / "figures").mkdir(exist_ok=True)
        for section in sections:
            for picture in section.figures:
                (folder / "figures" / f"{picture.id}.svg").write_bytes(picture.svg)
        (folder / "report.html").write_text(html, encoding="utf-8")
        (folder / "report.md").write_text(_markdown(title, about, sections), encoding="utf-8")
    except OSError as error:
        raise RunFolderError(f"cannot write the report into {str(folder)!r}: {error}; the results are kept") from error


def sections_of(config: BenchmarkConfig, rows: Sequence[ResultRow], results: Sequence[CellResult]) -> list[Section]:
    """Return everything on the page, without what there is no data for."""
    scores = scores_by_agent(rows)
    agents = [agent for agent in config.agents if agent in scores]
    everywhere = [agent for agent in agents if len(scores[agent]) == max(map(len, scores.values()))]
    failed = [result for result in results if result.status == "failed"]
    unable = sorted({(r.cell.agent, r.cell.task, r.error) for r in results if r.status == "inapplicable"})
    sections = []
    if agents:
        left_out = [agent for agent in agents if agent not in everywhere]
        sections += [
            Section(
                "overall",
                "Over all tasks",
                "Interquartile mean of normalised scores over tasks and seeds."
                + (f" Not on all tasks, and so not comparable: {', '.join(left_out)}." if left_out else ""),
                [draw_means(scores, agents)],
                [overall_table(rows, scores, agents)],
            ),
            Section("tasks", "Task by task", "", [], [task_table(task, rows, agents) for task in config.tasks]),
            Section(
                "profiles",
                "Performance profiles",
                "Share of runs that reach a score.",
                [draw_profiles(scores, everywhere)],
            ),
            Section(
                "improvement",
                "Probability of improvement",
                "That a run of the agent in the row beats one of the agent in the column on the same task.",
                [],
                [improvement_table(scores, agents)],
            ),
            Section(
                "curves",
                "Learning curves",
                "Sample efficiency and wall-clock time, learning only; agents without learning are dashed lines.",
                [
                    draw_curves(rows, everywhere, "step", "environment steps"),
                    draw_curves(rows, everywhere, "seconds", "seconds of learning"),
                    draw_task_curves(rows, agents, config.tasks),
                ],
            ),
        ]
    problems = [[r.cell.agent, r.cell.task, str(r.cell.seed), r.error] for r in failed]
    problems += [[agent, task, "all", error] for agent, task, error in unable]
    if problems:
        note = f"{len(failed)} runs failed. Agents that cannot do a task at all are listed with seed 'all'."
        table = PageTable(["agent", "task", "seed", "error"], problems, texts=True)
        sections.append(Section("failures", "Runs without a score", note, [], [table]))
    texts = transcript_tables(config, results)
    if texts:
        note = f"The first texts of the last evaluation with seed {config.seeds[0]}: not a selection."
        sections.append(Section("transcripts", "Transcripts", note, [], texts))
    return sections


def overall_table(rows: Sequence[ResultRow], scores: Mapping[str, Scores], agents: Sequence[str]) -> PageTable:
    """Return a line an agent, the best first; those without a run on some task come last."""
    lines = []
    for agent in agents:
        runs = np.concatenate(list(scores[agent].values()))
        mine = [row for row in final_rows(rows) if row["agent"] == agent]
        low, high = stratified_interval(scores[agent])
        best, worst = max(scores[agent].items(), key=_mean), min(scores[agent].items(), key=_mean)
        lines.append(
            (
                (len(scores[agent]), interquartile_mean(runs)),
                [
                    agent,
                    f"{interquartile_mean(runs):.2f} {_interval(low, high)}",
                    f"{runs.mean():.2f}",
                    f"{_mean(worst):.2f} ({_short(worst[0])})",
                    f"{_mean(best):.2f} ({_short(best[0])})",
                    f"{np.mean([row['tokens'] for row in mine]):.0f}",
                    f"{np.mean([row['seconds'] for row in mine]):.1f}",
                    f"{len(runs)} on {len(scores[agent])} tasks",
                ],
            )
        )
    headings = ["agent", "interquartile mean", "mean", "worst task", "best task", "tokens a text", "seconds", "runs"]
    return PageTable(headings, [line for _, line in sorted(lines, key=lambda line: line[0], reverse=True)])


def task_table(task: str, rows: Sequence[ResultRow], agents: Sequence[str]) -> PageTable:
    """Return a line an agent on one task, with what the task is and its bounds in the title."""
    last = [row for row in final_rows(rows) if row["task"] == task]
    lines = []
    for agent in agents:
        mine = [row for row in last if row["agent"] == agent]
        if not mine:
            continue
        scores = np.array([row["normalised"] for row in mine])
        low, high = stratified_interval({task: scores})
        kl = np.mean([row["kl"] for row in mine])
        lines.append(
            [
                agent,
                f"{np.mean([row['reward'] for row in mine]):.3f}",
                f"{interquartile_mean(scores):.2f} {_interval(low, high)}",
                "–" if np.isnan(kl) else f"{kl:.1f}",
                f"{np.mean([row['tokens'] for row in mine]):.0f}",
                f"{np.mean([row['seconds'] for row in mine]):.1f}",
                str(len(mine)),
            ]
        )
    headings = ["agent", "reward", "normalised", "KL, nats", "tokens a text", "seconds", "runs"]
    return PageTable(headings, lines, f"{_short(task)}: {_about(task)}")


def improvement_table(scores: Mapping[str, Scores], agents: Sequence[str]) -> PageTable:
    """Return agents against agents."""

    def cell(row: str, column: str) -> str:
        shared = set(scores[row]) & set(scores[column])
        return "–" if row == column or not shared else f"{probability_of_improvement(scores[row], scores[column]):.2f}"

    return PageTable(["agent", *agents], [[row, *(cell(row, column) for column in agents)] for row in agents])


def transcript_tables(config: BenchmarkConfig, results: Sequence[CellResult]) -> list[PageTable]:
    """Return a table a task with what each agent wrote."""
    tables = []
    for task in config.tasks:
        lines = [
            [r.cell.agent, text["prompt"], text["completion"], f"{text['reward']:.3f}"]
            for r in results
            if r.cell.task == task and r.cell.seed == config.seeds[0]
            for text in r.transcripts
        ]
        if lines:
            tables.append(PageTable(["agent", "prompt", "completion", "reward"], lines, _short(task), texts=True))
    return tables


# --- pictures


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
        axes.set_title(_short(task), fontsize=9)
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


# --- words


def _markdown(title: str, about: Sequence[str], sections: Sequence[Section]) -> str:
    lines = [f"# {title}", "", *(line for paragraph in about for line in (paragraph, ""))]
    for section in sections:
        lines += [f"## {section.title}", ""]
        lines += [section.note, ""] if section.note else []
        for picture in section.figures:
            lines += [f"![{picture.alt}](figures/{picture.id}.svg)", ""]
        for table in section.tables:
            lines += [*([f"### {markdown_cell(table.title)}", ""] if table.title else []), *markdown_table(table), ""]
    return "\n".join(lines)


def markdown_table(table: PageTable) -> list[str]:
    """Return the lines of a table in Markdown, its cells escaped."""
    rule = "|---" * len(table.headings) + "|" if table.texts else "|---|" + "---:|" * (len(table.headings) - 1)
    body = [[markdown_cell(cell) for cell in row] for row in (table.headings, *table.rows)]
    first, *rest = [f"| {' | '.join(row)} |" for row in body]
    return [first, rule, *rest]


def _about(task: str) -> str:
    """Return what a task is and its bounds, as far as they are known."""
    try:
        bounds = known_bounds(task)
    except TextGenError:
        return open_task(task).summary
    return (
        f"{open_task(task).summary} Language model {bounds.language_model:.3f}, best {bounds.best:.3f}, "
        f"ceiling {bounds.ceiling:.3f}."
    )


def _short(task: str) -> str:
    return task.removeprefix("TextGen/").replace("-v0", "")


def _mean(scores: tuple[str, Any]) -> float:
    return float(scores[1].mean())


def _interval(low: float, high: float, form: str = ".2f") -> str:
    return f"[{low:{form}}, {high:{form}}]"
