"""A judge of one's own: any function of a finished text. TextDQN learns what it likes, from its verdicts alone."""

from __future__ import annotations

import sys

import gymnasium as gym
from sklearn.feature_extraction.text import TfidfVectorizer
from sklearn.linear_model import LogisticRegression
from sklearn.pipeline import make_pipeline

from agents import TextDQN
from agents.text_dqn.networks import NEEDED_KEYS
from textgen_env.evaluation import evaluate
from textgen_env.prompts import make_prompts

LIKED = [
    "we laughed and ate warm bread",
    "a kind friend smiled at me",
    "she loved the sunny garden",
    "such a happy day",
]
DISLIKED = [
    "it was cold and he was sad",
    "they lost the old dog",
    "nobody came and she cried",
    "a dark and angry storm",
]
classifier = make_pipeline(TfidfVectorizer(), LogisticRegression(C=10)).fit(LIKED + DISLIKED, [1] * 4 + [0] * 4)


def judge(completion: str) -> float:
    """Return the probability that the text is one of the liked ones."""
    return float(classifier.predict_proba([completion])[0, 1])


def main(steps: int = 30_000) -> tuple[float, float]:
    """Learn, and return E[R] - 0.1 KL of the language model and of the agent on prompts that it has not seen."""
    openings = make_prompts("openings")
    task = {"reward": judge, "observation": NEEDED_KEYS, "max_new_tokens": 20, "min_new_tokens": 20}
    env = gym.make_vec("textgen_env:TextGen-v0", num_envs=64, prompts=openings.split("train"), **task)
    agent = TextDQN(env=env, beta=0.1, buffer_size=steps, seed=0, learning_starts=min(5_000, steps // 5)).learn(steps)
    print("acts as", agent.choose_beta(env.unwrapped, texts=128, prompts=list(openings.split("validation"))))
    values = []
    for name, beta in (("language model", 1e6), ("agent", agent.beta)):
        agent.beta = beta
        found = evaluate(agent, env.unwrapped, 256, seed=1, prompts=openings.split("test"))
        values.append(found.reward - 0.1 * (found.mean_kl or 0.0))
        print(f"{name}: reward {found.reward:.3f} at {found.mean_kl:.2f} nats, for example {found.completions[0]!r}")
    return values[0], values[1]


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
