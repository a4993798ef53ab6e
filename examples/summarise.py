"""Short summaries by an instruction model, rewarded by ROUGE-L against references.

    python examples/summarise.py            # half a minute on 2 cores

The prompts go through the model's chat template. ROUGE-L has a running score, so the second round
looks one token ahead in the reward: each candidate's log-probability plus the score that it adds. It
sees the reference, as training does; an agent must do without it.
"""

from __future__ import annotations

from textgen_env.models.device import prepare_process

prepare_process()  # before torch loads, which reads it then

import gymnasium as gym
import numpy as np
from transformers import AutoTokenizer

import textgen_env  # noqa: F401  registers the environment
from textgen_env.models import model_folder
from textgen_env.prompts import PromptSource, chat

ARTICLES = {
    "The town library will close for six weeks from Monday. Workers will repair the roof, which has leaked "
    "since the storm in March. Readers can keep the books they have until it opens again.": (
        "The library closes for six weeks while its roof is repaired."
    ),
    "After three days of rain the river rose by two metres on Sunday night. Fire crews moved forty families "
    "out of the lower streets. Nobody was hurt, and the water is falling again.": (
        "Forty families had to leave their homes after the river rose."
    ),
    "The football club has sold its young striker to a team from the capital. The fee was not made public. "
    "Fans had hoped that he would stay for another season.": (
        "The club sold its young striker to a team from the capital."
    ),
    "A bakery on Mill Street has been giving unsold bread to a school since January. The idea came from a "
    "pupil who wrote a letter to the owner. Two other shops want to join.": (
        "A bakery gives its unsold bread to a school after a pupil wrote to the owner."
    ),
}


def prompts() -> PromptSource:
    rows = [
        {"prompt": f"Summarise in one short sentence: {article}", "reference": summary}
        for article, summary in ARTICLES.items()
    ]
    return chat(rows, AutoTokenizer.from_pretrained(model_folder("smollm2")))


def write(source: PromptSource, weight: float) -> None:
    """Summarise every article, each token by its log-probability plus ``weight`` times the score it leads to."""
    envs = gym.make_vec(
        "TextGen-v0",
        num_envs=8,
        model="smollm2",
        prompts=source,
        reward="rouge",
        observation=("logprobs", "candidate_scores"),
        max_prompt_tokens=160,
        max_new_tokens=24,
        stop=("\n",),
    )
    observation, _ = envs.reset(seed=0)
    finished: dict[str, tuple[float, str]] = {}
    while len(finished) < len(source):
        actions = np.argmax(observation["logprobs"] + weight * observation["candidate_scores"], axis=-1)
        observation, rewards, terminations, _, infos = envs.step(actions)
        for row in np.flatnonzero(terminations):
            final = infos["final_info"]
            finished[final["prompt"][row]] = float(rewards[row]), final["completion"][row]
    print(f"\nscore weighs {weight}: mean ROUGE-L {np.mean([reward for reward, _ in finished.values()]):.3f}")
    for prompt in source:
        earned, summary = finished[prompt.text]
        print(f"  {earned:.3f} {summary!r}")


def main() -> None:
    source = prompts()
    for weight in (0.0, 20.0):
        write(source, weight)


if __name__ == "__main__":
    main()
