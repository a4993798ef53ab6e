"""A lean forward for Llama and its near relatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from textgen_env.models.cache import CacheShape, KeyValues
from textgen_env.models.device import forward_lock, one_blas_thread
from textgen_env.models.one_row import OneRow, column_layers
from textgen_env.models.packing import AttentionGroup, PackedDecoder, RaggedBatch
from textgen_env.models.projections import ColumnProjection, Projection, best_projection


class LlamaDecoder(PackedDecoder):
    """Llama, Mistral, Qwen2 and Qwen3 with fused projections, in the layout that this machine multiplies fastest.

    See ``textgen_env.models.projections``. The module itself stays as it is, unless ``relayout`` allows to
    lay its weights out anew in memory, where it keeps its values and goes on working.
    """

    name = "lean"
    splits = True
    FUSED_HEADS = 96

    def __init__(self, model: Any, relayout: bool = False) -> None:
        config, body = model.config, model.model
        self.lock = forward_lock(model)
        embed = body.embed_tokens.weight
        kind = best_projection(model, embed, relayout)
        self._in_numpy = kind is ColumnProjection
        self._embed = embed
        self._layers = [_LlamaLayer(layer, kind, relayout) for layer in body.layers]
        self._norm = body.norm
        self._head = kind([model.lm_head])
        self._rotary = body.rotary_emb
        self._cos = self._sin = torch.empty(0)
        attention = body.layers[0].self_attn
        size = attention.head_dim
        self._heads = attention.k_proj.out_features // size
        self._groups = attention.q_proj.out_features // size // self._heads
        self._scale = attention.scaling
        self._one_row = self._for_one_row(model)
        self.alone = self._one_row is not None
        self.shape = CacheShape(config.num_hidden_layers, self._heads, size, size, embed.dtype, embed.device)

    def _for_one_row(self, model: Any) -> OneRow | None:
        """Return the decoder of a lone row, on this one's own products where those are NumPy's."""
        products: Any = [(x.qkv, x.out, x.gate, x.up, x.down) for x in self._layers], self._head
        if self._in_numpy and self._layers[0].turned_norm is None:
            return OneRow(model, *products)
        return OneRow(model, *column_layers(model)) if OneRow.fits(model) else None

    @staticmethod
    def fits(model: Any) -> bool:
        """Return True if this class implements every part of ``model``."""
        if type(model).__name__ not in {
            "LlamaForCausalLM",
            "MistralForCausalLM",
            "Qwen2ForCausalLM",
            "Qwen3ForCausalLM",
        }:
            return False
        rope = getattr(model.config, "rope_parameters", None) or {}
        linears = [m for name, m in model.named_modules() if name.endswith(("_proj", "lm_head"))]
        return (
            model.config.hidden_act == "silu"
            and rope.get("rope_type", "default") in {"default", "linear", "llama3", "yarn"}
            and rope.get("partial_rotary_factor", 1.0) == 1.0
            and all(type(m) is nn.Linear for m in linears)
            and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        )

    def __call__(self, batch: RaggedBatch, cache: KeyValues) -> tuple[Tensor, Tensor]:
        with one_blas_thread():
            return self._forward(batch, cache)

    def _forward(self, batch: RaggedBatch, cache: KeyValues) -> tuple[Tensor, Tensor]:
        cos, sin = self._rotation(batch.positions, cache.reach)
        if self._one_row is not None and not batch.groups:
            where = int(batch.ids), int(batch.rows), int(batch.positions)
            found = self._one_row(*where, (cos[0], sin[0]), cache.keys, cache.values)
            return torch.from_numpy(found[0])[None], torch.from_numpy(found[1])[None]
        groups = [self._attention(group) for group in batch.groups]
        x = F.embedding(batch.ids, self._embed)  # (N, d)
        heads, size = self._heads, self.shape.key_size
        turned = heads * (self._groups + 1)
        for layer, keys, values in zip(self._layers, cache.keys, cache.values, strict=True):
            qkv = layer.qkv(layer.qkv.normed(x)).view(len(x), turned + heads, size)
            qk = qkv[:, :turned]
            if layer.turned_norm is not None:
                qk = F.rms_norm(qk, (size,), None, layer.turned_eps) * layer.turned_norm
            qk = torch.addcmul(qk * cos, qk.roll(size // 2, -1), sin)  # (N, Hq + Hk, D)
            keys[batch.rows, :, batch.positions] = qk[:, -heads:]
            values[batch.rows, :, batch.positions] = qkv[:, turned:]
            query = qk[:, :-heads].view(len(x), heads, self._groups, size)
            mixed = torch.empty_like(query)
            for attend in groups:
                mixed = attend(query, keys, values, mixed)
            x = layer.out.added_to(x, mixed.reshape(len(x), -1))
            x = layer.mlp(x)
        if batch.last is not None:
            x = x[batch.last]
        hidden = F.rms_norm(x, (x.shape[-1],), self._norm.weight, self._norm.variance_epsilon)
        return self._head(hidden), hidden

    def _attention(self, group: AttentionGroup) -> Callable[..., Tensor]:
        """Return a function that mixes the values for the queries of ``group``, in every layer alike."""
        places, rows, kept = group.tokens, group.rows, group.kept
        written = places if places is None or kept is None else places[kept]
        b, q, reach = group.mask.shape
        size, heads, folded = self.shape.key_size, self._heads, self._groups
        # Grouped queries fold into the query axis: one product serves all that share a key head.
        mask = group.mask[:, None, :, None].expand(b, 1, q, folded, reach).reshape(b, 1, q * folded, reach)
        # In half precision torch's own attention is up to 4 times as fast for few heads, a batched
        # product 1.1 to 1.7 times as fast for many.
        fused = b * heads <= self.FUSED_HEADS and mask.dtype != torch.float32

        def attend(query: Tensor, keys: Tensor, values: Tensor, mixed: Tensor) -> Tensor:
            if places is not None:
                query = query[places].transpose(1, 2).reshape(b, heads, q * folded, size)
            if rows is not None:
                keys, values = keys[rows], values[rows]
            if fused:
                found = F.scaled_dot_product_attention(query, keys, values, mask, scale=self._scale)
            else:
                scores = torch.add(mask, query @ keys.transpose(-1, -2), alpha=self._scale)
                found = torch.softmax(scores, -1) @ values  # (b, H, q G, D)
            if places is None:
                return found
            found = found.view(b, heads, q, folded, size).transpose(1, 2)
            mixed[written] = found if kept is None else found[kept]
            return mixed

        return attend

    def _rotation(self, positions: Tensor, length: int) -> tuple[Tensor, Tensor]:
        """Return the model's own rotary factors, (N, 1, D) each, the half-turn's sign in the sine."""
        if len(self._cos) < length:
            every = torch.arange(length, device=positions.device)[None]
            cos, sin = self._rotary(self._embed[:1], every)
            half = sin.shape[-1] // 2
            self._cos = cos[0, :, None].contiguous()
            self._sin = torch.cat([-sin[0, :, None, :half], sin[0, :, None, half:]], -1)
        return self._cos[positions], self._sin[positions]


class _LlamaLayer:
    def __init__(self, layer: Any, kind: type[Projection], relayout: bool) -> None:
        attention, mlp, after = layer.self_attn, layer.mlp, layer.post_attention_layernorm
        self.turned_norm, self.turned_eps = _turned_norm(attention)
        self.qkv = kind([attention.q_proj, attention.k_proj, attention.v_proj], layer.input_layernorm, relayout)
        self.out = kind([attention.o_proj], relayout=relayout)
        self.gate = kind([mlp.gate_proj], after, relayout)
        self.up = kind([mlp.up_proj], after, relayout)
        self.down = kind([mlp.down_proj], relayout=relayout)

    def mlp(self, x: Tensor) -> Tensor:
        """Return ``x`` plus the feed-forward block's output."""
        normed = self.gate.normed(x)  # as ``up`` wants it too
        return self.down.added_to(x, self.up.multiplied(normed, self.gate.silu(normed)))


def _turned_norm(attention: Any) -> tuple[Tensor | None, float]:
    """Return the weights (Hq + Hk, D) and epsilon of the norms of queries and keys, None without such norms."""
    if not hasattr(attention, "q_norm"):
        return None, 0.0
    norms = [attention.q_norm, attention.k_norm]
    heads = [linear.out_features // attention.head_dim for linear in (attention.q_proj, attention.k_proj)]
    weights = [norm.weight.detach().expand(count, -1) for norm, count in zip(norms, heads, strict=True)]
    return torch.cat(weights), float(norms[0].variance_epsilon)
