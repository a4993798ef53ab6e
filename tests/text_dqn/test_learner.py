"""The learner by itself, over several runs of ``learn``, and where it diverges."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from stable_baselines3.common.vec_env import VecNormalize
from toys import PROMPTS, Worth, letters

from agents.sb3_vec import SB3VecEnv
from agents.text_dqn.agent import TextDQN
from agents.text_dqn.networks import NEEDED_KEYS
from agents.text_dqn.settings import COUNTERS, SETTINGS
from textgen_env.errors import ConfigError, DivergenceError, RewardError

EXAMPLES = Path(__file__).parents[2] / "examples"


def make(num_envs=8, **settings):
    settings = {"model": letters(), "prompts": PROMPTS, "reward": Worth(), "top_k": 4, "max_new_tokens": 4} | settings
    return gym.make_vec("textgen_env:TextGen-v0", num_envs=num_envs, observation=NEEDED_KEYS, **settings)


def agent_in(env, **settings):
    defaults = {"learning_starts": 40, "steps_per_update": 10, "buffer_size": 2_000, "seed": 0}
    return TextDQN("CandidatePolicy", env, **(defaults | settings))


@pytest.mark.slow
def test_the_learner_learns_in_a_loop_of_one_s_own_without_stable_baselines3():
    program = (
        f"import sys; sys.modules['stable_baselines3'] = None; sys.path.insert(0, {str(EXAMPLES)!r})\n"
        "import learner; print(len(learner.main(1_600)))"
    )
    run = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
    assert run.stdout.splitlines()[-1:] == ["10"], run.stderr


def test_returns_are_carried_back_less_far_where_learned_scores_explain_the_reward():
    learner = agent_in(make(), trace_lambda=0.9).learner
    for held_out, carried in ((0.0, 0.9), (-0.2, 0.9), (0.2, 0.72), (0.9, 0.63)):
        learner.scorer_r2 = held_out
        now = learner.objective_now
        assert now.trace_lambda == pytest.approx(carried)
        assert (now.beta, now.gamma) == (learner.objective.beta, learner.objective.gamma)


@pytest.mark.slow
@pytest.mark.parametrize("reset", [True, False])
def test_updates_are_owed_for_every_step_of_every_learn(reset):
    agent = agent_in(make(), unjudged=0.0)
    for steps in (160, 320, 480):
        before = [weight.clone() for weight in agent.q_net.parameters()]
        agent.learn(160, reset_num_timesteps=reset)
        assert agent.num_timesteps == (160 if reset else steps)
        assert agent.learner.updates == agent.learner.steps // 10 == steps // 10
        assert not all(torch.equal(a, b) for a, b in zip(before, agent.q_net.parameters(), strict=True))


@pytest.mark.slow
def test_a_loaded_agent_learns_on(tmp_path):
    agent = agent_in(make()).learn(160)
    agent.save(tmp_path / "agent")
    agent.save_pretrained(tmp_path / "folder")
    for loaded in (
        TextDQN.load(tmp_path / "agent", env=make()),
        TextDQN.from_pretrained(tmp_path / "folder", env=make(num_envs=4)),
    ):
        assert loaded.learner.updates == 16
        loaded.learn(80)
        assert loaded.learner.updates == 24


@pytest.mark.slow
@pytest.mark.parametrize("settings", [{"learning_rate": 1e30}, {"beta": 1e-300, "target_beta": 0.1}])
def test_a_training_that_diverges_is_a_named_error_and_the_acting_network_stays_finite(settings):
    agent = agent_in(make(), **settings)
    with pytest.raises(DivergenceError, match="not finite"):
        agent.learn(2_000)
    assert all(bool(torch.isfinite(weight).all()) for weight in agent.q_net_target.parameters())


def test_a_reward_that_leaves_float32_is_refused_with_its_number():
    with pytest.raises(RewardError, match=r"answered 1e\+39 .* within 1e\+30"):
        agent_in(make(reward=lambda text: 1e39)).learn(100)


def test_weights_that_are_not_finite_are_refused_when_they_are_read(tmp_path):
    agent_in(make()).save_pretrained(tmp_path)
    weights = load_file(tmp_path / "model.safetensors")
    weights["q_net._heads.0.mix.bias"][3] = torch.nan
    save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(ConfigError, match=r"'q_net\._heads\.0\.mix\.bias' are not all finite"):
        TextDQN.from_pretrained(tmp_path, model=letters())


@pytest.mark.slow
def test_normalised_rewards_stay_out_of_the_replay_and_normalised_observations_are_refused():
    env = VecNormalize(SB3VecEnv(make(reward=lambda text: 100.0, min_new_tokens=4)), norm_obs=False, gamma=1.0)
    agent = agent_in(env).learn(400)
    batch = agent.replay_buffer.sample(8)
    assert (batch.rewards[batch.ended].numpy() == 100.0).all()
    with pytest.raises(ConfigError, match="norm_obs=False"):
        agent_in(VecNormalize(SB3VecEnv(make()))).learn(40)


@pytest.mark.slow
def test_torch_s_default_dtype_changes_nothing():
    expected = agent_in(make()).learn(200).q_net.state_dict()
    torch.set_default_dtype(torch.float64)
    try:
        found = agent_in(make()).learn(200).q_net.state_dict()
    finally:
        torch.set_default_dtype(torch.float32)
    assert {name: value.dtype for name, value in found.items()} == {n: v.dtype for n, v in expected.items()}


@pytest.fixture(scope="module")
def stored_agent(tmp_path_factory):
    """The folder of an agent that has learned nothing."""
    folder = tmp_path_factory.mktemp("agents") / "stored"
    agent_in(make()).save_pretrained(folder)
    return folder


@pytest.mark.parametrize("name", sorted(SETTINGS.keys() | COUNTERS.keys()))
@pytest.mark.parametrize("value", [-1.5e89, 1e89, "x", True, float("nan"), [1]])
def test_a_stored_number_out_of_range_is_refused(stored_agent, tmp_path, name, value):
    shutil.copytree(stored_agent, tmp_path, dirs_exist_ok=True)
    stored = json.loads((tmp_path / "agent.json").read_text())
    where = stored["counters"] if name in COUNTERS else stored
    where[name] = value
    (tmp_path / "agent.json").write_text(json.dumps(stored))
    unbounded = isinstance(value, float) and value == 1e89 and not np.isfinite((SETTINGS | COUNTERS)[name].high)
    if unbounded:
        pytest.skip("any positive number is allowed")
    with pytest.raises(ConfigError, match=name):
        TextDQN.from_pretrained(tmp_path, model=letters())


def test_a_stored_folder_to_write_to_is_passed_over(tmp_path):
    agent_in(make()).save_pretrained(tmp_path / "agent")
    path = tmp_path / "agent" / "agent.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"tensorboard_log": str(tmp_path / "elsewhere")}))
    TextDQN.from_pretrained(tmp_path / "agent", env=make()).learn(40)
    assert not (tmp_path / "elsewhere").exists()
