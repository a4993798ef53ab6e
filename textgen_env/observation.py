"""What an agent sees: spaces and observations."""

from __future__ import annotations

from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from textgen_env.episode import Episodes
from textgen_env.models.base import MASKED_LOGPROB

LARGE = 1e6
"""Bound of scores and hidden units: far outside what they reach, and finite."""


def observation_space(episodes: Episodes) -> spaces.Space[Any]:
    """Return the space of one row's observation."""
    length, k = episodes.max_length, episodes.k
    last_id = episodes.model.vocab_size - 1
    boxes: dict[str, spaces.Space[Any]] = {
        "tokens": spaces.Box(0, last_id, (length,), np.int32),
        "length": spaces.Box(0, length, (1,), np.int32),
        "budget": spaces.Box(0.0, 1.0, (1,), np.float32),
        "candidates": spaces.Box(0, last_id, (k,), np.int32),
        "logprobs": spaces.Box(MASKED_LOGPROB, 0.0, (k,), np.float32),
        "score": spaces.Box(-LARGE, LARGE, (1,), np.float32),
        "candidate_scores": spaces.Box(-LARGE, LARGE, (k,), np.float32),
        "action_mask": spaces.Box(0, 1, (k,), np.int8),
        "hidden": spaces.Box(-LARGE, LARGE, (episodes.model.hidden_size,), np.float32),
    }
    match episodes.config.observation:
        case "hidden":
            return spaces.Box(-LARGE, LARGE, (episodes.model.hidden_size + k + 2,), np.float32)
        case "tokens":
            return spaces.Box(-1.0, float(max(last_id, length)), (length + 2,), np.float32)
    return spaces.Dict({key: boxes[key] for key in episodes.keys})


def flatten(episodes: Episodes, observation: dict[str, npt.NDArray[Any]]) -> Any:
    """Return the observation as configured: the Dict itself, or its flat Box. Any leading axes."""
    match episodes.config.observation:
        case "hidden":
            return np.concatenate([observation[key] for key in ("hidden", "logprobs", "budget", "score")], axis=-1)
        case "tokens":
            ids, length = observation["tokens"], observation["length"]
            padded = np.where(np.arange(ids.shape[-1]) < length, ids, -1)
            return np.concatenate([length, observation["budget"], padded], axis=-1).astype(np.float32)
    return observation
