"""A question whose answer is needed many turns later: AskAhead."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_uppercase

import numpy as np

from textgen_env.config import check_at_least
from textgen_env.tasks.conversation.game import Game, Played
from textgen_env.tasks.exact import Floats, check_between, check_number, diagnostic_task, ranked

ASK, GREET, TALK = "Which one? ", "Nice day. ", ("Well. ", "So. ", "Oh. ")
NOTHING, RIGHT = "Hm. ", "Right."


@diagnostic_task("TextGen/AskAhead-v0")
@dataclass(frozen=True)
class AskAhead(Game):
    """Credit across turns: a question in the first turn pays `delay` turns later, and nothing before.

    ## Description
    The partner has one of `doors` doors. In the first turn the agent asks "Which one? " and is told, or greets
    ("Nice day. ") and hears "Hm. ". Then follow `delay` turns of small talk, in which nothing matters; in the
    last turn it names a door. The language model asks rarely, and names a door without regard to what it was told.

    ## Action space
    `Discrete(max(doors, 3))`: question and greeting, then small talk, then the doors, in the language model's
    order; the rest is masked.

    ## Observation
    `hidden` is the doors that fit all answers, one-hot: (doors,).

    ## Rewards
    1 for the partner's door, else 0, at the end.

    ## Starting state
    The prompt is always "Ask: "; all doors are equally likely.

    ## Episode end
    After 2 + `delay` turns.

    ## Arguments
    `doors`, 2 to 16; `delay` turns, 0 to 64; `asking`, the language model's probability of the question, in
    [0.001, 0.999]; `seed` of its preferences.

    ## Bounds
    Best: 1. Language model: 1 / doors, as for anyone who does not ask, or asks and does not remember.

    ## Reference
    Key to door in Hung et al. 2019, "Optimizing agent behavior over long time scales by transporting value",
    arXiv:1810.06721, with a question for the key.
    """

    doors: int = 4
    delay: int = 4
    asking: float = 0.1
    seed: int = 0

    def __post_init__(self) -> None:
        check_between("doors", self.doors, 2, 16)
        check_between("delay", self.delay, 0, 64)
        check_number("asking", self.asking, 0.001, 0.999)
        check_at_least("seed", self.seed, 0)

    @property
    def turns(self) -> int:  # type: ignore[override]
        return 2 + self.delay

    @property
    def tokens(self) -> Sequence[str]:
        doors = ascii_uppercase[: self.doors]
        told = (f"It is {door}. " for door in doors)
        return (*(f"Door {door}! " for door in doors), ASK, GREET, *TALK, *told, NOTHING, RIGHT, "Ask: ")

    @property
    def candidates(self) -> int:
        return max(self.doors, len(TALK))

    @property
    def secrets(self) -> int:
        return self.doors

    @property
    def spoken(self) -> int:
        return self.doors + 2 + len(TALK)

    @property
    def turn_tokens(self) -> int:
        return 1

    @property
    def right(self) -> tuple[int, ...]:
        return (self.tokens.index(RIGHT),)

    def hear(self, said: tuple[int, ...], secret: int) -> tuple[int, ...]:
        (token,) = said
        if token == self.doors:
            return (self.spoken + secret,)
        return self.right if token == secret else (self.tokens.index(NOTHING),)

    def probabilities(self, state: Played) -> Floats:
        values = np.zeros(len(self.tokens))
        if state.asked == 0:
            values[[self.doors, self.doors + 1]] = self.asking, 1 - self.asking
        elif state.asked <= self.delay:
            values[self.doors + 2 : self.spoken] = ranked(0.8, len(TALK), self.seed, state.asked)
        else:
            values[: self.doors] = ranked(0.8, self.doors, self.seed, state.asked)
        return values
