"""``python -m benchmarks.learning --fronts``: TextDQN and GRPO on judges of finished texts, at equal CPU seconds.

One agent learns and acts at several temperatures, each a point of reward and KL. GRPO runs once with each of nine
settings, for as many CPU seconds as the agent learned, and is measured after every eighth of them: three learning
rates, and as KL term none, 0.04, or the price of a nat that the agent is told. (GRPO divides rewards by their deviation
in a group, so the price is divided by the deviation of the language model's.) All its points count, though a user would
have to know beforehand which setting and which moment are the best.
"""

from __future__ import annotations

import itertools
import json
import time
from collections.abc import Mapping
from dataclasses import asdict
from typing import Any

import torch

from benchmarks import grpo
from benchmarks.suite import BETA, Cell, Suite
from textgen_env.files import read_json, write_file

ACTING = (0.05, 0.07, 0.1, 0.14, 0.2)
"""Temperatures of the agent, reward units a nat; it learns for ``BETA``."""

LEARNING_RATES = (1e-4, 3e-4, 1e-3)
"""Of GRPO. Higher ones leave the language model sooner than a price of KL can hold them."""

LOOKS = 8
"""Measurements of a run of GRPO."""

JUDGES = ("lexicon", "pairs", "characters", "sparse", "length")


def fronts(suite: Suite, cell: Cell, **settings: Any) -> dict[str, Any]:
    """Return the points of both on a cell of the suite, unless they are in its folder: from there then."""
    path = suite.folder / f"front-{cell.name}.json"
    if not path.is_file():
        agent, seconds = suite.learned(cell, settings)
        points = {}
        for agent.beta in ACTING:
            points[f"{agent.beta:g}"] = suite.measured(cell, agent)
        rivals = [
            {**chosen, "course": _rival(suite, cell, seconds["cpu_seconds"], **chosen)} for chosen in grid(suite, cell)
        ]
        write_file(path, json.dumps({**asdict(cell), **seconds, "text_dqn": points, "grpo": rivals}, indent=1) + "\n")
    found: dict[str, Any] = read_json(path, allow_nan=True)
    return found


def grid(suite: Suite, cell: Cell) -> list[dict[str, float]]:
    """Return the settings of GRPO."""
    stick = suite.yardstick(cell)
    price = BETA / float(stick.rewards(stick.judge(cell.judge)).std())
    return [
        {"learning_rate": rate, "kl_term": kl_term}
        for rate, kl_term in itertools.product(LEARNING_RATES, (*grpo.KL_TERMS, price))
    ]


def _rival(suite: Suite, cell: Cell, seconds: float, **chosen: float) -> list[dict[str, float]]:
    """Return the points of one run of GRPO."""
    stick = suite.yardstick(cell)
    judge = stick.judge(cell.judge)
    problem = grpo.Problem(
        cell.model,
        torch.float32,
        stick.train,
        cell.tokens,
        judge,
        lambda policy: suite.measured(cell, policy),
        clock=time.process_time,
    )
    due = [seconds * (look + 1) / LOOKS for look in range(LOOKS)]

    def is_due(step: int, now: float) -> bool:
        late = [at for at in due if at <= now]
        del due[: len(late)]
        return bool(late)

    return grpo.train(problem, cell.seed, 100_000, is_due, seconds=seconds, **chosen)


def summary(found: Mapping[str, Any]) -> dict[str, float]:
    """Return how the agent's point at ``BETA`` compares with the best points of GRPO."""
    own = found["text_dqn"][f"{BETA:g}"]
    points = [point for run in found["grpo"] for point in run["course"]]
    best = max(points, key=lambda point: point["share"])
    near = [point["reward"] for point in points if point["kl"] <= own["kl"]]
    return {
        "seconds": found["cpu_seconds"],
        **{key: own[key] for key in ("reward", "kl", "share")},
        "grpo_reward_within_as_many_nats": max(near, default=float("nan")),
        **{f"grpo_{key}": best[key] for key in ("reward", "kl", "share")},
        "grpo_highest_reward": max(point["reward"] for point in points),
    }


def run_fronts(suite: Suite, quick: bool, seeds: int, model: str) -> list[dict[str, Any]]:
    """Run what is not there yet, print a line for each judge and seed, and return all figures."""
    rows = []
    print(f"{'judge':12}{'seconds':>8}{'reward':>8}{'KL':>6}{'share':>7} | GRPO, the best of all settings and moments")
    for seed in range(1 if quick else seeds):
        for judge in JUDGES[: 2 if quick else None]:
            cell = Cell(judge, seed=seed, model=model, steps=8_000 if quick else 40_000)
            found = fronts(suite, cell, **({"learning_starts": 2_000} if quick else {}))
            line = summary(found)
            rows.append({**found, "summary": line})
            print(
                f"{judge:12}{line['seconds']:8.0f}{line['reward']:8.2f}{line['kl']:6.2f}{line['share']:7.0%} | "
                f"{line['grpo_reward_within_as_many_nats']:.2f} within as many nats, "
                f"{line['grpo_share']:.0%} ({line['grpo_reward']:.2f} at {line['grpo_kl']:.1f}), "
                f"highest reward {line['grpo_highest_reward']:.2f}",
                flush=True,
            )
    return rows
