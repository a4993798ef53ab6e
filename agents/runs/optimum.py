"""How far an agent is from the best possible one, in numbers and without a network.

Text generation is deterministic given the tokens, so the best policy for J = E[R] - beta KL(pi || mu)
is known: pi*(text) is proportional to mu(text) exp(R / beta), and J* = beta log E_mu[exp(R / beta)].
On a real model that expectation is estimated from samples of mu; on a table it is a sum.

    rewards (P, n) of n samples of mu a prompt  ->  estimated_optimum  ->  Optimum, (P,) arrays
    every text of a small environment           ->  TextTree           ->  the same, exactly

The logarithm of a mean is biased low, which would flatter an agent that is measured against it:
estimates are corrected by the jackknife, and come with the number of samples that really count.

Sources: Rafailov et al. 2023, arXiv:2305.18290 (the optimum); Efron and Stein 1981 (the jackknife);
Gao et al. 2022, arXiv:2210.10760 and Beirami et al. 2024, arXiv:2401.01879 (best-of-n).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt

from textgen_env.errors import CapacityError, ConfigError
from textgen_env.policies import Floats, kl_to
from textgen_env.prompts import Prompt
from textgen_env.vector_env import TextGenVectorEnv


class Point(NamedTuple):
    """A policy on the reward-KL plane."""

    reward: float  # mean reward of a text
    kl: float  # nats a text, to mu_k


@dataclass(frozen=True)
class Optimum:
    """The policy that maximises E[R] - beta KL, prompt by prompt; all arrays are (P,)."""

    beta: float
    value: Floats  # J*
    reward: Floats  # E[R] under it
    effective_samples: Floats  # how many equally weighted samples the estimate is worth
    gain_errors: Floats  # standard errors of J* - J(mu), from the jackknife; 0 where it is exact
    largest: float = math.inf  # reward of a sampled text

    @property
    def kl(self) -> Floats:
        """Nats a text, (P,): (E[R] - J*) / beta."""
        return (self.reward - self.value) / self.beta

    @property
    def point(self) -> Point:
        """The mean over prompts, within what there can be: no reward above the largest sampled, and no KL below 0.

        The jackknife may go beyond: where few samples have a high reward, it adds more than they have.
        """
        reward = min(float(self.reward.mean()), self.largest)
        return Point(reward, max(0.0, (reward - float(self.value.mean())) / self.beta))

    @property
    def gain_error(self) -> float:
        """Standard error of the mean over prompts of J* - J(mu), reward units."""
        return float(np.sqrt(np.sum(self.gain_errors**2)) / len(self.gain_errors))


def estimated_optimum(rewards: Floats, beta: float) -> Optimum:
    """Return the optimum, estimated from samples of the language model.

    J* and E[R] are self-normalised estimates, each corrected by the jackknife.

    Args:
        rewards: (P, n) rewards of n >= 2 texts sampled from mu_k for each of P prompts.
        beta: Reward units a nat, above 0.

    Raises:
        ConfigError: fewer than two samples a prompt, or ``beta`` not above 0.
    """
    rewards = np.asarray(rewards, np.float64)
    _check_beta(beta)
    if rewards.ndim != 2 or rewards.shape[1] < 2:
        raise ConfigError(f"rewards must be (prompts, samples) with at least 2 samples, got shape {rewards.shape}")
    count = rewards.shape[1]
    weights = rewards / beta  # logarithms throughout: exp(1 / 0.01) has no place in a float
    floor = rewards.min(axis=-1, keepdims=True)
    with np.errstate(divide="ignore"):
        weighted = weights + np.log(rewards - floor)

    def value(log_sum: Floats, samples: int) -> Floats:
        return beta * (log_sum - math.log(samples))

    total, total_without = _log_sum(weights), _log_sum_without_each(weights)
    values, values_without = value(total, count), value(total_without, count - 1)
    mean_without = (rewards.sum(-1, keepdims=True) - rewards) / (count - 1)
    # One sample alone has no gain, whichever it is: of two, the error of J* stands for that of the gain.
    gain_without = values_without - (mean_without if count > 2 else 0.0)
    reward = np.exp(_log_sum(weighted) - total)
    reward_without = np.exp(_log_sum_without_each(weighted) - total_without)
    return Optimum(
        beta,
        value=np.minimum(_jackknife(values, values_without), rewards.max()),
        reward=_jackknife(reward, reward_without) + floor[:, 0],
        effective_samples=np.exp(2 * total - _log_sum(2 * weights)),
        gain_errors=np.sqrt((count - 1) * np.var(gain_without, axis=-1)),
        largest=float(rewards.max()),
    )


def best_of_n(rewards: Floats, n: int) -> Point:
    """Return the mean reward of the best of ``n`` samples, from (P, N) samples of mu_k, and a bound of its KL.

    The reward is unbiased: the mean over all choices of n samples out of N, without replacement.

    Raises:
        ConfigError: ``n`` is not in 1..N.
    """
    rewards = np.sort(np.asarray(rewards, np.float64), axis=-1)
    count = rewards.shape[-1]
    if not 1 <= n <= count:
        raise ConfigError(f"n must be in 1..{count} (samples a prompt), got {n}")
    # The i-th smallest is the best in as many choices as there are of n - 1 smaller ones.
    weights = np.array([math.comb(i, n - 1) / math.comb(count, n) for i in range(count)])
    return Point(float((rewards @ weights).mean()), math.log(n) - (n - 1) / n)


def share_of_optimal_gain(value: float, reference: float, optimal: float) -> float:
    """Return (J(pi) - J(mu)) / (J* - J(mu)): 0 for the language model, 1 for the best policy; NaN if these tie."""
    gain = optimal - reference
    return (value - reference) / gain if gain > 1e-12 else math.nan


class TextTree:
    """Every text that an environment can generate from one prompt: exact values for small environments.

    Node 0 is the prompt, each node a prefix, each legal candidate an edge; M nodes, k candidates.
    Legal actions, ends and rewards follow the environment's own rules.

    Attributes:
        observations: What an agent sees at the nodes: a dict of (M, ...) arrays.
        prefixes: The generated ids of each node.
        log_mu: (M, k) log mu_k, -inf where masked.
        rewards: (M, k) reward of the step.
        child: (M, k) the node that follows, -1 where the text ends or the action is masked.

    Raises:
        CapacityError: more than ``limit`` prefixes.
    """

    def __init__(self, env: TextGenVectorEnv, prompt: str | Prompt, limit: int = 100_000) -> None:
        self._episodes = env.episodes
        self._row = np.zeros(1, np.int64)
        self._limit = limit
        self._observations: list[dict[str, npt.NDArray[Any]]] = []
        self._log_mu: list[Floats] = []
        self._rewards: list[Floats] = []
        self._child: list[npt.NDArray[np.int64]] = []
        self.prefixes: list[tuple[int, ...]] = []
        self._episodes.begin(self._row, [Prompt(prompt) if isinstance(prompt, str) else prompt])
        self._grow()
        self.observations = {key: np.concatenate([o[key] for o in self._observations]) for key in self._observations[0]}
        self.log_mu = np.stack(self._log_mu)
        self.rewards = np.stack(self._rewards)
        self.child = np.stack(self._child)

    def soft_values(self, beta: float) -> tuple[Floats, Floats]:
        """Return V* (M,) and Q* (M, k) of the optimal policy at ``beta``; Q* is -inf where masked."""
        _check_beta(beta)
        return self._backward(lambda node, q: beta * np.logaddexp.reduce(self.log_mu[node] + q / beta))

    def values(self, policy: Floats) -> tuple[Floats, Floats]:
        """Return the expected reward to come under ``policy`` (M, k): V (M,) and Q (M, k), without KL."""
        return self._backward(lambda node, q: np.sum(policy[node] * np.where(policy[node] > 0, q, 0.0)))

    def optimal_policy(self, beta: float) -> Floats:
        """Return pi* (M, k) = mu_k exp((Q* - V*) / beta)."""
        values, q = self.soft_values(beta)
        return np.exp(self.log_mu + (q - values[:, None]) / beta)

    def point(self, policy: Floats) -> Point:
        """Return where ``policy`` (M, k) is on the reward-KL plane."""
        reach = np.zeros(len(self.child))
        reach[0] = 1.0
        for node, children in enumerate(self.child):  # parents come before their children
            inner = children >= 0
            reach[children[inner]] = reach[node] * policy[node, inner]
        return Point(float(self.values(policy)[0][0]), float(reach @ kl_to(policy, self.log_mu)))

    def optimum(self, beta: float) -> Optimum:
        """Return the optimum at ``beta``, exact, with P = 1."""
        value = self.soft_values(beta)[0][:1]
        reward = self.values(self.optimal_policy(beta))[0][:1]
        return Optimum(beta, value, reward, effective_samples=np.array([math.inf]), gain_errors=np.zeros(1))

    def _grow(self) -> int:
        """Add the node that the row stands at, and all below it; return its number."""
        if len(self.prefixes) == self._limit:
            raise CapacityError(f"more than {self._limit} prefixes; use a shorter text or fewer candidates")
        episodes, row = self._episodes, self._row
        node = len(self.prefixes)
        self.prefixes.append(tuple(episodes.ids_of(0)[1]))
        self._observations.append(episodes.observe(row))
        self._log_mu.append(episodes.log_prior(row)[0][0])
        self._rewards.append(np.zeros(episodes.k))
        self._child.append(np.full(episodes.k, -1))
        here = episodes.save(0)
        for action in np.flatnonzero(np.isfinite(self._log_mu[node])):
            episodes.load(0, here)
            outcome = episodes.act(row, np.array([action]))
            self._rewards[node][action] = outcome.rewards[0]
            if not outcome.ended[0]:
                self._child[node][action] = self._grow()
        return node

    def _backward(self, value: Callable[[int, Floats], Any]) -> tuple[Floats, Floats]:
        values = np.zeros(len(self.child))
        q_values = np.full(self.child.shape, -np.inf)
        for node in reversed(range(len(self.child))):
            to_come = np.where(self.child[node] >= 0, values[self.child[node]], 0.0)
            legal = np.isfinite(self.log_mu[node])
            q_values[node] = np.where(legal, self.rewards[node] + to_come, -np.inf)
            values[node] = value(node, q_values[node])
        return values, q_values


def _check_beta(beta: float) -> None:
    if not beta > 0:
        raise ConfigError(f"beta must be above 0, got {beta}")


def _log_sum(logs: Floats) -> Floats:
    return np.logaddexp.reduce(logs, axis=-1)


def _log_sum_without_each(logs: Floats) -> Floats:
    """Return, for each entry of the last axis, the log-sum of all the others: no difference, so no cancellation."""
    nothing = np.full((*logs.shape[:-1], 1), -np.inf)
    before = np.logaddexp.accumulate(logs, axis=-1)[..., :-1]
    after = np.logaddexp.accumulate(logs[..., ::-1], axis=-1)[..., ::-1][..., 1:]
    return np.logaddexp(np.concatenate([nothing, before], axis=-1), np.concatenate([after, nothing], axis=-1))


def _jackknife(estimate: Floats, without_each: Floats) -> Floats:
    """Return n times the estimate minus (n - 1) times the mean of those without one sample."""
    count = without_each.shape[-1]
    return count * estimate - (count - 1) * without_each.mean(axis=-1)
