"""Text generation as a Gymnasium environment.

>>> import gymnasium as gym, textgen_env
>>> env = gym.make("TextGen-v0")

Importing this package registers the environments and loads neither torch nor a model.
"""

from __future__ import annotations

import gymnasium as gym

from textgen_env.env import TextGenEnv
from textgen_env.models import load_language_model
from textgen_env.models.base import LanguageModel, Proposals
from textgen_env.models.table import TableModel
from textgen_env.prompts import Prompt, PromptSource, make_prompts
from textgen_env.rewards import Generation, Reward, make_reward
from textgen_env.tasks import Task, make_task
from textgen_env.vector_env import TextGenVectorEnv

__version__ = "0.2.0"

__all__ = [
    "Generation",
    "LanguageModel",
    "Prompt",
    "PromptSource",
    "Proposals",
    "Reward",
    "TableModel",
    "Task",
    "TextGenEnv",
    "TextGenVectorEnv",
    "load_language_model",
    "make_prompts",
    "make_reward",
    "make_task",
]

gym.register(
    "TextGen-v0",
    entry_point="textgen_env.env:TextGenEnv",
    vector_entry_point="textgen_env.vector_env:TextGenVectorEnv",
)

DIAGNOSTIC_TASKS = ("Needle", "DelayedKey", "NoisyBandit", "Dyck", "StarGraph", "RandomWalks")
LANGUAGE_TASKS = ("Sentiment", "Keywords", "Readability", "Json", "Couplet", "LeadRouge")

CONVERSATION_TASKS = ("GuessNumber", "Wordle", "TwentyQuestions", "AskAhead")

for _name in (*DIAGNOSTIC_TASKS, *LANGUAGE_TASKS, *CONVERSATION_TASKS):
    gym.register(
        f"TextGen/{_name}-v0",
        entry_point="textgen_env.tasks:make_env",
        vector_entry_point="textgen_env.tasks:make_vec",
        kwargs={"task": f"TextGen/{_name}-v0"},
    )
