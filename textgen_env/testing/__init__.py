"""The contract, as functions that anybody's language model, reward or environment can run.

    check_language_model(model)      check_reward(reward)
    check_env(env)                   check_vector_env(vec, single)

Each plays with its object for a moment and returns nothing if every promise holds; otherwise it
raises ``ContractError``, which names the broken promise and the object. Errors of the object itself
come through as they are. They are meant for a test:

    def test_my_reward_keeps_the_contract():
        check_reward(MyReward())
"""

from __future__ import annotations

from textgen_env.testing.env import check_env, check_vector_env
from textgen_env.testing.model import check_language_model
from textgen_env.testing.reward import GENERATIONS, TEXTS, check_reward

__all__ = ["GENERATIONS", "TEXTS", "check_env", "check_language_model", "check_reward", "check_vector_env"]
