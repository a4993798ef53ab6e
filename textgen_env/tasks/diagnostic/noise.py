"""A reward that varies for the same text: NoisyBandit."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from string import ascii_lowercase
from typing import Any, NamedTuple

import numpy as np

from textgen_env.config import check_at_least
from textgen_env.tasks.exact import (
    LETTERS,
    Floats,
    Process,
    check_between,
    check_number,
    diagnostic_task,
    one_hot,
    ranked,
)


class _Pulled(NamedTuple):
    context: int
    arm: int | None


@diagnostic_task("TextGen/NoisyBandit-v0")
@dataclass(frozen=True)
class NoisyBandit(Process):
    """Noise: one token a text, and a reward of which only the mean says which is right.

    ## Description
    The prompt is one of `contexts` machines, the only token an arm. The arms of a machine pay
    1/(arms+1), 2/(arms+1), ... on average, in an order drawn from `seed`. The language model's
    preferences have nothing to do with it.

    The noise is the luck of the episode, a number that comes with the prompt, unseen: the same reset
    and actions give the same reward, and luck is spread so evenly over the prompts that the means are
    exact. Luck favours all arms alike, so a search that reads the reward gains nothing from it.

    ## Action space
    `Discrete(arms)`: the arms, in the language model's order for this machine.

    ## Observation
    `hidden` is the machine, one-hot: (contexts,).

    ## Rewards
    `scale` times (1 - noise) mean + noise draw, where the draw is 1 with probability mean, else 0.

    ## Starting state
    One of `contexts` machines.

    ## Episode end
    After one token.

    ## Arguments
    `arms`, 2 to 26; `contexts`, 1 to 26; `noise`, 0 (the mean itself) to 1 (only 0 and `scale`);
    `scale`, in [0.001, 1]; `seed` of what the arms pay.

    ## Bounds
    Best: scale arms / (arms + 1), at any noise. Ceiling: `scale`.

    ## Reference
    Bandit noise and bandit scale in Osband et al. 2020, arXiv:1908.03568.
    """

    arms: int = 8
    contexts: int = 4
    noise: float = 1.0
    scale: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        check_between("arms", self.arms, 2, LETTERS)
        check_between("contexts", self.contexts, 1, LETTERS)
        check_number("noise", self.noise)
        check_number("scale", self.scale, 0.001)
        check_at_least("seed", self.seed, 0)

    @property
    def tokens(self) -> Sequence[str]:
        return (*ascii_lowercase[: self.arms], *ascii_lowercase[: self.contexts].upper())

    @property
    def prompts(self) -> Sequence[tuple[int, ...]]:
        return [(self.arms + context,) for context in range(self.contexts)]

    @property
    def draws(self) -> Sequence[Mapping[str, Any]]:  # type: ignore[override]
        return [{"luck": (i + 0.5) / (self.arms + 1)} for i in range(self.arms + 1)]

    @property
    def steps(self) -> int:
        return 1

    @property
    def candidates(self) -> int:
        return self.arms

    @cached_property
    def means(self) -> Floats:
        """The mean reward of each arm, unscaled: (contexts, arms)."""
        rng = np.random.default_rng(self.seed)
        return np.stack([(1 + rng.permutation(self.arms)) / (self.arms + 1) for _ in range(self.contexts)])

    def begin(self, prompt: tuple[int, ...]) -> _Pulled:
        return _Pulled(prompt[0] - self.arms, None)

    def follow(self, state: _Pulled, token: int) -> _Pulled:
        return _Pulled(state.context, token)

    def probabilities(self, state: _Pulled) -> Floats:
        return np.append(ranked(0.8, self.arms, self.seed, state.context), np.zeros(self.contexts))

    def features(self, state: _Pulled) -> Floats:
        return one_hot(state.context, self.contexts)

    def worth(self, state: _Pulled) -> float:
        return self.scale * float(self.means[state])

    def paid(self, state: _Pulled, metadata: Mapping[str, Any]) -> float:
        mean = float(self.means[state])
        return self.scale * ((1 - self.noise) * mean + self.noise * (metadata["luck"] < mean))

    @property
    def ceiling(self) -> float:
        return self.scale
