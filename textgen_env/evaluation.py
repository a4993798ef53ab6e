"""The measures of an agent's texts: reward with an interval, KL, likelihood, variety.

Only whole episodes count, and their number is fixed before the first: a loop that stops after a
number of steps would favour short texts. Prompts take turns, so each gets the same number. Text ``i``
is drawn with the ``i``-th stream of random numbers, for any agent and any number of rows, so two
agents are compared on the same luck.

    P prompts, n texts each  ->  roll_out  ->  Evaluation: (P n,) arrays, text i is of prompt i % P

The KL is to mu_k: the language model's distribution renormalised over the legal candidates, from
which the agent chooses. At each step the KL is exact over the
candidates; along the text it is summed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from textgen_env.episode import Episodes, Outcome
from textgen_env.errors import ConfigError
from textgen_env.models.base import Rows
from textgen_env.observation import flatten
from textgen_env.policies import Agent, Floats, kl_to, sample
from textgen_env.prompts import ListPrompts, Prompt, PromptSource, as_prompt
from textgen_env.rewards.base import Generation, Turn
from textgen_env.rewards.lexical import RepetitionReward, distinct_share
from textgen_env.vector_env import TextGenVectorEnv

DISTINCT_TEXTS = 256
"""Distinct-n falls with the number of texts, so it is always taken over the first so many."""


@dataclass(frozen=True)
class Evaluation:
    """N = P n finished texts and their measures; arrays are (N,), text ``i`` is of prompt ``i % P``."""

    prompts: tuple[str, ...]
    completions: tuple[str, ...]
    num_prompts: int  # P
    rewards: Floats  # reward of the text
    parts: Mapping[str, Floats]  # the named parts it is made of
    lengths: npt.NDArray[np.int64]  # tokens
    logprobs: Floats  # nats, of the text under the language model (whole vocabulary)
    kl: Floats | None  # nats a text, to mu_k; None where the agent has no probabilities
    outside: Floats  # nats a text, minus log of the candidates' mass: full-vocabulary KL is kl + outside
    turns: tuple[tuple[Turn, ...], ...] = ()  # of each text, where a partner answered

    @property
    def reward(self) -> float:
        return float(self.rewards.mean())

    @property
    def mean_kl(self) -> float | None:
        return None if self.kl is None else float(self.kl.mean())

    @property
    def likelihood(self) -> float:
        """Log-likelihood a token under the language model, nats."""
        return float(self.logprobs.sum() / self.lengths.sum())

    @property
    def repetition(self) -> float:
        """Mean share of a text's word 3-grams that have occurred in it before."""
        return float(RepetitionReward()([Generation("", completion) for completion in self.completions]).mean())

    def by_prompt(self, values: Floats) -> Floats:
        """Return (N,) values as (P, n)."""
        return values.reshape(-1, self.num_prompts).T

    def values(self, beta: float) -> Floats | None:
        """Return R - beta KL of each text, (N,), whose mean estimates J; None without a KL."""
        return None if self.kl is None else self.rewards - beta * self.kl

    def distinct(self, n: int) -> float:
        """Return different word n-grams over all of them, in the first ``DISTINCT_TEXTS`` texts together."""
        return distinct_share(self.completions[:DISTINCT_TEXTS], n)

    def figures(self) -> dict[str, Any]:
        """Return everything but the texts as plain numbers: rewards, nats, tokens, shares."""
        low, high = bootstrap_interval(self.by_prompt(self.rewards))
        return {
            "texts": len(self.rewards),
            "prompts": self.num_prompts,
            "reward": self.reward,
            "reward_low": low,
            "reward_high": high,
            "parts": {name: float(values.mean()) for name, values in self.parts.items()},
            "kl": self.mean_kl,
            "kl_full": None if self.kl is None else float((self.kl + self.outside).mean()),
            "likelihood": self.likelihood,
            **{f"distinct_{n}": self.distinct(n) for n in (1, 2, 3)},
            "repetition": self.repetition,
            "length": float(self.lengths.mean()),
        }


def evaluate(
    agent: Agent,
    env: TextGenVectorEnv,
    episodes: int,
    seed: int,
    prompts: PromptSource | Sequence[Prompt | str] | None = None,
    deterministic: bool = False,
    watch: Callable[[int, int], None] = lambda ended, count: None,
) -> Evaluation:
    """Let ``agent`` write the same number of texts for each prompt, and measure them.

    Args:
        agent: With ``probabilities`` the texts are drawn from them here, and the KL is known;
            otherwise its ``predict`` draws, from its own random numbers.
        env: Used, and left without live episodes: reset it before going on.
        episodes: Texts; rounded up to a whole number a prompt. With more prompts than
            ``episodes``, so many of them are drawn.
        seed: Fixes the random numbers of the texts and the prompts drawn.
        prompts: Instead of the environment's own.
        deterministic: Ask ``predict(deterministic=True)``; its KL is that of a point mass.
        watch: Called after each step with two numbers: how many texts have ended, and how many there are.

    Raises:
        ConfigError: ``episodes`` below 1, or probabilities that are none.
    """
    if episodes < 1:
        raise ConfigError(f"episodes must be at least 1, got {episodes}")
    chosen = choose_prompts(env.episodes.prompts if prompts is None else prompts, episodes, seed)
    rounds = math.ceil(episodes / len(chosen))
    return roll_out(agent, env, list(chosen) * rounds, seed, deterministic, len(chosen), watch)


def choose_prompts(source: PromptSource | Sequence[Prompt | str], most: int, seed: int) -> PromptSource:
    """Return all prompts of ``source``, or ``most`` of them drawn without replacement, in their order."""
    count = len(source)
    indices: Sequence[int] = range(count)
    if count > most:
        indices = sorted(np.random.default_rng(seed).choice(count, most, replace=False).tolist())
    return ListPrompts([as_prompt(source[index], f"prompt {index}") for index in indices])


def roll_out(
    agent: Agent,
    env: TextGenVectorEnv,
    prompts: Sequence[Prompt | str],
    seed: int,
    deterministic: bool = False,
    num_prompts: int | None = None,
    watch: Callable[[int, int], None] = lambda ended, count: None,
) -> Evaluation:
    """Return one finished text for each entry of ``prompts``; see ``evaluate``.

    Args:
        num_prompts: The period of ``prompts``; all different if not given.
        watch: See ``evaluate``.
    """
    texts = [as_prompt(prompt, f"prompt {index}") for index, prompt in enumerate(prompts)]
    count = len(texts)
    rewards, kl, outside = np.zeros((3, count))
    lengths = np.zeros(count, np.int64)
    infos: list[dict[str, Any]] = [{} for _ in range(count)]
    ended = 0
    for step in play(agent, env, texts, seed, deterministic):
        rewards[step.texts] += step.outcome.rewards
        kl[step.texts] += step.kl
        outside[step.texts] -= step.log_mass
        lengths[step.texts] += 1
        for j in np.flatnonzero(step.outcome.ended):
            infos[step.texts[j]] = step.outcome.infos[j]
        ended += int(step.outcome.ended.sum())
        watch(ended, count)
    names = list(infos[0]["reward_parts"]) if infos else []
    return Evaluation(
        prompts=tuple(prompt.text for prompt in texts),
        completions=tuple(info["completion"] for info in infos),
        num_prompts=count if num_prompts is None else num_prompts,
        rewards=rewards,
        parts={name: np.array([info["reward_parts"][name] for info in infos]) for name in names},
        lengths=lengths,
        logprobs=np.array([info["logprob"] for info in infos], np.float64),
        kl=None if np.isnan(kl).any() else kl,
        outside=outside,
        turns=tuple(info["turns"] for info in infos if "turns" in info),
    )


@dataclass(frozen=True)
class Step:
    """One step of the B texts that were being written."""

    rows: Rows  # (B,) the environment's rows that write them
    texts: npt.NDArray[np.int64]  # (B,) indices into the prompts
    observation: Any  # the agent's, (B, ...)
    legal: npt.NDArray[np.bool_]  # (B, k)
    behaviour: Floats  # (B,) log-probability of each action under the agent, nats; NaN where unknown
    kl: Floats  # (B,) of the agent's distribution to mu_k, nats; NaN where unknown
    log_mass: Floats  # (B,) log of the candidates' mass
    outcome: Outcome


def play(
    agent: Agent, env: TextGenVectorEnv, prompts: Sequence[Prompt], seed: int, deterministic: bool = False
) -> Iterator[Step]:
    """Write one text for each entry of ``prompts``, as many at a time as ``env`` has rows.

    At a step, the rows whose text has ended can still be observed; the next step reuses them.
    """
    episodes, count = env.episodes, len(prompts)
    numbers = np.random.default_rng(seed).random((count, episodes.config.max_new_tokens))
    started = min(env.num_envs, count)
    rows = np.arange(started)
    texts = np.arange(started)  # which text each row is writing
    episodes.begin(rows, prompts[:started])
    while rows.size:
        step = _step(agent, episodes, rows, texts, numbers, deterministic)
        yield step
        goes_on = ~step.outcome.ended
        restart = np.flatnonzero(step.outcome.ended)[: count - started]
        if restart.size:
            texts = texts.copy()
            texts[restart] = np.arange(started, started + restart.size)
            started += restart.size
            goes_on[restart] = True
            episodes.begin(rows[restart], [prompts[i] for i in texts[restart]])
        rows, texts = rows[goes_on], texts[goes_on]


def _step(
    agent: Agent, episodes: Episodes, rows: Rows, texts: npt.NDArray[np.int64], numbers: Floats, deterministic: bool
) -> Step:
    """Let ``agent`` act once in ``rows``, which write ``texts``; ``numbers`` (texts, steps) are its luck."""
    observation = flatten(episodes.config, episodes.observe(rows))
    legal, (log_mu, log_mass) = episodes.legal(rows), episodes.log_prior(rows)
    probabilities = None if deterministic else getattr(agent, "probabilities", None)
    if probabilities is None:
        actions = np.asarray(agent.predict(observation, deterministic=deterministic)[0]).reshape(rows.shape)
        outcome = episodes.act(rows, actions)
        # Of a point mass on the played action, which may be a mapped one.
        behaviour = np.full(rows.shape, 0.0 if deterministic else np.nan)
        kl = behaviour - np.take_along_axis(log_mu, outcome.actions[:, None], -1)[:, 0]
    else:
        policy = _checked_policy(probabilities(observation), legal)
        actions = sample(policy, numbers[texts, episodes.steps(rows)])
        outcome = episodes.act(rows, actions)
        behaviour = np.log(policy[np.arange(rows.size), actions])
        kl = kl_to(policy, log_mu)
    return Step(rows, texts, observation, legal, behaviour, kl, log_mass, outcome)


def bootstrap_interval(
    values: Floats, confidence: float = 0.95, resamples: int = 1000, seed: int = 0
) -> tuple[float, float]:
    """Return a percentile bootstrap interval for the mean of ``values`` (P, n).

    Texts are redrawn within each prompt, so the interval speaks of these prompts. With one text a
    prompt, prompts are redrawn. Redrawn from n texts, a mean varies by (n - 1) / n of what it should: that is mended.
    """
    if values.shape[1] == 1:
        values = values.T
    count, mean = values.shape[1], float(values.mean())
    rng = np.random.default_rng(seed)
    means = np.zeros(resamples)
    for row in values:
        means += row[rng.integers(row.size, size=(resamples, row.size))].mean(axis=-1)
    deviations = np.quantile(means / len(values) - mean, [(1 - confidence) / 2, (1 + confidence) / 2])
    low, high = mean + deviations * np.sqrt(count / max(1, count - 1))
    return float(low), float(high)


def _checked_policy(policy: Any, legal: npt.NDArray[np.bool_]) -> Floats:
    policy = np.asarray(policy, np.float64)
    if policy.shape != legal.shape:
        raise ConfigError(f"the agent's probabilities must have shape {legal.shape}, got {policy.shape}")
    wrong = (policy < 0).any(-1) | (policy * ~legal).any(-1) | ~(np.abs(policy.sum(-1) - 1) < 1e-3)
    if wrong.any():
        raise ConfigError(
            "the agent's probabilities must be at least 0, 0 where action_mask is 0, and sum to 1; "
            f"got {policy[wrong][0].tolist()} for the mask {legal[wrong][0].astype(int).tolist()}"
        )
    return policy
