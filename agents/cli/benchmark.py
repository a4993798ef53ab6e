"""``textgen benchmark``: agents on tasks with several seeds, and comparisons of results."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from agents.cli.options import Address, AsJson, Engine, given, uses_ray
from agents.tables import show_table
from agents.terminal import open_console, say, table_of
from textgen_env.errors import ConfigError

if TYPE_CHECKING:
    from rich.table import Table

    from agents.benchmark.cells import CellResult
    from agents.benchmark.config import BenchmarkConfig
    from agents.benchmark.grid import CellRunner
    from agents.benchmark.pages import PageTable

Tasks = Annotated[
    str,
    typer.Option(
        help="diagnostic, language, conversation, all, or names with sizes, Needle:depth=6. See 'textgen list tasks'."
    ),
]
AgentNames = Annotated[
    str | None,
    typer.Option(
        help="Comma-separated, with settings where wanted, best_of_n:n=4. See 'textgen list agents'; yours: "
        "FILE.py:NAME or module:NAME.",
        show_default="all",
    ),
]
Seeds = Annotated[
    str | None, typer.Option(help="How many, from 0 on; or a list: 0,3,4 or 7, for one.", show_default="5")
]
CellSteps = Annotated[
    int | None, typer.Option(help="Environment steps for an agent to learn from.", min=1, show_default="20000")
]
CellEnvs = Annotated[int | None, typer.Option(help="Texts written at a time.", min=1, show_default="32")]
Evaluations = Annotated[
    int | None, typer.Option(help="Of an agent that learns, evenly spread.", min=2, show_default="9")
]
CellTexts = Annotated[int | None, typer.Option(help="Texts of each evaluation, at least.", min=1, show_default="64")]
ResultsFolder = Annotated[
    Path | None,
    typer.Option(help="Folder for the results; goes on where it stopped.", show_default="runs/benchmark"),
]
Compared = Annotated[
    tuple[str, str] | None,
    typer.Option(
        metavar="A B",
        help="Run nothing: which differences are significant between two folders (or CSV files) of results, or "
        "between two agents in --out.",
    ),
]


def benchmark_command(
    tasks: Tasks = "diagnostic",
    agents: AgentNames = None,
    seeds: Seeds = None,
    steps: CellSteps = None,
    envs: CellEnvs = None,
    evaluations: Evaluations = None,
    texts: CellTexts = None,
    out: ResultsFolder = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="Six agents, three seeds and few steps, unless said otherwise.")
    ] = False,
    workers: Annotated[int | None, typer.Option(help="Processes.", min=1, show_default="the cores")] = None,
    retry_failed: Annotated[bool, typer.Option("--retry-failed", help="Run again what is recorded as failed.")] = False,
    engine: Engine = "local",
    address: Address = None,
    compare: Compared = None,
    as_json: AsJson = False,
) -> None:
    """Run agents on tasks with several seeds, and report what is known of each.

    A folder belongs to one configuration. The same command goes on where it stopped: by Ctrl-C, a kill or a full disk.
    """
    console = open_console(stderr=as_json)
    if compare is not None:
        _compare(compare, out, console, as_json)
        return
    sizes = {"steps": steps, "envs": envs, "evaluations": evaluations, "texts": texts}
    changes: dict[str, Any] = given({"seeds": _parse_seeds(seeds), **sizes})
    if agents:
        changes["agents"] = tuple(agents.split(","))
    config = _settings(tasks, changes, quick)
    folder = out or Path("runs/benchmark")
    _run(config, folder, _cell_runner(engine, address, workers), workers, retry_failed, console, as_json)


def _compare(results: tuple[str, str], folder: Path | None, console: Console, as_json: bool) -> None:
    from agents.benchmark.pages import comparison_note, comparison_table, interval_text
    from agents.benchmark.results import compare_results

    compared = compare_results(*results, folder)
    if as_json:
        typer.echo(json.dumps({name: asdict(found) for name, found in compared}))
        return
    for name, found in compared:
        chance = interval_text(found.improvement_interval)
        show_table(console, _grid(comparison_table(name, found)))
        say(console, f"Probability that the first is better: {found.improvement:.2f} {chance}\n")
        say(console, comparison_note(found))


def _settings(tasks: str, changes: dict[str, Any], quick: bool) -> BenchmarkConfig:
    from agents.benchmark.config import QUICK, BenchmarkConfig, task_ids
    from agents.zoo import agent_names

    settings: dict[str, Any] = {"agents": agent_names(), **(QUICK if quick else {}), **changes}
    return BenchmarkConfig(tasks=task_ids(tasks), **settings)


def _cell_runner(engine: str, address: str | None, workers: int | None) -> CellRunner:
    from agents.benchmark.grid import run_in_processes

    if not uses_ray(engine, address=address):
        return run_in_processes
    from agents.distributed.cells import RayCellRunner

    return RayCellRunner(address, workers)


def _run(
    config: BenchmarkConfig,
    folder: Path,
    cell_runner: CellRunner,
    workers: int | None,
    retry_failed: bool,
    console: Console,
    as_json: bool,
) -> None:
    """Run the cells that are missing, write the report, and print its main table."""
    from agents.benchmark.grid import run_benchmark
    from agents.benchmark.pages import write_report
    from agents.runs.signals import Stopped, stop_signals

    settings: dict[str, Any] = {"workers": workers, "retry_failed": retry_failed}
    try:
        with stop_signals(lambda signum: False):
            results = run_benchmark(config, folder, **settings, cell_runner=cell_runner, console=console)
    except Stopped as stop:
        _report_what_is_done(config, folder)
        say(console, f"stopped by {stop.name}: what is done is in {folder}/; the same command goes on")
        raise typer.Exit(128 + stop.signum) from stop
    write_report(folder, config, results)
    _show(config, folder, results, console, as_json)


def _report_what_is_done(config: BenchmarkConfig, folder: Path) -> None:
    """Write the rows and the report of a benchmark that was stopped, if any of its runs is done."""
    from agents.benchmark.grid import read_cells
    from agents.benchmark.pages import write_report
    from agents.benchmark.results import RESULTS_FILE, write_results

    done = {result.cell: result for result in read_cells(folder)}
    results = [done[cell] for cell in config.cells if cell in done]
    if results:
        write_results(folder / RESULTS_FILE, results)
        write_report(folder, config, results)


def scores_as_lists(scores: Mapping[str, Mapping[str, Any]]) -> dict[str, dict[str, list[float]]]:
    """Return the normalised scores of the runs by agent and task, as plain data."""
    return {agent: {task: runs.tolist() for task, runs in tasks.items()} for agent, tasks in scores.items()}


def _show(config: BenchmarkConfig, folder: Path, results: list[CellResult], console: Console, as_json: bool) -> None:
    from agents.benchmark.pages import overall_table
    from agents.benchmark.results import read_results, scores_by_agent

    rows = read_results(folder)
    scores = scores_by_agent(rows)
    overall = overall_table(rows, scores, [agent for agent in config.agents if agent in scores])
    failed = sum(result.status == "failed" for result in results)
    if as_json:
        lines = [dict(zip(overall.headings, row, strict=True)) for row in overall.rows]
        runs = {"runs": len(results), "failed": failed, "scores": scores_as_lists(scores)}
        typer.echo(json.dumps({"folder": str(folder), **runs, "overall": lines}))
        return
    show_table(console, _grid(overall))
    unable = sorted({result.cell.agent for result in results if result.status == "inapplicable"})
    if unable:
        say(console, f"cannot do some task, report.md says why: {', '.join(unable)}")
    say(console, f"{len(results)} runs, {failed} failed. Report: {folder}/report.html, report.md; rows: results.csv")


def _grid(table: PageTable) -> Table:
    """Return a table of a report for the terminal."""
    return table_of(table.headings, table.rows, table.title or None)


def _parse_seeds(text: str | None) -> tuple[int, ...] | None:
    """Return the seeds that ``5``, ``0,3,4`` or ``7,`` stands for."""
    if text is None:
        return None
    try:
        numbers = [int(part) for part in text.removesuffix(",").split(",")]
    except ValueError as error:
        raise ConfigError(f"--seeds must be a number of seeds, or a list such as 0,1,2; got {text!r}") from error
    if "," in text:
        return tuple(numbers)
    if numbers[0] < 1:
        raise ConfigError(f"--seeds must be at least 1, or a list such as 0,1,2; got {text!r}")
    return tuple(range(numbers[0]))
