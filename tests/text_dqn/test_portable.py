"""Agents as files: what comes back is the same, and nothing that is read can run code."""

from __future__ import annotations

import base64
import copy
import io
import json
import os
import pickle
import zipfile

import cloudpickle
import gymnasium as gym
import numpy as np
import pytest
import torch
from safetensors.torch import load_file
from stable_baselines3 import DQN
from stable_baselines3.common.save_util import load_from_zip_file
from stable_baselines3.common.utils import LinearSchedule
from toys import PROMPTS, Worth, letters

from agents.pruning.healing import distil
from agents.sb3_vec import SB3VecEnv
from agents.text_dqn.agent import TextDQN
from agents.text_dqn.networks import NEEDED_KEYS
from agents.text_dqn.policy import CandidatePolicy
from textgen_env.errors import ConfigError, ModelError, TextGenError

SCORES = ("score", "candidate_scores")


def make(keys=NEEDED_KEYS, **settings):
    settings = {"model": letters(), "prompts": PROMPTS, "reward": Worth(), "top_k": 4, "max_new_tokens": 4} | settings
    return gym.make_vec("TextGen-v0", num_envs=8, observation=keys, **settings)


def agent_in(env, **settings) -> TextDQN:
    return TextDQN(
        "CandidatePolicy",
        env,
        **({"learning_starts": 0, "steps_per_update": 16, "buffer_size": 800, "seed": 3} | settings),
    )


@pytest.fixture(scope="module")
def agent():
    return agent_in(make(), beta=0.3).learn(400)


def weights(agent):
    return {name: tensor.numpy() for name, tensor in agent.policy.state_dict().items()}


def assert_same_weights(first, second):
    assert weights(first).keys() == weights(second).keys()
    for name, tensor in weights(first).items():
        np.testing.assert_array_equal(tensor, weights(second)[name])


# --- the zip


@pytest.mark.slow
def test_a_loaded_agent_goes_on_exactly_as_the_saved_one(agent, tmp_path):
    agent.save(tmp_path / "agent")
    agent.save_replay_buffer(tmp_path / "replay.safetensors")
    runs = []
    for _ in range(2):
        loaded = TextDQN.load(tmp_path / "agent", env=make())
        loaded.load_replay_buffer(tmp_path / "replay.safetensors")
        assert (loaded.num_timesteps, loaded._n_updates, loaded.beta) == (400, agent._n_updates, 0.3)
        assert_same_weights(agent, loaded)
        assert loaded.learner.rng.bit_generator.state == agent.learner.rng.bit_generator.state
        runs.append(loaded.learn(160, reset_num_timesteps=False))
        assert loaded.num_timesteps == 560
    assert_same_weights(*runs)
    assert not np.array_equal(weights(agent)["q_net._heads.0.mix.bias"], weights(runs[0])["q_net._heads.0.mix.bias"])


def test_the_optimiser_comes_back(agent, tmp_path):
    agent.save(tmp_path / "agent")
    loaded = TextDQN.load(tmp_path / "agent", env=make())
    for old, new in zip(*(a.policy.optimizer.state_dict()["state"].values() for a in (agent, loaded)), strict=True):
        for name in ("step", "exp_avg", "exp_avg_sq"):
            torch.testing.assert_close(old[name], new[name], rtol=0, atol=0)


def test_the_zip_holds_settings_as_json_and_no_pickle(agent, tmp_path):
    agent.save(tmp_path / "agent.zip")
    with zipfile.ZipFile(tmp_path / "agent.zip") as file:
        assert b":serialized:" not in file.read("data")
        settings = json.loads(file.read("data"))
        assert set(file.namelist()) >= {"policy.pth", "policy.optimizer.pth", "_stable_baselines3_version"}
    assert settings["left_out"] == []
    assert (settings["beta"], settings["seed"], settings["counters"]["num_timesteps"]) == (0.3, 3, 400)
    assert not set(settings["policy_kwargs"]) & {"optimizer_class"}


def test_file_objects_exclusions_and_optimisers_work_as_in_sb3(tmp_path):
    kwargs = {"optimizer_class": torch.optim.SGD, "optimizer_kwargs": {"momentum": 0.5}}
    agent = agent_in(make(), policy_kwargs=kwargs)
    file = io.BytesIO()
    agent.save(file, exclude=["seed"])
    file.seek(0)
    loaded = TextDQN.load(file, env=make())
    assert loaded.seed is None
    assert isinstance(loaded.policy.optimizer, torch.optim.SGD)
    assert loaded.policy.optimizer.param_groups[0]["momentum"] == 0.5


def test_what_has_no_plain_form_is_asked_for(tmp_path):
    class Mine(CandidatePolicy):
        pass

    agent_in(make(), learning_rate=LinearSchedule(1e-3, 1e-4, 1.0)).save(tmp_path / "scheduled.zip")
    with pytest.raises(ConfigError, match=r"could not store learning_rate.*custom_objects=\{'learning_rate': \.\.\.\}"):
        TextDQN.load(tmp_path / "scheduled.zip", env=make())
    given = {"learning_rate": LinearSchedule(1e-3, 1e-4, 1.0)}
    assert TextDQN.load(tmp_path / "scheduled.zip", env=make(), custom_objects=given).lr_schedule(0.5) < 1e-3
    TextDQN(Mine, make(), buffer_size=64).save(tmp_path / "mine.zip")
    with pytest.raises(ConfigError, match="could not store policy_class"):
        TextDQN.load(tmp_path / "mine.zip")
    loaded = TextDQN.load(tmp_path / "mine.zip", env=make(), custom_objects={"policy_class": Mine})
    assert isinstance(loaded.policy, Mine)


@pytest.mark.slow
def test_an_agent_of_other_weights_or_another_vocabulary_is_refused(tmp_path, tiny_lm):
    model, tokenizer = tiny_lm
    env = make(model=tiny_lm, prompts=["the film"])
    agent_in(env).save(tmp_path / "agent.zip")
    agent_in(env).save_pretrained(tmp_path / "agent")
    torch.manual_seed(7)
    other = type(model)(model.config).eval()
    for name, wrong in {"another weights": (other, tokenizer), "another vocabulary": letters()}.items():
        for load in (TextDQN.load, TextDQN.from_pretrained):
            with pytest.raises(ModelError, match=f"trained on model 'LlamaForCausalLM' .*has {name}"):
                load(
                    tmp_path / ("agent.zip" if load == TextDQN.load else "agent"), env=make(model=wrong, prompts=["."])
                )
        with pytest.raises(ModelError, match=name):
            TextDQN.from_pretrained(tmp_path / "agent", model=wrong)
    half = make(model=(model, tokenizer), prompts=["the film"], dtype="bfloat16")
    assert TextDQN.load(tmp_path / "agent.zip", env=half).num_timesteps == 0  # precision is no other model


# --- the folder


@pytest.mark.slow
def test_a_folder_gives_the_same_agent_with_or_without_an_environment(tmp_path):
    env = make(keys=NEEDED_KEYS + SCORES)
    agent = agent_in(env, beta=0.4).learn(200)
    agent.save_pretrained(tmp_path)
    observation, _ = env.reset(seed=0)
    expected = agent.probabilities(observation)
    for given in ({"model": letters()}, {"env": env}):
        loaded = TextDQN.from_pretrained(tmp_path, **given)
        np.testing.assert_array_equal(loaded.probabilities(observation), expected)
        assert (loaded.num_timesteps, loaded.task) == (200, agent.task)
    assert loaded.learn(80, reset_num_timesteps=False).num_timesteps == 280
    assert set(load_file(tmp_path / "model.safetensors")) == set(agent.policy.state_dict())


def test_an_agent_that_learned_its_scores_writes_without_the_reward_that_showed_others(tmp_path):
    agent_in(make(keys=NEEDED_KEYS + SCORES), score="learned").save_pretrained(tmp_path)
    loaded = TextDQN.from_pretrained(tmp_path, model=letters())
    found = loaded.write([PROMPTS[0]], particles=2)
    assert np.isnan(found[0].reward)  # nobody knows it: the reward, an object, was not stored


@pytest.mark.slow
def test_the_card_says_what_was_trained_on_what(tmp_path):
    mix = {"length": 1.0, "repetition": -0.5}
    agent_in(make(reward=mix, min_new_tokens=2), beta=0.25).learn(240).save_pretrained(tmp_path)
    card = (tmp_path / "README.md").read_text()
    for said in (
        'base_model: "letters"',
        "letters, 6 tokens; not included",
        '`[["length", 1.0], ["repetition", -0.5]]`',
        "| running scores seen | none |",
        "0.25 reward units a nat",
        "the 4 likeliest tokens",
        "2 to 4 tokens",
        "240 steps (tokens), 15 gradient steps",
        "| prompts | 4 |",
        "| seed | 3 |",
    ):
        assert said in card, said


def test_an_agent_remembers_what_it_learned_on_and_not_where_it_is_used(agent, tmp_path):
    agent.save(tmp_path / "agent")
    loaded = TextDQN.load(tmp_path / "agent", env=make(reward="length", prompts=["a"]))
    assert loaded.task == agent.task
    assert loaded.learn(8).task["reward_name"] == "length"


@pytest.mark.parametrize(
    "damage", ["no folder", "no weights", "bad json", "other json", "bad space", "bad rng", "pickle"]
)
def test_a_damaged_folder_is_refused(agent, tmp_path, damage):
    folder = tmp_path / "agent"
    agent.save_pretrained(folder)
    settings = json.loads((folder / "agent.json").read_text())
    learner = settings["counters"]["learner"] | {"rng": {"bit_generator": "PCG64", "state": 3}}
    bad_rng = settings["counters"] | {"learner": learner}
    changed = {
        "bad json": "{",
        "other json": "[1]",
        "bad space": json.dumps(settings | {"observation_space": {"hidden": {"low": 0}}}),
        "bad rng": json.dumps(settings | {"counters": bad_rng}),
    }
    if damage == "no folder":
        folder = tmp_path / "nowhere"
    elif damage == "no weights":
        (folder / "model.safetensors").unlink()
    elif damage == "pickle":
        (folder / "model.safetensors").write_bytes(pickle.dumps({"q_net": 1}))
    else:
        (folder / "agent.json").write_text(changed[damage])
    with pytest.raises(ConfigError, match=r"holds no agent|are damaged"):
        TextDQN.from_pretrained(folder, model=letters())


# --- files of others


class Bomb:
    """Unpickled, it makes a folder."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


@pytest.fixture
def bomb(tmp_path):
    """A pickle that runs code, shown to do so, and the place where that would be seen."""
    pickle.loads(pickle.dumps(Bomb(tmp_path / "tried")))
    assert (tmp_path / "tried").is_dir()
    return Bomb(tmp_path / "exploded")


def replaced(path, changes):
    """Rewrite entries of a zip."""
    with zipfile.ZipFile(path) as file:
        entries = {name: file.read(name) for name in file.namelist()}
    with zipfile.ZipFile(path, "w") as file:
        for name, content in (entries | changes).items():
            file.writestr(name, content)


@pytest.mark.parametrize("entry", ["observation_space", "policy_class", "lr_schedule", "_last_obs", "anything"])
def test_security_a_pickle_planted_in_a_zip_does_not_run(agent, tmp_path, bomb, entry):
    path = tmp_path / "agent.zip"
    agent.save(path)
    with zipfile.ZipFile(path) as file:
        settings = json.loads(file.read("data"))
    planted = {":type:": "dict", ":serialized:": base64.b64encode(cloudpickle.dumps(bomb)).decode()}
    replaced(path, {"data": json.dumps(settings | {entry: planted})})
    with pytest.raises(ConfigError, match=f"pickled entries \\({entry}\\)"):
        TextDQN.load(path, env=make())
    assert not (tmp_path / "exploded").exists()
    load_from_zip_file(path)  # what SB3 would have done: the trap is a real one
    assert (tmp_path / "exploded").exists()


@pytest.mark.parametrize("name", ["policy.pth", "policy.optimizer.pth", "pytorch_variables.pth"])
def test_security_a_pickle_planted_as_weights_does_not_run(agent, tmp_path, bomb, name):
    path = tmp_path / "agent.zip"
    agent.save(path)
    weights = io.BytesIO()
    torch.save({"weight": bomb}, weights)
    replaced(path, {name: weights.getvalue()})
    with pytest.raises(ConfigError, match="Weights only load failed"):
        TextDQN.load(path, env=make())
    assert not (tmp_path / "exploded").exists()


def test_security_a_zip_of_another_agent_is_not_unpickled(tmp_path):
    DQN("MultiInputPolicy", SB3VecEnv(make()), buffer_size=64).save(tmp_path / "dqn.zip")
    with pytest.raises(ConfigError, match="holds no agent that TextDQN"):
        TextDQN.load(tmp_path / "dqn.zip", env=make())
    (tmp_path / "text.zip").write_text("no zip")
    with pytest.raises(ConfigError, match="is no zip of an agent"):
        TextDQN.load(tmp_path / "text.zip", env=make())


def test_security_a_pickled_replay_does_not_run(agent, tmp_path, bomb):
    path = tmp_path / "replay"
    path.write_bytes(pickle.dumps(bomb))
    with pytest.raises(ConfigError, match="no replay file"):
        agent_in(make()).load_replay_buffer(path)
    assert not (tmp_path / "exploded").exists()


def test_security_a_pickled_checkpoint_of_healing_does_not_run(tmp_path, bomb, tiny_lm):
    model, tokenizer = copy.deepcopy(tiny_lm)
    rows = torch.zeros((4, 8), dtype=torch.long)
    distil(model, model, rows, 1, tokenizer=tokenizer, length=8, folder=tmp_path, checkpoint_every=1, progress=False)
    (checkpoint,) = (path for path in tmp_path.iterdir() if path.is_file())
    torch.save(bomb, checkpoint)
    with pytest.raises((TextGenError, pickle.UnpicklingError)):
        distil(
            model, model, rows, 1, tokenizer=tokenizer, length=8, folder=tmp_path, checkpoint_every=1, progress=False
        )
    assert not (tmp_path / "exploded").exists()
