"""The tables of the reference results: what a page shows is what the files say."""

from __future__ import annotations

from pathlib import Path

import pytest

from agents.benchmark.results import read_results
from benchmarks.leaderboard import leaderboard

ROOT = Path(__file__).resolve().parents[2]


def row(agent, task, score, seed=0.0, tokens=4.0, calls=0.0):
    return {
        "agent": agent,
        "task": f"TextGen/{task}-v0",
        "seed": seed,
        "status": "ok",
        "normalised": score,
        "tokens": tokens,
        "judge_calls": calls,
        "learning_judge_calls": 1000.0,
    }


def test_a_leaderboard_by_hand():
    rows = [
        row("a", "Dyck", 0.2),
        row("b", "Dyck", 0.5),
        row("b", "Dyck", 0.7, seed=1.0),  # a second run: the mean is 0.6
        row("b", "Json", 0.1, tokens=7.0),
        row("search", "Dyck", 0.9, tokens=16.0, calls=4.0),
    ]
    assert leaderboard(rows) == (
        "| one text | Dyck | Json | tokens a text | judge calls: a text | to learn |\n"
        "|---|---:|---:|---:|---:|---:|\n"
        "| `b` | 0.60 | 0.10 | 5 | 0 | 1,000 |\n"
        "| `a` | 0.20 | – | 4 | 0 | 1,000 |\n"
        "\n"
        "| several texts, one is chosen | Dyck | Json | tokens a text | judge calls: a text | to learn |\n"
        "|---|---:|---:|---:|---:|---:|\n"
        "| `search` | 0.90 | – | 16 | 4 | 1,000 |\n"
    )


@pytest.mark.parametrize("name", ["language", "language_100k", "diagnostic"])
def test_the_page_shows_what_the_file_says(name):
    page = (ROOT / "docs" / "benchmark.md").read_text(encoding="utf-8")
    assert leaderboard(read_results(ROOT / "benchmarks" / "results" / f"{name}.csv")) in page
