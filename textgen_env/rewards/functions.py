"""Rewards from plain Python functions.

A function is taken to score one completion: ``str -> number``. One that wants the prompt, the
reference, or the whole batch says so with ``@batch_reward`` and gets the ``Generation`` objects:

    @batch_reward
    def answers_the_prompt(generations):
        return [len(set(g.prompt.split()) & set(g.completion.split())) for g in generations]
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from textgen_env.errors import RewardError
from textgen_env.rewards.base import Generation, Reward, check_rewards, shorten

F = TypeVar("F", bound=Callable[[Sequence[Generation]], Any])


def batch_reward(function: F) -> F:
    """Mark ``function`` as one that takes a sequence of ``Generation`` and returns (B,) numbers."""
    try:
        function.takes_generations = True  # type: ignore[attr-defined]
    except AttributeError:  # a method, or a function written in C
        return batch_reward(partial(function))  # type: ignore[return-value]
    return function


class FunctionReward(Reward):
    """A Python function as a reward, under the function's name.

    Range and cost are the function's. A mark (``batch_reward``) tells a function of generations
    from one of a completion.
    """

    def __init__(self, function: Callable[[Any], Any], name: str | None = None) -> None:
        self.function = function
        named = str(name or getattr(function, "__name__", type(function).__name__))
        self.name = "function" if named == "<lambda>" else named
        self._takes_generations = getattr(function, "takes_generations", False)

    def __call__(self, generations: Sequence[Generation]) -> npt.NDArray[np.float64]:
        answer = self.function if self._takes_generations else self._one_by_one
        return check_rewards(self.name, answer, generations)

    def _one_by_one(self, generations: Sequence[Generation]) -> list[Any]:
        return [self._of_completion(generation.completion) for generation in generations]

    def _of_completion(self, completion: str) -> Any:
        try:
            return self.function(completion)
        except Exception as error:
            raise RewardError(
                f"reward {self.name!r} raised {type(error).__name__}: {error} (for the completion "
                f"{shorten(completion)}). A function is given one completion as a string; mark it with "
                "@batch_reward if it wants generations"
            ) from error
