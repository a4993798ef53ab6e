"""Higher or lower: GuessNumber."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np

from textgen_env.config import check_at_least
from textgen_env.tasks.conversation.game import Played
from textgen_env.tasks.conversation.in_words import SpokenGame, game_task
from textgen_env.tasks.exact import Floats, check_between, ranked

DIGITS = "0123456789"
HIGHER, LOWER, RIGHT = " higher. ", " lower. ", " right."


@game_task("TextGen/GuessNumber-v0")
@dataclass(frozen=True)
class GuessNumber(SpokenGame):
    """Search: guess a number, told after each guess if it is higher or lower.

    ## Description
    The partner has a number below `numbers`. A guess is its digits, with leading zeros, one a token; the
    partner answers " higher. ", " lower. " or " right.", and with the last ends the game. The language model
    guesses without regard to what it was told.

    ## Action space
    `Discrete(k)`: the digits that begin or end a number below `numbers`, in the language model's order.

    ## Observation
    `hidden` is the numbers that fit all answers, and the digits of the running guess but its last, each
    one-hot by place: (numbers + 10 (digits - 1),).

    ## Rewards
    1 for the number within `turns` guesses, else 0.

    ## Starting state
    The prompt is always "Guess: "; all numbers are equally likely.

    ## Episode end
    After the right guess, or `turns` guesses.

    ## Arguments
    `numbers`, 2 to 1000; `turns`, 2 to 16; `seed` of the model's preferences; `model`, a chat model that plays
    in words (its `Discrete(16)` likeliest tokens, 8 a turn; the first number counts), such as "smollm2".

    ## Bounds
    Best: halving what is left finds 2 ** turns - 1 numbers, so 1 or (2 ** turns - 1) / numbers. Language model:
    its guesses do not depend on the answers, so it misses a number with the product of its chances to miss it in
    each turn.

    ## Reference
    Guess my city in Abdulhai et al. 2023, "LMRL Gym", arXiv:2311.18232, for games of asking; binary search.
    """

    numbers: int = 7
    turns: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        check_between("numbers", self.numbers, 2, 1000)
        check_between("turns", self.turns, 2, 16)
        check_at_least("seed", self.seed, 0)

    @property
    def tokens(self) -> Sequence[str]:
        return (*DIGITS, HIGHER, LOWER, RIGHT, "Guess: ")

    @property
    def candidates(self) -> int:
        return min(len(DIGITS), self.numbers)

    @property
    def secrets(self) -> int:
        return self.numbers

    @property
    def spoken(self) -> int:
        return len(DIGITS)

    @property
    def turn_tokens(self) -> int:
        return len(str(self.numbers - 1))

    @property
    def right(self) -> tuple[int, ...]:
        return (self.tokens.index(RIGHT),)

    def hear(self, said: tuple[int, ...], secret: int) -> tuple[int, ...]:
        guess = int("".join(map(str, said)))
        word = RIGHT if guess == secret else HIGHER if guess < secret else LOWER
        return (self.tokens.index(word),)

    def probabilities(self, state: Played) -> Floats:
        values = np.zeros(len(self.tokens))
        later = 10 ** max(0, self.turn_tokens - len(state.said) - 1)
        begun = int("".join(map(str, (0, *state.said)))) * 10
        digits = [digit for digit in range(10) if (begun + digit) * later < self.numbers]
        values[digits] = ranked(0.8, len(digits), self.seed, state.asked, len(state.said))
        return values

    @property
    def rules(self) -> str:
        return (
            f"You guess the user's number, from 0 to {self.numbers - 1}, in {self.turns} turns. Each turn, say one "
            "number and nothing else. The user answers if it is higher or lower."
        )

    @property
    def opening(self) -> str:
        return f"Say a number from 0 to {self.numbers - 1}."

    def understand(self, text: str) -> tuple[int, ...] | None:
        found = next((int(number) for number in re.findall(r"[0-9]+", text) if int(number) < self.numbers), None)
        return None if found is None else tuple(map(int, str(found).zfill(self.turn_tokens)))

    def say(self, heard: tuple[int, ...]) -> str:
        return self.tokens[heard[0]].strip().capitalize()

    def value(self, state: Played, best: bool) -> float | None:
        if state.said:
            return None
        fitting, turns = list(state.fitting), range(state.asked, self.turns)
        if best:
            return min(1.0, (2 ** len(turns) - 1) / len(fitting))
        missed = np.prod([1 - guesses(self, asked)[fitting] for asked in turns], axis=0)
        return float(1 - np.mean(missed))


@lru_cache(64)
def guesses(game: GuessNumber, asked: int) -> Floats:
    """Return the language model's probability of each guess after ``asked`` turns, (numbers,)."""
    found = np.ones(game.numbers)
    for number in range(game.numbers):
        said = tuple(map(int, str(number).zfill(game.turn_tokens)))
        for place, digit in enumerate(said):
            found[number] *= game.probabilities(Played((), asked, said[:place], (), False))[digit]
    return found
