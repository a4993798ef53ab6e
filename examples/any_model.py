"""A hybrid model and an encoder-decoder: TextDQN learns on both, the same way.

    python examples/any_model.py                      # a minute on 2 cores

Both models are small and have random weights, so nothing is downloaded and their texts mean nothing. Put a name that
``from_pretrained`` knows in their place, ``model="LiquidAI/LFM2-350M"`` or ``model="google/flan-t5-small"``, and the
rest stays as it is.
"""

from __future__ import annotations

from typing import Any

import gymnasium as gym
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import Lfm2Config, Lfm2ForCausalLM, PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

import textgen_env  # noqa: F401  # registers the environment
from agents import TextDQN
from agents.zoo import OBSERVATION

WORDS = ["<pad>", "</s>", *(first + second for first in "bdgklmn" for second in ("a", "e", "i", "o", "u"))]


def tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer of a few syllables."""
    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<pad>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>")


def hybrid() -> Any:
    """Return a model with convolutions in half of its layers and attention in the others."""
    return Lfm2ForCausalLM(
        Lfm2Config(
            vocab_size=len(WORDS), hidden_size=64, intermediate_size=128, num_hidden_layers=4, num_attention_heads=4,
            num_key_value_heads=2, layer_types=["conv", "full_attention"] * 2, pad_token_id=0, eos_token_id=1,
        )
    )  # fmt: skip


def encoder_decoder() -> Any:
    """Return a model whose encoder reads the prompt, and whose decoder writes the text."""
    return T5ForConditionalGeneration(
        T5Config(vocab_size=len(WORDS), d_model=64, d_ff=128, num_layers=2, num_heads=4, decoder_start_token_id=0)
    )


def main(steps: int = 4_000) -> None:
    for make in (hybrid, encoder_decoder):
        torch.manual_seed(0)
        envs = gym.make_vec(
            "TextGen-v0", num_envs=16, model=(make(), tokenizer()), prompts=["ba de", "gi ko lu"],
            reward=lambda text: float(text.count("a")), top_k=8, max_new_tokens=8, observation=OBSERVATION,
        )  # fmt: skip
        agent = TextDQN("CandidatePolicy", envs, beta=0.1, learning_starts=500, seed=0).learn(steps)
        rewards = [episode["r"] for episode in agent.ep_info_buffer]
        print(f"{make.__name__}: runs on {envs.unwrapped.episodes.slots.decoder.name}; "
              f"mean reward of the last texts {sum(rewards) / len(rewards):.2f}")  # fmt: skip


if __name__ == "__main__":
    main()
