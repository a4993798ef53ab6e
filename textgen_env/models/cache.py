"""The keys and values of the tokens of each row, written in place."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor


@dataclass(frozen=True)
class CacheShape:
    """The keys and values of one token: numbers, sizes, dtype and device."""

    layers: int
    heads: int
    key_size: int
    value_size: int
    dtype: torch.dtype
    device: torch.device

    @property
    def token_bytes(self) -> int:
        return self.layers * self.heads * (self.key_size + self.value_size) * self.dtype.itemsize


class KeyValues:
    """Keys (L, R, H, reach, Dk) and values (L, R, H, reach, Dv) of R rows in L layers.

    Storage for ``length`` tokens a row is allocated once. Of it, ``reach`` tokens a row are in use:
    as many as the longest row has needed, rounded up to ``STEP``. So a layer's keys are contiguous,
    and enter a matrix product without being copied; to grow moves the rows apart, once in ``STEP``
    tokens. Places that a row has not written hold zeros or old numbers, and are masked.
    """

    STEP = 8
    recomputes_last = True

    @torch.inference_mode()
    def __init__(self, shape: CacheShape, rows: int, length: int) -> None:
        self.rows, self.dtype, self.device = rows, shape.dtype, shape.device
        self._front = (shape.layers, rows, shape.heads)
        self._sizes = (shape.key_size, shape.value_size)
        tokens = rows * shape.heads * self.rounded(length)
        self._storage = [
            torch.zeros(shape.layers, tokens * size, dtype=shape.dtype, device=shape.device) for size in self._sizes
        ]
        self.reach = 0
        self.keys, self.values = self._views()

    @classmethod
    def rounded(cls, length: int) -> int:
        """Return ``length`` in whole steps, as it is allocated."""
        return -(-length // cls.STEP) * cls.STEP

    @property
    def nbytes(self) -> int:
        return sum(storage.nbytes for storage in self._storage)

    @torch.inference_mode()
    def grow(self, length: int) -> None:
        """Make room for rows of ``length`` tokens."""
        if length <= self.reach:
            return
        before, kept = self.reach, (self.keys, self.values)
        self.reach = self.rounded(length)
        self.keys, self.values = self._views()
        for old, new in zip(kept, (self.keys, self.values), strict=True):
            for layer in range(len(old)):  # old and new share their storage
                new[layer, :, :, :before] = old[layer].clone()

    def clear(self) -> None:
        """Let no room be in use, as at first."""
        self.reach = 0
        self.keys, self.values = self._views()

    @torch.inference_mode()
    def read(self, rows: Any, length: int) -> tuple[Tensor, Tensor]:
        """Return a copy of the first ``length`` tokens of a row, or of several."""
        return self.keys[:, rows, :, :length].clone(), self.values[:, rows, :, :length].clone()

    @torch.inference_mode()
    def write(self, rows: Any, saved: tuple[Tensor, Tensor]) -> int:
        """Write the tokens that ``read`` returned, and return their number."""
        length = saved[0].shape[-2]
        self.grow(length)
        self.keys[:, rows, :, :length] = saved[0]
        self.values[:, rows, :, :length] = saved[1]
        return int(length)

    def copy(self, src: Any, dst: Any, lengths: Any) -> None:
        """Copy the first ``lengths[i]`` tokens of row ``src[i]`` to row ``dst[i]``, and more where others need it."""
        self.write(dst, self.read(src, int(lengths.max())))

    def _views(self) -> tuple[Tensor, Tensor]:
        used = self._front[1] * self._front[2] * self.reach
        keys, values = (
            store[:, : used * size].view(*self._front, self.reach, size)
            for store, size in zip(self._storage, self._sizes, strict=True)
        )
        return keys, values
