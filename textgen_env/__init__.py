"""Text generation as a Gymnasium environment.

>>> import gymnasium as gym, textgen_env
>>> env = gym.make("TextGen-v0")

Importing this package registers the environments and loads neither torch nor a model.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import gymnasium as gym

if TYPE_CHECKING:
    from textgen_env.env import TextGenEnv as TextGenEnv
    from textgen_env.models import load_language_model as load_language_model
    from textgen_env.models.base import LanguageModel as LanguageModel
    from textgen_env.models.base import Proposals as Proposals
    from textgen_env.models.table import TableModel as TableModel
    from textgen_env.prompts import Prompt as Prompt
    from textgen_env.prompts import PromptSource as PromptSource
    from textgen_env.prompts import make_prompts as make_prompts
    from textgen_env.rewards import Generation as Generation
    from textgen_env.rewards import Reward as Reward
    from textgen_env.rewards import make_reward as make_reward
    from textgen_env.tasks import Task as Task
    from textgen_env.tasks import make_task as make_task
    from textgen_env.vector_env import TextGenVectorEnv as TextGenVectorEnv

__version__ = "0.2.0"

_HOMES = {
    "Generation": "rewards",
    "LanguageModel": "models.base",
    "Prompt": "prompts",
    "PromptSource": "prompts",
    "Proposals": "models.base",
    "Reward": "rewards",
    "TableModel": "models.table",
    "Task": "tasks",
    "TextGenEnv": "env",
    "TextGenVectorEnv": "vector_env",
    "load_language_model": "models",
    "make_prompts": "prompts",
    "make_reward": "rewards",
    "make_task": "tasks",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name in _HOMES:
        return getattr(import_module(f"textgen_env.{_HOMES[name]}"), name)
    raise AttributeError(f"module 'textgen_env' has no attribute {name!r}")


def __dir__() -> list[str]:
    return [*globals(), *__all__]


gym.register(
    "TextGen-v0",
    entry_point="textgen_env.env:TextGenEnv",
    vector_entry_point="textgen_env.vector_env:TextGenVectorEnv",
)

DIAGNOSTIC_TASKS = ("Needle", "DelayedKey", "NoisyBandit", "Dyck", "StarGraph", "RandomWalks")
LANGUAGE_TASKS = ("Sentiment", "Keywords", "Readability", "Json", "Couplet", "LeadRouge")

for _name in (*DIAGNOSTIC_TASKS, *LANGUAGE_TASKS):
    gym.register(
        f"TextGen/{_name}-v0",
        entry_point="textgen_env.tasks:make_env",
        vector_entry_point="textgen_env.tasks:make_vec",
        kwargs={"task": f"TextGen/{_name}-v0"},
    )
