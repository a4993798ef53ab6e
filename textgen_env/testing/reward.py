"""The contract of rewards and their running scores."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import numpy.typing as npt

from textgen_env.errors import ContractError
from textgen_env.rewards import Generation, Reward, RunningScore, ScoreState, make_reward
from textgen_env.testing.promise import promise

TEXTS = (
    "",
    " ",
    "The cat sat on the mat, and the cat sat on the hat.",
    "VERY good, but not great!!! 💘",
    '{"a": [1, 2]}',
    "naïve café Straße\nline two",
    "and so I go\nto see the cat\nthat wore a hat",
)
"""Completions that rewards are tried on unless others are given."""

GENERATIONS = tuple(
    Generation(
        prompt=f"Roses are {n}\n",
        completion=text,
        ids=tuple(range(1, 1 + len(text.split()))),
        logprobs=(-0.5 - n,) * len(text.split()),
        reference="the cat is not bad",
        metadata={"keywords": ["cat", "hat"]},
    )
    for n, text in enumerate(TEXTS)
)


def check_reward(reward: Any, generations: Sequence[Generation] = GENERATIONS, partial: bool = False) -> None:
    """Check a reward, and its running score where it has one.

    Args:
        reward: Anything that ``textgen_env.make_reward`` takes.
        generations: Finished texts that it can score.
        partial: The running score covers only a part of the reward (a potential, some parts of a mix),
            so that the two may differ at the end.

    Raises:
        ContractError: a promise of ``textgen_env.rewards`` that does not hold.
        RewardError: the reward raised, or answered something other than finite numbers.
    """
    reward = make_reward(reward)
    together = _check_batches(reward, list(generations))
    if reward.running() is not None:
        for generation, value in zip(generations, together, strict=True):
            _check_running(reward, generation, None if partial else float(value))


def _check_batches(reward: Reward, generations: list[Generation]) -> npt.NDArray[np.float64]:
    """Check that a batch changes no reward; return the rewards, (B,)."""
    given = copy.deepcopy(generations)
    together = reward.scored(generations).total
    promise(generations == given, "a reward must leave the generations, their metadata included, as they are")
    apart = [reward.scored([generation]).total[0] for generation in generations]
    promise(np.allclose(together, apart, atol=1e-5), "a text must be worth the same alone and in a batch")
    order = np.random.default_rng(0).permutation(len(generations))
    shuffled = reward.scored([generations[i] for i in order]).total
    promise(np.allclose(shuffled, together[order], atol=1e-5), "permuting a batch must permute its rewards")
    promise(
        np.array_equal(reward.scored(generations).total, together), "the same batch must get the same rewards again"
    )
    promise(reward.scored([]).total.shape == (0,), "a batch of no texts must get no rewards")
    return together


def _check_running(reward: Reward, generation: Generation, total: float | None) -> None:
    running = reward.running()
    if running is None:
        raise ContractError("running() must answer a running score always, or never")
    text = generation.completion
    start = running.start(generation.prompt, generation.reference, generation.metadata)
    empty = start.value
    promise(np.isfinite(empty), "the running score of the empty completion must be finite")
    state = start
    for cut in sorted({*range(0, len(text), 3), len(text)}):
        state = _extended(running, state, text[:cut], text)
    at_once = running.extend(start, text)
    promise(start.value == empty, "extend must leave the state that it is given as it is")
    promise(
        np.isclose(state.value, at_once.value, atol=1e-6),
        f"the running score must not depend on the steps in which {text!r} was written",
    )
    promise(
        total is None or np.isclose(state.value, total, atol=1e-6),
        f"the running score of all of {text!r} must be its reward {total}, got {state.value}; "
        "give partial=True if it is only meant to cover a part of it",
    )


def _extended(running: RunningScore[Any], state: ScoreState, text: str, whole: str) -> ScoreState:
    """Return the state after ``text``, once lookahead and extend agree on it and on the ``whole`` text."""
    ahead = running.lookahead(state, [text, whole])
    promise(
        ahead.shape == (2,) and ahead.dtype == np.float32,
        f"lookahead must answer one float32 a completion, got {ahead.shape} {ahead.dtype}",
    )
    at_end, before = running.extend(state, whole), state.value
    after: ScoreState = running.extend(state, text)
    promise(
        np.allclose(ahead, [after.value, at_end.value], atol=1e-5),
        f"lookahead must answer the values of extend; it does not for {text!r}",
    )
    promise(state.value == before, "extend must leave the state that it is given as it is")
    return after
