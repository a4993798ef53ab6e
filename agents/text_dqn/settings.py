"""Every setting of TextDQN with its type and range: checked when it is given and when it is read from a file.

A file is somebody's words, so reading takes only the names listed here, and only values in range:
a folder to write to, a size of 1e12 numbers or a count of 1e89 steps never reaches the learner.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from numbers import Integral, Real
from typing import Any

from agents.text_dqn.targets import OBJECTIVES, UNDISCOUNTED
from textgen_env.errors import ConfigError

MANY = 2**53
"""More steps, updates or bytes than any machine counts; still exact as a float."""


@dataclass(frozen=True)
class Range:
    """A number in ``low..high``, both included unless ``above``; finite.

    Args:
        whole: Only integers.
        above: ``low`` itself is excluded.
        optional: None is allowed, too.
        unit: Said in the error.
    """

    low: float = 0
    high: float = math.inf
    whole: bool = False
    above: bool = False
    optional: bool = False
    unit: str = ""

    def check(self, name: str, value: Any) -> Any:
        """Return ``value`` as a plain int or float.

        Raises:
            ConfigError: another type, or out of range (says name, range and value).
        """
        if value is None and self.optional:
            return None
        kind = Integral if self.whole else Real
        plain = isinstance(value, kind) and not isinstance(value, bool) and math.isfinite(value)
        if not plain or not self.low <= value <= self.high or (self.above and value == self.low):
            raise ConfigError(f"{name} must be {self}, got {value!r}")
        return int(value) if self.whole else float(value)

    def __str__(self) -> str:
        number = "a whole number" if self.whole else "a number"
        if self.above and self.low == 0:
            text = number.replace("a ", "a positive ", 1) + ("" if math.isinf(self.high) else f" up to {self.high:g}")
        elif math.isinf(self.high):
            text = f"{number} of at least {self.low:g}"
        else:
            text = f"{number} from {self.low:g} to {self.high:g}"
        return f"{text} ({self.unit})" if self.unit else text


NATS = "reward units a nat"
COUNT = Range(0, MANY, whole=True)

SCORES = ("auto", "given", "learned", "judge", None)
"""Where running scores come from; see ``TextDQN``."""

SETTINGS: Mapping[str, Range] = {
    "beta": Range(above=True, unit=NATS),
    "target_beta": Range(above=True, unit=NATS),
    "beta_start": Range(above=True, optional=True, unit=NATS),
    "exploration_fraction": Range(0, 1),
    "trace_lambda": Range(0, 1),
    "lm_share": Range(0, 1, optional=True),
    "unjudged": Range(0, 100),
    "learning_rate": Range(0),
    "learning_starts": COUNT,
    "steps_per_update": Range(1, MANY, whole=True),
    "batch_size": Range(1, 2**20, whole=True),
    "tau": Range(0, 1),
    "buffer_size": Range(1, MANY, whole=True),
    "gamma": Range(0, 1),
    "max_grad_norm": Range(above=True),
    "stats_window_size": Range(1, 2**20, whole=True),
    "seed": Range(0, 2**32 - 1, whole=True, optional=True),
}
"""Settings that are numbers. ``target`` is a name in ``OBJECTIVES``, ``learning_rate`` may also be a schedule."""

COUNTERS: Mapping[str, Range] = {
    "num_timesteps": COUNT,
    "episodes": COUNT,
    "progress_remaining": Range(-MANY, 1),  # below 0 where the last step of all rows went beyond the end
}
"""Where the training stands, beside the learner's own counters."""


def check_settings(given: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of ``SETTINGS``, ``target`` and ``score`` that are ``given``, each checked.

    Raises:
        ConfigError: a value of another type or out of range, or a discount that the target does not know.
        UnknownName: no such target (with a suggestion).
    """
    checked = {
        name: value if name == "learning_rate" and callable(value) else SETTINGS[name].check(name, value)
        for name, value in given.items()
        if name in SETTINGS
    }
    if "target" in given:
        OBJECTIVES[given["target"]]
        checked["target"] = given["target"]
        if given["target"] in UNDISCOUNTED and checked.get("gamma", 1.0) != 1.0:
            raise ConfigError(f"target={given['target']!r} needs gamma=1, got {checked['gamma']}: it has no discount")
    if "score" in given:
        if given["score"] not in SCORES:
            raise ConfigError(f"score must be one of {SCORES}, got {given['score']!r}")
        checked["score"] = given["score"]
    return checked
