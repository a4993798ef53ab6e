"""The classic loop: hidden states of a frozen transformer in, Q-values of a small network out.

One target network, one replay, epsilon-greedy or logged actions. ``custom_loss`` is the one-step
temporal-difference error; ``train_model`` is DQN around it (Mnih et al. 2015).

    LabelledBatch  ->  transformer (frozen)  ->  states (n, d)  ->  ExperienceReplay  ->  custom_loss  ->  step
"""

from __future__ import annotations

import copy
import math
import warnings
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import nn

from agents.classic.model import ExperienceReplay
from agents.pruning.model import PrunedTransformerModel
from textgen_env.errors import ConfigError


class LabelledBatch(NamedTuple):
    """A batch of a data loader; a plain tuple of the first four, or of all, does as well.

    **One decision a text.** ``input_ids`` and ``attention_mask`` are (B, T), padded on the right, or
    the first is a list of B texts for the tokenizer and the second is None. The state is the hidden
    state at the last real token. ``actions`` (B,) were taken and earned ``rewards`` (B,), or are None
    and ``rewards`` (B, A) are those of all actions: the loop then chooses. Without next texts every
    transition ends its episode; with them, ``dones`` (B,) says which do (None: none does).

    **One decision a position.** ``rewards`` is (B, T, A) and ``actions`` None. Position t is the state
    of the prefix that ends there and leads to t + 1; the last real one ends the episode. One forward
    pays for all of them, so the transformer must be causal.
    """

    input_ids: torch.Tensor | Sequence[str]
    attention_mask: torch.Tensor | None
    actions: torch.Tensor | None
    rewards: torch.Tensor
    next_input_ids: torch.Tensor | Sequence[str] | None = None
    next_attention_mask: torch.Tensor | None = None
    dones: torch.Tensor | None = None


@dataclass(frozen=True)
class Epoch:
    """Counts and means of one pass over the data. Means of nothing are NaN."""

    transitions: int
    updates: int
    loss: float  # mean of the updates
    reward: float  # mean of the transitions, exploration included


def custom_loss(
    predicted: torch.Tensor,
    actions: torch.Tensor,
    rewards: torch.Tensor,
    gamma: float = 0.99,
    next_q_values: torch.Tensor | None = None,
    dones: torch.Tensor | None = None,
) -> torch.Tensor:
    """Return the mean squared temporal-difference error: (Q(s, a) - y)^2, a scalar.

    y = r + gamma max_a' Q'(s', a'), and y = r where ``dones``. The short form without
    ``next_q_values`` means that every action ends its episode, so y = r and gamma plays no part.
    No gradient flows through y.

    Args:
        predicted: (B, A) Q-values of the states.
        actions: (B,) int64, which were taken.
        rewards: (B,) of these actions.
        gamma: Discount, in [0, 1].
        next_q_values: (B, A) of the next states, from a target network; or (B,) their values.
        dones: (B,) bool; None means that no episode ended.

    Raises:
        ConfigError: shapes that do not match, actions out of range, or gamma outside [0, 1].
    """
    if predicted.ndim != 2 or actions.shape != predicted.shape[:1] or rewards.shape != actions.shape:
        raise ConfigError(
            f"need predicted (B, A), actions (B,) and rewards (B,); got {tuple(predicted.shape)}, "
            f"{tuple(actions.shape)} and {tuple(rewards.shape)}"
        )
    count = predicted.shape[1]
    if actions.is_floating_point() or ((actions < 0) | (actions >= count)).any():
        raise ConfigError(f"actions must be integers in 0..{count - 1}, got {actions.tolist()}")
    if not 0 <= gamma <= 1:
        raise ConfigError(f"gamma must be in [0, 1], got {gamma}")
    target = _target(rewards.to(predicted.dtype), gamma, next_q_values, dones)
    chosen = predicted.gather(1, actions.long().unsqueeze(1)).squeeze(1)  # (B, A) -> (B,)
    return nn.functional.mse_loss(chosen, target.detach())


def _target(
    rewards: torch.Tensor, gamma: float, next_q_values: torch.Tensor | None, dones: torch.Tensor | None
) -> torch.Tensor:
    """Return y, (B,)."""
    if next_q_values is None:
        if dones is not None and not dones.bool().all():
            raise ConfigError("transitions that are not done need next_q_values")
        return rewards
    if next_q_values.ndim == 2:
        next_q_values = next_q_values.max(dim=1).values  # (B, A) -> (B,)
    dones = torch.zeros_like(rewards) if dones is None else dones
    if next_q_values.shape != rewards.shape or dones.shape != rewards.shape:
        raise ConfigError(
            f"need next_q_values (B, A) or (B,) and dones (B,) for {len(rewards)} actions; got "
            f"{tuple(next_q_values.shape)} and {tuple(dones.shape)}"
        )
    return torch.where(dones.bool(), rewards, rewards + gamma * next_q_values)


def train_model(
    transformer: nn.Module,
    dq_learning_model: nn.Module,
    optimizer: torch.optim.Optimizer,
    epochs: int,
    tokenizer: Any,
    data_loader: Iterable[Any],
    replay_buffer: ExperienceReplay,
    device: torch.device | str,
    *,
    gamma: float = 0.99,
    batch_size: int = 32,
    updates_per_batch: int = 1,
    target_update: int = 100,
    epsilon: float = 0.1,
    seed: int = 0,
) -> list[Epoch]:
    """Learn Q-values from the data loader's decisions; return an ``Epoch`` for each pass.

    The transformer is frozen: the replay keeps its hidden states, which would go stale.

    Args:
        transformer: ``(input_ids, attention_mask) -> (B, T, d)``, such as a ``PrunedTransformerModel``.
        dq_learning_model: (B, d) states to (B, A) Q-values.
        optimizer: Over the parameters of ``dq_learning_model``.
        epochs: Passes over the data.
        tokenizer: Turns texts into ids, for loaders that yield texts.
        data_loader: Yields ``LabelledBatch`` or plain tuples of its fields.
        replay_buffer: Holds the transitions; keep it to go on later.
        device: Where the two models run.
        gamma: Discount.
        batch_size: Transitions an update; while the replay holds fewer, all of them.
        updates_per_batch: Updates after each batch of data.
        target_update: Updates from one copy to the target network to the next.
        epsilon: Chance of a uniformly random action where the loop chooses.
        seed: Of those random actions.

    Raises:
        ConfigError: numbers out of range, or a batch whose shapes do not fit. Nothing is skipped.
    """
    _check_settings(epochs, batch_size, updates_per_batch, target_update, epsilon)
    _warn_about_frozen_weights(transformer, optimizer)
    transformer.to(device).eval()
    dq_learning_model.to(device)
    updates = _Updates(dq_learning_model, optimizer, replay_buffer, device, gamma, batch_size, target_update)
    generator = torch.Generator().manual_seed(seed)
    history = []
    for _ in range(epochs):
        losses: list[float] = []
        earned, transitions = 0.0, 0
        for fields in data_loader:
            states, actions, rewards, next_states, dones = _transitions(
                LabelledBatch(*fields), transformer, dq_learning_model, tokenizer, device, epsilon, generator
            )
            replay_buffer.extend(states, actions, rewards, next_states, dones)
            earned += float(rewards.sum())
            transitions += len(rewards)
            losses += [updates.step() for _ in range(updates_per_batch)]
        history.append(Epoch(transitions, len(losses), _mean(sum(losses), len(losses)), _mean(earned, transitions)))
    return history


def _check_settings(epochs: int, batch_size: int, updates_per_batch: int, target_update: int, epsilon: float) -> None:
    for name, value in {"batch_size": batch_size, "target_update": target_update}.items():
        if value < 1:
            raise ConfigError(f"{name} must be at least 1, got {value}")
    if epochs < 0 or updates_per_batch < 0:
        raise ConfigError(f"epochs and updates_per_batch must not be negative, got {epochs}, {updates_per_batch}")
    if not 0 <= epsilon <= 1:
        raise ConfigError(f"epsilon must be in [0, 1], got {epsilon}")


@dataclass
class _Updates:
    """Gradient steps on samples of the replay, and the target network."""

    network: nn.Module
    optimizer: torch.optim.Optimizer
    replay: ExperienceReplay
    device: torch.device | str
    gamma: float
    batch_size: int
    target_update: int

    def __post_init__(self) -> None:
        self.target_network = copy.deepcopy(self.network)
        self.count = 0

    def step(self) -> float:
        """Take one step; return its loss."""
        sample = self.replay.sample(min(self.batch_size, len(self.replay)))
        with torch.no_grad():
            next_q_values = self.target_network(sample.next_states.to(self.device))
        loss = custom_loss(
            self.network(sample.states.to(self.device)),
            sample.actions.to(self.device),
            sample.rewards.to(self.device),
            self.gamma,
            next_q_values,
            sample.dones.to(self.device),
        )
        self.optimizer.zero_grad()
        loss.backward()
        self.optimizer.step()
        self.count += 1
        if self.count % self.target_update == 0:
            self.target_network.load_state_dict(self.network.state_dict())
        return loss.item()


def _transitions(
    batch: LabelledBatch,
    transformer: nn.Module,
    dq_learning_model: nn.Module,
    tokenizer: Any,
    device: torch.device | str,
    epsilon: float,
    generator: torch.Generator,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None, torch.Tensor | None]:
    """Return states (n, d), actions (n,), rewards (n,), next states (n, d) and dones (n,) of a batch."""
    hidden, mask = _hidden(transformer, tokenizer, batch.input_ids, batch.attention_mask, device)
    rewards, dones = batch.rewards.to(device), batch.dones
    next_states = None
    if rewards.ndim == 3:
        _check_every_position(batch, transformer, mask)
        real = mask.bool()
        ends = torch.arange(mask.shape[1], device=mask.device) == _last(mask)[:, None]  # (B, T)
        states, next_states = hidden[real], hidden.roll(-1, dims=1)[real]
        rewards, dones = rewards[real], ends[real]
    else:
        states = _state(hidden, mask)
        if batch.next_input_ids is not None:
            next_states = _state(
                *_hidden(transformer, tokenizer, batch.next_input_ids, batch.next_attention_mask, device)
            )
    if batch.actions is not None:
        return states, batch.actions.to(device), rewards, next_states, dones
    actions = _choose(dq_learning_model, states, epsilon, generator)
    if rewards.ndim != 2 or len(rewards) != len(actions) or int(actions.max()) >= rewards.shape[1]:
        raise ConfigError(
            f"without actions, rewards must be (B, A) for the A actions of the Q-network; got {tuple(rewards.shape)}"
        )
    return states, actions, rewards.gather(1, actions[:, None]).squeeze(1), next_states, dones


def _check_every_position(batch: LabelledBatch, transformer: nn.Module, mask: torch.Tensor) -> None:
    """Check a batch with a decision at every position: rewards (B, T, A)."""
    if isinstance(transformer, PrunedTransformerModel) and not transformer.model.can_generate():
        raise ConfigError(
            "a decision at every position needs a causal transformer: this encoder sees the tokens to come. "
            "Give it one prefix a row, with rewards (B, A)."
        )
    if batch.rewards.shape[:2] != mask.shape or batch.actions is not None:
        shapes = f"{tuple(batch.rewards.shape)}, {tuple(mask.shape)}"
        raise ConfigError(f"rewards (B, T, A) need ids (B, T) and no actions; got {shapes}")


@torch.no_grad()
def _hidden(
    transformer: nn.Module,
    tokenizer: Any,
    input_ids: torch.Tensor | Sequence[str],
    mask: torch.Tensor | None,
    device: torch.device | str,
) -> tuple[torch.Tensor, torch.Tensor]:
    """Return hidden states (B, T, d) in float32, and the mask (B, T)."""
    if isinstance(input_ids, torch.Tensor):
        ids, mask = input_ids, torch.ones_like(input_ids) if mask is None else mask
    elif getattr(tokenizer, "pad_token", "") is None:  # such a tokenizer refuses to pad
        encoded = tokenizer(list(input_ids), truncation=True)["input_ids"]
        ids, mask = padded([torch.tensor(row, dtype=torch.long) for row in encoded])
    else:
        encoded = tokenizer(list(input_ids), padding=True, truncation=True, return_tensors="pt")
        ids, mask = encoded["input_ids"], encoded["attention_mask"]
    mask = mask.to(device)
    return transformer(ids.to(device), mask).float(), mask


def padded(rows: list[torch.Tensor]) -> tuple[torch.Tensor, torch.Tensor]:
    """Return ids (B, T), padded on the right with 0, and mask (B, T) of rows of ids."""
    ids = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True)
    lengths = torch.tensor([len(row) for row in rows])
    return ids, (torch.arange(ids.shape[1]) < lengths[:, None]).long()


def _last(mask: torch.Tensor) -> torch.Tensor:
    """Return the place of the last real token in each row: (B, T) -> (B,)."""
    return (mask * torch.arange(1, mask.shape[1] + 1, device=mask.device)).argmax(dim=1)


def _state(hidden: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
    """Return the hidden state at the last real token, which has seen all others: (B, T, d) -> (B, d)."""
    return hidden[torch.arange(len(hidden), device=hidden.device), _last(mask)]


@torch.no_grad()
def _choose(
    dq_learning_model: nn.Module, states: torch.Tensor, epsilon: float, generator: torch.Generator
) -> torch.Tensor:
    """Return epsilon-greedy actions, (n,)."""
    q_values = dq_learning_model(states)  # (n, A)
    explore = torch.rand(len(states), generator=generator) < epsilon
    anything = torch.randint(q_values.shape[1], (len(states),), generator=generator)
    return torch.where(explore.to(q_values.device), anything.to(q_values.device), q_values.argmax(dim=1))


def _warn_about_frozen_weights(transformer: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    frozen = {id(parameter) for parameter in transformer.parameters()}
    if any(id(parameter) in frozen for group in optimizer.param_groups for parameter in group["params"]):
        warnings.warn(
            "train_model keeps the transformer frozen (the replay holds its hidden states); the optimizer's "
            "transformer parameters will not change. Give it those of dq_learning_model only.",
            stacklevel=3,
        )


def _mean(total: float, count: int) -> float:
    return total / count if count else math.nan
