"""How wrong Q is among the candidates of a state, and how much of that is noise.

At states of held-out prompts each candidate is tried in forked rollouts of the language model:

    Q*(s, a) = beta log mean exp(R / beta),  centred under mu,  beside the agent's Q, centred alike.

J* - J(pi) is about the sum over steps of the squared error, weighted by the policy, over 2 beta. The
rollouts have noise of their own, which is estimated from two halves and taken off.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from agents.text_dqn.agent import TextDQN
from benchmarks.suite import BETA, Cell, Suite
from textgen_env.episode import Episodes
from textgen_env.policies import Floats, sample

ROLLOUTS = 32
"""Of each candidate; half of them for each of two estimates."""


def diagnose(suite: Suite, cell: Cell, states: int, **settings: Any) -> dict[str, float]:
    """Train an agent on a cell, and return the errors of its Q at ``states`` states, reward units.

    ``rms`` is the centred error a step without the rollouts' noise, ``rollouts`` that noise, ``heads``
    the part of the error that differs between the agent's heads, ``signal`` the size of Q* itself.
    """
    agent, _ = suite.learned(cell, settings)
    stick = suite.yardstick(cell)
    env = suite.env(cell, "test", 16 * ROLLOUTS)
    rng = np.random.default_rng(cell.seed)
    sums = np.zeros(4)
    for i in range(states):
        observation, log_mu = _visited(env.episodes, stick.test[i % len(stick.test)], rng)
        mu = np.exp(log_mu)
        halves = _rolled_out(env.episodes, rng)  # (2, k)
        heads = _of_heads(agent, observation)  # (heads, k)
        halves, heads = (values - (values * mu).sum(-1, keepdims=True) for values in (halves, heads))
        errors = [heads.mean(0) - half for half in halves]
        between = heads.var(0, ddof=1) / len(heads) if len(heads) > 1 else np.zeros_like(mu)
        noise = (halves[0] - halves[1]) ** 2 / 2
        sums += [(mu * x).sum() for x in (errors[0] * errors[1], noise, between, halves[0] * halves[1])]
    rms, rollouts, between, signal = np.sqrt(np.maximum(sums / states, 0.0))
    return {"rms": rms, "rollouts": rollouts, "heads": between, "signal": signal, "held_out": agent.learner.scorer_r2}


def _visited(episodes: Episodes, prompt: Any, rng: np.random.Generator) -> tuple[dict[str, Any], Floats]:
    """Put all rows at one state that the language model reaches; return it (1, ...) and log mu, (k,)."""
    first = np.zeros(1, np.int64)
    episodes.begin(first, [prompt])
    for _ in range(int(rng.integers(episodes.config.max_new_tokens - 1))):
        episodes.observe(first)
        log_mu = episodes.log_prior(first)[0]
        if episodes.act(first, sample(np.exp(log_mu), rng.random(1))).ended[0]:
            episodes.begin(first, [prompt])
    observation, log_mu = episodes.observe(first), episodes.log_prior(first)[0][0]
    others = np.arange(1, episodes.rows)
    episodes.fork(np.zeros_like(others), others)
    return observation, log_mu


def _rolled_out(episodes: Episodes, rng: np.random.Generator) -> Floats:
    """Return two estimates of Q* of each candidate, (2, k): the rows play one each, and the language model goes on."""
    rows = np.arange(episodes.rows)
    legal = episodes.legal(rows[:1])[0]
    actions = np.repeat(np.where(legal, np.arange(episodes.k), legal.argmax()), ROLLOUTS)
    episodes.observe(rows)
    rewards = np.zeros(len(rows))
    while rows.size:
        outcome = episodes.act(rows, actions)
        rewards[rows] += outcome.rewards
        rows = rows[~outcome.ended]
        if rows.size:
            episodes.observe(rows)
            actions = sample(np.exp(episodes.log_prior(rows)[0]), rng.random(len(rows)))
    tilted = rewards.reshape(episodes.k, 2, -1) / BETA
    values: Floats = BETA * (np.logaddexp.reduce(tilted, -1) - np.log(tilted.shape[-1]))
    return values.T


def _of_heads(agent: TextDQN, observation: dict[str, Any]) -> Floats:
    """Return Q of a state by each head, (heads, k)."""
    network = agent.q_net_target
    tensors, _ = agent.policy.obs_to_tensor(observation)
    with torch.inference_mode():
        scored = network.scored(tensors)  # type: ignore[arg-type]
        found: Floats = network.head_values(scored).squeeze(1).double().numpy()
    return found
