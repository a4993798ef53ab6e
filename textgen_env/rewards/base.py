"""What a reward is: a batch of finished texts in, one number a text out.

Some rewards can also score an unfinished text, cheaply and incrementally. They offer a
``RunningScore``; the environment then shows ``score`` and ``candidate_scores`` to the agent and
can pay the increments step by step (``reward_at="step"``). A running score's value for the whole
completion equals the reward, so the increments sum to it.

    [Generation] * B  ->  Reward  ->  (B,) float64
    completion so far ->  RunningScore.extend -> state (.value)  ->  lookahead -> (k,) float32
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt


@dataclass(frozen=True)
class Generation:
    """One finished text, everything a reward may want to know about it.

    ``text`` is prompt plus completion; ``ids`` and ``logprobs`` (nats, full vocabulary) are those
    of the completion; ``reference`` and ``metadata`` come with the prompt.
    """

    prompt: str
    completion: str
    prompt_ids: tuple[int, ...] = ()
    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    finish_reason: str = "length"  # "eos", "stop" or "length"
    reference: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)

    @property
    def text(self) -> str:
        return self.prompt + self.completion


@runtime_checkable
class ScoreState(Protocol):
    """What a running score knows of one row. Immutable: rows that fork may share it."""

    @property
    def value(self) -> float:
        """The score of the completion so far, in reward units."""


@runtime_checkable
class RunningScore(Protocol):
    """Scores prefixes of one completion, reusing what the prefix already paid for."""

    def start(self, prompt: str, reference: str | None, metadata: Mapping[str, Any]) -> ScoreState:
        """Return the state of the empty completion."""

    def extend(self, state: ScoreState, completion: str) -> ScoreState:
        """Return the state of ``completion``, which usually, but not always, extends the state's own
        (the last characters of a partial code point may change)."""

    def lookahead(self, state: ScoreState, completions: Sequence[str]) -> npt.NDArray[np.float32]:
        """Return what each of k alternative completions would score: (k,) values of ``extend``."""


@dataclass(frozen=True)
class Scored:
    """Checked rewards of a batch: the total (B,) and the named parts it is made of, each (B,)."""

    total: npt.NDArray[np.float64]
    parts: Mapping[str, npt.NDArray[np.float64]]


class Reward(ABC):
    """A batch of finished texts to (B,) finite floats. Subclasses set ``name``."""

    name: str

    @abstractmethod
    def __call__(self, generations: Sequence[Generation]) -> npt.NDArray[np.float64]:
        """Return one finite number a generation."""

    def running(self) -> RunningScore | None:
        """Return the running score, or None where a prefix cannot be scored."""
        return None

    def scored(self, generations: Sequence[Generation]) -> Scored:
        """Call the reward and check what it answers.

        Raises:
            RewardError: the reward raised, or answered the wrong shape, dtype, NaN or infinity.
                Names the reward and the text; a raised error is chained.
        """
        total = check_rewards(self.name, self, generations)
        return Scored(total, {self.name: total})
