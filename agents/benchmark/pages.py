"""The report of a benchmark: scores with their intervals, as HTML and as Markdown.

    results.csv, cells/  ->  Section (tables, figures)  ->  report.html (self-contained), report.md, figures/*.svg

A page is text and pictures: texts of agents are escaped, pictures are inline, and the HTML allows no
scripts at all.
"""

from __future__ import annotations

import platform
import shlex
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from importlib import metadata
from pathlib import Path
from typing import Any

import numpy as np
from jinja2 import Environment, PackageLoader

from agents.benchmark.cells import PRICE, CellResult
from agents.benchmark.config import BenchmarkConfig, known_bounds, short_name
from agents.benchmark.plots import Picture, draw_curves, draw_means, draw_profiles, draw_task_curves
from agents.benchmark.results import ResultRow, by_score, final_rows, read_results, scores_by_agent
from agents.benchmark.statistics import (
    CONFIDENCE,
    Comparison,
    Difference,
    Scores,
    have_spread,
    interquartile_mean,
    probability_of_improvement,
    seeds_needed,
    stratified_interval,
)
from agents.terminal import markdown_cell
from textgen_env.errors import TextGenError
from textgen_env.files import write_file
from textgen_env.models.device import own_cores
from textgen_env.tasks import open_task


@dataclass(frozen=True)
class PageTable:
    """Headings and rows of text, for both forms of the report."""

    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    title: str = ""
    texts: bool = False  # holds prose rather than figures


@dataclass(frozen=True)
class Section:
    """A heading with its note, pictures and tables."""

    id: str
    title: str
    note: str = ""
    figures: Sequence[Picture] = ()
    tables: Sequence[PageTable] = ()


def comparison_table(name: str, found: Comparison) -> PageTable:
    """Return a comparison as a table."""

    def row(d: Difference) -> list[str]:
        p = f"{d.p:.4f}" if d.p >= 1e-4 else f"{d.p:.0e}"
        better = "first" if d.first > d.second else "second"
        verdict = f"yes, {better} is better" if d.significant else "too few runs" if d.has_too_few_runs else "no"
        return [d.task, f"{d.first:.2f}", f"{d.second:.2f}", interval_text(d.interval, "+.2f"), p, verdict]

    headings = ["task", "first", "second", f"difference ({CONFIDENCE:.0%})", "p", "significant"]
    return PageTable(headings, [row(d) for d in (*found.by_task, found.overall)], name)


def comparison_note(found: Comparison) -> str:
    """Return what readers of a comparison should know, first of all whether it had enough runs to find anything."""
    needed = seeds_needed(len(found.by_task))
    few = [d for d in (*found.by_task, found.overall) if d.has_too_few_runs]
    warning = (
        f"Too few runs: between so few, p cannot be below {few[0].least_p:.2f}, however large the difference. Give "
        f"each agent at least {needed} seeds (--seeds {needed}). "
        if few
        else ""
    )
    return warning + COMPARISON_NOTE


COMPARISON_NOTE = (
    "Normalised interquartile means. One task: two-sided Mann-Whitney U test, exact for few runs, p corrected by Holm "
    "over the tasks. "
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
    missing = len(config.cells) - len(results)
    stopped = f"Stopped: {len(results)} of {len(config.cells)} runs are done; the same command goes on with the rest."
    about = [
        *([stopped] if missing else []),
        f"{len(config.tasks)} tasks, {len(config.agents)} agents, {len(config.seeds)} seeds; {learners}. "
        f"textgen-env {config.version}.",
        "Scores are normalised: 0 is the language model, 1 the best known within its candidates. Intervals are 95%, "
        "stratified bootstrap over runs; where each task has one run there is none.",
        f"{datetime.now().astimezone():%Y-%m-%d %H:%M %Z}, on {machine()}.",
    ]
    command = command_of(config, folder)
    loader = PackageLoader("agents.benchmark", ".")
    jinja = Environment(loader=loader, autoescape=True, trim_blocks=True, lstrip_blocks=True)
    html = jinja.get_template("benchmark.html").render(title=title, about=about, command=command, sections=sections)
    for section in sections:
        for picture in section.figures:
            write_file(folder / "figures" / f"{picture.id}.svg", picture.svg)
    write_file(folder / "report.html", html)
    write_file(folder / "report.md", _markdown(title, [*about, f"    {command}"], sections))


def machine() -> str:
    """Return this machine and its software, in words."""
    packages = ", ".join(f"{name} {metadata.version(name)}" for name in ("torch", "stable-baselines3", "numpy"))
    system = f"{platform.system()} {platform.machine()}"
    return f"{own_cores()} cores of {processor()}, {system}; Python {platform.python_version()}, {packages}"


def processor() -> str:
    """Return the processor's name, or its architecture where the system does not tell."""
    with suppress(OSError, StopIteration):
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
        return next(line for line in lines if line.startswith("model name")).partition(":")[2].strip()
    return platform.processor() or platform.machine()


def command_of(config: BenchmarkConfig, folder: Path) -> str:
    """Return the command line that runs this benchmark."""
    seeds = ",".join(map(str, config.seeds)) + ("," if len(config.seeds) == 1 else "")
    if config.seeds == tuple(range(len(config.seeds))):
        seeds = str(len(config.seeds))
    words = ["textgen", "benchmark", "--tasks", ",".join(map(short_name, config.tasks))]
    words += ["--agents", ",".join(config.agents), "--seeds", seeds, "--steps", str(config.steps)]
    words += ["--envs", str(config.envs), "--evaluations", str(config.evaluations), "--texts", str(config.texts)]
    words += ["--out", str(folder)]
    return shlex.join(words)


def sections_of(config: BenchmarkConfig, rows: Sequence[ResultRow], results: Sequence[CellResult]) -> list[Section]:
    """Return the sections of the page; those without data are left out."""
    scores = scores_by_agent(rows)
    agents = by_score(scores)
    sections = [*score_sections(config, rows, scores, agents), *curve_sections(config, rows, scores, agents)]
    problems = problems_table(results)
    if problems.rows:
        failed = sum(result.status == "failed" for result in results)
        note = f"{failed} runs failed. Agents that cannot do a task at all are listed with seed 'all'."
        sections.append(Section("failures", "Runs without a score", note, [], [problems]))
    texts = transcript_tables(config, results)
    if texts:
        note = f"The first texts of the last evaluation with seed {config.seeds[0]}: not a selection."
        sections.append(Section("transcripts", "Transcripts", note, [], texts))
    return sections


def score_sections(
    config: BenchmarkConfig, rows: Sequence[ResultRow], scores: Mapping[str, Scores], agents: Sequence[str]
) -> list[Section]:
    """Return the sections about final scores; none without scores."""
    if not agents:
        return []
    everywhere = _on_all_tasks(scores, agents)
    left_out = [agent for agent in agents if agent not in everywhere]
    return [
        Section(
            "overall",
            "Over all tasks",
            "Interquartile mean of normalised scores over tasks and seeds."
            + (f" Not on all tasks, and so not comparable: {', '.join(left_out)}." if left_out else ""),
            [draw_means(scores, agents)],
            [overall_table(rows, scores, agents)],
        ),
        Section(
            "tasks",
            "Task by task",
            "Judge calls are finished texts that were judged: for a text that is written (a search asks about all "
            f"that it tries), and while learning. The score less {PRICE:g} a nat of KL is the trade for which agents "
            "learn that know a price, but on the small diagnostic tasks.",
            [],
            [task_table(task, rows, agents) for task in config.tasks],
        ),
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
    ]


def curve_sections(
    config: BenchmarkConfig, rows: Sequence[ResultRow], scores: Mapping[str, Scores], agents: Sequence[str]
) -> list[Section]:
    """Return the section about learning; none without scores."""
    if not agents:
        return []
    everywhere = _on_all_tasks(scores, agents)
    curves = [
        draw_curves(rows, everywhere, "step", "environment steps", agents),
        draw_curves(rows, everywhere, "seconds", "seconds of learning", agents),
        draw_task_curves(rows, agents, config.tasks),
    ]
    note = "Sample efficiency and wall-clock time, learning only; agents without learning are dotted lines."
    return [Section("curves", "Learning curves", note, curves)]


def problems_table(results: Sequence[CellResult]) -> PageTable:
    """Return a line for each run that failed, and one for each task that an agent cannot do."""
    failed = [[r.cell.agent, r.cell.task, str(r.cell.seed), r.error] for r in results if r.status == "failed"]
    unable = sorted({(r.cell.agent, r.cell.task, r.error) for r in results if r.status == "inapplicable"})
    lines = [*failed, *([agent, task, "all", error] for agent, task, error in unable)]
    return PageTable(["agent", "task", "seed", "error"], lines, texts=True)


def overall_table(rows: Sequence[ResultRow], scores: Mapping[str, Scores], agents: Sequence[str]) -> PageTable:
    """Return a line an agent, the best first; those without a run on some task come last."""
    lines = []
    for agent in by_score({agent: scores[agent] for agent in agents}):
        runs = np.concatenate(list(scores[agent].values()))
        mine = [row for row in final_rows(rows) if row["agent"] == agent]
        best, worst = max(scores[agent].items(), key=_mean), min(scores[agent].items(), key=_mean)
        lines.append(
            [
                agent,
                _middle(scores[agent]),
                f"{runs.mean():.2f}",
                f"{_mean(worst):.2f} ({short_name(worst[0])})",
                f"{_mean(best):.2f} ({short_name(best[0])})",
                f"{np.mean([row['tokens'] for row in mine]):.0f}",
                f"{np.mean([row['seconds'] for row in mine]):.1f}",
                f"{len(runs)} on {len(scores[agent])} tasks",
            ]
        )
    headings = ["agent", "interquartile mean", "mean", "worst task", "best task", "tokens a text", "seconds", "runs"]
    return PageTable(headings, lines)


def task_table(task: str, rows: Sequence[ResultRow], agents: Sequence[str]) -> PageTable:
    """Return a line an agent on one task; the title has the task's summary and bounds."""
    last = [row for row in final_rows(rows) if row["task"] == task]
    lines = []
    for agent in agents:
        mine = [row for row in last if row["agent"] == agent]
        if not mine:
            continue
        scores = np.array([row["normalised"] for row in mine])
        kl = np.mean([row["kl"] for row in mine])
        lines.append(
            [
                agent,
                f"{np.mean([row['reward'] for row in mine]):.3f}",
                _middle({task: scores}),
                figure(kl, ".1f"),
                figure(scores.mean() - PRICE * kl, ".2f"),
                *(
                    figure(np.mean([row[name] for row in mine]), ",.0f")
                    for name in ("tokens", "judge_calls", "learning_judge_calls")
                ),
                f"{np.mean([row['seconds'] for row in mine]):.1f}",
                str(len(mine)),
            ]
        )
    headings = ["agent", "reward", "normalised", "KL, nats", f"less {PRICE:g} a nat"]
    headings += ["tokens a text", "judge calls a text", "while learning", "seconds", "runs"]
    return PageTable(headings, lines, f"{short_name(task)}: {_about(task)}")


def figure(value: float, form: str) -> str:
    """Return a number for a table; a dash for NaN."""
    return "–" if np.isnan(value) else format(value, form)


def improvement_table(scores: Mapping[str, Scores], agents: Sequence[str]) -> PageTable:
    """Return agents against agents."""

    def cell(row: str, column: str) -> str:
        shared = set(scores[row]) & set(scores[column])
        return "–" if row == column or not shared else f"{probability_of_improvement(scores[row], scores[column]):.2f}"

    return PageTable(["agent", *agents], [[row, *(cell(row, column) for column in agents)] for row in agents])


def transcript_tables(config: BenchmarkConfig, results: Sequence[CellResult]) -> list[PageTable]:
    """Return a table a task with texts of each agent."""
    tables = []
    for task in config.tasks:
        lines = [
            [r.cell.agent, text["prompt"], text["completion"], f"{text['reward']:.3f}"]
            for r in results
            if r.cell.task == task and r.cell.seed == config.seeds[0]
            for text in r.transcripts
        ]
        if lines:
            tables.append(PageTable(["agent", "prompt", "completion", "reward"], lines, short_name(task), texts=True))
    return tables


# --- words


def _markdown(title: str, about: Sequence[str], sections: Sequence[Section]) -> str:
    lines = [f"# {title}", "", *(line for paragraph in about for line in (paragraph, ""))]
    for section in sections:
        lines += [f"## {section.title}", ""]
        lines += [section.note, ""] if section.note else []
        for picture in section.figures:
            lines += [f"![{picture.alt}](figures/{picture.id}.svg)", ""]
        for table in section.tables:
            heading = markdown_cell(table.title).replace("\\`", "`")  # a task's words, with its sizes as code
            lines += [*([f"### {heading}", ""] if table.title else []), *markdown_table(table), ""]
    return "\n".join(lines)


def markdown_table(table: PageTable) -> list[str]:
    """Return the lines of a table in Markdown, its cells escaped."""
    rule = "|---" * len(table.headings) + "|" if table.texts else "|---|" + "---:|" * (len(table.headings) - 1)
    body = [[markdown_cell(cell) for cell in row] for row in (table.headings, *table.rows)]
    first, *rest = [f"| {' | '.join(row)} |" for row in body]
    return [first, rule, *rest]


def _on_all_tasks(scores: Mapping[str, Scores], agents: Sequence[str]) -> list[str]:
    most = max(map(len, scores.values()))
    return [agent for agent in agents if len(scores[agent]) == most]


def _about(task: str) -> str:
    """Return a task's summary and, if they are known, its bounds."""
    try:
        bounds = known_bounds(task)
    except TextGenError:
        return open_task(task).summary
    return (
        f"{open_task(task).summary} Language model {bounds.language_model:.3f}, best {bounds.best:.3f}, "
        f"ceiling {bounds.ceiling:.3f}."
    )


def _mean(scores: tuple[str, Any]) -> float:
    return float(scores[1].mean())


def _middle(scores: Scores) -> str:
    """Return the interquartile mean with its interval, which single runs do not have."""
    middle = f"{interquartile_mean(np.concatenate(list(scores.values()))):.2f}"
    return f"{middle} {interval_text(stratified_interval(scores))}" if have_spread(scores) else middle


def interval_text(interval: tuple[float, float] | None, form: str = ".2f") -> str:
    """Return an interval in brackets; a dash for None."""
    return "–" if interval is None else f"[{interval[0]:{form}}, {interval[1]:{form}}]"
