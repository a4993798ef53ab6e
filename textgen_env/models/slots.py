"""Rows of text with a KV cache and a memo: one forward computes the rest.

rows  ->  memo hits: proposals as they were
      ->  the rest: one row for each equal start  ->  pack  ->  decoder  ->  top candidates (B, k)
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
import torch

from textgen_env.models.base import LanguageModel, Proposals, Rows, Slots
from textgen_env.models.candidates import top_candidates
from textgen_env.models.packing import Decoder, RowCache

T = TypeVar("T")
Arrays = tuple[npt.NDArray[np.int32], npt.NDArray[np.float32], npt.NDArray[np.float32]]


class HFSlots(Slots):
    """Rows of text with a cache. See ``Slots`` for the contract.

    Args:
        decoder: The forward.
        memo_bytes: Bound of the memory: half for proposals of prefixes seen before, half for
            the caches of prompts.
    """

    def __init__(
        self, model: LanguageModel, decoder: Decoder, rows: int, length: int, k: int | None, memo_bytes: int
    ) -> None:
        super().__init__(model, rows, length, k)
        self.decoder = decoder
        self.current: Callable[[], Decoder] | None = None  # returns the decoder of the weights as they are now
        self.suppressed: tuple[int, ...] = ()  # tokens that are never proposed
        self.suppressed_first: tuple[int, ...] = ()  # nor directly behind a prompt
        self.cache: RowCache = decoder.new_cache(rows, length)
        self.cached = np.zeros(rows, np.int64)  # how many tokens of each row are cached
        self._memo = Memo(memo_bytes // 2)
        self._prompts: LRUCache[Any] = LRUCache(memo_bytes // 2)

    # --- the cache

    def rebuild(self) -> None:
        self._memo.clear()
        self._prompts.clear()
        self.cached[:] = 0
        self.cache.clear()  # its width decides in which order numbers are added

    def _after_start(self, rows: Rows) -> None:
        for row in rows:
            known = self._prompts.get(self._key(row, self.lengths[row]))
            self.cached[row] = 0
            if known is not None:
                self._remembered(row, known)

    def _copy_cache(self, src: Rows, dst: Rows) -> None:
        self.cache.copy(src, dst, self.cached[src])
        self.cached[dst] = self.cached[src]

    def _read_cache(self, row: int) -> Any:
        return self.decoder, self.cache.read(row, int(self.cached[row]))

    def _write_cache(self, row: int, saved: Any) -> None:
        decoder, kept = saved
        if decoder is self.decoder:
            self._remembered(row, kept)
        else:
            self.cached[row] = 0  # saved with other weights, or where texts are longer or shorter: only the ids fit

    def _remembered(self, row: int, kept: Any) -> None:
        """Write a row that the cache has read."""
        self.cached[row] = self.cache.write(row, kept)

    def _heed_new_weights(self) -> None:
        """Forget everything that was computed with weights that have changed since."""
        decoder = self.decoder if self.current is None else self.current()
        if decoder is not self.decoder:
            self.decoder = decoder
            self.cache = decoder.new_cache(self.rows, self.length)
            self.rebuild()

    def _batch(self, rows: Rows, first: npt.NDArray[np.int64], end: npt.NDArray[np.int64]) -> Any:
        """Return the tokens of each row from ``first`` on, as the decoder takes them."""
        return self.decoder.batch(self.tokens, rows, first, end, self.cache)

    # --- proposals

    def propose(self, rows: Rows, block_end: npt.NDArray[np.bool_]) -> Proposals:
        self._check_rows(rows, started=True)
        self._heed_new_weights()
        block_end = np.asarray(block_end, bool)
        keys = self._keys(rows, block_end)
        known = [self._memo.get(key) for key in keys]
        hit = np.array([entry is not None for entry in known], bool)
        # A row that lacks one token rides along in the forward for almost nothing, and stays in
        # step. So it is left out only if half of the rows are; rows that lack more always are.
        if 2 * hit.sum() < len(rows):
            hit &= self.lengths[rows] - self.cached[rows] > 1
        new, old = np.flatnonzero(~hit), np.flatnonzero(hit)
        if not len(old):
            computed = self._forward(rows, block_end)
            self._memo.put(keys, computed)
            return Proposals(*computed)
        remembered = [np.array(column) for column in zip(*(known[i] or () for i in old.tolist()), strict=True)]
        if not len(new):
            return Proposals(*remembered)
        computed = self._forward(rows[new], block_end[new])
        self._memo.put([keys[i] for i in new.tolist()], computed)
        found: list[Any] = [np.empty((len(rows), part.shape[1]), part.dtype) for part in computed]
        for whole, fresh, kept in zip(found, computed, remembered, strict=True):
            whole[new], whole[old] = fresh, kept
        return Proposals(*found)

    @torch.inference_mode()
    def _forward(self, rows: Rows, block_end: npt.NDArray[np.bool_]) -> Arrays:
        """Catch up with ``rows``; return ids (B, k), logprobs (B, k) and hidden (B, d)."""
        with self.decoder.lock:
            return self._forward_alone(rows, block_end)

    def _forward_alone(self, rows: Rows, block_end: npt.NDArray[np.bool_]) -> Arrays:
        if self.cache.recomputes_last:
            # A prefix whose last token is cached, but whose proposals are not, feeds that token again.
            self.cached[rows] = np.minimum(self.cached[rows], self.lengths[rows] - 1)
        leaders, leader_of = self._equal_starts(rows)
        fresh = leaders[self.cached[leaders] == 0]
        first, end = self.cached[leaders], self.lengths[leaders]
        self.cache.grow(int(end.max()))
        logits, hidden = self.decoder(self._batch(leaders, first, end), self.cache)
        self.cached[leaders] = end
        for row in fresh:
            self._remember_prompt(row)
        if len(leaders) < len(rows):
            followers = rows != leaders[leader_of]
            self._copy_cache(leaders[leader_of[followers]], rows[followers])
            logits, hidden = logits[leader_of], hidden[leader_of]
        logits = self._without_suppressed(logits, rows)
        ids, logprobs = top_candidates(logits, self.k, self.model.end_ids, block_end)
        return ids, logprobs, hidden.float().cpu().numpy()

    def _without_suppressed(self, logits: torch.Tensor, rows: Rows) -> torch.Tensor:
        """Return logits (B, V) without the tokens that are never proposed, or not as a text's first ones.

        So does ``generate``, by the generation config.
        """
        if not self.suppressed and not self.suppressed_first:
            return logits
        logits = logits.clone()  # a cache may keep them
        logits[:, list(self.suppressed)] = -torch.inf
        begins = torch.from_numpy(self.lengths[rows] == self.prompt_lengths[rows]).to(logits.device)
        logits[torch.nonzero(begins), list(self.suppressed_first)] = -torch.inf
        return logits

    def _equal_starts(self, rows: Rows) -> tuple[Rows, npt.NDArray[np.int64]]:
        """Return one leader for each text among the rows without cache, and all other rows: (L,).

        The second array (B,) gives the place of each row's leader among them.
        """
        if self.cached[rows].all():
            return rows, np.arange(len(rows))
        places: dict[Any, int] = {}
        leaders: list[int] = []
        leader_of = np.empty(len(rows), np.int64)
        for i, row in enumerate(rows):
            key = row if self.cached[row] else self._key(row, self.lengths[row])
            if key not in places:
                places[key] = len(leaders)
                leaders.append(row)
            leader_of[i] = places[key]
        return np.array(leaders), leader_of

    def _remember_prompt(self, row: int) -> None:
        length = int(self.prompt_lengths[row])
        key = self._key(row, length)
        size = len(key) + self.decoder.cache_bytes(1, length)
        if size <= self._prompts.limit and self._prompts.get(key) is None:
            kept = self.cache.read(row, length)
            if kept is not None:
                self._prompts.put(key, kept, size)

    def _key(self, row: int, length: int) -> bytes:
        return self.tokens[row, :length].tobytes()

    def _keys(self, rows: Rows, block_end: npt.NDArray[np.bool_]) -> list[bytes]:
        """Return the memo's keys of rows: their ids, and which tokens are not proposed."""
        blocked = block_end.astype(np.int64)
        if self.suppressed_first:
            blocked += 2 * (self.lengths[rows] == self.prompt_lengths[rows])
        every = self.tokens[rows].tobytes()  # one call for all rows
        starts = np.arange(len(rows)) * (self.length * self.tokens.itemsize)
        ends = starts + self.lengths[rows] * self.tokens.itemsize
        flags = (b"\0", b"\1", b"\2", b"\3")
        return [
            every[start:end] + flags[flag]
            for start, end, flag in zip(starts.tolist(), ends.tolist(), blocked.tolist(), strict=True)
        ]


class Memo:
    """Proposals by prefix within ``limit`` bytes. A forward's rows come and go together: that takes no call a row."""

    PARTS = 8  # of the limit, that the rows of one forward may take together

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.size = 0
        self._places: dict[bytes, tuple[int, int]] = {}  # number of the forward, row in it
        self._forwards: OrderedDict[int, tuple[Arrays, list[bytes], int]] = OrderedDict()
        self._next = 0

    def get(self, key: bytes) -> tuple[npt.NDArray[Any], ...] | None:
        """Return the arrays of one row, which must not be changed, or None."""
        place = self._places.get(key)
        if place is None:
            return None
        self._forwards.move_to_end(place[0])
        return tuple(array[place[1]] for array in self._forwards[place[0]][0])

    def put(self, keys: list[bytes], arrays: Arrays) -> None:
        """Keep a copy of (B, ...) arrays under B keys, in groups that fit."""
        row_bytes = sum(array[0].nbytes for array in arrays) + max(len(key) for key in keys)
        if row_bytes > self.limit:
            return
        rows = max(1, self.limit // self.PARTS // row_bytes)
        for start in range(0, len(keys), rows):
            part = slice(start, start + rows)
            self._keep(keys[part], tuple(array[part].copy() for array in arrays), row_bytes)  # type: ignore[arg-type]

    def _keep(self, keys: list[bytes], arrays: Arrays, row_bytes: int) -> None:
        number, size = self._next, row_bytes * len(keys)
        self._next += 1
        self._forwards[number] = arrays, keys, size
        self._places.update((key, (number, row)) for row, key in enumerate(keys))
        self.size += size
        while self.size > self.limit:
            oldest, (_, gone, freed) = self._forwards.popitem(last=False)
            self.size -= freed
            for key in gone:
                if self._places.get(key, (-1, 0))[0] == oldest:
                    del self._places[key]

    def clear(self) -> None:
        self._places.clear()
        self._forwards.clear()
        self.size = 0


class LRUCache(Generic[T]):
    """A mapping from token ids (as bytes) within ``limit`` bytes; the least recently used entry goes first."""

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
        """Keep ``value``, which takes ``size`` bytes; nothing happens if that is above the limit."""
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
