"""An OpenEnv environment as a partner: TextDQN haggles with a seller behind a web socket.

    pip install openenv
    python examples/openenv_partner.py [STEPS]

The seller is served on this machine, as any OpenEnv environment is, and knows its lowest price; the agent does not.
An environment has a state, and a partner must not: rows fork and go back. So each reply begins the environment's
episode anew, with the seed that came with the prompt, and repeats what the agent has said.
"""

from __future__ import annotations

from textgen_env.models.device import prepare_process

prepare_process()  # before torch loads, which reads it then

import socket
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Thread
from typing import Any

import gymnasium as gym
import numpy as np
import uvicorn
from openenv.core import Action, Environment, GenericEnvClient, Observation, State, create_fastapi_app

from agents import TextDQN
from textgen_env import Prompt, TableModel
from textgen_env.conversation import Conversation, Reply
from textgen_env.evaluation import evaluate

PRICES = range(1, 6)
TOKENS = [*map(str, PRICES), " Too little. ", " Sold!", "Your offer: "]


# --- theirs: an environment of OpenEnv, and its server


class Offer(Action):
    text: str


class Answer(Observation):
    text: str = ""


class Seller(Environment[Offer, Answer, State]):
    """Sells for its lowest price or more. A bargain is worth more, and each refusal costs 0.1."""

    SUPPORTS_CONCURRENT_SESSIONS = True

    def reset(self, seed: int | None = None, episode_id: str | None = None, **_: Any) -> Answer:
        self.lowest, self.offers = PRICES[(seed or 0) % len(PRICES)], 0
        return Answer()

    def step(self, action: Offer, timeout_s: float | None = None, **_: Any) -> Answer:
        self.offers += 1
        offer = int(action.text)
        if offer >= self.lowest:
            return Answer(text=" Sold!", reward=1 - offer / 10, done=True)
        return Answer(text=" Too little. ", reward=-0.1)

    @property
    def state(self) -> State:
        return State(step_count=self.offers)


@contextmanager
def served() -> Iterator[str]:
    """Serve the seller on a free port of the loopback interface, and yield its address."""
    app = create_fastapi_app(Seller, Offer, Answer, max_concurrent_envs=4)
    server = uvicorn.Server(uvicorn.Config(app, log_level="error", ws="websockets-sansio"))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        thread = Thread(target=server.run, kwargs={"sockets": [listening]}, daemon=True)
        thread.start()
        try:
            while thread.is_alive() and not server.started:
                time.sleep(0.01)
            yield f"http://127.0.0.1:{listening.getsockname()[1]}"
        finally:
            server.should_exit = True
            thread.join()


# --- ours: the partner, and an agent that learns from it


class OpenEnvPartner:
    """Any OpenEnv environment whose actions and observations are texts."""

    name = "openenv"

    def __init__(self, client: Any) -> None:
        self.client = client

    def reply(self, conversation: Conversation) -> Reply:
        self.client.reset(seed=conversation.metadata["seed"])
        for text in conversation.said:
            result = self.client.step({"text": text})
        return Reply(result.observation["text"], float(result.reward or 0.0), result.done)


def refused(ids: tuple[int, ...]) -> np.ndarray:
    """Return one where an offer was refused, (5,): the hidden state of the model below."""
    return np.isin(PRICES, [int(TOKENS[offer]) for offer in ids[1::2]]).astype(float)


def main(steps: int = 4_000) -> tuple[float, float]:
    """Learn, and return the mean return of the language model, which offers blindly, and of the agent."""
    game = {
        "model": TableModel(TOKENS, [0.2] * 5 + [0.0] * 3, end=None, features=refused, hidden_size=5),
        "prompts": [Prompt("Your offer: ", metadata={"seed": seed}) for seed in range(len(PRICES))],
        "reward": None,  # the partner's alone
        "max_turns": 3,
        "max_turn_tokens": 1,
        "max_new_tokens": 3,
        "max_reply_tokens": 1,
    }
    with served() as address, GenericEnvClient(base_url=address).sync() as client:
        env = gym.make_vec(
            "textgen_env:TextGen-v0", num_envs=16, top_k=5, observation="full", partner=OpenEnvPartner(client), **game
        )
        agent = TextDQN(
            env=env,
            beta=0.02,
            beta_start=0.5,
            score=None,
            learning_starts=min(500, steps // 2),
            steps_per_update=16,
            seed=0,
        )
        measured = [evaluate(agent, env.unwrapped, 300, seed=1)]
        agent.learn(steps)
        measured.append(evaluate(agent, env.unwrapped, 300, seed=1))
    for name, texts in zip(("language model", "agent"), measured, strict=True):
        print(f"{name}: return {texts.reward:.2f}")
        print("\n".join(f"  {text}" for text in texts.completions[:5]))
    return measured[0].reward, measured[1].reward


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
