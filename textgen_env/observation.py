"""Observations: their spaces, and the arrays behind each key.

The environments and ``generate`` under an agent must agree on both to the bit, so the rules are
here, as functions of plain arrays.

    logprobs (B, k)  ->  legal_candidates  ->  legal (B, k), logprobs (B, k) with the rest masked
    columns: one (B,) or (B, n) array a key  ->  as_observation  ->  Dict of (B, n)  ->  flatten  ->  Box (B, m)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
from gymnasium import spaces

from textgen_env.config import EnvConfig
from textgen_env.models.base import MASKED_LOGPROB, LanguageModel
from textgen_env.models.candidates import nucleus

Observation = dict[str, npt.NDArray[Any]]

LARGE = 1e6
"""Bound of scores and hidden units: far outside their usual range, and finite. Larger scores are shown as it."""

_DTYPES: Mapping[str, Any] = {
    **dict.fromkeys(("tokens", "length", "candidates", "source", "turn"), np.int32),
    **dict.fromkeys(("action_mask", "speaker"), np.int8),
}
"""Dtypes of the keys; the others are float32."""


def observation_space(config: EnvConfig, keys: Sequence[str], model: LanguageModel) -> spaces.Space[Any]:
    """Return the space of one row's observation with these keys."""
    length, k, last_id = config.max_length, config.num_actions(model.vocab_size), model.vocab_size - 1
    match config.observation:
        case "hidden":
            return spaces.Box(-LARGE, LARGE, (model.hidden_size + k + 2,), np.float32)
        case "tokens":
            return spaces.Box(-1.0, float(max(last_id, length)), (length + 2,), np.float32)
    bounds: dict[str, tuple[float, float, int]] = {  # lowest, highest, size
        "tokens": (0, last_id, length),
        "length": (0, length, 1),
        "budget": (0.0, 1.0, 1),
        "candidates": (0, last_id, k),
        "logprobs": (MASKED_LOGPROB, 0.0, k),
        "score": (-LARGE, LARGE, 1),
        "candidate_scores": (-LARGE, LARGE, k),
        "action_mask": (0, 1, k),
        "hidden": (-LARGE, LARGE, model.hidden_size),
        "turn": (0, config.max_turns, 1),
        "turn_budget": (0.0, 1.0, 1),
        "speaker": (0, 2, length),
        "source": (-1, last_id, config.max_prompt_tokens),
    }
    boxes: dict[str, spaces.Space[Any]] = {
        key: spaces.Box(*bounds[key][:2], bounds[key][2:], _DTYPES.get(key, np.float32)) for key in keys
    }
    return spaces.Dict(boxes)


def flatten(config: EnvConfig, observation: Observation) -> Any:
    """Return the observation as configured: the Dict itself, or its flat Box. Any leading axes."""
    match config.observation:
        case "hidden":
            return np.concatenate([observation[key] for key in ("hidden", "logprobs", "budget", "score")], axis=-1)
        case "tokens":
            ids, length = observation["tokens"], observation["length"]
            padded = np.where(np.arange(ids.shape[-1]) < length, ids, -1)
            return np.concatenate([length, observation["budget"], padded], axis=-1).astype(np.float32)
    return observation


def as_observation(columns: Mapping[str, npt.NDArray[Any]]) -> Observation:
    """Return the arrays of an observation: (B,) becomes (B, 1), each in its key's dtype; scores within ``LARGE``."""
    scores = {key: columns[key].clip(-LARGE, LARGE) for key in columns.keys() & {"score", "candidate_scores"}}
    return {
        key: (values[:, None] if values.ndim == 1 else values).astype(_DTYPES.get(key, np.float32), copy=False)
        for key, values in {**columns, **scores}.items()
    }


def budget_left(steps: npt.NDArray[np.int64], max_new_tokens: int) -> npt.NDArray[np.float64]:
    """Return the share of the budget that is left after (B,) steps, 1 to 0."""
    return 1.0 - steps / max_new_tokens


def legal_candidates(
    logprobs: npt.NDArray[np.float32], top_k: int | None, top_p: float
) -> tuple[npt.NDArray[np.bool_], npt.NDArray[np.float32]]:
    """Return which candidates are legal, (B, k), and the log-probabilities with ``MASKED_LOGPROB`` elsewhere.

    A candidate is legal unless the model blocked it or it is outside the nucleus.

    Args:
        logprobs: (B, k) nats, best first; in id order where ``top_k`` is None.
        top_k: As in the configuration.
        top_p: Of the nucleus, in (0, 1].
    """
    legal = logprobs > MASKED_LOGPROB
    if top_p < 1.0 and top_k is not None:
        legal &= nucleus(logprobs, top_p)
    elif top_p < 1.0:
        order = np.argsort(-logprobs, axis=-1, kind="stable")  # sort, cut, put back
        inside = np.empty(logprobs.shape, np.bool_)
        np.put_along_axis(inside, order, nucleus(np.take_along_axis(logprobs, order, -1), top_p), -1)
        legal &= inside
    return legal, np.where(legal, logprobs, np.float32(MASKED_LOGPROB))
