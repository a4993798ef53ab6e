"""TextDQN's algorithm alone, in a loop of one's own: no Stable-Baselines3, no files.

    python examples/learner.py [--steps 20000]

Reward and KL of the texts that it writes while it learns, with the small model in the box.
"""

from __future__ import annotations

from textgen_env.models.device import prepare_process

prepare_process()  # before torch loads, which reads it then

import argparse

import gymnasium as gym
import numpy as np
import torch

from agents.text_dqn.learner import Learner
from agents.text_dqn.networks import NEEDED_KEYS, CandidateQNetwork
from agents.text_dqn.replay import EpisodeReplay


def main(steps: int) -> list[float]:
    """Train, print a line every tenth of the way, and return the mean rewards of those tenths."""
    torch.manual_seed(0)
    env = gym.make_vec("textgen_env:TextGen-v0", num_envs=32, observation=(*NEEDED_KEYS, "score"), max_new_tokens=12)
    model, space = env.unwrapped.language_model, env.single_observation_space
    networks = [
        CandidateQNetwork(space, embedding_size=model.embedding_size, max_new_tokens=env.unwrapped.max_new_tokens)
        for _ in range(2)
    ]
    networks[1].load_state_dict(networks[0].state_dict())
    for network in networks:
        network.bind(model)
        network.eval()
    optimizer = torch.optim.AdamW(networks[0].parameters(), lr=1e-3, weight_decay=0.1)
    learner = Learner(*networks, optimizer, EpisodeReplay(50_000, space, n_envs=32), rng=np.random.default_rng(0))

    observation, _ = env.reset(seed=0)
    tenths: list[float] = []
    rewards, kl = [], []
    while learner.steps < steps:
        acted = learner.act(observation, progress=learner.steps / steps)
        new_observation, reward, ended, _, infos = env.step(acted.actions)
        last = {key: value.copy() for key, value in new_observation.items()}  # ended rows have begun anew
        for row in np.flatnonzero(ended):
            for key, value in last.items():
                value[row] = infos["final_obs"][row][key]
        learner.add(observation, last, acted, reward, ended, truncated=np.zeros_like(ended))
        observation = new_observation
        rewards += reward[ended].tolist()
        kl.append(acted.kl)
        if learner.steps > steps // 10:
            learner.update(learner.updates_owed)
        if learner.steps * 10 // steps > len(tenths):
            tenths.append(float(np.mean(rewards)))
            print(f"{learner.steps:7,} steps  reward {tenths[-1]:5.2f}  KL {12 * np.mean(kl):4.1f} nats a text")
            rewards, kl = [], []
    return tenths


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=20_000)
    main(parser.parse_args().steps)
