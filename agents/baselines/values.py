"""Planning with values: where Q comes from, and rows that are tilted by it.

A value source says what is still to come after each candidate. The policy is the language model,
tilted by it, and the worth of a prefix is a soft value:

    observation  ->  ValueSource.q: Q (B, k)  ->  log pi = log mu + (Q - V) / beta (B, k)
                                              ->  V = beta log sum_a mu exp(Q / beta) (B,)

Three sources: a trained agent, a look one token ahead, and 0, under which pi is the language model.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt

from agents.baselines.planning import ROWS, Ids, TextPlanner
from agents.text_dqn.task import check_sizes
from textgen_env.config import check_at_least
from textgen_env.episode import Episodes
from textgen_env.errors import ConfigError, PromptError
from textgen_env.models.base import Rows
from textgen_env.policies import Floats
from textgen_env.prompts import Prompt, as_prompt
from textgen_env.vector_env import TextGenVectorEnv

DEFAULT_BETA = 0.1
"""Reward units a nat, where neither the user nor the value source says."""

VALUE_SOURCES = ("zero", "lookahead")
"""Value sources by name; a trained agent is given as itself."""


@runtime_checkable
class ValueSource(Protocol):
    """Says what each candidate is worth.

    Attributes:
        needs: Keys of the observation that it reads. With ``score`` among them Q is what a text
            gains from here on; without, it is the reward of the whole text.
    """

    @property
    def needs(self) -> tuple[str, ...]: ...

    def q(self, observation: Mapping[str, npt.NDArray[Any]]) -> Floats:
        """Return Q, (B, k), in reward units. Masked candidates may have any finite number."""


class ZeroValues:
    """Q = 0: the policy is the language model."""

    needs = ("logprobs",)

    def q(self, observation: Mapping[str, npt.NDArray[Any]]) -> Floats:
        return np.zeros(observation["logprobs"].shape)


class LookaheadValues:
    """Q is the change of the running score that a candidate causes at once."""

    needs = ("score", "candidate_scores")

    def q(self, observation: Mapping[str, npt.NDArray[Any]]) -> Floats:
        return np.asarray(observation["candidate_scores"], np.float64) - observation["score"]


class LearnedValues:
    """Q of a ``TextDQN``, with the trade that it was trained for, and the temperature that it acts at."""

    def __init__(self, agent: Any, env: TextGenVectorEnv) -> None:
        self._agent = agent
        unread = () if agent.learner.network.reads_given_scores else ("score", "candidate_scores")
        self.needs = tuple(key for key in agent.observation_space.spaces if key not in unread)
        trained = {"top_k": int(agent.action_space.n), "max_new_tokens": agent.learner.network.max_new_tokens}
        check_sizes(trained, {"top_k": env.episodes.k, "max_new_tokens": env.max_new_tokens})

    @property
    def beta(self) -> float:
        """The trade E[R] - beta KL that Q was trained for, reward units a nat."""
        return float(self._agent.target_beta)

    @property
    def temperature(self) -> float:
        """Temperature that the agent acts at, reward units a nat: rows draw from its own policy."""
        return float(self._agent.beta)

    def q(self, observation: Mapping[str, npt.NDArray[Any]]) -> Floats:
        values: Floats = self._agent.learner.q(observation)
        return values


def value_source(values: Any, env: TextGenVectorEnv) -> ValueSource:
    """Return the value source that ``values`` means in ``env``.

    Args:
        values: A ``TextDQN``, one of ``VALUE_SOURCES``, or an object with ``needs`` and ``q``. None:
            lookahead where the reward can score a prefix, else zero.

    Raises:
        ConfigError: something else, or an agent that was trained with other sizes.
    """
    if values is None:
        can_look = env.episodes.reward.running() is not None and env.episodes.config.top_k is not None
        values = "lookahead" if can_look else "zero"
    if values == "zero":
        return ZeroValues()
    if values == "lookahead":
        return LookaheadValues()
    if hasattr(getattr(values, "learner", None), "q"):
        return LearnedValues(values, env)
    if not isinstance(values, ValueSource):
        raise ConfigError(
            f"values must come from a TextDQN, one of {', '.join(VALUE_SOURCES)}, or an object with needs and q, got "
            f"{(values if isinstance(values, str) else type(values).__name__)!r}"
        )
    return values


@dataclass(frozen=True)
class Tilted:
    """What a value source says of B prefixes."""

    log_pi: Floats  # (B, k) nats, -inf where masked
    q: Floats  # (B, k) reward units, 0 where masked
    value: Floats  # (B,) V, reward units
    score: Floats  # (B,) the running score where Q counts from it, else 0

    @property
    def worth(self) -> Floats:
        """The soft value of the whole text, (B,): what it has gained, and what is to come."""
        return self.score + self.value


def tilt(log_mu: Floats, q: Floats, beta: float) -> tuple[Floats, Floats]:
    """Return log pi (B, k), pi proportional to mu exp(Q / beta), and V (B,), reward units.

    Raises:
        ConfigError: Q / beta is not finite.
    """
    tilted = log_mu + q / beta
    log_sum = np.logaddexp.reduce(tilted, axis=-1) if np.isfinite(q).all() else np.full(1, np.nan)
    if not np.isfinite(log_sum).all():
        raise ConfigError(f"Q / beta is not finite at beta={beta:g}: raise beta, or look at where the values come from")
    return tilted - log_sum[:, None], beta * log_sum


def beginnings(
    prompts: Sequence[str | Prompt], so_far: Sequence[Sequence[int]] | None = None
) -> list[tuple[Prompt, Ids]]:
    """Return the texts that begin with ``prompts`` and go on with the token ids ``so_far``; None: with nothing yet.

    Raises:
        PromptError: a prompt that is none, or a single text instead of several.
        ConfigError: more or fewer texts so far than prompts.
    """
    if isinstance(prompts, str):
        raise PromptError(f"prompts must be several, got one text: give [{prompts!r}]")
    if so_far is None:
        so_far = [()] * len(prompts)
    if len(so_far) != len(prompts):
        raise ConfigError(f"so_far must have the ids of a text for each of {len(prompts)} prompts, got {len(so_far)}")
    return [
        (as_prompt(prompt, f"prompts[{i}]"), tuple(ids))
        for i, (prompt, ids) in enumerate(zip(prompts, so_far, strict=True))
    ]


class ValuePlanner(TextPlanner):
    """Writes n rows for a text, tilted by values.

    Args:
        env: What it acts in: its model, prompts, reward and settings are searched with.
        seed: Of the random numbers.
        n: Rows a text, at least 1.
        values: Where Q comes from; see ``value_source``.
        beta: The price of KL in J, reward units a nat, above 0. None: that for which the values were
            learned, or 0.1.
        trust: A factor on Q, at least 0: 1 believes the values, 0 ignores them. An agent that acts at
            another temperature than ``beta`` is trusted accordingly: with 1, rows draw from its policy.
        rows: Rows written at a time, so that texts share forwards.

    Raises:
        ConfigError: a value out of range, or values that cannot be had.
        CapacityError: n rows do not fit into memory.
    """

    def __init__(
        self,
        env: TextGenVectorEnv,
        seed: int | None = None,
        *,
        n: int,
        values: Any = None,
        beta: float | None = None,
        trust: float = 1.0,
        rows: int = ROWS,
    ) -> None:
        super().__init__(env, seed)
        check_at_least("n", n, 1)
        check_at_least("rows", rows, 1)
        if beta is not None and not beta > 0:
            raise ConfigError(f"beta must be above 0 (reward units a nat), got {beta}")
        self.n = n
        self.values = value_source(values, env)
        self.trust = trust
        self._beta = beta
        self._at_a_time = max(1, rows // n)
        keys = [key for key in self.values.needs if key not in ("logprobs", "action_mask")]
        self._counts_from_score = "score" in keys
        self._episodes = self._open_rows(keys)

    def _open_rows(self, keys: Sequence[str]) -> Episodes:
        return self._open(self._at_a_time * self.n, *keys)

    @property
    def beta(self) -> float:
        """The price of KL, reward units a nat."""
        return getattr(self.values, "beta", DEFAULT_BETA) if self._beta is None else self._beta

    @property
    def trust(self) -> float:
        """The factor on Q."""
        return self._trust

    @trust.setter
    def trust(self, trust: float) -> None:
        if not 0 <= trust < np.inf:
            raise ConfigError(f"trust must be at least 0 (a factor on Q), got {trust}")
        self._trust = float(trust)

    def _tilted(self, rows: Rows) -> Tilted:
        """Return what the values say of the prefixes in ``rows``; at most one forward."""
        observation = self._episodes.observe(rows)
        log_mu, _ = self._episodes.log_prior(rows)
        factor = self.trust * self.beta / getattr(self.values, "temperature", self.beta)
        q = np.where(np.isfinite(log_mu), factor * self.values.q(observation), 0.0)
        log_pi, value = tilt(log_mu, q, self.beta)
        score = observation["score"][:, 0].astype(np.float64) if self._counts_from_score else np.zeros(len(rows))
        return Tilted(log_pi, q, value, score)

    def _start(self, texts: Sequence[tuple[Prompt, Ids]]) -> Rows:
        """Let n rows hold each text, forked from one: return them, (texts, n)."""
        rows = np.arange(len(texts) * self.n).reshape(-1, self.n)
        self._stand(self._episodes, rows[:, 0], texts)
        self._episodes.fork(np.repeat(rows[:, 0], self.n - 1), rows[:, 1:].ravel())
        return rows
