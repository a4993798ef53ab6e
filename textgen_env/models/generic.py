"""Any causal LM that caches keys and values, through its own forward."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from transformers import Cache
from transformers.cache_utils import CacheLayerMixin, DynamicLayer, DynamicSlidingWindowLayer

from textgen_env.errors import ModelError
from textgen_env.models.cache import CacheShape, KeyValues
from textgen_env.models.forward import Forward
from textgen_env.models.packing import PackedDecoder, RaggedBatch


class GenericDecoder(PackedDecoder):
    """Any causal LM whose layers cache plain keys and values, through its own forward.

    The model sees explicit positions, a 4-D mask, and a cache of ours that writes in place. A hook
    before the output embedding keeps each row's last token only, so that the model's own logit
    scaling and soft caps apply, and gives ``hidden``.

    Raises:
        ModelError: the model caches something else, or not alike in all layers.
    """

    name = "packed"

    def __init__(self, forward: Forward) -> None:
        self._model, self._forward = forward.model, forward
        self.lock = self._forward.lock
        self.shape = self._probe()
        if forward.may_misplace("position_ids"):
            raise ModelError(f"{type(self._model).__name__} counts positions itself")

    def _probe(self) -> CacheShape:
        """Run one token and look at the cache it leaves."""
        device = self._model.device
        with torch.inference_mode():
            try:
                found = self._model(input_ids=torch.zeros((1, 1), dtype=torch.long, device=device), use_cache=True)
                layers = found.past_key_values.layers
                if not all(type(layer) in (DynamicLayer, DynamicSlidingWindowLayer) for layer in layers):
                    raise TypeError("its cache has layers of other kinds")
                shapes = {(len(layers), x.keys.shape[1], x.keys.shape[3], x.values.shape[3]) for x in layers}
            except (AttributeError, IndexError, TypeError) as error:
                raise ModelError(
                    f"{type(self._model).__name__} does not cache keys and values for each token: {error}"
                ) from error
        if len(shapes) != 1:
            raise ModelError(f"{type(self._model).__name__} caches different shapes in its layers: {sorted(shapes)}")
        return CacheShape(*shapes.pop(), dtype=layers[0].keys.dtype, device=device)

    def __call__(self, batch: RaggedBatch, cache: KeyValues) -> tuple[Tensor, Tensor]:
        (group,) = batch.groups
        shape = group.mask.shape[:2]
        places = (
            torch.arange(len(batch.ids), device=batch.ids.device).view(shape) if group.tokens is None else group.tokens
        )
        written = batch.rows[places], batch.positions[places]
        layers: list[Any] = [
            _SlotLayer(written, group.rows, keys, values) for keys, values in zip(cache.keys, cache.values, strict=True)
        ]
        logits, hidden, _ = self._forward(
            {
                "input_ids": batch.ids[places],
                "attention_mask": group.mask[:, None],
                "position_ids": written[1],
                "past_key_values": Cache(layers=layers),
                "use_cache": True,
            },
            None if batch.last is None or shape[1] > 1 else batch.last,
        )
        return logits, hidden


class _SlotLayer(CacheLayerMixin):
    """Our storage, in the shape in which transformers asks for a layer of cache."""

    is_compileable = False
    is_sliding = False

    def __init__(self, written: tuple[Tensor, Tensor], rows: Tensor | None, keys: Tensor, values: Tensor) -> None:
        super().__init__()
        self._written, self._rows, self._keys, self._values = written, rows, keys, values
        self.is_initialized = True

    def lazy_initialization(self, key_states: Tensor, value_states: Tensor) -> None:
        """The storage is there already."""

    def update(self, key_states: Tensor, value_states: Tensor, *args: Any, **kwargs: Any) -> tuple[Tensor, Tensor]:
        rows, positions = self._written  # (b, q) each
        self._keys[rows, :, positions] = key_states.transpose(1, 2)
        self._values[rows, :, positions] = value_states.transpose(1, 2)
        if self._rows is None:
            return self._keys, self._values
        return self._keys[self._rows], self._values[self._rows]

    def get_mask_sizes(self, query_length: int) -> tuple[int, int]:
        return self.get_max_length(), 0

    def get_seq_length(self) -> int:
        return 0

    def get_max_length(self) -> int:
        return self._keys.shape[2]
