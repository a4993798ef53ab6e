"""The tokens of one ragged forward, and who attends together.

Rows lack different numbers of tokens: most lack one, a row that starts lacks its prompt. Padding
wastes work, and many small products cost more than one large one; ``pack`` chooses.

    tokens (R, T), cached and held lengths of B rows  ->  pack  ->  N tokens, in groups of b rows by q tokens
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from textgen_env.models.base import Rows
from textgen_env.models.cache import CacheShape, KeyValues

Places = npt.NDArray[np.int64]


@dataclass(frozen=True)
class AttentionGroup:
    """Rows of a batch that attend together: b rows of q tokens each.

    Shorter rows repeat their last token, which computes, and writes, the same thing again.
    """

    tokens: Tensor | None  # (b, q) places in the batch; None: all N of them, one a row
    rows: Tensor | None  # (b,) rows of the cache; None: all of them in order
    mask: Tensor  # (b, q, reach) added to the scores: 0, or the lowest number for later positions
    kept: Tensor | None = None  # the b rows that are meant; None: all of them


@dataclass(frozen=True)
class RaggedBatch:
    """The tokens of one forward."""

    ids: Tensor  # (N,)
    rows: Tensor  # (N,) row of each token
    positions: Tensor  # (N,)
    last: Tensor | None  # (B,) place of each row's last token; None: every token is the last of its row
    groups: Sequence[AttentionGroup]  # none for a single token that a decoder takes ``alone``


class RowCache(Protocol):
    """What R rows keep of their tokens."""

    recomputes_last: bool  # True: the last cached token may be fed again; False: its answer is kept

    def grow(self, length: int) -> None:
        """Make room for rows of ``length`` tokens."""

    def clear(self) -> None:
        """Forget all rows."""

    def read(self, row: int, length: int) -> Any:
        """Return a copy of the first ``length`` tokens of a row, or None if the row is not kept so."""

    def write(self, row: int, saved: Any) -> int:
        """Write what ``read`` returned, and return the number of its tokens."""

    def copy(self, src: Rows, dst: Rows, lengths: Places) -> None:
        """Copy the first ``lengths[i]`` tokens of row ``src[i]`` to row ``dst[i]``."""

    @property
    def nbytes(self) -> int:
        """Return the bytes in use."""


class Decoder(Protocol):
    """A forward over cached rows."""

    name: str  # of the way in which the model runs
    lock: threading.RLock  # one forward of the model at a time, in all threads
    device: torch.device
    dtype: torch.dtype
    alone: bool  # True: a single token of a single row has a forward of its own

    def new_cache(self, rows: int, length: int) -> Any:
        """Return a ``RowCache`` for rows of up to ``length`` tokens."""

    def cache_bytes(self, rows: int, length: int) -> int:
        """Return the bytes that such a cache takes at most."""

    def batch(self, tokens: npt.NDArray[np.int32], rows: Rows, first: Places, end: Places, cache: Any) -> Any:
        """Return the tokens ``first[i]`` to ``end[i]`` of each row, as ``__call__`` takes them."""

    def __call__(self, batch: Any, cache: Any) -> tuple[Tensor, Tensor]:
        """Return logits (B, V) and hidden (B, d)."""


class PackedDecoder:
    """A decoder whose rows share a forward without padding, on keys and values of one shape in all layers.

    Attributes:
        shape: Keys and values of a token.
        splits: True: rows with one token and rows with several form groups of their own.
        alone: True: a single token of a single row needs no group.
    """

    shape: CacheShape
    splits = False
    alone = False

    @property
    def device(self) -> torch.device:
        return self.shape.device

    @property
    def dtype(self) -> torch.dtype:
        return self.shape.dtype

    def new_cache(self, rows: int, length: int) -> KeyValues:
        return KeyValues(self.shape, rows, length)

    def cache_bytes(self, rows: int, length: int) -> int:
        """Return the bytes of keys and values of ``rows`` rows of ``length`` tokens."""
        return rows * KeyValues.rounded(length) * self.shape.token_bytes

    def batch(
        self, tokens: npt.NDArray[np.int32], rows: Rows, first: Places, end: Places, cache: KeyValues
    ) -> RaggedBatch:
        return pack(tokens, rows, first, end, cache, self)


def pack(
    tokens: npt.NDArray[np.int32], rows: Rows, first: Places, end: Places, cache: KeyValues, decoder: PackedDecoder
) -> RaggedBatch:
    """Return the batch of the tokens ``first[i]`` to ``end[i]`` of each row.

    Args:
        tokens: (R, T) ids of all rows of the cache.
        rows: (B,) rows that take part.
        first: (B,) tokens that are cached.
        end: (B,) tokens that the row holds, more than ``first``.
        cache: With room for all of them.
        decoder: Its ``splits`` and ``alone`` decide on groups.
    """
    counts = end - first
    stops = np.cumsum(counts)
    owners = np.repeat(rows, counts)
    positions = np.arange(stops[-1]) - np.repeat(stops - end, counts)
    return RaggedBatch(
        ids=_tensor(tokens[owners, positions].astype(np.int64), cache),
        rows=_tensor(owners, cache),
        positions=_tensor(positions, cache),
        last=None if (counts == 1).all() else _tensor(stops - 1, cache),
        groups=_groups(rows, counts, positions, cache, decoder),
    )


def _groups(
    rows: Rows, counts: Places, positions: Places, cache: KeyValues, decoder: PackedDecoder
) -> Sequence[AttentionGroup]:
    """Return who attends together among the (N,) tokens, ``counts`` (B,) of each row."""
    single, stops = counts == 1, np.cumsum(counts)

    def padded(some: npt.NDArray[np.bool_]) -> AttentionGroup:
        places = (stops - counts)[some][:, None] + np.arange(counts[some].max())
        places = np.minimum(places, stops[some][:, None] - 1)
        return _group(places, rows[some], positions[places], cache, decoder.splits)

    if len(positions) == 1 and decoder.alone:
        return []
    if decoder.splits and not single.all():
        return [padded(some) for some in (single, ~single) if some.any()]
    if single.all() or len(rows) * counts.max() > 2 * len(positions):
        # Each token attends for itself: padding would cost more.
        return [_group(None, np.repeat(rows, counts), positions[:, None], cache, decoder.splits)]
    return [padded(np.ones(len(rows), np.bool_))]


def _group(places: Places | None, rows: Rows, positions: Places, cache: KeyValues, splits: bool) -> AttentionGroup:
    """Return the group of ``rows`` (b,) whose tokens are at ``positions`` (b, q)."""
    every, kept = np.array_equal(rows, np.arange(cache.rows)), None
    if not every and splits and positions.shape[1] == 1 and 2 * len(rows) > cache.rows:
        # Most rows attend. To let the others attend too, to no effect, costs less than to copy
        # the cache of those that take part.
        every, kept = True, rows
        given = np.arange(len(rows))[:, None] if places is None else places
        spread = np.zeros((2, cache.rows, 1), np.int64)
        spread[:, kept] = given, positions
        places, positions = spread
    later = np.arange(cache.reach) > positions[..., None]
    lowest = max(torch.finfo(cache.dtype).min, torch.finfo(torch.float32).min)
    return AttentionGroup(
        tokens=None if places is None else _tensor(places, cache),
        rows=None if every else _tensor(rows, cache),
        mask=_tensor(np.where(later, np.float32(lowest), np.float32(0)), cache).to(cache.dtype),
        kept=None if kept is None else _tensor(kept, cache),
    )


def _tensor(array: npt.NDArray[Any], cache: KeyValues) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(array)).to(cache.device)
