"""A classifier trained on your own labelled lines as the reward.

    python examples/classifier_reward.py                 # half a minute on 2 cores
    python examples/classifier_reward.py reviews.tsv     # lines of label<TAB>text

Without a file it learns from the openings in the box which of them sound like a diary, and then finishes
openings about the weather: once with the model's first choice, once with the token that maximises its
log-probability plus the score that it leads to. A classifier of words scores a prefix quickly, so this
lookahead costs no forward of the model.
"""

from __future__ import annotations

from textgen_env.models.device import prepare_process

prepare_process()  # before torch loads, which reads it then

import argparse
import tempfile
from pathlib import Path

import gymnasium as gym
import numpy as np

import textgen_env  # noqa: F401  registers the environment
from textgen_env.prompts import make_prompts
from textgen_env.rewards.classifier import read_examples, train_classifier


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", nargs="?", help="a file of label<TAB>text lines")
    parser.add_argument("--label", help="the label to reward; default: the last in alphabetical order")
    chosen = parser.parse_args()
    if chosen.lines:
        examples, label = read_examples(chosen.lines), chosen.label
    else:
        examples = [(str(prompt.metadata["topic"]), prompt.text) for prompt in make_prompts()]
        label = "diary"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "classifier.json"
        print(train_classifier(examples, file, label, min_count=1))
        reward = {"name": "classifier", "file": str(file)}
        for weight in (0.0, 20.0):
            write(reward, weight)


def write(reward: dict[str, str], weight: float) -> None:
    """Finish eight texts, each token by its log-probability plus ``weight`` times the score it leads to."""
    keys = ("logprobs", "candidate_scores")
    envs = gym.make_vec("TextGen-v0", num_envs=8, prompts="weather", reward=reward, observation=keys, max_new_tokens=16)
    observation, _ = envs.reset(seed=0)
    finished: dict[int, tuple[float, str]] = {}
    while len(finished) < envs.num_envs:
        actions = np.argmax(observation["logprobs"] + weight * observation["candidate_scores"], axis=-1)
        observation, rewards, terminations, _, infos = envs.step(actions)
        for row in np.flatnonzero(terminations):
            finished.setdefault(int(row), (float(rewards[row]), infos["final_info"]["text"][row]))
    print(f"\nscore weighs {weight}: mean reward {np.mean([reward for reward, _ in finished.values()]):.3f}")
    for earned, text in list(finished.values())[:3]:
        print(f"  {earned:.3f} {text!r}")


if __name__ == "__main__":
    main()
