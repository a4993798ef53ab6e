"""``textgen list``: the names that the other commands take."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from inspect import signature
from typing import Annotated

import typer

from agents.tables import show_table
from agents.terminal import open_console, say, table_of
from textgen_env.registry import unknown_name

Described = Iterator[tuple[str, str]]
"""Pairs (name, description)."""


def list_command(
    what: Annotated[
        str | None, typer.Argument(help="agents, models, prompts, pruning, rewards or tasks; all unless said.")
    ] = None,
) -> None:
    """List the names that the other commands take."""
    if what is not None and what not in KINDS:
        raise unknown_name("list", what, KINDS)
    console = open_console()
    for kind in KINDS if what is None else (what,):
        show_table(console, table_of(("name", "what it is"), KINDS[kind](), kind))
        say(console, "")


def _agents() -> Described:
    from agents.baselines.one_step import ONE_STEP_AGENTS
    from agents.baselines.planning import PLANNING_AGENTS
    from agents.zoo import AGENTS

    yield from ((name, _first_line(AGENTS[name])) for name in AGENTS)
    for found in (ONE_STEP_AGENTS, PLANNING_AGENTS):
        for name, agent in found.items():
            yield name, _first_line(agent) + ("" if hasattr(agent, "learn") else " (no learning)")


def _models() -> Described:
    from textgen_env.models import MODEL_NAMES

    yield from MODEL_NAMES.items()


def _prompts() -> Described:
    from textgen_env.openings import OPENINGS
    from textgen_env.prompts import make_prompts

    yield "openings", f"all {len(make_prompts('openings'))} openings in the box"
    for topic in OPENINGS:
        yield topic, f"{len(make_prompts(topic))} of them, such as: {make_prompts(topic)[0].text}"


def _pruning() -> Described:
    from agents.pruning.methods import METHODS

    yield from ((name, _first_line(METHODS[name])) for name in METHODS)


def _rewards() -> Described:
    from textgen_env.rewards import REWARDS

    yield from ((name, _first_line(REWARDS[name])) for name in sorted(REWARDS))


def _tasks() -> Described:
    from textgen_env.tasks import TASKS

    for id in TASKS:  # not made: a task may need an optional package
        sizes = ", ".join(f"{size.name}={size.default}" for size in signature(TASKS[id]).parameters.values())
        yield id, f"{_first_line(TASKS[id])} ({sizes})"


def _first_line(documented: object) -> str:
    return (documented.__doc__ or "").strip().splitlines()[0]


KINDS: dict[str, Callable[[], Described]] = {
    "agents": _agents,
    "models": _models,
    "prompts": _prompts,
    "pruning": _pruning,
    "rewards": _rewards,
    "tasks": _tasks,
}
