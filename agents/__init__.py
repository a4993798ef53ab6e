"""Agents that write: TextDQN, agents that only search, Stable-Baselines3's own, and the classic parts.

>>> from agents import TextDQN

Names load when they are first used, so that ``import agents`` stays quick.
"""

from __future__ import annotations

from importlib import import_module
from typing import Any

_HOMES = {
    "DeepQLearningModel": "agents.classic.model",
    "ExperienceReplay": "agents.classic.model",
    "PrunedTransformerExtractor": "agents.extractor",
    "PrunedTransformerModel": "agents.pruning.model",
    "SB3VecEnv": "agents.sb3_vec",
    "TextDQN": "agents.text_dqn.agent",
    "custom_loss": "agents.classic.loop",
    "train_model": "agents.classic.loop",
}
__all__ = sorted(_HOMES)


def __getattr__(name: str) -> Any:
    if name not in _HOMES:
        raise AttributeError(f"module 'agents' has no attribute {name!r}")
    return getattr(import_module(_HOMES[name]), name)


def __dir__() -> list[str]:
    return [*globals(), *__all__]
