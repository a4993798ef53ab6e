"""The contract of single and vector environments."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode, VectorEnv

from textgen_env.conversation import PARTNER
from textgen_env.errors import ContractError, IllegalAction, ResetNeeded
from textgen_env.models.base import MASKED_LOGPROB
from textgen_env.testing.promise import promise


def check_env(env: gym.Env[Any, Any], seed: int = 0, episodes: int = 4) -> None:
    """Check a single environment: Gymnasium's rules, and the decision process of ``TextGenEnv``.

    Args:
        env: With a ``Dict`` observation that has at least ``action_mask``; its other keys of
            ``TextGenEnv`` are checked too. ``snapshot`` and ``restore`` are, where they exist.
        seed: Of the prompts and of the actions tried.
        episodes: How many texts to write, several times over.

    Raises:
        ContractError: a promise that does not hold.
    """
    env = env.unwrapped
    _repeated(lambda: _played(env, seed, episodes))
    _check_misuse(env, seed)
    if hasattr(env, "snapshot") and hasattr(env, "restore"):
        _check_snapshots(env, seed)


def _played(env: Any, seed: int, episodes: int) -> Iterator[Any]:
    """Yield every answer of some episodes with drawn actions, each checked on the way."""
    rng = np.random.default_rng(seed)
    for episode in range(episodes):
        observation, info = env.reset(seed=seed if episode == 0 else None)
        _check_observation(observation, env.observation_space, "reset")
        yield observation, info
        ended = False
        while not ended:
            action = int(rng.choice(np.flatnonzero(observation["action_mask"])))
            before = copy.deepcopy(observation)
            answer = env.step(action)
            observation, _, ended, _, _ = answer
            _check_answer(*answer)
            _check_observation(observation, env.observation_space, "step")
            _check_step(before, action, observation)
            yield answer


def _check_answer(_: Any, reward: Any, ended: Any, truncated: Any, info: Mapping[str, Any]) -> None:
    promise(isinstance(reward, float) and np.isfinite(reward), f"a reward must be a finite float, got {reward!r}")
    promise(
        isinstance(ended, bool) and truncated is False,
        "a text ends by terminated=True; truncated is left to limits from outside",
    )
    missing = {"text", "completion", "finish_reason"} - set(info)
    promise(not ended or not missing, f"the last info must have {', '.join(sorted(missing))}")


def _check_observation(observation: Any, space: gym.Space[Any], where: str) -> None:
    promise(isinstance(observation, Mapping), "check_env needs a Dict observation; make one with observation='full'")
    promise("action_mask" in observation, "the observation must have the key 'action_mask'")
    if not space.contains(observation):
        reason = _outside(observation, space)
        raise ContractError(f"the observation of {where} must be in the observation space: {reason}")
    mask = np.asarray(observation["action_mask"], bool)
    promise(mask.any(-1).all(), "the action mask must never be empty")
    if "logprobs" in observation and "candidates" in observation:
        for legal, logprobs in zip(np.atleast_2d(mask), np.atleast_2d(observation["logprobs"]), strict=True):
            promise((np.diff(logprobs[legal]) <= 0).all(), "legal candidates must be sorted by log-probability")
            promise((logprobs[~legal] <= MASKED_LOGPROB).all(), f"masked candidates must have {MASKED_LOGPROB} nats")


def _check_step(before: Mapping[str, Any], action: int, after: Mapping[str, Any]) -> None:
    """Check that the action's token was appended, and paid from the budget."""
    if "budget" in before:
        promise(after["budget"][0] < before["budget"][0], "every step must use up some of the budget")
    if {"tokens", "length"} <= set(before):
        length = int(before["length"][0])
        replied = int((after["speaker"][length:] == PARTNER).sum()) if "speaker" in after else 0
        longer = int(after["length"][0]) - replied == length + 1
        promise(longer, "a step must make the text one token longer, and by the partner's reply where it ends a turn")
        promise(
            np.array_equal(after["tokens"][:length], before["tokens"][:length]),
            "a step must leave the tokens before it as they are",
        )
        token = before["candidates"][action] if "candidates" in before else action
        promise(after["tokens"][length] == token, f"action {action} must append its candidate, token {token}")


def _check_misuse(env: Any, seed: int) -> None:
    observation, _ = env.reset(seed=seed)
    k = len(observation["action_mask"])
    _must_raise(lambda: env.step(k), IllegalAction, f"action {k} of {k} is out of range and must raise IllegalAction")
    ended = False
    while not ended:
        observation, _, ended, _, _ = env.step(int(np.argmax(observation["action_mask"])))
    _must_raise(lambda: env.step(0), ResetNeeded, "a step after the end must raise ResetNeeded")


def _check_snapshots(env: Any, seed: int) -> None:
    def rest(rng: np.random.Generator, observation: Any) -> list[Any]:
        answers, ended = [], False
        while not ended:
            action = int(rng.choice(np.flatnonzero(observation["action_mask"])))
            answers.append(env.step(action))
            observation, _, ended, _, _ = answers[-1]
        return answers

    observation, _ = env.reset(seed=seed)
    snapshot = env.snapshot()
    straight = rest(np.random.default_rng(seed), observation)
    for _ in range(2):
        back = env.restore(snapshot)
        promise(_same(back, observation), "restoring a snapshot must show the observation that it was taken at")
        rest(np.random.default_rng(seed + 1), back)
        again = rest(np.random.default_rng(seed), env.restore(snapshot))
        promise(_same(again, straight), "after restoring, the same actions must give the same answers")


def check_vector_env(
    env: VectorEnv[Any, Any, Any],
    single: Callable[[], gym.Env[Any, Any]] | None = None,
    seed: int = 0,
    steps: int = 40,
    tolerance: float = 1e-4,
) -> None:
    """Check a vector environment in ``SAME_STEP`` mode, with a ``Dict`` observation that has ``action_mask``.

    Args:
        single: Makes the single environment that each row is compared with.
        seed: Of the prompts (row i: seed + i) and of the actions tried.
        steps: Steps to try.
        tolerance: Largest difference of floats between a row and a single environment: 0 for an exact model.

    Raises:
        ContractError: a promise that does not hold.
    """
    mode = env.metadata.get("autoreset_mode")
    promise(mode == AutoresetMode.SAME_STEP, f"check_vector_env needs autoreset_mode SAME_STEP, got {mode!r}")
    first = _repeated(lambda: _played_rows(env, seed, steps))
    if single is not None:
        for row in range(env.num_envs):
            _check_row(first, single(), seed, row, tolerance)
    if hasattr(env, "fork"):
        _check_forks(env, seed, tolerance)


def _played_rows(env: Any, seed: int, steps: int) -> Iterator[Any]:
    """Yield (actions, answer) of the reset and of every step, each checked on the way."""
    rng = np.random.default_rng(seed)
    observation, infos = env.reset(seed=seed)
    yield None, (observation, infos)
    for _ in range(steps):
        _check_observation(observation, env.observation_space, "step")
        actions = _drawn(rng, observation)
        answer = env.step(actions)
        observation, rewards, terminated, truncated, infos = answer
        n = env.num_envs
        promise(
            rewards.shape == (n,) and rewards.dtype == np.float64 and np.isfinite(rewards).all(),
            f"rewards must be ({n},) finite float64, got {rewards.shape} {rewards.dtype}",
        )
        promise(
            terminated.dtype == np.bool_ and terminated.shape == (n,) and not truncated.any(),
            "a text ends by terminated=True; truncated is left to limits from outside",
        )
        if terminated.any():
            promise(
                "final_obs" in infos and "final_info" in infos,
                "infos must hold final_obs and final_info when a row has ended",
            )
        yield actions, answer


def _check_row(played: Sequence[Any], env: gym.Env[Any, Any], seed: int, row: int, tolerance: float) -> None:
    """Check that a row of a vector environment equals the single environment with its seed."""
    words = f"row {row} must be what a single environment with seed {seed + row} is"
    promise(_alike(env.reset(seed=seed + row)[0], _row(played[0][1][0], row), tolerance), words)
    for actions, (observation, rewards, terminated, _, infos) in played[1:]:
        seen, reward, ended, _, info = env.step(actions[row])
        promise(np.isclose(float(reward), rewards[row], atol=max(tolerance, 1e-9)), f"{words}: rewards differ")
        promise(ended == terminated[row], f"{words}: ends differ")
        if ended:
            promise(_alike(seen, infos["final_obs"][row], tolerance), f"{words}: final_obs differs")
            promise(
                info["completion"] == infos["final_info"]["completion"][row],
                f"{words}: the completions in final_info differ",
            )
            seen, _ = env.reset()
        promise(_alike(seen, _row(observation, row), tolerance), f"{words}: observations differ")


def _check_forks(env: Any, seed: int, tolerance: float) -> None:
    if env.num_envs < 2:
        return
    last = env.num_envs - 1
    for other in range(seed, seed + 100):  # until the two rows begin differently
        observation, _ = env.reset(seed=other)
        if not _alike(_row(observation, 0), _row(observation, last), 0.0):
            break
    observation = env.fork([0], [last])
    promise(_alike(_row(observation, 0), _row(observation, last), 0.0), "a forked row must show what its source shows")
    rng = np.random.default_rng(seed)
    for _ in range(3):
        actions = _drawn(rng, observation)
        actions[last] = actions[0]
        observation, rewards, terminated, _, _ = env.step(actions)
        promise(
            np.isclose(rewards[0], rewards[last], atol=max(tolerance, 1e-9)),
            "a forked row must earn what its source earns with the same actions",
        )
        if terminated[0]:
            return
        promise(
            _alike(_row(observation, 0), _row(observation, last), tolerance),
            "a forked row must go on as its source does with the same actions",
        )


# --- comparing


def _kept(answers: Iterator[Any]) -> list[Any]:
    """Return all answers, after checking that none of them has changed since it was given."""
    given, copies = [], []
    for answer in answers:
        given.append(answer)
        copies.append(copy.deepcopy(answer))
    promise(_same(given, copies), "what was returned must not change later: return fresh arrays")
    return given


def _repeated(play: Callable[[], Iterator[Any]]) -> list[Any]:
    """Return all answers of ``play``, after checking that a second time gives the same."""
    first = _kept(play())
    promise(_same(first, _kept(play())), "the same seed and actions must give the same answers, bit for bit")
    return first


def _drawn(rng: np.random.Generator, observation: Mapping[str, Any]) -> npt.NDArray[np.int64]:
    mask = np.asarray(observation["action_mask"], bool)
    return np.argmax(rng.random(mask.shape) * mask, axis=-1)


def _row(observation: Mapping[str, Any], row: int) -> dict[str, Any]:
    return {key: value[row] for key, value in observation.items()}


def _alike(one: Mapping[str, Any], other: Mapping[str, Any], tolerance: float) -> bool:
    return set(one) == set(other) and all(
        np.allclose(one[key], other[key], atol=tolerance * max(1.0, float(np.abs(other[key]).max()))) for key in one
    )


def _same(one: Any, other: Any) -> bool:
    """Return True if two answers are equal, arrays bit for bit."""
    if isinstance(one, Mapping):
        return isinstance(other, Mapping) and one.keys() == other.keys() and all(_same(one[k], other[k]) for k in one)
    if isinstance(one, np.ndarray) and one.dtype != object:
        return isinstance(other, np.ndarray) and one.dtype == other.dtype and np.array_equal(one, other)
    if isinstance(one, list | tuple | np.ndarray):
        return type(one) is type(other) and len(one) == len(other) and all(map(_same, one, other))
    return bool(one == other)


def _outside(observation: Mapping[str, Any], space: gym.Space[Any]) -> str:
    if not isinstance(space, gym.spaces.Dict):
        return f"that is {space}"
    if set(observation) != set(space.spaces):
        return f"its keys are {sorted(observation)}, those of the space {sorted(space.spaces)}"
    wrong = [key for key, part in space.spaces.items() if not part.contains(observation[key])]
    return f"{wrong[0]!r} is {observation[wrong[0]]!r}, the space is {space[wrong[0]]}"


def _must_raise(call: Callable[[], Any], error: type[Exception], words: str) -> None:
    try:
        call()
    except error:
        return
    raise ContractError(words)
