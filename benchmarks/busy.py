"""What a busy machine costs: steps a second beside a process at full load on each core.

    python -m benchmarks.busy                  # tiny, 64 rows, about 2 minutes
    python -m benchmarks.busy --model smollm2

Each measurement is a process of its own, since OpenMP reads its settings when torch loads: once as OpenMP
comes (threads that wait spin), once with ``OMP_WAIT_POLICY=PASSIVE`` (they sleep) and once as our programs let
them wait (they sleep soon), each alone and beside the load. They take turns, and medians are shown.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from statistics import median

from textgen_env.models import device
from textgen_env.models.device import own_cores

ROOT = Path(__file__).resolve().parents[1]
WAITING: Mapping[str, Mapping[str, str]] = {
    "as OpenMP comes": {},
    "passive": {"OMP_WAIT_POLICY": "PASSIVE"},
    "as textgen waits": device.WAITING,
}
"""Ways of waiting: what each adds to an environment without settings of OpenMP."""
SETTINGS = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT", "KMP_BLOCKTIME")
TURNS = 3


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=4.0, help="of each measurement")
    parser.add_argument("--here", action="store_true", help="measure in this process, and print the figure as JSON")
    options = parser.parse_args(arguments)
    if options.here:
        print(json.dumps(steps_a_second(options.model, options.rows, options.seconds)))
        return
    found = measured(options.model, options.rows, options.seconds)
    print(f"{options.model}, {options.rows} rows; steps a second of make_vec, {own_cores()} cores")
    print(f"{'waiting threads':18} {'alone':>8} {'beside a load on each core':>28} {'times slower':>14}")
    for name in WAITING:
        alone, loaded = found[name, False], found[name, True]
        print(f"{name:18} {alone:8,.0f} {loaded:28,.0f} {alone / loaded:14.1f}")


def measured(model: str, rows: int, seconds: float) -> dict[tuple[str, bool], float]:
    """Return the median steps a second for each way of waiting, without and with the load."""
    found: dict[tuple[str, bool], list[float]] = {(name, busy): [] for name in WAITING for busy in (False, True)}
    for _ in range(TURNS):
        for busy in (False, True):
            for name, added in WAITING.items():
                with load(own_cores() if busy else 0):
                    found[name, busy].append(_in_a_process(added, model, rows, seconds))
    return {key: median(values) for key, values in found.items()}


@contextmanager
def load(processes: int) -> Iterator[None]:
    """Keep ``processes`` processes at full load within the context."""
    running = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(processes)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def _in_a_process(added: Mapping[str, str], model: str, rows: int, seconds: float) -> float:
    settings = {name: value for name, value in os.environ.items() if name not in SETTINGS} | dict(added)
    # By its path, not as a module of the package, which would set a way of waiting.
    command = [sys.executable, str(Path(__file__).resolve()), "--here", "--model", model]
    command += ["--rows", str(rows), "--seconds", str(seconds)]
    done = subprocess.run(command, env=settings, cwd=ROOT, capture_output=True, text=True, check=True)
    return float(json.loads(done.stdout))


def steps_a_second(model: str, rows: int, seconds: float) -> float:
    """Return how many steps ``make_vec`` makes in a second of the clock, all rows counted."""
    import gymnasium as gym
    import numpy as np

    env = gym.make_vec("textgen_env:TextGen-v0", num_envs=rows, model=model, max_new_tokens=20, min_new_tokens=20)
    env.reset(seed=0)
    rng, times = np.random.default_rng(0), []
    end = time.perf_counter() + seconds
    while time.perf_counter() < end or len(times) < 3:
        started = time.perf_counter()
        env.step(rng.integers(16, size=rows))
        times.append(time.perf_counter() - started)
    return rows * (len(times) - 1) / sum(times[1:])  # the first one warms up


if __name__ == "__main__":
    main()
