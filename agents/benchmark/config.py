"""The settings of a benchmark, and its cells (task, agent, seed).

BenchmarkConfig  ->  cells, each of which is one run
"""

from __future__ import annotations

import json
import zlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from functools import lru_cache
from importlib import metadata
from typing import Any, NamedTuple

from agents.user_code import identify, is_reference
from agents.zoo import find_agent, name_and_settings
from textgen_env import CONVERSATION_TASKS, DIAGNOSTIC_TASKS
from textgen_env.config import check_at_least, check_seed
from textgen_env.errors import ConfigError
from textgen_env.tasks import TASKS, Bounds, open_task, task_id

QUICK: Mapping[str, Any] = {
    "agents": ("random", "sample", "best_of_n", "dqn", "ppo", "text_dqn"),
    "seeds": (0, 1, 2),
    "steps": 5_000,
    "evaluations": 5,
}
"""Settings of ``textgen benchmark --quick``, on the diagnostic tasks."""


class Cell(NamedTuple):
    """One run."""

    task: str
    agent: str
    seed: int

    @property
    def file(self) -> str:
        """The name of its file: readable, and different for different cells."""
        plain = "".join(c if c.isalnum() or c in "-_.=" else "-" for c in f"{self.task}--{self.agent}--{self.seed}")
        return f"{plain[:100]}--{zlib.crc32(repr(tuple(self)).encode()):08x}.json"


@dataclass(frozen=True)
class BenchmarkConfig:
    """The tasks, agents and seeds to run. Tasks may have sizes, ``"TextGen/Needle-v0:depth=6"``, and agents
    settings, ``"best_of_n:n=4"``.

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
    code: Mapping[str, str] = field(default_factory=dict)  # SHA-256 of the files of the user's own agents
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
            check_seed("a seed", seed)
        for name, least in (("steps", 1), ("envs", 1), ("evaluations", 2), ("texts", 1)):
            check_at_least(name, getattr(self, name), least)
        for task in self.tasks:
            open_task(task)
        for agent in self.agents:
            find_agent(name_and_settings(agent)[0])
        own = {agent: identify(agent).sha256 for agent in self.agents if is_reference(agent)}
        object.__setattr__(self, "code", own)

    @property
    def cells(self) -> list[Cell]:
        """All runs; those of a seed before those of the next, so that a stopped benchmark covers everything."""
        return [Cell(task, agent, seed) for seed in self.seeds for task in self.tasks for agent in self.agents]

    def to_json(self) -> str:
        return json.dumps(asdict(self), indent=2) + "\n"


def task_ids(names: str) -> tuple[str, ...]:
    """Return the tasks of a comma-separated list, or of the group ``diagnostic``, ``language``,
    ``conversation`` or ``all``.

    Raises:
        UnknownName: no such task or group.
    """
    diagnostic = tuple(map(task_id, DIAGNOSTIC_TASKS))
    conversation = tuple(map(task_id, CONVERSATION_TASKS))
    language = tuple(id for id in TASKS if id not in (*diagnostic, *conversation))
    groups = {"diagnostic": diagnostic, "language": language, "conversation": conversation}
    groups["all"] = (*diagnostic, *language, *conversation)
    return groups[names] if names in groups else tuple(map(task_id, names.split(",")))


@lru_cache(maxsize=64)
def known_bounds(spec: str) -> Bounds:
    """Return the bounds of ``open_task(spec)``, computed once a process."""
    return open_task(spec).bounds()


def short_name(task: str) -> str:
    """Return the name of a task for pages: without namespace and version."""
    return task.removeprefix("TextGen/").replace("-v0", "")
