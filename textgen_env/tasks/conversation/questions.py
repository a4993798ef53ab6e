"""Questions about a table: TwentyQuestions."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import numpy as np

from textgen_env.config import check_at_least
from textgen_env.tasks.conversation.game import Played
from textgen_env.tasks.conversation.in_words import SpokenGame, game_task
from textgen_env.tasks.exact import Floats, check_between, check_number, ranked

QUESTIONS = ("Does it fly? ", "Does it swim? ", "Has it fur? ", "Is it big? ", "Does it eat meat? ", "Is it a pet? ")
KNOWN_BY = ("fly", "swim", "fur", "big", "meat", "pet")  # the word by which each is known
ANIMALS = {
    "cat": (0, 0, 1, 0, 1, 1),
    "owl": (1, 0, 0, 0, 1, 0),
    "duck": (1, 1, 0, 0, 0, 0),
    "bear": (0, 1, 1, 1, 1, 0),
    "horse": (0, 0, 1, 1, 0, 1),
    "shark": (0, 1, 0, 1, 1, 0),
    "rabbit": (0, 0, 1, 0, 0, 1),
    "goldfish": (0, 1, 0, 0, 0, 1),
    "parrot": (1, 0, 0, 0, 0, 1),
    "elephant": (0, 0, 0, 1, 0, 0),
    "bat": (1, 0, 1, 0, 1, 0),
    "otter": (0, 1, 1, 0, 1, 0),
    "lion": (0, 0, 1, 1, 1, 0),
    "snail": (0, 0, 0, 0, 0, 0),
    "whale": (0, 1, 0, 1, 0, 0),
    "dog": (0, 1, 1, 0, 1, 1),
}
"""The answers to ``QUESTIONS``, all different."""
YES, NO, RIGHT = "yes. ", "no. ", "right."


@game_task("TextGen/TwentyQuestions-v0")
@dataclass(frozen=True)
class TwentyQuestions(SpokenGame):
    """Information: ask questions whose answers only pay in later turns, then name the animal.

    ## Description
    The partner has one of `animals` animals. A turn is one token, a question ("Has it fur? ") or an animal
    ("the cat! "). A question is answered "yes. " or "no. ", an animal "no. " or "right.", which ends the
    game. No question pays by itself. The language model asks and names without regard to the answers.

    ## Action space
    `Discrete(6 + animals)`: questions and animals, in the language model's order, which changes with the turn.

    ## Observation
    `hidden` is the animals that fit all answers, one-hot: (animals,).

    ## Rewards
    1 for the animal within `turns` turns, else 0.

    ## Starting state
    The prompt is always "Ask: "; all animals are equally likely.

    ## Episode end
    After the right animal, or `turns` turns.

    ## Arguments
    `animals`, 2 to 16, the first ones of the table; `turns`, 2 to 20; `naming`, the language model's probability
    of naming an animal, in [0.01, 0.99]; `seed` of its preferences; `model`, a chat model that plays in words
    (its `Discrete(16)` likeliest tokens, 8 a turn; the first animal or question counts), such as "smollm2".

    ## Bounds
    Best: by search over all questions and sets of animals. Language model: by dynamic programming.

    ## Reference
    Twenty questions in Abdulhai et al. 2023, "LMRL Gym", arXiv:2311.18232.
    """

    animals: int = 6
    turns: int = 4
    naming: float = 0.5
    seed: int = 0

    def __post_init__(self) -> None:
        check_between("animals", self.animals, 2, len(ANIMALS))
        check_between("turns", self.turns, 2, 20)
        check_number("naming", self.naming, 0.01, 0.99)
        check_at_least("seed", self.seed, 0)

    @property
    def tokens(self) -> Sequence[str]:
        return (*QUESTIONS, *(f"the {name}! " for name in self._names), YES, NO, RIGHT, "Ask: ")

    @property
    def candidates(self) -> int:
        return self.spoken

    @property
    def secrets(self) -> int:
        return self.animals

    @property
    def spoken(self) -> int:
        return len(QUESTIONS) + self.animals

    @property
    def turn_tokens(self) -> int:
        return 1

    @property
    def right(self) -> tuple[int, ...]:
        return (self.spoken + 2,)

    def hear(self, said: tuple[int, ...], secret: int) -> tuple[int, ...]:
        (token,) = said
        if token < len(QUESTIONS):
            return (self.spoken + 1 - ANIMALS[self._names[secret]][token],)
        return self.right if token - len(QUESTIONS) == secret else (self.spoken + 1,)

    def probabilities(self, state: Played) -> Floats:
        ask = (1 - self.naming) * ranked(0.8, len(QUESTIONS), self.seed, state.asked, 0)
        name = self.naming * ranked(0.8, self.animals, self.seed, state.asked, 1)
        return np.concatenate([ask, name, np.zeros(4)])

    @property
    def rules(self) -> str:
        return (
            f"You find the user's animal in {self.turns} turns. It is one of: {', '.join(self._names)}. Each turn, "
            f"name an animal or ask one of these questions: {''.join(QUESTIONS).strip()}"
        )

    @property
    def opening(self) -> str:
        return "Ask a question."

    def understand(self, text: str) -> tuple[int, ...] | None:
        moves = [*KNOWN_BY, *self._names]
        found = re.search("|".join(rf"\b({move})\b" for move in moves), text.lower())
        return None if found is None else (moves.index(found.group()),)

    def say(self, heard: tuple[int, ...]) -> str:
        return self.tokens[heard[0]].strip().capitalize()

    @cached_property
    def _names(self) -> tuple[str, ...]:
        return tuple(ANIMALS)[: self.animals]
