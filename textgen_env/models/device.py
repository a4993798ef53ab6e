"""Where, on how many cores and in which precision a model runs: all device code in one place.

Precision follows flags of the hardware, never a stopwatch, so that the same machine always
chooses the same one and results stay reproducible.
"""

from __future__ import annotations

import ctypes
import gc
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from functools import cache
from typing import TYPE_CHECKING, Any
from weakref import WeakKeyDictionary

import numpy as np
import psutil
from threadpoolctl import ThreadpoolController

from textgen_env.config import DTYPES, check_one_of

if TYPE_CHECKING:
    import torch

NARROW = 256  # hidden units

WAITING = {"OMP_WAIT_POLICY": "PASSIVE", "GOMP_SPINCOUNT": "1000"}
"""How OpenMP's threads wait in our programs. GNU's reads the second: turns of a loop, some 100 a microsecond."""

KEPT = {"ONEDNN_PRIMITIVE_CACHE_CAPACITY": "64", "LRU_CACHE_CAPACITY": "64"}
"""How many programs for products oneDNN keeps, and torch above it: a forward has about five for each number of rows."""

GARBAGE = 50_000
"""Objects that are made before Python looks for unreachable ones."""

_locks: WeakKeyDictionary[torch.nn.Module, threading.RLock] = WeakKeyDictionary()
_making_locks = threading.Lock()


def forward_lock(model: torch.nn.Module) -> threading.RLock:
    """Return the lock under which ``model`` runs, the same for everybody who shares it.

    Hooks on a shared module hand one thread's hidden states to another, so forwards take turns.
    """
    with _making_locks:
        return _locks.setdefault(model, threading.RLock())


def compute_alone_after_fork() -> None:
    """Let processes that are forked from this one compute with one thread.

    A fork copies the locks of torch's thread pool but not its threads, so a product on several
    threads would wait for ever. On one thread it needs no pool.
    """
    import torch

    os.register_at_fork(after_in_child=lambda: torch.set_num_threads(1))


def prepare_process() -> None:
    """Set up torch's libraries for a process of our own, before torch loads: it reads ``WAITING`` and ``KEPT`` then.

    As OpenMP comes its waiting threads spin for milliseconds, which takes the cores from whoever would end the
    wait: on a busy machine two threads are several times slower for it. Threads that sleep at once must be
    woken for every small operation, which takes longer than the operation. oneDNN keeps a program for each of the
    last 1,024 shapes of a product, which with many rows is each number of rows several times: 600 MB. Python looks for
    unreachable objects each time that 700 more have been made, which to import torch and transformers is a tenth of the
    time, and as much of many small steps.

    What the user has set stays. A library leaves its host alone, so this is for the beginning of a program.
    """
    for settings in (WAITING, KEPT):
        if not os.environ.keys() & settings.keys():
            os.environ.update(settings)
    first, second, third = gc.get_threshold()
    if 0 < first < GARBAGE:
        gc.set_threshold(GARBAGE, second, third)


@cache
def numpy_blas() -> Sequence[Any]:
    """Return the controllers of the OpenBLAS that NumPy multiplies with, none if it has another library."""
    build: Any = np.show_config(mode="dicts")
    if "openblas" not in str(build["Build Dependencies"]["blas"].get("name")):
        return ()
    return tuple(ThreadpoolController().select(internal_api="openblas").lib_controllers)


@contextmanager
def one_blas_thread() -> Iterator[None]:
    """Let NumPy's products use one thread within the context."""
    above = [(library, found) for library in numpy_blas() if (found := library.get_num_threads()) > 1]
    for library, _ in above:
        library.set_num_threads(1)
    try:
        yield
    finally:
        for library, found in above:
            library.set_num_threads(found)


def release_freed_memory() -> None:
    """Give freed memory back to the system, where the C library has a call for that (GNU's)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if os.name == "posix" else None
    if trim is not None:
        trim(0)


def own_cores() -> int:
    """Return how many cores this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1  # not on macOS


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
    """Return the dtype named ``requested``; for "auto" or None, a fast one for ``device``.

    Automatic is bfloat16 where the hardware multiplies it (a CPU with AVX512-BF16 or AMX, or a CUDA
    device that reports it), else float32: a CPU without such instructions emulates bfloat16, several
    times slower. On any CPU a model of a known ``width`` (hidden units) of at most ``NARROW`` runs in
    float32: its matrix products are too small for bfloat16 to gain much, and a single row can use
    ``textgen_env.models.one_row``.

    Raises:
        ConfigError: ``requested`` is not in ``DTYPES``.
    """
    import torch

    requested = requested or "auto"
    check_one_of("dtype", requested, DTYPES)
    if requested != "auto":
        chosen: torch.dtype = getattr(torch, requested)
        return chosen
    return torch.bfloat16 if _multiplies_bf16(device or pick_device(), width) else torch.float32


def _multiplies_bf16(device: torch.device, width: int | None) -> bool:
    import torch

    if device.type == "cuda":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    supported = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return device.type == "cpu" and supported and (width is None or width > NARROW)


def available_bytes(device: torch.device) -> int:
    """Return how many bytes an allocation on ``device`` may take now."""
    import torch

    if device.type == "cuda":
        return int(torch.cuda.mem_get_info(device)[0])
    return int(psutil.virtual_memory().available)
