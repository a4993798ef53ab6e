"""Games in words: a chat model plays, and the partner reads what it says.

    "I think it is 4."  ->  understand  ->  (4,)  ->  hear(said, secret)  ->  HIGHER  ->  say  ->  "Higher."

The game is the same, so what its best play reaches bounds what can be reached in words. A turn in which no move is
found is lost.
"""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import replace
from inspect import Parameter, signature
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from textgen_env.chat import ChatPartner
from textgen_env.conversation import Conversation, Partner, Reply
from textgen_env.errors import ConfigError
from textgen_env.models.hub import load_language_model
from textgen_env.prompts import ListPrompts, Prompt, chat
from textgen_env.rewards.base import Generation, Reward
from textgen_env.tasks.base import TASKS, Task
from textgen_env.tasks.conversation.game import Game
from textgen_env.tasks.exact import exact_task
from textgen_env.tasks.language import searched_bounds

G = TypeVar("G", bound="type[SpokenGame]")

TURN, REPLY = 8, 48
"""Tokens of a turn in words, and of a reply with its part of the chat template."""


class SpokenGame(Game):
    """A game that can be played in words, too."""

    @property
    @abstractmethod
    def rules(self) -> str:
        """Return what the agent is told, as a system message."""

    @property
    @abstractmethod
    def opening(self) -> str:
        """Return what the partner says first."""

    @abstractmethod
    def understand(self, text: str) -> tuple[int, ...] | None:
        """Return the ids of the first move in ``text``; None where there is none."""

    @abstractmethod
    def say(self, heard: tuple[int, ...]) -> str:
        """Return a reply, of the ids ``heard``, in words."""


class SpeakingHost(Partner):
    """The partner of a game in words: it knows the secret, and repeats the rules where it finds no move."""

    def __init__(self, game: SpokenGame) -> None:
        self.game = game
        self.name = f"{type(game).__name__} in words"

    def reply(self, conversation: Conversation) -> Reply:
        said = self.game.understand(conversation.last)
        if said is None:
            return Reply(self.game.opening)
        heard = self.game.hear(said, conversation.metadata["secret"])
        return Reply(self.game.say(heard), done=heard == self.game.right)


class Won(Reward):
    """1 if the partner's last words are that the agent has won, else 0. Running score: no."""

    def __init__(self, game: SpokenGame) -> None:
        self.name = "won"
        self._words = game.say(game.right)

    def __call__(self, generations: Sequence[Generation]) -> npt.NDArray[np.float64]:
        return np.array([float(g.turns[-1].text == self._words) for g in generations])


def game_task(id: str) -> Callable[[G], G]:
    """Register a game as a task whose sizes are the class's fields, and a chat model to play it in words."""

    def register(cls: G) -> G:
        def factory(model: Any = None, **sizes: Any) -> Task:
            game = cls(**sizes)
            return exact_task(id, game) if model is None else in_words(id, game, model)

        own = signature(cls)
        model = Parameter("model", Parameter.KEYWORD_ONLY, default=None, annotation=Any)
        factory.__doc__ = cls.__doc__
        factory.__signature__ = own.replace(parameters=[*own.parameters.values(), model])  # type: ignore[attr-defined]
        TASKS.register(id)(factory)
        return cls

    return register


def in_words(id: str, game: SpokenGame, model: Any) -> Task:
    """Return ``game`` as a conversation with a chat model.

    Raises:
        ConfigError: the model has no tokenizer, or one whose chat template does more than append.
        PromptError: the tokenizer has no chat template.
    """
    player = load_language_model(model)
    tokenizer: Any = getattr(player, "tokenizer", None)
    if tokenizer is None:
        raise ConfigError(f"model {player.name!r} has no tokenizer: {id} in words needs a chat model, such as smollm2")
    exact = exact_task(id, game)
    draws = [Prompt(game.opening, metadata=draw) for draw in game.draws]
    prompts, sizes = chat(ListPrompts(draws), tokenizer, game.rules), {**exact.sizes, "model": model}
    return replace(
        exact,
        sizes=sizes,
        model=player,
        train_prompts=prompts,
        test_prompts=prompts,
        reward=Won(game),
        settings={
            "max_turns": game.turns,
            "max_turn_tokens": TURN,
            "max_new_tokens": game.turns * TURN,
            "max_prompt_tokens": max(len(player.encode(prompt.text)) for prompt in prompts),
            "max_reply_tokens": REPLY,
            "reply_seconds": None,
        },
        partner=ChatPartner(SpeakingHost(game), tokenizer, game.rules),
        known_bounds=lambda: searched_bounds(id, sizes, game.ceiling),
    )
