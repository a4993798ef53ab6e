"""Running scores for measures that read a text chunk by chunk.

A chunk is a run of characters without whitespace. Appending a token changes at most the last
chunk or adds some after it, so everything before the last chunk is settled: it is folded into an
accumulator once, and a continuation costs only the open tail.

    completion = settled chunks | open tail      settle(acc, chunks) -> acc      value(acc, tail)

A tail without whitespace (a language written without spaces) stays open, and then a step costs
the length of that tail.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt

from textgen_env.rewards.base import Generation, Reward

A = TypeVar("A")


@dataclass(frozen=True, slots=True)
class IncrementalState(Generic[A]):
    """One row: its completion, the accumulator of its settled part, and its open tail."""

    completion: str
    origin: A  # the accumulator of the empty completion
    settled: A
    tail: str
    value: float


class IncrementalScore(ABC, Generic[A]):
    """A running score given by an immutable accumulator and two functions of it.

    ``value(settle(acc, text), tail)`` must equal ``value(acc, text + tail)`` wherever ``text`` ends
    in whitespace, so that the running score equals the score of the whole completion.
    """

    @abstractmethod
    def begin(self, prompt: str, reference: str | None, metadata: Mapping[str, Any]) -> A:
        """Return the accumulator of the empty completion."""

    @abstractmethod
    def settle(self, acc: A, text: str) -> A:
        """Return ``acc`` (left untouched) with the chunks of ``text``, which ends in whitespace, added."""

    @abstractmethod
    def value(self, acc: A, tail: str) -> float:
        """Return the score of a completion that has ``acc`` settled and ends with ``tail``."""

    def start(self, prompt: str, reference: str | None, metadata: Mapping[str, Any]) -> IncrementalState[A]:
        acc = self.begin(prompt, reference, metadata)
        return IncrementalState("", acc, acc, "", self.value(acc, ""))

    def extend(self, state: IncrementalState[A], completion: str) -> IncrementalState[A]:
        settled, tail = self._resume(state, completion)
        cut = _open_from(tail)
        if cut:
            settled, tail = self.settle(settled, tail[:cut]), tail[cut:]
        return IncrementalState(completion, state.origin, settled, tail, self.value(settled, tail))

    def lookahead(self, state: IncrementalState[A], completions: Sequence[str]) -> npt.NDArray[np.float32]:
        return np.array([self.value(*self._resume(state, text)) for text in completions], np.float32)

    def _resume(self, state: IncrementalState[A], completion: str) -> tuple[A, str]:
        if completion.startswith(state.completion):
            return state.settled, state.tail + completion[len(state.completion) :]
        return state.origin, completion  # a partial code point changed: from the start


def _open_from(text: str) -> int:
    """Return where the last chunk of ``text`` begins; its length if it ends in whitespace."""
    if not text or text[-1].isspace():
        return len(text)
    return len(text) - len(text.split()[-1])


class IncrementalReward(Reward):
    """A reward that its running score defines: the score of the completion taken as one tail."""

    @abstractmethod
    def running(self) -> IncrementalScore[Any]: ...

    def __call__(self, generations: Sequence[Generation]) -> npt.NDArray[np.float64]:
        score = self.running()
        values = [score.value(score.begin(g.prompt, g.reference, g.metadata), g.completion) for g in generations]
        return np.array(values, np.float64)
