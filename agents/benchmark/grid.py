"""Many runs: every agent on every task with every seed, in parallel processes, one file a run.

    BenchmarkConfig -> cells (task, agent, seed) -> run_cell -> CellResult -> DIR/cells/*.json -> DIR/results.csv

    benchmark.json   what was asked for; a folder belongs to one configuration
    cells/           a file for each run that is done, written whole or not at all
    results.csv      one row for each run and evaluation
    report.html, report.md

A run depends on its cell alone, so it does not matter which process computes it, or when: the same
command gives the same rows, except for the seconds.
"""

from __future__ import annotations

import csv
import io
import json
import math
import os
import signal
import time
import traceback
import zlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, field, fields
from functools import lru_cache
from importlib import metadata
from multiprocessing import get_context
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback

from agents.zoo import Budget, acts_greedily, draws_anew, env_settings, find_agent, make_agent, tuned_settings
from textgen_env import DIAGNOSTIC_TASKS
from textgen_env.config import check_at_least
from textgen_env.errors import ConfigError, RunFolderError
from textgen_env.evaluation import Evaluation, evaluate
from textgen_env.models.device import own_cores
from textgen_env.registry import unknown_name
from textgen_env.tasks import TASKS, Bounds, Task, make_task

GRID_FILE = "benchmark.json"
RESULTS_FILE = "results.csv"
TRANSCRIPTS = 4
"""Texts of the last evaluation that a run keeps."""

EVALUATION_SEED = 10_000
"""Added to a run's seed, so that texts are measured with other random numbers than it learned with."""

QUICK: Mapping[str, Any] = {
    "agents": ("random", "sample", "best_of_n", "dqn", "ppo", "text_dqn"),
    "seeds": (0, 1, 2),
    "steps": 5_000,
    "evaluations": 5,
}
"""What ``textgen benchmark --quick`` runs, on the diagnostic tasks."""


class Cell(NamedTuple):
    """One run."""

    task: str
    agent: str
    seed: int

    @property
    def file(self) -> str:
        """The name of its file: readable, and different for different cells."""
        plain = "".join(c if c.isalnum() or c in "-_.=" else "-" for c in f"{self.task}--{self.agent}--{self.seed}")
        return f"{plain}--{zlib.crc32(repr(tuple(self)).encode()):08x}.json"


@dataclass(frozen=True)
class BenchmarkConfig:
    """What is run. Tasks may have sizes: ``"TextGen/Needle-v0:depth=6"``.

    Raises:
        UnknownName: a task, size or agent that does not exist (with a suggestion).
        ConfigError: nothing to run, something named twice, or a number out of range.
    """

    tasks: tuple[str, ...]
    agents: tuple[str, ...]
    seeds: tuple[int, ...] = (0, 1, 2, 3, 4)
    steps: int = 20_000  # for an agent to learn from
    envs: int = 32  # texts written at a time
    evaluations: int = 9  # of an agent that learns, evenly spread, the first before it has learned
    texts: int = 64  # of each evaluation, at least; every test prompt gets the same number
    version: str = field(default_factory=lambda: metadata.version("textgen-env"))

    def __post_init__(self) -> None:
        object.__setattr__(self, "tasks", tuple(map(task_id, self.tasks)))
        for name in ("tasks", "agents", "seeds"):
            values = tuple(getattr(self, name))
            object.__setattr__(self, name, values)
            twice = sorted({str(value) for value in values if values.count(value) > 1})
            if twice or not values:
                raise ConfigError(f"{name} must be at least one, each once; got {', '.join(twice) or 'none'}")
        for seed in self.seeds:
            check_at_least("a seed", seed, 0)
        for name, least in (("steps", 1), ("envs", 1), ("evaluations", 2), ("texts", 1)):
            check_at_least(name, getattr(self, name), least)
        for task in self.tasks:
            open_task(task)
        for agent in self.agents:
            find_agent(agent)

    @property
    def cells(self) -> list[Cell]:
        """All runs; those of a seed before those of the next, so that a stopped benchmark covers everything."""
        return [Cell(task, agent, seed) for seed in self.seeds for task in self.tasks for agent in self.agents]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


def task_ids(names: str) -> tuple[str, ...]:
    """Return the tasks of a comma-separated list, or of the group ``diagnostic``, ``language`` or ``all``.

    Raises:
        UnknownName: no such task or group.
    """
    diagnostic = tuple(map(task_id, DIAGNOSTIC_TASKS))
    language = tuple(id for id in TASKS if id not in diagnostic)
    groups = {"diagnostic": diagnostic, "language": language, "all": (*diagnostic, *language)}
    return groups[names] if names in groups else tuple(map(task_id, names.split(",")))


def task_id(spec: str) -> str:
    """Return a task's id with its sizes, given that or its short name: ``Needle:depth=6``.

    Raises:
        UnknownName: no such task.
    """
    name, *sizes = spec.split(":")
    known = {id.removeprefix("TextGen/").removesuffix("-v0"): id for id in TASKS}
    if name not in TASKS and name not in known:
        raise unknown_name("task", name, known)
    return ":".join([known.get(name, name), *sizes])


@lru_cache(maxsize=64)
def open_task(spec: str) -> Task:
    """Return the task that ``task_id`` names.

    Raises:
        UnknownName: no such task or size.
        ConfigError: a size that is no ``name=value``, or out of its range.
    """
    id, *sizes = spec.split(":")
    given: dict[str, Any] = {}
    for size in sizes:
        name, equals, value = size.partition("=")
        if not equals:
            raise ConfigError(f"the size of a task is written name=value, got {size!r} in {spec!r}")
        try:
            given[name] = json.loads(value)
        except json.JSONDecodeError:
            given[name] = value
    return make_task(id, **given)


@lru_cache(maxsize=64)
def known_bounds(spec: str) -> Bounds:
    """Return the bounds of ``open_task(spec)``, computed once a process."""
    return open_task(spec).bounds()


# --- one run


@dataclass(frozen=True)
class CellResult:
    """What became of a run: plain data."""

    cell: Cell
    status: str  # "ok"; "failed": it raised; "inapplicable": the agent cannot do this task
    error: str = ""
    rows: Sequence[Mapping[str, Any]] = ()  # one an evaluation, as far as it got
    transcripts: Sequence[Mapping[str, Any]] = ()  # prompt, completion, reward
    traceback: str = ""


RESULT_COLUMNS = {
    "task": "with its sizes",
    "agent": "by name",
    "seed": "of the run",
    "status": "ok, failed, or inapplicable",
    "step": "environment steps learned from",
    "seconds": "of learning, without measuring",
    "reward": "mean of a text",
    "normalised": "0 for the language model, 1 for the best",
    "kl": "nats a text, where known",
    "tokens": "generated for a text, those of a search too",
    "length": "tokens of a text",
    "texts": "measured",
    "error": "of a run that failed",
}
"""Of ``results.csv``."""


def run_cell(config: BenchmarkConfig, cell: Cell) -> CellResult:
    """Run one agent on one task with one seed, and measure it as it learns.

    Whatever the agent raises, also about an illegal action, is part of the result.
    """
    rows: list[dict[str, Any]] = []
    kept: list[Mapping[str, Any]] = []
    opened = False
    try:
        task = open_task(cell.task)
        settings = env_settings(cell.agent, whole_vocabulary=task.settings.get("top_k", 16) is None)
        env = task.make_vec(config.envs, **settings)
        budget = Budget(config.steps, config.envs, env.max_new_tokens)
        agent = make_agent(cell.agent, env, cell.seed, budget, tuned_settings(cell.agent, env))
        opened = True
        learns_in_sb3 = isinstance(agent, BaseAlgorithm)
        # Planning agents search in the environment that they are asked in; SB3's must not lose their place.
        apart = task.make_vec(config.envs, **settings) if learns_in_sb3 else env

        def measure(step: int, seconds: float) -> None:
            measured, tokens = measure_agent(cell, config.texts, agent, apart, task)
            rows.append(row_of(measured, tokens, step, seconds, known_bounds(cell.task)))
            kept[:] = transcripts_of(measured)

        if learns_in_sb3:
            agent.learn(config.steps, callback=LearningCurve(config, measure))
        else:
            measure(0, 0.0)
            if hasattr(agent, "learn"):
                started = time.perf_counter()
                agent.learn(config.steps)
                measure(config.steps, time.perf_counter() - started)
    except Exception as error:
        status = "inapplicable" if isinstance(error, ConfigError) and not opened else "failed"
        return CellResult(cell, status, f"{type(error).__name__}: {error}", rows, kept, traceback.format_exc())
    return CellResult(cell, "ok", "", rows, kept)


class LearningCurve(BaseCallback):
    """Measure an agent before it learns, at even distances, and when it has learned; learning time only counts."""

    def __init__(self, config: BenchmarkConfig, measure: Callable[[int, float], None]) -> None:
        super().__init__()
        parts = config.evaluations - 1
        self._points = [config.steps * i // parts for i in range(1, parts)]
        self._measure = measure
        self._seconds = self._since = 0.0

    def _on_training_start(self) -> None:
        self._measured()

    def _on_step(self) -> bool:
        if self._points and self.num_timesteps >= self._points[0]:
            self._points = [point for point in self._points if point > self.num_timesteps]
            self._measured()
        return True

    def _on_training_end(self) -> None:
        self._measured()

    def _measured(self) -> None:
        if self.num_timesteps:
            self._seconds += time.perf_counter() - self._since
        self._measure(self.num_timesteps, self._seconds)
        self._since = time.perf_counter()


def measure_agent(cell: Cell, texts: int, agent: Any, env: Any, task: Task) -> tuple[Evaluation, float]:
    """Return what the agent writes for the test prompts, and the tokens that a text has cost."""
    greedy, prompts = acts_greedily(cell.agent, agent), task.test_prompts
    count = max(texts, len(prompts)) if draws_anew(cell.agent, agent) else len(prompts)
    before = getattr(agent, "tokens_used", None)
    measured = evaluate(agent, env, count, EVALUATION_SEED + cell.seed, prompts, greedy)
    spent = float(measured.lengths.sum()) if before is None else agent.tokens_used - before
    return measured, spent / len(measured.rewards)


def row_of(measured: Evaluation, tokens: float, step: int, seconds: float, bounds: Bounds) -> dict[str, Any]:
    """Return the figures of an evaluation, by ``RESULT_COLUMNS``."""
    return {
        "step": step,
        "seconds": seconds,
        "reward": measured.reward,
        "normalised": float(bounds.normalise(measured.reward)),
        "kl": measured.mean_kl,
        "tokens": tokens,
        "length": float(measured.lengths.mean()),
        "texts": len(measured.rewards),
    }


def transcripts_of(measured: Evaluation) -> list[dict[str, Any]]:
    """Return the first texts: not a selection."""
    texts = zip(measured.prompts, measured.completions, measured.rewards.tolist(), strict=True)
    return [
        {"prompt": prompt, "completion": completion, "reward": reward}
        for (prompt, completion, reward), _ in zip(texts, range(TRANSCRIPTS), strict=False)
    ]


# --- many runs


def run_in_processes(
    config: BenchmarkConfig, cells: Sequence[Cell], workers: int, started: Callable[[Cell], None] = lambda cell: None
) -> Iterator[CellResult]:
    """Yield the result of each cell as it comes, from ``workers`` processes of one thread each.

    A process that dies takes its cell with it, as a failed one; another takes its place.

    Args:
        started: Told of each cell that a process takes up.
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
    names = ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")
    before = {name: os.environ.get(name) for name in names}
    os.environ.update(dict.fromkeys(names, "1"))
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


CellRunner = Callable[[BenchmarkConfig, Sequence[Cell], int, Callable[[Cell], None]], Iterator[CellResult]]
"""What runs cells: ``run_in_processes``, or another way to spread ``run_cell`` over machines."""


def run_benchmark(
    config: BenchmarkConfig,
    out: str | os.PathLike[str],
    *,
    workers: int | None = None,
    retry_failed: bool = False,
    engine: CellRunner = run_in_processes,
    console: Console | None = None,
) -> list[CellResult]:
    """Run what of ``config`` is not recorded in the folder ``out`` yet, and return everything recorded.

    Stopped at any time, by Ctrl-C, a kill or a full disk, it goes on where it was when it is called again.

    Args:
        workers: Processes. None: as many as there are cores to use.
        retry_failed: Run the cells again that are recorded as failed.
        engine: How the cells are spread.
        console: Shows progress. None: silence.

    Raises:
        ConfigError: a task whose bounds nobody has searched, so that scores could not be normalised; says how to.
        RunFolderError: the folder belongs to another configuration, or cannot be written to.
    """
    folder, console = Path(out), console or Console(quiet=True)
    for task in config.tasks:
        known_bounds(task)
    open_folder(folder, config)
    done = {result.cell: result for result in read_cells(folder)}
    if retry_failed:
        done = {cell: result for cell, result in done.items() if result.status != "failed"}
    missing = [cell for cell in config.cells if cell not in done]
    count = workers or own_cores()
    with _progress(console, len(config.cells), len(done)) as (started, ended):
        for result in engine(config, missing, max(1, min(count, len(missing))), started):
            write_whole(folder / "cells" / result.cell.file, json.dumps(asdict(result)) + "\n")
            done[result.cell] = result
            ended(result)
    results = [done[cell] for cell in config.cells]
    write_results(folder / RESULTS_FILE, results)
    return results


def open_folder(folder: Path, config: BenchmarkConfig) -> None:
    """Make the folder, or see that it is the configuration's own.

    Raises:
        RunFolderError: it holds something else; says what differs.
    """
    path = folder / GRID_FILE
    if path.exists():
        held, asked = json.loads(path.read_text(encoding="utf-8")), json.loads(config.to_json())
        other = [
            f"{f.name} {held.get(f.name)} instead of {asked[f.name]}"
            for f in fields(config)
            if held.get(f.name) != asked[f.name]
        ]
        if other:
            raise RunFolderError(
                f"{str(folder)!r} holds results of another configuration: {'; '.join(other)}. Choose another folder, "
                "or delete this one"
            )
        return
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise RunFolderError(f"{str(folder)!r} exists and holds no benchmark; choose another folder")
    try:
        (folder / "cells").mkdir(parents=True)
    except OSError as error:
        raise RunFolderError(f"cannot make the folder {str(folder)!r}: {error}") from error
    write_whole(path, config.to_json())


def read_cells(folder: Path) -> list[CellResult]:
    """Return all runs that the folder has recorded."""
    results = []
    for path in sorted((folder / "cells").glob("*.json")):
        read = json.loads(path.read_text(encoding="utf-8"))
        results.append(CellResult(**{**read, "cell": Cell(*read["cell"])}))
    return results


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all, whatever happens.

    Raises:
        RunFolderError: it cannot be written, because the disk is full, for instance.
    """
    half = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        with half.open("w", encoding="utf-8") as file:
            file.write(text)
            file.flush()
            os.fsync(file.fileno())
        half.replace(path)
    except OSError as error:
        half.unlink(missing_ok=True)
        raise RunFolderError(
            f"cannot write {str(path)!r}: {error}. All runs recorded before are kept; make room, and give the same "
            "command again to go on"
        ) from error


def write_results(path: Path, results: Sequence[CellResult]) -> None:
    """Write one row for each run and evaluation; a run that never got to one has a row with its error."""
    text = io.StringIO()
    writer = csv.DictWriter(text, RESULT_COLUMNS, lineterminator="\n", restval="")
    writer.writeheader()
    for result in results:
        head = {**result.cell._asdict(), "status": result.status, "error": " ".join(result.error.split())}
        writer.writerows(
            {**head, **{name: _shown(value) for name, value in row.items()}} for row in result.rows or [{}]
        )
    write_whole(path, text.getvalue())


def _shown(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) and math.isfinite(value) else value


@contextmanager
def _progress(
    console: Console, total: int, done: int
) -> Iterator[tuple[Callable[[Cell], None], Callable[[CellResult], None]]]:
    """Show how many runs are done and which are going on; yield what to call at a start and at an end."""
    bar = Progress(
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TimeRemainingColumn(),
        console=console,
    )
    task = bar.add_task("runs", total=total, completed=done)
    running: list[Cell] = []

    def show() -> None:
        names = ", ".join(f"{cell.agent} on {cell.task.removeprefix('TextGen/')} #{cell.seed}" for cell in running)
        bar.update(task, description=f"runs ({names})" if names else "runs")

    def started(cell: Cell) -> None:
        running.append(cell)
        show()

    def ended(result: CellResult) -> None:
        if result.cell in running:
            running.remove(result.cell)
        if result.status == "failed":
            bar.console.print(
                f"failed: {result.cell.agent} on {result.cell.task}, seed {result.cell.seed}: {result.error}",
                markup=False,
            )
        bar.advance(task)
        show()

    with bar:
        yield started, ended
