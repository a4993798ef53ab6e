"""Plain Stable-Baselines3: a DQN picks the next token of a language model.

    python examples/sb3_dqn.py [STEPS]

The task is undiscounted, so gamma is 1 (SB3's default is 0.99). The features are the hidden state
that the environment's own forward has computed.
"""

from textgen_env.models.device import prepare_process

prepare_process()  # before torch loads, which reads it then

import sys

import gymnasium as gym
from stable_baselines3 import DQN

import textgen_env  # noqa: F401  registers the environment
from agents import PrunedTransformerExtractor


def main(steps: int = 3_000) -> None:
    env = gym.make("TextGen-v0", reward="sentiment", observation="full", max_new_tokens=12)
    agent = DQN(
        "MultiInputPolicy",
        env,
        gamma=1.0,
        buffer_size=5_000,
        learning_starts=500,
        policy_kwargs={
            "features_extractor_class": PrunedTransformerExtractor,
            "features_extractor_kwargs": {"source": "hidden"},
        },
    )
    agent.learn(steps)
    observation, _ = env.reset(options={"prompt": "The movie was"})
    ended = False
    while not ended:
        action, _ = agent.predict(observation, deterministic=True)
        observation, reward, ended, _, info = env.step(action)
    print(f"{reward:+.2f}  {info['text']}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
