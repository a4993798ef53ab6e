"""The interface of a language model: slots that propose next tokens.

A ``LanguageModel`` is weights and a tokenizer, shared by all environments of a process.
``slots`` opens a batch of rows on it: each row holds one text and the model's cache for it.
``start``, ``advance`` and ``fork`` change the token ids of a row, and run nothing; ``propose``
catches up with all changes in one ragged forward, so rows that go on and rows that restart share it.

    start / advance / fork  ->  tokens (R, T), lengths (R,)  ->  propose  ->  Proposals (B, k)
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from textgen_env.errors import CapacityError, ConfigError, ModelError, PromptError, ResetNeeded

Rows = npt.NDArray[np.int64]

MASKED_LOGPROB = -1e4
"""Stands for minus infinity: finite, so that bounds hold and 0 times it is 0."""


@dataclass(frozen=True)
class Proposals:
    """Next tokens of B rows, best first.

    Attributes:
        candidates: (B, k) int32 token ids, sorted by log-probability, ties by smaller id.
            With ``k=None`` at ``slots``, k is the vocabulary size and column i is token id i.
        logprobs: (B, k) float32, nats, normalised over the whole vocabulary (without the end tokens
            where they were blocked); a blocked token has ``MASKED_LOGPROB``.
        hidden: (B, d) float32, the last hidden state that the model reads its logits from.
    """

    candidates: npt.NDArray[np.int32]
    logprobs: npt.NDArray[np.float32]
    hidden: npt.NDArray[np.float32]


@dataclass(frozen=True)
class SavedRow:
    """A copy of one row: its token ids and their cache."""

    owner: LanguageModel
    ids: npt.NDArray[np.int32]
    prompt_length: int
    cache: Any


def special_ids(tokenizer: Any) -> set[int]:
    """Return the ids that ``decode`` leaves out: those of special tokens, also of ones that have no name."""
    unnamed = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    return unnamed.union(tokenizer.all_special_ids)


class Slots(ABC):
    """R rows of text on a language model. Rows are independent of their neighbours.

    This class keeps the token ids and checks its arguments; a subclass adds ``propose`` and, through
    the methods at the end, its cache. ``rows`` is always a (B,) integer array of distinct row numbers.

    Args:
        model: The model that proposes.
        rows: R.
        length: T, the tokens that a row can hold.
        k: Candidates to propose; None for the whole vocabulary in id order.

    Attributes:
        tokens: (R, T) int32, prompt and generated ids, right-padded with 0; read-only.
        lengths: (R,) int64, tokens of each row, 0 before its first start; read-only.
        prompt_lengths: (R,) int64, how many of them are the prompt; read-only.
    """

    def __init__(self, model: LanguageModel, rows: int, length: int, k: int | None) -> None:
        self.model, self.rows, self.length, self.k = model, rows, length, k
        self._tokens = np.zeros((rows, length), np.int32)
        self._lengths = np.zeros(rows, np.int64)
        self._prompt_lengths = np.zeros(rows, np.int64)
        self.tokens, self.lengths = read_only(self._tokens), read_only(self._lengths)
        self.prompt_lengths = read_only(self._prompt_lengths)

    @abstractmethod
    def propose(self, rows: Rows, block_end: npt.NDArray[np.bool_]) -> Proposals:
        """Return the next tokens of each row. At most one forward.

        Args:
            rows: (B,) which rows.
            block_end: (B,) True where end tokens must not be proposed.
        """

    def start(self, rows: Rows, prompts: Sequence[Sequence[int]]) -> None:
        """Let each row hold its prompt and nothing else. No forward.

        Raises:
            PromptError, CapacityError, ModelError: a prompt that is empty, longer than a row, or not of
                this vocabulary. No row has changed.
        """
        self._check_rows(rows)
        arrays = [np.asarray(prompt, np.int64) for prompt in prompts]
        for ids in arrays:
            if not len(ids):
                raise PromptError("a prompt needs at least one token")
            if len(ids) > self.length:
                raise CapacityError(f"a row holds at most {self.length} tokens, got a prompt of {len(ids)}")
            self._check_ids(ids)
        for row, ids in zip(rows, arrays, strict=True):
            self._hold(row, ids, len(ids))
        self._after_start(rows)

    def advance(self, rows: Rows, tokens: npt.NDArray[np.int64]) -> None:
        """Append one token id to each row. No forward.

        Raises:
            ResetNeeded, CapacityError, ModelError: a row that holds no text or is full, or an id that is
                not of this vocabulary. No row has changed.
        """
        self._check_rows(rows, started=True)
        self._check_ids(tokens)
        lengths = self._lengths[rows]
        if (lengths >= self.length).any():
            raise CapacityError(f"row {rows[lengths.argmax()]} is full: it holds all of its {self.length} tokens")
        self._tokens[rows, lengths] = tokens
        self._lengths[rows] = lengths + 1

    def fork(self, src: Rows, dst: Rows) -> None:
        """Copy row ``src[i]`` to row ``dst[i]``, cache included: O(row), no forward."""
        if not len(src):
            return
        self._check_rows(src, started=True)
        self._check_rows(dst)
        for array in (self._tokens, self._lengths, self._prompt_lengths):
            array[dst] = array[src]
        self._copy_cache(src, dst)

    def save(self, row: int) -> SavedRow:
        """Return a copy of one row (ids and cache) that later changes do not touch."""
        self._check_rows(np.array([row]), started=True)
        ids = self._tokens[row, : self._lengths[row]].copy()
        return SavedRow(self.model, ids, int(self._prompt_lengths[row]), self._read_cache(row))

    def load(self, row: int, saved: SavedRow) -> None:
        """Put a saved row into any row of slots of the same model.

        Raises:
            ModelError, CapacityError: it was saved from another model, or is longer than a row.
        """
        self._check_rows(np.array([row]))
        if not isinstance(saved, SavedRow) or saved.owner is not self.model:
            of = repr(saved.owner.name) if isinstance(saved, SavedRow) else f"a {type(saved).__name__}"
            raise ModelError(f"this was not saved from slots of this very model {self.model.name!r}, but of {of}")
        if len(saved.ids) > self.length:
            raise CapacityError(f"a row holds at most {self.length} tokens, the saved one holds {len(saved.ids)}")
        self._hold(row, saved.ids, saved.prompt_length)
        self._write_cache(row, saved.cache)

    def refill(
        self, tokens: npt.NDArray[np.int32], lengths: npt.NDArray[np.int64], prompt_lengths: npt.NDArray[np.int64]
    ) -> None:
        """Let all rows hold these ids, shaped as the attributes of the same names, and ``rebuild``.

        Raises:
            ModelError, ConfigError: an id that is not of this vocabulary, or lengths that are impossible.
        """
        self._check_ids(tokens.ravel())
        if not ((prompt_lengths >= 0) & (prompt_lengths <= lengths) & (lengths <= self.length)).all():
            raise ConfigError(
                f"rows need 0 <= prompt_lengths <= lengths <= {self.length}, "
                f"got {prompt_lengths.tolist()} and {lengths.tolist()}"
            )
        self._tokens[:], self._lengths[:], self._prompt_lengths[:] = tokens, lengths, prompt_lengths
        self.rebuild()

    def set_prompts(self, rows: Rows, prompts: Sequence[Sequence[int]]) -> None:
        """Tell which prompts rows that were refilled had: for models that read a prompt apart from the text."""
        return

    def prompt_of(self, row: int) -> tuple[int, ...]:
        """Return the ids of the prompt of a row."""
        return tuple(self._tokens[row, : self._prompt_lengths[row]].tolist())

    def prompts_of(self, rows: Rows, width: int) -> npt.NDArray[np.int32]:
        """Return the ids of the prompts of rows, (B, width), padded with -1."""
        found = np.full((len(rows), width), -1, np.int32)
        for place, row in enumerate(rows.tolist()):
            ids = self.prompt_of(row)
            found[place, : len(ids)] = ids
        return found

    def ids_of(self, row: int) -> list[int]:
        """Return the ids that a row holds."""
        return self._tokens[row, : self._lengths[row]].tolist()

    def _hold(self, row: int, ids: npt.NDArray[Any], prompt_length: int) -> None:
        self._tokens[row] = 0
        self._tokens[row, : len(ids)] = ids
        self._lengths[row], self._prompt_lengths[row] = len(ids), prompt_length

    def _check_rows(self, rows: Rows, started: bool = False) -> None:
        if len(rows) and (rows.min() < 0 or rows.max() >= self.rows):
            raise ConfigError(f"rows must be in 0..{self.rows - 1}, got {rows.tolist()}")
        if started and not self._lengths[rows].all():
            raise ResetNeeded(f"rows {rows[self._lengths[rows] == 0].tolist()} hold no text: start them first")

    def _check_ids(self, ids: npt.NDArray[Any]) -> None:
        if len(ids) and (ids.min() < 0 or ids.max() >= self.model.vocab_size):
            raise ModelError(f"token ids must be in 0..{self.model.vocab_size - 1}, got {ids.tolist()}")

    # --- the cache of a subclass, none here

    def rebuild(self) -> None:
        """Forget every memo and cached state but the token ids, as a resumed process must."""
        return

    def _after_start(self, rows: Rows) -> None:
        """Drop the cache of rows that hold another text now."""
        return

    def _copy_cache(self, src: Rows, dst: Rows) -> None:
        """Copy the cache of rows to other rows."""
        return

    def _read_cache(self, row: int) -> Any:
        """Return a copy of the cache of a row."""
        return None

    def _write_cache(self, row: int, saved: Any) -> None:
        """Restore the cache of a row from ``_read_cache``."""
        return


def read_only(array: npt.NDArray[Any]) -> npt.NDArray[Any]:
    """Return a view of ``array`` that cannot be written to."""
    view = array.view()
    view.flags.writeable = False
    return view


class LanguageModel(ABC):
    """Weights and a tokenizer. Slots opened on it share them."""

    name: str
    vocab_size: int
    hidden_size: int
    embedding_size: int
    max_context: int  # tokens, prompt included
    end_ids: tuple[int, ...]  # tokens that end a text
    begin: tuple[int, ...] = ()  # tokens that begin each text of a model that reads its prompt apart from the text

    @abstractmethod
    def encode(self, text: str) -> list[int]:
        """Return the token ids of ``text``, special tokens at its beginning included."""

    @abstractmethod
    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of ``ids`` without special tokens."""

    @abstractmethod
    def embed(self, ids: npt.NDArray[np.integer]) -> npt.NDArray[np.float32]:
        """Return the input embedding of each token: ids of any shape to (..., embedding_size)."""

    @abstractmethod
    def slots(self, rows: int, length: int, k: int | None) -> Slots:
        """Open ``rows`` rows of up to ``length`` tokens that propose ``k`` candidates each.

        ``k=None`` proposes the whole vocabulary in id order.

        Raises:
            ConfigError: ``k`` is not in 1..vocab_size minus the end tokens, or ``length`` exceeds the context.
            CapacityError: the cache would not fit into memory (says how many bytes it needs).
        """

    @abstractmethod
    def continuations(self, prompt_ids: Sequence[int], ids: Sequence[int], candidates: Sequence[int]) -> list[str]:
        """Return, for each candidate token, the completion ``decode(ids + [candidate])``; cheap.

        ``prompt_ids`` is the context that ``ids`` continue (some tokenizers strip a leading space
        at the start of a text).
        """

    def extended(self, completion: str, token: int) -> str | None:
        """Return the completion once ``token`` is appended, or None where that takes the ids before it."""
        return None
