"""Where, on how many cores and in which precision a model runs: all device code in one place.

Precision follows flags of the hardware, never a stopwatch, so that the same machine always
chooses the same one and results stay reproducible.
"""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import psutil

from textgen_env.errors import ConfigError

if TYPE_CHECKING:
    import torch

DTYPES = ("auto", "float32", "bfloat16", "float16")
NARROW = 256  # hidden units


def own_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0))


def pick_device() -> torch.device:
    """Return CUDA where there is some, else MPS, else the CPU."""
    import torch

    if torch.cuda.is_available():
        return torch.device("cuda")
    if torch.backends.mps.is_available():
        return torch.device("mps")
    return torch.device("cpu")


def pick_dtype(
    requested: str | None = "auto", device: torch.device | None = None, width: int | None = None
) -> torch.dtype:
    """Return the dtype named ``requested``; for "auto" or None, the one that is fast on ``device``.

    Automatic is bfloat16 where the hardware multiplies it (a CPU with AVX512-BF16 or AMX, a CUDA
    device that says so), else float32. On a CPU without such instructions bfloat16 is emulated,
    several times slower than float32. On any CPU a model whose hidden states have a known ``width``
    of at most ``NARROW`` runs in float32: its matrix products are too small for bfloat16 to gain
    much, and a single row takes the way of ``textgen_env.models.one_row``.

    Raises:
        ConfigError: ``requested`` is none of ``DTYPES``.
    """
    import torch

    if requested not in (None, *DTYPES):
        raise ConfigError(f"dtype must be one of {', '.join(DTYPES)}, got {requested!r}")
    if requested not in (None, "auto"):
        chosen: torch.dtype = getattr(torch, requested)
        return chosen
    device = device or pick_device()
    if device.type == "cuda":
        multiplies_bf16 = torch.cuda.is_bf16_supported(including_emulation=False)
    elif device.type == "cpu":
        supported = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
        multiplies_bf16 = supported and (width is None or width > NARROW)
    else:
        multiplies_bf16 = False
    return torch.bfloat16 if multiplies_bf16 else torch.float32


def available_bytes(device: torch.device) -> int:
    """Return how many bytes an allocation on ``device`` may take now."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
