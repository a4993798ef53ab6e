"""Any model that generates, on the cache that it makes for itself.

Here are the models whose layers keep more than keys and values (convolutions, recurrent states, compressed or
shared keys), see through windows, or bias attention by distance. Rows run in batches as Hugging Face's own
``generate`` runs them, except that no prompt is padded: padding is nothing to mask in a recurrent state.

    rows without cache     ->  groups of equal length       ->  one forward a group
    rows that lack tokens  ->  joined, tokens to the right  ->  one forward a token

A model that cannot run in this way runs in a simpler one, see ``Way``. The last keeps nothing and is always exact.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor
from transformers.cache_utils import (
    Cache,
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
    LinearAttentionLayer,
)

from textgen_env.errors import ModelError
from textgen_env.models.base import Rows
from textgen_env.models.forward import CACHE_NAMES, Forward, no_cache
from textgen_env.models.own_cache import Axes, Lengths, OwnBatch, OwnCaches, Path, growing_axes, tensors_in

PADDED_LAYERS = (
    DynamicLayer,
    DynamicSlidingWindowLayer,
    LinearAttentionLayer,
    LinearAttentionAndFullAttentionLayer,
    LinearAttentionAndSlidingWindowAttentionLayer,
)
"""Layers of a cache whose rows may be of different lengths: earlier places are masked, and states need no mask."""


@dataclass(frozen=True)
class Way:
    """How a model runs; from ``WAYS`` the first is taken that equals the model's uncached forward.

    name: Shown in tables and logs.
    cached: Keep the model's own cache; else every token runs the whole text again.
    ragged: Rows of different lengths share a forward.
    batched: Rows share a forward; else one row at a time, for models whose rows change each other.
    padded: Sources of different lengths share a forward of the decoder, padded on the right.
    """

    name: str
    cached: bool
    ragged: bool
    batched: bool
    padded: bool = False


WAYS = (
    Way("own cache", cached=True, ragged=True, batched=True),
    Way("own cache, equal lengths", cached=True, ragged=False, batched=True),
    Way("own cache, row by row", cached=True, ragged=False, batched=False),
    Way("uncached", cached=False, ragged=False, batched=True),
    Way("uncached, row by row", cached=False, ragged=False, batched=False),
)


@dataclass(frozen=True)
class RowsToRun:
    """The rows of one proposal: (R, T) tokens of all rows, and what the B rows hold and have cached."""

    tokens: npt.NDArray[np.int32]
    rows: Rows
    first: Lengths
    end: Lengths
    sources: Mapping[int, tuple[int, ...]] = field(default_factory=dict)  # ids that an encoder reads, of each row

    @property
    def ids(self) -> npt.NDArray[np.int32]:
        """Return the tokens that lack a forward."""
        parts = [self.tokens[r, a:b] for r, a, b in zip(self.rows, self.first, self.end, strict=True)]
        return np.concatenate(parts)


class StatefulDecoder:
    """A causal LM on its own cache.

    Args:
        forward: Of the causal LM.
        way: How it runs.

    Raises:
        ModelError: the model keeps nothing that it takes back, or not in this way.
    """

    alone = False
    POSITIONS = "position_ids"

    def __init__(self, forward: Forward, way: Way) -> None:
        self.model, self.way, self.name = forward.model, way, way.name
        self.forward, self.lock = forward, forward.lock
        self.device: torch.device = self.model.device
        self.dtype: torch.dtype = self.model.dtype
        self._name = ""  # of the cache, among the arguments of the model
        self._axes: Mapping[Path, Axes] = {}
        self._pads = True
        self._bytes = 0, 0  # of a row: once, and for each token
        self._takes_positions = self.POSITIONS in self.forward.accepts
        if way.cached:
            self._probe()

    # --- what the model keeps

    @torch.inference_mode()
    def _probe(self) -> None:
        """Run a few rows and tokens, and look at what grows."""
        caches = [self._keep(self._small_forward(*sizes)[2]) for sizes in ((2, 2, 2), (3, 2, 2), (2, 3, 2), (2, 2, 3))]
        self._axes = growing_axes(*caches)
        sizes = [sum(t.nbytes for _, t in tensors_in(cache)) for cache in caches]
        a_token = (max(sizes[2], sizes[3]) - sizes[0]) // 2
        self._bytes = sizes[0] // 2 - 2 * a_token, a_token
        if not any(axes.rows is not None for axes in self._axes.values()):
            raise ModelError(f"the cache of {type(self.model).__name__} holds nothing of its rows")
        self._pads = any(axes.tokens is not None for axes in self._axes.values())  # else there is nothing to mask
        kinds = {type(layer) for layer in self._layers(caches[0]) if any(True for _ in tensors_in(layer))}
        if self.way.ragged and self._pads and not kinds <= set(PADDED_LAYERS):
            raise ModelError(f"the cache of {type(self.model).__name__} has layers of its own kind")
        if self.way.ragged and self.forward.may_misplace(self.POSITIONS):
            raise ModelError(f"{type(self.model).__name__} counts positions itself")

    def _small_forward(self, rows: int, tokens: int, source: int) -> tuple[Tensor, Tensor, Any]:
        return self._first_forward(torch.zeros((rows, tokens), dtype=torch.long, device=self.device), None)

    def _layers(self, kept: Any) -> list[Any]:
        """Return the layers of what ``_keep`` returned."""
        return list(getattr(kept, "layers", [kept]))

    def _keep(self, found: Any) -> Any:
        """Return the cache in an output of the model."""
        for name in CACHE_NAMES:
            cache = getattr(found, name, None)
            # Other kinds may hold more tensors later than they do at first.
            if isinstance(cache, Cache) and name in self.forward.accepts:
                self._name = name
                return cache
        raise ModelError(f"{type(self.model).__name__} returns no cache that it takes back")

    # --- as slots use a decoder

    def new_cache(self, rows: int, length: int) -> OwnCaches:
        return OwnCaches(self._axes, rows)

    def cache_bytes(self, rows: int, length: int) -> int:
        """Return the bytes that the cache of ``rows`` rows of ``length`` tokens takes at most: joining copies it."""
        once, a_token = self._bytes
        return 2 * rows * (once + length * a_token)

    def batch(
        self, tokens: npt.NDArray[np.int32], rows: Rows, first: Lengths, end: Lengths, cache: OwnCaches
    ) -> RowsToRun:
        return RowsToRun(tokens, rows, first, end)

    def __call__(self, batch: RowsToRun, cache: OwnCaches) -> tuple[Tensor, Tensor]:
        """Return logits (B, V) and hidden (B, d) of each row's last token."""
        known = np.array([cache.holds(int(r), int(n)) for r, n in zip(batch.rows, batch.first, strict=True)], bool)
        if not self.way.cached:
            known &= batch.first == batch.end
        for places in self._groups(np.flatnonzero(~known), batch, batch.end, start=True):
            cache.place(self._started(batch, places))
        lengths = np.where(known, batch.first, batch.end)
        while len(behind := np.flatnonzero(lengths < batch.end)):
            for places in self._groups(behind, batch, lengths):
                self._step(batch, places, lengths, cache)
            lengths[behind] += 1
        return cache.answers(batch.rows.tolist())

    def _groups(self, places: Rows, batch: RowsToRun, lengths: Lengths, start: bool = False) -> list[Rows]:
        """Return the places in groups that may share a forward, by ``lengths`` (B,); none is padded at its start."""
        way, groups = self.way, defaultdict(list)
        for place in places.tolist():
            length = 0 if way.ragged and not start else int(lengths[place])
            source = 0 if way.padded and not start else len(batch.sources.get(int(batch.rows[place]), ()))
            groups[length, source, 0 if way.batched else place].append(place)
        return [np.array(group) for group in groups.values()]

    # --- forwards

    def _started(self, batch: RowsToRun, places: Rows) -> OwnBatch:
        """Return the batch of rows of equal length, run from their first token on."""
        rows, length = batch.rows[places], int(batch.end[places[0]])
        ids = torch.from_numpy(batch.tokens[rows, :length].astype(np.int64)).to(self.device)
        sources = [batch.sources.get(row, ()) for row in rows.tolist()]
        read = torch.tensor(sources, device=self.device) if len(sources[0]) else None
        logits, hidden, found = self._first_forward(ids, read)
        kept = self._keep(found) if self.way.cached else None
        return OwnBatch(
            rows.tolist(), np.full(len(rows), length), np.array(list(map(len, sources))), kept, logits, hidden
        )

    def _first_forward(self, ids: Tensor, sources: Tensor | None) -> tuple[Tensor, Tensor, Any]:
        return self.forward({"input_ids": ids, **self._use_cache()})

    def _use_cache(self) -> dict[str, Any]:
        return {"use_cache": True} if self.way.cached else no_cache(self.model)

    def _step(self, batch: RowsToRun, places: Rows, lengths: Lengths, cache: OwnCaches) -> None:
        """Run the next token of rows that are cached up to ``lengths``."""
        next_ids = {int(batch.rows[p]): int(batch.tokens[batch.rows[p], lengths[p]]) for p in places}
        own = cache.together(list(next_ids))
        ids = torch.tensor([[next_ids[row]] for row in own.rows], device=self.device)
        try:
            own.logits, own.hidden, found = self.forward(self._next_inputs(ids, own))
        except BaseException:
            cache.forget(own.rows)  # the model may have written half of a token
            raise
        own.cache = self._keep(found)
        own.lengths = own.lengths + 1

    def _next_inputs(self, ids: Tensor, own: OwnBatch) -> dict[str, Any]:
        """Return the model's inputs for the next token (B, 1) of each row."""
        return {"input_ids": ids, "use_cache": True, self._name: own.cache, **self._padding(own.lengths)}

    def _padding(self, lengths: Lengths) -> dict[str, Tensor]:
        """Return mask and positions of the next token of rows that are padded on the left.

        The positions are given even where nothing is padded: some hybrid models count them in a layer that has none.
        """
        if not self.way.ragged or not self._pads:
            return {}
        places = torch.from_numpy(lengths).to(self.device)[:, None]
        inputs = {"position_ids": places} if self._takes_positions else {}
        most = int(lengths.max())
        if (lengths < most).any():
            inputs["attention_mask"] = (torch.arange(most + 1, device=self.device) >= most - places).long()
        return inputs
