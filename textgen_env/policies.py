"""The arithmetic of policies over candidates."""

from __future__ import annotations

from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]


class Agent(Protocol):
    """Stable-Baselines3's ``predict``. An agent may also have ``probabilities(observation) -> (B, k)``."""

    def predict(
        self,
        observation: Any,
        state: tuple[Any, ...] | None = None,
        episode_start: Any = None,
        deterministic: bool = False,
    ) -> tuple[Any, Any]:
        """Return (B,) actions and a state (None for agents without memory)."""


def renormalise(logprobs: npt.ArrayLike, legal: npt.ArrayLike) -> tuple[Floats, Floats]:
    """Return log-probabilities (..., k) renormalised over the legal candidates, and their log mass (...)."""
    masked = np.where(np.asarray(legal, bool), np.asarray(logprobs, np.float64), -np.inf)
    log_mass = np.logaddexp.reduce(masked, axis=-1)
    return masked - log_mass[..., None], log_mass


def kl_to(policy: Floats, log_prior: Floats) -> Floats:
    """Return KL(policy || prior) over the last axis, nats; a policy of 0 contributes nothing."""
    positive = policy > 0
    log_ratio = np.log(policy, where=positive, out=np.zeros_like(policy)) - np.where(positive, log_prior, 0.0)
    return np.maximum(np.sum(policy * log_ratio, axis=-1), 0.0)  # rounding may leave -1e-17


def sample(policy: Floats, numbers: Floats) -> npt.NDArray[np.int64]:
    """Return one action a row of ``policy`` (B, k), given uniform ``numbers`` (B,) in [0, 1)."""
    cumulated = np.cumsum(policy, axis=-1)
    return np.sum(cumulated <= numbers[:, None] * cumulated[:, -1:], axis=-1)


def last_legal(legal: npt.NDArray[np.bool_]) -> npt.NDArray[np.int64]:
    """Return the last legal action of each row of ``legal`` (B, k): (B,)."""
    return legal.shape[-1] - 1 - np.argmax(legal[:, ::-1], axis=-1)
