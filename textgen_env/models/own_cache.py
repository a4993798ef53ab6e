"""The cache that a model makes for itself, cut into rows and put together again.

A model's own cache may hold keys and values, convolution states, recurrent states, or anything else. Nothing
here knows what they are: two axes of each tensor tell, the one that grows with rows and the one that grows with
tokens, and both are found by running the model on few more rows and tokens.

    rows of several batches  ->  each tensor: index rows, pad tokens on the left, join  ->  one batch
"""

from __future__ import annotations

import copy
from collections import UserDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import numpy.typing as npt
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn
from transformers import PreTrainedConfig

Path = tuple[Any, ...]
Lengths = npt.NDArray[np.int64]


class Axes(NamedTuple):
    """The axes of a tensor that grow with rows, tokens, and the tokens of an encoder; None where none does."""

    rows: int | None
    tokens: int | None
    source: int | None


def parts_of(tree: Any) -> Iterator[tuple[Any, Any]]:
    """Yield the parts of a dictionary, a list or an object of transformers, with their keys."""
    if isinstance(tree, dict | UserDict):
        yield from tree.items()
    elif isinstance(tree, list | tuple):
        yield from enumerate(tree)
    elif _is_open(tree):
        yield from vars(tree).items()


def _is_open(tree: Any) -> bool:
    closed = isinstance(tree, PreTrainedConfig | nn.Module | type)
    return not closed and type(tree).__module__.startswith("transformers") and hasattr(tree, "__dict__")


def tensors_in(tree: Any, path: Path = ()) -> Iterator[tuple[Path, Tensor]]:
    """Yield each tensor of a cache, with the way to it."""
    if isinstance(tree, Tensor):
        yield path, tree
        return
    for key, part in parts_of(tree):
        yield from tensors_in(part, (*path, key))


def with_tensors(tree: Any, tensors: Mapping[Path, Tensor], length: int, path: Path = ()) -> Any:
    """Return a copy of a cache that holds other ``tensors``, of rows up to ``length`` tokens."""
    if isinstance(tree, Tensor):
        return tensors[path]
    parts = {key: with_tensors(part, tensors, length, (*path, key)) for key, part in parts_of(tree)}
    if isinstance(tree, tuple):
        return type(tree)(*parts.values()) if hasattr(tree, "_fields") else tuple(parts.values())
    if isinstance(tree, list):
        return list(parts.values())
    if isinstance(tree, dict | UserDict):
        made = copy.copy(tree)
        for key, part in parts.items():
            made[key] = part
        return made
    if not _is_open(tree):
        return tree
    made = copy.copy(tree)
    vars(made).update(parts)
    if isinstance(getattr(made, "cumulative_length", None), int):
        made.cumulative_length = length  # what a sliding layer has seen
    return made


def growing_axes(base: Any, more_rows: Any, more_tokens: Any, more_source: Any) -> dict[Path, Axes]:
    """Return the axes of each tensor of ``base`` from the caches of one more row, token, and token of the source."""
    others = [dict(tensors_in(tree)) for tree in (more_rows, more_tokens, more_source)]
    found = {}
    for path, tensor in tensors_in(base):
        axes = [_changed(tensor, other.get(path)) for other in others]
        found[path] = Axes(*axes)
    return found


def _changed(one: Tensor, other: Tensor | None) -> int | None:
    if other is None or other.dim() != one.dim():
        raise TypeError("the tensors of the cache change with rows or tokens")
    axes = [axis for axis in range(one.dim()) if one.shape[axis] != other.shape[axis]]
    if len(axes) > 1:
        raise TypeError(f"a tensor of the cache changes in {len(axes)} axes at once")
    return axes[0] if axes else None


@dataclass
class OwnBatch:
    """B rows on one cache of the model's own, and its answer for their last tokens."""

    rows: list[int]
    lengths: Lengths  # (B,) tokens of each row; the longest fills the cache
    sources: Lengths  # (B,) tokens that an encoder has read, 0 without one
    cache: Any
    logits: Tensor  # (B, V)
    hidden: Tensor  # (B, d)

    @property
    def nbytes(self) -> int:
        return sum(tensor.nbytes for _, tensor in tensors_in(self.cache)) + self.logits.nbytes + self.hidden.nbytes


def joined(pieces: Sequence[tuple[OwnBatch, list[int]]], axes: Mapping[Path, Axes]) -> OwnBatch:
    """Return a batch of the given places of each batch, in this order, in storage of its own."""
    lengths = np.concatenate([batch.lengths[places] for batch, places in pieces])
    sources = np.concatenate([batch.sources[places] for batch, places in pieces])
    longest = max(range(len(pieces)), key=lambda i: pieces[i][0].lengths[pieces[i][1]].max())
    trees = [dict(tensors_in(batch.cache)) for batch, _ in pieces]
    sizes = [(int(batch.lengths[places].max()), int(batch.sources[places].max())) for batch, places in pieces]
    picks = [torch.tensor(places, device=batch.logits.device) for batch, places in pieces]
    tensors = {
        path: _joined([tree[path] for tree in trees], picks, sizes, axes[path], longest) for path in trees[longest]
    }
    return OwnBatch(
        rows=[batch.rows[place] for batch, places in pieces for place in places],
        lengths=lengths,
        sources=sources,
        cache=with_tensors(pieces[longest][0].cache, tensors, int(lengths.max())),
        logits=torch.cat([batch.logits[pick] for (batch, _), pick in zip(pieces, picks, strict=True)]),
        hidden=torch.cat([batch.hidden[pick] for (batch, _), pick in zip(pieces, picks, strict=True)]),
    )


def _joined(
    tensors: Sequence[Tensor], picks: Sequence[Tensor], sizes: Sequence[tuple[int, int]], axes: Axes, longest: int
) -> Tensor:
    if axes.rows is None:
        return tensors[longest].clone()
    found = []
    for tensor, pick, (tokens, source) in zip(tensors, picks, sizes, strict=True):
        part = tensor.index_select(axes.rows, pick)
        if axes.tokens is not None and part.shape[axes.tokens] > tokens:
            part = part.narrow(axes.tokens, part.shape[axes.tokens] - tokens, tokens)
        if axes.source is not None and part.shape[axes.source] > source:
            part = part.narrow(axes.source, 0, source)
        found.append(part)
    if len(found) == 1:
        return found[0].contiguous()
    for axis, left in ((axes.tokens, True), (axes.source, False)):
        if axis is not None:
            most = max(part.shape[axis] for part in found)
            found = [_padded(part, axis, most - part.shape[axis], left) for part in found]
    return torch.cat(found, axes.rows)


def _padded(tensor: Tensor, axis: int, by: int, left: bool) -> Tensor:
    if not by:
        return tensor
    behind = 2 * (tensor.dim() - 1 - axis)  # ``F.pad`` counts axes from the last one
    return F.pad(tensor, [0] * behind + ([by, 0] if left else [0, by]))


class OwnCaches:
    """What R rows keep: each is a place in a batch, or nothing.

    ``_home`` is the truth. A batch may still list rows that have moved on to another one; only those whose home it is
    count. It goes when the last of them has left.
    """

    recomputes_last = False  # the answer for the last token is kept: a state cannot be taken back by a token

    def __init__(self, axes: Mapping[Path, Axes], rows: int) -> None:
        self.axes = axes
        self.rows = rows
        self._home: dict[int, tuple[OwnBatch, int]] = {}

    @property
    def nbytes(self) -> int:
        return sum(batch.nbytes for batch in {id(batch): batch for batch, _ in self._home.values()}.values())

    def holds(self, row: int, length: int) -> bool:
        """Return True if the row is kept up to ``length`` tokens exactly."""
        home = self._home.get(row)
        return home is not None and home[0].lengths[home[1]] == length > 0

    def place(self, batch: OwnBatch) -> None:
        """Let the rows of ``batch`` live there."""
        self._home.update((row, (batch, place)) for place, row in enumerate(batch.rows))

    def together(self, rows: Sequence[int]) -> OwnBatch:
        """Return one batch of these rows, which hold something, without copying where they are one already."""
        pieces = self._pieces(rows)
        if len(pieces) == 1 and len(rows) == len(pieces[0][0].rows):
            return pieces[0][0]
        batch = joined(pieces, self.axes)
        self.place(batch)
        return batch

    def answers(self, rows: Sequence[int]) -> tuple[Tensor, Tensor]:
        """Return logits (B, V) and hidden (B, d) of the last tokens of rows."""
        pieces = self._pieces(rows)
        if len(pieces) == 1 and pieces[0][0].rows == list(rows):
            return pieces[0][0].logits, pieces[0][0].hidden
        homes = [self._home[row] for row in rows]
        return torch.stack([b.logits[i] for b, i in homes]), torch.stack([b.hidden[i] for b, i in homes])

    def forget(self, rows: Sequence[int]) -> None:
        """Let rows hold nothing."""
        for row in rows:
            self._home.pop(row, None)

    # --- as slots use a cache

    def grow(self, length: int) -> None:
        """The model's own cache grows by itself."""

    def clear(self) -> None:
        self._home.clear()

    def read(self, row: int, length: int) -> OwnBatch | None:
        """Return a copy of a row, or None unless it is kept up to ``length`` tokens exactly."""
        if not self.holds(row, length):
            return None
        return joined(self._pieces([row]), self.axes)

    def write(self, row: int, saved: OwnBatch | None) -> int:
        """Put a row that ``read`` returned into ``row``, and return its tokens."""
        if saved is None:
            self.forget([row])
            return 0
        batch = joined([(saved, [0])], self.axes)
        batch.rows = [row]
        self.place(batch)
        return int(batch.lengths[0])

    def copy(self, src: Sequence[int], dst: Sequence[int], lengths: Lengths) -> None:
        """Let each row ``dst[i]`` hold a copy of ``src[i]``, if that is kept up to ``lengths[i]`` tokens."""
        kept = [(int(s), int(d)) for s, d, n in zip(src, dst, lengths, strict=True) if self.holds(int(s), int(n))]
        if kept:
            pieces = self._pieces([s for s, _ in kept])
            targets: dict[int, list[int]] = {}
            for s, d in kept:
                targets.setdefault(s, []).append(d)
            batch = joined(pieces, self.axes)
            batch.rows = [targets[row].pop(0) for row in batch.rows]
        self.forget([int(d) for d in dst])
        if kept:
            self.place(batch)

    def _pieces(self, rows: Sequence[int]) -> list[tuple[OwnBatch, list[int]]]:
        found: dict[int, tuple[OwnBatch, list[int]]] = {}
        for row in rows:
            batch, place = self._home[int(row)]
            found.setdefault(id(batch), (batch, []))[1].append(place)
        return list(found.values())
