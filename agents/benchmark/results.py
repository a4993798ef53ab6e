"""The results of a benchmark as a CSV file, and the scores in it.

CellResult  ->  results.csv  ->  ResultRow  ->  scores {agent: {task: (runs,)}}  ->  Comparison
"""

from __future__ import annotations

import csv
import io
import math
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from agents.benchmark.cells import CellResult
from agents.benchmark.statistics import Comparison, Scores, compare, interquartile_mean
from textgen_env.errors import ConfigError, RunFolderError
from textgen_env.files import write_file

RESULTS_FILE = "results.csv"

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
    "judge_calls": "finished texts that the reward was asked about for one that is written: a search's",
    "learning_judge_calls": "the same, while learning",
    "length": "tokens of a text",
    "texts": "measured",
    "error": "of a run that failed",
}
"""Of ``results.csv``."""

ResultRow = Mapping[str, Any]
"""A row of ``results.csv``; figures are floats, NaN where the cell is empty."""

NAMES = ("task", "agent", "status")
NUMBERS = ("seed", "step", "seconds", "reward", "normalised", "kl", "tokens", "length", "texts")
MOST_OF_AN_ERROR = 4_000
"""Characters; longer cells cannot be read again."""

SINCE_0_2 = ("judge_calls", "learning_judge_calls")  # columns that older files lack


def write_results(path: Path, results: Sequence[CellResult]) -> None:
    """Write one row for each run and evaluation; a run that never got to one has a row with its error."""
    text = io.StringIO()
    writer = csv.DictWriter(text, RESULT_COLUMNS, lineterminator="\n", restval="")
    writer.writeheader()
    for result in results:
        error = " ".join(result.error.split())[:MOST_OF_AN_ERROR]
        head = {**result.cell._asdict(), "status": result.status, "error": error}
        writer.writerows(
            {**head, **{name: _rounded(value) for name, value in row.items()}} for row in result.rows or [{}]
        )
    write_file(path, text.getvalue())


def _rounded(value: Any) -> Any:
    return f"{value:.6g}" if isinstance(value, float) and math.isfinite(value) else value


def read_results(path: Path) -> list[ResultRow]:
    """Return the rows of a ``results.csv``, or of the folder that holds one.

    Raises:
        RunFolderError: there is none, or it is not one.
    """
    file = path / RESULTS_FILE if path.is_dir() else path
    try:
        with file.open(newline="", encoding="utf-8") as lines:
            rows = list(csv.DictReader(lines))
        return [
            {**row, **{name: float(row[name] or "nan") for name in NUMBERS}, **{name: row[name] for name in NAMES}}
            | {name: float(row.get(name) or "nan") for name in SINCE_0_2}
            for row in rows
        ]
    except OSError as error:
        raise RunFolderError(f"cannot read the results of a benchmark at {str(path)!r}: {error}") from error
    except (KeyError, ValueError, csv.Error) as error:
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


def by_score(scores: Mapping[str, Scores]) -> list[str]:
    """Return the agents, the best first; those without a run on some task come last. Tables and figures keep to it."""

    def rank(agent: str) -> tuple[int, float]:
        return len(scores[agent]), float(interquartile_mean(np.concatenate(list(scores[agent].values()))))

    return sorted(scores, key=rank, reverse=True)


def compare_results(first: str, second: str, folder: Path | None) -> list[tuple[str, Comparison]]:
    """Return the differences between two results (each agent in both), or two agents of ``folder``.

    Args:
        first, second: Folders or CSV files of results; or names of agents in ``folder``.

    Raises:
        ConfigError: agents that have no runs there, or nothing in common.
    """
    if Path(first).exists() and Path(second).exists():
        return _compare_folders(Path(first), Path(second))
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


def _compare_folders(first: Path, second: Path) -> list[tuple[str, Comparison]]:
    a, b = (scores_by_agent(read_results(path)) for path in (first, second))
    both = [agent for agent in a if agent in b]
    if not both:
        raise ConfigError(f"{str(first)!r} and {str(second)!r} have no agent in common, so there is nothing to compare")
    return [(agent, compare(a[agent], b[agent])) for agent in both]
