"""One reward function, two trainers: GRPO of TRL changes the language model, TextDQN steers it.

    pip install trl
    python examples/trl_grpo.py [TEXTS]

Both start from the small model in the box, and see the function's verdict on as many texts of 12 tokens. It is an
example and no contest: GRPO changes all weights and draws from the whole vocabulary, TextDQN changes no weight of the
language model and draws from 16 candidates, and their prices of a nat (``beta``) are not the same price.
"""

from __future__ import annotations

from textgen_env.models.device import prepare_process

prepare_process()  # before torch loads, which reads it then

import sys
import tempfile
from typing import Any

import gymnasium as gym
import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PrinterCallback
from trl import GRPOConfig, GRPOTrainer

from agents import TextDQN
from agents.zoo import OBSERVATION
from textgen_env.evaluation import evaluate
from textgen_env.models import model_folder

PROMPTS = ["The movie was", "My friend is", "I think that", "On the weekend we"]
TOKENS = 12
MODEL = model_folder("tiny")


def score(completion: str) -> float:
    """Return the share of the words that have more than five letters."""
    words = [word.strip(".,;:!?\"'") for word in completion.split()]
    return sum(len(word) > 5 for word in words) / max(1, len(words))


def scores(completions: list[str], **_: Any) -> list[float]:
    """The same in the form that TRL asks for: a batch, and columns of the data set as keywords."""
    return [score(completion) for completion in completions]


def with_grpo(texts: int) -> PreTrainedModel:
    """Return the model after GRPO on so many texts."""
    model = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            folder, use_cpu=True, seed=0, report_to="none", disable_tqdm=True, save_strategy="no",
            logging_strategy="no", max_completion_length=TOKENS, per_device_train_batch_size=32,
            num_generations=8, max_steps=texts // 32, learning_rate=3e-4, beta=0.04,
            gradient_checkpointing=False, generation_kwargs={"min_new_tokens": TOKENS},
        )  # fmt: skip
        data = Dataset.from_dict({"prompt": PROMPTS * 8})
        tokenizer = AutoTokenizer.from_pretrained(MODEL, padding_side="left")
        trainer = GRPOTrainer(model, scores, args=settings, train_dataset=data, processing_class=tokenizer)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
    return trainer.model


def write(model: PreTrainedModel, number: int) -> list[str]:
    """Return sampled completions, so many in all."""
    tokenizer = AutoTokenizer.from_pretrained(MODEL, padding_side="left")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    torch.manual_seed(1)
    prompts = tokenizer(PROMPTS * (number // len(PROMPTS)), return_tensors="pt", padding=True)
    ids = model.generate(**prompts, do_sample=True, max_new_tokens=TOKENS, min_new_tokens=TOKENS)
    return tokenizer.batch_decode(ids[:, prompts["input_ids"].shape[1] :], skip_special_tokens=True)


def with_text_dqn(texts: int) -> tuple[TextDQN, gym.vector.VectorEnv]:
    """Return the agent after so many texts, and its environment."""
    env = gym.make_vec(
        "textgen_env:TextGen-v0", num_envs=32, model=MODEL, prompts=PROMPTS, reward=score,
        max_new_tokens=TOKENS, min_new_tokens=TOKENS, observation=OBSERVATION,
    )  # fmt: skip
    agent = TextDQN("CandidatePolicy", env, beta=0.04, buffer_size=texts * TOKENS, learning_starts=1_000, seed=0)
    return agent.learn(texts * TOKENS), env


def main(texts: int = 640) -> dict[str, float]:
    """Train both, and return the mean score of each and of the language model."""
    untrained = AutoModelForCausalLM.from_pretrained(MODEL, dtype=torch.float32)
    written = {"language model": write(untrained, 256), "GRPO": write(with_grpo(texts), 256)}
    agent, env = with_text_dqn(texts)
    for name, beta in (("language model, 16 candidates", 1e6), ("TextDQN", agent.beta)):
        agent.beta = beta
        written[name] = list(evaluate(agent, env.unwrapped, 256, seed=1).completions)
    means = {}
    for name, completions in written.items():
        means[name] = sum(map(score, completions)) / len(completions)
        print(f"{name}: {means[name]:.3f}, for example {completions[0]!r}")
    return means


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
