"""A game of questions: the partner has a secret, and each of its answers rules some secrets out.

    said (m ids)  ->  hear(said, secret)  ->  reply (r ids)  ->  the secrets that fit all replies so far

All secrets are equally likely, and each comes once with every prompt, as metadata that no observation shows. So
means over the prompts are exact, and the best play follows by dynamic programming over sets of secrets.
"""

from __future__ import annotations

from abc import abstractmethod
from collections import Counter
from collections.abc import Mapping, Sequence
from functools import cached_property
from typing import Any, NamedTuple

import numpy as np

from textgen_env.conversation import Conversation, Partner, Reply
from textgen_env.models.table import TableModel
from textgen_env.tasks.exact import Floats, Process, one_hot


class Played(NamedTuple):
    """Where a game is."""

    fitting: tuple[int, ...]  # the secrets that fit all replies
    asked: int  # turns that were answered
    said: tuple[int, ...]  # tokens of the running turn
    heard: tuple[int, ...]  # tokens of its reply so far
    won: bool


class Game(Process):
    """A task of ``turns`` turns of ``turn_tokens`` tokens each, answered in ``reply_tokens``.

    The agent has won, and gets 1, when the reply is ``right``; a game that is lost is worth 0.
    """

    turns: int

    @property
    @abstractmethod
    def secrets(self) -> int:
        """Return how many secrets there are."""

    @property
    @abstractmethod
    def turn_tokens(self) -> int:
        """Return m, the tokens of a turn."""

    @property
    @abstractmethod
    def right(self) -> tuple[int, ...]:
        """Return the ids of the reply that ends the game."""

    @abstractmethod
    def hear(self, said: tuple[int, ...], secret: int) -> tuple[int, ...]:
        """Return the ids of the reply to a turn, as many as ``right`` has."""

    @property
    def prompts(self) -> Sequence[tuple[int, ...]]:
        """The last token alone."""
        return ((len(self.tokens) - 1,),)

    @property
    def draws(self) -> Sequence[Mapping[str, Any]]:  # type: ignore[override]
        return [{"secret": secret} for secret in range(self.secrets)]

    @property
    def steps(self) -> int:
        return self.turns * self.turn_tokens

    @property
    def partner(self) -> Partner:
        return Host(self)

    @property
    def turn_settings(self) -> Mapping[str, Any]:
        return {
            "max_turns": self.turns,
            "max_turn_tokens": self.turn_tokens,
            "max_reply_tokens": len(self.right),
            "reply_seconds": None,
        }

    def begin(self, prompt: tuple[int, ...]) -> Played:
        return Played(tuple(range(self.secrets)), 0, (), (), False)

    def follow(self, state: Played, token: int) -> Played:
        if len(state.said) < self.turn_tokens:
            return state._replace(said=(*state.said, token))
        heard = (*state.heard, token)
        if len(heard) < len(self.right):
            return state._replace(heard=heard)
        fitting = tuple(secret for secret in state.fitting if self._heard(state.said)[secret] == heard)
        return Played(fitting, state.asked + 1, (), (), heard == self.right)

    def replies(self, state: Played) -> Mapping[tuple[int, ...], float]:
        if len(state.said) < self.turn_tokens:
            return {}
        heard_of = self._heard(state.said)
        counts = Counter(heard_of[secret] for secret in state.fitting)
        return {heard: count / len(state.fitting) for heard, count in counts.items()}

    @cached_property
    def _answers(self) -> dict[tuple[int, ...], list[tuple[int, ...]]]:
        return {}

    def _heard(self, said: tuple[int, ...]) -> list[tuple[int, ...]]:
        """Return the reply to a turn under each secret."""
        if said not in self._answers:
            self._answers[said] = [self.hear(said, secret) for secret in range(self.secrets)]
        return self._answers[said]

    def left(self, state: Played, ids: tuple[int, ...]) -> int:
        return self.steps - state.asked * self.turn_tokens - len(state.said)

    def ended(self, state: Played) -> bool:
        return state.won

    def worth(self, state: Played) -> float:
        return float(state.won)

    def features(self, state: Played) -> Floats:
        """Return the fitting secrets, and the tokens of the running turn but its last place, one-hot by place."""
        fits = np.zeros(self.secrets)
        fits[list(state.fitting)] = 1.0
        places = [*state.said, *[None] * self.turn_tokens][: self.turn_tokens - 1]
        return np.concatenate([fits, *(one_hot(token, self.spoken) for token in places)])

    @property
    @abstractmethod
    def spoken(self) -> int:
        """Return how many tokens the agent may say: ids 0, 1, ... up to it."""


class Host(Partner):
    """The partner of a game: it knows the secret, and answers as the game says."""

    def __init__(self, game: Game) -> None:
        self.game = game
        self.name = type(game).__name__

    @cached_property
    def _model(self) -> TableModel:
        return TableModel(self.game.tokens, np.full(len(self.game.tokens), 1 / len(self.game.tokens)), end=None)

    def reply(self, conversation: Conversation) -> Reply:
        heard = self.game.hear(tuple(self._model.encode(conversation.last)), conversation.metadata["secret"])
        return Reply(self._model.decode(heard), done=heard == self.game.right)
