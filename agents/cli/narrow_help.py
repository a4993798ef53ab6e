"""Help for narrow terminals: each name on a line of its own, and below it what it means.

rich puts names and explanations side by side, and cuts the names where that is wider than the terminal.
"""

from __future__ import annotations

import inspect
import textwrap
from collections.abc import Iterator
from typing import Any

from typer.core import TyperCommand, TyperGroup

from agents.terminal import open_console

WIDE = 100
"""Columns from which on names and explanations fit side by side."""

INDENT = "  "


class _WholeHelp:
    """Help that loses nothing on a narrow terminal."""

    def format_help(self, ctx: Any, formatter: Any) -> None:
        """Show the help."""
        width = open_console().width
        if width >= WIDE:
            super().format_help(ctx, formatter)  # type: ignore[misc]  # of typer's class
        else:
            formatter.write(narrow_help(self, ctx, width))


class Command(_WholeHelp, TyperCommand):
    """A command with such help."""


class Group(_WholeHelp, TyperGroup):
    """A group of commands with such help."""


def narrow_help(command: Any, ctx: Any, width: int) -> str:
    """Return the help of a command in ``width`` columns; words that are longer, and the example, stay whole."""
    lines = [*_wrapped(" ".join(command.get_usage(ctx).split()), width, "")]
    for paragraph in inspect.cleandoc(command.help or "").split("\n\n"):
        lines += ["", *_wrapped(paragraph, width, "")]
    sections: dict[str, list[tuple[str, str]]] = {}
    for parameter in command.get_params(ctx):
        usual = "Arguments" if parameter.param_type_name == "argument" else "Options"
        section = getattr(parameter, "rich_help_panel", None) or usual
        sections.setdefault(section, []).append(parameter.get_help_record(ctx))
    if isinstance(command, TyperGroup):
        sections["Commands"] = [(name, _first_paragraph(command.commands[name])) for name in command.list_commands(ctx)]
    for section, records in sections.items():
        lines += ["", f"{section}:"]
        for name, explanation in records:
            lines += [*_wrapped(name, width, INDENT), *_wrapped(explanation, width, 2 * INDENT)]
    lines += ["", command.epilog] if command.epilog else []
    return "\n".join(lines) + "\n"


def _first_paragraph(command: Any) -> str:
    return inspect.cleandoc(command.help or "").split("\n\n")[0]


def _wrapped(text: str, width: int, indent: str) -> Iterator[str]:
    yield from textwrap.wrap(
        text,
        width,
        initial_indent=indent,
        subsequent_indent=indent,
        break_long_words=False,
        break_on_hyphens=False,
    )
