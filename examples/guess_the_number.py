"""A conversation: guess a number from 1 to 7, told "higher" or "lower". TextDQN learns to halve what is left.

    python examples/guess_the_number.py [STEPS]

The partner is a Python function. It knows the number, which comes with the prompt, and the agent does not. The best
play finds it in 17/7 guesses on average.
"""

from __future__ import annotations

from textgen_env.models.device import prepare_process

prepare_process()  # before torch loads, which reads it then

import sys

import gymnasium as gym
import numpy as np

from agents import TextDQN
from textgen_env import Prompt, TableModel
from textgen_env.conversation import Conversation, Reply
from textgen_env.evaluation import evaluate

NUMBERS = range(1, 8)
TOKENS = [*map(str, NUMBERS), " higher. ", " lower. ", " right.", "Guess: "]


def host(conversation: Conversation) -> Reply:
    """Answer a guess; one that is right ends the game, and any other costs 0.25."""
    number, guess = conversation.metadata["number"], int(conversation.last)
    if guess == number:
        return Reply(" right.", reward=1.0, done=True)
    return Reply(" higher. " if guess < number else " lower. ", reward=-0.25)


def still_possible(ids: tuple[int, ...]) -> np.ndarray:
    """Return the numbers that fit what was said, (7,): the hidden state of the model below."""
    possible, numbers = np.ones(7), np.array(NUMBERS)
    for guess, answer in zip(ids[1::2], ids[2::2], strict=False):
        possible *= {" higher. ": numbers > guess + 1, " lower. ": numbers < guess + 1}.get(TOKENS[answer], numbers > 0)
    return possible


def main(steps: int = 15_000) -> tuple[float, float]:
    """Learn, and return the mean return of the language model, which guesses blindly, and of the agent."""
    blind = [1 / 7] * 7 + [0.0] * 4
    game = {
        "model": TableModel(TOKENS, blind, end=None, features=still_possible, hidden_size=7),
        "prompts": [Prompt("Guess: ", metadata={"number": number}) for number in NUMBERS],
        "reward": None,  # the partner's alone
        "partner": host,
        "max_turns": 4,
        "max_turn_tokens": 1,
        "max_new_tokens": 4,
        "max_reply_tokens": 1,
    }
    env = gym.make_vec("textgen_env:TextGen-v0", num_envs=32, top_k=7, observation="full", **game)
    agent = TextDQN(
        env=env,
        beta=0.02,
        beta_start=0.5,
        score=None,
        learning_starts=min(1_000, steps // 2),
        steps_per_update=16,
        seed=0,
    )
    measured = [evaluate(agent, env.unwrapped, 700, seed=1)]
    agent.learn(steps)
    measured.append(evaluate(agent, env.unwrapped, 700, seed=1))
    for name, texts in zip(("language model", "agent"), measured, strict=True):
        print(f"{name}: return {texts.reward:.2f}, {texts.lengths.mean():.2f} guesses")
        print("\n".join(f"  {text}" for text in texts.completions[:3]))
    return measured[0].reward, measured[1].reward


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
