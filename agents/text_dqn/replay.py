"""Whole episodes, each step stored once.

A step's next state is the next row, so nothing is stored twice; hidden states are kept in half
precision. Every environment writes into a ring of its own, which keeps episodes contiguous:

    rings (N environments, L steps, ...)  ->  sample(B)  ->  EpisodeBatch (B, T, ...), padded

Rewards are stored shaped by the running score where Q reads one: the potential is the part of the score
that is not yet paid, 0 at the end. So a text's rewards sum to its reward less its first score, which no action
changes: every optimum stays, and ``reward_at="end"`` and ``"step"`` are the same learning problem.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt
import psutil
import torch
from gymnasium import spaces

from agents.text_dqn.echoes import echoed
from agents.text_dqn.features import FOLDS, JudgedTexts
from textgen_env.errors import CapacityError, ConfigError
from textgen_env.policies import Floats

Array = npt.NDArray[Any]

STORED = {
    "hidden": np.float16,
    "candidates": np.int32,
    "logprobs": np.float32,
    "action_mask": np.bool_,
    "budget": np.float32,
    "score": np.float32,
    "turn": np.int32,
    "turn_budget": np.float32,
    "candidate_scores": np.float32,
}
"""Observation keys that learning needs, and how they are kept. ``tokens`` are kept as actions."""

STEP_FIELDS = {
    "action": np.int64,
    "token": np.int32,
    "reward": np.float32,
    "behaviour": np.float32,
    "ended": np.bool_,
    "acted": np.bool_,
    "by_language_model": np.bool_,
    "judged": np.float32,
}
"""What a step holds beside its observation."""


@dataclass(frozen=True)
class Acted:
    """What N rows did at a step."""

    actions: npt.NDArray[np.int64]  # (N,)
    logprobs: Floats  # (N,) of the actions under the behaviour, nats
    by_language_model: npt.NDArray[np.bool_]  # (N,) the language model itself chose
    kl: float  # nats a token, behaviour against language model, mean over the rows


@dataclass(frozen=True)
class EpisodeBatch:
    """B whole episodes of up to T steps, padded at the end.

    ``acted`` is False for padding, and for the state after an outside time limit, which has a
    value but no action; ``ended`` is True at the last step of a text. In a conversation the steps are the
    agent's tokens: a reply lies between two of them, as part of what the first has led to.
    """

    observations: dict[str, torch.Tensor]  # each (B, T, ...)
    actions: torch.Tensor  # (B, T) int64
    tokens: torch.Tensor  # (B, T) int64, the token that each action appended
    rewards: torch.Tensor  # (B, T) shaped
    behaviour: torch.Tensor  # (B, T) log-probability of the action when it was taken, nats
    ended: torch.Tensor  # (B, T) bool
    acted: torch.Tensor  # (B, T) bool
    by_language_model: torch.Tensor  # (B, T) bool, the language model itself chose the action
    echoes: torch.Tensor  # (B, T, k) bool, the candidate occurs in the prompt
    folds: torch.Tensor | None = None  # (B,) int64, the part of the texts that each belongs to; see ``scorer``


class EpisodeReplay:
    """A ring of steps for each environment, sampled by whole episodes.

    Bytes: ``buffer_size`` times ``bytes_per_step(observation_space)``, allocated at once. ``shapes``: shape
    rewards by the observation's running score, where it has one.

    Raises:
        CapacityError: that is more than the memory that is free (says both).
    """

    def __init__(
        self,
        buffer_size: int,
        observation_space: spaces.Dict,
        device: torch.device | str = "cpu",
        n_envs: int = 1,
        seed: int | None = None,
        shapes: bool = True,
    ) -> None:
        self.device = torch.device(device)
        self.n_envs = n_envs
        self.observation_space = observation_space
        self.num_actions = _shape(observation_space, "candidates")[0]
        self.keys = [key for key in STORED if key in observation_space.spaces]
        self.shapes = shapes and "score" in self.keys
        self.ring = max(2, buffer_size // n_envs)
        free = psutil.virtual_memory().available
        needed = self.bytes = self.ring * n_envs * self.bytes_per_step(observation_space)
        if needed > free:
            raise CapacityError(
                f"a replay of {buffer_size:,} steps needs {needed:,} bytes and {free:,} are free: lower buffer_size"
            )
        shape = (n_envs, self.ring)
        self.store: dict[str, Array] = {
            key: np.zeros((*shape, *_shape(observation_space, key)), STORED[key]) for key in self.keys
        } | {name: np.zeros(shape, dtype) for name, dtype in STEP_FIELDS.items()}
        self.store["echoes"] = np.zeros((*shape, self.num_actions), np.bool_)
        self.rng = np.random.default_rng(seed)
        self.reset()

    @staticmethod
    def bytes_per_step(observation_space: spaces.Dict) -> int:
        """Return the bytes that one step takes."""
        keys = [key for key in STORED if key in observation_space.spaces]
        sizes = (int(np.prod(_shape(observation_space, key))) * np.dtype(STORED[key]).itemsize for key in keys)
        fields = sum(np.dtype(dtype).itemsize for dtype in STEP_FIELDS.values())
        return sum(sizes) + fields + _shape(observation_space, "candidates")[0]  # the last: its echoes

    def reset(self) -> None:
        """Forget everything."""
        self.written = np.zeros(self.n_envs, np.int64)  # steps ever written by each environment
        self.open = np.zeros(self.n_envs, np.int64)  # where its running episode began
        self.unpaid = np.zeros(self.n_envs)  # the part of its running score not paid yet
        # Finished episodes of each environment, oldest first: (first step, length).
        self.episodes: list[deque[tuple[int, int]]] = [deque() for _ in range(self.n_envs)]
        self.episodes_seen = 0

    def size(self) -> int:
        """Return how many steps of finished episodes can be sampled."""
        return sum(length for episodes in self.episodes for _, length in episodes)

    def add(
        self,
        observation: Mapping[str, Array],
        next_observation: Mapping[str, Array],
        acted: Acted,
        rewards: Array,
        done: Array,
        truncated: Array,
        judged: Array | None = None,
    ) -> None:
        """Store one step of each environment.

        Args:
            observation, next_observation: (N, ...) a key; ``next_observation`` holds the last
                observation of ended rows.
            acted: What they did.
            rewards, done: (N,).
            truncated: (N,) True where an outside limit ended the episode, and not the text itself.
            judged: (N,) what the text after the step would get if it ended here; NaN where nobody asked.
        """
        envs = np.arange(self.n_envs)
        ended = done & ~truncated
        shaped = rewards
        if self.shapes:
            score, next_score = observation["score"][:, 0], next_observation["score"][:, 0]
            unpaid = np.where(self.written == self.open, score, self.unpaid)
            shaped, self.unpaid = _shaped(rewards, score, next_score, unpaid, ended)
        generated = self.written - self.open
        at = self._next_rows(envs)
        self._write(
            (envs, at),
            observation,
            echoes=echoed(observation, generated),
            action=acted.actions,
            token=observation["candidates"][envs, acted.actions],
            reward=shaped,
            behaviour=acted.logprobs,
            by_language_model=acted.by_language_model,
            ended=ended,
            acted=True,
            judged=np.nan if judged is None else judged,
        )
        for env in np.flatnonzero(done).tolist():
            if truncated[env]:
                last = {key: value[env : env + 1] for key, value in next_observation.items()}
                self._store_last_state(env, last, generated[env : env + 1] + 1)
            self._close(env)

    def give_up_open(self) -> None:
        """Forget the texts that environments have begun: they will not go on."""
        self.written[:] = self.open

    def add_episode(
        self,
        observations: Mapping[str, Array],
        actions: Array,
        rewards: Array,
        behaviour: Array,
        by_language_model: Array,
        ended: bool = True,
    ) -> None:
        """Store one whole episode of L steps, in the ring with the most room.

        Args:
            observations: (L + 1, ...) a key, the last one after the last step. Without ``tokens`` nobody
                knows what occurs in the prompt.
            actions, rewards, behaviour, by_language_model: (L,); see ``Acted``.
            ended: The text ended by itself, and not by an outside limit.

        Raises:
            ConfigError: an environment is in the middle of an episode.
        """
        if (self.open != self.written).any():
            raise ConfigError("environments are in the middle of episodes: add recorded ones before learning")
        env, steps = int(self.written.argmin()), len(actions)
        at = np.concatenate([self._next_rows(np.array([env])) for _ in range(steps)])
        last = np.arange(steps) == steps - 1
        shaped = np.array(rewards, np.float64)
        if self.shapes:
            scores = observations["score"][:, 0]
            unpaid = scores[0]
            for t in range(steps):
                shaped[t], unpaid = _shaped(rewards[t], scores[t], scores[t + 1], unpaid, last[t] and ended)
        self._write(
            (env, at),
            {key: observations[key][:-1] for key in self.keys},
            echoes=echoed(observations, np.arange(steps + 1))[:-1],
            action=actions,
            token=observations["candidates"][np.arange(steps), actions],
            reward=shaped,
            behaviour=behaviour,
            by_language_model=by_language_model,
            ended=last & ended,
            acted=True,
            judged=np.nan,
        )
        if not ended:
            self._store_last_state(env, {key: value[-1:] for key, value in observations.items()}, np.array([steps]))
        self._close(env)

    def take(self) -> tuple[dict[str, Array], npt.NDArray[np.int64]]:
        """Hand over the finished episodes: their steps as stored, (S, ...) a name, and the length of each, (E,).

        They follow each other in the order of the environments, and are forgotten here.
        """
        picks = [(env, first, length) for env, ring in enumerate(self.episodes) for first, length in ring]
        if not picks:
            return {name: array[0, :0] for name, array in self.store.items()}, np.zeros(0, np.int64)
        envs, _, lengths = np.array(picks).T
        at = np.concatenate([np.arange(first, first + length) for _, first, length in picks]) % self.ring
        self.episodes = [deque() for _ in range(self.n_envs)]
        return {name: array[np.repeat(envs, lengths), at] for name, array in self.store.items()}, lengths

    def put(self, steps: Mapping[str, Array], lengths: npt.NDArray[np.int64]) -> None:
        """Store what ``take`` handed over elsewhere, each episode in the ring with the most room.

        An episode that an environment has begun here is given up: its steps would lie in between.
        """
        self.give_up_open()
        ends = np.cumsum(lengths)
        for first, end in zip(ends - lengths, ends, strict=True):
            env = int(self.written.argmin())
            at = (self.written[env] + np.arange(end - first)) % self.ring
            self.written[env] += end - first
            self._forget_overwritten(env)
            for name, array in self.store.items():
                array[env, at] = steps[name][first:end]
            self._close(env)

    def sample(self, batch_size: int) -> EpisodeBatch:
        """Return ``batch_size`` episodes, uniformly with replacement.

        Raises:
            ConfigError: no episode has finished yet.
        """
        ends = np.cumsum([len(episodes) for episodes in self.episodes])
        if ends[-1] == 0:
            raise ConfigError("the replay holds no finished episode yet; raise learning_starts")
        picks = self.rng.integers(ends[-1], size=batch_size)
        envs = np.searchsorted(ends, picks, side="right")
        return self.batch([(int(e), *self.episodes[e][int(i - ends[e])]) for e, i in zip(envs, picks, strict=True)])

    def batch(self, picks: list[tuple[int, int, int]], keys: Sequence[str] | None = None) -> EpisodeBatch:
        """Return the episodes ``(environment, first step, length)``, padded to the longest.

        Args:
            picks: The episodes.
            keys: Of the observations; all if not given.
        """
        envs, first, lengths = np.array(picks).T[..., None]  # (B, 1) each
        offset = np.arange(lengths.max())[None]
        inside = offset < lengths
        at = (first + np.minimum(offset, lengths - 1)) % self.ring

        def tensor(name: str) -> torch.Tensor:
            return torch.from_numpy(self.store[name][envs, at]).to(self.device)

        return EpisodeBatch(
            observations={key: tensor(key) for key in self.keys if keys is None or key in keys},
            actions=tensor("action"),
            tokens=tensor("token").long(),
            rewards=tensor("reward"),
            behaviour=tensor("behaviour"),
            ended=tensor("ended"),
            acted=tensor("acted") & torch.from_numpy(inside).to(self.device),
            by_language_model=tensor("by_language_model"),
            echoes=tensor("echoes"),
            folds=torch.tensor([fold_of(env, start) for env, start, _ in picks], device=self.device),
        )

    def texts(self) -> JudgedTexts:
        """Return the finished texts that are kept, and the prefixes of theirs that were judged, with their rewards.

        Texts that an outside limit cut off are left out: nobody knows what they would have been worth.
        """
        picks = [(env, *episode) for env, ring in enumerate(self.episodes) for episode in ring]
        envs, first, lengths = np.array(picks, np.int64).reshape(-1, 3).T
        ended = self.store["ended"][envs, (first + lengths - 1) % self.ring]
        envs, first, lengths = envs[ended], first[ended], lengths[ended]
        offset = np.arange(lengths.max(initial=1))
        at = (envs[:, None], (first[:, None] + np.minimum(offset, lengths[:, None] - 1)) % self.ring)
        inside = offset < lengths[:, None]
        tokens, folds = self.store["token"][at].astype(np.int64), fold_of(envs, first)
        echoes = self.store["echoes"][(*at, self.store["action"][at])]
        texts, steps = np.nonzero(inside & np.isfinite(self.store["judged"][at]))  # prefixes that were judged
        judged = self.store["judged"][at][texts, steps].astype(np.float64)
        return JudgedTexts(
            tokens=np.concatenate([tokens, tokens[texts]]),
            lengths=np.concatenate([lengths, steps + 1]),
            rewards=np.concatenate([(self.store["reward"][at].astype(np.float64) * inside).sum(1), judged]),
            folds=np.concatenate([folds, folds[texts]]),
            finished=np.arange(len(tokens) + len(texts)) < len(tokens),
            echoes=np.concatenate([echoes, echoes[texts]]),
        )

    def spread(self, count: int, keys: Sequence[str]) -> EpisodeBatch:
        """Return up to ``count`` episodes, spread evenly over all that are kept, with these keys of observations."""
        picks = [(env, *episode) for env, ring in enumerate(self.episodes) for episode in ring]
        return self.batch([picks[i] for i in np.unique(np.linspace(0, len(picks) - 1, count).astype(int))], keys)

    def state_dict(self) -> tuple[dict[str, Array], dict[str, Any]]:
        """Return the steps as arrays, without the part of the rings that was never written, and plain data."""
        used = min(self.ring, int(self.written.max()))
        steps = {name: np.ascontiguousarray(array[:, :used]) for name, array in self.store.items()}
        return steps, {
            "written": self.written.tolist(),
            "open": self.open.tolist(),
            "unpaid": self.unpaid.tolist(),
            "episodes": [list(episodes) for episodes in self.episodes],
            "episodes_seen": self.episodes_seen,
            "rng": self.rng.bit_generator.state,
            "ring": self.ring,
        }

    def load_state_dict(self, steps: Mapping[str, Array], plain: Mapping[str, Any]) -> None:
        """Put back what ``state_dict`` returned, into a replay of the same shape.

        Raises:
            ConfigError: other keys or shapes (says which).
            KeyError, OverflowError, TypeError, ValueError: ``plain`` is no state of a replay.
        """
        used = min(self.ring, max(plain["written"]))
        episodes = [deque((int(first), int(length)) for first, length in ring) for ring in plain["episodes"]]
        counts = np.array([plain[name] for name in ("written", "open", "unpaid")], np.float64)
        whole = isinstance(plain["episodes_seen"], int)
        if counts.shape != (3, self.n_envs) or len(episodes) != self.n_envs or not whole:
            raise ValueError(f"its state is not that of {self.n_envs} rows")
        rng = np.random.default_rng()
        rng.bit_generator.state = plain["rng"]
        for name, array in self.store.items():
            shape, given = array[:, :used].shape, steps[name].shape if name in steps else None
            if given != shape or plain["ring"] != self.ring:
                raise ConfigError(
                    f"{name!r} must have shape {shape} of {self.ring} steps a row, got {given} of {plain['ring']}: use "
                    "the same buffer_size, environment and number of rows"
                )
            array[:, :used] = steps[name]
        self.written[:] = plain["written"]
        self.open[:] = plain["open"]
        self.unpaid[:] = plain["unpaid"]
        self.episodes = episodes
        self.episodes_seen = plain["episodes_seen"]
        self.rng = rng

    def _write(self, where: Any, observation: Mapping[str, Array], **fields: Any) -> None:
        """Store observations and step fields at ``where``, an index of (environments, rows)."""
        for key in self.keys:
            self.store[key][where] = _storable(key, observation[key])
        for name, value in fields.items():
            self.store[name][where] = value

    def _next_rows(self, envs: npt.NDArray[np.int64]) -> npt.NDArray[np.int64]:
        """Return the row that each environment writes next, forgetting the episode it overwrites."""
        at = self.written[envs] % self.ring
        self.written[envs] += 1
        for env in envs:
            self._forget_overwritten(env)
        return at

    def _forget_overwritten(self, env: int) -> None:
        episodes = self.episodes[env]
        while episodes and episodes[0][0] < self.written[env] - self.ring:
            episodes.popleft()

    def _store_last_state(self, env: int, last: Mapping[str, Array], generated: npt.NDArray[np.int64]) -> None:
        """Store a state without an action: (1, ...) a key."""
        at = self._next_rows(np.array([env]))
        self._write((env, at), last, echoes=echoed(last, generated), **dict.fromkeys(STEP_FIELDS, 0))

    def _close(self, env: int) -> None:
        first, length = int(self.open[env]), int(self.written[env] - self.open[env])
        self.open[env] = self.written[env]
        if length > self.ring:
            raise CapacityError(
                f"an episode of {length} steps exceeds the {self.ring} that each environment has: raise buffer_size"
            )
        self.episodes[env].append((first, length))
        self.episodes_seen += 1


def fold_of(env: Any, first: Any) -> Any:
    """Return which part of the texts an episode belongs to, 0..FOLDS - 1: the same for as long as it is kept."""
    return (env * 40_503 + first * 2_654_435_761 >> 16) % FOLDS


def _storable(key: str, value: Array) -> Array:
    return np.clip(value, -6e4, 6e4) if STORED[key] is np.float16 else value


def _shape(observation_space: spaces.Dict, key: str) -> tuple[int, ...]:
    shape = observation_space[key].shape
    if shape is None:
        raise ConfigError(f"observation key {key!r} has no shape")
    return shape


def _shaped(reward: Any, score: Any, next_score: Any, unpaid: Any, ended: Any) -> tuple[Any, Any]:
    """Return rewards with the unpaid part of the running score as potential, and that part after the step."""
    after = np.where(ended, 0.0, unpaid + (next_score - score) - reward)
    return reward + after - unpaid, after
