"""The parts of a module, looked at once a step: has its owner changed or replaced any?

Noticed are writes through torch (each raises a tensor's counter), another tensor behind ``weight.data``, another
parameter, and another module in its place. These leave no trace: a write in place through ``weight.data`` or NumPy,
a hook, another ``forward``, and a switch in plain Python, such as the ``disable_adapter`` of ``peft``.
"""

from __future__ import annotations

from itertools import chain
from operator import attrgetter

import torch

_KINDS = ("_modules", "_parameters", "_buffers")
"""Attributes in which a torch module holds its parts."""

_writes = attrgetter("_version")


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
        self._seen = self._state()

    def have_changed(self) -> bool:
        """Return True if one was replaced or written to since. No look at the numbers: 0.1 ms for SmolLM2."""
        return self._state() != self._seen

    def _state(self) -> tuple[list[int], ...]:
        """Return which parts there are, where each tensor is, and how often it has been written to."""
        found = chain.from_iterable(map(dict.values, self._dicts))
        return list(map(id, found)), list(map(torch.Tensor.data_ptr, self._tensors)), list(map(_writes, self._counted))
