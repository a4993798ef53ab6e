"""Recorded texts: what is written is what happened, and TextDQN learns from it alone."""

from __future__ import annotations

import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import spaces
from gymnasium.utils.env_checker import data_equivalence
from toys import PROMPTS, Worth, letters

import textgen_env  # noqa: F401  (registers the environment)
from agents.baselines.one_step import SampleAgent
from agents.runs.optimum import TextTree
from agents.text_dqn.agent import TextDQN
from agents.text_dqn.networks import NEEDED_KEYS
from agents.text_dqn.offline import BEHAVIOUR, BY_LANGUAGE_MODEL, fill_replay, open_dataset, record
from agents.text_dqn.replay import Acted, EpisodeReplay
from textgen_env import TableModel
from textgen_env.errors import CapacityError, ConfigError, DatasetError, RunFolderError
from textgen_env.prompts import Prompt

minari = pytest.importorskip("minari", reason="recorded texts need minari[hdf5]")
pytest.importorskip("h5py", reason="recorded texts need minari[hdf5]")

TOY = {"prompts": PROMPTS, "reward": Worth(), "top_k": 4, "top_p": 0.65, "max_new_tokens": 4}
START = [Prompt(text) for text in PROMPTS] * 5


def make(num_envs=3, observation="full", **settings):
    settings = {"model": letters(), **TOY, **settings}
    return gym.make_vec("TextGen-v0", num_envs=num_envs, observation=observation, **settings)


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    return record(SampleAgent(), make(), START, tmp_path_factory.mktemp("datasets") / "letters-v0", seed=3)


@pytest.mark.slow
def test_a_recorded_text_is_what_the_environment_answers_to_its_actions(dataset):
    env = gym.make("TextGen-v0", model=letters(), observation="full", **TOY)
    metadata = list(dataset.storage.get_episode_metadata(dataset.episode_indices))
    for episode, about in zip(dataset, metadata, strict=True):
        observations = [env.reset(options=about["options"])[0]]
        for t, action in enumerate(episode.actions):
            observation, reward, terminated, truncated, info = env.step(action)
            observations.append(observation)
            assert reward == episode.rewards[t]
            assert (terminated, truncated) == (episode.terminations[t], episode.truncations[t])
        assert (info["completion"], info["finish_reason"]) == (about["completion"], about["finish_reason"])
        for key, values in episode.observations.items():
            assert data_equivalence(np.stack([o[key] for o in observations]), values, exact=True), key
    assert sorted(about["options"]["prompt"] for about in metadata) == sorted(p.text for p in START)


def test_recorded_log_probabilities_are_those_of_who_acted(dataset):
    for episode in dataset:
        mask = episode.observations["action_mask"][:-1].astype(bool)
        mu = np.where(mask, np.exp(episode.observations["logprobs"][:-1].astype(np.float64)), 0.0)
        mu /= mu.sum(-1, keepdims=True)
        expected = np.log(mu[np.arange(len(episode)), episode.actions])
        np.testing.assert_allclose(episode.infos[BEHAVIOUR][1:], expected, atol=1e-6)
        assert np.isnan(episode.infos[BEHAVIOUR][0])
        assert episode.infos[BY_LANGUAGE_MODEL].tolist() == [False] + [True] * len(episode)


def test_minari_itself_finds_the_dataset_by_name(dataset, monkeypatch):
    folder = Path(dataset.spec.data_path).parent
    monkeypatch.setenv("MINARI_DATASETS_PATH", str(folder.parent))
    again = minari.load_dataset("letters-v0")
    assert again.total_episodes == len(START)
    assert again.total_steps == dataset.total_steps
    assert data_equivalence(again[7].observations, dataset[7].observations, exact=True)


def test_greedy_texts_have_log_probability_zero_and_flat_observations_their_mask(tmp_path):
    class First:
        def predict(self, observation, state=None, episode_start=None, deterministic=False):
            return np.zeros(len(observation), np.int64), None

    env = make(observation="hidden")
    with pytest.raises(ConfigError, match="--greedy"):
        record(First(), env, START, tmp_path / "a")
    episode = record(First(), env, START, tmp_path / "a", deterministic=True)[0]
    assert (episode.infos[BEHAVIOUR][1:] == 0).all()
    assert not episode.infos[BY_LANGUAGE_MODEL].any()
    assert episode.observations.shape == (len(episode) + 1, env.single_observation_space.shape[0])
    assert episode.infos["action_mask"].shape == (len(episode) + 1, 4)
    assert 0 < episode.infos["action_mask"][:-1].mean() < 1  # top_p masks some
    with pytest.raises(RunFolderError, match="not an empty folder"):
        record(First(), env, START, tmp_path / "a", deterministic=True)


@pytest.mark.parametrize("cut", [False, True], ids=["ended", "cut off"])
def test_adding_a_whole_episode_equals_adding_its_steps(cut):
    space = spaces.Dict({key: make().single_observation_space[key] for key in ("candidates", "logprobs", "score")})
    whole, steps = (EpisodeReplay(20, space, device="cpu", n_envs=1) for _ in range(2))
    rng = np.random.default_rng(0)
    for length in (4, 3, 6, 5, 2):  # more than the ring holds
        observations = {
            "candidates": rng.integers(0, 6, (length + 1, 4), np.int32),
            "logprobs": -rng.random((length + 1, 4), np.float32),
            "score": rng.integers(0, 9, (length + 1, 1)).astype(np.float32) / 8,
        }
        actions, rewards = rng.integers(0, 4, length), rng.integers(0, 9, length) / 8
        behaviour = -rng.random(length, np.float32)
        by_model = rng.random(length) < 0.5
        whole.add_episode(observations, actions, rewards, behaviour, by_model, ended=not cut)
        for t in range(length):
            now, after = ({k: v[i : i + 1] for k, v in observations.items()} for i in (t, t + 1))
            last, here = t == length - 1, slice(t, t + 1)
            acted = Acted(actions[here], behaviour[here], by_model[here], 0.0)
            steps.add(now, after, acted, rewards[here], np.array([last]), np.array([cut and last]))
    assert whole.episodes == steps.episodes
    assert whole.store["ended"].any() != cut
    for name, values in steps.store.items():
        np.testing.assert_array_equal(whole.store[name], values, err_msg=name)


def positions(ids):
    """Hidden states that tell every text of up to three tokens apart: one-hot by position."""
    hidden = np.zeros((4, 3), np.float32)
    hidden[np.arange(len(ids)) % 4, ids] = 1.0
    return hidden.ravel()


@pytest.mark.slow
def test_q_converges_to_the_exact_soft_values_from_the_language_models_texts_alone(tmp_path, monkeypatch):
    model = TableModel(["a", "b", "c"], [0.5, 0.3, 0.2], end=None, features=positions)
    settings = {"model": model, "prompts": ["c"], "top_k": 3, "top_p": 1.0, "max_new_tokens": 3}
    settings |= {"reward": lambda text: float(text in {"bca", "aab"}), "observation": NEEDED_KEYS}
    env = make(8, **settings)
    toy = TextTree(make(1, **settings), "c")
    values, exact = toy.soft_values(0.5)
    dataset = record(SampleAgent(), env, [Prompt("c")] * 500, tmp_path / "mu")
    agent = TextDQN(
        "CandidatePolicy",
        env,
        score=None,  # Q itself, not what is left of it beside a learned potential
        beta=0.5,
        learning_rate=3e-3,
        tau=0.1,
        buffer_size=2_000,
        policy_kwargs={
            "q_net_kwargs": {"dropout": 0.0, "heads": 1, "width": 64},
            "optimizer_kwargs": {"weight_decay": 0.0},
        },
        seed=0,
    )

    def stepped(*arguments):
        raise AssertionError("offline training stepped the environment")

    monkeypatch.setattr(env, "step", stepped)
    monkeypatch.setattr(env, "reset", stepped)
    assert fill_replay(agent.replay_buffer, dataset) == 1500 == agent.replay_buffer.size()
    losses = agent.fit(150)

    assert losses[-100:].mean() < 0.2 * losses[:20].mean()
    observations, _ = agent.policy.obs_to_tensor(toy.observations)
    with torch.no_grad():
        learned = agent.q_net_target(observations).numpy()
    assert np.abs(learned - exact).max() < 0.06
    reached = toy.point(agent.probabilities(toy.observations))
    assert reached.reward - 0.5 * reached.kl == pytest.approx(values[0], abs=0.005)


@pytest.mark.slow
def test_an_agent_fitted_offline_goes_on_in_the_environment(dataset):
    env = make(4)
    agent = TextDQN("CandidatePolicy", env, learning_starts=0, steps_per_update=20, buffer_size=1_000, seed=0)
    fill_replay(agent.replay_buffer, dataset)
    agent.fit(30)
    assert agent._n_updates == 30
    agent.learn(100)
    assert agent._n_updates == 30 + 100 // 20


def written(folder, change):
    """A dataset of one text of two steps, changed by ``change(observations, fields)`` before it is written."""
    from minari.data_collector import EpisodeBuffer
    from minari.dataset.minari_storage import MinariStorage

    env = make(1)
    observation, _ = env.reset(seed=0)
    observations = {key: np.concatenate([value] * 3) for key, value in observation.items()}
    fields = {
        "actions": np.array([0, 0]),
        "rewards": [0.0, 1.0],
        "terminations": [False, True],
        "truncations": [False, False],
        "infos": {BEHAVIOUR: np.array([np.nan, -1.0, -1.0], np.float32)},
    }
    change(observations, fields)
    folder.mkdir()
    kept = {key: box for key, box in env.single_observation_space.spaces.items() if key in observations}
    storage = MinariStorage.new(folder, observation_space=spaces.Dict(kept), action_space=env.single_action_space)
    storage.update_metadata({"dataset_id": "bad-v0", "minari_version": minari.__version__})
    storage.update_episodes([EpisodeBuffer(observations=observations, **fields)])
    return open_dataset(folder)


def replay_of(env, size=400):
    return EpisodeReplay(size, env.single_observation_space, device="cpu", n_envs=2)


BAD = {
    "no log-probabilities": (
        lambda o, f: f.update(infos={}),
        r"episode 0: infos\['behaviour_logprob'\].*textgen record",
    ),
    "positive log-probability": (lambda o, f: f["infos"][BEHAVIOUR].put(1, 0.5), r"at most 0, got 0\.5"),
    "log-probability missing": (lambda o, f: f["infos"][BEHAVIOUR].put(1, np.nan), "behaviour_logprob must be finite"),
    "infinite reward": (lambda o, f: f.update(rewards=[0.0, np.inf]), "rewards must be finite, got inf"),
    "hidden not a number": (lambda o, f: o["hidden"].put(0, np.nan), "hidden must be finite"),
    "masked action": (lambda o, f: f.update(actions=np.array([0, 3])), "action 3 at step 1 is out of range or masked"),
    "action out of range": (lambda o, f: f.update(actions=np.array([9, 0])), "action 9 at step 0"),
    "no end": (lambda o, f: f.update(terminations=[False, False]), r"must end at its last step 1.*ends at \[\]"),
    "end in the middle": (lambda o, f: f.update(terminations=[True, True]), r"ends at \[0, 1\]"),
    "who chose, shorter": (
        lambda o, f: f["infos"].update({BY_LANGUAGE_MODEL: np.array([False, True])}),
        r"infos\['by_language_model'\] must have shape \(3,\), got \(2,\)",
    ),
    "key missing": (lambda o, f: o.pop("hidden"), r"'hidden' must have shape \(6,\), the dataset has none"),
}


@pytest.mark.parametrize("name", BAD)
def test_a_malformed_episode_is_refused_with_what_is_wrong(name, tmp_path):
    change, message = BAD[name]
    with pytest.raises(DatasetError, match=message):
        fill_replay(replay_of(make()), written(tmp_path / "data", change))


def test_without_lengths_nothing_is_known_of_the_prompt(tmp_path):
    replay = replay_of(make())
    assert fill_replay(replay, written(tmp_path / "data", lambda o, f: o.pop("length"))) == 2
    assert not replay.store["echoes"].any()


def test_a_dataset_that_does_not_fit_is_refused(dataset, tmp_path, monkeypatch):
    with pytest.raises(DatasetError, match=r"'candidates' must have shape \(3,\), the dataset has \(4,\)"):
        fill_replay(replay_of(make(top_k=3)), dataset)
    with pytest.raises(CapacityError, match="raise buffer_size to at least"):
        fill_replay(replay_of(make(), size=20), dataset)
    with pytest.raises(DatasetError, match="no Minari dataset"):
        open_dataset(tmp_path / "nowhere")
    (tmp_path / "metadata.json").write_text("{}")
    with pytest.raises(DatasetError, match="no Minari dataset"):
        open_dataset(tmp_path)
    env = make(2)
    agent = TextDQN("CandidatePolicy", env, learning_starts=50, buffer_size=1_000)
    with pytest.raises(ConfigError, match="no finished"):
        agent.fit(1)
    agent.learn(6)
    with pytest.raises(ConfigError, match="before learning"):
        fill_replay(agent.replay_buffer, dataset)
    monkeypatch.setitem(sys.modules, "h5py", None)
    with pytest.raises(ConfigError, match=r"pip install 'textgen-env\[minari\]'"):
        open_dataset(tmp_path)


def test_a_killed_record_leaves_nothing_and_the_same_call_records(tmp_path, monkeypatch):
    class Killed(BaseException):
        pass

    def killed(*_):
        raise Killed

    with monkeypatch.context() as patch:
        patch.setattr("agents.text_dqn.offline._write", killed)
        with pytest.raises(Killed):
            record(SampleAgent(), make(), START, tmp_path / "a-v0")
    assert list(tmp_path.iterdir()) == []
    (tmp_path / ".a-v0.half-made" / "data").mkdir(parents=True)  # what SIGKILL leaves
    (tmp_path / ".a-v0.half-made" / "data" / "metadata.json").write_text("{")
    (tmp_path / ".a-v0.lock").write_text("")
    dataset = record(SampleAgent(), make(), START, tmp_path / "a-v0")
    assert dataset.total_episodes == len(START)
    assert dataset.id == "a-v0"
    assert [path.name for path in tmp_path.iterdir() if "half" in path.name] == []
