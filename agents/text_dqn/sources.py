"""Where the steps that a learner learns from come from: an SB3 ``VecEnv``, or texts written elsewhere."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
from stable_baselines3.common.logger import Logger

from agents.text_dqn.learner import Learner
from agents.text_dqn.replay import Acted


@dataclass(frozen=True)
class Collected:
    """Whole texts that were written elsewhere."""

    steps: Mapping[str, npt.NDArray[Any]]  # (S, ...) a name, as ``EpisodeReplay.take`` hands them over
    lengths: npt.NDArray[np.int64]  # (E,)
    infos: list[dict[str, Any]]  # E dicts with SB3's "episode", and "reward_parts"
    counted: int  # environment steps that they count for


class EpisodeSource(Protocol):
    """Writes the texts that an agent learns from, where its own environment does not."""

    def collect(self, learner: Learner, logger: Logger, progress: float, steps_left: int) -> Collected | None:
        """Return some texts, at most ``steps_left`` steps of them counted; None if none came in time."""
        ...


def add_step(
    learner: Learner,
    observation: Any,
    new_obs: Any,
    acted: Acted,
    rewards: npt.NDArray[Any],
    dones: npt.NDArray[np.bool_],
    infos: list[dict[str, Any]],
    judged: npt.NDArray[Any] | None = None,
) -> None:
    """Let ``learner`` remember a step of an SB3 ``VecEnv``, whose infos hold the last observation of ended texts."""
    last = new_obs
    if dones.any():
        last = {key: value.copy() for key, value in new_obs.items()}
        for i in np.flatnonzero(dones):
            for key, value in last.items():
                value[i] = infos[i]["terminal_observation"][key]
    truncated = np.array([bool(info.get("TimeLimit.truncated")) for info in infos])
    learner.add(observation, last, acted, rewards, dones, truncated, judged)
