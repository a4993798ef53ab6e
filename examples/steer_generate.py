"""A trained agent steers ``model.generate``: back into Hugging Face, with any prompt.

    python examples/steer_generate.py [STEPS]        # half a minute on 2 cores

A TextDQN learns for a while to write positive texts with the small model in the box. It is saved
as a folder of safetensors and JSON, loaded again without an environment, and steers the plain model.
"""

from __future__ import annotations

from textgen_env.models.device import prepare_process

prepare_process()  # before torch loads, which reads it then

import sys
import tempfile

import gymnasium as gym
import torch

import textgen_env  # registers the environment
from agents import TextDQN

PROMPTS = ["The movie was", "My neighbour is a person who", "The weather this morning:", "I think that this city"]
TOKENS = 20


def learn(steps: int) -> TextDQN:
    """Return an agent that has learned to write positive texts of ``TOKENS`` tokens."""
    envs = gym.make_vec("TextGen-v0", num_envs=64, reward="sentiment", observation="full",
                        max_new_tokens=TOKENS, min_new_tokens=TOKENS)  # fmt: skip
    return TextDQN("CandidatePolicy", envs, learning_starts=2_000, seed=0).learn(steps)


def main(steps: int = 20_000) -> None:
    with tempfile.TemporaryDirectory() as folder:
        learn(steps).save_pretrained(folder)
        agent = TextDQN.from_pretrained(folder)

    model, tokenizer = agent.language_model.model, agent.language_model.tokenizer
    tokenizer.pad_token = tokenizer.eos_token
    inputs = tokenizer(PROMPTS * 8, padding=True, padding_side="left", return_tensors="pt")
    start = inputs["input_ids"].shape[1]

    torch.manual_seed(0)
    with agent.logits_processor(model, max_new_tokens=TOKENS) as steer:
        steered = model.generate(**inputs, logits_processor=[steer], **steer.settings)
        plain = model.generate(**inputs, **(steer.settings | {"top_k": 16, "min_new_tokens": TOKENS}))

    sentiment = textgen_env.make_reward("sentiment")
    for name, ids in {"language model": plain, "steered": steered}.items():
        texts = tokenizer.batch_decode(ids[:, start:], skip_special_tokens=True)
        rewards = sentiment([textgen_env.Generation("", text) for text in texts])
        print(f"\n{name}: mean sentiment of {len(texts)} texts {rewards.mean():.2f}")
        for prompt, text in zip(PROMPTS, texts, strict=False):
            print(f"  {prompt}|{text!r}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
