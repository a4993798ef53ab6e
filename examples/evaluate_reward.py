"""Modules of the ``evaluate`` library: one as the reward, several as a description of the texts.

    python examples/evaluate_reward.py      # half a minute on 2 cores

Here the modules are those of ``textgen_env.metrics``, which need no hub. With a network,
``evaluate.load("sacrebleu")`` and other modules take the same places.
"""

from __future__ import annotations

from textgen_env.models.device import prepare_process

prepare_process()  # before torch loads, which reads it then

import evaluate
import gymnasium as gym
import numpy as np

import textgen_env  # noqa: F401  registers the environment
from textgen_env.metrics import Chrf, Distinct, RewardStatistics, Rouge
from textgen_env.rewards import EvaluateReward

PROMPTS = [
    {"prompt": "The sun rises in the", "reference": " east and sets in the west."},
    {"prompt": "Water freezes at", "reference": " zero degrees Celsius."},
    {"prompt": "The capital of France is", "reference": " Paris, a city on the Seine."},
    {"prompt": "An apple a day", "reference": " keeps the doctor away."},
]


def main() -> None:
    reward = EvaluateReward(Chrf(), key="chrf")  # a module and which of its figures
    envs = gym.make_vec("TextGen-v0", num_envs=8, prompts=PROMPTS, reward=reward, max_new_tokens=12)
    references = {prompt["prompt"]: prompt["reference"] for prompt in PROMPTS}
    observation, _ = envs.reset(seed=0)
    rng = np.random.default_rng(0)
    texts: list[str] = []
    wanted: list[str] = []
    earned: list[float] = []
    while len(texts) < 16:
        actions = np.argmax(observation["logprobs"] + rng.gumbel(size=observation["logprobs"].shape), axis=-1)
        observation, rewards, terminations, _, infos = envs.step(actions)
        for row in np.flatnonzero(terminations):
            final = infos["final_info"]
            texts.append(final["completion"][row])
            wanted.append(references[final["prompt"][row]])
            earned.append(float(rewards[row]))
    description = evaluate.combine([Chrf(), Rouge(), Distinct(), RewardStatistics()])
    figures = description.compute(predictions=texts, references=wanted, rewards=earned)
    for name, figure in figures.items():
        print(f"{name:12} {figure:.3f}")
    best = int(np.argmax(earned))
    print(f"the best, with {earned[best]:.1f}: {texts[best]!r} (reference {wanted[best]!r})")


if __name__ == "__main__":
    main()
