"""The matrix products of a decoder: three ways to hold the same linear layers.

Most of a step is products of a few rows with large weights, and libraries differ by a factor of two there.

    Projection         the module's own weights, by ``F.linear``: everywhere
    PackedProjection   a copy in oneDNN's blocked layout, which oneDNN would otherwise produce again in every call
    ColumnProjection   weights laid out (inputs, outputs), by NumPy's OpenBLAS: float32 on CPUs with AVX2 alone

Which one a model gets follows flags of the machine, never a stopwatch: results stay reproducible.
"""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from textgen_env.models.device import available_bytes, numpy_blas
from textgen_env.models.products import Float32s, multiply


@dataclass(frozen=True)
class RMSNorm:
    """x / sqrt(mean(x^2) + eps) * weight, over the last axis."""

    weight: Tensor  # (d,)
    eps: float

    @classmethod
    def of(cls, module: Any) -> RMSNorm:
        """Return what a module computes: Gemma's stores its weight less one, Llama's the weight."""
        if hasattr(module, "variance_epsilon"):
            return cls(module.weight.detach(), module.variance_epsilon)
        return cls(1 + module.weight.detach().float(), module.eps)

    def __call__(self, x: Tensor) -> Tensor:
        return F.rms_norm(x.to(self.weight.dtype), (x.shape[-1],), self.weight, self.eps).to(x.dtype)


@dataclass(frozen=True)
class Activation:
    """A function of each number."""

    apply: Callable[[Tensor], Tensor]
    onednn: tuple[str, str]  # name and algorithm of the operation behind oneDNN's product


ACTIVATIONS = {
    "silu": Activation(partial(F.silu, inplace=True), ("swish", "")),
    "gelu_pytorch_tanh": Activation(partial(F.gelu, approximate="tanh"), ("gelu", "tanh")),
}
"""By the names of transformers."""


class Projection:
    """Linear layers that read the same input, as one: (N, d) -> (N, sum of outputs).

    Args:
        linears: The layers.
        norm: The norm before them, if there is one.
        relayout: The weights may be laid out anew: the module keeps its values and goes on working.
    """

    def __init__(self, linears: Sequence[nn.Linear], norm: RMSNorm | None = None, relayout: bool = False) -> None:
        self._linears: Sequence[nn.Linear] = linears
        self._norm: Any = norm

    def normed(self, x: Tensor) -> Tensor:
        """Return ``x`` as the layers read it: its root mean square 1, times the norm's weight unless that is folded."""
        return self._norm(x)

    def __call__(self, x: Tensor) -> Tensor:
        found = [F.linear(x, linear.weight, linear.bias) for linear in self._linears]
        return found[0] if len(found) == 1 else torch.cat(found, -1)

    def activated(self, x: Tensor, activation: Activation) -> Tensor:
        """Return the activation of the projection of ``x``."""
        return activation.apply(self(x))

    def multiplied(self, x: Tensor, factor: Tensor) -> Tensor:
        """Return the projection of ``x`` times ``factor``, which may be overwritten."""
        return factor.mul_(self(x))

    def added_to(self, residual: Tensor, x: Tensor) -> Tensor:
        """Return ``residual`` plus the projection of ``x``."""
        return self(x).add_(residual)


class PackedProjection(Projection):
    """Weights packed once for oneDNN: 1.3 to 2.5 times as fast as ``F.linear`` on CPUs with AVX512 or AMX.

    oneDNN also does the operation that follows the product (activation, gate, residual sum), before the
    result is rounded: a pass over memory less. The weight of the norm before the layers is folded in.
    """

    MANY = 64  # rows from which multiplying within oneDNN is the faster way

    def __init__(self, linears: Sequence[nn.Linear], norm: RMSNorm | None = None, relayout: bool = False) -> None:
        self._norm: Any = norm
        weight = torch.cat([linear.weight for linear in linears])
        if norm is not None:
            weight = (weight.float() * norm.weight.float()).to(weight.dtype)
        self._bias = joined_bias(linears)
        self._packed: Tensor = torch.ops.mkldnn._reorder_linear_weight(weight)

    def normed(self, x: Tensor) -> Tensor:
        width, eps = x.shape[-1], self._norm.eps
        if x.dtype == torch.float32:
            return F.rms_norm(x, (width,), None, eps)
        # Batch norm with rows as channels: one pass in bfloat16, where rms_norm makes float32 copies.
        square = torch.linalg.vector_norm(x, dim=-1, dtype=torch.float32).square_().div_(width)
        return F.batch_norm(x[None], torch.zeros_like(square), square, eps=eps)[0]

    def __call__(self, x: Tensor) -> Tensor:
        found: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, "none", [], "")
        return found

    def activated(self, x: Tensor, activation: Activation) -> Tensor:
        name, algorithm = activation.onednn
        found: Tensor = torch.ops.mkldnn._linear_pointwise(x, self._packed, self._bias, name, [], algorithm)
        return found

    def multiplied(self, x: Tensor, factor: Tensor) -> Tensor:
        return self._then(x, factor, "mul") if len(x) >= self.MANY else super().multiplied(x, factor)

    def added_to(self, residual: Tensor, x: Tensor) -> Tensor:
        return self._then(x, residual, "add")

    def _then(self, x: Tensor, other: Tensor, operation: str) -> Tensor:
        found: Tensor = torch.ops.mkldnn._linear_pointwise.binary(x, other, self._packed, self._bias, operation)
        return found


class ColumnProjection(Projection):
    """Weights laid out (inputs, outputs), multiplied by NumPy: float32 on the CPU.

    With one thread of an AVX2 machine, all layers of SmolLM2 take 50 / 140 / 335 / 1,114 ms for 1 / 16 / 64 / 256
    rows, 82 / 263 / 547 / 1,330 by ``F.linear`` and 98 / 193 / 368 / 1,176 packed. With ``relayout`` nothing is copied:
    the weights of the layers become views of the new layout.
    """

    def __init__(self, linears: Sequence[nn.Linear], norm: RMSNorm | None = None, relayout: bool = False) -> None:
        weights = [linear.weight.detach() for linear in linears]
        weights = weights if relayout else [torch.cat(weights)]
        columns = [weight.t().contiguous() for weight in weights]  # (d, outputs)
        self._eps = 0.0 if norm is None else norm.eps
        self._scale: Float32s | None = None
        if relayout:
            for linear, own in zip(linears, columns, strict=True):
                linear.weight.data = own.t()
            self._scale = None if norm is None else norm.weight.numpy()
        elif norm is not None:
            columns[0] *= norm.weight[:, None]
        bias = joined_bias(linears)
        self._columns: list[Float32s] = [own.numpy() for own in columns]
        self._outputs = sum(own.shape[1] for own in columns)
        self._bias: Float32s | None = None if bias is None else bias.detach().numpy()

    def normed(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.scaled(x.numpy()))

    def scaled(self, x: Float32s) -> Float32s:
        """Return ``x``, (N, d) or (d,), as ``normed`` does."""
        if x.ndim == 1:
            found = x * np.float32((float(x @ x) / len(x) + self._eps) ** -0.5)
        else:
            found = x * ((np.einsum("nd,nd->n", x, x) / x.shape[-1] + self._eps) ** -0.5)[:, None]
        if self._scale is not None:
            found *= self._scale
        return found

    def product(self, x: Float32s) -> Float32s:
        """Return the projection of ``x``, (N, d) or (d,)."""
        found = np.empty((*x.shape[:-1], self._outputs), np.float32)
        begin = 0
        for columns in self._columns:
            end = begin + columns.shape[1]
            multiply(x, columns, found[..., begin:end])
            begin = end
        if self._bias is not None:
            found += self._bias
        return found

    def __call__(self, x: Tensor) -> Tensor:
        return torch.from_numpy(self.product(x.numpy()))

    def added_to(self, residual: Tensor, x: Tensor) -> Tensor:
        found = self.product(x.numpy())
        found += residual.numpy()
        return torch.from_numpy(found)


def joined_bias(linears: Sequence[nn.Linear]) -> Tensor | None:
    """Return the biases of layers, of which all or none have one, as one."""
    biases: list[Tensor] = [linear.bias for linear in linears if linear.bias is not None]
    return torch.cat(biases) if biases else None


def best_projection(model: nn.Module, weight: Tensor, relayout: bool = False) -> type[Projection]:
    """Return the fastest kind of projection for ``model``, of whose weights ``weight`` is one.

    A kind that copies the weights is only taken while they take less than half of the free memory.
    """
    nbytes = sum(parameter.nbytes for parameter in model.parameters())
    fits = 2 * nbytes < available_bytes(weight.device)
    if prefers_columns(weight) and (relayout or fits):
        return ColumnProjection
    return PackedProjection if can_pack(weight) and fits else Projection


def prefers_columns(weight: Tensor) -> bool:
    """Return True if NumPy's products are the fastest: float32, AVX2 and nothing wider, and OpenBLAS in NumPy."""
    return takes_columns(weight) and torch.backends.cpu.get_cpu_capability() == "AVX2" and bool(numpy_blas())


def takes_columns(weight: Tensor) -> bool:
    """Return True if NumPy can multiply by ``weight``: float32 on the CPU."""
    return weight.device.type == "cpu" and weight.dtype == torch.float32


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
