"""A lean forward for Llama and its near relatives."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from textgen_env.models.cache import CacheShape, KeyValues
from textgen_env.models.device import available_bytes, forward_lock
from textgen_env.models.one_row import OneRow
from textgen_env.models.packing import AttentionGroup, PackedDecoder, RaggedBatch


class LlamaDecoder(PackedDecoder):
    """Llama, Mistral, Qwen2 and Qwen3 with fused projections and weights laid out for oneDNN.

    On x86 CPUs the weights are copied once into oneDNN's blocked layout, which it would otherwise
    produce again in every call: 1.3 to 2.5 times as fast as ``F.linear``. That copy is as large as
    the model and is only made while it takes less than half of the free memory; elsewhere the
    module's own weights are used. Either way the module itself stays as it is.
    """

    name = "lean"
    splits = True
    FUSED_HEADS = 96

    def __init__(self, model: Any) -> None:
        config, body = model.config, model.model
        self.lock = forward_lock(model)
        embed = body.embed_tokens.weight
        pack = can_pack(embed) and 2 * _nbytes(model) < available_bytes(embed.device)
        self._embed = embed
        self._layers = [_LlamaLayer(layer, pack) for layer in body.layers]
        self._norm = body.norm
        self._head = Projection([model.lm_head], pack)
        self._rotary = body.rotary_emb
        self._cos = self._sin = torch.empty(0)
        attention = body.layers[0].self_attn
        size = attention.head_dim
        self._heads = attention.k_proj.out_features // size
        self._groups = attention.q_proj.out_features // size // self._heads
        self._scale = attention.scaling
        self._one_row = OneRow(model) if OneRow.fits(model) else None
        self.alone = self._one_row is not None
        self.shape = CacheShape(config.num_hidden_layers, self._heads, size, size, embed.dtype, embed.device)

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
    def __init__(self, layer: Any, pack: bool) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.turned_norm, self.turned_eps = _turned_norm(attention)
        self.qkv = Projection([attention.q_proj, attention.k_proj, attention.v_proj], pack, layer.input_layernorm)
        self.out = Projection([attention.o_proj], pack)
        self._gate = Projection([mlp.gate_proj], pack, layer.post_attention_layernorm)
        self._up = Projection([mlp.up_proj], pack, layer.post_attention_layernorm)
        self._down = Projection([mlp.down_proj], pack)

    def mlp(self, x: Tensor) -> Tensor:
        """Return ``x`` plus the feed-forward block's output."""
        normed = self._gate.normed(x)  # as ``_up`` wants it too
        return self._down.added_to(x, self._up.multiplied(normed, self._gate.silu(normed)))


def _turned_norm(attention: Any) -> tuple[Tensor | None, float]:
    """Return the weights (Hq + Hk, D) and epsilon of the norms of queries and keys, None without such norms."""
    if not hasattr(attention, "q_norm"):
        return None, 0.0
    norms = [attention.q_norm, attention.k_norm]
    heads = [linear.out_features // attention.head_dim for linear in (attention.q_proj, attention.k_proj)]
    weights = [norm.weight.detach().expand(count, -1) for norm, count in zip(norms, heads, strict=True)]
    return torch.cat(weights), float(norms[0].variance_epsilon)


class Projection:
    """Linear layers that read the same input, as one: (N, d) -> (N, sum of outputs).

    Where the weights are packed, oneDNN also does the operation that follows the product (SiLU, the
    gate, the residual sum), before the result is rounded: a pass over memory less. The weight of the norm before
    the layers is folded into packed weights.
    """

    MANY = 64  # rows from which multiplying within oneDNN is the faster way

    def __init__(self, linears: Sequence[nn.Linear], pack: bool, norm: Any = None) -> None:
        self._linears, self._norm = linears, norm
        self._packed: Tensor | None = None
        if pack:
            weight = torch.cat([linear.weight for linear in linears])
            if norm is not None:
                weight = (weight.float() * norm.weight.float()).to(weight.dtype)
            biases: list[Tensor] = [linear.bias for linear in linears]
            self._bias = None if biases[0] is None else torch.cat(biases)
            self._packed = torch.ops.mkldnn._reorder_linear_weight(weight)

    def normed(self, x: Tensor) -> Tensor:
        """Return ``x`` as the layers read it: its root mean square 1, times the norm's weight unless that is folded."""
        width, eps = x.shape[-1], self._norm.variance_epsilon
        if self._packed is None:
            return F.rms_norm(x, (width,), self._norm.weight, eps)
        if x.dtype == torch.float32:
            return F.rms_norm(x, (width,), None, eps)
        # Batch norm with rows as channels: one pass in bfloat16, where rms_norm makes float32 copies.
        square = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).square_().div_(width)
        return F.batch_norm(x[None], torch.zeros_like(square), square, eps=eps)[0]

    def __call__(self, x: Tensor) -> Tensor:
        if self._packed is not None:
            return torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        found = [F.linear(x, linear.weight, linear.bias) for linear in self._linears]
        return found[0] if len(found) == 1 else torch.cat(found, -1)

    def silu(self, x: Tensor) -> Tensor:
        """Return SiLU of the projection of ``x``."""
        if self._packed is not None:
            return torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "swish", [], "")
        return F.silu(self(x), inplace=True)

    def multiplied(self, x: Tensor, factor: Tensor) -> Tensor:
        """Return the projection of ``x`` times ``factor``, which may be overwritten."""
        if self._packed is not None and len(x) >= self.MANY:
            return torch.ops.mkldnn._linear_pointwise.binary(x, factor, self._packed, self._bias, "mul")
        return factor.mul_(self(x))

    def added_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """Return ``residual`` plus the projection of ``x``."""
        if self._packed is not None:
            return torch.ops.mkldnn._linear_pointwise.binary(x, residual, self._packed, self._bias, "add")
        return self(x).add_(residual)


def can_pack(weight: Tensor) -> bool:
    """Return True if oneDNN's prepacked matrix product (not a public function of torch) is there."""
    return (
        weight.device.type == "cpu"
        and platform.machine() in {"x86_64", "AMD64"}
        and torch.backends.mkldnn.is_available()
        and hasattr(torch.ops.mkldnn, "_reorder_linear_weight")
        and hasattr(torch.ops.mkldnn, "_linear_pointwise")
        and (
            weight.dtype == torch.float32
            or (weight.dtype == torch.bfloat16 and torch.ops.mkldnn._is_mkldnn_bf16_supported())
        )
    )


def _nbytes(model: nn.Module) -> int:
    return sum(parameter.nbytes for parameter in model.parameters())
