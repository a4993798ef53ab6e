"""A classifier trained on your own labelled lines as the reward.

    python examples/classifier_reward.py                 # half a minute on 2 cores
    python examples/classifier_reward.py reviews.tsv     # lines of label<TAB>text

Without a file it learns from the two dozen lines below: whether a sentence is about people or about
things. It then writes with a look at what each candidate token would earn, beside the model's own
first choice. The score of the prefix is cheap, so looking costs no forward of the model.
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path

import gymnasium as gym
import numpy as np

import textgen_env  # noqa: F401  registers the environment
from textgen_env.rewards.classifier import read_examples, train_classifier

PEOPLE = """my sister called her friends
the children and their teacher were singing
he met his brother and his wife
a young man helped the old woman
she told her mother about the boy
our neighbours invited the whole family
the girl asked her father
they were friends of my parents
a group of people thanked the man
his daughter and her husband came
the woman smiled at the children
my friend and I talked to the people"""

THINGS = """the engine needs a new battery
a table with a broken leg
the road is made of stone
this phone has a large screen
the roof and the windows were new
an old car with two doors
the box was full of paper
the machine has a metal handle
the water in the pipe was cold
a house with a wooden floor
the clock on the wall stopped
the bridge is made of iron"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("lines", nargs="?", help="a file of label<TAB>text lines")
    parser.add_argument("--label", help="the label to reward; default: the last in alphabetical order")
    chosen = parser.parse_args()
    if chosen.lines:
        examples, label = read_examples(chosen.lines), chosen.label
    else:
        examples = [("people", line) for line in PEOPLE.splitlines()]
        examples += [("things", line) for line in THINGS.splitlines()]
        label = "people"
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "classifier.json"
        print(train_classifier(examples, file, label))
        reward = {"name": "classifier", "file": str(file)}
        for weight in (0.0, 5.0):
            write(reward, weight)


def write(reward: dict[str, str], weight: float) -> None:
    """Finish eight texts, each token by its log-probability plus ``weight`` times the score it leads to."""
    keys = ("logprobs", "candidate_scores")
    envs = gym.make_vec("TextGen-v0", num_envs=8, reward=reward, observation=keys, max_new_tokens=16)
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
