"""How far a long job is and how long it still takes: a bar in a terminal, a line now and then elsewhere."""

from __future__ import annotations

import time

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from agents.terminal import say, status_text

EVERY = 20.0
"""Seconds from one line to the next, without a terminal."""

TIMED = 3.0
"""Seconds of a job from which the rest is estimated."""


class JobProgress:
    """Shows one job after the other, each with its name, the part that is done, and the time left.

    Args:
        console: Where it is shown; a quiet one shows nothing.
        unit: What is counted: steps, texts.
    """

    def __init__(self, console: Console, unit: str) -> None:
        self._console, self._unit = console, unit
        self._name = ""
        self._started = self._said = 0.0
        self._from = 0
        columns = ("{task.description}", BarColumn(), MofNCompleteColumn(), unit + "{task.fields[note]}")
        made = [TextColumn(column) if isinstance(column, str) else column for column in columns]
        self._bar = Progress(*made, TimeRemainingColumn(), console=console, disable=not console.is_terminal)
        self._task = self._bar.add_task("", total=None, note="", visible=False)

    def __enter__(self) -> JobProgress:
        self._bar.start()
        return self

    def __exit__(self, *exception: object) -> None:
        self._bar.stop()

    def __call__(self, name: str, done: int, total: int, note: str = "") -> None:
        """Show that ``done`` of ``total`` of the job ``name`` is done."""
        now = time.monotonic()
        if name != self._name:
            self._name, self._started, self._said, self._from = name, now, now, done
            self._bar.reset(self._task, total=total, description=status_text(name), visible=True)
        self._bar.update(self._task, completed=min(done, total), note=note)
        if not self._console.is_terminal and now - self._said >= EVERY:
            self._said = now
            left = (now - self._started) * (total - done) / max(done - self._from, 1)
            line = f"{name}: {min(done, total):,} of {total:,} {self._unit}{note}, {minutes(left)} left"
            say(self._console, line)

    def measuring(self, policy: str, ended: int, texts: int) -> None:
        """Show that ``ended`` of the texts of a policy that is measured have ended."""
        self(f"measuring: {policy}", ended, texts)


class FirstEstimate:
    """How long a job still takes, once: as soon as ``TIMED`` seconds of its steps have been timed.

    Args:
        begin: The steps before are not timed: they are quicker, or slower, than the others.
        ready: No estimate before so many steps.
    """

    def __init__(self, begin: int, ready: int) -> None:
        self._begin, self._ready = begin, ready
        self._start: tuple[float, int] | None = None  # seconds and steps
        self._is_known = False

    def left(self, seconds: float, done: int, total: int) -> float | None:
        """Return the seconds that the job still takes, or None: too early, or known before."""
        if self._is_known or done < self._begin:
            return None
        if self._start is None:
            self._start = seconds, done
        spent, steps = seconds - self._start[0], done - self._start[1]
        if spent < TIMED or done < self._ready or not steps:
            return None
        self._is_known = True
        return spent / steps * (total - done)


def minutes(seconds: float) -> str:
    """Return a duration as minutes and seconds: 3:05."""
    whole = max(0, round(seconds))
    return f"{whole // 60}:{whole % 60:02}"
