"""A product of NumPy on as many threads as torch has: each takes some of the output columns.

OpenBLAS has threads of its own, which yield in a loop while they wait for each other. Beside other processes a
product then takes more than ten times as long. Threads that sleep on a queue cost nothing there.

    x (N, d) @ columns (d, o)  ->  out (N, o), columns cut into one part a thread
"""

from __future__ import annotations

import os
import threading
from functools import cache
from queue import SimpleQueue
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

Float32s = npt.NDArray[np.float32]
Job = tuple[Float32s, Float32s, Float32s, "SimpleQueue[None]"]

LEAST_WORK = 1 << 19
"""Numbers of weights, or a fortieth of the multiplications, below which a product is not worth a second thread."""

ALIGNED = 16
"""Columns: parts begin at multiples of it."""


def multiply(x: Float32s, columns: Float32s, out: Float32s) -> None:
    """Write ``x @ columns`` for ``x`` (N, d) or (d,) into ``out``. The same threads give the same bits."""
    rows = 1 if x.ndim == 1 else len(x)
    parts = torch.get_num_threads()
    if parts == 1 or max(columns.size, rows * columns.size // 40) < LEAST_WORK:
        np.matmul(x, columns, out=out)
        return
    edges = np.linspace(0, columns.shape[1] // ALIGNED, parts + 1).astype(int) * ALIGNED
    edges[-1] = columns.shape[1]
    done: SimpleQueue[None] = SimpleQueue()
    for begin, end in zip(edges[1:-1].tolist(), edges[2:].tolist(), strict=True):
        _jobs(os.getpid()).put((x, columns[:, begin:end], out[..., begin:end], done))
    np.matmul(x, columns[:, : edges[1]], out=out[..., : edges[1]])
    for _ in range(parts - 1):
        done.get()


@cache
def _jobs(process: int) -> SimpleQueue[Job]:
    """Return the queue of this process's threads: a forked one has none of its parent's."""
    jobs: SimpleQueue[Job] = SimpleQueue()
    for number in range(max(1, torch.get_num_threads() - 1)):
        threading.Thread(target=_work, args=(jobs,), name=f"products-{number}", daemon=True).start()
    return jobs


def _work(jobs: SimpleQueue[Any]) -> None:
    while True:
        x, columns, out, done = jobs.get()
        try:
            np.matmul(x, columns, out=out)
        finally:
            done.put(None)
