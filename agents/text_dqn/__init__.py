"""TextDQN: soft Q-learning over the candidates of a language model.

Begin at ``learner`` for the algorithm, at ``agent`` for its shell of Stable-Baselines3, which loads
when it is first asked for.
"""

from __future__ import annotations

from typing import Any

__all__ = ["CandidatePolicy", "TextDQN"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module 'agents.text_dqn' has no attribute {name!r}")
    from agents.text_dqn import agent

    return getattr(agent, name)
