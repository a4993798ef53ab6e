"""The contract, as functions that anybody's language model, reward or environment can run.

    check_language_model(model)      check_reward(reward)
    check_env(env)                   check_vector_env(vec, single)

Each plays with its object for a moment and returns nothing if every promise holds; otherwise it
raises ``ContractError``, which says which promise broke and on what. Errors of the object itself
come through as they are. They are meant for a test:

    def test_my_reward_keeps_the_contract():
        check_reward(MyReward())
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import gymnasium as gym
import numpy as np
import numpy.typing as npt
from gymnasium.vector import AutoresetMode, VectorEnv

from textgen_env.errors import ContractError, IllegalAction, ResetNeeded
from textgen_env.models.base import MASKED_LOGPROB, LanguageModel, Proposals, Slots
from textgen_env.rewards import Generation, Reward, make_reward

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


def promise(kept: Any, what: str) -> None:
    """Raise ``ContractError`` unless ``kept``."""
    if not kept:
        raise ContractError(what)


# --- language models


def check_language_model(
    model: LanguageModel, prompts: Sequence[str] = ("The", "It was a"), k: int = 2, tolerance: float = 1e-4
) -> None:
    """Check what an environment relies on in a language model and its slots.

    Args:
        model: Left as it was; slots of a few rows are opened on it.
        prompts: At least two texts that the model can encode, of different lengths if possible.
        k: Candidates to ask for, fewer than the vocabulary.
        tolerance: How far logarithms of probabilities and hidden units may be apart between ways of
            computing the same thing: 0 for an exact model.

    Raises:
        ContractError: a promise of ``textgen_env.models.base`` that does not hold.
    """
    promise(len(prompts) >= 2, "check_language_model needs at least two prompts")
    encoded = [model.encode(prompt) for prompt in prompts]
    _check_vocabulary(model, encoded)
    checks = (_check_proposals, _check_whole_vocabulary, _check_blocked_ends, _check_rows, _check_copies)
    for check in checks:
        check(model, encoded, k, tolerance)


def _check_vocabulary(model: LanguageModel, encoded: Sequence[Sequence[int]]) -> None:
    vocab = model.vocab_size
    promise(all(encoded), "a prompt must have at least one token")
    promise(
        all(0 <= i < vocab for ids in (*encoded, model.end_ids) for i in ids),
        f"token ids and end_ids must be in 0..{vocab - 1}, the vocabulary",
    )
    ids = np.array([[encoded[0][0]] * 2])
    vectors = model.embed(ids)
    promise(
        vectors.shape == (1, 2, model.embedding_size) and vectors.dtype == np.float32,
        f"embed must answer (..., embedding_size={model.embedding_size}) float32, got {vectors.shape} {vectors.dtype}",
    )
    promise(np.isfinite(vectors).all(), "embeddings must be finite")
    prompt, new = list(encoded[0]), list(encoded[1])
    together = model.continuations(prompt, new[:-1], new[-1:] * 2)
    promise(
        together == model.continuations(prompt, new[:-1], new[-1:]) * 2 and all(isinstance(t, str) for t in together),
        "continuations must answer one string a candidate, whatever the other candidates are",
    )


def _check_proposals(model: LanguageModel, encoded: Sequence[Sequence[int]], k: int, tolerance: float) -> None:
    slots = _started(model, encoded, k)
    rows, free = np.arange(len(encoded)), np.zeros(len(encoded), np.bool_)
    found = slots.propose(rows, free)
    b = len(encoded)
    for name, array, shape, dtype in (
        ("candidates", found.candidates, (b, k), np.int32),
        ("logprobs", found.logprobs, (b, k), np.float32),
        ("hidden", found.hidden, (b, model.hidden_size), np.float32),
    ):
        promise(
            array.shape == shape and array.dtype == dtype,
            f"{name} must be {shape} {np.dtype(dtype)}, got {array.shape} {array.dtype}",
        )
    promise(np.isfinite(found.hidden).all(), "hidden states must be finite")
    promise(
        (found.logprobs >= MASKED_LOGPROB).all() and (found.logprobs <= 1e-6).all(),
        f"log-probabilities must be in [{MASKED_LOGPROB}, 0] nats",
    )
    promise((np.exp(found.logprobs).sum(-1) <= 1 + 1e-4).all(), "probabilities must not sum to more than 1")
    _check_order(found)
    promise(all(len(set(ids)) == k for ids in found.candidates.tolist()), "a candidate must not be listed twice")
    before = copy.deepcopy(found)
    for array in (found.candidates, found.logprobs, found.hidden):
        if array.flags.writeable:
            array[...] = 0
    again = slots.propose(rows, free)
    promise(_equal(before, again), "proposing again must answer the same, in arrays that nobody else writes to")
    promise(
        _equal(before, _started(model, encoded, k).propose(rows, free)),
        "the same texts in new slots must get the same proposals, bit for bit",
    )


def _check_order(found: Proposals) -> None:
    for ids, logprobs in zip(found.candidates.tolist(), found.logprobs.tolist(), strict=True):
        order = sorted(range(len(ids)), key=lambda i: (-logprobs[i], ids[i]))
        promise(
            order == list(range(len(ids))),
            f"candidates must be sorted by log-probability, ties by smaller id; got {ids[:5]} with {logprobs[:5]}",
        )


def _check_whole_vocabulary(model: LanguageModel, encoded: Sequence[Sequence[int]], k: int, tolerance: float) -> None:
    rows, free = np.arange(len(encoded)), np.zeros(len(encoded), np.bool_)
    whole = _started(model, encoded, None).propose(rows, free)
    promise(
        (whole.candidates == np.arange(model.vocab_size)).all(),
        "with k=None candidate i must be token id i",
    )
    total = np.exp(whole.logprobs.astype(np.float64)).sum(-1)
    promise(np.allclose(total, 1, atol=1e-3), f"probabilities over the vocabulary must sum to 1, got {total.tolist()}")
    some = _started(model, encoded, k).propose(rows, free)
    best = -np.sort(-whole.logprobs, axis=-1)[:, :k]
    promise(
        np.allclose(some.logprobs, best, atol=tolerance)
        and np.allclose(np.take_along_axis(whole.logprobs, some.candidates, -1), best, atol=tolerance),
        "k candidates must be the k likeliest of the vocabulary, normalised over all of it",
    )


def _check_blocked_ends(model: LanguageModel, encoded: Sequence[Sequence[int]], k: int, tolerance: float) -> None:
    if not model.end_ids:
        return
    rows = np.arange(len(encoded))
    blocked = np.arange(len(encoded)) == 0
    whole = _started(model, encoded, None).propose(rows, blocked)
    promise(
        (whole.logprobs[0, list(model.end_ids)] <= MASKED_LOGPROB).all(),
        "an end token must not be proposed where block_end says so",
    )
    total = np.exp(whole.logprobs.astype(np.float64)).sum(-1)
    promise(np.allclose(total, 1, atol=1e-3), "the rest must be normalised without the end tokens that are blocked")
    free = _started(model, encoded, None).propose(rows, np.zeros_like(blocked))
    promise(
        np.allclose(whole.logprobs[1:], free.logprobs[1:], atol=tolerance),
        "blocking the end in one row must not change another row",
    )


def _check_rows(model: LanguageModel, encoded: Sequence[Sequence[int]], k: int, tolerance: float) -> None:
    rows, free = np.arange(len(encoded)), np.zeros(len(encoded), np.bool_)
    slots = _started(model, encoded, k)
    together = slots.propose(rows, free)
    for row, ids in enumerate(encoded):
        alone = _started(model, [ids], k).propose(np.zeros(1, np.int64), free[:1])
        promise(
            _close(alone, _part(together, [row]), tolerance),
            f"a row must not depend on its neighbours: row {row} alone and in a batch differ",
        )
    backwards = slots.propose(rows[::-1], free)
    promise(
        _close(backwards, _part(together, rows[::-1]), tolerance),
        "proposals must come in the order of the rows that were asked for",
    )
    slots.rebuild()
    promise(_close(slots.propose(rows, free), together, tolerance), "rebuilding must keep every row's text")
    token = together.candidates[:, 0].astype(np.int64)
    slots.advance(rows, token)
    longer = _started(model, [[*ids, int(t)] for ids, t in zip(encoded, token, strict=True)], k)
    promise(
        _close(slots.propose(rows, free), longer.propose(rows, free), tolerance),
        "advancing by a token must equal starting with the longer text",
    )


def _check_copies(model: LanguageModel, encoded: Sequence[Sequence[int]], k: int, tolerance: float) -> None:
    first, last, free = np.array([0]), np.array([len(encoded) - 1]), np.zeros(1, np.bool_)
    slots = _started(model, encoded, k)
    here = slots.propose(first, free)
    saved = slots.save(0)
    slots.fork(first, last)
    promise(_close(slots.propose(last, free), here, tolerance), "a forked row must propose what its source does")
    slots.advance(last, here.candidates[:, -1].astype(np.int64))
    moved = slots.propose(last, free)
    promise(_close(slots.propose(first, free), here, tolerance), "a fork that goes on must leave its source alone")
    slots.load(int(last[0]), saved)
    promise(_close(slots.propose(last, free), here, tolerance), "a saved row must come back as it was saved")
    slots.advance(last, here.candidates[:, -1].astype(np.int64))
    promise(_close(slots.propose(last, free), moved, tolerance), "a row that was loaded must go on as the original did")
    slots.load(int(last[0]), saved)
    promise(_close(slots.propose(last, free), here, tolerance), "what was saved must not change with the row")


def _started(model: LanguageModel, encoded: Sequence[Sequence[int]], k: int | None) -> Slots:
    slots = model.slots(len(encoded), max(map(len, encoded)) + 4, k)
    slots.start(np.arange(len(encoded)), encoded)
    return slots


def _part(found: Proposals, rows: Any) -> Proposals:
    return Proposals(found.candidates[rows], found.logprobs[rows], found.hidden[rows])


def _equal(one: Proposals, other: Proposals) -> bool:
    return all(
        np.array_equal(getattr(one, name), getattr(other, name)) for name in ("candidates", "logprobs", "hidden")
    )


def _close(one: Proposals, other: Proposals, tolerance: float) -> bool:
    """Near ties may swap places: a token that both list must be about as likely in both."""
    for a, b, p, q in zip(one.candidates, other.candidates, one.logprobs, other.logprobs, strict=True):
        _, here, there = np.intersect1d(a, b, return_indices=True)
        if not here.size or not np.allclose(p[here], q[there], atol=tolerance) or not np.allclose(p, q, atol=tolerance):
            return False
    scale = max(1.0, float(np.abs(other.hidden).max()))
    return bool(np.allclose(one.hidden, other.hidden, atol=tolerance * scale))


# --- rewards


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
    given = copy.deepcopy(list(generations))
    together = reward.scored(generations).total
    promise(list(generations) == given, "a reward must leave the generations, their metadata included, as they are")
    apart = [reward.scored([generation]).total[0] for generation in generations]
    promise(np.allclose(together, apart, atol=1e-5), "a text must be worth the same alone and in a batch")
    order = np.random.default_rng(0).permutation(len(generations))
    shuffled = reward.scored([generations[i] for i in order]).total
    promise(np.allclose(shuffled, together[order], atol=1e-5), "permuting a batch must permute its rewards")
    promise(
        np.array_equal(reward.scored(generations).total, together), "the same batch must get the same rewards again"
    )
    promise(reward.scored([]).total.shape == (0,), "a batch of no texts must get no rewards")
    if reward.running() is not None:
        for generation, worth in zip(generations, together, strict=True):
            _check_running(reward, generation, None if partial else float(worth))


def _check_running(reward: Reward, generation: Generation, worth: float | None) -> None:
    running = reward.running()
    if running is None:
        raise ContractError("running() must answer a running score always, or never")
    text = generation.completion
    start = running.start(generation.prompt, generation.reference, generation.metadata)
    empty = start.value
    promise(np.isfinite(empty), "the running score of the empty completion must be finite")
    state, cuts = start, sorted({*range(0, len(text), 3), len(text)})
    for cut in cuts:
        ahead = running.lookahead(state, [text[:cut], text])
        promise(
            ahead.shape == (2,) and ahead.dtype == np.float32,
            f"lookahead must answer one float32 a completion, got {ahead.shape} {ahead.dtype}",
        )
        whole, before = running.extend(state, text), state.value
        state_after = running.extend(state, text[:cut])
        promise(
            np.allclose(ahead, [state_after.value, whole.value], atol=1e-5),
            f"lookahead must answer the values of extend; it does not for {text[:cut]!r}",
        )
        promise(state.value == before, "extend must leave the state that it is given as it is")
        state = state_after
    at_once = running.extend(start, text)
    promise(start.value == empty, "extend must leave the state that it is given as it is")
    promise(
        np.isclose(state.value, at_once.value, atol=1e-6),
        f"the running score must not depend on the steps in which {text!r} was written",
    )
    if worth is not None:
        promise(
            np.isclose(state.value, worth, atol=1e-6),
            f"the running score of all of {text!r} must be its reward {worth}, got {state.value}; "
            "give partial=True if it is only meant to cover a part of it",
        )


# --- environments


def check_env(env: gym.Env[Any, Any], seed: int = 0, episodes: int = 4) -> None:
    """Check a single environment: what Gymnasium asks, and the decision process of ``TextGenEnv``.

    Args:
        env: With a ``Dict`` observation that has at least ``action_mask``; whatever else it has of
            ``TextGenEnv``'s keys is checked too. ``snapshot`` and ``restore`` are, where they exist.
        seed: Of the prompts and of the actions tried.
        episodes: How many texts to write, several times over.

    Raises:
        ContractError: a promise that does not hold.
    """
    env = env.unwrapped
    first = _kept(_played(env, seed, episodes))
    promise(
        _same(first, _kept(_played(env, seed, episodes))),
        "the same seed and actions must give the same answers, bit for bit",
    )
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
            observation, reward, ended, truncated, info = answer
            promise(
                isinstance(reward, float) and np.isfinite(reward), f"a reward must be a finite float, got {reward!r}"
            )
            promise(
                isinstance(ended, bool) and truncated is False,
                "a text ends by terminated=True; truncated is left to limits from outside",
            )
            _check_observation(observation, env.observation_space, "step")
            _check_step(before, action, observation)
            if ended:
                missing = {"text", "completion", "finish_reason"} - set(info)
                promise(not missing, f"the last info must have {', '.join(sorted(missing))}")
            yield answer


def _check_observation(observation: Any, space: gym.Space[Any], where: str) -> None:
    promise(isinstance(observation, Mapping), "check_env needs a Dict observation; make one with observation='full'")
    promise("action_mask" in observation, "the observation must have the key 'action_mask'")
    if not space.contains(observation):
        what = _outside(observation, space)
        raise ContractError(f"the observation of {where} must be in the observation space: {what}")
    mask = np.asarray(observation["action_mask"], bool)
    promise(mask.any(-1).all(), "the action mask must never be empty")
    if "logprobs" in observation and "candidates" in observation:
        for legal, logprobs in zip(np.atleast_2d(mask), np.atleast_2d(observation["logprobs"]), strict=True):
            promise((np.diff(logprobs[legal]) <= 0).all(), "legal candidates must be sorted by log-probability")
            promise((logprobs[~legal] <= MASKED_LOGPROB).all(), f"masked candidates must have {MASKED_LOGPROB} nats")


def _check_step(before: Mapping[str, Any], action: int, after: Mapping[str, Any]) -> None:
    """Check that one token was appended, the one that the action stands for, and paid from the budget."""
    if "budget" in before:
        promise(after["budget"][0] < before["budget"][0], "every step must use up some of the budget")
    if {"tokens", "length"} <= set(before):
        length = int(before["length"][0])
        promise(int(after["length"][0]) == length + 1, "a step must make the text one token longer")
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
    """Check a vector environment in ``SAME_STEP`` mode.

    Args:
        env: With a ``Dict`` observation that has at least ``action_mask``.
        single: Makes the single environment of one row, which every row is then compared with.
        seed: Of the prompts (row i: seed + i) and of the actions tried.
        steps: How many.
        tolerance: How far floats of a row and of a single environment may be apart: 0 for an exact model.

    Raises:
        ContractError: a promise that does not hold.
    """
    mode = env.metadata.get("autoreset_mode")
    promise(mode == AutoresetMode.SAME_STEP, f"check_vector_env needs autoreset_mode SAME_STEP, got {mode!r}")
    first = _kept(_played_rows(env, seed, steps))
    promise(
        _same(first, _kept(_played_rows(env, seed, steps))),
        "the same seed and actions must give the same answers, bit for bit",
    )
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
    """Check that a row of a vector environment is what the single environment with its seed is."""
    what = f"row {row} must be what a single environment with seed {seed + row} is"
    promise(_alike(env.reset(seed=seed + row)[0], _row(played[0][1][0], row), tolerance), what)
    for actions, (observation, rewards, terminated, _, infos) in played[1:]:
        seen, reward, ended, _, info = env.step(actions[row])
        promise(np.isclose(float(reward), rewards[row], atol=max(tolerance, 1e-9)), f"{what}: rewards differ")
        promise(ended == terminated[row], f"{what}: ends differ")
        if ended:
            promise(_alike(seen, infos["final_obs"][row], tolerance), f"{what}: final_obs differs")
            promise(
                info["completion"] == infos["final_info"]["completion"][row],
                f"{what}: the completions in final_info differ",
            )
            seen, _ = env.reset()
        promise(_alike(seen, _row(observation, row), tolerance), f"{what}: observations differ")


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
    """Return whether two answers are equal, arrays bit for bit."""
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


def _must_raise(call: Callable[[], Any], error: type[Exception], what: str) -> None:
    try:
        call()
    except error:
        return
    raise ContractError(what)
