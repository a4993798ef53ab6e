"""Rewards that are rare or late: Needle and DelayedKey."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from string import ascii_lowercase
from typing import NamedTuple

import numpy as np

from textgen_env.config import check_at_least, check_one_of
from textgen_env.tasks.exact import (
    LETTERS,
    Floats,
    Process,
    check_between,
    check_number,
    diagnostic_task,
    one_hot,
    ranked,
)

TILES = ".,_"
"""The tiles of a corridor."""


@diagnostic_task("TextGen/Needle-v0")
@dataclass(frozen=True)
class Needle(Process):
    """Exploration: of all texts only one is worth anything.

    ## Description
    A text is `depth` letters, and one text, drawn from `seed`, is the needle. Nothing on the way
    shows if the letters so far begin it. The deceptive variant pays a little for every letter
    that is not the needle's, so each small improvement leads away from it.

    ## Action space
    `Discrete(branches)`: the letters, in the language model's order, which changes with the prefix.

    ## Observation
    `hidden` is the letters so far, one-hot by place: (depth branches,).

    ## Rewards
    1 for the needle, else 0; with `deceptive` else 0.5 times the share of letters that differ from it.

    ## Starting state
    The prompt is always ">".

    ## Episode end
    After `depth` letters.

    ## Arguments
    `depth` letters, 1 to 64; `branches` letters to choose from, 2 to 26; `deceptive`; `seed` of the needle.

    ## Bounds
    Language model: the needle's probability, about branches ** -depth. Best: 1.

    ## Reference
    Deep sea in Osband et al. 2020, "Behaviour suite for reinforcement learning", arXiv:1908.03568.
    """

    depth: int = 8
    branches: int = 2
    deceptive: bool = False
    seed: int = 0

    def __post_init__(self) -> None:
        check_between("depth", self.depth, 1, 64)
        check_between("branches", self.branches, 2, LETTERS)
        check_one_of("deceptive", self.deceptive, (False, True))
        check_at_least("seed", self.seed, 0)

    @property
    def tokens(self) -> Sequence[str]:
        return (*ascii_lowercase[: self.branches], ">")

    @property
    def prompts(self) -> Sequence[tuple[int, ...]]:
        return ((self.branches,),)

    @property
    def steps(self) -> int:
        return self.depth

    @property
    def candidates(self) -> int:
        return self.branches

    @cached_property
    def needle(self) -> tuple[int, ...]:
        """The text that is worth 1, as ids."""
        return tuple(np.random.default_rng(self.seed).integers(self.branches, size=self.depth).tolist())

    def begin(self, prompt: tuple[int, ...]) -> tuple[int, ...]:
        return ()

    def follow(self, state: tuple[int, ...], token: int) -> tuple[int, ...]:
        return (*state, token)

    def probabilities(self, state: tuple[int, ...]) -> Floats:
        letters = ranked(0.8, self.branches, self.seed, len(state), *state[-1:])
        return np.append(letters, 0.0)

    def features(self, state: tuple[int, ...]) -> Floats:
        places = np.zeros((self.depth, self.branches))
        places[np.arange(len(state)), list(state)] = 1.0
        return places.ravel()

    def worth(self, state: tuple[int, ...]) -> float:
        if state == self.needle:
            return 1.0
        return 0.5 * self._off(state) / self.depth if self.deceptive else 0.0

    def summary(self, state: tuple[int, ...]) -> tuple[int, tuple[int, ...]]:
        return self._off(state), state[-1:]

    def _off(self, state: tuple[int, ...]) -> int:
        return sum(token != right for token, right in zip(state, self.needle, strict=False))


class _Carried(NamedTuple):
    door: int
    key: int | None  # None before the first step


@diagnostic_task("TextGen/DelayedKey-v0")
@dataclass(frozen=True)
class DelayedKey(Process):
    """Credit: the first token decides, and its reward comes `delay` tokens later.

    ## Description
    The prompt is a door. The first token takes a key; then a corridor of `delay` steps follows, on
    which nothing matters; at its end the door opens or not. The language model prefers wrong keys.

    ## Action space
    `Discrete(max(keys, 3))`: the keys at the first step, afterwards the three tiles of the corridor; the
    rest is masked.

    ## Observation
    `hidden` is the door and the key carried, each one-hot: (2 keys,).

    ## Rewards
    1 if the first token was the door's own key, else 0, at the end.

    ## Starting state
    One of `keys` doors.

    ## Episode end
    After 1 + `delay` tokens.

    ## Arguments
    `delay` steps, 0 to 256; `keys`, 2 to 26; `prior`, the probability of the right key under the
    language model, in (0, 1); `seed` of which key fits which door.

    ## Bounds
    Language model: `prior`. Best: 1.

    ## Reference
    Key to door in Hung et al. 2019, "Optimizing agent behavior over long time scales by transporting
    value", arXiv:1810.06721.
    """

    delay: int = 16
    keys: int = 4
    prior: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        check_between("delay", self.delay, 0, 256)
        check_between("keys", self.keys, 2, LETTERS)
        check_number("prior", self.prior, 0.001, 0.999)
        check_at_least("seed", self.seed, 0)

    @property
    def tokens(self) -> Sequence[str]:
        keys = ascii_lowercase[: self.keys]
        return (*keys, *TILES, *keys.upper())

    @property
    def prompts(self) -> Sequence[tuple[int, ...]]:
        return [(self.keys + len(TILES) + door,) for door in range(self.keys)]

    @property
    def steps(self) -> int:
        return 1 + self.delay

    @property
    def candidates(self) -> int:
        return max(self.keys, len(TILES))

    @cached_property
    def fitting(self) -> tuple[int, ...]:
        """The key of each door."""
        return tuple(np.random.default_rng(self.seed).permutation(self.keys).tolist())

    def begin(self, prompt: tuple[int, ...]) -> _Carried:
        return _Carried(prompt[0] - self.keys - len(TILES), None)

    def follow(self, state: _Carried, token: int) -> _Carried:
        return _Carried(state.door, token) if state.key is None else state

    def probabilities(self, state: _Carried) -> Floats:
        values = np.zeros(len(self.tokens))
        if state.key is None:
            right = self.fitting[state.door]
            wrong = [key for key in range(self.keys) if key != right]
            values[right] = self.prior
            values[wrong] = (1 - self.prior) * ranked(0.8, len(wrong), self.seed, state.door)
        else:
            values[self.keys : self.keys + len(TILES)] = ranked(0.8, len(TILES), self.seed, state.door, state.key)
        return values

    def features(self, state: _Carried) -> Floats:
        return np.concatenate([one_hot(state.door, self.keys), one_hot(state.key, self.keys)])

    def worth(self, state: _Carried) -> float:
        return float(state.key == self.fitting[state.door])
