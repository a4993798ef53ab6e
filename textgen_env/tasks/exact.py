"""Tasks with known optima: a small decision process, and exact dynamic programming on it.

A ``Process`` maps a text to an abstract state; everything else follows from it: the ``TableModel``
that proposes, the reward, the best possible mean reward, and that of the language model, both by
dynamic programming over states, never by enumerating texts.

    ids  ->  state  ->  probabilities (V,), features (d,)      the language model
                    ->  worth                                  the reward, and expected_reward()

Two rules for features: they determine the value of a prefix (an agent without memory can be
optimal), and they do not reveal the right token.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Mapping, Sequence
from dataclasses import asdict
from functools import cache, lru_cache, reduce
from inspect import cleandoc, signature
from string import ascii_lowercase
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from textgen_env.config import check_at_least
from textgen_env.conversation import Partner
from textgen_env.errors import ConfigError, PromptError
from textgen_env.models.table import TableModel
from textgen_env.prompts import ListPrompts, Prompt
from textgen_env.rewards.base import Generation, Reward
from textgen_env.tasks.base import TASKS, Bounds, Task

State = Any
"""The state of a process after a text: any hashable object."""

P = TypeVar("P", bound="type[Process]")

Floats = npt.NDArray[np.float64]

LETTERS = len(ascii_lowercase)

REMEMBERED = 1 << 16
"""Prefixes whose states, probabilities and features are kept."""


class Process(ABC):
    """A task on abstract states. Subclasses are frozen dataclasses whose fields are the task's sizes."""

    draws: Sequence[Mapping[str, Any]] = ({},)  # metadata: each prompt comes once with each
    stop: tuple[str, ...] = ()  # ends the text; see ``ended``

    @property
    @abstractmethod
    def tokens(self) -> Sequence[str]:
        """Return the text of each token id, V of them."""

    @property
    @abstractmethod
    def prompts(self) -> Sequence[tuple[int, ...]]:
        """Return the ids of all prompts, equally long; they are trained and tested on alike."""

    @property
    @abstractmethod
    def steps(self) -> int:
        """Return how many tokens a text can have."""

    @property
    @abstractmethod
    def candidates(self) -> int:
        """Return k: how many tokens have a probability at once, at most."""

    @abstractmethod
    def begin(self, prompt: tuple[int, ...]) -> State:
        """Return the state before the first token."""

    @abstractmethod
    def follow(self, state: State, token: int) -> State:
        """Return the state after ``token``."""

    @abstractmethod
    def probabilities(self, state: State) -> npt.ArrayLike:
        """Return the language model's next-token probabilities, (V,)."""

    @abstractmethod
    def features(self, state: State) -> npt.ArrayLike:
        """Return the hidden state, (d,)."""

    @abstractmethod
    def worth(self, state: State) -> float:
        """Return the expected reward of a text that ends in ``state``, in [0, 1]."""

    def ended(self, state: State) -> bool:
        """Return True if the text ends in ``state`` before its last step; ``stop`` must agree."""
        return False

    def paid(self, state: State, metadata: Mapping[str, Any]) -> float:
        """Return the reward itself, whose noise may only come from the prompt's metadata."""
        return self.worth(state)

    @property
    def ceiling(self) -> float:
        """The reward that no text can exceed."""
        return 1.0

    # --- a partner that answers; see ``textgen_env.tasks.conversation.game``

    @property
    def partner(self) -> Partner | None:
        """Who answers the agent's turns; None: a text is one turn."""
        return None

    @property
    def turn_settings(self) -> Mapping[str, Any]:
        """The settings of ``EnvConfig`` that a partner needs."""
        return {}

    def replies(self, state: State) -> Mapping[tuple[int, ...], float]:
        """Return the answers that a turn which ends in ``state`` may get, as ids, each with its probability."""
        return {}

    def left(self, state: State, ids: tuple[int, ...]) -> int:
        """Return how many tokens the agent has left after ``ids``, prompt included, which lead to ``state``."""
        return self.steps + len(self.prompts[0]) - len(ids)

    def summary(self, state: State) -> Hashable:
        """Return the part of ``state`` that determines its values; all of it by default."""
        summary: Hashable = state
        return summary

    def value(self, state: State, best: bool) -> float | None:
        """Return the value of ``state`` if a formula has it, of the best policy or of the language model.

        None, the default, leaves it to dynamic programming.
        """
        return None


class ExactValues:
    """Expected rewards by dynamic programming: one value for each summary of a state and steps left.

    Args:
        process: The task.
        best: Of the best policy; otherwise of the language model.
    """

    def __init__(self, process: Process, best: bool) -> None:
        self._process = process
        self._best = best
        self._known: dict[Hashable, float] = {}

    def of_tokens(self, state: State, left: int) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
        """Return the tokens that may follow ``state``, ``left`` steps before the end, and the value of each."""
        tokens = np.flatnonzero(self._process.probabilities(state))
        values = [self.of_state(self._process.follow(state, token), left - 1) for token in tokens.tolist()]
        return tokens, np.array(values)

    def of_state(self, state: State, left: int) -> float:
        """Return the expected reward of a text in ``state``, ``left`` steps before the end."""
        process = self._process
        replies = process.replies(state)
        if not replies and (left == 0 or process.ended(state)):
            return process.worth(state)
        key = (left, process.summary(state))
        if key not in self._known and (found := process.value(state, self._best)) is not None:
            self._known[key] = found
        if replies and key not in self._known:
            after = ((reduce(process.follow, ids, state), p) for ids, p in replies.items())
            self._known[key] = sum(p * self.of_state(answered, left) for answered, p in after)
        if key not in self._known:
            tokens, values = self.of_tokens(state, left)
            mu = np.asarray(process.probabilities(state), np.float64)[tokens]
            self._known[key] = float(values.max() if self._best else values @ mu / mu.sum())
        return self._known[key]


def expected_reward(process: Process, best: bool) -> float:
    """Return the mean reward over the prompts, exact: of the best policy, or of the language model."""
    values = ExactValues(process, best)
    return float(np.mean([values.of_state(process.begin(prompt), process.steps) for prompt in process.prompts]))


class OptimalAgent:
    """The best possible policy of a diagnostic task, planted: uniform over the best tokens.

    It reads ``tokens``, ``length``, ``candidates`` and ``action_mask``, and answers Stable-Baselines3's
    ``predict``.

    Raises:
        ConfigError: the task is not a diagnostic one, so that its best policy is unknown.
    """

    def __init__(self, task: Task, seed: int | None = None) -> None:
        self._process = process_of(task)
        self._rng = np.random.default_rng(seed)
        self._state = _states(self._process)
        self._values = ExactValues(self._process, best=True)

    def probabilities(self, observation: Mapping[str, npt.NDArray[Any]]) -> npt.NDArray[np.float64]:
        """Return (B, k) probabilities, for an observation with a batch axis."""
        rows = zip(observation["tokens"], observation["length"], observation["candidates"], strict=True)
        chosen = np.array([np.isin(candidates, self._best(ids[: length[0]])) for ids, length, candidates in rows])
        chosen = chosen & np.asarray(observation["action_mask"], bool)
        return chosen / chosen.sum(-1, keepdims=True)

    def predict(
        self, observation: Any, state: Any = None, episode_start: Any = None, deterministic: bool = False
    ) -> tuple[npt.NDArray[np.int64], Any]:
        """Return (B,) actions; one action, (), for an observation without a batch axis."""
        single = np.ndim(observation["tokens"]) == 1
        batch = {key: np.asarray(value)[None] for key, value in observation.items()} if single else observation
        policy = self.probabilities(batch)
        actions = (policy * (1.0 if deterministic else self._rng.random(policy.shape))).argmax(-1)
        return (actions[0] if single else actions), state

    def _best(self, ids: npt.NDArray[np.int32]) -> npt.NDArray[np.int64]:
        prefix = tuple(ids.tolist())
        state = self._state(prefix)
        tokens, values = self._values.of_tokens(state, self._process.left(state, prefix))
        return tokens[values >= values.max() - 1e-12]


class ProcessReward(Reward):
    """The reward that a process pays for a text. Range: 0 to 1. Running score: no."""

    def __init__(self, process: Process) -> None:
        self.name = type(process).__name__
        self.process = process
        self._state = _states(process)

    def __call__(self, generations: Sequence[Generation]) -> npt.NDArray[np.float64]:
        return np.array([self.process.paid(self._state(g.prompt_ids + g.ids), g.metadata) for g in generations])


def diagnostic_task(id: str) -> Callable[[P], P]:
    """Register a ``Process`` class as a task whose sizes are the class's fields."""

    def register(cls: P) -> P:
        def factory(**sizes: Any) -> Task:
            return exact_task(id, cls(**sizes))

        factory.__doc__, factory.__signature__ = cls.__doc__, signature(cls)  # type: ignore[attr-defined]
        TASKS.register(id)(factory)
        return cls

    return register


def process_of(task: Task) -> Process:
    """Return the process behind a diagnostic task.

    Raises:
        ConfigError: the task is not a diagnostic one.
    """
    if not isinstance(task.reward, ProcessReward):
        raise ConfigError(f"{task.id} is no diagnostic task: its best policy is not known exactly")
    return task.reward.process


def exact_task(id: str, process: Process) -> Task:
    """Return ``process`` as a task, with its exact bounds."""
    texts = ["".join(process.tokens[i] for i in ids) for ids in process.prompts]
    prompts = ListPrompts([Prompt(text, metadata=draw) for text in texts for draw in process.draws])
    return Task(
        id=id,
        summary=cleandoc(process.__doc__ or "").partition("\n")[0],
        sizes=asdict(process),  # type: ignore[call-overload]
        model=_table_model(id, process),
        train_prompts=prompts,
        test_prompts=prompts,
        reward=ProcessReward(process),
        settings={
            "top_k": process.candidates,
            "max_new_tokens": process.steps,
            "max_prompt_tokens": len(process.prompts[0]),
            "stop": process.stop,
            **process.turn_settings,
        },
        partner=process.partner,
        known_bounds=cache(
            lambda: Bounds(expected_reward(process, False), expected_reward(process, True), process.ceiling)
        ),
    )


def _table_model(id: str, process: Process) -> TableModel:
    state = _states(process)

    @lru_cache(REMEMBERED)
    def probabilities(ids: tuple[int, ...]) -> npt.ArrayLike:
        return process.probabilities(state(ids))

    @lru_cache(REMEMBERED)
    def features(ids: tuple[int, ...]) -> npt.ArrayLike:
        return process.features(state(ids))

    hidden_size = np.shape(features(process.prompts[0]))[0]
    return TableModel(process.tokens, probabilities, end=None, features=features, hidden_size=hidden_size, name=id)


def _states(process: Process) -> Callable[[tuple[int, ...]], State]:
    """Return the function from ids, prompt included, to the state; each prefix is followed once."""
    prompts = frozenset(process.prompts)
    length = len(process.prompts[0])

    @lru_cache(REMEMBERED)
    def state(ids: tuple[int, ...]) -> State:
        if len(ids) > length:
            return process.follow(state(ids[:-1]), ids[-1])
        if ids not in prompts:
            raise PromptError(
                f"{''.join(process.tokens[i] for i in ids)!r} is no prompt of {type(process).__name__}; they are like "
                f"{''.join(process.tokens[i] for i in process.prompts[-1])!r}"
            )
        return process.begin(ids)

    return state


# --- tools for processes


def check_between(name: str, value: object, least: int, most: int) -> None:
    """Raise ``ConfigError`` unless ``value`` is a whole number in ``least..most``."""
    check_at_least(name, value, least)
    if value > most:  # type: ignore[operator]
        raise ConfigError(f"{name} must be a whole number in {least}..{most}, got {value!r}")


def check_number(name: str, value: object, least: float = 0.0, most: float = 1.0) -> None:
    """Raise ``ConfigError`` unless ``value`` is a number in [least, most]."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not least <= value <= most:
        raise ConfigError(f"{name} must be a number in [{least}, {most}], got {value!r}")


@lru_cache(1 << 12)
def ranked(ratio: float, count: int, *seed: int) -> Floats:
    """Return ``count`` probabilities in an order drawn from ``seed``, each ``ratio`` times the one before."""
    weights = ratio ** np.random.default_rng(seed).permutation(count)
    weights /= weights.sum()
    weights.flags.writeable = False  # remembered
    return np.asarray(weights)


def one_hot(place: int | None, size: int) -> Floats:
    """Return (size,) with a 1 at ``place``, all zeros for None."""
    hot = np.zeros(size)
    if place is not None:
        hot[place] = 1.0
    return hot
