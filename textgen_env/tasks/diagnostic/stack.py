"""A text that must remember its beginning: Dyck."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

import numpy as np

from textgen_env.config import check_at_least, check_one_of
from textgen_env.errors import ConfigError
from textgen_env.tasks.exact import (
    Floats,
    Process,
    check_between,
    diagnostic_task,
    ranked,
)

OPENING, CLOSING = "([{<", ")]}/"
MOST_PROMPTS = 64


class _Nested(NamedTuple):
    stack: tuple[int, ...]  # kinds of the open brackets, the innermost last
    closed: int  # pairs matched before the first mistake
    broken: bool


@diagnostic_task("TextGen/Dyck-v0")
@dataclass(frozen=True)
class Dyck(Process):
    """Memory and constraint: close every bracket, the last opened first, within the length.

    ## Description
    The prompt opens `depth` brackets of `kinds` kinds. The text has exactly `length` brackets, more
    than needed to close them: pairs may be opened and closed on the way. The language model knows
    about how deep it is, but neither which bracket is innermost nor how much room is left.

    ## Action space
    `Discrete(2 kinds)`: all brackets, in the language model's order.

    ## Observation
    `hidden` is the stack of open brackets, innermost first, one-hot by place, whether there was a
    mistake, and the share of pairs matched before it: (kinds (depth + length) / 2 + 2,).

    ## Rewards
    The share of pairs that are matched before the first bracket that closes the wrong one or none,
    out of (depth + length) / 2. With `graded=False` 1 for a balanced text, else 0.

    ## Starting state
    All ways to open `depth` brackets, or 64 of them drawn from `seed`.

    ## Episode end
    After `length` tokens.

    ## Arguments
    `depth`, 0 to 16; `length` tokens, from `depth` to 64, even if `depth` is even and odd if it is odd;
    `kinds`, 1 to 4; `graded`; `seed` of the model's habits.

    ## Bounds
    Best: 1, a balanced text. Language model: by dynamic programming over stacks.

    ## Reference
    Dyck languages as a probe of memory: Hewitt et al. 2020, "RNNs can generate bounded hierarchical
    languages with optimal memory", arXiv:2010.07515.
    """

    depth: int = 4
    length: int = 8
    kinds: int = 2
    graded: bool = True
    seed: int = 0

    def __post_init__(self) -> None:
        check_between("depth", self.depth, 0, 16)
        check_between("kinds", self.kinds, 1, len(OPENING))
        check_between("length", self.length, max(1, self.depth), 64)
        check_one_of("graded", self.graded, (False, True))
        check_at_least("seed", self.seed, 0)
        if (self.length - self.depth) % 2:
            raise ConfigError(
                f"length={self.length} brackets cannot close depth={self.depth} and balance: make both even or both odd"
            )

    @property
    def pairs(self) -> int:
        """How many pairs a balanced text has, prompt included."""
        return (self.depth + self.length) // 2

    @property
    def tokens(self) -> Sequence[str]:
        return (*OPENING[: self.kinds], *CLOSING[: self.kinds], ">")

    @property
    def prompts(self) -> Sequence[tuple[int, ...]]:
        mark = 2 * self.kinds
        count = self.kinds**self.depth
        if count <= MOST_PROMPTS:
            return [(mark, *opened) for opened in product(range(self.kinds), repeat=self.depth)]
        rng = np.random.default_rng(self.seed)
        drawn: set[tuple[int, ...]] = set()
        while len(drawn) < MOST_PROMPTS:
            drawn.add(tuple(rng.integers(self.kinds, size=self.depth).tolist()))
        return [(mark, *opened) for opened in sorted(drawn)]

    @property
    def steps(self) -> int:
        return self.length

    @property
    def candidates(self) -> int:
        return 2 * self.kinds

    def begin(self, prompt: tuple[int, ...]) -> _Nested:
        return _Nested(prompt[1:], 0, False)

    def follow(self, state: _Nested, token: int) -> _Nested:
        if state.broken:
            return state
        if token < self.kinds:
            return state._replace(stack=(*state.stack, token))
        if state.stack and state.stack[-1] == token - self.kinds:
            return state._replace(stack=state.stack[:-1], closed=state.closed + 1)
        return state._replace(stack=(), broken=True)

    def probabilities(self, state: _Nested) -> Floats:
        closes = 0.7 if state.stack else 0.1
        kinds = ranked(0.8, self.kinds, self.seed, len(state.stack))
        return np.concatenate([(1 - closes) * kinds, closes * kinds[::-1], [0.0]])

    def features(self, state: _Nested) -> Floats:
        places = np.zeros((self.depth + self.length, self.kinds))
        places[np.arange(len(state.stack)), list(reversed(state.stack))] = 1.0
        return np.append(places[: self.pairs], [state.broken, state.closed / self.pairs])

    def worth(self, state: _Nested) -> float:
        return state.closed / self.pairs if self.graded else float(state.closed == self.pairs)
