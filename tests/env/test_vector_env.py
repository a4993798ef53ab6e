"""The vector environment: N rows are N single environments, in every autoreset mode, whatever some of them do."""

from __future__ import annotations

import copy

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.utils.env_checker import data_equivalence
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from numpy.testing import assert_array_equal
from toys import PROMPTS, CountingModel, PlainEpisode, Worth, assert_same, by_sum, letters, worth

from textgen_env.errors import ConfigError, IllegalAction, PromptError, ResetNeeded, RewardError, SpecError
from textgen_env.vector_env import TextGenVectorEnv

SETTINGS = {"prompts": PROMPTS, "reward": Worth(), "top_k": 5, "max_new_tokens": 5, "max_prompt_tokens": 4}
MODES = list(AutoresetMode)
N = 4


def make(num_envs=N, **changes):
    return gym.make_vec("TextGen-v0", num_envs=num_envs, **({"model": letters()} | SETTINGS | changes))


def singles(num_envs=N, mode=AutoresetMode.SAME_STEP, **changes):
    """Gymnasium's own vector of N single environments."""
    arguments = {"model": letters()} | SETTINGS | changes
    return SyncVectorEnv([lambda: gym.make("TextGen-v0", **arguments)] * num_envs, autoreset_mode=mode)


def row(observation, i):
    return {key: value[i] for key, value in observation.items()}


# --- N rows are N singles


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(
    "changes",
    [
        {"observation": "full"},
        {"observation": "hidden", "reward_at": "step"},
        {"observation": "tokens", "stop": ("ab",), "min_new_tokens": 2},
        {"top_k": None, "top_p": 0.55, "on_illegal": "last_legal"},
    ],
    ids=str,
)
def test_rows_equal_gymnasium_s_vector_of_singles(mode, changes):
    ours, theirs = make(autoreset_mode=mode, **changes), singles(mode=mode, **changes)
    assert ours.single_observation_space == theirs.single_observation_space
    assert ours.observation_space == theirs.observation_space
    assert ours.action_space == theirs.action_space
    assert ours.metadata["autoreset_mode"] is theirs.metadata["autoreset_mode"] is mode
    rng = np.random.default_rng(0)

    assert data_equivalence(ours.reset(seed=7), theirs.reset(seed=7), exact=True)
    ended = 0
    for _ in range(60):
        masks = ours.unwrapped.action_masks()
        if changes.get("on_illegal"):
            masks[:] = True
        actions = np.array([rng.choice(np.flatnonzero(mask)) for mask in masks])
        one, other = ours.step(actions), theirs.step(actions)
        assert data_equivalence(one, other, exact=True)
        ended += one[2].sum()
        if mode is AutoresetMode.DISABLED and one[2].any():
            options = {"reset_mask": one[2]}  # Gymnasium pops the mask
            assert data_equivalence(ours.reset(options=dict(options)), theirs.reset(options=dict(options)), exact=True)
    assert ended > 20


def test_row_i_is_seeded_with_seed_plus_i():
    vector = make(observation="full")
    observation, _ = vector.reset(seed=40)
    listed, _ = make(observation="full").reset(seed=[40, 41, 42, 43])
    assert data_equivalence(observation, listed, exact=True)
    for i in range(N):
        single = gym.make("TextGen-v0", model=letters(), observation="full", **SETTINGS)
        assert data_equivalence(row(observation, i), single.reset(seed=40 + i)[0], exact=True)


@pytest.mark.parametrize(
    "seed", [np.int64(3), np.array(3), np.arange(3, 7), [np.uint8(3), 4, np.int64(5), 6], (3, 4, 5, 6)]
)
def test_seeds_of_numpy_are_seeds(seed):
    assert data_equivalence(make().reset(seed=seed), make().reset(seed=3), exact=True)


def test_seeds_and_generators_are_told_as_gymnasium_s_vector_tells_them():
    ours, theirs = make().unwrapped, singles()
    for seed in (5, [1, 2, 3, 4]):
        ours.reset(seed=seed)
        theirs.reset(seed=seed)
        assert ours.np_random_seed == theirs.np_random_seed
        for mine, other in zip(ours.np_random, theirs.np_random, strict=True):
            assert mine.bit_generator.state == other.bit_generator.state
    unseeded = make().unwrapped
    assert len(set(unseeded.np_random_seed)) == N
    unseeded.reset()
    unseeded.load_state_dict(*ours.state_dict())
    assert unseeded.np_random_seed == (-1,) * N  # as in Gymnasium, where a generator was put in place of a seed
    assert [g.bit_generator.state for g in unseeded.np_random] == [g.bit_generator.state for g in ours.np_random]


def test_a_small_numpy_integer_is_a_number_of_rows():
    env = TextGenVectorEnv(np.uint8(200), letters(), **SETTINGS)
    assert env.reset(seed=0)[0]["tokens"].shape[0] == 200
    assert type(env.num_envs) is int


def test_a_row_does_not_depend_on_its_neighbours():
    few, many = make(2, observation="full"), make(7, observation="full")
    seeds = [11, 12]
    few.reset(seed=seeds)
    many.reset(seed=[1, 11, 2, 3, 12, 4, 5])
    rng = np.random.default_rng(0)
    for _ in range(30):
        masks = many.unwrapped.action_masks()
        actions = np.array([rng.choice(np.flatnonzero(mask)) for mask in masks])
        o, r, t, *_ = many.step(actions)
        o2, r2, t2, *_ = few.step(actions[[1, 4]])
        for i, j in enumerate((1, 4)):
            assert data_equivalence(row(o2, i), row(o, j), exact=True)
            assert (r2[i], t2[i]) == (r[j], t[j])


def test_a_spec_makes_an_equal_vector_and_holds_objects_by_reference():
    model = letters()
    env = make(model=model, autoreset_mode=AutoresetMode.NEXT_STEP)
    again = gym.make_vec(copy.deepcopy(env.spec))
    assert again.num_envs == N
    assert again.unwrapped.episodes.model is model
    assert again.unwrapped.autoreset_mode is AutoresetMode.NEXT_STEP
    with pytest.raises(SpecError, match="was given as an object of type"):
        env.spec.to_json()


def test_returned_arrays_belong_to_the_caller():
    env = make(observation="full")
    observation, _ = env.reset(seed=0)
    kept = copy.deepcopy(observation)
    _, rewards, terminations, truncations, _ = env.step(np.zeros(N, int))
    assert data_equivalence(observation, kept, exact=True)
    for array in (*observation.values(), rewards, terminations, truncations):
        array[:] = 0
    assert (env.unwrapped.episodes.slots.lengths == kept["length"][:, 0] + 1).all()


# --- forwards


@pytest.mark.parametrize("mode", MODES)
def test_a_step_is_one_forward_and_the_end_costs_none(mode):
    model = CountingModel()
    env = make(2, model=model, max_new_tokens=2, min_new_tokens=2, autoreset_mode=mode)
    env.reset(seed=0)
    for _ in range(2):
        env.step(np.zeros(2, int))
    # both rows end at the second step: shown without a forward, restarted within it, at the next step, or not
    assert model.forwards == {"SameStep": [2, 2, 2], "NextStep": [2, 2], "Disabled": [2, 2]}[mode.value]
    if mode is AutoresetMode.NEXT_STEP:
        _, rewards, terminations, _, infos = env.step(np.array([99, -1]))  # actions of restarting rows are ignored
        assert model.forwards == [2, 2, 2]
        assert (rewards.tolist(), terminations.tolist(), infos) == ([0.0, 0.0], [False, False], {})


def test_rows_that_ended_are_left_out_of_the_forward():
    model = CountingModel()
    env = make(3, model=model, top_k=5, autoreset_mode="Disabled")
    env.reset(options={"prompt": ["a", ".", "b"]})
    _, _, terminations, _, _ = env.step(np.array([0, 0, 0]))  # the likeliest token after a full stop is the end
    assert terminations.tolist() == [False, True, False]
    assert model.forwards == [3, 2]
    env.reset(options={"reset_mask": np.array([False, True, False])})
    assert model.forwards == [3, 2, 1]


# --- partial resets


def test_a_partial_reset_restarts_its_rows_only():
    env = make(observation="full")
    env.reset(seed=0)
    before = env.step(np.zeros(N, int))[0]
    mask = np.array([True, False, False, True])
    after, infos = env.reset(seed=[5, 5, 5, 5], options={"reset_mask": mask, "prompt": ["a", "b", "b", "ab"]})
    assert infos == {}
    for i, prompt in enumerate(["a", None, None, "ab"]):
        if prompt is None:
            assert data_equivalence(row(after, i), row(before, i), exact=True)
        else:
            assert_same(row(after, i), PlainEpisode(prompt, top_k=5).observation())


def test_a_partial_reset_seeds_its_rows_only():
    env, plain = make(), make()
    for e in (env, plain):
        e.reset(seed=0)
    env.reset(seed=9, options={"reset_mask": np.array([True, False, False, False])})
    fresh, drawn = env.reset()[0], plain.reset()[0]
    for i in range(1, N):
        assert data_equivalence(row(fresh, i), row(drawn, i), exact=True)


@pytest.mark.parametrize(
    ("mask", "words"),
    [
        (np.zeros(N, bool), "at least one True"),
        (np.ones(N - 1, bool), r"must be \(4,\) bool"),
        (np.ones(N, int), "got int64"),
        ([1, 0, 0, 0], "got int64"),
    ],
    ids=str,
)
def test_a_mask_that_is_none_is_named(mask, words):
    env = make()
    env.reset(seed=0)
    with pytest.raises(ConfigError, match=words):
        env.reset(options={"reset_mask": mask})


# --- forks


@pytest.mark.parametrize("reward_at", ["end", "step"])
def test_a_forked_row_goes_on_as_its_source_would_have(reward_at):
    env = make(observation="full", reward_at=reward_at, autoreset_mode="Disabled").unwrapped
    env.reset(options={"prompt": ["a", "b", "ab", "b a"]})
    env.step(np.array([0, 1, 2, 0]))
    forked = env.fork([0, 2], [3, 1])
    for src, dst in ((0, 3), (2, 1)):
        assert data_equivalence(row(forked, src), row(forked, dst), exact=True)
    for actions in ([1, 0, 0, 1], [0, 1, 1, 0]):
        observation, rewards, *_ = env.step(np.array(actions))
        for src, dst in ((0, 3), (2, 1)):
            assert data_equivalence(row(observation, src), row(observation, dst), exact=True)
            assert rewards[src] == rewards[dst]
    diverged, *_ = env.step(np.array([0, 0, 1, 1]))
    assert diverged["tokens"][0].tolist() != diverged["tokens"][3].tolist()


def test_rows_can_be_swapped_and_shuffled_in_one_call():
    env = make(model=letters(by_sum), observation="full", autoreset_mode="Disabled").unwrapped
    before, _ = env.reset(options={"prompt": ["a", "b", "ab", "b a"]})
    after = env.fork([1, 0, 0, 2], [0, 1, 2, 3])
    for dst, src in enumerate([1, 0, 0, 2]):
        assert data_equivalence(row(after, dst), row(before, src), exact=True)
    after, *_ = env.step(np.zeros(N, int))  # the model's rows went along: it answers for the ids that are there
    for i in range(N):
        ids = after["tokens"][i, : after["length"][i, 0]]
        np.testing.assert_allclose(np.exp(after["logprobs"][i, 0]), by_sum(ids).max(), rtol=1e-6)


def half_ended(mode):
    """Two rows of which the second has ended."""
    env = make(2, max_new_tokens=2, autoreset_mode=mode).unwrapped
    env.reset(options={"prompt": ["b", "."]})
    assert env.step(np.array([0, 0]))[2].tolist() == [False, True]  # "a" after "b", the end after "."
    return env


@pytest.mark.parametrize("mode", ["NextStep", "Disabled"])
def test_a_fork_of_a_live_row_revives_an_ended_one(mode):
    env = half_ended(mode)
    env.fork(0, 1)
    observation, _, terminations, _, _ = env.step(np.array([0, 0]))
    assert observation["tokens"][:, :3].tolist() == [[1, 0, 0], [1, 0, 0]]
    assert terminations.tolist() == [True, True]


def test_a_fork_of_an_ended_row_ends_a_live_one():
    env = half_ended("Disabled")
    env.fork(1, 0)
    with pytest.raises(ResetNeeded, match=r"rows \[0, 1\]"):
        env.step(np.array([0, 0]))
    env = half_ended("NextStep")
    env.fork(1, 0)
    observation, _, terminations, _, _ = env.step(np.array([0, 0]))
    assert observation["budget"].tolist() == [[1.0], [1.0]]  # both restarted
    assert terminations.tolist() == [False, False]


def test_a_fork_leaves_the_random_generators_where_they_are():
    env, plain = make().unwrapped, make().unwrapped
    for e in (env, plain):
        e.reset(seed=0)
    env.fork(0, 1)
    assert data_equivalence(env.reset(), plain.reset(), exact=True)


@pytest.mark.parametrize(
    ("src", "dst", "words"),
    [
        (0, N, r"dst must be rows in 0\.\.3, got \[4\]"),
        (-1, 0, r"src must be rows in 0\.\.3"),
        ([0, 1], [2, 2], "each dst named once"),
        ([0, 1], [2], "each src needs one dst"),
        ([0.0], [1], "src must be rows"),
        ([True, False], [0, 1], "src must be rows"),
    ],
    ids=str,
)
def test_a_fork_out_of_range_is_named_and_changes_nothing(src, dst, words):
    env = make().unwrapped
    before, _ = env.reset(seed=0)
    with pytest.raises(IndexError, match=words):
        env.fork(src, dst)
    assert data_equivalence(env.observe(), before, exact=True)


@pytest.mark.parametrize("nothing", [[], (), np.array([]), np.array([], np.int64)], ids=repr)
def test_a_fork_of_no_rows_changes_nothing(nothing):
    env = make().unwrapped
    before, _ = env.reset(seed=0)
    assert data_equivalence(env.fork(nothing, nothing), before, exact=True)


@pytest.mark.parametrize("dtype", [np.uint8, np.int8, np.uint64])
@pytest.mark.parametrize("model", ["letters", "tiny"])
def test_rows_of_any_integers_are_forked(model, dtype):
    env = TextGenVectorEnv(3, letters() if model == "letters" else model, ["a", "b a", "ab"], Worth(), top_k=4)
    env.reset(options={"prompt": ["a", "b a", "ab"]})
    before, *_ = env.step(np.zeros(3, np.int64))
    forked = env.fork(np.array([0, 2], dtype), np.array([1, 0], dtype))
    for key, value in forked.items():
        assert_array_equal(value, before[key][[2, 0, 2]], key)
    together, *_ = env.step(np.array([1, 1, 1]))
    assert_array_equal(together["tokens"][0], together["tokens"][2])
    np.testing.assert_allclose(together["logprobs"][0], together["logprobs"][2], atol=1e-5)


def test_a_row_that_never_began_cannot_be_forked():
    env = make().unwrapped
    with pytest.raises(ResetNeeded, match="reset"):
        env.fork(0, 1)


# --- misuse


@pytest.mark.parametrize("mode", MODES)
def test_step_before_reset_raises(mode):
    env = make(autoreset_mode=mode).unwrapped
    with pytest.raises(ResetNeeded, match="reset"):
        env.step(np.zeros(N, int))


def test_without_autoreset_an_ended_row_must_be_reset_first():
    env = make(2, max_new_tokens=1, autoreset_mode="Disabled").unwrapped
    env.reset(seed=0)
    env.step(np.zeros(2, int))
    with pytest.raises(ResetNeeded, match=r"rows \[0, 1\]"):
        env.step(np.zeros(2, int))


@pytest.mark.parametrize(
    "actions", [[0, 0, 0, 5], [0, -1, 0, 0], [0, 0, 0], [[0], [0], [0], [0]], 0, np.zeros(N), ["0"] * N, None], ids=str
)
def test_invalid_actions_raise_and_change_no_row(actions):
    env = make(observation="full").unwrapped
    before, _ = env.reset(seed=0)
    with pytest.raises(IllegalAction):
        env.step(actions)
    assert data_equivalence(env.observe(), before, exact=True)
    env.step([0] * N)


def test_one_masked_action_stops_all_rows_before_any_has_moved():
    env = make(3, top_p=0.25, observation="full").unwrapped
    before, _ = env.reset(options={"prompt": "a"})
    with pytest.raises(IllegalAction, match=r"actions \[1\] of rows \[2\] are masked"):
        env.step(np.array([0, 0, 1]))
    assert data_equivalence(env.observe(), before, exact=True)


def test_a_reward_that_raises_leaves_no_row_with_half_a_step():
    def fragile(text):
        return 1 / text.count("b")

    env = make(2, reward=fragile, max_new_tokens=3).unwrapped
    env.reset(options={"prompt": ["a", "."]})
    with pytest.raises(RewardError, match="'fragile' raised ZeroDivisionError"):
        env.step(np.array([0, 0]))  # row 1 ends, without a "b"
    with pytest.raises(ResetNeeded):
        env.step(np.array([0, 0]))
    env.reset(options={"prompt": ["a", "b"]})
    env.step(np.array([0, 0]))


@pytest.mark.parametrize(
    ("changes", "options", "seed", "error", "words"),
    [
        ({"num_envs": 0}, {}, None, ConfigError, "num_envs must be .* at least 1, got 0"),
        ({"num_envs": 1.5}, {}, None, ConfigError, "num_envs must be .* got 1.5"),
        ({"autoreset_mode": "same"}, {}, None, ConfigError, "autoreset_mode must be one of .*'SameStep'.* got 'same'"),
        ({}, {"prompt": ["a"]}, None, ConfigError, "one text or 4 of them, got 1"),
        ({}, {"prompt": 3}, None, PromptError, "got int"),
        ({}, {"prompt": ["a", "a", "a", ""]}, None, PromptError, "must not be empty"),
        ({}, {"prompts": "a"}, None, ConfigError, "unknown reset options"),
        ({}, {}, [1, 2], ConfigError, "one number or 4 of them, got 2"),
        ({}, {}, 5.0, ConfigError, "seed must be a whole number of at least 0, got 5.0"),
        ({}, {}, True, ConfigError, "seed must be .* got True"),
        ({}, {}, np.arange(4.0), ConfigError, "seed must be .* got 0.0"),
        ({}, {}, [1, 2, 3, -4], ConfigError, "seed must be .* got -4"),
        ({}, {}, np.arange(4)[:, None], ConfigError, r"seed must be .* got \[0\]"),
    ],
    ids=str,
)
def test_bad_arguments_are_named(changes, options, seed, error, words):
    with pytest.raises(error, match=words):
        TextGenVectorEnv(**({"num_envs": N, "model": letters()} | SETTINGS | changes)).reset(options=options, seed=seed)


# --- rendering


def test_each_row_renders_as_its_single_does():
    for mode in ("ansi", "rgb_array"):
        vector, single = (
            make(2, render_mode=mode),
            gym.make("TextGen-v0", model=letters(), render_mode=mode, **SETTINGS),
        )
        vector.reset(seed=3)
        single.reset(seed=4)
        shown = vector.render()
        assert len(shown) == 2
        np.testing.assert_array_equal(shown[1], single.render())


def test_human_prints_every_row(capsys):
    env = make(2, render_mode="human")
    env.reset(options={"prompt": ["a", "b"]})
    env.step(np.array([0, 0]))
    assert env.render() is None
    assert [line for line in capsys.readouterr().out.splitlines() if "│" in line] == ["a│", "b│", "a│a", "b│a"]


# --- any order


class VectorMachine(RuleBasedStateMachine):
    """Steps, partial resets and forks in any order and mode, against one ``PlainEpisode`` a row."""

    @initialize(mode=st.sampled_from(MODES), reward_at=st.sampled_from(["end", "step"]))
    def open(self, mode, reward_at):
        self.mode = mode
        self.rules = {"top_k": 5, "max_new_tokens": 3, "reward_at": reward_at, "stop": ("ab",)}
        prompts = ["b a"]  # the only one that an automatic reset can draw
        settings = self.rules | {"observation": "full", "prompts": prompts, "autoreset_mode": mode}
        self.env = make(3, model=letters(by_sum), **settings).unwrapped
        self.env.reset(seed=0)
        self.rows = [self.plain("b a") for _ in range(3)]

    def plain(self, prompt):
        return PlainEpisode(prompt, table=by_sum, **self.rules)

    @rule(mask=st.lists(st.booleans(), min_size=3, max_size=3).filter(any), prompt=st.sampled_from(PROMPTS))
    def partial_reset(self, mask, prompt):
        observation, _ = self.env.reset(options={"reset_mask": np.array(mask), "prompt": prompt})
        self.rows = [self.plain(prompt) if new else old for new, old in zip(mask, self.rows, strict=True)]
        self.check(observation)

    @rule(src=st.integers(0, 2), dst=st.integers(0, 2))
    def fork(self, src, dst):
        observation = self.env.fork(src, dst)
        self.rows[dst] = copy.deepcopy(self.rows[src])
        self.check(observation)

    @precondition(lambda self: self.mode is not AutoresetMode.DISABLED or not any(r.finish_reason for r in self.rows))
    @rule(choice=st.lists(st.integers(0, 4), min_size=3, max_size=3))
    def step(self, choice):
        legal = [[i for i, (*_, allowed) in enumerate(r.candidates()) if allowed] for r in self.rows]
        actions = np.array([some[c % len(some)] for some, c in zip(legal, choice, strict=True)])
        observation, rewards, terminations, truncations, infos = self.env.step(actions)
        assert not truncations.any()
        for i, plain in enumerate(self.rows):
            if plain.finish_reason:  # NEXT_STEP: this step restarts it
                self.rows[i] = self.plain("b a")
                assert (rewards[i], terminations[i]) == (0.0, False)
                continue
            assert rewards[i] == plain.step(actions[i])
            assert terminations[i] == (plain.finish_reason is not None)
            if plain.finish_reason:
                last = infos["final_info"] if self.mode is AutoresetMode.SAME_STEP else infos
                assert last["_completion"][i]
                assert last["completion"][i] == plain.text
                assert last["finish_reason"][i] == plain.finish_reason
                assert last["logprob"][i] == pytest.approx(plain.logprob, rel=1e-5)
                assert last["reward_parts"]["worth"][i] == worth(plain.text)
                if self.mode is AutoresetMode.SAME_STEP:
                    assert infos["_final_obs"][i]
                    assert_same(infos["final_obs"][i], plain.observation())
                    self.rows[i] = self.plain("b a")
        self.check(observation)

    def check(self, observation):
        for i, plain in enumerate(self.rows):
            assert_same(row(observation, i), plain.observation())


VectorMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestAnyOrder = pytest.mark.slow(VectorMachine.TestCase)
