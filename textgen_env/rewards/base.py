"""The interface of rewards: a batch of finished texts in, one number a text out.

Some rewards can also score an unfinished text, cheaply and incrementally. They offer a
``RunningScore``; the environment then shows ``score`` and ``candidate_scores`` to the agent and
can pay the increments step by step (``reward_at="step"``). A running score's value for the whole
completion equals the reward, so the increments sum to it; where it covers only a part (a mix with
a part that cannot be scored, ``Shaped``), the last step pays the difference.

    [Generation] * B  ->  Reward  ->  (B,) float64
    completion so far ->  RunningScore.extend -> state (.value)  ->  lookahead -> (k,) float32
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol, TypeVar, runtime_checkable

import numpy as np
import numpy.typing as npt

from textgen_env.errors import RewardError
from textgen_env.registry import Registry

LARGEST = 1e30
"""Rewards beyond it, in size, are refused: sums of them leave float32, in which agents learn."""


class Turn(NamedTuple):
    """What one speaker of a conversation has said at a time."""

    speaker: str  # "agent" or "partner"
    text: str
    reward: float = 0.0  # of a partner's reply


@dataclass(frozen=True)
class Generation:
    """One finished text, everything a reward may want to know about it.

    ``text`` is prompt plus completion; ``ids`` and ``logprobs`` (nats, full vocabulary) are those
    of the completion; ``reference`` and ``metadata`` come with the prompt. In a conversation the
    completion is everything behind the prompt, replies included (their tokens have log-probability 0),
    and ``turns`` tells who said what.
    """

    prompt: str
    completion: str
    prompt_ids: tuple[int, ...] = ()
    ids: tuple[int, ...] = ()
    logprobs: tuple[float, ...] = ()
    finish_reason: str = "length"  # "eos", "stop", "length"; with a partner "length", "turns" or "partner"
    reference: str | None = None
    metadata: Mapping[str, Any] = field(default_factory=dict)
    turns: tuple[Turn, ...] = ()

    @property
    def text(self) -> str:
        return self.prompt + self.completion

    def as_info(self) -> dict[str, Any]:
        """Return what an environment's ``info`` says of a text that has ended."""
        return {
            "prompt": self.prompt,
            "completion": self.completion,
            "text": self.text,
            "finish_reason": self.finish_reason,
            "logprob": float(np.sum(self.logprobs)),
        }


@runtime_checkable
class ScoreState(Protocol):
    """The state of a running score for one row. Immutable: rows that fork may share it."""

    @property
    def value(self) -> float:
        """The score of the completion so far, in reward units."""


S = TypeVar("S", bound=ScoreState)


@runtime_checkable
class RunningScore(Protocol[S]):
    """Scores prefixes of one completion, reusing the work on shorter prefixes."""

    def start(self, prompt: str, reference: str | None, metadata: Mapping[str, Any]) -> S:
        """Return the state of the empty completion."""

    def extend(self, state: S, completion: str) -> S:
        """Return the state of ``completion``, which usually, but not always, extends the state's own
        (the last characters of a partial code point may change)."""

    def lookahead(self, state: S, completions: Sequence[str]) -> npt.NDArray[np.float32]:
        """Return the scores of k alternative completions: (k,) values of ``extend``."""


@dataclass(frozen=True)
class Scored:
    """Checked rewards of a batch: the total (B,) and the named parts it is made of, each (B,)."""

    total: npt.NDArray[np.float64]
    parts: Mapping[str, npt.NDArray[np.float64]]


class Reward(ABC):
    """A batch of finished texts to (B,) finite floats. Subclasses set ``name``.

    The score of a text must not depend on its neighbours in the batch. A registered reward is a
    frozen dataclass whose fields are plain data, so a run folder can store it.
    """

    name: str

    @abstractmethod
    def __call__(self, generations: Sequence[Generation]) -> npt.NDArray[np.float64]:
        """Return one finite number a generation."""

    def running(self) -> RunningScore[Any] | None:
        """Return the running score, or None where a prefix cannot be scored."""
        return None

    def scored(self, generations: Sequence[Generation]) -> Scored:
        """Call the reward and check its answer.

        Raises:
            RewardError: the reward raised, or answered the wrong shape, dtype, NaN or infinity.
                Names the reward and the text; a raised error is chained.
        """
        total = check_rewards(self.name, self, generations)
        return Scored(total, {self.name: total})


REWARDS: Registry[Callable[..., Reward]] = Registry("reward")
"""Rewards in the box by name: factories that take the reward's settings as keywords."""


def check_rewards(
    name: str, function: Callable[[Sequence[Generation]], Any], generations: Sequence[Generation]
) -> npt.NDArray[np.float64]:
    """Return ``function(generations)`` as (B,) finite float64.

    Integers and booleans count as numbers; strings, objects and complex numbers do not.

    Raises:
        RewardError: names the reward and a text; an error raised by ``function`` is chained.
    """
    try:
        answer = np.asarray(function(generations))
    except RewardError:
        raise
    except Exception as error:
        raise RewardError(
            f"reward {name!r} raised {type(error).__name__}: {error} (while scoring {_texts(generations)})"
        ) from error
    if answer.dtype.kind not in "biuf":
        raise RewardError(
            f"reward {name!r} answered dtype {answer.dtype}, not numbers, for {_texts(generations)}; "
            "return one float a text"
        )
    if answer.shape != (len(generations),):
        raise RewardError(
            f"reward {name!r} answered shape {answer.shape} for {_texts(generations)}; "
            f"expected ({len(generations)},), one number a text"
        )
    values = answer.astype(np.float64)
    bad = np.flatnonzero(~(np.abs(values) <= LARGEST))
    if bad.size:
        raise RewardError(
            f"reward {name!r} answered {answer[bad[0]]} for the completion "
            f"{shorten(generations[bad[0]].completion)}; rewards must be finite numbers within {LARGEST:g}"
        )
    return values


def shorten(text: str, limit: int = 80) -> str:
    """Return the quoted text for an error message, its middle left out where it is long."""
    half = limit // 2
    return repr(text if len(text) <= limit else f"{text[:half]} ... {text[-half:]}")


def _texts(generations: Sequence[Generation]) -> str:
    if not generations:
        return "no texts"
    first = f"the completion {shorten(generations[0].completion)}"
    return first if len(generations) == 1 else f"{len(generations)} texts, the first of them {first}"
