"""The classic pair: a Q-network with one output an action, and the memory that it learns from.

state (B, d)  ->  DeepQLearningModel  ->  Q (B, actions)
state, action, reward, next state, done  ->  ExperienceReplay  ->  Transitions of n rows
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from textgen_env.errors import ConfigError


class DeepQLearningModel(nn.Module):
    """Q-values of all actions from a state: two hidden layers with ReLU.

    Input:  (..., input_dim) float32, such as a transformer's hidden state.
    Output: (..., action_dim) expected return, in reward units; any real number.

    Raises:
        ConfigError: a dimension below 1, or a state of another width.
    """

    def __init__(self, input_dim: int = 768, action_dim: int = 10, hidden_dim: int = 256) -> None:
        super().__init__()
        for name, size in {"input_dim": input_dim, "action_dim": action_dim, "hidden_dim": hidden_dim}.items():
            if size < 1:
                raise ConfigError(f"{name} must be at least 1, got {size}")
        self.input_dim, self.action_dim = input_dim, action_dim
        self.layers = nn.Sequential(
            nn.Linear(input_dim, hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, hidden_dim),
            nn.ReLU(),
            nn.Linear(hidden_dim, action_dim),
        )

    def forward(self, state: torch.Tensor) -> torch.Tensor:
        """Return Q of every action: (..., input_dim) -> (..., action_dim)."""
        if state.shape[-1] != self.input_dim:
            raise ConfigError(f"a state has {self.input_dim} numbers (input_dim), got the shape {tuple(state.shape)}")
        q_values: torch.Tensor = self.layers(state)
        return q_values


@dataclass(frozen=True)
class Transitions:
    """n sampled transitions."""

    states: torch.Tensor  # (n, *state) float32
    actions: torch.Tensor  # (n,) int64
    rewards: torch.Tensor  # (n,) float32
    next_states: torch.Tensor  # (n, *state) float32, zeros where done
    dones: torch.Tensor  # (n,) bool

    def __len__(self) -> int:
        return len(self.actions)


class ExperienceReplay:
    """The last ``capacity`` transitions, sampled uniformly without repetition.

    The store is allocated whole when the first state shows its shape: 8 bytes a number of the state
    and a transition. Sampling depends on ``seed`` alone, not on global randomness.

    Raises:
        ConfigError: a capacity below 1, shapes that do not match, a negative action, a reward that
            is not finite, or a sample larger than the content.
    """

    def __init__(self, capacity: int = 10000, seed: int = 0) -> None:
        if capacity < 1:
            raise ConfigError(f"capacity must be at least 1, got {capacity}")
        self.capacity = capacity
        self._random = np.random.default_rng(seed)
        self._store: Transitions | None = None
        self._pushed = 0

    def __len__(self) -> int:
        return min(self._pushed, self.capacity)

    def push(self, state: Any, action: int, reward: float, next_state: Any = None, done: bool | None = None) -> None:
        """Add one transition. Without ``next_state`` it is the last of its episode.

        Args:
            state: Numbers of any fixed shape.
            action: Index, at least 0.
            reward: Of the action.
            next_state: The state after it, in the shape of ``state``.
            done: True if the episode ended there; left out, it did if there is no next state.
        """
        if next_state is None and done is False:
            raise ConfigError("a transition that is not done needs its next_state")
        self.extend(
            torch.as_tensor(state)[None],
            torch.as_tensor(action)[None],
            torch.as_tensor(reward)[None],
            None if next_state is None else torch.as_tensor(next_state)[None],
            None if done is None else torch.as_tensor(done)[None],
        )

    def extend(
        self,
        states: torch.Tensor,
        actions: torch.Tensor,
        rewards: torch.Tensor,
        next_states: torch.Tensor | None = None,
        dones: torch.Tensor | None = None,
    ) -> None:
        """Add n transitions at once: the arguments of ``push``, with n rows in front."""
        count = len(states)
        if dones is None:
            dones = torch.full((count,), next_states is None)
        if next_states is None:
            next_states = torch.zeros_like(states)
        if self._store is None:
            self._store = _empty(self.capacity, states.shape[1:])
        self._check(count, states, next_states, actions, rewards, dones)
        last = slice(max(0, count - self.capacity), None)  # the others would be overwritten at once
        places = torch.arange(self._pushed, self._pushed + count)[last] % self.capacity
        self._store.states[places] = states[last].detach().float().cpu()
        self._store.actions[places] = actions[last].long().cpu()
        self._store.rewards[places] = rewards[last].detach().float().cpu()
        self._store.next_states[places] = next_states[last].detach().float().cpu()
        self._store.dones[places] = dones[last].bool().cpu()
        self._pushed += count

    def _check(
        self,
        count: int,
        states: torch.Tensor,
        next_states: torch.Tensor,
        actions: torch.Tensor,
        rewards: torch.Tensor,
        dones: torch.Tensor,
    ) -> None:
        assert self._store is not None
        shape = self._store.states.shape[1:]
        given = (states.shape, next_states.shape, actions.shape, rewards.shape, dones.shape)
        if given != ((count, *shape), (count, *shape), (count,), (count,), (count,)):
            raise ConfigError(
                f"{count} transitions of states {tuple(shape)} need (n, *state) states and next states, and (n,) "
                f"actions, rewards and dones; got {', '.join(str(tuple(s)) for s in given)}"
            )
        if actions.is_floating_point() or (actions < 0).any():
            raise ConfigError(f"actions must be integers from 0, got {actions.tolist()}")
        if not torch.isfinite(rewards).all():
            raise ConfigError(f"rewards must be finite, got {rewards.tolist()}")

    def sample(self, batch_size: int) -> Transitions:
        """Return ``batch_size`` different transitions, each equally likely."""
        if self._store is None or not 1 <= batch_size <= len(self):
            raise ConfigError(f"a sample needs from 1 to {len(self)} transitions (its content), got {batch_size}")
        rows = torch.from_numpy(self._random.choice(len(self), batch_size, replace=False))
        store = self._store
        return Transitions(
            store.states[rows], store.actions[rows], store.rewards[rows], store.next_states[rows], store.dones[rows]
        )


def _empty(capacity: int, shape: torch.Size) -> Transitions:
    return Transitions(
        states=torch.zeros(capacity, *shape),
        actions=torch.zeros(capacity, dtype=torch.long),
        rewards=torch.zeros(capacity),
        next_states=torch.zeros(capacity, *shape),
        dones=torch.zeros(capacity, dtype=torch.bool),
    )
