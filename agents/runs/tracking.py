"""The figures of a run in an experiment tracker, under Stable-Baselines3's own tags.

TensorBoard's events are in the folder of every run. Weights & Biases and Trackio share one interface (``init``,
``log``, ``finish``), so one writer of SB3's logger serves both; where they store is set as each of them documents.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from stable_baselines3.common.logger import KVWriter

from agents.runs.report import Report
from textgen_env.errors import ConfigError
from textgen_env.extras import require

TRACKERS = ("tensorboard", "wandb", "trackio")
PROJECT = "textgen-env"
"""Name of the project in a tracker."""


def check_tracker(name: str | None) -> None:
    """Check that a tracker of this name can be used; None is no tracker.

    Raises:
        ConfigError: no such tracker, or its package is not installed (names the extra).
    """
    if name is None:
        return
    if name not in TRACKERS:
        raise ConfigError(f"--track must be one of {', '.join(TRACKERS)}, got {name!r}")
    require(name, extra=name, for_=f"--track {name}")


class TrackerWriter(KVWriter):
    """Send the numbers of SB3's logger to Weights & Biases or Trackio.

    Args:
        tracker: ``"wandb"`` or ``"trackio"``.
        run: Name of the run in the tracker.
        config: The run's configuration, plain data.

    Raises:
        ConfigError: the package is not installed, or the tracker does not start: says why.
    """

    def __init__(self, tracker: str, run: str, config: Mapping[str, Any]) -> None:
        self._module = require(tracker, extra=tracker, for_=f"--track {tracker}")
        try:
            self._module.init(project=PROJECT, name=run, config=dict(config))
        except Exception as error:  # each has its own: no account, no network, no disk
            raise ConfigError(f"{tracker} cannot start: {type(error).__name__}: {error}") from error

    def write(self, key_values: dict[str, Any], key_excluded: dict[str, tuple[str, ...]], step: int = 0) -> None:
        """Log what SB3 would give to TensorBoard, numbers only, at ``step`` environment steps."""
        shown = [name for name in key_values if "tensorboard" not in (key_excluded.get(name) or ())]
        numbers = {name: key_values[name] for name in shown if isinstance(key_values[name], int | float | np.number)}
        self._module.log({name: float(value) for name, value in numbers.items()}, step=step)

    def close(self) -> None:
        """End the tracker's run."""
        self._module.finish()


def sb3_tags(means: Mapping[str, float], steps: int, seconds: float, episodes: int) -> dict[str, float]:
    """Return the figures of recent texts and the time under the names that SB3's own agents log them by.

    Args:
        means: ``reward`` and ``length`` of recent texts, if any has ended.
        steps, seconds, episodes: Environment steps, seconds of training and texts so far.
    """
    names = {"rollout/ep_rew_mean": "reward", "rollout/ep_len_mean": "length"}
    tags = {tag: means[name] for tag, name in names.items() if name in means}
    tags |= {"time/episodes": episodes, "time/total_timesteps": steps, "time/time_elapsed": seconds}
    return tags | ({"time/fps": steps / seconds} if seconds > 0 else {})


def evaluation_tags(report: Report) -> dict[str, float]:
    """Return the measures of a report's agent by tag: ``eval/mean_reward``, as of SB3's ``EvalCallback``, and others.

    ``eval/value`` is J; ``eval/share`` of the optimal gain is missing where it means nothing, and ``eval/kl`` where
    the agent has no probabilities.
    """
    line = next(row for row in report.rows if row.name == report.agent)
    details = line.details or {}
    named = {"mean_reward": line.reward, "mean_ep_length": details.get("length")}
    named |= {"kl": line.kl, "value": line.value, "share": line.share}
    named |= {name: details.get(name) for name in ("likelihood", "distinct_2", "repetition")}
    return {f"eval/{name}": float(value) for name, value in named.items() if value is not None}
