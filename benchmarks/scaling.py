"""What goes from actors to the learner, and how fast: the measured half of docs/scaling.md.

    python -m benchmarks.scaling --seconds 20 --rounds 3

One process with two threads and two single-thread Ray actors collect in turn, with the same model
and environments, so that both see the same machine; then the learner updates on what was sent.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from collections.abc import Callable

import numpy as np
import torch
from stable_baselines3.common.logger import Logger

from agents.distributed.actors import Collector, RayTextSource, store_bound
from agents.distributed.connection import import_ray
from agents.runs.config import RunConfig
from agents.runs.run import open_run
from agents.text_dqn.agent import TextDQN


def steps_a_second(collect: Callable[[], int], seconds: float) -> float:
    """Return steps a second of ``collect``, which returns steps, over at least so many seconds."""
    started, steps = time.perf_counter(), 0
    while time.perf_counter() - started < seconds:
        steps += collect()
    return steps / (time.perf_counter() - started)


def measure(config: RunConfig, seconds: float, rounds: int) -> dict[str, float]:
    """Return all figures, by name."""
    run = open_run(config)
    agent = run.agent
    assert isinstance(agent, TextDQN)
    agent.set_logger(Logger(None, []))
    weights = {name: tensor.numpy() for name, tensor in agent.learner.slow_network.state_dict().items()}
    alone = Collector()
    alone.open(config, {}, 0)
    sent: list[int] = []

    def one_process() -> int:
        return int(alone.collect(0, weights, 0.0).lengths.sum())

    one, two = [], []
    with RayTextSource(2)(run, print) as pool:

        def two_actors() -> int:
            found = None
            while found is None:
                found = pool.collect(agent.learner, agent.logger, 0.0, sys.maxsize)
            agent.learner.put(found.steps, found.lengths, found.counted)
            sent.extend([sum(array.nbytes for array in found.steps.values()), found.counted])
            return found.counted

        while pool.writing < 2:
            two_actors()
        for _ in range(rounds):
            two.append(steps_a_second(two_actors, seconds))
            for request in pool.pending:  # what is under way ends first: it would take cores from the other
                import_ray().wait([request])
            torch.set_num_threads(2)
            one_process()
            one.append(steps_a_second(one_process, seconds))
    bytes_a_step = sum(sent[::2]) / sum(sent[1::2])
    updates = steps_a_second(lambda: agent.fit(20).size, seconds)
    return {
        "one process, two threads: steps/s": float(np.median(one)),
        "two actors: steps/s": float(np.median(two)),
        "two actors / one process": float(np.median(np.array(two) / np.array(one))),
        "bytes a step": bytes_a_step,
        "bytes a second": bytes_a_step * float(np.median(two)),
        "updates/s": updates,
        "steps/s that those updates pay for": updates * agent.learner.steps_per_update,
        "bytes of the head": float(sum(array.nbytes for array in weights.values())),
        "most bytes in the object store": float(store_bound(run, 2)),
    }


def main() -> None:
    """Measure, and print JSON."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="tiny")
    parser.add_argument("--seconds", type=float, default=20.0, help="of each measurement")
    parser.add_argument("--rounds", type=int, default=3)
    given = parser.parse_args()
    print(json.dumps(measure(RunConfig(model=given.model), given.seconds, given.rounds), indent=2))


if __name__ == "__main__":
    main()
