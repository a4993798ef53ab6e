"""Everything that may be given as a reward, and rewards made of rewards.

``make_reward`` takes a name, JSON, a function, an object of another library, or a mix of them;
``reward_spec`` goes back to JSON where there is a way back.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from textgen_env.config import check_unicode
from textgen_env.errors import ConfigError
from textgen_env.registry import build
from textgen_env.rewards.adapters import EvaluateReward, PipelineReward, comes_from
from textgen_env.rewards.base import REWARDS, Generation, Reward, RunningScore, Scored, ScoreState, check_rewards
from textgen_env.rewards.functions import FunctionReward


def make_reward(spec: Any) -> Reward:
    """Return the reward that ``spec`` means.

    ============================================  =======================================================
    ``"sentiment"``                               a name in ``REWARDS``
    ``{"name": "keywords", "words": ["sun"]}``    a name with settings
    ``{"sentiment": 1.0, "repetition": -0.5}``    a weighted mix of names
    ``[["sentiment", 1.0], [function, 0.5]]``     a weighted mix of anything in this table
    a Python function                             one completion in, one number out; one marked with
                                                  ``@batch_reward`` takes the batch of ``Generation``
    a ``Reward``                                  itself
    an ``evaluate.EvaluationModule``              its figure, text by text
    a text-classification pipeline                the probability of its last label
    ============================================  =======================================================

    Raises:
        UnknownName: no reward of that name (suggests one).
        ConfigError: settings that the reward does not take, a weight that is not a finite number,
            or a value that means no reward.
    """
    if isinstance(spec, Reward):
        return spec
    check_unicode("the settings of a reward", spec)
    if isinstance(spec, str):
        return build(REWARDS, spec)
    if isinstance(spec, Mapping):
        return build(REWARDS, **spec) if "name" in spec else Mix.of(list(spec.items()))
    if isinstance(spec, list):
        return Mix.of(spec)
    if comes_from(spec, "evaluate"):
        return EvaluateReward(spec)
    if comes_from(spec, "transformers.pipelines"):
        return PipelineReward(spec)
    if callable(spec):
        return FunctionReward(spec)
    raise ConfigError(
        f"{spec!r} is no reward; give a name ({', '.join(sorted(REWARDS))}), a dict, a list of "
        "[reward, weight], a function of one completion, or a Reward"
    )


def reward_spec(reward: Reward) -> Any:
    """Return plain data that ``make_reward`` turns into an equal reward, or None if there is none.

    There is none for functions and other objects, nor for rewards that contain one.
    """
    if isinstance(reward, Mix):
        parts = [[reward_spec(part), weight] for part, weight in reward.parts]
        return None if any(part is None for part, _ in parts) else parts
    if reward.name not in REWARDS or REWARDS[reward.name] is not type(reward):
        return None
    settings: dict[str, Any] = {}
    for field in dataclasses.fields(reward):  # type: ignore[arg-type]
        value = getattr(reward, field.name)
        if value == field.default:
            continue
        if isinstance(value, Reward):
            value = reward_spec(value)
            if value is None:
                return None
        settings[field.name] = list(value) if isinstance(value, tuple) else value
    return {"name": reward.name, **settings} if settings else reward.name


@dataclass(frozen=True)
class Mix(Reward):
    """A weighted sum of rewards.

    Range: the weighted sum of the parts' ranges. Parts are reported by name and unweighted; a
    second part of the same name is called ``name_2``. The running score is the weighted sum of the
    parts that have one; the values of the others are paid at the end.
    """

    parts: tuple[tuple[Reward, float], ...]

    name = "mix"

    @classmethod
    def of(cls, parts: Sequence[Any]) -> Mix:
        """Return the mix of ``(anything make_reward takes, weight)`` pairs.

        Raises:
            ConfigError: no parts, something else than pairs, or a weight that is not a finite number.
        """
        if not parts:
            raise ConfigError("a mix needs at least one reward, got none")
        made = []
        for pair in parts:
            if not isinstance(pair, list | tuple) or len(pair) != 2:
                raise ConfigError(f"a mix is a list of [reward, weight], got the entry {pair!r}")
            made.append((make_reward(pair[0]), _weight(pair[1], pair[0])))
        return cls(tuple(made))

    def __call__(self, generations: Sequence[Generation]) -> npt.NDArray[np.float64]:
        return self.scored(generations).total

    def scored(self, generations: Sequence[Generation]) -> Scored:
        total = np.zeros(len(generations))
        by_name: dict[str, npt.NDArray[np.float64]] = {}
        for part, weight in self.parts:
            values = part.scored(generations).total
            with np.errstate(over="ignore", invalid="ignore"):  # refused below
                total += weight * values
            by_name[_free_name(part.name, by_name)] = values
        return Scored(check_rewards(self.name, lambda _: total, generations), by_name)

    def running(self) -> RunningScore[Any] | None:
        scores = [(part.running(), weight) for part, weight in self.parts]
        running = [(score, weight) for score, weight in scores if score is not None]
        return _WeightedScore(running) if running else None


@REWARDS.register("shaped")
@dataclass(frozen=True)
class Shaped(Reward):
    """A reward paid at the end, with steps paid by the running score of another one.

    The return is that of ``reward``. Along the way the agent sees and is paid ``weight``
    times the running score of ``potential``, and the last step takes it back: potential-based
    shaping with potential 0 at the end, which keeps the optimal policy.

    Range: that of ``reward``.
    Running score: that of ``potential`` times ``weight``.
    How it is gamed: as ``reward`` is; the potential earns nothing in the end.

    Args:
        reward: Anything that ``make_reward`` takes.
        potential: Anything that ``make_reward`` takes and that has a running score.
        weight: Scales the potential.

    Source: Ng, Harada and Russell 1999, "Policy invariance under reward transformations".
    """

    reward: Any
    potential: Any
    weight: float = 1.0

    name = "shaped"

    def __post_init__(self) -> None:
        object.__setattr__(self, "reward", make_reward(self.reward))
        object.__setattr__(self, "potential", make_reward(self.potential))
        object.__setattr__(self, "weight", _weight(self.weight, self.name))
        if self.potential.running() is None:
            raise ConfigError(f"reward {self.potential.name!r} has no running score, so it is no potential")

    def __call__(self, generations: Sequence[Generation]) -> npt.NDArray[np.float64]:
        return self.scored(generations).total

    def scored(self, generations: Sequence[Generation]) -> Scored:
        scored: Scored = self.reward.scored(generations)
        return scored

    def running(self) -> RunningScore[Any]:
        return _WeightedScore([(self.potential.running(), self.weight)])


@dataclass(frozen=True, slots=True)
class _WeightedState:
    states: tuple[ScoreState, ...]
    value: float


class _WeightedScore:
    """The weighted sum of running scores."""

    def __init__(self, scores: Sequence[tuple[RunningScore[Any], float]]) -> None:
        self._scores = [score for score, _ in scores]
        self._weights = [weight for _, weight in scores]

    def start(self, prompt: str, reference: str | None, metadata: Mapping[str, Any]) -> _WeightedState:
        return self._state(tuple(score.start(prompt, reference, metadata) for score in self._scores))

    def extend(self, state: _WeightedState, completion: str) -> _WeightedState:
        pairs = zip(self._scores, state.states, strict=True)
        return self._state(tuple(score.extend(part, completion) for score, part in pairs))

    def lookahead(self, state: _WeightedState, completions: Sequence[str]) -> npt.NDArray[np.float32]:
        total = np.zeros(len(completions), np.float32)
        for score, weight, part in zip(self._scores, self._weights, state.states, strict=True):
            total += np.float32(weight) * score.lookahead(part, completions)
        return total

    def _state(self, states: tuple[ScoreState, ...]) -> _WeightedState:
        value = sum(weight * state.value for weight, state in zip(self._weights, states, strict=True))
        return _WeightedState(states, value)


def _weight(weight: Any, reward: Any) -> float:
    is_number = isinstance(weight, int | float | np.number) and not isinstance(weight, bool)
    if not is_number or not math.isfinite(weight):
        raise ConfigError(f"the weight of reward {reward!r} must be a finite number, got {weight!r}")
    return float(weight)


def _free_name(name: str, taken: Mapping[str, Any]) -> str:
    if name not in taken:
        return name
    return next(numbered for n in range(2, len(taken) + 2) if (numbered := f"{name}_{n}") not in taken)
