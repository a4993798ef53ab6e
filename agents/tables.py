"""Tables and progress that lose nothing: on a wide or a narrow terminal, in a pipe, in a log file.

A table that does not fit is written as one block a line of it: the name, then each figure with its heading. Without a
terminal nobody limits the width (unless ``COLUMNS`` is set), lines are whole, and progress is a line now and then.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from rich.cells import cell_len
from rich.console import Console
from rich.progress import Progress, TaskID
from rich.table import Table
from rich.text import Text

from agents.terminal import say

LINES_OF_PROGRESS = 10
"""From the start of a task to its end, without a terminal."""


def show_table(console: Console, table: Table, *notes: str) -> None:
    """Print a table, in blocks if it is wider than the console, and whole lines of notes below it."""
    width = available_width(console)
    widest = console.measure(table, options=console.options.update(max_width=10_000)).maximum
    if width is None:
        own, console.width = console.width, max(console.width, widest)  # print takes no more than its own
        console.print(table)
        console.width = own
    elif (fitting := _widths(table, width, widest)) is None:
        say(console, *blocks(table))
    else:
        with _column_widths(table, fitting):
            console.print(table, width=min(width, widest))
    say(console, *notes)


@contextmanager
def _column_widths(table: Table, widths: Sequence[int | None]) -> Iterator[None]:
    """Within, the columns of a table have these widths."""
    before = [column.width for column in table.columns]
    for column, width in zip(table.columns, widths, strict=True):
        column.width = width
    try:
        yield
    finally:
        for column, width in zip(table.columns, before, strict=True):
            column.width = width


def _widths(table: Table, width: int, widest: int) -> list[int] | None:
    """Return widths of the columns at which no word is cut; None if ``width`` is too small for that.

    rich itself shortens wide columns until all fit, some of them below their longest word.

    Args:
        widest: Of the whole table, where no line is wrapped.
    """
    least, most = list[int](), list[int]()
    for column in table.columns:
        lines = [line for text in (column.header, *column.cells) for line in _plain(text).splitlines() or [""]]
        pieces = lines if column.no_wrap else [word for line in lines for word in line.split()]
        narrowest = column.min_width or 0
        least.append(max(narrowest, *map(cell_len, pieces), 0))
        most.append(max(narrowest, *map(cell_len, lines)))
    left = width - (widest - sum(most)) - sum(least)  # the first bracket: edges, and blanks between columns
    if left < 0:
        return None
    wishes = sorted(range(len(least)), key=lambda index: most[index] - least[index])
    for done, index in enumerate(wishes):
        more = min(most[index] - least[index], left // (len(wishes) - done))
        least[index] += more
        left -= more
    return least


def available_width(console: Console) -> int | None:
    """Return the columns of a terminal, or those that ``COLUMNS`` says; None without either."""
    columns = os.environ.get("COLUMNS", "")
    is_limited = console.is_terminal or (columns.isdigit() and int(columns) > 0)
    return console.width if is_limited else None


def blocks(table: Table) -> list[str]:
    """Return a table as lines: for each row its first cell, then an indented line for each other cell with a value."""
    headings = [_plain(column.header) for column in table.columns]
    cells = [[_plain(cell) for cell in column.cells] for column in table.columns]
    lines = [_plain(table.title)] if table.title else []
    for first, *rest in zip(*cells, strict=True):
        lines.append(first)
        lines += [f"  {heading}: {cell}" for heading, cell in zip(headings[1:], rest, strict=True) if cell != "–"]
    return lines


class SteadyProgress(Progress):
    """A progress bar; without a terminal, a line for each tenth of a task instead."""

    def __init__(self, *columns: Any, console: Console, words: str) -> None:
        super().__init__(*columns, console=console, disable=not console.is_terminal)
        self._words = words  # with {name} for the task's fields
        self._written = 0  # tenths

    def update(self, task_id: TaskID, **changes: Any) -> None:
        """Change a task, as ``Progress.update``."""
        super().update(task_id, **changes)
        task = next(task for task in self.tasks if task.id == task_id)
        tenth = int(LINES_OF_PROGRESS * task.completed / task.total) if task.total else 0
        if self.disable and tenth > self._written:
            self._written = tenth
            spent = task.elapsed or 0.0
            left = spent * (task.total or 0) / task.completed - spent
            done = f"{task.completed:,.0f} of {task.total:,.0f}"
            words = self._words.format(done=done, **task.fields)
            say(self.console, f"{words}; {spent:.0f} s, about {left:.0f} s left")


def _plain(cell: Any) -> str:
    return cell.plain if isinstance(cell, Text) else str(cell)
