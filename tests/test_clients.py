"""Other people's software on the environments, each as its own documentation says to use it."""

from __future__ import annotations

import runpy
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import yaml
from gymnasium.utils.env_checker import check_env, data_equivalence
from gymnasium.wrappers import FlattenObservation, RecordEpisodeStatistics, TimeLimit, vector
from gymnasium.wrappers.vector import RecordEpisodeStatistics as RecordVectorStatistics
from stable_baselines3 import DQN, PPO
from stable_baselines3.common.evaluation import evaluate_policy
from toys import PROMPTS, Worth, letters, worth

import textgen_env  # noqa: F401  (registers the environment)
from agents.extractor import PrunedTransformerExtractor
from agents.sb3_vec import SB3VecEnv
from textgen_env import TableModel

ROOT = Path(__file__).parents[1]
TOY = {"prompts": PROMPTS, "reward": Worth(), "top_k": 4, "max_new_tokens": 4}


def make(**settings):
    return gym.make("TextGen-v0", model=letters(), **{**TOY, **settings})


def make_vec(num_envs=4, **settings):
    return gym.make_vec("TextGen-v0", num_envs=num_envs, **{"model": letters(), **TOY, **settings})


# --- Gymnasium's wrappers


@pytest.mark.filterwarnings("ignore:.*different from the unwrapped version")  # it is: the wrapper is what is tested
@pytest.mark.parametrize("observation", ["default", "full", "hidden", "tokens"])
def test_flatten_observation_is_gymnasiums_flatten_and_passes_its_checker(observation):
    env, plain = FlattenObservation(make(observation=observation)), make(observation=observation)
    given = plain.reset(seed=2)[0]
    np.testing.assert_array_equal(env.reset(seed=2)[0], gym.spaces.flatten(plain.observation_space, given))
    # Gymnasium's checker knows no mask, so illegal actions are mapped.
    check_env(
        FlattenObservation(make(observation=observation, on_illegal="last_legal").unwrapped), skip_render_check=True
    )


@pytest.mark.parametrize("observation", ["default", "full", "hidden", "tokens"])
def test_vector_flatten_observation_works_where_gymnasium_lets_it(observation):
    def make_two(mode):
        settings = {**TOY, "observation": observation, "max_new_tokens": 2, "autoreset_mode": mode}
        return gym.make_vec("TextGen-v0", num_envs=2, model=letters(), **settings)

    env, plain = vector.FlattenObservation(make_two("NextStep")), make_two("NextStep")

    def flat(batch):
        is_dict = isinstance(batch, dict)
        rows = [{key: value[i] for key, value in batch.items()} if is_dict else batch[i] for i in range(2)]
        return [gym.spaces.flatten(plain.single_observation_space, row) for row in rows]

    np.testing.assert_array_equal(env.reset(seed=2)[0], flat(plain.reset(seed=2)[0]))
    for _ in range(6):
        actions = np.zeros(2, np.int64)
        np.testing.assert_array_equal(env.step(actions)[0], flat(plain.step(actions)[0]))
    with pytest.raises(ValueError, match="NEXT_STEP or DISABLED"):  # as docs/clients.md says
        vector.FlattenObservation(make_two("SameStep"))


def test_recorded_statistics_are_the_texts_reward_and_length():
    env = RecordEpisodeStatistics(make())
    for seed in range(5):
        env.reset(seed=seed)
        length, ended = 0, False
        while not ended:
            _, _, ended, _, info = env.step(0)
            length += 1
        assert info["episode"]["r"] == worth(info["completion"])
        assert info["episode"]["l"] == length


def test_a_time_limit_truncates_where_the_text_would_go_on():
    env = TimeLimit(make(min_new_tokens=4), max_episode_steps=2)
    env.reset(seed=0)
    assert env.step(0)[2:4] == (False, False)
    assert env.step(0)[2:4] == (False, True)
    env.reset(seed=0)  # the budget of the text itself is no truncation
    whole = TimeLimit(make(min_new_tokens=4), max_episode_steps=4)
    whole.reset(seed=0)
    assert [whole.step(0)[2:4] for _ in range(4)][-1][0]


def test_recorded_statistics_of_the_vector_are_each_texts_own():
    env = RecordVectorStatistics(make_vec(8))
    env.reset(seed=0)
    ended = 0
    for _ in range(20):
        *_, infos = env.step(np.zeros(8, np.int64))
        for row in np.flatnonzero(infos.get("_final_info", np.zeros(8, bool))):
            ended += 1
            assert infos["episode"]["r"][row] == worth(infos["final_info"]["completion"][row])
    assert ended > 10


# --- RL Baselines3 Zoo


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # what other packages warn of is not this project's
def test_rl_zoo_trains_with_the_projects_hyperparameters(tiny_lm, tmp_path, monkeypatch):
    pytest.importorskip("rl_zoo3", reason="RL Zoo is not installed")
    for part in tiny_lm:
        part.save_pretrained(tmp_path / "model")
    settings = yaml.safe_load((ROOT / "examples" / "rl_zoo" / "dqn.yml").read_text())
    on_tiny = {"model": str(tmp_path / "model"), "prompts": ["the film was"], "top_k": 4, "dtype": "float32"}
    settings["TextGen-v0"]["env_kwargs"] |= on_tiny
    settings["TextGen-v0"] |= {"n_timesteps": 120.0, "learning_starts": 40}
    (tmp_path / "dqn.yml").write_text(yaml.safe_dump(settings))
    arguments = f"--algo dqn --env TextGen-v0 --gym-packages textgen_env --conf-file {tmp_path / 'dqn.yml'} --seed 1"
    evaluated = ["--eval-freq", "60", "--eval-episodes", "2", "--eval-env-kwargs"]  # see docs/clients.md
    evaluated += [f"{name}:{value!r}" for name, value in settings["TextGen-v0"]["env_kwargs"].items()]
    monkeypatch.setattr(sys, "argv", ["train", *arguments.split(), "-f", str(tmp_path / "logs"), *evaluated])
    runpy.run_module("rl_zoo3.train", run_name="__main__")

    measured = np.load(tmp_path / "logs" / "dqn" / "TextGen-v0_1" / "evaluations.npz")
    assert measured["timesteps"].tolist() == [60, 120]
    assert measured["ep_lengths"].max() <= settings["TextGen-v0"]["env_kwargs"]["max_new_tokens"]
    agent = DQN.load(tmp_path / "logs" / "dqn" / "TextGen-v0_1" / "TextGen-v0.zip")
    assert agent.num_timesteps == 120
    assert agent._n_updates == 20  # one every fourth step after the 40th
    assert agent.gamma == 1.0


# --- sb3-contrib's mask protocol


@pytest.mark.parametrize("kind", ["single", "vector"])
def test_maskable_ppo_finds_the_mask_and_never_plays_a_masked_action(kind):
    contrib = pytest.importorskip("sb3_contrib", reason="sb3-contrib is not installed")
    from sb3_contrib.common.maskable.evaluation import evaluate_policy as evaluate_masked
    from sb3_contrib.common.maskable.utils import get_action_masks, is_masking_supported

    masked = {"top_p": 0.65, "observation": "hidden"}  # on_illegal="raise" is the default: one slip would end the test
    env = make(**masked) if kind == "single" else SB3VecEnv(make_vec(**masked))
    assert is_masking_supported(env)
    agent = contrib.MaskablePPO("MlpPolicy", env, gamma=1.0, n_steps=16, batch_size=16, n_epochs=2, seed=0)
    agent.learn(64)
    reward, _ = evaluate_masked(agent, env, n_eval_episodes=8, warn=False)
    assert np.isfinite(reward)
    env.reset()
    expected = env.unwrapped.action_masks() if kind == "single" else env.action_masks()
    assert data_equivalence(np.squeeze(get_action_masks(env)), np.squeeze(expected))
    assert not get_action_masks(make_masked_after(env, kind)).all()


def make_masked_after(env, kind):
    """Step until some action is masked."""
    for _ in range(20):
        masks = np.atleast_2d(env.unwrapped.action_masks() if kind == "single" else env.action_masks())
        if not masks.all():
            break
        if kind == "single" and env.step(0)[2]:
            env.reset()
        elif kind == "vector":
            env.step(np.zeros(len(masks), np.int64))
    return env


# --- TorchRL


@pytest.mark.slow
def test_torchrl_accepts_the_specs_and_samples_under_the_mask():
    pytest.importorskip("torchrl", reason="TorchRL is not installed")
    from torchrl.envs import GymEnv, TransformedEnv, check_env_specs
    from torchrl.envs.transforms import ActionMask

    def torchrl_env(**settings):
        return GymEnv("TextGen-v0", model=letters(), categorical_action_encoding=True, **{**TOY, **settings})

    check_env_specs(torchrl_env(on_illegal="last_legal"))
    masked = TransformedEnv(torchrl_env(top_p=0.65), ActionMask())  # on_illegal="raise": a slip would end the test
    steps = masked.rollout(60, break_when_any_done=False)
    taken = steps["action_mask"].bool().gather(-1, steps["action"].unsqueeze(-1))
    assert taken.all()
    assert not steps["action_mask"].bool().all()


# --- Stable-Baselines3's agents, as they are


def vanilla(name):
    """The class, and settings that learn a bandit in a thousand steps."""
    if name in ("QRDQN", "MaskablePPO"):
        kind = getattr(pytest.importorskip("sb3_contrib", reason="sb3-contrib is not installed"), name)
    else:
        kind = {"DQN": DQN, "PPO": PPO}[name]
    if name.endswith("DQN"):
        few = {"policy_kwargs": {"n_quantiles": 10}} if name == "QRDQN" else {"policy_kwargs": {}}
        own = few | {"learning_starts": 64, "buffer_size": 2_000, "target_update_interval": 64, "gradient_steps": 2}
        return kind, {**own, "learning_rate": 3e-3, "train_freq": 1, "exploration_fraction": 0.5, "batch_size": 64}
    return kind, {"policy_kwargs": {}, "n_steps": 16, "batch_size": 64, "n_epochs": 4, "learning_rate": 1e-2}


@pytest.mark.slow
@pytest.mark.parametrize("name", ["DQN", "QRDQN", "PPO", "MaskablePPO"])
@pytest.mark.parametrize("features", ["extractor", "hidden"])
def test_vanilla_agents_learn_what_the_language_model_seldom_writes(name, features):
    """The token with probability 0.1 is worth 0.5 each of two times: the language model earns 0.1."""
    model = TableModel(["a", "b", "c"], [0.6, 0.3, 0.1], end=None)
    env = SB3VecEnv(
        make_vec(
            8,
            model=model,
            prompts=["a", "b"],
            reward=lambda text: text.count("c") / 2,
            top_k=3,
            max_new_tokens=2,
            observation="full" if features == "extractor" else "hidden",
        )
    )
    kind, settings = vanilla(name)
    if features == "extractor":
        settings["policy_kwargs"]["features_extractor_class"] = PrunedTransformerExtractor
    policy = "MultiInputPolicy" if features == "extractor" else "MlpPolicy"
    agent = kind(policy, env, gamma=1.0, seed=0, **settings)
    agent.learn(1_000)
    mean, _ = evaluate_policy(agent, env, n_eval_episodes=16, deterministic=True)
    assert mean > 0.9


@pytest.mark.slow
def test_the_cleanrl_example_learns(tiny_lm, tmp_path, monkeypatch):
    for part in tiny_lm:
        part.save_pretrained(tmp_path / "model")
    sizes = "--steps 6000 --envs 16 --top-k 4 --max-new-tokens 4 --target-every 50 --learning-rate 2e-3"
    arguments = f"--model {tmp_path / 'model'} {sizes}"
    monkeypatch.setattr(sys, "argv", ["cleanrl_dqn.py", *arguments.split()])
    course = runpy.run_path(str(ROOT / "examples" / "cleanrl_dqn.py"))["main"]()
    assert course[-1] > course[0] + 0.2
