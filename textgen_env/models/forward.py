"""One forward of a Hugging Face module, of which each row's last token is kept."""

from __future__ import annotations

import inspect
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from textgen_env.models.device import forward_lock
from textgen_env.models.fast_linears import FastLinears

MOST_OFFSET = 8
"""Rows of a table of positions beside those of positions, for padding."""


class Forward:
    """A module's own forward in eval mode, up to the output layer for all tokens, through it for the last ones only.

    A hook before the output embedding keeps each row's last token, so that the model's own logit scaling and soft
    caps apply, and gives ``hidden``. A model that does not call its output embedding on (B, T, d) has no such place:
    there all logits are computed, and ``hidden`` is the last of its hidden states.
    """

    def __init__(self, model: Any) -> None:
        self.model = model
        self.lock = forward_lock(model)
        self.accepts = frozenset(inspect.signature(model.forward).parameters)
        self._modules = list(model.modules())
        self._linears = FastLinears(model)
        self._head_is_called = True

    def may_misplace(self, argument: str) -> bool:
        """Return True if rows of different lengths may get wrong positions, and a check would take that for rounding.

        So it is in half precision with positions from a table, unless the module takes them under ``argument``.
        """
        if self.model.dtype in (torch.float32, torch.float64) or argument in self.accepts:
            return False
        known = getattr(self.model.config.get_text_config(decoder=True), "max_position_embeddings", None) or 0
        tables = (module for module in self._modules if isinstance(module, nn.Embedding))
        return any(0 < known <= table.num_embeddings <= known + MOST_OFFSET for table in tables)

    def __call__(self, inputs: Mapping[str, Any], pick: Tensor | None = None) -> tuple[Tensor, Tensor, Any]:
        """Return logits (B, V) and hidden (B, d) of the last tokens, and the model's whole output.

        Args:
            inputs: Of the module's forward, (B, T) ids among them.
            pick: (B',) rows to keep; None for all.
        """
        kept: list[Tensor] = []

        def keep_last(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
            if args[0].dim() != 3:
                return args  # not (B, T, d): other streams are predicted too
            hidden = args[0][:, -1:]
            kept.append(hidden if pick is None else hidden[pick])
            return (kept[-1],)

        head = self.model.get_output_embeddings() if self._head_is_called else None
        hook = nullcontext() if head is None else head.register_forward_pre_hook(keep_last)
        with self.running(), hook:
            found = self.model(**inputs, **({} if head is not None else {"output_hidden_states": True}))
        if kept:
            return found.logits[:, -1], kept[-1][:, -1], found
        if head is not None:
            self._head_is_called = False
            if any(inputs.get(name) is not None for name in CACHE_NAMES):
                raise TypeError("the output embedding is called for some inputs and not for others")
            return self(inputs, pick)
        states = found.decoder_hidden_states if "decoder_input_ids" in inputs else found.hidden_states
        logits, hidden = found.logits[:, -1], states[-1][:, -1]
        return (logits, hidden, found) if pick is None else (logits[pick], hidden[pick], found)

    @contextmanager
    def running(self) -> Iterator[None]:
        """Let the module, or a part of it, run as here, without dropout and with fast products."""
        with without_dropout(self._modules), self._linears.in_place():
            yield


@contextmanager
def without_dropout(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Run modules as after ``eval()``, and put those back that their owner trains: no dropout here, none less there."""
    training = [module for module in modules if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


CACHE_NAMES = ("past_key_values", "cache_params", "state", "past_buckets_states", "mems")
"""Names under which models take and return what they keep of earlier tokens."""


def no_cache(model: Any) -> dict[str, Any]:
    """Return the arguments with which a model's forward keeps nothing."""
    return {"use_cache": False} if "use_cache" in inspect.signature(model.forward).parameters else {}
