"""A task: a language model, prompts, a reward, a budget, and the bounds of its mean reward.

    make_task("TextGen/Needle-v0", depth=6)  ->  Task  ->  make_vec(64), test_prompts, bounds()
    gym.make("TextGen/Needle-v0", depth=6, observation="full")  ->  its environment
    "Needle:depth=6"  ->  task_id  ->  "TextGen/Needle-v0:depth=6"  ->  open_task  ->  Task

Tasks are registered in ``TASKS`` and, under the same ids, with Gymnasium. Every keyword of a task
(length, depth, noise ...) is a size, so a sweep of difficulty is one line.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields
from functools import lru_cache
from typing import Any

import numpy as np
import numpy.typing as npt

from textgen_env.config import EnvConfig
from textgen_env.env import TextGenEnv
from textgen_env.errors import ConfigError
from textgen_env.prompts import PromptSource
from textgen_env.registry import Registry, split_settings, unknown_name
from textgen_env.rewards.base import Reward
from textgen_env.spec import unwrap
from textgen_env.vector_env import TextGenVectorEnv


@dataclass(frozen=True)
class Bounds:
    """Mean reward of a text, over the test prompts.

    Raises:
        ConfigError: the best is not above the language model, or above the ceiling.
    """

    language_model: float  # mu_k sampled: the model's own choice among the candidates
    best: float  # the best found within the candidates; the exact optimum on diagnostic tasks
    ceiling: float  # no text can exceed it

    def __post_init__(self) -> None:
        if not self.language_model < self.best <= self.ceiling + 1e-9:
            raise ConfigError(
                f"bounds must rise from the language model to the best to the ceiling, got {self.language_model}, "
                f"{self.best}, {self.ceiling}"
            )

    def normalise(self, reward: npt.ArrayLike) -> Any:
        """Return ``reward``, a number or an array, on a scale where the language model is 0 and the best 1."""
        return (np.asarray(reward, np.float64) - self.language_model) / (self.best - self.language_model)


@dataclass(frozen=True)
class Task:
    """One problem, the same for every agent.

    The bounds are those of the task's own ``settings``. How an agent sees it (``observation``,
    ``reward_at``, ``on_illegal``, ``render_mode``) can be set freely; with other lengths or
    candidates it is another problem, of which they say nothing.
    """

    id: str
    summary: str
    sizes: Mapping[str, Any]  # arguments of ``make_task``, defaults included
    model: Any  # see textgen_env.models.load_language_model
    train_prompts: PromptSource
    test_prompts: PromptSource
    reward: Reward
    settings: Mapping[str, Any]  # fields of EnvConfig
    known_bounds: Callable[[], Bounds] = field(repr=False)
    partner: Any = None  # see textgen_env.conversation.make_partner

    def make_env(self, **settings: Any) -> TextGenEnv:
        """Return the environment on the training prompts; ``settings`` go over the task's own."""
        return TextGenEnv(self.model, self.train_prompts, self.reward, self.partner, **{**self.settings, **settings})

    def make_vec(self, num_envs: int, **settings: Any) -> TextGenVectorEnv:
        """Return ``num_envs`` texts at a time on the training prompts; ``settings`` go over the task's own."""
        parts = (self.model, self.train_prompts, self.reward, self.partner)
        return TextGenVectorEnv(num_envs, *parts, **{**self.settings, **settings})

    def bounds(self) -> Bounds:
        """Return the mean rewards of the language model and of the best texts found, and the ceiling.

        Raises:
            ConfigError: a language task at sizes that nobody has searched; says how to.
        """
        return self.known_bounds()


TASKS: Registry[Callable[..., Task]] = Registry("task")
"""Tasks by id: factories that take the task's sizes as keywords."""


def make_task(id: str, **sizes: Any) -> Task:
    """Return the task ``id`` at these sizes.

    Raises:
        UnknownName: no such task, or no such size (with a suggestion).
        ConfigError: a size out of its range.

    >>> make_task("TextGen/Needle-v0", depth=4).bounds().best
    1.0
    """
    factory = TASKS[id]
    known = inspect.signature(factory).parameters
    for name in sizes:
        if name not in known:
            raise unknown_name(f"size of {id}", name, known)
    return factory(**sizes)


def task_id(spec: str) -> str:
    """Return a task's id with its sizes, given that or its short name: ``Needle:depth=6``.

    Raises:
        UnknownName: no such task.
    """
    name, *sizes = spec.split(":")
    known = {id.removeprefix("TextGen/").removesuffix("-v0"): id for id in TASKS}
    if name not in TASKS and name not in known:
        raise unknown_name("task", name, known)
    return ":".join([known.get(name, name), *sizes])


@lru_cache(maxsize=64)
def open_task(spec: str) -> Task:
    """Return the task that ``task_id`` names.

    Raises:
        UnknownName: no such task or size.
        ConfigError: a size that is not written ``name=value``, or out of its range.
    """
    id, given = split_settings(spec, "task")
    return make_task(id, **given)


def _task_and_settings(id: str, given: Mapping[str, Any], also: tuple[str, ...] = ()) -> tuple[Task, dict[str, Any]]:
    """Return the task at the sizes in ``given``, and the settings of its environment, the rest of it."""
    sizes = inspect.signature(TASKS[id]).parameters
    given = {name: unwrap(value) for name, value in given.items()}
    settings = [f.name for f in fields(EnvConfig)]
    for name in given:
        if name not in (*sizes, *settings, *also):
            raise unknown_name(f"argument of {id}", name, [*sizes, *settings])
    task = make_task(id, **{name: value for name, value in given.items() if name in sizes})
    return task, {name: value for name, value in given.items() if name not in sizes}


def make_env(task: str, **given: Any) -> TextGenEnv:
    """Return a task's environment: the entry point of ``gym.make("TextGen/...")``."""
    made, settings = _task_and_settings(task, given)
    return made.make_env(**settings)


def make_vec(num_envs: int, task: str, **given: Any) -> TextGenVectorEnv:
    """Return a task's vector environment: the entry point of ``gym.make_vec("TextGen/...")``."""
    made, settings = _task_and_settings(task, given, ("autoreset_mode",))
    return made.make_vec(num_envs, **settings)
