"""The parts of a module, looked at once a step: has its owner changed or replaced any?

Noticed are writes through torch (each raises a tensor's counter), another tensor behind ``weight.data``, another
parameter, and another module in its place. Fused optimisers, ``weight.data.mul_`` and NumPy write without raising a
counter: they are noticed by two numbers of each tensor on the CPU. These leave no trace: a write that passes by all of
those numbers, a hook, another ``forward``, and a switch in plain Python, such as the ``disable_adapter`` of ``peft``.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from functools import partial
from itertools import chain
from operator import attrgetter, call
from typing import Any

import torch

_KINDS = ("_modules", "_parameters", "_buffers")
"""Attributes in which a torch module holds its parts."""

_writes = attrgetter("_version")

_INTEGERS = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
"""By the bytes of a number. Bits are compared: a number that is none differs from itself."""


class ModuleParts:
    """Submodules, parameters and stored buffers of a module, as they are now.

    They are kept, the memory behind weights too: an address that another tensor may get tells nothing. A buffer that
    ``state_dict`` leaves out is none of them, since models write such ones in their forward (frequencies of rope).
    """

    def __init__(self, module: torch.nn.Module) -> None:
        dicts = [(part, vars(part)[kind]) for part in module.modules() for kind in _KINDS]
        self._dicts = [found for part, found in dicts if found.keys() - part._non_persistent_buffers_set]
        self._found = list(chain.from_iterable(map(dict.values, self._dicts)))
        self._tensors = [found for found in self._found if isinstance(found, torch.Tensor)]
        self._counted = [tensor for tensor in self._tensors if not tensor.is_inference()]  # those have no counter
        self._memory = [tensor.detach() for tensor in self._tensors]
        self._looks = list(chain.from_iterable(map(_looks_at, self._memory)))
        self._seen = self._state()

    def have_changed(self) -> bool:
        """Return True if one was replaced or written to since: 0.12 ms for SmolLM2."""
        return self._state() != self._seen

    def _state(self) -> tuple[list[int], ...]:
        """Return which parts there are, where each tensor is, how often it was written to, and a few of its numbers."""
        found = chain.from_iterable(map(dict.values, self._dicts))
        places, writes = map(torch.Tensor.data_ptr, self._tensors), map(_writes, self._counted)
        return list(map(id, found)), list(places), list(writes), list(map(call, self._looks))


def _looks_at(tensor: torch.Tensor) -> Iterator[Callable[[], Any]]:
    """Yield functions that read two numbers of a tensor, as integers, where that costs next to nothing."""
    plain = type(tensor) is torch.Tensor and tensor.layout == torch.strided and not tensor.is_complex()
    if plain and tensor.device.type == "cpu" and tensor.itemsize in _INTEGERS:
        numbers = tensor.view(_INTEGERS[tensor.itemsize]).numpy()
        yield from (partial(numbers.item, third * tensor.numel() // 3) for third in (1, 2) if tensor.numel())
