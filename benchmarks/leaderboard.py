"""The tables of docs/benchmark.md, and your own row in them.

    python -m benchmarks.leaderboard benchmarks/results/language.csv
    python -m benchmarks.leaderboard benchmarks/results/language.csv out/mine     # with the agents of your own run

Files or folders of ``textgen benchmark``  ->  Markdown: agents that write one text, then those that write several
and choose; the best first, by their mean score over the tasks that all of their table can do.
"""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from agents.benchmark.config import short_name
from agents.benchmark.pages import figure
from agents.benchmark.results import ResultRow, final_rows, read_results


def leaderboard(rows: Sequence[ResultRow]) -> str:
    """Return two Markdown tables of normalised scores, means over the runs of an agent on a task."""
    last = final_rows(rows)
    tasks = list(dict.fromkeys(row["task"] for row in last))
    agents = list(dict.fromkeys(row["agent"] for row in last))
    several = {row["agent"] for row in last if row["judge_calls"] > 0}
    tables = []
    for title, chosen in (
        ("one text", [agent for agent in agents if agent not in several]),
        ("several texts, one is chosen", [agent for agent in agents if agent in several]),
    ):
        if not chosen:
            continue
        scores = {agent: [_mean(last, agent, task, "normalised") for task in tasks] for agent in chosen}
        shared = [j for j in range(len(tasks)) if not any(np.isnan(row[j]) for row in scores.values())]
        compared = shared or range(len(tasks))
        chosen.sort(key=lambda agent: -np.nanmean([scores[agent][j] for j in compared]))
        lines = [
            f"| {title} | {' | '.join(map(short_name, tasks))} | tokens a text | judge calls: a text | to learn |",
            "|---|" + "---:|" * (len(tasks) + 3),
        ]
        for agent in chosen:
            costs = [_mean(last, agent, None, name) for name in ("tokens", "judge_calls", "learning_judge_calls")]
            cells = [f"`{agent}`", *(figure(score, ".2f") for score in scores[agent])]
            cells += [figure(cost, ",.0f") for cost in costs]
            lines.append(f"| {' | '.join(cells)} |")
        tables.append("\n".join(lines))
    return "\n\n".join(tables) + "\n"


def _mean(rows: Sequence[ResultRow], agent: str, task: str | None, name: str) -> float:
    """Return the mean of a column over an agent's runs, on one task or on all; NaN where there are none."""
    found = [row[name] for row in rows if row["agent"] == agent and task in (None, row["task"])]
    return float(np.mean(found)) if found else np.nan


def main() -> None:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("results", nargs="+", type=Path, help="results.csv, or the folder that holds one")
    print(leaderboard([row for path in parser.parse_args().results for row in read_results(path)]), end="")


if __name__ == "__main__":
    main()
