"""The replay against the transitions that went in."""

from __future__ import annotations

import numpy as np
import pytest
from gymnasium import spaces

from agents.text_dqn.portable import read_replay, write_replay
from agents.text_dqn.replay import Acted, EpisodeReplay
from textgen_env.errors import CapacityError, ConfigError

K, D = 3, 4
NO = np.array([False])  # for every row


def acted(action: int) -> Acted:
    """A single row takes an action for certain."""
    return Acted(np.array([action]), np.zeros(1), NO, 0.0)


SPACE = spaces.Dict(
    {
        "hidden": spaces.Box(-1, 1, (D,), np.float32),
        "candidates": spaces.Box(0, 99, (K,), np.int32),
        "logprobs": spaces.Box(-1e4, 0, (K,), np.float32),
        "action_mask": spaces.Box(0, 1, (K,), np.int8),
        "budget": spaces.Box(0, 1, (1,), np.float32),
    }
)
SCORED = spaces.Dict({**SPACE.spaces, "score": spaces.Box(-9, 9, (1,), np.float32)})


def replay(size: int = 40, envs: int = 2, space: spaces.Dict = SPACE) -> EpisodeReplay:
    return EpisodeReplay(size, space, device="cpu", n_envs=envs, seed=0)


def observation(rng: np.random.Generator, envs: int, **fixed: np.ndarray) -> dict[str, np.ndarray]:
    drawn = {
        "hidden": rng.integers(-8, 8, (envs, D)).astype(np.float32) / 8,  # exact in half precision
        "candidates": rng.integers(0, 99, (envs, K), dtype=np.int32),
        "logprobs": rng.normal(size=(envs, K)).astype(np.float32),
        "action_mask": rng.integers(0, 2, (envs, K), dtype=np.int8),
        "budget": rng.random((envs, 1), dtype=np.float32),
    }
    return drawn | fixed


def write(buffer: EpisodeReplay, lengths: list[int], seed: int = 0) -> list[list[dict]]:
    """Write one episode after the other to each environment; return what went in, by environment."""
    rng = np.random.default_rng(seed)
    written: list[list[dict]] = [[] for _ in range(buffer.n_envs)]
    step_of = 0
    for length in lengths:
        for step in range(length):
            obs = observation(rng, buffer.n_envs)
            actions = rng.integers(0, K, buffer.n_envs)
            rewards, behaviour = rng.normal(size=(2, buffer.n_envs)).astype(np.float32)
            done = np.full(buffer.n_envs, step == length - 1)
            buffer.add(obs, obs, Acted(actions, behaviour, ~done & done, 0.0), rewards, done, ~done & done)
            for env in range(buffer.n_envs):
                written[env].append(
                    {key: value[env] for key, value in obs.items()}
                    | {"action": actions[env], "reward": rewards[env], "behaviour": behaviour[env], "at": step_of}
                )
            step_of += 1
    return written


def test_a_batch_holds_what_was_written_step_by_step():
    buffer = replay()
    written = write(buffer, [3, 5, 2])

    batch = buffer.batch([(1, 3, 5), (0, 8, 2)])

    assert batch.actions.shape == (2, 5)
    assert batch.acted.tolist() == [[True] * 5, [True] * 2 + [False] * 3]
    assert batch.ended[0].tolist() == [False] * 4 + [True]
    for row, (env, first, length) in enumerate([(1, 3, 5), (0, 8, 2)]):
        for t in range(length):
            step = written[env][first + t]
            for key, values in batch.observations.items():
                np.testing.assert_array_equal(values[row, t].numpy(), step[key].astype(values.numpy().dtype))
            assert batch.actions[row, t] == step["action"]
            assert batch.tokens[row, t] == step["candidates"][step["action"]]
            assert batch.rewards[row, t].item() == step["reward"]
            assert batch.behaviour[row, t].item() == step["behaviour"]


def test_only_whole_finished_episodes_that_are_still_there_are_drawn():
    buffer = replay(size=20, envs=2)  # ten steps an environment
    written = write(buffer, [4, 4, 3, 2])  # the first four are overwritten, and one step of the second

    kept = {(first, length) for ring in buffer.episodes for first, length in ring}
    batch = buffer.sample(64)

    assert kept == {(4, 4), (8, 3), (11, 2)}
    assert buffer.size() == 2 * 9
    drawn = {float(r) for r in batch.rewards[batch.acted]}
    assert drawn == {float(step["reward"]) for ring in written for step in ring if step["at"] >= 4}


def test_an_open_episode_that_overwrites_an_old_one_forgets_it_at_once():
    buffer = replay(size=10, envs=1)
    write(buffer, [6, 4])
    rng = np.random.default_rng(1)
    obs = observation(rng, 1)
    buffer.add(obs, obs, acted(0), np.zeros(1), np.array([False]), NO)

    assert list(buffer.episodes[0]) == [(6, 4)]


@pytest.mark.parametrize("paid", ["at the end", "step by step"])
def test_shaped_rewards_are_the_increments_of_the_score_however_it_is_paid(paid):
    """Both ways of paying are one learning problem; the part of the reward beyond the score comes last."""
    scores, total = [0.0, 0.5, 0.25, 1.0], 1.75  # the score of the prefixes, and the reward of the text
    buffer = replay(envs=1, space=SCORED)
    rng = np.random.default_rng(0)
    steps = len(scores) - 1
    for t in range(steps):
        obs, after = (observation(rng, 1, score=np.array([[s]], np.float32)) for s in scores[t : t + 2])
        last = t == steps - 1
        if paid == "at the end":
            reward = total if last else 0.0
        else:
            reward = total - scores[t] if last else scores[t + 1] - scores[t]
        buffer.add(obs, after, acted(0), np.array([reward]), np.array([last]), NO)

    batch = buffer.sample(1)

    np.testing.assert_allclose(batch.rewards.numpy(), [[0.5, -0.25, 1.75 - 0.25]], rtol=1e-6)


def test_an_outside_time_limit_keeps_the_last_state_without_an_action():
    buffer = replay(envs=1)
    rng = np.random.default_rng(0)
    obs, after = observation(rng, 1), observation(rng, 1)
    cut = np.array([True])
    buffer.add(obs, after, acted(1), np.ones(1), np.array([True]), cut)

    batch = buffer.sample(1)

    assert batch.acted.tolist() == [[True, False]]
    assert batch.ended.tolist() == [[False, False]]
    np.testing.assert_array_equal(batch.observations["candidates"][0, 1].numpy(), after["candidates"][0])


def test_a_saved_replay_goes_on_as_if_it_had_never_stopped(tmp_path):
    one, other = replay(), replay()
    write(one, [3, 5, 2])
    one.sample(4)
    write_replay(one, tmp_path / "replay.safetensors")
    read_replay(other, tmp_path / "replay.safetensors")

    for buffer in (one, other):
        write(buffer, [4], seed=1)

    np.testing.assert_array_equal(one.sample(8).rewards, other.sample(8).rewards)
    with pytest.raises(ConfigError, match="shape"):
        read_replay(replay(size=60), tmp_path / "replay.safetensors")


def test_bytes_are_said_and_counted():
    each = (
        2 * D + 4 * K + 4 * K + K + 4 + (8 + 4 + 4 + 4 + 1 + 1 + 1 + 4) + K
    )  # half hidden, ids, logprobs, mask, budget, step, echoes
    assert EpisodeReplay.bytes_per_step(SPACE) == each
    assert replay().bytes == 40 * each == sum(array.nbytes for array in replay().store.values())


def test_too_much_too_long_and_too_early_are_refused():
    with pytest.raises(CapacityError, match="bytes"):
        replay(size=10**14)
    with pytest.raises(CapacityError, match="raise buffer_size"):
        write(replay(size=4, envs=2), [3])
    with pytest.raises(ConfigError, match="learning_starts"):
        replay().sample(1)
