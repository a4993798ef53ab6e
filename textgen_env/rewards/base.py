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
from itertools import chain
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
    ``replied`` of its tokens are theirs, and ``turns`` tells who said what.
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
    replied: int = 0

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
    return _checked(f"reward {name!r}", lambda: function(generations), [g.completion for g in generations])


def _checked(who: str, function: Callable[[], Any], completions: Sequence[str]) -> npt.NDArray[np.float64]:
    """Return ``function()`` as (B,) finite float64, one number a completion; see ``check_rewards``."""
    try:
        answer = np.asarray(function())
    except RewardError:
        raise
    except Exception as error:
        raise RewardError(
            f"{who} raised {type(error).__name__}: {error} (while scoring {_texts(completions)})"
        ) from error
    if answer.dtype.kind not in "biuf":
        given = answer.ravel().tolist()
        example = next((value for value in given if not isinstance(value, int | float)), given[0] if given else None)
        raise RewardError(
            f"{who} answered dtype {answer.dtype}, not numbers, for {_texts(completions)} (got {repr(example)[:80]}); "
            "return one float a text"
        )
    if answer.shape != (len(completions),):
        raise RewardError(
            f"{who} answered shape {answer.shape} for {_texts(completions)}; "
            f"expected ({len(completions)},), one number a text"
        )
    values = answer.astype(np.float64)
    bad = np.flatnonzero(~(np.abs(values) <= LARGEST))
    if bad.size:
        raise RewardError(
            f"{who} answered {answer[bad[0]]} for the completion {shorten(completions[bad[0]])}; "
            f"rewards must be finite numbers within {LARGEST:g}"
        )
    return values


class CheckedScore:
    """The running score of a reward, for B rows at a time, its answers checked.

    Each method raises ``RewardError``, which names the reward and a text, where the score raises, or answers something
    else than finite numbers within ``LARGEST``, one a completion.
    """

    def __init__(self, name: str, score: RunningScore[Any]) -> None:
        self._who, self._score = f"the running score of reward {name!r}", score

    def start(self, prompt: str, reference: str | None, metadata: Mapping[str, Any]) -> ScoreState:
        """Return the state of the empty completion."""
        states: list[ScoreState] = []

        def value() -> list[float]:
            states.append(self._score.start(prompt, reference, metadata))
            return [states[0].value]

        _checked(self._who, value, [""])
        return states[0]

    def extend(
        self, states: npt.NDArray[np.object_], completions: Sequence[str]
    ) -> tuple[npt.NDArray[np.object_], npt.NDArray[np.float64]]:
        """Return the states (B,) of B completions, and their values, (B,)."""
        extended = np.empty(len(states), object)

        def values() -> list[float]:
            for i, (state, completion) in enumerate(zip(states, completions, strict=True)):
                extended[i] = self._score.extend(state, completion)
            return [state.value for state in extended]

        return extended, _checked(self._who, values, completions)

    def lookahead(
        self, states: npt.NDArray[np.object_], completions: Sequence[Sequence[str]]
    ) -> npt.NDArray[np.float64]:
        """Return the scores of k alternative completions a row, (B, k)."""

        def values() -> npt.NDArray[Any]:
            answers = []
            for state, texts in zip(states, completions, strict=True):
                answers.append(np.asarray(self._score.lookahead(state, texts)))
                if answers[-1].shape != (len(texts),):
                    raise RewardError(
                        f"{self._who} looked ahead with shape {answers[-1].shape} for {_texts(texts)}; "
                        f"expected ({len(texts)},), one number a text"
                    )
            return np.concatenate(answers)

        return _checked(self._who, values, list(chain.from_iterable(completions))).reshape(len(states), -1)


def shorten(text: str, limit: int = 80) -> str:
    """Return the quoted text for an error message, its middle left out where it is long."""
    half = limit // 2
    return repr(text if len(text) <= limit else f"{text[:half]} ... {text[-half:]}")


def _texts(completions: Sequence[str]) -> str:
    if not completions:
        return "no texts"
    first = f"the completion {shorten(completions[0])}"
    return first if len(completions) == 1 else f"{len(completions)} texts, the first of them {first}"
