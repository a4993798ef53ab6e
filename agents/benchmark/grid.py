"""Run a benchmark: every agent on every task with every seed, in parallel processes, one file a run.

    BenchmarkConfig -> cells (task, agent, seed) -> run_cell -> CellResult -> DIR/cells/*.json -> DIR/results.csv

    benchmark.json   the configuration; a folder belongs to one
    cells/           a file for each run that is done, written whole or not at all
    results.csv      one row for each run and evaluation
    report.html, report.md

A run depends on its cell alone, so it does not matter which process computes it, or when: the same
command gives the same rows, except for the seconds.
"""

from __future__ import annotations

import json
import os
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, fields
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from agents.benchmark.cells import CellResult, check_agents, run_cell
from agents.benchmark.config import BenchmarkConfig, Cell, known_bounds
from agents.benchmark.results import RESULTS_FILE, write_results
from agents.runs.stored import no_new_folders_of_a_failed_start
from agents.tables import SteadyProgress
from agents.terminal import say, status_text
from textgen_env.errors import RunFolderError
from textgen_env.files import is_free, locked, read_json, refuse_links, write_file
from textgen_env.models.device import own_cores

BENCHMARK_FILE = "benchmark.json"
CELLS_FOLDER = "cells"

CellRunner = Callable[[BenchmarkConfig, Sequence[Cell], int, Callable[[Cell], None]], Iterator[CellResult]]
"""Runs cells: ``run_in_processes``, or another way to spread ``run_cell`` over machines."""

THREADS = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
"""Environment variables that bound a process's threads."""


def run_in_processes(
    config: BenchmarkConfig, cells: Sequence[Cell], workers: int, started: Callable[[Cell], None] = lambda cell: None
) -> Iterator[CellResult]:
    """Yield the result of each cell as it comes, from ``workers`` processes of one thread each.

    A process that dies takes its cell with it, as a failed one; another takes its place.

    Args:
        started: Called with each cell that a process takes up.
    """
    queue, idle, busy = list(reversed(cells)), list[_Worker](), list[_Worker]()
    try:
        while queue or busy:
            while queue and len(busy) < workers:
                worker = idle.pop() if idle else _Worker(config)
                worker.take(queue.pop())
                busy.append(worker)
                started(worker.cell)
            ready = wait([worker.connection for worker in busy])
            for worker in [worker for worker in busy if worker.connection in ready]:
                busy.remove(worker)
                result = worker.result()
                if worker.process.is_alive():
                    idle.append(worker)
                yield result
    finally:
        for worker in (*idle, *busy):
            worker.process.terminate()
            worker.process.join()


class _Worker:
    """A process that runs one cell after the other."""

    def __init__(self, config: BenchmarkConfig) -> None:
        context = get_context("spawn")
        self.connection, theirs = context.Pipe()
        self.process: BaseProcess = context.Process(target=_serve, args=(theirs, config), daemon=True)
        with _one_thread():
            self.process.start()
        theirs.close()

    def take(self, cell: Cell) -> None:
        self.cell = cell
        with suppress(OSError):  # it died while idle: its result says so
            self.connection.send(cell)

    def result(self) -> CellResult:
        try:
            result: CellResult = self.connection.recv()
        except (EOFError, OSError):
            self.process.join()
            code = self.process.exitcode
            return CellResult(self.cell, "failed", f"the process of this run died with exit code {code}")
        return result


@contextmanager
def _one_thread() -> Iterator[None]:
    """Let processes that start meanwhile use one thread: workers share the cores already."""
    before = {name: os.environ.get(name) for name in THREADS}
    os.environ.update(dict.fromkeys(THREADS, "1"))
    try:
        yield
    finally:
        for name, value in before.items():
            os.environ.pop(name) if value is None else os.environ.update({name: value})


def _serve(connection: Connection, config: BenchmarkConfig) -> None:
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's, which ends this process
    torch.set_num_threads(1)
    while True:
        try:
            connection.send(run_cell(config, connection.recv()))
        except (EOFError, OSError):  # the parent is gone
            return


def run_benchmark(
    config: BenchmarkConfig,
    out: str | os.PathLike[str],
    *,
    workers: int | None = None,
    retry_failed: bool = False,
    cell_runner: CellRunner = run_in_processes,
    console: Console | None = None,
) -> list[CellResult]:
    """Run the cells of ``config`` that the folder ``out`` has not recorded yet; return the results of all cells.

    Stopped at any time, by Ctrl-C, a kill or a full disk, it goes on where it was when it is called again.

    Args:
        workers: Processes. None: as many as there are cores to use.
        retry_failed: Run the cells again that are recorded as failed.
        cell_runner: Runs the cells: here, or on other machines.
        console: Shows progress. None: silence.

    Raises:
        ContractError: an agent of the user's own that is none.
        ConfigError: a task whose bounds nobody has searched, so that scores could not be normalised; says how to.
        RunFolderError: the folder belongs to another configuration or to another process, has links in
            it, or cannot be written to.
    """
    folder = Path(out)
    for task in config.tasks:
        known_bounds(task)
    with no_new_folders_of_a_failed_start(folder), locked(folder):
        open_folder(folder, config, check=lambda: check_agents(config))
        return _run_missing(config, folder, workers, retry_failed, cell_runner, console)


def _run_missing(
    config: BenchmarkConfig,
    folder: Path,
    workers: int | None,
    retry_failed: bool,
    cell_runner: CellRunner,
    console: Console | None,
) -> list[CellResult]:
    done = {result.cell: result for result in read_cells(folder)}
    if retry_failed:
        done = {cell: result for cell, result in done.items() if result.status != "failed"}
    missing = [cell for cell in config.cells if cell not in done]
    count = max(1, min(workers or own_cores(), len(missing)))
    with CellProgress(console or Console(quiet=True), len(config.cells), len(done)) as progress:
        for result in cell_runner(config, missing, count, progress.start):
            _record(folder, result)
            done[result.cell] = result
            progress.end(result)
    results = [done[cell] for cell in config.cells]
    write_results(folder / RESULTS_FILE, results)
    return results


def open_folder(folder: Path, config: BenchmarkConfig, check: Callable[[], None] = lambda: None) -> None:
    """Make the folder, or check that it is the configuration's own.

    Args:
        check: Called before anything is written.

    Raises:
        RunFolderError: it holds something else; says what differs.
    """
    refuse_links(folder)
    path = folder / BENCHMARK_FILE
    if path.exists():
        held, asked = read_json(path, ()), json.loads(config.to_json())
        other = [f"{name} {held.get(name)} instead of {asked[name]}" for name in asked if held.get(name) != asked[name]]
        if other:
            raise RunFolderError(
                f"{str(folder)!r} holds results of another configuration: {'; '.join(other)}. Choose another folder, "
                "or delete this one"
            )
        return
    if not is_free(folder):
        raise RunFolderError(f"{str(folder)!r} exists and holds no benchmark; choose another folder")
    check()
    write_file(path, config.to_json())


def read_cells(folder: Path) -> list[CellResult]:
    """Return all runs that the folder has recorded.

    Raises:
        RunFolderError: a file is damaged.
    """
    results = []
    for path in sorted((folder / CELLS_FOLDER).glob("*.json")):
        read = read_json(path, [field.name for field in fields(CellResult)], allow_nan=True)
        try:
            results.append(CellResult(**{**read, "cell": Cell(*read["cell"])}))
        except TypeError as error:
            raise RunFolderError(f"{str(path)!r} is damaged: {error}; delete it to run it again") from error
    return results


def _record(folder: Path, result: CellResult) -> None:
    try:
        write_file(folder / CELLS_FOLDER / result.cell.file, json.dumps(asdict(result)) + "\n")
    except RunFolderError as error:
        raise RunFolderError(
            f"{error}. All runs recorded before are kept; give the same command again to go on"
        ) from error


class CellProgress:
    """A bar that shows how many runs are done, and names those that are going on."""

    def __init__(self, console: Console, total: int, done: int) -> None:
        self._bar = SteadyProgress(
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            console=console,
            words="{done} runs",
        )
        self._task = self._bar.add_task("runs", total=total, completed=done)
        self._running: list[Cell] = []
        self._done = done

    def __enter__(self) -> CellProgress:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def start(self, cell: Cell) -> None:
        """Show that a run has started."""
        self._running.append(cell)
        self._show()

    def end(self, result: CellResult) -> None:
        """Show that a run has ended; print a line if it failed."""
        cell = result.cell
        if cell in self._running:
            self._running.remove(cell)
        if result.status == "failed":
            line = f"failed: {cell.agent} on {cell.task}, seed {cell.seed}: {result.error}"
            say(self._bar.console, line)
        self._done += 1
        self._bar.update(self._task, completed=self._done)
        self._show()

    def _show(self) -> None:
        names = ", ".join(f"{c.agent} on {c.task.removeprefix('TextGen/')} #{c.seed}" for c in self._running)
        self._bar.update(self._task, description=status_text(f"runs ({names})" if names else "runs"))
