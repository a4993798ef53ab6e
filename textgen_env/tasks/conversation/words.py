"""Words, letter by letter: Wordle."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from string import ascii_lowercase

import numpy as np

from textgen_env.config import check_at_least
from textgen_env.tasks.conversation.game import Played
from textgen_env.tasks.conversation.in_words import SpokenGame, game_task
from textgen_env.tasks.exact import Floats, check_between, ranked

WORD_LIST = (
    "lane", "core", "cave", "mine", "love", "rove", "care", "line", "lone", "more", "cove", "mane",
    "lace", "rice", "mice", "vine", "nice", "race", "move", "cone", "lice", "vane", "roam", "lime",
)  # fmt: skip
PLACED, ELSEWHERE, ABSENT = "+~-"


@game_task("TextGen/Wordle-v0")
@dataclass(frozen=True)
class Wordle(SpokenGame):
    """Words: guess one letter by letter, told after each guess which letters are right.

    ## Description
    The partner has one of `words` words of four letters. A guess is a word of the list, a letter a token. The
    partner marks each letter: "+" in its place, "~" elsewhere in the word, "-" not in it (a letter that is
    guessed twice is marked as often as the word has it). The language model spells, and guesses without regard
    to the marks.

    ## Action space
    `Discrete(k)`: the letters with which a word of the list can go on, in the language model's order.

    ## Observation
    `hidden` is the words that fit all marks, and the letters of the running guess but its last, each one-hot
    by place: (words + 78,).

    ## Rewards
    1 for the word within `turns` guesses, else 0.

    ## Starting state
    The prompt is always "> "; all words are equally likely.

    ## Episode end
    After the right word, or `turns` words.

    ## Arguments
    `words`, 2 to 24, the first ones of the list; `turns`, 2 to 8; `seed` of the model's preferences;
    `model`, a chat model that plays in words (its `Discrete(16)` likeliest tokens, 8 a turn; the first word of the
    list counts), such as "smollm2".

    ## Bounds
    Best: by search over all guesses and sets of words. Language model: by dynamic programming.

    ## Reference
    Wordle in Abdulhai et al. 2023, "LMRL Gym", arXiv:2311.18232.
    """

    words: int = 12
    turns: int = 3
    seed: int = 0

    def __post_init__(self) -> None:
        check_between("words", self.words, 2, len(WORD_LIST))
        check_between("turns", self.turns, 2, 8)
        check_at_least("seed", self.seed, 0)

    @property
    def tokens(self) -> Sequence[str]:
        return (*ascii_lowercase, PLACED, ELSEWHERE, ABSENT, ":", " ", "> ")

    @property
    def candidates(self) -> int:
        starts = {word[:place] for word in self._list for place in range(4)}
        return max(len(self._following(start)) for start in starts)

    @property
    def secrets(self) -> int:
        return self.words

    @property
    def spoken(self) -> int:
        return len(ascii_lowercase)

    @property
    def turn_tokens(self) -> int:
        return 4

    @property
    def right(self) -> tuple[int, ...]:
        return self._ids(f":{4 * PLACED} ")

    def hear(self, said: tuple[int, ...], secret: int) -> tuple[int, ...]:
        return self._ids(f":{marks(''.join(ascii_lowercase[i] for i in said), WORD_LIST[secret])} ")

    def probabilities(self, state: Played) -> Floats:
        values = np.zeros(len(self.tokens))
        letters = self._following("".join(ascii_lowercase[i] for i in state.said))
        values[list(letters)] = ranked(0.8, len(letters), self.seed, state.asked, *state.said)
        return values

    @property
    def rules(self) -> str:
        return (
            f"You guess the user's word in {self.turns} turns. It is one of: {', '.join(self._list)}. Each turn, say "
            'one of these words and nothing else. The user marks its letters: "+" is right, "~" is elsewhere in the '
            'word, "-" is not in it.'
        )

    @property
    def opening(self) -> str:
        return "Say a word."

    def understand(self, text: str) -> tuple[int, ...] | None:
        said = next((word for word in re.findall(r"[a-z]+", text.lower()) if word in self._list), None)
        return None if said is None else self._ids(said)

    def say(self, heard: tuple[int, ...]) -> str:
        return "".join(self.tokens[i] for i in heard[1:-1])

    @cached_property
    def _list(self) -> tuple[str, ...]:
        return WORD_LIST[: self.words]

    def _following(self, start: str) -> tuple[int, ...]:
        """Return the ids of the letters with which a word goes on after ``start``; all where none does."""
        letters = {word[len(start)] for word in self._list if word.startswith(start) and len(start) < 4}
        return tuple(sorted(map(ascii_lowercase.index, letters or set(ascii_lowercase))))

    def _ids(self, text: str) -> tuple[int, ...]:
        return tuple(map(self.tokens.index, text))


def marks(guess: str, secret: str) -> str:
    """Return a mark for each letter of ``guess``."""
    over = [letter for letter, own in zip(secret, guess, strict=True) if letter != own]
    found = ""
    for letter, own in zip(secret, guess, strict=True):
        if letter == own:
            found += PLACED
        elif own in over:
            over.remove(own)
            found += ELSEWHERE
        else:
            found += ABSENT
    return found
