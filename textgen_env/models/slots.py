"""Rows of text with a KV cache and a memo."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from textgen_env.errors import CapacityError, ConfigError, ModelError, PromptError, ResetNeeded
from textgen_env.models.base import LanguageModel, Proposals, Slots
from textgen_env.models.cache import KeyValues
from textgen_env.models.candidates import top_candidates
from textgen_env.models.packing import AttentionGroup, Decoder, RaggedBatch

Rows = npt.NDArray[np.int64]


T = TypeVar("T")


@dataclass(frozen=True)
class SavedRow:
    """A row taken out of its slots: ids, and the keys and values cached for them."""

    owner: LanguageModel
    ids: npt.NDArray[np.int32]
    prompt_length: int
    key_values: tuple[torch.Tensor, torch.Tensor]


class HFSlots(Slots):
    """Rows of text with a KV cache. See ``Slots`` for the contract."""

    def __init__(
        self, model: LanguageModel, decoder: Decoder, rows: int, length: int, k: int | None, memo_bytes: int
    ) -> None:
        self.model = model
        self.rows = rows
        self.length = length
        self.k = k
        self._decoder = decoder
        self._ids = np.zeros((rows, length), np.int32)
        self._held = np.zeros(rows, np.int64)  # tokens of each row
        self._cached = np.zeros(rows, np.int64)  # how many of them have keys and values
        self._prompt = np.zeros(rows, np.int64)  # how many of them are the prompt
        self._memo: _Bounded[npt.NDArray[np.float32]] = _Bounded(memo_bytes // 2)
        self._prompts: _Bounded[tuple[torch.Tensor, torch.Tensor]] = _Bounded(memo_bytes // 2)
        self.cache = KeyValues(decoder.shape, rows, length)

    # --- bookkeeping

    def start(self, rows: Rows, prompts: Sequence[Sequence[int]]) -> None:
        self._check_rows(rows)
        arrays = [np.asarray(prompt, np.int64) for prompt in prompts]
        for ids in arrays:
            if not len(ids):
                raise PromptError("a prompt needs at least one token")
            if len(ids) > self.length:
                raise CapacityError(f"a row holds at most {self.length} tokens, got a prompt of {len(ids)}")
            self._check_ids(ids)
        for row, ids in zip(rows, arrays, strict=True):
            self._ids[row, : len(ids)] = ids
            self._held[row] = self._prompt[row] = len(ids)
            self._cached[row] = 0
            known = self._prompts.get(self._key(row, len(ids)))
            if known is not None:
                self.cache.write(row, known)
                self._cached[row] = len(ids)

    def advance(self, rows: Rows, tokens: npt.NDArray[np.int64]) -> None:
        self._check_rows(rows, started=True)
        self._check_ids(tokens)
        held = self._held[rows]
        if (held >= self.length).any():
            raise CapacityError(f"row {rows[held.argmax()]} is full: it holds all of its {self.length} tokens")
        self._ids[rows, held] = tokens
        self._held[rows] = held + 1

    def fork(self, src: Rows, dst: Rows) -> None:
        self._check_rows(src, started=True)
        self._check_rows(dst)
        for array in (self._ids, self._held, self._prompt):
            array[dst] = array[src]
        self._copy(src, dst)

    def save(self, row: int) -> SavedRow:
        self._check_rows(np.array([row]), started=True)
        ids = self._ids[row, : self._held[row]].copy()
        return SavedRow(self.model, ids, int(self._prompt[row]), self.cache.read(row, self._cached[row]))

    def load(self, row: int, saved: SavedRow) -> None:
        self._check_rows(np.array([row]))
        if not isinstance(saved, SavedRow) or saved.owner is not self.model:
            of = repr(saved.owner.name) if isinstance(saved, SavedRow) else f"a {type(saved).__name__}"
            raise ModelError(f"this was not saved from slots of this very model {self.model.name!r}, but of {of}")
        if len(saved.ids) > self.length:
            raise CapacityError(f"a row holds at most {self.length} tokens, the saved one holds {len(saved.ids)}")
        self._ids[row, : len(saved.ids)] = saved.ids
        self._held[row], self._prompt[row] = len(saved.ids), saved.prompt_length
        self._cached[row] = saved.key_values[0].shape[-2]
        self.cache.write(row, saved.key_values)

    def rebuild(self) -> None:
        self._memo.clear()
        self._prompts.clear()
        self._cached[:] = 0
        self.cache.clear()  # its width decides in which order numbers are added

    # --- proposals

    def propose(self, rows: Rows, block_end: npt.NDArray[np.bool_]) -> Proposals:
        self._check_rows(rows, started=True)
        block_end = np.asarray(block_end, bool)
        keys = [
            self._key(row, self._held[row]) + (b"\1" if flag else b"\0")
            for row, flag in zip(rows, block_end, strict=True)
        ]
        known = [self._memo.get(key) for key in keys]
        hit = np.array([entry is not None for entry in known], bool)
        # A row that lacks one token rides along in the forward for almost nothing, and stays in
        # step. So it is left out only if half of the rows are; rows that lack more always are.
        if 2 * hit.sum() < len(rows):
            hit &= self._held[rows] - self._cached[rows] > 1
        k = self.k or self.model.vocab_size
        table = np.empty((len(rows), 2 * k + self.model.hidden_size), np.float32)
        for i in np.flatnonzero(hit):
            table[i] = known[i]
        new = np.flatnonzero(~hit)
        if len(new):
            table[new] = self._forward(rows[new], block_end[new])
            for i in new:
                self._memo.put(keys[i], table[i].copy(), table[i].nbytes + len(keys[i]))
        ids = table[:, :k].copy().view(np.int32)
        return Proposals(ids, table[:, k : 2 * k].copy(), table[:, 2 * k :].copy())

    @torch.inference_mode()
    def _forward(self, rows: Rows, block_end: npt.NDArray[np.bool_]) -> npt.NDArray[np.float32]:
        """Catch up with ``rows`` and return a row (ids as bits, logprobs, hidden) for each."""
        # A prefix whose last token is cached, but whose proposals are not, feeds that token again.
        self._cached[rows] = np.minimum(self._cached[rows], self._held[rows] - 1)
        leaders, leader_of = self._same_starts(rows)
        fresh = leaders[self._cached[leaders] == 0]
        logits, hidden = self._decoder(self._batch(leaders), self.cache)
        self._cached[leaders] = self._held[leaders]
        for row in fresh:
            self._remember_prompt(row)
        if len(leaders) < len(rows):
            followers = rows != leaders[leader_of]
            self._copy(leaders[leader_of[followers]], rows[followers])
            logits, hidden = logits[leader_of], hidden[leader_of]
        ids, logprobs = top_candidates(logits, self.k, self.model.end_ids, block_end)
        return np.concatenate([ids.view(np.float32), logprobs, hidden.float().cpu().numpy()], axis=1)

    def _same_starts(self, rows: Rows) -> tuple[Rows, npt.NDArray[np.int64]]:
        """Return one row for each text among the rows that start from nothing, and all other rows;
        and the place of each row's representative in that list."""
        if self._cached[rows].all():
            return rows, np.arange(len(rows))
        places: dict[Any, int] = {}
        leaders: list[int] = []
        leader_of = np.empty(len(rows), np.int64)
        for i, row in enumerate(rows):
            key = row if self._cached[row] else self._key(row, self._held[row])
            if key not in places:
                places[key] = len(leaders)
                leaders.append(row)
            leader_of[i] = places[key]
        return np.array(leaders), leader_of

    def _copy(self, src: Rows, dst: Rows) -> None:
        """Copy what is cached of rows to other rows."""
        self.cache.write(dst, self.cache.read(src, self._cached[src].max()))
        self._cached[dst] = self._cached[src]

    def _remember_prompt(self, row: int) -> None:
        length = int(self._prompt[row])
        key = self._key(row, length)
        size = len(key) + length * self._decoder.shape.token_bytes
        if size <= self._prompts.limit and self._prompts.get(key) is None:
            self._prompts.put(key, self.cache.read(row, length), size)

    # --- one ragged forward

    def _batch(self, rows: Rows) -> RaggedBatch:
        """Pack what the cache lacks of ``rows``."""
        first, end = self._cached[rows], self._held[rows]
        counts = end - first
        self.cache.grow(int(end.max()))
        stops = np.cumsum(counts)
        owners = np.repeat(rows, counts)
        positions = np.arange(stops[-1]) - np.repeat(stops - end, counts)
        single = counts == 1

        def group_of(some: npt.NDArray[np.bool_]) -> AttentionGroup:
            places = (stops - counts)[some][:, None] + np.arange(counts[some].max())
            places = np.minimum(places, stops[some][:, None] - 1)
            return self._group(places, rows[some], positions[places])

        if len(owners) == 1 and self._decoder.alone:
            groups = []
        elif self._decoder.splits and not single.all():
            groups = [group_of(some) for some in (single, ~single) if some.any()]
        elif single.all() or len(rows) * counts.max() > 2 * len(owners):
            # Each token attends for itself: padding would cost more.
            groups = [self._group(None, owners, positions)]
        else:
            groups = [group_of(single | True)]
        return RaggedBatch(
            ids=self._tensor(self._ids[owners, positions].astype(np.int64)),
            rows=self._tensor(owners),
            positions=self._tensor(positions),
            last=None if single.all() else self._tensor(stops - 1),
            groups=groups,
        )

    def _group(
        self, places: npt.NDArray[np.int64] | None, rows: Rows, positions: npt.NDArray[np.int64]
    ) -> AttentionGroup:
        positions = positions.reshape(len(rows), -1)
        every = np.array_equal(rows, np.arange(self.rows))
        kept = None
        if not every and self._decoder.splits and positions.shape[1] == 1 and 2 * len(rows) > self.rows:
            # Most rows attend. To let the others attend too, to no effect, costs less than to copy
            # the cache of those that take part.
            every, kept = True, rows
            given = np.arange(len(rows))[:, None] if places is None else places
            spread = np.zeros((2, self.rows, 1), np.int64)
            spread[:, kept] = given, positions
            places, positions = spread
        dtype = self._decoder.shape.dtype
        later = np.arange(self.cache.reach) > positions[..., None]
        lowest = max(torch.finfo(dtype).min, torch.finfo(torch.float32).min)
        mask = torch.from_numpy(np.where(later, np.float32(lowest), np.float32(0)))
        return AttentionGroup(
            tokens=None if places is None else self._tensor(places),
            rows=None if every else self._tensor(rows),
            mask=mask.to(self._decoder.shape.device, dtype),
            kept=None if kept is None else self._tensor(kept),
        )

    def _tensor(self, array: npt.NDArray[Any]) -> torch.Tensor:
        return torch.from_numpy(np.ascontiguousarray(array)).to(self._decoder.shape.device)

    def _key(self, row: int, length: int) -> bytes:
        return self._ids[row, :length].tobytes()

    # --- checks

    def _check_rows(self, rows: Rows, started: bool = False) -> None:
        if len(rows) and (rows.min() < 0 or rows.max() >= self.rows):
            raise ConfigError(f"rows must be in 0..{self.rows - 1}, got {rows.tolist()}")
        if started and not self._held[rows].all():
            raise ResetNeeded(f"rows {rows[self._held[rows] == 0].tolist()} hold no text: start them first")

    def _check_ids(self, ids: npt.NDArray[np.int64]) -> None:
        if len(ids) and (ids.min() < 0 or ids.max() >= self.model.vocab_size):
            raise ModelError(f"token ids must be in 0..{self.model.vocab_size - 1}, got {ids.tolist()}")


class _Bounded(Generic[T]):
    """A mapping from token ids (as bytes) that forgets what was used least recently."""

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.size = 0
        self._entries: OrderedDict[bytes, tuple[T, int]] = OrderedDict()

    def get(self, key: bytes) -> T | None:
        entry = self._entries.get(key)
        if entry is None:
            return None
        self._entries.move_to_end(key)
        return entry[0]

    def put(self, key: bytes, value: T, size: int) -> None:
        if size > self.limit:
            return
        if key in self._entries:
            self.size -= self._entries.pop(key)[1]
        self._entries[key] = (value, size)
        self.size += size
        while self.size > self.limit:
            self.size -= self._entries.popitem(last=False)[1][1]

    def clear(self) -> None:
        self._entries.clear()
        self.size = 0
