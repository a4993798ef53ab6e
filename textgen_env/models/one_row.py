"""The next token of a single row of a Llama, in NumPy.

One token of one row takes some hundred operations on a few hundred numbers each, beside the products. There,
calling an operation costs more than its work, and a call of NumPy costs a third of one of torch.

    token, position p  ->  keys and values written at p  ->  attention up to p  ->  logits (V,), hidden (d,)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor

from textgen_env.models.products import Float32s
from textgen_env.models.projections import ColumnProjection, takes_columns

Layer = tuple[ColumnProjection, ColumnProjection, ColumnProjection, ColumnProjection, ColumnProjection]
"""Queries, keys and values as one; output; gate; up; down."""


class OneRow:
    """A Llama-like decoder in float32 on the CPU, for one token of one row at a time.

    Args:
        model: The Llama.
        layers: Its products, layer by layer.
        head: The product of the output layer.
    """

    LIMIT = 32 << 20  # bytes of weights up to which they are copied where batches multiply in another layout

    def __init__(self, model: Any, layers: Sequence[Layer], head: ColumnProjection) -> None:
        body = model.model
        attention = body.layers[0].self_attn
        self._size = attention.head_dim
        self._heads = attention.k_proj.out_features // self._size
        self._scale = np.float32(attention.scaling)
        self._eps = body.norm.variance_epsilon
        self._embed = body.embed_tokens.weight.detach().numpy()
        self._norm = body.norm.weight.detach().numpy()
        self._layers, self._head = layers, head
        self._half_turn = np.roll(np.arange(self._size), self._size // 2)

    @classmethod
    def fits(cls, model: Any) -> bool:
        """Return True if ``model`` is a plain Llama in float32 on the CPU: no further norms, SiLU, one rotation."""
        layer = model.model.layers[0]
        norms_of_llama = hasattr(layer.input_layernorm, "variance_epsilon") and not hasattr(layer.self_attn, "q_norm")
        return norms_of_llama and model.config.hidden_act == "silu" and all(map(takes_columns, model.parameters()))

    @classmethod
    def is_small(cls, model: Any) -> bool:
        """Return True if its weights may be copied."""
        return sum(weight.nbytes for weight in model.parameters()) <= cls.LIMIT

    def __call__(
        self, token: int, row: int, position: int, rotation: tuple[Tensor, Tensor], keys: Tensor, values: Tensor
    ) -> tuple[Float32s, Float32s]:
        """Return logits (V,) and hidden (d,); ``keys`` and ``values`` are the cache's, all layers and rows."""
        x = self._embed[token]
        cos, sin = (factor.numpy() for factor in rotation)
        heads = self._heads
        upto = slice(position + 1)
        for (qkv_of, out, gate_of, up_of, down), k, v in zip(self._layers, keys.numpy(), values.numpy(), strict=True):
            qkv = qkv_of.product(qkv_of.scaled(x)).reshape(-1, self._size)
            qk = qkv[:-heads]
            qk = qk * cos + qk[:, self._half_turn] * sin  # (Hq + Hk, D)
            k[row, :, position] = qk[-heads:]
            v[row, :, position] = qkv[-heads:]
            query = qk[:-heads].reshape(heads, -1, self._size) * self._scale
            scores = query @ k[row, :, upto].swapaxes(1, 2)  # (Hk, G, T)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            mixed = weights @ v[row, :, upto] / weights.sum(-1, keepdims=True)
            x = x + out.product(mixed.reshape(-1))
            normed = gate_of.scaled(x)  # as ``up`` wants it too
            gate = gate_of.product(normed)
            # SiLU; this form of it cannot overflow
            x = x + down.product(gate * (0.5 + 0.5 * np.tanh(0.5 * gate)) * up_of.product(normed))
        hidden = x * np.float32((float(x @ x) / len(x) + self._eps) ** -0.5) * self._norm
        return self._head.product(hidden), hidden
