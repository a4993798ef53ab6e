"""A lean forward for Llama and its near relatives."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from textgen_env.models.cache import CacheShape, KeyValues
from textgen_env.models.device import forward_lock, one_blas_thread
from textgen_env.models.one_row import OneRow
from textgen_env.models.packing import AttentionGroup, PackedDecoder, RaggedBatch
from textgen_env.models.projections import ACTIVATIONS, ColumnProjection, Projection, RMSNorm, best_projection

FAMILY = {
    *("LlamaForCausalLM", "MistralForCausalLM", "MinistralForCausalLM", "SeedOssForCausalLM", "CwmForCausalLM"),
    *("Qwen2ForCausalLM", "Qwen3ForCausalLM", "GemmaForCausalLM", "Gemma2ForCausalLM", "Gemma3ForCausalLM"),
}
CAPPED = {"Gemma2ForCausalLM"}  # Gemma 3 has the setting for scores, and does not heed it
ROPES = {"default", "linear", "llama3", "yarn"}


class LlamaDecoder(PackedDecoder):
    """Llama, Mistral, Qwen and Gemma with fused projections, in the layout that this machine multiplies fastest.

    See ``textgen_env.models.projections``. The module itself stays as it is, unless ``relayout`` allows to
    lay its weights out anew in memory, where it keeps its values and goes on working.

    Beside Llama's parts there may be norms of queries and keys (Qwen 3, Gemma 3), norms of what a block adds,
    scaled embeddings, rotations by the kind of layer and soft caps (Gemma 2 and 3).
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
        self._embed, self._embed_scale = embed, getattr(body.embed_tokens, "embed_scale", None)
        self._layers = [_LlamaLayer(config, layer, kind, relayout) for layer in body.layers]
        self._norm = RMSNorm.of(body.norm)
        self._head = kind([model.lm_head])
        self._head_cap = getattr(config, "final_logit_softcapping", None)
        self._rotary = body.rotary_emb
        self._turns = {layer.rotation: (torch.empty(0), torch.empty(0)) for layer in self._layers}  # cos, sin
        attention = body.layers[0].self_attn
        size = attention.head_dim
        self._heads = attention.k_proj.out_features // size
        self._groups = attention.q_proj.out_features // size // self._heads
        self._scale = attention.scaling
        self._score_cap = getattr(config, "attn_logit_softcapping", None)
        self._one_row = self._for_one_row(model)
        self.alone = self._one_row is not None
        self.shape = CacheShape(config.num_hidden_layers, self._heads, size, size, embed.dtype, embed.device)

    def _for_one_row(self, model: Any) -> OneRow | None:
        """Return the decoder of a lone row, on this one's own products where those are NumPy's."""
        if not OneRow.fits(model) or not (self._in_numpy or OneRow.is_small(model)):
            return None
        layers, head = self._layers, self._head
        if not self._in_numpy:
            layers = [
                _LlamaLayer(model.config, layer, ColumnProjection, relayout=False) for layer in model.model.layers
            ]
            head = ColumnProjection([model.lm_head])
        products: Any = [(x.qkv, x.out, x.gate, x.up, x.down) for x in layers]
        return OneRow(model, products, head)  # type: ignore[arg-type]

    @staticmethod
    def fits(model: Any) -> bool:
        """Return True if this class implements every part of ``model``."""
        if type(model).__name__ not in FAMILY:
            return False
        config = model.config
        linears = [m for name, m in model.named_modules() if name.endswith(("_proj", "lm_head"))]
        return (
            _activation(config) in ACTIVATIONS
            and all(_turns_whole_heads(rope) for rope in _ropes(config).values())
            and (type(model).__name__ in CAPPED or getattr(config, "attn_logit_softcapping", None) is None)
            and all(type(m) is nn.Linear for m in linears)
            and not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
        )

    def __call__(self, batch: RaggedBatch, cache: KeyValues) -> tuple[Tensor, Tensor]:
        with one_blas_thread():
            return self._forward(batch, cache)

    def _forward(self, batch: RaggedBatch, cache: KeyValues) -> tuple[Tensor, Tensor]:
        turns = self._rotations(batch.positions, cache.reach)
        if self._one_row is not None and not batch.groups:
            where = int(batch.ids), int(batch.rows), int(batch.positions)
            cos, sin = turns[None]
            found = self._one_row(*where, (cos[0], sin[0]), cache.keys, cache.values)
            return torch.from_numpy(found[0])[None], torch.from_numpy(found[1])[None]
        groups = [self._attention(group) for group in batch.groups]
        x = F.embedding(batch.ids, self._embed)  # (N, d)
        if self._embed_scale is not None:
            x *= self._embed_scale.to(x.dtype)
        heads, size = self._heads, self.shape.key_size
        turned = heads * (self._groups + 1)
        for layer, keys, values in zip(self._layers, cache.keys, cache.values, strict=True):
            qkv = layer.qkv(layer.qkv.normed(x)).view(len(x), turned + heads, size)
            qk = qkv[:, :turned]
            if layer.turned_norm is not None:
                weight, eps = layer.turned_norm
                qk = F.rms_norm(qk, (size,), None, eps) * weight
            cos, sin = turns[layer.rotation]
            qk = torch.addcmul(qk * cos, qk.roll(size // 2, -1), sin)  # (N, Hq + Hk, D)
            keys[batch.rows, :, batch.positions] = qk[:, -heads:]
            values[batch.rows, :, batch.positions] = qkv[:, turned:]
            query = qk[:, :-heads].view(len(x), heads, self._groups, size)
            mixed = torch.empty_like(query)
            for attend in groups:
                mixed = attend(query, keys, values, mixed)
            x = layer.attended(x, mixed.reshape(len(x), -1))
            x = layer.mlp(x)
        if batch.last is not None:
            x = x[batch.last]
        hidden = self._norm(x)
        logits = self._head(hidden)
        return logits if self._head_cap is None else capped(logits, self._head_cap), hidden

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
        cap = self._score_cap
        fused = b * heads <= self.FUSED_HEADS and mask.dtype != torch.float32 and cap is None

        def attend(query: Tensor, keys: Tensor, values: Tensor, mixed: Tensor) -> Tensor:
            if places is not None:
                query = query[places].transpose(1, 2).reshape(b, heads, q * folded, size)
            if rows is not None:
                keys, values = keys[rows], values[rows]
            if fused:
                found = F.scaled_dot_product_attention(query, keys, values, mask, scale=self._scale)
            else:
                scores = query @ keys.transpose(-1, -2)
                if cap is not None:
                    scores = capped(scores, cap / self._scale)
                scores = torch.add(mask, scores, alpha=self._scale)
                found = torch.softmax(scores, -1) @ values  # (b, H, q G, D)
            if places is None:
                return found
            found = found.view(b, heads, q, folded, size).transpose(1, 2)
            mixed[written] = found if kept is None else found[kept]
            return mixed

        return attend

    def _rotations(self, positions: Tensor, length: int) -> dict[str | None, tuple[Tensor, Tensor]]:
        """Return the model's own rotary factors by kind of layer, (N, 1, D) each, the half-turn's sign in the sine."""
        for kind, (cos, _) in self._turns.items():
            if len(cos) < length:
                every = torch.arange(length, device=positions.device)[None]
                cos, sin = self._rotary(self._embed[:1], every, *([] if kind is None else [kind]))
                half = sin.shape[-1] // 2
                turned = torch.cat([-sin[0, :, None, :half], sin[0, :, None, half:]], -1)
                self._turns[kind] = cos[0, :, None].contiguous(), turned
        return {kind: (cos[positions], sin[positions]) for kind, (cos, sin) in self._turns.items()}


class _LlamaLayer:
    """The parts of a layer, by the names of transformers.

    x + (norm of) out(attention(norm of x))  ->  x + (norm of) down(activation(gate(norm of x)) * up(norm of x))
    """

    def __init__(self, config: Any, layer: Any, kind: type[Projection], relayout: bool) -> None:
        attention, mlp = layer.self_attn, layer.mlp
        self.rotation: str | None = None if None in _ropes(config) else attention.layer_type
        self.turned_norm = _turned_norm(attention)
        self.out_norm = self.down_norm = None
        before = layer.post_attention_layernorm  # in Llama's words; in Gemma's it is behind the attention
        if hasattr(layer, "pre_feedforward_layernorm"):
            self.out_norm, self.down_norm = RMSNorm.of(before), RMSNorm.of(layer.post_feedforward_layernorm)
            before = layer.pre_feedforward_layernorm
        first, second = RMSNorm.of(layer.input_layernorm), RMSNorm.of(before)
        self.qkv = kind([attention.q_proj, attention.k_proj, attention.v_proj], first, relayout)
        self.out = kind([attention.o_proj], relayout=relayout)
        self.gate = kind([mlp.gate_proj], second, relayout)
        self.up = kind([mlp.up_proj], second, relayout)
        self.down = kind([mlp.down_proj], relayout=relayout)
        self._activation = ACTIVATIONS[_activation(config)]

    def attended(self, x: Tensor, mixed: Tensor) -> Tensor:
        """Return ``x`` plus the attention block's output, of the mixed values."""
        return _added_to(x, self.out, mixed, self.out_norm)

    def mlp(self, x: Tensor) -> Tensor:
        """Return ``x`` plus the feed-forward block's output."""
        normed = self.gate.normed(x)  # as ``up`` wants it too
        gated = self.up.multiplied(normed, self.gate.activated(normed, self._activation))
        return _added_to(x, self.down, gated, self.down_norm)


def _added_to(residual: Tensor, projection: Projection, x: Tensor, norm: RMSNorm | None) -> Tensor:
    return projection.added_to(residual, x) if norm is None else norm(projection(x)).add_(residual)


def capped(x: Tensor, cap: float) -> Tensor:
    """Return ``x`` within -cap and cap, smoothly."""
    return (x / cap).tanh_().mul_(cap)


def _activation(config: Any) -> str:
    """Return the name of the feed-forward block's activation: Gemma has a word of its own for it."""
    return str(getattr(config, "hidden_activation", None) or config.hidden_act)


def _ropes(config: Any) -> dict[str | None, dict[str, Any]]:
    """Return the settings of rotations by kind of layer; None stands for every kind."""
    rope = getattr(config, "rope_parameters", None) or {}
    return rope if any(isinstance(settings, dict) for settings in rope.values()) else {None: rope}


def _turns_whole_heads(rope: dict[str, Any]) -> bool:
    return rope.get("rope_type", "default") in ROPES and rope.get("partial_rotary_factor", 1.0) == 1.0


def _turned_norm(attention: Any) -> tuple[Tensor, float] | None:
    """Return the weights (Hq + Hk, D) and epsilon of the norms of queries and keys, None without such norms."""
    if not hasattr(attention, "q_norm"):
        return None
    norms = [RMSNorm.of(norm) for norm in (attention.q_norm, attention.k_norm)]
    heads = [linear.out_features // attention.head_dim for linear in (attention.q_proj, attention.k_proj)]
    weights = [norm.weight.expand(count, -1) for norm, count in zip(norms, heads, strict=True)]
    return torch.cat(weights).to(attention.q_proj.weight.dtype), norms[0].eps
