"""Tables and progress lose nothing: on narrow terminals, in pipes, in logs."""

from __future__ import annotations

import io
from collections import Counter

import pytest
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from agents.tables import SteadyProgress, show_table
from agents.terminal import table_of

ROWS = [("text_dqn, trained", "0.62 ±0.03", "12.5", "–"), ("best possible policy", "0.71", "≥ 1.04", "100%")]


def shown(width, monkeypatch, terminal=False, columns=None):
    """What is printed of a table of figures that do not wrap, and a note."""
    monkeypatch.setenv("COLUMNS", columns) if columns else monkeypatch.delenv("COLUMNS", raising=False)
    table = Table(box=None)
    table.add_column("policy")
    for heading in ("reward", "KL", "share"):
        table.add_column(heading, no_wrap=True)
    for row in ROWS:
        table.add_row(*row)
    console = Console(file=io.StringIO(), width=width, force_terminal=terminal, color_system=None)
    show_table(console, table, "a note of " + "many " * 20 + "words")
    return console.file.getvalue()


@pytest.mark.parametrize(("width", "columns"), [(200, "200"), (80, "80"), (40, "40"), (30, "30"), (12, "12")])
def test_every_figure_is_there_at_every_width(width, columns, monkeypatch):
    for terminal in (True, False):
        printed = shown(width, monkeypatch, terminal, columns)
        for row in ROWS:
            for cell in row[1:]:
                assert cell == "–" or cell in " ".join(printed.split())
        assert "".join(printed.split()).count("policy") >= 1
        assert "…" not in printed
        if width >= 30:
            assert max(map(len, printed.splitlines()[:-1])) <= width  # the note is a line of its own


def test_no_heading_and_no_cell_is_cut_at_any_width(monkeypatch):
    heads = ("agent", "interquartile mean", "mean", "median", "optimality gap")
    row = ("text_dqn_particles", "0.12 [0.10, 0.15]", "0.13 [0.10, 0.15]", "0.1", "–")
    for width in range(20, 110):
        monkeypatch.setenv("COLUMNS", str(width))
        for boxed in (False, True):
            console = Console(file=io.StringIO(), width=width, color_system=None)
            table = table_of(heads, [row, row], "all tasks")
            table.box = SIMPLE_HEAD if boxed else None
            show_table(console, table)
            printed = console.file.getvalue()
            words = Counter(printed.replace("─", " ").replace(":", "").split())
            assert "…" not in printed
            for cell in (*row[1:4], *row[1:4]):
                assert Counter(cell.split()) <= words
            assert words["text_dqn_particles"] == 2
            assert words["interquartile"] in (1, 2)  # twice in blocks, one a row
            if words["interquartile"] == 1:
                assert max(map(len, printed.splitlines())) <= width
            else:
                longest = ("text_dqn_particles", "interquartile", "[0.10,", "median", "optimality")
                assert width < sum(map(len, longest)) + 3 * len(longest) + 1  # blanks and edges


def test_a_table_in_a_pipe_is_as_wide_as_it_is_and_notes_are_whole_lines(monkeypatch):
    lines = shown(20, monkeypatch).splitlines()
    assert any(all(cell in line for cell in ROWS[0]) for line in lines)
    assert lines[-1].endswith("words")


def test_progress_without_a_terminal_is_a_line_for_each_tenth():
    console = Console(file=io.StringIO(), width=40)
    progress = SteadyProgress(console=console, words="learning: {done} steps, reward {reward}")
    task = progress.add_task("", total=1000, reward="–")
    with progress:
        for step in range(1, 1001):
            progress.update(task, completed=step, reward=f"{step / 1000:.2f}")
    lines = console.file.getvalue().splitlines()
    assert len(lines) == 10
    assert lines[2].startswith("learning: 300 of 1,000 steps, reward 0.30; 0 s, about 0 s left")
