"""Next-token choices from text files: the data of the classic loop.

A text is cut into windows. At every position of a window the environment's language model proposes
``action_dim`` candidates for the next token, best first; choosing the true one earns 1. One forward
a window pays for all its positions, and both the model and the agent see the window from its start.
Files are streamed in blocks, so a folder may be larger than memory.

    folder  ->  blocks of text  ->  windows of ids (T,)  ->  candidates (T, k), rewards (T, k)  ->  LabelledBatch
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader, IterableDataset
from transformers import PreTrainedModel

from agents.classic.loop import LabelledBatch, padded
from agents.pruning.calibration import context_of
from textgen_env.errors import ConfigError, PromptError
from textgen_env.models.candidates import top_candidates

BLOCK = 1 << 16  # characters read at a time


@dataclass(frozen=True)
class Choices:
    """Decisions about the next token: at every position of ``ids``, or at its end."""

    ids: torch.Tensor  # (T,) the text so far
    candidates: torch.Tensor  # (T, k) or (k,) token ids, best first
    rewards: torch.Tensor  # the same shape: 1 where the candidate is the true next token, else 0
    next_ids: torch.Tensor | None = None  # (T + 1,) of a prefix, except at the end of its window


class TextDataset(IterableDataset[Choices]):
    """Streams ``Choices`` from every ``*.txt`` file below a folder, in order of their paths.

    ``rows`` counts the decisions of the current pass, ``missed`` those whose true token is not among
    the candidates: they stay in, and no action earns anything. Read it in one process (the model is
    inside): ``num_workers=0``.

    Args:
        folder: With UTF-8 text files, of any size.
        model: The environment's causal language model.
        tokenizer: Its tokenizer.
        action_dim: Candidates a position, k.
        window: Tokens a window, T at most.
        prefixes: Yield every prefix on its own, for transformers that are not causal; its last
            position decides. Off: whole windows, every position decides.

    Raises:
        PromptError: no such folder, no ``*.txt`` file in it, or a file that is not UTF-8.
        ConfigError: ``action_dim`` outside 1..vocabulary, or a window outside 1..the context.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        model: PreTrainedModel,
        tokenizer: Any,
        action_dim: int = 10,
        window: int = 64,
        prefixes: bool = False,
    ) -> None:
        self.files = sorted(path for path in Path(folder).rglob("*.txt") if path.is_file())
        if not self.files:
            raise PromptError(f"no *.txt file below {os.fspath(folder)!r}; give a folder with text files")
        for name, value, limit in (
            ("action_dim", action_dim, model.config.vocab_size),
            ("window", window, context_of(model)),
        ):
            if not 1 <= value <= limit:
                raise ConfigError(f"{name} must be in 1..{limit} for this model, got {value}")
        self.model = model.eval()
        self.tokenizer = tokenizer
        self.action_dim = action_dim
        self.window = window
        self.prefixes = prefixes
        self.rows = self.missed = 0

    def __iter__(self) -> Iterator[Choices]:
        self.rows = self.missed = 0
        for file in self.files:
            for ids in self._windows(file):
                yield from self._choices(ids)

    def _windows(self, file: Path) -> Iterator[torch.Tensor]:
        """Yield ids of ``window`` + 1 tokens each (the last one is only a target); the rest may be shorter."""
        held: list[int] = []
        for text in _pieces(file):
            held += self.tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
            while len(held) > self.window:
                yield torch.tensor(held[: self.window + 1])
                held = held[self.window :]
        if len(held) > 1:
            yield torch.tensor(held)

    def _choices(self, ids: torch.Tensor) -> Iterator[Choices]:
        seen, following = ids[:-1], ids[1:]  # (T,), (T,)
        with torch.no_grad():
            logits = self.model(input_ids=seen[None].to(self.model.device)).logits[0]  # (T, V)
        candidates = torch.from_numpy(top_candidates(logits, self.action_dim)[0])  # (T, k)
        rewards = (candidates == following[:, None]).float()  # (T, k)
        self.rows += len(seen)
        self.missed += int((rewards.sum(dim=1) == 0).sum())
        if not self.prefixes:
            yield Choices(seen, candidates, rewards)
            return
        for t in range(len(seen)):
            next_ids = seen[: t + 2] if t + 1 < len(seen) else None
            yield Choices(seen[: t + 1], candidates[t], rewards[t], next_ids)


def text_loader(
    folder: str | os.PathLike[str],
    model: PreTrainedModel,
    tokenizer: Any,
    action_dim: int = 10,
    window: int = 64,
    prefixes: bool = False,
    batch_size: int = 8,
) -> DataLoader[Any]:
    """Return a data loader for ``train_model``; arguments and errors are those of ``TextDataset``."""
    dataset = TextDataset(folder, model, tokenizer, action_dim, window, prefixes)
    return DataLoader(dataset, batch_size=batch_size, collate_fn=collate)


def collate(choices: Sequence[Choices]) -> LabelledBatch:
    """Join choices of one kind, padded on the right with id 0 and reward 0."""
    input_ids, mask = padded([c.ids for c in choices])
    if choices[0].rewards.ndim == 2:
        rewards = torch.nn.utils.rnn.pad_sequence([c.rewards for c in choices], batch_first=True)  # (B, T, k)
        return LabelledBatch(input_ids, mask, None, rewards)
    next_ids, next_mask = padded([c.ids if c.next_ids is None else c.next_ids for c in choices])
    dones = torch.tensor([c.next_ids is None for c in choices])
    return LabelledBatch(input_ids, mask, None, torch.stack([c.rewards for c in choices]), next_ids, next_mask, dones)


def _pieces(file: Path) -> Iterator[str]:
    """Yield the text of a file in blocks that end before white space, where there is any: no word is cut."""
    held = ""
    try:
        with file.open(encoding="utf-8") as stream:
            while block := stream.read(BLOCK):
                held += block
                cut = max(held.rfind(" "), held.rfind("\n"))
                if cut < 1:
                    cut = len(held)
                yield held[:cut]
                held = held[cut:]
    except UnicodeDecodeError as error:
        raise PromptError(f"{file} is not UTF-8 text ({error}); convert it or take it out of the folder") from error
    if held:
        yield held
