"""Lines and tables on a terminal: every text is shown as it is.

Square brackets are no markup, control characters are escapes (``textgen_env.terminal``), a line is
wrapped by the terminal and stays whole in a pipe, and a terminal of a poor encoding gets
replacement characters.
"""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Iterable
from typing import Any

from rich.console import Console
from rich.markup import escape
from rich.table import Table
from rich.text import Text

from textgen_env.terminal import printable

USUAL_WIDTH = 80
"""Columns of a terminal that does not know its own."""


def open_console(stderr: bool = False) -> Console:
    """Return a console for ``say`` and tables."""
    console = Console(stderr=stderr, markup=False, emoji=False)
    if console.width < 1:  # as some terminals say, and COLUMNS=0: nothing at all would be shown
        console.width = USUAL_WIDTH
    return console


def say(console: Console, *lines: object) -> None:
    """Print lines, each whole."""
    for line in lines:
        console.print(printable(line), markup=False, emoji=False, highlight=False, soft_wrap=True)


def status_text(text: str) -> str:
    """Return ``text`` for ``console.status`` and progress bars, which read markup whatever the console says."""
    return escape(printable(text, one_line=True))


def cell(text: object) -> Text:
    """Return ``text`` as a cell of a table."""
    return Text(printable(text))


def table_of(headings: Iterable[object], rows: Iterable[Iterable[object]], title: str | None = None) -> Table:
    """Return a plain table: columns side by side without lines."""
    grid = Table(title=None if title is None else cell(title), title_justify="left", box=None)
    for heading in headings:
        grid.add_column(cell(heading))
    for row in rows:
        grid.add_row(*map(cell, row))
    return grid


def decimals_for(values: Iterable[float]) -> int:
    """Return with how many decimals a column is shown: 2, or as many as show three digits of the largest below 0.1."""
    largest = max((abs(value) for value in values if math.isfinite(value)), default=0.0)
    return 2 - math.floor(math.log10(largest)) if 0 < largest < 0.1 else 2


def markdown_cell(text: str) -> str:
    """Return ``text`` as one cell of a Markdown table: generated text is not Markdown, HTML, nor a link."""
    text = re.sub(r"([\\`*_\[\]|~$])", r"\\\1", text.replace("&", "&amp;").replace("<", "&lt;"))
    text = re.sub(r"(?i)(https?|ftp|mailto|xmpp):|(www)\.|@", _without_link, text)
    return printable(" ".join(text.split("\n"))).strip()


def _without_link(found: re.Match[str]) -> str:
    """Return an address so that Markdown makes no link of it: its sign as an entity."""
    return f"{found[0][:-1]}&#{ord(found[0][-1])};"


def json_text(value: Any) -> str:
    """Return ``value`` as JSON that standard output can encode: ASCII where it is not Unicode."""
    text = json.dumps(value, indent=2, ensure_ascii=False)
    try:
        text.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except UnicodeEncodeError:
        return json.dumps(value, indent=2)
    return text


def replace_what_cannot_be_encoded() -> None:
    """Let standard output and error replace characters that their encoding lacks, instead of raising."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="replace")
