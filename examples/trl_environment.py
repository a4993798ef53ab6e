"""A task of textgen-env in TRL: GRPOTrainer plays guess-the-number through ``environment_factory``.

    pip install trl
    python examples/trl_environment.py [UPDATES]

TRL calls the public methods of an environment as tools. Here the one tool says something to the task's partner, and the
task's own reward scores what was said. The exact bounds of the task show how good the result is.

The player is a small transformer that has learned to call the tool, with guesses at random. With an instruction model
in its place, whose chat template and tool calls TRL knows, ``TaskTools`` stays as it is.
"""

from __future__ import annotations

from textgen_env.models.device import prepare_process

prepare_process()  # before torch loads, which reads it then

import sys
import tempfile
from typing import Any

import torch
from tokenizers import Tokenizer, decoders, models
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, PrinterCallback

from textgen_env import make_task
from textgen_env.conversation import Conversation
from textgen_env.rewards.base import Generation, Turn
from textgen_env.tasks import Task

TASK = make_task("TextGen/GuessNumber-v0", numbers=3, turns=2)


class TaskTools:
    """A task with a partner, as an environment of TRL."""

    def __init__(self, task: Task = TASK) -> None:
        self._task = task

    def reset(self, prompt: list[dict[str, str]], **metadata: Any) -> None:
        """Begin a conversation. The columns of the row are the prompt and what the partner knows."""
        self._prompt, self._metadata = prompt[-1]["content"], metadata
        self._turns: tuple[Turn, ...] = ()
        self._turns_left = self._task.settings["max_turns"]

    def say(self, text: str) -> str:
        """Say something to the partner.

        Args:
            text: What you say.

        Returns:
            The partner's answer.
        """
        if not self._turns_left:
            raise ValueError("the conversation has ended")
        turns = (*self._turns, Turn("agent", text))
        reply = self._task.partner.reply(Conversation(self._prompt, turns, metadata=self._metadata))
        self._turns = (*turns, Turn("partner", reply.text, reply.reward))
        self._turns_left = 0 if reply.done else self._turns_left - 1
        return str(reply.text)

    def get_reward(self) -> float:
        """Return the task's reward, and what the partner has paid."""
        said, encode = "".join(turn.text for turn in self._turns), self._task.model.encode
        text = Generation(
            self._prompt, said, tuple(encode(self._prompt)), tuple(encode(said)),
            metadata=self._metadata, turns=self._turns,
        )  # fmt: skip
        return float(self._task.reward([text])[0]) + sum(turn.reward for turn in self._turns)


def rows(task: Task) -> list[dict[str, Any]]:
    """Return the task's prompts as rows of a data set, each with what its partner knows."""
    return [{"prompt": [{"role": "user", "content": prompt.text}], **prompt.metadata} for prompt in task.train_prompts]


# --- the player: a chat template, a tokenizer of few words, a small transformer

CALL, CLOSE = '<call>{"name": "say", "arguments": {"text": "', '"}}</call>'
WORDS = [
    "<pad>", "<|end|>", "<|user|>", "<|assistant|>", "<|tool|>", CALL, CLOSE,
    "0", "1", "2", " higher. ", " lower. ", " right.", "Guess: ",
]  # fmt: skip
TEMPLATE = """{% for m in messages %}{{ "<|" + m.role + "|>" + m.content }}{% for call in m.tool_calls or [] %}\
<call>{{ {"name": call.function.name, "arguments": call.function.arguments} | tojson }}</call>{% endfor %}<|end|>\
{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"""
PARSED = {  # how transformers finds the calls in what the model wrote
    "defaults": {"role": "assistant"},
    "start_anchor": "<|assistant|>",
    "fields": {
        "tool_calls": {
            "open": "<call>", "close": "</call>", "repeats": True, "content": "json",
            "transform": {"type": "function", "function": "{content}"},
        },
        "content": {"close": "<|end|>", "content": "text"},
    },
}  # fmt: skip


def make_tokenizer() -> PreTrainedTokenizerFast:
    plain = Tokenizer(models.WordLevel({"<pad>": 0}, unk_token="<pad>"))
    plain.add_tokens(WORDS[1:])
    plain.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=plain, pad_token="<pad>", eos_token="<|end|>", padding_side="left"
    )
    tokenizer.chat_template, tokenizer.response_template = TEMPLATE, PARSED
    return tokenizer


def random_games(task: Task) -> list[list[dict[str, Any]]]:
    """Return every game of two guesses, as messages."""
    games = []
    for row in rows(task):
        for guesses in (first + second for first in "012" for second in "012"):
            tools, messages = TaskTools(task), list(row["prompt"])
            tools.reset(**row)
            for guess in guesses:
                call = {"type": "function", "function": {"name": "say", "arguments": {"text": guess}}}
                messages.append({"role": "assistant", "content": "", "tool_calls": [call]})
                messages.append({"role": "tool", "name": "say", "content": tools.say(guess)})
                if messages[-1]["content"] == " right.":
                    break
            games.append([*messages, {"role": "assistant", "content": ""}])
    return games


def make_player(tokenizer: PreTrainedTokenizerFast, task: Task, updates: int = 150) -> LlamaForCausalLM:
    """Return a transformer that plays as in ``random_games``."""
    torch.manual_seed(0)
    size = {"hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 4}
    player = LlamaForCausalLM(
        LlamaConfig(vocab_size=len(WORDS), max_position_embeddings=64, pad_token_id=0, eos_token_id=1, **size)
    )
    texts = [tokenizer.apply_chat_template(game, tokenize=False) for game in random_games(task)]
    batch = tokenizer(texts, return_tensors="pt", padding=True, return_token_type_ids=False)
    labels = batch["input_ids"].masked_fill(batch["attention_mask"] == 0, -100)
    optimizer = torch.optim.Adam(player.parameters(), 3e-3)
    for _ in range(updates):
        loss = player(**batch, labels=labels).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    return player


def main(updates: int = 120) -> list[float]:
    """Train, print the course, and return the mean reward of each update's games."""
    from datasets import Dataset  # the environment above needs neither
    from trl import GRPOConfig, GRPOTrainer

    tokenizer = make_tokenizer()
    with tempfile.TemporaryDirectory() as folder:
        settings = GRPOConfig(
            folder, use_cpu=True, seed=0, report_to="none", save_strategy="no", disable_tqdm=True, logging_steps=1,
            gradient_checkpointing=False, per_device_train_batch_size=48, num_generations=16, max_steps=updates,
            max_completion_length=24, max_tool_calling_iterations=2, learning_rate=1e-3,
            lr_scheduler_type="constant", shuffle_dataset=False,  # so that a batch has each secret equally often
        )  # fmt: skip
        trainer = GRPOTrainer(
            make_player(tokenizer, TASK), args=settings, train_dataset=Dataset.from_list(rows(TASK) * 16),
            processing_class=tokenizer, environment_factory=TaskTools,
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)  # prints every figure of every update
        trainer.train()
    course = [float(line["reward"]) for line in trainer.state.log_history if "reward" in line]
    for when, won in (("first", course[:5]), ("last", course[-5:])):
        print(f"games won in the {when} updates: {sum(won) / len(won):.2f}")
    print(f"by the best play: {TASK.bounds().best:.2f}")
    return course


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
