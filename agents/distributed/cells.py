"""The cells of a benchmark on a Ray cluster, each as one task of Ray."""

from __future__ import annotations

import platform
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from agents.benchmark.cells import CellResult, run_cell
from agents.benchmark.config import BenchmarkConfig, Cell
from agents.distributed.actors import POLL
from agents.distributed.connection import SMALLEST_STORE, check_versions, connected, versions


@dataclass(frozen=True)
class RayCellRunner:
    """Runs each cell of a benchmark as a Ray task; an ``agents.benchmark.grid.CellRunner``.

    Args:
        address, timeout: As of ``agents.distributed.actors.RayTextSource``.
        workers: Cells at a time on a cluster. None: one for each core that it has by then.
    """

    address: str | None = None
    workers: int | None = None
    timeout: float = 20.0

    def __call__(
        self,
        config: BenchmarkConfig,
        cells: Sequence[Cell],
        workers: int,
        started: Callable[[Cell], None] = lambda cell: None,
    ) -> Iterator[CellResult]:
        """Yield the result of each cell as it comes.

        A cell whose process or node dies is run again twice, then it is a failed one.

        Args:
            workers: Cells at a time where Ray starts in this process.
            started: Called with each cell that is handed to Ray.
        """
        with connected(self.address, workers, self.timeout, SMALLEST_STORE) as ray:
            run = ray.remote(num_cpus=1, max_retries=2)(_run_cell)
            queue, running = list(reversed(cells)), dict[Any, Cell]()
            while queue or running:
                cores = workers if self.address is None else int(ray.cluster_resources().get("CPU", 0))
                while queue and len(running) < max(1, self.workers or cores):
                    cell = queue.pop()
                    running[run.remote(config, cell, versions())] = cell
                    started(cell)
                for request in ray.wait(list(running), num_returns=1, timeout=POLL)[0]:
                    cell = running.pop(request)
                    try:
                        yield ray.get(request)
                    except ray.exceptions.RayTaskError as error:
                        raise (error.cause or error) from error  # other versions; a cell's own errors are results
                    except ray.exceptions.RayError as error:
                        yield CellResult(cell, "failed", f"the process of this run died: {type(error).__name__}")


def _run_cell(config: BenchmarkConfig, cell: Cell, ours: Mapping[str, str]) -> CellResult:
    check_versions(versions(), ours, f"node {platform.node()}")
    torch.set_num_threads(1)
    return run_cell(config, cell)
