"""Agents that learn nothing: the language model, its likeliest text, and a look one token ahead.

They read everything from the observation, so one instance serves any environment. All have
Stable-Baselines3's ``predict``, and probabilities from which KL is computed exactly.

    observation: logprobs (B, k), action_mask (B, k), ...  ->  probabilities (B, k)  ->  actions (B,)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from textgen_env.errors import ConfigError
from textgen_env.observation import Observation
from textgen_env.policies import Floats, renormalise, sample
from textgen_env.registry import Registry

ONE_STEP_AGENTS: Registry[type[OneStepAgent]] = Registry("agent")
"""Agents that read the observation alone, by name."""


class OneStepAgent(ABC):
    """A policy over the candidates, computed from the observation alone.

    Args:
        seed: Of the random numbers that ``predict`` draws with.
    """

    needs: tuple[str, ...] = ("logprobs", "action_mask")  # keys of the observation

    def __init__(self, seed: int | None = None) -> None:
        self._rng = np.random.default_rng(seed)

    def probabilities(self, observation: Observation) -> Floats:
        """Return (B, k) probabilities, 0 where the action is masked.

        Raises:
            ConfigError: the observation lacks a key (which, and how to get it).
        """
        check_keys_of(observation, self.needs, type(self).__name__)
        log_mu, _ = renormalise(observation["logprobs"], observation["action_mask"])
        return self._policy(log_mu, observation)

    @abstractmethod
    def _policy(self, log_mu: Floats, observation: Observation) -> Floats:
        """Return (B, k) probabilities, given log mu_k with -inf where masked."""

    def predict(
        self,
        observation: Observation,
        state: tuple[Any, ...] | None = None,
        episode_start: npt.NDArray[np.bool_] | None = None,
        deterministic: bool = False,
    ) -> tuple[npt.NDArray[np.int64], tuple[Any, ...] | None]:
        """Return an action a row, (B,), or one action, (), for an observation without a batch axis."""
        return choose(self.probabilities(observation), self._rng, deterministic), state


def check_keys_of(observation: Observation, needed: Sequence[str], agent: str) -> None:
    """Raise ``ConfigError`` unless the observation has all keys that ``agent`` needs; says how to get them."""
    held = tuple(observation) if isinstance(observation, dict) else ()
    missing = [key for key in needed if key not in held]
    if missing:
        raise ConfigError(
            f"{agent} needs the observation key {missing[0]!r}; make the environment with observation='full' or a "
            f"tuple of keys that holds {', '.join(needed)}"
            + (" (and a reward that can score a prefix)" if missing[0] == "candidate_scores" else "")
        )


def choose(policy: Floats, rng: np.random.Generator, deterministic: bool) -> npt.NDArray[np.int64]:
    """Return an action for each distribution of ``policy`` (..., k): the likeliest, or a sample; (...)."""
    rows = policy.reshape(-1, policy.shape[-1])
    actions = rows.argmax(-1) if deterministic else sample(rows, rng.random(len(rows)))
    return actions.reshape(policy.shape[:-1])


@ONE_STEP_AGENTS.register("random")
class RandomAgent(OneStepAgent):
    """Any legal candidate, all alike."""

    def _policy(self, log_mu: Floats, observation: Observation) -> Floats:
        legal = np.isfinite(log_mu)
        return legal / legal.sum(-1, keepdims=True)


@ONE_STEP_AGENTS.register("sample")
class SampleAgent(OneStepAgent):
    """The language model itself: mu_k, its distribution over the legal candidates."""

    def _policy(self, log_mu: Floats, observation: Observation) -> Floats:
        return np.exp(log_mu)


@ONE_STEP_AGENTS.register("greedy")
class GreedyAgent(OneStepAgent):
    """The likeliest legal candidate, always."""

    def _policy(self, log_mu: Floats, observation: Observation) -> Floats:
        return np.asarray(np.arange(log_mu.shape[-1]) == log_mu.argmax(-1)[..., None], np.float64)


@ONE_STEP_AGENTS.register("lookahead")
class LookaheadAgent(OneStepAgent):
    """The language model, tilted by the change of the running score that each candidate causes at once.

    pi is proportional to mu_k exp((candidate_scores - score) / beta): the optimal policy if nothing
    after the next token mattered. It needs a reward that can score a prefix, and is the bar that
    learning has to clear.

    Args:
        beta: Temperature, in reward units a nat, above 0.

    Raises:
        ConfigError: ``beta`` is not above 0.
    """

    needs = ("logprobs", "action_mask", "score", "candidate_scores")

    def __init__(self, beta: float = 0.2, seed: int | None = None) -> None:
        super().__init__(seed)
        if not beta > 0:
            raise ConfigError(f"beta must be above 0, got {beta}")
        self.beta = beta

    def _policy(self, log_mu: Floats, observation: Observation) -> Floats:
        gains = np.asarray(observation["candidate_scores"], np.float64) - observation["score"]
        tilted = log_mu + gains / self.beta
        return np.exp(tilted - np.logaddexp.reduce(tilted, axis=-1)[..., None])
