"""Episodes played once and kept, so that a change of behaviour shows as a change of a file.

Write them again, after a change that was meant, with ``python tests/golden.py``.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
from toys import PROMPTS, Worth, letters

from textgen_env import TextGenEnv

PATH = Path(__file__).with_name("golden_episodes.json")
SMALL = {"top_k": 4, "max_new_tokens": 5, "max_prompt_tokens": 4}
BOX = {"model": "tiny", "prompts": None, "reward": "sentiment", "dtype": "float32", "max_prompt_tokens": 24}
SCRIPTS = [
    ({}, 0, [0, 1, 2, 3, 0]),
    ({"observation": "full", "reward_at": "step", "stop": ("ab",), "top_p": 0.75}, 1, [0, 1]),
    ({"observation": "full", "top_k": None, "min_new_tokens": 2}, 2, [4, 3, 5]),
    ({"observation": "hidden", "top_k": 2, "top_p": 0.35, "on_illegal": "last_legal"}, 3, [1, 1, 1, 0, 0]),
    ({"observation": "tokens", "max_new_tokens": 2}, 4, [0, 3]),
    ({**BOX, "observation": "default"}, 5, [0, 0, 1, 2, 0]),
    ({**BOX, "observation": ("score", "candidate_scores"), "reward_at": "step", "top_p": 0.5}, 6, [0, 0, 0, 0, 0]),
]
"""(settings, seed of the reset, actions to the end of the episode)"""


def episodes():
    """What the environment answers to each script, as plain data."""
    played = []
    for settings, seed, actions in SCRIPTS:
        objects = {"model": letters(), "prompts": PROMPTS, "reward": Worth()}
        env = TextGenEnv(**(objects | SMALL | settings))
        steps = [{"observation": _plain(env.reset(seed=seed)[0])}]
        for action in actions:
            observation, reward, terminated, truncated, info = env.step(action)
            answer = {"observation": _plain(observation), "reward": reward, "info": _plain(info)}
            steps.append(answer | {"terminated": terminated, "truncated": truncated})
        played.append({"settings": _plain(settings), "seed": seed, "actions": actions, "steps": steps})
    return played


def _plain(value):
    if isinstance(value, dict):
        return {key: _plain(part) for key, part in value.items()}
    if isinstance(value, np.ndarray):
        return [round(number, 6) for number in value.tolist()]
    if isinstance(value, tuple):
        return list(value)
    return round(value, 6) if isinstance(value, float) else value


def as_text(played):
    """One line a step, so that a difference is readable."""
    lines = []
    for episode in played:
        head = {key: value for key, value in episode.items() if key != "steps"}
        steps = ",\n   ".join(map(json.dumps, episode["steps"]))
        lines.append(f'{json.dumps(head)[:-1]}, "steps": [\n   {steps}]}}')
    return "[" + ",\n ".join(lines) + "]\n"


if __name__ == "__main__":
    PATH.write_text(as_text(episodes()))
