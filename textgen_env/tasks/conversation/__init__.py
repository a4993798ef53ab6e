"""Four games against a partner that keeps a secret, with exact optima and an exact language model."""

from __future__ import annotations

from textgen_env.tasks.conversation.ahead import AskAhead
from textgen_env.tasks.conversation.numbers import GuessNumber
from textgen_env.tasks.conversation.questions import TwentyQuestions
from textgen_env.tasks.conversation.words import Wordle

__all__ = ["AskAhead", "GuessNumber", "TwentyQuestions", "Wordle"]
