"""Who attends together in one ragged forward."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

from torch import Tensor

from textgen_env.models.cache import CacheShape, KeyValues


@dataclass(frozen=True)
class AttentionGroup:
    """Rows of a batch that attend together: b rows of q tokens each.

    Shorter rows repeat their last token, which computes, and writes, the same thing again.
    """

    tokens: Tensor | None  # (b, q) places in the batch; None: all N of them, one a row
    rows: Tensor | None  # (b,) rows of the cache; None: all of them in order
    mask: Tensor  # (b, q, reach) added to the scores: 0, or the lowest number for later positions
    kept: Tensor | None = None  # which of the b rows are meant; None: all of them


@dataclass(frozen=True)
class RaggedBatch:
    """The tokens of one forward."""

    ids: Tensor  # (N,)
    rows: Tensor  # (N,) row of each token
    positions: Tensor  # (N,)
    last: Tensor | None  # (B,) place of each row's last token; None: every token is the last of its row
    groups: Sequence[AttentionGroup]  # none for a single token that a decoder takes ``alone``


class Decoder(Protocol):
    """A forward over cached rows."""

    shape: CacheShape
    splits: bool  # whether rows with one token and rows with several form groups of their own
    alone: bool  # whether a single token of a single row needs no group

    def __call__(self, batch: RaggedBatch, cache: KeyValues) -> tuple[Tensor, Tensor]:
        """Return logits (B, V) and hidden (B, d)."""
