"""The next token of a single row of a small Llama, in NumPy.

One token through a model of a few million parameters takes some hundred operations on a few hundred
numbers each. There, calling an operation costs more than its work, and a call of NumPy costs a third of
one of torch. The matrix products stay torch's; everything between them is NumPy on the same memory.

    token, position p  ->  keys and values written at p  ->  attention up to p  ->  logits (V,), hidden (d,)
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

Vector = npt.NDArray[np.float32]


class OneRow:
    """A Llama-like decoder in float32 on the CPU, for one token of one row at a time.

    The weights of the norms are folded into the projections behind them.
    """

    LIMIT = 32 << 20  # bytes of weights, which are copied; in larger models the products take most of the time

    def __init__(self, model: Any) -> None:
        body = model.model
        attention = body.layers[0].self_attn
        self._size = attention.head_dim
        self._heads = attention.k_proj.out_features // self._size
        self._scale = np.float32(attention.scaling)
        self._eps = body.norm.variance_epsilon
        self._embed = _array(body.embed_tokens.weight)
        self._norm = _array(body.norm.weight)
        self._head = _Product([model.lm_head])
        self._half_turn = np.roll(np.arange(self._size), self._size // 2)
        self._layers = [
            (
                _Product([x.self_attn.q_proj, x.self_attn.k_proj, x.self_attn.v_proj], x.input_layernorm),
                _Product([x.self_attn.o_proj]),
                _Product([x.mlp.gate_proj, x.mlp.up_proj], x.post_attention_layernorm),
                _Product([x.mlp.down_proj]),
            )
            for x in body.layers
        ]

    @classmethod
    def fits(cls, model: Any) -> bool:
        """Return True if ``model``, a Llama, is in float32, on the CPU, small, and without norms of its queries."""
        if hasattr(model.model.layers[0].self_attn, "q_norm"):
            return False
        weights = list(model.parameters())
        plain = all(w.dtype == torch.float32 and w.device.type == "cpu" for w in weights)
        return plain and sum(w.nbytes for w in weights) <= cls.LIMIT

    def __call__(
        self, token: int, row: int, position: int, rotation: tuple[Tensor, Tensor], keys: Tensor, values: Tensor
    ) -> tuple[Vector, Vector]:
        """Return logits (V,) and hidden (d,); ``keys`` and ``values`` are the cache's, all layers and rows."""
        x = self._embed[token]
        cos, sin = (factor.numpy() for factor in rotation)
        heads = self._heads
        upto = slice(position + 1)
        for (qkv_of, out, gate_up_of, down), k, v in zip(self._layers, keys.numpy(), values.numpy(), strict=True):
            qkv = qkv_of(self._scaled(x)).reshape(-1, self._size)
            qk = qkv[:-heads]
            qk = qk * cos + qk[:, self._half_turn] * sin  # (Hq + Hk, D)
            k[row, :, position] = qk[-heads:]
            v[row, :, position] = qkv[-heads:]
            query = qk[:-heads].reshape(heads, -1, self._size) * self._scale
            scores = query @ k[row, :, upto].swapaxes(1, 2)  # (Hk, G, T)
            weights = np.exp(scores - scores.max(-1, keepdims=True))
            mixed = weights @ v[row, :, upto] / weights.sum(-1, keepdims=True)
            x = x + out(mixed.reshape(-1))
            gate, up = gate_up_of(self._scaled(x)).reshape(2, -1)
            x = x + down(gate * (0.5 + 0.5 * np.tanh(0.5 * gate)) * up)  # SiLU; this form of it cannot overflow
        hidden = self._scaled(x) * self._norm
        return self._head(hidden), hidden

    def _scaled(self, x: Vector) -> Vector:
        return x * np.float32((float(x @ x) / len(x) + self._eps) ** -0.5)


class _Product:
    """Linear layers that read the same input, as one, with the weight of the norm before them."""

    def __init__(self, linears: Sequence[nn.Linear], norm: Any = None) -> None:
        weight = torch.cat([linear.weight.detach() for linear in linears])
        self._weight = weight if norm is None else weight * norm.weight.detach()
        biases = [linear.bias.detach() for linear in linears if linear.bias is not None]
        self._bias = torch.cat(biases) if biases else None

    def __call__(self, x: Vector) -> Vector:
        given = torch.from_numpy(x)
        found = self._weight.mv(given) if self._bias is None else self._bias.addmv(self._weight, given)
        array: Vector = found.numpy()
        return array


def _array(weight: Tensor) -> Vector:
    array: Vector = weight.detach().numpy()
    return array
