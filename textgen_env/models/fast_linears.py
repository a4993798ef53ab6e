"""The linear layers of somebody else's module, multiplied as this machine does it fastest, while our forward runs.

Most of a step is products with large weights, whatever the architecture: a module's own forward with these layers
replaced is 1.4 to 1.7 times as fast on CPUs with AVX512 (see docs/engine.md).
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from torch._dynamo import OptimizedModule
from transformers.pytorch_utils import Conv1D

from textgen_env.models.device import one_blas_thread
from textgen_env.models.projections import Projection, best_projection

LEAST = {torch.float32: 1 << 17, torch.bfloat16: 1 << 14}
"""Numbers in a weight from which a layer is replaced: a smaller product is over before another one has begun."""


class FastLinears:
    """The linear layers of ``model`` that have nothing of their own: no hooks, no other forward, no other class.

    Weights are copied when a layer is first called, so what text never reaches costs no memory. A module that its owner
    has compiled is left alone: a layer that comes and goes would be compiled anew each time.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers: list[tuple[Any, _FastLinear]] = []
        if any(isinstance(module, OptimizedModule) or module._compiled_call_impl for module in model.modules()):
            return
        layers: list[Any] = [module for module in model.modules() if _is_plain(module)]
        weights = {layer.weight.dtype: layer.weight for layer in layers}  # one of each dtype
        kinds = {dtype: best_projection(model, weight) for dtype, weight in weights.items()}
        pairs = [(layer, kinds[layer.weight.dtype]) for layer in layers]
        self._layers = [(layer, _FastLinear(layer, kind)) for layer, kind in pairs if kind is not Projection]

    @contextmanager
    def in_place(self) -> Iterator[None]:
        """Let the module's forward use them; for its owner nothing has changed afterwards."""
        if not torch.is_autocast_enabled("cpu"):  # which chooses precisions itself
            for module, fast in self._layers:
                vars(module).setdefault("forward", fast)  # its owner may have set one since, or another thread ours
        try:
            with one_blas_thread():
                yield
        finally:
            for module, fast in self._layers:
                if vars(module).get("forward") is fast:
                    vars(module).pop("forward", None)


class _FastLinear:
    """The forward of one layer."""

    def __init__(self, module: Any, kind: type[Projection]) -> None:
        self._module, self._kind, self._dtype = module, kind, module.weight.dtype
        self._projection: Projection | None = None

    def __call__(self, x: Tensor) -> Tensor:
        if x.dtype != self._dtype or not x.numel():
            own: Tensor = type(self._module).forward(self._module, x)
            return own
        if self._projection is None:
            self._projection = self._kind([_as_linear(self._module)])
        found = self._projection(x.reshape(-1, x.shape[-1]))
        return found.view(*x.shape[:-1], found.shape[-1])


def _is_plain(module: Any) -> bool:
    """Return True for a large linear layer with nothing of its own."""
    if type(module) not in (nn.Linear, Conv1D) or module.weight.numel() < LEAST.get(module.weight.dtype, math.inf):
        return False
    return not (module._forward_hooks or module._forward_pre_hooks or "forward" in vars(module))


def _as_linear(module: Any) -> Any:
    """Return weight (outputs, inputs) and bias; GPT-2's ``Conv1D`` keeps its weight the other way round."""
    weight = module.weight.detach()
    bias = None if module.bias is None else module.bias.detach()
    return SimpleNamespace(weight=weight.t() if isinstance(module, Conv1D) else weight, bias=bias)
