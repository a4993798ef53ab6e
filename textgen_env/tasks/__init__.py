"""The suite: sixteen tasks under registered ids, with known bounds."""

from __future__ import annotations

from textgen_env.tasks.base import TASKS, Bounds, Task, make_env, make_task, make_vec, open_task, task_id
from textgen_env.tasks.conversation import AskAhead, GuessNumber, TwentyQuestions, Wordle
from textgen_env.tasks.diagnostic import DelayedKey, Dyck, Needle, NoisyBandit, RandomWalks, StarGraph
from textgen_env.tasks.exact import ExactValues, OptimalAgent, Process, expected_reward, process_of
from textgen_env.tasks.language import TaskRecipe, language_task

__all__ = [
    "TASKS",
    "AskAhead",
    "Bounds",
    "DelayedKey",
    "Dyck",
    "ExactValues",
    "GuessNumber",
    "Needle",
    "NoisyBandit",
    "OptimalAgent",
    "Process",
    "RandomWalks",
    "StarGraph",
    "Task",
    "TaskRecipe",
    "TwentyQuestions",
    "Wordle",
    "expected_reward",
    "language_task",
    "make_env",
    "make_task",
    "make_vec",
    "open_task",
    "process_of",
    "task_id",
]
